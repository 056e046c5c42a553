"""Scoring: the log-probability of what was generated, at the temperature with which it was drawn."""

from __future__ import annotations

import pytest
import torch

from deepwright_core.engine import Engine, SamplingParams
from deepwright_core.model.transformer import Transformer
from deepwright_rl.rollout import pad
from deepwright_rl.scoring import token_logps

PROMPTS = [[3, 4, 5], [6], [7, 8, 9, 10]]
COMPLETIONS = [[11, 2], [12, 13, 14, 2], [2]]


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_by_the_softmax_of_each_sample_alone(model: Transformer, temperature: float) -> None:
    batch = pad(PROMPTS, COMPLETIONS, pad_id=0)
    logp_BS, entropy_BS = token_logps(model, batch, temperature)
    assert logp_BS.shape == entropy_BS.shape == batch.mask_BS.shape
    for row, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        tokens = torch.tensor([prompt + completion])
        logp_SV = (model.logits(model(tokens[:, :-1]))[0] / temperature).log_softmax(-1)
        places = range(len(prompt) - 1, len(prompt) + len(completion) - 1)
        want = torch.stack([logp_SV[place, token] for place, token in zip(places, completion, strict=True)])
        torch.testing.assert_close(logp_BS[row][batch.mask_BS[row]], want, atol=1e-5, rtol=1e-4)
        entropy = torch.stack([-(logp_SV[place].exp() * logp_SV[place]).sum() for place in places])
        torch.testing.assert_close(entropy_BS[row][batch.mask_BS[row]], entropy.detach(), atol=1e-5, rtol=1e-4)
    assert logp_BS[~batch.mask_BS].abs().max() == 0 and entropy_BS[~batch.mask_BS].abs().max() == 0


def test_prompt_and_padding_tokens_are_not_pushed(model: Transformer) -> None:
    """A gradient reaches the head only for the positions and the classes of generated tokens."""
    pad_id = 23
    batch = pad(PROMPTS, COMPLETIONS, pad_id)
    token_logps(model, batch, 1.0)[0].sum().backward()
    assert model.embedding.weight.grad[pad_id].abs().max() == 0
    with torch.no_grad():
        hidden = model(batch.tokens_BS1[:, :-1])[batch.mask_BS]
        targets = batch.tokens_BS1[:, 1:][batch.mask_BS]
        chosen = torch.nn.functional.one_hot(targets, 24).float()
        want = (chosen - model.logits(hidden).softmax(-1)).T @ hidden
    torch.testing.assert_close(model.head.weight.grad, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@torch.no_grad()
def test_engine_and_trainer_agree(model: Transformer, temperature: float) -> None:
    params = [SamplingParams(max_tokens=12, temperature=temperature, seed=n) for n in range(30)]
    prompts = [PROMPTS[n % 3] for n in range(30)]
    completions = Engine(model, 2, block_size=4, cache_tokens=200).generate(prompts, params)
    batch = pad(prompts, [completion.token_ids for completion in completions], pad_id=2)
    logp_BS, _ = token_logps(model, batch, temperature)
    wrong_BS, _ = token_logps(model, batch, 0.9 * temperature)
    sampler = torch.tensor([logp for completion in completions for logp in completion.logprobs])
    torch.testing.assert_close(logp_BS[batch.mask_BS], sampler, atol=1e-4, rtol=0)
    assert (wrong_BS[batch.mask_BS] - sampler).abs().max() > 0.05
