"""The special tokens of the chat form, in DeepSeek's spelling. Their order is their id in a tokenizer trained here."""

from __future__ import annotations

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
PAD = "<｜▁pad▁｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
THINK_START = "<think>"
THINK_END = "</think>"
TOOL_CALLS_BEGIN = "<｜tool▁calls▁begin｜>"
TOOL_CALLS_END = "<｜tool▁calls▁end｜>"
TOOL_CALL_BEGIN = "<｜tool▁call▁begin｜>"
TOOL_CALL_END = "<｜tool▁call▁end｜>"
TOOL_SEP = "<｜tool▁sep｜>"
TOOL_OUTPUT_BEGIN = "<｜tool▁output▁begin｜>"
TOOL_OUTPUT_END = "<｜tool▁output▁end｜>"

# What each is for -> how it is spelt. A tokenizer may spell the first three in its own way.
MARKS = {
    "bos": BOS,
    "eos": EOS,
    "pad": PAD,
    "user": USER,
    "assistant": ASSISTANT,
    "think_start": THINK_START,
    "think_end": THINK_END,
    "tool_calls_begin": TOOL_CALLS_BEGIN,
    "tool_calls_end": TOOL_CALLS_END,
    "tool_call_begin": TOOL_CALL_BEGIN,
    "tool_call_end": TOOL_CALL_END,
    "tool_sep": TOOL_SEP,
    "tool_output_begin": TOOL_OUTPUT_BEGIN,
    "tool_output_end": TOOL_OUTPUT_END,
}
SPECIAL_TOKENS = tuple(MARKS.values())

# As in DeepSeek's own tokenizer.json, the marks of thinking and of tools are not `special` there: other programs that
# decode with skip_special_tokens still see where the thinking ends and what is called.
CONTROL_TOKENS = (BOS, EOS, PAD, USER, ASSISTANT)
