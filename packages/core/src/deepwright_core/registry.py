"""The registry: every component by kind and name, with the config model that is its single truth.

Hydra's options, validation, `deepwright plugins` and the drop-downs of the run form are all derived from what is
registered here. Configs choose a component by name (`name: mla`); a class path is never executed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError

from .errors import RequestError, did_you_mean

Builder = TypeVar("Builder", bound=Callable[..., Any])


class ComponentConfig(BaseModel):
    """Base of every component's config: immutable, and closed to keys that it does not name."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str


@dataclass(frozen=True)
class ComponentOf:
    """Marks a config field that holds another component: `router: Annotated[dict[str, Any], ComponentOf("router")]`.

    Validation then goes into it; with `many`, the field maps labels to components.
    """

    kind: str
    many: bool = False


@dataclass(frozen=True)
class Kind:
    """A kind of component. `group` is the Hydra group in which its options appear (None: not configurable)."""

    name: str
    group: str | None
    doc: str


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("attention", "model/attention", "token mixing: (config, model, layer) -> nn.Module"),
        Kind("ffn", "model/ffn", "feed-forward: (config, model, layer) -> nn.Module"),
        Kind(
            "router",
            "model/ffn/router",
            "expert choice of a mixture: (config, hidden_size, experts, top_k) -> nn.Module",
        ),
        Kind("finetune", "finetune", "what of a model trains: (config, model, seed, new_rows) -> FineTuning"),
        Kind("optimizer", "optimizer", "parameter update: (config, model) -> torch.optim.Optimizer"),
        Kind("schedule", "schedule", "learning rate over a run: (config, total_steps) -> (step -> factor)"),
        Kind("source", "data", "where text comes from: (config) -> iterator of documents"),
        Kind("tokenizer", "tokenizer", "text to ids: (config, documents) -> Tokenizer"),
        Kind("task", "task", "verifiable problems: (config) -> Task"),
        Kind("reward", "rl/reward", "score of a completion: (config) -> callable"),
        Kind("advantage", None, "rewards to advantages: (config) -> callable"),
        Kind("policy_loss", None, "the policy objective: (config) -> callable"),
        Kind("algorithm", "rl/algorithm", "a whole RL recipe: (config, registry) -> Algorithm"),
        Kind("kernel_backend", None, "implementations of operators for a device"),
        Kind("checkpoint_format", None, "a published layout of configs and tensors: (config) -> Format"),
        Kind("stage", None, "a step of the pipeline: (config, inputs, context) -> StageResult"),
    )
}


@dataclass(frozen=True)
class Provider:
    """Who provided a component: the plugin's name and the distribution that it came with."""

    plugin: str
    distribution: str = "(none)"
    version: str = "(none)"

    def __str__(self) -> str:
        return f"{self.distribution} {self.version} (plugin {self.plugin})"


@dataclass(frozen=True)
class Component:
    """One registered component. `build(config, ...)` makes it; `config` describes and checks its options."""

    kind: str
    name: str
    build: Callable[..., Any]
    config: type[BaseModel]
    doc: str
    provider: Provider


class Registry:
    """All components. `provider` is set by the plugin manager around each plugin's registration."""

    def __init__(self) -> None:
        self._components: dict[tuple[str, str], Component] = {}
        self.provider = Provider("(unknown)")

    def add(self, kind: str, name: str, *, config: type[BaseModel]) -> Callable[[Builder], Builder]:
        """A decorator that registers a builder.

        Raises `RequestError` when the kind is unknown, or when the name is taken in that kind: a plugin never
        replaces another's component; it takes a new name that configs can choose.
        """
        if kind not in KINDS:
            raise RequestError(f"Plugin {self.provider.plugin} registers kind '{kind}'. {did_you_mean(kind, KINDS)}")
        taken = self._components.get((kind, name))
        if taken is not None:
            raise RequestError(
                f"Two plugins provide {kind} '{name}': {taken.provider} and {self.provider}. "
                f"Rename one, or block one with --block {self.provider.plugin}."
            )

        def register(build: Builder) -> Builder:
            text = inspect.getdoc(build) or inspect.getdoc(config) or ""
            doc = text.strip().split("\n", 1)[0]
            self._components[kind, name] = Component(kind, name, build, config, doc, self.provider)
            return build

        return register

    def forget(self, provider: Provider) -> None:
        """Drop everything a provider registered (used when its registration failed half-way)."""
        self._components = {key: c for key, c in self._components.items() if c.provider != provider}

    def __iter__(self) -> Iterator[Component]:
        return iter(sorted(self._components.values(), key=lambda c: (c.kind, c.name)))

    def names(self, kind: str) -> list[str]:
        """Names registered for a kind, sorted."""
        return sorted(name for k, name in self._components if k == kind)

    def get(self, kind: str, name: str) -> Component:
        """One component; `RequestError` with near matches when there is none of that name."""
        component = self._components.get((kind, name))
        if component is None:
            raise RequestError(f"There is no {kind} called '{name}'. {did_you_mean(name, self.names(kind))}")
        return component

    def parse(self, kind: str, data: Mapping[str, Any] | BaseModel, where: str | None = None) -> Any:
        """Validate a config mapping with a `name` key against the component it names; returns the config model.

        Raises `RequestError` with one sentence a problem, each beginning with `where` (default: the kind).
        """
        where = where or kind
        if not isinstance(data, BaseModel | Mapping):
            raise RequestError(
                f"{where} is {data!r}; expected a mapping with a name, one of: {', '.join(self.names(kind))}."
            )
        values = data.model_dump() if isinstance(data, BaseModel) else dict(data)
        name = values.get("name")
        if not isinstance(name, str):
            raise RequestError(f"{where}.name is {name!r}; expected one of: {', '.join(self.names(kind))}.")
        try:
            component = self.get(kind, name)
        except RequestError as error:
            raise RequestError([f"{where}.name: {problem}" for problem in error.problems]) from None
        return parse(component.config, values, where, self)

    def build(self, kind: str, data: Mapping[str, Any] | BaseModel, *args: Any, **kwargs: Any) -> Any:
        """Validate `data` and build the component it names."""
        config = self.parse(kind, data)
        return self.get(kind, config.name).build(config, *args, **kwargs)


def parse(model: type[BaseModel], values: Mapping[str, Any], where: str, registry: Registry) -> Any:
    """Validate `values` against a pydantic model and the components inside it against theirs.

    Raises `RequestError` with every problem found, one sentence each, starting with its path. What validation filled
    in (defaults) is kept, also inside components: a saved config says every value that was used.
    """
    problems: list[str] = []
    reported: set[str] = set()
    values = dict(values)
    for key, field in model.model_fields.items():
        part = values.get(key, field.get_default(call_default_factory=True))
        inner = _model_in(field.annotation)
        if inner is not None and get_origin(field.annotation) not in (dict, list, tuple) and isinstance(part, Mapping):
            try:
                values[key] = parse(inner, part, f"{where}.{key}", registry)
            except RequestError as error:
                problems += error.problems
                reported.add(key)
        for mark in field.metadata:
            if isinstance(mark, ComponentOf) and isinstance(part, Mapping):
                parts = (
                    {f"{where}.{key}.{label}": p for label, p in part.items()}
                    if mark.many
                    else {f"{where}.{key}": part}
                )
                parsed = {}
                for path, each in parts.items():
                    try:
                        parsed[path] = registry.parse(mark.kind, each, path).model_dump()
                    except RequestError as error:
                        problems += error.problems
                if len(parsed) == len(parts):
                    values[key] = (
                        dict(zip(part, parsed.values(), strict=True)) if mark.many else parsed[f"{where}.{key}"]
                    )
    try:
        config = model.model_validate(values)
    except ValidationError as error:
        problems += sentences(error, model, where, reported)
    if problems:
        raise RequestError(problems)
    return config


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model that an annotation speaks of: `Yarn`, `Yarn | None`, `dict[str, Yarn]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_model_in, get_args(annotation))), None)


def sentences(error: ValidationError, model: type[BaseModel], where: str, reported: Collection[str] = ()) -> list[str]:
    """One sentence for each problem in a pydantic error, less those in fields that were `reported` already."""
    problems = []
    for item in error.errors():
        if item["loc"] and item["loc"][0] in reported:
            continue
        path = ".".join([where, *(str(part) for part in item["loc"])]) if where else ".".join(map(str, item["loc"]))
        if item["type"] == "extra_forbidden":
            owner, known = model, model.model_fields
            for part in item["loc"][:-1]:
                inner = _model_in(known[str(part)].annotation) if str(part) in known else None
                if inner is not None:
                    owner, known = inner, inner.model_fields
            problems.append(f"{path} is not an option of {owner.__name__}. {did_you_mean(str(item['loc'][-1]), known)}")
        elif item["type"] == "missing":
            problems.append(f"{path} is missing; give it a value.")
        elif item["type"] == "value_error":
            # Raised by our own validators: already a sentence about the fields it names.
            problems.append(f"{path}: {item['ctx']['error']}.")
        else:
            message = item["msg"][0].lower() + item["msg"][1:]
            problems.append(f"{path} is {item['input']!r}; {message}.")
    return problems
