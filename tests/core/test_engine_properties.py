"""Whatever comes together in an engine: the tokens are right, every cached value is right, and no block is lost.

Prefix cache, chunked prefill, preemption, cancellation, speculation, several samples of a prompt, new weights and
salts meet in random orders over small caches. The oracle computes everything anew: tokens from the training form, and
what a slot must hold from one call over the whole sequence in a cache of its own.
"""

from __future__ import annotations

import random
from collections import Counter
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from deepwright_core.engine import Engine, SamplingParams
from deepwright_core.engine.block_manager import BlockManager, block_digest, root_digest
from deepwright_core.engine.runner import ModelRunner
from deepwright_core.engine.sampler import SamplingRows, sample
from deepwright_core.model.cache import CacheBatch
from deepwright_core.model.config import ModelConfig
from deepwright_core.model.transformer import Transformer, build_model
from deepwright_core.registry import Registry

VOCABULARY = 10
POSITIONS = 32
EOS = 3
MODULES = 3


def weights(model: Transformer, seed: int) -> None:
    """Weights in which a token says most of what the next one is, so that drafts are often right and often wrong."""
    draw = torch.Generator().manual_seed(seed)
    width = model.config.hidden_size
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.25, generator=draw)
        model.embedding.weight.normal_(0.0, 1.0, generator=draw)
        model.head.weight.normal_(0.0, 0.5, generator=draw)
        for module in model.mtp:
            module.projection.weight[:, :width] += torch.eye(width)  # type: ignore[union-attr, index]


class Oracle:
    """A model with two sets of weights, and what an engine must give and hold with each."""

    def __init__(self, registry: Registry) -> None:
        config = ModelConfig(
            vocab_size=VOCABULARY,
            hidden_size=8,
            layers=1,
            intermediate_size=12,
            max_positions=POSITIONS,
            mtp={"depth": MODULES},
            attention={"name": "gqa", "heads": 2, "kv_heads": 1, "head_dim": 4},
            ffn={"name": "dense"},
        )
        self.models = [build_model(registry, config, seed=0).double().eval() for _ in range(3)]
        self.model = self.models.pop()  # the engine's own; it has the weights of one of the others
        for seed, model in enumerate(self.models):
            weights(model, seed)
        self.next_token = cache(self._next_token)
        self.contents = cache(self._contents)

    def take(self, version: int) -> None:
        self.model.load_state_dict(self.models[version].state_dict())

    @torch.inference_mode()
    def _next_token(self, version: int, tokens: tuple[int, ...], prompt: int, params: SamplingParams) -> int:
        model = self.models[version]
        logits_V = model.logits(model(torch.tensor([tokens]))[0, -1]).float()
        for token in set(tokens[prompt:]):
            logits_V[token] -= params.presence_penalty
        for token, bias in params.logit_bias:
            logits_V[token] += bias
        if len(tokens) - prompt < params.min_tokens:
            logits_V[EOS] = -torch.inf
        if params.greedy:
            return int(logits_V.argmax())
        rows = SamplingRows(
            temperature_B=torch.tensor([params.temperature]),
            top_p_B=torch.tensor([params.top_p]),
            min_p_B=torch.tensor([params.min_p]),
            top_k_B=torch.tensor([params.top_k]),
            seed_B=torch.tensor([params.seed]),
        )
        drawn, _ = sample(logits_V[None], rows, torch.tensor([len(tokens)]), any_random=True, any_truncated=True)
        return int(drawn)

    @torch.inference_mode()
    def _contents(self, version: int, tokens: tuple[int, ...]) -> list[Tensor]:
        """What the slots of positions 0, 1, ... must hold, for the main model's layer and for every module: [L, W]."""
        model, length = self.models[version], len(tokens)
        tokens_BS = torch.tensor([tokens])

        def batch(count: int) -> CacheBatch:
            places = torch.arange(count)[None]
            return CacheBatch(places, places, torch.zeros(1, 1, dtype=torch.int64), torch.tensor([count]), POSITIONS)

        caches = [torch.zeros(POSITIONS, width).double() for width in model.cache_widths + model.further_cache_widths]
        model.extend(tokens_BS, caches[:1], batch(length))
        hidden_BSD = model(tokens_BS)
        for depth in range(MODULES):
            count = length - 1 - depth
            if count > 0:
                next_BS = tokens_BS[:, depth + 1 :]
                model.extend_further(hidden_BSD[:, :count], next_BS, depth, caches[1 + depth], batch(count))
                hidden_BSD = model.predict_further(hidden_BSD[:, :count], next_BS, depth)
        return [cache_NW[: length if layer == 0 else max(0, length - layer)] for layer, cache_NW in enumerate(caches)]


@pytest.fixture(scope="module")
def oracle(registry: Registry) -> Oracle:
    return Oracle(registry)


def prompts() -> list[tuple[int, ...]]:
    """Unequal prompts, most of which begin alike."""
    draw = random.Random(0)
    trunk = [draw.randrange(VOCABULARY) for _ in range(12)]
    return [(5,), tuple(trunk[:8])] + [
        tuple(trunk[: draw.randrange(2, 13)] + [draw.randrange(VOCABULARY) for _ in range(draw.randrange(5))])
        for _ in range(4)
    ]


PROMPTS = prompts()
PARAMS = [
    SamplingParams(max_tokens=9, temperature=0),
    SamplingParams(max_tokens=12, temperature=0, ignore_eos=True),
    SamplingParams(max_tokens=9, temperature=0.7),
    SamplingParams(max_tokens=9, temperature=1.3, top_k=5, top_p=0.9),
    SamplingParams(max_tokens=7, temperature=0, presence_penalty=1.5, ignore_eos=True),  # takes no drafts
    SamplingParams(max_tokens=9, temperature=0.9, logit_bias=((1, 1.5), (4, -3.0), (EOS, 2.0)), min_tokens=3),
]


class Checked:
    """An engine that is looked into after every step."""

    def __init__(self, oracle: Oracle, engine: Engine) -> None:
        self.oracle, self.engine = oracle, engine
        self.version = 0  # of the weights, as the oracle numbers them
        self.asked: dict[int, tuple[int, SamplingParams, str]] = {}  # request -> length of its prompt
        self.tokens: dict[int, list[int]] = {}
        self.endings: dict[int, str] = {}
        self.known: dict[bytes, tuple[int, ...]] = {}  # digest of a block -> all tokens that its content hangs on

    def add(self, prompt: tuple[int, ...], params: SamplingParams, salt: str) -> None:
        request = self.engine.add(prompt, params, salt=salt)
        self.asked[request], self.tokens[request] = (len(prompt), params, salt), list(prompt)

    def cancel(self, request: int) -> None:
        assert self.engine.cancel(request) == (request not in self.endings)
        self.endings.setdefault(request, "cancelling")

    def new_weights(self) -> None:
        self.version = 1 - self.version
        self.oracle.take(self.version)
        self.engine.update_weights()

    def step(self) -> None:
        for event in self.engine.step():
            length, params, _ = self.asked[event.request_id]
            tokens, ending = self.tokens[event.request_id], self.endings.get(event.request_id)
            if event.token_id is None:
                assert (event.finish_reason, ending) == ("cancelled", "cancelling")
            else:
                assert ending is None
                assert event.token_id == self.oracle.next_token(self.version, tuple(tokens), length, params)
                tokens.append(event.token_id)
                full = len(tokens) == min(length + params.max_tokens, POSITIONS, self.engine.cache_capacity)
                ended = event.token_id == EOS and not params.ignore_eos
                assert event.finish_reason == ("stop" if ended else "length" if full else None)
            if event.finish_reason:
                self.endings[event.request_id] = event.finish_reason
        self.check_blocks()

    def check_blocks(self) -> None:
        """Every block is free, idle or owned, by as many as say so; nothing is known twice."""
        scheduler = self.engine._scheduler
        manager: BlockManager = scheduler.manager
        owners = Counter(block for sequence in scheduler.admitted.values() for block in sequence.blocks)
        assert sorted([*manager._free, *manager._idle, *owners]) == list(range(1, manager.blocks + 1))
        assert [manager._owners[block] for block in range(manager.blocks + 1)] == [
            owners[block] for block in range(manager.blocks + 1)
        ]
        assert {block: digest for digest, block in manager._block_of.items()} == manager._digest_of
        assert manager._idle.keys() <= manager._digest_of.keys()
        assert not manager._digest_of.keys() & set(manager._free)
        assert scheduler.admitted.keys() >= {sequence.request_id for sequence in scheduler.decoding}
        assert not any(sequence.blocks for sequence in scheduler.waiting)

    def check_contents(self) -> None:
        """Every slot that an unfinished sequence, or a prompt to come, will read."""
        scheduler, size = self.engine._scheduler, self.engine._scheduler.block_size
        for sequence in scheduler.admitted.values():
            count = len(sequence.tokens) - 1 if sequence.decoding else sequence.computed
            slots = [sequence.blocks[i // size] * size + i % size for i in range(count)]
            self.check_slots(tuple(sequence.tokens), slots)
        for request, tokens in self.tokens.items():
            self.learn(tokens, self.asked[request][2])
        for block, digest in scheduler.manager._digest_of.items():
            tokens = self.known[digest]
            first = len(tokens) - scheduler.lookahead - size
            self.check_slots(tokens, [block * size + i for i in range(size)], first)

    def check_slots(self, tokens: tuple[int, ...], slots: list[int], first: int = 0) -> None:
        for layer, cache_NW in enumerate(self.engine._runner.cache):
            want = self.oracle.contents(self.version, tokens)[layer][first : first + len(slots)]
            torch.testing.assert_close(cache_NW[slots[: len(want)]], want, atol=1e-9, rtol=1e-9)

    def learn(self, tokens: list[int], salt: str) -> None:
        scheduler = self.engine._scheduler
        digest, size = root_digest(scheduler.weights_version, 0, salt), scheduler.block_size
        for end in range(size, len(tokens) - scheduler.lookahead + 1, size):
            digest = block_digest(digest, tokens[end - size : end + scheduler.lookahead])
            self.known[digest] = tuple(tokens[: end + scheduler.lookahead])


class AheadRunner(ModelRunner):
    """Starts steps before the last one is read, as it is done on a GPU."""

    @property
    def runs_ahead(self) -> bool:
        return True


def start_ahead(runner: ModelRunner) -> None:
    runner.__class__ = AheadRunner


@pytest.mark.costly
@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_comes_together(oracle: Oracle, data: st.DataObject) -> None:
    oracle.take(0)
    engine = Engine(
        oracle.model,
        EOS,
        block_size=data.draw(st.sampled_from([1, 2, 4])),
        cache_tokens=data.draw(st.sampled_from([24, 36, 64])),
        max_prefill_tokens=data.draw(st.sampled_from([1, 5, 100])),
        max_batch=data.draw(st.sampled_from([1, 3, 8])),
        speculate=data.draw(st.sampled_from([0, 0, 1, 2, 3])),
    )
    if data.draw(st.booleans()):
        start_ahead(engine._runner)
    checked = Checked(oracle, engine)
    arrivals = data.draw(
        st.lists(
            st.tuples(st.sampled_from(PROMPTS), st.sampled_from(PARAMS), st.sampled_from(["", "", "salt"])),
            min_size=1,
            max_size=6,
        )
    )
    script = data.draw(
        st.lists(st.sampled_from(["step"] * 5 + ["add"] * 3 + ["look", "cancel", "weights"]), max_size=24)
    )
    while script or arrivals or engine.has_work:
        action = script.pop() if script else "add" if arrivals else "step"
        if action == "add" and arrivals:
            prompt, params, salt = arrivals.pop()
            for seed in range(1 if params.greedy else 2):  # samples of one prompt
                checked.add(prompt, SamplingParams(**{**vars(params), "seed": seed}), salt)
        elif action == "cancel" and checked.asked:
            checked.cancel(data.draw(st.sampled_from(sorted(checked.asked))))
        elif action == "weights":
            checked.new_weights()
        elif action == "look":
            checked.check_contents()
        else:
            checked.step()
    checked.check_contents()
    assert engine.stats.cache_blocks_used == 0
    assert set(checked.endings) == set(checked.asked)
