"""Which backend runs: listed and tested by `deepwright kernels`, chosen by the section `kernels` of a run."""

import json
from collections.abc import Callable, Iterator

import pytest
import torch

from deepwright_core.errors import RequestError
from deepwright_core.plugins import Plugins
from deepwright_kernels import add_backend, choices, dispatch, operators
from flows import cli, compose, request, session

Go = Callable[..., session.Report]


@pytest.fixture(autouse=True)
def _on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setenv("DEEPWRIGHT_BLOCK", "core,moe,mla,rl,serve")


@pytest.fixture
def vendor() -> Iterator[Callable[..., None]]:
    """Adds a backend "vendor" to rms_norm, as a plugin would."""
    declared = dispatch._operators["rms_norm"]

    def add(implementation: Callable[..., torch.Tensor], available=lambda tensor: None) -> None:
        add_backend("rms_norm", "vendor", implementation, available)

    yield add
    declared.backends.pop("vendor", None)
    declared.available.pop("vendor", None)


def listed(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> dict[str, dict]:
    """Operator -> its entry in the JSON, with its backends by name."""
    assert cli.call(["kernels", "--json", *arguments]) == status
    entries = json.loads(capsys.readouterr().out)["operators"]
    return {entry["name"]: {**entry, "backends": {b["name"]: b for b in entry["backends"]}} for entry in entries}


def test_every_operator_is_listed_with_what_runs_and_why_others_cannot(capsys: pytest.CaptureFixture[str]) -> None:
    found = listed(capsys)
    assert sorted(found) == sorted(operators())
    norm = found["rms_norm"]
    assert (norm["chosen"], norm["runs"]) == ("auto", "torch")
    assert norm["backends"]["torch"]["reason"] is None
    assert "the tensor is on cpu" in norm["backends"]["triton"]["reason"]
    for entry in found.values():
        assert entry["backends"][entry["runs"]]["reason"] is None
        assert "reference" in entry["backends"] and "self_test" not in entry["backends"]["reference"]


def test_the_table_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.call(["kernels", "rms_norm", "--self-test"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["torch", "runs", "passed"] in [line[:3] for line in lines]
    assert any(line[:3] == ["triton", "cannot", "run:"] for line in lines)


def test_added_backends_are_listed_and_tested(capsys: pytest.CaptureFixture[str], vendor: Callable[..., None]) -> None:
    vendor(dispatch.load("rms_norm", "reference"))
    tested = listed(capsys, "rms_norm", "--self-test")["rms_norm"]
    assert tested["runs"] == "torch", "installing changes nothing"
    assert tested["backends"]["vendor"]["self_test"]["passed"]
    assert "self_test" not in tested["backends"]["triton"]


@pytest.mark.parametrize(
    ("implementation", "sentence"),
    [
        (lambda x, weight, eps: x * weight, "rms_norm with vendor: the error is"),
        (lambda x, weight, eps: (x * weight)[:1], "it gives tensors of"),
        (lambda x: x, "rms_norm with vendor: TypeError"),
    ],
)
def test_a_wrong_backend_fails_with_1_and_a_sentence(
    implementation: Callable[..., torch.Tensor],
    sentence: str,
    capsys: pytest.CaptureFixture[str],
    vendor: Callable[..., None],
) -> None:
    vendor(implementation)
    assert cli.call(["kernels", "rms_norm", "--self-test"]) == 1
    said = capsys.readouterr()
    assert "FAILED" in said.out and "passed" in said.out
    assert sentence in said.err.splitlines()[-1] and "Traceback" not in said.err
    tested = listed(capsys, "rms_norm", "--self-test", status=1)["rms_norm"]["backends"]
    assert not tested["vendor"]["self_test"]["passed"] and tested["torch"]["self_test"]["passed"]


def test_asked_wrongly_it_says_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, sentence in {
        "kernels rms_nrm": "Did you mean rms_norm",
        "kernels --device cuda": "torch finds no GPU on this machine",
        "kernels --device gpu": "'gpu' is not one of 'cpu', 'cuda'",
        "kernels --selftest": "--self-test",
        "kernel": "Did you mean kernels?",
    }.items():
        assert cli.call(arguments.split()) == 2
        assert sentence in capsys.readouterr().err, arguments


def chosen(go: Go, *overrides: str) -> dict[str, str]:
    """What was configured while the stage ran."""
    learn = go("learn", *overrides).outcomes[1]
    return json.loads((learn.directory / "kernels.json").read_text())


def test_a_run_chooses_backends_and_leaves_none_behind(go: Go) -> None:
    assert chosen(go) == {}
    assert chosen(go, "kernels.rms_norm=reference") == {"rms_norm": "reference"}
    everything = chosen(go, "kernels=reference", "kernels.rms_norm=torch", "kernels.rotary=auto")
    assert everything.pop("rms_norm") == "torch"
    assert everything == dict.fromkeys(set(operators()) - {"rms_norm", "rotary"}, "reference")
    assert set(choices().values()) == {"auto"}


def test_a_chosen_backend_belongs_to_a_stages_identity_and_auto_does_not(go: Go) -> None:
    def reused(*overrides: str) -> list[bool]:
        return [outcome.reused for outcome in go("learn", *overrides).outcomes]

    assert reused() == [False, False]
    assert reused("kernels.rms_norm=auto") == [True, True]
    assert reused("kernels.rms_norm=reference") == [True, False]
    assert reused("kernels=reference", "kernels.rms_norm=auto") == [True, False]


def test_every_operator_is_a_key_of_the_config(plugins: Plugins) -> None:
    assert compose.compose([], plugins)["kernels"] == dict.fromkeys(operators(), "auto")


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("kernels.rms_nrm=torch", "kernels.rms_nrm is not in the config (override 'kernels.rms_nrm=torch'). Did you"),
        ("+kernels.rms=torch", "kernels.rms: there is no operator of that name. "),
        ("kernels.rms_norm=tritn", "kernels.rms_norm is 'tritn', and the operator has no such backend. Did you mean "),
        ("kernels.rms_norm=3", "kernels.rms_norm is 3, and the operator has no such backend. Known: auto, "),
        ("kernels.rms_norm=triton", "kernels.rms_norm is 'triton', which cannot run on this machine because "),
        ("kernels=refrence", "kernels=refrence: there is no such option. Did you mean reference?"),
    ],
)
def test_a_wrong_choice_is_refused_before_anything_starts(override: str, sentence: str, plugins: Plugins) -> None:
    with pytest.raises(RequestError) as error:
        request.make("learn", [override], plugins)
    (problem,) = error.value.problems
    assert problem.startswith(sentence)


def test_an_older_config_without_the_section_still_runs(plugins: Plugins, tmp_path) -> None:
    composed = compose.compose([], plugins)
    del composed["kernels"]
    (tmp_path / "config.yaml").write_text(compose.to_yaml(composed))
    made = request.make("learn", [], plugins, str(tmp_path / "config.yaml"))
    assert made.sections["kernels"] == {}
