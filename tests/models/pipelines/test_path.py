"""The path tracker inside real pipelines, with every scheduler whose noise levels are known.

The network is an exact mixture in one dimension, where a random sign gives the divergence itself:
what is left is the error of the trapezoid.  Means over 1,024 images of |tracked - exact|, whose
standard deviation is below 0.1, are within five standard errors (0.016, false alarm 1e-6) of what
infinitely many images give; the bounds are wider than what was measured by more than that.
"""

from __future__ import annotations

import inspect
import math
import warnings
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    DDIMInverseScheduler,
    DDIMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
)

from dng_math import DynamicNegativeGuidance, GaussianMixture, NegativePrompting
from dng_models.pipelines.guided_chain import GuidedChain
from dng_models.pipelines.hook import apply_guidance
from dng_models.pipelines.mixture_pipelines import mixture_pipeline, run_mixture
from dng_models.pipelines.noise_levels import _READERS, scheduler_levels
from dng_models.pipelines.scheduler_reading import _FOLLOWED
from dng_models.pipelines.scheduler_reading import _READERS as WITH_STEPS
from dng_models.pipelines.schedulers import EtaDDIMScheduler, PosteriorFlowScheduler
from dng_models.pipelines.transitions import scheduler_run
from tests.helpers import brownian
from tests.helpers.families import built, final_latents

pytestmark = [
    # diffusers' DEIS gives tensors to NumPy's functions.
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning"),
]
MODES = GaussianMixture([0.25] * 4, [[-3.0], [-1.0], [1.0], [3.0]], [0.16] * 4)
ONE, PRIOR, IMAGES = (1, 1, 1), 0.25, 1024
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
OPTIONS: dict[str, dict[str, Any]] = {
    "DDPMScheduler": {"clip_sample": False},
    "DDIMScheduler": {"clip_sample": False},
    "CogVideoXDDIMScheduler": {"clip_sample": False},
    "LCMScheduler": {"clip_sample": False},
    "TCDScheduler": {"clip_sample": False},
    "PNDMScheduler": {"skip_prk_steps": True},
    "DPMSolverSinglestepScheduler": {"lower_order_final": True},
}
# Those that draw their noise anew jump across the whole distribution at every step.
ANEW = ("LCMScheduler", "FlowMatchLCMScheduler")
NOISY = ("DDPMScheduler", "SASolverScheduler", "DPMSolverSDEScheduler", *ANEW)
# Its step is told more than a Stable Diffusion pipeline knows: levels only.
OTHER_PIPELINES = ("CogVideoXDPMScheduler",)


@pytest.fixture(autouse=True)
def with_brownian_motion(monkeypatch):
    """torchsde is optional, and one scheduler needs it."""
    brownian.stand_in(monkeypatch)


def made(name, **options):
    kind = getattr(diffusers, name)
    given = {} if name.startswith("FlowMatch") else {**BETAS, **OPTIONS.get(name, {})}
    if "steps_offset" in inspect.signature(kind.__init__).parameters:
        given["steps_offset"] = 1  # without it Stable Diffusion's pipeline complains
    return kind(**{**given, **options})


def path_rule(g=0.0, **options):
    return DynamicNegativeGuidance.tracked(g, PRIOR, tracker="path", **options)


@pytest.mark.parametrize("name", [n for n in _READERS if n not in OTHER_PIPELINES])
@pytest.mark.parametrize("g", [0.0, pytest.param(2.0, marks=pytest.mark.slow)])
@pytest.mark.thinned(3)
def test_every_scheduler_has_the_right_posterior_in_20_steps(name, g):
    """Without a word of warning; the other trackers refuse half of these, or are off by 0.2."""
    pipe = mixture_pipeline(MODES, [[1]], ONE, made(name))
    torch.manual_seed(0)  # Stable Diffusion 3 gives its scheduler no generator
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*posterior.*")
        run = run_mixture(pipe, path_rule(g), images=IMAGES, steps=20)
    assert len(run.tracked) == len(run.exact) >= 20
    worst = float((run.tracked - run.exact).abs().mean(1).max())
    noisy = "Ancestral" in name or name in NOISY
    allowed = 0.12 if name in ANEW else 0.045 if noisy else 0.012
    assert worst < allowed, worst
    if g:
        assert float(run.exact[-1].mean()) < 0.06
    else:
        # The samples are right, so that levels which are wrong for network and tracker alike show.
        apart = (run.latents.flatten(1).double() - torch.tensor(MODES.means.T)).abs().amin(1)
        assert float(apart.square().mean()) < 2.0 * 0.16
        # Noise that is drawn anew at every one of few steps does not sample the mixture: 0.31.
        assert abs(float(run.exact[-1].mean()) - 0.25) < (0.12 if name in ANEW else 0.08)


@pytest.mark.parametrize("name", _READERS)
@pytest.mark.parametrize("steps", [7, 20])
def test_levels_are_those_of_the_timesteps(name, steps):
    """A network knows x and t alone: sigma/alpha at t is interpolated in training's table."""
    scheduler = made(name)
    scheduler.set_timesteps(steps)
    run = scheduler_levels(scheduler)
    c = run.coefficients
    assert len(run) == len(scheduler.timesteps) and np.all(np.diff(c.time) < 0)
    t = np.array([float(each) for each in scheduler.timesteps])
    if name.startswith("FlowMatch"):
        np.testing.assert_allclose(c.sigma_t, t / 1000.0, rtol=1e-5)
        np.testing.assert_allclose(c.alpha_t, 1.0 - t / 1000.0, rtol=1e-4, atol=1e-6)
    else:
        known = scheduler.alphas_cumprod.double().numpy()
        log_ratio = np.interp(t, np.arange(1000), 0.5 * np.log((1.0 - known) / known))
        np.testing.assert_allclose(np.log(c.sigma_t / c.alpha_t), log_ratio, atol=2e-3)
        np.testing.assert_allclose(c.alpha_t**2 + c.sigma_t**2, 1.0, rtol=1e-6)
    if name in WITH_STEPS:
        steps_too = scheduler_run(scheduler)
        np.testing.assert_allclose(steps_too.coefficients.alpha_t, c.alpha_t, rtol=1e-9)
        np.testing.assert_allclose(steps_too.coefficients.sigma_t, c.sigma_t, rtol=1e-9)
        np.testing.assert_allclose(steps_too.input_scale[:-1], run.input_scale[:-1], rtol=1e-9)


@pytest.mark.parametrize(
    "options",
    [
        {"use_karras_sigmas": True},
        {"timestep_spacing": "leading", "steps_offset": 1},
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True,
         "timestep_spacing": "trailing"},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_options_of_schedules_are_followed(name, options):
    pipe = mixture_pipeline(MODES, [[1]], ONE, made(name, **options))
    run = run_mixture(pipe, path_rule(), images=IMAGES, steps=20)
    assert float((run.tracked - run.exact).abs().mean(1).max()) < 0.02


def test_pndm_with_runge_kutta_steps():
    pipe = mixture_pipeline(MODES, [[1]], ONE, made("PNDMScheduler", skip_prk_steps=False))
    run = run_mixture(pipe, path_rule(), images=256, steps=20)
    assert float((run.tracked - run.exact).abs().mean(1).max()) < 0.03


def test_our_schedulers_are_followed_at_any_eta():
    for scheduler in (EtaDDIMScheduler(eta=0.5, **BETAS, clip_sample=False, steps_offset=1),
                      PosteriorFlowScheduler(eta=0.5)):  # fmt: skip
        run = run_mixture(
            mixture_pipeline(MODES, [[1]], ONE, scheduler), path_rule(), images=IMAGES, steps=20
        )
        assert float((run.tracked - run.exact).abs().mean(1).max()) < 0.045


def guided(pipe, rule, images=IMAGES, *, callback=None, extra=None, **options):
    """Tracked log posteriors of a call, and the exact ones of what its network was shown."""
    exact = []
    network = pipe.unet

    def look(module, given, named):
        exact.append(network.log_posterior(given[0][:images], given[1]).exp())

    watching = network.register_forward_pre_hook(look, with_kwargs=True)
    try:
        with apply_guidance(pipe, rule, **options) as trace:
            pipe(
                **network.prompts(images), num_inference_steps=20, output_type="latent",
                generator=torch.Generator().manual_seed(0), callback_on_step_end=callback,
                **(extra or {}),
            )  # fmt: skip
    finally:
        watching.remove()
    found = trace.log_posterior.double().exp()
    return found, torch.stack(exact[-len(found) :])


def test_a_callback_that_moves_the_latents_is_followed(recwarn):
    """The other trackers warn that they cannot know what the change says."""

    def jump(pipe, step, t, values):
        if step in (5, 9):
            values["latents"] = values["latents"] + 0.4
        return values

    pipe = mixture_pipeline(MODES, [[1]], ONE, made("DDIMScheduler"))
    tracked, exact = guided(pipe, path_rule(), callback=jump)
    assert float((tracked - exact).abs().mean(1).max()) < 0.03
    assert not [w for w in recwarn if "changed" in str(w.message)]


@pytest.mark.slow
def test_a_start_from_an_image_follows_from_its_posterior():
    """Img2img at strength 0.7: with the exact posterior at its first point, it stays exact."""
    scheduler = made("DDIMScheduler")
    rng = np.random.default_rng(0)
    mixture = GaussianMixture([0.5, 0.5], rng.normal(size=(2, 4)), [0.2] * 2)
    pipe = mixture_pipeline(mixture, [[1]], (4, 1, 1), scheduler)
    image = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    image.set_progress_bar_config(disable=True)
    start = torch.tensor(mixture.sample(256, 0)).float().reshape(256, 4, 1, 1)
    rule = DynamicNegativeGuidance.tracked(0.0, 0.5, tracker="path", probes=16)
    first, exact = guided(image, rule, 256, extra={"image": start, "strength": 0.7})
    given, exact = guided(
        image, rule, 256, initial_log_posterior=exact[0].log(),
        extra={"image": start, "strength": 0.7},
    )  # fmt: skip
    assert torch.allclose(given[0], exact[0].clamp(1e-6, 0.99), atol=1e-5)
    assert float((given - exact).abs().mean(1).max()) < 0.03
    assert float((first - exact).abs().mean(1).max()) > float((given - exact).abs().mean(1).max())


def test_several_concepts_each_have_their_posterior():
    pipe = mixture_pipeline(MODES, [[1], [0, 3]], ONE, made("DPMSolverMultistepScheduler"))
    network = pipe.unet
    exact = []

    def look(module, given, named):
        exact.append([network.log_posterior(given[0][:512], given[1], k).exp() for k in (0, 1)])

    watching = network.register_forward_pre_hook(look, with_kwargs=True)
    rule = [DynamicNegativeGuidance.tracked(1.0, p, tracker="path") for p in (0.25, 0.5)]
    prompts = network.prompts(512)
    prompts["negative_prompt_embeds"] = network.embeddings(512)
    with apply_guidance(
        pipe, rule, negative_prompts=[network.embeddings(1, k) for k in (0, 1)]
    ) as trace:
        pipe(**prompts, num_inference_steps=20, output_type="latent",
             generator=torch.Generator().manual_seed(0))  # fmt: skip
    watching.remove()
    found = trace.log_posterior.double().exp()
    assert found.shape == (20, 2, 512)
    right = torch.stack([torch.stack(each) for each in exact[-20:]])
    assert float((found - right).abs().mean(2).max()) < 0.03


# ---------------------------------------------------------------- refusals


def test_what_is_refused_for_its_steps_points_to_the_path():
    assert set(_FOLLOWED) == set(_READERS) - set(WITH_STEPS)
    for name in _FOLLOWED:
        scheduler = made(name)
        scheduler.set_timesteps(8)
        with pytest.raises(ValueError, match=r"cannot be guided.*or a rule with tracker='path'"):
            scheduler_run(scheduler)


class Shifted(EulerDiscreteScheduler):
    def scale_model_input(self, sample, timestep):
        return 2.0 * super().scale_model_input(sample, timestep)


def test_unknown_levels_are_refused():
    for scheduler, message in (
        (EDMEulerScheduler(), "EDMEulerScheduler cannot be followed.*preconditioning"),
        (DDIMInverseScheduler(), "DDIMInverseScheduler cannot be followed.*adds noise"),
        (Shifted(), "Shifted cannot be followed.*scale_model_input"),
        (diffusers.ScoreSdeVeScheduler(), "cannot be followed.*levels are not known"),
        (FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "invert_sigmas=True"),
        (HeunDiscreteScheduler(prediction_type="v"), "prediction_type.*'v'"),
        (
            made("DPMSolverSDEScheduler", prediction_type="sample"),
            "prediction_type.*one of 'epsilon', 'v_prediction', got 'sample'",
        ),
        (DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing"), "'epsilon'"),
    ):
        scheduler.set_timesteps(8)
        with pytest.raises(ValueError, match=message):
            scheduler_levels(scheduler)
    with pytest.raises(ValueError, match="timesteps set"):
        scheduler_levels(DDIMScheduler())
    with pytest.raises(TypeError, match="not the class"):
        scheduler_levels(HeunDiscreteScheduler)
    with pytest.raises(TypeError, match="diffusers scheduler"):
        scheduler_levels(3)
    learned = diffusers.DDPMScheduler(variance_type="learned_range")
    learned.set_timesteps(8)
    with pytest.raises(ValueError, match="half of the network's output"):
        scheduler_levels(learned)


def test_what_a_path_cannot_have():
    rule = path_rule(1.0)
    for options, message in (
        ({"divergence_probes": 1}, "divergence_probes must be 0 for a path tracker"),
        ({"skip_below": 0.1}, "skip_below must be None for a path tracker"),
        ({"has_network": False}, "probes must be 0 where.*no network"),
    ):
        with pytest.raises(ValueError, match=message):
            GuidedChain(rule, **options)
    two = [rule, DynamicNegativeGuidance.tracked(1.0, PRIOR)]
    with pytest.raises(ValueError, match="one number of probes"):
        GuidedChain(two, concepts=2)
    GuidedChain(rule)
    GuidedChain(NegativePrompting(1.0))


def test_without_probes_it_is_the_tracker_of_transitions():
    pipe = mixture_pipeline(MODES, [[1]], ONE, made("DDPMScheduler"))
    runs = [
        run_mixture(
            pipe, DynamicNegativeGuidance.tracked(1.0, PRIOR, **options), images=64, steps=10
        )
        for options in ({"tracker": "path", "probes": 0}, {"tracker": "log-odds"})
    ]
    assert torch.equal(runs[0].tracked, runs[1].tracked)
    heun = mixture_pipeline(MODES, [[1]], ONE, made("HeunDiscreteScheduler"))
    with pytest.raises(ValueError, match="HeunDiscreteScheduler cannot be guided"):
        run_mixture(heun, path_rule(1.0, probes=0), images=4, steps=4)


def test_images_of_half_precision_are_followed():
    pipe = mixture_pipeline(
        MODES, [[1]], ONE, made("DPMSolverMultistepScheduler"), dtype=torch.bfloat16
    )
    run = run_mixture(pipe, path_rule(), images=512, steps=20)
    assert math.isfinite(run.error) and run.error < 0.1


def test_cogvideox_is_followed_with_its_own_schedulers():
    """Its DPM's step is told more than other schedulers' steps are."""
    family, pipe = built("CogVideoXPipeline")
    for kind in (CogVideoXDDIMScheduler, CogVideoXDPMScheduler):
        pipe.scheduler = kind.from_config(pipe.scheduler.config)
        rule = DynamicNegativeGuidance.tracked(1.0, 0.1, 0.01, tracker="path")
        with apply_guidance(pipe, rule) as trace:
            final_latents(pipe, family)
        assert torch.isfinite(trace.log_posterior).all()
        assert len(torch.unique(trace.log_posterior)) == trace.log_posterior.numel() > 1


def test_latents_that_are_overwritten_are_followed_without_a_mask():
    """As inpainting overwrites them: one channel is a known image, noised to the next level."""
    means = np.zeros((2, 8))
    means[:, :4], means[:, 4:] = [[0.6], [-0.6]], [[0.3], [-0.3]]
    mixture = GaussianMixture([0.5, 0.5], means, [0.25, 0.25])
    pipe = mixture_pipeline(mixture, [[0]], (2, 2, 2), made("DDIMScheduler"))
    noise = torch.randn(256, 2, 2, generator=torch.Generator().manual_seed(1))

    def overwrite(pipe, step, t, values):
        timesteps = pipe.scheduler.timesteps
        if step + 1 < len(timesteps):
            kept = float(pipe.scheduler.alphas_cumprod[timesteps[step + 1]])
            latents = values["latents"].clone()
            latents[:, 0] = 0.4 * kept**0.5 + (1.0 - kept) ** 0.5 * noise
            values["latents"] = latents
        return values

    rule = DynamicNegativeGuidance.tracked(0.0, 0.5, tracker="path", probes=16)
    tracked, exact = guided(pipe, rule, 256, callback=overwrite)
    assert float((tracked - exact).abs().mean(1).max()) < 0.05
    assert float((tracked - 0.5).abs().mean(1).max()) > 0.2
