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

from deepwright_core import chat
from deepwright_core import tokenizer as tokenizer_package
from deepwright_core.errors import RequestError
from deepwright_core.registry import Registry
from deepwright_core.tokenizer import Conventions, StreamDecoder, Tokenizer
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


def test_special_tokens_are_ids_at_the_front_and_count_only_when_allowed() -> None:
    text = "".join(SPECIAL_TOKENS)
    assert TOKENIZER.encode(text, allow_special=True) == list(range(14)) == list(TOKENIZER.marks.values())
    assert [TOKENIZER.bos_id, TOKENIZER.eos_id, TOKENIZER.pad_id] == [0, 1, 2]
    assert [TOKENIZER.user_id, TOKENIZER.assistant_id] == [3, 4]
    assert [TOKENIZER.think_start_id, TOKENIZER.think_end_id] == [5, 6]
    assert (TOKENIZER.begin_ids, TOKENIZER.end_ids) == ((0,), {1})
    assert TOKENIZER.decode(range(14)) == ""
    assert TOKENIZER.decode(range(14), skip_special=False) == text


def test_digits_stand_alone_wherever_they_are() -> None:
    for text in ("357", " 357", "a357b", "3.57", "٣57"):
        for i in TOKENIZER.encode(text):
            piece = TOKENIZER.decode([i])
            assert len(piece) == 1 or not any(character.isdigit() for character in piece), (text, piece)
    assert TOKENIZER.encode("x = 357")[-3:] == TOKENIZER.encode("357")


def test_deepseek_v3_cuts_numbers_in_threes_and_words_from_punctuation() -> None:
    tokenizer = build(vocab_size=2000, pre_tokenizer="deepseek_v3", min_frequency=1)
    cut = tokenizer._plain.pre_tokenizer.pre_tokenize_str

    def parts(text: str) -> list[str]:
        return [text[start:end] for _, (start, end) in cut(text)]

    assert parts("12345 is٣4") == ["123", "45", " is", "٣4"]
    assert parts("漢字かなABC、。") == ["漢字かな", "ABC", "、。"]
    assert parts("don't f(x)==-y;\n\n  z") == ["don", "'t", " f", "(x", ")==-", "y", ";\n\n", " ", " z"]
    assert parts("a  b\r\n\tc ~~") == ["a", " ", " b", "\r\n", "\tc", " ~~"]
    assert all(len(tokenizer.decode([i]).strip()) <= 3 for i in tokenizer.encode("357 4680 123456"))
    assert tokenizer.encode("345") != TOKENIZER.encode("345")
    for text in TEXT[:4]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


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


def test_training_repeats_in_other_processes_with_other_threads() -> None:
    program = (
        "import hashlib, sys\n"
        "from deepwright_core.tokenizer.bpe import BpeConfig, train\n"
        "texts = [f'{a}{b} {b}{a} {a}{a}{c}' for a in 'abcdefgh' for b in 'ijklmnop' for c in 'qrst']\n"
        "tokenizer = train(BpeConfig(vocab_size=500), texts)\n"
        "sys.stdout.write(hashlib.sha256(tokenizer.source.encode()).hexdigest())\n"
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


def foreign(directory: Path, **config: object) -> int:
    """Write a small byte-level tokenizer that knows nothing of the chat form; returns its size."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator(TEXT, trainer)
    directory.mkdir(parents=True, exist_ok=True)
    library.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return library.get_vocab_size()


def test_a_loaded_tokenizer_is_what_its_file_says(tmp_path: Path) -> None:
    size = foreign(tmp_path, eos_token={"content": "<|end|>"}, bos_token="<absent>", model_max_length=77)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 7]}))
    ours = Tokenizer.load(tmp_path)
    assert (ours.vocab_size, ours.marks, ours.special_ids) == (size, {"eos": 0}, {0})
    assert (ours.bos_id, ours.pad_id, ours.user_id, ours.think_start_id) == (None, None, None, None)
    assert (ours.begin_ids, ours.end_ids, ours.filler_id) == ((), {0, 7}, 0)
    assert 0 not in ours.encode("<|end|>") and ours.encode("<|end|>", allow_special=True) == [0]
    assert not ours.chats
    ours.save(tmp_path / "saved")
    again = Tokenizer.load(tmp_path / "saved")
    assert (tmp_path / "saved" / "tokenizer.json").read_text() == (tmp_path / "tokenizer.json").read_text()
    assert again.conventions == ours.conventions and again.end_ids == ours.end_ids
    assert not (tmp_path / "saved" / "chat_template.jinja").exists()


def test_without_the_marks_the_chat_form_is_refused_and_the_rest_works(tmp_path: Path) -> None:
    foreign(tmp_path, eos_token="<|end|>")
    ours = Tokenizer.load(tmp_path)
    question = [{"role": "user", "content": "x"}]
    with pytest.raises(RequestError, match="has no <｜begin▁of▁sentence｜>, <｜User｜>, <｜Assistant｜>, which"):
        ours.chat(question)
    with pytest.raises(RequestError, match="tokenizer=file, which adds such tokens"):
        chat.encode_with_mask(ours, question)
    with pytest.raises(RequestError, match="<｜User｜>"):
        ours.mark_id("user")
    ids = ours.encode("<think>so</think>4")
    assert chat.parse_reply(ours, [*ids, 0]) == chat.Reply(None, "<think>so</think>4", True)
    assert not chat.opens_thinking(ours, ids)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}{{ eos_token }}")
    own = Tokenizer.load(tmp_path)
    assert own.chats and own.chat(question) == [*own.encode("x"), 0]
    with pytest.raises(RequestError, match=r"with_chat_form\(\)"):
        chat.encode_with_mask(own, question)
    own.save(tmp_path / "saved")
    assert Tokenizer.load(tmp_path / "saved").chat(question) == own.chat(question)


def test_a_file_may_name_a_template_for_tools(tmp_path: Path) -> None:
    templates = {"default": "plain", "tool_use": "tools", "rag": "documents"}
    foreign(tmp_path, chat_template=[{"name": name, "template": text} for name, text in templates.items()])
    ours = Tokenizer.load(tmp_path)
    assert (ours.conventions.template, ours.conventions.tool_template) == ("plain", "tools")
    ours.save(tmp_path / "saved")
    assert Tokenizer.load(tmp_path / "saved").conventions == ours.conventions
    assert ours.with_chat_form().conventions.tool_template is None


def test_merges_do_not_make_a_special_token() -> None:
    import tokenizers
    from tokenizers import models

    vocabulary = {"<": 0, "s": 1, ">": 2, "<s": 3, "<s>": 4, "<s><s>": 5}
    merges = [("<", "s"), ("<s", ">"), ("<s>", "<s>")]
    library = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    ours = Tokenizer(library.to_str(), Conventions(names={"bos_token": "<s>"}))
    assert ours.encode("<s><s>") == [3, 2, 3, 2]
    assert ours.encode("<s>", allow_special=True) == [ours.bos_id] == [4]


def test_tools_need_their_marks(tmp_path: Path) -> None:
    document = json.loads(TOKENIZER.source)
    document["added_tokens"] = [t for t in document["added_tokens"] if "tool" not in t["content"]]
    document["model"]["vocab"] = {t: i for t, i in document["model"]["vocab"].items() if "tool▁" not in t}
    ours = Tokenizer(json.dumps(document))
    asked = [{"role": "user", "content": "x"}]
    called = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    assert ours.chats and len(ours.marks) == 7
    assert ours.chat(asked) == TOKENIZER.chat(asked)
    with pytest.raises(RequestError, match=r"has no <｜tool▁calls▁begin｜>, .*<｜tool▁calls▁end｜"):
        ours.chat([*asked, called])


def test_the_file_tokenizer_keeps_its_names_and_gets_what_it_lacks(tmp_path: Path) -> None:
    size = foreign(tmp_path, eos_token={"content": "<|end|>"})
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    ours = build(name="file", path=str(tmp_path))
    before = Tokenizer.load(tmp_path)
    assert ours.eos_id == 0
    assert ours.vocab_size == size + 13
    assert ours.encode("<|end|> a") == before.encode("<|end|> a")
    assert 0 not in ours.encode("<|end|>")
    assert ours.decode(ours.encode(TEXT[3])) == TEXT[3]
    assert ours.extends(before) and not before.extends(ours) and not ours.extends(TOKENIZER)
    conversation = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "reasoning_content": "z"}]
    ids, _ = chat.encode_with_mask(ours, conversation)
    assert ours.decode(ids, skip_special=False) == (
        "<｜begin▁of▁sentence｜><｜User｜>x<｜Assistant｜><think>z</think>y<|end|>"
    )
    ours.save(tmp_path / "saved")
    again = Tokenizer.load(tmp_path / "saved")
    assert (again.marks, again.vocab_size, again.conventions) == (ours.marks, ours.vocab_size, ours.conventions)
    assert again.with_chat_form().source == again.source


def test_a_vocabulary_that_could_match_a_special_token_does_not() -> None:
    """Unigram matches whatever its vocabulary has, added token or not; a lone character stays one."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((c, -5.0) for c in "▁a!s</>"), ("▁a", -2.5)]
    library = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0))
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Metaspace()
    assert library.encode("a</s>").tokens == ["▁a", "</s>"]
    names = {"eos_token": "</s>", "pad_token": "!"}
    ours = Tokenizer(library.to_str(), Conventions(names=names))
    ids = ours.encode("a</s>!")
    assert ours.eos_id == 1 and 1 not in ids
    assert ours.decode(ids) == "a</s>!"
    assert ours.encode("a</s>", allow_special=True) == library.encode("a</s>").ids


def test_refusals_are_sentences(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"tokenizer\.json does not exist"):
        Tokenizer.load(tmp_path)
    for content in ("{", "[]", '{"model": 3}', '{"model": {"type": "BPE"}}', '{"model": {"type": "Odd", "vocab": {}}}'):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(RequestError, match=r"/tokenizer\.json is not a tokenizer"):
            Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(b"\xff{")
    with pytest.raises(RequestError, match="cannot be read"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text(TOKENIZER.source)
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": 3}')
    (tmp_path / "special_tokens_map.json").write_text("[]")
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(RequestError) as caught:
        Tokenizer.load(tmp_path)
    assert [Path(problem.split()[0].rstrip(":")).name for problem in caught.value.problems] == [
        "special_tokens_map.json", "generation_config.json", "tokenizer_config.json",
    ]  # fmt: skip
    with pytest.raises(RequestError, match="vocab_size"):
        build(vocab_size=100)
    registry = Registry()
    tokenizer_package.register(registry)
    with pytest.raises(RequestError, match="training split is empty"):
        registry.build("tokenizer", {"name": "bpe"}, [])
