"""An adapter back on its base: who keeps only adapters gets the merged model again, bit for bit."""

from __future__ import annotations

from pathlib import Path

from ..errors import RequestError
from ..model.directory import save_model
from ..model.tensor_files import differences
from ..registry import Registry
from . import adapter_files
from .lora import Lora, LoraConfig
from .start import load_start


def apply_adapter(base: Path, adapter: Path, destination: Path, registry: Registry) -> None:
    """Write the model directory that a stage made when it started from `base` and left `adapter`.

    Raises `RequestError` when the adapter belongs to other weights; nothing is written then.
    """
    section, digest, factors = adapter_files.read(adapter)
    config: LoraConfig = registry.parse("finetune", section, f"{adapter / adapter_files.CONFIG_FILE}: finetune")
    start = load_start(base, registry)
    problems = config.problems(lambda: start.model, str(adapter))
    if problems:
        raise RequestError(problems)
    lora = Lora(config, start.model, seed=0, new_rows=start.new_rows)
    wanted = {name: tuple(tensor.shape) for name, tensor in lora.factors().items()}
    problems = differences(wanted, {name: tuple(t.shape) for name, t in factors.items()}, str(adapter))
    if not problems and adapter_files.digest_of(lora.originals()) != digest:
        problems = [f"{adapter} was trained on other weights than {base} holds; give the model that it started from."]
    if problems:
        raise RequestError(problems)
    lora.load_factors(factors)
    lora.merge()
    save_model(start.model, destination)
    start.tokenizer.save(destination)
