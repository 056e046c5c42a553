"""Our models against transformers' own code, in float32 on the CPU: logits, loss, gradients, generation, caches, files.

The cases are chosen so that every value of every option meets every value of every other option at least once.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from deepwright_core.engine import Engine, SamplingParams
from deepwright_core.errors import RequestError
from deepwright_core.huggingface import to_published
from deepwright_core.training.objective import language_model_loss

from .published_models import (
    CORRECTION_BIAS,
    DEEPSEEK_YARN,
    LONGEST,
    ORIGINAL_LENGTH,
    PLAIN_ROPE,
    YARN,
    Pair,
    difference,
    pair,
    random_tokens,
    registry,
    transformers,
    write,
)

pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element")  # their shared expert of width 0
GENERATED = 64
PROMPTS = (3, 19, 8)  # tokens; one is longer than YaRN's original length before anything is generated


class Case(NamedTuple):
    q_lora: int
    groups: int
    shared: int
    dense: int
    yarn: bool
    tied: bool
    scoring: str = "sigmoid"


V3 = [
    Case(10, 4, 1, 1, True, False, "sigmoid"),  # the published layout
    Case(0, 4, 0, 0, False, True, "softmax"),
    Case(10, 4, 0, 1, True, False, "softmax"),
    Case(0, 1, 0, 2, True, False, "sigmoid"),
    Case(0, 4, 1, 0, True, False, "sigmoid"),
    Case(0, 1, 1, 1, True, True, "sigmoid"),
    Case(10, 1, 1, 2, False, True, "softmax"),
    Case(10, 1, 2, 0, True, True, "softmax"),
    Case(10, 1, 2, 1, False, False, "sigmoid"),
    Case(0, 4, 2, 2, False, False, "sigmoid"),
]
V2 = [  # softmax always
    Case(10, 4, 0, 0, True, True, "softmax"),
    Case(0, 4, 0, 1, False, False, "softmax"),
    Case(10, 1, 0, 2, False, True, "softmax"),
    Case(0, 4, 1, 0, False, False, "softmax"),
    Case(10, 1, 1, 1, True, False, "softmax"),
    Case(0, 1, 1, 2, False, True, "softmax"),
    Case(0, 1, 2, 0, False, False, "softmax"),
    Case(0, 1, 2, 1, True, True, "softmax"),
    Case(10, 4, 2, 2, True, False, "softmax"),
]


def options(case: Case) -> dict[str, Any]:
    return {
        "q_lora_rank": case.q_lora or None,
        "n_group": case.groups,
        "topk_group": 2 if case.groups > 1 else 1,
        "n_shared_experts": case.shared,
        "first_k_dense_replace": case.dense,
        "rope_parameters": DEEPSEEK_YARN if case.yarn else PLAIN_ROPE,
        "tie_word_embeddings": case.tied,
    }


def name(case: Case) -> str:
    return (
        f"q_lora{case.q_lora} groups{case.groups} shared{case.shared} dense{case.dense} "
        f"{'yarn' if case.yarn else 'plain'} {'tied' if case.tied else 'untied'} {case.scoring}"
    )


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        f"V3 {name(case)}": (
            "DeepseekV3",
            {**options(case), "topk_method": "noaux_tc", "scoring_func": case.scoring},
        )
        for case in V3
    },
    **{
        f"V2 {name(case)}": (
            "DeepseekV2",
            {**options(case), "topk_method": "group_limited_greedy" if case.groups > 1 else "greedy"},
        )
        for case in V2
    },
    # eps large enough to be seen: the norms of the latents have 1e-6 whatever it is.
    "V3 eps": ("DeepseekV3", {"rms_norm_eps": 0.05, "q_lora_rank": 10}),
    "V2 eps": ("DeepseekV2", {"rms_norm_eps": 0.05, "q_lora_rank": 10}),
    "V3 weights that do not add up to one": ("DeepseekV3", {"norm_topk_prob": False, "n_group": 4, "topk_group": 2}),
    "V3 two mscales": ("DeepseekV3", {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5}}),
    "V3 no mscale": ("DeepseekV3", {"rope_parameters": YARN}),
    "V2 two mscales": ("DeepseekV2", {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.0}}),
    "Llama": ("Llama", {"rms_norm_eps": 1e-5}),
    "Llama tied, one head of keys": ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "Llama 3.1": ("Llama", {"rope_parameters": LLAMA3}),
    "Llama wide heads": ("Llama", {"head_dim": 12}),
    "Qwen2": ("Qwen2", {}),
    "Qwen2 tied, yarn": ("Qwen2", {"tie_word_embeddings": True, "rope_parameters": YARN}),
}
LATENT_MODELS = {key: model for key, model in MODELS.items() if model[0].startswith("Deepseek")}
# Some of its readers know sigmoids alone, so it cannot be written.
UNWRITABLE = {key for key, model in MODELS.items() if model[0] == "DeepseekV3" and "softmax" in model[1].values()}


@pytest.fixture(params=MODELS)
def both(request: pytest.FixtureRequest) -> Pair:
    architecture, values = MODELS[request.param]
    return pair(architecture, **values)


@pytest.mark.parametrize("cases", [V3, V2], ids=["V3", "V2"])
def test_every_two_options_meet_in_every_way(cases: Sequence[Case]) -> None:
    for one, other in combinations(range(len(Case._fields)), 2):
        values = [sorted({case[place] for case in cases}) for place in (one, other)]
        assert {(case[one], case[other]) for case in cases} == set(product(*values))
    assert {case.shared for case in cases} == {case.dense for case in cases} == {0, 1, 2}


@torch.no_grad()
def test_logits(both: Pair) -> None:
    tokens_BS = random_tokens(2, 3 * ORIGINAL_LENGTH)
    assert difference(both.our_logits(tokens_BS), both.their_logits(tokens_BS)) < 1e-5


@torch.no_grad()
def test_logits_at_the_last_positions(both: Pair) -> None:
    tokens_BS = random_tokens(1, LONGEST)
    assert difference(both.our_logits(tokens_BS), both.their_logits(tokens_BS)) < 1e-5


def test_loss_and_the_gradient_of_every_parameter(both: Pair) -> None:
    from transformers.core_model_loading import revert_weight_conversion

    tokens_BS = random_tokens(4, 3 * ORIGINAL_LENGTH)
    theirs = dict(both.theirs.named_parameters())
    their_loss = both.theirs(tokens_BS, labels=tokens_BS).loss
    their_gradients = torch.autograd.grad(their_loss, list(theirs.values()))
    wanted = revert_weight_conversion(both.theirs, dict(zip(theirs, their_gradients, strict=True)))
    ours = dict(both.ours.named_parameters())
    loss = language_model_loss(both.ours, tokens_BS).total
    gradients = both.by_name_on_disk(dict(zip(ours, torch.autograd.grad(loss, list(ours.values())), strict=True)))
    assert loss.item() == pytest.approx(their_loss.item(), rel=1e-6)
    # All that the files hold, except that a bias which is no parameter has no gradient and nothing has none.
    assert gradients.keys() == {n for n, t in both.tensors.items() if t.numel() and not n.endswith(CORRECTION_BIAS)}
    silent = [n for n, tensor in wanted.items() if tensor.numel() and not tensor.any()]
    assert all(".experts." in n for n in silent) and len(silent) < len(wanted) / 10  # experts that no token chose
    differences = {n: difference(gradients[n], tensor) for n, tensor in wanted.items() if tensor.numel()}
    assert differences.keys() == gradients.keys()
    assert {n: d for n, d in differences.items() if d >= 1e-4} == {}


def their_greedy_tokens(theirs: Any, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Each prompt alone: nothing to pad, nothing to mask."""
    return [
        theirs.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=GENERATED, pad_token_id=0)[
            0, len(prompt) :
        ].tolist()
        for prompt in prompts
    ]


@torch.no_grad()
def test_greedy_generation_in_a_batch_of_unequal_lengths(both: Pair) -> None:
    prompts = [random_tokens(1, length, seed=length)[0].tolist() for length in PROMPTS]
    params = SamplingParams(max_tokens=GENERATED, temperature=0.0, ignore_eos=True)
    engine = Engine(both.ours, 0, block_size=4, cache_tokens=512)
    have = [completion.token_ids for completion in engine.generate(prompts, params)]
    assert have == their_greedy_tokens(both.theirs, prompts)
    assert [len(tokens) for tokens in have] == [GENERATED] * len(PROMPTS)


def halves_to_pairs(x: Tensor) -> Tensor:
    return x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


@pytest.mark.parametrize("key", LATENT_MODELS)
@torch.no_grad()
def test_the_cache_holds_what_theirs_holds(key: str) -> None:
    """Of each token the normed latent, and the rope key, which their DeepseekV3 keeps as two halves."""
    architecture, values = LATENT_MODELS[key]
    both = pair(architecture, **values)
    prompt = random_tokens(1, 3 * ORIGINAL_LENGTH)
    theirs = both.theirs(prompt, use_cache=True).past_key_values
    engine = Engine(both.ours, 0, block_size=LONGEST, cache_tokens=LONGEST)
    engine.generate([prompt[0].tolist()], SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True))
    for layer, cache_NW in enumerate(engine._runner.cache):
        latent_1SC, rope_1SR = theirs.layers[layer].keys[0], theirs.layers[layer].values[0]
        if architecture == "DeepseekV3":
            rope_1SR = halves_to_pairs(rope_1SR)
        want_SW = torch.cat([latent_1SC, rope_1SR], -1)[0]
        have_SW = cache_NW[LONGEST : LONGEST + prompt.shape[1]]  # the first block belongs to padding
        assert difference(have_SW, want_SW) < 1e-5, layer


@torch.no_grad()
def test_what_is_read_is_written_bit_for_bit_and_transformers_reads_it(
    request: pytest.FixtureRequest, both: Pair, tmp_path: Path
) -> None:
    if request.node.callspec.params["both"] in UNWRITABLE:
        with pytest.raises(RequestError, match="scoring is softmax"):
            to_published(registry(), both.ours)
        return
    document, tensors = to_published(registry(), both.ours)
    # A tied head is written too where a reader of the format, vLLM, does not tie it.
    latent = type(both.theirs).__name__.startswith("Deepseek")
    head = {"lm_head.weight"} if latent and both.ours.config.tied_head else set()
    assert tensors.keys() == both.tensors.keys() | head
    assert [n for n, tensor in both.tensors.items() if not torch.equal(tensor, tensors[n])] == []
    assert all(torch.equal(tensors[n], both.tensors["model.embed_tokens.weight"]) for n in head)
    write(tmp_path, document, tensors)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32").eval()
    assert type(again) is type(both.theirs)
    tokens_BS = random_tokens(2, 2 * ORIGINAL_LENGTH)
    assert torch.equal(again(tokens_BS).logits, both.their_logits(tokens_BS))
