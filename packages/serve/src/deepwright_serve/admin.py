"""The operator's routes: what is loaded, load beside, go live, roll back, take away.

They exist only on a server that was started with `--admin-key-file`, answer only its key, and load only from below the
directories of `--admin-models`. Left out: rights between operators.
"""

from __future__ import annotations

from fastapi import Depends, FastAPI, Request

from .going_live import GoingLive
from .openapi import BODY, body_schema, describe_bodies, refusals
from .protocol.admin import AdminStatus, LiveRequest, LoadRequest, NameRequest
from .reading import body_of
from .refusal import Refusal
from .service import Service

REFUSED = refusals(*BODY, 409)


def add_admin_routes(app: FastAPI, service: Service, changes: GoingLive) -> None:
    """Give the application the routes under /admin."""

    async def operator(http: Request) -> None:
        if not service.door.is_operator(http.headers):
            raise Refusal(
                403, "Only the operator may do this; send the key of --admin-key-file as 'Authorization: Bearer KEY'.",
                code="operator_only",
            )  # fmt: skip

    may = [Depends(operator)]
    load_body = Depends(body_of(LoadRequest, service.limits))
    live_body = Depends(body_of(LiveRequest, service.limits))
    name_body = Depends(body_of(NameRequest, service.limits))

    @app.get(
        "/admin/models",
        response_model=AdminStatus,
        responses=refusals(),
        dependencies=may,
        summary="What is loaded, and how the latest changes went",
    )
    async def loaded() -> AdminStatus:
        return changes.status()

    @app.post(
        "/admin/models",
        response_model=AdminStatus,
        responses=refusals(*BODY, 409, 507),
        openapi_extra=body_schema(LoadRequest),
        dependencies=may,
        summary="Load a version beside what runs",
    )
    async def load(request: LoadRequest = load_body) -> AdminStatus:
        await changes.load(request.name, request.directory, request.version)
        return changes.status()

    @app.post(
        "/admin/models/live",
        response_model=AdminStatus,
        responses=REFUSED,
        openapi_extra=body_schema(LiveRequest),
        dependencies=may,
        summary="Give a name to its candidate",
    )
    async def live(request: LiveRequest = live_body) -> AdminStatus:
        changes.go_live(request.name, request.prove_seconds, request.failed_share, service.prove)
        return changes.status()

    @app.post(
        "/admin/models/rollback",
        response_model=AdminStatus,
        responses=REFUSED,
        openapi_extra=body_schema(NameRequest),
        dependencies=may,
        summary="Give a name back to the version before",
    )
    async def roll_back(request: NameRequest = name_body) -> AdminStatus:
        changes.roll_back(request.name, "the operator asked for it.")
        return changes.status()

    @app.post(
        "/admin/models/discard",
        response_model=AdminStatus,
        responses=REFUSED,
        openapi_extra=body_schema(NameRequest),
        dependencies=may,
        summary="End a candidate",
    )
    async def discard(request: NameRequest = name_body) -> AdminStatus:
        await changes.discard(request.name)
        return changes.status()

    @app.post(
        "/admin/models/remove",
        response_model=AdminStatus,
        responses=refusals(*BODY, 404, 409),
        openapi_extra=body_schema(NameRequest),
        dependencies=may,
        summary="Take a name away",
    )
    async def remove(request: NameRequest = name_body) -> AdminStatus:
        changes.remove(request.name)
        return changes.status()

    describe_bodies(app, LoadRequest, LiveRequest, NameRequest)
