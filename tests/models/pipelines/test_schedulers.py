"""The two schedulers of our own: against diffusers', and what the seed decides."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusion3Img2ImgPipeline,
)
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import retrieve_timesteps
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from dng_models.pipelines.schedulers import EtaDDIMScheduler, PosteriorFlowScheduler, sample_keys
from dng_models.pipelines.tiny import tiny_ddpm, tiny_stable_diffusion, tiny_stable_diffusion_3
from dng_models.pipelines.transitions import scheduler_run, transition

SHAPE = (3, 4, 8, 8)
LIMITS: list[dict[str, Any]] = [
    {"clip_sample": False},
    {"clip_sample": True},
    {"thresholding": True, "sample_max_value": 1.5},
]


def built(cls: type, steps: int, **options: Any) -> Any:
    scheduler = cls(**options)
    scheduler.set_timesteps(steps)
    return scheduler


def random(count: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn((count, *SHAPE), generator=torch.Generator().manual_seed(seed)).to(dtype)


def seeded(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("cls", [EtaDDIMScheduler, PosteriorFlowScheduler])
def test_configuration(cls: type, tmp_path: Path) -> None:
    base = cls.__mro__[1]
    ours, theirs = (inspect.signature(c.__init__).parameters for c in (cls, base))  # type: ignore[misc]
    # In the order and with the defaults of the installed diffusers, and eta after them.
    assert [*ours] == [*theirs, "eta"]
    assert all(ours[name].default == theirs[name].default for name in theirs)
    changed = {"num_train_timesteps": 500, "eta": 0.25}
    scheduler = cls(**changed)
    assert cls().config.eta == 1.0 and scheduler.config.eta == 0.25
    scheduler.save_pretrained(tmp_path)
    loaded = cls.from_pretrained(tmp_path)  # type: ignore[attr-defined]
    assert dict(loaded.config).items() >= changed.items()
    from_base = cls.from_config(base(num_train_timesteps=500).config)  # type: ignore[attr-defined]
    assert from_base.config.num_train_timesteps == 500 and from_base.config.eta == 1.0
    assert "eta" not in inspect.signature(cls.step).parameters  # type: ignore[attr-defined]
    for bad in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"eta must be in \[0, 1\]"):
            cls(eta=bad)
    with pytest.raises(TypeError, match="eta must be a real number"):
        cls(eta="1")


# ---------------------------------------------------------------------- DDIM with its own eta


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_step_is_diffusers(eta: float, prediction: str, limit: dict[str, Any]) -> None:
    for spacing, one in (("leading", True), ("trailing", False), ("linspace", True)):
        options = limit | {
            "prediction_type": prediction,
            "timestep_spacing": spacing,
            "set_alpha_to_one": one,
        }
        stock, ours = built(DDIMScheduler, 7, **options), built(EtaDDIMScheduler, 7, **options)
        ours = built(EtaDDIMScheduler, 7, **options, eta=eta)
        for scheduler in (stock, ours):
            scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
            scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
        for step, t in enumerate(stock.timesteps):
            x, output = random(2, step, torch.float64)
            expected = stock.step(
                output, t, x, eta=eta, use_clipped_model_output=True, generator=seeded()
            )
            actual = ours.step(output, t, x, generator=seeded())
            for name in ("prev_sample", "pred_original_sample"):
                # Float64; DDIM's 1 - alpha_bar - std^2 leaves 1e-8 at the noisy end.
                torch.testing.assert_close(actual[name], expected[name], rtol=1e-6, atol=1e-8)
            noise = torch.randn(SHAPE, generator=seeded(), dtype=torch.float64)
            again = ours.step(output, t, x, variance_noise=noise, return_dict=False)
            assert torch.equal(again[0], actual.prev_sample)


@pytest.mark.parametrize("limit", LIMITS)
def test_ddim_with_full_noise_is_ddpm(limit: dict[str, Any]) -> None:
    options = limit | {"timestep_spacing": "trailing"}
    ddpm, ours = built(DDPMScheduler, 10, **options), built(EtaDDIMScheduler, 10, **options)
    assert torch.equal(ddpm.timesteps, ours.timesteps)
    for step, t in enumerate(ddpm.timesteps[:-1]):
        x, output = random(2, step)
        expected = ddpm.step(output, t, x, generator=seeded()).prev_sample
        actual = ours.step(output, int(t), x, generator=seeded()).prev_sample
        # Float32 in DDPM, of numbers of order ten (x0 of a noise prediction).
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-5)


def test_ddim_from_pure_noise_is_finite() -> None:
    options = {
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
        "prediction_type": "v_prediction",
    }
    x, output = random(2)
    scheduler = built(EtaDDIMScheduler, 10, **options)
    t, (following, *_) = scheduler.timesteps[0], scheduler.timesteps[1:]
    alpha_bar = scheduler.alphas_cumprod[[int(t), int(following)]].double()
    assert alpha_bar[0] == 0  # where a velocity is -x0
    noise = randn_tensor(x.shape, generator=seeded(), dtype=x.dtype)
    expected = alpha_bar[1].sqrt() * -output.clamp(-1, 1) + (1 - alpha_bar[1]).sqrt() * noise
    found = scheduler.step(output, t, x, generator=seeded()).prev_sample
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)


def test_ddim_keeps_the_dtype_and_draws_per_sample() -> None:
    scheduler = built(EtaDDIMScheduler, 5)
    x, output = random(2)
    t = scheduler.timesteps[1]
    generators = [seeded(seed) for seed in (1, 2, 3)]
    together = scheduler.step(output, t, x, generator=generators).prev_sample
    alone = scheduler.step(output[1:2], t, x[1:2], generator=seeded(2)).prev_sample
    torch.testing.assert_close(together[1:2], alone, rtol=1e-6, atol=1e-6)
    half = scheduler.step(output.bfloat16(), t, x.bfloat16(), generator=seeded())
    assert half.prev_sample.dtype == half.pred_original_sample.dtype == torch.bfloat16


def test_ddim_bad_input() -> None:
    scheduler = built(EtaDDIMScheduler, 5)
    x = random(1)[0]
    with pytest.raises(ValueError, match="timestep must be one of scheduler.timesteps, got 3"):
        scheduler.step(x, 3, x)
    with pytest.raises(ValueError, match="generator or variance_noise, not both"):
        scheduler.step(x, scheduler.timesteps[0], x, generator=seeded(), variance_noise=x)
    with pytest.raises(ValueError, match=r"call EtaDDIMScheduler.set_timesteps\(...\) first"):
        EtaDDIMScheduler().step(x, 999, x)


def test_pipelines_leave_its_eta_alone() -> None:
    def image(**options: Any) -> Any:
        pipe = tiny_stable_diffusion(
            scheduler=EtaDDIMScheduler(clip_sample=False, steps_offset=1, **options)
        )
        return pipe("a cat", num_inference_steps=3, generator=seeded(), output_type="latent").images

    deterministic, noisy = image(eta=0.0), image(eta=1.0)
    assert float((deterministic - noisy).abs().max()) > 0.1
    torch.testing.assert_close(image(), noisy, rtol=0, atol=0)
    pipe = tiny_stable_diffusion(scheduler=DDIMScheduler(clip_sample=False, steps_offset=1))
    stock = pipe("a cat", num_inference_steps=3, generator=seeded(), output_type="latent", eta=1.0)
    torch.testing.assert_close(noisy, stock.images, rtol=1e-3, atol=1e-4)  # float32 of its steps


def test_a_pipeline_is_saved_with_its_scheduler(tmp_path: Path) -> None:
    pipe = tiny_ddpm()
    pipe.scheduler = EtaDDIMScheduler.from_config(pipe.scheduler.config, eta=0.5)
    pipe.save_pretrained(tmp_path)
    loaded = DDPMPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.scheduler) is EtaDDIMScheduler and loaded.scheduler.config.eta == 0.5
    images = [
        p(generator=seeded(), num_inference_steps=2, output_type="np").images
        for p in (pipe, loaded)
    ]
    # Weights that lie elsewhere in memory are multiplied in another order.
    np.testing.assert_allclose(*images, rtol=0, atol=1e-5)


# ---------------------------------------------------------------------- flow matching


@pytest.mark.parametrize("options", [{}, {"shift": 3.0}, {"use_karras_sigmas": True}])
def test_flow_without_noise_is_euler(options: dict[str, Any]) -> None:
    stock = built(FlowMatchEulerDiscreteScheduler, 6, **options)
    ours = built(PosteriorFlowScheduler, 6, **options, eta=0.0)
    assert torch.equal(stock.timesteps, ours.timesteps) and torch.equal(stock.sigmas, ours.sigmas)
    for step, t in enumerate(stock.timesteps):
        x, output = random(2, step)
        expected = stock.step(output, t, x).prev_sample
        assert torch.equal(ours.step(output, t, x).prev_sample, expected)


@pytest.mark.parametrize("eta", [0.5, 1.0])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_step_is_the_posterior(shift: float, eta: float) -> None:
    """p(x_s | x_t, x0) from the joint Gaussian of x_s and x_t = alpha_ts x_s + noise."""
    scheduler = built(PosteriorFlowScheduler, 6, shift=shift, eta=eta)
    for step, t in enumerate(scheduler.timesteps):
        at = transition(scheduler, step)
        sigma, following = (float(scheduler.sigmas[i]) for i in (step, step + 1))
        covariance = (1 - sigma) / (1 - following) * following**2
        variance = following**2 - covariance**2 / sigma**2
        assert at.step_var == pytest.approx(eta**2 * variance, rel=1e-9, abs=1e-15)
        if eta == 1:
            assert at.x_factor == pytest.approx(covariance / sigma**2, rel=1e-9, abs=1e-15)
        # x_s has the mean and variance of its time, given x0.
        spread = (at.x_factor * sigma) ** 2 + at.step_var
        assert spread == pytest.approx(following**2, rel=1e-9, abs=1e-15)
        mean = at.x_factor * (1 - sigma) + at.x0_factor
        assert mean == pytest.approx(1 - following, rel=1e-9)
        x, output = random(2, step)
        taken = scheduler.step(output, t, x, generator=seeded()).prev_sample
        noise = torch.randn(SHAPE, generator=seeded())
        x0 = x - sigma * output
        expected = at.x_factor * x + at.x0_factor * x0 + at.step_var**0.5 * noise
        torch.testing.assert_close(taken, expected, rtol=1e-5, atol=1e-5)
    assert at.step_var == 0 and scheduler.step_index == 6


def flow_images(start: Tensor, steps: int = 5, **options: Any) -> Tensor:
    """A chain of the scheduler alone, with a network that sees each sample by itself."""
    scheduler = built(PosteriorFlowScheduler, steps, **options)
    x = start
    for t in scheduler.timesteps:
        (x,) = scheduler.step(x - torch.tanh(x), t, x, return_dict=False)
    return x


def test_first_latents_decide_whatever_else_is_in_the_batch() -> None:
    start = random(1, 3)[0]
    together = flow_images(start)
    for i in range(len(start)):
        assert torch.equal(flow_images(start[i : i + 1])[0], together[i])
    assert torch.equal(flow_images(start.flip(0)), together.flip(0))
    torch.manual_seed(0)
    assert torch.equal(flow_images(start), together)  # nor does the global generator matter
    assert not torch.equal(flow_images(start, eta=0.5), together)
    other = start.clone()
    other[0, 0, 0, 0] += 1e-6
    changed = flow_images(other)
    assert float((changed[0] - together[0]).abs().max()) > 0.1
    assert torch.equal(changed[1:], together[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_noise_is_standard_normal_and_new_in_every_step(dtype: torch.dtype) -> None:
    scheduler = built(PosteriorFlowScheduler, 4)
    start = torch.randn((2, 1, 200, 200), generator=seeded()).to(dtype)
    drawn = [start[0].float()]
    x = start
    for step, t in enumerate(scheduler.timesteps[:-1]):
        at = transition(scheduler, step)
        (x_next,) = scheduler.step(torch.zeros_like(x), t, x, return_dict=False)
        assert x_next.dtype == dtype
        exact = scheduler._noise(step, x.float(), None)
        # x0 = x where the network says 0.
        mean = (at.x_factor + at.x0_factor) * x.float()
        expected = (mean + at.step_var**0.5 * exact).to(dtype)
        torch.testing.assert_close(x_next, expected, rtol=1e-2, atol=1e-2)  # bfloat16
        drawn.extend(exact)
        x = x_next
    # 40,000 numbers: five standard errors of a mean, a variance and a correlation.
    table = torch.stack(drawn).flatten(1).double()
    assert float(table.mean(1).abs().max()) < 5 / 200
    assert float((table.var(1) - 1).abs().max()) < 5 * 2**0.5 / 200
    correlation = torch.corrcoef(table) - torch.eye(len(table), dtype=torch.float64)
    assert float(correlation.abs().max()) < 5 / 200


def test_keys_are_of_bits_alone() -> None:
    x = random(1, 2)[0]
    keys = sample_keys(x)
    assert keys.shape == (3, 2) and keys.dtype == torch.int64 and len(keys.unique()) == 6
    assert torch.equal(sample_keys(x[1:]), keys[1:])
    assert torch.equal(sample_keys(x.to(memory_format=torch.channels_last)), keys)
    assert torch.equal(sample_keys(x[:, :1].expand(-1, 4, -1, -1)[:, :1]), sample_keys(x[:, :1]))
    assert not torch.equal(sample_keys(x.bfloat16()), keys)


def test_a_new_run_has_new_keys() -> None:
    scheduler = PosteriorFlowScheduler()
    for seed in (1, 2):
        scheduler.set_timesteps(5)
        start = random(1, seed)[0]
        x = start
        for t in scheduler.timesteps:
            (x,) = scheduler.step(x - torch.tanh(x), t, x, return_dict=False)
        assert torch.equal(x, flow_images(start))


def test_pipelines_can_set_its_sigmas() -> None:
    """They look at the signature first."""
    for options in ({"sigmas": [1.0, 0.6, 0.2]}, {"timesteps": [900.0, 500.0, 100.0]}):
        stock, ours = FlowMatchEulerDiscreteScheduler(shift=2.0), PosteriorFlowScheduler(shift=2.0)
        expected, _ = retrieve_timesteps(stock, **options)
        actual, steps = retrieve_timesteps(ours, **options)
        assert steps == 3 and torch.equal(actual, expected)
        assert torch.equal(stock.sigmas, ours.sigmas)
    shifted = PosteriorFlowScheduler(use_dynamic_shifting=True)
    retrieve_timesteps(shifted, sigmas=[1.0, 0.5], mu=0.7)
    assert float(shifted.sigmas[1]) > 0.5


def test_generators_of_the_step_are_used_when_given() -> None:
    scheduler = built(PosteriorFlowScheduler, 5)
    x, output = random(2)
    t = scheduler.timesteps[1]

    def taken(*generators: torch.Generator, rows: slice = slice(None)) -> Tensor:
        scheduler.set_timesteps(5)
        scheduler.set_begin_index(1)
        (following,) = scheduler.step(
            output[rows], t, x[rows], generator=list(generators), return_dict=False
        )
        return following

    together = taken(seeded(1), seeded(2), seeded(3))
    torch.testing.assert_close(taken(seeded(2), rows=slice(1, 2)), together[1:2])
    assert not torch.equal(taken(seeded(1), seeded(4), seeded(3))[1], together[1])


def test_noise_of_scale_noise_is_the_key() -> None:
    """Encoded images are the network's rounding, which a batch changes; the noise is not."""
    noise, images = random(2)
    output = torch.zeros(SHAPE)

    def taken(encoded: Tensor) -> Tensor:
        scheduler = built(PosteriorFlowScheduler, 5)
        scheduler.set_begin_index(2)
        t = scheduler.timesteps[2]
        x = scheduler.scale_noise(encoded, t[None], noise)
        (following,) = scheduler.step(output, t, x, return_dict=False)
        scheduler.scale_noise(encoded, t[None], torch.zeros_like(noise))  # as inpainting does
        assert torch.equal(scheduler.noise_keys, sample_keys(noise))
        return following

    torch.testing.assert_close(taken(images + 1e-6), taken(images), rtol=0, atol=1e-5)


def test_stochastic_sampling_is_another_process() -> None:
    with pytest.raises(ValueError, match="stochastic_sampling must be False, got True: .* eta"):
        PosteriorFlowScheduler(stochastic_sampling=True)


def test_flow_runs_are_read() -> None:
    run = scheduler_run(built(PosteriorFlowScheduler, 5, shift=3.0))
    assert run.scheduler == "PosteriorFlowScheduler" and run.prediction_type == "flow_prediction"
    assert (run.coefficients.eta == 1).all()


@pytest.mark.parametrize("kind", ["text", "image"])
def test_seed_decides_the_image_of_stable_diffusion_3(kind: str) -> None:
    pipe = tiny_stable_diffusion_3(scheduler=PosteriorFlowScheduler(shift=3.0))
    given: dict[str, Any] = {"num_inference_steps": 4, "output_type": "latent"}
    if kind == "image":
        pipe = StableDiffusion3Img2ImgPipeline(**pipe.components)
        pipe.set_progress_bar_config(disable=True)
        starts = torch.rand((3, 3, 16, 16), generator=seeded(9))
        given |= {"strength": 0.75, "height": 16, "width": 16}
    else:
        given |= {"height": 16, "width": 16}
    prompts = ["a cat", "a dog", "breakfast"]

    def images(*rows: int) -> Tensor:
        own = {"image": starts[list(rows)]} if kind == "image" else {}
        result: Tensor = pipe(
            [prompts[i] for i in rows], generator=[seeded(i) for i in rows], **given, **own
        ).images
        return result

    together = images(0, 1, 2)
    assert float((together[0] - together[1]).abs().max()) > 0.1
    # Networks round differently in another batch: 1e-6 of float32, through four steps.
    torch.testing.assert_close(images(1), together[1:2], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(images(2, 0), together[[2, 0]], rtol=1e-3, atol=1e-4)
    pipe.scheduler = PosteriorFlowScheduler(shift=3.0, eta=0.0)
    assert float((images(0, 1, 2) - together).abs().max()) > 0.1
