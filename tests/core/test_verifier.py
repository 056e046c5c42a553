"""The verifier: scores in order, and a scorer that hangs, dies or talks is replaced and counted, never a silent 0."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from deepwright_core import tasks
from deepwright_core.errors import WorkError
from deepwright_core.registry import Registry
from deepwright_core.tasks import Problem
from deepwright_core.tasks import verifier as module
from deepwright_core.tasks.verifier import Verifier

Child = Callable[[str], list[int]]

SCORER = """
import json, os, sys, time
print("ready", flush=True)
for line in sys.stdin:
    problem, answer = json.loads(line)
    if answer == "hang":
        time.sleep(3600)
    if answer == "die":
        os._exit(3)
    if answer == "nonsense":
        print("I am not a number", flush=True)
    else:
        print(answer, flush=True)
"""

# Holds its answers back until it dies, and closes its ears before it gives them: the parent finds out that nobody
# listens before it has read what was said.
SPEAKS_BEFORE_IT_DIES = """
import json, os, sys
print("ready", flush=True)
held = []
for line in sys.stdin:
    answer = json.loads(line)[1]
    if answer == "die":
        os.close(0)
        os.write(1, "".join(f"{a}\\n" for a in held).encode())
        os._exit(3)
    held.append(answer)
    if len(held) > 5:
        print("\\n".join(held), flush=True)
        held = []
"""


@pytest.fixture
def child(monkeypatch: pytest.MonkeyPatch) -> Child:
    """Put a program in the scorer's place; gives the ids of the processes that were started."""
    real = subprocess.Popen

    def replace(program: str) -> list[int]:
        started: list[int] = []

        def start(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
            process = real([sys.executable, "-c", program], **options)
            started.append(process.pid)
            return process

        monkeypatch.setattr(module.subprocess, "Popen", start)
        return started

    return replace


def pair(answer: str) -> tuple[Problem, str]:
    return Problem("0" * 64, "sum", "?", "1", {}), answer


def gone(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    return False


def test_scores_keep_the_order_of_the_answers(child: Child) -> None:
    started = child(SCORER)
    with Verifier() as verifier:
        for batch in (range(200), range(0), range(200, 203)):
            assert verifier.score([pair(str(n / 7)) for n in batch]) == [n / 7 for n in batch]
        assert verifier.failures == 0 and len(started) == 1
    assert gone(started[0])


@pytest.mark.parametrize("place", [0, 19, 39])
@pytest.mark.parametrize("trouble", ["die", "hang", "nonsense"])
def test_one_bad_answer_costs_itself_and_no_other(child: Child, trouble: str, place: int) -> None:
    started = child(SCORER)
    answers = [str(n) for n in range(1, 41)]
    answers[place] = trouble
    with Verifier(seconds=1.0) as verifier:
        scores = verifier.score([pair(answer) for answer in answers])
        assert scores == [0.0 if answer == trouble else float(answer) for answer in answers]
        assert verifier.failures == 1
        assert verifier.score([pair("0.5")]) == [0.5]  # and goes on
        assert verifier.failures == 1 and gone(started[0])


def test_every_failure_is_counted(child: Child) -> None:
    child(SCORER)
    answers = ["1", "die", "die", "2", "nonsense", "3", "die"]
    with Verifier(seconds=5) as verifier:
        assert verifier.score([pair(answer) for answer in answers]) == [1, 0, 0, 2, 0, 3, 0]
        assert verifier.failures == 4


def test_answers_given_before_a_death_count(child: Child) -> None:
    child(SPEAKS_BEFORE_IT_DIES)
    answers = ["1", "2", "3", "4", "5", "die", *(str(n) for n in range(6, 42))]
    with Verifier(seconds=10) as verifier:
        assert verifier.score([pair(answer) for answer in answers]) == [1, 2, 3, 4, 5, 0, *range(6, 42)]
        assert verifier.failures == 1


@pytest.mark.costly
def test_large_problems_do_not_block_before_a_scorer_that_hangs(child: Child) -> None:
    """More than a pipe holds waits behind the answer that hangs; nobody may wait for anybody then."""
    child(SCORER)
    large = Problem("0" * 64, "sum", "?", "1", {"board": "x" * 100_000})
    with Verifier(seconds=1.0) as verifier:
        assert verifier.score([(large, "hang"), *((large, str(n)) for n in range(1, 40))]) == [0.0, *range(1, 40)]
        assert verifier.failures == 1


def test_an_interrupted_call_leaves_no_answers_to_the_next(child: Child, monkeypatch: pytest.MonkeyPatch) -> None:
    child(SCORER)
    with Verifier() as verifier:
        line, read = verifier._line, []

        def interrupted(seconds: float) -> bytes | None:
            read.append(seconds)
            if len(read) == 5:
                raise KeyboardInterrupt
            return line(seconds)

        monkeypatch.setattr(verifier, "_line", interrupted)
        with pytest.raises(KeyboardInterrupt):
            verifier.score([pair(str(n)) for n in range(10)])
        assert verifier.score([pair("0.5"), pair("0.25")]) == [0.5, 0.25]


def test_a_scorer_that_does_not_start_is_an_error_and_not_a_score(child: Child) -> None:
    started = child("import sys; sys.exit('no such module')")
    with Verifier() as verifier, pytest.raises(WorkError, match="verifier process did not start"):
        verifier.score([pair("1")])
    assert gone(started[0]) and verifier.failures == 0


def test_it_starts_again_after_it_was_closed(child: Child) -> None:
    started = child(SCORER)
    verifier = Verifier()
    assert verifier.score([pair("1")]) == [1.0]
    verifier.close()
    verifier.close()
    assert verifier.score([pair("2")]) == [2.0]
    verifier.close()
    assert len(started) == 2 and all(gone(process) for process in started)


def test_the_real_scorer_even_when_a_dataset_talks(child: Child) -> None:
    """reasoning-gym's own scorers, in their process; what one of them prints is not taken for a score."""
    child(
        "from deepwright_core.tasks import gym, verifier\n"
        "quiet = gym.score\n"
        "def score(problem, answer):\n"
        "    print('1.0')\n"
        "    return quiet(problem, answer)\n"
        "gym.score = score\n"
        "verifier._serve()\n"
    )
    registry = Registry()
    tasks.register(registry)
    task = registry.build("task", {"name": "arithmetic", "train_size": 100, "validation_size": 1, "test_size": 1})
    problems = task.generate()["train"]
    pairs = [(problem, problem.answer if n % 3 else problem.answer + "1") for n, problem in enumerate(problems)]
    with Verifier(seconds=60) as verifier:
        assert verifier.score(pairs) == [float(n % 3 > 0) for n in range(100)]
        assert verifier.failures == 0


def test_the_real_command() -> None:
    with Verifier(seconds=60) as verifier:
        problem = Problem("0" * 64, "chain_sum", "State the final answer: 2 + 3 =", "5", {"dataset_options": {}})
        assert verifier.score([(problem, "5"), (problem, "6"), (problem, "")]) == [1.0, 0.0, 0.0]
