"""GET /v1/models and /version, and what the probes answer."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel


class ModelCard(BaseModel):
    """A model that can be asked. An adapter's `parent` is the model that it changes; `root` is the model itself."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "deepwright"
    max_model_len: int
    root: str
    parent: str | None = None


class ModelList(BaseModel):
    """GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Version(BaseModel):
    """GET /version."""

    version: str


class Status(BaseModel):
    """GET /health and GET /ready."""

    status: Literal["ok"] = "ok"
