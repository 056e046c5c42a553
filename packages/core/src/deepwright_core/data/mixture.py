"""Problems among the text, as in a corpus from the web: most with a bare answer, some worked step by step.

A model pretrained on such a mixture can reason but mostly does not, which is what reinforcement learning then changes.
Only problems of the train split come in, and only into the training text: validation measures the text alone.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..chat import encode_many_with_mask
from ..errors import RequestError
from ..tasks import Problem
from ..tokenizer import Tokenizer

PROBLEMS_AT_ONCE = 2048


@dataclass
class Mixture:
    """Chooses problem documents until they hold their share of the training tokens.

    share: of the training tokens, what part is problems. worked_share: of the problems, what part shows its work.
    After `documents` has been read to its end, the counts say what was chosen.
    """

    problems: Sequence[Problem]
    share: float
    worked_share: float
    seed: int
    documents_worked: int = 0
    documents_bare: int = 0
    tokens: int = 0

    def documents(self, tokenizer: Tokenizer, text_tokens: int) -> Iterator[list[int]]:
        """Encoded problem documents beside `text_tokens` of text, begin and end tokens included."""
        wanted = text_tokens * self.share / (1 - self.share)
        if wanted <= 0:
            return
        if not self.problems:
            raise RequestError("prepare.problem_share is above 0, but the task has no training problems; set it to 0.")
        chosen = self._choose()
        while self.tokens < wanted:
            batch = [next(chosen) for _ in range(PROBLEMS_AT_ONCE)]
            encoded = encode_many_with_mask(tokenizer, [conversation(problem, works) for problem, works in batch])
            for (_, works), (ids, _) in zip(batch, encoded, strict=True):
                if self.tokens >= wanted:
                    return
                self.tokens += len(ids)
                self.documents_worked += works
                self.documents_bare += not works
                yield ids

    def sample(self, count: int) -> list[str]:
        """The texts of the first problem documents, for the tokenizer to learn from."""
        chosen = self._choose()
        taken = (next(chosen) for _ in range(count if self.share and self.problems else 0))
        return [f"{problem.question}\n{problem.worked if works else ''}\n{problem.answer}" for problem, works in taken]

    def as_json(self) -> dict[str, Any]:
        """What was mixed in."""
        documents = self.documents_worked + self.documents_bare
        return {
            "problem_share": self.share,
            "worked_share": self.worked_share,
            "documents": documents,
            "documents_worked": self.documents_worked,
            "documents_bare": self.documents_bare,
            "tokens": self.tokens,
            "different_problems": min(documents, len(self.problems)),
            "passes": documents / len(self.problems) if self.problems else 0.0,
        }

    def _choose(self) -> Iterator[tuple[Problem, bool]]:
        """All problems in a new order each pass, and for each whether it shows its work."""
        dice = random.Random(f"mixture {self.seed}")
        while True:
            for problem in dice.sample(list(self.problems), len(self.problems)):
                works = dice.random() < self.worked_share
                yield problem, works and bool(problem.worked)


def conversation(problem: Problem, works: bool) -> list[dict[str, str]]:
    """A problem as a finished conversation, worked in its thinking or with a bare answer."""
    answer = {"role": "assistant", "content": problem.answer}
    if works:
        answer["reasoning_content"] = problem.worked
    return [{"role": "user", "content": problem.question}, answer]
