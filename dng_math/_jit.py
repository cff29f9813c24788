"""Numba's compiler options, all decided here.

Two kinds of compiled function exist here.  A *scalar* is branch-free arithmetic on numbers;
it is forced inline, so that the loop that calls it becomes SIMD code.  A *kernel* loops over
arrays, releases the GIL (threads are Python's, see :func:`run_blocks`) and is cached on disk,
so that only the first process on a machine compiles.

``fastmath`` stays off: without it a scalar loop, its vectorised body and its remainder round
alike, and that is why sample ``i`` has the same bits whatever the batch around it.
``error_model="numpy"`` divides by zero as IEEE 754 does instead of branching to raise.

Numba recompiles a cached function when the file that defines it changes, but not when a function
that it calls changes in another file.  Here the stamp of every cached function is a hash of all
sources of the package, so stale machine code is never run after an edit or an upgrade.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

from numba import njit, types
from numba.extending import intrinsic


@lru_cache(maxsize=1)
def package_stamp() -> bytes:
    """Hash of all sources of this package."""
    digest = hashlib.sha256()
    package = Path(__file__).parent
    for source in sorted(package.rglob("*.py")):
        digest.update(source.relative_to(package).as_posix().encode() + source.read_bytes())
    return digest.digest()


def _compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    try:
        dispatcher = njit(error_model="numpy", cache=True, **options)(function)
    except RuntimeError:  # there is no writable cache directory
        return njit(error_model="numpy", **options)(function)
    dispatcher._cache._cache_file._source_stamp = package_stamp()
    return dispatcher


def scalar(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile arithmetic on numbers, to be inlined where it is called."""
    return _compiled(function, forceinline=True, no_cpython_wrapper=True, no_cfunc_wrapper=True)


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a loop over arrays, callable from Python without the GIL."""
    return _compiled(function, nogil=True, _nrt=True, no_cfunc_wrapper=True)


def block_kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a loop over a block of lanes, called by kernels only.

    It allocates nothing, so it is compiled without reference counts: their atomic updates, one
    for each view of a row, would cost as much as the arithmetic on the row.
    """
    return _compiled(function, _nrt=False, no_cpython_wrapper=True, no_cfunc_wrapper=True)


@intrinsic
def fma(typingctx, a, b, c):  # type: ignore[no-untyped-def]
    """``a * b + c`` with one rounding (IEEE 754 fusedMultiplyAdd)."""
    signature = types.float64(types.float64, types.float64, types.float64)

    def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.fma(*arguments)

    return signature, codegen


@intrinsic
def float_bits(typingctx, x):  # type: ignore[no-untyped-def]
    """The 64 bits of a double as an unsigned integer."""

    def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.bitcast(arguments[0], context.get_value_type(types.uint64))

    return types.uint64(types.float64), codegen


@intrinsic
def bits_float(typingctx, bits):  # type: ignore[no-untyped-def]
    """The double with the given 64 bits."""

    def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.bitcast(arguments[0], context.get_value_type(types.float64))

    return types.float64(types.uint64), codegen


def available_threads() -> int:
    """Number of cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@lru_cache(maxsize=8)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="dng_math")


def run_blocks(function: Callable[[int], None], n_blocks: int, threads: int | None = None) -> None:
    """Call ``function(block)`` for every block, on ``threads`` threads (default: all cores).

    Blocks are independent and each writes its own slice, so neither the number of threads nor
    the order in which blocks run can change a result.
    """
    threads = min(threads or available_threads(), n_blocks)
    if threads <= 1:
        for block in range(n_blocks):
            function(block)
        return
    for _ in _pool(threads).map(function, range(n_blocks)):
        pass


if hasattr(os, "register_at_fork"):
    # A forked child inherits the executor but not its threads, and would wait forever.
    os.register_at_fork(after_in_child=_pool.cache_clear)
