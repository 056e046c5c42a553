"""One reinforcement step: a batch of rollouts becomes a few optimizer steps.

The batch is split into mini-batches, each one optimizer step. Log-probabilities of the sampling policy and of the
reference are computed once, before the first, by the trainer's own model: the engine's figures only serve to check
that both agree. The balancing bias of a mixture stays frozen until the last mini-batch is done.

Shapes: B samples, S token positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deepwright_core.model.precision import autocast
from deepwright_core.model.record import ForwardRecord
from deepwright_core.model.transformer import Transformer
from deepwright_core.training.trainer import Metrics, Trainer

from .algorithm import Algorithm
from .policy_loss import PolicyBatch, k3, token_weights
from .rollout import Rollouts, ScoredTokens, pad
from .scoring import token_logps


@dataclass(frozen=True)
class Share:
    """The loss of a micro-batch, in the form that the trainer takes."""

    total: Tensor
    record: ForwardRecord


@dataclass
class Tally:
    """Sums over the tokens of a whole rollout batch, for reports; largest_ratio is the furthest from 1 either way."""

    tokens: int = 0
    clipped: float = 0.0
    entropy: float = 0.0
    kl: float = 0.0
    largest_ratio: float = 1.0


@torch.no_grad()
def frozen_logps(
    model: Transformer, batches: Sequence[ScoredTokens], temperature: float, dtype: torch.dtype
) -> list[Tensor]:
    """Log-probabilities under a model that does not learn from them, in the precision in which the trainer learns: the
    ratio of the first mini-batch is then exactly 1."""
    model.eval()
    with autocast(batches[0].tokens_BS1.device, dtype):
        return [token_logps(model, batch, temperature)[0] for batch in batches]


def reinforce(
    trainer: Trainer,
    reference: Transformer | None,
    algorithm: Algorithm,
    rollouts: Rollouts,
    *,
    step: int,
    minibatches: int,
    micro_batch: int,
    temperature: float,
    max_tokens: int,
    pad_id: int,
) -> Metrics:
    """Learn from a batch of rollouts; returns the step's figures."""
    device = trainer.device
    advantages_B = algorithm.advantage(rollouts.rewards_PG).flatten()
    lengths = [len(p) + len(s.token_ids) for p, s in zip(rollouts.prompts, rollouts.samples, strict=True)]
    # A cut-off sample counts in its group's mean, but its tokens are not trained: nobody knows how it would have ended.
    usable = [n for n, finished in enumerate(rollouts.finished) if finished]
    if not usable:
        return {"loss": 0.0, "gradient_norm": 0.0}
    shuffled = [usable[n] for n in torch.randperm(len(usable), generator=torch.Generator().manual_seed(step)).tolist()]
    tally = Tally()
    metrics: Metrics = {}
    total_loss = 0.0
    minibatch_size = -(-len(shuffled) // minibatches)
    plan: list[list[list[int]]] = []
    for start in range(0, len(shuffled), minibatch_size):
        # Neighbours in length share a micro-batch, so that little of it is padding.
        members = sorted(shuffled[start : start + minibatch_size], key=lambda n: (lengths[n], n))
        plan.append([members[m : m + micro_batch] for m in range(0, len(members), micro_batch)])

    def padded(members: list[int]) -> ScoredTokens:
        batch = pad(
            [rollouts.prompts[n] for n in members],
            [rollouts.samples[n].token_ids for n in members],
            pad_id,
            [rollouts.forced[n] for n in members] if rollouts.forced else None,
        )
        return ScoredTokens(batch.tokens_BS1.to(device), batch.mask_BS.to(device), batch.real_BS.to(device))

    batches = [[padded(members) for members in minibatch] for minibatch in plan]
    flat = [batch for minibatch in batches for batch in minibatch]
    old = iter(frozen_logps(trainer.model, flat, temperature, trainer.dtype))
    needs_reference = reference is not None
    references = iter(frozen_logps(reference, flat, temperature, trainer.dtype) if reference is not None else [])
    gap = 0.0
    for minibatch, scored in zip(plan, batches, strict=True):
        tokens = sum(int(batch.mask_BS.sum()) for batch in scored)
        samples = sum(len(members) for members in minibatch)
        losses = []
        for members, batch in zip(minibatch, scored, strict=True):
            old_logp_BS = next(old)
            reference_logp_BS = next(references) if needs_reference else None
            gap = max(gap, _sampler_gap(old_logp_BS, batch, [rollouts.sampler_logps[n] for n in members]))
            weights_BS = token_weights(batch.mask_BS, algorithm.aggregation, samples, tokens, max_tokens)

            def loss(
                members: list[int] = members,
                batch: ScoredTokens = batch,
                old_logp_BS: Tensor = old_logp_BS,
                reference_logp_BS: Tensor | None = reference_logp_BS,
                weights_BS: Tensor = weights_BS,
            ) -> Share:
                nonlocal total_loss
                record = ForwardRecord(batch.real_BS)
                logp_BS, entropy_BS = token_logps(trainer.model, batch, temperature, record)
                terms = algorithm.policy_loss(
                    PolicyBatch(
                        logp_BS,
                        old_logp_BS,
                        reference_logp_BS,
                        advantages_B[members].to(device),
                        batch.mask_BS,
                        weights_BS,
                    )
                )
                tally.tokens += int(batch.mask_BS.sum())
                tally.clipped += float(terms.clipped)
                tally.entropy += float(entropy_BS.sum())
                if reference_logp_BS is not None:
                    tally.kl += float(k3(logp_BS.detach(), reference_logp_BS).sum())
                distance = float((logp_BS.detach() - old_logp_BS).abs().max())
                tally.largest_ratio = max(tally.largest_ratio, math.exp(distance))
                total_loss += float(terms.loss.detach())
                return Share(terms.loss, record)

            losses.append(loss)
        metrics = trainer.update(step, losses, rebalance=False)
    trainer.rebalance()
    metrics |= {
        "loss": total_loss / len(plan),
        "clip_fraction": tally.clipped / tally.tokens,
        "entropy": tally.entropy / tally.tokens,
        "largest_ratio": tally.largest_ratio,
        "sampler_gap": gap,
    }
    if needs_reference:
        metrics["kl"] = tally.kl / tally.tokens
    return metrics


def _sampler_gap(logp_BS: Tensor, batch: ScoredTokens, sampler: Sequence[list[float]]) -> float:
    """Largest difference between the engine's and the trainer's log-probability of a sampled token."""
    widest = 0.0
    for row, logps in enumerate(sampler):
        ours = logp_BS[row][batch.mask_BS[row]]
        widest = max(widest, float((ours - torch.tensor(logps, device=ours.device)).abs().max()))
    return widest
