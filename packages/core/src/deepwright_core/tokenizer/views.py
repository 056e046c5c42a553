"""One tokenizer.json, read in two ways.

The *marked* view recognises control tokens in text. In the *plain* view each of them bears a name that nobody can
write, so that a control token in somebody's text is just characters. Renamed, not taken out: the library numbers added
tokens by their order, so the others would get other ids; and a Unigram vocabulary matches its own "</s>", added or not.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import tokenizers

from ..errors import RequestError

_UNWRITABLE = secrets.token_hex(16)
# Stands before a text that does not begin a document. Tokenizers that mark a text's first word then leave it unmarked,
# exactly as they do behind a special token.
ANCHOR = f"{_UNWRITABLE}:anchor"


def parse(source: str) -> dict[str, Any]:
    """The content of a tokenizer.json; `RequestError` when it is none."""
    try:
        data = json.loads(source)
    except ValueError as error:
        raise RequestError(f"tokenizer.json is not a tokenizer: not valid JSON ({error}).") from None
    if not isinstance(data, dict) or not isinstance(data.get("model"), dict):
        raise RequestError("tokenizer.json is not a tokenizer: expected a mapping with a 'model'.")
    return data


def marked(source: str, named: Collection[str] = ()) -> tokenizers.Tokenizer:
    """The view that recognises special tokens.

    named: tokens that other files call special; those that the vocabulary has count as such, as in transformers.
    """
    try:
        view = tokenizers.Tokenizer.from_str(source)
    except Exception as error:  # the library raises plain Exception for what it cannot read
        raise RequestError(f"tokenizer.json is not a tokenizer that can be read: {error}.") from error
    known = {token.content for token in view.get_added_tokens_decoder().values()}
    missing = [token for token in named if token not in known and view.token_to_id(token) is not None]
    view.add_special_tokens([tokenizers.AddedToken(token, normalized=False, special=True) for token in missing])
    view.no_truncation()
    view.no_padding()
    return view


def plain(data: Mapping[str, Any], control: Collection[str]) -> tokenizers.Tokenizer:
    """The view in which no text holds a control token. Nothing is put around a text either."""
    names = {token: f"{_UNWRITABLE}:{token}" for token in control}
    model = dict(data["model"])
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(token, token): i for token, i in vocabulary.items()}
    elif isinstance(vocabulary, list):
        model["vocab"] = [[names.get(token, token), score] for token, score in vocabulary]
    if model.get("merges"):
        model["merges"] = [merge for merge in model["merges"] if not _concerns(merge, names)]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    added = [{**token, "content": names.get(token["content"], token["content"])} for token in data["added_tokens"]]
    content = {**data, "model": model, "added_tokens": added}
    content |= {"post_processor": None, "truncation": None, "padding": None}
    view = tokenizers.Tokenizer.from_str(json.dumps(content))
    view.add_special_tokens([tokenizers.AddedToken(ANCHOR, normalized=False, special=True)])
    return view


def _concerns(merge: Any, names: Collection[str]) -> bool:
    first, second = merge.split(" ", 1) if isinstance(merge, str) else merge
    return first in names or second in names or first + second in names


def with_added(source: str, tokens: Sequence[str], special: Collection[str]) -> str:
    """A tokenizer.json with more added tokens, of which some are special; everything else in it stays as it is."""
    data = parse(source)
    view = tokenizers.Tokenizer.from_str(source)
    view.add_tokens([tokenizers.AddedToken(token, normalized=False, special=token in special) for token in tokens])
    ids = {token: view.token_to_id(token) for token in tokens}
    added = json.loads(view.to_str())["added_tokens"]
    data["added_tokens"] = [*(data.get("added_tokens") or []), *(t for t in added if t["id"] in ids.values())]
    return json.dumps(data, indent=2, ensure_ascii=False)


def begin_ids(post_processor: Mapping[str, Any] | None) -> tuple[int, ...]:
    """What a tokenizer.json's post-processor puts before a text."""
    kind = post_processor["type"] if post_processor else None
    if post_processor is None or kind == "ByteLevel":
        return ()
    if kind == "Sequence":
        return tuple(i for inner in post_processor["processors"] for i in begin_ids(inner))
    if kind in ("BertProcessing", "RobertaProcessing"):
        return (post_processor["cls"][1],)
    ids: list[int] = []
    for piece in post_processor["single"]:
        if "SpecialToken" not in piece:
            break
        ids += post_processor["special_tokens"][piece["SpecialToken"]["id"]]["ids"]
    return tuple(ids)
