"""What single requests ask of their draws, on a GPU and through CUDA graphs.

Each answer asks for the scores of the whole vocabulary, so that what its penalties, biases and controls should have
drawn can be worked out from the model's own probabilities of the very same step.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from deepwright_core.engine import Completion, Engine, SamplingParams, ThinkingControl, compile_grammar
from deepwright_core.engine.penalties import penalised
from deepwright_core.engine.sampler import SamplingRows, sample
from deepwright_core.model.config import ModelConfig
from deepwright_core.model.transformer import Transformer, build_model
from deepwright_core.plugins import installed
from deepwright_core.registry import parse
from deepwright_core.tokenizer.bpe import BpeConfig, train

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

VOCABULARY = 500  # no multiple of 32
EOS, END = 1, 6
VALUES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "layers": 2,
    "intermediate_size": 384,
    "max_positions": 512,
    "init_std": 0.08,
    "mtp": {"depth": 1},
    "attention": {
        "name": "mla",
        "heads": 4,
        "kv_lora_rank": 128,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 64,
        "v_head_dim": 64,
    },
    "ffn": {"name": "dense"},
}
BASE = SamplingParams(max_tokens=24, temperature=0.0, scores=VOCABULARY)
ASKED = [
    replace(BASE, presence_penalty=1.5),
    replace(BASE, frequency_penalty=0.9, min_tokens=20),
    replace(BASE, logit_bias=((7, 3.0), (9, -100.0)), frequency_penalty=1.3),
    replace(BASE, stop_ids=(30, 31), min_tokens=24),
    replace(BASE, thinking=ThinkingControl(END, opened=True, budget=5, closing=(40, 41))),
    replace(BASE, thinking=ThinkingControl(END, opened=True, least=9, continuation=(42, 43)), logit_bias=((END, 4.0),)),
    BASE,
]
PROMPTS = [[(11 * i + 3 * j) % 499 for j in range(length)] for i, length in enumerate((5, 70, 33, 200, 1, 129, 64))]


@pytest.fixture(scope="module")
def model() -> Transformer:
    registry = installed().registry
    return build_model(registry, parse(ModelConfig, VALUES, "model", registry), seed=0).to("cuda", torch.bfloat16)


def check(p: SamplingParams, completion: Completion) -> None:
    """Each drawn token is the best of what its scores become; each forced one is where it must be."""
    answer: list[int] = []
    forced = completion.forced or [False] * len(completion.token_ids)
    for token, score, put in zip(completion.token_ids, completion.scores, forced, strict=True):
        logits = torch.full((VOCABULARY,), -torch.inf, dtype=torch.float64)
        logits[[i for i, _ in score.top]] = torch.tensor([x for _, x in score.top], dtype=torch.float64)
        assert score.token_id == token
        assert score.logprob == pytest.approx(float(logits[token]), abs=1e-5)
        assert float(logits.exp().sum()) == pytest.approx(1.0, abs=1e-4)
        if not put:
            for i in set(answer):
                logits[i] -= p.presence_penalty + p.frequency_penalty * answer.count(i)
            for i, bias in p.logit_bias:
                logits[i] += bias
            if len(answer) < p.min_tokens:
                logits[[EOS, *p.stop_ids]] = -torch.inf
            assert float(logits[token]) == pytest.approx(float(logits.max()), abs=1e-4)
        answer.append(token)
    control = p.thinking
    if control is not None and control.budget is not None:
        assert answer[control.budget :][:3] == [*control.closing, END] or END in answer[: control.budget]
    if control is not None and control.least and END in answer:
        assert answer.index(END) >= control.least


@pytest.mark.parametrize("options", [{"graphs": "off"}, {}, {"speculate": 1}, {"cache_tokens": 768}], ids=str)
def test_what_is_drawn_is_what_was_asked_for(model: Transformer, options: dict[str, Any]) -> None:
    engine = Engine(model, EOS, **{"cache_tokens": 4096, **options})
    for turn in range(2):
        params = ASKED[turn:] + ASKED[:turn]
        for p, completion in zip(params, engine.generate(PROMPTS, params), strict=True):
            check(p, completion)
            assert len(completion.token_ids) >= p.min_tokens
    assert engine.stats.cache_blocks_used == 0


def test_prompt_scores_are_those_of_a_whole_pass(model: Transformer) -> None:
    engine = Engine(model, EOS, cache_tokens=4096, max_prefill_tokens=64)
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_scores=2)
    for prompt, completion in zip(PROMPTS, engine.generate(PROMPTS, params), strict=True):
        with torch.no_grad():
            want = model.logits(model(torch.tensor([prompt], device="cuda")))[0].log_softmax(-1)
        assert completion.prompt_scores is not None
        assert [score.token_id for score in completion.prompt_scores] == prompt[1:]
        for place, score in enumerate(completion.prompt_scores):
            assert score.logprob == pytest.approx(float(want[place, score.token_id]), abs=0.1)  # bf16, other kernels


def test_penalties_are_the_same_on_both_devices() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, VOCABULARY, generator=generator)
    answer = torch.randint(0, 3, (5, VOCABULARY), generator=generator, dtype=torch.int32)
    prompt = torch.rand(5, VOCABULARY, generator=generator) < 0.2
    params = {name: torch.rand(5, generator=generator) + 0.5 for name in ("repetition_P", "presence_P", "frequency_P")}
    want = penalised(logits, answer, prompt, **params)
    got = penalised(logits.cuda(), answer.cuda(), prompt.cuda(), **{k: v.cuda() for k, v in params.items()})
    torch.testing.assert_close(got.cpu(), want, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("vocabulary", [23, 500, 32768, 129280])
def test_draws_are_the_same_on_both_devices(vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    rows = 48
    logits = (torch.randn(rows, vocabulary, generator=generator) * 3).round(decimals=1)  # with many ties
    drawn = SamplingRows(
        temperature_B=torch.tensor([0.0, 0.3, 1.0, 1.7]).repeat(12),
        top_p_B=torch.tensor([1.0, 0.9, 0.5]).repeat(16),
        min_p_B=torch.tensor([0.0, 0.0, 0.0, 0.05, 0.3, 0.0]).repeat(8),
        top_k_B=torch.tensor([0, 0, 1, 40, 1500, 0, 0, 3]).repeat(6),
        seed_B=torch.arange(rows),
    )
    on_gpu = SamplingRows(*(getattr(drawn, name).cuda() for name in drawn.__dataclass_fields__))
    for truncated in (False, True):
        same = 0
        for position in range(4):
            at = torch.full((rows,), position)
            want = sample(logits, drawn, at, any_random=True, any_truncated=truncated)
            got = sample(logits.cuda(), on_gpu, at.cuda(), any_random=True, any_truncated=truncated)
            same += int((got[0].cpu() == want[0]).sum())
            agree = got[0].cpu() == want[0]
            torch.testing.assert_close(got[1].cpu()[agree], want[1][agree], atol=1e-5, rtol=0)
        assert same >= 4 * rows - 1  # rounding may move a draw that lies on a boundary


def test_a_grammar_on_a_gpu(model: Transformer) -> None:
    pytest.importorskip("llguidance")
    tokenizer = train(BpeConfig(vocab_size=330, min_frequency=2), ["yes, no, 42. Ein Käse"] * 4)
    grammar = compile_grammar(tokenizer, "regex", "[0-9]{2,4}(ä|x)*")
    engine = Engine(model, EOS, cache_tokens=4096)
    params = [SamplingParams(max_tokens=60, seed=i, grammar=grammar if i % 2 else None) for i in range(16)]
    for p, completion in zip(params, engine.generate([[3]] * 16, params), strict=True):
        if p.grammar is not None and completion.finish_reason == "stop":
            assert re.fullmatch("[0-9]{2,4}(ä|x)*", tokenizer.decode(completion.token_ids))
