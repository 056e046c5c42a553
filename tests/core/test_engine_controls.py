"""What single requests ask of their draws, in the engine, against decoding that computes everything anew.

The oracle applies penalties, biases and bans as they are defined, token by token in Python, to the logits of a whole
forward pass.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepwright_core.engine import Engine, SamplingParams, ThinkingControl, TokenScore
from deepwright_core.errors import RequestError

from .test_engine import EOS, MODEL, PROMPTS, SHAPES, VOCABULARY, PlainModel

THINK, END = 20, 21
GREEDY = SamplingParams(max_tokens=12, temperature=0)


@torch.no_grad()
def logits_of(tokens: list[int]) -> list[float]:
    return MODEL.logits(MODEL(torch.tensor([tokens]))[0, -1]).tolist()


def naive(prompt: list[int], p: SamplingParams) -> tuple[list[int], list[bool]]:
    """Greedy tokens, and which of them were forced."""
    answer: list[int] = []
    forced: list[bool] = []
    control, ends = p.thinking, {EOS, *p.stop_ids}
    inside, thoughts, queue = bool(control and control.opened), 0, []
    while len(answer) < p.max_tokens and len(prompt) + len(answer) < MODEL.max_positions:
        spent = bool(control and control.budget is not None and thoughts >= control.budget)
        if inside and spent and (not queue or queue[-1] != END):
            queue = [*control.closing, END]
        closing = queue[-1:] == [END]
        if queue:
            token, put = queue.pop(0), True
        else:
            logits = logits_of(prompt + answer)
            for i in {*prompt, *answer}:
                logits[i] = logits[i] / p.repetition_penalty if logits[i] > 0 else logits[i] * p.repetition_penalty
            for i in set(answer):
                logits[i] -= p.presence_penalty + p.frequency_penalty * answer.count(i)
            for i, bias in p.logit_bias:
                logits[i] += bias
            early = bool(inside and control and thoughts < control.least)
            banned = set(ends) if len(answer) < p.min_tokens and not (early and control.continuation) else set()
            if early and not control.continuation:
                banned |= {*ends, END}
            if control and not inside and spent:
                banned.add(control.start_id)
            token = max((i for i in range(VOCABULARY) if i not in banned), key=lambda i: logits[i])
            put = early and token in {*ends, END}
            if put:
                token, *queue = control.continuation
        answer.append(token)
        forced.append(put)
        if inside and token == END:
            inside, queue = False, []
        elif inside and not closing:
            thoughts += 1
        elif control and not inside and token == control.start_id:
            inside = True
        if token in ends:
            break
    return answer, forced


ASKED = [
    replace(GREEDY, presence_penalty=1.5),
    replace(GREEDY, frequency_penalty=0.8, min_tokens=9),
    replace(GREEDY, repetition_penalty=1.6),
    replace(GREEDY, repetition_penalty=0.7, presence_penalty=-1.0, frequency_penalty=0.4),
    replace(GREEDY, logit_bias=((3, 4.0), (EOS, -100.0))),
    replace(GREEDY, min_tokens=12, stop_ids=(4, 7, 9)),
    GREEDY,
    replace(GREEDY, thinking=ThinkingControl(END, opened=True, budget=3, closing=(1, 2))),
    replace(GREEDY, thinking=ThinkingControl(END, opened=True, least=7, continuation=(5, 6)), frequency_penalty=1.0),
    replace(GREEDY, thinking=ThinkingControl(END, opened=False, start_id=THINK, budget=0), logit_bias=((THINK, 3.0),)),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_everything_asked_for_is_its_definition_whatever_the_batch(shape: str) -> None:
    engine = Engine(MODEL, EOS, **SHAPES[shape])
    for turn in range(2):
        params = ASKED[turn:] + ASKED[:turn]
        for prompt, p, got in zip(PROMPTS, params, engine.generate(PROMPTS, params), strict=True):
            answer, forced = naive(prompt, p)
            assert got.token_ids == answer
            assert got.forced == (forced if any(forced) else [])
            assert [x for x, f in zip(got.logprobs, forced, strict=True) if f] == [0.0] * sum(forced)
    assert engine.stats.cache_blocks_used == 0


controls = st.builds(
    ThinkingControl,
    st.just(END),
    opened=st.booleans(),
    budget=st.sampled_from([None, 4, 6]),
    closing=st.sampled_from([(), (1,), (2, 3)]),
    least=st.integers(0, 4),
    continuation=st.sampled_from([(), (5,), (6, 5)]),
    start_id=st.just(THINK),
)
asked = st.builds(
    SamplingParams,
    max_tokens=st.just(10),
    temperature=st.just(0.0),
    stop_ids=st.sampled_from([(), (3, 4)]),
    min_tokens=st.integers(0, 10),
    presence_penalty=st.sampled_from([0.0, 0.9]),
    frequency_penalty=st.sampled_from([0.0, -0.3, 1.1]),
    repetition_penalty=st.sampled_from([1.0, 1.4]),
    logit_bias=st.sampled_from([(), ((END, 3.0),), ((THINK, 2.0), (7, -100.0))]),
    thinking=st.none() | controls,
)


@pytest.mark.costly
@settings(max_examples=25, deadline=None)
@given(st.lists(asked, min_size=1, max_size=6), st.sampled_from(sorted(SHAPES)), st.randoms(use_true_random=False))
def test_combinations_are_their_definitions(params: list[SamplingParams], shape: str, draw: random.Random) -> None:
    prompts = draw.sample(PROMPTS, len(params))
    got = Engine(MODEL, EOS, **SHAPES[shape]).generate(prompts, params)
    assert [c.token_ids for c in got] == [naive(prompt, p)[0] for prompt, p in zip(prompts, params, strict=True)]


def test_sampled_answers_do_not_depend_on_the_company_or_on_preemption() -> None:
    params = [replace(p, temperature=1.2, seed=i) for i, p in enumerate(ASKED)]
    want = [Engine(MODEL, EOS).generate([p], [q])[0] for p, q in zip(PROMPTS, params, strict=True)]
    for shape in ("small blocks", "chunked prefill", "tiny cache"):
        got = Engine(MODEL, EOS, **SHAPES[shape]).generate(PROMPTS, params)
        assert [(c.token_ids, c.forced) for c in got] == [(c.token_ids, c.forced) for c in want]


def test_copies_of_a_prompt_are_penalised_each_for_itself() -> None:
    params = [replace(GREEDY, frequency_penalty=f) for f in (0.0, 0.5, 1.0, 1.5, 2.0)]
    got = Engine(MODEL, EOS, block_size=4).generate([PROMPTS[0]] * 5, params)
    assert [c.token_ids for c in got] == [naive(PROMPTS[0], p)[0] for p in params]


# Scores -------------------------------------------------------------------------------------------


def check(score: TokenScore, tokens: list[int], token: int, alternatives: int) -> None:
    want = torch.tensor(logits_of(tokens), dtype=torch.float64).log_softmax(-1)
    assert score.token_id == token
    assert score.logprob == pytest.approx(float(want[token]), abs=1e-5)
    assert [i for i, _ in score.top] == want.topk(alternatives).indices.tolist()
    assert [x for _, x in score.top] == pytest.approx(want.topk(alternatives).values.tolist(), abs=1e-5)


@pytest.mark.parametrize("shape", ["plain", "chunked prefill", "everything at once"])
def test_scores_are_of_the_models_own_distribution(shape: str) -> None:
    engine = Engine(MODEL, EOS, **SHAPES[shape])
    params = [
        replace(p, temperature=0.5, top_k=2, scores=i % 4, prompt_scores=(2, None, 0, 3)[i % 4])
        for i, p in enumerate(ASKED)
    ]
    params[6] = replace(params[6], scores=None)
    for _ in range(2):
        for prompt, p, got in zip(PROMPTS, params, engine.generate(PROMPTS, params), strict=True):
            tokens = prompt + got.token_ids
            assert len(got.scores) == (0 if p.scores is None else len(got.token_ids))
            for n, score in enumerate(got.scores):
                check(score, tokens[: len(prompt) + n], tokens[len(prompt) + n], p.scores or 0)
            if p.prompt_scores is None:
                assert got.prompt_scores is None
                continue
            assert got.cached_tokens == 0
            assert got.prompt_scores is not None
            assert len(got.prompt_scores) == len(prompt) - 1
            for n, score in enumerate(got.prompt_scores, 1):
                check(score, tokens[:n], tokens[n], p.prompt_scores)


def test_prompt_scores_come_with_the_first_event_and_a_long_prompt_is_scored_in_slices(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = PlainModel().double()
    widest: list[int] = []
    logits = model.logits
    monkeypatch.setattr(model, "logits", lambda hidden: widest.append(len(hidden)) or logits(hidden))
    monkeypatch.setattr("deepwright_core.engine.scores.SLICE_LOGITS", 4 * VOCABULARY)
    engine = Engine(model, EOS, max_prefill_tokens=11)
    engine.add(PROMPTS[1] * 3, replace(GREEDY, max_tokens=3, prompt_scores=1, ignore_eos=True))
    events = [event for _ in range(20) for event in engine.step()]
    assert [event.prompt_scores is None for event in events] == [False, True, True]
    assert len(events[0].prompt_scores or ()) == len(PROMPTS[1]) * 3 - 1
    assert max(widest) == 4


def test_the_prompt_of_a_scored_request_is_there_for_others() -> None:
    engine = Engine(MODEL, EOS, block_size=4)
    prompt = list(range(12))
    engine.generate([prompt], replace(GREEDY, prompt_scores=0))
    assert engine.generate([prompt], GREEDY)[0].cached_tokens == 8
    assert engine.generate([prompt], replace(GREEDY, prompt_scores=0))[0].cached_tokens == 0


# Refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"min_tokens": 13}, "min_tokens is 13; expected 0 to max_tokens, which is 12"),
        ({"presence_penalty": 2.1}, "presence_penalty is 2.1; expected a number from -2 to 2"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty is nan; expected a number from -2 to 2"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0; expected a number above 0"),
        ({"logit_bias": ((1, 101.0),)}, "logit_bias gives token 1 101.0; expected"),
        ({"logit_bias": ((1, 1.0), (1, 2.0))}, r"logit_bias names tokens \[1\] more than once"),
        ({"scores": -1}, "scores is -1; expected None or 0 to 1024"),
        ({"prompt_scores": 9999}, "prompt_scores is 9999; expected None or 0 to 1024"),
    ],
)
def test_parameters_that_mean_nothing_are_refused(asked: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RequestError, match=sentence):
        replace(GREEDY, **asked)


def test_controls_that_mean_nothing_are_refused_all_at_once() -> None:
    with pytest.raises(RequestError) as error:
        ThinkingControl(END, opened=True, budget=2, least=3, closing=(-1, END))
    assert len(error.value.problems) == 3
    with pytest.raises(RequestError, match=r"thinking.budget is -1; expected at least 0"):
        ThinkingControl(END, opened=True, budget=-1)


def test_tokens_that_the_model_does_not_know_are_refused() -> None:
    engine = Engine(MODEL, EOS)
    with pytest.raises(RequestError, match=r"logit_bias names token 23; the model knows 0 to 22"):
        engine.add([1], replace(GREEDY, logit_bias=((23, 1.0),)))
    with pytest.raises(RequestError, match=r"Prompt 1: thinking.closing names token 99"):
        engine.generate([[1], [2]], [GREEDY, replace(GREEDY, thinking=ThinkingControl(END, True, closing=(99,)))])
    with pytest.raises(RequestError, match="stop_ids names all of the 23 tokens"):
        engine.add([1], replace(GREEDY, stop_ids=tuple(range(23)), min_tokens=1))
    assert not engine.has_work
