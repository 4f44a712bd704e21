"""Which part of the package may import which, and what ``import llmos_kernels`` loads."""

import ast
import importlib
import pkgutil
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import llmos_kernels

PACKAGE = Path(llmos_kernels.__file__).parent
#: What each room may import, besides itself. "" is the package's own ``__init__``.
ALLOWED = {
    "_core": {"_C"},
    "ops": {"_core"},
    "_triton": {"_core", "_C"},
    "nn": {"ops", "_core"},
    "graph": {"nn", "ops", "_core"},
    "swap": {"graph", "nn", "ops", "_core"},
    "integrations": {"swap", "graph", "nn", "ops", "_core"},
    "testing": {"", "nn", "ops", "_core"},
    "_tools": {"", "testing", "_triton", "swap", "nn", "ops", "_core", "_C"},
    "": {"integrations", "swap", "graph", "nn", "ops", "_core"},
    "__main__": {"", "_tools"},
}
#: The modules of ``ops`` whose constants, and limits of a launch, kernels share.
SHARED_WITH_KERNELS = {
    "ops._activations",
    "ops._attention_arguments",
    "ops._dropout",
    "ops.int8",
    "ops.int8_linear",
}


def modules() -> dict[str, Path]:
    """Return the file of each module of the package, by its dotted name below the package."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(p for p in parts if p != "__init__")] = path
    return found


MODULES = modules()


def imported(name: str) -> set[str]:
    """Return the modules of the package that ``name`` imports, also inside of functions."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            targets = [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            targets = [(node.module or "", alias.name) for alias in node.names]
        else:
            continue
        for module, attribute in targets:
            if module.partition(".")[0] == "llmos_kernels":
                below = module.partition(".")[2]
                inner = f"{below}.{attribute}".lstrip(".")
                found.add(inner if inner in MODULES or inner == "_C" else below)
    return found - {name}


def room(name: str) -> str:
    return name.partition(".")[0]


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_point_one_way(name):
    shared = SHARED_WITH_KERNELS if room(name) == "_triton" else set()
    others = {room(n) for n in imported(name) - shared} - {room(name)}
    assert others <= ALLOWED[room(name)], f"{name} imports {sorted(others - ALLOWED[room(name)])}"


def test_there_is_no_circle():
    graph = {n: imported(n) for n in MODULES}
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as e:
        pytest.fail(f"circle: {' -> '.join(e.args[1])}")


def test_import_loads_no_more_than_it_needs():
    code = """
import sys, llmos_kernels
rooms = "testing", "_tools", "_triton", "integrations.transformers"
heavy = ["llmos_kernels." + room for room in rooms]
heavy += ["triton", "transformers", "hypothesis", "pytest"]
print([m for m in sys.modules if any(f"{m}.".startswith(f"{h}.") for h in heavy)])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", [m.name for m in pkgutil.iter_modules([str(PACKAGE / "ops")])])
def test_public_names_have_one_home(name):
    """Each module of ``ops`` says which names are public: its own, or, of helpers, none."""
    module = importlib.import_module(f"llmos_kernels.ops.{name}")
    assert bool(module.__all__) != name.startswith("_")
    for public in module.__all__:
        assert getattr(module, public).__module__ == module.__name__, public
