"""The Prefect flow of `deepwright promote`: the same from the pages, from a schedule and from the command line.

Its artifact `promotion` shows both versions side by side; a version that stays out or is taken back fails the run, with
the reason as its message. The operator's key is named by its file: parameters are shown to everybody.
"""

from __future__ import annotations

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.runtime import flow_run

from deepwright_core.plugins import installed
from deepwright_serve.check import Check

from . import cancellation, promotion, request, service_addresses
from .rich_progress import display


@flow(name="promote")
def promote(
    source: str = "deepwright@candidate",
    server: str = "",
    admin_key_file: str = "",
    check: Check = Check(),  # noqa: B008 - the run form shows the default; it cannot be changed
    prove_seconds: float = 60.0,
    failed_share: float = 0.05,
    name: str = "deepwright",
    problems_file: str = "",
    anyway: bool = False,
    overrides: list[str] = [],  # noqa: B006
) -> str:
    """Let a version go live if it answers held-out problems as well as the one that is; take it back if it fails.

    Args:
        source: The version: a registered name, a run id or a model directory.
        server: Address of the running server. Empty: the version is tried in a server of its own, and becomes champion.
        admin_key_file: File with the key of the server's operator, on the machine where this runs.
        check: How the version is asked, and what it must reach.
        prove_seconds: How long the version before is kept ready to come back.
        failed_share: Share of failed answers from which on it comes back.
        name: What requests call the model on that server.
        problems_file: Problems to ask. Empty: those that were kept from the version's own training.
        anyway: Let it go live although it is worse than the live version, as long as it answers at all.
        overrides: Changes to the configuration that say where runs are and who remembers them.
    """
    chosen = (check, prove_seconds, failed_share, problems_file, anyway, tuple(overrides))
    wish = promotion.Wish(source, server, admin_key_file, name, *chosen)
    plugins = installed()
    servers = service_addresses.running(request.make(request.PIPELINE, overrides, plugins).root)
    with cancellation.watched(flow_run.get_id() if servers is not None else None):
        done = promotion.promote(wish, plugins, display())
    create_markdown_artifact(done.markdown, key="promotion", description=f"{source}: before and after")
    promotion.settle(done)
    return done.state
