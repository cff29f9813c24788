"""The path tracker against the exact posterior, wherever it may run.

Hypothesis draws the mixture, its dimension, the scheduler, guidance, a callback that moves the
latents, a start from an image, and one or two concepts.  What is left in one dimension, where a
random sign gives the divergence itself, is the error of the trapezoid; in more of them also that of
few random signs.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from hypothesis import given as with_random
from hypothesis import settings
from hypothesis import strategies as st

from dng_math import DynamicNegativeGuidance, GaussianMixture
from dng_models.pipelines.hook import apply_guidance
from dng_models.pipelines.mixture_pipelines import mixture_pipeline
from dng_models.pipelines.noise_levels import _READERS
from tests.helpers.mixtures import KINDS, moderate
from tests.models.pipelines.test_path import OTHER_PIPELINES, made, with_brownian_motion

__all__ = ["with_brownian_motion"]  # an automatic fixture
# diffusers' DEIS and KDPM2 give tensors to NumPy's functions.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array_wrap__ must accept context:DeprecationWarning"
)
IMAGES, STEPS, PROBES = 64, 20, 4
SCHEDULERS = [name for name in _READERS if name not in OTHER_PIPELINES]
# Of mixtures that may be far apart, with noise: one long step can carry the wrong half of them.
LARGEST = 0.15


@dataclass(frozen=True)
class Case:
    """A run: of which mixture, with which scheduler, and what happens on the way."""

    name: str
    mixture: GaussianMixture
    scale: float
    concepts: tuple[tuple[int, ...], ...]
    jump: int | None = None
    strength: float | None = None

    def __repr__(self) -> str:
        told = f"{self.mixture.n_components} components in {self.mixture.dim}"
        return f"{self.name}, {told}, {self.scale}, {self.concepts}, {self.jump}, {self.strength}"


@st.composite
def cases(draw: st.DrawFn) -> Case:
    name = draw(st.sampled_from(SCHEDULERS))
    flow = name.startswith("FlowMatch")
    strength = None if flow else draw(st.sampled_from([None, None, 0.7]))
    # Stable Diffusion takes an image of four channels for latents.
    dim = 4 if strength else draw(st.sampled_from([1, 1, 2, 4]))
    components = draw(st.integers(2, 5))
    several = components > 2 and not flow and strength is None and draw(st.booleans())
    return Case(
        name,
        moderate(draw(st.integers(0, 2**32 - 1)), draw(st.sampled_from(KINDS)), components, dim),
        draw(st.sampled_from([0.0, 1.0, 2.0])),
        ((0,), (1,)) if several else ((0,),),
        draw(st.sampled_from([None, None, 6])),
        strength,
    )


def worst_error(case: Case) -> float:
    """Largest over the points of the mean |tracked - exact| of a concept's posterior."""
    pipe = mixture_pipeline(case.mixture, case.concepts, (case.mixture.dim, 1, 1), made(case.name))
    network = getattr(pipe, "unet", None) or pipe.transformer
    shown: list[list[torch.Tensor]] = []

    def look(module: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        x, t = (named["hidden_states"], named["timestep"]) if not given else given
        each = range(len(case.concepts))
        shown.append([network.log_posterior(x[:IMAGES], t, k).exp() for k in each])

    def jump(pipe: Any, step: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == case.jump:
            values["latents"] = values["latents"] + 0.3
        return values

    call = {**network.prompts(IMAGES), "num_inference_steps": STEPS, "output_type": "latent"}
    options: dict[str, Any] = {}
    rule: Any = [
        DynamicNegativeGuidance.tracked(
            case.scale, float(case.mixture.weights[list(each)].sum()), tracker="path", probes=PROBES
        )
        for each in case.concepts
    ]
    if len(case.concepts) > 1:
        options["negative_prompts"] = [network.embeddings(1, k) for k in (0, 1)]
        call["negative_prompt_embeds"] = network.embeddings(IMAGES)
    else:
        (rule,) = rule
    if case.strength is not None:
        pipe = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
        pipe.set_progress_bar_config(disable=True)
        image = torch.tensor(case.mixture.sample(IMAGES, 0)).float().reshape(IMAGES, 4, 1, 1)
        call |= {"image": image, "strength": case.strength}

    def run() -> torch.Tensor:
        shown.clear()
        torch.manual_seed(0)
        with apply_guidance(pipe, rule, **options) as trace:
            pipe(**call, generator=torch.Generator().manual_seed(0), callback_on_step_end=jump)
        assert trace.log_posterior is not None
        return trace.log_posterior.double().exp()

    watching = network.register_forward_pre_hook(look, with_kwargs=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*posterior.*")
            tracked = run()
            if case.strength is not None:
                # Of a start that is no noise nothing is known but what is given.
                options["initial_log_posterior"] = torch.log(shown[-len(tracked)][0])
                tracked = run()
    finally:
        watching.remove()
    exact = torch.stack([torch.stack(each) for each in shown[-len(tracked) :]])
    gap = (tracked.reshape(exact.shape) - exact).abs()
    return float(gap.mean(2).max())


FIXED = (
    Case("DPMSolverMultistepScheduler", moderate(1, "full", 4, 2), 2.0, ((0,), (1,))),
    Case("HeunDiscreteScheduler", moderate(2, "diagonal", 3, 2), 1.0, ((0,),), jump=12),
    Case("DDIMScheduler", moderate(3, "spherical", 3, 4), 1.0, ((0,),), jump=6, strength=0.7),
    Case("FlowMatchHeunDiscreteScheduler", moderate(4, "full", 4, 1), 1.0, ((0,),)),
)


@pytest.mark.parametrize(
    "case",
    [*FIXED[:1], *(pytest.param(case, marks=pytest.mark.slow) for case in FIXED[1:])],
    ids=str,
)
def test_the_posterior_is_the_exact_one(case):
    assert worst_error(case) < 0.03


@pytest.mark.slow
def test_the_posterior_is_the_exact_one_of_any_mixture_scheduler_and_start():
    """The worst of each run, and the mean of them over all runs."""
    found = []

    @settings(max_examples=40)
    @with_random(cases())
    def each(case):
        found.append(worst_error(case))
        assert found[-1] < LARGEST

    each()
    assert sum(found) / len(found) < 0.015
