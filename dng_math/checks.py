"""Argument checks of public functions, with uniform error messages.

Each function returns the checked value, converted, or raises TypeError or ValueError.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Collection
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

_NO_REAL = (bool, np.bool_, str, bytes, complex, np.complexfloating)


def shown(value: object) -> str:
    """The repr of a value for an error message, cut to a line or two."""
    try:
        text = repr(value)
    except Exception:  # the repr of a user's object may fail
        text = f"an object of {type(value)}"
    return text if len(text) <= 160 else f"{text[:120]}... ({type(value).__name__})"


def real(name: str, value: object, allowed: str, low: float, high: float, *, closed: str) -> float:
    """A finite float between low and high; ``closed`` marks included ends: "[]", "(]"..."""
    if isinstance(value, (bool, np.bool_, str, bytes)) or not np.isscalar(value):
        raise TypeError(f"{name} must be a real number ({allowed}), got {shown(value)}")
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a real number ({allowed}), got {shown(value)}") from None
    except OverflowError:
        number = math.inf
    above = number >= low if closed[0] == "[" else number > low
    below = number <= high if closed[1] == "]" else number < high
    if not (math.isfinite(number) and above and below):
        raise ValueError(f"{name} must be {allowed}, got {shown(value)}")
    return number


def finite(name: str, value: object) -> float:
    """A finite float."""
    return real(name, value, "finite", -math.inf, math.inf, closed="()")


def non_negative(name: str, value: object) -> float:
    """A finite float, zero or more."""
    return real(name, value, "finite and >= 0", 0.0, math.inf, closed="[)")


def positive(name: str, value: object) -> float:
    """A finite float above zero."""
    return real(name, value, "finite and > 0", 0.0, math.inf, closed="()")


def integer(name: str, value: object, low: int, high: int | None = None) -> int:
    """An int from low to high (included)."""
    allowed = f">= {low}" if high is None else f"from {low} to {high}"
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be an integer {allowed}, got {shown(value)}")
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    # A tensor without data, as on torch's meta device, raises RuntimeError.
    except (TypeError, RuntimeError):
        raise TypeError(f"{name} must be an integer {allowed}, got {shown(value)}") from None
    if number < low or (high is not None and number > high):
        raise ValueError(f"{name} must be an integer {allowed}, got {shown(value)}")
    return number


def size(name: str, value: object, low: int) -> int:
    """An int that can be the length of an array: from low to 2^40."""
    number = integer(name, value, low)
    if number > 2**40:
        raise ValueError(f"{name} must be an integer from {low} to 2^40, got {shown(value)}")
    return number


def choice(name: str, value: object, allowed: Collection[str]) -> str:
    """One of the allowed strings."""
    if not isinstance(value, str) or value not in allowed:
        listed = ", ".join(repr(option) for option in allowed)
        raise ValueError(f"{name} must be one of {listed}; got {shown(value)}")
    return value


def boolean(name: str, value: object) -> bool:
    """True or False."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False, got {shown(value)}")
    return bool(value)


def numpy_array(name: str, value: object, of: str) -> NDArray[Any]:
    """The value as a NumPy array of any dtype; refuses masked values and what NumPy cannot read.

    Parameters
    ----------
    name : str
        Name of the argument, for the message.
    value : array_like
        Anything NumPy can read; a masked array only if its mask hides nothing.
    of : str
        What the array should hold, for the message.

    Raises
    ------
    TypeError
        If NumPy cannot read the value, for example a torch tensor on a GPU or with a gradient.
    ValueError
        If values are masked.
    """
    hidden = _hidden(value)
    if hidden:
        raise ValueError(
            f"{name} must be an array of {of} and hide none, got a masked array with {hidden} "
            "masked: leave them out (compressed()) or give them a value (filled())"
        )
    try:
        return np.asarray(value)
    # Which error a tensor raises depends on its library and on the reason.
    except (TypeError, ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        if "inhomogeneous" in reason:
            raise TypeError(
                f"{name} must be an array of {of}, got a ragged list, whose parts differ in "
                f"length: {shown(value)}"
            ) from None
        cure = ""
        if _holds_tensor(value):
            cure = (
                f"; give {name}.detach().float().cpu().numpy() of a tensor (.double() of float64)"
            )
        raise TypeError(f"{name} must be an array of {of}: {reason}{cure}") from None


def _hidden(value: object) -> int:
    """Number of masked values, also of arrays in lists, where NumPy would unmask them."""
    if isinstance(value, np.ma.MaskedArray):
        return int(np.count_nonzero(np.ma.getmaskarray(value)))
    if isinstance(value, (list, tuple)):
        return sum(map(_hidden, value))
    return 0


def _holds_boolean(value: object) -> bool:
    """Whether a nested list contains a boolean, which NumPy would turn into 0 or 1."""
    if isinstance(value, (list, tuple)):
        return any(map(_holds_boolean, value))
    return isinstance(value, (bool, np.bool_))


def _holds_tensor(value: object) -> bool:
    """Whether a value is or contains a torch tensor; works without importing torch."""
    if isinstance(value, (list, tuple)):
        return any(map(_holds_tensor, value))
    return hasattr(value, "detach") and hasattr(value, "requires_grad")


def reals(name: str, value: ArrayLike) -> NDArray[np.float64]:
    """A float64 array of any shape, finite or not."""
    if type(value) is np.ndarray and value.dtype == np.float64:
        return value
    result = numpy_array(name, value, "real numbers")
    if np.iscomplexobj(result):
        raise TypeError(f"{name} must be an array of real numbers, got complex ones")
    if isinstance(value, (list, tuple)) and _holds_boolean(value):
        raise TypeError(f"{name} must be an array of real numbers, got booleans: {shown(value)}")
    # NumPy would read "0.5" as a number, a mask as ones and zeros, and a date as nanoseconds.
    foreign = {
        "b": "booleans",
        "U": "strings",
        "S": "bytes",
        "M": "dates",
        "m": "durations",
        "V": "records",
    }
    found = foreign.get(result.dtype.kind)
    if result.dtype == object:
        # In an object array it would also read None as NaN, and 1 + 0j as 1.
        wrong = [v for v in result.flat if v is None or isinstance(v, _NO_REAL)]
        found = shown(wrong[0]) if wrong else None
    if found is not None:
        raise TypeError(f"{name} must be an array of real numbers, got {found}")
    try:
        return result.astype(np.float64, copy=False)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be an array of real numbers, got {shown(value)}") from None
    except OverflowError:
        raise ValueError(
            f"{name} must be an array of numbers that float64 can hold, got {shown(value)}"
        ) from None


def known(name: str, value: ArrayLike) -> NDArray[np.float64]:
    """A float64 array of any shape without NaN; infinities are allowed."""
    result = reals(name, value)
    if np.isnan(result).any():
        bad = tuple(int(i) for i in np.argwhere(np.isnan(result))[0])
        raise ValueError(f"{name} must not be NaN, got NaN at index {bad}")
    return result


def array(name: str, value: ArrayLike, shape: tuple[int | str, ...]) -> NDArray[np.float64]:
    """A finite float64 array of the given shape; names in the shape stand for any length."""
    result = reals(name, value)
    wanted = "(" + ", ".join(str(length) for length in shape) + ("," if len(shape) == 1 else "")
    if result.ndim != len(shape) or any(
        isinstance(length, int) and length != actual
        for length, actual in zip(shape, result.shape, strict=True)
    ):
        raise ValueError(f"{name} must have shape {wanted}), got {result.shape}")
    if not np.isfinite(result).all():
        bad = tuple(int(i) for i in np.argwhere(~np.isfinite(result))[0])
        raise ValueError(f"{name} must be finite, got {result[bad]} at index {bad}")
    return result


def filled(name: str, value: ArrayLike, shape: tuple[int | str, ...]) -> NDArray[np.float64]:
    """A finite float64 array of the given shape with at least one entry."""
    result = array(name, value, shape)
    if result.size == 0:
        raise ValueError(f"{name} must not be empty, got shape {result.shape}")
    return result


def generator(name: str, value: object) -> np.random.Generator:
    """A random generator: the one given, one made from a seed, or an unseeded one for None."""
    sources = (np.random.Generator, np.random.BitGenerator, np.random.SeedSequence)
    if value is None or isinstance(value, sources):
        return np.random.default_rng(value)
    try:
        seed = integer(name, value, 0)
    except TypeError:
        raise TypeError(
            f"{name} must be a numpy.random.Generator, an integer seed >= 0 or None, "
            f"got {shown(value)}"
        ) from None
    return np.random.default_rng(seed)


def frozen(values: Any) -> NDArray[Any]:
    """A read-only copy."""
    copy = np.array(values)
    copy.flags.writeable = False
    return copy


class ReadOnly:
    """Base class that keeps arrays read-only in copies and after unpickling; NumPy does not.

    Cached properties are not copied: a copy computes them again when needed.
    """

    def __getstate__(self) -> dict[str, Any]:
        """All attributes except cached properties."""
        return {
            name: value
            for name, value in self.__dict__.items()
            if not isinstance(getattr(type(self), name, None), cached_property)
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the attributes and make their arrays read-only again."""
        for value in state.values():
            if isinstance(value, np.ndarray):
                value.flags.writeable = False
        self.__dict__.update(state)
