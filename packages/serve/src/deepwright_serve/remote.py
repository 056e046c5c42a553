"""A running server as its operator sees it from another process: what is loaded, load, go live, discard.

Every failure is a `WorkError` with the server's own sentence. Left out: asking it problems (see `asking`).
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import httpx

from deepwright_core.errors import WorkError

from .protocol.admin import AdminModel, AdminStatus, Change

POLL_SECONDS = 0.2
# Loading can take minutes; the server answers when it is done.
LOAD_SECONDS = 1800.0
ANSWER_SECONDS = 30.0


class RemoteServer:
    """The server at an address, for whoever has its operator's key."""

    def __init__(self, address: str, key: str) -> None:
        self.address = address.rstrip("/")
        self.headers = {"Authorization": f"Bearer {key}"}

    def live(self) -> dict[str, AdminModel]:
        """The models that answer, by name."""
        return {model.id: model for model in self._ask("GET").models if model.state == "live"}

    def load(self, name: str, directory: Path, version: str) -> None:
        """Have a version loaded beside what runs, as `going_live.candidate_of(name)`."""
        body = {"name": name, "directory": str(directory), "version": version}
        self._ask("POST", "", body, LOAD_SECONDS)

    def discard(self, name: str) -> None:
        """Have the candidate of a name ended."""
        self._ask("POST", "/discard", {"name": name})

    def go_live(self, name: str, prove_seconds: float, failed_share: float) -> Change:
        """Give a name to its candidate and wait until that has proved itself or was taken back."""
        asked = {"name": name, "prove_seconds": prove_seconds, "failed_share": failed_share}
        change = self._change(self._ask("POST", "/live", asked), name)
        until = time.monotonic() + prove_seconds + ANSWER_SECONDS
        while change.state == "proving":
            if time.monotonic() > until:
                raise WorkError(f"{self.address} still proves {name} long after {prove_seconds:g} s; see its log.")
            time.sleep(POLL_SECONDS)
            change = self._change(self._ask("GET"), name)
        return change

    @staticmethod
    def _change(status: AdminStatus, name: str) -> Change:
        return next(change for change in status.changes if change.name == name)

    def _ask(
        self, method: str, path: str = "", body: dict[str, Any] | None = None, seconds: float = ANSWER_SECONDS
    ) -> AdminStatus:
        try:
            with httpx.Client(timeout=seconds, trust_env=False, headers=self.headers) as client:
                reply = client.request(method, f"{self.address}/admin/models{path}", json=body)
            answer = reply.json()
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            raise WorkError(f"No server of ours answers at {self.address}: {error}.") from None
        if reply.status_code == 404:
            raise WorkError(
                f"The server at {self.address} cannot be changed while it runs; start it with --admin-key-file and "
                "--admin-models."
            )
        if reply.status_code != 200:
            message = answer.get("error", {}).get("message", reply.text[:500])
            raise WorkError(f"The server at {self.address} refused: {message}")
        return AdminStatus.model_validate(answer)
