"""The self-test: every operator has one, and it finds what is wrong."""

import importlib.util
import math
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from deepwright_kernels import dispatch, operators, self_test

CPU = torch.device("cpu")
MISSING = [name for name in ("triton", "numpy") if importlib.util.find_spec(name) is None]


def test_every_operator_has_inputs() -> None:
    lacking = sorted(set(operators()) - set(self_test.INPUTS))
    assert not lacking, f"deepwright_kernels/self_test.py has no inputs for {', '.join(lacking)}"
    assert sorted(self_test.INPUTS) == sorted(operators())


@pytest.mark.parametrize("name", sorted(operators()))
def test_backends_agree_on_the_inputs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    outcomes = {outcome.backend: outcome for outcome in self_test.run(name, CPU)}
    assert sorted(outcomes) == operators()[name]
    assert outcomes["reference"].passed and outcomes["reference"].error == 0.0
    for outcome in outcomes.values():
        assert outcome.passed is not False, outcome
        assert (outcome.reason is None) == (outcome.milliseconds is not None)


def test_an_operator_without_inputs_is_not_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(self_test.INPUTS, "rms_norm")
    assert {outcome.passed for outcome in self_test.run("rms_norm", CPU)} == {None}
    assert len(self_test.arguments_of("rms_norm", CPU)) == 1


def test_inputs_are_the_same_every_time_and_not_shared() -> None:
    first, second = (self_test.arguments_of("rms_norm", CPU) for _ in range(2))
    assert torch.equal(first[0], second[0]) and first[0].data_ptr() != second[0].data_ptr()


@pytest.mark.parametrize(
    ("wrong", "failure"),
    [
        (lambda x, weight, eps: (x * weight).detach(), "TypeError|RuntimeError|ValueError"),
        (lambda x, weight, eps: (_ for _ in ()).throw(OSError("no device")), "OSError: no device"),
        (lambda x, weight, eps: (x * weight).double()[..., :3], "it gives tensors of"),
    ],
)
def test_a_backend_that_fails_is_a_failure(
    wrong: Callable[..., Any], failure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(dispatch._operators["rms_norm"].backends, "torch", wrong)
    outcome = next(o for o in self_test.run("rms_norm", CPU) if o.backend == "torch")
    assert outcome.passed is False and outcome.failure is not None
    assert any(sign in outcome.failure for sign in failure.split("|")), outcome.failure


def test_a_wrong_gradient_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = dispatch.load("rms_norm", "reference")

    def half(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        y = reference(x, weight, eps)
        return y / 2 + y.detach() / 2

    monkeypatch.setitem(dispatch._operators["rms_norm"].backends, "torch", half)
    outcome = next(o for o in self_test.run("rms_norm", CPU) if o.backend == "torch")
    assert outcome.passed is False and outcome.error == pytest.approx(0.5, rel=0.01)


@pytest.mark.parametrize(
    ("have", "want", "error"),
    [
        ([1.0, -4.0], [1.0, -2.0], 1.0),
        ([math.nan, 1.0], [math.nan, 1.0], 0.0),
        ([math.nan, 1.0], [2.0, 1.0], math.inf),
        ([math.inf, 1.0], [math.inf, 1.0], 0.0),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([1, 2], [1, 2], 0.0),
        ([1, 3], [1, 2], math.inf),
        ([], [], 0.0),
    ],
)
def test_deviation(have: list[float], want: list[float], error: float) -> None:
    assert self_test._deviation(torch.tensor(have), torch.tensor(want)) == error


@pytest.mark.skipif(bool(MISSING), reason=f"triton's interpreter needs {' and '.join(MISSING)}, which is not installed")
def test_the_interpreters_kernels_take_part_when_it_is_on() -> None:
    program = """
import torch
from deepwright_kernels import self_test
outcome = next(o for o in self_test.run("rotary", torch.device("cpu")) if o.backend == "triton")
assert outcome.passed, outcome
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
