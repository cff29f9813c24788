"""The storeys of the house: nothing imports upward, and what should be light stays light."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import dng_math

ROOT = Path(__file__).resolve().parents[2]
USERS = {"benchmarks", "figures", "tests"}

FORBIDDEN = {
    "dng_math": USERS | {"diffusers", "dng_kernels", "dng_models", "torch", "triton"},
    "dng_kernels": USERS | {"dng_models", "numba"},
    "dng_models": USERS,
    "figures": USERS - {"figures"},
    "benchmarks": USERS - {"benchmarks"},
}
# The rooms of dng_models, each of which uses those before it.  Experiments stand side by side.
ROOMS = ("support", "pairs", "pipelines", "class_removal text_to_image league")
# The one module of dng_kernels that compiles with Numba, which is loaded when a step is bound.
COMPILED = {"dng_kernels._compiled_cpu"}
SHARED = {f"dng_math.{name}" for name in ("equations", "rules", "trackers", "schedules")}
LIGHT = SHARED | {"dng_math.checks", "dng_math._codes"}  # modules, and packages as a whole
ARITHMETIC = (
    *(ast.Module, ast.FunctionDef, ast.arguments, ast.arg, ast.Return, ast.Assign, ast.Expr),
    *(ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.UnaryOp, ast.USub),
    *(ast.Call, ast.Constant, ast.Name, ast.Load, ast.Store, ast.Tuple),
)


def module_name(path: Path) -> str:
    """The dotted name, with ``__init__`` kept so that relative imports resolve alike."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imported(source: str, module: str) -> Iterator[str]:
    """Dotted names of what is imported anywhere in the source, under a function or an if too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".")[: -node.level] if node.level else []
            origin = ".".join([*package, *filter(None, [node.module])])
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def within(name: str, packages: set[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def rooms_out_of_reach(module: str) -> set[str]:
    """The rooms beside and above that of a module of dng_models."""
    own = module.split(".")[1]
    levels = [level.split() for level in ROOMS]
    floor = next((i for i, level in enumerate(levels) if own in level), len(levels))
    return {f"dng_models.{room}" for level in levels[floor:] for room in level if room != own}


def violations(source: str, module: str) -> list[str]:
    """The imports that the module's place in the house does not allow."""
    package = module.split(".")[0]
    names = list(imported(source, module))
    allowed = {"numba"} if module in COMPILED else set()
    wrong = [name for name in names if within(name, FORBIDDEN[package] - allowed)]
    if package == "dng_kernels":
        wrong += [n for n in names if within(n, {"dng_math"}) and not within(n, LIGHT)]
    if package == "dng_models":
        wrong += [name for name in names if within(name, rooms_out_of_reach(module))]
    if module == "dng_math.equations":
        wrong += names
    elif within(module, LIGHT):
        allowed = LIGHT | {"numpy"} | sys.stdlib_module_names
        wrong += [name for name in names if not within(name, allowed)]
    return wrong


def impurities(source: str) -> list[str]:
    """Whatever in the source is not arithmetic on arguments, nor a call of its own functions."""
    tree = ast.parse(source)
    own = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    found = [type(node).__name__ for node in ast.walk(tree) if not isinstance(node, ARITHMETIC)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) not in own:
            found.append(ast.unparse(node))
        if isinstance(node, ast.FunctionDef) and node.decorator_list:
            found.append(f"decorated {node.name}")
    return found


MODULES = {
    module_name(path): path
    for package in FORBIDDEN
    for path in sorted((ROOT / package).rglob("*.py"))
}


def test_the_modules_under_rule_are_found():
    packages = {"dng_math", "dng_math.rules"}
    assert LIGHT - packages | {f"{each}.__init__" for each in packages} <= MODULES.keys()
    assert {"dng_math.rules.protocol", "dng_math.rules.dynamic"} <= MODULES.keys()


@pytest.mark.parametrize("module", MODULES)
def test_nothing_imports_upward(module):
    assert violations(MODULES[module].read_text(encoding="utf-8"), module) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("dng_math.sampling", "import torch.nn"),
        ("dng_math.sampling", "def f():\n    from torch import nn"),
        ("dng_math.sampling", "from tests import textbook"),
        ("dng_math.sampling", "from ..dng_kernels import fused"),
        ("dng_math.rules.images", "from .. import mixture"),
        ("dng_math.rules.images", "from ..mixture import GaussianMixture"),
        ("dng_math.rules.images", "from dng_math import GaussianMixture"),
        ("dng_math.rules.images", "import scipy.special"),
        ("dng_math.rules.__init__", "from ..mixture import GaussianMixture"),
        ("dng_math.trackers", "from . import mixture"),
        ("dng_math.checks", "import numba"),
        ("dng_math.equations", "import math"),
        ("dng_kernels.fused", "from dng_math import mixture"),
        ("dng_kernels.fused", "import dng_math"),
        ("dng_kernels.fused", "from numba import njit"),
        ("dng_kernels.ops.fused", "from ...dng_math.mixture import GaussianMixture"),
        ("dng_models.pipelines.hook", "if True:\n    import figures"),
        ("figures.chains", "from benchmarks import mixture"),
    ],
)
def test_a_forbidden_import_is_seen(module, source):
    assert len(violations(source, module)) >= 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("dng_math.sampling", "import numba, scipy.stats\nfrom .mixture import GaussianMixture"),
        ("dng_math.rules.images", "import numpy as np\nfrom .. import checks, equations"),
        ("dng_math.rules.__init__", "from .images import SPELL"),
        ("dng_kernels.fused", "import torch, triton\nfrom dng_math import equations"),
        ("dng_kernels.fused", "from dng_math.schedules import StepCoefficients"),
        ("dng_models.pipelines.hook", "import diffusers, dng_kernels, dng_math"),
        ("figures.chains", "from figures import style\nimport dng_math"),
    ],
)
def test_an_allowed_import_passes(module, source):
    assert violations(source, module) == []


def circles(modules: dict[str, str]) -> list[list[str]]:
    """Groups of modules, given with their sources, that import each other in a ring."""

    def holding(name: str) -> str | None:
        """The module that is meant or has what is; a name of a package is its ``__init__``'s."""
        above = name.rpartition(".")[0]
        told = (name, f"{name}.__init__", above, f"{above}.__init__")
        return next((other for other in told if other in modules), None)

    uses = {
        name: {
            other
            for found in imported(source, name)
            if (other := holding(found)) is not None and other != name
        }
        for name, source in modules.items()
    }

    def reached(name: str) -> set[str]:
        seen: set[str] = set()
        todo = [name]
        while todo:
            for other in uses[todo.pop()] - seen:
                seen.add(other)
                todo.append(other)
        return seen

    reach = {name: reached(name) for name in uses}
    rings = {tuple(sorted(o for o in reach[n] if n in reach[o])) for n in uses if n in reach[n]}
    return [list(ring) for ring in sorted(rings)]


def test_no_modules_import_each_other():
    sources = {name: path.read_text(encoding="utf-8") for name, path in MODULES.items()}
    assert circles(sources) == []


def test_a_circle_is_seen():
    sources = {
        "a.x": "def f():\n    from a import y",
        "a.y": "from a.z import f",
        "a.z": "import a.x",
    }
    assert circles(sources) == [["a.x", "a.y", "a.z"]]
    assert circles(sources | {"a.z": "import math"}) == []


@pytest.mark.parametrize("source", ["from a import f", "from . import f", "import a"])
def test_a_circle_through_a_package_is_seen(source):
    sources = {"a.__init__": "from a.x import f\nfrom a.y import g", "a.x": source, "a.y": ""}
    assert circles(sources) == [["a.__init__", "a.x"]]
    assert circles(sources | {"a.x": "from a import y"}) == []


@pytest.mark.parametrize("module", MODULES)
def test_a_module_and_what_it_defines_have_different_names(module):
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    defined = {getattr(node, "name", None) for node in tree.body}
    assert module.rpartition(".")[2] not in defined


def test_equations_are_arithmetic():
    assert impurities(MODULES["dng_math.equations"].read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "body",
    ["abs(x)", "x if x else 0", "x < 1", "x ** 2", "x.sum()", "x[0]", "x and 1", "(lambda: x)()"],
)
def test_an_impure_equation_is_seen(body):
    assert impurities(f"def f(x):\n    return {body}") != []


def test_the_shared_modules_load_neither_numba_nor_scipy():
    code = "import sys, dng_math.equations, dng_math.rules, dng_math.trackers, "
    code += "dng_math.schedules; print({'numba', 'scipy'} & sys.modules.keys() or 'light')"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert run.stdout.strip() == "light"


def test_public_names_agree_in_the_three_places_that_list_them():
    source = MODULES["dng_math.__init__"].read_text(encoding="utf-8")
    for_checkers = {
        name.rpartition(".")[2]: name.split(".")[1]
        for name in imported(source, "dng_math.__init__")
        if within(name, {"dng_math"})
    }
    assert for_checkers == dng_math._HOME
    assert set(dng_math.__all__) == {*dng_math._HOME, "__version__"}


@pytest.mark.parametrize("name", dng_math.__all__)
def test_a_public_name_loads(name):
    assert getattr(dng_math, name) is not None
    assert name in dir(dng_math)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'guidence'"):
        dng_math.guidence  # noqa: B018
