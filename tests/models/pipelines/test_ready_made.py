"""The ready-made pipelines are diffusers' own, with apply_guidance around their call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    UNet2DModel,
)
from diffusers.hooks import HookRegistry
from PIL import Image

from dng_math import DynamicNegativeGuidance
from dng_math.rules import NegativePrompting
from dng_models.pipelines import tiny
from dng_models.pipelines.hook import apply_guidance
from dng_models.pipelines.ready_made import (
    DNGDDPMPipeline,
    DNGStableDiffusionPipeline,
    DNGStableDiffusionXLPipeline,
)

PROMPTED = (
    (tiny.tiny_stable_diffusion, DNGStableDiffusionPipeline),
    (tiny.tiny_stable_diffusion_xl, DNGStableDiffusionXLPipeline),
)
RULE = DynamicNegativeGuidance.tracked(5.0, prior=0.1, temperature=0.05)
# Float32: loaded weights lie elsewhere in memory, where sums may be split differently.
LOADED = 1e-4


def ancestral() -> EulerAncestralDiscreteScheduler:
    return EulerAncestralDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
    )


def call(pipe: Any, prompt: Any = "a cat", **kwargs: Any) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    given = {"negative_prompt": "egg", "num_inference_steps": 4, "output_type": "np", **kwargs}
    return pipe(prompt, generator=torch.Generator().manual_seed(0), **given).images


def from_pipe(kind: Any, pipe: Any) -> Any:
    silent = {} if "XL" in kind.__name__ else {"requires_safety_checker": False}
    return kind.from_pipe(pipe, **silent)


def hooked(pipe: Any) -> bool:
    registry = HookRegistry.check_if_exists_or_initialize(pipe.unet)
    return registry.get_hook("dng") is not None


@pytest.mark.parametrize(("build", "kind"), PROMPTED)
def test_a_call_is_that_of_the_parent_under_apply_guidance(build: Any, kind: Any) -> None:
    stock = build(scheduler=ancestral())
    ours = from_pipe(kind, stock)
    assert ours.unet is stock.unet
    for options, negative in (
        ({"cfg_scale": 3.0}, ["egg", "ham"]),
        ({"negative_prompts": ["egg", "sausage"], "cfg_scale": 2.0}, ["", ""]),
    ):
        call_of_two = {"prompt": ["a cat", "a dog"], "negative_prompt": negative}
        with apply_guidance(stock, RULE, **options) as trace:
            expected = call(stock, **call_of_two)
        made = call(ours, **call_of_two, rule=RULE, **options)
        np.testing.assert_array_equal(made, expected)
        assert torch.equal(ours.trace.scale, trace.scale)
        assert torch.equal(ours.trace.log_posterior, trace.log_posterior)
        assert not hooked(ours)


@pytest.mark.parametrize(("build", "kind"), PROMPTED)
def test_without_guidance_it_is_the_parent(build: Any, kind: Any) -> None:
    stock = build(scheduler=ancestral())
    ours = from_pipe(kind, stock)
    guided = call(ours, rule=RULE)
    assert len(ours.trace.runs) == 1
    np.testing.assert_array_equal(call(ours), call(stock))
    assert ours.trace is None
    assert np.abs(guided - call(ours)).max() > 1e-3


@pytest.mark.parametrize(("build", "kind"), PROMPTED)
def test_loads_stock_and_own_folders(build: Any, kind: Any, tmp_path: Path) -> None:
    stock = build(scheduler=ancestral())
    ours = from_pipe(kind, stock)
    expected = call(ours, rule=RULE)
    stock.save_pretrained(tmp_path / "stock")
    ours.save_pretrained(tmp_path / "ours")
    for folder in ("stock", "ours"):
        loaded = kind.from_pretrained(tmp_path / folder)
        assert type(loaded) is kind and loaded.trace is None
        np.testing.assert_allclose(call(loaded, rule=RULE), expected, rtol=0, atol=LOADED)
    back = type(stock).from_pretrained(tmp_path / "ours")
    np.testing.assert_allclose(call(back), call(stock), rtol=0, atol=LOADED)


def test_other_pipelines_take_over_its_parts() -> None:
    ours = from_pipe(DNGStableDiffusionPipeline, tiny.tiny_stable_diffusion())
    other = StableDiffusionImg2ImgPipeline.from_pipe(ours, requires_safety_checker=False)
    assert other.unet is ours.unet
    picture = Image.new("RGB", (16, 16), "red")
    assert call(other, image=picture).shape == (1, 16, 16, 3)


def test_the_pipelines_eta_is_ddims() -> None:
    """DDIM's eta is an argument of the pipeline's call, and needs no measuring."""
    ours = from_pipe(DNGStableDiffusionPipeline, tiny.tiny_stable_diffusion())
    call(ours, rule=RULE, eta=1.0)
    measured = tiny.tiny_stable_diffusion()
    with apply_guidance(measured, RULE) as trace:
        call(measured, eta=1.0)
    # 1e-6: float32 posteriors of one sampler, whose eta one of them had to measure.
    torch.testing.assert_close(ours.trace.log_posterior, trace.log_posterior, rtol=0, atol=1e-6)
    with pytest.warns(UserWarning, match="adds no noise .eta = 0"):
        call(ours, rule=RULE)


def test_other_rules_and_errors_in_mid_call() -> None:
    ours = from_pipe(DNGStableDiffusionPipeline, tiny.tiny_stable_diffusion(scheduler=ancestral()))
    call(ours, rule=NegativePrompting(2.0))
    assert ours.trace.log_posterior is None
    np.testing.assert_array_equal(ours.trace.scale, np.full((4, 1), 2.0))

    def stop(*_: Any) -> Any:
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        call(ours, rule=RULE, callback_on_step_end=stop)
    assert not hooked(ours)
    assert len(ours.trace.scale) == 1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"cfg_scale": 2.0}, ValueError, "cfg_scale must be left out without rule"),
        ({"negative_prompts": ["egg"]}, ValueError, "negative_prompts must be left out"),
        ({"divergence_probes": 1}, ValueError, "divergence_probes must be left out"),
        ({"skip_below": 0.1}, ValueError, "skip_below must be left out without rule"),
        ({"rule": "dng"}, TypeError, "rule must be one of dng_math.rules"),
        ({"rule": RULE, "guidance_scale": 1.0}, ValueError, "guidance_scale"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    ours = from_pipe(DNGStableDiffusionPipeline, tiny.tiny_stable_diffusion(scheduler=ancestral()))
    with pytest.raises(error, match=message):
        call(ours, **options)
    assert not hooked(ours)


# ---------------------------------------------------------------------- DDPM


def denoise(pipe: Any, **kwargs: Any) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe(
        batch_size=2, num_inference_steps=5, generator=generator, output_type="np", **kwargs
    ).images


def test_ddpm_is_that_of_the_parent_under_apply_guidance() -> None:
    stock, unwanted = tiny.tiny_ddpm(0), tiny.tiny_unet(1)
    ours = DNGDDPMPipeline.from_pipe(stock, unwanted_unet=unwanted)
    np.testing.assert_array_equal(denoise(ours), denoise(stock))
    assert ours.trace is None
    for given in (unwanted, [unwanted, tiny.tiny_unet(2)]):
        with apply_guidance(stock, RULE, unwanted=given) as trace:
            expected = denoise(stock)
        override = {"unwanted": given} if isinstance(given, list) else {}
        np.testing.assert_array_equal(denoise(ours, rule=RULE, **override), expected)
        assert torch.equal(ours.trace.log_posterior, trace.log_posterior)
    assert ours.trace.log_posterior.shape == (5, 2, 2)
    assert np.abs(expected - denoise(stock)).max() > 1e-3


def test_ddpm_loads_stock_and_own_folders(tmp_path: Path) -> None:
    stock, unwanted = tiny.tiny_ddpm(0), tiny.tiny_unet(1)
    ours = DNGDDPMPipeline.from_pipe(stock, unwanted_unet=unwanted)
    expected = denoise(ours, rule=RULE)
    stock.save_pretrained(tmp_path / "stock")
    ours.save_pretrained(tmp_path / "ours")
    own = DNGDDPMPipeline.from_pretrained(tmp_path / "ours")
    assert torch.equal(own.unwanted_unet.conv_in.weight, unwanted.conv_in.weight)
    given = DNGDDPMPipeline.from_pretrained(tmp_path / "stock", unwanted_unet=unwanted)
    assert given.unwanted_unet is unwanted
    for loaded in (own, given):
        np.testing.assert_allclose(denoise(loaded, rule=RULE), expected, rtol=0, atol=LOADED)
    with pytest.raises(ValueError, match=r"unwanted_unet must be given.*from_pretrained\(path, "):
        DNGDDPMPipeline.from_pretrained(tmp_path / "stock")
    with pytest.raises(ValueError, match="unwanted_unet must be given"):
        DNGDDPMPipeline.from_pipe(stock)


def test_ddpm_with_ddim_has_no_noise() -> None:
    stock = tiny.tiny_ddpm(0)
    scheduler = DDIMScheduler.from_config(stock.scheduler.config)
    ours = DNGDDPMPipeline(stock.unet, scheduler, tiny.tiny_unet(1))
    with pytest.warns(UserWarning, match="DDIMScheduler adds no noise .eta = 0"):
        denoise(ours, rule=RULE)


def test_ddpm_bad_input() -> None:
    stock = tiny.tiny_ddpm(0)
    grey = UNet2DModel(
        sample_size=16,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
    )
    with pytest.raises(ValueError, match="unwanted_unet must be for the images of unet, with in_"):
        DNGDDPMPipeline(stock.unet, stock.scheduler, grey)
    with pytest.raises(TypeError, match="unwanted_unet must be a UNet2DModel, got a str"):
        DNGDDPMPipeline(stock.unet, stock.scheduler, "net")
    ours = DNGDDPMPipeline(stock.unet, stock.scheduler, tiny.tiny_unet(1))
    with pytest.raises(ValueError, match="unwanted must be left out without rule"):
        denoise(ours, unwanted=grey)
    with pytest.raises(ValueError, match="unwanted must not be an empty sequence"):
        denoise(ours, rule=RULE, unwanted=[])
    assert not hooked(ours)
