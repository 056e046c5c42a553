"""A version's way to its users: asked held-out problems, compared with the live one, put in its place, remembered.

With a running server the candidate is loaded beside the live version, both are asked there, and the server swaps,
watches and if need be takes back (`deepwright_serve.going_live`). Without one, each is asked in a server of its own, a
child process, one after the other, and only the registry changes: whoever serves `deepwright@champion` next serves the
new one. A version becomes champion when it has proved itself, never before.

Left out: moving several servers together (promote on each; the registry is right after the first).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from rich.markdown import Markdown

from deepwright_core.errors import RequestError, WorkError
from deepwright_core.plugins import Plugins
from deepwright_core.tasks import Problem, load_problems
from deepwright_serve import child, operator_key
from deepwright_serve.asking import Answered, ask_all
from deepwright_serve.check import Check, Verdict, judge
from deepwright_serve.going_live import candidate_of
from deepwright_serve.remote import RemoteServer

from . import mlflow_tracker, model_source, promotion_report, registered_model, request, summary
from .model_source import Source
from .rich_progress import Display
from .stage_directory import StageDirectory

if TYPE_CHECKING:
    from mlflow import MlflowClient

PROBLEMS_STAGE, PROBLEMS, TEST_FILE = "prepare", "problems", "test.jsonl"
CHILD_SECONDS = 600.0

OnAnswer = Callable[[Answered], None]
Which = Literal["candidate", "live"]


@dataclass(frozen=True)
class Wish:
    """What is asked for.

    source: as on the command line. server: the address of a running one, "" for none; admin_key_file: its operator's
    key. name: what requests call the model there. problems_file: problems to ask in place of the version's own test
    problems. anyway: without comparing it with the live version. overrides: of the configuration; they say where runs
    are and who remembers them.
    """

    source: str
    server: str = ""
    admin_key_file: str = ""
    name: str = "deepwright"
    check: Check = field(default_factory=Check)
    prove_seconds: float = 60.0
    failed_share: float = 0.05
    problems_file: str = ""
    anyway: bool = False
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Promotion:
    """How it ended. verdict: None when the candidate could not even be asked. live: what it was compared with."""

    candidate: str
    live: str
    verdict: Verdict | None
    state: Literal["live", "refused", "taken back", "failed"]
    message: str

    @property
    def markdown(self) -> str:
        """Before and after, as a table, and what came of it."""
        return promotion_report.markdown(self)


class Place(Protocol):
    """Where a candidate is tried and where it then answers."""

    live: str

    def prepare(self) -> None:
        """Make both ready to be asked; `WorkError` when the candidate cannot be."""

    def ask(self, which: Which, problems: Sequence[Problem], on_answer: OnAnswer) -> list[Answered]:
        """The answers of one of the two."""

    def go_live(self) -> tuple[bool, str]:
        """Let the candidate take over; whether it stayed, and a sentence about it."""

    def give_up(self) -> None:
        """Leave everything as it was."""


def promote(wish: Wish, plugins: Plugins, display: Display) -> Promotion:
    """Try, compare, swap, remember. `RequestError` when what is asked for makes no sense."""
    asked = request.make(request.PIPELINE, wish.overrides, plugins)
    found = model_source.find_at(wish.source, asked.root, asked.tracking.uri)
    problems = _problems(wish, found, asked.root)
    client = mlflow_tracker.client_at(asked.root, asked.tracking.uri) if found.name else None
    display.stage("promote")
    if wish.admin_key_file and not wish.server:
        raise RequestError("--admin-key-file is a server's operator's key; name the server with --server as well.")
    candidate = f"{found.name} version {found.version}" if found.name else str(found.directory)
    place: Place
    place = _Running(wish, found) if wish.server else _Children(wish, asked, found)
    return _remember(client, found, _decide(wish, candidate, place, problems, display))


def settle(done: Promotion) -> None:
    """Show how it ended on standard output; `WorkError` when the candidate did not go live or did not stay."""
    summary.show(Markdown(done.markdown))
    if done.state != "live":
        raise WorkError(done.message)


def _decide(wish: Wish, candidate: str, place: Place, problems: Sequence[Problem], display: Display) -> Promotion:
    verdict: Verdict | None = None
    kept = False
    try:
        place.prepare()
        old = None
        if place.live:
            display.say(f"Asking {place.live}, which is live.")
            old = place.ask("live", problems, _counter(display, "asking the live version", len(problems)))
        display.say(f"Asking {candidate}.")
        new = place.ask("candidate", problems, _counter(display, "asking the candidate", len(problems)))
        verdict = judge(new, old, wish.check, compare=not wish.anyway)
        if not verdict.passed:
            message = f"{candidate} stays out: " + " ".join(verdict.problems)
            return Promotion(candidate, place.live, verdict, "refused", message)
        display.say("Good enough; it goes live.")
        kept = True
        stayed, message = place.go_live()
        return Promotion(candidate, place.live, verdict, "live" if stayed else "taken back", message)
    except WorkError as error:
        return Promotion(candidate, place.live, verdict, "failed", str(error))
    finally:
        display.close()
        if not kept:
            place.give_up()


def _counter(display: Display, what: str, total: int) -> OnAnswer:
    display.start(what, total)
    seen, right = 0, 0

    def on_answer(answer: Answered) -> None:
        nonlocal seen, right
        seen, right = seen + 1, right + answer.correct
        display.advance(seen, f"{right} of {seen} right")

    return on_answer


def _remember(client: MlflowClient | None, found: Source, promotion: Promotion) -> Promotion:
    """The result on the version's page, and the aliases when it went live."""
    if client is not None:
        registered_model.mark(client, found.name, found.version, promotion_report.tags(promotion))
        if promotion.state == "live":
            registered_model.crown(client, found.name, found.version)
    return promotion


def _problems(wish: Wish, found: Source, root: Path) -> list[Problem]:
    """Held-out problems: the given file's, or those that were kept from the version's own training."""
    path = Path(wish.problems_file).expanduser()
    if not wish.problems_file:
        identity = found.tags.get(f"stage.{PROBLEMS_STAGE}", "")
        finished = StageDirectory.of(root, PROBLEMS_STAGE, identity).finished()[0] if identity else None
        if finished is None or PROBLEMS not in finished.result.outputs:
            raise RequestError(
                f"The problems that were kept from {wish.source}'s training are not known"
                f"{' any more' if identity else ''}; name a file of problems with --problems-file."
            )
        path = StageDirectory.of(root, PROBLEMS_STAGE, identity).path / finished.result.outputs[PROBLEMS] / TEST_FILE
    if not path.is_file():
        raise RequestError(f"--problems-file {path} does not exist.")
    problems = load_problems(path)[: wish.check.problems]
    if not problems:
        raise RequestError(f"{path} holds no problem.")
    return problems


class _Running:
    """A running server: both versions beside each other, asked over HTTP as its clients ask."""

    def __init__(self, wish: Wish, found: Source) -> None:
        if not wish.admin_key_file:
            raise RequestError(f"--server is {wish.server}; give its operator's key with --admin-key-file.")
        self._wish = wish
        self._server = RemoteServer(wish.server, operator_key.read(Path(wish.admin_key_file).expanduser()))
        models = self._server.live()
        if wish.name not in models:
            raise RequestError(
                f"--name is {wish.name}; at {wish.server} there is {', '.join(models)}: name the one to replace."
            )
        live = models[wish.name]
        if live.directory == str(found.directory.resolve()):
            raise RequestError(f"{found.directory} is live at {wish.server} already.")
        self.live = f"version {live.version}" if live.version else live.directory
        self._found = found
        self._loaded = False

    def prepare(self) -> None:
        self._server.load(self._wish.name, self._found.directory.resolve(), self._found.version)
        self._loaded = True

    def ask(self, which: Which, problems: Sequence[Problem], on_answer: OnAnswer) -> list[Answered]:
        server = self._server
        name = candidate_of(self._wish.name) if which == "candidate" else self._wish.name
        return ask_all(server.address, name, problems, self._wish.check, on_answer, server.headers)

    def go_live(self) -> tuple[bool, str]:
        change = self._server.go_live(self._wish.name, self._wish.prove_seconds, self._wish.failed_share)
        return change.state == "proved", change.message

    def give_up(self) -> None:
        if self._loaded:
            self._server.discard(self._wish.name)


class _Children:
    """No running server: each version in a child process, and the registry's champion in place of the live one."""

    def __init__(self, wish: Wish, asked: request.Request, found: Source) -> None:
        self._wish = wish
        self._options = child.model_options(asked.sections["precision"], asked.sections["threads"])
        self._directories = {"candidate": found.directory}
        self._candidate = found
        self.live = ""
        if not found.name:
            raise RequestError(
                f"{wish.source} is no registered model, so without --server nothing would change; register it by "
                "running the pipeline, or name a running server."
            )
        client = mlflow_tracker.client_at(asked.root, asked.tracking.uri)
        champion = registered_model.version_of(client, found.name, registered_model.CHAMPION)
        if champion == found.version:
            raise RequestError(f"{found.name} version {found.version} is the champion already.")
        if champion is not None:
            name = f"{found.name}/{champion}"
            self._directories["live"] = model_source.find_at(name, asked.root, asked.tracking.uri).directory
            self.live = f"version {champion}"

    def prepare(self) -> None:
        return

    def ask(self, which: Which, problems: Sequence[Problem], on_answer: OnAnswer) -> list[Answered]:
        options = [*self._options, "--name", self._wish.name]
        with tempfile.TemporaryDirectory(prefix="deepwright-promote-") as folder:
            server = child.start(
                self._directories[which], Path(folder), options, port=0, keep=False, limit=CHILD_SECONDS
            )
            try:
                return ask_all(server.address, self._wish.name, problems, self._wish.check, on_answer)
            finally:
                server.stop(30)

    def go_live(self) -> tuple[bool, str]:
        return True, (
            f"Version {self._candidate.version} is the champion: who serves {self._candidate.name}@champion from now "
            "on serves it."
        )

    def give_up(self) -> None:
        return
