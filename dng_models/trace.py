"""What guidance did: when, for which image, and how strongly."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]

# Okabe and Ito's colours, told apart by colour-blind readers.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", "-.", ":")


# Leading digits of the labelled ticks of a logarithmic axis, the plainest first.
LEADS: tuple[tuple[float, ...], ...] = ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7))
FEWEST, MOST = 3, 7


@dataclass(eq=False)
class RunTrace:
    """One call of a pipeline: S steps, B images, M unwanted concepts.

    Attributes
    ----------
    scheduler : str
        Class name of the scheduler.
    concepts : int or None
        Number M of concepts, None if there is one that is not in a list.
    quantity : str
        What is tracked, as an axis is labelled.
    steps : list of int
        Step of the scheduler's run, from its noisy end.
    evaluations, evaluations_saved : int
        Predictions of an unwanted concept, one an image and concept, that were made and that
        were skipped.
    """

    scheduler: str
    concepts: int | None
    quantity: str = "posterior p(c | x)"
    steps: list[int] = field(default_factory=list)
    evaluations: int = 0
    evaluations_saved: int = 0
    # Nothing is known yet of what the sampler did with the first guided prediction.
    unconfirmed: bool = field(default=True, repr=False)
    # log p(c | x) after the last step that is known of.
    final: Tensor | None = field(default=None, repr=False)
    _timesteps: list[float] = field(default_factory=list, repr=False)
    _time: list[float] = field(default_factory=list, repr=False)
    # Left on the device until somebody looks: a copy would wait for the network.
    _log_posterior: list[Tensor] = field(default_factory=list, repr=False)
    _scale: list[Tensor] = field(default_factory=list, repr=False)

    def add(
        self, step: int, timestep: float, time: float, log_posterior: Tensor | None, scale: Tensor
    ) -> None:
        """Record a step."""
        self.steps.append(step)
        self._timesteps.append(timestep)
        self._time.append(time)
        if log_posterior is not None:
            self._log_posterior.append(log_posterior.detach().clone())
        self._scale.append(scale.detach().clone())

    @property
    def timesteps(self) -> Array:
        """What the network was told, shape (S,)."""
        return np.array(self._timesteps)

    @property
    def time(self) -> Array:
        """Diffusion time of the noisier end of every step, shape (S,); 1 is pure noise."""
        return np.array(self._time)

    @property
    def log_posterior(self) -> Tensor | None:
        """log p(c | x_t) that each step used, float32 on the CPU; for FBG the log ratio L.

        Shape (S, B), or (S, M, B) for several concepts; None for rules that track nothing.
        """
        return torch.stack(self._log_posterior).float().cpu() if self._log_posterior else None

    @property
    def final_log_posterior(self) -> Tensor | None:
        """log p(c | x) after the last step, float32 on the CPU; for FBG the log ratio L.

        Shape (B,), or (M, B) for several concepts: what a run that goes on with these latents
        takes as its ``initial_log_posterior``.  None for rules that track nothing.
        """
        if not self._log_posterior:
            return None
        last = self._log_posterior[-1] if self.final is None else self.final
        return last.detach().float().cpu()

    @property
    def scale(self) -> Tensor:
        """The scale lambda of every step and image, shape (S, B), float32 on the CPU.

        For several concepts that of their union, g sum_k p_k / (1 - sum_k p_k).
        """
        return torch.stack(self._scale).float().cpu() if self._scale else torch.zeros(0, 0)


class Trace:
    """What guidance did, run by run, and the way to take it off.

    Returned by :func:`dng_models.apply_guidance`; as a context manager it removes the guidance at
    the end of the block.

    Attributes
    ----------
    runs : list of RunTrace
        One a call of the pipeline, in order.  The properties below are those of the last one.
    """

    def __init__(self, remove: Callable[[], None] | None = None) -> None:
        self.runs: list[RunTrace] = []
        self._remove = remove

    def __enter__(self) -> Trace:
        """The trace itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Take the guidance off the pipeline."""
        if self._remove is not None:
            self._remove()

    def __getstate__(self) -> dict[str, Any]:
        """What a pickled trace keeps: the runs, and not the pipeline that was guided."""
        return {**self.__dict__, "_remove": None}

    def __repr__(self) -> str:
        """How much was seen."""
        if not self.runs:
            return "Trace(no run yet)"
        last = self.runs[-1]
        return f"Trace({len(self.runs)} runs; last: {last.scheduler}, {len(last.steps)} steps)"

    @property
    def last(self) -> RunTrace:
        """The last run.

        Raises
        ------
        ValueError
            If there was none.
        """
        if not self.runs:
            raise ValueError("trace must have a run: call the pipeline under the guidance first")
        return self.runs[-1]

    @property
    def timesteps(self) -> Array:
        """See :attr:`RunTrace.timesteps`."""
        return self.last.timesteps

    @property
    def time(self) -> Array:
        """See :attr:`RunTrace.time`."""
        return self.last.time

    @property
    def log_posterior(self) -> Tensor | None:
        """See :attr:`RunTrace.log_posterior`."""
        return self.last.log_posterior

    @property
    def final_log_posterior(self) -> Tensor | None:
        """See :attr:`RunTrace.final_log_posterior`."""
        return self.last.final_log_posterior

    @property
    def scale(self) -> Tensor:
        """See :attr:`RunTrace.scale`."""
        return self.last.scale

    @property
    def evaluations(self) -> int:
        """Predictions of unwanted concepts that were made, in all runs."""
        return sum(run.evaluations for run in self.runs)

    @property
    def evaluations_saved(self) -> int:
        """Predictions of unwanted concepts that were skipped, in all runs."""
        return sum(run.evaluations_saved for run in self.runs)

    def plot(self, path: str | Path) -> None:
        """Draw the scale, and the posterior if one is tracked, of every image over time.

        Parameters
        ----------
        path : str or Path
            File to write, in a folder that exists; its suffix (.png, .svg, .pdf) is the format.

        Raises
        ------
        ValueError, TypeError
            If the path is none that can be drawn to, or nothing was guided yet.
        OSError
            If the file cannot be written.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError(
                "trace.plot needs Matplotlib: pip install 'dng-toolkit[figures]'"
            ) from error

        file, run = _file(path), self.last
        if not run.steps:
            raise ValueError("trace must have a run with a guided step, and its last has none")
        log_posterior, scale = run.log_posterior, run.scale.numpy()
        panels = 1 if log_posterior is None else 2
        figure = Figure(figsize=(7.2, 0.6 + 2.2 * panels), dpi=200, layout="constrained")
        axes = figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0]
        images = scale.shape[1]
        # More lines than these cannot be told apart: then they are one cloud with its median.
        told_apart = images <= len(COLOURS)
        for image in range(images):
            look = (
                {"color": COLOURS[image], "label": f"image {image}"}
                if told_apart
                else {"color": COLOURS[0], "alpha": 0.25, "lw": 0.7}
            )
            axes[0].plot(run.time, scale[:, image], **look)
            if log_posterior is None:
                continue
            rows = log_posterior if log_posterior.ndim == 3 else log_posterior[:, None]
            for concept in range(rows.shape[1]):
                style = DASHES[concept % len(DASHES)]
                axes[1].plot(run.time, rows[:, concept, image].exp(), style, **look)
                look.pop("label", None)
        if not told_apart:
            axes[0].plot(run.time, np.median(scale, axis=1), color=COLOURS[1], label="median")
            axes[0].plot([], [], color=COLOURS[0], alpha=0.5, lw=0.7, label=f"{images} images")
        axes[0].set_ylabel("guidance scale λ")
        axes[0].set_ylim(bottom=min(0.0, float(scale.min(initial=0.0))))
        if log_posterior is not None:
            axes[1].set_ylabel(f"tracked {run.quantity}")
            _posterior_axis(axes[1].yaxis, log_posterior.exp().numpy())
        axes[-1].set_xlabel("diffusion time t/T (noise on the left, image on the right)")
        axes[-1].set_xlim(float(run.time.max()), min(0.0, float(run.time.min())))
        handles, labels = axes[0].get_legend_handles_labels()
        if log_posterior is not None and log_posterior.ndim == 3:
            for concept in range(log_posterior.shape[1]):
                style = DASHES[concept % len(DASHES)]
                handles.append(axes[1].plot([], [], style, color="#7F7F7F")[0])
                labels.append(f"concept {concept}")
        figure.legend(
            handles, labels, loc="outside upper center", ncols=4, fontsize=8, frameon=False
        )
        for panel in axes:
            panel.spines[["top", "right"]].set_visible(False)
        figure.savefig(file)


# ---------------------------------------------------------------------- the picture


def _file(path: Any) -> Path:
    """Where a picture can be drawn to."""
    from matplotlib.backend_bases import FigureCanvasBase

    if not isinstance(path, str | os.PathLike) or isinstance(path, bytes):
        raise TypeError(f"path must be a str or Path, got {path!r}")
    file = Path(path)
    suffix = file.suffix.removeprefix(".").lower()
    known = sorted(FigureCanvasBase.get_supported_filetypes())
    if suffix not in known:
        raise ValueError(
            f"path must end in one of {', '.join(f'.{each}' for each in known)}, got {str(path)!r}"
        )
    if not file.parent.is_dir():
        raise FileNotFoundError(
            f"path must be in a folder that exists, got {str(path)!r}: there is no folder "
            f"{file.parent}"
        )
    return file


def _posterior_axis(axis: Any, values: Array) -> None:
    """Logarithmic, of probabilities up to 1 where there are such."""
    known = values[np.isfinite(values) & (values > 0.0)]
    if known.size:
        low, high = float(known.min()), float(known.max())
        # Probabilities that come near 1 are read against it; likelihood ratios may lie above.
        top = high * 1.3 if high > 1.0 or high < 0.1 else 1.0
        readable_log_axis(axis, low / 1.3, top)


def readable_log_axis(axis: Any, low: float, high: float) -> None:
    """Make an axis logarithmic between two limits, with three labels or more.

    Parameters
    ----------
    axis : matplotlib.axis.Axis
        Of an axes that is not logarithmic yet.
    low, high : float
        Its limits, 0 < low < high.
    """
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

    vertical = axis.axis_name == "y"
    (axis.axes.set_yscale if vertical else axis.axes.set_xscale)("log")
    (axis.axes.set_ylim if vertical else axis.axes.set_xlim)(low, high)
    axis.set_major_locator(FixedLocator(_log_ticks(low, high)))
    axis.set_major_formatter(FuncFormatter(_written))
    axis.set_minor_formatter(NullFormatter())


def _log_ticks(low: float, high: float) -> list[float]:
    """Plain numbers between two positive ones, at least three; 1 if it is between them."""
    inside = (low * (1.0 - 1e-9), high * (1.0 + 1e-9))
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for leads in LEADS:
        ticks = [float(f"{lead}e{power}") for power in powers for lead in leads]
        ticks = [tick for tick in ticks if inside[0] <= tick <= inside[1]]
        if len(ticks) >= FEWEST:
            every = math.ceil(len(ticks) / MOST)
            return ticks[(ticks.index(1.0) if 1.0 in ticks else 0) % every :: every]
    # Over less than that a logarithmic axis is nearly a linear one.
    step = 10.0 ** math.floor(math.log10((high - low) / FEWEST))
    for each in (5.0 * step, 2.0 * step, step):
        first, last = math.ceil(inside[0] / each), math.floor(inside[1] / each)
        if last - first + 1 >= FEWEST:
            break
    return [each * number for number in range(first, last + 1)]


def _written(value: float, place: object = None) -> str:
    """A tick: 0.002, 50, or a power of ten beyond 1,000ths."""
    if 1e-3 <= value < 1e4:
        return f"{value:.10g}"
    lead, power = f"{value:.3e}".split("e")
    lead = lead.rstrip("0").rstrip(".")
    factor = "" if lead == "1" else rf"{lead}\times"
    return rf"${factor}10^{{{int(power)}}}$"
