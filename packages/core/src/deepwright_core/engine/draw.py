"""What a step drew, and its way to the host.

Shapes: B rows, Q tokens drawn for each (one, and one for each draft).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import Tensor

from .parcel import Parcel
from .scores import AnswerScores
from .sequence import Drawn

Reader = Callable[[list[np.ndarray]], list[list[Drawn]]]
"""The tokens of each row, from the opened parcel."""


class Draw:
    """What a step drew, on its way to the host.

    Of each row, the tokens up to the first are its new ones; with drafts, up to the one behind those accepted. Only the
    first may be forced.
    """

    def __init__(
        self, token_BQ: Tensor, logprob_BQ: Tensor, forced_B: Tensor | None, scores: AnswerScores | None, parcel: Parcel
    ) -> None:
        self.token_BQ = token_BQ
        self._scores = scores
        self._parcel = parcel
        self._tokens, self._logprobs = parcel.add(token_BQ), parcel.add(logprob_BQ)
        self._forced = None if forced_B is None else parcel.add(forced_B)
        self._accepted: int | None = None

    def accept(self, accepted_B: Tensor) -> None:
        """Say how many drafts of each row were accepted."""
        self._accepted = self._parcel.add(accepted_B)

    def read(self, arrays: list[np.ndarray]) -> list[list[Drawn]]:
        """The new tokens of each row, from the opened parcel."""
        tokens, logprobs = arrays[self._tokens], arrays[self._logprobs]
        firsts = list(map(Drawn, tokens[:, 0].tolist(), logprobs[:, 0].tolist()))
        if self._forced is not None:
            for row in arrays[self._forced].nonzero()[0].tolist():
                firsts[row] = firsts[row]._replace(forced=True)
        drawn = [[first] for first in firsts]
        if self._accepted is not None:
            further = zip(drawn, arrays[self._accepted].tolist(), tokens.tolist(), logprobs.tolist(), strict=True)
            for new, accepted, ids, values in further:
                new += map(Drawn, ids[1 : accepted + 1], values[1 : accepted + 1])
        if self._scores is not None:
            for row, scores in self._scores.read(arrays).items():
                drawn[row] = [new._replace(score=score) for new, score in zip(drawn[row], scores, strict=False)]
        return drawn
