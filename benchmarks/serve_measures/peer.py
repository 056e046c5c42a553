"""The peer: `generate` of transformers, with the same weights, in the same run."""

from __future__ import annotations

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

    def seconds(self, batch: int, prompt: int, tokens: int) -> float:
        """Time for a greedy `generate` of `tokens` tokens."""
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
            )
        synchronise(self.device)
        return time.perf_counter() - start

    def decode_tokens_per_second(self, batch: int, prompt: int, tokens: int) -> float:
        """Of decoding alone: what a longer answer takes beyond a short one."""
        self.seconds(batch, prompt, 2)
        short = self.seconds(batch, prompt, 2)
        return batch * (tokens - 2) / (self.seconds(batch, prompt, tokens) - short)

    def prefill_tokens_per_second(self, batch: int, prompt: int) -> float:
        """Of a `generate` that gives one token."""
        self.seconds(batch, prompt, 1)
        return batch * prompt / self.seconds(batch, prompt, 1)
