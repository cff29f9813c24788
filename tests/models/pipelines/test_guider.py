"""The guider for modular pipelines: against diffusers' own, a loop by hand, and the hook."""

from __future__ import annotations

import importlib
import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler
from torch import Tensor, nn

from dng_kernels import StepPlan, guide, update_posterior
from dng_math import DynamicNegativeGuidance
from dng_models.pipelines import guider as module
from dng_models.pipelines import modular_blocks, tiny
from dng_models.pipelines.guided_chain import GuidedChain
from dng_models.pipelines.guider import DynamicNegativeGuider
from dng_models.pipelines.hook import apply_guidance
from dng_models.pipelines.modular_blocks import ShowLatents, add_latents_block
from dng_models.pipelines.schedulers import PosteriorFlowScheduler
from dng_models.pipelines.transitions import scheduler_run
from tests.helpers.versions import before

tracked_dng = DynamicNegativeGuidance.tracked

STEPS = 6
# Latents grow to about 50 with random weights, and float32 has seven digits: relative 1e-6.
LATENTS = 1e-4
needs_guiders = pytest.mark.skipif(
    module.GuiderOutput is None, reason="diffusers 0.35 has guiders of another interface"
)


@pytest.fixture(autouse=True)
def without_tracebacks_of_expected_errors() -> Any:
    """diffusers logs every error of a block with its traceback."""
    log = logging.getLogger("diffusers.modular_pipelines.modular_pipeline")
    before = log.level
    log.setLevel(logging.CRITICAL)
    yield
    log.setLevel(before)


def ancestral() -> EulerAncestralDiscreteScheduler:
    return EulerAncestralDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
    )


def names_of(block: Any) -> list[str]:
    return [spec.name for spec in block.expected_components]


def modular(stock: Any, blocks: Any) -> Any:
    pipe = blocks.init_pipeline()
    wanted = set(names_of(pipe.blocks))
    pipe.update_components(**{k: v for k, v in stock.components.items() if k in wanted and v})
    blocks = getattr(pipe, "_blocks", None) or pipe.blocks
    for block in blocks.sub_blocks.values():
        for loop in modular_blocks._loops(block):
            loop.set_progress_bar_config(disable=True)
    return pipe


def build(name: str, *, shows: bool = True) -> Any:
    """A tiny modular pipeline, and the classic one with the same parts as ``classic``."""
    if name == "xl":
        stock = tiny.tiny_stable_diffusion_xl(scheduler=ancestral())
        blocks = diffusers.StableDiffusionXLAutoBlocks()
    else:
        if not hasattr(diffusers, "StableDiffusion3AutoBlocks"):
            pytest.skip("this diffusers has no StableDiffusion3AutoBlocks")
        stock = tiny.tiny_stable_diffusion_3(scheduler=PosteriorFlowScheduler(shift=3.0))
        blocks = diffusers.StableDiffusion3AutoBlocks()
    pipe = modular(stock, add_latents_block(blocks) if shows else blocks)
    pipe.classic = stock
    return pipe


def latents(pipe: Any, guider: Any = None, **kwargs: Any) -> Tensor:
    if guider is not None:
        pipe.update_components(guider=guider)
    given = {
        "prompt": ["a cat", "a house"],
        "negative_prompt": ["egg", "sausage"],
        "num_inference_steps": STEPS,
        "height": 16,
        "width": 16,
        "generator": torch.Generator().manual_seed(0),
        **kwargs,
    }
    return pipe(**given, output="latents")


def cfg(scale: float) -> Any:
    return diffusers.ClassifierFreeGuidance(guidance_scale=scale)


RULE = {"guidance_scale": 20.0, "prior": 0.02, "temperature": 0.02}


# ---------------------------------------------------------------------- against others


@needs_guiders
@pytest.mark.parametrize("name", ["xl", "sd3"])
def test_scale_0_is_plain_cfg_to_the_last_bit(name: str) -> None:
    pipe = build(name)
    guider = DynamicNegativeGuider(0.0, cfg_scale=4.0)
    pipe.update_components(guider=guider)
    guider.encode_unconditional(pipe)
    # One image: the same prompt encoded in a batch of two has other last bits.
    ours = latents(pipe, prompt="a cat", negative_prompt="egg")
    # Without a negative prompt XL takes zeros, and SD3 none at all.
    plain = {"prompt": "a cat", "negative_prompt": None if name == "xl" else ""}
    assert torch.equal(ours, latents(pipe, cfg(4.0), **plain))
    assert guider.trace.log_posterior.shape == (STEPS, 1)
    assert not torch.equal(ours, latents(pipe, cfg(3.0), **plain))


@needs_guiders
@pytest.mark.parametrize("name", ["xl", "sd3"])
def test_temperature_0_is_plain_negative_prompting(name: str) -> None:
    pipe = build(name)
    guider = DynamicNegativeGuider(20.0, prior=0.1, temperature=0.0)
    ours = latents(pipe, guider)
    scale = 20.0 * 0.1 / 0.9
    torch.testing.assert_close(
        guider.trace.scale, torch.full((STEPS, 2), scale), rtol=1e-6, atol=0.0
    )
    torch.testing.assert_close(ours, latents(pipe, cfg(1.0 + scale)), rtol=0.0, atol=LATENTS)
    assert (ours - latents(pipe, cfg(1.0))).abs().max() > 0.1


@needs_guiders
@pytest.mark.parametrize("name", ["xl", "sd3"])
@pytest.mark.parametrize(
    ("cfg_scale", "reference"), [(None, "positive"), (3.0, "positive"), (3.0, "unconditional")]
)
def test_against_the_hook(name: str, cfg_scale: float | None, reference: Any) -> None:
    pipe, rule = build(name), RULE | {"reference": reference}
    guider = DynamicNegativeGuider(**rule, cfg_scale=cfg_scale)
    pipe.update_components(guider=guider)
    if cfg_scale is not None:
        guider.encode_unconditional(pipe)
    ours = latents(pipe)
    with apply_guidance(pipe.classic, tracked_dng(**rule), cfg_scale=cfg_scale) as trace:
        theirs = pipe.classic(
            ["a cat", "a house"],
            negative_prompt=["egg", "sausage"],
            num_inference_steps=STEPS,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        ).images
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=LATENTS)
    # Trackers add up differences of large squares in float32, whose rounding they share.
    torch.testing.assert_close(
        guider.trace.log_posterior, trace.log_posterior, rtol=1e-5, atol=1e-5
    )
    assert np.array_equal(guider.trace.timesteps, trace.timesteps)
    scale = guider.trace.scale
    assert (scale.amax(dim=0) - scale.amin(dim=0)).min() > 1e-4


@needs_guiders
def test_a_path_is_followed_as_seen_from_the_unconditional_prediction() -> None:
    """The network is evaluated anew for that prompt and for the negative one."""
    pipe = build("xl")
    rule = RULE | {"tracker": "path", "temperature": 1e-3, "reference": "unconditional"}
    guider = DynamicNegativeGuider(**rule, cfg_scale=3.0)
    pipe.update_components(guider=guider)
    guider.encode_unconditional(pipe)
    ours = latents(pipe, num_inference_steps=3)
    with apply_guidance(pipe.classic, tracked_dng(**rule), cfg_scale=3.0) as trace:
        theirs = pipe.classic(
            ["a cat", "a house"],
            negative_prompt=["egg", "sausage"],
            num_inference_steps=3,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        ).images
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=LATENTS)
    torch.testing.assert_close(
        guider.trace.log_posterior, trace.log_posterior, rtol=1e-5, atol=1e-5
    )


@needs_guiders
def test_against_a_loop_by_hand() -> None:
    pipe = build("xl")
    guider = DynamicNegativeGuider(**RULE)
    ours = latents(pipe, guider)

    stock, scheduler = pipe.classic, ancestral()
    embeds, negative, pooled, negative_pooled = stock.encode_prompt(
        ["a cat", "a house"], negative_prompt=["egg", "sausage"]
    )
    sizes = torch.tensor([[16.0, 16.0, 0.0, 0.0, 16.0, 16.0]]).repeat(2, 1)

    def predict(x: Tensor, t: Tensor, tokens: Tensor, text: Tensor) -> Tensor:
        added = {"text_embeds": text, "time_ids": sizes}
        return stock.unet(x, t, encoder_hidden_states=tokens, added_cond_kwargs=added).sample

    scheduler.set_timesteps(STEPS)
    run = scheduler_run(scheduler)
    plan = StepPlan(run.coefficients, tracked_dng(**RULE), prediction_type=run.prediction_type)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 8, 8, generator=generator) * scheduler.init_noise_sigma
    state = plan.init_state(2, torch.float32)
    with torch.no_grad():
        for i, t in enumerate(scheduler.timesteps):
            shown = scheduler.scale_model_input(x, t)
            eps = predict(shown, t, embeds, pooled)
            eps_neg = predict(shown, t, negative, negative_pooled)
            taken = guide(plan, i, eps, eps_neg, state, return_scale=True)
            torch.testing.assert_close(guider.trace.scale[i], taken.scale, rtol=1e-5, atol=0.0)
            x = scheduler.step(taken.eps_guided, t, x, generator=generator).prev_sample
            x_next = x * float(run.input_scale[i + 1])
            state = update_posterior(plan, i, shown, x_next, eps, eps_neg, state).state
    torch.testing.assert_close(ours, x, rtol=1e-5, atol=LATENTS)


# ---------------------------------------------------------------------- runs and intervals


@needs_guiders
def test_every_call_is_a_run_of_its_own() -> None:
    pipe = build("xl")
    guider = DynamicNegativeGuider(**RULE)
    first = latents(pipe, guider)
    assert torch.equal(latents(pipe), first)
    assert len(guider.trace.runs) == 2
    single = latents(pipe, prompt="a cat", negative_prompt="egg", num_inference_steps=3)
    assert single.shape == (1, 4, 8, 8)
    assert [run.scale.shape for run in guider.trace.runs] == [(STEPS, 2), (STEPS, 2), (3, 1)]
    # A run that was broken off is no part of the next one.
    with pytest.raises(RuntimeError, match="broken off"):
        latents(pipe, generator=_Breaks(after=4))
    assert torch.equal(latents(pipe), first)


class _Breaks(torch.Generator):
    """A generator whose device can be asked for some times only: randn_tensor asks each step."""

    def __new__(cls, after: int) -> _Breaks:
        return super().__new__(cls)

    def __init__(self, after: int) -> None:
        self.left = after

    @property
    def device(self) -> torch.device:
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("broken off")
        return torch.device("cpu")


@needs_guiders
def test_interval_is_of_steps_and_the_posterior_is_tracked_outside() -> None:
    pipe = build("xl")
    free = DynamicNegativeGuider(**RULE, stop=0.0)
    unguided = latents(pipe, free)
    assert torch.equal(free.trace.scale, torch.zeros(STEPS, 2))
    assert len(torch.unique(free.trace.log_posterior[:, 0])) == STEPS
    torch.testing.assert_close(unguided, latents(pipe, cfg(1.0)), rtol=0, atol=0)
    assert free.num_conditions == 2
    for start, stop, active in (
        (0.0, 0.5, [0, 1, 2]),
        (0.34, 1.0, [2, 3, 4, 5]),
        (0.2, 0.9, [1, 2, 3, 4]),
        (0.9, 0.9, []),
    ):
        guider = DynamicNegativeGuider(**RULE, start=start, stop=stop)
        latents(pipe, guider)
        acted = (guider.trace.scale > 0).all(dim=1).nonzero()[:, 0].tolist()
        assert acted == active
        assert ((guider.trace.scale > 0).sum(dim=1) % 2 == 0).all()


@needs_guiders
def test_interval_of_a_run_that_starts_late() -> None:
    """Image to image begins at a later step of the scheduler; fractions are of its own steps."""
    pipe = build("sd3")
    guider = DynamicNegativeGuider(**RULE, start=0.5)
    picture = torch.zeros(1, 3, 16, 16)
    latents(pipe, guider, image=picture, strength=0.7, prompt="a cat", negative_prompt="egg")
    assert guider.trace.last.steps == [1, 2, 3, 4, 5]
    assert (guider.trace.scale[:, 0] > 0).tolist() == [False, False, True, True, True]


@needs_guiders
def test_disabled_it_is_the_positive_prediction() -> None:
    pipe = build("sd3")
    guider = DynamicNegativeGuider(**RULE, enabled=False)
    assert guider.num_conditions == 1
    ours = latents(pipe, guider, negative_prompt=None)
    assert not guider.trace.runs
    guider.enable()
    assert guider.num_conditions == 2
    assert not torch.equal(ours, latents(pipe))
    guider.disable()
    assert torch.equal(ours, latents(pipe, negative_prompt=None))
    assert torch.equal(ours, latents(pipe, cfg(1.0), negative_prompt=None))


@needs_guiders
def test_carried_prompts_are_the_pipelines_own() -> None:
    pipe = build("xl")
    spoken = DynamicNegativeGuider(**RULE, cfg_scale=3.0)
    pipe.update_components(guider=spoken)
    spoken.encode_unconditional(pipe)
    # One row of embeddings serves any number of images; sizes in them are those of the call.
    expected = latents(pipe, negative_prompt="egg", prompt="a cat", num_images_per_prompt=2)
    carried = DynamicNegativeGuider(**RULE, cfg_scale=3.0)
    pipe.update_components(guider=carried)
    carried.encode_negative(pipe, "egg", height=32)
    ours = latents(pipe, negative_prompt=None, prompt="a cat", num_images_per_prompt=2)
    assert torch.equal(ours, expected)
    with pytest.raises(ValueError, match="rows for 1 or 2 images, got 3"):
        carried.set_negative({k: v.repeat(3, *[1] * (v.ndim - 1)) for k, v in _embeds(pipe)})
        latents(pipe)


def _embeds(pipe: Any) -> list[tuple[str, Tensor]]:
    tokens, _, pooled, _ = pipe.classic.encode_prompt("egg")
    return [("prompt_embeds", tokens), ("text_embeds", pooled)]


# ---------------------------------------------------------------------- saving


@needs_guiders
def test_configuration_round_trips(tmp_path: Path) -> None:
    settings = {
        "guidance_scale": 7.0,
        "prior": 0.2,
        "temperature": 0.3,
        "offset": 0.001,
        "offset_nats": 0.5,
        "p_min": 1e-4,
        "p_max": 0.9,
        "tracker": "log-odds",
        "variance": "small",
        "cfg_scale": 2.0,
        "start": 0.1,
        "stop": 0.8,
        "enabled": False,
        "probes": 1,
        "reference": "unconditional",
    }
    guider = DynamicNegativeGuider(**settings)
    guider.save_pretrained(tmp_path / "a")
    guider.save_config(tmp_path / "b")
    saved = json.loads((tmp_path / "a" / "guider_config.json").read_text())
    assert {k: v for k, v in saved.items() if not k.startswith("_")} == settings
    for other in (
        DynamicNegativeGuider.from_pretrained(tmp_path / "a"),
        DynamicNegativeGuider.from_config(DynamicNegativeGuider.load_config(tmp_path / "b")),
        DynamicNegativeGuider.from_config(guider.config),
        guider.new(),
    ):
        assert other.rule == guider.rule
        assert dict(other.config).items() >= settings.items()
    assert guider.new(prior=0.5).rule.posterior.prior == 0.5
    assert "num_conditions: 1" in repr(guider)


@needs_guiders
def test_saved_inside_a_modular_pipeline(tmp_path: Path) -> None:
    from diffusers.modular_pipelines import ComponentSpec

    pipe = build("xl")
    DynamicNegativeGuider(**RULE).save_pretrained(tmp_path / "guider")
    spec = ComponentSpec(
        "guider", DynamicNegativeGuider, pretrained_model_name_or_path=str(tmp_path / "guider")
    )
    pipe.update_components(guider=spec.load())
    expected = latents(pipe)
    folder = str(tmp_path / "pipe")
    pipe.save_pretrained(folder, overwrite_modular_index=True)
    blocks = add_latents_block(diffusers.StableDiffusionXLAutoBlocks())
    loaded = blocks.init_pipeline(folder)
    loaded.load_components()
    assert loaded.guider.rule == tracked_dng(**RULE)
    # Float32: loaded weights lie elsewhere in memory, where sums may be split differently.
    torch.testing.assert_close(latents(loaded), expected, rtol=1e-5, atol=LATENTS)


# ---------------------------------------------------------------------- the block


FAMILIES = (
    "StableDiffusionXLAutoBlocks",
    "StableDiffusion3AutoBlocks",
    "QwenImageAutoBlocks",
    "QwenImageEditAutoBlocks",
    "WanBlocks",
    "Wan22Blocks",
    "WanImage2VideoAutoBlocks",
    "Flux2KleinBaseAutoBlocks",
    "ZImageAutoBlocks",
    "HunyuanVideo15AutoBlocks",
    "LTXAutoBlocks",
)


@needs_guiders
@pytest.mark.parametrize("family", FAMILIES)
def test_the_block_stands_before_the_denoiser(family: str) -> None:
    if not hasattr(diffusers, family):
        pytest.skip(f"this diffusers has no {family}")
    blocks = getattr(diffusers, family)()
    ours = add_latents_block(add_latents_block(blocks))
    before, after = list(modular_blocks._loops(blocks)), list(modular_blocks._loops(ours))
    assert before and len(before) == len(after)
    for old, new in zip(before, after, strict=True):
        names = list(new.sub_blocks)
        assert [name for name in names if name != "show_latents"] == list(old.sub_blocks)
        at = names.index("show_latents")
        assert isinstance(new.sub_blocks["show_latents"], ShowLatents)
        assert all("guider" not in names_of(new.sub_blocks[n]) for n in names[:at])
        assert "guider" in names_of(new.sub_blocks[names[at + 1]])
    assert names_of(ours) == names_of(blocks)
    kinds = [{spec.name: spec.type_hint for spec in b.expected_components} for b in (blocks, ours)]
    assert kinds[0] == kinds[1]


@needs_guiders
@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("LTX2AutoBlocks", "made for its LTX2Guidance"),
        ("HeliosAutoBlocks", "HeliosChunkDenoiseInner of .* takes many"),
        ("FluxAutoBlocks", "must have a denoising loop with a guider, FluxAutoBlocks has none"),
    ],
)
def test_refused_blocks(family: str, message: str) -> None:
    if not hasattr(diffusers, family):
        pytest.skip(f"this diffusers has no {family}")
    with pytest.raises(ValueError, match=message):
        add_latents_block(getattr(diffusers, family)())


@needs_guiders
def test_blocks_must_be_blocks() -> None:
    pipe = build("xl")
    with pytest.raises(TypeError, match=r"pipe.blocks, got a StableDiffusionXLModularPipeline"):
        add_latents_block(pipe)


class _Network(nn.Module):
    """Stands for a transformer of any family: shifts x by its prompt."""

    dtype = torch.float32

    def forward(
        self,
        hidden_states: Any = None,
        encoder_hidden_states: Any = None,
        x: Any = None,
        t: Any = None,
        timestep: Any = None,
        cap_feats: Any = None,
        **_: Any,
    ) -> tuple[Any]:
        if x is not None:
            pairs = zip(x, cap_feats, strict=True)
            return ([-predict(each[None], tokens[None])[0] for each, tokens in pairs],)
        return (predict(hidden_states, encoder_hidden_states),)


def predict(x: Tensor, tokens: Tensor) -> Tensor:
    shift = tokens.mean(dim=(1, 2)).reshape(-1, *[1] * (x.ndim - 1))
    return torch.tanh(x + shift) + 0.3 * shift


def rescaled(pred: Tensor, like: Tensor) -> Tensor:
    return pred * (like.norm(dim=-1, keepdim=True) / pred.norm(dim=-1, keepdim=True))


LOOPS: dict[str, tuple[str, str, tuple[int, ...], dict[str, Any]]] = {
    "qwen": ("qwenimage", "QwenImageDenoiseStep", (2, 6, 4), {"img_shapes": [(1, 2, 3)]}),
    "qwen edit": (
        "qwenimage",
        "QwenImageEditDenoiseStep",
        (2, 6, 4),
        {"img_shapes": [(1, 2, 3)], "image_latents": torch.ones(2, 5, 4)},
    ),
    "wan": ("wan", "WanDenoiseStep", (2, 4, 3, 4, 4), {"dtype": torch.float32}),
    "wan 2.2": ("wan", "Wan22DenoiseStep", (2, 4, 3, 4, 4), {"dtype": torch.float32}),
    "flux2": ("flux2", "Flux2KleinBaseDenoiseStep", (2, 6, 4), {}),
    "z-image": ("z_image", "ZImageDenoiseStep", (2, 4, 4, 4), {"dtype": torch.float32}),
}


def run_loop(family: str, guider: Any, x: Tensor, prompts: Any) -> tuple[Tensor, Any]:
    """One of diffusers' denoising loops with the network above; and its scheduler."""
    from diffusers.modular_pipelines.modular_pipeline import PipelineState

    package, name, _, extra = LOOPS[family]
    path = f"diffusers.modular_pipelines.{package}.denoise"
    kind = getattr(importlib.import_module(path), name)
    loop = add_latents_block(kind())
    loop.set_progress_bar_config(disable=True)
    scheduler = PosteriorFlowScheduler()
    scheduler.set_timesteps(5)
    parts = {"scheduler": scheduler, "guider": guider, "transformer": _Network()}
    if family == "wan 2.2":
        parts |= {"guider_2": guider, "transformer_2": _Network()}
    config = SimpleNamespace(boundary_ratio=0.5)
    components = SimpleNamespace(**parts, components=parts, config=config, num_train_timesteps=1000)
    state = PipelineState()
    ids = torch.zeros(2, 3, 4)
    state.set("txt_ids", ids, "denoiser_input_fields")
    state.set("negative_txt_ids", ids, "denoiser_input_fields")
    positive, negative = prompts
    if family == "z-image":
        positive, negative = list(positive), list(negative)
    state.set("prompt_embeds", positive, "denoiser_input_fields")
    state.set("negative_prompt_embeds", negative, "denoiser_input_fields")
    inputs = {
        "latents": x,
        "latent_ids": ids,
        "timesteps": scheduler.timesteps,
        "num_inference_steps": 5,
        "additional_cond_kwargs": {},
        **extra,
    }
    for key, value in inputs.items():
        state.set(key, value)
    _, state = loop(components, state)
    return state.get("latents"), scheduler


@needs_guiders
@pytest.mark.parametrize("family", LOOPS)
def test_loops_of_other_families(family: str) -> None:
    generator = torch.Generator().manual_seed(1)
    shape = LOOPS[family][2]
    x = torch.randn(shape, generator=generator)
    prompts = torch.randn(2, 2, 3, 4, generator=generator)
    guider = DynamicNegativeGuider(3.0, prior=0.2, temperature=0.1, offset_nats=1.0)
    try:
        ours, scheduler = run_loop(family, guider, x, prompts)
    except (ImportError, AttributeError) as error:
        if not before("diffusers", "0.42"):
            raise
        pytest.skip(f"an older modular pipeline: {error}")
    chain = GuidedChain(guider.rule)
    scheduler.set_timesteps(5)
    qwen = family.startswith("qwen")
    for t in scheduler.timesteps:
        positive, negative = (predict(x, tokens) for tokens in prompts)
        chain.observe(scheduler, x, t, scaled=False)
        guided = chain.guide(positive, negative)
        # Qwen-Image gives what was guided the norm of the positive prediction, by token.
        guided = rescaled(guided, positive) if qwen else guided
        x = scheduler.step(guided, t, x, return_dict=False)[0]
    torch.testing.assert_close(ours, x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(guider.trace.log_posterior, chain.trace.log_posterior)
    assert len(guider.trace.runs) == 1
    assert (guider.trace.scale[-1] / guider.trace.scale[0] - 1).abs().min() > 0.01


@needs_guiders
def test_overwritten_latents_do_not_count() -> None:
    state = SimpleNamespace(mask=torch.ones(1, 1, 2, 2))
    x = torch.zeros(1, 4, 2, 2)
    assert modular_blocks._mask(SimpleNamespace(num_channels_unet=4), state, x) is state.mask
    state.masked_image_latents = x
    assert modular_blocks._mask(SimpleNamespace(num_channels_unet=9), state, x) is None
    kept = SimpleNamespace(conditioning_mask=torch.tensor([[1.0, 0.0, 0.0]]))
    mask = modular_blocks._mask(SimpleNamespace(), kept, torch.zeros(1, 3, 4))
    assert mask.shape == (1, 3, 1) and mask[0, :, 0].tolist() == [0.0, 1.0, 1.0]
    assert modular_blocks._mask(SimpleNamespace(), SimpleNamespace(), x) is None


@needs_guiders
def test_inpainting_gives_the_chain_its_mask() -> None:
    pipe = build("xl")
    guider = DynamicNegativeGuider(**RULE)
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., :8] = 1.0
    given = {"image": torch.zeros(1, 3, 16, 16), "mask_image": mask, "strength": 0.99}
    latents(pipe, guider, prompt="a cat", negative_prompt="egg", **given)
    seen = guider._chain.mask
    assert seen is not None and 0 < seen.mean() < 1
    assert guider.trace.scale.shape[1] == 1


# ---------------------------------------------------------------------- errors


@needs_guiders
def test_without_its_latents() -> None:
    for name in ("xl", "sd3"):
        pipe = build(name, shows=False)
        with pytest.raises(
            ValueError, match=r"latents of this step were not shown.*add_latents_bl"
        ):
            latents(pipe, DynamicNegativeGuider(**RULE))


@needs_guiders
@pytest.mark.parametrize("negative", [None, "", ["", " "]])
@pytest.mark.parametrize("name", ["xl", "sd3"])
def test_without_a_negative_prompt(name: str, negative: Any) -> None:
    pipe = build(name)
    with pytest.raises(ValueError, match="negative_prompt must be given to the pipeline"):
        latents(pipe, DynamicNegativeGuider(**RULE), negative_prompt=negative)


@needs_guiders
def test_without_the_unconditional_prompt() -> None:
    pipe = build("xl")
    guider = DynamicNegativeGuider(**RULE, cfg_scale=3.0)
    assert guider.num_conditions == 3
    with pytest.raises(ValueError, match=r"cfg_scale=3.0: call guider.encode_unconditional\(pipe"):
        latents(pipe, guider)
    guider.set_unconditional({"prompt_embeds": torch.ones(1, 77, 64)})
    with pytest.raises(ValueError, match=r"set_unconditional must also have 'text_embeds'"):
        latents(pipe, guider)
    for value in (torch.ones(1), {}, 3):
        with pytest.raises(TypeError, match="embeddings must be a mapping"):
            guider.set_unconditional(value)
    with pytest.raises(ValueError, match="pipe must be a modular pipeline with this guider"):
        DynamicNegativeGuider(cfg_scale=3.0).encode_unconditional(pipe)
    with pytest.raises(ValueError, match="prompt must be a non-empty str"):
        guider.encode_negative(pipe, " ")


@needs_guiders
def test_an_embedding_of_nothing_is_no_negative_prompt() -> None:
    """For loops of one's own, where only embeddings are seen."""
    tokens, empty = torch.ones(1, 3, 4), torch.full((1, 3, 4), 0.5)
    guider = DynamicNegativeGuider(cfg_scale=2.0)
    guider.set_unconditional({"prompt_embeds": empty})
    guider.set_state(0, 5, torch.tensor(999))
    for nothing in (None, torch.zeros_like(tokens), empty):
        with pytest.raises(ValueError, match="negative_prompt must be given"):
            guider.prepare_inputs({"prompt_embeds": (tokens, nothing)})
    batches = guider.prepare_inputs({"prompt_embeds": (tokens, 2 * tokens), "x": tokens})
    assert [float(b.prompt_embeds.mean()) for b in batches] == [1.0, 2.0, 0.5]
    assert all(b.x is tokens for b in batches)


@needs_guiders
def test_two_guiders_of_one_chain_must_be_one() -> None:
    guiders = {"guider": DynamicNegativeGuider(), "guider_2": DynamicNegativeGuider()}
    with pytest.raises(ValueError, match="guider and guider_2 must be the same object"):
        ShowLatents()(SimpleNamespace(components=guiders), SimpleNamespace(), 0, torch.tensor(1))
    one = SimpleNamespace(components={"guider": guiders["guider"]}, scheduler=None)
    with pytest.raises(ValueError, match="must have a scheduler and a tensor latents, got a None"):
        ShowLatents()(one, SimpleNamespace(), 0, torch.tensor(1))


@needs_guiders
@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"prior": 1.0}, ValueError, r"prior must be in \(0, 1\), got 1.0"),
        ({"temperature": -1.0}, ValueError, "temperature must be"),
        ({"temperature": "hot"}, TypeError, "temperature must be a real number"),
        ({"p_max": 1.5}, ValueError, "p_max must be"),
        ({"tracker": "exact"}, ValueError, "tracker must be one of 'paper', 'log-odds'"),
        ({"variance": "huge"}, ValueError, "variance must be one of"),
        ({"guidance_scale": float("nan")}, ValueError, "guidance_scale must be finite"),
        ({"cfg_scale": "much"}, TypeError, "cfg_scale must be a real number"),
        ({"reference": "unconditional"}, ValueError, "cfg_scale must be given for DynamicNeg"),
        ({"start": 1.0}, ValueError, r"start must be in \[0, 1\), got 1.0"),
        ({"start": 0.5, "stop": 0.4}, ValueError, r"stop must be in \[start, 1\] = \[0.5, 1\]"),
        ({"enabled": 1}, TypeError, "enabled must be True or False, got 1"),
    ],
)
def test_bad_settings(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        DynamicNegativeGuider(**settings)


def test_an_old_diffusers_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GuiderOutput", None)
    with pytest.raises(ImportError, match=r"needs diffusers 0.36 or newer.*this is \d"):
        DynamicNegativeGuider()
