"""The tiny pipelines that every other test of models rests on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDPMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
)
from PIL import Image

from dng_models.pipelines import tiny

PROMPTED: tuple[Callable[..., Any], ...] = (
    tiny.tiny_stable_diffusion,
    tiny.tiny_stable_diffusion_xl,
    tiny.tiny_stable_diffusion_3,
    tiny.tiny_controlnet,
)


def image(pipe: Any, prompt: str = "a cat", seed: int = 0, steps: int = 2) -> np.ndarray:
    extra = {"image": Image.new("RGB", (16, 16), "green")} if hasattr(pipe, "controlnet") else {}
    generator = torch.Generator().manual_seed(seed)
    out = pipe(
        prompt, num_inference_steps=steps, generator=generator, output_type="np", **extra
    ).images
    assert out.shape == (1, 16, 16, 3)
    return out


@pytest.mark.parametrize("build", PROMPTED)
def test_the_seed_decides_and_prompts_matter(build: Callable[..., Any]) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    pipe = build(5)
    assert torch.equal(torch.get_rng_state(), before)
    first = image(pipe)
    torch.manual_seed(4)
    np.testing.assert_array_equal(image(build(5)), first)
    assert np.abs(image(build(6)) - first).max() > 0.01
    assert np.abs(image(pipe, "a dog") - first).max() > 0.001
    assert np.abs(image(pipe, seed=1) - first).max() > 0.01


@pytest.mark.parametrize("build", PROMPTED)
def test_prompted_pipelines_round_trip(build: Callable[..., Any], tmp_path: Path) -> None:
    pipe = build(1)
    pipe.save_pretrained(tmp_path)
    loaded = type(pipe).from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    # Float32: loaded weights lie elsewhere in memory, where sums may be split differently.
    np.testing.assert_allclose(image(loaded), image(pipe), rtol=0, atol=1e-5)


def test_controlnet_sees_its_image() -> None:
    pipe = tiny.tiny_controlnet()
    seen = [
        pipe(
            "a cat",
            image=Image.new("RGB", (16, 16), colour),
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(0),
            output_type="np",
        ).images
        for colour in ("black", "white")
    ]
    assert np.abs(seen[0] - seen[1]).max() > 0.001


def test_img2img_and_inpaint_from_the_same_parts() -> None:
    pipe = tiny.tiny_stable_diffusion()
    picture = Image.new("RGB", (16, 16), "red")
    for kind, extra in (
        (StableDiffusionImg2ImgPipeline, {}),
        (StableDiffusionInpaintPipeline, {"mask_image": Image.new("L", (16, 16), 255)}),
    ):
        other = kind.from_pipe(pipe, requires_safety_checker=False)
        other.set_progress_bar_config(disable=True)
        out = other("a cat", image=picture, num_inference_steps=4, output_type="np", **extra)
        assert out.images.shape == (1, 16, 16, 3)


def test_ddpm_and_its_network(tmp_path: Path) -> None:
    pipe = tiny.tiny_ddpm(2)
    for name, parameter in tiny.tiny_unet(2).named_parameters():
        assert torch.equal(parameter, pipe.unet.get_parameter(name))
    pipe.save_pretrained(tmp_path)
    loaded = type(pipe).from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)

    def made(pipe: Any) -> np.ndarray:
        generator = torch.Generator().manual_seed(0)
        return pipe(num_inference_steps=3, generator=generator, output_type="np").images

    assert made(pipe).shape == (1, 16, 16, 3)
    # Float32: loaded weights lie elsewhere in memory, where sums may be split differently.
    np.testing.assert_allclose(made(loaded), made(pipe), rtol=0, atol=1e-5)
    assert np.abs(made(tiny.tiny_ddpm(3)) - made(pipe)).max() > 0.01


def test_clip_tells_images_and_texts_apart(tmp_path: Path) -> None:
    model, processor = tiny.tiny_clip(1)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    pictures = [Image.new("RGB", (40, 32), colour) for colour in ("red", "blue")]
    again = type(model).from_pretrained(tmp_path), type(processor).from_pretrained(tmp_path)
    scores = []
    for net, read in ((model, processor), again):
        inputs = read(text=["a cat", "a dog"], images=pictures, return_tensors="pt", padding=True)
        with torch.no_grad():
            scores.append(net(**inputs).logits_per_image)
    assert scores[0].shape == (2, 2)
    assert torch.equal(scores[0], scores[1])
    assert torch.unique(scores[0]).numel() == 4


def test_tokens_of_words() -> None:
    tokenizer = tiny.tiny_stable_diffusion().tokenizer
    words = ["egg", "eggs", "gge", "sausage", "Egg and sausage", "é", "猫", ""]
    ids = [tuple(tokenizer(word).input_ids) for word in words]
    assert len(set(ids)) == len(words)
    # CLIP's text encoder is not told of upper case.
    assert ids[0] == tuple(tokenizer("EGG").input_ids)
    long = tokenizer("sausage " * 40, truncation=True, padding="max_length").input_ids
    assert len(long) == tokenizer.model_max_length == tiny.TOKENS
    assert max(long) < len(tokenizer) == 514


def test_scheduler_and_prediction_type() -> None:
    pipe = tiny.tiny_stable_diffusion_xl(prediction_type="v_prediction")
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    given = DDPMScheduler(steps_offset=1, clip_sample=False)
    assert tiny.tiny_stable_diffusion(scheduler=given).scheduler is given


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"seed": -1}, ValueError, "seed must be an integer from 0"),
        ({"seed": 0.5}, TypeError, "seed must be an integer from 0"),
        ({"prediction_type": "flow"}, ValueError, "prediction_type must be one of 'epsilon'"),
        ({"scheduler": "ddim"}, TypeError, "scheduler must be a diffusers scheduler"),
    ],
)
def test_bad_input(kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        tiny.tiny_stable_diffusion(**kwargs)
