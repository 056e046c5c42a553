"""Problems from reasoning-gym: drawn, made unique, split by the hash of what they ask, and scored by its own scorers.

reasoning-gym draws item i from `Random(seed + i)`, so that the datasets of seeds 42 and 43 share all items but one.
Here every dataset has one seed far from all others, and the splits do not rest on seeds at all: see `problem.py`.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, field_validator

from ..errors import RequestError, WorkError, did_you_mean
from ..registry import ComponentConfig
from ..tracking import Progress, SilentProgress
from .guard import LONGEST_ANSWER, may_be_scored
from .problem import SPLITS, Problem, Split, problem_id, split_of
from .worked import form_of

# How long to look for new problems before saying that there are too few.
DRAWS_PER_PROBLEM = 40
FEWEST_DRAWS = 20_000
DRAWS_WITHOUT_NEWS = 20_000


class Task(Protocol):
    """What the kind "task" builds: problems for each split, and a judgement of an answer."""

    def generate(self, progress: Progress | None = None) -> dict[Split, list[Problem]]:
        """The problems of every split; no two splits share one."""

    def score(self, problem: Problem, answer: str) -> float:
        """1.0 for a right answer, else 0.0."""


class DatasetChoice(BaseModel):
    """One reasoning-gym dataset of a task.

    dataset: its name there; the key under which it stands, if left out.
    options: its own options, such as max_digits.
    weight: its share of the problems, relative to the others.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    dataset: str | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    weight: float = Field(1.0, gt=0)

    @field_validator("options")
    @classmethod
    def _ours(cls, options: dict[str, Any]) -> dict[str, Any]:
        for key in ("seed", "size"):
            if key in options:
                raise ValueError(f"options.{key} is set by the task; use task.seed and task.train_size instead.")
        return options


class ReasoningGymConfig(ComponentConfig):
    """Any reasoning-gym datasets, mixed by weight.

    tasks: label -> dataset, options, weight.
    train_size, validation_size, test_size: problems wanted in each split.
    seed: which problems are drawn; not which split they fall in.
    """

    name: Literal["reasoning_gym"] = "reasoning_gym"
    tasks: dict[str, DatasetChoice] = Field(min_length=1)
    train_size: int = Field(30_000, ge=1)
    validation_size: int = Field(512, ge=1)
    test_size: int = Field(512, ge=1)
    seed: int = Field(42, ge=0)


class ArithmeticConfig(ReasoningGymConfig):
    """Sums and differences of two three-digit numbers: too hard at one glance, easy digit by digit."""

    name: Literal["arithmetic"] = "arithmetic"  # type: ignore[assignment]
    tasks: dict[str, DatasetChoice] = Field(
        default={
            "chain_sum": DatasetChoice(
                weight=1.0,
                options={"min_terms": 2, "max_terms": 2, "min_digits": 3, "max_digits": 3},
            )
        },
        min_length=1,
    )


class ReasoningGymTask:
    """Draws problems until every split is full."""

    def __init__(self, config: ReasoningGymConfig) -> None:
        self.config = config
        for label, choice in config.tasks.items():
            _dataset(choice.dataset or label, json.dumps(choice.options, sort_keys=True), f"task.tasks.{label}")

    def generate(self, progress: Progress | None = None) -> dict[Split, list[Problem]]:
        """The problems of every split, the datasets mixed in a seeded order."""
        progress = progress or SilentProgress()
        config = self.config
        sizes = dict(zip(SPLITS, (config.train_size, config.validation_size, config.test_size), strict=True))
        shares = {split: _shares(size, config.tasks) for split, size in sizes.items()}
        total, done = sum(sizes.values()), 0
        progress.start("problems", total)
        found: dict[Split, list[Problem]] = {split: [] for split in SPLITS}
        seen: set[str] = set()
        for label in config.tasks:
            wanted = {split: shares[split][label] for split in SPLITS}
            for split, problems in self._draw(label, wanted, seen).items():
                found[split] += problems
                done += len(problems)
            progress.advance(done, label)
        for split in SPLITS:
            random.Random(f"{config.seed} {split}").shuffle(found[split])
        return found

    def score(self, problem: Problem, answer: str) -> float:
        """1.0 for a right answer by the dataset's own scorer, else 0.0."""
        return score(problem, answer)

    def _draw(self, label: str, wanted: Mapping[Split, int], seen: set[str]) -> dict[Split, list[Problem]]:
        choice = self.config.tasks[label]
        name = choice.dataset or label
        form = form_of(name)
        draws = max(FEWEST_DRAWS, DRAWS_PER_PROBLEM * sum(wanted.values()))
        options = json.dumps(choice.options, sort_keys=True)
        digest = hashlib.sha256(f"{self.config.seed} {label}".encode()).digest()
        dataset = _create(name, choice.options, f"task.tasks.{label}", int.from_bytes(digest[:6], "big"), draws)
        found: dict[Split, list[Problem]] = {split: [] for split in SPLITS}
        news = 0
        for index in range(draws):
            if all(len(found[split]) == wanted[split] for split in SPLITS):
                return found
            if index - news > DRAWS_WITHOUT_NEWS:
                break
            entry = dataset[index]
            question, answer = entry["question"], entry["answer"]
            metadata = json.loads(json.dumps(entry["metadata"], default=_plain))
            identity = problem_id(name, form.canonical(metadata, question))
            split = split_of(identity)
            if identity in seen or len(found[split]) == wanted[split]:
                continue
            metadata["dataset_options"] = choice.options
            worked = form.worked(metadata, question, answer)
            problem = Problem(identity, name, question, answer, metadata, worked)
            if not isinstance(answer, str) or score(problem, answer) != 1.0:
                raise RequestError(
                    f"task.tasks.{label}: {name} does not accept its own answer {answer!r} to {question!r}; "
                    "choose another dataset."
                )
            seen.add(identity)
            found[split].append(problem)
            news = index
        counts = ", ".join(f"{len(found[split])} of {wanted[split]} {split}" for split in SPLITS)
        raise RequestError(
            f"task.tasks.{label}: {name} with options {options} has too few different problems ({counts}); "
            "ask for fewer, or widen its options."
        )


def build(config: ReasoningGymConfig) -> ReasoningGymTask:
    """Problems of reasoning-gym datasets."""
    return ReasoningGymTask(config)


def score(problem: Problem, answer: str) -> float:
    """1.0 if the dataset's own scorer calls the answer fully right, else 0.0. Never raises for an answer.

    Its scorers give part marks, for instance for a long text that has the right number in it somewhere. They would
    teach a model to write more numbers, so they count as wrong here; `part_mark` has them.
    """
    return 1.0 if part_mark(problem, answer) >= 1.0 - 1e-9 else 0.0


def part_mark(problem: Problem, answer: str) -> float:
    """What the dataset's own scorer says, between 0 and 1."""
    options = problem.metadata.get("dataset_options", {})
    dataset = _dataset(problem.task, json.dumps(options, sort_keys=True), f"problem {problem.id[:12]}")
    if not isinstance(answer, str):
        return 0.0
    answer = answer.strip()
    longest = max(LONGEST_ANSWER, 4 * len(problem.answer))
    if not may_be_scored(problem.task, answer, longest):
        return 0.0
    entry = {"question": problem.question, "answer": problem.answer, "metadata": dict(problem.metadata)}
    try:
        return float(dataset.score_answer(answer, entry))
    except Exception:  # whatever an absurd answer does to a scorer, it is not right
        return 0.0


def _shares(size: int, tasks: Mapping[str, DatasetChoice]) -> dict[str, int]:
    """Divide a size by weight, exactly: the largest remainders get what rounding leaves."""
    total = sum(choice.weight for choice in tasks.values())
    exact = {label: size * choice.weight / total for label, choice in tasks.items()}
    shares = {label: int(value) for label, value in exact.items()}
    by_remainder = sorted(exact, key=lambda label: shares[label] - exact[label])
    for label in by_remainder[: size - sum(shares.values())]:
        shares[label] += 1
    return shares


@lru_cache(maxsize=64)
def _dataset(name: str, options: str, where: str) -> Any:
    """A dataset to score with; also the check that it exists and takes these options."""
    return _create(name, json.loads(options), where, seed=0, size=1)


def _create(name: str, options: Mapping[str, Any], where: str, seed: int, size: int) -> Any:
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if name not in DATASETS:
        raise RequestError(f"{where}: reasoning-gym has no dataset '{name}'. {did_you_mean(name, DATASETS)}")
    try:
        return reasoning_gym.create_dataset(name, **options, seed=seed, size=size)
    except (TypeError, AssertionError, ValueError) as error:
        raise RequestError(f"{where}.options {dict(options)}: {name} refuses them: {error}.") from error
    except Exception as error:
        raise WorkError(f"{where}: reasoning-gym's {name} cannot be made: {error}.") from error


def _plain(value: Any) -> Any:
    """JSON for what datasets put into metadata: numpy numbers and arrays, sets; anything else as its text."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=str)
    return str(value)
