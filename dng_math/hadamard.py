"""Rows of a Hadamard matrix, as signs for estimates of a trace, on NumPy and torch alike."""

from __future__ import annotations

from typing import Any

_GOLDEN = 0.6180339887498949


def signs_of_row(index: int, places: Any, length: int) -> Any:
    """Signs of a row, in an order of rows in which parts of a cycle are balanced.

    Parameters
    ----------
    index : int
        The row's place in the order, which repeats after the next power of 2 from ``length``.
    places : ndarray or Tensor of int64
        Places in the row, from 0 and below ``length``.
    length : int
        Number of signs that are wanted of a row, at least 1.

    Returns
    -------
    ndarray or Tensor of int64, shape of places
        1 and -1.
    """
    # Multiples of the golden ratio: of rows that are near, also the leading bits differ.
    bits = max(1, (length - 1).bit_length())
    factor = round(_GOLDEN * 2**bits) | 1
    bits_set = places & (index * factor % 2**bits)
    for shift in (32, 16, 8, 4, 2, 1):
        bits_set = bits_set ^ (bits_set >> shift)
    return 1 - 2 * (bits_set & 1)
