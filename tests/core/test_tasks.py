"""Problems: splits that share nothing, scorers that cannot be fooled or broken, files that come back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import reasoning_gym

from deepwright_core import tasks
from deepwright_core.errors import RequestError
from deepwright_core.registry import Registry
from deepwright_core.tasks import SPLITS, Problem, Split, dump_problems, load_problems, part_mark, score, split_of
from deepwright_core.tasks import worked_chain_sum as chain
from deepwright_core.tasks.gym import ReasoningGymTask
from deepwright_core.tasks.problem import problem_id

SMALL = {"train_size": 300, "validation_size": 40, "test_size": 40}
TWO_TERMS = {"min_terms": 2, "max_terms": 2, "min_digits": 3, "max_digits": 3}


def build(**config: Any) -> ReasoningGymTask:
    registry = Registry()
    tasks.register(registry)
    return registry.build("task", {"name": "arithmetic", **config})


def problem_of(entry: dict[str, Any], task: str = "chain_sum", **options: Any) -> Problem:
    metadata = {**entry["metadata"], "dataset_options": options}
    return Problem("0" * 64, task, entry["question"], entry["answer"], metadata)


def operands(problem: Problem) -> tuple[int, str, int]:
    a, operator, b = problem.metadata["expression"].split()
    return int(a), operator, int(b)


@pytest.fixture(scope="module")
def drawn() -> dict[Split, list[Problem]]:
    return build(train_size=6000, validation_size=500, test_size=500).generate()


def test_sizes_are_met_and_every_problem_is_right(drawn: dict[Split, list[Problem]]) -> None:
    assert [len(drawn[split]) for split in SPLITS] == [6000, 500, 500]
    for problem in drawn["test"]:
        a, operator, b = operands(problem)
        assert 100 <= a <= 999 and 100 <= b <= 999
        assert int(problem.answer) == (a + b if operator == "+" else a - b)
        assert score(problem, problem.answer) == 1.0


def test_no_two_splits_share_a_problem_even_turned_round(drawn: dict[Split, list[Problem]]) -> None:
    def asked(split: Split) -> set[tuple[int, str, int]]:
        """Every way to ask what a split asks: both orders of the operands."""
        forms = set()
        for problem in drawn[split]:
            a, operator, b = operands(problem)
            forms |= {(a, operator, b), (b, operator, a)}
        return forms

    for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert not asked(one) & asked(other)
    everything = [problem.id for split in SPLITS for problem in drawn[split]]
    assert len(set(everything)) == len(everything)


@pytest.mark.costly
def test_splits_stay_disjoint_over_seeds_that_share_items(drawn: dict[Split, list[Problem]]) -> None:
    # The trap: item i is drawn from Random(seed + i), so that seed 42's item 1 is seed 43's item 0.
    one, other = (reasoning_gym.create_dataset("chain_sum", seed=seed, size=50, **TWO_TERMS) for seed in (42, 43))
    assert [one[i + 1]["question"] for i in range(49)] == [other[i]["question"] for i in range(49)]
    held_out = {problem.id for problem in drawn["test"]} | {problem.id for problem in drawn["validation"]}
    for seed in (42, 43, 44, 7):
        again = build(train_size=3000, validation_size=200, test_size=200, seed=seed).generate()
        assert not held_out & {problem.id for problem in again["train"]}
        assert all(split_of(problem.id) == split for split in SPLITS for problem in again[split])


def test_the_split_follows_no_pattern_of_the_problem(drawn: dict[Split, list[Problem]]) -> None:
    # A modular hash can put exactly the sums ending in one digit into a split.
    for split in SPLITS:
        endings = [int(problem.answer) % 10 for problem in drawn[split]]
        for digit in range(10):
            assert 0.04 < endings.count(digit) / len(endings) < 0.18, (split, digit)
        subtractions = sum("-" in problem.metadata["expression"] for problem in drawn[split])
        assert 0.4 < subtractions / len(endings) < 0.6


def test_generation_repeats_and_the_seed_matters() -> None:
    assert build(**SMALL).generate() == build(**SMALL).generate()
    one, other = ({p.id for p in build(**SMALL, seed=seed).generate()["train"]} for seed in (1, 2))
    assert len(one & other) < 30


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("357 + 468", "468 + 357", True),
        ("357 - 468", "468 - 357", True),
        ("357 + 468", "357 - 468", False),
        ("1 - 2 + 3", "3 + 1 - 2", True),
        ("1 - 2 + 3", "2 - 1 - 3", True),
        ("1 - 2 + 3", "1 + 2 - 3", False),
        ("-4 + -5", "-5 - 4", True),
    ],
)
def test_canonical_sums(one: str, other: str, same: bool) -> None:
    first, second = (chain.canonical({"expression": expression}, "") for expression in (one, other))
    assert (first == second) is same


def test_ids_are_hashes_of_task_and_canonical_text() -> None:
    assert len(problem_id("a", "b")) == 64
    assert problem_id("a", "b") != problem_id("b", "a")
    shares = [split_of(problem_id("t", str(n))) for n in range(4000)]
    assert 0.08 < shares.count("test") / 4000 < 0.12
    assert 0.08 < shares.count("validation") / 4000 < 0.12


def test_mixtures_follow_their_weights_and_carry_bare_datasets() -> None:
    registry = Registry()
    tasks.register(registry)
    config = {
        "name": "reasoning_gym",
        "train_size": 100,
        "validation_size": 10,
        "test_size": 10,
        "tasks": {
            "sums": {"dataset": "chain_sum", "options": TWO_TERMS, "weight": 3},
            "basic_arithmetic": {"weight": 1},
        },
    }
    drawn = registry.build("task", config).generate()
    assert [p.task for p in drawn["train"]].count("chain_sum") == 75
    assert [p.task for p in drawn["train"][:40]].count("basic_arithmetic") > 0
    assert all((p.worked == "") == (p.task == "basic_arithmetic") for p in drawn["train"])


def test_too_small_a_space_is_said() -> None:
    options = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    with pytest.raises(RequestError, match=r"too few different problems \(.* of 300 train"):
        build(tasks={"chain_sum": {"options": options}}, **SMALL).generate()


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"chain_sums": {}}, "Did you mean chain_sum"),
        ({"chain_sum": {"options": {"min_term": 2}}}, "min_term"),
        ({"chain_sum": {"options": {"min_terms": 5, "max_terms": 2}}}, "max_terms must be >= min_terms"),
        ({"chain_sum": {"options": {"seed": 3}}}, "task.seed"),
        ({"chain_sum": {"weight": 0}}, "greater than 0"),
        ({}, "at least 1"),
    ],
)
def test_wrong_tasks_are_refused_before_anything_is_drawn(choice: dict[str, Any], expected: str) -> None:
    with pytest.raises(RequestError) as caught:
        build(tasks=choice)
    assert expected in str(caught.value)


ENTRY = reasoning_gym.create_dataset("chain_sum", seed=5, size=1, **TWO_TERMS)[0]


@pytest.mark.parametrize(
    "answer",
    [
        "",
        " ",
        "x",
        "nan",
        "sNaN",
        "inf",
        "1e999999999",
        "9" * 100000,
        "(" * 5000,
        "\x00",
        "𝟏𝟐𝟑x",
        "None",
        "{answer}1",
        "the answer is {answer}",
        "{answer} {answer}",
        "{answer}.0000001",
    ],
)
def test_wrong_answers_score_nothing_and_raise_nothing(answer: str) -> None:
    assert score(problem_of(ENTRY), answer.replace("{answer}", ENTRY["answer"])) == 0.0


def test_right_answers_score_in_the_forms_that_the_scorer_takes() -> None:
    for form in ("{}", " {}\n", "{}.0", "0{}" if not ENTRY["answer"].startswith("-") else "{}"):
        assert score(problem_of(ENTRY), form.format(ENTRY["answer"])) == 1.0
    assert score(problem_of(ENTRY), None) == 0.0  # type: ignore[arg-type]


def test_part_marks_are_kept_apart_from_right_and_wrong() -> None:
    hedged = f"{ENTRY['answer']} or not"
    assert 0.0 < part_mark(problem_of(ENTRY), hedged) < 1.0
    assert score(problem_of(ENTRY), hedged) == 0.0


def test_answers_are_never_executed(tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    attacks = (f"open({str(touched)!r}, 'w')", f"__import__('pathlib').Path({str(touched)!r}).touch()", "9**9**9**9")
    for name in ("countdown", "spiral_matrix", "polynomial_multiplication", "binary_matrix", "n_queens"):
        dataset = reasoning_gym.create_dataset(name, seed=1, size=1)
        for attack in attacks:
            for answer in (attack, f"[{attack}]", f"(lambda: {attack})()"):
                assert score(problem_of(dataset[0], name), answer) == 0.0
    assert not touched.exists()


@pytest.mark.parametrize(
    "name",
    [
        "countdown",
        "spiral_matrix",
        "polynomial_multiplication",
        "binary_matrix",
        "string_insertion",
        "puzzle24",
        "simple_integration",
        "n_queens",
        "number_sorting",
        "gcd",
        "basic_arithmetic",
        "word_sorting",
    ],
)
def test_guarded_scorers_still_take_their_own_answers(name: str) -> None:
    dataset = reasoning_gym.create_dataset(name, seed=3, size=20)
    right = 0
    for index in range(20):
        entry = json.loads(json.dumps(dataset[index], default=str))
        if entry["answer"] is None:
            entry["answer"] = entry["metadata"]["solution"]
        right += score(problem_of(entry, name), str(entry["answer"])) == 1.0
    assert right == 20


def test_problems_come_back_from_their_file(tmp_path: Path, drawn: dict[Split, list[Problem]]) -> None:
    path = tmp_path / "test.jsonl"
    path.write_text(dump_problems(drawn["test"]), encoding="utf-8")
    assert load_problems(path) == drawn["test"]
    path.write_text(dump_problems(drawn["test"][:1]) + '{"id": 1}\n')
    with pytest.raises(RequestError, match=r"line 2 is not a problem"):
        load_problems(path)
    with pytest.raises(RequestError, match="cannot be read"):
        load_problems(tmp_path / "none.jsonl")
