"""Settings of all tests.

Hypothesis: no deadline (the first example compiles), and the same examples on every run.  Triton:
its interpreter where there is no GPU, chosen before the first kernel is defined.  Torch: one
thread, because the tests' work is so small that several threads only wait for each other.  Numba:
one cache for each of pytest-xdist's workers, because two processes that compile different
signatures of one function at once can leave an index that names the other's machine code.
"""

from __future__ import annotations

import importlib.util
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from dng_models.support.threads import torch_threads

settings.register_profile("suite", deadline=None, derandomize=True, max_examples=50)
settings.register_profile("search", deadline=None, max_examples=2000)
settings.load_profile("suite")

TESTS = Path(__file__).resolve().parent
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    cache = TESTS.parent / ".pytest_cache" / f"numba-{worker}"
    os.environ["NUMBA_CACHE_DIR"] = str(cache)

try:
    import torch
except ImportError:
    HAS_GPU = False
else:
    HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")


# Packages that the tests in a folder or file need in addition to those of dng_math.
NEEDED = {
    "kernels": ("torch",),
    "kernels/test_gpu.py": ("triton",),
    "kernels/test_layout.py": ("triton",),
    "models": ("torch", "diffusers", "transformers", "matplotlib"),
    "figures": ("matplotlib", "sklearn"),
    "figures/test_class_removal_networks.py": ("torch", "diffusers"),
    "figures/test_pipeline_digits.py": ("torch", "diffusers"),
    "figures/test_schedulers.py": ("torch", "diffusers"),
    "figures/test_text_to_image.py": ("torch", "diffusers", "transformers"),
    "benchmarks": ("torch", "matplotlib"),
    "house/test_choosing.py": ("torch", "diffusers", "transformers"),
    "house/test_docs.py": ("diffusers",),
    "house/test_results.py": ("torch", "diffusers", "matplotlib"),
}
MISSING = {
    place: missing
    for place, packages in NEEDED.items()
    if (missing := [name for name in packages if importlib.util.find_spec(name) is None])
}


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Ignore test files that need a package that is not installed."""
    return any(collection_path == TESTS / place for place in MISSING) or None


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Report the test files that were left out, as skipped tests are reported."""
    for place, packages in MISSING.items():
        terminalreporter.write_line(f"LEFT OUT tests/{place}: needs {', '.join(packages)}")


@pytest.hookimpl(tryfirst=True)  # before pytest deselects what is slow
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow what is thinned, and skip tests marked gpu where there is no GPU."""
    count: Counter[str] = Counter()
    for item in items:
        thinned = item.get_closest_marker("thinned")
        if thinned is None or item.get_closest_marker("slow"):
            continue
        test = item.nodeid.partition("[")[0]
        if count[test] % thinned.args[0]:
            item.add_marker(pytest.mark.slow)
        count[test] += 1
    if not HAS_GPU:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and there is none"))


@pytest.fixture
def kernel_device() -> str:
    """Device for Triton kernels: a GPU, or the CPU, where they are interpreted."""
    return "cuda" if HAS_GPU else "cpu"


@pytest.fixture(scope="module", autouse=True)
def one_thread_for_torch() -> Iterator[None]:
    with torch_threads(count=1):
        yield
