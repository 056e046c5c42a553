"""Imported by Python at start-up when this folder is on PYTHONPATH: hides distributions. See tests/isolated.py."""

import json
import os
import re
import sys


class Curtain:
    """Stands before another finder and lets through what may be seen."""

    def __init__(self, finder, distributions, hidden):
        self.finder, self.distributions, self.hidden = finder, distributions, hidden

    def find_spec(self, name, path=None, target=None):
        if path is None and name in self.hidden:
            return None
        return self.finder.find_spec(name, path, target)

    def find_distributions(self, *args, **kwargs):
        finder = getattr(self.finder, "find_distributions", None)
        for found in finder(*args, **kwargs) if finder else ():
            if re.sub(r"[-_.]+", "-", found.metadata["Name"] or "").lower() in self.distributions:
                yield found

    def invalidate_caches(self):
        invalidate = getattr(self.finder, "invalidate_caches", None)
        if invalidate:
            invalidate()


if "DEEPWRIGHT_ISOLATION" in os.environ:
    with open(os.environ["DEEPWRIGHT_ISOLATION"]) as file:
        allowed = json.load(file)
    sys.meta_path[:] = [
        Curtain(finder, frozenset(allowed["distributions"]), frozenset(allowed["hidden"])) for finder in sys.meta_path
    ]
