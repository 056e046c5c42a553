"""The seven special tokens, in DeepSeek's spelling. Their order is their id in a tokenizer trained here."""

from __future__ import annotations

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
PAD = "<｜▁pad▁｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
THINK_START = "<think>"
THINK_END = "</think>"

SPECIAL_TOKENS = (BOS, EOS, PAD, USER, ASSISTANT, THINK_START, THINK_END)

# As in DeepSeek-R1's own tokenizer.json, the two marks of thinking are not `special` there: other programs that
# decode with skip_special_tokens still show where the thinking ends.
CONTROL_TOKENS = (BOS, EOS, PAD, USER, ASSISTANT)
