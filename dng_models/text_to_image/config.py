"""What decides the images, in one typed object, and the points of its sweep.

A :class:`Config` is everything that the images of one folder share; a :class:`Point` is one prompt,
rule, negative and scale, of which images with the seeds ``seed``, ``seed + 1``, ... are drawn.
Nothing that cannot change an image beyond the rounding of a network (the device, the batch size,
the number of processes) is compared when a folder is used again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dng_math import _checks
from dng_math.guidance import (
    ContrastiveCFG,
    DynamicNegativeGuidance,
    LimitedInterval,
    NegativePrompting,
    PerpNeg,
    Rule,
    SafeLatentDiffusion,
    Unguided,
)
from dng_models.text_to_image.prompts import PAPER, Prompt, check_names, file_name, from_json, split

Kind = Literal["none", "related", "unrelated"]
KINDS: tuple[Kind, ...] = ("related", "unrelated")
UNGUIDED = "none"
FRACTIONS = (0.25, 0.5, 0.75, 1.0)
DEFAULT_RULES = ("np", "dng")
DEFAULT_MODEL = "stabilityai/stable-diffusion-2"
DEFAULT_CLIP = "openai/clip-vit-large-patch14"
TINY = "tiny"
DTYPES = ("float32", "float16", "bfloat16")
SCHEDULERS = ("auto", "ddpm", "ddim", "euler-ancestral", "sde-dpm++", "flow", "own")


@dataclass(frozen=True)
class Method:
    """A rule as the sweep knows it.

    Attributes
    ----------
    label : str
        In tables and figures.
    reference : {"np", "dng"}
        Which of a prompt's two scales the relative ones are fractions of.  The paper has none for
        the other constant rules: they take negative prompting's.
    several : bool
        Whether it takes several concepts.
    """

    label: str
    reference: Literal["np", "dng"]
    several: bool = False


METHODS: dict[str, Method] = {
    "np": Method("NP", "np"),
    "dng": Method("DNG", "dng", several=True),
    "dng-log-odds": Method("DNG log-odds", "dng", several=True),
    "sld": Method("SLD", "np"),
    "perp-neg": Method("Perp-Neg", "np"),
    "ccfg": Method("CCFG", "np"),
}
RULES = tuple(METHODS)


@dataclass(frozen=True)
class Point:
    """One setting of the sweep.

    Attributes
    ----------
    prompt : Prompt
    rule : str
        A name of :data:`METHODS`, or "none".
    kind : {"none", "related", "unrelated"}
    scale : float
        0 for "none".
    """

    prompt: Prompt
    rule: str
    kind: Kind
    scale: float

    @property
    def key(self) -> str:
        """A name that no other point of the run has, which is a path too."""
        folder = file_name(self.prompt.name)
        if self.rule == UNGUIDED:
            return f"{folder}/unguided"
        return f"{folder}/{self.rule}-{self.kind}-{self.scale:.10g}"

    @property
    def unguided(self) -> Point:
        """The same prompt without guidance."""
        return Point(self.prompt, UNGUIDED, "none", 0.0)

    @property
    def negative(self) -> str | None:
        """The negative prompt, None where there is no guidance."""
        return None if self.kind == "none" else self.prompt.negative(self.kind)


@dataclass(frozen=True)
class Config:
    """Everything that the images of a folder share.

    Parameters
    ----------
    model : str
        A text-to-image pipeline: a name on the hub, a folder, or "tiny".
    prompts : tuple of Prompt
    rules : tuple of str
        Of "np", "dng", "dng-log-odds", "sld", "perp-neg" and "ccfg".  "dng-log-odds" takes the
        hyperparameters of "dng", which the paper chose for its own tracker.
    scales : tuple of float, optional
        Guidance scales of every rule; 0 is the unguided image itself and is not drawn again.
        Default: ``fractions``.
    fractions : tuple of float
        Scales as fractions of the prompt's own scale of a rule.
    num_images : int
        Of every point; can be raised later.
    seed : int
        Image i has the noise of seed + i, from a generator of its own.
    steps : int
        Of the sampler.  DNG's offset is added at each of them, so that hyperparameters belong to a
        number of steps; those of the paper are for Stable Diffusion 2, of which 50 is the usual.
    scheduler : str
        "auto" is DDPM (eta = 1, which DNG's tracker assumes), or for flow matching its posterior
        step; "own" is what the pipeline comes with.  See
        :func:`dng_models.text_to_image.pipelines.set_scheduler`.
    cfg_scale : float, optional
        Classifier-free guidance of the positive prompt; default: its plain prediction.
    t_lo, t_hi : float
        Guide only at these diffusion times, in [0, 1]; 1 is the noisy end.
    height, width : int, optional
        Of the images; default: the pipeline's.
    dtype : {"float32", "float16", "bfloat16"}
        Of the networks.
    split_negatives : bool
        Take the concepts of a negative prompt apart at its commas, each with its own posterior.
    contrast : float
        Temperature of contrastive CFG ("ccfg"), per squared difference of the predicted noises.
        That is a sum over the latents: at the 1 of small images nothing would be left of the push.
    clip : str
        CLIP model of the similarities: a name on the hub, a folder, or "tiny".
    detector : str
        "clip" (the same model), another CLIP model, or "none".

    Raises
    ------
    ValueError, TypeError
        Naming the field, its value and what is allowed.
    """

    model: str = DEFAULT_MODEL
    prompts: tuple[Prompt, ...] = PAPER
    rules: tuple[str, ...] = DEFAULT_RULES
    scales: tuple[float, ...] | None = None
    fractions: tuple[float, ...] = FRACTIONS
    num_images: int = 32
    seed: int = 0
    steps: int = 50
    scheduler: str = "auto"
    cfg_scale: float | None = None
    t_lo: float = 0.0
    t_hi: float = 1.0
    height: int | None = None
    width: int | None = None
    dtype: str = "float32"
    split_negatives: bool = False
    contrast: float = 1e-3
    clip: str = DEFAULT_CLIP
    detector: str = "clip"

    def __post_init__(self) -> None:
        for name in ("model", "clip", "detector"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise TypeError(f"{name} must be a name or a folder, got {getattr(self, name)!r}")
        for name in ("prompts", "rules", "scales", "fractions"):
            value = getattr(self, name)
            if value is None and name == "scales":
                continue
            if isinstance(value, str) or not isinstance(value, Sequence):
                raise TypeError(f"{name} must be a tuple, got {value!r}")
        if not self.prompts or not all(isinstance(each, Prompt) for each in self.prompts):
            raise ValueError(f"prompts must hold at least one prompt, got {self.prompts!r}")
        check_names(self.prompts)
        if not self.rules or len(set(self.rules)) < len(self.rules):
            raise ValueError(f"rules must name at least one rule, each once; got {self.rules!r}")
        for rule in self.rules:
            _checks.choice("rules", rule, RULES)
        _checks.integer("num_images", self.num_images, 1)
        _checks.integer("seed", self.seed, 0, 2**63 - 1 - self.num_images)
        _checks.integer("steps", self.steps, 1, 1000)
        _checks.choice("scheduler", self.scheduler, SCHEDULERS)
        _checks.choice("dtype", self.dtype, DTYPES)
        _checks.boolean("split_negatives", self.split_negatives)
        if self.cfg_scale is not None:
            _checks.finite("cfg_scale", self.cfg_scale)
        for name in ("height", "width"):
            if getattr(self, name) is not None:
                _checks.integer(name, getattr(self, name), 8)
        _checks.real("t_hi", self.t_hi, "in [0, 1]", 0.0, 1.0, closed="[]")
        _checks.real("t_lo", self.t_lo, "in [0, t_hi]", 0.0, self.t_hi, closed="[]")
        _checks.non_negative("contrast", self.contrast)
        self._check_rules()
        for name in ("scales", "fractions"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _ladder(name, getattr(self, name)))
        for name in ("cfg_scale", "t_lo", "t_hi", "contrast"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, float(getattr(self, name)))

    def _check_rules(self) -> None:
        for rule in self.rules:
            if self.split_negatives and not METHODS[rule].several:
                several = ", ".join(name for name in RULES if METHODS[name].several)
                raise ValueError(
                    f"rules must be of {several} where split_negatives is True: {rule!r} takes one "
                    "concept"
                )

    # ------------------------------------------------------------------ JSON

    @property
    def shared(self) -> dict[str, Any]:
        """What all images of a folder have in common, ready for JSON."""
        return {name: getattr(self, name) for name in SHARED}

    def to_json(self) -> dict[str, Any]:
        """The shared settings, and the prompts by their names."""
        prompts = {
            prompt.name: {
                field: value
                for field, value in dataclasses.asdict(prompt).items()
                if field != "name"
            }
            for prompt in self.prompts
        }
        return {"settings": self.shared, "prompts": prompts}

    # ------------------------------------------------------------------ points

    def scales_of(self, rule: str, prompt: Prompt) -> tuple[float, ...]:
        """The guidance scales of a rule for a prompt, each once; 0, the unguided image, is none."""
        scales = self.scales
        if scales is None:
            reference = prompt.np_scale if METHODS[rule].reference == "np" else prompt.dng_scale
            # Rounded, so that 0.75 times 3.4 is 2.55 in the name of a file.
            scales = tuple(float(f"{fraction * reference:.10g}") for fraction in self.fractions)
        return tuple(scale for scale in dict.fromkeys(scales) if scale != 0.0)

    def points(self) -> list[Point]:
        """All points: for each prompt the unguided one, then rule, negative and scale."""
        points = []
        for prompt in self.prompts:
            points.append(Point(prompt, UNGUIDED, "none", 0.0))
            points += [
                Point(prompt, rule, kind, scale)
                for rule in self.rules
                for kind in KINDS
                for scale in self.scales_of(rule, prompt)
            ]
        return points

    def concepts(self, point: Point) -> tuple[str, ...]:
        """The negative prompts of a point, of which each has a posterior."""
        if point.negative is None:
            return ()
        return split(point.negative) if self.split_negatives else (point.negative,)

    def cfg_of(self, point: Point) -> float | None:
        """Classifier-free guidance beneath the rule of a point."""
        return None if point.rule == "perp-neg" else self.cfg_scale

    def hyperparameters(self, point: Point) -> dict[str, Any]:
        """Of the rule of a point besides the scale, as they are recorded."""
        found: dict[str, Any] = {}
        if point.rule.startswith("dng"):
            found = {
                "prior": point.prompt.prior,
                "temperature": point.prompt.temperature,
                "offset": point.prompt.offset,
                "tracker": "paper" if point.rule == "dng" else "log-odds",
            }
        elif point.rule == "ccfg":
            found = {"temperature": self.contrast}
        elif point.rule == "sld":
            # The paper's (arXiv 2410.14398, Eq. 21), from Schramowski et al. (2023).
            found = {
                "threshold": 0.04,
                "scale": 100.0,
                "momentum_scale": 0.1,
                "momentum_decay": 0.2,
            }
        return found

    def rule(self, point: Point) -> Rule:
        """The guidance rule of a point."""
        rule = self._rule(point)
        if point.rule == UNGUIDED or (self.t_lo, self.t_hi) == (0.0, 1.0):
            return rule
        return LimitedInterval(rule, self.t_lo, self.t_hi)

    def _rule(self, point: Point) -> Rule:
        given = self.hyperparameters(point)
        match point.rule:
            case "none":
                return Unguided()
            case "np":
                return NegativePrompting(point.scale)
            case "sld":
                return SafeLatentDiffusion(point.scale, **given)
            case "perp-neg":
                # Starts from the unconditional prediction: 1 leads to the plain positive one.
                return PerpNeg(point.scale, 1.0 if self.cfg_scale is None else self.cfg_scale)
            case "ccfg":
                return ContrastiveCFG(point.scale, **given)
        return DynamicNegativeGuidance.tracked(point.scale, **given)


# Fields that a folder has one value of.  Who measures the images is said with each measurement.
SHARED = (
    *("model", "seed", "steps", "scheduler", "cfg_scale", "t_lo", "t_hi", "height", "width"),
    *("dtype", "split_negatives", "contrast"),
)


def _ladder(name: str, values: Sequence[float]) -> tuple[float, ...]:
    """Scales as floats, smallest first."""
    found = sorted({_checks.non_negative(name, value) for value in values})
    if not any(found):
        raise ValueError(f"{name} must hold at least one that is not 0, got {tuple(values)!r}")
    return tuple(found)


def check_same(config: Config, before: Mapping[str, Any], where: Path) -> None:
    """Refuse to add to images that were made with other settings.

    Parameters
    ----------
    config : Config
    before : mapping
        What :meth:`Config.to_json` was for the images that are there.
    where : Path
        Of the folder, for the message.

    Raises
    ------
    ValueError
        Naming every setting that differs.
    """
    now = config.to_json()
    differing = list(_differences(before["settings"], now["settings"]))
    for name in before["prompts"].keys() & now["prompts"].keys():
        found = _differences(before["prompts"][name], now["prompts"][name])
        differing += [f"of prompt {name!r}, {each}" for each in found]
    if differing:
        raise ValueError(
            f"{where} has images that were made with other settings ({'; '.join(differing)}): use "
            "another --out, or the settings of before"
        )


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterable[str]:
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            yield f"{name} was {before.get(name)!r} and is {now.get(name)!r}"


def prompts_from_json(prompts: Mapping[str, Any], where: Path) -> tuple[Prompt, ...]:
    """The prompts as :meth:`Config.to_json` has them."""
    return tuple(
        from_json({"name": name, **fields}, str(where)) for name, fields in prompts.items()
    )
