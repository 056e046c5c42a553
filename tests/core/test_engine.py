"""The engine against an oracle of its own: a tiny plain model, decoded greedily by computing everything anew.

`PlainModel` keeps the engine's contract in the plainest way: `extend` reads the cache one sequence and one token at a
time, in Python; `forward` never sees a cache. What they share is only the weights.
"""

from __future__ import annotations

import random
import time
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from deepwright_core.engine import Engine, SamplingParams
from deepwright_core.engine.runner import ModelRunner
from deepwright_core.errors import RequestError, WorkError
from deepwright_core.model.cache import CacheBatch

VOCABULARY = 23
EOS = 12
GREEDY = SamplingParams(max_tokens=15, temperature=0)


class PlainLayer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))

    def attend(self, q_D: Tensor, k_LD: Tensor, v_LD: Tensor) -> Tensor:
        return self.o(((k_LD @ q_D) * q_D.numel() ** -0.5).softmax(0) @ v_LD)


class PlainModel(nn.Module):
    """Two layers of single-head attention with learned positions."""

    def __init__(self, width: int = 8, max_positions: int = 48, seed: int = 0) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=VOCABULARY)
        self.max_positions = max_positions
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.position = nn.Embedding(max_positions, width)
        self.layers = nn.ModuleList(PlainLayer(width) for _ in range(2))
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.calls: list[tuple[int, ...]] = []  # (sequences, new tokens) of each extend
        self.failures: list[int] = []  # numbers of the calls that fail half-way
        self.was_training: set[bool] = set()
        self.draw_weights(seed)

    def draw_weights(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            parameter.data.normal_(0.0, 1.0, generator=generator)

    @property
    def cache_widths(self) -> list[int]:
        return [2 * self.embedding.embedding_dim] * len(self.layers)

    @property
    def fp8_cache_bytes(self) -> list[int | None]:
        return [None] * len(self.layers)

    def forward(self, tokens_BS: Tensor) -> Tensor:
        x_BSD = self.embedding(tokens_BS) + self.position(torch.arange(tokens_BS.shape[1]))
        for layer in self.layers:
            rows = []
            for x_SD in x_BSD:
                q, k, v = layer.q(x_SD), layer.k(x_SD), layer.v(x_SD)
                rows.append(torch.stack([layer.attend(q[i], k[: i + 1], v[: i + 1]) for i in range(len(x_SD))]))
            x_BSD = torch.tanh(x_BSD + torch.stack(rows))
        return x_BSD

    def extend(self, tokens_BQ: Tensor, cache: list[Tensor], batch: CacheBatch) -> Tensor:
        self.calls.append(tuple(tokens_BQ.shape))
        self.was_training.add(self.training)
        size = batch.block_size
        x_BQD = self.embedding(tokens_BQ) + self.position(batch.positions_BQ)
        for layer, cache_NW in zip(self.layers, cache, strict=True):
            cache_NW[batch.slots_BQ] = torch.cat([layer.k(x_BQD), layer.v(x_BQD)], -1)
            if len(self.calls) in self.failures:
                raise OSError("the device is gone")
            out_BQD = torch.zeros_like(x_BQD)
            for b, blocks in enumerate(batch.blocks_BP.tolist()):
                for q, position in enumerate(batch.positions_BQ[b].tolist()):
                    slots = [blocks[i // size] * size + i % size for i in range(position + 1)]
                    k_LD, v_LD = cache_NW[slots].chunk(2, -1)
                    out_BQD[b, q] = layer.attend(layer.q(x_BQD[b, q]), k_LD, v_LD)
            x_BQD = torch.tanh(x_BQD + out_BQD)
        return x_BQD

    def logits(self, hidden: Tensor) -> Tensor:
        return self.head(hidden).float()


MODEL = PlainModel().double()  # so that rounding never decides an argmax


@torch.no_grad()
def naive(model: PlainModel, prompt: list[int], max_tokens: int, stop: tuple[int, ...]) -> list[int]:
    """Greedy decoding that computes everything anew for every token."""
    tokens = list(prompt)
    while len(tokens) - len(prompt) < max_tokens and len(tokens) < model.max_positions:
        tokens.append(int(model.logits(model(torch.tensor([tokens]))[0, -1]).argmax()))
        if tokens[-1] in stop:
            break
    return tokens[len(prompt) :]


@cache
def wanted(prompt: tuple[int, ...], max_tokens: int) -> list[int]:
    return naive(MODEL, list(prompt), max_tokens, (EOS,))


def family(count: int, seed: int) -> list[list[int]]:
    """Unequal prompts, many of which begin alike."""
    draw = random.Random(seed)
    trunk = [draw.randrange(VOCABULARY) for _ in range(12)]
    return [
        trunk[: draw.randrange(1, 13)] + [draw.randrange(VOCABULARY) for _ in range(draw.randrange(6))]
        for _ in range(count)
    ]


PROMPTS = family(10, seed=0)
SHAPES = {
    "plain": {},
    "small blocks": {"block_size": 4},
    "one token a block": {"block_size": 1},
    "chunked prefill": {"block_size": 4, "max_prefill_tokens": 5},
    "one token a chunk": {"block_size": 4, "max_prefill_tokens": 1},
    "few rows": {"block_size": 4, "max_batch": 3},
    "tiny cache": {"block_size": 4, "cache_tokens": 48},
    "everything at once": {"block_size": 2, "cache_tokens": 56, "max_prefill_tokens": 7, "max_batch": 5},
}


@pytest.fixture(params=["in turn", "ahead"])
def _pace(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step is started before the one before has been read, as on a GPU, or not."""
    if request.param == "ahead":
        monkeypatch.setattr(ModelRunner, "runs_ahead", True)


@pytest.mark.usefixtures("_pace")
@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_output_is_that_of_naive_decoding(shape: str) -> None:
    engine = Engine(MODEL, EOS, **SHAPES[shape])
    for _ in range(2):  # the second time over what the first left in the cache
        completions = engine.generate(PROMPTS, GREEDY)
        for prompt, completion in zip(PROMPTS, completions, strict=True):
            assert completion.token_ids == wanted(tuple(prompt), 15)
            assert completion.finish_reason == ("stop" if completion.token_ids[-1] == EOS else "length")
    stats = engine.stats
    assert (stats.running, stats.waiting, stats.cache_blocks_used) == (0, 0, 0)
    assert stats.prompt_tokens == 2 * sum(map(len, PROMPTS))
    assert stats.generation_tokens == 2 * sum(len(c.token_ids) for c in completions)
    assert (stats.preemptions > 0) == (SHAPES[shape].get("cache_tokens", 999) < 60)
    if shape != "plain":
        assert stats.cached_prompt_tokens > 0


def test_both_kinds_of_ending_are_among_the_test_prompts() -> None:
    assert {wanted(tuple(prompt), 15)[-1] == EOS for prompt in PROMPTS} == {True, False}


def test_log_probabilities_are_the_models() -> None:
    engine = Engine(MODEL, EOS, block_size=4, cache_tokens=64)
    params = SamplingParams(max_tokens=12, temperature=0.7, top_k=5)
    for prompt, completion in zip(PROMPTS, engine.generate(PROMPTS, params), strict=True):
        tokens = prompt + completion.token_ids
        with torch.no_grad():
            logits = MODEL.logits(MODEL(torch.tensor([tokens]))[0, len(prompt) - 1 : -1]) / 0.7
        logits[logits < logits.topk(5).values[:, -1:]] = -torch.inf
        want = logits.log_softmax(-1).gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(completion.logprobs), want, atol=1e-5, rtol=0)


@pytest.mark.usefixtures("_pace")
def test_sampled_tokens_do_not_depend_on_the_company() -> None:
    params = [SamplingParams(max_tokens=12, temperature=t, seed=i) for i, t in enumerate([0, 0.5, 1, 1, 2] * 2)]
    want = [Engine(MODEL, EOS).generate([p], [q])[0].token_ids for p, q in zip(PROMPTS, params, strict=True)]
    for shape in ("small blocks", "chunked prefill", "tiny cache"):
        got = Engine(MODEL, EOS, **SHAPES[shape]).generate(PROMPTS, params)
        assert [completion.token_ids for completion in got] == want


def test_copies_of_a_prompt_get_seeds_of_their_own() -> None:
    params = SamplingParams(max_tokens=10, temperature=2.0, seed=5)
    engine = Engine(MODEL, EOS)
    first = [c.token_ids for c in engine.generate([[1, 2]] * 4, params)]
    assert len(set(map(tuple, first))) == 4
    assert [c.token_ids for c in engine.generate([[1, 2]] * 4, params)] == first
    assert engine.generate([[1, 2]], [replace(params, seed=7)])[0].token_ids == first[2]


def test_samples_of_one_prompt_prefill_it_once_in_one_step() -> None:
    model = PlainModel().double()
    engine = Engine(model, EOS, block_size=4)
    prompt = list(range(14))
    for seed in range(6):
        engine.add(prompt, SamplingParams(seed=seed))
    assert len(engine.step()) == 6
    assert model.calls == [(1, 14), (5, 2)]
    assert engine.stats.cached_prompt_tokens == 5 * 12


def test_a_full_hit_still_computes_the_last_block() -> None:
    model = PlainModel().double()
    engine = Engine(model, EOS, block_size=4)
    for _ in range(2):
        assert engine.generate([list(range(8))], GREEDY)[0].token_ids == wanted(tuple(range(8)), 15)
    assert engine.stats.cached_prompt_tokens == 4


def test_generated_tokens_are_found_by_the_next_turn() -> None:
    engine = Engine(MODEL, EOS, block_size=4)
    first = engine.generate([PROMPTS[0]], replace(GREEDY, ignore_eos=True))[0]
    turn = PROMPTS[0] + first.token_ids + [1, 2]
    second = engine.generate([turn], GREEDY)[0]
    assert second.cached_tokens == (len(turn) - 3) // 4 * 4  # all whose cache was written: the last token's never was
    assert second.token_ids == wanted(tuple(turn), 15)


def test_salts_do_not_share() -> None:
    engine = Engine(MODEL, EOS, block_size=4)
    for salt, cached in (("a", 0), ("b", 0), ("", 0), ("a", 12), ("b", 12)):
        assert engine.generate([list(range(14))], GREEDY, salt=salt)[0].cached_tokens == cached


def test_events_tell_when_a_request_was_first_admitted() -> None:
    engine = Engine(MODEL, EOS, block_size=4, max_batch=1)
    before = time.monotonic()
    first, second = (engine.add([5, 6, 7], SamplingParams(max_tokens=3, ignore_eos=True)) for _ in range(2))
    admitted: dict[int, set[float]] = {first: set(), second: set()}
    while engine.has_work:
        for event in engine.step():
            admitted[event.request_id].add(event.admitted_at)
    (one,), (two,) = admitted[first], admitted[second]
    # The second had to wait for the first one's place.
    assert before <= one < two <= time.monotonic()


def test_stop_ids_and_ignored_eos() -> None:
    prompt = next(p for p in PROMPTS if len(wanted(tuple(p), 15)) > 4)
    answer = wanted(tuple(prompt), 15)
    engine = Engine(MODEL, [EOS, answer[2]])
    (stopped,) = engine.generate([prompt], GREEDY)
    assert stopped.token_ids == answer[: answer.index(answer[2]) + 1]
    (stopped,) = Engine(MODEL, EOS).generate([prompt], replace(GREEDY, stop_ids=(answer[1],)))
    assert stopped.token_ids == answer[: answer.index(answer[1]) + 1]
    (whole,) = engine.generate([prompt], replace(GREEDY, ignore_eos=True))
    assert whole.token_ids == naive(MODEL, prompt, 15, ())
    assert whole.finish_reason == "length"


def test_the_last_position_ends_a_request() -> None:
    (completion,) = Engine(MODEL, EOS).generate([[1] * 40], replace(GREEDY, ignore_eos=True))
    assert (len(completion.token_ids), completion.finish_reason) == (8, "length")
    (completion,) = Engine(MODEL, EOS, block_size=4, cache_tokens=20).generate(
        [[1] * 9], replace(GREEDY, ignore_eos=True)
    )
    assert (len(completion.token_ids), completion.finish_reason) == (11, "length")


def test_impossible_requests_are_refused_with_numbers() -> None:
    engine = Engine(MODEL, EOS, cache_tokens=32)
    with pytest.raises(RequestError, match="40 tokens; the whole cache holds 32"):
        engine.add([1] * 40)
    with pytest.raises(RequestError, match="has 48 tokens; the model has 48 positions"):
        Engine(MODEL, EOS).add([1] * 48)
    with pytest.raises(RequestError, match="is empty"):
        engine.add([])
    with pytest.raises(RequestError, match="token 23; the model knows 0 to 22"):
        engine.add([1, 23])
    with pytest.raises(RequestError) as error:
        engine.generate([[1], [], [-1]], GREEDY)
    assert [problem.split(":")[0] for problem in error.value.problems] == ["Prompt 1", "Prompt 2"]
    with pytest.raises(RequestError, match="2 prompts came with 1"):
        engine.generate([[1], [2]], [GREEDY])
    with pytest.raises(RequestError, match="block_size is 0"):
        Engine(MODEL, EOS, block_size=0)
    with pytest.raises(RequestError, match="at least one block"):
        Engine(MODEL, EOS, cache_tokens=8)
    with pytest.raises(RequestError, match="cache_dtype is 'fp4'; expected auto or fp8"):
        Engine(MODEL, EOS, cache_dtype="fp4")  # type: ignore[arg-type]
    with pytest.raises(RequestError, match=r"the attention of layers \[0, 1\] has no FP8 cache .*; expected 'auto'"):
        Engine(MODEL, EOS, cache_dtype="fp8")
    assert not engine.has_work
    engine.add([1])
    with pytest.raises(RequestError, match="1 added requests are under way"):
        engine.generate([[1]], GREEDY)


@pytest.mark.usefixtures("_pace")
def test_generate_reports_progress_and_leaves_nothing_behind_when_it_is_interrupted() -> None:
    engine = Engine(MODEL, EOS, block_size=4)
    seen: list[tuple[int, int]] = []
    engine.generate(PROMPTS, GREEDY, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(set(seen))
    assert seen[-1] == (len(PROMPTS), len(PROMPTS))

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate(PROMPTS, GREEDY, on_progress=interrupt)
    assert not engine.has_work
    assert engine.stats.cache_blocks_used == 0
    assert engine.generate([], GREEDY) == []


@pytest.mark.usefixtures("_pace")
def test_a_failed_step_is_done_again_from_a_clean_cache() -> None:
    model = PlainModel().double()
    engine = Engine(model, EOS, block_size=4, max_prefill_tokens=20)
    answers: dict[int, list[int]] = {engine.add(prompt, GREEDY): [] for prompt in PROMPTS}
    model.failures = [1, 4, 9]
    failed = 0
    while engine.has_work:
        try:
            for event in engine.step():
                answers[event.request_id].append(event.token_id)
        except OSError:
            failed += 1
            assert engine.stats.cache_blocks_used == 0
    assert failed == 3
    assert list(answers.values()) == [wanted(tuple(prompt), 15) for prompt in PROMPTS]


def test_broken_weights_are_an_error_that_names_the_requests() -> None:
    model = PlainModel().double()
    model.head.weight.data[0, 0] = torch.nan
    engine = Engine(model, EOS)
    with pytest.raises(WorkError, match=r"requests \[0, 1\] are not finite"):
        engine.generate([[1], [2]], GREEDY)
    assert not engine.has_work


@pytest.mark.usefixtures("_pace")
def test_new_weights_forget_the_old_cache_even_under_way() -> None:
    model = PlainModel(seed=1).double()
    engine = Engine(model, EOS, block_size=4)
    params = replace(GREEDY, ignore_eos=True)
    first = {engine.add(prompt, params): list(prompt) for prompt in PROMPTS}
    for _ in range(6):
        for event in engine.step():
            first[event.request_id].append(event.token_id)
    model.draw_weights(seed=2)
    engine.update_weights()
    want = [tokens + naive(model, tokens, 9, ()) for tokens in first.values()]
    while engine.has_work:
        for event in engine.step():
            first[event.request_id].append(event.token_id)
    assert list(first.values()) == want
    assert [c.token_ids for c in engine.generate(PROMPTS, GREEDY)] == [naive(model, p, 15, (EOS,)) for p in PROMPTS]


def test_the_model_generates_in_evaluation_mode_and_keeps_its_own() -> None:
    model = PlainModel().double()
    model.train()
    Engine(model, EOS).generate([[1]], GREEDY)
    assert model.was_training == {False}
    assert model.training


@pytest.mark.costly
@pytest.mark.usefixtures("_pace")
@given(data=st.data())
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_order_of_arrivals_cancellations_and_steps(data: st.DataObject) -> None:
    """Prefix cache, chunks, preemption and cancellation at once: what is not cancelled is right, and nothing leaks."""
    engine = Engine(
        MODEL,
        EOS,
        block_size=data.draw(st.sampled_from([1, 2, 4])),
        cache_tokens=data.draw(st.sampled_from([28, 40, 64])),
        max_prefill_tokens=data.draw(st.sampled_from([1, 6, 100])),
        max_batch=data.draw(st.sampled_from([1, 3, 8])),
    )
    arrivals = data.draw(st.lists(st.integers(0, len(PROMPTS) - 1), min_size=1, max_size=8))
    script = data.draw(st.lists(st.sampled_from(["step", "add", "cancel"]), max_size=30))
    asked: dict[int, int] = {}
    answers: dict[int, list[int]] = {}
    endings: dict[int, str] = {}
    while script or arrivals or engine.has_work:
        action = script.pop() if script else "add" if arrivals else "step"
        if action == "add" and arrivals:
            index = arrivals.pop()
            request = engine.add(PROMPTS[index], replace(GREEDY, max_tokens=8))
            asked[request], answers[request] = index, []
        elif action == "cancel" and asked:
            request = data.draw(st.integers(0, max(asked)))
            assert engine.cancel(request) == (request not in endings)
            if request not in endings:
                endings[request] = "cancelling"
        else:
            for event in engine.step():
                if event.token_id is not None:
                    answers[event.request_id].append(event.token_id)
                if event.finish_reason:
                    expected = "cancelled" if endings.get(event.request_id) == "cancelling" else ("stop", "length")
                    assert event.finish_reason in expected
                    endings[event.request_id] = event.finish_reason
            stats = engine.stats
            assert stats.cache_blocks_used <= stats.cache_blocks_total
            assert stats.running + stats.waiting == sum(request not in endings for request in asked)
    assert engine.stats.cache_blocks_used == 0
    for request, index in asked.items():
        want = wanted(tuple(PROMPTS[index]), 8)
        if endings[request] == "cancelled":
            assert answers[request] == want[: len(answers[request])]
        else:
            assert answers[request] == want
