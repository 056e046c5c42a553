"""The rules of the house, read from the source: who may import whom, what no file may be called, what none may do."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "deepwright_kernels": set(),
    "deepwright_core": {"deepwright_kernels"},
    **{
        name: {"deepwright_core", "deepwright_kernels"}
        for name in ("deepwright_moe", "deepwright_mla", "deepwright_rl", "deepwright_serve")
    },
}
ONLY_FLOWS = {"prefect", "mlflow", "hydra", "omegaconf"}
NAMELESS = {"util", "utils", "helper", "helpers", "common", "misc"}
UNSAFE_FORMATS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
CODE_ROOTS = ("packages", "flows", "examples", "benchmarks", "tests")


def sources(*roots: str) -> list[Path]:
    """Python files below these folders of the repository, without caches and builds."""
    return sorted(
        path
        for root in roots
        for path in (ROOT / root).rglob("*.py")
        if not {"__pycache__", "build", "dist", ".venv"} & set(path.relative_to(ROOT).parts)
    )


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every absolute import, also inside functions and by `import_module("...")`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.lineno, node.module
        elif isinstance(node, ast.Call) and _called(node).rpartition(".")[2] in {"import_module", "__import__"}:
            for argument in node.args[:1]:
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    yield node.lineno, argument.value


def _called(node: ast.Call) -> str:
    return ast.unparse(node.func)


def import_problems(source: str, package: str) -> list[str]:
    """What `package` imports and must not. `package` is an import name of packages/, or "examples"."""
    problems = []
    for line, name in imports(ast.parse(source)):
        top = name.partition(".")[0]
        if top in ONLY_FLOWS:
            problems.append(f"{line}: {package} imports {name}; only flows may")
        if top == "flows":
            problems.append(f"{line}: {package} imports {name}; nobody may import flows")
        if package in MAY_IMPORT and top in MAY_IMPORT and top not in MAY_IMPORT[package] | {package}:
            problems.append(
                f"{line}: {package} imports {name}; it may import {sorted(MAY_IMPORT[package]) or 'nobody'}"
            )
    return problems


def danger_problems(source: str) -> list[str]:
    """Code that runs what a file says: pickles, torch.load without weights_only=True, eval and exec."""
    tree = ast.parse(source)
    problems = [
        f"{line}: imports {name}; use JSON or safetensors"
        for line, name in imports(tree)
        if name.partition(".")[0] in UNSAFE_FORMATS
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "torch" and any(a.name == "load" for a in node.names):
            problems.append(f"{node.lineno}: takes load out of torch; call torch.load(..., weights_only=True)")
        if not isinstance(node, ast.Call):
            continue
        called, given = _called(node), {keyword.arg: keyword.value for keyword in node.keywords}
        if called in {"eval", "exec"}:
            problems.append(f"{node.lineno}: calls {called}")
        if called == "torch.load" and not _is_constant(given.get("weights_only"), True):
            problems.append(f"{node.lineno}: torch.load without weights_only=True")
        if "allow_pickle" in given and not _is_constant(given["allow_pickle"], False):
            problems.append(f"{node.lineno}: {called} with allow_pickle")
        if "shell" in given and not _is_constant(given["shell"], False):
            problems.append(f"{node.lineno}: {called} through a shell")
    return problems


def _is_constant(node: ast.expr | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def package_of(path: Path) -> str:
    """The import name that a file of packages/ belongs to, or the name of its top folder."""
    parts = path.relative_to(ROOT).parts
    return parts[3] if parts[0] == "packages" and parts[2] == "src" else parts[0]


def found(paths: list[Path], check) -> list[str]:
    return [f"{path.relative_to(ROOT)}:{problem}" for path in paths for problem in check(path)]


def test_imports_go_one_way() -> None:
    paths = sources("packages", "examples")
    assert {package_of(path) for path in paths} >= set(MAY_IMPORT)
    assert found(paths, lambda path: import_problems(path.read_text(), package_of(path))) == []


def test_nothing_runs_what_a_file_says() -> None:
    # Tests may: eval is a fair oracle for arithmetic there.
    assert found(sources(*set(CODE_ROOTS) - {"tests"}), lambda path: danger_problems(path.read_text())) == []


def test_every_file_is_named_for_its_idea() -> None:
    named = [path for root in (*CODE_ROOTS, "conf") for path in (ROOT / root).rglob("*")]
    assert [str(path.relative_to(ROOT)) for path in named if path.stem.lower() in NAMELESS] == []


def test_every_file_says_what_it_is() -> None:
    paths = [path for path in sources("packages", "flows", "examples", "benchmarks") if path.read_text().strip()]
    silent = [str(path.relative_to(ROOT)) for path in paths if ast.get_docstring(ast.parse(path.read_text())) is None]
    assert silent == []


def test_every_package_has_its_own_face() -> None:
    packages = sorted(path for path in (ROOT / "packages").iterdir() if path.is_dir())
    assert [path.name for path in packages] == ["core", "kernels", "mla", "moe", "rl", "serve"]
    for package in packages:
        for name in ("pyproject.toml", "README.md", "CHANGELOG.md", f"src/deepwright_{package.name}/py.typed"):
            assert (package / name).is_file(), f"packages/{package.name}/{name} is missing"


def test_no_package_index_is_named() -> None:
    files = [ROOT / "pyproject.toml", *ROOT.glob("constraints*.txt"), *ROOT.glob("*/*/pyproject.toml")]
    naming = re.compile(r"index-url|find-links|trusted-host|https?://\S*/simple")
    assert [str(path.relative_to(ROOT)) for path in files if naming.search(path.read_text())] == []


@pytest.mark.parametrize(
    ("source", "package", "allowed"),
    [
        ("import torch", "deepwright_kernels", True),
        ("from deepwright_core.errors import RequestError", "deepwright_kernels", False),
        ("from deepwright_kernels import rms_norm", "deepwright_core", True),
        ("def f():\n    import deepwright_mla", "deepwright_core", False),
        ("from deepwright_moe.router import Router", "deepwright_mla", False),
        ("from deepwright_core import registry", "deepwright_rl", True),
        ("from .router import Router", "deepwright_moe", True),
        ("import mlflow", "deepwright_core", False),
        ("import importlib\nimportlib.import_module('hydra.core')", "deepwright_serve", False),
        ("import hydrate", "deepwright_serve", True),
        ("from flows import compose", "deepwright_rl", False),
        ("import omegaconf", "examples", False),
        ("import deepwright_rl, deepwright_mla", "examples", True),
    ],
)
def test_the_import_rule_tells_right_from_wrong(source: str, package: str, allowed: bool) -> None:
    assert (import_problems(source, package) == []) == allowed


@pytest.mark.parametrize(
    ("source", "allowed"),
    [
        ("torch.load(path, weights_only=True)", True),
        ("torch.load(path)", False),
        ("torch.load(path, weights_only=False)", False),
        ("torch.load(path, weights_only=flag)", False),
        ("from torch import load", False),
        ("import pickle", False),
        ("from joblib import dump", False),
        ("numpy.load(path, allow_pickle=True)", False),
        ("numpy.load(path, allow_pickle=False)", True),
        ("model.eval()", True),
        ("eval(text)", False),
        ("exec(text)", False),
        ("subprocess.run(text, shell=True)", False),
        ("subprocess.run(words)", True),
    ],
)
def test_the_danger_rule_tells_right_from_wrong(source: str, allowed: bool) -> None:
    assert (danger_problems(source) == []) == allowed
