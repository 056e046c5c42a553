"""Imports every module of a package, and then whatever its functions import when they are called.

    python -m import_everything deepwright_core [import names that extras provide, and that may be missing]

A wrong name or an undeclared distribution is found without calling the function. Leaves out what is imported by a name
that is only computed, and the Triton side of a kernel where triton is not installed.
"""

import ast
import importlib
import importlib.util
import pkgutil
import sys
from pathlib import Path


def modules(package):
    found = importlib.import_module(package)
    yield found
    for module in pkgutil.walk_packages(found.__path__, package + "."):
        without_triton = module.name.endswith(".triton") and not importlib.util.find_spec("triton")
        if not without_triton and not module.name.endswith(".__main__"):
            yield importlib.import_module(module.name)


def inner_imports(node, inside=False):
    """Import statements in functions."""
    for child in ast.iter_child_nodes(node):
        if inside and isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        yield from inner_imports(child, inside or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))


def main(package, *may_be_missing):
    for module in list(modules(package)):
        tree = ast.parse(Path(module.__file__).read_text())
        for statement in inner_imports(tree):
            names = {"__name__": module.__name__, "__package__": module.__spec__.parent}
            try:
                exec(compile(ast.Module([statement], []), module.__file__, "exec"), names)
            except ModuleNotFoundError as error:
                if error.name.partition(".")[0] not in may_be_missing:
                    raise


if __name__ == "__main__":
    main(*sys.argv[1:])
