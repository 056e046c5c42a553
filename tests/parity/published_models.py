"""Tiny models of transformers with random weights, and ours made from what transformers writes to the disk of them.

The weights are random in every place where a published model has something to say: norms are not ones, the balancing
bias is not zero. Matrices are wide enough (0.15, not 0.02) that each part of a layer shows in the logits, and no wider:
at 0.25 rounding alone makes either program differ by 1e-5 from itself in float64.
"""

from __future__ import annotations

import functools
import json
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from deepwright_core.huggingface import from_published
from deepwright_core.huggingface.format import format_of
from deepwright_core.model.directory import distinct_tensors
from deepwright_core.model.transformer import Transformer
from deepwright_core.plugins import installed
from deepwright_core.registry import Registry

transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

VOCABULARY = 96
LONGEST = 128
ORIGINAL_LENGTH = 16  # of YaRN and Llama 3.1's scaling: most sequences of these tests are longer
CORRECTION_BIAS = "e_score_correction_bias"

SEED = 1
"""Nothing here hangs on rounding: with this seed, the two best logits of each generated token lie 5e-5 of the largest
apart, and the last chosen expert's score 3e-6 above the next. With most others one of the two is below 2e-6."""

TRUNK = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": LONGEST,
    "bos_token_id": None,
    "eos_token_id": None,
}
LATENT = {"q_lora_rank": None, "kv_lora_rank": 14, "qk_nope_head_dim": 10, "qk_rope_head_dim": 8, "v_head_dim": 12}
MIXTURE = {
    "moe_intermediate_size": 12,
    "n_routed_experts": 12,
    "num_experts_per_tok": 3,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
    "n_group": 1,
    "topk_group": 1,
    "aux_loss_alpha": 0.0,  # ours then adds no balance loss, which theirs does not have
}
GROUPED = {"num_key_value_heads": 2}
SIZES: dict[str, dict[str, Any]] = {
    "DeepseekV3": {**TRUNK, **LATENT, **MIXTURE, "num_key_value_heads": 4, "num_mtp_layers": 0},
    "DeepseekV2": {**TRUNK, **LATENT, **MIXTURE, "num_key_value_heads": 4},
    "Llama": {**TRUNK, **GROUPED},
    "Qwen2": {**TRUNK, **GROUPED},
}
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
# Of 4 pairs of rope the first is kept, the last is slowed by the factor, and two lie between.
YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 8.0,
    "original_max_position_embeddings": ORIGINAL_LENGTH,
    "beta_fast": 2.0,
    "beta_slow": 0.25,
}
DEEPSEEK_YARN = {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}


@functools.cache
def registry() -> Registry:
    """Every component that is installed."""
    return installed().registry


@dataclass(frozen=True)
class Pair:
    """One model twice. document and tensors: what the published directory holds, by the names on the disk."""

    theirs: Any
    ours: Transformer
    document: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    def their_logits(self, tokens_BS: Tensor) -> Tensor:
        return self.theirs(tokens_BS).logits

    def our_logits(self, tokens_BS: Tensor) -> Tensor:
        return self.ours.logits(self.ours(tokens_BS))

    def by_name_on_disk(self, of_ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors with the shapes of our parameters (gradients, say), cut and named as a published file has them."""
        format = format_of(self.document["model_type"], registry(), "config.json")
        shapes = {name: tuple(tensor.shape) for name, tensor in distinct_tensors(self.ours).items()}
        pieces = format.pieces(self.ours.config, shapes)
        return {
            piece.theirs: piece.to_theirs(of_ours[piece.ours][piece.part]).reshape(piece.shape)
            for piece in pieces
            if not piece.optional and piece.ours in of_ours
        }


def randomise(model: nn.Module, seed: int) -> None:
    """Weights that leave nothing at a value that could hide a mistake."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith(CORRECTION_BIAS):
                tensor.normal_(0.0, 0.04, generator=draw)
            elif "norm" in name:
                tensor.uniform_(0.4, 1.6, generator=draw)
            elif "embed_tokens" in name:
                tensor.normal_(0.0, 0.05, generator=draw)
            elif name.endswith((".weight", ".bias", "_proj")):
                tensor.normal_(0.0, 0.15, generator=draw)


def build_theirs(architecture: str, seed: int = SEED, **options: Any) -> Any:
    """A seeded model of transformers, in evaluation mode."""
    values = {"rope_parameters": PLAIN_ROPE, **SIZES[architecture], **options}
    config = getattr(transformers, f"{architecture}Config")(**values)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element")  # without shared experts theirs has width 0
        model = getattr(transformers, f"{architecture}ForCausalLM")(config).eval()
    randomise(model, seed)
    return model


def written(theirs: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and tensors as transformers writes them."""
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        return json.loads((Path(folder) / "config.json").read_text()), load_file(Path(folder) / "model.safetensors")


def write(directory: Path, document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """A published directory of one file."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(document))
    save_file(dict(tensors), directory / "model.safetensors", metadata={"format": "pt"})


@functools.cache
def _pair(architecture: str, seed: int, options: str) -> Pair:
    theirs = build_theirs(architecture, seed, **json.loads(options))
    if theirs.config.to_dict().get("scoring_func") == "softmax":
        score_by_softmax(theirs)
    document, tensors = written(theirs)
    return Pair(theirs, from_published(registry(), document, tensors), document, tensors)


def pair(architecture: str, seed: int = SEED, **options: Any) -> Pair:
    """The same model in transformers and in deepwright, made once for these options. Nobody may change its weights."""
    return _pair(architecture, seed, json.dumps(options, sort_keys=True))


def score_by_softmax(theirs: Any) -> None:
    """Give a DeepseekV3 model of transformers, whose scores are always sigmoids, a router written out here.

    As the report says it, a token at a time: scores, biased scores, groups by the sum of their two best, the best
    experts of the kept groups, weights from the unbiased scores.
    """

    def route(gate: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits_TE = hidden.reshape(-1, gate.hidden_dim) @ gate.weight.T
        scores_TE = logits_TE.exp() / logits_TE.exp().sum(-1, keepdim=True)
        biased_TE = (scores_TE + gate.e_score_correction_bias).tolist()
        size = gate.num_experts // gate.num_group
        chosen_TK = []
        for biased in biased_TE:
            groups = [range(g * size, (g + 1) * size) for g in range(gate.num_group)]
            groups.sort(key=lambda group: -sum(sorted(biased[e] for e in group)[-2:]))
            allowed = [expert for group in groups[: gate.topk_group] for expert in group]
            chosen_TK.append(sorted(allowed, key=lambda expert: -biased[expert])[: gate.top_k])
        experts_TK = torch.tensor(chosen_TK)
        weights_TK = scores_TE.gather(1, experts_TK)
        if gate.norm_topk_prob:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        return logits_TE, weights_TK * gate.routed_scaling_factor, experts_TK

    for module in theirs.modules():
        if hasattr(module, CORRECTION_BIAS):
            module.forward = functools.partial(route, module)


def random_tokens(rows: int, length: int, seed: int = 7) -> Tensor:
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def difference(have: Tensor, want: Tensor) -> float:
    """Largest difference, relative to the largest value; 0 where both are all zeros."""
    if have.shape != want.shape:
        raise AssertionError(f"shapes differ: {list(have.shape)} and {list(want.shape)}")
    largest = (have - want).abs().max().item()
    return largest / want.abs().max().item() if largest else 0.0
