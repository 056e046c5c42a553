"""Everything a plugin can say to deepwright, on one page.

A plugin is an installed distribution with an entry point in the group `deepwright` that names a module (or object)
with some of these functions, each marked with `@hookimpl`. The built-in parts register in exactly the same way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    import click

    from .events import (
        CheckpointEvent,
        EvaluationEvent,
        RequestEvent,
        RolloutEvent,
        RunEvent,
        StageEvent,
        StepEvent,
    )
    from .registry import Registry

PROJECT = "deepwright"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


# Components ---------------------------------------------------------------------------------------


@hookspec
def deepwright_register(registry: Registry) -> None:
    """Add components: `registry.add(kind, name, config=Model)(builder)`."""


@hookspec
def deepwright_config_path() -> str | None:
    """Name a folder of Hydra options to add, such as `pkg://my_plugin.conf`."""


@hookspec
def deepwright_commands(cli: click.Group) -> None:
    """Add subcommands to the `deepwright` command."""


# Events -------------------------------------------------------------------------------------------


@hookspec
def deepwright_run_start(event: RunEvent) -> None:
    """A run starts; its config is valid and nothing has been written yet."""


@hookspec
def deepwright_run_end(event: RunEvent) -> None:
    """A run is over, well or badly."""


@hookspec
def deepwright_stage_start(event: StageEvent) -> None:
    """A stage starts."""


@hookspec
def deepwright_stage_end(event: StageEvent) -> None:
    """A stage is done, was reused, or failed."""


@hookspec
def deepwright_step_end(event: StepEvent) -> None:
    """An optimizer step is over."""


@hookspec
def deepwright_checkpoint_saved(event: CheckpointEvent) -> None:
    """A checkpoint lies complete on the disk."""


@hookspec
def deepwright_rollout_done(event: RolloutEvent) -> None:
    """A batch of samples was generated and scored."""


@hookspec
def deepwright_evaluation_done(event: EvaluationEvent) -> None:
    """An evaluation is over."""


@hookspec
def deepwright_request_done(event: RequestEvent) -> None:
    """A server is done with a request to a model. Called in a thread that holds up no request."""
