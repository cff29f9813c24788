"""Figure of a calibration: reliability, losses over diffusion time and the fitted weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dng_models.support import extras, style
from dng_models.support.printable import drawable
from dng_models.support.style import (
    BLACK,
    BLUE,
    DASHED,
    DOTTED,
    GREEN,
    GREY,
    MIXED,
    ORANGE,
    SKY,
    SOLID,
    WIDTH,
)

with extras.needed_by("dng_models.class_removal.plot"):
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = NDArray[np.float64]


@style.applied
def reliability(calibration: Mapping[str, Any]) -> Figure:
    """How far a tracked posterior can be trusted, before and after calibration.

    Parameters
    ----------
    calibration : mapping
        Entries:

        - ``times`` (T,), diffusion time t/T
        - ``after`` and, optionally, ``before``, ``prior`` (a posterior that stays at the prior) and
          ``constant`` (a weight that does not vary): each with ``log_loss`` and ``brier`` (T,) and,
          optionally, ``log_loss_low``, ``log_loss_high``, ``brier_low`` and ``brier_high``
        - ``reliability``, with ``after`` and, optionally, ``before``: each with ``confidence``,
          ``frequency``, ``low``, ``high`` and ``count`` (B,); bins with count 0 are not drawn
        - ``profile``, the fitted weight of the evidence (the temperature), with ``times`` and
          ``values`` (K,) and, optionally, ``low`` and ``high``
        - ``label``, optional, a title

    Returns
    -------
    Figure
        Four panels: reliability diagram, log loss, Brier score, weight.

    Raises
    ------
    ValueError
        If an entry is missing.
    """
    for name in ("times", "after", "reliability", "profile"):
        if name not in calibration:
            raise ValueError(f"calibration must have {name!r}, got {', '.join(calibration)}")
    looks = {
        "prior": ("the prior alone", GREY, DOTTED, "v"),
        "before": ("before calibration", ORANGE, MIXED, "^"),
        "constant": ("calibrated, one weight", SKY, DASHED, "D"),
        "after": ("calibrated", BLUE, SOLID, "s"),
    }
    figure = Figure(figsize=(WIDTH, 4.9), layout="constrained")
    panels = figure.subplots(2, 2)
    if calibration.get("label"):
        figure.suptitle(drawable(calibration["label"]))
    axes = panels[0, 0]
    axes.plot([0.0, 1.0], [0.0, 1.0], color=BLACK, lw=0.6, ls=DASHED)
    for name, diagram in calibration["reliability"].items():
        _, color, line, marker = looks[name]
        _draw_reliability(axes, diagram, color, line, marker)
    axes.set_xlim(-0.03, 1.03)
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("tracked posterior of the class")
    axes.set_ylabel("share that is of the class")
    axes.text(0.98, 0.03, "larger: fuller bins", transform=axes.transAxes, size=6.5, ha="right")
    style.title(axes, "a", "reliability")
    times = np.array(calibration["times"], dtype=np.float64)
    for axes, letter, quantity, text in (
        (panels[0, 1], "b", "log_loss", "log loss (nats)"),
        (panels[1, 0], "c", "brier", "Brier score"),
    ):
        drawn = []
        for name, (label, color, line, _) in looks.items():
            losses = calibration.get(name)
            if losses is None or quantity not in losses:
                continue
            values = np.array(losses[quantity], dtype=np.float64)
            drawn.append(values)
            _band(axes, times, losses, quantity, color)
            axes.plot(times, values, color=color, ls=line, label=label)
        every = np.concatenate(drawn)
        if every.min() > 0.0 and every.max() > 30.0 * every.min():
            axes.set_yscale("log")
            style.log_ticks(axes.yaxis)
        else:
            axes.set_ylim(bottom=0.0)
        axes.set_ylabel(text)
        style.title(axes, letter, text.split(" (")[0] + " through time")
    axes = panels[1, 1]
    profile = calibration["profile"]
    at = np.array(profile["times"], dtype=np.float64)
    axes.axhline(1.0, color=BLACK, lw=0.6, ls=DASHED)
    if "low" in profile and "high" in profile:
        low, high = (np.array(profile[end], dtype=np.float64) for end in ("low", "high"))
        axes.fill_between(at, low, high, color=GREEN, alpha=0.25, lw=0, label="95% interval")
    axes.plot(at, np.array(profile["values"], dtype=np.float64), color=GREEN, label="fitted weight")
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    axes.set_ylabel("weight of the evidence")
    axes.legend(loc="best")
    style.title(axes, "d", "fitted weight")
    start, end = max(times.max(), at.max()), min(times.min(), at.min(), 0.0)
    for axes in panels.flat[1:]:
        axes.set_xlim(start, end)
        axes.set_xlabel("diffusion time $t/T$")
    figure.legend(*panels[0, 1].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def _band(axes: Axes, times: Array, values: Mapping[str, Any], quantity: str, color: str) -> None:
    """Draw the interval of a curve as a band, if it is known."""
    if f"{quantity}_low" in values and f"{quantity}_high" in values:
        low, high = (
            np.array(values[f"{quantity}_{end}"], dtype=np.float64) for end in ("low", "high")
        )
        axes.fill_between(times, low, high, color=color, alpha=0.2, lw=0)


def _draw_reliability(
    axes: Axes, diagram: Mapping[str, Any], color: str, line: Any, marker: str
) -> None:
    """Draw points with bars; the size of a point grows with the count of its bin."""
    count = np.array(diagram["count"], dtype=np.float64)
    kept = count > 0
    x, y, low, high = (
        np.array(diagram[name], dtype=np.float64)[kept]
        for name in ("confidence", "frequency", "low", "high")
    )
    axes.vlines(x, low, high, color=color, lw=0.6)
    axes.plot(x, y, color=color, ls=line, lw=0.8)
    size = 6.0 + 10.0 * np.log10(count[kept])
    axes.scatter(x, y, s=size, color=color, marker=marker, lw=0, zorder=2.5)
