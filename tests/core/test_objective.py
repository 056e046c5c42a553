"""The language-model objective: what is a target, what it is divided by, and that splitting a batch changes nothing."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from deepwright_core.model.config import ModelConfig
from deepwright_core.model.transformer import Transformer, build_model
from deepwright_core.registry import Registry
from deepwright_core.training.objective import (
    IGNORED,
    count_targets,
    language_model_loss,
    mean_loss,
    targets_at,
)

TOKENS = torch.tensor([[10, 11, 12, 13, 14, 15]])
SEGMENTS = torch.tensor([[0, 0, 0, 1, 1, -1]])


def build(registry: Registry, **changes: Any) -> Transformer:
    values: dict[str, Any] = {"vocab_size": 30, "hidden_size": 8, "layers": 1, "intermediate_size": 12, "init_std": 0.4}
    attention = {"name": "gqa", "heads": 2, "kv_heads": 1, "head_dim": 4}
    return build_model(registry, ModelConfig(**values, attention=attention, ffn={"name": "dense"}, **changes), seed=0)


def test_targets_by_hand() -> None:
    assert targets_at(TOKENS, None, None, 1).tolist() == [[11, 12, 13, 14, 15]]
    assert targets_at(TOKENS, None, None, 3).tolist() == [[13, 14, 15]]
    x = IGNORED
    assert targets_at(TOKENS, SEGMENTS, None, 1).tolist() == [[11, 12, x, 14, x]]
    assert targets_at(TOKENS, SEGMENTS, None, 2).tolist() == [[12, x, x, x]]
    trained = torch.tensor([[False, False, True, True, True, False]])
    assert targets_at(TOKENS, SEGMENTS, trained, 1).tolist() == [[x, 12, x, 14, x]]


def log_probability(model: Transformer, tokens: Tensor, place: int, segments: Tensor | None = None) -> Tensor:
    hidden = model(tokens[None, :-1], None if segments is None else segments[None, :-1])
    return torch.log_softmax(model.logits(hidden[0, place]), -1)[tokens[place + 1]]


def test_only_trained_targets_inside_a_document_count(registry: Registry) -> None:
    model = build(registry)
    trained = torch.tensor([[False, True, True, True, True, False]])
    loss = language_model_loss(model, TOKENS, SEGMENTS, trained)
    want = [log_probability(model, TOKENS[0], place, SEGMENTS[0]) for place in (0, 1, 3)]
    torch.testing.assert_close(loss.total, -torch.stack(want).mean())


def test_padding_and_untrained_tokens_get_no_gradient_as_targets(registry: Registry) -> None:
    model, pad = build(registry), 29
    tokens = torch.tensor([[5, 6, 7, pad, pad]])
    trained = torch.tensor([[False, False, True, False, False]])
    language_model_loss(model, tokens, torch.tensor([[0, 0, 0, -1, -1]]), trained).total.backward()
    pushed_up = (model.head.weight.grad * model(tokens[:, :-1])[0, 1]).sum(-1) < 0
    assert pushed_up.nonzero().flatten().tolist() == [7]
    assert model.embedding.weight.grad[pad].abs().max() == 0


def test_nothing_to_train_on_is_a_loss_of_zero(registry: Registry) -> None:
    loss = language_model_loss(build(registry), TOKENS, None, torch.zeros(1, 6, dtype=torch.bool))
    loss.total.backward()
    assert float(loss.total.detach()) == 0.0


def test_an_untrained_model_is_worth_the_logarithm_of_the_vocabulary(registry: Registry) -> None:
    model = build(registry)
    torch.nn.init.zeros_(model.head.weight)
    loss = language_model_loss(model, torch.randint(30, (4, 9)))
    assert float(loss.next_token) == pytest.approx(math.log(30))


def test_mean_loss_divides_by_what_it_is_told(registry: Registry) -> None:
    model, hidden, targets = build(registry), torch.randn(2, 3, 8), torch.tensor([[1, IGNORED, 2], [3, 4, IGNORED]])
    mean = mean_loss(model, hidden, targets)
    torch.testing.assert_close(mean_loss(model, hidden, targets, torch.tensor(10)), mean * 4 / 10)


def packed_batch() -> tuple[Tensor, Tensor, Tensor]:
    """Four rows with very different numbers of targets."""
    torch.manual_seed(1)
    segments = torch.tensor([[0] * 9, [0, 1, 2, 3, 4, 5, 6, 7, 7], [0, 0, 1, 1, 2, 2, 3, 3, -1], [0] * 4 + [-1] * 5])
    trained = torch.rand(4, 9) < 0.8
    trained &= segments >= 0
    return torch.randint(30, (4, 9)), segments, trained


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("depth", [0, 2])
def test_micro_batches_add_up_to_the_batch(registry: Registry, parts: int, depth: int) -> None:
    """Loss and gradient, though every micro-batch has another number of targets."""
    model = build(registry, mtp={"depth": depth, "loss_weight": 0.3})
    tokens, segments, trained = packed_batch()
    whole = language_model_loss(model, tokens, segments, trained)
    want = torch.autograd.grad(whole.total, list(model.parameters()))
    counts = [count / parts for count in count_targets(model, tokens, segments, trained)]
    reported = 0.0
    for here in torch.arange(4).chunk(parts):
        loss = language_model_loss(model, tokens[here], segments[here], trained[here], counts=counts)
        loss.scaled(1 / parts).total.backward()
        reported += float(loss.next_token) / parts
    assert reported == pytest.approx(float(whole.next_token), rel=1e-5)
    for (name, parameter), gradient in zip(model.named_parameters(), want, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_targets_are_counted_at_each_distance(registry: Registry) -> None:
    model = build(registry, mtp={"depth": 2})
    assert [int(count) for count in count_targets(model, TOKENS, None, None)] == [5, 4, 3]
    assert [int(count) for count in count_targets(model, TOKENS, SEGMENTS, None)] == [3, 1, 0]


def test_scaling_weights_what_is_differentiated_and_not_what_is_reported(registry: Registry) -> None:
    loss = language_model_loss(build(registry, mtp={"depth": 1}), TOKENS)
    half = loss.scaled(0.5)
    torch.testing.assert_close(half.total, loss.total / 2)
    assert half.next_token == loss.next_token and half.further == loss.further and half.record is loss.record
