"""The configuration of a run, and the points of its sweep.

A :class:`Config` is everything that the images of one folder share; a :class:`Point` is one prompt,
rule, negative and scale, of which images with the seeds ``seed``, ``seed + 1``, ... are drawn.
What changes an image by no more than the rounding of a network (the device, the batch size, the
number of processes) is not compared when a folder is used again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from dng_math import checks
from dng_math.rules import (
    SAFETY_LEVELS,
    ContrastiveCFG,
    DynamicNegativeGuidance,
    NormalizedAttention,
    Rule,
    SafeLatentDiffusion,
    SafetyLevel,
    Unguided,
    ValueSignFlip,
    limited,
    rule_named,
)
from dng_models.pipelines.negative_template import ALONE, COMPOSED, checked_template, filled_in
from dng_models.support.options import between, check, integer, option, settings
from dng_models.text_to_image.laboratory.prompts import LABORATORY
from dng_models.text_to_image.prompts import (
    PAPER,
    SHARES,
    Prompt,
    check_names,
    file_name,
    from_json,
    split,
)

Kind = Literal["none", "related", "unrelated"]
KINDS: tuple[Kind, ...] = ("related", "unrelated")
UNGUIDED = "none"
IDEAL = "ideal"
THE_LABORATORY = "laboratory"
TRAINED = "laboratory-trained"  # a network that was trained on its world, and ships
LABORATORIES = (THE_LABORATORY, TRAINED)
JUDGE = "judge"  # the laboratory's, in place of CLIP and of a detector
PAPER_MODEL = "stabilityai/stable-diffusion-2"
DEFAULT_CLIP = "openai/clip-vit-large-patch14"
TINY = "tiny"
Scheduler = Literal["auto", "ddpm", "ddim", "euler-ancestral", "sde-dpm++", "flow", "own"]


@dataclass(frozen=True)
class Method:
    """How the sweep treats a rule.

    Attributes
    ----------
    label : str
        Name in tables and figures.
    reference : {"np", "dng"}
        Which of a prompt's two scales the relative ones are fractions of.  The paper has scales
        for "np" and "dng" only: the other constant rules take those of negative prompting.
    several : bool
        Whether the rule takes several concepts.
    tracker : {"paper", "log-odds", "path"}, optional
        Tracker of DNG's posterior; None for rules that track none.
    negative : {"given", "alone", "empty"}
        How the negative is shown: as the configuration's template has it; alone, whatever the
        template, with the prompt's settings for that; or alone and compared with the empty prompt.
    times : float
        Factor of the prompt's scale.
    asks : bool
        Whether something looks at the images and chooses among the negative's concepts.
    attends : bool
        Whether it acts on the attention to the prompt, so that the network must have some.
    measured : bool
        Whether it can be chosen what the push is measured from.
    from_empty : bool
        Whether the push is measured from the unconditional prediction, or compares with it, so that
        there must be classifier-free guidance beneath.
    make : callable, optional
        Makes the rule of a guidance scale and hyperparameters; None: the rule of that name.
    """

    label: str
    reference: Literal["np", "dng"]
    several: bool = False
    tracker: Literal["paper", "log-odds", "path"] | None = None
    negative: Literal["given", "alone", "empty"] = "given"
    times: float = 1.0
    asks: bool = False
    attends: bool = False
    measured: bool = False
    from_empty: bool = False
    make: Callable[..., Rule] | None = None


def _dng(label: str, tracker: Literal["paper", "log-odds", "path"], **how: Any) -> Method:
    make = DynamicNegativeGuidance.tracked
    return Method(label, "dng", several=True, tracker=tracker, measured=True, make=make, **how)


def _sld(level: SafetyLevel) -> Method:
    make = partial(SafeLatentDiffusion.preset, level)
    return Method(f"SLD {level}", "np", from_empty=True, make=make)


METHODS: dict[str, Method] = {
    "np": Method("NP", "np", measured=True),
    "dng": _dng("DNG", "paper"),
    "dng-empty": _dng("DNG vs empty", "paper", negative="empty"),
    "dng-bare": _dng("DNG bare", "paper", negative="alone"),
    "dng-log-odds": _dng("DNG log-odds", "log-odds"),
    "dng-path": _dng("DNG path", "path"),
    "sld": Method("SLD", "np", measured=True),
    **{f"sld-{level}": _sld(level) for level in SAFETY_LEVELS},
    "perp-neg": Method("Perp-Neg", "np"),
    "ccfg": Method("CCFG", "np", measured=True),
    "ccfg-published": Method(
        "CCFG, published", "np", from_empty=True, make=ContrastiveCFG.published
    ),
    "geoguide": Method("GeoGuide", "np", measured=True),
    "crg": Method("CRG", "np", from_empty=True),
    # Four times the paper's scales of negative prompting are the 7.5 to 15 that it was published
    # with: it pushes only while something is seen.
    "ask": Method("VL-DNP", "np", several=True, times=4.0, asks=True, measured=True),
    "nag": Method("NAG", "np", negative="alone", times=1.5, attends=True),
    "nag-gated": Method(
        "NAG gated", "np", tracker="paper", negative="alone", times=1.5, attends=True
    ),
    "vsf": Method("VSF", "np", negative="alone", attends=True),
    IDEAL: Method("ideal", "np"),
}
RULES = tuple(METHODS)


@dataclass(frozen=True)
class Point:
    """One setting of the sweep.

    Attributes
    ----------
    prompt : Prompt
        The prompt, with its negatives and hyperparameters.
    rule : str
        A name of :data:`METHODS`, or "none".
    kind : {"none", "related", "unrelated"}
        Which of the prompt's negatives is used; "none" without guidance.
    guidance_scale : float
        Guidance scale g; 0 for the rule "none".
    """

    prompt: Prompt
    rule: str
    kind: Kind
    guidance_scale: float

    @property
    def key(self) -> str:
        """Name of the point, unique in the run; also the path of its images."""
        folder = file_name(self.prompt.name)
        if self.rule == UNGUIDED:
            return f"{folder}/unguided"
        if self.rule == IDEAL:
            return f"{folder}/{self.rule}-{self.kind}"
        return f"{folder}/{self.rule}-{self.kind}-{self.guidance_scale:.10g}"

    @property
    def unguided(self) -> Point:
        """The same prompt without guidance."""
        return Point(self.prompt, UNGUIDED, "none", 0.0)

    @property
    def negative(self) -> str | None:
        """The negative prompt; None without guidance."""
        return None if self.kind == "none" else self.prompt.negative(self.kind)


def _model_name(name: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise TypeError(f"{name} must be a name or a folder, got {value!r}")
    return value


def _sequence(name: str, value: Any) -> Sequence[Any]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"{name} must be a tuple, got {value!r}")
    return value


def _prompts(name: str, value: object) -> tuple[Prompt, ...]:
    found = _sequence(name, value)
    if not found or not all(isinstance(each, Prompt) for each in found):
        raise ValueError(f"{name} must hold at least one prompt, got {found!r}")
    check_names(found)
    return tuple(found)


def _rules(name: str, value: object) -> tuple[str, ...]:
    found = _sequence(name, value)
    if not found or len(set(found)) < len(found):
        raise ValueError(f"{name} must name at least one rule, each once; got {found!r}")
    return tuple(checks.choice(name, each, RULES) for each in found)


def _scales(name: str, value: object) -> tuple[float, ...]:
    """Scales as floats, smallest first, each once."""
    values = _sequence(name, value)
    found = sorted({checks.non_negative(name, each) for each in values})
    if not any(found):
        raise ValueError(f"{name} must hold at least one that is not 0, got {tuple(values)!r}")
    return tuple(found)


BY_MODEL: Any = None  # stands for what defaults_of gives


def defaults_of(model: str) -> dict[str, Any]:
    """Values of options that were not given, which depend on the model.

    Parameters
    ----------
    model : str
        "laboratory", "laboratory-trained", "tiny", a name or a folder.
    """
    if model in LABORATORIES:
        return {
            "prompts": LABORATORY,
            "rules": ("np", "dng", "dng-empty", "dng-bare", "dng-log-odds", "sld", IDEAL),
            "negative_template": COMPOSED,
            "fractions": (0.5, 1.0),
            "num_images": 48,
            "clip": JUDGE,
            "ask": JUDGE,
        }
    return {
        "prompts": PAPER,
        "rules": ("np", "dng"),
        "negative_template": ALONE,
        "fractions": (0.25, 0.5, 0.75, 1.0),
        "num_images": 32,
        "clip": DEFAULT_CLIP,
        "ask": TINY if model == TINY else DEFAULT_CLIP,
    }


@settings
class Config:
    """Everything that the images of a folder share, and how they are measured.

    The model may be "laboratory", whose predictions are exact and whose judge knows what is in an
    image, and "tiny", random networks that show that everything works.  Both decide what some
    options mean if they are None: without a word of the user's, the laboratory compares all methods
    with negatives that are composed with the prompt, and other models do what the paper did.  The
    schedulers are those of :func:`dng_models.text_to_image.pipelines.set_scheduler`.  Without
    ``guidance_scales`` the scales are ``fractions`` of the prompt's own.

    "dng-log-odds" takes the hyperparameters of "dng", which the paper chose for its own tracker.
    They belong to a number of steps, because the offset is added at each of them: those of the
    paper are for Stable Diffusion 2, of which 50 steps are the usual number.  The temperature of
    contrastive CFG is small because the squared difference is a sum over all latents: at 1, the
    value for small images, nothing would be left of the push.
    """

    model: str = option(
        THE_LABORATORY,
        "laboratory, whose predictions are exact; laboratory-trained, a network that learned its "
        "world; or any text-to-image pipeline of diffusers: a name on the hub, or a folder. The "
        f"paper's numbers are of Stable Diffusion 2, {PAPER_MODEL}",
        check=_model_name,
        metavar="NAME_OR_DIR",
    )
    prompts: tuple[Prompt, ...] = option(
        BY_MODEL,
        "prompts with their negatives",
        check=_prompts,
        shown="the laboratory's or paper's",
    )
    rules: tuple[str, ...] = option(
        BY_MODEL,
        f"rules to compare, of {', '.join(RULES)}; dng-empty and dng-bare show the negative alone, "
        "and dng-empty compares it with the empty prompt; ask pushes away what is seen in the "
        "images on their way; nag, nag-gated and vsf act on the attention to the prompt, which the "
        "laboratory's exact network has none of; ideal is for captions of the laboratory; the four "
        "levels of SLD, ccfg-published and crg are measured from the unconditional prediction, and "
        "need a cfg_scale",
        check=_rules,
        metavar="RULE",
        shown="np dng, and in the laboratory most",
    )
    negative_template: str = option(
        BY_MODEL,
        "how a negative is shown to the model, of {positive} and {negative}",
        check=checked_template,
        metavar="TEXT",
        shown=f"'{COMPOSED}' in the laboratory, else '{ALONE}'",
    )
    prior: Literal["given", "measured"] = option(
        "given",
        "DNG's priors: those of the prompts, or the share of the unguided images in which the "
        "detector finds what the negative names",
    )
    guidance_scales: tuple[float, ...] | None = option(
        None,
        "guidance scales of every rule and prompt, of which 0 is the unguided image",
        check=_scales,
        metavar="G",
    )
    fractions: tuple[float, ...] = option(
        BY_MODEL,
        "guidance scales as fractions of the prompt's own scale (np_scale, dng_scale or "
        "composed_scale)",
        check=_scales,
        shown="0.25 0.5 0.75 1, in the laboratory 0.5 1",
    )
    num_images: int = option(
        BY_MODEL,
        "images of every prompt, rule, negative and scale",
        check=integer(1),
        shown="32, in the laboratory 48",
    )
    seed: int = option(
        0, "seed of the first image; image i has seed + i", check=integer(0, 2**63 - 1)
    )
    steps: int = option(
        50,
        "steps of the sampler; DNG's offset is added at each of them, so that its hyperparameters "
        "belong to a number of steps",
        check=integer(1, 1000),
    )
    scheduler: Scheduler = option(
        "auto",
        "sampler; auto: ddpm, or flow for flow-matching models, whose noise DNG can be tracked "
        "with; own: what the pipeline comes with",
    )
    cfg_scale: float | None = option(
        None,
        "classifier-free guidance of the positive prompt, guided and unguided",
        metavar="W",
        shown="its plain prediction",
    )
    reference: Literal["positive", "unconditional"] | None = option(
        None,
        "what the push of "
        f"{', '.join(name for name, method in METHODS.items() if method.measured)} is measured "
        "from; unconditional, with which np is the composable NOT, needs a cfg_scale",
        shown="each rule's own: unconditional for ask where there is a cfg_scale, else positive",
    )
    t_lo: float = option(0.0, "least diffusion time that is guided, in [0, t_hi]")
    t_hi: float = option(
        1.0,
        "largest diffusion time that is guided; 1 is the noisy end",
        check=between(0.0, 1.0, "[]"),
    )
    height: int | None = option(
        None, "height of the images", check=integer(8), metavar="PIXELS", shown="the pipeline's"
    )
    width: int | None = option(
        None, "width of the images", check=integer(8), metavar="PIXELS", shown="the pipeline's"
    )
    dtype: Literal["float32", "float16", "bfloat16"] = option("float32", "dtype of the networks")
    split_negatives: bool = option(
        False,
        "the concepts between the commas of a negative prompt each have a posterior; DNG only",
    )
    contrast: float = option(
        1e-3,
        "temperature of contrastive CFG (ccfg), per squared difference of the predictions",
        check=checks.non_negative,
    )
    ask: str = option(
        BY_MODEL,
        "what looks at the images for the rule ask: a CLIP model or a vision-language model of "
        "transformers, by its name on the hub or its folder; or judge, the laboratory's",
        check=_model_name,
        metavar="NAME_OR_DIR",
        shown=f"{DEFAULT_CLIP}, in the laboratory judge",
    )
    clip: str = option(
        BY_MODEL,
        "CLIP model of the similarities: a name on the hub, or a folder; or judge, the "
        "laboratory's, to which similarity is the share of cells that stayed as they were",
        check=_model_name,
        metavar="NAME_OR_DIR",
        shown=f"{DEFAULT_CLIP}, in the laboratory judge",
    )
    detector: str = option(
        "clip",
        "what tells whether the unwanted is in an image: clip (the same model, zero-shot), another "
        "CLIP model, judge, or none",
        check=_model_name,
        metavar="NAME_OR_DIR",
    )

    def __post_init__(self) -> None:
        for name, value in defaults_of(self.model).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        check(self)
        checks.integer("seed", self.seed, 0, 2**63 - 1 - self.num_images)
        checks.real("t_lo", self.t_lo, "in [0, t_hi]", 0.0, self.t_hi, closed="[]")
        self._check_rules()

    def _check_rules(self) -> None:
        for rule in self.rules:
            if self.split_negatives and not METHODS[rule].several:
                several = ", ".join(name for name in RULES if METHODS[name].several)
                raise ValueError(
                    f"rules must be of {several} where split_negatives is True: {rule!r} takes one "
                    "concept"
                )
            if METHODS[rule].from_empty and self.cfg_scale is None:
                raise ValueError(
                    f"cfg_scale must be given for the rule {rule!r}, which is measured from the "
                    "unconditional prediction, got None"
                )
            if METHODS[rule].attends and self.model == THE_LABORATORY:
                raise ValueError(
                    f"rules must be without {rule!r} for the laboratory, whose exact network has "
                    f"no attention: {TRAINED!r} has some"
                )
        if self.reference == "unconditional" and self.cfg_scale is None:
            raise ValueError(
                "cfg_scale must be given with reference='unconditional', whose prediction it makes"
            )
        if self.prior == "measured" and self.detector == "none":
            raise ValueError("detector must not be 'none' where prior is 'measured'")
        for prompt in self.prompts:
            for kind in KINDS:
                self._check_prompt(prompt, kind)

    def _check_prompt(self, prompt: Prompt, kind: Kind) -> None:
        """Check that the rules have what they need of a prompt."""
        if IDEAL in self.rules:
            try:
                self.texts(Point(prompt, IDEAL, kind, 1.0))
            except ValueError as error:
                raise ValueError(
                    f"rules must be without 'ideal' for the prompt {prompt.name!r}, which has no "
                    f"caption of the laboratory without its {kind} negative: {error}"
                ) from None
        for rule in self.rules:
            tracker, alone = METHODS[rule].tracker, self._settings_alone(rule)
            if tracker and not alone and self.prior == "given" and prompt.share(kind) is None:
                raise ValueError(
                    f"prior must be 'measured' for {rule!r} with negative_template "
                    f"{self.negative_template!r}, or the prompt {prompt.name!r} must have a "
                    f"{kind}_share"
                )
            if tracker == "path" and alone and prompt.offset != 0.0:
                raise ValueError(
                    f"offset of the prompt {prompt.name!r} must be 0 for 'dng-path', whose offsets "
                    f"are offset_nats, got {prompt.offset!r}"
                )

    def _settings_alone(self, rule: str) -> bool:
        """Whether a rule takes the prompt's settings for a negative that stands alone."""
        form = METHODS[rule].negative
        return form == "alone" or (form == "given" and "{positive}" not in self.negative_template)

    # ------------------------------------------------------------------ JSON

    @property
    def shared(self) -> dict[str, Any]:
        """The settings that all images of a folder have in common, ready for JSON."""
        found = {name: getattr(self, name) for name in SHARED}
        if any(METHODS[rule].asks for rule in self.rules):
            found["ask"] = self.ask
        return found

    def to_json(self) -> dict[str, Any]:
        """Return the shared settings, and the prompts by their names, ready for JSON."""
        prompts = {
            prompt.name: {
                field: value
                for field, value in dataclasses.asdict(prompt).items()
                # Measured shares are kept with the images that they were counted in.
                if field != "name" and not (self.prior == "measured" and field in SHARES)
            }
            for prompt in self.prompts
        }
        return {"settings": self.shared, "prompts": prompts}

    # ------------------------------------------------------------------ points

    def scales_of(self, rule: str, prompt: Prompt) -> tuple[float, ...]:
        """Return the guidance scales of a rule for a prompt, each once, without 0 (unguided)."""
        if rule == IDEAL:
            return (1.0,)
        scales = self.guidance_scales
        if scales is None:
            reference = prompt.np_scale
            if METHODS[rule].reference == "dng":
                alone = self._settings_alone(rule)
                reference = prompt.dng_scale if alone else prompt.composed_scale
            reference *= METHODS[rule].times
            # Rounded, so that 0.75 times 3.4 gives a file name with 2.55.
            scales = tuple(float(f"{fraction * reference:.10g}") for fraction in self.fractions)
        return tuple(scale for scale in dict.fromkeys(scales) if scale != 0.0)

    def points(self) -> list[Point]:
        """Return all points: for each prompt the unguided one, then rule, negative and scale."""
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
        """Return the negative prompts of a point, each of which has a posterior of its own.

        Of a rule that asks, each is looked for on its own.
        """
        if point.negative is None:
            return ()
        each = self.split_negatives or METHODS[point.rule].asks
        return split(point.negative) if each else (point.negative,)

    def texts(self, point: Point) -> tuple[str, tuple[str, ...]]:
        """Return the prompt of a point as the pipeline is given it, and its negative prompts."""
        positive = point.prompt.prompt
        if point.rule == IDEAL:
            # Only now, because it draws the world's pictures.
            from dng_models.text_to_image.laboratory.captions import ideal
            from dng_models.text_to_image.laboratory.standard import laboratory_world

            return ideal(positive, point.negative or "", laboratory_world()), ()
        method = METHODS.get(point.rule)
        alone = method is None or method.negative != "given"
        template = ALONE if alone else self.negative_template
        return positive, tuple(filled_in(template, positive, each) for each in self.concepts(point))

    def reference_of(self, point: Point) -> Literal["positive", "unconditional"]:
        """Return what the tracker of a point's rule compares the negative with."""
        method = METHODS.get(point.rule)
        empty = method is not None and method.negative == "empty"
        return "unconditional" if empty else "positive"

    def cfg_of(self, point: Point) -> float | None:
        """Return the CFG scale beneath a point's rule.

        None for Perp-Neg, whose rule contains it, and for the rules of attention, under which the
        pipeline combines the predictions itself.
        """
        within = point.rule == "perp-neg" or self.attends(point)
        return None if within else self.cfg_scale

    def attends(self, point: Point) -> bool:
        """Return whether a point's rule acts on attention."""
        return point.rule != UNGUIDED and METHODS[point.rule].attends

    def hyperparameters(self, point: Point) -> dict[str, Any]:
        """Return the hyperparameters of a point's rule besides the scale, by their names."""
        found: dict[str, Any] = {}
        tracker = METHODS[point.rule].tracker if point.rule != UNGUIDED else None
        if tracker is not None:
            prompt, share = point.prompt, point.prompt.share(point.kind)
            found = {"prior": share, "temperature": 1.0, "offset": 0.0, "tracker": tracker}
            if self._settings_alone(point.rule):
                measured = self.prior == "measured" and METHODS[point.rule].negative == "given"
                found |= {
                    "prior": share if measured else prompt.prior,
                    "temperature": prompt.temperature,
                    "offset": prompt.offset,
                }
                if prompt.offset_nats:
                    found["offset_nats"] = prompt.offset_nats
        elif point.rule in ("ccfg", "ccfg-published"):
            found = {"temperature": self.contrast}
        elif point.rule == "sld":
            # Those of the paper (arXiv 2410.14398, Eq. 21), from Schramowski et al. (2023).
            found = {
                "threshold": 0.04,
                "slope": 100.0,
                "momentum_scale": 0.1,
                "momentum_decay": 0.2,
            }
        elif point.rule == "perp-neg":
            # From the unconditional prediction, a scale of 1 leads to the plain positive one.
            found = {"positive_scale": 1.0 if self.cfg_scale is None else self.cfg_scale}
        elif point.rule == "ask":
            found = {"asked": self.ask}
        if self.reference is not None and point.rule in METHODS and METHODS[point.rule].measured:
            found["reference"] = self.reference
        return found

    def rule(self, point: Point, ask: Any = None) -> Rule:
        """Return the guidance rule of a point.

        Parameters
        ----------
        point : Point
        ask : callable, optional
            What looks at the images, for the rule "ask", with the ``concepts`` of the point.

        Raises
        ------
        ValueError
            If the rule asks, and nothing to be asked is given.
        """
        given = self.hyperparameters(point)
        if point.rule in (UNGUIDED, IDEAL):
            return Unguided()
        if METHODS[point.rule].asks:
            return limited(self._asking(point, ask), self.t_lo, self.t_hi)
        if METHODS[point.rule].attends:
            # A gate opens alpha to alpha p.
            gate = DynamicNegativeGuidance.tracked(1.0, **given) if given else None
            kind = ValueSignFlip if point.rule == "vsf" else NormalizedAttention
            return limited(kind(scale=point.guidance_scale, gate=gate), self.t_lo, self.t_hi)
        make = METHODS[point.rule].make or partial(rule_named, point.rule)
        rule = make(point.guidance_scale, **given)
        return limited(rule, self.t_lo, self.t_hi)

    def _asking(self, point: Point, ask: Any) -> Rule:
        if ask is None:
            raise ValueError(f"ask must be given for the rule {point.rule!r}, got None")
        # Only now, because it needs torch.
        from dng_models.pipelines.dynamic_prompts import DynamicPrompts

        named = zip(self.concepts(point), self.texts(point)[1], strict=True)
        return DynamicPrompts(
            ask,
            dict(named),
            point.guidance_scale,
            self.reference,
            # A model that talks may answer with anything, and would end the run at the same image
            # whenever it is started again.
            on_error="keep" if getattr(ask, "may_ramble", False) else "raise",
        )


# Fields with one value for all images of a folder.  The models that measure them are recorded with
# each measurement instead.
SHARED = (
    *("model", "seed", "steps", "scheduler", "cfg_scale", "t_lo", "t_hi", "height", "width"),
    *("dtype", "split_negatives", "contrast", "negative_template", "prior", "reference"),
)
# Of folders that were made before there was a choice.
BEFORE = {"negative_template": ALONE, "prior": "given", "reference": None}


def check_same(config: Config, before: Mapping[str, Any], where: Path) -> None:
    """Refuse to add to images that were made with other settings.

    Parameters
    ----------
    config : Config
        Settings of the images that are to be added.
    before : mapping
        Result of :meth:`Config.to_json` for the images that are there.
    where : Path
        Folder, for the message.

    Raises
    ------
    ValueError
        If a setting, or a prompt that both have, differs: the message names all of them.
    """
    now = config.to_json()
    # What is asked matters only where both have images of a rule that asks.
    asked = before["settings"].get("ask", now["settings"].get("ask"))
    settings_before = {**BEFORE, "ask": asked, **before["settings"]}
    differing = list(_differences(settings_before, {"ask": asked, **now["settings"]}))
    for prompt in prompts_from_json(before["prompts"], where):
        name = prompt.name
        if name not in now["prompts"]:
            continue
        fields = {f: v for f, v in dataclasses.asdict(prompt).items() if f in now["prompts"][name]}
        found = _differences(fields, now["prompts"][name])
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
    """Return the prompts of a :meth:`Config.to_json`.

    Parameters
    ----------
    prompts : mapping
        Fields of the prompts, by the prompts' names.
    where : Path
        File that they are from, for the message.

    Raises
    ------
    ValueError, TypeError
        If a prompt is not allowed; see :class:`Prompt`.
    """
    return tuple(
        from_json({"name": name, **fields}, str(where)) for name, fields in prompts.items()
    )
