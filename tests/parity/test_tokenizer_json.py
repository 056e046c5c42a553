"""Any tokenizer.json: the same ids and the same text as the tokenizers library and transformers, whole and streamed."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from deepwright_core.errors import RequestError
from deepwright_core.tokenizer import StreamDecoder, Tokenizer

from .tokenizer_kinds import KINDS, TEXTS, write

ALL = pytest.mark.parametrize("kind", KINDS)
ANY_TEXT = st.text(max_size=30) | st.lists(st.sampled_from(["a", "ab ", " the", "\n\n", "  ", "12", "é", "漢"])).map(
    "".join
)


@cache
def made(kind: str) -> tuple[tokenizers.Tokenizer, Tokenizer, Any]:
    """The library's tokenizer, ours of the same directory, and transformers' of the directory that ours saved."""
    directory = Path(mkdtemp())
    library = write(kind, directory)
    ours = Tokenizer.load(directory)
    ours.save(directory / "saved")
    assert (directory / "saved" / "tokenizer.json").read_bytes() == (directory / "tokenizer.json").read_bytes()
    return library, ours, AutoTokenizer.from_pretrained(str(directory / "saved"))


@ALL
@given(text=ANY_TEXT | st.sampled_from(TEXTS))
@settings(max_examples=60, deadline=None)
def test_texts_get_the_librarys_ids(kind: str, text: str) -> None:
    library, ours, theirs = made(kind)
    ids = ours.encode(text)
    assert ids == library.encode(text, add_special_tokens=False).ids
    assert ids == theirs.encode(text, add_special_tokens=False)
    assert ours.encode_batch([text, text]) == [ids, ids]


@ALL
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_ids_get_the_librarys_text_whole_and_streamed(kind: str, data: st.DataObject) -> None:
    library, ours, theirs = made(kind)
    known = sorted(library.get_vocab(with_added_tokens=True).values())
    ids = data.draw(st.lists(st.sampled_from(known), max_size=20))
    text = ours.decode(ids, skip_special=False)
    assert text == library.decode(ids, skip_special_tokens=False)
    assert text == theirs.decode(ids, skip_special_tokens=False)
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    for skip in (False, True):
        decoder = StreamDecoder(ours, skip_special=skip)
        pieces = [*map(decoder.push, ids), decoder.flush()]
        assert "".join(pieces) == ours.decode(ids, skip_special=skip)


@ALL
@pytest.mark.parametrize("text", TEXTS[:4])
def test_texts_stream_as_they_come(kind: str, text: str) -> None:
    _, ours, _ = made(kind)
    ids = ours.encode(text)
    decoder = StreamDecoder(ours)
    yielded = ""
    for place, i in enumerate(ids, 1):
        yielded += decoder.push(i)
        assert ours.decode(ids).startswith(yielded)
        # Only bytes wait for what comes next, as far as they go.
        if kind in ("unigram", "word_piece", "word_level", "end_of_word"):
            assert yielded == ours.decode(ids[:place])
    assert yielded + decoder.flush() == ours.decode(ids)


@ALL
def test_a_special_token_in_a_text_is_characters(kind: str) -> None:
    library, ours, theirs = made(kind)
    unknown = library.token_to_id(ours.conventions.names.get("unk_token", "<unk>"))
    for token, control in ours.control.items():
        for text in (token, f"a {token} b", f"a{token}{token}"):
            assert control.id not in ours.encode(text) or control.id == unknown
            assert not (ours.special_ids - {unknown}).intersection(ours.encode(text))
            marked = ours.encode(text, allow_special=True)
            assert marked == theirs.encode(text, add_special_tokens=False)
            assert control.id in marked


@ALL
def test_roles_and_sizes_are_the_files(kind: str) -> None:
    library, ours, theirs = made(kind)
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    assert ours.vocab_size == max(library.get_vocab(with_added_tokens=True).values()) + 1
    assert len(theirs) == library.get_vocab_size(with_added_tokens=True)  # nothing was added, on either side
    assert ours.special_ids == set(theirs.all_special_ids) | {
        i for i, token in theirs.added_tokens_decoder.items() if token.special
    }
    with_begin = library.encode("the dog", add_special_tokens=True).ids
    assert tuple(with_begin[: len(ours.begin_ids)]) == ours.begin_ids or kind == "gemma"
    assert ours.begin_ids == {
        "byte_level": (ours.bos_id,),
        "llama": (1,),
        "mistral": (1,),
        "gemma": (2,),  # its tokenizer_config.json says so
        "word_piece": (2,),
    }.get(kind, ())
    assert not ours.chats


@ALL
def test_the_chat_form_can_be_added(kind: str) -> None:
    _, ours, _ = made(kind)
    if kind == "with_holes":
        with pytest.raises(RequestError, match="unused ids"):
            ours.with_chat_form()
        return
    grown = ours.with_chat_form()
    assert grown.chats and grown.extends(ours) and not ours.extends(grown)
    assert all(grown.marks[mark] == i for mark, i in ours.marks.items())
    new = sorted(set(grown.marks.values()) - set(ours.marks.values()))
    assert new == list(range(ours.vocab_size, grown.vocab_size))
    for text in TEXTS[:4]:
        assert grown.encode(text) == ours.encode(text)
    directory = Path(mkdtemp())
    grown.save(directory)
    again, theirs = Tokenizer.load(directory), AutoTokenizer.from_pretrained(str(directory))
    assert again.marks == grown.marks and again.control == grown.control
    assert again.with_chat_form().source == again.source
    messages = [
        {"role": "system", "content": "be brief "},
        {"role": "user", "content": " the dog? "},
        {"role": "assistant", "content": "the fox", "reasoning_content": "is it?"},
    ]
    for prompt in (True, False):
        ids = theirs.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)
        assert again.chat(messages, add_generation_prompt=prompt) == list(ids)


@pytest.mark.parametrize(
    ("kind", "turn"),
    [
        ("byte_level", "<|begin|><|user|>\n\n{} <|mask|> {}<|end|>\n<tool>{}</tool>"),
        ("llama", "<s>[INST] {} [/INST] {} </s>{}"),
        ("mistral", "<s>[INST] {} [/INST]{}</s> {}"),
        ("gemma", "<bos>user\n\n{}<eos>\n\n{}  {}"),
        ("unigram", "User: {}</s>{}\n{}"),
        ("word_piece", "[CLS] {} [SEP]{}[SEP] {}"),
        ("end_of_word", "{}</s>{} {}"),
    ],
)
def test_its_own_template_gives_transformers_ids(kind: str, turn: str) -> None:
    """White space that a token swallows, words that are marked or not behind a token, texts that begin a document."""
    _, ours, _ = made(kind)
    turn = turn.format(*["{{ m.content }}"] * 3)
    template = "{% for m in messages %}" + turn.replace("\n", "{{ '\\n' }}") + "{% endfor %}"
    own = Tokenizer(ours.source, replace(ours.conventions, template=template))
    directory = Path(mkdtemp())
    own.save(directory)
    theirs = AutoTokenizer.from_pretrained(str(directory))
    for text in ("the dog", " the dog ", "\n the\n\n\ndog", "12 漢 é🙂", "isn't over.", ""):
        messages = [{"role": "user", "content": text}, {"role": "assistant", "content": "def add"}]
        ids = theirs.apply_chat_template(messages, return_dict=False)
        assert own.chat(messages, add_generation_prompt=False) == list(ids), text


@ALL
def test_the_bytes_of_tokens_make_up_the_text(kind: str) -> None:
    _, ours, _ = made(kind)
    for text in TEXTS:
        ids = ours.encode(text)
        # A tokenizer that marks words also marks the first, whose space decoding takes away.
        whole = b"".join(map(ours.token_bytes, ids)).decode()
        assert whole in (ours.decode(ids), f" {ours.decode(ids)}")
