"""The finished model in MLflow's registry, with its lineage: a version under `tracking.registered_model`.

The version is an ordinary MLflow model whose code is `registered_model_code.py` and whose weights are safetensors;
`mlflow.pyfunc.load_model("models:/deepwright@champion")` loads it, `mlflow models serve` serves it. A model that is
registered already only gets the alias.

`candidate` is what the latest run made, `champion` what is live, `previous` what was live before. A run moves the
first; the others move when a version has proved itself (see `promotion`). The very first version is all that there is
and becomes champion at once.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from .request import Request
from .summary import final_model

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.models import ModelSignature

    from .runner import Outcome

CANDIDATE, CHAMPION, PREVIOUS = "candidate", "champion", "previous"
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
            client.set_registered_model_alias(name, CANDIDATE, known.version)
            return str(known.version)
    run_id = (maker.finished.record.get("tracking") or {}).get("run_id") or parent_run_id
    keep(client, run_id, directory)
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
    client.set_registered_model_alias(name, CANDIDATE, made.version)
    if version_of(client, name, CHAMPION) is None:
        client.set_registered_model_alias(name, CHAMPION, made.version)
    return str(made.version)


def version_of(client: MlflowClient, name: str, alias: str) -> str | None:
    """The version that an alias of a registered model stands for, or None."""
    found = client.get_registered_model(name).aliases.get(alias)
    return None if found is None else str(found)


def mark(client: MlflowClient, name: str, version: str, facts: Mapping[str, str]) -> None:
    """Say on a version's page what became of it; a longer text is cut to what a tag may hold."""
    for key, value in facts.items():
        client.set_model_version_tag(name, version, key, value[:5000])


def crown(client: MlflowClient, name: str, version: str) -> str | None:
    """Make a version the champion; returns the version that was, which is now called previous."""
    before = version_of(client, name, CHAMPION)
    if before == version:
        return None
    if before is not None:
        client.set_registered_model_alias(name, PREVIOUS, before)
    client.set_registered_model_alias(name, CHAMPION, version)
    return before


def keep(client: MlflowClient, run_id: str, directory: Path) -> None:
    """Put a model directory into a run's artifacts as an MLflow model."""
    from mlflow import pyfunc

    logging.getLogger("mlflow").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        # It would rather read the signature from type hints, which cannot say all of it.
        warnings.simplefilter("ignore")
        path = Path(folder) / FOLDER
        pyfunc.save_model(
            path=str(path),
            python_model=str(CODE),
            artifacts={"model": str(directory)},
            signature=signature(),
            input_example={"messages": [{"role": "user", "content": "What is 17 + 25?"}]},
            # Named, not guessed: guessing would load the model in a process of its own.
            pip_requirements=[f"{package}=={version(package)}" for package in ("deepwright-core", "deepwright-serve")],
        )
        client.log_artifacts(run_id, str(path), FOLDER)


def signature() -> ModelSignature:
    """What the registered model takes and gives: see `registered_model_code`."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import Array, Object, Property

    def with_text(*names: str) -> list[Property]:
        return [Property(name, DataType.string) for name in names]

    message = [*with_text("role", "content"), Property("reasoning_content", DataType.string, required=False)]
    choice = [
        Property("index", DataType.long),
        *with_text("finish_reason"),
        Property("message", Object(message), required=False),
        Property("text", DataType.string, required=False),
    ]
    usage = [Property(name, DataType.long) for name in ("prompt_tokens", "completion_tokens", "total_tokens")]
    return ModelSignature(
        inputs=Schema(
            [
                ColSpec(Array(Object(message)), "messages", required=False),
                ColSpec(DataType.string, "prompt", required=False),
            ]
        ),
        outputs=Schema([ColSpec(Array(Object(choice)), "choices"), ColSpec(Object(usage), "usage")]),
        params=ParamSchema(
            [
                ParamSpec("max_tokens", DataType.long, 256),
                ParamSpec("temperature", DataType.double, 0.0),
                ParamSpec("top_p", DataType.double, 1.0),
                # Below 0: another one each time.
                ParamSpec("seed", DataType.long, -1),
            ]
        ),
    )
