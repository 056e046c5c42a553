"""The process environment that Prefect and MLflow read when they are imported; set it before that.

What the user has set already is left alone. Everything stays on this machine: no analytics, no telemetry.
"""

from __future__ import annotations

import os
from pathlib import Path

LOGGERS = (
    "deepwright",
    "deepwright_core",
    "deepwright_kernels",
    "deepwright_moe",
    "deepwright_mla",
    "deepwright_rl",
    "deepwright_serve",
)


def apply(root: Path) -> None:
    """Prefect's home and MLflow's manners for a run below `root`."""
    here = Path(__file__).resolve().parent
    settings = {
        "PREFECT_HOME": str(root / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        "PREFECT_LOGGING_SETTINGS_PATH": str(here / "prefect_logging.yml"),
        "PREFECT_LOGGING_EXTRA_LOGGERS": ",".join(LOGGERS),
        "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
        "PREFECT_CLI_PROMPT": "false",
        # MLflow understands only "true" here, Prefect also "1".
        "DO_NOT_TRACK": "true",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "MLFLOW_LOGGING_LEVEL": "ERROR",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "GIT_PYTHON_REFRESH": "quiet",
        "MPLBACKEND": "Agg",
        "PYTHONUNBUFFERED": "1",
    }
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    Path(os.environ["PREFECT_HOME"]).mkdir(parents=True, exist_ok=True)
