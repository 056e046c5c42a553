"""`deepwright serve`: a model directory in, a running server out.

`serve` checks the request, takes the port (before the weights are loaded, so that a taken port is told at once), loads
the model, and runs until it is told to end. Used by the command line, by `python -m deepwright_serve`, and so by the
serve stage.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import json
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, get_args

import click
import torch
import uvicorn

from deepwright_core import plugins
from deepwright_core.errors import RequestError, WorkError
from deepwright_core.model.directory import find_model
from deepwright_core.stage import write_atomically

from . import logs, operator_key
from .app import create_app
from .connection import Connection
from .engine_options import EngineOptions, engine_options, take_engine_options
from .expert_parallel import over_ranks, refuse_beside
from .going_live import GoingLive
from .keys import Keys
from .limit_options import limit_options, take_limits
from .limits import Limits
from .loading import Loading
from .protocol import Prices
from .roster import Roster
from .service import Service
from .telling import Teller

log = logging.getLogger("deepwright.serve")

PORT = 8000
# Beyond the limit for draining: the step in progress and the last words to each client.
CUT_OFF_SECONDS = 10


def serve(
    model_directory: Path,
    host: str = "127.0.0.1",
    port: int = PORT,
    *,
    name: str = "deepwright",
    version: str = "",
    api_key_file: Path | None = None,
    admin_key_file: Path | None = None,
    admin_models: Sequence[Path] = (),
    device: str = "auto",
    precision: str = "auto",
    threads: int = 0,
    engine: EngineOptions | None = None,
    limits: Limits | None = None,
    prices: Prices | None = None,
    address_file: Path | None = None,
    end_with_stdin: bool = False,
) -> None:
    """Serve a model until SIGTERM or Ctrl-C.

    version: which of that name's it is, as the operator's routes tell it. admin_key_file: the operator's key; it is
    made where there is none. admin_models: directories from below which models may be loaded while the server runs.
    prices: what `usage` tells the cost by; without them it tells none.
    address_file: written once requests are taken, as {"address", "host", "port", "pid"}.
    end_with_stdin: end when standard input is closed, that is, when the process that holds its other end is gone.
    """
    engine, limits = engine or EngineOptions(), limits or Limits()
    directory = find_model(model_directory)
    operator = operator_key.of_server(admin_key_file, admin_models)
    local = is_loopback(host)
    if not local and api_key_file is None:
        raise RequestError(
            f"--host is {host}, which other machines can reach; give --api-key-file, or leave --host at 127.0.0.1."
        )
    keys = Keys.read(api_key_file) if api_key_file is not None else None
    listener = listen(host, port)
    if address_file is not None:
        # A server that was killed may have left one, and nobody must be sent to it.
        address_file.unlink(missing_ok=True)
    with listener:
        if threads or engine.expert_parallel > 1:
            torch.set_num_threads(threads or max(1, (os.cpu_count() or 1) // engine.expert_parallel))
        of_each = engine.model_dump(exclude={"adapters", "expert_parallel"})
        loading = Loading(device, precision, limits=limits, **of_each)
        with ExitStack() as stack:
            ends = [standard_input_ends] if end_with_stdin else []
            if engine.expert_parallel > 1:
                refuse_beside(loading, bool(engine.adapters), operator is not None)
                spread = over_ranks(loading, engine.expert_parallel, directory, name, version)
                models, followers = stack.enter_context(spread)
                ends.append(followers.wait_for_loss)
                stack.callback(followers.look)  # the last word, when one was lost
            else:
                models = loading.load_with_adapters(
                    directory, name, version, {name: Path(at) for name, at in engine.adapters.items()}
                )
            roster = Roster(models)
            changes = None if operator is None else GoingLive(roster, loading, admin_models, limits.request_seconds)
            service = Service(roster, limits, keys, local, operator, changes, prices, listeners())
            run(service, listener, address_file=address_file, ends=ends)


def listeners() -> Teller | None:
    """Tells the installed plugins of finished requests; None where none of them wants to know."""
    hook = plugins.installed().hook.deepwright_request_done
    return Teller(lambda event: hook(event=event)) if hook.get_hookimpls() else None


def is_loopback(host: str) -> bool:
    """Whether an address is reachable from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens on the address, or one sentence about why there is none."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise RequestError(f"--host {host} is not an address of this machine: {error}.") from None
    except OverflowError:
        raise RequestError(f"--port is {port}; expected 0 (any free one) to 65535.") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1024)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise RequestError(
                f"Port {port} on {host} is in use; choose another with --port, or --port 0 for a free one."
            ) from None
        raise RequestError(f"Port {port} on {host} cannot be opened: {error.strerror}.") from None
    return listener


class GracefulServer(uvicorn.Server):
    """A server that stops admitting requests as soon as it is told to end."""

    def __init__(self, config: uvicorn.Config, service: Service, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._service = service
        self._ready = ready

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._service.door.draining:
            # Told twice: what still runs is cut off now.
            self._interrupt()
        self._service.door.draining = True
        super().handle_exit(sig, frame)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            if self._service.door.keys is not None:
                asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._reload_keys)
            self._ready()

    def _reload_keys(self) -> None:
        for keys in (self._service.door.keys, self._service.door.operator):
            if keys is None:
                continue
            try:
                keys.reload()
            except RequestError as error:
                log.error("The keys are those of before: %s", error)
            else:
                log.info("A key file was read again.")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let what runs finish within the limit; then tell it that it was cut off."""
        limit = asyncio.get_running_loop().call_later(self._service.limits.drain_seconds, self._interrupt)
        try:
            await super().shutdown(sockets)
        finally:
            limit.cancel()

    def _interrupt(self) -> None:
        for thread in self._service.roster.threads():
            thread.interrupt()


def uvicorn_config(service: Service) -> uvicorn.Config:
    """How uvicorn is to serve a service."""
    limits = service.limits
    return uvicorn.Config(
        create_app(service),
        http=partial(Connection, limits),  # type: ignore[arg-type]
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        # After ours: this one cuts connections without a word.
        timeout_graceful_shutdown=int(limits.drain_seconds) + CUT_OFF_SECONDS,
    )


def run(
    service: Service,
    listener: socket.socket,
    *,
    address_file: Path | None = None,
    ends: Sequence[Callable[[], None]] = (),
) -> None:
    """Run a service on a listening socket until SIGTERM, Ctrl-C or the return of one of `ends` (each has a thread)."""
    host, port = listener.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def ready() -> None:
        record = {"address": address, "host": host, "port": port, "pid": os.getpid()}
        if address_file is not None:
            write_atomically(address_file, json.dumps(record) + "\n")
        names = ", ".join(served.name for served in service.roster.models())
        click.echo(f"{names} answers at {address} (chat in a browser, OpenAI clients under {address}/v1).")

    server = GracefulServer(uvicorn_config(service), service, ready)
    for wait in ends:
        threading.Thread(target=_end_after, args=(wait, server), daemon=True).start()
    # uvicorn raises the signal again when it has shut down; having obeyed it, we end in peace.
    previous = {sig: signal.signal(sig, lambda *_: None) for sig in (signal.SIGTERM, signal.SIGINT)}
    try:
        asyncio.run(server.serve([listener]))
    finally:
        for sig, handler in previous.items():
            signal.signal(sig, handler)
    if not server.started:
        raise WorkError(f"The server at {address} did not start; the log above says why.")


def _end_after(wait: Callable[[], None], server: GracefulServer) -> None:
    wait()
    server.handle_exit(signal.SIGTERM, None)


def standard_input_ends() -> None:
    """Return when whoever holds the other end of standard input has closed it."""
    # Not sys.stdin: a thread that waits inside its buffer would hold the lock that the interpreter needs to end.
    while os.read(0, 4096):
        pass


@click.command("serve")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=PORT, show_default=True, type=click.IntRange(0, 65535), help="0: any free port.")
@click.option("--name", default="deepwright", show_default=True, help="The model's name in requests.")
@click.option(
    "--api-key-file", type=click.Path(path_type=Path), help="Keys to accept, one a line; their limits behind them."
)
@click.option("--admin-key-file", type=click.Path(path_type=Path), help="The operator's key; made if it is not there.")
@click.option(
    "--admin-models",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Let the operator load models from below this directory while the server runs. Repeatable.",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option(
    "--precision",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "fp32", "bf16"]),
    help="Of the weights; auto: bf16 on a GPU, fp32 elsewhere.",
)
@click.option("--threads", default=0, type=click.IntRange(0), help="CPU threads of the model (0: all cores).")
@engine_options
@limit_options
@click.option(
    "--log-format",
    default="text",
    show_default=True,
    type=click.Choice(get_args(logs.LogFormat)),
    help="One line a request, to standard error.",
)
@click.option("--price-input", type=click.FloatRange(0), help="Price of a million tokens of prompts, for usage.cost.")
@click.option("--price-cached", type=click.FloatRange(0), help="The same where the prefix cache had them.")
@click.option("--price-output", type=click.FloatRange(0), help="Price of a million tokens of answers.")
@click.option("--address-file", type=click.Path(path_type=Path), help="Write address and pid here when ready.")
@click.option("--end-with-stdin", is_flag=True, help="End when standard input is closed.")
def serve_command(
    model: Path,
    price_input: float | None,
    price_cached: float | None,
    price_output: float | None,
    **options: Any,
) -> None:
    """Serve MODEL (a model directory, or the directory of a finished stage) to OpenAI clients and browsers."""
    logs.start(options.pop("log_format"))
    engine = take_engine_options(options)
    serve(
        model,
        engine=engine,
        limits=take_limits(options),
        prices=_prices(price_input, price_cached, price_output),
        **options,
    )


def _prices(prompt: float | None, cached: float | None, answer: float | None) -> Prices | None:
    if prompt is None and cached is None and answer is None:
        return None
    if prompt is None or answer is None:
        raise RequestError("A price was given without --price-input or --price-output; give both, or none.")
    return Prices(input=prompt, cached=cached, output=answer)


def main() -> None:
    """The command on its own: `python -m deepwright_serve MODEL`."""
    try:
        serve_command.main(prog_name="deepwright serve", standalone_mode=False)
    except RequestError as error:
        for problem in error.problems:
            click.echo(problem, err=True)
        sys.exit(2)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except click.Abort:
        sys.exit(130)
    except WorkError as error:
        click.echo(str(error), err=True)
        sys.exit(1)
