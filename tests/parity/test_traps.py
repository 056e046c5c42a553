"""The known ways to build a DeepSeek that is nearly right, with a test for each that fails when it is built so.

Traps 1-13 are about the function: router (1-6), latent attention (7-10), multi-token prediction (11), FP8 (12, 13).
The others are about files. Who is right is told by transformers, or by a formula written out here.
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from deepwright_core.engine import Engine, SamplingParams
from deepwright_core.huggingface import export_directory, from_published, import_directory, to_published
from deepwright_core.huggingface.memory import read_config_document
from deepwright_core.model.config import ModelConfig
from deepwright_core.model.directory import load_model, save_model
from deepwright_core.model.record import ForwardRecord
from deepwright_core.model.rope import Rotary, softmax_scale
from deepwright_core.model.transformer import Transformer, build_model
from deepwright_core.training.objective import language_model_loss
from deepwright_core.training.trainer import Trainer
from deepwright_kernels import dequantise_fp8_blocks, quantise_fp8_blocks

from .published_models import (
    CORRECTION_BIAS,
    DEEPSEEK_YARN,
    LATENT,
    ORIGINAL_LENGTH,
    SIZES,
    Pair,
    difference,
    pair,
    random_tokens,
    registry,
    transformers,
    write,
)
from .published_mtp import LAYERS, published, their_logits

FULL = {
    "q_lora_rank": 10,
    "n_group": 4,
    "topk_group": 2,
    "n_shared_experts": 2,
    "rope_parameters": DEEPSEEK_YARN,
}
MIXTURE_LAYER = 1
EXPERTS, TOP_K = SIZES["DeepseekV3"]["n_routed_experts"], SIZES["DeepseekV3"]["num_experts_per_tok"]
# The published config.json of DeepSeek-V3, as far as positions are concerned.
V3_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 40.0,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
V3_POSITIONS = 163840


def v3(**options: Any) -> Pair:
    return pair("DeepseekV3", **{**FULL, **options})


def routers(both: Pair) -> tuple[Any, Any]:
    """Their gate and our router, copied: a test may change them."""
    gate = both.theirs.model.layers[MIXTURE_LAYER].mlp.gate
    return copy.deepcopy(gate), copy.deepcopy(both.ours.layers[MIXTURE_LAYER].ffn.router)


def hidden_states(rows: int, length: int) -> Tensor:
    return torch.randn(rows, length, SIZES["DeepseekV3"]["hidden_size"], generator=torch.Generator().manual_seed(5))


def spread(experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """[T, E]: each expert's weight, nan where it is not chosen."""
    return torch.full((len(experts_TK), EXPERTS), math.nan).scatter(1, experts_TK, weights_TK)


def assert_same_routing(router: nn.Module, gate: nn.Module, hidden_TD: Tensor) -> None:
    have = router(hidden_TD)
    with torch.autocast("cpu", enabled=False):  # theirs follows autocast
        _, weights_TK, experts_TK = gate(hidden_TD)
    torch.testing.assert_close(
        spread(have.experts_TK, have.weights_TK), spread(experts_TK, weights_TK), equal_nan=True, rtol=1e-5, atol=1e-6
    )


@torch.no_grad()
def test_trap_01_the_bias_chooses_and_never_weights() -> None:
    """Sigmoids in float32, also under autocast. The correction bias moves choices, leaves weights alone, and is no
    parameter: an optimizer must not see it, a checkpoint must."""
    gate, router = routers(v3(n_group=1, topk_group=1))
    hidden_TD = hidden_states(1, 64)[0]
    assert_same_routing(router, gate, hidden_TD)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_routing(router, gate, hidden_TD)
    chosen_TK = router(hidden_TD).experts_TK
    router.bias_E.zero_()
    assert (router(hidden_TD).experts_TK.sort(-1).values != chosen_TK.sort(-1).values).any()
    assert [name for name, _ in router.named_parameters()] == ["weight"]
    assert router.state_dict()["bias_E"].dtype == torch.float32


@pytest.mark.parametrize("shift", [0.0, -2.0], ids=["as it is", "every biased score negative"])
@torch.no_grad()
def test_trap_02_a_group_is_worth_its_two_best_and_a_dropped_one_is_out(shift: float) -> None:
    """Biased scores decide about groups too. Dropped groups at 0 instead of -inf would win over negative scores."""
    gate, router = routers(v3())
    gate.e_score_correction_bias += shift
    router.bias_E += shift
    assert_same_routing(router, gate, hidden_states(1, 64)[0])


@pytest.mark.parametrize("normalise", [True, False])
@torch.no_grad()
def test_trap_03_weights_are_normalised_before_they_are_scaled_and_never_divided_by_zero(normalise: bool) -> None:
    """Weights add up to the scaling factor, 2.5. Scores that underflow give zeros, not nan."""
    gate, router = routers(v3(norm_topk_prob=normalise))
    hidden_TD = hidden_states(1, 64)[0]
    assert_same_routing(router, gate, hidden_TD)
    sums = router(hidden_TD).weights_TK.sum(-1)
    assert torch.allclose(sums, torch.tensor(2.5)) == normalise
    for module in (gate, router):
        module.weight.fill_(-100.0)
    weights_TK = router(torch.ones_like(hidden_TD)).weights_TK
    assert torch.equal(weights_TK, torch.zeros_like(weights_TK))
    assert_same_routing(router, gate, torch.ones_like(hidden_TD))


@torch.no_grad()
def test_trap_04_the_shared_expert_has_no_gate_and_no_token_is_dropped() -> None:
    """The output is routed + shared, the shared expert being as wide as all shared ones together. 64 equal tokens all
    go to the same experts: with a capacity, most of them would get nothing."""
    both = v3()
    theirs, ours = both.theirs.model.layers[MIXTURE_LAYER].mlp, both.ours.layers[MIXTURE_LAYER].ffn
    for hidden in (hidden_states(2, 24), hidden_states(1, 1).expand(2, 64, -1)):
        assert difference(ours(hidden, None), theirs(hidden)) < 1e-5
    width = FULL["n_shared_experts"] * SIZES["DeepseekV3"]["moe_intermediate_size"]
    assert both.tensors[f"model.layers.{MIXTURE_LAYER}.mlp.shared_experts.gate_proj.weight"].shape[0] == width
    assert ours.shared.gate.weight.shape[0] == width


def their_choices(theirs: Any, batches: list[Tensor]) -> list[dict[int, tuple[Tensor, Tensor]]]:
    """For each batch and each layer with a mixture: the sigmoid scores [T, E] and the chosen experts [T, K]."""
    seen: list[dict[int, tuple[Tensor, Tensor]]] = []
    hooks = []
    for layer, block in enumerate(theirs.model.layers):
        if hasattr(block.mlp, "gate"):

            def note(module: Any, inputs: Any, routing: Any, layer: int = layer) -> None:
                seen[-1][layer] = (routing[0].sigmoid(), routing[2])

            hooks.append(block.mlp.gate.register_forward_hook(note))
    for tokens_BS in batches:
        seen.append({})
        theirs(tokens_BS)
    for hook in hooks:
        hook.remove()
    return seen


def test_trap_05_the_bias_moves_by_the_sign_of_the_load_of_the_whole_batch() -> None:
    """Once an optimizer step: b + 0.001 · sign(mean load - load), the load being that of all micro-batches together.
    Each micro-batch for itself would move it twice; by the difference instead of its sign, much further."""
    both = v3()
    ours = from_published(registry(), both.document, both.tensors)
    batches = [random_tokens(2, 24, seed) for seed in (1, 2)]
    with torch.no_grad():
        choices = their_choices(both.theirs, [tokens[:, :-1] for tokens in batches])
    optimizer = torch.optim.SGD([{"params": list(ours.parameters()), "peak_lr": 0.0}], lr=0.0)
    trainer = Trainer(ours, optimizer, lambda step: 1.0, clip=1e9)
    trainer.update(0, [lambda tokens=tokens: language_model_loss(ours, tokens).scaled(0.5) for tokens in batches])
    assert choices[0].keys() == {1, 2}
    for layer in choices[0]:
        load_E = sum(choice[layer][1].flatten().bincount(minlength=EXPERTS) for choice in choices)
        before = both.tensors[f"model.layers.{layer}.mlp.gate.{CORRECTION_BIAS}"]
        want = before + 0.001 * torch.sign(load_E.float().mean() - load_E)
        torch.testing.assert_close(ours.layers[layer].ffn.router.bias_E, want, rtol=0, atol=1e-7)


def test_trap_05_activation_recomputation_does_not_count_twice() -> None:
    ours = v3().ours
    record, hidden = ForwardRecord(), hidden_states(2, 9).requires_grad_()
    block, rope = ours.layers[MIXTURE_LAYER], ours.rotary(torch.arange(9)[None])
    calls: list[None] = []
    hook = block.ffn.router.register_forward_hook(lambda *_: calls.append(None))
    with set_checkpoint_early_stop(False):  # the whole block again, its report included
        checkpoint(block, hidden, rope, None, record, use_reentrant=False).sum().backward()
    hook.remove()
    ours.zero_grad()
    assert len(calls) == 2
    assert int(record.loads[MIXTURE_LAYER].sum()) == 2 * 9 * TOP_K


@torch.no_grad()
def test_trap_06_the_balance_loss_is_taken_sequence_by_sequence_from_unbiased_scores() -> None:
    """Report, eq. 17-20: α Σ f P, f counting the K best of the scores without the bias (and without groups), P the mean
    of the scores that are normalised over all experts; then the mean over sequences."""
    alpha, length = 0.01, 30
    both = v3(aux_loss_alpha=alpha)
    tokens_BS = random_tokens(3, length + 1)
    record = language_model_loss(both.ours, tokens_BS).record
    choices = their_choices(both.theirs, [tokens_BS[:, :-1]])[0]
    assert record.losses.keys() == choices.keys()
    for layer, (scores_TE, _) in choices.items():
        losses = []
        for scores in scores_TE.view(3, length, EXPERTS).tolist():
            loss = 0.0
            for expert in range(EXPERTS):
                best = [sorted(range(EXPERTS), key=lambda e, row=row: -row[e])[:TOP_K] for row in scores]
                f = EXPERTS / (TOP_K * length) * sum(expert in row for row in best)
                p = sum(row[expert] / sum(row) for row in scores) / length
                loss += f * p
            losses.append(alpha * loss)
        assert float(record.losses[layer]) == pytest.approx(sum(losses) / 3, rel=1e-5)


@pytest.mark.parametrize("q_lora_rank", [10, None])
@torch.no_grad()
def test_trap_07_heads_are_nope_then_rope_and_the_rope_key_has_no_norm(q_lora_rank: int | None) -> None:
    """One attention layer. Without a rank for queries there is one projection and no norm. The rope key made five times
    longer changes the result: a norm would hide it. The norms of the latents have an eps of 1e-6 of their own."""
    both = v3(q_lora_rank=q_lora_rank, rms_norm_eps=0.05)
    theirs, ours = (copy.deepcopy(m) for m in (both.theirs.model.layers[0].self_attn, both.ours.layers[0].attention))
    assert hasattr(ours, "q_b") == hasattr(ours, "q_norm") == (not hasattr(ours, "q")) == (q_lora_rank is not None)
    hidden, positions = hidden_states(2, 40), torch.arange(40)[None]
    results = []
    for factor in (1.0, 5.0):
        theirs.kv_a_proj_with_mqa.weight[LATENT["kv_lora_rank"] :] *= factor
        ours.kv_a.weight[LATENT["kv_lora_rank"] :] *= factor
        turned = both.theirs.model.rotary_emb(hidden, positions)
        want = theirs(hidden, position_embeddings=turned, attention_mask=None)[0]
        results.append(ours(hidden, both.ours.rotary(positions), None))
        assert difference(results[-1], want) < 1e-5
    assert difference(*results) > 0.01


@torch.no_grad()
def test_trap_08_absorbed_decoding_is_the_same_function() -> None:
    """Token by token over the latent cache, with the softmax scale of the whole query head and not of the latents."""
    both = v3()
    prompt = random_tokens(1, 5)[0].tolist()
    engine = Engine(both.ours, 0, block_size=4, cache_tokens=256)
    absorbed: list[int] = []
    attention = both.ours.layers[0].attention
    whole = type(attention)._attend_absorbed
    attention._attend_absorbed = lambda *given: (absorbed.append(1), whole(attention, *given))[1]
    completion = engine.generate([prompt], SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True))[0]
    del attention._attend_absorbed
    assert len(absorbed) == 39  # every token but the first, which the prompt gives
    sequence = torch.tensor([prompt + completion.token_ids])
    logprobs = both.theirs(sequence).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    want = logprobs.gather(1, sequence[0, len(prompt) :, None])[:, 0]
    torch.testing.assert_close(torch.tensor(completion.logprobs), want, rtol=0, atol=1e-4)


def test_trap_08_the_cache_of_the_published_model_has_576_values_a_token_and_layer() -> None:
    """61 layers in bfloat16: 70,272 bytes for a token. Keys and values of every head would be 57 times that."""
    latent = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
    config = ModelConfig(
        hidden_size=7168,
        layers=61,
        intermediate_size=1,
        vocab_size=1,
        max_positions=2,
        attention={"name": "mla", "heads": 128, "q_lora_rank": 1536, **latent},
        ffn={"name": "dense"},
    )
    with torch.device("meta"):
        widths = build_model(registry(), config).cache_widths
    assert widths == [576] * 61
    assert sum(widths) * torch.bfloat16.itemsize == 70_272


@pytest.mark.parametrize(("architecture", "halves"), [("DeepseekV3", True), ("DeepseekV2", False)])
@torch.no_grad()
def test_trap_09_rope_turns_neighbours_and_caches_are_not_exchanged(architecture: str, halves: bool) -> None:
    """Files hold pairs, and we leave them so, in weights and in the cache. transformers' V3 caches halves: the scores
    are the same, the cached keys are not."""
    both = pair(architecture, q_lora_rank=10)
    for layer, block in enumerate(both.ours.layers):
        theirs = both.tensors[f"model.layers.{layer}.self_attn.q_b_proj.weight"]
        assert torch.equal(block.attention.q_b.weight, theirs)
    tokens = random_tokens(1, 20)
    engine = Engine(both.ours, 0, block_size=32, cache_tokens=32)
    engine.generate([tokens[0].tolist()], SamplingParams(max_tokens=1, temperature=0.0))
    have_SR = engine._runner.cache[0][32 : 32 + 20, LATENT["kv_lora_rank"] :]
    want_SR = both.theirs(tokens, use_cache=True).past_key_values.layers[0].values[0, 0]
    as_pairs = want_SR.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
    assert difference(have_SR, as_pairs if halves else want_SR) < 1e-5
    assert difference(have_SR, want_SR if halves else as_pairs) > 0.1
    assert difference(both.our_logits(tokens), both.their_logits(tokens)) < 1e-5


def published_rope() -> tuple[Any, ModelConfig]:
    """Their config of the published model, and ours read from it."""
    config = transformers.DeepseekV3Config(rope_parameters=V3_ROPE, max_position_embeddings=V3_POSITIONS)
    return config, read_config_document(config.to_dict(), registry(), "config.json")[1]


def test_trap_10_yarn_of_the_published_model_multiplies_the_softmax_scale_by_1_874() -> None:
    """Factor 40: (0.1 ln 40 + 1)² in the scale, which therefore has to be given to every attention call."""
    theirs, config = published_rope()
    assert softmax_scale(192, config.rope) * 192**0.5 == pytest.approx(1.874, abs=5e-4)
    with torch.device("meta"):
        attention = transformers.models.deepseek_v3.modeling_deepseek_v3.DeepseekV3Attention(theirs, 0)
        ours = registry().build("attention", config.attention, config, 0)
    assert ours.scale == pytest.approx(attention.scaling, rel=1e-12)


@torch.no_grad()
def test_trap_10_yarn_turns_far_positions_by_the_published_angles() -> None:
    theirs, config = published_rope()
    positions = torch.tensor([0, 1, 4095, 4096, 30000, V3_POSITIONS - 1])
    rotary = transformers.models.deepseek_v3.modeling_deepseek_v3.DeepseekV3RotaryEmbedding(theirs)
    want = rotary(torch.zeros(1), positions[None])
    for table, angle in zip(Rotary(64, config.rope, V3_POSITIONS)(positions), want, strict=True):
        torch.testing.assert_close(table, angle[0, :, :32], rtol=0, atol=1e-6)


@torch.no_grad()
def test_trap_10_the_scale_is_the_same_in_training_and_in_decoding() -> None:
    """Far beyond the original length, where another scale would tell."""
    both = v3()
    tokens = random_tokens(1, 6 * ORIGINAL_LENGTH)
    assert difference(both.our_logits(tokens), both.their_logits(tokens)) < 1e-5
    engine = Engine(both.ours, 0, block_size=4, cache_tokens=256)
    completion = engine.generate([tokens[0].tolist()], SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True))
    first, second = completion[0].token_ids
    longer = torch.cat([tokens, torch.tensor([[first]])], 1)
    want = both.their_logits(longer)[0, -1].log_softmax(-1)[second]
    assert completion[0].logprobs[1] == pytest.approx(float(want), abs=1e-4)


def test_trap_11_the_modules_follow_the_last_layer_under_their_published_names() -> None:
    """Copies of embedding and head included: their readers look for them."""
    _, _, document, tensors = published(2)
    config, again = to_published(registry(), from_published(registry(), document, tensors))
    assert config["num_nextn_predict_layers"] == 2 and config["num_hidden_layers"] == LAYERS
    for layer in (LAYERS, LAYERS + 1):
        prefix = f"model.layers.{layer}."
        own = {name.removeprefix(prefix) for name in again if name.startswith(prefix)}
        assert {name for name in own if not name.startswith(("self_attn.", "mlp."))} == {
            "enorm.weight",
            "hnorm.weight",
            "eh_proj.weight",
            "shared_head.norm.weight",
            "shared_head.head.weight",
            "embed_tokens.weight",
            "input_layernorm.weight",
            "post_attention_layernorm.weight",
        }
        assert again[f"{prefix}eh_proj.weight"].shape == (32, 64)
        assert torch.equal(again[f"{prefix}embed_tokens.weight"], again["model.embed_tokens.weight"])
        assert torch.equal(again[f"{prefix}shared_head.head.weight"], again["lm_head.weight"])


@torch.no_grad()
def test_trap_11_the_embedding_comes_first_and_documents_in_a_row_do_not_predict_each_other() -> None:
    """The report prints [hidden ; embedding], the files hold [embedding ; hidden]. Three documents packed into one row
    are worth what transformers' model and modules say of each of them alone."""
    main, modules, document, tensors = published(2)
    ours = from_published(registry(), {**document, "aux_loss_alpha": 0.0}, tensors)
    documents = [random_tokens(1, length, seed=length) for length in (9, 14, 5)]
    wanted: list[list[Tensor]] = [[], [], []]
    for tokens_BS in documents:
        logits = [main(tokens_BS).logits[:, :-1], *(each[:, :-1] for each in their_logits(main, modules, tokens_BS))]
        for k, each in enumerate(logits):
            wanted[k].append(F.cross_entropy(each[0], tokens_BS[0, 1 + k :], reduction="none"))
    means = [float(torch.cat(losses).mean()) for losses in wanted]
    segments = torch.cat([torch.full_like(tokens, n) for n, tokens in enumerate(documents)], 1)
    loss = language_model_loss(ours, torch.cat(documents, 1), segments)
    assert float(loss.next_token) == pytest.approx(means[0], rel=1e-5)
    assert float(loss.further) == pytest.approx((means[1] + means[2]) / 2, rel=1e-5)


@torch.no_grad()
def test_trap_12_the_inverse_scale_multiplies_and_the_last_block_may_be_partial(tmp_path: Path) -> None:
    """576 rows are four blocks of 128 and a half one. `weight_scale_inv` multiplies, whatever its name says."""
    sizes = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "hidden_size": 160, "num_hidden_layers": 1}
    both = pair("DeepseekV3", **sizes, first_k_dense_replace=1)
    name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(576, 160, generator=draw).to(torch.float8_e4m3fn)
    scales = torch.rand(5, 2, generator=draw) + 0.5
    want = torch.empty(576, 160)
    for row in range(5):
        for column in range(2):
            place = (slice(128 * row, 128 * row + 128), slice(128 * column, 128 * column + 128))
            want[place] = values[place].float() * scales[row, column]
    assert torch.equal(dequantise_fp8_blocks(values, scales, dtype=torch.float32), want)
    document = {
        **both.document,
        "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
    }
    write(tmp_path / "theirs", document, {**both.tensors, name: values, f"{name}_scale_inv": scales})
    import_directory(tmp_path / "theirs", tmp_path / "ours", registry(), dtype="fp32")
    assert torch.equal(load_model(tmp_path / "ours", registry()).layers[0].attention.kv_a.weight, want)
    again, inverse = quantise_fp8_blocks(want)
    assert inverse.shape == (5, 2)
    torch.testing.assert_close(dequantise_fp8_blocks(again, inverse, dtype=torch.float32), want, rtol=0.07, atol=0.01)


@torch.no_grad()
def test_trap_13_embedding_head_router_norms_and_mtp_projections_stay_out_of_fp8(tmp_path: Path) -> None:
    """What is stored in FP8 is what the published checkpoint has so: the matrices of attention and feed-forwards."""
    _, _, document, tensors = published(1)
    save_model(from_published(registry(), document, tensors), tmp_path / "ours")
    export_directory(tmp_path / "ours", tmp_path / "theirs", registry(), dtype="fp8")
    stored = load_file(tmp_path / "theirs" / "model.safetensors")
    matrix = re.compile(r"self_attn\.\w+_proj(_with_mqa)?\.weight|mlp\.(\w+\.)*(\d+\.)?(gate|up|down)_proj\.weight")
    for name, tensor in stored.items():
        if name.endswith("_scale_inv"):
            assert tensor.dtype == torch.float32 and name.removesuffix("_scale_inv") in stored
        elif name.endswith(CORRECTION_BIAS):
            assert tensor.dtype == torch.float32
        elif matrix.search(name):
            assert tensor.dtype == torch.float8_e4m3fn and f"{name}_scale_inv" in stored, name
        else:
            assert tensor.dtype == torch.bfloat16, name
    kept = {re.sub(r"^.*layers\.\d+\.", "", n) for n, t in stored.items() if t.dtype == torch.bfloat16}
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight", "mlp.gate.weight"} <= kept
    assert {"eh_proj.weight", "enorm.weight", "hnorm.weight", "self_attn.kv_a_layernorm.weight"} <= kept


def exported(**options: Any) -> Mapping[str, Any]:
    return to_published(registry(), v3(**options).ours)[0]


def test_files_name_the_routers_method_and_its_scores() -> None:
    """Without `topk_method` some readers fail; without `scoring_func` they take a softmax and say nothing."""
    document = exported()
    assert (document["topk_method"], document["scoring_func"]) == ("noaux_tc", "sigmoid")
    v2 = pair("DeepseekV2", n_group=4, topk_group=2, topk_method="group_limited_greedy")
    document = to_published(registry(), v2.ours)[0]
    assert (document["topk_method"], document["scoring_func"]) == ("group_limited_greedy", "softmax")


def test_files_spell_rope_in_both_ways() -> None:
    """New readers take `rope_parameters`, older ones `rope_theta` and `rope_scaling`; the two must agree."""
    document = exported()
    assert document["rope_parameters"] == {**DEEPSEEK_YARN}
    assert document["rope_theta"] == DEEPSEEK_YARN["rope_theta"]
    scaling = {name: value for name, value in DEEPSEEK_YARN.items() if name not in ("rope_type", "rope_theta")}
    assert {"type": "yarn", **scaling}.items() <= document["rope_scaling"].items()
    assert document["rope_interleave"] is True
    document = exported(rope_parameters={"rope_type": "default", "rope_theta": 50.0})
    assert document["rope_scaling"] is None and document["rope_theta"] == 50.0


def test_files_say_all_that_decides_about_layers_and_experts() -> None:
    document = exported(first_k_dense_replace=2, norm_topk_prob=False)
    for name, value in {
        "first_k_dense_replace": 2,
        "moe_layer_freq": 1,
        "num_nextn_predict_layers": 0,
        "n_group": 4,
        "topk_group": 2,
        "n_shared_experts": 2,
        "n_routed_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
        "norm_topk_prob": False,
        "routed_scaling_factor": 2.5,
        "tie_word_embeddings": False,
        "q_lora_rank": 10,
    }.items():
        assert document[name] == value, name
    assert exported(q_lora_rank=None)["q_lora_rank"] is None


def test_files_hold_each_expert_apart() -> None:
    """In memory experts are stacked, in transformers and here; on the disk each matrix of each has its name."""
    both = v3()
    tensors = to_published(registry(), both.ours)[1]
    inside = f"model.layers.{MIXTURE_LAYER}.mlp.experts."
    names = {name.removeprefix(inside) for name in tensors if name.startswith(inside)}
    assert names == {f"{e}.{part}_proj.weight" for e in range(EXPERTS) for part in ("gate", "up", "down")}
    stacked = both.theirs.model.layers[MIXTURE_LAYER].mlp.experts.gate_up_proj
    for expert in range(EXPERTS):
        gate, up = stacked[expert].chunk(2)
        assert torch.equal(tensors[f"{inside}{expert}.gate_proj.weight"], gate)
        assert torch.equal(tensors[f"{inside}{expert}.up_proj.weight"], up)


@torch.no_grad()
def test_the_correction_bias_and_the_angles_stay_float32_when_a_model_is_cast(tmp_path: Path) -> None:
    """A bias that has moved by 0.001 is another number in bfloat16, and so are most angles."""
    both = v3()
    name = f"model.layers.{MIXTURE_LAYER}.mlp.gate.{CORRECTION_BIAS}"

    def assert_kept(model: Transformer) -> None:
        bias_E = model.layers[MIXTURE_LAYER].ffn.router.bias_E
        assert bias_E.dtype == torch.float32 and torch.equal(bias_E, both.tensors[name])
        assert torch.equal(model.rotary.cos_MF, both.ours.rotary.cos_MF)
        assert model.layers[0].attention.o.weight.dtype == torch.bfloat16

    assert_kept(copy.deepcopy(both.ours).to(torch.bfloat16))
    write(tmp_path / "theirs", both.document, both.tensors)
    import_directory(tmp_path / "theirs", tmp_path / "ours", registry(), dtype="bf16")
    assert_kept(load_model(tmp_path / "ours", registry(), dtype=torch.bfloat16))
    export_directory(tmp_path / "ours", tmp_path / "again", registry(), dtype="bf16")
    stored = load_file(tmp_path / "again" / "model.safetensors")
    assert torch.equal(stored[name], both.tensors[name]) and stored["lm_head.weight"].dtype == torch.bfloat16
    assert json.loads((tmp_path / "again" / "config.json").read_text())["dtype"] == "bfloat16"
