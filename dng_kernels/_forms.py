"""The results of a step as linear forms of a few tensors.

Whatever a rule computes is linear in x, eps, delta = eps_neg - eps, the noise, and what the rule
adds to these.  So the equations run on forms, which is cheap, and each term costs one pass over
memory.  The factors are affine in the scale and in a second number: for Perp-Neg the scale times
the projection, for contrastive CFG what its positive factor adds to 1.  Their coefficients are
computed once for each row of a plan and cached.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from dng_kernels.plan import UPDATE, Row, Variant, named
from dng_math import equations
from dng_math._codes import CONTRASTIVE, FEEDBACK, PERPENDICULAR, SAFE, TOWARD


class Form(dict[str, Any]):
    """A linear form: names of tensors and their factors, each a number or one number per sample."""

    def __add__(self, other: Form) -> Form:
        return Form(self | {name: self.get(name, 0.0) + c for name, c in other.items()})

    def __sub__(self, other: Form) -> Form:
        return Form(self | {name: self.get(name, 0.0) - c for name, c in other.items()})

    def dot(self, dots: dict[str, Any]) -> Any:
        """The form applied to the dot products of its tensors with another tensor."""
        return sum((c * dots[name] for name, c in self.items() if name in dots), 0.0)


class Factor:
    """A number that an equation multiplies a form by."""

    def __init__(self, value: float) -> None:
        self.value = value

    def __mul__(self, form: Form) -> Form:
        return Form({name: self.value * c for name, c in form.items()})


class Forms(NamedTuple):
    """The guided prediction, x_next, and the residual x_next - mu.

    They are forms of x, x_next (where it is given), eps, delta and noise, and of what
    :mod:`dng_kernels.cpu` adds to a block: third_gap = eps - eps_third, direction =
    eps_pos - eps, SLD's correction.  With clipping, eps and delta in x_next and in the residual are
    those of the clipped x0, and shift is how far guidance moves it.
    """

    guided: Form
    x_next: Form
    residual: Form


class Prepared(NamedTuple):
    """A row of the table, and the forms of its step as functions of the scale.

    Every factor is three numbers: a constant, what multiplies the scale, and what multiplies the
    second number.
    """

    at: Row
    factors: tuple[dict[str, tuple[float, float, float]], ...]

    def forms(self, scale: Any, second: Any) -> Forms:
        """The forms for scales and second numbers, (B,) or numbers."""
        if isinstance(scale, np.ndarray) and len(scale) == 1:
            scale = float(scale[0])
        guided, x_next, residual = (
            Form(
                {
                    name: factor
                    + (by_scale * scale if by_scale else 0.0)
                    + (by_second * second if by_second else 0.0)
                    for name, (factor, by_scale, by_second) in form.items()
                }
            )
            for form in self.factors
        )
        return Forms(guided, x_next, residual)


@lru_cache(maxsize=4096)  # a few runs of a thousand steps; an entry takes kilobytes
def prepared(variant: Variant, noisy: bool, row: tuple[float, ...]) -> Prepared:
    """The forms of a step from a row of its plan's table."""
    at = named(row)
    corners = (
        _forms_of(variant, at, scale, second, noisy)
        for scale, second in ((0.0, 0.0), (1.0, 0.0), (1.0, 1.0))
    )
    factors = []
    for none, scaled, seconded in zip(*corners, strict=True):
        of_form = {}
        for name, factor in seconded.items():
            constant, once = none.get(name, 0.0), scaled.get(name, 0.0)
            if (constant, once, factor) != (0.0, 0.0, 0.0):
                of_form[name] = constant, once - constant, factor - once
        factors.append(of_form)
    return Prepared(at, tuple(factors))


def _forms_of(variant: Variant, at: Row, scale: float, second: float, noisy: bool) -> Forms:
    """The forms at a scale, 0 or 1, and a second number; the equations of naive.py."""
    x, eps, delta = Form(x=1.0), Form(eps=1.0), Form(delta=1.0)
    if variant.mode == UPDATE:
        mean = equations.step_mean(
            x, eps, Factor(at.transition_x_factor), Factor(at.transition_factor)
        )
        return Forms(Form(), Form(), Form(x_next=1.0) - mean)
    noise = Form(noise=1.0) if noisy else Form()
    base = eps
    if variant.cfg:
        gap, cfg_scale = Form(third_gap=1.0), at.cfg_scale
        if variant.rule == CONTRASTIVE and variant.reads_third:
            cfg_scale = cfg_scale + at.active * at.attraction * second
        base = equations.toward(eps - gap, gap, Factor(cfg_scale))
    if variant.rule == SAFE:
        correction = Form(correction=at.from_noise)
        guided = equations.away(base, correction, Factor(at.guidance_scale * at.applied))
    elif variant.rule == PERPENDICULAR:
        direction = Form(direction=1.0)
        guided = equations.away(
            equations.toward(base, direction, Factor(at.active * at.positive_scale)),
            equations.perpendicular(delta, direction, Factor(second)),
            Factor(scale),
        )
    elif variant.rule in (TOWARD, FEEDBACK):
        guided = equations.toward(base, delta, Factor(scale))
    else:
        guided = equations.away(base, delta, Factor(scale))
    shift = Form(shift=1.0) if variant.clip else guided - eps
    factor, deviation = Factor(at.factor), Factor(at.deviation)
    mean = equations.step_mean(x, eps + shift, Factor(at.x_factor), factor)
    x_next = equations.step(mean, deviation, noise)
    residual = equations.step_residual(
        x, eps, shift, noise, Factor(at.x_drift), Factor(at.drift), factor, deviation
    )
    return Forms(guided, x_next, residual)
