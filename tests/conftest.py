"""What every test runs under.

Hypothesis: no deadline (the first example compiles), and the same examples on every run.  Triton:
its interpreter where there is no GPU, chosen before the first kernel is defined.  Torch: one
thread, for all that tests give it is so small that several only wait for each other.  Numba: a
cache of its own for each of pytest-xdist's workers, since two processes that compile different
signatures of one function at once can leave an index that names the other's machine code.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from dng_models.threads import torch_threads

settings.register_profile("suite", deadline=None, derandomize=True, max_examples=50)
settings.register_profile("search", deadline=None, max_examples=2000)
settings.load_profile("suite")

if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    cache = Path(__file__).resolve().parent.parent / ".pytest_cache" / f"numba-{worker}"
    os.environ["NUMBA_CACHE_DIR"] = str(cache)

try:
    import torch
except ImportError:
    HAS_GPU = False
else:
    HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu are skipped, with the reason, where there is none."""
    if not HAS_GPU:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and there is none"))


@pytest.fixture
def kernel_device() -> str:
    """Where Triton kernels run: compiled on a GPU, else interpreted on the CPU."""
    return "cuda" if HAS_GPU else "cpu"


@pytest.fixture(scope="module", autouse=True)
def one_thread_for_torch() -> Iterator[None]:
    with torch_threads(count=1):
        yield
