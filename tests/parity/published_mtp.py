"""A tiny model of transformers with modules for multi-token prediction, and the published directory of both.

transformers reads such modules and does not write them, so their names on the disk are written out here.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from .published_models import DEEPSEEK_YARN, SEED, build_theirs, randomise, transformers, written

pytest.importorskip("transformers.modeling_layers", reason="needs the MTP modules of recent transformers")
from transformers.modeling_layers import MtpModel

LAYERS = 3  # of the main model
PARTS = {"post_norm": "shared_head.norm", "enorm": "enorm", "hnorm": "hnorm", "eh_proj": "eh_proj"}


def main_model(depth: int) -> Any:
    options = {"q_lora_rank": 10, "n_group": 4, "topk_group": 2, "rope_parameters": DEEPSEEK_YARN}
    return build_theirs("DeepseekV3", num_mtp_layers=depth, num_hidden_layers=LAYERS, **options)


def names_on_disk(modules: Any, main: Any) -> dict[str, Tensor]:
    """The modules' tensors as published files have them, written out by hand: each is one more layer."""
    tensors: dict[str, Tensor] = {}
    for k, module in enumerate(modules.layers):
        layer = f"model.layers.{LAYERS + k}"
        for theirs, published in PARTS.items():
            tensors[f"{layer}.{published}.weight"] = getattr(module, theirs).weight
        for name, tensor in module.mtp_block.state_dict().items():
            if name == "mlp.experts.gate_up_proj":
                for expert, both in enumerate(tensor):
                    gate, up = both.chunk(2)
                    tensors[f"{layer}.mlp.experts.{expert}.gate_proj.weight"] = gate
                    tensors[f"{layer}.mlp.experts.{expert}.up_proj.weight"] = up
            elif name == "mlp.experts.down_proj":
                for expert, down in enumerate(tensor):
                    tensors[f"{layer}.mlp.experts.{expert}.down_proj.weight"] = down
            else:
                tensors[f"{layer}.{name}"] = tensor
        tensors[f"{layer}.embed_tokens.weight"] = main.get_input_embeddings().weight
        tensors[f"{layer}.shared_head.head.weight"] = main.lm_head.weight
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def published(depth: int) -> tuple[Any, Any, dict[str, Any], dict[str, Tensor]]:
    """A main model and its modules in transformers, and the config and tensors of the directory that holds both."""
    main = main_model(depth)
    modules = MtpModel(main, depth).eval()
    for number, module in enumerate(modules.layers):
        randomise(module, SEED + 1 + number)
    document, tensors = written(main)
    return main, modules, document, tensors | names_on_disk(modules, main)


def their_logits(main: Any, modules: Any, tokens_BS: Tensor) -> list[Tensor]:
    """Logits of every module at every place, given what generation gives them: the main model's last hidden states,
    the tokens one place ahead and the positions of these; the next module gets the hidden states of the one before."""
    hidden_BSD = main.model(tokens_BS).last_hidden_state
    cache = transformers.cache_utils.MtpCache(config=main.config.get_mtp_config())
    logits = []
    for k in range(len(modules.layers)):
        length = tokens_BS.shape[1] - 1 - k
        positions_BS = torch.arange(k + 1, k + 1 + length).expand(len(tokens_BS), -1)
        hidden_BSD = modules.forward_layer(
            k, hidden_BSD[:, :length], positions_BS, cache, input_ids=tokens_BS[:, k + 1 :]
        )
        logits.append(modules._project_to_logits(hidden_BSD))
    return logits
