"""Run a package's own tests as if only its declared dependencies were installed.

    python -m tests.isolated kernels [pytest arguments]     its tests
    python -m tests.isolated kernels --first-cases          of each test function only the first case, and no costly one
    python -m tests.isolated kernels --import-only          only import its modules, and what its functions import

The allowed distributions are the package's declared dependencies, theirs in turn, its extra `test`, and the tools that
tests are written with. Everything else that is installed vanishes, for imports and for `importlib.metadata` alike, in
the child process and its children: `tests/isolation/sitecustomize.py` does it at start-up. Nothing is installed, so
this takes no longer than the tests. `make test` runs the first cases: all cases run beside everything else that is
installed, and an import that is missing here is missing for a function's first case as for its last. Tests marked
`costly` take a second or more and import what cheaper ones do.

Leaves out: versions. That the lowest declared ones work is not shown by this.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
TEST_TOOLS = ("pytest", "pytest-timeout", "hypothesis")
ISOLATION_VARIABLE = "DEEPWRIGHT_ISOLATION"
FIRST_CASES = ["-p", "first_cases", "-m", "not costly and not slow and not gpu and not browser"]


@cache
def packages() -> dict[str, dict[str, list[str]]]:
    """Our own distributions -> what their pyproject.toml declares by extra, "" for none (an editable installation may
    remember less)."""
    read = [tomllib.loads(path.read_text())["project"] for path in (ROOT / "packages").glob("*/pyproject.toml")]
    return {
        project["name"]: {"": project.get("dependencies", []), **project.get("optional-dependencies", {})}
        for project in read
    }


@cache
def import_names() -> dict[str, set[str]]:
    """Import name -> canonical names of the distributions that provide it."""
    names = {name: {canonicalize_name(owner) for owner in owners} for name, owners in packages_distributions().items()}
    # An editable installation does not say which import names it provides; ours follow from the distribution's.
    return names | {name.replace("-", "_"): {name} for name in packages()} | {"flows": {"deepwright"}}


def closure(names: Iterable[str]) -> set[str]:
    """These distributions and all that they depend on, as far as they are installed. Names are canonical."""
    found: set[str] = set()
    waiting = [Requirement(name) for name in names]
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        requirement = waiting.pop()
        key = (canonicalize_name(requirement.name), frozenset(requirement.extras))
        if key in seen:
            continue
        seen.add(key)
        try:
            declared = _declared(requirement)
        except PackageNotFoundError:
            continue
        found.add(key[0])
        waiting += declared
    return found


def _declared(requirement: Requirement) -> list[Requirement]:
    """What a distribution with these extras depends on; `PackageNotFoundError` if it is not installed."""
    own = packages().get(requirement.name)
    if own is not None:
        # An extra called `test` is for what a package's own tests need and the package does not.
        return [Requirement(line) for extra in ("", "test", *requirement.extras) for line in own.get(extra, [])]
    extras = [{"extra": extra} for extra in requirement.extras] or [{"extra": ""}]
    lines = [Requirement(line) for line in distribution(requirement.name).requires or []]
    return [line for line in lines if line.marker is None or any(line.marker.evaluate(extra) for extra in extras)]


def isolation(package: str) -> dict[str, list[str]]:
    """What the child process may see: distributions, and the import names that belong to others only."""
    allowed = closure([f"deepwright-{package}", *TEST_TOOLS])
    hidden = [name for name, owners in import_names().items() if not owners & allowed]
    return {"distributions": sorted(allowed), "hidden": sorted(hidden)}


def of_extras(package: str) -> list[str]:
    """The import names of what only the package's extras ask for."""
    extras = [line for extra, lines in packages()[f"deepwright-{package}"].items() if extra for line in lines]
    wanted = {canonicalize_name(Requirement(line).name) for line in extras}
    installed = {name for name, owners in import_names().items() if owners & wanted}
    return sorted(installed | {name.replace("-", "_") for name in wanted})


def run(package: str, arguments: list[str], import_only: bool = False) -> int:
    """Run in a child process; returns its exit status."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "isolation.json"
        path.write_text(json.dumps(isolation(package)))
        paths = [str(ROOT / "tests" / "isolation"), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, ISOLATION_VARIABLE: str(path), "PYTHONPATH": os.pathsep.join(paths)}
        if import_only:
            command = [sys.executable, "-m", "import_everything", f"deepwright_{package}", *of_extras(package)]
        else:
            command = [sys.executable, "-m", "pytest", f"tests/{package}", "-p", "no:cacheprovider", *arguments]
        return subprocess.run(command, cwd=ROOT, env=environment).returncode


def main() -> None:
    known = sorted(path.name for path in (ROOT / "packages").iterdir() if (path / "pyproject.toml").is_file())
    parser = argparse.ArgumentParser(prog="python -m tests.isolated", description=__doc__.partition("\n")[0])
    parser.add_argument("package", choices=known)
    parser.add_argument("--import-only", action="store_true")
    parser.add_argument("--first-cases", action="store_true")
    options, arguments = parser.parse_known_args()
    sys.exit(run(options.package, [*(FIRST_CASES if options.first_cases else []), *arguments], options.import_only))


if __name__ == "__main__":
    main()
