"""The rules of the league, and the strengths that each is swept over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from dng_math import (
    CRG,
    SPELL,
    AskedNegative,
    ContrastiveCFG,
    DynamicNegativeGuidance,
    ExactPosterior,
    GeoGuide,
    ImageReferenced,
    LogOddsTracker,
    NegativeAwareSubtraction,
    NegativePrompting,
    NormalizedAttention,
    PaperTracker,
    PathTracker,
    SafeLatentDiffusion,
    ValueSignFlip,
)
from dng_math.rules import ASKED_OF, Rule
from dng_math.weights import FeynmanKac
from dng_models.league.experiments import Experiment

IMAGES = 16  # of the forbidden, for the rule that is given images


@dataclass(frozen=True, eq=False)
class Entry:
    """A rule of the league.

    Attributes
    ----------
    name : str
    knob, strengths : str, tuple of float
        What is swept and its values, weakest first.
    make : callable
        The rule of an experiment and a strength.
    published : float, optional
        The strength that its authors use, one of ``strengths``.
    evaluations : int, optional
        Of networks in a step, with no classifier-free guidance beneath; a derivative of one
        counts as one.  None: as many as the samples take, which is measured.
    state : callable
        Numbers that a sample of D dimensions keeps from step to step.
    cfg_scale : float, optional
        Of classifier-free guidance towards everything, for the rule that insists on it.
    weights : FeynmanKac, optional
        Weights of the samples, which a sampler without noise cannot have.
    engine : {"fused", "reference"}
        Of :func:`dng_math.sample`; the compiled chain has no rules of attention, nor any that ask.
    most_steps : int, optional
        Of the chains that it takes part in; default any number.
    """

    name: str
    knob: str
    strengths: tuple[float, ...]
    make: Callable[[Experiment, float], Rule]
    published: float | None
    evaluations: int | None
    state: Callable[[int], int] = lambda _: 0
    cfg_scale: float | None = None
    weights: FeynmanKac | None = None
    engine: Literal["fused", "reference"] = "fused"
    most_steps: int | None = None

    @property
    def few(self) -> tuple[float, ...]:
        """Every second strength, and the published one."""
        chosen = {*self.strengths[1::2], self.published}
        return tuple(strength for strength in self.strengths if strength in chosen)


def _dng(posterior: Any) -> Callable[[Experiment, float], Rule]:
    return lambda _, g: DynamicNegativeGuidance(g, posterior)


def _images(experiment: Experiment, g: float) -> Rule:
    """Examples of the forbidden, the same in every chain, under a kernel by Silverman's rule."""
    mixture, forbidden = experiment.mixture, experiment.forbidden
    points = mixture.restrict(forbidden).sample(IMAGES, np.random.default_rng(0))
    narrower = (4 / ((mixture.dim + 2) * IMAGES)) ** (1 / (mixture.dim + 4))
    bandwidth = narrower * float(points.std(axis=0, ddof=1).mean())
    return ImageReferenced(points, experiment.share, g, bandwidth)


def _sld(_: Experiment, scale: float) -> Rule:
    """Without its warm-up of ten steps, which are all of the shortest chains."""
    return replace(SafeLatentDiffusion.preset("medium", scale), warmup_steps=0)


def _attention(
    name: str,
    knob: str,
    strengths: tuple[float, ...],
    rule: Callable[[float], Rule],
    published: float | None,
) -> Entry:
    """A rule of attention, whose features are the predictions of x0 here.

    Networks need one evaluation for it, with the text of the negative beside the other.
    """

    def make(_: Experiment, strength: float) -> Rule:
        return rule(strength)

    return Entry(name, knob, strengths, make, published, 1, engine="reference")


def _asked(name: str, **when: Any) -> Entry:
    """VL-DNP with the exact classifier as the judge of E[x0 | x_t]; it keeps one answer.

    Where nothing is held no negative is evaluated, so its cost depends on the samples.
    """

    def make(experiment: Experiment, g: float) -> Rule:
        return AskedNegative(lambda x0, _: experiment.shows(x0), g, **when)

    return Entry(
        name, "scale", ASKED_SCALES, make, 7.5, None, _one, engine="reference", most_steps=100
    )


def _one(_: int) -> int:
    return 1


PUSHES = (0.03, 0.1, 0.2, 0.5, 1.0, 2.0, 4.0, 7.5)
SCALES = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0)
ASKED_SCALES = (0.5, 1.0, 2.0, 4.0, 7.5, 15.0)
LEAGUE: tuple[Entry, ...] = (
    Entry("DNG, exact", "g", SCALES, _dng(ExactPosterior()), 1.0, 2),
    Entry("DNG, paper's", "g", SCALES, _dng(PaperTracker()), 1.0, 2, _one),
    Entry("DNG, log-odds", "g", SCALES, _dng(LogOddsTracker()), 1.0, 2, _one),
    # It keeps the last point, the gap of the predictions there, and a rate.
    Entry("DNG, path", "g", SCALES, _dng(PathTracker()), 1.0, 4, lambda dim: 2 * dim + 2),
    Entry("DNG, 16 images", "g", SCALES, _images, None, 1),
    Entry("NP", "scale", PUSHES, lambda _, g: NegativePrompting(g), 1.0, 2),
    Entry("SLD, medium", "scale", PUSHES, _sld, 7.5, 2, lambda dim: dim),
    Entry("CCFG", "w", PUSHES, lambda _, w: ContrastiveCFG(w, 0.2), 7.5, 2),
    Entry(
        "GeoGuide",
        "kappa",
        (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 8.0),
        lambda _, kappa: GeoGuide(kappa),
        None,
        2,
    ),
    Entry(
        "CRG",
        "-CP",
        (0.0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0),
        lambda _, below: CRG(threshold=-below),
        0.0,
        2,
        _one,
        cfg_scale=1.0,
    ),
    Entry(
        "SPELL",
        "radius",
        (0.1, 0.3, 0.4, 0.5, 0.7, 0.9, 1.2, 1.6, 2.2),
        lambda experiment, share: SPELL(experiment.references, share * experiment.gap),
        None,
        1,
    ),
    _asked("VL-DNP"),
    _asked("VL-DNP, 50 questions", at=range(ASKED_OF)),
)
MORE: tuple[Entry, ...] = (
    Entry(
        "DNG, weighted",
        "g",
        (1.5, 2.0, 3.0),
        _dng(ExactPosterior()),
        2.0,
        2,
        lambda _: 2,  # a sample's weight, and the level of the last step
        weights=FeynmanKac(),
    ),
    _attention("NAG", "phi", (0.5, 1.0, 2.0, 4.0, 8.0, 16.0), NormalizedAttention, 2.0),
    _attention("NASA", "scale", PUSHES[:-1], NegativeAwareSubtraction, None),
    _attention("VSF", "scale", (0.0, 0.5, 1.0, 1.5, 2.0, 3.5), ValueSignFlip, 3.5),
)
