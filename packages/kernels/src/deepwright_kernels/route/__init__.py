"""Which experts a token goes to, with what weights: scores, group-limited top-k and counts in one pass."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import dispatch
from ..arguments import require, require_device, require_dtype, require_shape

NAME = "route"
SCORINGS = ("sigmoid", "softmax")
MOST_CHOSEN = 64
FEW_LOGITS = 1024
LARGEST = 4096
# Of the CUDA kernel, where eight lanes of a warp share a row and load four experts at a time.
LANES, PIECES, LONGEST_ROW = 8, 32, 512


def _too_large(logits_TE: Tensor, bias_E: Tensor | None, top_k: int, *_: object) -> str | None:
    if logits_TE.shape[1] > LARGEST:
        return f"logits_TE has {logits_TE.shape[1]} experts and a program's row holds at most {LARGEST}"
    if top_k > MOST_CHOSEN:
        return f"top_k is {top_k} and the loop over the choices is unrolled, at most {MOST_CHOSEN} times"
    return None


def _not_float32(logits_TE: Tensor, bias_E: Tensor | None, *_: object) -> str | None:
    if logits_TE.dtype != torch.float32 or (bias_E is not None and bias_E.dtype != torch.float32):
        return "its keys hold float32 and logits_TE or bias_E is float64"
    return None


def _ungainly(
    logits_TE: Tensor,
    bias_E: Tensor | None,
    top_k: int,
    scoring: str,
    groups: int,
    top_groups: int,
    group_best: int,
    *_: object,
) -> str | None:
    experts = logits_TE.shape[1]
    if _not_float32(logits_TE, bias_E):
        return "it computes in float32 and logits_TE or bias_E is float64"
    if experts % PIECES or experts > LONGEST_ROW or top_k > LANES:
        return (
            f"{LANES} threads share a row in pieces of {PIECES} experts, up to {LONGEST_ROW}, one choice each: "
            f"there are {experts} experts and top_k is {top_k}"
        )
    if top_groups < groups and (LANES % groups or group_best > 2):
        return (
            f"a group is one or more of the {LANES} threads of a row and worth its one or two best: groups is {groups} "
            f"and group_best is {group_best}"
        )
    return None


def _order(logits_TE: Tensor, *rest: Any) -> tuple[str, ...]:
    hopper = dispatch.capability(logits_TE.device.index or 0) == (9, 0) and torch.version.hip is None
    if hopper and rest and _ungainly(logits_TE, *rest) is None:
        return "cuda", "triton", "reference"
    return "triton", "reference"


def _elsewhere(logits_TE: Tensor, *_: object) -> tuple[str, ...]:
    sorted_faster = logits_TE.numel() <= FEW_LOGITS  # packing keys takes calls, sorting few numbers does not
    return ("reference",) if sorted_faster or logits_TE.dtype != torch.float32 else ("torch", "reference")


dispatch.operator(
    NAME,
    {
        "reference": f"{__name__}.reference:route",
        "cuda": f"{__name__}.hopper:route",
        "triton": f"{__name__}.triton:route",
        "torch": f"{__name__}.packed_keys:route",
    },
    cuda=_order,
    elsewhere=_elsewhere,
    needs={"cuda": _ungainly, "triton": _too_large, "torch": _not_float32},
)


class Choice(NamedTuple):
    """experts_TK: int64, best first. weights_TK, scores_TE: float32. counts_E: int64, how many tokens chose each."""

    experts_TK: Tensor
    weights_TK: Tensor
    scores_TE: Tensor
    counts_E: Tensor


def route(
    logits_TE: Tensor,
    bias_E: Tensor | None,
    top_k: int,
    *,
    scoring: str = "sigmoid",
    groups: int = 1,
    top_groups: int = 1,
    group_best: int = 2,
    normalise: bool = True,
    scaling: float = 1.0,
) -> Choice:
    """logits_TE [T, E] float32, bias_E [E] float32 or None -> (experts, weights, scores, counts), see `Choice`.

    s = sigmoid(logits) or softmax(logits). The choice is made by s + bias: of `groups` equal groups the `top_groups`
    stay whose `group_best` best sum highest, and of their experts the best `top_k` (DeepSeek-V3 report, eq. 12-16; V2
    ranks groups by their single best). The weights are the chosen s, without the bias, divided by (their sum + 1e-20)
    if `normalise`, times `scaling`. Of equal scores the lowest expert wins, of equal groups the lowest group.
    Gradients flow from weights and scores to the logits; the bias gets none.
    """
    require_shape(NAME, "logits_TE", logits_TE, (None, None), "[T, E]")
    require_dtype(NAME, "logits_TE", logits_TE, (torch.float32, torch.float64))
    experts = logits_TE.shape[1]
    if bias_E is not None:
        require_shape(NAME, "bias_E", bias_E, (experts,), "[E]")
        require_dtype(NAME, "bias_E", bias_E, (torch.float32, torch.float64))
        require_device(NAME, "bias_E", bias_E, logits_TE.device)
    require(scoring in SCORINGS, NAME, "scoring", f"is '{scoring}'; expected one of {', '.join(SCORINGS)}")
    require(
        groups >= 1 and experts % groups == 0, NAME, "groups", f"is {groups}; expected a divisor of {experts} experts"
    )
    size = experts // groups
    require(1 <= top_groups <= groups, NAME, "top_groups", f"is {top_groups}; expected 1 to groups, which is {groups}")
    require(
        groups == 1 or 1 <= group_best <= size,
        NAME,
        "group_best",
        f"is {group_best}; expected 1 to the {size} experts of a group",
    )
    allowed = size * top_groups
    require(
        1 <= top_k <= allowed,
        NAME,
        "top_k",
        f"is {top_k}; expected 1 to the {allowed} experts that top_groups groups hold",
    )
    return Choice(
        *dispatch.run(
            NAME, logits_TE, bias_E, top_k, scoring, groups, top_groups, group_best, normalise, float(scaling)
        )
    )
