"""The Prefect flows: the pipeline, and one for each stage.

A flow takes overrides and a few choices that become overrides, composes and validates once, and runs its stages. Each
stage is a subflow around one task whose cache key is the stage's identity; whether a stage is done is decided by its
own directory (see `stage_directory`), Prefect's cache only mirrors that. The command line calls the same flows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.context import TaskRunContext
from prefect.flows import Flow
from prefect.runtime import flow_run

from deepwright_core.plugins import installed

from . import cancellation, invoke, request, service_addresses, session
from .form_fields import Algorithm, Attention, Experiment, FeedForward, FineTune, Model, overrides_for
from .rich_progress import display
from .runner import Outcome, Run, Step


def run_target(target: str, overrides: list[str], config_file: str = "", **chosen: str) -> dict[str, Any]:
    """What every flow does."""
    plugins = installed()
    # A choice in the form comes first: what is written out as an override is more specific.
    checked = request.make(target, [*overrides_for(**chosen), *overrides], plugins, config_file)
    links = {}
    servers = service_addresses.running(checked.root)
    if servers is not None:
        links["workflow"] = f"{servers.prefect}/v2/runs/flow-run/{flow_run.get_id()}"
    show = display()
    report: session.Report | None = None
    try:
        with cancellation.watched(flow_run.get_id() if servers is not None else None):
            report = session.run(checked, plugins, show, carry_out=_as_subflow, links=links, tags=_tags())
    finally:
        if report is not None:
            create_markdown_artifact(report.markdown, key="summary", description=f"{target}: what it took and gained")
    invoke.print_summary(checked, report)
    return {outcome.stage: str(outcome.directory) for outcome in report.outcomes}


def _tags() -> dict[str, str]:
    """How the tracker's records find this flow run."""
    found = {"prefect.flow_run_id": flow_run.get_id(), "prefect.flow_run_name": flow_run.get_name()}
    return {key: str(value) for key, value in found.items() if value}


def _identity(context: TaskRunContext, parameters: dict[str, Any]) -> str:
    return f"{parameters['stage']}-{parameters['identity']}"


def _as_subflow(run: Run, step: Step) -> Outcome:
    """Carry a stage out as a subflow with one task. Both return paths and numbers, never the work itself."""

    @task(
        name=step.name,
        task_run_name=f"{step.name} {step.identity[:12]}",
        cache_key_fn=_identity,
        persist_result=True,
        result_serializer="json",
        refresh_cache=step.done is None,
    )
    def work(stage: str, identity: str) -> dict[str, Any]:
        outcome = run.execute(step)
        return {
            "directory": str(outcome.directory),
            "metrics": dict(outcome.result.metrics),
            "reused": outcome.reused,
            "tracking": outcome.tracked_at,
        }

    @flow(
        name=f"{step.name} stage",
        flow_run_name=f"{step.name} {step.identity[:12]}",
        persist_result=True,
        result_serializer="json",
        validate_parameters=False,
    )
    def stage_flow(stage: str, identity: str, directory: str) -> dict[str, Any]:
        run.tags = _tags()
        return work(stage, identity)

    stage_flow(step.name, step.identity, str(step.directory.path))
    if step.name not in run.outcomes:
        run.execute(step)  # Prefect took the task's result from its cache; ours is known to be good
    return run.outcomes[step.name]


@flow(name="pipeline")
def pipeline(
    overrides: list[str] = [],  # noqa: B006 - the run form shows the default; it is not changed
    experiment: Experiment = "",
    model: Model = "",
    attention: Attention = "",
    ffn: FeedForward = "",
    algorithm: Algorithm = "",
    finetune: FineTune = "",
    init: str = "",
    config_file: str = "",
) -> dict[str, Any]:
    """Every stage from text to a served model; what is done already is reused.

    Args:
        overrides: Changes to the configuration, one a line, as on the command line: `pretrain.steps=400`.
        experiment: A recipe. Empty: as configured.
        model: The model's shape. Empty: as configured.
        attention: How tokens look at each other. Empty: as configured.
        ffn: The feed-forward part: dense or a mixture of experts. Empty: as configured.
        algorithm: How reinforcement learning goes about it. Empty: as configured.
        finetune: What trains in sft and rl: every weight, or adapters. Empty: as configured.
        init: A model to start from: a directory, a run id, or deepwright@champion. Empty: as configured.
        config_file: A resolved configuration to run again, in place of everything above.
    """
    return run_target(
        "pipeline",
        overrides,
        config_file,
        experiment=experiment,
        model=model,
        attention=attention,
        ffn=ffn,
        algorithm=algorithm,
        finetune=finetune,
        init=init,
    )


def _stage_flow(stage: str, what: str) -> Flow[..., dict[str, Any]]:
    def run_stage(
        overrides: list[str] = [],  # noqa: B006
        experiment: Experiment = "",
        model: Model = "",
        attention: Attention = "",
        ffn: FeedForward = "",
        algorithm: Algorithm = "",
        finetune: FineTune = "",
        init: str = "",
        config_file: str = "",
    ) -> dict[str, Any]:
        return run_target(
            stage,
            overrides,
            config_file,
            experiment=experiment,
            model=model,
            attention=attention,
            ffn=ffn,
            algorithm=algorithm,
            finetune=finetune,
            init=init,
        )

    arguments = (pipeline.fn.__doc__ or "").partition("Args:")[2]
    run_stage.__doc__ = f"{what}\n\n    Stages that it needs run first, or are reused.\n\n    Args:{arguments}"
    run_stage.__name__ = run_stage.__qualname__ = stage
    return flow(name=stage)(run_stage)


def _flows() -> dict[str, Flow[..., dict[str, Any]]]:
    """The pipeline's flow and one for each installed stage, plugins' included."""
    registry = installed().registry
    stages = {name: registry.get("stage", name).doc or f"The stage {name}." for name in registry.names("stage")}
    return {"pipeline": pipeline, **{name: _stage_flow(name, what) for name, what in stages.items()}}


FLOWS = _flows()
# Each flow is importable by its name (`flows.pipeline.pretrain`): that is how a worker finds it.
globals().update(FLOWS)


def flow_for(target: str) -> Callable[..., dict[str, Any]]:
    """The flow of a target that `request.make` has accepted."""
    return FLOWS[target]
