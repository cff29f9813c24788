"""What decides a result, in one typed object; and where everything of a run lies.

A :class:`Config` names one setting: the data, what is forgotten, the networks, the rule with its
hyperparameters, the chain, and how many images are drawn.  It is written beside every result, and
its key names the result.  Nothing that cannot change an image or a metric (the device, the number
of processes, progress bars) is in it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote

from dng_math import _checks
from dng_math.guidance import (
    ClassifierFreeGuidance,
    ClassifierGuidance,
    ContrastiveCFG,
    DynamicNegativeGuidance,
    FeedbackGuidance,
    LimitedInterval,
    NegativePrompting,
    PerpNeg,
    Rule,
    SafeLatentDiffusion,
    Unguided,
)
from dng_math.posterior import LogOddsTracker, PaperTracker
from dng_math.schedules import TRACKER_VARIANCES, TrackerVariance
from dng_models import foreign

if TYPE_CHECKING:
    from dng_models.class_removal.calibrate import Calibration

Networks = Literal["pair", "conditional"]
NETWORKS: tuple[Networks, ...] = ("pair", "conditional")
RuleName = Literal["none", "np", "sld", "dng", "ccfg", "cfg", "cg", "fbg", "perp-neg"]
RULES: tuple[RuleName, ...] = ("none", "np", "sld", "dng", "ccfg", "cfg", "cg", "fbg", "perp-neg")
TOWARD = ("cfg", "cg", "fbg")  # those that do not look at what is forbidden
NEED_POSITIVE = (*TOWARD, "perp-neg")
TrackerName = Literal["paper", "log-odds"]
TRACKERS: dict[TrackerName, type[PaperTracker] | type[LogOddsTracker]] = {
    "paper": PaperTracker,
    "log-odds": LogOddsTracker,
}
Hyperparameters = Literal["paper", "calibrated", "calibrated-constant", "own"]
HYPERPARAMETERS: tuple[Hyperparameters, ...] = (
    "paper",
    "calibrated",
    "calibrated-constant",
    "own",
)
CALIBRATED = ("calibrated", "calibrated-constant")
AUTOCAST = ("float16", "bfloat16")

BUILT_IN = {
    "digits": "digits",
    "mnist": "mnist",
    "ylecun/mnist": "mnist",
    "cifar10": "cifar10",
    "uoft-cs/cifar10": "cifar10",
}
# Prior, temperature and offset by which the paper tracks (its section 5); digits as MNIST.
PAPER: dict[str, dict[str, Any]] = {
    "digits": {"prior": 0.25, "temperature": 0.25, "offset": 0.0},
    "mnist": {"prior": 0.25, "temperature": 0.25, "offset": 0.0},
    "cifar10": {"prior": 0.01, "temperature": 0.2, "offset": 2e-4},
}
# What differs from the defaults of a configuration where little suffices.
FEWER_FOR_DIGITS: dict[str, Any] = {"steps": 100, "batch_size": 128}
CALIBRATION_PATHS = 4  # noisings of a held-out image
PRECISIONS = {"no": None, "fp16": "float16", "bf16": "bfloat16"}
TrainingPrecision = Literal["no", "bf16"]  # fp16 needs a loss scale, a state more to resume
TRAINING_PRECISIONS: tuple[TrainingPrecision, ...] = ("no", "bf16")
OWN = ("prior", "temperature", "offset", "offset_nats")


@dataclass(frozen=True)
class Config:
    """One setting: everything that decides its images and what is measured of them.

    Parameters
    ----------
    dataset : str
        "digits", "mnist", "cifar10", a hub name, a parquet file or a folder of images.
    image_column, label_column : str, optional
        Found by their types where they are not named.
    split : str
        Of a data set that has several.
    held_out : float
        Share of the data that no network is trained on, in (0, 1).
    image_size, channels : int, optional
        To which images are brought; default: as they are.
    like : {"digits", "mnist", "cifar10"}, optional
        Which of the built-in data sets a file or folder holds, where its name does not say: the
        paper's settings for that one are used.
    forget : tuple of str
        Names of the forbidden classes, at least one.
    networks : {"pair", "conditional"}
        The paper's two networks, or one conditional network with label dropout.
    base, positive, classifier : str, optional
        Folder or hub name, instead of those of the run folder.
    forgetful : tuple of str
        The same, one for every forgotten class (or one for all of them).
    toward : str, optional
        Class whose network is the positive one, for rules that need one.
    rule : {"none", "np", "sld", "dng", "ccfg", "cfg", "cg", "fbg", "perp-neg"}
        See :mod:`dng_math.guidance`.
    scale : float
        The guidance scale g; not read by "none" and "fbg".
    tracker : {"paper", "log-odds"}
        DNG's.
    hyperparameters : {"paper", "calibrated", "calibrated-constant", "own"}
        Where the tracker's come from: the paper's values for the data set (for one that it does
        not have, the forbidden class's share of the data as prior, temperature 0.25 and offset
        0), a calibration of the networks (with a temperature that varies over time, or with
        one), or those given here.
    calibration : str, optional
        Class whose calibration is used, or a file with one; default: the first forgotten class's.
    prior, temperature, offset, offset_nats : float, optional
        With ``hyperparameters="own"``; default the share, 1 and 0.
    p_min, p_max : float, optional
        Default: the tracker's, see :class:`dng_math.PaperTracker`.
    tracker_variance : {"matched", "small", "large", "published"}
        Variance that the tracker divides by.
    threshold, gate, slope, momentum, momentum_decay, warmup_steps
        SLD's threshold, gate, s_s, s_m, beta_m and warm-up.
    contrast : float
        Temperature tau of contrastive CFG.
    pi, lambda_max : float
        Of feedback guidance.
    positive_scale : float
        Of Perp-Neg.
    t_lo, t_hi : float
        Guide only at these diffusion times, in [0, 1]; 1 is the noisy end.
    steps : int
        Of the chain, 1 to 1000; fewer than 1000 are respaced.
    variance : {"small", "large"}
        Of the noise that a step adds.
    clip : float, optional
        Bound of the predicted |x0|.
    num_images : int
        How many are drawn.
    seed : int
        Image i is a function of (seed, i), for one batch size.
    batch_size : int
        Images that a network sees at once.
    autocast : {"float16", "bfloat16"}, optional
        In which the networks compute.
    fid : bool
        Whether FID is measured, with Inception.

    Raises
    ------
    ValueError, TypeError
        Naming the field, its value and what is allowed.
    """

    dataset: str = "digits"
    image_column: str | None = None
    label_column: str | None = None
    split: str = "train"
    held_out: float = 0.2
    image_size: int | None = None
    channels: int | None = None
    like: str | None = None
    forget: tuple[str, ...] = ("0",)
    networks: Networks = "pair"
    base: str | None = None
    forgetful: tuple[str, ...] = ()
    positive: str | None = None
    classifier: str | None = None
    toward: str | None = None
    rule: RuleName = "dng"
    scale: float = 1.0
    tracker: TrackerName = "paper"
    hyperparameters: Hyperparameters = "paper"
    calibration: str | None = None
    prior: float | None = None
    temperature: float | None = None
    offset: float | None = None
    offset_nats: float | None = None
    p_min: float | None = None
    p_max: float | None = None
    tracker_variance: TrackerVariance = "matched"
    threshold: float = 0.04
    gate: Literal["signed", "absolute"] = "signed"
    slope: float = 100.0
    momentum: float = 0.1
    momentum_decay: float = 0.2
    warmup_steps: int = 0
    contrast: float = 1.0
    pi: float = 0.95
    lambda_max: float = 10.0
    positive_scale: float = 0.0
    t_lo: float = 0.0
    t_hi: float = 1.0
    steps: int = 1000
    variance: Literal["small", "large"] = "small"
    clip: float | None = None
    num_images: int = 1024
    seed: int = 0
    batch_size: int = 64
    autocast: str | None = None
    fid: bool = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), str(field.type).split(" | ")
            if "str" in kind and not (isinstance(value, str) or (value is None and "None" in kind)):
                raise TypeError(f"{field.name} must be a text, got {foreign.shown(value)}")
        for name in ("forget", "forgetful"):
            names = getattr(self, name)
            if not isinstance(names, tuple | list) or not all(
                isinstance(each, str) for each in names
            ):
                raise TypeError(f"{name} must be a sequence of names, got {names!r}")
            object.__setattr__(self, name, tuple(names))
        for name in ("image_size", "channels"):
            if getattr(self, name) is not None:
                _checks.integer(name, getattr(self, name), 1)
        if self.like is not None:
            _checks.choice("like", self.like, PAPER)
        for name, allowed in (
            ("networks", NETWORKS),
            ("rule", RULES),
            ("tracker", TRACKERS),
            ("hyperparameters", HYPERPARAMETERS),
            ("tracker_variance", TRACKER_VARIANCES),
            ("variance", ("small", "large")),
        ):
            _checks.choice(name, getattr(self, name), allowed)
        if self.autocast is not None:
            _checks.choice("autocast", self.autocast, AUTOCAST)
        _checks.boolean("fid", self.fid)
        _checks.real("held_out", self.held_out, "in (0, 1)", 0.0, 1.0, closed="()")
        if self.clip is not None:
            _checks.positive("clip", self.clip)
        _checks.integer("steps", self.steps, 1, 1000)
        _checks.integer("num_images", self.num_images, 1)
        _checks.integer("seed", self.seed, 0, 2**63 - 1)
        _checks.integer("batch_size", self.batch_size, 1)
        # The rule would call these by another name.
        _checks.non_negative("slope", self.slope)
        _checks.non_negative("contrast", self.contrast)
        self._check_classes()
        self._check_own()
        self._numbers_as_floats()
        # The rules check what is theirs; what only data or a calibration can give stands in.
        self.guidance(self.with_own(TRACKERS[self.tracker](prior=0.5)))

    def _check_classes(self) -> None:
        if not self.forget or len(set(self.forget)) < len(self.forget):
            raise ValueError(f"forget must name at least one class, each once; got {self.forget}")
        several = len(self.forget) > 1 and len(self.forgetful) != 1
        if several and self.rule not in ("dng", "none"):
            raise ValueError(
                f"forget must be one class with rule {self.rule!r}, got {self.forget}: only 'dng' "
                "takes one network for each class (one forgetful network that was trained on all "
                "of them serves every rule, and --each forgets one after the other)"
            )
        if self.forgetful and len(self.forgetful) not in (1, len(self.forget)):
            raise ValueError(
                f"forgetful must be one network, or one for each of the {len(self.forget)} "
                f"forgotten classes; got {self.forgetful}"
            )
        if self.networks == "conditional" and (self.forgetful or self.positive):
            raise ValueError(
                "forgetful and positive must not be given with networks='conditional', whose one "
                f"network makes every prediction; got {self.forgetful} and {self.positive!r}"
            )
        if self.rule in NEED_POSITIVE and self.positive is None and self.toward is None:
            raise ValueError(
                f"toward (a class) or positive (a network) must be given for rule {self.rule!r}, "
                "which guides towards something; got None"
            )
        if self.toward in self.forget:
            raise ValueError(f"toward must not be a forgotten class, got {self.toward!r}")

    def _check_own(self) -> None:
        for name in OWN:
            if getattr(self, name) is not None and self.hyperparameters != "own":
                raise ValueError(
                    f"{name} must be None with hyperparameters={self.hyperparameters!r}, which "
                    f"decide it, got {getattr(self, name)!r}; it belongs to 'own'"
                )

    def _numbers_as_floats(self) -> None:
        """Equal settings are equal JSON: 1 and 1.0 are one number."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if "float" in str(field.type) and value is not None:
                object.__setattr__(self, field.name, _checks.finite(field.name, value))

    # ------------------------------------------------------------------ JSON

    def to_json(self) -> dict[str, Any]:
        """Every field, ready for :func:`json.dumps`."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Config:
        """From :meth:`to_json`'s.

        Raises
        ------
        ValueError
            If there is a field that no configuration has, or a value that is not allowed.
        """
        if not isinstance(fields, dict):
            raise ValueError(f"a configuration must be an object, got {foreign.shown(fields)}")
        unknown = fields.keys() - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            raise ValueError(
                f"a configuration has no field {', '.join(map(repr, sorted(unknown)))}: was it "
                "written by another version?"
            )
        return cls(**fields)

    @cached_property
    def key(self) -> str:
        """Twelve hexadecimal digits that name this configuration."""
        return _digest(self.to_json())

    @cached_property
    def images_key(self) -> str:
        """The same of all that decides image i: how many there are and who judges them do not."""
        return _digest(
            {
                name: value
                for name, value in self.to_json().items()
                if name not in ("num_images", "classifier", "fid")
            }
        )

    # ------------------------------------------------------------------ the rule

    @property
    def paper_name(self) -> str | None:
        """The built-in data set whose settings hold here, if one does."""
        return self.like or BUILT_IN.get(self.dataset)

    @property
    def needs_calibration(self) -> bool:
        """Whether DNG's tracker comes from one."""
        return self.rule == "dng" and self.hyperparameters in CALIBRATED

    def guidance(self, tracker: PaperTracker | LogOddsTracker) -> Rule:
        """The guidance rule, with DNG's tracker as it is given."""
        rule = self._rule(tracker)
        if (self.t_lo, self.t_hi) == (0.0, 1.0):
            return rule
        return LimitedInterval(rule, self.t_lo, self.t_hi)

    def _rule(self, tracker: PaperTracker | LogOddsTracker) -> Rule:
        match self.rule:
            case "none":
                return Unguided()
            case "np":
                return NegativePrompting(self.scale)
            case "sld":
                return SafeLatentDiffusion(
                    self.scale,
                    threshold=self.threshold,
                    gate=self.gate,
                    scale=self.slope,
                    momentum_scale=self.momentum,
                    momentum_decay=self.momentum_decay,
                    warmup_steps=self.warmup_steps,
                )
            case "dng":
                return DynamicNegativeGuidance(self.scale, tracker)
            case "ccfg":
                return ContrastiveCFG(self.scale, self.contrast)
            case "cfg":
                return ClassifierFreeGuidance(self.scale)
            case "cg":
                return ClassifierGuidance(self.scale)
            case "fbg":
                return FeedbackGuidance(pi=self.pi, lambda_max=self.lambda_max)
            case "perp-neg":
                return PerpNeg(self.scale, self.positive_scale)

    def with_own(self, tracker: PaperTracker | LogOddsTracker) -> PaperTracker | LogOddsTracker:
        """What is given takes the place of what the tracker has."""
        given = {name: getattr(self, name) for name in (*OWN, "p_min", "p_max")}
        return dataclasses.replace(
            tracker,
            variance=self.tracker_variance,
            **{name: value for name, value in given.items() if value is not None},
        )


def _digest(fields: dict[str, Any]) -> str:
    canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def rule(config: Config, *, share: float, calibration: Calibration | None = None) -> Rule:
    """The guidance rule of a configuration; arguments and errors as for :func:`tracker_of`."""
    return config.guidance(tracker_of(config, share=share, calibration=calibration))


def tracker_of(
    config: Config, *, share: float, calibration: Calibration | None = None
) -> PaperTracker | LogOddsTracker:
    """DNG's tracker in a configuration.

    Parameters
    ----------
    config : Config
    share : float
        Of a forbidden class in the data (the mean of several): the prior where the paper has none.
    calibration : Calibration, optional
        Where DNG is calibrated.

    Raises
    ------
    ValueError
        If a calibration is needed and not given.
    """
    kind = TRACKERS[config.tracker]
    tracker = kind(prior=share)
    if config.hyperparameters == "paper":
        unknown_to_it: dict[str, Any] = {"prior": share, "temperature": 0.25}
        values = PAPER.get(config.paper_name or "", unknown_to_it)
        tracker = dataclasses.replace(tracker, **values)
    elif config.needs_calibration:
        if calibration is None:
            raise ValueError(
                "calibration must be given for hyperparameters="
                f"{config.hyperparameters!r}, got None"
            )
        varying = config.hyperparameters == "calibrated"
        fitted = calibration.tracker(config.tracker, varying=varying)
        tracker = dataclasses.replace(fitted, prior=share)
    return config.with_own(tracker)


# ---------------------------------------------------------------------- methods


# What a sweep calls a method, and the fields that make it one.
METHODS: dict[str, dict[str, str]] = {
    "none": {"rule": "none"},
    "np": {"rule": "np"},
    "sld": {"rule": "sld"},
    "ccfg": {"rule": "ccfg"},
    "dng-paper": {"rule": "dng", "tracker": "paper", "hyperparameters": "paper"},
    "dng-calibrated": {"rule": "dng", "tracker": "paper", "hyperparameters": "calibrated"},
    "dng-constant": {
        "rule": "dng",
        "tracker": "paper",
        "hyperparameters": "calibrated-constant",
    },
    "dng-log-odds": {"rule": "dng", "tracker": "log-odds", "hyperparameters": "calibrated"},
}
DEFAULT_METHODS = ("none", "np", "sld", "dng-paper", "dng-calibrated")
# Scales that leave from some percent to a few thousandths of the forbidden class, on digits.
LADDERS: dict[str, tuple[float, ...]] = {
    "np": (0.2, 0.4, 0.6, 0.8),
    "sld": (0.3, 0.5, 0.75, 1.0),
    "ccfg": (0.2, 0.5, 1.0, 2.0),
    "dng-paper": (1.0, 2.0, 4.0),
    # Calibrated trackers start from the class's own share, which is less than the paper's prior.
    "dng-calibrated": (2.0, 5.0, 10.0),
    "dng-constant": (2.0, 4.0, 8.0),
    "dng-log-odds": (3.0, 6.0, 12.0),
    "dng": (1.0, 2.0, 4.0),
}
# What a tuning compares.
TUNED = ("none", "np", "sld", "ccfg", "dng-paper", "dng-constant", "dng-calibrated", "dng-log-odds")
# What may be chosen of a method, stage after stage: each alternative changes what the stages before
# it chose.  DNG has the paper's settings or its calibration.
_INTERVALS: tuple[tuple[dict[str, Any], ...], ...] = (
    ({"t_lo": 0.25}, {"t_lo": 0.4}),
    ({"t_hi": 0.7},),
)
ALTERNATIVES: dict[str, tuple[tuple[dict[str, Any], ...], ...]] = {
    "np": _INTERVALS,
    "sld": (
        (
            {"gate": "absolute", "threshold": 0.3},
            {"gate": "absolute", "threshold": 0.1},
            {"gate": "absolute", "threshold": 1.0},
            {"gate": "signed", "threshold": 0.3},
        ),
        ({"slope": 10.0}, {"slope": 1.0}),
        # A slope that does not saturate may want another threshold.
        ({"gate": "absolute", "threshold": 1.0},),
        *_INTERVALS,
    ),
    "ccfg": (({"contrast": 0.2}, {"contrast": 5.0}), *_INTERVALS),
}


def settings(
    base: Config, methods: Sequence[str] = DEFAULT_METHODS, scales: Sequence[float] | None = None
) -> list[Config]:
    """The settings of a sweep: every method over its guidance scales, in that order.

    Parameters
    ----------
    base : Config
        All that the settings share.
    methods : sequence of str
        Names in :data:`METHODS`, or rules as ``base`` has their hyperparameters.
    scales : sequence of float, optional
        For every method; default: those of :data:`LADDERS`.

    Raises
    ------
    ValueError
        If a method does not exist.
    """
    configs = []
    for method in methods:
        if method not in METHODS and method not in RULES:
            _checks.choice("rules", method, tuple(dict.fromkeys([*METHODS, *RULES])))
        fields: dict[str, Any] = METHODS.get(method, {"rule": method})
        ladder = LADDERS.get(method, LADDERS["np"]) if scales is None else tuple(scales)
        if method == "none":
            ladder = (0.0,)
        configs += [dataclasses.replace(base, scale=scale, **fields) for scale in ladder]
    return list(dict.fromkeys(configs))


# ---------------------------------------------------------------------- where things lie


SHIPPED = Path(__file__).resolve().parent / "checkpoints"


@dataclass(frozen=True)
class RunFolder:
    """Where everything of a run lies.

    Parameters
    ----------
    path : Path
        The folder, made when something is written.
    shipped : Path, optional
        Networks that came with the package, to use instead of the folder's own.
    """

    path: Path
    shipped: Path | None = None

    @property
    def networks(self) -> Path:
        """Where the networks are: base, class-NAME, conditional, classifier."""
        return self.shipped or self.path / "networks"

    @property
    def table(self) -> Path:
        """The rows of the sweeps."""
        return self.path / "sweep.jsonl"

    @property
    def tuning(self) -> Path:
        """The rows from which settings were chosen."""
        return self.path / "tuning.jsonl"

    @property
    def figures(self) -> Path:
        """The plots."""
        return self.path / "figures"

    def class_network(self, name: str) -> Path:
        """The network that was trained on one class."""
        return self.networks / f"class-{_file_name(name)}"

    def calibration(self, name: str, networks: Networks) -> Path:
        """What was fitted for a forgotten class and a kind of networks.

        The folder's own, unless only the shipped networks come with one.
        """
        suffix = "" if networks == "pair" else f"-{networks}"
        file = Path("calibration", f"{_file_name(name)}{suffix}.json")
        own = self.path / file
        if self.shipped is not None and not own.is_file() and (self.shipped / file).is_file():
            return self.shipped / file
        return own

    def samples(self, config: Config) -> Path:
        """Images of a setting."""
        return self.path / "samples" / config.key

    def work(self, config: Config) -> Path:
        """Pieces of a setting that is being drawn."""
        return self.path / "work" / config.images_key


def _file_name(name: str) -> str:
    return quote(name, safe=" ")
