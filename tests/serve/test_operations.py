"""What whoever runs the server sees and relies on: metrics, the log, clients that stall, servers that are killed."""

from __future__ import annotations

import io
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from deepwright_core import plugins
from deepwright_core.engine import Engine
from deepwright_core.events import RequestEvent
from deepwright_core.model.directory import load_model
from deepwright_core.tokenizer import Tokenizer
from deepwright_serve import child, logs
from deepwright_serve.service import Service
from deepwright_serve.telling import Teller

from .conftest import ScriptedEngine, service_of

KEY = "a-key-that-is-long-enough"
LONG = "on and on " * 20


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


# Metrics --------------------------------------------------------------------------------------------


def scrape(server: Any) -> Callable[..., float]:
    """The value of a series by name and labels."""
    reply = server.client.get("/metrics")
    assert reply.status_code == 200 and reply.headers["content-type"].startswith("text/plain")
    samples = [sample for family in text_string_to_metric_families(reply.text) for sample in family.samples]

    def value(name: str, **labels: str) -> float:
        found = [sample.value for sample in samples if sample.name == name and labels.items() <= sample.labels.items()]
        assert found, f"{name} {labels} is not there"
        return sum(found)

    return value


def test_what_dashboards_look_for_is_there_and_true(
    model_directory: Path, tokenizer: Tokenizer, serve_service: Callable[[Service], Any]
) -> None:
    engine = Engine(
        load_model(model_directory, plugins.installed().registry), tokenizer.end_ids, cache_tokens=1024, block_size=16
    )
    with serve_service(service_of(engine, tokenizer, 512)) as server:
        usages = [server.chat("hello " * 20, max_tokens=5, seed=3, n=2).json()["usage"] for _ in range(2)]
        value = scrape(server)
        of_model = {"model_name": "tiny"}
        # Each answer counts its prompt once, as the engine does.
        assert value("vllm:prompt_tokens_total", **of_model, engine="0") == 4 * usages[0]["prompt_tokens"]
        generated = sum(usage["completion_tokens"] for usage in usages)
        assert value("vllm:generation_tokens_total", **of_model) == generated
        hits, queries = value("vllm:prefix_cache_hits_total"), value("vllm:prefix_cache_queries_total")
        assert 0 < hits < queries == value("vllm:prompt_tokens_total")
        for gauge in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
            assert value(f"vllm:{gauge}", **of_model, engine="0") == 0
        assert value("vllm:num_preemptions_total") == value("vllm:spec_decode_num_drafts_total") == 0
        ends = {reason: 0.0 for reason in ("stop", "length")}
        for reason in ends:
            try:
                ends[reason] = value("vllm:request_success_total", finished_reason=reason, **of_model)
            except AssertionError:
                continue
        assert sum(ends.values()) == 4
        for name, count in (
            ("time_to_first_token_seconds", 4),
            ("e2e_request_latency_seconds", 4),
            ("request_queue_time_seconds", 4),
            ("request_prompt_tokens", 4),
            ("request_generation_tokens", 4),
            ("inter_token_latency_seconds", generated - 4),
        ):
            assert value(f"vllm:{name}_count", **of_model) == count, name
        assert value("vllm:request_generation_tokens_sum") == generated
        assert value("deepwright:http_requests_total", path="/v1/chat/completions", status="200", method="POST") == 2


def test_aborts_and_refusals_are_counted(serve_script: Callable[..., Any]) -> None:
    server = serve_script(LONG, request_seconds=0.2)
    server.engine.gate.clear()
    assert server.chat().status_code == 504
    assert server.client.post("/v1/chat/completions", content=b"{").status_code == 415
    assert server.client.get("/no/such/place").status_code == 404
    assert server.client.request("BREW", "/ready").status_code == 405
    value = scrape(server)
    assert value("vllm:request_success_total", finished_reason="abort") == 1
    assert value("deepwright:errors_total", code="deadline_exceeded") == 1
    assert value("deepwright:errors_total", code="unsupported_media_type") == 1
    # What clients make up does not become a label.
    assert value("deepwright:http_requests_total", path="other", status="404") == 1
    assert value("deepwright:http_requests_total", method="other") == 1
    assert value("deepwright:http_requests_in_progress") == 1


def test_what_is_refused_at_the_door_counts_for_its_route(serve_script: Callable[..., Any]) -> None:
    server = serve_script(keys=[KEY])
    assert server.client.get("/v1/models/any/name").status_code == 401
    assert server.chat().status_code == 401
    assert server.client.get("/v1/chat/completions").status_code == 401
    assert server.client.get("/made/up").status_code == 401
    server.client.headers["authorization"] = f"Bearer {KEY}"
    value = scrape(server)
    for path, method, count in (
        ("/v1/models/{name:path}", "GET", 1),
        ("/v1/chat/completions", "POST", 1),
        ("/v1/chat/completions", "GET", 1),
        ("other", "GET", 1),
    ):
        assert value("deepwright:http_requests_total", path=path, method=method, status="401") == count


def test_a_connection_too_many_is_refused_like_all_else(
    serve_script: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    server = serve_script(connections=2)
    caplog.set_level(logging.INFO)
    server.engine.gate.clear()
    host, port = server.address.removeprefix("http://").split(":")
    assert server.client.get("/ready").status_code == 200
    with socket.create_connection((host, int(port)), timeout=10):
        with httpx.Client(base_url=server.address, trust_env=False) as third:
            refused = third.post("/v1/chat/completions", json={})
        assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["code"] == "too_many_connections"
        assert refused.json()["error"]["type"] == "service_unavailable_error"
        assert refused.headers["x-request-id"] and refused.headers["connection"] == "close"
        # Those who came before are served as ever.
        assert server.client.get("/ready").status_code == 200
        value = scrape(server)
    assert value("deepwright:errors_total", code="too_many_connections") == 1
    assert value("deepwright:http_requests_total", path="/v1/chat/completions", status="503") == 1
    told = [getattr(line, "record", None) for line in caplog.records]
    assert [r.path for r in told if r is not None and r.error == "too_many_connections"] == ["/v1/chat/completions"]
    # A place that is given up is another's.
    deadline = time.monotonic() + 10
    with httpx.Client(base_url=server.address, trust_env=False) as later:
        while later.get("/ready").status_code != 200:
            assert time.monotonic() < deadline


def test_metrics_need_the_key_and_keep_their_names(serve_script: Callable[..., Any]) -> None:
    server = serve_script(keys=[KEY])
    assert server.client.get("/metrics").status_code == 401
    # What Prometheus itself asks for.
    accept = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.2,*/*;q=0.1"
    reply = server.client.get("/metrics", headers={"authorization": f"Bearer {KEY}", "accept": accept})
    assert reply.status_code == 200 and "\nvllm:prompt_tokens_total{" in reply.text


# The log --------------------------------------------------------------------------------------------


@pytest.fixture
def log_lines() -> Callable[[str], Callable[[], list[str]]]:
    """Starts the log in a form, into memory."""

    def begin(form: Any) -> Callable[[], list[str]]:
        stream = io.StringIO()
        logs.start(form, stream)
        return lambda: stream.getvalue().splitlines()

    return begin


def test_a_request_is_one_json_line_without_text_or_key(
    serve_script: Callable[..., Any], log_lines: Callable[..., Any]
) -> None:
    lines = log_lines("json")
    server = serve_script("<think>deep</think>Marzipan", keys=[KEY])
    reply = server.client.post(
        "/v1/chat/completions",
        json={"model": "tiny", "messages": [{"role": "user", "content": "Mandelhoernchen"}]},
        headers={"authorization": f"Bearer {KEY}"},
    )
    server.client.get("/v1/models")
    usage = reply.json()["usage"]
    until(lambda: sum("deepwright.serve.access" in line for line in lines()) == 2)
    asked, refused = (json.loads(line) for line in lines() if "deepwright.serve.access" in line)
    assert asked["request_id"] == reply.headers["x-request-id"] and asked["tenant"].startswith("key-")
    assert (asked["status"], asked["path"], asked["model"]) == (200, "/v1/chat/completions", "tiny")
    assert (asked["prompt_tokens"], asked["completion_tokens"]) == (usage["prompt_tokens"], usage["completion_tokens"])
    assert asked["cached_tokens"] == 1 and asked["finish_reasons"] == ["stop"]
    assert asked["reasoning_tokens"] == usage["completion_tokens_details"]["reasoning_tokens"] > 0
    assert 0 < asked["first_token_seconds"] <= asked["seconds"]
    assert (refused["status"], refused["error"]) == (401, "invalid_api_key") and "tenant" not in refused
    text = "\n".join(lines())
    for secret in (KEY, "Mandelhoernchen", "Marzipan", "deep<"):
        assert secret not in text
    assert all(json.loads(line)["level"] for line in lines())


def test_lines_as_text_and_exceptions_as_json(log_lines: Callable[..., Any], serve_script: Callable[..., Any]) -> None:
    lines = log_lines("text")
    serve_script().chat()
    until(lambda: any("finish_reasons=stop" in line and "status=200" in line for line in lines()))
    lines = log_lines("json")
    try:
        raise OSError("no room")
    except OSError:
        logging.getLogger("deepwright.serve").exception("it went %s", "wrong")
    (line,) = map(json.loads, lines())
    assert line["message"] == "it went wrong" and "OSError: no room" in line["exception"] and line["level"] == "error"


# Plugins ---------------------------------------------------------------------------------------------


def test_plugins_hear_of_each_request_to_a_model_and_their_failures_hurt_nobody(
    tokenizer: Tokenizer, serve_service: Callable[[Service], Any]
) -> None:
    heard: list[RequestEvent] = []

    def hear(event: RequestEvent) -> None:
        heard.append(event)
        if event.error:
            raise OSError("the tracker is down")

    engine = ScriptedEngine(lambda _: tokenizer.encode("<think>hm</think>Hello", allow_special=True), tokenizer.eos_id)
    service = service_of(engine, tokenizer)
    service.teller = Teller(hear)
    with serve_service(service) as server:
        server.client.get("/v1/models")
        server.engine.fail = 1
        assert server.chat("first").status_code == 500
        assert server.chat("Mandelkern", stream=True, seed=7).status_code == 200
    failed, done = heard
    assert (failed.status, failed.error, failed.finish_reasons) == (500, "engine_failed", ("error",))
    assert (done.model, done.path, done.finish_reasons) == ("tiny", "/v1/chat/completions", ("stop",))
    assert done.request["messages"][0]["content"] == "Mandelkern" and done.request["seed"] == 7
    assert done.answers == ({"content": "Hello", "reasoning": "hm"},)
    assert done.completion_tokens > done.reasoning_tokens > 0
    assert done.first_token_seconds is not None and 0 < done.first_token_seconds <= done.seconds
    assert "Mandelkern" not in repr(done)


# Clients that stall ---------------------------------------------------------------------------------


def connect(server: Any) -> socket.socket:
    host, port = server.address.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


@pytest.mark.parametrize(
    ("answered", "sent"), [(False, b""), (False, b"POST /v1/chat/comp"), (True, b"POST /v1/chat/comp")]
)
def test_a_head_that_does_not_come_ends_the_connection(
    serve_script: Callable[..., Any], answered: bool, sent: bytes
) -> None:
    server = serve_script(header_seconds=0.3)
    with connect(server) as client:
        if answered:
            client.sendall(b"GET /ready HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert b"200 OK" in client.recv(4096)
        client.sendall(sent)
        # The end of the connection, however it is told; a connection that stayed would be a timeout here.
        try:
            while client.recv(4096):
                pass
        except ConnectionResetError:
            pass


@pytest.mark.costly
def test_a_reader_that_stops_blocks_nobody_and_is_cut_off(serve_script: Callable[..., Any]) -> None:
    server = serve_script(stalled_seconds=0.5, default_output_tokens=200_000)
    server.engine.script = lambda prompt: [300, 301] if prompt == [1, 2] else [300] * 50_000
    server.served.context = 1 << 20
    # Many answers at once, so that the sockets are full soon.
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "stream": True, "n": 16}
    body = json.dumps(asked).encode()
    with connect(server) as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        slow.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        until(lambda: len(server.engine.running) == 16)
        # Others are answered meanwhile.
        for _ in range(5):
            reply = server.client.post("/v1/completions", json={"model": "tiny", "prompt": [1, 2]})
            assert reply.status_code == 200
        until(lambda: len(server.engine.cancelled) == 16)
        server.until_idle()
    value = scrape(server)
    assert value("vllm:request_success_total", finished_reason="abort") == 16
    assert value("deepwright:errors_total", code="hung_up") == 1


def test_a_head_that_is_too_large_is_a_sentence(serve_script: Callable[..., Any]) -> None:
    server = serve_script(header_bytes=2048)
    reply = server.client.get("/v1/models", headers={"x-padding": "x" * 3000})
    assert reply.status_code == 431 and reply.json()["error"]["code"] == "headers_too_large"


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01 a handshake\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}",
    ],
)
def test_what_is_no_http_is_refused_as_everything_is(serve_script: Callable[..., Any], sent: bytes) -> None:
    with connect(serve_script()) as client:
        client.sendall(sent)
        head, _, body = b"".join(iter(lambda: client.recv(4096), b"")).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 Bad Request") and b"x-request-id: req_" in head
    assert json.loads(body)["error"]["code"] == "invalid_http"


def test_a_body_that_goes_wrong_behind_its_answer_ends_the_connection_quietly(
    serve_script: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    with connect(serve_script()) as client:
        client.sendall(b"POST /nowhere HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
        answer = b""
        while not answer.endswith(b"}}"):  # head and body may come in two pieces
            answer += client.recv(4096)
        assert b" 404 " in answer
        client.sendall(b"zz\r\n")
        assert client.recv(4096) == b""
    assert not [record for record in caplog.records if record.name == "asyncio"]


# Hanging up at every stage --------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["waiting", "running", "streaming"])
def test_hanging_up_frees_the_place_whatever_the_stage(serve_script: Callable[..., Any], stage: str) -> None:
    server = serve_script(LONG, running=1)
    server.engine.gate.clear()
    blocker = threading.Thread(target=server.chat)
    if stage == "waiting":
        blocker.start()
        until(lambda: len(server.engine.running) == 1)
    body = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "x"}], "stream": True}).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with connect(server) as client:
        client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        until(lambda: server.served.thread.open == 1 + (stage == "waiting"))
        if stage == "streaming":
            server.engine.gate.set()
            received = b""
            while received.count(b"data: ") < 4:
                piece = client.recv(4096)
                assert piece, "the stream ended"
                received += piece
            server.engine.gate.clear()
    until(lambda: server.served.thread.open == (stage == "waiting"))
    assert len(server.engine.asked) == 1, "one that waited was begun after its client had gone"
    server.engine.gate.set()
    if stage == "waiting":
        blocker.join(10)
    server.until_idle()


# Processes ------------------------------------------------------------------------------------------

OPTIONS = ["--threads", "1", "--name", "tiny", "--log-format", "json"]
ASK = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "stream": True, "temperature": 0}


@pytest.mark.costly
def test_keys_are_read_again_and_a_second_sigterm_cuts(model_directory: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"{KEY} name=alice\n")
    options = [*OPTIONS, "--drain-seconds", "600", "--api-key-file", str(keys)]
    server = child.start(model_directory, tmp_path, options, port=0, keep=False, limit=60)
    bearer = {"authorization": "Bearer another-key-long-enough"}
    try:
        with httpx.Client(base_url=server.address, timeout=30, headers=bearer) as client:
            assert client.get("/v1/models").status_code == 401
            keys.write_text("another-key-long-enough name=bob\n")
            os.kill(server.pid, signal.SIGHUP)
            until(lambda: client.get("/v1/models").status_code == 200)
            keys.write_text("bad\n")
            os.kill(server.pid, signal.SIGHUP)
            until(lambda: "those of before" in server.log.read_text())
            assert client.get("/v1/models").status_code == 200
            with client.stream("POST", "/v1/chat/completions", json=ASK | {"max_tokens": 60_000}) as long:
                events = long.iter_raw()
                next(events)
                os.kill(server.pid, signal.SIGTERM)
                until(lambda: "Shutting down" in server.log.read_text())
                next(events)
                os.kill(server.pid, signal.SIGTERM)
                assert b"shutting down" in b"".join(events)
        assert server.process.wait(30) == 0
    finally:
        server.stop(5)
    lines = [json.loads(line) for line in server.log.read_text().splitlines() if line.startswith("{")]
    asked = next(line for line in lines if line.get("path") == "/v1/chat/completions")
    assert asked["tenant"] == "bob" and asked["error"] == "engine_failed" and asked["completion_tokens"] > 0


@pytest.mark.costly
def test_killed_in_the_middle_it_starts_again_on_the_same_port(model_directory: Path, tmp_path: Path) -> None:
    server = child.start(model_directory, tmp_path, OPTIONS, port=0, keep=False, limit=60)
    port = int(server.address.rsplit(":", 1)[1])
    try:
        with (
            httpx.Client(base_url=server.address, timeout=30) as client,
            client.stream("POST", "/v1/chat/completions", json=ASK | {"max_tokens": 60_000}) as long,
        ):
            events = long.iter_raw()
            next(events)
            os.kill(server.pid, signal.SIGKILL)
            server.process.wait(10)
            with pytest.raises(httpx.HTTPError):
                list(events)
        left = tmp_path / "address.json"
        assert left.exists(), "this test wants what a killed server leaves"
        # Not through child.start, which would remove the file itself.
        command = [sys.executable, "-m", "deepwright_serve", str(model_directory), "--port", str(port), *OPTIONS]
        again = subprocess.Popen([*command, "--address-file", str(left)], stderr=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + 60
            while not left.exists() or json.loads(left.read_text())["pid"] != again.pid:
                assert again.poll() is None and time.monotonic() < deadline
                time.sleep(0.05)
            assert httpx.get(f"{server.address}/health", timeout=30).status_code == 200
            again.terminate()
            assert again.wait(30) == 0
        finally:
            again.kill()
            again.wait()
    finally:
        server.stop(5)
