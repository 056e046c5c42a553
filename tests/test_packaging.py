"""Each package is a wheel of its own: it builds, says what it is, and needs what it declares and nothing else."""

import ast
import importlib.util
import sys
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PACKAGES = sorted(path.name for path in (ROOT / "packages").iterdir() if (path / "pyproject.toml").is_file())
OURS = [f"deepwright-{name}" for name in PACKAGES]
PROJECTS = {**{name: ROOT / "packages" / name for name in PACKAGES}, "deepwright": ROOT}

build = pytest.importorskip("build", reason="building wheels needs the distribution `build`")


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


isolated = _load(ROOT / "tests" / "isolated.py")


def project(name: str) -> dict:
    return tomllib.loads((PROJECTS[name] / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every wheel, built from the source with what is installed (no isolation, no network)."""
    out = tmp_path_factory.mktemp("wheels")
    return {
        name: Path(build.ProjectBuilder(folder, runner=build_quietly).build("wheel", out))
        for name, folder in PROJECTS.items()
    }


def build_quietly(command, cwd=None, extra_environ=None) -> None:
    from pyproject_hooks import quiet_subprocess_runner

    quiet_subprocess_runner(command, cwd, extra_environ)


def metadata(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        return Parser().parsestr(archive.read(name).decode())


def imported(wheel: Path, top: bool) -> dict[str, str]:
    """Top-level import name -> a file that imports it. `top`: only what is imported as soon as the file is."""
    found: dict[str, str] = {}
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if not name.endswith(".py"):
                continue
            tree = ast.parse(archive.read(name))
            for node in _at_import(tree.body) if top else ast.walk(tree):
                if isinstance(node, ast.Import):
                    found |= {alias.name.partition(".")[0]: name for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                    found[node.module.partition(".")[0]] = name
    return {name: path for name, path in found.items() if name not in sys.stdlib_module_names}


def _at_import(body):
    """Statements that run when a module is imported."""
    for node in body:
        yield node
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        for field in ("body", "orelse", "handlers", "finalbody"):
            if field == "body" and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                continue
            yield from _at_import(getattr(node, field, []))


def owners(name: str) -> set[str]:
    """Distributions that provide an import name (from what is installed)."""
    return isolated.import_names().get(name, {canonicalize_name(name)})


def declared(name: str, extras: bool = False) -> set[str]:
    lines = list(project(name).get("dependencies", []))
    if extras:
        optional = project(name).get("optional-dependencies", {})
        lines += [line for extra, required in optional.items() if extra != "test" for line in required]
    return {canonicalize_name(Requirement(line).name) for line in lines}


@pytest.mark.parametrize("name", PROJECTS)
def test_the_wheel_says_what_it_is(name: str, wheels: dict[str, Path]) -> None:
    said, known = metadata(wheels[name]), project(name)
    assert (said["Name"], said["Version"]) == (known["name"], known["version"])
    assert said["Requires-Python"] == ">=3.11"
    assert said["License-Expression"] == "MIT"
    assert len(said.get_payload()) > 40, "the README is the long description"
    with zipfile.ZipFile(wheels[name]) as archive:
        names = archive.namelist()
        entries = [n for n in names if n.endswith("entry_points.txt")]
        if name in PACKAGES:
            assert f"deepwright_{name}/py.typed" in names
            assert {n.partition("/")[0] for n in names if ".dist-info" not in n} == {f"deepwright_{name}"}
        if name in PACKAGES and name != "kernels":
            assert f"{name} = deepwright_{name}.plugin" in archive.read(entries[0]).decode()


@pytest.mark.parametrize("name", PROJECTS)
def test_what_it_imports_is_declared(name: str, wheels: dict[str, Path]) -> None:
    itself = {"deepwright": "flows"}.get(name, f"deepwright_{name}")
    for top in (True, False):
        # Inside a function an import may also be covered by an extra.
        covered = declared(name, extras=not top)
        missing = {
            f"{path} imports {module}, which {project(name)['name']} does not declare"
            for module, path in imported(wheels[name], top).items()
            if module != itself and not owners(module) & covered
        }
        assert missing == set()


@pytest.mark.parametrize("name", PACKAGES)
def test_what_it_declares_is_imported(name: str, wheels: dict[str, Path]) -> None:
    used = set().union(*(owners(module) for module in imported(wheels[name], top=False)))
    assert declared(name, extras=True) - used == set()


@pytest.mark.parametrize("name", PACKAGES)
def test_dependencies_go_one_way_and_have_a_floor_and_a_ceiling(name: str) -> None:
    allowed = {"kernels": set(), "core": {"deepwright-kernels"}}.get(name, {"deepwright-kernels", "deepwright-core"})
    for line in project(name).get("dependencies", []):
        requirement = Requirement(line)
        if canonicalize_name(requirement.name) in OURS:
            assert requirement.name in allowed
            version = project(requirement.name.removeprefix("deepwright-"))["version"]
            assert requirement.specifier.contains(version), f"{line} does not admit {version}"
            assert {s.operator for s in requirement.specifier} == {">=", "<"}


@pytest.mark.parametrize("name", PACKAGES)
def test_it_imports_with_its_declared_dependencies_alone(name: str) -> None:
    assert isolated.run(name, [], import_only=True) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", PACKAGES)
def test_its_own_tests_pass_with_its_declared_dependencies_alone(name: str) -> None:
    status = isolated.run(name, ["-q", *isolated.FIRST_CASES])
    if not list((ROOT / "tests" / name).glob("test_*.py")):
        assert status == 5  # nothing collected
    else:
        assert status == 0


def test_isolation_hides_what_is_not_declared() -> None:
    seen = isolated.isolation("kernels")
    assert {"torch", "deepwright-kernels", "pytest"} <= set(seen["distributions"])
    assert not {"pydantic", "deepwright-core", "mlflow", "hydra-core"} & set(seen["distributions"])
    assert {"deepwright_core", "pydantic", "hydra", "flows"} <= set(seen["hidden"])
    assert {"deepwright-kernels", "pydantic"} <= set(isolated.isolation("core")["distributions"])
