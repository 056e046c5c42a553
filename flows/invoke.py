"""From a valid request to a finished run: through Prefect, or straight through with `run.workflow=none`."""

from __future__ import annotations

from deepwright_core.plugins import Plugins

from . import environment, session, summary
from .request import Request
from .rich_progress import Display, display


def invoke(request: Request, plugins: Plugins, config_file: str = "") -> None:
    """Run a request that the command line has checked, and print the summary."""
    environment.apply(request.root)
    if request.run.workflow == "none":
        show = display()
        print_summary(request, session.run(request, plugins, show))
        return
    from . import prefect_server

    with prefect_server.reachable(request.root):
        from . import cancellation, pipeline

        try:
            pipeline.flow_for(request.target)(overrides=list(request.overrides), config_file=config_file)
        finally:
            cancellation.confirm()


def print_summary(request: Request, report: session.Report, show: Display | None = None) -> None:
    """The table at the end, on standard output."""
    table = summary.table(report.outcomes, report.seconds, request.run.cpu_watts, request.root, report.links)
    summary.show(table)
