"""Structured output: what a model of random weights writes under a grammar fits it; what cannot be is refused."""

from __future__ import annotations

import json
import random
import re
import time
from functools import reduce
from typing import Any

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers

from deepwright_core.engine import Engine, SamplingParams, ThinkingControl, compile_grammar
from deepwright_core.engine.grammar import LIMITS, GrammarKind
from deepwright_core.errors import RequestError
from deepwright_core.model.config import ModelConfig
from deepwright_core.model.transformer import Transformer, build_model
from deepwright_core.registry import Registry
from deepwright_core.tokenizer import Tokenizer
from deepwright_core.tokenizer.bpe import BpeConfig, train

jsonschema = pytest.importorskip("jsonschema")
pytest.importorskip("llguidance")

TEXTS = [
    '{"name": "Zoë", "age": 17}',
    "yes, no, 42. Ein Käse 🙂",
    '[1, 2, {"a": null}]',
    "def add(a, b):\n    return a",
]
SWITCH = {
    "type": "object",
    "properties": {"on": {"type": "boolean"}},
    "required": ["on"],
    "additionalProperties": False,
}
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "ü", 3, None]}, "maxItems": 3},
        "kind": {"anyOf": [{"const": "x"}, SWITCH]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}
SCHEMAS: list[dict[str, Any]] = [
    PERSON,
    {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 4},
    {"enum": [1, "two", None]},
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train(BpeConfig(vocab_size=330, min_frequency=2), TEXTS * 4)


@pytest.fixture(scope="module")
def model(registry: Registry, tokenizer: Tokenizer) -> Transformer:
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size + 6,  # rows that no token has
        hidden_size=16,
        layers=1,
        intermediate_size=24,
        max_positions=512,
        init_std=0.3,
        mtp={"depth": 1},
        attention={"name": "gqa", "heads": 2, "kv_heads": 1, "head_dim": 8},
        ffn={"name": "dense"},
    )
    return build_model(registry, config, seed=0).double()


def answers(
    engine: Engine, tokenizer: Tokenizer, grammars: list[Any], count: int = 4, **more: Any
) -> list[tuple[Any, str]]:
    """(grammar, text) of answers that were not cut off."""
    asked = [grammar for grammar in grammars for _ in range(count)]
    params = [
        SamplingParams(max_tokens=300, temperature=1.5, seed=i, grammar=grammar, **more)
        for i, grammar in enumerate(asked)
    ]
    completions = engine.generate([[1, 40 + i % 7] for i in range(len(asked))], params)
    finished = [
        (grammar, tokenizer.decode(c.token_ids))
        for grammar, c in zip(asked, completions, strict=True)
        if c.finish_reason == "stop"
    ]
    assert len(finished) >= len(asked) * 0.6
    return finished


@pytest.mark.parametrize(
    "shape", [{}, {"block_size": 4, "cache_tokens": 100, "max_prefill_tokens": 3}, {"speculate": 2}], ids=str
)
def test_what_a_random_model_writes_fits_its_schema(
    model: Transformer, tokenizer: Tokenizer, shape: dict[str, int]
) -> None:
    grammars = [compile_grammar(tokenizer, "json_schema", schema) for schema in SCHEMAS]
    of = {id(grammar): schema for grammar, schema in zip(grammars, SCHEMAS, strict=True)}
    assert tokenizer.eos_id is not None
    engine = Engine(model, tokenizer.eos_id, **shape)
    for grammar, text in answers(engine, tokenizer, grammars):
        jsonschema.validate(json.loads(text), of[id(grammar)])
    assert engine.stats.cache_blocks_used == 0
    if "cache_tokens" in shape:
        assert engine.stats.preemptions


def test_the_other_kinds(model: Transformer, tokenizer: Tokenizer) -> None:
    choices = ["yes", "yes, no", 'ein "Käse"\n']
    sources: list[tuple[GrammarKind, Any]] = [
        ("json_object", None),
        ("regex", r"[0-9]{2,4}(-[a-zä]{1,3})?"),
        ("choice", choices),
        ("lark", 'start: "<" %json {"type": "boolean"} ">"'),
    ]
    grammars = [compile_grammar(tokenizer, *source) for source in sources]
    engine = Engine(model, tokenizer.end_ids)
    seen = set()
    for grammar, text in answers(engine, tokenizer, grammars, count=8, logit_bias=((tokenizer.encode("}")[0], 9.0),)):
        seen.add((grammar.kind, text))
        if grammar.kind == "json_object":
            assert isinstance(json.loads(text), dict)
        elif grammar.kind == "regex":
            assert re.fullmatch(r"[0-9]{2,4}(-[a-zä]{1,3})?", text)
        elif grammar.kind == "choice":
            assert text in choices
        else:
            assert text in ("<true>", "<false>")
    assert {text for kind, text in seen if kind == "choice"} > {"yes"}  # "yes" may end or go on
    assert len({text for kind, text in seen if kind == "lark"}) == 2


def test_the_grammar_waits_for_the_end_of_thinking(model: Transformer, tokenizer: Tokenizer) -> None:
    start, end = tokenizer.mark_id("think_start"), tokenizer.mark_id("think_end")
    grammar = compile_grammar(tokenizer, "regex", r"[0-9]{3}")
    engine = Engine(model, tokenizer.end_ids)
    closing = tuple(tokenizer.encode("so"))
    controls = [
        ThinkingControl(end, opened=True, budget=5, closing=closing),
        ThinkingControl(end, opened=True, least=8, budget=20, continuation=closing),
        ThinkingControl(end, opened=False, start_id=start, budget=4),
        ThinkingControl(end, opened=False, start_id=start, budget=0),
        ThinkingControl(end, opened=False),
    ]
    bias = ((start, 6.0), (end, 4.0), (1, 6.0))  # the end of text is probable, and must not come before the digits
    params = [
        SamplingParams(max_tokens=60, temperature=1.5, seed=i, grammar=grammar, thinking=control, logit_bias=bias)
        for i, control in enumerate(controls * 6)
    ]
    opened = 0
    for p, completion in zip(params, engine.generate([[3]] * len(params), params), strict=True):
        ids = completion.token_ids
        assert p.thinking is not None
        if ids[0] == start and not p.thinking.opened:
            opened += 1
            assert p.thinking.budget == 4
        if p.thinking.opened or ids[0] == start:
            thought, ids = ids[: ids.index(end)], ids[ids.index(end) + 1 :]
            assert len(thought) <= (p.thinking.budget or 0) + len(closing) + 1
            assert len(thought) >= p.thinking.least
        assert re.fullmatch("[0-9]{3}", tokenizer.decode(ids, skip_special=False))
        assert completion.finish_reason == "stop"
    assert opened


def test_ends_of_text_come_only_where_the_grammar_may_end(model: Transformer, tokenizer: Tokenizer) -> None:
    grammar = compile_grammar(tokenizer, "regex", "(ab)+")
    stop = tokenizer.mark_id("user")
    engine = Engine(model, tokenizer.end_ids)
    eager = SamplingParams(
        max_tokens=20, temperature=0.0, grammar=grammar, stop_ids=(stop,), logit_bias=((stop, 90.0),)
    )
    (answer,) = engine.generate([[3]], eager)
    assert tokenizer.decode(answer.token_ids, skip_special=False) == f"ab{tokenizer.decode([stop], skip_special=False)}"
    (answer,) = engine.generate(
        [[3]], SamplingParams(max_tokens=20, grammar=grammar, ignore_eos=True, logit_bias=((1, 90.0),))
    )
    assert answer.finish_reason == "length"
    assert re.fullmatch("(ab)*a?", tokenizer.decode(answer.token_ids))


def test_a_grammar_that_cannot_go_on_ends_the_answer(
    model: Transformer, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LIMITS, "max_lexer_states", 60)
    endless = compile_grammar(tokenizer, "regex", "([ab]*a[ab]{60}b){2}")
    engine = Engine(model, tokenizer.end_ids)
    params = SamplingParams(max_tokens=200, temperature=2.0, grammar=endless)
    free = engine.add([4], SamplingParams(max_tokens=100, ignore_eos=True))
    held = engine.add([3], params)
    ended: list[int] = []
    while engine.has_work:
        for event in engine.step():
            if event.finish_reason:
                assert event.finish_reason == "length"
                ended.append(event.request_id)
    assert ended == [held, free]
    assert engine.stats.cache_blocks_used == 0


def test_a_grammar_of_nothing_but_tokens_that_end_the_answer(model: Transformer, tokenizer: Tokenizer) -> None:
    (a,) = tokenizer.encode("a")
    params = SamplingParams(
        max_tokens=9, min_tokens=5, stop_ids=(a, 10**6), grammar=compile_grammar(tokenizer, "regex", "a{3}")
    )
    (answer,) = Engine(model, tokenizer.end_ids).generate([[3]], params)
    assert (answer.token_ids, answer.finish_reason) == ([a], "stop")


def test_an_answer_that_cannot_begin_is_refused_and_hurts_nobody(model: Transformer, tokenizer: Tokenizer) -> None:
    grammar = compile_grammar(tokenizer, "regex", "ab")
    while not grammar.start().stuck:  # as if others had used up a limit
        grammar._matcher.consume_token(tokenizer.encode("a")[0])
    engine = Engine(model, tokenizer.end_ids)
    engine.add([3], SamplingParams(max_tokens=2))
    with pytest.raises(RequestError, match="The grammar cannot be used"):
        engine.add([3], SamplingParams(max_tokens=2, grammar=grammar))
    while engine.has_work:
        engine.step()


def test_a_vocabulary_with_marked_spaces(registry: Registry) -> None:
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "yes", "▁no", "no", "▁or"]
    bpe = tokenizers.Tokenizer(
        models.BPE({t: i for i, t in enumerate(vocabulary)}, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    bpe.pre_tokenizer = pre_tokenizers.Metaspace()
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bpe.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer = Tokenizer(bpe.to_str())
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=8, layers=1, intermediate_size=8, max_positions=64, init_std=0.5,
        attention={"name": "gqa", "heads": 1, "kv_heads": 1, "head_dim": 8}, ffn={"name": "dense"},
    )  # fmt: skip
    engine = Engine(build_model(registry, config, seed=1), 2)
    grammar = compile_grammar(tokenizer, "regex", "yes or (yes|no|ä)")
    answers = engine.generate([[1]] * 12, SamplingParams(max_tokens=30, temperature=3.0, grammar=grammar))
    texts = {tokenizer.decode(answer.token_ids) for answer in answers}
    assert texts <= {"yes or yes", "yes or no", "yes or ä"}
    assert len(texts) > 1


# Refusals -----------------------------------------------------------------------------------------

DEEP = reduce(lambda inner, _: {"type": "object", "properties": {"a": inner}}, range(70), {"type": "integer"})


@pytest.mark.parametrize(
    ("kind", "source", "sentence"),
    [
        ("json_schema", "{", "The JSON schema is not JSON"),
        ("json_schema", [1], r"The JSON schema is \[1\]; expected an object"),
        ("json_schema", DEEP, "The JSON schema is nested 141 deep; expected at most 64"),
        ("json_schema", "[" * 100_000, "The JSON schema has 100000 bytes; expected at most 65536"),
        ("json_schema", {"enum": ["x" * 70_000]}, "The JSON schema has 70014 bytes"),
        ("json_schema", {"type": "array", "uniqueItems": True}, "cannot be used: Unimplemented keys: .*uniqueItems"),
        ("json_schema", {"type": "integer", "minimum": 5, "maximum": 3}, "Unsatisfiable schema"),
        ("json_schema", {"$ref": "http://169.254.169.254/"}, "cannot be used: .*not present"),
        (
            "json_schema",
            {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
            "no text of at least one token fits",
        ),
        ("json_schema", {"title": "\ud800"}, "The JSON schema cannot be used"),
        ("json_schema", {"a": object()}, "cannot be written as JSON"),
        ("json_object", {}, "takes no source"),
        ("regex", "a(", "The regular expression cannot be used: unclosed group"),
        ("regex", "(?=a)b", "look-around"),
        ("regex", "\ud800", "half of a character"),
        ("regex", "(" * 65 + ")" * 65, "nested 65 deep"),
        ("regex", "", "is ''; expected a text"),
        (
            "regex",
            "(a{1000}){1000}{1000}",
            "are 999999999 pieces more when they are written out; expected at most 20000",
        ),
        (
            "json_schema",
            {"items": [{"pattern": r"^(x[a{]\){3}){9000}$"}]},
            "The JSON schema has .* are 44997 pieces more",
        ),
        ("json_schema", {"patternProperties": {"(ab{100}){200}": {}}}, "are 20198 pieces more"),
        ("choice", [], r"The choices are \[\]; expected a list of texts"),
        ("choice", ["a"] * 1025, "There are 1025 choices; expected at most 1024"),
        ("lark", "nonsense", "The grammar cannot be used"),
        ("lark", 'start: "a" %json {"pattern": "(a{300}){300}"}', "The grammar has .* are 89999 pieces more"),
        ("yaml", "a", "The kind of grammar is 'yaml'; expected one of json_schema"),
    ],
)
def test_sources_that_cannot_be_used_are_refused(tokenizer: Tokenizer, kind: Any, source: Any, sentence: str) -> None:
    with pytest.raises(RequestError, match=sentence):
        compile_grammar(tokenizer, kind, source)


def test_nasty_sources_cost_little_before_they_are_refused_or_end(tokenizer: Tokenizer) -> None:
    """Each is within the bounds of size and depth; what it may cost is the library's count."""
    letters = "abcdefgh"
    objects = [{"type": "object", "properties": {f"p{i}": {"type": "integer"}}} for i in range(300)]
    products = [{"anyOf": [{"type": "object", "properties": {f"{i}_{j}": {}}} for i in range(8)]} for j in range(8)]
    patterns = {f"p{i}": {"type": "string", "pattern": f"^x{i}.*y$"} for i in range(1100)}
    sources: list[tuple[GrammarKind, Any]] = [
        ("regex", "(a|b)*a(a|b){25}"),
        ("regex", "x(a{140}){70}|x(a{139}){71}b"),
        ("regex", "|".join(f"(.*{letters[i % 8]}.{{{i}}}{letters[i * 3 % 8]})" for i in range(300))),
        ("json_schema", {"anyOf": objects}),
        ("json_schema", {"allOf": products}),
        ("json_schema", {"type": "object", "properties": patterns}),
        ("json_schema", {"type": "array", "minItems": 10**9, "items": {"pattern": "^(a|b)*a(a|b){40}$"}}),
    ]
    draw = random.Random(0)
    for kind, source in sources:
        start = time.perf_counter()
        try:
            state = compile_grammar(tokenizer, kind, source).start()
        except RequestError:
            pass
        else:
            for _ in range(60):
                if state.stuck:
                    break
                bits = torch.from_numpy(state.allowed_W)[:, None] >> torch.arange(32) & 1
                state.advance(draw.choice(bits.flatten().nonzero()[:, 0].tolist()))
        assert time.perf_counter() - start < 20, source


def test_a_grammar_of_another_tokenizer_is_refused(
    registry: Registry, tokenizer: Tokenizer, model: Transformer
) -> None:
    larger = train(
        BpeConfig(vocab_size=500, min_frequency=1), [*TEXTS, "what has never been seen before, word by word"]
    )
    grammar = compile_grammar(larger, "json_object")
    with pytest.raises(RequestError, match=f"a tokenizer of {larger.vocab_size} tokens; the model knows"):
        Engine(model, 1).add([1], SamplingParams(grammar=grammar))


def test_word_pieces_have_no_bytes() -> None:
    pieces = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    pieces.decoder = decoders.WordPiece()
    with pytest.raises(RequestError, match="needs a tokenizer whose tokens each stand for certain bytes"):
        compile_grammar(Tokenizer(pieces.to_str()), "json_object")
