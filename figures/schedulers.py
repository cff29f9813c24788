"""Error of the tracked posterior with each scheduler of diffusers.

The network is an exact mixture in eight dimensions inside real pipelines, so that every error comes
from the scheduler or the tracker.  With the noise of the DDPM posterior (first column) the error
falls with the number of steps, whatever the scheduler.  With less noise (second column) it does
not, unless the divergence that the tracker lacks is estimated (third column).  With Stable
Diffusion's betas some error remains at any number of steps: they keep some signal at T, so that
p(c|x_T) is not the prior.  Flow matching, and betas rescaled to no signal at T, start from noise
alone.

The figure shows the paper's tracker; the printed table has the log-odds tracker too.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray

from dng_math import DynamicNegativeGuidance, GaussianMixture
from dng_math.distances import forbidden_mass
from dng_models.support.progress import progress_bar
from dng_models.support.threads import torch_threads
from figures import style

Array = NDArray[np.float64]

PAPER = "beyond it"
TITLE = "Tracked posteriors with diffusers' schedulers (needs torch and diffusers)"
MINUTES = 3
NEEDS = ("torch", "diffusers", "transformers")

SHAPE = (2, 2, 2)
DIMENSIONS = 8
MIXTURE = GaussianMixture(
    [0.25] * 4, np.random.default_rng(0).normal(size=(4, DIMENSIONS)), [0.25] * 4
)
FORBIDDEN = [0]
# Stable Diffusion's betas, with the spacing that starts runs of any length at the noisy end.
BETAS: dict[str, Any] = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "timestep_spacing": "trailing",
    "steps_offset": 1,
}
STEPS = (20, 50, 200, 1000)
QUICK_STEPS = (10, 20, 50)
PROBES = 1
TRACKERS: tuple[tuple[Literal["paper", "log-odds"], style.Method], ...] = (
    ("paper", style.DNG_PAPER),
    ("log-odds", style.DNG_LOG_ODDS),
)
DRAWN = 0  # index into TRACKERS


@dataclass(frozen=True)
class Row:
    """A scheduler of diffusers or of this project, and its settings."""

    label: str
    scheduler: str
    options: dict[str, Any]
    eta: float = 0.0  # argument of the pipeline's call, for DDIM
    probes: int = 0
    most_steps: int = 200

    @property
    def pure(self) -> bool:
        """Whether it starts from noise alone, without signal at T."""
        return "Flow" in self.scheduler or "rescale_betas_zero_snr" in self.options


GROUPS: dict[str, tuple[Row, ...]] = {
    r"noise of the DDPM posterior, $\eta=1$": (
        Row(r"DDPM (= DDIM, $\eta=1$)", "DDPMScheduler", {"clip_sample": False}, most_steps=1000),
        Row("Euler ancestral", "EulerAncestralDiscreteScheduler", {}),
        Row(
            "SDE-DPM-Solver++ 2M",
            "DPMSolverMultistepScheduler",
            {"algorithm_type": "sde-dpmsolver++"},
        ),
        Row("flow, posterior step", "PosteriorFlowScheduler", {}, most_steps=1000),
    ),
    r"less noise, $\eta<1$": (
        Row(r"DDIM, $\eta=0.5$", "DDIMScheduler", {"clip_sample": False}, eta=0.5),
        Row(r"DDIM, $\eta=0$", "DDIMScheduler", {"clip_sample": False}),
        Row("Euler", "EulerDiscreteScheduler", {}),
        Row("DPM-Solver++ 2M", "DPMSolverMultistepScheduler", {}),
        Row("UniPC", "UniPCMultistepScheduler", {}),
        Row("DEIS", "DEISMultistepScheduler", {}),
        Row("flow Euler", "FlowMatchEulerDiscreteScheduler", {}),
    ),
    r"less noise, $\eta<1$; divergence estimated": (
        Row(r"DDIM, $\eta=0$", "DDIMScheduler", {"clip_sample": False}, probes=PROBES),
        Row(
            r"DDIM, $\eta=0$, no signal at $T$",
            "DDIMScheduler",
            {
                "clip_sample": False,
                "rescale_betas_zero_snr": True,
                "prediction_type": "v_prediction",
            },
            probes=PROBES,
        ),
        Row("flow Euler", "FlowMatchEulerDiscreteScheduler", {}, probes=PROBES),
    ),
}
ROWS = tuple(row for rows in GROUPS.values() for row in rows)
# Text beside the curves, by group and by whether they start from noise alone; such curves are close
# to each other.
NAMES: dict[tuple[int, bool], str] = {
    (0, False): "DDPM,\nEuler ancestral,\nSDE-DPM-Solver++",
    (0, True): "flow,\nposterior step",
    (1, False): "DDIM ($\\eta=0.5$ lower),\nEuler, DPM-Solver++,\nUniPC, DEIS",
    (1, True): "flow Euler",
    (2, False): "DDIM",
    (2, True): "flow Euler;\nDDIM, no\nsignal at $T$",
}
TITLES = (
    "noise of the DDPM\nposterior, $\\eta=1$",
    "less noise, $\\eta<1$:\nwrong at any number of steps",
    "less noise, with the\ndivergence estimated",
)
STARTS = {
    False: (style.BLUE, "o", "some signal left at $T$ (Stable Diffusion's betas)"),
    True: (style.ORANGE, "s", "noise alone at $T$"),
}


@dataclass(frozen=True, eq=False)
class Data:
    """Axes: row, tracker, number of steps; NaN where a row is not run with so many steps."""

    steps: tuple[int, ...]
    error: Array  # mean |tracked - exact p(c|x)| before the last step, unguided
    correlation: Array  # correlation of tracked and exact p over the images
    mass: Array  # forbidden mass left at g = 1
    prior_error: float  # mean |prior - p(c|x_T)| with Stable Diffusion's betas
    n: int


def scheduler_of(row: Row) -> Any:
    """Make the scheduler of a row."""
    import diffusers

    from dng_models.pipelines import schedulers

    kind = getattr(schedulers, row.scheduler, None) or getattr(diffusers, row.scheduler)
    return kind(**row.options, **({} if "Flow" in row.scheduler else BETAS))


def compute(quick: bool = False, seed: int = 0) -> Data:
    """Run every row with both trackers, unguided and guided."""
    n, steps = (256, QUICK_STEPS) if quick else (1024, STEPS)
    with torch_threads(work=n * DIMENSIONS * MIXTURE.n_components):
        return _compute(n, steps, seed)


def _compute(n: int, steps: tuple[int, ...], seed: int) -> Data:
    from dng_models.pipelines.mixture_pipelines import mixture_pipeline, run_mixture

    shape = (len(ROWS), len(TRACKERS), len(steps))
    error, correlation, mass = (np.full(shape, np.nan) for _ in range(3))
    runs_of = [at for at in np.ndindex(shape) if steps[at[2]] <= ROWS[at[0]].most_steps]
    # The longest first, so that the remaining time is not underestimated.
    runs_of.sort(key=lambda at: -steps[at[2]])
    for i, j, k in progress_bar(runs_of, "schedulers", unit="run", leave=False):
        row, tracker = ROWS[i], TRACKERS[j][0]
        pipe = mixture_pipeline(MIXTURE, [FORBIDDEN], SHAPE, scheduler_of(row))
        runs = []
        for scale in (0.0, 1.0):
            rule = DynamicNegativeGuidance.tracked(scale, prior=0.25, tracker=tracker)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*tracked posterior is wrong")
                runs.append(
                    run_mixture(
                        pipe,
                        rule,
                        images=n,
                        steps=steps[k],
                        seed=seed,
                        eta=row.eta,
                        divergence_probes=row.probes,
                    )
                )
        unguided, guided = runs
        error[i, j, k], correlation[i, j, k] = unguided.error, unguided.correlation
        points = guided.latents.flatten(1).double().numpy()
        mass[i, j, k] = forbidden_mass(points, MIXTURE, FORBIDDEN)
    return Data(steps, error, correlation, mass, _prior_error(seed), n)


def _prior_error(seed: int) -> float:
    import diffusers

    alpha_bar = float(diffusers.DDPMScheduler(**BETAS).alphas_cumprod[-1])
    x = np.random.default_rng(seed).standard_normal((10_000, DIMENSIONS))
    noisy = MIXTURE.diffuse(alpha_bar**0.5, (1.0 - alpha_bar) ** 0.5)
    prior = MIXTURE.weights[FORBIDDEN].sum()
    return float(np.abs(prior - np.exp(noisy.log_posterior(x, FORBIDDEN))).mean())


@style.applied
def draw(data: Data) -> dict[str, Figure]:
    """Plot error and remaining forbidden mass over the number of steps, a column per group."""
    figure = Figure(figsize=(style.WIDTH, 5.0), layout="constrained")
    panels = figure.subplots(2, len(GROUPS), sharex=True, sharey="row")
    for line, values in enumerate((data.error, data.mass)):
        first = 0
        for group, rows in enumerate(GROUPS.values()):
            part = slice(first, first + len(rows))
            _curves(panels[line, group], data.steps, rows, values[part, DRAWN], group)
            first += len(rows)
    reference: dict[str, Any] = {"color": style.GREY, "lw": 1.0}
    prior = float(MIXTURE.weights[FORBIDDEN].sum())
    for group, (top, bottom) in enumerate(panels.T):
        style.title(top, "abc"[group], TITLES[group])
        style.title(bottom, "def"[group], "")
        top.axhline(data.prior_error, ls=":", **reference)
        bottom.axhline(prior, ls="--", **reference)
        bottom.set_xlabel("steps")
        for panel in (top, bottom):
            panel.grid(True)
    panels[0, 0].set_ylim(0.003, 0.5)
    panels[1, 0].set_ylim(0.003, 0.5)
    panels[0, 0].set_ylabel("mean $|$tracked $-$ exact$|$ of\n$p(c\\,|\\,x)$, unguided")
    panels[1, 0].set_ylabel("forbidden mass left\nat $g=1$")
    figure.suptitle(
        f"Exact mixture in {DIMENSIONS} dimensions as the network, paper's tracker, "
        f"{data.n:,} images a run",
        size=8,
    )
    figure.legend(
        handles=[
            *(
                Line2D([], [], color=color, marker=marker, label=label)
                for color, marker, label in STARTS.values()
            ),
            Line2D([], [], ls=":", label="$|$prior $-$ exact$|$ with that signal", **reference),
            Line2D([], [], ls="--", label=f"unguided: {prior:g}", **reference),
        ],
        loc="outside lower center",
        ncols=2,
    )
    return {"schedulers": figure}


def _curves(
    axes: Axes, steps: tuple[int, ...], rows: tuple[Row, ...], values: Array, group: int
) -> None:
    """Draw the curves of a group, and their names beside their ends."""
    ends: dict[bool, tuple[float, float]] = {}  # where the curves end, by kind of start
    for pure, (color, marker, _) in STARTS.items():
        last = []
        for row, value in zip(rows, values, strict=True):
            seen = np.isfinite(value)
            if row.pure != pure or not seen.any():
                continue
            x = np.array(steps)[seen]
            look: dict[str, Any] = {"lw": 1.0, "ms": 3.5, "mec": "white", "mew": 0.3}
            axes.plot(x, value[seen], color=color, marker=marker, **look)
            last.append((x[-1], value[seen][-1]))
        if last:
            height = np.exp(np.mean([np.log(y) for _, y in last]))
            ends[pure] = max(x for x, _ in last), float(height)
    for pure, at in ends.items():
        above = at[1] >= max(height for _, height in ends.values())  # keeps the names apart
        axes.annotate(
            NAMES[group, pure],
            at,
            (6, 4 if above else -4),
            textcoords="offset points",
            size=6.5,
            color=STARTS[pure][0],
            va="bottom" if above else "top",
            linespacing=0.95,
            path_effects=[withStroke(linewidth=2.0, foreground="white")],
        )
    axes.set(xscale="log", yscale="log", xlim=(steps[0] / 1.4, 20 * steps[-1]))
    axes.set_xticks(steps, [f"{count:g}" for count in steps])
    axes.set_xticks([], minor=True)
    style.log_ticks(axes.yaxis)


def summary(data: Data) -> str:
    """The results of both trackers as a table."""
    lines = ["mean error of p (correlation) -> forbidden mass left at g = 1"]
    width = max(len(style.plain(row.label)) for row in ROWS)
    at = 0
    for group, rows in GROUPS.items():
        lines.append(f"  {style.plain(group)}")
        for row in rows:
            for j, (tracker, _) in enumerate(TRACKERS):
                parts = [
                    f"{steps}: {data.error[at, j, k]:.4f} ({data.correlation[at, j, k]:.3f}) -> "
                    f"{data.mass[at, j, k]:.4f}"
                    for k, steps in enumerate(data.steps)
                    if np.isfinite(data.error[at, j, k])
                ]
                lines.append(
                    f"    {style.plain(row.label):{width}} {tracker:8}  {'; '.join(parts)}"
                )
            at += 1
    lines.append(
        f"  n = {data.n}; mean error already at t = T, from the prior: {data.prior_error:.4f}"
    )
    return "\n".join(lines)
