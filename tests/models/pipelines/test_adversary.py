"""Calls under guidance that were silently wrong, failed unclearly, or were refused falsely.

Each test is one input that was found by looking for it; what is right is what the pipeline itself
says (its own call, one image alone, the same prompt in another form).
"""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    EulerAncestralDiscreteScheduler,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)

from dng_math import (
    DynamicNegativeGuidance,
    LimitedInterval,
    NegativePrompting,
)
from dng_models import apply_guidance
from dng_models.pipelines import tiny
from dng_models.pipelines.layouts import Layout
from dng_models.pipelines.ready_made import DNGStableDiffusionPipeline
from tests.helpers.families import built as built_family
from tests.helpers.families import final_latents
from tests.helpers.versions import before

tracked_dng = DynamicNegativeGuidance.tracked

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{said}")
    for said in (
        *(".*:FutureWarning", ".*:DeprecationWarning", ".*adds no noise", "the network of a"),
        ".* of the pipeline's call is dropped:UserWarning",
    )
]

PROMPT, NEGATIVE, STEPS = "A classic British breakfast", "egg, sausage", 3
RULE = tracked_dng(40, prior=0.05)
CLOSE = 1e-5
LISTED: dict[str, Any] = {"negative_prompts": ["tea"], "cfg_scale": 2.0}


def silent(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def built() -> dict[str, Any]:
    found = {"sd": tiny.tiny_stable_diffusion(0), "xl": tiny.tiny_stable_diffusion_xl(0)}
    for pipe in found.values():
        pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    return found


@pytest.fixture
def sd(built: dict[str, Any]) -> Any:
    """A pipeline of its own, of the shared parts."""
    return like(built["sd"], StableDiffusionPipeline)


@pytest.fixture
def xl(built: dict[str, Any]) -> Any:
    return silent(StableDiffusionXLPipeline(**built["xl"].components, add_watermarker=False))


def like(pipe: Any, kind: type, **parts: Any) -> Any:
    return silent(kind(**{**pipe.components, **parts}, requires_safety_checker=False))


def run(pipe: Any, images: int = 1, **options: Any) -> Any:
    given: dict[str, Any] = {
        "prompt": PROMPT,
        "negative_prompt": NEGATIVE,
        "num_inference_steps": STEPS,
        "num_images_per_prompt": images,
        "generator": [torch.Generator().manual_seed(seed) for seed in range(images)],
        "output_type": "latent",
    }
    return pipe(**{**given, **options}).images


def guided(pipe: Any, rule: Any = RULE, options: Any = None, **call: Any) -> Any:
    with apply_guidance(pipe, rule, **(options or {})):
        return run(pipe, **call)


def apart(a: Any, b: Any) -> float:
    return float((a - b).abs().max() / b.abs().max())


# ---------------------------------------------------------------------- prompts


def test_a_second_negative_prompt_alone(xl: Any) -> None:
    # Without negative_prompt SDXL shows zeros, whatever negative_prompt_2 says.
    with pytest.raises(ValueError, match="shows its network zeros for it.*negative_prompt_2"):
        guided(xl, negative_prompt=None, negative_prompt_2="egg")
    own = run(xl, negative_prompt="", negative_prompt_2="egg", guidance_scale=3.0)
    found = guided(xl, NegativePrompting(2.0), negative_prompt="", negative_prompt_2="egg")
    assert apart(found, own) < CLOSE
    with pytest.raises(ValueError, match="prompt 1 has none"):
        guided(xl, prompt=["a", "b"], negative_prompt=["", ""], negative_prompt_2=["egg", " "])


def embeddings_of(xl: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of the prompt and of the negative one, as arguments of a call."""
    names = "prompt_embeds", "negative_prompt_embeds"
    names += "pooled_prompt_embeds", "negative_pooled_prompt_embeds"
    encoded = xl.encode_prompt(PROMPT, device="cpu", negative_prompt=NEGATIVE)
    found = dict(zip(names, encoded, strict=True))
    negative = {name: found.pop(name) for name in names if name.startswith("negative_")}
    return {"prompt": None, "negative_prompt": None, **found}, negative


def test_embeddings_of_prompts_and_none_of_a_negative_one(xl: Any) -> None:
    positive, negative = embeddings_of(xl)
    stock = run(xl, **positive, guidance_scale=3.0)  # zeros stand for no negative prompt
    found = guided(xl, tracked_dng(0.0), {"cfg_scale": 3.0}, **positive, **negative)
    assert apart(found, stock) < CLOSE


def test_prompts_that_were_encoded_once(xl: Any) -> None:
    positive, negative = embeddings_of(xl)
    expected = guided(xl, **positive, **negative)
    encoders = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    parts = xl.components | dict.fromkeys(encoders)
    without = silent(StableDiffusionXLPipeline(**parts, add_watermarker=False))
    options = {"negative_prompts": [negative]}
    zeros = {name: torch.zeros_like(value) for name, value in negative.items()}
    for own in ({}, zeros, negative):
        assert apart(guided(without, RULE, options, **positive, **own), expected) < CLOSE
    with pytest.raises(ValueError, match="must say something, but those of negative_prompts.0. ar"):
        guided(xl, RULE, {"negative_prompts": [zeros]})


def test_a_text_encoder_that_was_freed_meanwhile(sd: Any) -> None:
    with apply_guidance(sd, RULE, **LISTED):
        run(sd)
        sd.text_encoder, kept = None, sd.text_encoder
        with pytest.raises(ValueError, match="pipe must have its text encoder"):
            run(sd)
        sd.text_encoder = kept


def test_embeddings_in_lists() -> None:
    family, pipe = built_family("ZImagePipeline")
    own, negative = pipe.encode_prompt(
        PROMPT, device="cpu", negative_prompt=NEGATIVE, max_sequence_length=32
    )
    call = {"prompt": None, "negative_prompt": None, "prompt_embeds": own}
    rule = tracked_dng(40, prior=0.05, temperature=1e-4)
    with apply_guidance(pipe, rule):
        text = final_latents(pipe, family, prompt=PROMPT, negative_prompt=NEGATIVE)
        lists = final_latents(pipe, family, **call, negative_prompt_embeds=negative)
        assert apart(lists, text) < CLOSE
        empty, _ = pipe.encode_prompt("", False, "cpu", max_sequence_length=32)
        with pytest.raises(ValueError, match="embeddings 0 are those of the empty prompt"):
            final_latents(pipe, family, **call, negative_prompt_embeds=empty)


def test_embeddings_whose_rows_are_not_first() -> None:
    family, pipe = built_family("HiDreamImagePipeline")
    encoded = pipe.encode_prompt(PROMPT, negative_prompt=NEGATIVE, max_sequence_length=64)
    names = ("prompt_embeds_t5", "prompt_embeds_llama3", "pooled_prompt_embeds")
    negative = {f"negative_{n}": e for n, e in zip(names, encoded[1::2], strict=True)}
    rule = tracked_dng(40, prior=0.05, temperature=1e-4)
    call = {"prompt": PROMPT, "max_sequence_length": 64}
    with apply_guidance(pipe, rule):
        own = final_latents(pipe, family, **call, negative_prompt=NEGATIVE)
    with apply_guidance(pipe, rule, negative_prompts=[negative]):
        listed = final_latents(pipe, family, **call, negative_prompt="tea")
    assert apart(listed, own) < CLOSE


def test_a_row_for_each_picture_that_stands_for_a_prompt() -> None:
    family, pipe = built_family("KandinskyV22Pipeline")
    own = family.call()["image_embeds"]
    unwanted, batch = torch.ones_like(own), own.expand(2, -1)
    found = []
    for rows in (1, 2):
        concept = {"negative_image_embeds": unwanted.expand(rows, -1)}
        with apply_guidance(pipe, RULE, negative_prompts=[concept]):
            call = {"image_embeds": batch, "negative_image_embeds": -batch}
            found.append(final_latents(pipe, family, **call))
    assert torch.equal(*found)


def test_a_prompt_for_each_part_of_a_video() -> None:
    family, pipe = built_family("AnimateDiffPipeline")
    pipe.enable_free_noise(context_length=2, context_stride=1)
    call = {"prompt": {0: "a cat", 3: "a dog"}, "negative_prompt": {0: "egg", 3: "tea"}}
    call |= {"num_frames": 4}
    stock = final_latents(pipe, family, **call, guidance_scale=3.0)
    with apply_guidance(pipe, NegativePrompting(2.0)):
        assert apart(final_latents(pipe, family, **call), stock) < 10 * CLOSE


# ---------------------------------------------------------------------- calls


class HandsOn(StableDiffusionPipeline):
    """One's own class, which says nothing of what its parent takes."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs)


class Short(StableDiffusionPipeline):
    """One's own class, with a setting that is not to be given twice."""

    def __call__(self, prompt: Any, **kwargs: Any) -> Any:
        return super().__call__(prompt, num_inference_steps=STEPS, **kwargs)


@pytest.mark.parametrize("kind", [HandsOn, Short, DNGStableDiffusionPipeline])
def test_classes_that_hand_their_arguments_on(sd: Any, kind: Any) -> None:
    own = like(sd, kind)
    call = {"negative_prompt": NEGATIVE, "output_type": "latent"}
    if kind is not Short:
        call |= {"num_inference_steps": STEPS}
    embedded = [sd.encode_prompt("tea", "cpu", 1, False)[0]]
    for options in ({}, LISTED, {**LISTED, "negative_prompts": embedded}):
        expected = guided(sd, RULE, options)
        with apply_guidance(own, RULE, **options):
            found = own(PROMPT, generator=torch.Generator().manual_seed(0), **call).images
        assert apart(found, expected) < CLOSE
        if kind is DNGStableDiffusionPipeline:
            assert apart(run(own, rule=RULE, **options), expected) < CLOSE
    with pytest.raises(ValueError, match="negative_prompt of the pipeline's call must be given"):
        guided(like(sd, HandsOn), negative_prompt=None)


def test_another_pipeline_of_the_same_class(sd: Any) -> None:
    plain = run(sd)
    with apply_guidance(sd, RULE) as trace:
        other = silent(type(sd)(**sd.components, requires_safety_checker=False))
        assert torch.equal(run(other), plain)
        run(sd)
    assert type(other) is type(sd) is StableDiffusionPipeline
    assert torch.equal(run(copy.deepcopy(other)), plain)
    assert torch.equal(pickle.loads(pickle.dumps(trace)).scale, trace.scale)


def test_the_scheduler_steps_through_a_function_of_ones_own(sd: Any) -> None:
    step = sd.scheduler.step
    counted: list[int] = []

    def counting(*args: Any, **kwargs: Any) -> Any:
        counted.append(1)
        return step(*args, **kwargs)

    sd.scheduler.step = counting  # which tells a pipeline of no generator
    try:
        torch.manual_seed(0)
        stock = run(sd, guidance_scale=3.0)
        torch.manual_seed(0)
        assert apart(guided(sd, NegativePrompting(2.0)), stock) < CLOSE
    finally:
        del sd.scheduler.step
    assert len(counted) == 2 * STEPS


def test_what_callbacks_call_themselves(sd: Any) -> None:
    text = sd.encode_prompt(PROMPT, "cpu", 1, False)[0]
    other = like(sd, StableDiffusionPipeline, scheduler=copy.deepcopy(sd.scheduler))
    expected, plain = guided(sd), run(other)

    def preview(pipe: Any, step: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        pipe.scheduler.step(pipe.unet(kwargs["latents"], t, text).sample, t, kwargs["latents"])
        assert torch.equal(run(other), plain)
        return {}

    def twice(pipe: Any, step: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        pipe.scheduler.step(kwargs["latents"], t, kwargs["latents"])
        return {}

    def again(pipe: Any, step: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        pipe.scheduler.set_timesteps(STEPS)
        return {}

    assert torch.equal(guided(sd, callback_on_step_end=preview), expected)
    with pytest.raises(ValueError, match="were set anew at step 1 of 3: a callback"):
        guided(sd, callback_on_step_end=again)
    ancestral = EulerAncestralDiscreteScheduler.from_config(sd.scheduler.config)
    counts = like(sd, StableDiffusionPipeline, scheduler=ancestral)
    with pytest.raises(ValueError, match="counts step 2 where that is at step 1: leave it alone"):
        guided(counts, callback_on_step_end=twice)


def test_another_thread_calls_the_same_network(sd: Any) -> None:
    # A tokenizer of its own: padding is a state of the tokenizer, which two threads would change
    # under each other, guided or not.
    own = {name: copy.deepcopy(getattr(sd, name)) for name in ("scheduler", "tokenizer")}
    other = like(sd, StableDiffusionPipeline, **own)
    expected, plain, found = guided(sd), run(other), []
    thread = threading.Thread(target=lambda: found.extend(run(other) for _ in range(3)))
    with apply_guidance(sd, RULE):
        thread.start()
        for _ in range(3):
            assert torch.equal(run(sd), expected)
        thread.join()
    assert len(found) == 3 and all(torch.equal(each, plain) for each in found)


class Yields(DDPMPipeline):
    """A pipeline of one's own that shows every step."""

    def __call__(self, generator: Any = None) -> Iterator[Any]:
        x = torch.randn(1, 3, 16, 16, generator=generator)
        self.scheduler.set_timesteps(STEPS)
        for t in self.scheduler.timesteps:
            x = self.scheduler.step(self.unet(x, t).sample, t, x, generator=generator)[0]
            yield x


def test_calls_that_return_before_they_have_run() -> None:
    pipe = Yields(**tiny.tiny_ddpm(0).components)
    layout = Layout(calls="alone", text=(), guidance_scale=None)
    with (
        apply_guidance(pipe, RULE, unwanted=tiny.tiny_unet(1), layout=layout),
        pytest.raises(ValueError, match="returns a generator, which makes them later"),
    ):
        list(pipe())


# ---------------------------------------------------------------------- networks


def test_perturbed_attention_is_taken_out_again(sd: Any) -> None:
    pag = like(sd, StableDiffusionPAGPipeline, pag_applied_layers=["mid"])
    plain, processors = run(sd), sd.unet.attn_processors

    def stop(pipe: Any, step: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        raise KeyboardInterrupt

    with apply_guidance(pag, RULE) as full:
        run(pag, pag_scale=3.0)
        assert pag.unet.attn_processors == processors
        with pytest.raises(KeyboardInterrupt):
            run(pag, pag_scale=3.0, callback_on_step_end=stop)
    assert pag.unet.attn_processors == processors
    assert torch.equal(run(sd), plain)
    # Its negative prompt is in the batch in any case, and nothing is said to be saved.
    with apply_guidance(pag, RULE, skip_below=1.0) as trace:
        run(pag, pag_scale=3.0)
    assert trace.evaluations_saved == 0
    assert torch.equal(trace.log_posterior, full.runs[0].log_posterior)


@pytest.mark.parametrize("options", [{}, {"cfg_scale": 3.0}])
def test_all_predictions_of_a_step_are_skipped(sd: Any, options: dict[str, Any]) -> None:
    rule = LimitedInterval(RULE, 0.5, 1.0)
    listed = {"negative_prompts": ["egg", "tea"], **options}
    expected = guided(sd, rule, listed, num_inference_steps=4)
    with apply_guidance(sd, rule, **listed, skip_below=1e-9) as trace:
        assert apart(run(sd, num_inference_steps=4), expected) < CLOSE
    assert trace.evaluations == trace.evaluations_saved == 4


class Traced(torch.nn.Module):
    """As the documentation of diffusers wraps a traced network."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network, self.config = network, network.config
        self.device, self.dtype = network.device, network.dtype

    def forward(self, latent_model_input: Any, t: Any, encoder_hidden_states: Any, **more: Any):
        return self.network(latent_model_input, t, encoder_hidden_states, **more)


def test_networks_that_call_their_arguments_otherwise(sd: Any) -> None:
    wrapped = like(sd, StableDiffusionPipeline)
    wrapped.unet = Traced(sd.unet)
    for options in ({}, LISTED):
        assert apart(guided(wrapped, RULE, options), guided(sd, RULE, options)) < CLOSE


@pytest.mark.skipif(
    before("diffusers", "0.36"), reason="hooks of diffusers 0.35 do not say what they wrap"
)
def test_wrappers_that_come_and_go_under_guidance(sd: Any) -> None:
    from accelerate import hooks

    calls: list[int] = []

    class Counting(hooks.ModelHook):  # type: ignore[misc, name-defined]
        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            return args, kwargs

    plain, expected = run(sd), guided(sd)
    try:
        # Put on under guidance, it stays.
        with apply_guidance(sd, RULE):
            hooks.add_hook_to_module(sd.unet, Counting())
            assert torch.equal(run(sd), expected)
        calls.clear()
        assert torch.equal(run(sd), plain) and len(calls) == STEPS
        # Offloading takes its own off at the end of each call, and puts it on again.
        with apply_guidance(sd, RULE):
            for _ in range(2):
                assert torch.equal(run(sd), expected)
                hooks.remove_hook_from_module(sd.unet)
                hooks.add_hook_to_module(sd.unet, Counting())
            hooks.remove_hook_from_module(sd.unet)
            assert torch.equal(run(sd), expected)
    finally:
        hooks.remove_hook_from_module(sd.unet)
    assert torch.equal(run(sd), plain)
    forward = sd.unet.forward
    with apply_guidance(sd, RULE):
        hooked = sd.unet.forward
        sd.unet.forward = lambda *args, **kwargs: (calls.append(1), hooked(*args, **kwargs))[1]
        assert torch.equal(run(sd), expected)
    calls.clear()
    assert torch.equal(run(sd), plain) and len(calls) == STEPS
    sd.unet.forward = forward
    assert torch.equal(guided(sd), expected)


def test_a_distilled_network_in_place_of_another(sd: Any) -> None:
    config = {k: v for k, v in sd.unet.config.items() if not k.startswith("_")}
    distilled = type(sd.unet)(**{**config, "time_cond_proj_dim": 8})
    pipe = like(sd, StableDiffusionPipeline)
    with apply_guidance(pipe, RULE):
        run(pipe, 2)
        pipe.unet = distilled  # whose two images are no doubled batch of one
        for images in (1, 2):
            with pytest.raises(ValueError, match="its network is distilled"):
                run(pipe, images)


# ---------------------------------------------------------------------- numbers


def test_the_noise_of_a_clipped_image() -> None:
    """DDIM that is told use_clipped_model_output is DDPM at eta = 1."""
    found = {}
    for kind in (DDPMPipeline, DDIMPipeline):
        parts = tiny.tiny_ddpm(0).components
        scheduler = DDPMScheduler if kind is DDPMPipeline else DDIMScheduler
        parts["scheduler"] = scheduler.from_config(parts["scheduler"].config, clip_sample=True)
        pipe = silent(kind(**parts))
        call = {} if kind is DDPMPipeline else {"eta": 1.0, "use_clipped_model_output": True}
        rule = tracked_dng(3.0, prior=0.1, temperature=2e-5)
        with apply_guidance(pipe, rule, unwanted=tiny.tiny_unet(1)) as trace:
            generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
            pipe(2, generators, num_inference_steps=5, output_type="np", **call)
        found[kind] = trace.log_posterior
    np.testing.assert_allclose(found[DDIMPipeline], found[DDPMPipeline], atol=2e-5)
    assert float(found[DDPMPipeline][3].std()) > 0


def test_numbers_of_numpy_and_a_rule_in_a_list(sd: Any) -> None:
    expected = guided(sd)
    assert torch.equal(guided(sd, [RULE]), expected)
    family, pipe = built_family("DiTPipeline")
    with apply_guidance(pipe, RULE, negative_classes=[np.int64(3)]):
        final_latents(pipe, family)


def test_a_prompt_that_a_callback_changes() -> None:
    """Where added prompts are encoded together with the positive one, it was ignored."""
    family, pipe = built_family("ZImagePipeline")
    other, _ = pipe.encode_prompt("tea with milk", False, "cpu", max_sequence_length=32)

    def change(pipe: Any, step: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        return {**kwargs, "prompt_embeds": other}

    call: dict[str, Any] = {"callback_on_step_end": change}
    call["callback_on_step_end_tensor_inputs"] = ["latents", "prompt_embeds"]
    stock = final_latents(pipe, family, **call, guidance_scale=2.0)
    with apply_guidance(pipe, NegativePrompting(2.0)):
        assert apart(final_latents(pipe, family, **call), stock) < CLOSE
    with (
        apply_guidance(pipe, NegativePrompting(2.0), negative_prompts=["egg"]),
        pytest.raises(ValueError, match="prompts must stay the same during a run.*at step 1"),
    ):
        final_latents(pipe, family, **call)


def test_lists_that_a_pipeline_writes_into() -> None:
    family, pipe = built_family("ZImageOmniPipeline")
    prompts, negatives = [PROMPT, "tea"], [NEGATIVE, "milk"]
    call: dict[str, Any] = {"generator": [torch.Generator().manual_seed(s) for s in (0, 0)]}
    for options in ({}, {"negative_prompts": ["red"]}):
        with apply_guidance(pipe, NegativePrompting(1.0), **options):
            texts = {"prompt": list(prompts), "negative_prompt": list(negatives)}
            assert torch.isfinite(final_latents(pipe, family, **texts, **call)).all()


class Around(torch.nn.Module):
    """A wrapper through which all of a network's attributes are seen, as PEFT's."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("network"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.network(*args, **kwargs)


def test_wrappers_that_show_what_is_inside() -> None:
    # The pipeline itself puts hooks of diffusers on what is inside.
    family, pipe = built_family("FluxPipeline")
    with apply_guidance(pipe, RULE):
        expected = final_latents(pipe, family)
    pipe.transformer = Around(pipe.transformer)
    plain = final_latents(pipe, family)
    for _ in range(2):
        with apply_guidance(pipe, RULE):
            assert torch.equal(final_latents(pipe, family), expected)
    assert torch.equal(final_latents(pipe, family), plain)
    assert type(copy.deepcopy(pipe.transformer)) is Around


class TakesAnotherScheduler(StableDiffusionPipeline):
    """One's own class, whose calls have a scheduler of their own."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.scheduler = DDPMScheduler.from_config(self.scheduler.config)
        return super().__call__(*args, **kwargs)


def test_a_scheduler_that_a_call_puts_in_place(sd: Any) -> None:
    own = like(sd, TakesAnotherScheduler)
    for options in ({}, LISTED):
        assert apart(guided(own, RULE, options), guided(sd, RULE, options)) < CLOSE
    assert "step" not in vars(own.scheduler)


class Stubborn(torch.autograd.Function):
    """An operation without a forward derivative."""

    @staticmethod
    def forward(x: Any) -> Any:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass


class StubbornLayer(torch.nn.Module):
    def forward(self, x: Any) -> Any:
        return Stubborn.apply(x)


@pytest.mark.parametrize("name", ["IFPipeline", "StableDiffusionPipeline"])
def test_a_network_without_a_forward_derivative(name: str) -> None:
    """IF's attention before its norms has one that torch's own formula fails to take."""
    family, pipe = built_family(name)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    old = tracked_dng(40, prior=0.05, temperature=1e-4)
    path = tracked_dng(40, prior=0.05, temperature=1e-4, tracker="path")
    for rule, options in ((old, {"divergence_probes": 1}), (path, {})):
        with apply_guidance(pipe, rule, **options):
            final_latents(pipe, family)
    pipe.unet.conv_act = StubbornLayer()
    for rule, options in ((old, {"divergence_probes": 1}), (path, {})):
        with (
            apply_guidance(pipe, rule, **options),
            pytest.raises(ValueError, match="must be 0 for a network without a forward derivative"),
        ):
            final_latents(pipe, family)


@pytest.mark.parametrize("how", ["group offloading", "layerwise casting"])
def test_weights_that_are_exchanged_in_a_derivative(how: str) -> None:
    """A crash of the process, in torch."""
    pipe = silent(tiny.tiny_stable_diffusion(0))
    cpu = torch.device("cpu")
    if how == "group offloading":
        pipe.unet.enable_group_offload(cpu, offload_device=cpu, offload_type="leaf_level")
    else:
        pipe.unet.enable_layerwise_casting(torch.float64, torch.float32)
    with pytest.raises(ValueError, match=f"divergence_probes must be 0 where pipe.unet has {how}"):
        guided(pipe, RULE, {"divergence_probes": 1})
    assert torch.isfinite(guided(pipe)).all()


def test_hooks_of_diffusers_that_come_and_go_under_guidance(sd: Any) -> None:
    from diffusers.hooks import HookRegistry, ModelHook

    calls: list[int] = []

    class Counting(ModelHook):  # type: ignore[misc]
        def new_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            return self.fn_ref.original_forward(*args, **kwargs)

    def hooks() -> Any:
        return HookRegistry.check_if_exists_or_initialize(sd.unet)

    plain, expected = run(sd), guided(sd)
    hooks().register_hook(Counting(), "counting")
    with apply_guidance(sd, RULE):
        hooks().remove_hook("counting")  # as a cache is, where guidance says that it must
        assert torch.equal(run(sd), expected)
        hooks().register_hook(Counting(), "counting")
        assert torch.equal(run(sd), expected)
    calls.clear()
    assert torch.equal(run(sd), plain) and len(calls) == STEPS
    hooks().remove_hook("counting")
    assert torch.equal(run(sd), plain)
