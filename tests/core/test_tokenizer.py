"""The tokenizer: texts survive, digits stand alone, nobody writes special tokens, training repeats."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepwright_core import tokenizer as tokenizer_package
from deepwright_core.errors import RequestError
from deepwright_core.registry import Registry
from deepwright_core.tokenizer import StreamDecoder, Tokenizer
from deepwright_core.tokenizer.special import SPECIAL_TOKENS

TEXT = [
    "The quick brown fox jumps over the lazy dog, 12 times or 345 times.",
    "def add(a, b):\n    return a + b  # the sum of a and b\n",
    "State the final answer to the following arithmetic problem: 357 + 468 =",
    "Grüße aus Köln; 漢字 and emoji 🙂🙃 too.",
] * 8


def build(vocab_size: int = 400, name: str = "bpe", **config: object) -> Tokenizer:
    registry = Registry()
    tokenizer_package.register(registry)
    values = {"vocab_size": vocab_size} if name == "bpe" else {}
    return registry.build("tokenizer", {"name": name, **values, **config}, TEXT)


TOKENIZER = build()
ANY_TEXT = st.text(max_size=60) | st.lists(st.sampled_from([*SPECIAL_TOKENS, "a", " 12", "é", "\n"])).map("".join)


@given(ANY_TEXT)
@settings(max_examples=200, deadline=None)
def test_every_text_comes_back_and_holds_no_special_token(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert not TOKENIZER.special_ids.intersection(ids)
    assert TOKENIZER.encode_batch([text]) == [ids]


def test_special_tokens_are_seven_ids_at_the_front_and_count_only_when_allowed() -> None:
    text = "".join(SPECIAL_TOKENS)
    assert TOKENIZER.encode(text, allow_special=True) == list(range(7))
    assert [TOKENIZER.bos_id, TOKENIZER.eos_id, TOKENIZER.pad_id] == [0, 1, 2]
    assert [TOKENIZER.user_id, TOKENIZER.assistant_id] == [3, 4]
    assert [TOKENIZER.think_start_id, TOKENIZER.think_end_id] == [5, 6]
    assert TOKENIZER.decode(range(7)) == ""
    assert TOKENIZER.decode(range(7), skip_special=False) == text


def test_digits_stand_alone_wherever_they_are() -> None:
    for text in ("357", " 357", "a357b", "3.57", "٣57"):
        for i in TOKENIZER.encode(text):
            piece = TOKENIZER.decode([i])
            assert len(piece) == 1 or not any(character.isdigit() for character in piece), (text, piece)
    assert TOKENIZER.encode("x = 357")[-3:] == TOKENIZER.encode("357")


def test_ids_beyond_the_tokens_decode_to_nothing() -> None:
    assert TOKENIZER.decode([TOKENIZER.vocab_size, 10**6, -1]) == ""


@given(st.lists(st.integers(0, TOKENIZER.vocab_size - 1), max_size=40))
@settings(max_examples=300, deadline=None)
def test_streaming_any_ids_gives_the_decoded_text(ids: list[int]) -> None:
    decoder = StreamDecoder(TOKENIZER)
    assert "".join([*(decoder.push(i) for i in ids), decoder.flush()]) == TOKENIZER.decode(ids)


@given(st.text(min_size=1, max_size=30))
@settings(max_examples=200, deadline=None)
def test_streaming_text_never_yields_half_a_character(text: str) -> None:
    decoder = StreamDecoder(TOKENIZER)
    yielded = ""
    for i in TOKENIZER.encode(text):
        yielded += decoder.push(i)
        assert text.startswith(yielded)
    assert yielded == text
    assert decoder.flush() == ""


def test_the_stream_decoder_holds_bytes_back_until_the_character_is_whole() -> None:
    ids = TOKENIZER.encode("\U0001f9ff")
    assert len(ids) > 1
    decoder = StreamDecoder(TOKENIZER)
    assert [decoder.push(i) for i in ids] == [""] * (len(ids) - 1) + ["\U0001f9ff"]
    decoder.push(ids[0])
    assert decoder.flush() == "\ufffd"


def test_saved_and_loaded_is_the_same(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    text = "".join(TEXT[:4])
    assert loaded.encode(text) == TOKENIZER.encode(text)
    assert loaded.vocab_size == TOKENIZER.vocab_size
    assert loaded.special_ids == TOKENIZER.special_ids
    loaded.save(tmp_path / "again")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["chat_template"] == (tmp_path / "chat_template.jinja").read_text()


def test_transformers_loads_it_and_agrees(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    TOKENIZER.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    text = "".join(TEXT[:4])
    assert theirs.encode(text, add_special_tokens=False) == TOKENIZER.encode(text)
    assert theirs.encode(text) == [TOKENIZER.bos_id, *TOKENIZER.encode(text)]
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 1, 2)
    assert len(theirs) == TOKENIZER.vocab_size
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2 ="}]
    for thinking in ("auto", "enabled", "disabled"):
        ids = theirs.apply_chat_template(messages, add_generation_prompt=True, thinking=thinking, return_dict=False)
        assert list(ids) == TOKENIZER.chat(messages, thinking=thinking)
    # As with DeepSeek-R1's tokenizer, programs that skip special tokens still see where the thinking ends.
    assert theirs.decode([5, *TOKENIZER.encode("a"), 6], skip_special_tokens=True) == "<think>a</think>"


def test_training_repeats_in_other_processes_with_other_threads() -> None:
    program = (
        "import hashlib, sys\n"
        "from deepwright_core.tokenizer.bpe import BpeConfig, train\n"
        "texts = [f'{a}{b} {b}{a} {a}{a}{c}' for a in 'abcdefgh' for b in 'ijklmnop' for c in 'qrst']\n"
        "tokenizer = train(BpeConfig(vocab_size=500), texts)\n"
        "sys.stdout.write(hashlib.sha256(tokenizer._marked.to_str().encode()).hexdigest())\n"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": threads},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed, threads in (("0", "1"), ("1", "2"), ("2", "4"))
    }
    assert len(digests) == 1 and len(digests.pop()) == 64


def test_an_existing_tokenizer_keeps_its_names_and_gets_what_it_lacks(tmp_path: Path) -> None:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    foreign = tokenizers.Tokenizer(models.BPE())
    foreign.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    foreign.decoder = decoders.ByteLevel()
    foreign.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["<|end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    size = foreign.get_vocab_size()
    foreign.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|end|>"}}))
    ours = build(name="file", path=str(tmp_path))
    assert ours.eos_id == 0
    assert ours.vocab_size == size + 6
    assert ours.encode("<|end|> a") == Tokenizer.load(tmp_path).encode("<|end|> a")
    assert 0 not in ours.encode("<|end|>")
    assert ours.decode(ours.encode(TEXT[3])) == TEXT[3]
    ours.save(tmp_path / "saved")
    again = Tokenizer.load(tmp_path / "saved")
    assert (again.eos_id, again.bos_id, again.vocab_size) == (ours.eos_id, ours.bos_id, ours.vocab_size)


def test_refusals_are_sentences(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"tokenizer\.json does not exist"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(RequestError, match="is not a tokenizer"):
        Tokenizer.load(tmp_path)
    with pytest.raises(RequestError, match="vocab_size"):
        build(vocab_size=100)
    registry = Registry()
    tokenizer_package.register(registry)
    with pytest.raises(RequestError, match="training split is empty"):
        registry.build("tokenizer", {"name": "bpe"}, [])
