"""Deployments: every flow on the workflow's pages, with a form whose drop-downs come from the installed plugins.

`deepwright up` starts this module as the process that waits for runs and carries them out; `deepwright deploy` writes
the forms again after a plugin was installed. An automation ends runs whose process was killed together with the waiting
one: nobody else would, and they would count as running forever.
"""

from __future__ import annotations

import os
import signal
import sys
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deepwright_core.errors import RequestError

if TYPE_CHECKING:
    from prefect.flows import Flow

DEPLOYMENT = "local"
POLL_SECONDS = 2
HEARTBEAT_SECONDS = 30
SILENT_SECONDS = 90
AUTOMATION = "deepwright: end runs that went silent"


@click.command(
    short_help="Put the flows on the workflow's pages again.",
    epilog="""\b
Examples:
  pip install my-attention-plugin && deepwright deploy
  deepwright deploy --root /data/runs""",
)
@click.option("--root", default="runs", show_default=True, help="The root that `deepwright up` was started with.")
def deploy(root: str) -> None:
    """Register every flow again, so that forms offer what newly installed plugins provide."""
    from . import environment, service_addresses
    from .cli_plugins import load_plugins

    load_plugins()
    place = Path(root).expanduser().resolve()
    running = service_addresses.running(place)
    if running is None and not os.environ.get("PREFECT_API_URL"):
        raise RequestError(
            f"Nothing to deploy to: `deepwright up` is not running for {place}, and PREFECT_API_URL is not set."
        )
    environment.apply(place)
    if running is not None:
        os.environ["PREFECT_API_URL"] = running.prefect_api
    new = _register()
    names = ", ".join(sorted(_flows()))
    click.echo(f"Deployed: {names}.")
    if new and running is not None:
        os.kill(running.pid, signal.SIGHUP)
        click.echo(f"New: {', '.join(sorted(new))}; the worker starts again to wait for them.")


def _flows() -> dict[str, Flow[..., Any]]:
    from .pipeline import FLOWS
    from .promote_flow import promote

    return {**FLOWS, promote.name: promote}


def _deployments() -> list[object]:
    from prefect.deployments.runner import EntrypointType

    return [
        flow.to_deployment(
            name=DEPLOYMENT,
            entrypoint_type=EntrypointType.MODULE_PATH,
            description=flow.description,
            tags=["deepwright"],
        )
        for flow in _flows().values()
    ]


def _register() -> set[str]:
    """Write every deployment to the server; returns the names of flows that were not there."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        known = {f.id: f.name for f in client.read_flows(limit=200)}
        before = {known.get(d.flow_id) for d in client.read_deployments(limit=200)}
    for deployment in _deployments():
        deployment.apply()  # type: ignore[attr-defined]
    _end_silent_runs()
    return set(_flows()) - before


def _end_silent_runs() -> None:
    """The automation, once."""
    from prefect.automations import Automation
    from prefect.client.schemas.objects import StateType
    from prefect.events.actions import ChangeFlowRunState
    from prefect.events.schemas.automations import EventTrigger, Posture

    ends = {f"prefect.flow-run.{state}" for state in ("Completed", "Failed", "Cancelled", "Crashed")}
    wanted = Automation(
        name=AUTOMATION,
        trigger=EventTrigger(
            after={"prefect.flow-run.heartbeat"},
            expect={"prefect.flow-run.heartbeat", *ends},
            match={"prefect.resource.id": ["prefect.flow-run.*"]},
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=SILENT_SECONDS),
        ),
        actions=[
            ChangeFlowRunState(
                name=None,
                state=StateType.CRASHED,
                force=False,
                message=f"No sign of life for {SILENT_SECONDS} seconds: its process is gone.",
            )
        ],
    )
    try:
        Automation.read(name=AUTOMATION)  # type: ignore[unused-coroutine]
    except ValueError:
        wanted.create()


def serve(ready: Path) -> None:
    """Register every flow and carry out what is asked for, until stopped. `ready` is written when it waits."""
    import asyncio

    _register()
    asyncio.run(_wait_for_runs(ready))


async def _wait_for_runs(ready: Path) -> None:
    from prefect.runner import Runner

    runner = Runner(
        name="deepwright",
        query_seconds=POLL_SECONDS,
        heartbeat_seconds=HEARTBEAT_SECONDS,
        pause_on_shutdown=False,
        # One at a time: stages use every core.
        limit=1,
    )
    for deployment in _deployments():
        await runner.aadd_deployment(await deployment)  # type: ignore[misc]
    ready.write_text(" ".join(_flows()))
    await runner.start()


if __name__ == "__main__":
    from flows import lifeline

    lifeline.hold()
    serve(Path(sys.argv[1]))
