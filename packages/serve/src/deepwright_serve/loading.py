"""From a model directory to a model that can be put on the roster: weights, tokenizer, engine, thread.

How it is loaded is decided once for a server, so that a version that comes later runs as the first one did.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from deepwright_core import plugins
from deepwright_core.engine import CacheDtype, Engine, GraphsOption, SamplingParams
from deepwright_core.errors import RequestError
from deepwright_core.finetune.adapter_files import find_adapter
from deepwright_core.model.description import describe
from deepwright_core.model.directory import load_model, read_config
from deepwright_core.model.transformer import Transformer
from deepwright_core.parallel.leading import LeadingModel
from deepwright_core.tokenizer import Tokenizer

from .engine_options import CACHE_TOKENS
from .limits import Limits
from .pool import EnginePool
from .roster import Served
from .scheduling import EngineThread


@dataclass(frozen=True)
class Loading:
    """device: auto, cpu, cuda or cuda:N. precision: auto, fp32 or bf16. cache_tokens: what the cache holds, of each
    replica. replicas: engines that share the work; each has a GPU, or on a CPU all have the same weights. speculate:
    tokens that the model's MTP modules draft in a step. batch_invariant: an answer is the same to the last bit
    whatever runs beside it."""

    device: str = "auto"
    precision: str = "auto"
    cache_tokens: int = CACHE_TOKENS
    cache_dtype: CacheDtype = "auto"
    limits: Limits = field(default_factory=Limits)
    replicas: int = 1
    speculate: int = 0
    batch_invariant: bool = False

    def load(self, directory: Path, name: str, version: str = "") -> Served:
        """Load a model directory; blocks for as long as that takes. `RequestError` when it cannot be served."""
        return self.load_with_adapters(directory, name, version, {})[0]

    def load_with_adapters(
        self, directory: Path, name: str, version: str, adapters: Mapping[str, Path]
    ) -> list[Served]:
        """The same, and LoRA adapters of it: a model of its own name each, all answered by the same engines."""
        return self.put_on(self._models(directory), directory, name, version, adapters)

    def put_on(
        self,
        models: Sequence[Transformer | LeadingModel],
        directory: Path,
        name: str,
        version: str,
        adapters: Mapping[str, Path],
        graphs: GraphsOption = "auto",
    ) -> list[Served]:
        """The engines of models that are loaded, one for each, behind one name (and those of the adapters)."""
        tokenizer = Tokenizer.load(directory)
        engines = [
            Engine(
                model,
                tokenizer.end_ids,
                cache_tokens=self.cache_tokens,
                max_batch=self.limits.running,
                cache_dtype=self.cache_dtype,
                batch_invariant=self.batch_invariant,
                speculate=self.speculate,
                graphs=graphs,
            )
            for model in models
        ]
        found = {adapter: find_adapter(path) for adapter, path in adapters.items()}
        for engine in engines:
            for adapter, path in found.items():
                engine.load_adapter(adapter, path, directory)
            if self.batch_invariant:
                _refuse_what_depends_on_company(engine, tokenizer.begin_ids)
            engine.warm_up()
        context = min(models[0].max_positions, engines[0].cache_capacity)
        threads = [EngineThread(engine, self.limits) for engine in engines]
        thread = threads[0] if len(threads) == 1 else EnginePool(threads)
        served = Served(name, thread, tokenizer, context, version, directory=directory)
        return [served, *(Served(each, thread, tokenizer, context, version, each, found[each]) for each in found)]

    def _models(self, directory: Path) -> list[Transformer]:
        """The model, once for each replica."""
        device, dtype = self.place()
        registry = plugins.installed().registry
        if device.type == "cuda" and self.replicas > 1:
            places = [torch.device("cuda", number) for number in range(self.replicas)]
            return [load_model(directory, registry, device=place, dtype=dtype) for place in places]
        model = load_model(directory, registry, device=device, dtype=dtype)
        # Modules of their own, because an engine may put something on them; the weights are the same tensors.
        shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        return [model, *(copy.deepcopy(model, dict(shared)) for _ in range(1, self.replicas))]

    def place(self) -> tuple[torch.device, torch.dtype]:
        """Where models go, and what their weights are; `RequestError` when this machine has no such device."""
        auto = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            device = torch.device(auto if self.device == "auto" else self.device)
        except RuntimeError:
            raise RequestError(f"--device is '{self.device}'; expected auto, cpu, cuda or cuda:N.") from None
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise RequestError(
                f"--device is '{self.device}'; this machine has {torch.cuda.device_count()} CUDA devices."
            )
        if device.type == "cuda" and self.replicas > 1:
            if device.index is not None:
                raise RequestError(
                    f"--device is '{self.device}' and --replicas is {self.replicas}, which have a GPU each from cuda:0 "
                    "on; expected auto or cuda."
                )
            if self.replicas > torch.cuda.device_count():
                raise RequestError(
                    f"--replicas is {self.replicas} and each wants a GPU of its own; this machine has "
                    f"{torch.cuda.device_count()}."
                )
            device = torch.device("cuda", 0)
        bf16 = device.type == "cuda" if self.precision == "auto" else self.precision == "bf16"
        return device, torch.bfloat16 if bf16 else torch.float32

    def bytes_of(self, directory: Path) -> int:
        """What a model will take beside others on its device: its weights and its cache, without what a step needs for
        a moment."""
        device, dtype = self.place()
        registry = plugins.installed().registry
        facts = describe(registry, read_config(directory, registry))
        caches = 1 if device.type == "cuda" else self.replicas
        layers = 1 + min(self.speculate, facts["mtp"]["depth"]) / facts["layers"]  # those of the model, and its modules
        # The description counts two bytes a value.
        cached = facts["kv_bytes_per_token"] / 2 * layers * self.cache_tokens * caches
        return int((facts["parameters_total"] + facts["parameters_mtp"] + cached) * dtype.itemsize)


def _refuse_what_depends_on_company(engine: Engine, begin_ids: Sequence[int]) -> None:
    """Generate a token: a form that depends on the batch is found out here, and not by a client."""
    try:
        engine.generate([[*begin_ids] or [0]], SamplingParams(max_tokens=1, temperature=0.0))
    except NotImplementedError as error:
        raise RequestError(f"--batch-invariant cannot be had for this model: {error}") from None
