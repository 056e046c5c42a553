"""Decoding through CUDA graphs: the same tokens and the same cache as kernel by kernel, whatever joins and leaves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from deepwright_core.engine import Completion, Engine, SamplingParams
from deepwright_core.engine.graphs import Graphs
from deepwright_core.engine.runner import ModelRunner
from deepwright_core.model.config import ModelConfig, MtpConfig
from deepwright_core.model.transformer import Transformer, build_model
from deepwright_core.plugins import installed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; there is none here"),
]

MLA = {"name": "mla", "heads": 4, "kv_lora_rank": 512, "qk_nope_head_dim": 64, "qk_rope_head_dim": 64, "v_head_dim": 64}
GQA = {"name": "gqa", "heads": 4, "kv_heads": 2, "head_dim": 64}
MOE = {"name": "moe", "experts": 32, "top_k": 4, "intermediate_size": 128}
DENSE = {"name": "dense"}  # in float32 torch's product over experts asks the host, which no graph can
GREEDY = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)


def model(
    attention: dict[str, Any], dtype: torch.dtype = torch.bfloat16, modules: int = 0, ffn: dict[str, Any] = MOE
) -> Transformer:
    config = ModelConfig(
        vocab_size=512,
        hidden_size=256,
        layers=3,
        intermediate_size=512,
        first_dense_layers=1,
        max_positions=4096,
        init_std=0.08,
        mtp=MtpConfig(depth=modules),
        attention=attention,
        ffn=ffn,
    )
    return build_model(installed().registry, config, seed=0).to("cuda", dtype).eval()


@pytest.fixture(scope="module", params=[MLA, GQA], ids=["mla", "gqa"])
def served(request: pytest.FixtureRequest) -> Iterator[Transformer]:
    yield model(request.param)


def prompts(count: int, longest: int = 90) -> list[list[int]]:
    draw = torch.Generator().manual_seed(count)
    lengths = torch.randint(1, longest, (count,), generator=draw).tolist()
    return [torch.randint(512, (length,), generator=draw).tolist() for length in lengths]


def tokens(completions: list[Completion]) -> list[list[int]]:
    return [completion.token_ids for completion in completions]


@pytest.mark.parametrize("count", [1, 8, 32])  # sizes that are not padded: every product is the same product
def test_graphs_give_the_same_tokens_and_the_same_cache(served: Transformer, count: int) -> None:
    engines = [Engine(served, 0, graphs=graphs, max_batch=32, cache_tokens=32 * 256) for graphs in ("auto", "off")]
    with_graphs, without = (engine.generate(prompts(count), GREEDY) for engine in engines)
    assert with_graphs == without
    for a, b in zip(engines[0]._runner.cache, engines[1]._runner.cache, strict=True):
        assert torch.equal(a[64:], b[64:])  # any of the paddings that write to block 0 may be the last


@pytest.mark.parametrize(
    "params",
    # Nothing truncated: a token at the edge of top_p comes or goes with the last bit of a logit.
    [replace(GREEDY, max_tokens=48), SamplingParams(max_tokens=48, ignore_eos=True)],
)
def test_unequal_requests_that_come_and_go(params: SamplingParams, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are padded, leave, move up and are preempted, and steps run ahead of their reading. In float32, where a
    padded product gives the same tokens."""
    exact = model(MLA, torch.float32, ffn=DENSE)
    lengths = [params.max_tokens - i % 11 for i in range(21)]
    wanted = [SamplingParams(**{**vars(params), "max_tokens": n, "seed": i}) for i, n in enumerate(lengths)]
    results = []
    for graphs in ("auto", "off"):
        if graphs == "off":
            monkeypatch.setattr(ModelRunner, "runs_ahead", False)
        engine = Engine(
            exact, 0, graphs=graphs, max_batch=13, block_size=16, cache_tokens=50 * 16, max_prefill_tokens=100
        )
        results.append(engine.generate(prompts(21), wanted))
        assert engine.stats.cache_blocks_used == 0
        assert engine.stats.preemptions > 0
        assert engine._runner._graphs is None or engine._runner._graphs.refusal is None
    for a, b in zip(*results, strict=True):
        assert a.token_ids == b.token_ids
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-3)


def test_padding_writes_into_nobodys_blocks() -> None:
    """A row that was left must not go on writing: its block belongs to another sequence by now."""
    exact = model(MLA, torch.float32, ffn=DENSE)
    engine = Engine(exact, 0, max_batch=8, cache_tokens=8 * 64)
    short, long = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True), GREEDY
    engine.generate(prompts(8, 30), [long, *[short] * 7])  # seven leave at once, their rows stay behind as padding
    alone = Engine(exact, 0, graphs="off", max_batch=1, cache_tokens=8 * 64)
    prompt = (prompts(1)[0] * 40)[:200]
    after = engine.generate([prompt], GREEDY)[0]
    assert after.token_ids == alone.generate([prompt], GREEDY)[0].token_ids


def test_contexts_that_outgrow_a_width() -> None:
    exact = model(MLA, torch.float32, ffn=DENSE)
    prompt = (prompts(1)[0] * 1016)[:1016]
    params = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)
    with_graphs, without = (
        Engine(exact, 0, graphs=graphs, max_batch=2, cache_tokens=4096).generate([prompt, prompt[:70]], params)
        for graphs in ("auto", "off")
    )
    assert tokens(with_graphs) == tokens(without)


@pytest.mark.parametrize("drafts", [1, 3])
@pytest.mark.parametrize("params", [GREEDY, SamplingParams(max_tokens=24, top_k=3, ignore_eos=True)])
def test_speculation_through_graphs(params: SamplingParams, drafts: int) -> None:
    """Verifying and drafting are graphs of their own; what is drawn is what is drawn without drafts."""
    exact = model(MLA, torch.float32, modules=2, ffn=DENSE)
    results = [
        tokens(
            Engine(exact, 0, graphs=graphs, max_batch=7, cache_tokens=7 * 128, speculate=k).generate(
                prompts(12), params
            )
        )
        for graphs, k in (("off", 0), ("off", drafts), ("auto", drafts))
    ]
    assert results[2] == results[1] == results[0]


def test_fp8_cache() -> None:
    """Its kernel shares work out by the table's width, which graphs pad: results agree to rounding, and rounding now
    and then takes a cached latent to the next of the few values that FP8 has."""
    served = model(MLA)
    with_graphs, without = (
        Engine(served, 0, graphs=graphs, max_batch=8, cache_dtype="fp8").generate(prompts(8), GREEDY)
        for graphs in ("auto", "off")
    )
    for a, b in zip(with_graphs, without, strict=True):
        same = next((i for i, (x, y) in enumerate(zip(a.token_ids, b.token_ids, strict=True)) if x != y), 24)
        assert a.logprobs[:same] == pytest.approx(b.logprobs[:same], abs=0.15)
        if same < 24:  # two tokens were about as probable
            assert a.logprobs[same] == pytest.approx(b.logprobs[same], abs=0.15)
    assert sum(a.token_ids == b.token_ids for a, b in zip(with_graphs, without, strict=True)) >= 4


def test_weights_that_change_in_place_and_weights_that_move(served: Transformer) -> None:
    engine = Engine(served, 0, max_batch=8, cache_tokens=4096)
    before = engine.generate(prompts(8), GREEDY)
    captured = len(engine._runner._graphs._captured)
    kept = [parameter.detach().clone() for parameter in served.parameters()]
    generator = torch.Generator("cuda").manual_seed(1)
    try:
        with torch.no_grad():
            for parameter in served.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, 0.08, generator=generator)
        engine.update_weights()
        changed = tokens(engine.generate(prompts(8), GREEDY))
        assert changed == tokens(Engine(served, 0, max_batch=8, graphs="off").generate(prompts(8), GREEDY))
        assert changed != tokens(before)
        assert len(engine._runner._graphs._captured) == captured
    finally:
        for parameter, old in zip(served.parameters(), kept, strict=True):
            parameter.data = old  # elsewhere in memory
    engine.update_weights()
    assert tokens(engine.generate(prompts(8), GREEDY)) == tokens(before)


def test_after_a_warm_up_nothing_is_captured() -> None:
    engine = Engine(model(MLA), 0, max_batch=8, cache_tokens=4096)
    engine.warm_up()
    captured = len(engine._runner._graphs._captured)
    assert captured == 4 * 3  # rows 1, 2, 4, 8; contexts of 1024, 2048, 4096
    engine.generate(prompts(7), GREEDY)
    assert len(engine._runner._graphs._captured) == captured


def test_after_a_warm_up_nothing_is_captured_for_drafts() -> None:
    engine = Engine(model(MLA, modules=1), 0, max_batch=4, cache_tokens=4096, speculate=1)
    engine.warm_up()
    captured = len(engine._runner._graphs._captured)
    # Rows 1, 2, 4: to accept, and for contexts of 1024, 2048, 4096 to verify, to draft greedily, to draft at random.
    assert captured == 3 + 3 * 3 * 3
    for params in (
        GREEDY,
        SamplingParams(max_tokens=9),
        SamplingParams(max_tokens=9, top_p=0.8, logit_bias=((3, 1.0),)),
    ):
        engine.generate(prompts(3), params)
    assert len(engine._runner._graphs._captured) == captured


def test_a_model_that_cannot_be_captured_decodes_without(caplog: pytest.LogCaptureFixture) -> None:
    served = model(GQA)
    want = Engine(served, 0, max_batch=8, graphs="off").generate(prompts(8), GREEDY)
    extend = served.extend

    def curious(tokens: torch.Tensor, *rest: Any) -> torch.Tensor:
        hidden = extend(tokens, *rest)
        hidden.sum().item()  # makes the host wait
        return hidden

    served.extend = curious  # type: ignore[method-assign]
    assert Engine(served, 0, max_batch=8).generate(prompts(8), GREEDY) == want
    assert "without CUDA graphs" in caplog.text
    torch.cuda.synchronize()


def test_results_are_overwritten_by_the_next_run_only() -> None:
    graphs = Graphs(torch.device("cuda", torch.cuda.current_device()))
    source = torch.ones(4, device="cuda")
    for value in (1.0, 2.0, 3.0):
        source.fill_(value)
        assert graphs.run("double", lambda: source * 2).tolist() == [2 * value] * 4
