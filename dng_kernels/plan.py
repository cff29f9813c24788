"""Everything that is known about a run before its first step, as one table on the device.

A row of the table holds the coefficients of one step and the hyperparameters of the rule and of
its tracker.  A kernel reads its numbers from memory with the step index, so one captured graph
replays every step, and a change of hyperparameters compiles nothing.

Predictions enter as the network gives them.  With ``x0 = P x + Q prediction`` the step
``x_next = A x + B x0 + sqrt(V) z`` is ``(A + B P) x + B Q prediction + sqrt(V) z``; the factors
are multiplied here, in float64.

With classifier-free guidance beneath the rule, steps have two predictions that the negative can be
measured from.  They call ``eps`` the one that it is, and ``eps_third`` the other; both combine to
the same base, ``eps_third + s (eps - eps_third)``, with s the scale of CFG or one minus it.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dng_kernels import layout
from dng_math import checks, equations
from dng_math._codes import (
    CONTRASTIVE,
    EXACT,
    FEEDBACK,
    GEOMETRIC,
    PERPENDICULAR,
    REGULATED,
    SAFE,
    TOWARD,
    TOWARD_BY_STEP,
    TRACKED,
    RuleCode,
    chain_code,
    tracker_code,
)
from dng_math.rules import (
    CRG,
    ROUNDING_SQ,
    SPELL,
    AskedNegative,
    AttentionRule,
    CFGPlusPlus,
    FeedbackGuidance,
    GeoGuide,
    ImageReferenced,
    LimitedInterval,
    Rule,
    StepNumbers,
    innermost,
    tracker_of,
    warn_where_noise_is_missing,
)
from dng_math.schedules import PREDICTION_TYPES, PredictionType, StepCoefficients, x0_of
from dng_math.trackers import (
    LogOddsTracker,
    PathTracker,
    RatioTracker,
    Tracker,
    temperatures,
)

Array = NDArray[np.float64]

STEP, GUIDE, UPDATE = range(3)  # the three operations


class Variant(NamedTuple):
    """What is fixed when a kernel is compiled.

    ``mode`` is STEP, GUIDE or UPDATE; ``rule`` and ``tracker`` are the numbers of
    :mod:`dng_math._codes`; the rest says whether there is CFG beneath the rule, a clip of x0, a
    transition of the tracker that differs from the step, and a divergence to take into account;
    whether the rule itself reads ``eps_third`` of CFG, as do SLD, whose gate compares the negative
    with it, and contrastive CFG with its positive factor; and whether a step returns its weight.
    """

    mode: int
    rule: int
    tracker: int
    cfg: bool
    clip: bool
    drift: bool
    divergence: bool
    reads_third: bool
    weighted: bool


SHARED = (
    # x_next = x_factor x + factor prediction + deviation z
    "x_factor",
    "factor",
    "deviation",
    # factors of the transition that the tracker compares, and the step's minus those
    "transition_x_factor",
    "transition_factor",
    "x_drift",
    "drift",
    "variance",
    # 1 or 0: inside the guidance interval; and past the warm-up
    "active",
    "applied",
    # a difference of predictions times to_noise is one of noise predictions
    "to_noise",
    "from_noise",
    # x0 = x0_x_factor x + x0_factor prediction, clipped to [-clip, clip]
    "x0_x_factor",
    "x0_factor",
    "clip",
    "cfg_scale",
    "guidance_scale",
    # the tracker
    "temperature",
    "offset",
    "offset_nats",
    "low",
    "high",
    "log_odds_cap",
    "eta",
    "beta",
    "score_factor",
)
# A plan has one rule: the rules' own numbers share the columns that follow.  A name that several
# have is in the same place for all.
OWN = (
    ("threshold", "slope", "momentum_scale", "momentum_decay", "absolute"),  # SLD
    ("positive_scale", "rounding_sq"),  # Perp-Neg
    ("contrastive_temperature", "attraction"),  # contrastive CFG
    ("pi", "added"),  # FBG
    ("length", "rounding_sq"),  # GeoGuide
    ("threshold", "rounding_sq", "gain", "rate", "lead"),  # CRG
)
COLUMN = {name: place for place, name in enumerate(SHARED)} | {
    name: len(SHARED) + place for names in OWN for place, name in enumerate(names)
}
WIDTH = 32  # columns in memory: a row of float32 is one cache line
LARGEST_STEPS = 2**16  # a step has 16 bits of the noise's counter
LARGEST = 1e30  # stands for infinity where inf - inf must not happen
SAME_STEP = 1e-9  # relative difference of two steps' factors that is rounding
# Rules that need sums over a sample before they can guide.
NEED_SUMS = (CONTRASTIVE, PERPENDICULAR, GEOMETRIC, REGULATED)

# Values are floats on the host and 0-dim tensors elsewhere; torch.compile can trace a tuple.
_Row = namedtuple("_Row", COLUMN)  # type: ignore[misc]
Row: TypeAlias = Any
_PLACES = tuple(COLUMN.values())


def named(values: Sequence[Any]) -> Row:
    """A row of the table by the names of its columns."""
    return _Row(*[values[place] for place in _PLACES])


def device_of(device: torch.device | str | None) -> torch.device:
    """The device of that name, which must be available; the CPU for None."""
    if device is None:
        return torch.device("cpu")
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        kind = ValueError if isinstance(device, str) else TypeError
        raise kind(f"device must be a torch.device or its name, got {device!r}") from None
    try:
        return torch.empty(0, device=found).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device must be one that torch finds, got {device!r}: {reason}") from None


def _shown(value: object) -> str:
    """A value for an error message; only the dtype of a tensor."""
    return f"one of {value.dtype}" if isinstance(value, Tensor) else repr(value)


def _coded(rule: Rule) -> RuleCode:
    inner, coded = innermost(rule), chain_code(rule)
    if isinstance(inner, SPELL):
        raise ValueError(
            "rule must be one that the step of dng_kernels computes; SPELL compares whole samples "
            "with given points: dng_models.sample and apply_guidance move the prediction by it "
            f"before an unguided step; got {inner!r}"
        )
    if isinstance(inner, ImageReferenced):
        raise ValueError(
            "rule must be one that the step of dng_kernels computes; the posterior of "
            "ImageReferenced needs the density of x, which networks have not: track it, with a "
            "DynamicNegativeGuidance whose negative prediction is that of the points "
            f"(dng_models.PointsDenoiser, apply_guidance(images=...)); got {inner!r}"
        )
    if isinstance(inner, AttentionRule):
        raise ValueError(
            "rule must act on predictions, and this one acts on a network's attention: "
            f"dng_models.apply_guidance puts it into a pipeline's; got {inner!r}"
        )
    if isinstance(inner, AskedNegative):
        raise ValueError(
            "rule must be one that needs predictions only, and AskedNegative asks about samples: "
            "dng_models.DynamicPrompts is this rule for dng_models.apply_guidance, and "
            f"dng_math.sample runs it with engine='reference'; got {inner!r}"
        )
    if coded is None:
        raise TypeError(f"rule must be one of dng_math.rules, got {rule!r}")
    if coded.code == EXACT:
        raise ValueError(
            "rule must track its posterior with a PaperTracker, a LogOddsTracker or a PathTracker: "
            f"networks have no exact one; got {inner!r}"
        )
    # CFG++ is CFG with another scale at every step: a column, not another kernel.
    return coded._replace(code=TOWARD) if coded.code == TOWARD_BY_STEP else coded


def _reference(rule: Rule) -> str:
    """What a rule measures the negative from; "positive" for rules that measure none."""
    return getattr(rule, "reference", "positive")


def _own_columns(code: int) -> tuple[str, ...]:
    """The columns that a rule has for itself."""
    of_rule = {SAFE: 0, PERPENDICULAR: 1, CONTRASTIVE: 2, FEEDBACK: 3, GEOMETRIC: 4, REGULATED: 5}
    return OWN[of_rule[code]] if code in of_rule else ()


def _columns_of_steps(rule: Rule, c: StepCoefficients, on_x0: Array) -> dict[str, Array | float]:
    """What a rule computes from the step that will be taken; ``on_x0`` is dx0/dprediction."""
    numbers = [StepNumbers.of(c, step) for step in range(len(c))]
    if isinstance(rule, CFGPlusPlus):
        return {"guidance_scale": np.array([rule.scale(at) for at in numbers])}
    if isinstance(rule, FeedbackGuidance):
        with np.errstate(divide="ignore"):
            ratios = c.sigma_t / c.alpha_t
        return {"added": np.array([rule.added(float(ratio)) for ratio in ratios])}
    if isinstance(rule, GeoGuide):
        # In one dimension and for x0; the step knows the number of its dimensions.
        lengths = np.array([rule.length(at, 1) for at in numbers])
        return {"length": lengths / np.abs(on_x0), "rounding_sq": ROUNDING_SQ}
    if isinstance(rule, CRG):
        rates = np.array([rule.rate(at) for at in numbers])
        return {"rate": rates, "rounding_sq": ROUNDING_SQ}
    return {}


def _drifts(table: Array, tolerance: float = 0.0) -> bool:
    """Whether the transition that the tracker compares differs from the step of the sampler."""
    drift = np.abs(table[:, [COLUMN["x_drift"], COLUMN["drift"]]])
    size = np.abs(table[:, [COLUMN["x_factor"], COLUMN["factor"]]])
    return bool(np.any(drift > tolerance * size))


def _tracker_columns(tracker: Tracker, c: StepCoefficients) -> dict[str, Array | float]:
    columns: dict[str, Array | float] = {
        "variance": c.tracker_variance(tracker.variance),
        "temperature": temperatures(tracker, c),
        "log_odds_cap": 0.0,
        "eta": c.eta,
        "beta": c.beta_ts,
    }
    low, high = tracker.bounds
    if isinstance(tracker, RatioTracker):
        return columns | {"offset_nats": tracker.step_offset, "low": low, "high": high}
    if isinstance(tracker, PathTracker):
        # A step reads the odds and leaves the state, as it does where the variance is 0.
        columns["variance"] = 0.0
        tracker = tracker.first_order
    columns["offset"] = tracker.offset
    columns["offset_nats"] = tracker.offset_nats / len(c)
    if isinstance(tracker, LogOddsTracker):
        columns |= {"high": LARGEST, "log_odds_cap": high}
    else:
        columns["high"] = high
    return columns | {"low": max(low, -LARGEST)}


# What captured graphs read and write of plans: a graph keeps no tensor of its own accord, and a
# replay on memory that went to others would be silently wrong.  Kilobytes for each plan and batch.
_CAPTURED: dict[int, Tensor] = {}


def capturing(device: torch.device) -> bool:
    """Whether launches on this device go into a graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def keep_captured(*tensors: Tensor) -> None:
    """Keep tensors that a graph will read or write until StepPlan.release_captured."""
    _CAPTURED.update((id(tensor), tensor) for tensor in tensors)


class StepPlan:
    """A schedule, a sampler, a rule and the kind of prediction, ready for :func:`dng_step`.

    Parameters
    ----------
    coefficients : StepCoefficients
        ``schedule.coefficients(sampler)``, one row a step, noisiest first.
    rule : Rule
        From :mod:`dng_math.rules`: unguided, CFG and CFG++, negative prompting, composable NOT,
        SLD, Perp-Neg, contrastive CFG, GeoGuide, CRG, FBG and its hybrids, DNG with a tracker, and
        any of them in a limited interval.
    prediction_type : {"epsilon", "v_prediction", "sample", "flow_prediction"}
        What the network returns: the noise, v = alpha eps - sigma x0, x0, or eps - x0.
    cfg_scale : float or sequence of float, optional
        Classifier-free guidance beneath the rule, with one scale or one per step: the steps then
        take ``eps_uncond`` and start from ``eps_uncond + cfg_scale (eps - eps_uncond)``.  The
        rule's ``reference`` says which of the two the negative is measured from.
    clip : float, optional
        Bound of |x0|: every predicted x0 is clipped to it, as diffusers' ``clip_sample`` does.
    weighted : bool
        Whether steps return ``log_weight``, what a step adds to the log weight of a sample of
        :class:`dng_math.FeynmanKac`, but for the change of the posterior; for
        :class:`dng_math.DynamicNegativeGuidance`.  A last step without noise, which has no density
        to compare, is then taken unguided.
    device : torch.device or str, optional
        Where the steps run; default "cpu".

    Attributes
    ----------
    coefficients, rule, prediction_type, clip, device
        As given.
    tracker : PaperTracker, LogOddsTracker, PathTracker, RatioTracker or None
        What the rule tracks; steps then take and return a ``state``.
    has_state, tracks_evidence : bool
        Whether steps take and return a ``state``, and whether it is CRG's sum of evidence, which
        :func:`guide` returns too.
    from_uncond : bool
        Whether the negative is measured from ``eps_uncond``: with ``cfg_scale``, for a rule with
        ``reference="unconditional"``.
    has_log_odds : bool
        Whether the state is log p/(1-p).
    tracks_path : bool
        Whether it is a path tracker: steps then return the state as it was, and
        :func:`update_path` changes it before each.
    needs_uncond, needs_positive, needs_momentum, needs_divergence : bool
        Whether steps take ``eps_uncond``, ``eps_pos``, ``momentum``, ``divergence_gap``.
    noisy : list of bool
        Whether a step adds noise, and so takes ``noise`` or a ``seed``.
    indices : tuple of Tensor, shape (), int64
        Every step index as a tensor on the device, to be passed as ``step``.
    table, table64 : Tensor, shape (N, 32), float32 and float64
        The numbers of every step, on the device; the columns are named by :data:`COLUMN`.
    variants : tuple of Variant
        What the kernels of STEP, GUIDE and UPDATE are compiled for.

    Raises
    ------
    ValueError, TypeError
        If an argument is invalid; the message names it, its value and what is allowed.

    Warns
    -----
    UserWarning
        If the sampler adds less noise than DDPM (eta < 1) and the rule's tracker lacks
        ``divergence=True``, with which :func:`update_posterior` adds the missing term: the
        tracked posterior is then wrong.
    """

    def __init__(
        self,
        coefficients: StepCoefficients,
        rule: Rule,
        *,
        prediction_type: PredictionType = "epsilon",
        cfg_scale: float | Sequence[float] | None = None,
        clip: float | None = None,
        weighted: bool = False,
        device: torch.device | str | None = None,
        _warn: bool = True,  # False for callers that give a warning of their own
    ) -> None:
        if not isinstance(coefficients, StepCoefficients):
            raise TypeError(f"coefficients must be a StepCoefficients, got {coefficients!r}")
        if not 1 <= len(coefficients) <= LARGEST_STEPS:
            raise ValueError(
                f"coefficients must have 1 to {LARGEST_STEPS} steps, got {len(coefficients)}"
            )
        if not hasattr(rule, "guide"):
            raise TypeError(f"rule must be one of dng_math.rules, got {rule!r}")
        checks.choice("prediction_type", prediction_type, PREDICTION_TYPES)
        if prediction_type == "epsilon" and np.any(coefficients.alpha_t == 0):
            raise ValueError(
                "prediction_type must not be 'epsilon' where alpha is 0 (there x says nothing of "
                f"x0, step {int(np.argmin(coefficients.alpha_t))}): use 'v_prediction', 'sample' "
                "or 'flow_prediction'"
            )
        if not np.all(coefficients.sigma_t > 0):
            step = int(np.argmin(coefficients.sigma_t > 0))
            raise ValueError(
                "coefficients.sigma_t must be > 0 at the noisier end of every step, got "
                f"{coefficients.sigma_t[step]} at step {step}"
            )
        self.coefficients = coefficients
        self._steps = len(coefficients)
        self.rule = rule
        self.prediction_type = prediction_type
        self.clip = None if clip is None else checks.positive("clip", clip)
        self.tracker = tracker_of(rule, coefficients)
        coded = _coded(rule)
        self.needs_positive = coded.code == PERPENDICULAR
        self.needs_momentum = coded.code == SAFE
        self._compares_lengths = "rounding_sq" in _own_columns(coded.code)
        self.needs_uncond = cfg_scale is not None
        inner = innermost(rule)
        self.from_uncond = self.needs_uncond and _reference(inner) == "unconditional"
        self.tracks_evidence = coded.code == REGULATED
        self.has_state = self.tracker is not None or self.tracks_evidence
        tracked = self.tracker
        if isinstance(tracked, PathTracker):
            tracked = tracked.first_order
        self.has_log_odds = isinstance(tracked, LogOddsTracker)
        # update_path takes a path tracker's divergence, and no step does.
        self.tracks_path = isinstance(self.tracker, PathTracker)
        self.needs_divergence = (
            self.tracker is not None and self.tracker.divergence and not self.tracks_path
        )
        if self.needs_uncond and self.needs_positive:
            raise ValueError(
                "cfg_scale must be None for PerpNeg, whose positive_scale does the same; "
                f"got {cfg_scale!r}"
            )
        both = bool(getattr(inner, "positive_factor", False))
        if not self.needs_uncond and (both or self.tracks_evidence):
            raise ValueError(
                f"cfg_scale must be given for {inner!r}, which compares the positive prediction "
                "with the unconditional one; got None"
            )
        self._reads_third = both or (coded.code == SAFE and self.from_uncond)
        self.weighted = checks.boolean("weighted", weighted)
        table = self._table(coded, cfg_scale)
        if _warn:
            warn_where_noise_is_missing(self.tracker, coefficients, stacklevel=2)
        # Read on the host at every step, so kept as a list.
        self.noisy: list[bool] = (table[:, COLUMN["deviation"]] > 0).tolist()
        self._ever_noisy = any(self.noisy)
        if self.weighted:
            self._check_weighted(coded.code, table)
            # The sum along the residual is then that of the shift and the noise; what a path
            # tracker compares is not in it.
            table[:, [COLUMN["x_drift"], COLUMN["drift"]]] = 0.0
        self.variants = self._all_variants(coded.code, table)
        self._on_host = torch.from_numpy(table)
        self._place(device_of(device))

    def _table(self, coded: RuleCode, cfg_scale: float | Sequence[float] | None) -> Array:
        c, tracker = self.coefficients, self.tracker
        # The factors of x0 = x0_x_factor x + x0_factor prediction.
        x0_x_factor, x0_factor = (
            np.broadcast_to(x0_of(self.prediction_type, *at, c.alpha_t, c.sigma_t), len(c))
            for at in ((1.0, 0.0), (0.0, 1.0))
        )
        to_noise = -(c.alpha_t / c.sigma_t) * x0_factor
        if self.prediction_type == "epsilon":
            to_noise = np.ones_like(to_noise)
        steps: dict[str, Array | float] = {}
        if self.clip is None:
            for of in ("", "transition_"):
                on_x, on_x0 = getattr(c, f"{of}x_factor"), getattr(c, f"{of}x0_factor")
                steps[f"{of}x_factor"] = equations.step_mean(on_x, x0_x_factor, 1.0, on_x0)
                steps[f"{of}factor"] = on_x0 * x0_factor
        else:
            # Clipping cannot be folded into factors of the prediction: the step is taken on x0.
            steps = {
                "x_factor": c.x_factor,
                "factor": c.x0_factor,
                "transition_x_factor": c.transition_x_factor,
                "transition_factor": c.transition_x0_factor,
            }
        active = np.ones(len(c))
        rule = self.rule
        while isinstance(rule, LimitedInterval):
            active *= (rule.t_lo <= c.time) & (c.time <= rule.t_hi)
            rule = rule.rule
        if self.weighted:
            active *= c.step_var > 0
        warmed_up = np.arange(len(c)) >= coded.parameters.get("warmup_steps", 0)
        columns: dict[str, Array | float] = {
            **steps,
            "x_drift": np.subtract(steps["x_factor"], steps["transition_x_factor"]),
            "drift": np.subtract(steps["factor"], steps["transition_factor"]),
            "deviation": np.sqrt(np.maximum(c.step_var, 0.0)),
            "variance": c.step_var,
            "active": active,
            "applied": active * warmed_up * (to_noise != 0),
            "to_noise": to_noise,
            "from_noise": np.divide(1.0, to_noise, out=np.zeros(len(c)), where=to_noise != 0),
            "x0_x_factor": x0_x_factor,
            "x0_factor": x0_factor,
            "clip": 0.0 if self.clip is None else self.clip,
            "cfg_scale": 1.0,
            "guidance_scale": coded.guidance_scale,
            **{name: value for name, value in coded.parameters.items() if name in COLUMN},
        }
        columns |= _columns_of_steps(rule, c, x0_factor)
        if coded.code == REGULATED:
            columns["rate"] = active * columns["rate"]
        if cfg_scale is not None:
            scale: Array | float = (
                checks.finite("cfg_scale", cfg_scale)
                if np.isscalar(cfg_scale)
                else checks.array("cfg_scale", cfg_scale, (len(c),))
            )
            columns["cfg_scale"] = np.subtract(1.0, scale) if self.from_uncond else scale
            if coded.code == CONTRASTIVE:
                # The factor f turns the scale w into w f, and 1 - w into 1 - w f.
                columns["attraction"] = np.negative(scale) if self.from_uncond else scale
            if coded.code == REGULATED:
                columns["lead"] = scale
        if tracker is not None:
            columns |= _tracker_columns(tracker, c)
            # |s_c - s|^2 from |delta|^2: s is -eps / sigma, and (alpha x0 - x) / sigma^2.
            of_x0 = c.alpha_t / c.sigma_t**2
            columns["score_factor"] = (to_noise / c.sigma_t if self.clip is None else of_x0) ** 2
        if np.any(c.step_var < 0):
            step = int(np.argmax(c.step_var < 0))
            raise ValueError(
                f"coefficients.step_var must be >= 0, got {c.step_var[step]} at step {step}"
            )
        table = np.zeros((len(c), WIDTH))
        for name, values in columns.items():
            column = table[:, COLUMN[name]]
            column[:] = values
            with np.errstate(over="ignore"):
                finite = np.isfinite(column.astype(np.float32))
            if not finite.all():
                step = int(np.argmin(finite))
                raise ValueError(
                    f"coefficients must be finite in float32, but {name} is {column[step]} at "
                    f"step {step}"
                )
        variance = table[:, COLUMN["variance"]]
        if np.any(variance < 0):
            step = int(np.argmax(variance < 0))
            raise ValueError(
                f"the tracker's variance must be >= 0, got {variance[step]} at step {step}"
            )
        return table

    def _check_weighted(self, rule: int, table: Array) -> None:
        """Refuse weights where a step's two sums do not hold them."""
        reason = None
        silent = int(np.sum(~np.array(self.noisy[:-1], dtype=bool)))
        if rule != TRACKED:
            reason = "the rule is DynamicNegativeGuidance, whose target they are for"
        elif self.needs_uncond:
            reason = "cfg_scale is None: the sums of a step would hold the shift by CFG too"
        elif self.clip is not None:
            reason = "clip is None: a clipped shift is none along the difference of predictions"
        elif silent:
            reason = (
                "all steps but the last add noise, or there is no density to compare: "
                f"{silent} add none (use DDPM, or DDIM with eta > 0)"
            )
        elif not self.tracks_path and _drifts(table, SAME_STEP):
            reason = (
                "the sampler's noise is that of the tracker's transitions (DDPM, or DDIM with "
                "eta=1), or the tracker a PathTracker"
            )
        if reason is not None:
            raise ValueError(f"weighted must be False unless {reason}; got True for {self.rule!r}")

    def _all_variants(self, rule: int, table: Array) -> tuple[Variant, Variant, Variant]:
        """What the kernels of STEP, GUIDE and UPDATE are compiled for."""
        tracked = self.tracker
        if isinstance(tracked, PathTracker):
            tracked = tracked.first_order  # whose state is the same
        tracker, cfg, clip = tracker_code(tracked), self.needs_uncond, self.clip is not None
        drift = _drifts(table)
        divergence, third = self.needs_divergence, self._reads_third
        return (
            Variant(STEP, rule, tracker, cfg, clip, drift, divergence, third, self.weighted),
            Variant(GUIDE, rule, tracker, cfg, False, False, False, third, False),
            Variant(UPDATE, rule, tracker, False, clip, False, divergence, False, False),
        )

    def _place(self, device: torch.device) -> None:
        self.table64 = self._on_host.to(device)
        self.table = self._on_host.to(device, torch.float32)
        if self._compares_lengths:
            # The differences are rounded to float32, so the threshold is higher.
            self.table[:, COLUMN["rounding_sq"]] = torch.finfo(torch.float32).eps ** 2
        self.device = self.table.device
        # Made once: indexing a tensor at every step would cost more than checking its arguments.
        # All are at multiples of 16 bytes, as Triton compiles for the alignment of an address.
        self.indices = torch.arange(len(self), device=device).repeat_interleave(2)[::2].unbind()
        self._workspaces: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        # Calls that were launched before, by what they have in common (dng_kernels._known).
        self._known: dict[tuple[Any, ...], Any] = {}

    def __len__(self) -> int:
        """Number of steps."""
        return self._steps

    def __repr__(self) -> str:
        """The rule and where it runs."""
        return (
            f"StepPlan({len(self)} steps, {self.rule!r}, {self.prediction_type!r}, {self.device})"
        )

    def __getstate__(self) -> dict[str, Any]:
        """All but the calls that are known, which belong to this process."""
        return self.__dict__ | {"_known": {}}

    def to(self, device: torch.device | str) -> StepPlan:
        """A plan of the same steps on another device, with a workspace of its own."""
        if device is None:
            raise TypeError("device must be a torch.device or its name, got None")
        place = device_of(device)
        other = object.__new__(StepPlan)
        other.__dict__.update(self.__dict__)
        other._place(place)
        return other

    def workspace(self, batch: int, elements: int) -> tuple[Tensor, Tensor]:
        """Counters and room for sums, for launches of batches of that shape; made once.

        A plan serves one stream at a time.  Call this, or a step, before a graph is captured.
        What a graph reads of a plan outlives the plan: see :meth:`release_captured`.
        """
        key = batch, elements
        if key not in self._workspaces:
            checks.integer("batch", batch, 0)
            checks.integer("elements", elements, 0)
            if capturing(self.device):
                raise RuntimeError(
                    "the workspace of a batch must exist before a graph is captured: take a step "
                    f"first, or call plan.workspace({batch}, {elements})"
                )
            self._workspaces[key] = layout.workspace(batch, elements, self.device)
        return self._workspaces[key]

    @staticmethod
    def release_captured() -> int:
        """Free what was kept of plans because a graph was captured; call it when no graph is left.

        A captured graph reads the table of a plan and writes into its workspace when it is
        replayed, and nobody tells when a graph is gone.  So these tensors, kilobytes for each plan
        and batch, are kept even after the plan, until this is called.  Tensors that steps in a
        graph were given, and those that a :class:`BoundStep` made for its results, are not among
        them: keep these yourself, as with any graph.

        Returns
        -------
        int
            Number of tensors that were kept.
        """
        count = len(_CAPTURED)
        _CAPTURED.clear()
        return count

    def column(self, name: str) -> Tensor:
        """One number of every step, by its name in :data:`COLUMN`; (N,), float64 on the CPU."""
        return self._on_host[:, COLUMN[checks.choice("name", name, COLUMN)]]

    def row(self, step: int) -> Row:
        """All numbers of a step as floats, by their names in :data:`COLUMN`."""
        return named(self._on_host[checks.integer("step", step, 0, len(self) - 1)].tolist())

    def init_state(self, batch: int, dtype: torch.dtype = torch.float32) -> Tensor | None:
        """The state before the first step, shape (batch,); None for rules that have none.

        It is log p for :class:`PaperTracker`, log p/(1-p) for :class:`LogOddsTracker`, either for
        :class:`PathTracker`, L for FBG, and the sum of evidence, 0 at first, for CRG.
        """
        checks.integer("batch", batch, 0)
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(f"dtype must be torch.float32 or torch.float64, got {dtype!r}")
        if self.tracks_evidence:
            return torch.zeros(batch, dtype=dtype, device=self.device)
        if self.tracker is None:
            return None
        prior = getattr(self.tracker, "prior", 0.5)
        if prior is None:
            raise ValueError(
                "the tracker's prior must be given: networks have no weights to take it from; "
                f"got {self.tracker!r}"
            )
        value = float(self.tracker.init(np.array(prior)))
        return torch.full((batch,), value, dtype=dtype, device=self.device)

    def init_momentum(self, x: Tensor) -> Tensor | None:
        """SLD's momentum before the first step, zeros like x; None for the other rules.

        It has the units of the noise, and is float32, or float64 if x is.
        """
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(f"x must be a floating-point tensor, got {_shown(x)}")
        if not self.needs_momentum:
            return None
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        return torch.zeros_like(x, dtype=dtype)

    def log_posterior(self, state: Tensor) -> Tensor:
        """log p(c | x) from a state, any shape; for FBG and CRG the state, a log ratio, itself."""
        if not isinstance(state, Tensor) or not state.is_floating_point():
            raise TypeError(f"state must be a floating-point tensor, got {_shown(state)}")
        if self.has_log_odds:
            return torch.nn.functional.logsigmoid(state)
        return state
