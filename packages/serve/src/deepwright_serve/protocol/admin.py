"""What the operator sends and hears: models that are loaded, go live and come back while the server runs."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from .wire import NAME, Wire

State = Literal["live", "candidate", "previous"]


class LoadRequest(Wire):
    """POST /admin/models: load a version beside what runs.

    directory: the absolute path of a model directory, or of a finished stage's, on the server's machine.
    """

    name: NAME
    directory: Annotated[str, Field(min_length=1, max_length=4096)]
    version: Annotated[str, Field(max_length=256)] = ""


class LiveRequest(Wire):
    """POST /admin/models/live: let the candidate of a name take the name over.

    prove_seconds: how long the model that was live before is kept to come back. failed_share: it comes back when a
    larger share of the answers fails.
    """

    name: NAME
    prove_seconds: float = Field(60.0, ge=0, le=86400)
    failed_share: float = Field(0.05, ge=0, le=1)


class NameRequest(Wire):
    """POST /admin/models/rollback, /admin/models/discard and /admin/models/remove: the name that is meant."""

    name: NAME


class AdminModel(BaseModel):
    """A loaded model. `id` is what requests call it; failed: answers that its engine broke off."""

    id: str
    name: str
    state: State
    version: str
    directory: str
    created: int
    open: int
    answered: int
    failed: int


class Change(BaseModel):
    """The latest change of a name. `message` says in a sentence what happened and why."""

    name: str
    state: Literal["loading", "loaded", "proving", "proved", "rolled back", "failed", "discarded", "removed"]
    message: str


class AdminStatus(BaseModel):
    """GET /admin/models, and the answer to every change."""

    models: list[AdminModel]
    changes: list[Change]
