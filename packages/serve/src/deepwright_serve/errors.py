"""Every failure leaves as OpenAI's error object."""

from __future__ import annotations

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from deepwright_core.errors import RequestError

from .generation import HungUp
from .refusal import Refusal

# What OpenAI's clients may ask for, and will not find.
NOT_HERE = {
    "/v1/embeddings": "There are no embeddings here: the models served are trained to write, and vectors made of their "
    "hidden states would not be what a client expects. Use a model made for it.",
    "/v1/responses": "There is no Responses API here; /v1/chat/completions does the same for one turn.",
}


def add_error_objects(app: FastAPI) -> None:
    """Give the application handlers for all that can be raised below a route."""

    @app.exception_handler(Refusal)
    async def refused(request: Request, error: Refusal) -> Response:
        request.state.record.error = error.label
        return JSONResponse(error.body(), error.status, error.headers)

    @app.exception_handler(RequestError)
    async def wrong(request: Request, error: RequestError) -> Response:
        request.state.record.error = "status_400"
        return JSONResponse(Refusal(400, str(error)).body(), 400)

    @app.exception_handler(HungUp)
    async def gone(request: Request, error: HungUp) -> Response:
        # Nobody reads it; the status is for the log.
        request.state.record.error = HungUp.CODE
        return Response(status_code=499)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        path = request.url.path
        sentence = {
            404: NOT_HERE.get(path, f"There is nothing at {request.method} {path[:200]}."),
            405: f"{path[:200]} does not take {request.method}.",
        }.get(error.status_code, str(error.detail))
        return JSONResponse(Refusal(error.status_code, sentence).body(), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        request.state.record.error = "failed"
        message = f"The server failed ({type(error).__name__}); its log tells more under this request's id."
        return JSONResponse(Refusal(500, message).body(), 500)
