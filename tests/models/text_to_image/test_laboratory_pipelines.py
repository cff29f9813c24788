"""The laboratory in a real Stable Diffusion pipeline, with guidance and any scheduler."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)

from dng_math import DynamicNegativeGuidance, NegativePrompting, Unguided
from dng_models import apply_guidance, scheduler_run
from dng_models.pipelines.schedulers import EtaDDIMScheduler
from dng_models.text_to_image.laboratory.captions import parse
from dng_models.text_to_image.laboratory.cells_vae import CellVAE
from dng_models.text_to_image.laboratory.exact_model import ExactModel
from dng_models.text_to_image.laboratory.judge import Judge
from dng_models.text_to_image.laboratory.pipelines import BETAS, laboratory_pipeline
from dng_models.text_to_image.laboratory.reader import (
    CaptionEncoder,
    EmbeddingReader,
    caption_tokenizer,
)
from dng_models.text_to_image.laboratory.standard import laboratory_world
from tests.helpers.small_worlds import small_world
from tests.helpers.statistical import mean_bound

tracked = DynamicNegativeGuidance.tracked

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*tracked posterior is wrong:UserWarning"),
    # diffusers' DEIS gives tensors to NumPy's functions.
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning"),
]
WORLD = laboratory_world()
BREAKFAST = "an english breakfast"
RELATED = f"{BREAKFAST} with egg, sausage"
UNCLIPPED = {**BETAS, "clip_sample": False, "steps_offset": 1}
SCHEDULERS: dict[str, Any] = {
    "ddpm": lambda: DDPMScheduler(**UNCLIPPED),
    "ddim": lambda: DDIMScheduler(**UNCLIPPED, set_alpha_to_one=False),
    "ddim-1": lambda: EtaDDIMScheduler(**UNCLIPPED),
    "euler": lambda: EulerDiscreteScheduler(**BETAS, steps_offset=1),
    "euler-karras": lambda: EulerDiscreteScheduler(**BETAS, steps_offset=1, use_karras_sigmas=True),
    "euler-ancestral": lambda: EulerAncestralDiscreteScheduler(**BETAS, steps_offset=1),
    "dpm": lambda: DPMSolverMultistepScheduler(**BETAS, steps_offset=1),
    "sde-dpm": lambda: DPMSolverMultistepScheduler(
        **BETAS, steps_offset=1, algorithm_type="sde-dpmsolver++"
    ),
    "unipc": lambda: UniPCMultistepScheduler(**BETAS, steps_offset=1),
    "deis": lambda: DEISMultistepScheduler(**BETAS, steps_offset=1),
    "v": lambda: DDIMScheduler(**UNCLIPPED, prediction_type="v_prediction"),
    "sample": lambda: DDIMScheduler(**UNCLIPPED, prediction_type="sample"),
    "zero-snr": lambda: DDIMScheduler(
        **UNCLIPPED,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    ),
}


def draw(pipe: Any, prompt: str, n: int = 16, steps: int = 20, **options: Any) -> torch.Tensor:
    return pipe(
        [prompt] * n,
        num_inference_steps=steps,
        generator=[torch.Generator().manual_seed(seed) for seed in range(n)],
        output_type="latent",
        **options,
    ).images


def embedded(pipe: Any, *captions: str) -> torch.Tensor:
    tokens = pipe.tokenizer(
        list(captions), padding="max_length", max_length=77, return_tensors="pt"
    )
    return pipe.text_encoder(tokens.input_ids)[0]


# ---------------------------------------------------------------------- parts


def test_the_pipeline_is_diffusers_own():
    pipe = laboratory_pipeline()
    assert type(pipe) is StableDiffusionPipeline
    found = pipe(RELATED, num_inference_steps=2, generator=torch.Generator().manual_seed(0))
    assert found.images[0].size == (32, 32)


def test_words_of_the_world_are_one_token_each():
    tokenizer = caption_tokenizer(WORLD)
    caption = f"{RELATED} without wine glass"
    assert tokenizer.tokenize(caption) == [
        word + "</w>" for word in caption.replace(",", " ,").split()
    ]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_embeddings_say_what_their_captions_say(dtype):
    tokenizer = caption_tokenizer(WORLD)
    captions = ["", RELATED, "egg, fish", "an egg and a fish", "A Holiday, without wine glasses."]
    ids = tokenizer(captions, padding="max_length", max_length=77, return_tensors="pt").input_ids
    (embeddings,) = CaptionEncoder(dtype=dtype)(ids)
    assert embeddings.dtype == dtype
    read = EmbeddingReader(WORLD, tokenizer)
    assert read(embeddings) == [parse(caption, WORLD) for caption in captions]
    assert read(torch.zeros(1, 77, 2)) == [parse("", WORLD)]
    with pytest.raises(ValueError, match=r"shape \(B, L, 2\), got \(1, 77, 3\)"):
        read(torch.zeros(1, 77, 3))


def test_latents_are_scaled_pixels_cell_by_cell():
    vae = CellVAE(16, (0.1, -0.2, 0.3), 0.375)
    pixels = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    found = vae.encode(pixels).latent_dist.sample()
    assert found.shape == (2, 768, 2, 3)
    lower_right = pixels[:, :, 16:, 32:] - torch.tensor([0.1, -0.2, 0.3])[:, None, None]
    assert torch.equal(found[:, :, 1, 2], lower_right.flatten(1))
    assert torch.allclose(vae.decode(found).sample, pixels, atol=1e-6)
    assert torch.equal(vae.decode(found, return_dict=False)[0], vae.decode(found).sample)
    assert torch.equal(vae.encode(pixels, return_dict=False)[0].mode(), found)


def test_the_vae_is_saved_and_loaded(tmp_path):
    CellVAE(4, (0.1, -0.2, 0.3), 0.375).save_pretrained(tmp_path)
    vae = CellVAE.from_pretrained(tmp_path)
    pixels = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    own = CellVAE(4, (0.1, -0.2, 0.3), 0.375)
    assert vae.config.scaling_factor == 0.375
    assert torch.equal(vae.encode(pixels).latent_dist.mode(), own.encode(pixels).latent_dist.mode())


# ---------------------------------------------------------------------- the network


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_network_knows_the_noise_of_every_schedulers_timesteps(name):
    scheduler = SCHEDULERS[name]()
    pipe = laboratory_pipeline(scheduler=scheduler)
    scheduler.set_timesteps(13)
    run = scheduler_run(scheduler)
    alpha, sigma = pipe.unet.noise_level(torch.from_numpy(run.timesteps))
    # Timesteps between those of training, as Karras' sigmas have, are rounded or interpolated.
    allowed = 2e-3 if name == "euler-karras" else 2e-5
    assert np.abs(alpha.numpy() - run.coefficients.alpha_t).max() < allowed
    assert np.abs(sigma.numpy() - run.coefficients.sigma_t).max() < allowed


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_network_is_the_exact_model(prediction, dtype):
    scheduler = DDIMScheduler(**UNCLIPPED, prediction_type=prediction)
    pipe = laboratory_pipeline(scheduler=scheduler, dtype=dtype)
    model = ExactModel(WORLD, dtype=dtype)
    captions = ["", RELATED, "egg, fish", f"{BREAKFAST} without egg"]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, *WORLD.latent_shape, generator=generator, dtype=dtype)
    t = torch.tensor([999, 700, 300, 20])
    alpha, sigma = pipe.unet.noise_level(t)
    x0, noise = model.x0_and_noise(x, alpha, sigma, captions)
    over = [level.to(dtype)[:, None, None, None] for level in (alpha, sigma)]
    expected = {
        "epsilon": noise,
        "v_prediction": over[0] * noise - over[1] * x0,
        "sample": x0,
    }[prediction]
    found = pipe.unet(x, t, embedded(pipe, *captions)).sample
    assert found.dtype == dtype
    assert torch.allclose(found, expected, atol=1e-5)
    (alone,) = pipe.unet(x[1:2], t[1], embedded(pipe, RELATED), return_dict=False)
    assert torch.allclose(alone, expected[1:2], atol=1e-4)
    assert torch.equal(
        pipe.unet(x[:1], 500).sample, pipe.unet(x[:1], 500, embedded(pipe, "")).sample
    )


@pytest.mark.parametrize("name", SCHEDULERS)
def test_any_scheduler_draws_what_the_caption_says(name):
    pipe = laboratory_pipeline(scheduler=SCHEDULERS[name]())
    latents = draw(pipe, f"{RELATED} without tomato", guidance_scale=1.0)
    judged = Judge(WORLD).look(latents)
    assert np.all(judged.scene == 4)
    assert judged.has("egg", "sausage").all() and not judged.has("tomato").any()
    assert judged.ghosts.mean() < 0.1


def test_half_precision():
    pipe = laboratory_pipeline(dtype=torch.float16)
    latents = draw(pipe, RELATED, n=4, guidance_scale=1.0)
    assert latents.dtype == torch.float16
    assert Judge(WORLD).look(latents.float()).has("egg", "sausage").all()


def test_image_to_image_keeps_the_picture():
    pipe = laboratory_pipeline()
    again = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    again.set_progress_bar_config(disable=True)
    before = pipe(RELATED, num_inference_steps=20, generator=torch.Generator().manual_seed(3))
    after = again(
        BREAKFAST,
        before.images[0],
        strength=0.2,
        num_inference_steps=20,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(4),
    )
    judge = Judge(WORLD)
    assert np.array_equal(judge.look(after.images).cells, judge.look(before.images).cells)


def test_a_small_world_in_a_pipeline():
    world = small_world(cell=4)
    pipe = laboratory_pipeline(world)
    latents = draw(pipe, "a room with an egg and a ball", n=8, guidance_scale=1.0)
    judged = Judge(world).look(latents)
    assert judged.has("egg").all() and judged.has("ball").all()


# ---------------------------------------------------------------------- guidance


@pytest.mark.parametrize("step", [0, 8, 12])
def test_the_exact_posterior_and_the_composed_negative_predict_without_it(step):
    # From the exact log posterior on, the first step of DNG is that of the ideal caption.
    pipe = laboratory_pipeline(dtype=torch.float64)
    pipe.scheduler.set_timesteps(20)
    timesteps = pipe.scheduler.timesteps[step:].tolist()
    alpha, sigma = (float(level) for level in pipe.unet.noise_level(timesteps[0]))
    model = ExactModel(WORLD, dtype=torch.float64)
    pictures = model.sample(BREAKFAST, 16, generator=1).latents
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(pictures.shape, generator=generator, dtype=torch.float64)
    x = alpha * pictures + sigma * noise
    log_posterior, _ = model.log_posterior(x, alpha, sigma, BREAKFAST, RELATED)
    keep = log_posterior < np.log(0.99)  # beyond, odds of 100 and more magnify rounding
    assert keep.sum() >= 4
    x, log_posterior = x[keep], log_posterior[keep]
    predictions: list[torch.Tensor] = []
    take = pipe.scheduler.step

    def step_and_keep(prediction: torch.Tensor, *arguments: Any, **named: Any) -> Any:
        predictions.append(prediction)
        return take(prediction, *arguments, **named)

    pipe.scheduler.step = step_and_keep
    rule = tracked(1.0, 0.5, tracker="log-odds")
    with apply_guidance(pipe, rule, initial_log_posterior=log_posterior):
        pipe(
            [BREAKFAST] * len(x),
            negative_prompt=[RELATED] * len(x),
            timesteps=timesteps,
            latents=x,
            output_type="latent",
        )
    ideal = model.x0_and_noise(x, alpha, sigma, f"{BREAKFAST} without egg, sausage")[1]
    assert torch.allclose(predictions[0], ideal, atol=1e-6)


def left(latents: torch.Tensor) -> np.ndarray:
    return Judge(WORLD).look(latents).has("egg", "sausage")


@pytest.mark.slow
def test_guidance_removes_what_is_related_and_leaves_what_is_not():
    pipe, judge = laboratory_pipeline(), Judge(WORLD)
    options = {"n": 24, "steps": 50}
    before = judge.look(draw(pipe, BREAKFAST, guidance_scale=1.0, **options))
    found = {}
    for name, rule, negative in (
        ("nothing", Unguided(), RELATED),
        ("np", NegativePrompting(1.0), RELATED),
        ("dng", tracked(2.0, 0.7), RELATED),
        ("np unrelated", NegativePrompting(1.0), f"{BREAKFAST} with skyline"),
        ("dng unrelated", tracked(2.0, 0.012), f"{BREAKFAST} with skyline"),
    ):
        with apply_guidance(pipe, rule):
            latents = draw(pipe, BREAKFAST, negative_prompt=[negative] * 24, **options)
        found[name] = judge.look(latents)
    assert not found["nothing"].changed(before).any()
    assert before.has("egg", "sausage").mean() > 0.5
    # These samples are deterministic, with far margins: the shares are 0.05 and 0.2, 0 and 1.
    assert found["dng"].has("egg", "sausage").mean() < found["np"].has("egg", "sausage").mean()
    assert found["dng"].has("egg", "sausage").mean() < 0.2
    assert found["dng unrelated"].changed(before).mean() < 0.1
    assert found["np unrelated"].changed(before).mean() > 0.3
    assert not found["dng"].ghosts.any() and found["np unrelated"].ghosts.any()


@pytest.mark.parametrize("name", ["ddim-1", "euler-ancestral", "sde-dpm", "dpm", "v"])
def test_guidance_with_other_schedulers(name):
    pipe = laboratory_pipeline(scheduler=SCHEDULERS[name]())
    with warnings.catch_warnings(), apply_guidance(pipe, tracked(2.0, 0.7)) as trace:
        guided = draw(pipe, BREAKFAST, n=16, steps=25, negative_prompt=[RELATED] * 16)
    unguided = draw(pipe, BREAKFAST, n=16, steps=25, guidance_scale=1.0)
    assert trace.scale.shape == (25, 16)
    assert left(guided).sum() < left(unguided).sum()


SHARES = {
    "a medieval feast": ("chalice", "candle"),
    "a dinner table": ("flower", "wine glass"),
    "an art workshop": ("paintbrush", "canvas"),
    "an antique store": ("lamp", "book"),
    BREAKFAST: ("egg", "sausage"),
}
BIAS = 0.03  # of 50 steps that start from N(0, 1), which is not quite p_T


def unguided_share(prompts: Any, n: int) -> float:
    """Share of images that have something related to their prompt."""
    pipe, judge = laboratory_pipeline(), Judge(WORLD)
    found = []
    for prompt in prompts:
        looked = judge.look(draw(pipe, prompt, n=n, steps=50, guidance_scale=1.0))
        assert np.all([WORLD.scenes[i].name == prompt for i in looked.scene])
        found.append(looked.has(*SHARES[prompt]))
    return float(np.mean(found))


@pytest.mark.slow
def test_unguided_shares_are_about_the_worlds():
    share = unguided_share([BREAKFAST, "a dinner table"], 128)
    assert abs(share - 0.70) < BIAS + mean_bound(256, value_range=1.0)


@pytest.mark.slow
def test_unguided_shares_of_all_prompts():
    share = unguided_share(SHARES, 2048)
    assert abs(share - 0.70) < BIAS + mean_bound(5 * 2048, value_range=1.0)


def test_two_negatives_with_a_posterior_each_beneath_classifier_free_guidance():
    pipe = laboratory_pipeline()
    negatives = [f"{BREAKFAST} with {name}" for name in ("egg", "sausage")]
    rules = [tracked(2.0, WORLD.share(BREAKFAST, name)) for name in ("egg", "sausage")]
    with apply_guidance(pipe, rules, negative_prompts=negatives, cfg_scale=1.5) as trace:
        guided = draw(pipe, BREAKFAST, steps=30, negative_prompt=[""] * 16)
    assert trace.log_posterior is not None and trace.log_posterior.shape == (30, 2, 16)
    unguided = draw(pipe, BREAKFAST, steps=30, guidance_scale=1.0)
    assert left(guided).sum() < 0.5 * left(unguided).sum()


def test_images_of_half_precision_are_finite():
    pipe = laboratory_pipeline().to(torch.float16)
    images = pipe(
        [RELATED] * 2,
        num_inference_steps=10,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images
    assert np.isfinite(images).all()
    assert Judge(WORLD).look(images).holds(RELATED).all()


# ---------------------------------------------------------------------- errors


def test_unknown_words_in_a_prompt():
    pipe = laboratory_pipeline()
    with pytest.raises(ValueError, match="there is no 'eggz'; did you mean 'egg'"):
        draw(pipe, f"{BREAKFAST} with eggz")
    with pytest.raises(ValueError, match="there is no 'frühstück'"):
        draw(pipe, "Frühstück")
    with (
        apply_guidance(pipe, tracked(1.0, 0.7)),
        pytest.raises(ValueError, match="there is no 'zebra'"),
    ):
        draw(pipe, BREAKFAST, negative_prompt=["zebra"] * 16)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: laboratory_pipeline("world"), TypeError, "world must be a World or None"),
        (lambda: laboratory_pipeline(small_world(1, 1)), ValueError, r"8 divides, got \[2, 2\]"),
        (lambda: laboratory_pipeline(scheduler=DDPMScheduler), TypeError, "scheduler must be"),
        (
            lambda: laboratory_pipeline(scheduler=FlowMatchEulerDiscreteScheduler()),
            TypeError,
            "with alphas_cumprod",
        ),
        (lambda: CellVAE(12), ValueError, "cell must be a power of 2, got 12"),
        (lambda: CellVAE(16, scaling_factor=0.0), ValueError, "scaling_factor must be"),
        (lambda: CellVAE(16, centre=(0.0, 0.0)), ValueError, "centre must have shape"),
        (lambda: laboratory_pipeline().unet.noise_level(1000), ValueError, "from 0 to 999"),
        (
            lambda: laboratory_pipeline().unet(torch.zeros(2, 768, 2, 2), 1, torch.zeros(1, 77, 2)),
            ValueError,
            "a row for each of 2 images, got 1",
        ),
    ],
)
def test_errors(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
