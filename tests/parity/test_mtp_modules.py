"""Multi-token prediction against the modules of transformers, in both directions and through the files of both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deepwright_core.huggingface import from_published, to_published
from deepwright_core.model.transformer import Transformer

from .published_models import difference, random_tokens, registry, transformers, write
from .published_mtp import LAYERS, MtpModel, published, their_logits

LENGTH = 40
DEPTHS = pytest.mark.parametrize("depth", [1, 2, 3])


def our_logits(model: Transformer, tokens_BS: Tensor) -> list[Tensor]:
    hidden_BSD, logits = model(tokens_BS), []
    for k in range(model.config.mtp.depth):
        length = tokens_BS.shape[1] - 1 - k
        hidden_BSD = model.predict_further(hidden_BSD[:, :length], tokens_BS[:, k + 1 :], k)
        logits.append(model.logits(hidden_BSD))
    return logits


@DEPTHS
@torch.no_grad()
def test_logits_of_their_modules(depth: int) -> None:
    main, modules, document, tensors = published(depth)
    ours = from_published(registry(), document, tensors)
    tokens_BS = random_tokens(2, LENGTH)
    assert difference(ours.logits(ours(tokens_BS)), main(tokens_BS).logits) < 1e-5
    theirs = their_logits(main, modules, tokens_BS)
    assert len(theirs) == ours.config.mtp.depth == depth
    for have, want in zip(our_logits(ours, tokens_BS), theirs, strict=True):
        assert difference(have, want) < 1e-5


@torch.no_grad()
def test_generation_gives_the_modules_the_hidden_after_the_final_norm(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What enters a module decides what it must have been trained on. transformers' own loop is watched."""
    main, _, document, tensors = published(1)
    write(tmp_path, document, tensors)
    main = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32").eval()
    main._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{LAYERS}\."]
    given: list[Tensor] = []
    forward_layer = MtpModel.forward_layer

    def watched(self: Any, layer: int, hidden: Tensor, *rest: Any, **more: Any) -> Tensor:
        given.append(hidden)
        return forward_layer(self, layer, hidden, *rest, **more)

    monkeypatch.setattr(MtpModel, "forward_layer", watched)
    prompt = random_tokens(1, 12)
    main.generate(prompt, use_mtp=True, do_sample=False, max_new_tokens=4, pad_token_id=0)
    ours = from_published(registry(), document, tensors)
    assert difference(given[0], ours(prompt)) < 1e-5


@DEPTHS
@torch.no_grad()
def test_their_loader_finds_the_modules_in_what_we_write(depth: int, tmp_path: Path) -> None:
    """By their own renaming rules: every tensor of a module is found, under its name and with its value."""
    _, modules, document, tensors = published(depth)
    document, again = to_published(registry(), from_published(registry(), document, tensors))
    assert again.keys() == tensors.keys()
    assert [name for name, tensor in again.items() if not torch.equal(tensor, tensors[name])] == []
    write(tmp_path, document, again)
    main = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32").eval()
    # transformers knows the modules of checkpoints with 61 layers; this one has fewer.
    main._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{LAYERS + k}\." for k in range(depth)]
    read = MtpModel.from_pretrained(main).eval()
    wanted = modules.layers.state_dict()
    assert read.layers.state_dict().keys() == wanted.keys()
    assert [name for name, tensor in read.layers.state_dict().items() if not torch.equal(tensor, wanted[name])] == []
    tokens_BS = random_tokens(2, LENGTH)
    for have, want in zip(their_logits(main, read, tokens_BS), their_logits(main, modules, tokens_BS), strict=True):
        assert torch.equal(have, want)
