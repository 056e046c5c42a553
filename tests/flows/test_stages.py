"""Running stages: what is reused, what runs again, what goes on where it stopped."""

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deepwright_core.errors import RequestError, WorkError
from deepwright_core.plugins import Plugins
from deepwright_core.stage import Stage
from flows import fingerprint, plan, session
from flows.stage_directory import StageDirectory

Go = Callable[..., session.Report]


def reused(report: session.Report) -> dict[str, bool]:
    return {outcome.stage: outcome.reused for outcome in report.outcomes}


def visits(report: session.Report) -> list[int]:
    """The steps at which `learn` was entered."""
    learn = next(o for o in report.outcomes if o.stage == "learn")
    return [int(line) for line in (learn.directory / "visits.txt").read_text().split()]


def test_a_stage_runs_with_what_it_needs_and_no_more(go: Go) -> None:
    report = go("learn")
    assert [o.stage for o in report.outcomes] == ["gather", "learn"]
    assert report.outcomes[1].result.metrics == {"total": 190.0}


def test_a_finished_stage_is_reused(go: Go) -> None:
    go("pipeline")
    again = go("pipeline")
    assert reused(again) == {"gather": True, "learn": True, "judge": True}
    assert visits(again) == [0]


def test_only_what_changed_and_what_depends_on_it_runs_again(go: Go) -> None:
    go("pipeline")
    assert reused(go("pipeline", "optimizer.pace=2")) == {"gather": True, "learn": False, "judge": False}
    assert reused(go("pipeline", "judge.bar=2")) == {"gather": True, "learn": True, "judge": False}
    # The seed is a section of learn, but here it changes nothing in what learn makes: judge's inputs are the same.
    assert reused(go("pipeline", "seed=5")) == {"gather": True, "learn": False, "judge": True}
    assert all(reused(go("pipeline", "run.cpu_watts=1", "tracking=none")).values())


def test_a_forced_stage_starts_from_nothing(go: Go) -> None:
    go("pipeline")
    report = go("pipeline", "run.force=[learn]")
    assert reused(report) == {"gather": True, "learn": False, "judge": True}
    assert visits(report) == [0]


@pytest.mark.parametrize("damage", ["gone", "shorter", "changed"])
def test_a_damaged_output_is_made_again(quiet: Callable[[], Any], go: Go, damage: str) -> None:
    first = go("learn")
    model = first.outcomes[1].directory / "model" / "model.safetensors"
    before = model.read_bytes()
    if damage == "gone":
        model.unlink()
    elif damage == "shorter":
        model.write_bytes(before[:-1])
    else:
        model.write_bytes(b"9" + before[1:])
    display = quiet()
    again = go("learn", display=display)
    assert reused(again) == {"gather": True, "learn": False}
    assert model.read_bytes() == before
    assert any("cannot be used" in line and str(model) in line for line in display.said)


def test_a_touched_output_is_still_good(go: Go) -> None:
    model = go("learn").outcomes[1].directory / "model" / "model.safetensors"
    os.utime(model, (1, 1))
    assert all(reused(go("learn")).values())


def test_an_unreadable_result_is_made_again(go: Go) -> None:
    result = go("learn").outcomes[1].directory / "result.json"
    result.write_text(result.read_text()[:50])
    assert reused(go("learn")) == {"gather": True, "learn": False}
    assert json.loads(result.read_text())["metrics"] == {"total": 190.0}


def test_a_stage_that_failed_goes_on_from_its_checkpoint(go: Go, plugins: Plugins) -> None:
    class FailOnce:
        """A callback that pulls the plug at the second checkpoint, once."""

        done = False

    from deepwright_core.hookspecs import hookimpl

    class Plug(FailOnce):
        @hookimpl
        def deepwright_checkpoint_saved(self, event: object) -> None:
            if event.step == 10 and not self.done:  # type: ignore[attr-defined]
                self.done = True
                raise OSError("pulled")

    plug = Plug()
    plugins.manager.register(plug)
    try:
        with pytest.raises(WorkError, match="learn failed: OSError: pulled"):
            go("learn")
        report = go("learn")
    finally:
        plugins.manager.unregister(plug)
    assert visits(report) == [0, 10]
    assert report.outcomes[1].result.metrics == {"total": 190.0}


def test_failures_are_sentences_and_keep_the_checkpoints(go: Go) -> None:
    with pytest.raises(WorkError, match="the numbers do not add up"):
        go("learn", "learn.fail=crash")
    with pytest.raises(WorkError, match=r"disk that holds .* is full") as error:
        go("learn", "learn.fail=disk")
    assert "same command" in str(error.value)
    with pytest.raises(RequestError, match="too bold"):
        go("learn", "learn.fail=request")


def test_too_little_disk_is_told_before_the_start(go: Go) -> None:
    with pytest.raises(WorkError, match=r"gather was not started: .* run.min_free_disk_gb asks for 1e\+09"):
        go("learn", "run.min_free_disk_gb=1e9")


def test_a_root_that_cannot_be_written_is_refused(go: Go, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="nothing can be written there"):
        go("learn", f"paths.root={tmp_path}/file/runs")


def test_a_second_run_waits_and_then_reuses(quiet: Callable[[], Any], go: Go, plugins: Plugins) -> None:
    first_is_in = threading.Event()

    from deepwright_core.hookspecs import hookimpl

    class Tell:
        @hookimpl
        def deepwright_checkpoint_saved(self, event: object) -> None:
            first_is_in.set()

    tell = Tell()
    plugins.manager.register(tell)
    reports: list[session.Report] = []
    slow = ("learn.pause=0.03", "learn.every=1")
    thread = threading.Thread(target=lambda: reports.append(go("learn", *slow)))
    try:
        thread.start()
        assert first_is_in.wait(20)
        display = quiet()
        second = go("learn", *slow, display=display)
        thread.join(20)
    finally:
        plugins.manager.unregister(tell)
    assert reused(reports[0]) == {"gather": False, "learn": False}
    assert reused(second) == {"gather": True, "learn": True}
    assert any(f"run by process {os.getpid()}" in line for line in display.said)


@pytest.mark.parametrize(("fail", "sign"), [("crash", "do not add up"), ("die", "the last words of learn")])
def test_an_isolated_stage_that_dies_shows_its_last_lines(
    fail: str, sign: str, go: Go, command_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for key in ("PYTHONPATH", "DEEPWRIGHT_BLOCK"):
        monkeypatch.setenv(key, command_environment[key])
    with pytest.raises(WorkError, match=sign) as error:
        go("learn", f"learn.fail={fail}", "run.isolate=true")
    assert "own process" in str(error.value)


def test_an_isolated_stage_gives_the_same_result(
    go: Go, command_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for key in ("PYTHONPATH", "DEEPWRIGHT_BLOCK"):
        monkeypatch.setenv(key, command_environment[key])
    isolated = go("learn", "run.isolate=true", "kernels.rms_norm=reference")
    assert isolated.outcomes[1].result.metrics == {"total": 190.0}
    kernels = isolated.outcomes[1].directory / "kernels.json"
    assert json.loads(kernels.read_text()) == {"rms_norm": "reference"}
    assert all(reused(go("learn", "kernels.rms_norm=reference")).values())


def test_a_callback_that_fails_is_named_and_harmless(quiet: Callable[[], Any], go: Go, plugins: Plugins) -> None:
    from deepwright_core.hookspecs import hookimpl

    class Clumsy:
        @hookimpl
        def deepwright_stage_end(self, event: object) -> None:
            raise ValueError("oops")

    clumsy = Clumsy()
    plugins.manager.register(clumsy, name="clumsy")
    display = quiet()
    try:
        go("gather", display=display)
    finally:
        plugins.manager.unregister(clumsy)
    assert any("clumsy" in line and "oops" in line for line in display.said)


def test_code_that_decides_a_result_is_part_of_the_identity(plugins: Plugins) -> None:
    component = plugins.registry.get("stage", "learn")
    versions = fingerprint.code_versions(component, {"optimizer": {"name": "walk"}}, plugins.registry)
    assert {"deepwright_core", "deepwright_kernels", "deepwright_toy"} <= versions.keys()
    assert versions["distribution toy-for-deepwright"] == "0.1"
    assert not {"flows", "deepwright_serve"} & versions.keys()


def test_a_package_digest_follows_its_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "somebody"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "notes.md").write_text("one")
    monkeypatch.syspath_prepend(str(tmp_path))
    digest = fingerprint.package_digest.__wrapped__
    first = digest("somebody")
    (package / "notes.md").write_text("two")
    assert digest("somebody") == first
    (package / "deep.py").write_text("x = 1")
    second = digest("somebody")
    assert second != first
    (package / "kernel.cu").write_text("// x")
    assert digest("somebody") not in (first, second)


def test_stages_that_need_each_other_are_refused() -> None:
    def stage(name: str, **needs: str) -> Stage:
        return Stage(name, (), needs, lambda sections, context: None)  # type: ignore[arg-type,return-value]

    stages = {s.name: s for s in (stage("a", x="b"), stage("b", y="c"), stage("c", z="b"), stage("d", w="e"))}
    with pytest.raises(RequestError, match="b -> c -> b need each other"):
        plan.order(stages, ["a"])
    with pytest.raises(RequestError, match="Stage d needs a stage 'e'"):
        plan.order(stages, ["d"])


def test_a_result_of_another_identity_is_not_taken(go: Go) -> None:
    outcome = go("gather").outcomes[0]
    done, why = StageDirectory(outcome.directory, "gather", "0" * 64).finished()
    assert done is None and why is not None and "another configuration" in why


def test_a_run_leaves_its_config_log_and_summary(go: Go) -> None:
    report = go("pipeline")
    assert {"config.yaml", "log.txt", "summary.md"} <= {p.name for p in report.directory.iterdir()}
    text = (report.directory / "summary.md").read_text()
    assert "| learn | done |" in text and "0 → 190" in text and "deepwright serve" in text
    assert "plugin toy-for-deepwright" in (report.directory / "log.txt").read_text()
