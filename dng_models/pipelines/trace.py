"""Records of what guidance did at each step, to each image, and how strongly."""

from __future__ import annotations

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

from dng_models.support import style

Array = NDArray[np.float64]

COLOURS = [
    getattr(style, name)
    for name in ("BLUE", "VERMILLION", "GREEN", "PURPLE", "ORANGE", "SKY", "BLACK")
]
DASHES = ("-", "--", "-.", ":")


@dataclass(frozen=True)
class Question:
    """A question of :class:`dng_models.DynamicPrompts`, and what is held since.

    Attributes
    ----------
    step : int
        Index of the step whose images were looked at, 0 the noisiest.
    time : float
        Its diffusion time, 1 at pure noise.
    shown : tuple of tuple of str
        Names of the concepts that each image showed, which are held until the next question.
    error : str or None
        Why there was no answer; what was held before is then held on.
    """

    step: int
    time: float
    shown: tuple[tuple[str, ...], ...]
    error: str | None = None


@dataclass(eq=False)
class RunTrace:
    """Record of one call of a pipeline: S steps, B images, M unwanted concepts.

    Attributes
    ----------
    scheduler : str
        Class name of the scheduler.
    concepts : int or None
        Number M of concepts; None if there is a single one that was not given as a list.
    quantity : str
        Name of the tracked quantity, for the label of an axis.
    steps : list of int
        Indices of the steps in the scheduler's timesteps, 0 the noisiest.
    evaluations, evaluations_saved : int
        Numbers of unwanted predictions that were made and that were skipped; each image and
        concept counts.
    evaluations_of_images : list of int
        How many of them were made for each image.
    questions : list of Question
        What was asked of the images and answered, for :class:`dng_models.DynamicPrompts`.
    unconfirmed : bool
        Whether no step was completed yet, so that the effect of the first prediction is unknown.
    final : Tensor, optional
        log p(c | x) after the last completed step.
    """

    scheduler: str
    concepts: int | None
    quantity: str = "posterior p(c | x)"
    steps: list[int] = field(default_factory=list)
    evaluations: int = 0
    evaluations_saved: int = 0
    evaluations_of_images: list[int] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)
    unconfirmed: bool = field(default=True, repr=False)
    final: Tensor | None = field(default=None, repr=False)
    _timesteps: list[float] = field(default_factory=list, repr=False)
    _time: list[float] = field(default_factory=list, repr=False)
    # Kept on the device until they are read, because a copy would wait for the network.
    _log_posterior: list[Tensor] = field(default_factory=list, repr=False)
    _scale: list[Tensor] = field(default_factory=list, repr=False)

    def add(
        self, step: int, timestep: float, time: float, log_posterior: Tensor | None, scale: Tensor
    ) -> None:
        """Record a step.

        Parameters
        ----------
        step : int
            Index in the scheduler's timesteps.
        timestep, time : float
            The network's timestep, and the diffusion time in (0, 1].
        log_posterior : Tensor, shape (B,) or (M, B), optional
            log p(c | x_t) that the step used; None for rules that track nothing.
        scale : Tensor, shape (B,)
            The scale lambda of each image.
        """
        self.steps.append(step)
        self._timesteps.append(timestep)
        self._time.append(time)
        if log_posterior is not None:
            self._log_posterior.append(log_posterior.detach().clone())
        self._scale.append(scale.detach().clone())

    @property
    def timesteps(self) -> Array:
        """Timesteps that the network was given, shape (S,)."""
        return np.array(self._timesteps)

    @property
    def time(self) -> Array:
        """Diffusion time of the noisier end of every step, shape (S,); 1 is pure noise."""
        return np.array(self._time)

    @property
    def log_posterior(self) -> Tensor | None:
        """log p(c | x_t) that each step used, float32 on the CPU; FBG: log ratio L, CRG: evidence.

        Shape (S, B), or (S, M, B) for several concepts; None for rules that track nothing.
        """
        return torch.stack(self._log_posterior).float().cpu() if self._log_posterior else None

    @property
    def final_log_posterior(self) -> Tensor | None:
        """log p(c | x) after the last step, float32 on the CPU; FBG: log ratio L, CRG: evidence.

        Shape (B,), or (M, B) for several concepts; None for rules that track nothing.  A run that
        continues with these latents takes it as its ``initial_log_posterior``.
        """
        if not self._log_posterior:
            return None
        last = self._log_posterior[-1] if self.final is None else self.final
        return last.detach().float().cpu()

    @property
    def scale(self) -> Tensor:
        """The scale lambda of every step and image, shape (S, B), float32 on the CPU.

        For several concepts it is that of their union, g sum_k p_k / (1 - sum_k p_k).
        """
        return torch.stack(self._scale).float().cpu() if self._scale else torch.zeros(0, 0)


class Trace:
    """Record of what guidance did in each run; as a context manager it also removes the guidance.

    :func:`dng_models.apply_guidance` returns it.

    Parameters
    ----------
    remove : callable, optional
        Called at the end of the ``with`` block, to remove the guidance.

    Attributes
    ----------
    runs : list of RunTrace
        One for each call of the pipeline, in order.  The properties of RunTrace are here those of
        the last run, except that ``evaluations`` and ``evaluations_saved`` sum over all runs.
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
        """Remove the guidance from the pipeline."""
        if self._remove is not None:
            self._remove()

    def __getstate__(self) -> dict[str, Any]:
        """State for pickle: the runs, without the function that refers to the guided pipeline."""
        return {**self.__dict__, "_remove": None}

    def __repr__(self) -> str:
        """Number of runs, and scheduler and number of steps of the last one."""
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
            If there was no run yet.
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
        """Number of unwanted predictions that were made, in all runs."""
        return sum(run.evaluations for run in self.runs)

    @property
    def evaluations_saved(self) -> int:
        """Number of unwanted predictions that were skipped, in all runs."""
        return sum(run.evaluations_saved for run in self.runs)

    @property
    def questions(self) -> list[Question]:
        """See :class:`RunTrace`."""
        return self.last.questions

    def plot(self, path: str | Path) -> None:
        """Draw every image's scale, and its posterior if one is tracked, over diffusion time.

        Parameters
        ----------
        path : str or Path
            File to write, in a folder that exists; its suffix (.png, .svg, .pdf) gives the format.

        Raises
        ------
        ValueError, TypeError
            If the path is not a str or Path with a known suffix, or nothing was guided yet.
        OSError
            If the folder does not exist or the file cannot be written.
        ImportError
            If Matplotlib is not installed.
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
        # More lines cannot be told apart by colour: draw them as one cloud with its median.
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
                dashes = DASHES[concept % len(DASHES)]
                axes[1].plot(run.time, rows[:, concept, image].exp(), dashes, **look)
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
                dashes = DASHES[concept % len(DASHES)]
                handles.append(axes[1].plot([], [], dashes, color=style.GREY)[0])
                labels.append(f"concept {concept}")
        figure.legend(
            handles, labels, loc="outside upper center", ncols=4, fontsize=8, frameon=False
        )
        for panel in axes:
            panel.spines[["top", "right"]].set_visible(False)
        figure.savefig(file)


# ---------------------------------------------------------------------- the picture


def _file(path: Any) -> Path:
    """The path of the figure, checked."""
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
    """Make an axis logarithmic, with limits that fit the positive values."""
    known = values[np.isfinite(values) & (values > 0.0)]
    if known.size:
        low, high = float(known.min()), float(known.max())
        # End at 1 if probabilities come near it; likelihood ratios may exceed 1.
        top = high * 1.3 if high > 1.0 or high < 0.1 else 1.0
        style.log_axis(axis, low / 1.3, top)
