"""Trackers that compare the unwanted with the unconditional prediction."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

import dng_models
from dng_math import DynamicNegativeGuidance
from dng_math.rules import REFERENCES, ClassifierFreeGuidance, NegativePrompting
from dng_models.pipelines import tiny
from dng_models.pipelines.guided_chain import GuidedChain
from dng_models.pipelines.hook import apply_guidance
from dng_models.pipelines.ready_made import DNGStableDiffusionPipeline
from dng_models.text_to_image.laboratory.pipelines import BETAS, laboratory_pipeline

ROOT = Path(dng_models.__file__).parents[1]
tracked = DynamicNegativeGuidance.tracked
SHAPE = (3, 4, 2, 2)
STEPS = 6
NEGATIVE = "egg, sausage"
PROMPT = "an english breakfast"


def follow(chain: GuidedChain, swapped: bool, mask: torch.Tensor | None = None) -> list[Any]:
    """Guided predictions of a chain along latents that depend on nothing but the step."""
    scheduler = DDPMScheduler(**BETAS, clip_sample=False)
    scheduler.set_timesteps(STEPS)
    generator = torch.Generator().manual_seed(0)
    taken = []
    for t in scheduler.timesteps:
        x, positive, negative, empty = (torch.randn(SHAPE, generator=generator) for _ in range(4))
        chain.observe(scheduler, x, t)
        if swapped:
            guided = chain.guide(empty, negative)
        else:
            guided = chain.guide(positive, negative, empty)
        taken.append((positive, negative, empty, guided))
    return taken


@pytest.mark.parametrize("tracker", ["paper", "log-odds"])
@pytest.mark.parametrize("masked", [False, True])
def test_the_posterior_is_that_of_the_negative_against_the_empty_prompt(tracker, masked):
    """And the push is that of the positive prompt, by the scale that the posterior gives."""
    mask = torch.tensor([1.0, 0.0]).reshape(1, 1, 1, 2) if masked else None
    rule = tracked(3.0, 0.2, temperature=0.05, tracker=tracker)
    chain = GuidedChain(rule, reference="unconditional", mask=mask)
    assert chain.needs_unconditional
    taken = follow(chain, swapped=False)
    other = GuidedChain(rule, mask=mask)
    follow(other, swapped=True)
    run, against = chain.trace.last, other.trace.last
    assert torch.equal(run.log_posterior, against.log_posterior)
    assert run.log_posterior.std() > 0.01
    for scale, (positive, negative, _, guided) in zip(run.scale, taken, strict=True):
        expected = positive - scale[:, None, None, None] * (negative - positive)
        torch.testing.assert_close(guided, expected, rtol=1e-5, atol=1e-5)


def test_classifier_free_guidance_beneath_leaves_the_posterior():
    rule = tracked(3.0, 0.2, temperature=0.05)
    plain = GuidedChain(rule, reference="unconditional")
    above = GuidedChain(rule, reference="unconditional", cfg_scale=2.0)
    follow(plain, swapped=False)
    taken = follow(above, swapped=False)
    assert torch.equal(plain.trace.last.log_posterior, above.trace.last.log_posterior)
    for scale, (positive, negative, empty, guided) in zip(
        above.trace.last.scale, taken, strict=True
    ):
        base = empty + 2.0 * (positive - empty)
        expected = base - scale[:, None, None, None] * (negative - positive)
        torch.testing.assert_close(guided, expected, rtol=1e-5, atol=1e-5)


def test_several_concepts_each_have_a_posterior_against_the_empty_prompt():
    rules = [tracked(3.0, 0.2, temperature=0.05), tracked(1.0, 0.1, temperature=0.1)]
    scheduler = DDPMScheduler(**BETAS, clip_sample=False)
    scheduler.set_timesteps(STEPS)
    generator = torch.Generator().manual_seed(1)
    chain = GuidedChain(rules, concepts=2, reference="unconditional")
    alone = [GuidedChain(rule) for rule in rules]
    for t in scheduler.timesteps:
        x, positive, empty, *others = (torch.randn(SHAPE, generator=generator) for _ in range(5))
        chain.observe(scheduler, x, t)
        chain.guide(positive, others, empty)
        for one, other in zip(alone, others, strict=True):
            one.observe(scheduler, x, t)
            one.guide(empty, other)
    for concept, one in enumerate(alone):
        torch.testing.assert_close(
            chain.trace.last.log_posterior[:, concept], one.trace.last.log_posterior
        )


def drawn(rule: Any, negative: str = NEGATIVE, *, prompt: str = PROMPT, n: int = 32, **options):
    """Latents and trace of a call of the laboratory's pipeline."""
    scheduler = options.pop("scheduler", None)
    pipe = laboratory_pipeline(scheduler=scheduler)
    with apply_guidance(pipe, rule, **options) as trace:
        latents = pipe(
            [prompt] * n,
            negative_prompt=[negative] * n,
            num_inference_steps=20,
            generator=[torch.Generator().manual_seed(i) for i in range(n)],
            output_type="latent",
        ).images
    return pipe, latents, trace


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tracker", "kind", "most"),
    [
        ("paper", DDPMScheduler, 0.2),
        ("log-odds", DDPMScheduler, 0.2),
        pytest.param("path", DDIMScheduler, 0.3, marks=pytest.mark.slow),
    ],
)
def test_the_tracked_posterior_is_the_exact_one_of_all_images(tracker, kind, most):
    """Along unguided images: at the end the exact one is 0 or 1.

    Deterministic.  When this was written the mean errors after 20 steps were .11 (paper), .13
    (log-odds) and .19 (path, DDIM); those against the positive prompt were .50, .47 and .59.
    """
    betas = {**BETAS, "clip_sample": False, "steps_offset": 1, "timestep_spacing": "trailing"}
    # The share of all images, which docs/choosing.md derives.
    rule = tracked(0.0, 0.182, tracker=tracker)
    errors = []
    for reference in ("unconditional", "positive"):
        pipe, latents, trace = drawn(rule, reference=reference, scheduler=kind(**betas))
        yes, _ = pipe.unet.exact(latents).log_posterior(latents, 1.0, 0.0, "", NEGATIVE)
        exact = yes.double().exp()
        assert 0.4 < exact.mean() < 0.95
        errors.append(float((trace.final_log_posterior.double().exp() - exact).abs().mean()))
    assert errors[0] < most and errors[1] > 2.0 * errors[0]


def test_with_an_empty_prompt_both_references_are_one():
    rule = tracked(2.0, 0.182)
    _, one, first = drawn(rule, prompt="", n=4)
    _, other, second = drawn(rule, prompt="", n=4, reference="unconditional")
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(first.scale, second.scale, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("build", [tiny.tiny_stable_diffusion, tiny.tiny_stable_diffusion_3])
def test_every_kind_of_call_shows_the_empty_prompt(build):
    """With the tracker's own derivatives too."""
    pipe = build()
    pipe.set_progress_bar_config(disable=True)
    traces = []
    for prompt, reference in (("a cat", "unconditional"), ("a cat", "positive")):
        with apply_guidance(pipe, tracked(2.0, 0.2, tracker="path"), reference=reference) as trace:
            pipe(
                prompt,
                negative_prompt="egg",
                num_inference_steps=3,
                height=16,
                width=16,
                generator=torch.Generator().manual_seed(0),
                output_type="latent",
            )
        traces.append(trace.log_posterior)
    assert torch.isfinite(traces[0]).all()
    assert not torch.allclose(traces[0][1:], traces[1][1:])


@pytest.mark.parametrize(
    ("rule", "options", "message"),
    [
        (tracked(1.0, 0.1), {"reference": "empty"}, "reference must be one of 'positive'"),
        (NegativePrompting(1.0), {"reference": "unconditional"}, "reference must be 'positive'"),
        (
            ClassifierFreeGuidance(2.0),
            {"reference": "unconditional"},
            "reference must be 'positive' for",
        ),
        (
            tracked(1.0, 0.1),
            {"reference": "unconditional", "skip_below": 0.01},
            "skip_below must be None with reference='unconditional'",
        ),
    ],
)
def test_what_cannot_be_is_refused(rule, options, message):
    with pytest.raises(ValueError, match=message):
        GuidedChain(rule, **options)


def test_a_pipeline_without_prompts_has_no_empty_one():
    pipe = tiny.tiny_ddpm()
    with pytest.raises(ValueError, match="must do without a second prompt.*reference='uncond"):
        apply_guidance(pipe, tracked(1.0, 0.1), unwanted=pipe.unet, reference="unconditional")


def test_the_unconditional_prediction_must_be_given():
    chain = GuidedChain(tracked(1.0, 0.1), reference="unconditional")
    scheduler = DDPMScheduler(**BETAS)
    scheduler.set_timesteps(2)
    x = torch.zeros(SHAPE)
    chain.observe(scheduler, x, scheduler.timesteps[0])
    with pytest.raises(ValueError, match="unconditional must be given .*reference='uncond"):
        chain.guide(x, x)


def test_the_ready_made_pipeline_has_it_too():
    scheduler = DDPMScheduler(**BETAS, clip_sample=False, steps_offset=1)
    stock = tiny.tiny_stable_diffusion(scheduler=scheduler)
    ours = DNGStableDiffusionPipeline.from_pipe(stock, requires_safety_checker=False)
    rule = tracked(5.0, 0.1, temperature=0.05)
    given = {"num_inference_steps": 3, "output_type": "np", "negative_prompt": "egg"}
    options = {"reference": "unconditional", "negative_template": "{positive}, with {negative}"}
    images = []
    for pipe in (stock, ours):
        pipe.set_progress_bar_config(disable=True)
        seed = torch.Generator().manual_seed(0)
        if pipe is stock:
            with apply_guidance(pipe, rule, **options):
                images.append(pipe("a cat", generator=seed, **given).images)
        else:
            images.append(pipe("a cat", generator=seed, rule=rule, **options, **given).images)
    np.testing.assert_array_equal(*images)
    with pytest.raises(ValueError, match="reference must be left out without rule"):
        ours("a cat", reference="unconditional", **given)


def test_both_references_are_words_of_one_list():
    """The trackers' own, an argument here, and a rule's: the same two predictions by one name."""
    lists = [
        str(path.relative_to(ROOT))
        for package in ("dng_math", "dng_kernels", "dng_models")
        for path in sorted((ROOT / package).rglob("*.py"))
        if re.search(r"^(REFERENCES|Reference)\b.* = ", path.read_text(encoding="utf-8"), re.M)
    ]
    assert lists == [str(Path("dng_math", "rules", "protocol.py"))]
    for given in REFERENCES:
        rule = tracked(1.0, 0.1, reference=given)
        assert GuidedChain(rule, reference=given, cfg_scale=2.0).reference == given
