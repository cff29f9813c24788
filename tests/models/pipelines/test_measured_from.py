"""What a rule's push is measured from, and the rules that need no negative prompt, in pipelines."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from PIL import Image

from dng_math import (
    CRG,
    SPELL,
    CFGPlusPlus,
    ContrastiveCFG,
    DynamicNegativeGuidance,
    FeedbackGuidance,
    GeoGuide,
    ImageReferenced,
    LimitedInterval,
    NegativePrompting,
    SafeLatentDiffusion,
    SignedNegative,
    Unguided,
)
from dng_models.pipelines import tiny
from dng_models.pipelines.dynamic_prompts import DynamicPrompts
from dng_models.pipelines.guided_chain import GuidedChain
from dng_models.pipelines.hook import apply_guidance
from dng_models.pipelines.image_points import points_of
from dng_models.text_to_image.laboratory.pipelines import BETAS
from tests.helpers import textbook
from tests.helpers.tolerances import error

tracked = DynamicNegativeGuidance.tracked
SHAPE = (3, 4, 2, 2)
STEPS, W = 6, 2.5
CLOSE = 2e-5  # a few roundings of float32, in predictions of up to 30


def follow(chain: GuidedChain) -> list[tuple[np.ndarray, ...]]:
    """x and predictions of every step, and the guided one; float64, one row an image."""
    scheduler = DDPMScheduler(**BETAS, clip_sample=False)
    scheduler.set_timesteps(STEPS)
    generator = torch.Generator().manual_seed(0)
    taken = []
    for t in scheduler.timesteps:
        x, c, n, u = (torch.randn(SHAPE, generator=generator) for _ in range(4))
        chain.observe(scheduler, x, t)
        several = chain.concepts if chain.needs_negative else 0
        negatives = [n] * (1 if several is None else several)
        guided = chain.guide(c, negatives, u)
        taken.append(tuple(v.double().flatten(1).numpy() for v in (x, c, n, u, guided)))
    return taken


def levels(chain: GuidedChain) -> Any:
    """Coefficients of the run under way."""
    assert chain._run is not None
    return chain._run.steps.coefficients


def constant(scale):
    return lambda c, n, u, i, memory, at: (u + W * (c - u) - scale * (n - u), memory)


def by_sld(c, n, u, i, memory, at):
    memory = np.zeros_like(c) if memory is None else memory
    return textbook.sld_pipeline(u, c, n, memory, i, W, 1, 1000.0, 0.01, 0.3, 0.4)


def by_crg(c, n, u, i, past, at):
    past = np.zeros(len(c)) if past is None else past
    base = textbook.cfg_beneath(u, c, W)
    guided = textbook.crg(base, u, n, past, 1.5, 0.8, 0.1)
    b = textbook.squared_distance(base, u) - textbook.squared_distance(base, n)
    return guided, past + at.beta_ts[i] / (2.0 * at.alpha_ts[i] ** 2 * at.sigma_t[i] ** 2) * b


def by_geoguide(c, n, u, i, memory, at):
    one = (at.alpha_ts[i], at.beta_ts[i], at.sigma_t[i])
    push = textbook.geoguide(u, n, 0.5, STEPS, *one) - u
    return textbook.cfg_beneath(u, c, W) + push, memory


def plus_plus(c, n, u, i, memory, at):
    whole = at.alpha_s[i] * at.sigma_t[i]
    w = 0.6 * whole / (whole - at.alpha_t[i] * at.sigma_s[i])
    return u + w * (c - u), memory


PUSHES = {
    "signed": (SignedNegative(0.8), constant(0.8)),
    "np": (NegativePrompting(0.8, "unconditional"), constant(0.8)),
    "sld": (replace(SafeLatentDiffusion.preset("medium", W), warmup_steps=1), by_sld),
    "ccfg": (
        ContrastiveCFG.published(W, 0.05),
        lambda c, n, u, i, m, at: (textbook.contrastive_cfg_both(u, c, n, W, 0.05), m),
    ),
    "crg": (CRG(1.5, 0.8, 0.1), by_crg),
    "geoguide": (GeoGuide(0.5, "unconditional"), by_geoguide),
    "cfg++": (CFGPlusPlus(0.6), plus_plus),
}


@pytest.mark.parametrize(
    ("name", "concepts"),
    [(name, None) for name in PUSHES] + [("signed", 1), ("sld", 1), ("crg", 1)],
)
def test_a_pipeline_is_guided_as_the_papers_print_it(name, concepts):
    rule, expected = PUSHES[name]
    leads = isinstance(rule, CFGPlusPlus)
    chain = GuidedChain(rule, concepts=concepts, cfg_scale=None if leads else W)
    memory = None
    for i, (_, c, n, u, guided) in enumerate(follow(chain)):
        wanted, memory = expected(c, n, u, i, memory, levels(chain))
        assert error(guided, wanted) < CLOSE, i


@pytest.mark.parametrize("several", [False, True])
def test_a_posterior_is_relative_to_what_the_push_is_measured_from(several):
    """As with the tracker's own reference; but the push too is from the unconditional."""
    rule = tracked(3.0, 0.2, temperature=0.05, reference="unconditional")
    rules = [rule, tracked(1.0, 0.2, temperature=0.05, reference="unconditional")]
    chain = GuidedChain(rules if several else rule, concepts=2 if several else None, cfg_scale=W)
    assert chain.reference == "unconditional"
    taken = follow(chain)
    plain = tracked(3.0, 0.2, temperature=0.05)
    other = GuidedChain(plain, cfg_scale=W, reference="unconditional")
    follow(other)
    found = chain.trace.last.log_posterior
    torch.testing.assert_close(found[:, 0] if several else found, other.trace.last.log_posterior)
    for scale, (_, c, n, u, guided) in zip(chain.trace.last.scale, taken, strict=True):
        expected = u + W * (c - u) - scale.double().numpy()[:, None] * (n - u)
        assert error(guided, expected) < CLOSE


def test_without_guidance_beneath_a_rule_measures_from_the_base():
    chain = GuidedChain(SignedNegative(0.8))
    assert not chain.needs_unconditional
    for _, c, n, _, guided in follow(chain):
        assert error(guided, c - 0.8 * (n - c)) < CLOSE


def test_a_skipped_prediction_pushes_nothing_and_is_no_evidence():
    """It counts as what it would be measured from."""
    rule = tracked(3.0, 0.2, temperature=0.05, reference="unconditional")
    chain = GuidedChain(rule, cfg_scale=W, skip_below=1e9)
    scheduler = DDPMScheduler(**BETAS, clip_sample=False)
    scheduler.set_timesteps(STEPS)
    generator = torch.Generator().manual_seed(0)
    for i, t in enumerate(scheduler.timesteps[:3]):
        x, c, n, u = (torch.randn(SHAPE, generator=generator) for _ in range(4))
        with pytest.warns(UserWarning, match="skip_below") if i == 0 else nullcontext():
            chain.observe(scheduler, x, t)
        evaluated = chain.to_evaluate()
        assert bool(evaluated.all()) == (i == 0)
        guided = chain.guide(c, n, u)
        if i > 0:
            torch.testing.assert_close(guided, u + W * (c - u), rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- points


def test_spell_moves_the_prediction_out_of_its_balls():
    points = np.random.default_rng(0).normal(size=(2, 16))
    chain = GuidedChain(LimitedInterval(SPELL(points, 25.0, 0.5), 0.0, 0.7), cfg_scale=W)
    assert not chain.needs_negative
    acted = []
    for i, (x, c, _, u, guided) in enumerate(follow(chain)):
        at = levels(chain)
        base = u + W * (c - u)
        x0 = (x - at.sigma_t[i] * base) / at.alpha_t[i]
        moved = textbook.spell(x0, points, 25.0, 0.5)
        expected = base if at.time[i] > 0.7 else (x - at.alpha_t[i] * moved) / at.sigma_t[i]
        assert error(guided, expected) < CLOSE
        acted.append(np.abs(expected - base).max() > 1e-3)
    assert acted[-1] and not acted[0]


def test_images_are_a_negative_prediction_of_their_own():
    """DNG away from points: the posterior tracked, the prediction a formula of the latents."""
    rule = tracked(3.0, 0.2, temperature=0.05, tracker="log-odds")
    points = torch.randn(3, *SHAPE[1:], generator=torch.Generator().manual_seed(4))
    chain, told = GuidedChain(rule, points=points), GuidedChain(rule)
    assert not chain.needs_negative
    scheduler = DDPMScheduler(**BETAS, clip_sample=False)
    scheduler.set_timesteps(STEPS)
    generator = torch.Generator().manual_seed(0)
    for i, t in enumerate(scheduler.timesteps):
        x, c = (torch.randn(SHAPE, generator=generator) for _ in range(2))
        chain.observe(scheduler, x, t)
        told.observe(scheduler, x, t)
        at = levels(chain)
        kernels = np.array(
            [
                -((x - at.alpha_t[i] * z).double().flatten(1).square().sum(1)).numpy()
                / (2.0 * at.sigma_t[i] ** 2)
                for z in points
            ]
        )
        weights = np.exp(kernels - kernels.max(0))
        weights = torch.from_numpy(weights / weights.sum(0))
        x0 = torch.einsum("kb,kchw->bchw", weights, points.double())
        n = ((x - at.alpha_t[i] * x0) / at.sigma_t[i]).float()
        guided, expected = chain.guide(c), told.guide(c, n)
        torch.testing.assert_close(guided, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        chain.trace.last.log_posterior, told.trace.last.log_posterior, rtol=1e-4, atol=1e-4
    )
    assert chain.trace.last.evaluations == 0


@pytest.fixture(scope="module")
def pipe():
    made = tiny.tiny_stable_diffusion(0)
    made.scheduler = DDPMScheduler.from_config(made.scheduler.config)
    made.set_progress_bar_config(disable=True)
    return made


def drawn(pipe, rule, **options):
    """Latents of a guided call, its trace, and how often the network saw how many rows."""
    rows = []
    handle = pipe.unet.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    try:
        with apply_guidance(pipe, rule, **options) as trace:
            latents = pipe(
                "a cat",
                negative_prompt=None if "images" in options else "egg",
                num_inference_steps=3,
                height=16,
                width=16,
                generator=torch.Generator().manual_seed(0),
                output_type="latent",
            ).images
    finally:
        handle.remove()
    return latents, trace, rows


@pytest.mark.parametrize("name", ["signed", "sld", "ccfg", "crg", "geoguide", "cfg++"])
def test_every_rule_runs_in_a_pipeline(pipe, name):
    rule, _ = PUSHES[name]
    if name == "crg":  # evidence of random networks is small, and other in each version
        rule = dataclasses.replace(rule, threshold=0.01)
    cfg_scale = None if isinstance(rule, CFGPlusPlus) else W
    latents, trace, _ = drawn(pipe, rule, cfg_scale=cfg_scale)
    plain, _, _ = drawn(pipe, Unguided(), cfg_scale=W)
    assert bool(torch.isfinite(latents).all()) and not torch.equal(latents, plain)
    assert (trace.log_posterior is not None) == (name == "crg")


def test_images_go_through_the_vae_of_the_pipeline(pipe):
    """And give what their latents give; the network is not asked about a negative prompt."""
    images = [Image.new("RGB", (16, 16), color) for color in ("red", "blue")]
    points = points_of(pipe, images)
    latent = pipe.vae.encode(pipe.image_processor.preprocess(images[:1])).latent_dist.mode()
    torch.testing.assert_close(points[:1], latent.detach() * pipe.vae.config.scaling_factor)
    rule = tracked(5.0, 0.3, temperature=0.1)
    latents, trace, rows = drawn(pipe, rule, images=images)
    again, _, _ = drawn(pipe, rule, images=points)
    assert torch.equal(latents, again)
    assert trace.log_posterior.shape[0] == 3 and bool((trace.scale > 0).all())
    plain, _, plain_rows = drawn(pipe, Unguided(), images=None)
    assert not torch.equal(latents, plain) and rows == plain_rows
    led, _, _ = drawn(pipe, rule, images=images, cfg_scale=2.0)
    assert not torch.equal(led, latents)


def test_a_path_is_followed_away_from_images_too(pipe):
    rule = tracked(5.0, 0.3, temperature=1e-4, tracker="path")
    _, trace, _ = drawn(pipe, rule, images=torch.zeros(1, 4, 8, 8))
    assert bool(torch.isfinite(trace.log_posterior).all())
    assert trace.log_posterior.std() > 0.0


def test_pixels_of_a_pipeline_without_a_vae():
    pipe = tiny.tiny_ddpm()
    black = points_of(pipe, [Image.new("RGB", (8, 8), "black"), np.ones((8, 8, 3), np.float32)])
    assert black.shape == (2, 3, 8, 8)
    assert bool((black[0] == -1.0).all()) and bool((black[1] == 1.0).all())


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("rule", "options", "message"),
    [
        (CRG(), {}, "cfg_scale must be given for CRG"),
        (ContrastiveCFG(positive_factor=True), {}, "cfg_scale must be given for ContrastiveCFG"),
        (CFGPlusPlus(), {"cfg_scale": 2.0}, "cfg_scale must be None for CFGPlusPlus"),
        (ImageReferenced([[0.0]], 0.1), {}, "with images= to apply_guidance"),
        (FeedbackGuidance(), {"points": torch.zeros(1, 4)}, "images must be None for FeedbackGuid"),
        (SPELL([[0.0]], 1.0), {"points": torch.zeros(1, 4)}, "images must be None for SPELL"),
        (
            tracked(1.0, 0.1),
            {"points": torch.zeros(1, 4), "skip_below": 0.1},
            "skip_below must be None with images",
        ),
        (
            [tracked(1.0, 0.1), tracked(1.0, 0.1, reference="unconditional")],
            {"concepts": 2, "cfg_scale": 2.0},
            "rule must have one reference for all concepts",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(rule, options, message):
    with pytest.raises(ValueError, match=message):
        GuidedChain(rule, **options)


@pytest.mark.parametrize(
    "rule",
    [
        SignedNegative(0.8),
        GeoGuide(0.5, "unconditional"),
        SafeLatentDiffusion(reference="unconditional"),
        LimitedInterval(NegativePrompting(1.0, "unconditional"), 0.2),
        tracked(1.0, 0.1, reference="unconditional"),
        DynamicPrompts(lambda images, step: [()], ["egg"], reference="unconditional"),
    ],
    ids=lambda rule: type(rule).__name__,
)
def test_what_is_measured_from_a_prediction_that_nobody_makes_is_refused(pipe, rule):
    """It was measured from the positive prediction, and nothing said so."""
    with pytest.raises(ValueError, match="cfg_scale must be given for .*'positive'; got None"):
        apply_guidance(pipe, rule)
    with apply_guidance(pipe, rule, cfg_scale=1.0):
        pass


def test_without_prompts_the_base_is_the_unconditional_prediction():
    alone = DDPMPipeline(tiny.tiny_unet(), DDPMScheduler(**BETAS))
    with apply_guidance(alone, SignedNegative(0.8), unwanted=tiny.tiny_unet(1)):
        pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": []}, "images must be a tensor of latents, or a sequence of images"),
        ({"images": "cat.png"}, "images must be a tensor of latents"),
        ({"images": [3]}, "images must be PIL images or NumPy arrays, got 3"),
        ({"images": torch.zeros(0, 4, 2, 2)}, "images, as latents: points must be"),
        (
            {"images": [Image.new("RGB", (16, 16)), Image.new("RGB", (8, 8))]},
            "images must have one size",
        ),
        (
            {"images": torch.zeros(1, 4, 8, 8), "negative_prompts": ["egg"]},
            "negative_prompts must be None with images",
        ),
    ],
)
def test_bad_images_are_refused_by_name(pipe, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        apply_guidance(pipe, tracked(1.0, 0.1), **options)


def test_images_of_another_size_are_refused(pipe):
    with pytest.raises(ValueError, match="images must be of the size that the pipeline makes"):
        drawn(pipe, tracked(1.0, 0.1), images=torch.zeros(1, 4, 3, 3))


def test_latents_that_are_not_known_cannot_be_compared():
    chain = GuidedChain(tracked(1.0, 0.1), points=torch.zeros(1, *SHAPE[1:]))
    scheduler = DDPMScheduler(**BETAS)
    scheduler.set_timesteps(2)
    chain.begin(scheduler, 0)
    with pytest.raises(ValueError, match="x must be given for .* with images or points"):
        chain.guide(torch.zeros(SHAPE))
