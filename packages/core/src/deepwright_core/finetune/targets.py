"""Which matrices of a model are adapted: those whose path contains a target.

A target is a part of a parameter's dotted path, whole names only: `attention`, `ffn.experts`, `ffn.shared.gate`. So
nothing here knows which attention or which mixture a model has, and a stranger's component is adapted like ours.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

# What stands before the names that people know, and is the same in every layer.
CONTAINERS = ("layers", "mtp", "block")


def matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter of two or more dimensions by its path; a stack of matrices, such as experts, is one."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.dim() > 1}


def contains(path: str, target: str) -> bool:
    """Whether `target` stands in `path` as whole names, one after the other."""
    return f".{target}." in f".{path}."


def chosen(model: nn.Module, targets: Sequence[str]) -> dict[str, nn.Parameter]:
    """The matrices that any of the targets matches."""
    return {name: p for name, p in matrices(model).items() if any(contains(name, target) for target in targets)}


def places(model: nn.Module) -> dict[int, list[str]]:
    """Every path of each parameter (by its `id`): those of a tied head are two."""
    paths: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        paths.setdefault(id(parameter), []).append(name)
    return paths


def problems(model: nn.Module, targets: Sequence[str], where: str) -> list[str]:
    """A sentence for each target that matches nothing, or matrices that two modules share."""
    found = []
    for target in targets:
        if not any(contains(name, target) for name in matrices(model)):
            known = ", ".join(names(model))
            found.append(f"{where} holds '{target}', and no matrix of the model is called so. It has: {known}.")
    paths = places(model)
    for parameter in chosen(model, targets).values():
        shared = paths[id(parameter)]
        if len(shared) > 1:
            found.append(f"{where} would part {' and '.join(shared)}, which are one matrix (model.tied_head is true).")
    return found


def names(model: nn.Module) -> list[str]:
    """What targets could be: each matrix without the number of its layer, once."""
    short = []
    for name in matrices(model):
        parts = name.removesuffix(".weight").split(".")
        while parts[0] in CONTAINERS or parts[0].isdigit():
            parts = parts[1:]
        short.append(".".join(parts))
    return sorted(set(short))
