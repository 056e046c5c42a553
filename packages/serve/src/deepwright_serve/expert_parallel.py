"""One model over several processes of this host, each with a share of its experts, behind one engine.

Left out: what needs more than one engine, or more of the other ranks than the calls they repeat (`refuse_beside`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from deepwright_core import plugins
from deepwright_core.errors import RequestError
from deepwright_core.parallel.experts import load_share
from deepwright_core.parallel.leading import Followers, LeadingModel
from deepwright_core.parallel.ranks import Ranks

from .loading import Loading
from .roster import Served


def refuse_beside(loading: Loading, adapters: bool, admin: bool) -> None:
    """Refuse what cannot be had together with --expert-parallel, all at once."""
    given = {
        "--replicas": loading.replicas > 1,
        "--speculate": loading.speculate > 0,
        "--batch-invariant": loading.batch_invariant,
        "--adapter": adapters,
        "--admin-models": admin,
    }
    problems = [
        f"{option} cannot be had together with --expert-parallel; leave one of them out."
        for option, wanted in given.items()
        if wanted
    ]
    if problems:
        raise RequestError(problems)


@contextmanager
def over_ranks(
    loading: Loading, world: int, directory: Path, name: str, version: str
) -> Iterator[tuple[list[Served], Followers]]:
    """The model on `world` ranks, of which this process is the first: what to put on the roster, and the others."""
    device, dtype = loading.place()
    if device.type == "cuda":
        if device.index is not None or torch.cuda.device_count() < world:
            raise RequestError(
                f"--expert-parallel is {world}: its ranks have a GPU each from cuda:0 on. This machine has "
                f"{torch.cuda.device_count()}, and --device is '{loading.device}'; expected auto or cuda."
            )
        device = torch.device("cuda", 0)
    with TemporaryDirectory(prefix="deepwright-ranks-") as folder:
        meeting = Path(folder) / "meeting"
        # As many threads as here: the ranks repeat each other's attention, and should do so to the last bit.
        followers = Followers(directory, world, meeting, device, dtype, torch.get_num_threads())
        try:
            ranks = Ranks.join(0, world, meeting, device, followers.look)
            model = LeadingModel(load_share(directory, plugins.installed().registry, ranks, device, dtype), ranks)
            yield loading.put_on([model], directory, name, version, {}, graphs="off"), followers
            if followers.loss is None:
                model.leave()
        finally:
            followers.end()
