"""How far a tracked posterior can be trusted with each scheduler of diffusers.

The network is an exact mixture in eight dimensions inside real pipelines, so that every error is
the scheduler's or the tracker's: steps that are finite, of some order, with the noise of the DDPM
posterior or less.  With that noise (the first group of rows) more steps help, whatever the
scheduler.  With less they do not (the second), unless the divergence that the tracker lacks is
estimated (the third).  What many steps leave with Stable Diffusion's betas was there at the start:
they keep some signal at T, so that p(c|x_T) is not the prior.  Flow matching, and betas that are
rescaled to no signal at T, start from noise alone.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from dng_math import GaussianMixture
from dng_math.distances import forbidden_mass
from dng_models.progress import progress
from dng_models.threads import torch_threads
from figures import style

Array = NDArray[np.float64]

PAPER = "beyond it"
TITLE = "Tracked posteriors with diffusers' schedulers (needs torch and diffusers)"
NEEDS = ("torch", "diffusers", "transformers")

SHAPE = (2, 2, 2)
DIMENSIONS = 8
MIXTURE = GaussianMixture(
    [0.25] * 4, np.random.default_rng(0).normal(size=(4, DIMENSIONS)), [0.25] * 4
)
FORBIDDEN = [0]
# Stable Diffusion's, and the spacing with which a run of any length begins at the noisy end.
BETAS: dict[str, Any] = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "timestep_spacing": "trailing",
    "steps_offset": 1,
}
STEPS = (20, 50, 200, 1000)
QUICK_STEPS = (20, 50)
PROBES = 1
TRACKERS: tuple[tuple[Literal["paper", "log_odds"], style.Method], ...] = (
    ("paper", style.DNG_PAPER),
    ("log_odds", style.DNG_LOG_ODDS),
)
SIZES = {20: 2.5, 50: 4.0, 200: 5.5, 1000: 7.5}  # of markers, by number of steps


@dataclass(frozen=True)
class Row:
    """A scheduler of diffusers, or of ours, and how it is used."""

    label: str
    scheduler: str
    options: dict[str, Any]
    eta: float = 0.0  # of the pipeline's call, for DDIM
    probes: int = 0
    most_steps: int = 200


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


@dataclass(frozen=True, eq=False)
class Data:
    """Axes: row, tracker, number of steps; not a number where a row is not run with so many."""

    steps: tuple[int, ...]
    error: Array  # mean |tracked - exact p(c|x)| before the last step, unguided
    correlation: Array  # of the two over the images
    mass: Array  # forbidden mass left at g = 1
    prior_error: float  # mean |prior - p(c|x_T)| with Stable Diffusion's betas
    n: int


def scheduler_of(row: Row) -> Any:
    """A new scheduler of a row."""
    import diffusers

    from dng_models import schedulers

    kind = getattr(schedulers, row.scheduler, None) or getattr(diffusers, row.scheduler)
    return kind(**row.options, **({} if "Flow" in row.scheduler else BETAS))


def compute(quick: bool = False, seed: int = 0) -> Data:
    """Unguided and guided runs of every row with both trackers."""
    n, steps = (256, QUICK_STEPS) if quick else (1024, STEPS)
    with torch_threads(work=n * DIMENSIONS * MIXTURE.n_components):
        return _compute(n, steps, seed)


def _compute(n: int, steps: tuple[int, ...], seed: int) -> Data:
    from dng_models.exact import mixture_pipeline, run_mixture
    from dng_models.guidance import DynamicNegative

    shape = (len(ROWS), len(TRACKERS), len(steps))
    error, correlation, mass = (np.full(shape, np.nan) for _ in range(3))
    runs_of = [at for at in np.ndindex(shape) if steps[at[2]] <= ROWS[at[0]].most_steps]
    # The longest first, so that the time left is not thought too short.
    runs_of.sort(key=lambda at: -steps[at[2]])
    for i, j, k in progress(runs_of, "schedulers", unit="run", leave=False):
        row, tracker = ROWS[i], TRACKERS[j][0]
        pipe = mixture_pipeline(MIXTURE, [FORBIDDEN], SHAPE, scheduler_of(row))
        runs = []
        for scale in (0.0, 1.0):
            rule = DynamicNegative(scale, prior=0.25, tracker=tracker)
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
    """One figure: error and forbidden mass left, a line for each scheduler."""
    figure = Figure(figsize=(style.WIDTH, 5.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    heights = _heights()
    for axes, values in ((left, data.error), (right, data.mass)):
        _dots(axes, values, heights, data.steps)
        axes.set_xscale("log")
        axes.grid(True, axis="x")
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.set_ylim(min(heights) - 0.7, max(heights) + 1.4)
    left.set_yticks(heights, [row.label for row in ROWS])
    _name_groups(left, heights)
    prior = float(MIXTURE.weights[FORBIDDEN].sum())
    reference: dict[str, Any] = {"color": style.GREY, "lw": 1.0}
    left.axvline(data.prior_error, ls=":", **reference)
    right.axvline(prior, ls="--", **reference)
    left.set_xlim(4e-3, 0.3)
    left.set_xticks(
        [0.005, 0.01, 0.02, 0.05, 0.1, 0.2], ["0.005", "0.01", "0.02", "0.05", "0.1", "0.2"]
    )
    right.set_xlim(3e-3, 0.4)
    right.set_xticks(
        [0.005, 0.01, 0.02, 0.05, 0.1, 0.2], ["0.005", "0.01", "0.02", "0.05", "0.1", "0.2"]
    )
    left.set_xlabel("mean $|$tracked $-$ exact$|$ of $p(c\\,|\\,x)$\nat the last step, unguided")
    right.set_xlabel("forbidden mass left\nat $g=1$")
    style.title(left, "a", "error of the posterior")
    style.title(right, "b", "what guidance leaves of the unwanted")
    figure.suptitle(
        f"The network is an exact mixture in {DIMENSIONS} dimensions, {data.n:,} images a run",
        size=8,
    )
    figure.legend(handles=_handles(data, reference, prior), loc="outside lower center", ncols=4)
    return {"schedulers": figure}


def _heights() -> list[float]:
    """Where each row stands, from the top, with a line's space above each group for its name."""
    heights, at = [], 0.0
    for rows in GROUPS.values():
        at -= 1.0
        for _ in rows:
            heights.append(at)
            at -= 1.0
    return heights


def _dots(axes: Axes, values: Array, heights: list[float], steps: tuple[int, ...]) -> None:
    for row, height in enumerate(heights):
        for tracker, (offset, (_, method)) in enumerate(zip((0.17, -0.17), TRACKERS, strict=True)):
            seen = np.isfinite(values[row, tracker])
            x, y = values[row, tracker][seen], np.full(seen.sum(), height + offset)
            axes.plot(x, y, color=method.color, lw=0.8, alpha=0.6)
            # The largest first, so that none is hidden.
            for at, count in sorted(
                zip(x, np.array(steps)[seen], strict=True), key=lambda dot: -dot[1]
            ):
                axes.plot(
                    at,
                    height + offset,
                    method.marker,
                    color=method.color,
                    markersize=SIZES[int(count)],
                    markeredgecolor="white",
                    markeredgewidth=0.4,
                )


def _name_groups(axes: Axes, heights: list[float]) -> None:
    first = 0
    for name, rows in GROUPS.items():
        axes.text(
            0.0,
            heights[first] + 0.78,
            name,
            transform=axes.get_yaxis_transform(),
            size=7.5,
            weight="bold",
            va="center",
            zorder=5,
            bbox={"color": "white", "pad": 1.0},
        )
        first += len(rows)


def _handles(data: Data, reference: dict[str, Any], prior: float) -> list[Line2D]:
    trackers = [
        Line2D([], [], color=method.color, marker=method.marker, lw=0.8, label=f"{name} tracker")
        for name, method in (("paper's", TRACKERS[0][1]), ("log-odds", TRACKERS[1][1]))
    ]
    sizes = [
        Line2D(
            [],
            [],
            color=style.GREY,
            marker="o",
            ls="",
            markersize=SIZES[count],
            label=f"{count} steps",
        )
        for count in data.steps
    ]
    lines = [
        Line2D(
            [],
            [],
            ls=":",
            label="$|$prior $-$ exact$|$ at $t=T$, Stable Diffusion's betas",
            **reference,
        ),
        Line2D([], [], ls="--", label=f"unguided: {prior:g}", **reference),
    ]
    return [*trackers, *lines, *sizes]


def summary(data: Data) -> str:
    """Everything that is drawn, as a table."""
    lines = ["mean error of p (correlation) -> forbidden mass left at g = 1"]
    width = max(len(_plain(row.label)) for row in ROWS)
    at = 0
    for name, rows in GROUPS.items():
        lines.append(f"  {_plain(name)}")
        for row in rows:
            for j, (tracker, _) in enumerate(TRACKERS):
                parts = [
                    f"{steps}: {data.error[at, j, k]:.4f} ({data.correlation[at, j, k]:.3f}) -> "
                    f"{data.mass[at, j, k]:.4f}"
                    for k, steps in enumerate(data.steps)
                    if np.isfinite(data.error[at, j, k])
                ]
                lines.append(f"    {_plain(row.label):{width}} {tracker:8}  {'; '.join(parts)}")
            at += 1
    lines.append(
        f"  n = {data.n}; mean error already at t = T, from the prior: {data.prior_error:.4f}"
    )
    return "\n".join(lines)


def _plain(label: str) -> str:
    """A label without its mathematics' markup."""
    spaced = label.replace("$", "").replace(r"\eta", "eta").replace("=", " = ").replace("<", " < ")
    return " ".join(spaced.split())
