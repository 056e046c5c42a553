"""The finished model in MLflow's registry, with its lineage: a version under `tracking.registered_model`.

The version is an ordinary MLflow model whose code is `registered_model_code.py` and whose weights are safetensors;
`mlflow.pyfunc.load_model("models:/deepwright@champion")` loads it. A model that is
registered already only gets the alias.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from .request import Request
from .summary import final_model

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from .runner import Outcome

ALIAS = "champion"
CODE = Path(__file__).with_name("registered_model_code.py")
FOLDER = "registered_model"


def register(client: MlflowClient, request: Request, outcomes: Sequence[Outcome], parent_run_id: str) -> str | None:
    """Register the model that the last stage made or used; returns the version, or None when there is no model."""
    found = final_model(outcomes)
    if found is None:
        return None
    directory, maker = found
    name = request.tracking.registered_model
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name, description="Models made by `deepwright run pipeline`.")
    for known in client.search_model_versions(f"name = '{name}'"):
        if known.tags.get("identity") == maker.identity:
            client.set_registered_model_alias(name, ALIAS, known.version)
            return str(known.version)
    run_id = (maker.finished.record.get("tracking") or {}).get("run_id") or parent_run_id
    _keep(client, run_id, directory)
    lineage = {f"stage.{o.stage}": o.identity for o in outcomes}
    lineage |= {
        f"given.{artifact}": f"{given['directory']} sha256:{given['sha256']}"
        for o in outcomes
        for artifact, given in (o.finished.record.get("given") or {}).items()
    }
    made = client.create_model_version(
        name,
        source=f"{client.get_run(run_id).info.artifact_uri}/{FOLDER}",
        run_id=run_id,
        tags={"identity": maker.identity, "stage": maker.stage, "pipeline_run": parent_run_id, **lineage},
        description=f"Made by stage {maker.stage} in {directory}.",
    )
    client.set_registered_model_alias(name, ALIAS, made.version)
    return str(made.version)


def _keep(client: MlflowClient, run_id: str, directory: Path) -> None:
    from mlflow import pyfunc
    from mlflow.models import infer_signature

    logging.getLogger("mlflow").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / FOLDER
        pyfunc.save_model(
            path=str(path),
            python_model=str(CODE),
            artifacts={"model": str(directory)},
            signature=infer_signature(["question"], ["answer"], params={"max_tokens": 256}),
            # Named, not guessed: guessing would load the model in a process of its own.
            pip_requirements=[f"deepwright-core=={version('deepwright-core')}"],
        )
        client.log_artifacts(run_id, str(path), FOLDER)
