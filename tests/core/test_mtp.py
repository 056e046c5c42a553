"""Multi-token prediction (DeepSeek-V3 report, section 2.2): what each module reads, predicts, and is worth."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from deepwright_core.model.config import ModelConfig
from deepwright_core.model.transformer import Transformer, build_model
from deepwright_core.registry import Registry
from deepwright_core.training.objective import language_model_loss


def build(registry: Registry, depth: int = 1, weight: float = 0.3, **changes: Any) -> Transformer:
    config = ModelConfig(
        vocab_size=40,
        hidden_size=12,
        layers=2,
        intermediate_size=16,
        max_positions=32,
        init_std=0.3,
        mtp={"depth": depth, "loss_weight": weight},
        attention={"name": "gqa", "heads": 2, "kv_heads": 1, "head_dim": 4},
        ffn={"name": "dense"},
        **changes,
    )
    return build_model(registry, config, seed=0)


def cross_entropy(model: Transformer, hidden_D: Tensor, target: int) -> Tensor:
    return -torch.log_softmax(model.logits(hidden_D), -1)[target]


@torch.no_grad()
def test_the_embedding_comes_before_the_hidden(registry: Registry) -> None:
    """As `eh_proj` of the published checkpoint has it. With the block silenced, the projection alone remains."""
    model = build(registry)
    module = model.mtp[0]
    module.block.attention.o.weight.zero_()
    module.block.ffn.down.weight.zero_()
    module.embedding_norm.weight.uniform_(0.5, 2.0)
    module.hidden_norm.weight.uniform_(0.5, 2.0)
    hidden_BSD, tokens_BS = torch.randn(1, 5, 12), torch.randint(40, (1, 5))
    for columns, norm, source in (
        (slice(0, 12), module.embedding_norm, model.embedding(tokens_BS)),
        (slice(12, 24), module.hidden_norm, hidden_BSD),
    ):
        module.projection.weight.zero_()
        module.projection.weight[:, columns] = torch.eye(12)
        have = model.predict_further(hidden_BSD, tokens_BS, 0)
        torch.testing.assert_close(have, module.norm(norm(source)))


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_loss_is_the_next_token_plus_lambda_over_depth(registry: Registry, depth: int) -> None:
    """Each depth k predicts the token k + 1 places ahead from the depth before it and the token k places ahead."""
    model, tokens = build(registry, depth, weight=0.3), torch.randint(40, (1, 11))
    loss = language_model_loss(model, tokens)
    ids, size = tokens[0].tolist(), tokens.shape[1]
    hidden = model(tokens[:, :-1])
    next_token = torch.stack([cross_entropy(model, hidden[0, i], ids[i + 1]) for i in range(size - 1)]).mean()
    further = []
    for k in range(1, depth + 1):
        inputs = size - 1 - k  # the last that has a target k + 1 places ahead
        hidden = model.predict_further(hidden[:, :inputs], tokens[:, k : k + inputs], k - 1)
        further.append(torch.stack([cross_entropy(model, hidden[0, i], ids[i + k + 1]) for i in range(inputs)]).mean())
    torch.testing.assert_close(loss.next_token, next_token.detach())
    torch.testing.assert_close(loss.further, (sum(further) / depth).detach())
    torch.testing.assert_close(loss.total, next_token + 0.3 / depth * sum(further))


def test_without_modules_there_is_nothing_further(registry: Registry) -> None:
    loss = language_model_loss(build(registry, 0), torch.randint(40, (2, 6)))
    assert loss.further is None
    torch.testing.assert_close(loss.total, loss.next_token)


@torch.no_grad()
def test_a_prediction_does_not_see_its_target(registry: Registry) -> None:
    model, tokens = build(registry, 2), torch.randint(40, (1, 10))

    def predictions(tokens: Tensor) -> list[Tensor]:
        first = model.predict_further(model(tokens)[:, :8], tokens[:, 1:9], 0)
        return [first[0], model.predict_further(first[:, :7], tokens[:, 2:9], 1)[0]]

    changed = tokens.clone()
    changed[0, 6] = (changed[0, 6] + 1) % 40
    for depth, (before, after) in enumerate(zip(predictions(tokens), predictions(changed), strict=True)):
        # Position i sees tokens up to i + 1 + depth and predicts the one after.
        unchanged = 6 - 1 - depth
        assert torch.equal(before[:unchanged], after[:unchanged])
        assert (before[unchanged:] - after[unchanged:]).abs().amax(-1).min() > 1e-5


@pytest.mark.parametrize("depth", [1, 2])
@torch.no_grad()
def test_packed_documents_are_worth_what_they_are_alone(registry: Registry, depth: int) -> None:
    """No target lies in another document, and nothing of another document leaks into a prediction."""
    model = build(registry, depth)
    documents = [torch.randint(40, (1, size)) for size in (6, 2, 9, 1, 4)]
    segments = torch.cat([torch.full_like(d, n) for n, d in enumerate(documents)], 1)
    packed = language_model_loss(model, torch.cat(documents, 1), segments)
    next_token, further = 0.0, [0.0] * depth
    for document in documents:
        ids, size = document[0].tolist(), document.shape[1]
        hidden = model(document)
        next_token += sum(float(cross_entropy(model, hidden[0, i], ids[i + 1])) for i in range(size - 1))
        for k in range(1, min(depth, size - 2) + 1):
            inputs = size - k - 1
            hidden = model.predict_further(hidden[:, :inputs], document[:, k : k + inputs], k - 1)
            further[k - 1] += sum(float(cross_entropy(model, hidden[0, i], ids[i + k + 1])) for i in range(inputs))
    sizes = [d.shape[1] for d in documents]
    assert float(packed.next_token) == pytest.approx(next_token / sum(s - 1 for s in sizes), rel=1e-5)
    means = [further[k - 1] / sum(max(s - 1 - k, 0) for s in sizes) for k in range(1, depth + 1)]
    assert float(packed.further) == pytest.approx(sum(means) / depth, rel=1e-5)


def test_the_modules_teach_the_shared_embedding_head_and_trunk(registry: Registry) -> None:
    torch.manual_seed(5)
    tokens = torch.randint(40, (2, 9))
    names = [name for name, _ in build(registry, 2).named_parameters()]
    both, alone = (
        torch.autograd.grad(language_model_loss(model, tokens).total, list(model.parameters()))
        for model in (build(registry, 2), build(registry, 2, weight=0.0))
    )
    for name, with_mtp, without_mtp in zip(names, both, alone, strict=True):
        assert (with_mtp - without_mtp).abs().max() > 1e-6, name
        assert name.startswith("mtp.") == (without_mtp.abs().max() == 0), name


def test_the_modules_share_embedding_and_head(registry: Registry) -> None:
    names = {name for name, _ in build(registry).mtp.named_parameters()}
    assert {name.split(".")[1] for name in names} == {"embedding_norm", "hidden_norm", "projection", "block", "norm"}


def test_the_modules_take_no_part_in_generation(registry: Registry) -> None:
    assert build(registry, 2).cache_widths == build(registry, 0).cache_widths
