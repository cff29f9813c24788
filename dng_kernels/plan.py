"""Everything about a run that is known before its first step, as one table on the device.

A row of the table holds the coefficients of one step and the hyperparameters of the rule and of
its tracker, so that a kernel reads its numbers from memory with the step index: a captured graph
replays every step, and a change of hyperparameters compiles nothing.

Predictions enter as the network gives them.  With ``x0 = P x + Q prediction`` the step
``x_next = A x + B x0 + sqrt(V) z`` is ``(A + B P) x + B Q prediction + sqrt(V) z``; the folding
is done here, in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dng_kernels import layout
from dng_math import _checks, equations
from dng_math.guidance import (
    ClassifierFreeGuidance,
    ContrastiveCFG,
    DynamicNegativeGuidance,
    FeedbackGuidance,
    LimitedInterval,
    NegativePrompting,
    PerpNeg,
    RatioTracker,
    Rule,
    SafeLatentDiffusion,
    Unguided,
    innermost,
    tracker_of,
    warn_where_noise_is_missing,
)
from dng_math.posterior import LogOddsTracker, PaperTracker, temperatures
from dng_math.schedules import StepCoefficients

Array = NDArray[np.float64]
Tracker = PaperTracker | LogOddsTracker | RatioTracker
PredictionType = Literal["epsilon", "v_prediction", "sample", "flow"]
PREDICTION_TYPES: tuple[PredictionType, ...] = ("epsilon", "v_prediction", "sample", "flow")

# What the kernels know of a rule.  STATIC pushes away with g, TRACKED with g p/(1-p);
# TOWARD pulls with g, FEEDBACK with e^L/(e^L - (1 - pi)).
STATIC, TRACKED, TOWARD, FEEDBACK, SAFE, CONTRASTIVE, PERPENDICULAR = range(7)
NO_TRACKER, PAPER, LOG_ODDS, RATIO = range(4)

COLUMNS = (
    # x_next = x_factor x + factor prediction + deviation z
    "x_factor",
    "factor",
    "deviation",
    # factors of the transition that the tracker compares, and the step's minus those
    "kernel_x_factor",
    "kernel_factor",
    "x_drift",
    "drift",
    "variance",
    # 1 or 0: inside the guidance interval; and past the warm-up
    "active",
    "applied",
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
    # the rule: pi; threshold, slope, momentum scale, momentum decay and whether the gate is
    # absolute; temperature; positive scale and what is rounding in |positive - base|^2/|base|^2
    "rule_0",
    "rule_1",
    "rule_2",
    "rule_3",
    "rule_4",
)
WIDTH = 32  # columns in memory: a row of float32 is one cache line
LARGEST_STEPS = 2**16  # a step has 16 bits of the noise's counter
LARGEST = 1e30  # stands for infinity where inf - inf must not happen


@dataclass(frozen=True)
class _Coded:
    """A rule in numbers."""

    code: int
    guidance_scale: float
    parameters: tuple[float, ...] = ()


def _code(rule: Rule) -> _Coded:
    if isinstance(rule, Unguided):
        return _Coded(STATIC, 0.0)
    if isinstance(rule, ClassifierFreeGuidance):
        return _Coded(TOWARD, rule.guidance_scale)
    if isinstance(rule, NegativePrompting):
        return _Coded(STATIC, rule.guidance_scale)
    if isinstance(rule, FeedbackGuidance):
        return _Coded(FEEDBACK, 1.0, (rule.pi,))
    if isinstance(rule, SafeLatentDiffusion):
        absolute = float(rule.gate == "absolute")
        shape = (rule.threshold, rule.scale, rule.momentum_scale, rule.momentum_decay, absolute)
        return _Coded(SAFE, rule.guidance_scale, shape)
    if isinstance(rule, ContrastiveCFG):
        return _Coded(CONTRASTIVE, rule.guidance_scale, (rule.temperature,))
    if isinstance(rule, PerpNeg):
        parameters = (rule.positive_scale, rule.ROUNDING_SQ)
        return _Coded(PERPENDICULAR, rule.guidance_scale, parameters)
    if isinstance(rule, DynamicNegativeGuidance):
        if isinstance(rule.posterior, PaperTracker | LogOddsTracker):
            return _Coded(TRACKED, rule.guidance_scale)
        raise ValueError(
            "rule must track its posterior with a PaperTracker or a LogOddsTracker: networks have "
            f"no exact one; got {rule!r}"
        )
    raise TypeError(f"rule must be one of dng_math.guidance, got {rule!r}")


def _x0_factors(prediction: str, c: StepCoefficients) -> tuple[Array, Array]:
    """P and Q of x0 = P x + Q prediction."""
    if prediction == "epsilon":
        if np.any(c.alpha_t == 0):
            raise ValueError(
                "prediction must not be 'epsilon' where alpha is 0 (there x says nothing of x0, "
                f"step {int(np.argmin(c.alpha_t))}): use 'v_prediction', 'sample' or 'flow'"
            )
        one = equations.x0_from_noise(1.0, 0.0, c.alpha_t, c.sigma_t)
        return one, equations.x0_from_noise(0.0, 1.0, c.alpha_t, c.sigma_t)
    if prediction == "v_prediction":
        one = equations.x0_from_velocity(1.0, 0.0, c.alpha_t, c.sigma_t)
        return one, equations.x0_from_velocity(0.0, 1.0, c.alpha_t, c.sigma_t)
    if prediction == "flow":
        return np.ones_like(c.sigma_t), equations.x0_from_flow(0.0, 1.0, c.sigma_t)
    return np.zeros_like(c.sigma_t), np.ones_like(c.sigma_t)


def _tracker_columns(tracker: Tracker, c: StepCoefficients) -> dict[str, Array | float]:
    columns: dict[str, Array | float] = {
        "variance": c.tracker_variance(tracker.variance),
        "temperature": temperatures(tracker, c),
        "log_odds_cap": 0.0,
        "eta": c.eta,
        "beta": c.beta_ts,
    }
    if isinstance(tracker, RatioTracker):
        limits = {"offset_nats": tracker.step_offset, "low": tracker.low, "high": tracker.high}
        return columns | limits
    columns["offset"] = tracker.offset
    columns["offset_nats"] = tracker.offset_nats / len(c)
    with np.errstate(divide="ignore"):
        low, high = np.log(tracker.p_min), np.log(tracker.p_max)
    if isinstance(tracker, LogOddsTracker):
        low -= np.log1p(-tracker.p_min)
        cap = high - np.log1p(-tracker.p_max)
        return columns | {"low": max(low, -LARGEST), "high": LARGEST, "log_odds_cap": cap}
    return columns | {"low": max(low, -LARGEST), "high": high}


class StepPlan:
    """A schedule, a sampler, a rule and the kind of prediction, ready for :func:`dng_step`.

    Parameters
    ----------
    coefficients : StepCoefficients
        ``schedule.coefficients(sampler)``, one row a step, noisiest first.
    rule : Rule
        From :mod:`dng_math.guidance`: unguided, CFG, negative prompting, SLD, Perp-Neg,
        contrastive CFG, FBG, DNG with a tracker, and any of them in a limited interval.
    prediction : {"epsilon", "v_prediction", "sample", "flow"}
        What the network returns: the noise, v = alpha eps - sigma x0, x0, or eps - x0.
    cfg_scale : float or sequence of float, optional
        Classifier-free guidance beneath the rule, of one scale or of one a step: the steps then
        take ``eps_uncond`` and start from ``eps_uncond + cfg_scale (eps - eps_uncond)``.
    clip : float, optional
        Bound of |x0|: every predicted x0 is clipped to it, as diffusers' ``clip_sample`` does.
    device : torch.device or str, optional
        Where the steps run; default "cpu".

    Raises
    ------
    ValueError, TypeError
        Naming the argument, its value and what is allowed.

    Warns
    -----
    UserWarning
        Where the sampler adds less noise than DDPM (eta < 1) and the rule's tracker has not
        ``divergence=True``, with which :func:`update_posterior` takes the missing term: the
        posterior is then wrong.
    """

    def __init__(
        self,
        coefficients: StepCoefficients,
        rule: Rule,
        *,
        prediction: PredictionType = "epsilon",
        cfg_scale: float | Sequence[float] | None = None,
        clip: float | None = None,
        device: torch.device | str | None = None,
        _warn: bool = True,  # False for callers that warn themselves, of a cure of their own
    ) -> None:
        if not isinstance(coefficients, StepCoefficients):
            raise TypeError(f"coefficients must be a StepCoefficients, got {coefficients!r}")
        if not 1 <= len(coefficients) <= LARGEST_STEPS:
            raise ValueError(
                f"coefficients must have 1 to {LARGEST_STEPS} steps, got {len(coefficients)}"
            )
        if not hasattr(rule, "guide"):
            raise TypeError(f"rule must be one of dng_math.guidance, got {rule!r}")
        _checks.choice("prediction", prediction, PREDICTION_TYPES)
        if not np.all(coefficients.sigma_t > 0):
            step = int(np.argmin(coefficients.sigma_t > 0))
            raise ValueError(
                "coefficients.sigma_t must be > 0 at the noisier end of every step, got "
                f"{coefficients.sigma_t[step]} at step {step}"
            )
        self.coefficients = coefficients
        self._steps = len(coefficients)
        self.rule = rule
        self.prediction = prediction
        self.clip = None if clip is None else _checks.positive("clip", clip)
        self.tracker = tracker_of(rule, coefficients)
        coded = _code(innermost(rule))
        self.rule_code = coded.code
        self.needs_positive = coded.code == PERPENDICULAR
        self.needs_momentum = coded.code == SAFE
        self.needs_uncond = cfg_scale is not None
        self.needs_divergence = self.tracker is not None and self.tracker.divergence
        if self.needs_uncond and self.needs_positive:
            raise ValueError(
                "cfg_scale must be None for PerpNeg, whose positive_scale does the same; "
                f"got {cfg_scale!r}"
            )
        self.tracker_code = {
            PaperTracker: PAPER,
            LogOddsTracker: LOG_ODDS,
            RatioTracker: RATIO,
            type(None): NO_TRACKER,
        }[type(self.tracker)]

        table = self._table(coded, cfg_scale)
        self._check(table)
        if _warn:
            warn_where_noise_is_missing(self.tracker, coefficients, stacklevel=2)
        column = {name: i for i, name in enumerate(COLUMNS)}
        self.has_drift = bool(np.any(table[:, [column["x_drift"], column["drift"]]]))
        # Asked on the host at every step, so kept as a list.
        self.noisy: list[bool] = (table[:, column["deviation"]] > 0).tolist()
        self.ever_noisy = any(self.noisy)
        self._table64 = torch.from_numpy(table)
        self._place(torch.device("cpu" if device is None else device))

    def _table(self, coded: _Coded, cfg_scale: float | Sequence[float] | None) -> Array:
        c, tracker = self.coefficients, self.tracker
        x0_x_factor, x0_factor = _x0_factors(self.prediction, c)
        to_noise = -(c.alpha_t / c.sigma_t) * x0_factor
        if self.prediction == "epsilon":
            to_noise = np.ones_like(to_noise)
        steps: dict[str, Array | float] = {}
        if self.clip is None:
            for kernel in ("", "kernel_"):
                on_x, on_x0 = getattr(c, f"{kernel}x_factor"), getattr(c, f"{kernel}x0_factor")
                steps[f"{kernel}x_factor"] = equations.step_mean(on_x, x0_x_factor, 1.0, on_x0)
                steps[f"{kernel}factor"] = on_x0 * x0_factor
        else:
            # What is clipped cannot be folded: the step is taken on x0.
            steps = {
                "x_factor": c.x_factor,
                "factor": c.x0_factor,
                "kernel_x_factor": c.kernel_x_factor,
                "kernel_factor": c.kernel_x0_factor,
            }
        active = np.ones(len(c))
        rule, inner = self.rule, innermost(self.rule)
        while isinstance(rule, LimitedInterval):
            active *= (rule.t_lo <= c.time) & (c.time <= rule.t_hi)
            rule = rule.rule
        applied = active
        if isinstance(inner, SafeLatentDiffusion):
            applied = active * (np.arange(len(c)) >= inner.warmup_steps) * (to_noise != 0)
        columns: dict[str, Array | float] = {
            **steps,
            "x_drift": np.subtract(steps["x_factor"], steps["kernel_x_factor"]),
            "drift": np.subtract(steps["factor"], steps["kernel_factor"]),
            "deviation": np.sqrt(np.maximum(c.step_var, 0.0)),
            "variance": c.step_var,
            "active": active,
            "applied": applied,
            "to_noise": to_noise,
            "from_noise": np.divide(1.0, to_noise, out=np.zeros(len(c)), where=to_noise != 0),
            "x0_x_factor": x0_x_factor,
            "x0_factor": x0_factor,
            "clip": 0.0 if self.clip is None else self.clip,
            "cfg_scale": 1.0,
            "guidance_scale": coded.guidance_scale,
            **{f"rule_{i}": value for i, value in enumerate(coded.parameters)},
        }
        if cfg_scale is not None:
            per_step = np.ndim(cfg_scale) > 0
            columns["cfg_scale"] = (
                _checks.array("cfg_scale", cfg_scale, (len(c),))
                if per_step
                else _checks.finite("cfg_scale", cfg_scale)
            )
        if tracker is not None:
            columns |= _tracker_columns(tracker, c)
            # |s_c - s|^2 from |delta|^2: s is -eps / sigma, and (alpha x0 - x) / sigma^2.
            of_x0 = c.alpha_t / c.sigma_t**2
            columns["score_factor"] = (to_noise / c.sigma_t if self.clip is None else of_x0) ** 2
        table = np.zeros((len(c), WIDTH))
        for name, values in columns.items():
            table[:, COLUMNS.index(name)] = values
        return table

    def _check(self, table: Array) -> None:
        if np.any(self.coefficients.step_var < 0):
            step = int(np.argmax(self.coefficients.step_var < 0))
            raise ValueError(
                "coefficients.step_var must be >= 0, "
                f"got {self.coefficients.step_var[step]} at step {step}"
            )
        variance = table[:, COLUMNS.index("variance")]
        if np.any(variance < 0):
            step = int(np.argmax(variance < 0))
            raise ValueError(
                f"the tracker's variance must be >= 0, got {variance[step]} at step {step}"
            )
        with np.errstate(over="ignore"):
            finite = np.isfinite(table.astype(np.float32))
        if not finite.all():
            step, column = (int(i) for i in np.argwhere(~finite)[0])
            raise ValueError(
                f"coefficients must be finite in float32, but {COLUMNS[column]} is "
                f"{table[step, column]} at step {step}"
            )

    def _place(self, device: torch.device) -> None:
        self.table64 = self._table64.to(device)
        self.table = self._table64.to(device, torch.float32)
        if self.rule_code == PERPENDICULAR:
            # In float32 more of a difference is rounding.
            self.table[:, COLUMNS.index("rule_1")] = torch.finfo(torch.float32).eps ** 2
        self.device = self.table.device
        # Views made once: indexing a tensor at every step costs more than the checks of a step.
        self.indices = torch.arange(len(self), device=device)
        self.index_of = list(self.indices.unbind())
        self._workspaces: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        """Number of steps."""
        return self._steps

    def __repr__(self) -> str:
        """The rule and where it runs."""
        return f"StepPlan({len(self)} steps, {self.rule!r}, {self.prediction!r}, {self.device})"

    def to(self, device: torch.device | str) -> StepPlan:
        """A plan of the same steps on another device, with a workspace of its own."""
        other = object.__new__(StepPlan)
        other.__dict__.update(self.__dict__)
        other._place(torch.device(device))
        return other

    def workspace(self, batch: int, elements: int) -> tuple[Tensor, Tensor]:
        """Counters and room for sums, for launches of batches of that shape; made once.

        A plan serves one stream at a time.  Call this, or a step, before a graph is captured.
        """
        key = batch, elements
        if key not in self._workspaces:
            if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "the workspace of a batch must exist before a graph is captured: take a step "
                    f"first, or call plan.workspace({batch}, {elements})"
                )
            self._workspaces[key] = layout.workspace(batch, elements, self.device)
        return self._workspaces[key]

    def init_state(self, batch: int, dtype: torch.dtype = torch.float32) -> Tensor | None:
        """State of the tracker before the first step, shape (batch,); None without a tracker.

        log p for :class:`PaperTracker`, log p/(1-p) for :class:`LogOddsTracker`, L for FBG.
        """
        _checks.integer("batch", batch, 0)
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
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

        It is in units of the noise, float32 (float64 if x is).
        """
        if not self.needs_momentum:
            return None
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        return torch.zeros_like(x, dtype=dtype)

    def log_posterior(self, state: Tensor) -> Tensor:
        """log p(c | x) from a state, any shape; for FBG the log ratio L itself."""
        if self.tracker_code == LOG_ODDS:
            return torch.nn.functional.logsigmoid(state)
        return state
