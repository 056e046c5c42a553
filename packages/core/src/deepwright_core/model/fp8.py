"""Training in FP8 as DeepSeek-V3 was (report, section 3.3): the products of attention's and feed-forwards' projections.

Activations are quantised in blocks of 1 x 128, weights in blocks of 128 x 128, gradients like activations; forward,
dgrad and wgrad multiply e4m3 and add up in float32 every 128 values. Everything else stays as under bf16: embedding,
head, routers, norms, attention itself, the projections of MTP modules, and the float32 weights that are updated.

It is applied to a finished model from outside, before adapters are put on it and before training: modules become ones
of another kind that have the same parameters under the same names, so checkpoints do not know of it. It multiplies in
FP8 while it trains; in evaluation and generation it is the plain model under autocast.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from deepwright_kernels import fp8_feed_forward, fp8_linear

from ..errors import RequestError
from .feed_forward import SwiGLU
from .record import ForwardRecord
from .transformer import Transformer

# e4m3 in the tensor cores came with Ada.
LEAST_CAPABILITY = (8, 9)
# Rows of FP8 operands have to begin at multiples of 16 bytes.
MULTIPLE = 16


@runtime_checkable
class TrainsInFp8(Protocol):
    """A module that multiplies by matrices of its own and can do it in FP8 while it trains, once it is told to."""

    def fp8_matrices(self) -> dict[str, Tensor]:
        """Each of these matrices [..., outputs, inputs] by its name."""

    def train_in_fp8(self) -> None: ...


class Fp8Linear(nn.Linear):
    """A linear layer that multiplies in block-scaled FP8 while it trains."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        output = fp8_linear(input, self.weight)
        return output if self.bias is None else output + self.bias.to(output.dtype)


class Fp8SwiGLU(SwiGLU):
    """A gated feed-forward whose input is quantised once for gate and up, and whose hidden values exist in FP8 only."""

    def forward(self, x_BSD: Tensor, record: ForwardRecord | None = None) -> Tensor:
        if not self.training:
            return super().forward(x_BSD, record)
        return fp8_feed_forward(x_BSD, torch.cat([self.gate.weight, self.up.weight]), self.down.weight)


# Exact types: what is derived from them, such as a variant's own layer, is not ours to change.
CONVERTED: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: Fp8Linear, SwiGLU: Fp8SwiGLU}


def fp8_problems(model: Transformer, device: torch.device, where: str = "model") -> list[str]:
    """A sentence for each reason why this model cannot train in FP8 on this device; the model may be on meta.
    `where` is the config section that describes it."""
    problems = []
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        problems.append(
            f"precision is fp8, but {torch.cuda.get_device_name(device)} has no FP8 products (they came with compute "
            "capability 8.9). Set precision=bf16."
        )
    sizes = {name: matrix.shape[-2:] for part in _parts(model) for name, matrix in _matrices(part)}
    for name, (outputs, inputs) in sizes.items():
        if inputs % MULTIPLE or outputs % MULTIPLE:
            problems.append(
                f"precision is fp8, but the layer '{name}' of {where} has the sizes {inputs} -> {outputs}; expected "
                f"multiples of {MULTIPLE}. Change the sizes, or set precision=bf16."
            )
    return problems


def train_in_fp8(model: Transformer) -> None:
    """Convert the projections of every block, MTP modules' blocks included. `RequestError` if it cannot be."""
    problems = fp8_problems(model, next(model.parameters()).device)
    if problems:
        raise RequestError(problems)
    for part in _parts(model):
        for module in part.modules():
            if isinstance(module, TrainsInFp8):
                module.train_in_fp8()
            elif type(module) in CONVERTED:
                module.__class__ = CONVERTED[type(module)]  # as torch's parametrizations do: the object stays


def _parts(model: Transformer) -> list[nn.Module]:
    """What is converted: attention and feed-forward of every block."""
    blocks = [*model.layers, *(module.block for module in model.mtp)]
    return [cast(nn.Module, part) for block in blocks for part in (block.attention, block.ffn)]


def _matrices(part: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every matrix below a part that is multiplied in FP8, by the name of its layer."""
    for name, module in part.named_modules():
        if isinstance(module, TrainsInFp8):
            yield from module.fp8_matrices().items()
        elif type(module) is nn.Linear:
            yield name, module.weight
