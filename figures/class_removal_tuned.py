"""Every method with its best settings, at equal safety: an exact model forgets three digits.

A baseline at one setting may be far from its best.  Here every baseline is tuned, for each digit
and distance: SLD over both gates, thresholds and slopes, and contrastive CFG over its temperature;
then the best of either, and negative prompting, over intervals of time in which they act.  All
candidates run on one seed.  The one that is nearest to the ideal where 1% of the images are still
forbidden is chosen, and measured on another seed with more images.  DNG is not tuned: its posterior
is exact, or tracked as in the paper, or in log-odds.

A candidate's scale is raised or lowered by factors of 1.5 until two scales enclose 1%.  Between
them the logarithms of the scale and of the distances are interpolated linearly in the logarithm of
the forbidden share, where zero images count as half an image.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from dng_math import (
    ContrastiveCFG,
    DynamicNegativeGuidance,
    LimitedInterval,
    LogOddsTracker,
    NegativePrompting,
    NoiseSchedule,
    PaperTracker,
    SafeLatentDiffusion,
    Unguided,
    sample,
)
from dng_math.rules import Rule
from dng_models.support.progress import Progress
from figures import style
from figures.digits import Forgetting

Array = NDArray[np.float64]

PAPER = "Figs. 4, 10, 11"
TITLE = "Class removal on digits, every baseline at its best, at equal safety"
MINUTES = 5

DIGITS = (0, 1, 8)
SAFETY = 0.01
DISTANCES = {"frechet": "Fréchet distance of pixels", "kl": r"KL(ideal $\Vert$ histogram) (nats)"}
FACTOR = 1.5  # ratio of neighbouring scales
SCALES = (0.02, 100.0)  # limits of the search

INTERVALS = ((0.0, 0.4), (0.2, 0.4), (0.2, 0.6), (0.2, 1.0), (0.3, 0.5), (0.4, 0.6), (0.4, 1.0))
GATES = (
    *(SafeLatentDiffusion(threshold=t, gate="signed") for t in (-0.3, 0.3)),
    *(SafeLatentDiffusion(threshold=t, gate="absolute") for t in (0.2, 0.3, 0.5, 1.0)),
    *(SafeLatentDiffusion(threshold=t, gate="absolute", slope=3.0) for t in (0.2, 0.3, 0.5)),
)
TEMPERATURES = tuple(ContrastiveCFG(temperature=tau) for tau in (0.1, 0.3, 1.0, 3.0, 10.0))


@dataclass(frozen=True)
class Family:
    """A method and its candidates, at scale 1.

    ``inside`` names an earlier family; its best candidates, limited to each of INTERVALS, are then
    the candidates.
    """

    look: style.Method
    candidates: tuple[Rule, ...] = ()
    inside: str | None = None


FAMILIES: dict[str, Family] = {
    "np": Family(style.NP, (NegativePrompting(),)),
    "np-interval": Family(replace(style.NP, label="… in its best interval"), inside="np"),
    "sld-published": Family(replace(style.SLD, label="SLD as published"), (SafeLatentDiffusion(),)),
    "sld": Family(replace(style.SLD, label="SLD, best gate and slope"), GATES),
    "sld-interval": Family(replace(style.SLD, label="… in its best interval"), inside="sld"),
    "ccfg": Family(replace(style.CCFG, label=r"contrastive CFG, best $\tau$"), TEMPERATURES),
    "ccfg-interval": Family(replace(style.CCFG, label="… in its best interval"), inside="ccfg"),
    "dng-paper": Family(style.DNG_PAPER, (DynamicNegativeGuidance(posterior=PaperTracker()),)),
    "dng-log-odds": Family(
        style.DNG_LOG_ODDS, (DynamicNegativeGuidance(posterior=LogOddsTracker()),)
    ),
    "dng-exact": Family(style.DNG_EXACT, (DynamicNegativeGuidance(),)),
}
BASELINES = tuple(name for name in FAMILIES if not name.startswith("dng"))
OURS = tuple(name for name in FAMILIES if name.startswith("dng"))
USUAL = ("np", "sld-published")  # baselines as most users would run them


@dataclass(frozen=True)
class Form:
    """Sizes of the computation."""

    digits: tuple[int, ...]
    tuning: tuple[int, int]  # images and steps
    measuring: tuple[int, int]
    resamples: int


FULL = Form(digits=DIGITS, tuning=(512, 50), measuring=(1024, 100), resamples=100)
QUICK = Form(digits=(0,), tuning=(128, 20), measuring=(256, 25), resamples=20)


def scaled(rule: Rule, guidance_scale: float) -> Rule:
    """The rule at another guidance scale."""
    if isinstance(rule, LimitedInterval):
        return replace(rule, rule=scaled(rule.rule, guidance_scale))
    return replace(rule, guidance_scale=guidance_scale)  # type: ignore[type-var]


def settings(rule: Rule) -> str:
    """The tuned settings of a rule except its scale, as text."""
    if isinstance(rule, LimitedInterval):
        inside = f"t/T in [{rule.t_lo:g}, {rule.t_hi:g}]"
        return ", ".join(filter(None, [settings(rule.rule), inside]))
    if isinstance(rule, SafeLatentDiffusion):
        return f"{rule.gate} gate {rule.threshold:g}, slope {rule.slope:g}"
    if isinstance(rule, ContrastiveCFG):
        return f"tau {rule.temperature:g}"
    return ""


# ---------------------------------------------------------------------- one rule over its scale


@dataclass(frozen=True, eq=False)
class Runs:
    """A rule at several scales: images, and the classifier's answers."""

    task: Forgetting
    images: dict[float, Array]  # scale: (N, 64)
    judged: dict[float, NDArray[np.int64]]  # scale: (N,)

    def share(self, scale: float, drawn: Any = slice(None)) -> float:
        """Forbidden share of the drawn images; zero images count as half an image."""
        judged = self.judged[scale][drawn]
        return max(float(np.mean(judged == self.task.digit)), 0.5 / len(judged))

    def enclosing(self, drawn: Any = slice(None)) -> tuple[float, float] | None:
        """The smallest neighbouring scales between which the share falls to SAFETY."""
        scales = sorted(self.images)
        for low, high in itertools.pairwise(scales):
            if self.share(low, drawn) > SAFETY >= self.share(high, drawn):
                return low, high
        return None

    def at_safety(self, drawn: Any = slice(None)) -> dict[str, float] | None:
        """Scale and distances where the share is SAFETY; None if no two scales enclose it."""
        ends = self.enclosing(drawn)
        if ends is None:
            return None
        logs = [math.log(self.share(end, drawn)) for end in ends]
        weight = (math.log(SAFETY) - logs[0]) / (logs[1] - logs[0])

        def between(values: Sequence[float]) -> float:
            low, high = map(math.log, values)
            return math.exp((1.0 - weight) * low + weight * high)

        return {
            "guidance_scale": between(ends),
            "frechet": between([self.task.frechet(self.images[end][drawn]) for end in ends]),
            "kl": between([self.task.kl(self.judged[end][drawn]) for end in ends]),
        }


@dataclass(frozen=True)
class Chains:
    """Settings of chains: number of images, steps, seed."""

    task: Forgetting
    n: int
    steps: int
    seed: int

    def images(self, rule: Rule) -> Array:
        return sample(
            self.task.mixture,
            NoiseSchedule.linear().respace(self.steps),
            rule,
            n=self.n,
            forbidden=self.task.forbidden,
            seed=self.seed,
        ).x

    def search(self, rule: Rule, scales: Sequence[float], each: Callable[[], None]) -> Runs:
        """Run the rule at these scales, and at further ones until two enclose SAFETY."""
        runs = Runs(self.task, {}, {})

        def run(scale: float) -> float:
            runs.images[scale] = self.images(scaled(rule, scale))
            runs.judged[scale] = self.task.classifier(runs.images[scale])
            each()
            return runs.share(scale)

        shares = [run(scale) for scale in scales]
        low, high = min(scales), max(scales)
        safe_below, safe_above = shares[0] <= SAFETY, shares[-1] <= SAFETY
        while safe_below and low > SCALES[0]:
            low /= FACTOR
            safe_below = run(low) <= SAFETY
        while not safe_above and high < SCALES[1]:
            high *= FACTOR
            safe_above = run(high) <= SAFETY
        return runs


# ---------------------------------------------------------------------- compute


@dataclass(frozen=True)
class Choice:
    """The best candidate, and its scale at equal safety on the tuning seed."""

    rule: Rule
    guidance_scale: float


@functools.cache
def best(task: Forgetting, n: int, steps: int, name: str) -> dict[str, Choice]:
    """A family's best candidate for each distance; empty if no candidate reaches SAFETY.

    The result is cached, because other figures and other families need it too.
    """
    family = FAMILIES[name]
    rules: list[Rule] = list(family.candidates)
    if family.inside is not None:
        inner = dict.fromkeys(c.rule for c in best(task, n, steps, family.inside).values())
        rules = [LimitedInterval(rule, *span) for rule in inner for span in INTERVALS]
    chains = Chains(task, n, steps, task.seed + 1)  # not the seed on which the best is measured
    found: dict[Rule, dict[str, float]] = {}
    scale = 0.5
    with Progress(desc=f"{task.digit} forgotten, tuning {name}", unit="chain", leave=False) as seen:
        for rule in rules:
            point = chains.search(rule, [scale], seen.update).at_safety()
            if point is not None:
                found[rule] = point
                scale = point["guidance_scale"]  # a good start for the next candidate
    if not found:
        return {}
    chosen = {d: min(found, key=lambda rule: found[rule][d]) for d in DISTANCES}
    return {d: Choice(rule, found[rule]["guidance_scale"]) for d, rule in chosen.items()}


@dataclass(frozen=True, eq=False)
class Point:
    """A family's best candidate at equal safety, for one digit and distance, on fresh images.

    Attributes
    ----------
    rule, guidance_scale, value : Rule, float, float
        The candidate, its scale at equal safety, and the distance there.
    resampled : ndarray, shape (R,)
        Logarithms of the distance over bootstrap samples, which are the same for every family,
        because image i has the same noise under every rule.  NaN where no two scales enclose
        SAFETY in the sample.
    """

    rule: Rule
    guidance_scale: float
    value: float
    resampled: Array

    @property
    def interval(self) -> tuple[float, float]:
        """95% interval, from the spread of the logarithm."""
        return _interval(self.value, self.resampled)


@dataclass(frozen=True, eq=False)
class Data:
    """Results by digit, distance and family, and those of perfect samples with the same share."""

    form: Form
    points: dict[int, dict[str, dict[str, Point]]]
    unguided: dict[int, dict[str, float]]  # distances and forbidden share
    perfect: dict[int, dict[str, float]]
    false_alarms: dict[int, float]

    def best_baseline(self, digit: int, distance: str) -> str:
        points = self.points[digit][distance]
        return min((n for n in BASELINES if n in points), key=lambda name: points[name].value)

    def lead(self, digit: int, distance: str, ours: str, other: str) -> tuple[float, float, float]:
        """Another family's distance over ours, with its 95% interval."""
        a, b = (self.points[digit][distance][name] for name in (other, ours))
        ratio = a.value / b.value
        return ratio, *_interval(ratio, a.resampled - b.resampled)


def _interval(value: float, logarithms: Array) -> tuple[float, float]:
    """95% interval, from the spread of the resampled logarithms."""
    factor = math.exp(1.96 * float(np.nanstd(logarithms, ddof=1)))
    return value / factor, value * factor


def compute(quick: bool, seed: int) -> Data:
    form = QUICK if quick else FULL
    data = Data(form, {}, {}, {}, {})
    for digit in form.digits:
        _measure(data, Forgetting(digit, seed))
    return data


def _measure(data: Data, task: Forgetting) -> None:
    """Measure one digit, and enter the results into the data."""
    form, digit = data.form, task.digit
    choices = {name: best(task, *form.tuning, name) for name in FAMILIES}
    scales = {c.rule: c.guidance_scale for chosen in choices.values() for c in chosen.values()}
    n, steps = form.measuring
    chains = Chains(task, n, steps, task.seed)
    rng = np.random.default_rng(task.seed)
    draws = [rng.integers(n, size=n) for _ in range(form.resamples)]
    data.points[digit] = {distance: {} for distance in DISTANCES}
    with (
        Progress(4 * len(scales), f"{digit} forgotten", unit="chain", leave=False) as progress,
        # Threads cost more than they save on thousands of decompositions of 64 x 64 matrices.
        threadpool_limits(1, user_api="blas"),
    ):
        for rule, scale in scales.items():
            around = [scale * FACTOR**power for power in (-1.5, -0.5, 0.5, 1.5)]
            runs = chains.search(rule, around, progress.update)
            point = runs.at_safety()
            if point is None:
                continue
            resampled = [runs.at_safety(drawn) for drawn in draws]
            for family, chosen in choices.items():
                for distance, choice in chosen.items():
                    if choice.rule == rule:
                        values = [np.nan if r is None else r[distance] for r in resampled]
                        data.points[digit][distance][family] = Point(
                            rule, point["guidance_scale"], point[distance], np.log(values)
                        )
        images = chains.images(Unguided())
        judged = task.classifier(images)
        data.unguided[digit] = {
            "share": float(np.mean(judged == digit)),
            "frechet": task.frechet(images),
            "kl": task.kl(judged),
        }
        perfect = [task.perfect(n, SAFETY, rng) for _ in range(form.resamples)]
        data.perfect[digit] = {
            "frechet": float(np.mean([task.frechet(x) for x in perfect])),
            "kl": float(np.mean([task.kl(task.classifier(x)) for x in perfect])),
        }
    data.false_alarms[digit] = task.classifier.false_alarms


# ---------------------------------------------------------------------- draw


PERFECT: dict[str, Any] = {"color": style.TARGET, "lw": 0.7, "ls": (0, (6, 4))}
WITHOUT: dict[str, Any] = {"color": style.GREY, "lw": 1.0, "ls": ":"}
BEHIND = "#EEF6F2"  # background of DNG's rows


@style.applied
def draw(data: Data) -> dict[str, Figure]:
    """Plot a row of panels for each distance and a column for each digit; methods as lines."""
    count = len(data.form.digits)
    figure = Figure(figsize=(style.WIDTH, 5.8), layout="constrained")
    axes = figure.subplots(len(DISTANCES), count, sharex="row", sharey=True, squeeze=False)
    names = list(FAMILIES)
    for row, (distance, label) in enumerate(DISTANCES.items()):
        for column, digit in enumerate(data.form.digits):
            panel = axes[row, column]
            _draw_panel(panel, data, digit, distance)
            best = data.best_baseline(digit, distance)
            ratio, low, high = data.lead(digit, distance, "dng-paper", best)
            letter = "abcdefghijklm"[row * count + column]
            style.title(
                panel,
                letter,
                f"digit {digit} forgotten:\nDNG {ratio:.1f} [{low:.1f}, {high:.1f}] times nearer",
            )
            panel.set_xlabel(label)
    axes[0, 0].set_yticks(range(len(names)), [FAMILIES[name].look.label for name in names])
    axes[0, 0].invert_yaxis()
    n = data.form.measuring[0]
    figure.legend(
        handles=[
            Line2D([], [], color=style.BLACK, marker="o", lw=0.8, label="at 1% forbidden, 95%"),
            Line2D([], [], label="perfect samples, 1% forbidden", **PERFECT),
            Line2D([], [], label="unguided", **WITHOUT),
            Patch(color=BEHIND, label="DNG"),
        ],
        loc="outside lower center",
        ncols=4,
    )
    figure.suptitle(
        f"{n:,} images a point; times nearer: DNG with the paper's tracker than the best baseline",
        size=8,
    )
    return {"class_removal_tuned": figure}


def _draw_panel(panel: Axes, data: Data, digit: int, distance: str) -> None:
    panel.axvline(data.perfect[digit][distance], **PERFECT)
    panel.axvline(data.unguided[digit][distance], **WITHOUT)
    names = list(FAMILIES)
    first = names.index(OURS[0])
    panel.axhspan(first - 0.5, len(names) - 0.5, color=BEHIND, lw=0, zorder=0)
    for place, name in enumerate(names):
        point = data.points[digit][distance].get(name)
        look = FAMILIES[name].look
        if point is None:
            panel.text(
                0.98,
                place,
                "does not reach 1%",
                size=6.5,
                ha="right",
                va="center",
                transform=panel.get_yaxis_transform(),
            )
            continue
        low, high = point.interval
        panel.errorbar(
            point.value,
            place,
            xerr=[[point.value - low], [high - point.value]],
            color=look.color,
            marker="o",
            elinewidth=0.8,
            mfc="white" if FAMILIES[name].inside else look.color,
        )
    panel.set_xscale("log")
    style.log_ticks(panel.xaxis)
    panel.tick_params(axis="y", length=0)
    panel.grid(True, axis="x")


def summary(data: Data) -> str:
    n, steps = data.form.measuring
    tuning_n, tuning_steps = data.form.tuning
    lines = [
        f"at {100 * SAFETY:g}% forbidden; {n} images a point, {steps} steps; chosen with "
        f"{tuning_n} other images and {tuning_steps} steps"
    ]
    for digit in data.form.digits:
        unguided, perfect = data.unguided[digit], data.perfect[digit]
        lines.append(
            f"the digit {digit} forgotten: unguided {100 * unguided['share']:.1f}% forbidden, "
            f"Frechet {unguided['frechet']:.3f}, KL {unguided['kl']:.4f}; perfect samples of which "
            f"{100 * SAFETY:g}% are forbidden: {perfect['frechet']:.3f}, {perfect['kl']:.4f}; the "
            f"classifier calls {100 * data.false_alarms[digit]:.2f}% of the others a {digit}"
        )
        points = data.points[digit]
        for name in FAMILIES:
            parts = []
            for distance, short in (("frechet", "Frechet"), ("kl", "KL")):
                point = points[distance].get(name)
                if point is None:
                    parts.append(f"{short}: {100 * SAFETY:g}% not reached")
                    continue
                low, high = point.interval
                chosen = [settings(point.rule), f"g = {point.guidance_scale:.2f}"]
                how = ", ".join(filter(None, chosen))
                parts.append(f"{short} {point.value:.3g} [{low:.3g}, {high:.3g}] ({how})")
            lines.append(f"  {_full_name(name)}: {'; '.join(parts)}")
        for ours, other in [*((ours, "") for ours in OURS), *(("dng-paper", o) for o in USUAL)]:
            lines.append(f"  {_lead(data, digit, ours, other)}")
    return "\n  ".join(lines)


def _lead(data: Data, digit: int, ours: str, other: str) -> str:
    """Text of :meth:`Data.lead` over another family, by default the best baseline."""
    parts = []
    for distance, short in (("frechet", "Frechet"), ("kl", "KL")):
        points, against = data.points[digit][distance], other or data.best_baseline(digit, distance)
        if ours in points and against in points:
            ratio, low, high = data.lead(digit, distance, ours, against)
            named = "" if other else f" ({_full_name(against)})"
            parts.append(f"{ratio:.2f} [{low:.2f}, {high:.2f}] times in {short}{named}")
    than = _full_name(other) if other else "the best baseline"
    return f"{_full_name(ours)} is nearer than {than}: {', '.join(parts) or 'not comparable'}"


def _full_name(name: str) -> str:
    """A family's label; for one limited to an interval, with the label of the inner family."""
    family = FAMILIES[name]
    inside = "" if family.inside is None else f"{FAMILIES[family.inside].look.label} "
    return style.plain(f"{inside}{family.look.label}".replace("…", ""))
