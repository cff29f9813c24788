"""Class removal on real images without training: an exact model of the digits forgets the 0.

The model is the mixture of Gaussians on 1,797 scanned digits.  Its predictions, its posterior and
the target distribution are therefore exact, and methods differ only by their guidance.  All use the
same noise: image i is the same under every method until guidance changes it.

A classifier that was trained on half of the data judges every image.  Safety is the share that
it calls a 0.  SLD and contrastive CFG are shown with the gate and the temperature that
``class_removal_tuned`` finds best; that figure compares all methods at equal safety, also in
limited intervals.

Below g = 1/2 the log-odds tracker can run away, and the curves show where it does.  The push that
it causes, -g o (mu_neg - mu), adds evidence against the class in proportion to 1 + (2g - 1) o.
With g < 1/2 and odds o above 1/(1 - 2g) that becomes evidence for the class, so odds that are too
high grow with every push.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray
from scipy import stats
from threadpoolctl import threadpool_limits

from dng_math import (
    DynamicNegativeGuidance,
    ExactPosterior,
    LogOddsTracker,
    NegativePrompting,
    NoiseSchedule,
    PaperTracker,
    SafeLatentDiffusion,
    Unguided,
    sample,
)
from dng_math.distances import binomial_interval
from dng_math.rules import Rule
from dng_math.trackers import log_odds_from_log_posterior
from dng_models.support.progress import progress_bar
from figures import class_removal_tuned, digits, style
from figures.class_removal_tuned import scaled, settings
from figures.digits import Forgetting

Array = NDArray[np.float64]
Gate = Literal["signed", "absolute"]

PAPER = "Figs. 4, 5b, 10-14"
TITLE = "Class removal on digits: safety against KL and Frechet distance, NP, SLD and DNG"

FORBIDDEN = 0

REMEMBERED = style.Method("remembered mixture", style.TARGET, "none", "*")
SLD_PUBLISHED = replace(style.SLD, label="SLD as published", linestyle=(0, (1, 1)), marker="<")
SLD_TUNED = replace(style.SLD, label="SLD, tuned gate")
CCFG_TUNED = replace(style.CCFG, label=r"contrastive CFG, tuned $\tau$")

STATIC: dict[style.Method, Rule] = {
    style.NP: NegativePrompting(),
    SLD_PUBLISHED: SafeLatentDiffusion(),
}
# Each is the best candidate, by Frechet distance, of this family of class_removal_tuned.
TUNED: dict[style.Method, str] = {SLD_TUNED: "sld", CCFG_TUNED: "ccfg"}
DYNAMIC: dict[style.Method, Rule] = {
    style.DNG_PAPER: DynamicNegativeGuidance(posterior=PaperTracker()),
    style.DNG_LOG_ODDS: DynamicNegativeGuidance(posterior=LogOddsTracker()),
    style.DNG_EXACT: DynamicNegativeGuidance(),
}
# For these the threshold varies, while the scale stays at GATE_SCALE.
GATES: dict[Gate, style.Method] = {
    "signed": replace(SLD_PUBLISHED, label="SLD, signed gate"),
    "absolute": replace(style.SLD, label="SLD, absolute gate"),
}

SAFE = 0.005  # methods are compared at their weakest scale that leaves at most this share
GATE_SCALE = 1.0  # SLD's guidance scale where its threshold varies
WEAK_SCALE = 0.2  # guidance scale of NP in the grid of images
DYNAMIC_SCALE = 3.0  # DNG's guidance scale where its lambda is plotted over time
OUTSIDE = 10.0  # larger pixels have diverged: the strongest constant push leaves them below 6


@dataclass(frozen=True)
class Form:
    """Sizes of the computation."""

    n: int
    steps: int
    tuning: tuple[int, int]  # images and steps
    static_scales: tuple[float, ...]
    tuned_scales: tuple[float, ...]  # in units of the scale that leaves 1% forbidden
    dynamic_scales: tuple[float, ...]
    thresholds: dict[Gate, tuple[float, ...]]
    resamples: int


FULL = Form(
    n=512,
    steps=250,
    tuning=class_removal_tuned.FULL.tuning,
    static_scales=(0.1, 0.2, 0.3, 0.5, 1.0, 2.0),
    tuned_scales=(0.25, 0.5, 1.0, 1.5, 2.0, 4.0),
    dynamic_scales=(0.3, 1.0, 3.0, 10.0, 30.0),
    thresholds={
        "signed": (-0.3, -0.04, 0.04, 0.3, 1.0),
        "absolute": (0.01, 0.04, 0.1, 0.3, 1.0),
    },
    resamples=40,
)
QUICK = Form(
    n=128,
    steps=50,
    tuning=class_removal_tuned.QUICK.tuning,
    static_scales=(0.2, 0.5, 1.0),
    tuned_scales=(0.5, 1.0, 2.0),
    dynamic_scales=(0.5, 1.0, 3.0),
    thresholds={"signed": (-0.3, 0.04, 1.0), "absolute": (0.04, 0.3, 1.0)},
    resamples=10,
)


@dataclass(frozen=True, eq=False)
class Curve:
    """Results of one method at S settings, with N images each.

    Attributes
    ----------
    rule : Rule
        The rule at scale 1.
    setting : ndarray, shape (S,)
        Guidance scale, or threshold.
    images, digit : ndarray, shape (S, N, 64) and (S, N)
        The images, and the digits that the classifier sees in them.
    kl, kl_spread, frechet, frechet_spread : ndarray, shape (S,)
        Distances from the ideal, and the bootstrap standard deviations of their logarithms.
    """

    rule: Rule
    setting: Array
    images: Array
    digit: NDArray[np.int64]
    kl: Array
    kl_spread: Array
    frechet: Array
    frechet_spread: Array

    @property
    def n(self) -> int:
        """Number of images at each setting."""
        return self.digit.shape[1]

    @property
    def histogram(self) -> Array:
        """Class shares, shape (S, 10)."""
        return np.mean(self.digit[:, :, None] == np.arange(digits.CLASSES), axis=1)

    @property
    def forbidden(self) -> Array:
        """Share of images in the forbidden class, shape (S,)."""
        return self.histogram[:, FORBIDDEN]

    @property
    def forbidden_interval(self) -> Array:
        """Exact 95% interval of that share, shape (2, S)."""
        counts = np.sum(self.digit == FORBIDDEN, axis=1)
        return np.transpose([binomial_interval(int(count), self.n) for count in counts])

    @property
    def ran_away(self) -> NDArray[np.int64]:
        """Number of images that diverged, shape (S,)."""
        return np.sum(np.abs(self.images).max(axis=2) > OUTSIDE, axis=1)

    @property
    def safe(self) -> int:
        """Index of the weakest setting that leaves at most SAFE, or else of the safest one."""
        below = np.flatnonzero(self.forbidden <= SAFE)
        return int(below[0] if len(below) else np.argmin(self.forbidden))

    def at(self, setting: float) -> int:
        """Index of a setting."""
        return int(np.flatnonzero(self.setting == setting)[0])


@dataclass(frozen=True, eq=False)
class Data:
    """Everything that the figures show; N images, T steps.

    Attributes
    ----------
    curves : dict of Curve
        Every method over its guidance scale; with one setting, the unguided model and the
        remembered mixture run through the same chain.
    gates : dict of Curve
        SLD over its threshold.
    time, scale : ndarray, shape (T,), and dict of ndarray, shape (T, N)
        Diffusion time, and lambda of each DNG at DYNAMIC_SCALE.
    unguided_log_odds : ndarray, shape (T, N)
        Exact log p/(1-p) of the forbidden class along the unguided chain.
    floor_kl, floor_frechet : float
        Mean distances of N images drawn directly from the remembered mixture.
    """

    task: Forgetting
    steps: int
    curves: dict[style.Method, Curve]
    gates: dict[Gate, Curve]
    time: Array
    scale: dict[style.Method, Array]
    unguided_log_odds: Array
    floor_kl: float
    floor_frechet: float

    @property
    def n(self) -> int:
        """Number of images at each setting."""
        return self.curves[style.UNGUIDED].n

    @property
    def guided(self) -> list[style.Method]:
        """The methods that have a guidance scale."""
        return [method for method in (*STATIC, *TUNED, *DYNAMIC) if method in self.curves]

    @property
    def heading(self) -> NDArray[np.bool_]:
        """Which images the unguided chain turns into the forbidden digit, shape (N,)."""
        return self.curves[style.UNGUIDED].digit[0] == FORBIDDEN

    def changed(self, curve: Curve) -> Array:
        """Share that moved, of the images that are allowed without guidance, shape (S,).

        An image has moved if its root mean square difference exceeds the model's pixel noise.
        """
        unguided = self.curves[style.UNGUIDED].images[0]
        moved = np.sqrt(np.mean((curve.images - unguided) ** 2, axis=2)) > digits.BANDWIDTH
        return np.mean(moved[:, ~self.heading], axis=1)


# ---------------------------------------------------------------------- compute


def compute(quick: bool, seed: int) -> Data:
    form = QUICK if quick else FULL
    task = Forgetting(FORBIDDEN, seed)
    schedule = NoiseSchedule.linear().respace(form.steps)

    methods: dict[style.Method, tuple[Rule, tuple[float, ...]]] = {}
    methods |= {method: (rule, form.static_scales) for method, rule in STATIC.items()}
    for method, family in TUNED.items():
        choice = class_removal_tuned.best(task, *form.tuning, family).get("frechet")
        if choice is not None:
            unit = choice.guidance_scale
            methods[method] = (
                choice.rule,
                tuple(float(f"{unit * f:.2g}") for f in form.tuned_scales),
            )
    methods |= {method: (rule, form.dynamic_scales) for method, rule in DYNAMIC.items()}
    guided = {m: [scaled(rule, g) for g in values] for m, (rule, values) in methods.items()}
    gated: dict[Gate, list[Rule]] = {
        gate: [SafeLatentDiffusion(GATE_SCALE, threshold, gate) for threshold in thresholds]
        for gate, thresholds in form.thresholds.items()
    }
    # Equal rules are equal keys, so a chain that two figures need runs once.
    rules: list[Rule] = [Unguided()]
    for row in (*guided.values(), *gated.values()):
        rules += row
    runs = {}
    for rule in progress_bar(dict.fromkeys(rules), "class_removal", unit="chain", leave=False):
        runs[rule] = sample(
            task.mixture,
            schedule,
            rule,
            n=form.n,
            forbidden=task.forbidden,
            seed=seed,
            record=("scale", "exact") if rule == Unguided() else ("scale",),
        )
    unguided = runs[Unguided()]
    target = sample(task.remembered, schedule, n=form.n, seed=seed)

    rng = np.random.default_rng(seed)
    judge = _Judge(task, form.resamples, rng)
    # Threads cost more than they save on thousands of decompositions of 64 x 64 matrices.
    with threadpool_limits(1, user_api="blas"):
        curves = {
            style.UNGUIDED: judge.curve(Unguided(), [0.0], [unguided.x]),
            REMEMBERED: judge.curve(Unguided(), [1.0], [target.x]),
        }
        for method, row in guided.items():
            rule, scales = methods[method]
            curves[method] = judge.curve(rule, scales, [runs[each].x for each in row])
        gates = {
            gate: judge.curve(row[0], form.thresholds[gate], [runs[rule].x for rule in row])
            for gate, row in gated.items()
        }
        direct = [task.perfect(form.n, 0.0, rng) for _ in range(form.resamples)]
        floor_frechet = float(np.mean([task.frechet(x) for x in direct]))
    followed = {method: runs[scaled(rule, DYNAMIC_SCALE)] for method, rule in DYNAMIC.items()}
    return Data(
        task=task,
        steps=form.steps,
        curves=curves,
        gates=gates,
        time=schedule.coefficients().time,
        scale={method: _recorded(run.scale) for method, run in followed.items()},
        unguided_log_odds=log_odds_from_log_posterior(_recorded(unguided.exact)[:-1]),
        floor_kl=float(np.mean([task.kl(task.classifier(x)) for x in direct])),
        floor_frechet=floor_frechet,
    )


@dataclass(frozen=True, eq=False)
class _Judge:
    """Measures images, with bootstrap spreads."""

    task: Forgetting
    resamples: int
    rng: np.random.Generator

    def curve(self, rule: Rule, settings: Sequence[float], samples: Sequence[Array]) -> Curve:
        images = np.array(samples)
        digit = np.array([self.task.classifier(x) for x in images])
        resampled = np.empty((2, self.resamples, len(images)))
        for i in range(self.resamples):
            drawn = self.rng.integers(digit.shape[1], size=digit.shape[1])
            resampled[0, i] = [self.task.kl(row[drawn]) for row in digit]
            resampled[1, i] = [self.task.frechet(x[drawn]) for x in images]
        spread = np.log(resampled).std(axis=1, ddof=1)
        return Curve(
            rule=rule,
            setting=np.array(settings),
            images=images,
            digit=digit,
            kl=np.array([self.task.kl(row) for row in digit]),
            kl_spread=spread[0],
            frechet=np.array([self.task.frechet(x) for x in images]),
            frechet_spread=spread[1],
        )


def _recorded(rows: Array | None) -> Array:
    """The record of the only concept, shape (T, N)."""
    assert rows is not None
    return rows[:, 0]


# ---------------------------------------------------------------------- draw


@style.applied
def draw(data: Data) -> dict[str, Figure]:
    return {
        "class_removal": _draw_curves(data),
        "class_histogram": _draw_histograms(data),
        "sld_threshold": _draw_thresholds(data),
        "dynamic_scale": _draw_scales(data),
        "sample_grid": _draw_grid(data),
    }


def _percent_axis(axes: Axes, which: Literal["x", "y"], n: int) -> None:
    """Make an axis of percentages: logarithmic down to one image in n, and linear below."""
    one = 100.0 / n
    ticks = [tick for tick in (0.0, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0) if not 0 < tick < one]
    getattr(axes, f"set_{which}scale")("symlog", linthresh=one, linscale=0.5)
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_ticks([], minor=True)
    getattr(axes, f"set_{which}lim")(-0.25 * one, 20.0)


def _log_axis(axes: Axes) -> None:
    axes.set_yscale("log")
    style.log_ticks(axes.yaxis)


def _bars(value: Array, spread: Array) -> Array:
    """95% bars from the standard deviation of the logarithm, shape (2, S)."""
    factor = np.exp(1.96 * spread)
    return np.array([value - value / factor, value * factor - value])


def _forbidden_bars(curve: Curve) -> Array:
    low, high = curve.forbidden_interval
    return 100.0 * np.array([curve.forbidden - low, high - curve.forbidden])


def _quantities(curve: Curve) -> tuple[tuple[Array, Array], ...]:
    """Forbidden percentage, KL and Frechet distance (S,), each with its 95% bars (2, S)."""
    return (
        (100.0 * curve.forbidden, _forbidden_bars(curve)),
        (curve.kl, _bars(curve.kl, curve.kl_spread)),
        (curve.frechet, _bars(curve.frechet, curve.frechet_spread)),
    )


def _draw_curves(data: Data) -> Figure:
    """Plot all methods above, and DNG's three posteriors over the guidance scale below.

    The posteriors lead to nearly the same images, so only one of them is shown above.
    """
    figure = Figure(figsize=(style.WIDTH, 6.6), layout="constrained")
    (top,), (bottom,) = figure.subfigures(2, 1, squeeze=False, height_ratios=(1.25, 1.0))
    _draw_tradeoff(top, data)
    _draw_posteriors(bottom, data)
    return figure


def _draw_tradeoff(figure: SubFigure, data: Data) -> None:
    panels = figure.subplots(1, 2)
    shown = [m for m in data.curves if m not in (style.DNG_LOG_ODDS, style.DNG_EXACT)]
    for axes, quantity in zip(panels, ("kl", "frechet"), strict=True):
        for method in shown:
            curve = data.curves[method]
            percent, value = 100.0 * curve.forbidden, getattr(curve, quantity)
            axes.errorbar(
                percent,
                value,
                yerr=_bars(value, getattr(curve, f"{quantity}_spread")),
                xerr=_forbidden_bars(curve),
                fmt="none",
                ecolor=method.color,
                elinewidth=0.4,
                alpha=0.6,
            )
            look = {"ms": 10, "mfc": "white"} if method == REMEMBERED else {}
            axes.plot(percent, value, label=method.label, **method.line, **look)
        # Label the scales of two methods, one above its points and one below.
        for method, (above, place) in ((style.NP, (5, "bottom")), (style.DNG_PAPER, (-5, "top"))):
            curve = data.curves[method]
            for g, percent, value in zip(
                curve.setting, 100.0 * curve.forbidden, getattr(curve, quantity), strict=True
            ):
                axes.annotate(
                    f"{g:g}",
                    (percent, value),
                    (3, above),
                    textcoords="offset points",
                    size=6.5,
                    color=method.color,
                    va=place,
                    path_effects=[withStroke(linewidth=1.5, foreground="white")],
                    zorder=5,
                )
        _log_axis(axes)
        _percent_axis(axes, "x", data.n)
        axes.set_xlabel("forbidden images (%)")
    style.title(panels[0], "a", "balance of the remembered classes")
    style.title(panels[1], "b", "distribution of the images")
    panels[0].set_ylabel(r"KL(ideal $\Vert$ class histogram) (nats)")
    panels[1].set_ylabel("Fréchet distance of pixels")
    panels[0].text(
        0.98,
        0.02,
        "bars: 95%; numbers: scale $g$",
        transform=panels[0].transAxes,
        size=6.5,
        ha="right",
    )
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)


def _draw_posteriors(figure: SubFigure, data: Data) -> None:
    panels = figure.subplots(1, 3)
    names = ("forbidden images (%)", "KL (nats)", "Fréchet distance")
    for i, (axes, name) in enumerate(zip(panels, names, strict=True)):
        floor = (None, data.floor_kl, data.floor_frechet)[i]
        if floor is not None:
            axes.axhline(
                floor,
                color=style.TARGET,
                lw=0.7,
                ls=(0, (6, 4)),
                label="remembered mixture, drawn directly",
            )
        for beside, method in enumerate(DYNAMIC):
            curve = data.curves[method]
            # Distances are left out where images ran away: a few of those dominate a mean.
            whole = (curve.ran_away == 0) | (i == 0)
            value, bars = _quantities(curve)[i]
            axes.errorbar(
                # Shifted, because the curves would cover each other.
                curve.setting[whole] * 1.12 ** (beside - 1),
                value[whole],
                bars[:, whole],
                elinewidth=0.5,
                label=method.label,
                **method.line,
            )
        axes.set_xscale("log")
        scales = data.curves[style.DNG_EXACT].setting
        axes.set_xticks(scales, [f"{g:g}" for g in scales])
        axes.set_xticks([], minor=True)
        axes.set_xlim(scales[0] / 1.5, scales[-1] * 1.5)
        axes.set_xlabel("guidance scale $g$")
        style.title(axes, "cde"[i], name)
    _percent_axis(panels[0], "y", data.n)
    for axes in panels[1:]:
        _log_axis(axes)
    away = [
        f"{method.label.removeprefix('DNG, ')}, $g={curve.setting[at]:g}$:\n"
        f"{curve.ran_away[at]} of {data.n} images diverge"
        for method, curve in ((method, data.curves[method]) for method in DYNAMIC)
        for at in np.flatnonzero(curve.ran_away)
    ]
    if away:
        why = "(below $g=1/2$ the log-odds one can\ntake its own push for evidence)"
        panels[2].text(
            0.03,
            0.97,
            "\n".join(["not shown:", *away, why]),
            transform=panels[2].transAxes,
            size=6.5,
            va="top",
        )
    figure.legend(*panels[1].get_legend_handles_labels(), loc="outside lower center", ncols=4)


def _draw_histograms(data: Data) -> Figure:
    figure = Figure(figsize=(style.WIDTH, 3.6), layout="constrained")
    panels = figure.subplots(2, 4, sharex=True, sharey=True)
    ideal = data.task.ideal
    low, high = 100.0 / data.n * np.array(stats.binom.interval(0.95, data.n, ideal))
    place = np.arange(digits.CLASSES)
    edges = np.arange(digits.CLASSES + 1) - 0.5
    shown = (style.UNGUIDED, *data.guided)
    for axes, method, letter in zip(panels.flat, shown, "abcdefgh", strict=False):
        curve = data.curves[method]
        at = curve.safe
        axes.stairs(high, edges, baseline=low, fill=True, color=style.GREY, alpha=0.3, lw=0)
        axes.bar(place, 100.0 * curve.histogram[at], 0.7, color=method.color, alpha=0.65)
        axes.stairs(100.0 * ideal, edges, baseline=None, color=style.TARGET, lw=0.9)
        scale = _scale_text(method, curve, at)
        style.title(axes, letter, ",\n".join(filter(None, [method.label, scale])))
        axes.text(
            0.97,
            0.95,
            f"{100.0 * curve.forbidden[at]:.1f}% forbidden\nKL {curve.kl[at]:.3f} nats",
            transform=axes.transAxes,
            ha="right",
            va="top",
            size=7,
        )
        axes.set_xticks(place)
        axes.set_xlim(edges[0], edges[-1])
        axes.tick_params(axis="x", length=0)
    for axes in panels[1]:
        axes.set_xlabel("digit, as classified")
    for axes in panels[:, 0]:
        axes.set_ylabel("images (%)")
    figure.legend(
        handles=[
            Line2D([], [], color=style.TARGET, lw=0.9, label="ideal: uniform without 0"),
            Patch(
                color=style.GREY,
                alpha=0.3,
                lw=0,
                label=f"95% of counts in {data.n} images of the ideal",
            ),
        ],
        loc="outside lower center",
        ncols=2,
    )
    return figure


def _scale_text(method: style.Method, curve: Curve, at: int) -> str:
    return "" if method in (style.UNGUIDED, REMEMBERED) else f"$g={curve.setting[at]:g}$"


def _named(method: style.Method, curve: Curve, at: int) -> str:
    """The method, and its scale if it has one."""
    return ", ".join(filter(None, [method.label, _scale_text(method, curve, at)]))


def _draw_thresholds(data: Data) -> Figure:
    figure = Figure(figsize=(style.WIDTH, 2.9), layout="constrained")
    panels = figure.subplots(1, 3)

    for method in (style.UNGUIDED, style.DNG_PAPER):
        curve = data.curves[method]
        at = curve.safe
        label = _named(method, curve, at)
        for axes, (value, _) in zip(panels, _quantities(curve), strict=True):
            axes.axhline(value[at], color=method.color, ls=method.linestyle, label=label)
    for gate, method in GATES.items():
        curve = data.gates[gate]
        for axes, (value, bars) in zip(panels, _quantities(curve), strict=True):
            label = f"{method.label}, $g={GATE_SCALE:g}$"
            axes.errorbar(curve.setting, value, bars, elinewidth=0.5, label=label, **method.line)
    _percent_axis(panels[0], "y", data.n)
    titles = ("forbidden images (%)", "KL from the ideal (nats)", "Fréchet distance of pixels")
    ticks = (-0.3, 0.0, 0.1, 0.3, 1.0)
    for axes, letter, text in zip(panels, "abc", titles, strict=True):
        style.title(axes, letter, text)
        axes.set_xscale("symlog", linthresh=0.1, linscale=0.8)
        axes.set_xticks(ticks, [f"{tick:g}".replace("-", "\N{MINUS SIGN}") for tick in ticks])
        axes.set_xticks([], minor=True)
        axes.set_xlim(-0.4, 1.4)
        axes.set_xlabel("gate threshold (units of the noise)")
    for axes in panels[1:]:
        _log_axis(axes)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def _show(axes: Axes, images: Array) -> None:
    """Show images (R, C, 64) in a grid; one unit of the axes is an image and the gap after it."""
    rows, columns, _ = images.shape
    cell = digits.SIDE + 1
    sheet = np.full((rows, cell, columns, cell), np.nan)
    sheet[:, :-1, :, :-1] = images.reshape(rows, columns, digits.SIDE, -1).transpose(0, 2, 1, 3)
    axes.imshow(
        sheet.reshape(rows * cell, columns * cell),
        cmap="gray_r",
        vmin=-1.0,
        vmax=1.0,
        extent=(0.0, columns, rows, 0.0),
        interpolation="nearest",
    )
    axes.set_axis_off()


def _frame(axes: Axes, rows: int, columns: int) -> None:
    """Frame the first columns, which are the forbidden digit without guidance."""
    pixel = 1.0 / (digits.SIDE + 1)
    corner = (-pixel / 2, -pixel / 2)
    axes.add_patch(
        Rectangle(corner, columns, rows, fill=False, ec=style.FORBIDDEN, lw=1.2, clip_on=False)
    )


def _draw_scales(data: Data) -> Figure:
    figure = Figure(figsize=(style.WIDTH, 4.1), layout="constrained")
    (top,), (bottom,) = figure.subfigures(2, 1, squeeze=False, height_ratios=(2.3, 1.0))
    panels = top.subplots(1, 3, sharex=True, sharey=True)
    heading = data.heading
    odds = np.median(data.unguided_log_odds[:, heading], axis=1)
    groups = (
        (heading, style.FORBIDDEN, "images that are a 0 without guidance"),
        (~heading, style.BLUE, "images that are another digit"),
    )
    singles = [np.flatnonzero(group)[:6] for group, _, _ in groups]
    for axes, (method, scale), letter in zip(panels, data.scale.items(), "abc", strict=True):
        for (group, color, text), few in zip(groups, singles, strict=True):
            low, middle, high = np.quantile(scale[:, group], (0.1, 0.5, 0.9), axis=1)
            axes.fill_between(data.time, low, high, color=color, alpha=0.2, lw=0)
            axes.plot(data.time, scale[:, few[:3]], color=color, lw=0.4)
            axes.plot(data.time, middle, color=color, lw=1.8, label=text)
        axes.plot(
            data.time,
            DYNAMIC_SCALE * np.exp(np.minimum(odds, 50.0)),
            color=style.FORBIDDEN,
            ls="--",
            label=r"the former unguided: median $g\,p/(1-p)$",
        )
        _log_axis(axes)
        axes.set_ylim(1e-6, 1e3)
        axes.set_xlim(1.0, 0.0)
        axes.set_xlabel("diffusion time $t/T$")
        style.title(axes, letter, f"{method.label}, $g={DYNAMIC_SCALE:g}$")
        tracker = data.curves[method].rule.posterior  # type: ignore[attr-defined]
        if not isinstance(tracker, ExactPosterior):
            floor = DYNAMIC_SCALE * tracker.p_min
            text = "least that the\ntracker's limits allow"
            axes.text(0.98, 1.6 * floor, text, size=6.5, color=style.GREY, linespacing=0.95)
            axes.axhline(floor, color=style.GREY, lw=0.6, zorder=0)
    panels[0].set_ylabel("dynamic scale $\\lambda$\n(median, 10\N{EN DASH}90%, examples)")
    top.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    strips = bottom.subplots(1, 2)
    dng = data.curves[style.DNG_PAPER]
    rows = np.array([data.curves[style.UNGUIDED].images[0], dng.images[dng.at(DYNAMIC_SCALE)]])
    for axes, few in zip(strips, singles, strict=True):
        _show(axes, rows[:, few])
    _frame(strips[0], len(rows), len(singles[0]))
    for row, text in enumerate(("unguided", r"DNG, as in $\mathbf{a}$")):
        strips[0].text(-0.2, row + 0.45, text, ha="right", va="center", size=7)
    return figure


def _draw_grid(data: Data) -> Figure:
    curves = data.curves
    digit = curves[style.UNGUIDED].digit[0]
    forgotten = np.flatnonzero(data.heading)[:6]
    others = [np.flatnonzero(digit == c)[0] for c in range(digits.CLASSES) if c != FORBIDDEN]
    columns = np.concatenate([forgotten, others])
    rows = [
        (style.UNGUIDED, 0),
        (style.NP, curves[style.NP].at(WEAK_SCALE)),
        *((method, curves[method].safe) for method in data.guided),
        (REMEMBERED, 0),
    ]
    # Placed by hand, because automatic layouts ignore how the fixed aspect moves the texts.
    left, below, above, image = 1.74, 0.25, 0.25, 0.297
    width, height = image * len(columns), image * len(rows)
    figure = Figure(figsize=(style.WIDTH, below + height + above))
    whole = below + height + above
    axes = figure.add_axes((left / style.WIDTH, below / whole, width / style.WIDTH, height / whole))
    _show(axes, np.array([curves[method].images[at][columns] for method, at in rows]))
    _frame(axes, len(rows), len(forgotten))
    right = len(columns) + 0.1
    axes.text(len(forgotten) / 2, -0.15, "0 without guidance", ha="center", color=style.FORBIDDEN)
    axes.text(len(forgotten) + len(others) / 2, -0.15, "another digit", ha="center")
    axes.text(right, -0.15, "forbidden", size=7)
    axes.text(right + 1.75, -0.15, "changed", size=7)
    axes.text(
        right + 3.1,
        len(rows) + 0.15,
        "changed: of the images that are another digit without guidance, "
        "those that moved by more than the pixel noise",
        size=6.5,
        ha="right",
        va="top",
    )
    for row, (method, at) in enumerate(rows):
        curve, middle = curves[method], row + 0.45
        text = _named(method, curve, at)
        axes.text(-0.2, middle, text, ha="right", va="center", size=7)
        share, changed = 100.0 * curve.forbidden[at], 100.0 * data.changed(curve)[at]
        axes.text(right, middle, f"{share:.1f}%", va="center", size=7)
        axes.text(right + 1.75, middle, f"{changed:.0f}%", va="center", size=7)
    return figure


def summary(data: Data) -> str:
    judge = data.task.classifier
    lines = [
        f"the digit {FORBIDDEN} forgotten, {data.n} images a point, {data.steps} steps; "
        f"classifier {100.0 * judge.accuracy:.1f}% right on {judge.held_out} held-out digits, "
        f"calls {100.0 * judge.false_alarms:.2f}% of the others a {FORBIDDEN} and misses "
        f"{100.0 * judge.misses:.2f}% of those",
        f"at the weakest scale that leaves at most {100.0 * SAFE:g}%, or else the safest:",
    ]
    for method, curve in data.curves.items():
        at = curve.safe
        low, high = 100.0 * curve.forbidden_interval[:, at]
        how = [method.label, settings(curve.rule), _scale_text(method, curve, at)]
        named = style.plain(", ".join(filter(None, how)))
        lines.append(
            f"{named}: forbidden {100.0 * curve.forbidden[at]:.2f}% "
            f"[{low:.2f}, {high:.2f}], KL {curve.kl[at]:.3f}, Frechet {curve.frechet[at]:.3f}, "
            f"changed {100.0 * data.changed(curve)[at]:.1f}% of the allowed; "
            f"least KL of its scales {curve.kl.min():.3f}"
        )
        lines += [
            f"{method.label} g = {curve.setting[at]:g}: {curve.ran_away[at]} images ran away"
            for at in np.flatnonzero(curve.ran_away)
        ]
    for gate, curve in data.gates.items():
        best = int(np.argmin(curve.kl))
        lines.append(
            f"SLD g = {GATE_SCALE:g}, {gate} gate: least KL {curve.kl[best]:.3f} at threshold "
            f"{curve.setting[best]:g}, forbidden {100.0 * curve.forbidden[best]:.2f}%"
        )
    exact = data.curves[style.DNG_EXACT]
    gap = np.abs(exact.images[exact.at(1.0)] - data.curves[REMEMBERED].images[0]).max()
    lines.append(
        f"remembered mixture drawn directly: KL {data.floor_kl:.3f}, "
        f"Frechet {data.floor_frechet:.3f}; its chain and exact DNG g = 1 differ by {gap:.1e}"
    )
    return "\n  ".join(lines)
