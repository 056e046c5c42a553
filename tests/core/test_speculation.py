"""Speculative decoding: the tokens of plain decoding, from fewer steps. (With everything else at once: see
test_engine_properties.)"""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
import torch

from deepwright_core.engine import Engine, SamplingParams, ThinkingControl
from deepwright_core.engine.runner import ModelRunner
from deepwright_core.engine.scheduler import Scheduler
from deepwright_core.errors import RequestError
from deepwright_core.model.config import ModelConfig
from deepwright_core.model.transformer import Transformer, build_model
from deepwright_core.registry import Registry

VOCABULARY = 6
PROMPT = [1, 4, 2]


def build(registry: Registry, depth: int, agreement: float = 0.0) -> Transformer:
    """agreement: how much of what the next token is depends on the token alone, which the modules guess right."""
    config = ModelConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        layers=2,
        intermediate_size=24,
        max_positions=48,
        init_std=0.3,
        mtp={"depth": depth},
        attention={"name": "gqa", "heads": 2, "kv_heads": 1, "head_dim": 8},
        ffn={"name": "dense"},
    )
    model = build_model(registry, config, seed=0).double()  # so that rounding never decides a token
    with torch.no_grad():
        model.embedding.weight.mul_(1 + 9 * agreement)
        for block in [*model.layers, *(module.block for module in model.mtp)]:
            block.attention.o.weight.mul_(1 - agreement)  # type: ignore[union-attr]
            block.ffn.down.weight.mul_(1 - agreement)  # type: ignore[union-attr]
        for module in model.mtp:
            module.projection.weight.mul_(1 - agreement)  # type: ignore[union-attr, operator]
            module.projection.weight[:, :16] += agreement * torch.eye(16)  # type: ignore[union-attr, index]
    return model


def prompts() -> list[list[int]]:
    draw = random.Random(0)
    trunk = [draw.randrange(VOCABULARY) for _ in range(14)]
    return [[1]] + [
        trunk[: draw.randrange(1, 15)] + [draw.randrange(VOCABULARY) for _ in range(draw.randrange(8))]
        for _ in range(7)
    ]


GREEDY = SamplingParams(max_tokens=14, temperature=0.0, ignore_eos=True)
KINDS = [GREEDY, replace(GREEDY, temperature=0.8), replace(GREEDY, temperature=1.5, top_k=4, top_p=0.9)]
MIXED = [replace(KINDS[i % 3], seed=i) for i in range(8)]


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_tokens_are_those_of_plain_decoding(registry: Registry, depth: int) -> None:
    model = build(registry, depth)
    want = [c.token_ids for c in Engine(model, 0).generate(prompts(), MIXED)]
    for drafts in (1, 2, 3):
        engine = Engine(model, 0, speculate=drafts)
        assert [c.token_ids for c in engine.generate(prompts(), MIXED)] == want
        assert 0 < engine.stats.accepted_tokens < engine.stats.draft_tokens


def test_drafts_that_are_right_save_steps(registry: Registry) -> None:
    """A model in which the token alone decides: its module is never wrong, and every step gives all it can."""
    model = build(registry, 1, agreement=1.0)
    for params in (replace(GREEDY, max_tokens=9), replace(GREEDY, max_tokens=9, temperature=0.7)):
        want = Engine(model, 0).generate([PROMPT], params)[0].token_ids
        engine = Engine(model, 0, speculate=3)
        request = engine.add(PROMPT, params)
        steps = []
        while engine.has_work:
            steps.append([event.token_id for event in engine.step() if event.request_id == request])
        assert [token for step in steps for token in step] == want
        assert [len(step) for step in steps] == [1, 4, 4]
        assert engine.stats.accepted_at == (2, 2, 2)
        assert engine.stats.draft_steps == 2


def test_steps_run_ahead_of_what_drafts_are_accepted(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: the next step is started while nobody knows how many tokens the last one gives. All drafts are right
    here, so every step may need all the blocks it can; and the cache is too small for all that drafts could use."""
    monkeypatch.setattr(ModelRunner, "runs_ahead", True)
    model = build(registry, 1, agreement=1.0)
    started = []
    plan_ahead = Scheduler.plan_ahead
    monkeypatch.setattr(Scheduler, "plan_ahead", lambda *of: started.append(plan_ahead(*of)) or started[-1])
    wanted = [replace(MIXED[i], max_tokens=9 + i, scores=0 if i == 5 else None) for i in range(8)]
    want = Engine(model, 0).generate(prompts(), wanted)
    started.clear()
    for cache_tokens in (60, 84, 120):
        for drafts, size in ((1, 1), (3, 1), (3, 4)):
            engine = Engine(model, 0, speculate=drafts, block_size=size, cache_tokens=cache_tokens)
            have = engine.generate(prompts(), wanted)
            assert [c.token_ids for c in have] == [c.token_ids for c in want]
            assert [s.token_id for s in have[5].scores] == have[5].token_ids
            assert engine.stats.accepted_tokens > 0.4 * engine.stats.draft_tokens
    assert {plan is not None for plan in started} == {True, False}


def test_what_stands_behind_a_stop_token_is_dropped(registry: Registry) -> None:
    model = build(registry, 1, agreement=1.0)
    whole = Engine(model, 0).generate([PROMPT], GREEDY)[0].token_ids
    place = next(i for i in range(2, 14) if whole[i] not in whole[:i])
    for drafts in (1, 2, 3):
        engine = Engine(model, 0, speculate=drafts, block_size=2)
        stopped = engine.generate([PROMPT], replace(GREEDY, stop_ids=(whole[place],)))[0]
        assert (stopped.token_ids, stopped.finish_reason) == (whole[: place + 1], "stop")
        assert engine.stats.generation_tokens == place + 1
        for limit in range(1, 7):
            cut = engine.generate([PROMPT], replace(GREEDY, max_tokens=limit))[0]
            assert (cut.token_ids, cut.finish_reason) == (whole[:limit], "length")
        assert engine.stats.cache_blocks_used == 0


def test_drafts_are_scored_and_not_accepted_where_penalties_hang_on_them(registry: Registry) -> None:
    model = build(registry, 1, agreement=0.9)
    wanted = [replace(GREEDY, frequency_penalty=0.7), replace(GREEDY, scores=2, temperature=0.5), GREEDY]
    want = Engine(model, 0).generate([PROMPT] * 3, wanted)
    engine = Engine(model, 0, speculate=2)
    events = {engine.add(PROMPT, params): [] for params in wanted}  # type: ignore[var-annotated]
    most = dict.fromkeys(events, 0)
    while engine.has_work:
        step = engine.step()
        for request, tokens in events.items():
            new = [event for event in step if event.request_id == request]
            tokens += new
            most[request] = max(most[request], len(new))
    assert list(most.values()) == [1, 3, 3]
    for completion, tokens in zip(want, events.values(), strict=True):
        assert [event.token_id for event in tokens] == completion.token_ids
    for score, event in zip(want[1].scores, events[1], strict=True):
        assert (event.score.token_id, dict(event.score.top).keys()) == (score.token_id, dict(score.top).keys())
        assert event.score.logprob == pytest.approx(score.logprob, abs=1e-5)
        assert dict(event.score.top) == pytest.approx(dict(score.top), abs=1e-5)


@pytest.mark.parametrize("ahead", [False, True])
def test_rules_let_drafts_through_for_as_long_as_they_leave_the_draws_alone(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, ahead: bool
) -> None:
    model = build(registry, 1, agreement=0.8)
    budget = ThinkingControl(end_id=5, opened=True, budget=7, closing=(3,), start_id=4)
    unopened = replace(budget, opened=False, budget=4)
    never = replace(unopened, budget=0)
    least = ThinkingControl(end_id=5, opened=True, least=6, continuation=(2, 1))
    later = replace(least, opened=False, start_id=4)
    sampled = replace(GREEDY, max_tokens=24, temperature=0.9)
    kinds = [replace(sampled, thinking=control) for control in (budget, unopened, least, later, never)]
    kinds += [replace(sampled, min_tokens=6, ignore_eos=False), replace(sampled, logit_bias=((3, 1.0), (1, -9.0)))]
    wanted = [replace(kind, seed=seed) for kind in kinds for seed in range(6)]
    want = Engine(model, 0).generate([PROMPT] * 42, wanted)
    assert all(any(any(completion.forced) for completion in want[6 * kind : 6 * kind + 6]) for kind in range(4))
    monkeypatch.setattr(ModelRunner, "runs_ahead", ahead)
    small = {"block_size": 2, "cache_tokens": 120, "max_batch": 9}
    for shape in ({"speculate": 3}, {"speculate": 0, **small}, {"speculate": 3, **small}):
        engine = Engine(model, 0, **shape)
        # One kind at a time, too: a row whose next draw is bound keeps all from running ahead.
        have = [c for kind in range(7) for c in engine.generate([PROMPT] * 6, wanted[6 * kind : 6 * kind + 6])]
        have = have if ahead else engine.generate([PROMPT] * 42, wanted)
        assert [(c.token_ids, c.forced, c.finish_reason) for c in have] == [
            (c.token_ids, c.forced, c.finish_reason) for c in want
        ]
        assert not shape["speculate"] or engine.stats.accepted_tokens > 0.2 * engine.stats.generation_tokens
    assert engine.stats.preemptions > 0


def test_the_distribution_is_the_targets(registry: Registry) -> None:
    """Chi-squared over all second and third tokens, drafted ones, against the model's own probabilities."""
    model = build(registry, 1, agreement=0.5)
    temperature, count = 1.3, 4000
    with torch.no_grad():
        contexts = [[*PROMPT, *more] for more in itertools.product(range(VOCABULARY), repeat=2)]
        logits = model.logits(model(torch.tensor(contexts)))[:, len(PROMPT) - 1 :] / temperature
    chances = logits.softmax(-1).view(VOCABULARY, VOCABULARY, 3, VOCABULARY)  # first, second, place, token
    first_1, second_12, third_123 = chances[0, 0, 0], chances[:, 0, 1], chances[:, :, 2]
    want_23 = torch.einsum("a,ab,abc->bc", first_1, second_12, third_123)

    engine = Engine(model, 0, speculate=2, block_size=4)
    params = SamplingParams(max_tokens=3, temperature=temperature, ignore_eos=True, seed=1)
    drawn = [completion.token_ids for completion in engine.generate([PROMPT] * count, params)]
    stats = engine.stats
    assert 0.2 < stats.accepted_tokens / stats.draft_tokens < 0.9
    have_23 = torch.zeros(VOCABULARY, VOCABULARY)
    for _, second, third in drawn:
        have_23[second, third] += 1
    expected = want_23 * count
    assert expected.min() > 3
    statistic = float(((have_23 - expected) ** 2 / expected).sum())
    assert statistic < 77  # 35 degrees of freedom exceed it once in 20,000


def test_with_rows_one_by_one_even_the_log_probabilities_are_the_same(registry: Registry) -> None:
    model = build(registry, 2).float()
    plain, speculating = (Engine(model, 0, batch_invariant=True, speculate=drafts) for drafts in (0, 3))
    want, have = (engine.generate(prompts(), MIXED) for engine in (plain, speculating))
    assert [(c.token_ids, c.logprobs) for c in have] == [(c.token_ids, c.logprobs) for c in want]


def test_a_model_without_modules_is_refused(registry: Registry) -> None:
    with pytest.raises(RequestError, match="speculate is 1, and the model has no MTP module"):
        Engine(build(registry, 0), 0, speculate=1)
    with pytest.raises(RequestError, match=r"speculate is 4; expected 0 \(off\) to 3"):
        Engine(build(registry, 1), 0, speculate=4)
