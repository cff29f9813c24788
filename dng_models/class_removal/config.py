"""The configuration of a setting, and the guidance rule and tracker that follow from it.

A :class:`Config` names one setting: the data, what is forgotten, the networks, the rule with its
hyperparameters, the chain, and how many images are drawn.  It is written beside every result, and
its key names the result.  It leaves out what cannot change an image or a metric: the device, the
number of processes, progress bars.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from dng_math import DDIM, DDPM, checks
from dng_math.rules import Rule, limited, rule_named
from dng_math.schedules import Sampler, TrackerVariance
from dng_math.trackers import (
    TRACKERS,
    LogOddsTracker,
    PaperTracker,
    PathTracker,
    TimeProfile,
    TrackerName,
)
from dng_models.support import foreign
from dng_models.support.options import between, check, integer, option, settings

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dng_models.class_removal.calibration import Calibration

Networks = Literal["pair", "conditional"]
RuleName = Literal[
    "none", "np", "sld", "dng", "ccfg", "cfg", "cg", "fbg", "perp-neg", "geoguide", "cfg++", "spell"
]
RULES: tuple[RuleName, ...] = get_args(RuleName)
# Rules of dng_math that cannot run here, with the reason.
_ATTENTION = "acts on a network's attention to a prompt, and these networks have none"
REFUSED = {
    "crg": "compares the prediction of a prompt with the unconditional one; without a prompt these "
    "are the same, its evidence is never above its threshold, and it does nothing",
    "signed": "is 'np' where there is no prompt, beneath which it would differ",
    "images": "needs the density of x, which networks do not give; 'dng' with negative='images' "
    "tracks its posterior",
    "nag": _ATTENTION,
    "nasa": _ATTENTION,
    "vsf": _ATTENTION,
}
TOWARD = ("cfg", "cg", "fbg", "cfg++")  # rules that use no prediction of what is forbidden
NEED_POSITIVE = (*TOWARD, "perp-neg")
AnyTracker = PaperTracker | LogOddsTracker | PathTracker
CALIBRATED = ("calibrated", "calibrated-constant")

BUILT_IN = {
    "digits": "digits",
    "mnist": "mnist",
    "ylecun/mnist": "mnist",
    "cifar10": "cifar10",
    "uoft-cs/cifar10": "cifar10",
}
# The tracker's hyperparameters in the paper (its section 5); digits take those of MNIST.
PAPER: dict[str, dict[str, Any]] = {
    "digits": {"prior": 0.25, "temperature": 0.25, "offset": 0.0},
    "mnist": {"prior": 0.25, "temperature": 0.25, "offset": 0.0},
    "cifar10": {"prior": 0.01, "temperature": 0.2, "offset": 2e-4},
}
# Defaults of the command line for digits, where fewer steps suffice and batches can be larger.
FEWER_FOR_DIGITS: dict[str, Any] = {"steps": 100, "batch_size": 128}
CALIBRATION_PATHS = 4  # noisings of a held-out image
PRECISIONS = {"no": None, "fp16": "float16", "bf16": "bfloat16"}
# fp16 needs a loss scale, one more state that a training would have to resume.
TrainingPrecision = Literal["no", "bf16"]
TRAINING_PRECISIONS: tuple[TrainingPrecision, ...] = get_args(TrainingPrecision)
OWN = ("prior", "temperature", "offset", "offset_nats")
# Fields that came later: a setting that has their defaults keeps the key that it had.
LATER: dict[str, Any] = {
    **{"eta": 1.0, "probes": 1, "track_lo": 0.0, "solver": "first-order"},
    **{"negative": "network", "bandwidth": None, "radius": None},
}


def _rule_name(name: str, value: object) -> str:
    """Check of a rule that can run here."""
    if isinstance(value, str) and value in REFUSED:
        raise ValueError(f"{name} must not be {value!r}, which {REFUSED[value]}")
    return checks.choice(name, value, RULES)


def _class_names(name: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, tuple | list) or not all(isinstance(each, str) for each in value):
        raise TypeError(f"{name} must be a sequence of names, got {value!r}")
    return tuple(value)


@settings
class Config:
    """One setting: everything that decides its images and what is measured of them.

    The rules are those of :mod:`dng_math.rules`.  Where the paper has no hyperparameters for the
    data set, its tracker has the share of the forbidden class in the data as prior, temperature
    0.25 and offset 0 (:func:`tracker_of`).
    """

    dataset: str = option(
        "digits",
        "digits (8x8, with scikit-learn), mnist, cifar10, a hub name, a parquet file, or a folder "
        "with a sub-folder of images for each class",
        metavar="NAME_OR_PATH",
    )
    image_column: str | None = option(
        None, "column of the images", shown="the only one of that type"
    )
    label_column: str | None = option(
        None, "column of the labels", shown="the only one, or the one of a usual name"
    )
    split: str = option("train", "split of a data set on the hub")
    held_out: float = option(
        0.2,
        "share of the data that no network is trained on",
        check=between(0.0, 1.0, "()"),
        metavar="SHARE",
    )
    image_size: int | None = option(
        None,
        "cut and resize the images to this side",
        check=integer(1),
        metavar="PIXELS",
        shown="as they are",
    )
    channels: int | None = option(
        None, "make the images grey (1) or coloured (3)", check=integer(1), shown="as they are"
    )
    like: Literal["digits", "mnist", "cifar10"] | None = option(
        None, "which built-in data set a file or folder holds: the paper's settings for it are used"
    )
    forget: tuple[str, ...] = option(
        ("0",), "names or numbers of the forgotten classes", check=_class_names, metavar="CLASS"
    )
    networks: Networks = option(
        "pair",
        "the paper's two networks, or one conditional network with label dropout, which forgets "
        "any class without another training",
    )
    base: str | None = option(
        None,
        "base (or conditional) network: a folder, or a DDPM pipeline by its name on the hub, such "
        "as google/ddpm-cifar10-32",
        metavar="NAME_OR_DIR",
        shown="that of the run",
    )
    unwanted: tuple[str, ...] = option(
        (),
        "network of what is forgotten: one for all, or one for each class",
        check=_class_names,
        metavar="NAME_OR_DIR",
        shown="the run's",
    )
    positive: str | None = option(None, "network to guide towards", metavar="NAME_OR_DIR")
    classifier: str | None = option(
        None,
        "judge of the images: a folder, or any image classifier of the Hugging Face hub with the "
        "classes of the data",
        metavar="NAME_OR_DIR",
        shown="that of the run",
    )
    toward: str | None = option(
        None, "class to guide towards, for rules cfg, cg, fbg, perp-neg and cfg++", metavar="CLASS"
    )
    rule: RuleName = option("dng", "how predictions are combined", check=_rule_name)
    guidance_scale: float = option(
        1.0, "guidance scale g, which the rules none and fbg do not read", metavar="G"
    )
    negative: Literal["network", "images"] = option(
        "network",
        "what predicts the forbidden: a network, or a kernel on each of its training images",
    )
    bandwidth: float | None = option(
        None,
        "standard deviation of that kernel; values of images are from -1 to 1",
        check=checks.non_negative,
        shown="under which each image is likeliest beside the others",
    )
    radius: float | None = option(
        None,
        "radius of SPELL's balls around the training images of the forbidden, from which it "
        "pushes; its strength",
        check=checks.positive,
    )
    tracker: TrackerName = option("paper", "how DNG tracks the posterior")
    hyperparameters: Literal["paper", "calibrated", "calibrated-constant", "own"] = option(
        "paper",
        "hyperparameters of the tracker: the paper's for the data set, those of the calibration "
        "(with a temperature that varies over time, or with one), or those given here",
    )
    calibration: str | None = option(
        None,
        "use the calibration of another class, or one in a file",
        metavar="CLASS_OR_FILE",
        shown="that of the first forgotten class",
    )
    prior: float | None = option(
        None, "own p(c) at the noisy end", shown="share of the class in the data"
    )
    temperature: float | None = option(None, "own factor of the log likelihood ratio", shown="1")
    offset: float | None = option(
        None, "own offset as in the paper, offset/(2 v) a step", shown="0"
    )
    offset_nats: float | None = option(
        None, "own offset of the whole run, for any number of steps", shown="0"
    )
    p_min: float | None = option(None, "least posterior", shown="1e-6")
    p_max: float | None = option(
        None, "largest posterior, which caps the scale at g p/(1 - p)", shown="0.99"
    )
    tracker_variance: TrackerVariance = option(
        "matched",
        "variance that the tracker divides by; 'published' with the large variance of the noise is "
        "the published implementation",
    )
    probes: int = option(
        1,
        "random directions of the path tracker, each a forward derivative of the networks",
        check=integer(1),
    )
    track_lo: float = option(
        0.0,
        "least diffusion time at which evidence is counted: near the data networks err most",
        check=between(0.0, 1.0, "[)"),
    )
    threshold: float = option(0.04, "threshold of SLD's gate")
    gate: Literal["signed", "absolute"] = option(
        "signed", "difference that SLD's gate compares with the threshold"
    )
    slope: float = option(100.0, "SLD's s_s", check=checks.non_negative)
    momentum: float = option(0.1, "SLD's s_m")
    momentum_decay: float = option(0.2, "SLD's beta_m")
    warmup_steps: int = option(0, "SLD's steps without guidance", check=integer(0))
    contrast: float = option(
        1.0, "temperature tau of contrastive CFG (ccfg)", check=checks.non_negative
    )
    pi: float = option(0.95, "pi of feedback guidance (fbg)")
    lambda_max: float = option(10.0, "largest scale of feedback guidance")
    positive_scale: float = option(0.0, "Perp-Neg's scale of the positive direction")
    t_lo: float = option(0.0, "least diffusion time that is guided, in [0, 1]")
    t_hi: float = option(1.0, "largest diffusion time that is guided; 1 is the noisy end")
    steps: int = option(1000, "steps of the chain, respaced from 1000", check=integer(1, 1000))
    variance: Literal["small", "large"] = option("small", "variance of the noise of a step")
    eta: float = option(
        1.0,
        "noise of a step relative to DDPM's: 0 is deterministic DDIM, for which only the path "
        "tracker has the right posterior",
        check=between(0.0, 1.0, "[]"),
    )
    solver: Literal["first-order", "dpm++2m"] = option(
        "first-order",
        "steps of the chain: DDPM's and DDIM's, or DPM-Solver++ 2M, deterministic (eta 0)",
    )
    clip: float | None = option(
        None, "bound of the predicted |x0|", check=checks.positive, shown="none, as in the paper"
    )
    num_images: int = option(1024, "images to draw; can be raised later", check=integer(1))
    seed: int = option(
        0,
        "image i is a function of it, of i and of the batch size",
        check=integer(0, 2**63 - 1),
    )
    batch_size: int = option(64, "images that the networks see at once", check=integer(1))
    autocast: Literal["float16", "bfloat16"] | None = option(
        None, "precision in which the networks compute", shown="no autocast"
    )
    fid: bool = option(
        False, "measure FID too, with Inception, against the data with and without the class"
    )

    def __post_init__(self) -> None:
        check(self)
        self._check_classes()
        self._check_images()
        self._check_own()
        self._check_path()
        # The rule and the tracker check their own hyperparameters.  0.5 is any allowed prior: the
        # one that the data or a calibration gives is not known here.
        self.guidance_rule(self.with_own(TRACKERS[self.tracker](prior=0.5)))

    def _check_images(self) -> None:
        if self.rule == "spell" and self.radius is None:
            raise ValueError(
                "radius must be given for rule 'spell', the distance that it keeps from every "
                "training image of what is forbidden (values of images are from -1 to 1); got None"
            )
        if self.negative == "network":
            if self.bandwidth is not None:
                raise ValueError(
                    "bandwidth must be None with negative='network', which has no kernel, got "
                    f"{self.bandwidth:g}"
                )
            return
        if self.unwanted:
            raise ValueError(
                "unwanted must not be given with negative='images', which takes no network of "
                f"what is forbidden, got {self.unwanted}"
            )
        if self.needs_calibration:
            raise ValueError(
                "hyperparameters must be 'paper' or 'own' with negative='images', got "
                f"{self.hyperparameters!r}: calibrations are of networks"
            )

    def _check_classes(self) -> None:
        if not self.forget or len(set(self.forget)) < len(self.forget):
            raise ValueError(f"forget must name at least one class, each once; got {self.forget}")
        several = len(self.forget) > 1 and len(self.unwanted) != 1
        if several and self.rule not in ("dng", "none", "spell"):
            raise ValueError(
                f"forget must be one class with rule {self.rule!r}, got {self.forget}: only 'dng' "
                "takes one network for each class (one unwanted network that was trained on all "
                "of them serves every rule, and --each forgets one after the other)"
            )
        if self.unwanted and len(self.unwanted) not in (1, len(self.forget)):
            raise ValueError(
                f"unwanted must be one network, or one for each of the {len(self.forget)} "
                f"forgotten classes; got {self.unwanted}"
            )
        if self.networks == "conditional" and (self.unwanted or self.positive):
            raise ValueError(
                "unwanted and positive must not be given with networks='conditional', whose one "
                f"network makes every prediction; got {self.unwanted} and {self.positive!r}"
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

    def _check_path(self) -> None:
        if self.eta < 1.0 and self.variance != "small":
            raise ValueError(
                f"variance must be 'small' with eta < 1, got {self.variance!r} and {self.eta:g}"
            )
        if self.solver == "dpm++2m":
            for name, value in (("eta", 0.0), ("clip", None)):
                if getattr(self, name) != value:
                    raise ValueError(
                        f"{name} must be {value!r} with solver='dpm++2m', got "
                        f"{getattr(self, name)!r}"
                    )
            if self.rule in NEED_POSITIVE:
                raise ValueError(
                    f"rule must lead away from something, or be 'none', with solver='dpm++2m', got "
                    f"{self.rule!r}"
                )
        if self.rule != "dng":
            return
        if self.tracker != "path":
            if self.eta < 1.0:
                raise ValueError(
                    f"tracker must be 'path' with eta < 1, got {self.tracker!r}, whose posterior "
                    f"would be wrong at eta = {self.eta:g} however many steps are taken"
                )
            return
        if self.hyperparameters == "paper":
            raise ValueError(
                "hyperparameters must be 'calibrated', 'calibrated-constant' or 'own' with "
                "tracker='path', which the paper does not have, got 'paper'"
            )
        if self.offset is not None or self.tracker_variance != "matched":
            raise ValueError(
                "offset and tracker_variance must not be given with tracker='path', which divides "
                f"by no variance, got {self.offset!r} and {self.tracker_variance!r}"
            )

    @property
    def sampler(self) -> Sampler:
        """The steps of the chain, unless the solver is of second order."""
        return DDPM(self.variance) if self.eta == 1.0 else DDIM(self.eta)

    # ------------------------------------------------------------------ JSON

    def to_json(self) -> dict[str, Any]:
        """Return every field by its name, ready for :func:`json.dumps`."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Config:
        """Read what :meth:`to_json` returned.

        Parameters
        ----------
        fields : dict
            Fields by their names; those that are missing have their defaults.

        Raises
        ------
        ValueError, TypeError
            If a field is unknown, or a value is not allowed.
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
        """Twelve hexadecimal digits that name the images, however many and whoever judges them."""
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
        """Whether DNG's tracker comes from a calibration."""
        return self.rule == "dng" and self.hyperparameters in CALIBRATED

    @property
    def reads_images(self) -> bool:
        """Whether the forbidden is given by its training images instead of a network."""
        if self.negative == "images":
            return self.rule not in ("none", *TOWARD)
        return self.rule == "spell"

    @property
    def strength_field(self) -> Literal["guidance_scale", "radius"]:
        """Which field a sweep of strengths varies: SPELL's is its radius."""
        return "radius" if self.rule == "spell" else "guidance_scale"

    @property
    def strength(self) -> float:
        """The guidance scale, or SPELL's radius."""
        return float(getattr(self, self.strength_field))

    def at(self, strength: float) -> Config:
        """The same setting with another guidance scale, or another radius of SPELL."""
        changed: dict[str, Any] = {self.strength_field: strength}
        return dataclasses.replace(self, **changed)

    def guidance_rule(self, tracker: AnyTracker, points: NDArray[np.float64] | None = None) -> Rule:
        """Return the guidance rule.

        Parameters
        ----------
        tracker : PaperTracker, LogOddsTracker or PathTracker
            Of DNG; other rules do not read it.
        points : ndarray, shape (K, D), optional
            Training images of what is forbidden, around which SPELL has its balls; other rules do
            not read them.  Default: one of a single number, for a rule that is only to be checked.
        """
        parameters: dict[str, object] = {}
        match self.rule:
            case "sld":
                parameters = {
                    "threshold": self.threshold,
                    "gate": self.gate,
                    "slope": self.slope,
                    "momentum_scale": self.momentum,
                    "momentum_decay": self.momentum_decay,
                    "warmup_steps": self.warmup_steps,
                }
            case "dng":
                parameters = {"posterior": tracker}
            case "ccfg":
                parameters = {"temperature": self.contrast}
            case "fbg":
                parameters = {"pi": self.pi, "lambda_max": self.lambda_max}
            case "perp-neg":
                parameters = {"positive_scale": self.positive_scale}
            case "spell":
                balls = np.zeros((1, 1)) if points is None else points
                parameters = {"points": balls, "radius": self.radius}
        rule = rule_named(self.rule, self.guidance_scale, **parameters)
        return limited(rule, self.t_lo, self.t_hi)

    def with_own(self, tracker: AnyTracker) -> AnyTracker:
        """Replace what the tracker has by the hyperparameters that are given here."""
        given = {name: getattr(self, name) for name in (*OWN, "p_min", "p_max")}
        changed = {name: value for name, value in given.items() if value is not None}
        if isinstance(tracker, PathTracker):
            changed["probes"] = self.probes
        else:
            changed["variance"] = self.tracker_variance
        own = dataclasses.replace(tracker, **changed)
        if self.track_lo == 0.0:
            return own
        if isinstance(own.temperature, TimeProfile):
            raise ValueError(
                "track_lo must be 0 with a temperature that varies over time, as the calibration's "
                f"does, got {self.track_lo:g}"
            )
        step = TimeProfile((self.track_lo * (1.0 - 1e-9), self.track_lo), (0.0, own.temperature))
        return dataclasses.replace(own, temperature=step)


def _digest(fields: dict[str, Any]) -> str:
    fields = {n: value for n, value in fields.items() if n not in LATER or value != LATER[n]}
    canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def rule(config: Config, *, share: float, calibration: Calibration | None = None) -> Rule:
    """Return the guidance rule of a configuration; arguments and errors of :func:`tracker_of`."""
    return config.guidance_rule(tracker_of(config, share=share, calibration=calibration))


def tracker_of(
    config: Config, *, share: float, calibration: Calibration | None = None
) -> AnyTracker:
    """Return DNG's tracker of a configuration.

    Parameters
    ----------
    config : Config
        Setting that names the tracker and its hyperparameters.
    share : float
        Share of a forbidden class in the data (the mean of several): the prior where the paper
        has none.
    calibration : Calibration, optional
        Fitted hyperparameters, for a configuration that takes them from a calibration.

    Raises
    ------
    ValueError
        If a calibration is needed and not given.
    """
    tracker: AnyTracker = TRACKERS[config.tracker](prior=share)
    if config.hyperparameters == "paper":
        elsewhere: dict[str, Any] = {"prior": share, "temperature": 0.25}
        values = PAPER.get(config.paper_name or "", elsewhere)
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
