"""The unigram model: how many bits a byte costs a model that only knows how often each token occurs.

What a language model must beat to have learnt anything about order. Frequencies are counted on the training text with
one added for every token, and the cost is that of the same predictions that a model makes on the validation text:
every token of a document but the first, the end token included.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class Unigram:
    """Counts first, then costs."""

    def __init__(self, vocab_size: int) -> None:
        self._counts = np.zeros(vocab_size, dtype=np.int64)

    def count(self, ids: Sequence[int]) -> None:
        """A training document, begin token first."""
        self._counts += np.bincount(np.asarray(ids[1:], dtype=np.int64), minlength=len(self._counts))

    def bits(self, ids: Sequence[int]) -> float:
        """Bits that the predictions of a document cost, begin token first."""
        surprise = np.log2(self._counts.sum() + len(self._counts)) - np.log2(self._counts + 1)
        return float(surprise[np.asarray(ids[1:], dtype=np.int64)].sum())
