"""Calls of tiny pipelines with guided attention: what they leave alone, and what they refuse."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDPMScheduler,
    LCMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPAGPipeline,
)
from diffusers.models.attention_processor import (
    AttnProcessor,
    AttnProcessor2_0,
    SD3IPAdapterJointAttnProcessor2_0,
    SlicedAttnProcessor,
)
from PIL import Image

from dng_math import (
    DynamicNegativeGuidance,
    LimitedInterval,
    NegativeAwareSubtraction,
    NegativePrompting,
    NormalizedAttention,
    ValueSignFlip,
)
from dng_models.pipelines import tiny
from dng_models.pipelines.hook import apply_guidance, remove_guidance
from tests.helpers.families.separate import flux

PROMPT, NEGATIVE = "A classic British breakfast", "egg, sausage"
STEPS = 2
NAG, VSF, NASA = NormalizedAttention(4.0), ValueSignFlip(1.5), NegativeAwareSubtraction(0.5)
RULES = {"nag": NAG, "vsf": VSF, "nasa": NASA}
each_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
# Float32 networks: a batch of another shape, or another order of a sum, differs by a few roundings.
CLOSE = 1e-5
# What a prompt changes in these networks, and more.
FAR = 1e-3

BUILD: dict[str, Callable[[], Any]] = {
    "sd": tiny.tiny_stable_diffusion,
    "xl": tiny.tiny_stable_diffusion_xl,
    "sd3": tiny.tiny_stable_diffusion_3,
    "controlnet": tiny.tiny_controlnet,
    "img2img": lambda: StableDiffusionImg2ImgPipeline(
        **tiny.tiny_stable_diffusion().components, requires_safety_checker=False
    ),
}


@pytest.fixture(scope="module")
def pipes() -> dict[str, Any]:
    return {}


@pytest.fixture
def pipe_of(pipes: dict[str, Any]) -> Callable[[str], Any]:
    """Built once, unguided whenever a test asks for one."""

    def get(name: str) -> Any:
        if name not in pipes:
            pipes[name] = BUILD[name]()
        remove_guidance(pipes[name])
        return pipes[name]

    return get


@pytest.fixture
def pipe(pipe_of: Callable[[str], Any]) -> Any:
    return pipe_of("sd")


def run(pipe: Any, seeds: tuple[int, ...] = (0, 1), **options: Any) -> Any:
    """Latents; one generator an image."""
    given: dict[str, Any] = {
        "prompt": PROMPT,
        "negative_prompt": NEGATIVE,
        "num_inference_steps": STEPS,
        "num_images_per_prompt": len(seeds),
        "output_type": "latent",
        "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
    }
    name = type(pipe).__name__
    if "3" in name:
        given["max_sequence_length"] = 16
    if "ControlNet" in name or "Img2Img" in name:
        given["image"] = Image.new("RGB", (16, 16), "green")
    return pipe(**{**given, **options}).images


def guided(pipe: Any, rule: Any, *, negative_prompts: Any = None, **options: Any) -> Any:
    with apply_guidance(pipe, rule, negative_prompts=negative_prompts):
        return run(pipe, **options)


def apart(a: Any, b: Any) -> float:
    """Largest difference, relative to the largest value."""
    return float((a - b).abs().max() / b.abs().max())


def network_of(pipe: Any) -> Any:
    return pipe.transformer if hasattr(pipe, "transformer") else pipe.unet


# ---------------------------------------------------------------------- what it reduces to


@pytest.mark.parametrize(
    ("name", "scale"),
    [
        ("sd", 1.0),
        ("sd", 5.0),
        ("xl", 0.0),
        ("xl", 5.0),
        ("sd3", 1.0),
        ("controlnet", 5.0),
        ("img2img", 5.0),
    ],
)
def test_no_strength_is_the_stock_image(
    pipe_of: Callable[[str], Any], name: str, scale: float
) -> None:
    pipe = pipe_of(name)
    plain = run(pipe, negative_prompt=None, guidance_scale=scale)
    for rule in (NormalizedAttention(0.0), NormalizedAttention(4.0, alpha=0.0)):
        found = guided(pipe, rule, guidance_scale=scale)
        # In a joint transformer the negative text is in further rows of the batch.
        assert apart(found, plain) < CLOSE if name == "sd3" else torch.equal(found, plain)
    assert apart(guided(pipe, NAG, guidance_scale=scale), plain) > FAR
    assert torch.equal(run(pipe, negative_prompt=None, guidance_scale=scale), plain)


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_the_unwanted_may_be_given_beside_the_calls_own_negative(
    pipe_of: Callable[[str], Any], name: str
) -> None:
    pipe = pipe_of(name)
    plain = run(pipe, negative_prompt="tea")
    zero = guided(pipe, NormalizedAttention(0.0), negative_prompts=["egg"], negative_prompt="tea")
    assert apart(zero, plain) < CLOSE
    # Without one, classifier-free guidance is from the empty prompt, wherever the unwanted is told.
    own = guided(pipe, NAG, negative_prompt="egg")
    given = guided(pipe, NAG, negative_prompts=["egg"], negative_prompt=None)
    assert torch.equal(own, given)
    assert apart(guided(pipe, NAG, negative_prompts=["egg"], negative_prompt="tea"), own) > FAR
    more: dict[str, Any] = {"max_sequence_length": 16} if name == "sd3" else {}
    device = {} if name == "sd3" else {"device": torch.device("cpu"), "num_images_per_prompt": 1}
    texts = ("egg", None, None) if name == "sd3" else ("egg",)
    made = pipe.encode_prompt(*texts, do_classifier_free_guidance=False, **device, **more)
    embeddings: Any = made[0]
    if name == "sd3":
        embeddings = {"prompt_embeds": made[0], "pooled_prompt_embeds": made[2]}
    found = guided(pipe, NAG, negative_prompts=[embeddings], negative_prompt=None)
    assert apart(found, given) < CLOSE


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_every_image_has_its_own_negative(pipe_of: Callable[[str], Any], name: str) -> None:
    pipe = pipe_of(name)
    both = guided(
        pipe,
        NAG,
        prompt=["bread", "tea"],
        negative_prompt=["egg", "milk"],
        num_images_per_prompt=1,
        guidance_scale=1.0,
    )
    for i, (prompt, negative) in enumerate((("bread", "egg"), ("tea", "milk"))):
        one = guided(
            pipe, NAG, seeds=(i,), prompt=prompt, negative_prompt=negative, guidance_scale=1.0
        )
        assert apart(both[i : i + 1], one) < CLOSE


def test_texts_of_another_length(pipe_of: Callable[[str], Any]) -> None:
    pipe, device = pipe_of("sd"), torch.device("cpu")
    made = pipe.encode_prompt(NEGATIVE, device, 1, False)[0]
    # The same tokens twice take the same share of a softmax: the same features.
    options: dict[str, Any] = {"negative_prompt": None}
    once = guided(pipe, NAG, negative_prompts=[made], **options)
    twice = guided(pipe, NAG, negative_prompts=[torch.cat([made, made], 1)], **options)
    assert apart(twice, once) < CLOSE
    # Under one softmax with the positive text the negative takes more of it.
    once = guided(pipe, VSF, negative_prompts=[made], **options)
    twice = guided(pipe, VSF, negative_prompts=[torch.cat([made, made], 1)], **options)
    assert apart(twice, once) > FAR
    # In a joint transformer both texts are rows of one batch.
    pipe = pipe_of("sd3")
    made, _, pooled, _ = pipe.encode_prompt(NEGATIVE, None, None, do_classifier_free_guidance=False)
    given = {"prompt_embeds": made, "pooled_prompt_embeds": pooled}
    with pytest.raises(ValueError, match="negative_prompts must be encoded like the call's"):
        guided(pipe, NAG, negative_prompts=[given], **options)


def test_guidance_that_a_callback_cuts_off(pipe: Any) -> None:
    def cut_off(pipe: Any, step: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step > 0:
            return kwargs
        pipe._guidance_scale = 0.0
        return {**kwargs, "prompt_embeds": kwargs["prompt_embeds"].chunk(2)[-1]}

    options: dict[str, Any] = {
        "callback_on_step_end": cut_off,
        "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
        "num_inference_steps": 3,
    }
    plain = run(pipe, negative_prompt=None, **options)
    assert torch.equal(guided(pipe, NormalizedAttention(0.0), **options), plain)
    assert apart(guided(pipe, NAG, **options), plain) > FAR


# ---------------------------------------------------------------------- when it acts


def test_it_acts_until_a_time(pipe: Any) -> None:
    with apply_guidance(pipe, NormalizedAttention(4.0, alpha=0.3, end=0.5)) as trace:
        found = run(pipe, num_inference_steps=4)
    times = trace.time
    assert 0 < (times >= 0.5).sum() < 4
    expected = np.where(times[:, None] >= 0.5, 0.3, 0.0).repeat(2, axis=1)
    np.testing.assert_allclose(trace.scale, expected, rtol=1e-6)
    assert trace.log_posterior is None and trace.evaluations == 0
    limited = LimitedInterval(NormalizedAttention(4.0, alpha=0.3), 0.5, 1.0)
    assert torch.equal(guided(pipe, limited, num_inference_steps=4), found)
    plain = run(pipe, negative_prompt=None)
    assert torch.equal(guided(pipe, NormalizedAttention(4.0, end=0.0)), plain)


def test_schedulers_that_no_posterior_can_be_tracked_with(pipe: Any) -> None:
    other = copy.copy(pipe)
    other.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    plain = run(other, negative_prompt=None, guidance_scale=1.0)
    found = guided(other, NAG, guidance_scale=1.0)
    assert torch.isfinite(found).all() and apart(found, plain) > FAR


def test_keys_and_values_of_the_negative_are_made_once(pipe: Any) -> None:
    rows: dict[str, list[int]] = {}
    watching = []
    for name, module in pipe.unet.named_modules():
        if name.endswith(("attn2.to_k", "attn2.to_v", "attn2.to_q")):
            seen = rows.setdefault(name, [])
            watching.append(module.register_forward_hook(lambda m, x, y, s=seen: s.append(len(y))))
    try:
        for rule in (NAG, VSF):
            guided(pipe, rule, guidance_scale=4.0)
            for name, seen in rows.items():
                # Both halves of the batch at every step, and the two images' negative text once.
                assert sorted(seen) == ([] if name.endswith("q") else [2]) + [4] * STEPS
                seen.clear()
    finally:
        for each in watching:
            each.remove()


# ---------------------------------------------------------------------- processors and adapters


class Watching(AttnProcessor):
    """A processor of a user's own, with an argument of its own."""

    def __init__(self) -> None:
        self.told: list[float] = []

    def __call__(self, attn: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        self.told.append(kwargs.pop("loudness", 0.0))
        return super().__call__(attn, hidden_states, *args, **kwargs)


class Loud(Watching):
    """The same with its argument in its signature, by which the layer hands it on."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Any,
        encoder_hidden_states: Any = None,
        attention_mask: Any = None,
        loudness: float = 0.0,
    ) -> Any:
        return super().__call__(
            attn, hidden_states, encoder_hidden_states, attention_mask, loudness=loudness
        )


class Elsewhere(AttnProcessor2_0):
    """A processor that does not use the layer's output projection."""

    def __call__(self, attn: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        return hidden_states


@each_rule
def test_other_processors(pipe: Any, rule: Any) -> None:
    expected = guided(pipe, rule)
    for processor in (AttnProcessor(), SlicedAttnProcessor(1), Loud()):
        other = copy.deepcopy(pipe)
        other.unet.set_attn_processor(processor)
        before = other.unet.attn_processors
        found = guided(other, rule, cross_attention_kwargs=None)
        assert apart(found, expected) < CLOSE
        assert all(own is before[n] for n, own in other.unet.attn_processors.items())
    # The last of them is told what the call says.
    guided(other, rule, cross_attention_kwargs={"loudness": 3.0})
    assert set(processor.told[-4:]) == {3.0}  # type: ignore[attr-defined]


@each_rule
@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_fused_projections(pipe_of: Callable[[str], Any], name: str, rule: Any) -> None:
    pipe = pipe_of(name)
    expected = guided(pipe, rule)
    fused = copy.deepcopy(pipe)
    network_of(fused).fuse_qkv_projections()
    if name == "sd3" and rule is VSF:
        with pytest.raises(ValueError, match=r"cannot be combined with ValueSignFlip.*unfuse"):
            guided(fused, rule)
    else:
        assert apart(guided(fused, rule), expected) < CLOSE


@pytest.mark.parametrize(("name", "rule"), [("sd", NAG), ("sd", VSF), ("sd3", NASA), ("sd3", VSF)])
def test_a_picture_as_a_prompt_is_left_as_it_is(
    pipe_of: Callable[[str], Any], name: str, rule: Any
) -> None:
    pipe = copy.deepcopy(pipe_of(name))
    generator = torch.Generator().manual_seed(6)
    if name == "sd":
        from tests.models.pipelines.test_calls import ip_adapter

        ip_adapter(pipe)
        pipe.set_ip_adapter_scale(0.8)
        nothing, shown = torch.zeros(1, 1, 32), torch.randn(1, 1, 32, generator=generator)
        pictures: dict[str, Any] = {"ip_adapter_image_embeds": [torch.cat([nothing, shown])]}
    else:
        pictures = ip_adapter_of_sd3(pipe, generator)
    plain = run(pipe, negative_prompt=None, guidance_scale=4.0, **pictures)
    assert (
        apart(plain, run(pipe, negative_prompt=None, guidance_scale=4.0, **zeroed(pictures))) > FAR
    )
    found = guided(pipe, rule, guidance_scale=4.0, **pictures)
    assert apart(found, plain) > FAR
    if not isinstance(rule, ValueSignFlip):
        off = type(rule)(0.0)
        assert apart(guided(pipe, off, guidance_scale=4.0, **pictures), plain) < CLOSE
    # Where the adapter is silent, the image is that without one.
    without = guided(pipe_of(name), rule, guidance_scale=4.0)
    if name == "sd":
        pipe.set_ip_adapter_scale(0.0)
    else:
        for processor in pipe.transformer.attn_processors.values():
            processor.scale = 0.0
    assert apart(guided(pipe, rule, guidance_scale=4.0, **pictures), without) < CLOSE
    names = [n for n, _ in pipe.components[network_name(pipe)].named_modules()]
    assert not any("inner" in n for n in names)


def network_name(pipe: Any) -> str:
    return "transformer" if hasattr(pipe, "transformer") else "unet"


def zeroed(pictures: dict[str, Any]) -> dict[str, Any]:
    """The same pictures, with another sign."""
    return {
        name: [-each for each in value] if isinstance(value, list) else -value
        for name, value in pictures.items()
    }


def ip_adapter_of_sd3(pipe: Any, generator: Any) -> dict[str, Any]:
    """Put an adapter of random weights into SD3's layers; its pictures, for a doubled batch."""
    network = pipe.transformer

    class Projection(torch.nn.Module):
        def forward(self, embeds: Any, timestep: Any) -> tuple[Any, Any]:
            return embeds, embeds.mean(1)

    network.image_proj = Projection()
    with torch.random.fork_rng():
        torch.manual_seed(8)
        processors = {
            name: SD3IPAdapterJointAttnProcessor2_0(
                hidden_size=32, ip_hidden_states_dim=32, head_dim=8, timesteps_emb_dim=32, scale=0.8
            )
            for name in network.attn_processors
        }
    network.set_attn_processor(processors)
    shown = torch.randn(1, 3, 32, generator=generator)
    pictures = torch.cat([torch.zeros_like(shown), shown])
    return {"ip_adapter_image_embeds": pictures}


@pytest.mark.parametrize(("name", "rule"), [("sd", NAG), ("sd3", VSF)])
def test_adapters_of_low_rank(pipe_of: Callable[[str], Any], name: str, rule: Any) -> None:
    peft = pytest.importorskip("peft")
    pipe = pipe_of(name)
    layers = ["to_q", "to_k", "to_v", "to_out.0"]
    layers += ["add_k_proj"] if name == "sd3" else []
    adapted, merged = copy.deepcopy(pipe), copy.deepcopy(pipe)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        config = peft.LoraConfig(r=2, init_lora_weights=False, target_modules=layers)
        network_of(adapted).add_adapter(config)
    network = network_of(merged)
    network.add_adapter(config)
    network.load_state_dict(network_of(adapted).state_dict())
    network.fuse_lora()
    network.unload_lora()
    found = guided(adapted, rule)
    assert apart(found, guided(merged, rule)) < CLOSE
    assert apart(found, guided(pipe, rule)) > FAR


@pytest.mark.parametrize("rule", [NAG, VSF], ids=["nag", "vsf"])
def test_masked_tokens_are_no_tokens(pipe: Any, rule: Any) -> None:
    device = torch.device("cpu")
    made = pipe.encode_prompt(PROMPT, device, 1, True, NEGATIVE)
    long = {"prompt_embeds": made[0], "negative_prompt_embeds": made[1]}
    length = 20
    short = {name: value[:, :length] for name, value in long.items()}
    own = {"prompt": None, "negative_prompt": None, "guidance_scale": 1.0}
    expected = guided(pipe, rule, **own, **short)

    def mask(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        text = kwargs["encoder_hidden_states"]
        kept = torch.arange(text.shape[1]) < length
        return args, {**kwargs, "encoder_attention_mask": kept.expand(text.shape[:2])}

    masking = pipe.unet.register_forward_pre_hook(mask, with_kwargs=True)
    try:
        found = guided(pipe, rule, **own, **long)
    finally:
        masking.remove()
    assert apart(found, expected) < CLOSE
    assert apart(guided(pipe, rule, **own, **long), expected) > 10 * CLOSE


@pytest.mark.slow
@pytest.mark.parametrize(("name", "graphs"), [("sd", 2), ("sd3", 1)])
def test_compiled_networks(pipe_of: Callable[[str], Any], name: str, graphs: int) -> None:
    from torch._dynamo.testing import CompileCounter

    pipe = pipe_of(name)
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = copy.deepcopy(pipe)
    network_of(compiled).compile(backend=counter, fullgraph=True)
    for negative in ("egg", "milk"):
        found = guided(compiled, NAG, negative_prompt=negative)
        assert apart(found, guided(pipe, NAG, negative_prompt=negative)) < CLOSE
        # In a UNet one graph makes the negative's keys, and another one has them.
        assert counter.frame_count == graphs
    torch._dynamo.reset()


def test_a_network_that_is_moved_around(pipe_of: Callable[[str], Any]) -> None:
    from accelerate import cpu_offload

    for name in ("sd", "sd3"):
        pipe = pipe_of(name)
        moved = copy.deepcopy(pipe)
        cpu_offload(network_of(moved), execution_device="cpu")
        assert next(network_of(moved).parameters()).device.type == "meta"
        assert torch.equal(guided(moved, NAG), guided(pipe, NAG))


# ---------------------------------------------------------------------- gates


def gate(g: float = 1.0, prior: float = 0.3, **options: Any) -> DynamicNegativeGuidance:
    return DynamicNegativeGuidance.tracked(g, prior=prior, tracker="log-odds", **options)


def noisy(pipe: Any) -> Any:
    """With a scheduler whose noise a tracker needs."""
    other = copy.copy(pipe)
    if "3" not in type(pipe).__name__:
        other.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    return other


@pytest.mark.filterwarnings("ignore:FlowMatchEuler.*adds no noise")
@pytest.mark.parametrize(("name", "scale"), [("sd", 1.0), ("xl", 4.0), ("sd3", 4.0)])
def test_a_gate(pipe_of: Callable[[str], Any], name: str, scale: float) -> None:
    pipe = noisy(pipe_of(name))
    plain = run(pipe, negative_prompt=None, guidance_scale=scale)
    # Closed it is the stock image; wide open, with g p > 1 all along, the ungated rule.
    closed = NormalizedAttention(4.0, gate=gate(), gate_bound=1.0)
    assert apart(guided(pipe, closed, guidance_scale=scale), plain) < CLOSE
    constant = gate(2.0, prior=0.9, temperature=0.0)
    with apply_guidance(pipe, NormalizedAttention(4.0, gate=constant)) as trace:
        found = run(pipe, guidance_scale=scale)
    assert (trace.scale == 0.5).all()
    assert apart(found, guided(pipe, NAG, guidance_scale=scale)) < CLOSE
    # Between them it opens by the posterior of each image.
    with apply_guidance(pipe, NormalizedAttention(4.0, gate=gate())) as trace:
        found = run(pipe, guidance_scale=scale)
    assert trace.log_posterior is not None
    expected = 0.5 * trace.log_posterior.exp().clamp(max=0.99)
    torch.testing.assert_close(trace.scale, expected)
    assert trace.scale.shape == (STEPS, 2) and trace.evaluations == 2 * STEPS
    assert apart(found, plain) > 1e-5
    for seed in (0, 1):
        one = guided(
            pipe, NormalizedAttention(4.0, gate=gate()), seeds=(seed,), guidance_scale=scale
        )
        # A posterior multiplies roundings.
        assert apart(one, found[seed : seed + 1]) < 1e-3


def test_a_gate_tracks_as_dng_does(pipe: Any) -> None:
    pipe = noisy(pipe)
    closed = NormalizedAttention(4.0, gate=gate(), gate_bound=1.0)
    with apply_guidance(pipe, closed) as trace:
        run(pipe, guidance_scale=1.0)
    with apply_guidance(pipe, gate(0.0)) as dng:
        run(pipe)
    assert dng.log_posterior is not None and trace.log_posterior is not None
    assert dng.log_posterior.std() > 0.1
    torch.testing.assert_close(trace.log_posterior, dng.log_posterior, rtol=1e-3, atol=1e-3)
    final = trace.final_log_posterior
    assert final is not None
    with apply_guidance(pipe, closed, initial_log_posterior=final) as following:
        run(pipe)
    assert following.log_posterior is not None
    torch.testing.assert_close(following.log_posterior[0], final)


def test_some_images_open_and_some_do_not(pipe: Any) -> None:
    pipe = noisy(pipe)
    first = torch.tensor([0.0, -20.0])
    constant = gate(temperature=0.0)
    rule = NormalizedAttention(4.0, gate=constant, gate_bound=0.5)
    with apply_guidance(pipe, rule, initial_log_posterior=first) as trace:
        found = run(pipe)
    assert (trace.scale[:, 0] > 0.49).all() and (trace.scale[:, 1] == 0.0).all()
    plain = run(pipe, negative_prompt=None)
    assert apart(found[:1], plain[:1]) > FAR and apart(found[1:], plain[1:]) < CLOSE


# ---------------------------------------------------------------------- nothing is left behind


def fail(pipe: Any, step: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    raise KeyboardInterrupt


def exchange(pipe: Any, step: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    pipe.unet = pipe.another
    return kwargs


def slice_up(pipe: Any, step: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    pipe.unet.set_attention_slice(1)
    return kwargs


@pytest.mark.parametrize(
    ("callback", "error", "message"),
    [
        (fail, KeyboardInterrupt, None),
        (exchange, ValueError, "the network that it calls is not the one"),
        (slice_up, ValueError, r"the attention processor of .*attn2 must stay the same"),
    ],
)
def test_a_call_that_fails(pipe: Any, callback: Any, error: Any, message: str | None) -> None:
    pipe = copy.deepcopy(pipe)
    pipe.another = copy.deepcopy(pipe.unet)
    network, plain = pipe.unet, run(pipe)
    before = dict(network.attn_processors)
    with apply_guidance(pipe, NAG) as trace, pytest.raises(error, match=message):
        run(pipe, callback_on_step_end=callback)
    assert len(trace.runs) == 1
    if callback is not slice_up:  # which set other processors than those that were there
        assert all(own is before[name] for name, own in network.attn_processors.items())
    assert "_diffusers_hook" not in vars(network) and "_diffusers_hook" not in vars(pipe.unet)
    pipe.unet = network
    assert apart(run(pipe), plain) < CLOSE


def test_between_calls_everything_may_change(pipe: Any) -> None:
    pipe = copy.deepcopy(pipe)
    modules = [name for name, _ in pipe.unet.named_modules()]
    another = copy.deepcopy(pipe.unet)
    with apply_guidance(pipe, NAG) as trace:
        first = run(pipe)
        pipe.unet = another
        assert torch.equal(run(pipe), first)
        pipe.unet.set_attention_slice(1)
        assert apart(run(pipe), first) < CLOSE
        assert all(type(p) is SlicedAttnProcessor for p in pipe.unet.attn_processors.values())
    assert len(trace.runs) == 3
    assert [name for name, _ in pipe.unet.named_modules()] == modules


def test_calls_of_others_are_not_guided(pipe: Any) -> None:
    text = torch.ones(4, 77, 32)
    shown = torch.ones(4, 4, 8, 8)

    def ask(pipe: Any, step: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        found.append(pipe.unet(shown, 1, text).sample)
        return kwargs

    found: list[Any] = []
    with torch.no_grad():
        plain = pipe.unet(shown, 1, text).sample
    expected = guided(pipe, NAG)
    with pytest.warns(UserWarning, match="such calls are not guided"):
        assert torch.equal(guided(pipe, NAG, callback_on_step_end=ask), expected)
    assert len(found) == STEPS and all(torch.equal(each, plain) for each in found)


# ---------------------------------------------------------------------- what cannot be


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"negative_prompt": None}, "negative_prompt of the pipeline's call must be given"),
        ({"negative_prompt": " "}, r"NormalizedAttention\(.* avoids \(prompt 0 has none\)"),
        (
            {"negative_prompt": ["egg", "tea", "milk"], "generator": None},
            "one or two rows for each of 2 images",
        ),
    ],
)
def test_calls_that_cannot_be_guided(pipe: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        guided(pipe, NAG, **options)


@pytest.mark.parametrize(
    ("rule", "options", "message"),
    [
        (NAG, {"cfg_scale": 2.0}, "cfg_scale must be left out .* keeps its effect"),
        (NAG, {"reference": "unconditional"}, "reference must be left out for NormalizedAttention"),
        (NAG, {"divergence_probes": 1}, "divergence_probes must be left out"),
        (NAG, {"skip_below": 0.1}, "skip_below must be left out"),
        (NAG, {"eta": 1.0}, "eta must be left out"),
        (NAG, {"negative_classes": [1]}, "negative_classes must be left out"),
        (NAG, {"negative_template": "{positive} {negative}"}, "negative_template must be left out"),
        (NAG, {"mask": torch.ones(1)}, "mask must be left out .* posterior of a gate"),
        (NAG, {"initial_log_posterior": torch.zeros(2)}, "initial_log_posterior must be left out"),
        (NAG, {"negative_prompts": ["egg", "tea"]}, "negative_prompts must be one for"),
        ([NAG], {}, "rule must be one rule, and not a sequence"),
        (NAG, {"negative_prompts": [" "]}, "negative_prompts must be non-empty"),
        (
            NormalizedAttention(gate=DynamicNegativeGuidance()),
            {},
            "rule must track its posterior",
        ),
        (
            NormalizedAttention(gate=DynamicNegativeGuidance.tracked(tracker="path")),
            {},
            "gate must have a tracker of transitions",
        ),
        (
            NormalizedAttention(gate=gate(reference="unconditional")),
            {},
            "gate must have reference='positive'",
        ),
    ],
)
def test_options_that_cannot_be(
    pipe: Any, rule: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        apply_guidance(pipe, rule, **options)
    assert type(pipe).__mro__[1].__name__ != type(pipe).__name__


def test_pipelines_that_cannot_be(pipe: Any) -> None:
    with pytest.raises(ValueError, match=r"got a FluxPipeline with a FluxTransformer2DModel.*take"):
        apply_guidance(flux(), NAG)
    with pytest.raises(ValueError, match="DDPMPipeline with a UNet2DModel"):
        apply_guidance(tiny.tiny_ddpm(), NAG)
    bare = copy.deepcopy(pipe)
    for _, module in list(bare.unet.named_modules()):
        if hasattr(module, "is_cross_attention"):
            module.is_cross_attention = False
    with pytest.raises(ValueError, match="network with attention to its prompt .* has none"):
        apply_guidance(bare, NAG)
    projecting = copy.deepcopy(pipe)
    projecting.unet.register_to_config(encoder_hid_dim_type="text_proj")
    with pytest.raises(ValueError, match="projects it first"):
        apply_guidance(projecting, NAG)
    strange = copy.deepcopy(pipe)
    strange.unet.set_attn_processor(Elsewhere())
    with pytest.raises(ValueError, match=r"Elsewhere, cannot be combined .* did so 0 times"):
        guided(strange, NAG)
    with apply_guidance(pipe, NAG), pytest.raises(ValueError, match="must not be guided already"):
        apply_guidance(pipe, NegativePrompting())


def test_what_changes_the_attention_itself(pipe_of: Callable[[str], Any]) -> None:
    with pytest.raises(ValueError, match="skip_guidance_layers of the pipeline's call must be"):
        guided(pipe_of("sd3"), NAG, skip_guidance_layers=[0])
    perturbed = StableDiffusionPAGPipeline(
        **copy.deepcopy(pipe_of("sd")).components,
        requires_safety_checker=False,
        pag_applied_layers="mid",
    )
    perturbed.set_progress_bar_config(disable=True)
    with pytest.raises(ValueError, match=r"pag_scale of the pipeline's call must be 0 .* got 3"):
        guided(perturbed, NAG)
    plain = run(perturbed, negative_prompt=None, pag_scale=0.0)
    assert torch.equal(guided(perturbed, NormalizedAttention(0.0), pag_scale=0.0), plain)


def test_embeddings_need_no_text_encoder_or_say_so(pipe: Any) -> None:
    device = torch.device("cpu")
    made = pipe.encode_prompt(PROMPT, device, 1, True, NEGATIVE)
    call = {"prompt": None, "prompt_embeds": made[0], "negative_prompt": None}
    bare = copy.copy(pipe)
    bare.text_encoder = bare.tokenizer = None
    negative = {"negative_prompt_embeds": made[1]}
    found = guided(bare, NAG, guidance_scale=1.0, **call, **negative)
    assert torch.equal(found, guided(pipe, NAG, guidance_scale=1.0))
    with pytest.raises(ValueError, match="has no text encoder, with which the empty prompt"):
        guided(bare, NAG, guidance_scale=4.0, **call, **negative)
    with pytest.raises(ValueError, match="give them as embeddings"):
        apply_guidance(bare, NAG, negative_prompts=["egg"])
    other = guided(bare, NAG, negative_prompts=[made[1]], guidance_scale=4.0, **call, **negative)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = guided(pipe, NAG, negative_prompts=[NEGATIVE], guidance_scale=4.0)
    assert torch.equal(other, whole)
