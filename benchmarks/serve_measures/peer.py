"""The peer: `generate` of transformers, with the same weights, in the same run."""

from __future__ import annotations

import itertools
import statistics
import time

import torch

from deepwright_core.huggingface import to_published
from deepwright_core.model.transformer import Transformer
from deepwright_core.registry import Registry

from .throughput import prompts, synchronise


class Peer:
    """The model as transformers builds and runs it."""

    def __init__(self, registry: Registry, model: Transformer) -> None:
        import transformers

        transformers.logging.set_verbosity_error()
        document, tensors = to_published(registry, model)
        config = transformers.AutoConfig.for_model(**document)
        weight = next(iter(model.parameters()))
        kind = getattr(transformers, document["architectures"][0])
        self.version = transformers.__version__
        self.model = kind.from_pretrained(None, config=config, state_dict=tensors, dtype=weight.dtype)
        self.model = self.model.to(weight.device).eval()
        self.device = weight.device

    def _generate(self, batch: int, prompt: int, tokens: int) -> list[float]:
        """When each token of a greedy `generate` was about to be chosen, the end last; in seconds."""
        times = []

        def note(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            synchronise(self.device)
            times.append(time.perf_counter())
            return scores

        ids = torch.tensor(prompts(self.model.config.vocab_size, batch, prompt), device=self.device)
        synchronise(self.device)
        start = time.perf_counter()
        with torch.inference_mode():
            self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                pad_token_id=0,
                eos_token_id=None,
                logits_processor=[note],
            )
        return [at - start for at in times]

    def decode_tokens_per_second(self, batch: int, prompt: int, tokens: int) -> float:
        """Of decoding alone, from the median step."""
        self._generate(batch, prompt, 2)
        times = self._generate(batch, prompt, tokens)
        return batch / statistics.median(b - a for a, b in itertools.pairwise(times[1:]))

    def prefill_tokens_per_second(self, batch: int, prompt: int) -> float:
        """Up to the first logits."""
        self._generate(batch, prompt, 1)
        return batch * prompt / self._generate(batch, prompt, 1)[0]
