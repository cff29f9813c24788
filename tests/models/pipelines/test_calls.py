"""Calls of pipelines under guidance that went wrong for users, each kind of fault by itself.

Every test began as a report: of added prompts that were encoded otherwise than the pipeline's own,
of runs that were told apart by what is in their tensors, of settings that belong to one call, of
networks that are shared, exchanged, wrapped or copied.  test_models_hook.py has what guidance does
in a usual call, test_models_families.py all classes of pipelines.
"""

from __future__ import annotations

import copy
import functools
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from PIL import Image

from dng_math import (
    ClassifierFreeGuidance,
    ContrastiveCFG,
    DynamicNegativeGuidance,
    NegativePrompting,
    PerpNeg,
    SafeLatentDiffusion,
    Unguided,
)
from dng_models import apply_guidance
from dng_models.pairs.denoisers import Labelled
from dng_models.pipelines import tiny
from dng_models.pipelines.hook import remove_guidance
from dng_models.pipelines.layouts import LAYOUTS, Layout
from dng_models.pipelines.schedulers import PosteriorFlowScheduler
from tests.helpers import textbook
from tests.helpers.families import FAMILIES, final_latents
from tests.helpers.families import built as built_family
from tests.helpers.families.base import attends_in_bfloat16
from tests.helpers.families.latent_diffusion import control, made, sd, sdxl
from tests.helpers.versions import before

tracked_dng = DynamicNegativeGuidance.tracked

# What diffusers and transformers say of their own old and new ways, and of tiny sizes.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{said}")
    for said in (
        ".*:FutureWarning",
        ".*:DeprecationWarning",
        "Initializing zero-element tensors:UserWarning",
        ".* of the pipeline's call is dropped:UserWarning",
    )
]

PROMPT, NEGATIVE = "a British breakfast", "egg, sausage"
STEPS = 4
RULE = tracked_dng(40, prior=0.05)
# Random networks of other families differ by much: evidence that reaches no bound in a few steps.
GENTLE = tracked_dng(40, prior=0.05, temperature=1e-5, p_min=1e-300)
# Float32 networks, shown batches of another size or the same sums in another order.
CLOSE = 1e-5
FAR = 100 * CLOSE


@pytest.fixture(scope="module")
def built() -> dict[str, Any]:
    return {}


@pytest.fixture
def pipe_of(built: dict[str, Any]) -> Callable[[str], Any]:
    """A pipeline for one test alone: a copy of what is built once."""
    kinds: dict[str, Callable[[], Any]] = {
        "sd": lambda: made("StableDiffusionPipeline", sd()),
        "xl": lambda: made("StableDiffusionXLPipeline", sdxl()),
        "sd3": lambda: tiny.tiny_stable_diffusion_3(0, scheduler=PosteriorFlowScheduler(shift=3.0)),
        "controlnet": lambda: made("StableDiffusionControlNetPipeline", control(sd())),
        "img2img": lambda: made("StableDiffusionImg2ImgPipeline", sd()),
    }

    def get(name: str) -> Any:
        if name not in built:
            built[name] = kinds[name]() if name in kinds else built_family(name)[1]
        return copy.deepcopy(built[name])

    return get


@pytest.fixture
def pipe(pipe_of: Callable[[str], Any]) -> Any:
    return pipe_of("sd")


def gens(*seeds: int) -> list[Any]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def picture(seed: int = 1) -> Any:
    return torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def run(pipe: Any, seeds: tuple[int, ...] = (0, 1), **options: Any) -> Any:
    """Latents; one generator an image."""
    given: dict[str, Any] = {
        "prompt": PROMPT,
        "negative_prompt": NEGATIVE,
        "num_inference_steps": STEPS,
        "generator": gens(*seeds),
        "output_type": "latent",
    }
    prompts = options.get("prompt")
    each = len(seeds) // (len(prompts) if isinstance(prompts, list) else 1)
    given["num_images_per_prompt"] = each
    if "Img2Img" in type(pipe).__name__ or "ControlNet" in type(pipe).__name__:
        given["image"] = picture()
    return pipe(**{**given, **options}).images


def guided(pipe: Any, rule: Any, options: dict[str, Any], **call: Any) -> tuple[Any, Any]:
    """Latents and trace of one call under guidance."""
    with apply_guidance(pipe, rule, **options) as trace:
        found = run(pipe, **call)
    return found, trace


def of_family(
    name: str, pipe: Any, rule: Any, options: dict[str, Any], **call: Any
) -> tuple[Any, Any]:
    with warnings.catch_warnings():
        # Some come with schedulers of their own, without noise.
        warnings.filterwarnings("ignore", message=".* adds no noise")
        with apply_guidance(pipe, rule, **options) as trace:
            found = final_latents(pipe, FAMILIES[name], **call)
    return found, trace


def apart(a: Any, b: Any) -> float:
    """Largest difference, relative to the largest value."""
    return float((a - b).abs().max() / b.abs().max())


@contextmanager
def shown_to(network: Any) -> Iterator[list[dict[str, Any]]]:
    """Named arguments that a network itself is called with, guidance's own calls too.

    To be entered before guidance is.
    """
    calls: list[dict[str, Any]] = []
    forward = network.forward

    @functools.wraps(forward)
    def watched(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return forward(*args, **kwargs)

    network.forward = watched
    try:
        yield calls
    finally:
        network.__dict__.pop("forward", None)


@contextmanager
def answers_of(network: Any) -> Iterator[list[tuple[Any, Any, Any]]]:
    """What a pipeline shows its network, and what it is answered: latents, time and prediction."""
    found: list[tuple[Any, Any, Any]] = []

    def record(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        found.append((args[0], args[1], output[0]))

    handle = network.register_forward_hook(record, with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()


def predictions(pipe: Any, shown: Any, t: Any, *texts: str) -> list[np.ndarray]:
    """What the network alone says of latents for each text, in float64."""
    found = []
    for text in texts:
        embedded = pipe.encode_prompt(text, "cpu", 1, False)[0]
        with torch.no_grad():
            found.append(pipe.unet(shown, t, embedded.expand(len(shown), -1, -1)).sample)
    return [p.double().numpy() for p in found]


def ddim(pipe: Any, **config: Any) -> Any:
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **config)
    return pipe


# ---------------------------------------------------------------------- what added prompts say


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [NEGATIVE, PROMPT]),
        ({"negative_prompts": ["egg"]}, [PROMPT, "egg"]),
        ({"negative_prompts": ["egg", "tea"], "cfg_scale": 3.0}, [NEGATIVE, PROMPT, "egg", "tea"]),
        ({"cfg_scale": 3.0}, [NEGATIVE, PROMPT, ""]),
        ({"negative_prompts": ["egg"], "skip_below": 1e-6}, [PROMPT, "egg"]),
    ],
)
def test_text_has_a_row_for_every_frame(
    pipe_of: Callable[[str], Any], options: dict[str, Any], expected: list[str]
) -> None:
    """Videos of two prompts: all frames of one stand before those of the other."""
    name, frames = "AnimateDiffPipeline", 3
    pipe = pipe_of(name)
    both = {PROMPT: (PROMPT, "supper"), NEGATIVE: (NEGATIVE, "milk")}
    every = [each for text in expected for each in both.get(text, (text, text))]
    known = {t: pipe.encode_prompt(t, "cpu", 1, False)[0][0].detach() for t in every}
    with shown_to(pipe.unet) as calls:
        of_family(
            name,
            pipe,
            RULE,
            options,
            prompt=list(both[PROMPT]),
            negative_prompt=list(both[NEGATIVE]),
            num_frames=frames,
            num_inference_steps=2,
        )
    shown = calls[-1]["encoder_hidden_states"]
    # Several texts are encoded in one batch: their last digits are others.
    near = [[t for t, e in known.items() if apart(row, e) < CLOSE] for row in shown]
    assert near == [[text] for text in every for _ in range(frames)]


def test_pooled_text_and_sizes_of_added_prompts(pipe_of: Callable[[str], Any]) -> None:
    pipe = pipe_of("xl")
    # Of one image: for several, diffusers itself alternates the sizes of the two prompts.
    sizes: dict[str, Any] = {"negative_original_size": (8, 24), "negative_target_size": (16, 8)}
    sizes["seeds"] = (0,)
    own, _ = guided(pipe, RULE, {}, negative_prompt="egg", **sizes)
    with shown_to(pipe.unet) as calls:
        listed, _ = guided(
            pipe, RULE, {"negative_prompts": ["egg", "tea"], "cfg_scale": 2.0}, **sizes
        )
    more = calls[-1]["added_cond_kwargs"]
    pooled = [
        pipe.encode_prompt(text, device="cpu", do_classifier_free_guidance=False)[2]
        for text in (NEGATIVE, PROMPT, "egg", "tea")
    ]
    assert torch.equal(more["text_embeds"], torch.cat(pooled))
    unwanted, wanted = [8.0, 24, 0, 0, 16, 8], [16.0, 16, 0, 0, 16, 16]
    expected = torch.tensor([unwanted, wanted, unwanted, unwanted])
    assert torch.equal(more["time_ids"].float(), expected)
    assert apart(listed, own) > FAR
    listed, _ = guided(pipe, RULE, {"negative_prompts": ["egg"]}, **sizes)
    assert apart(listed, own) < CLOSE
    assert apart(guided(pipe, RULE, {}, negative_prompt="egg", seeds=(0,))[0], own) > FAR


@pytest.mark.parametrize("other", ["egg", "something that is much longer", "t"])
def test_masks_of_two_text_encoders(pipe_of: Callable[[str], Any], other: str) -> None:
    name = "HunyuanDiTPipeline"
    pipe = pipe_of(name)
    own, trace = of_family(name, pipe, GENTLE, {}, negative_prompt="egg")
    with shown_to(pipe.transformer) as calls:
        listed, same = of_family(
            name, pipe, GENTLE, {"negative_prompts": ["egg"]}, negative_prompt=other
        )
    # A byte is a token: three of the word, and a marker.
    for mask in ("text_embedding_mask", "text_embedding_mask_t5"):
        assert int(calls[-1][mask].sum(1)[1]) == 4, mask
    assert apart(listed, own) < CLOSE
    torch.testing.assert_close(same.log_posterior[:, 0], trace.log_posterior, rtol=1e-4, atol=1e-4)
    plain = final_latents(pipe, FAMILIES[name], negative_prompt=None, guidance_scale=3.0)
    zero, _ = of_family(name, pipe, tracked_dng(0.0), {"cfg_scale": 3.0}, negative_prompt=other)
    assert apart(zero, plain) < CLOSE


# Encoders that take other arguments than Stable Diffusion's, in a doubled batch and without.
ENCODERS = (
    "FluxPipeline",
    "HunyuanDiTPipeline",
    "LTXPipeline",
    "PixArtAlphaPipeline",
    "StableDiffusion3Pipeline",
    "StableDiffusionXLPipeline",
    "ZImagePipeline",
)


@pytest.mark.parametrize("name", ENCODERS)
def test_prompts_of_one_call_and_an_added_one(pipe_of: Callable[[str], Any], name: str) -> None:
    """Two prompts, with two images each: rows of added text stand beside the right ones."""
    pipe = pipe_of(name)
    each = "num_videos_per_prompt" if name.startswith("LTX") else "num_images_per_prompt"
    # Where there are masks, diffusers itself gives those of several images to the wrong prompts,
    # and diffusers 0.35 the pooled embeddings of Stable Diffusion 3.
    wrong = ("Hunyuan", "LTX") + (("StableDiffusion3",) if before("diffusers", "0.36") else ())
    number = 1 if name.startswith(wrong) else 2
    seeds = range(2 * number)
    prompts, negatives = ["breakfast", "tea and toast"], ["egg", "egg"]
    options: dict[str, Any] = {"negative_prompts": ["egg"]}
    call = {"prompt": prompts, "generator": gens(*seeds), each: number}
    own, trace = of_family(name, pipe, GENTLE, {}, negative_prompt=negatives, **call)
    call["generator"] = gens(*seeds)
    listed, same = of_family(name, pipe, GENTLE, options, negative_prompt=["x", "long"], **call)
    assert apart(listed, own) < CLOSE
    np.testing.assert_allclose(same.log_posterior[:, 0], trace.log_posterior, rtol=1e-4, atol=1e-4)
    alone, _ = of_family(
        name,
        pipe,
        GENTLE,
        options,
        prompt=prompts[1:],
        negative_prompt=["x"],
        generator=gens(*seeds[number:]),
        **{each: number},
    )
    assert apart(alone, own[number:]) < CLOSE
    assert apart(alone, own[:number]) > FAR


def test_embeddings_of_long_and_weighted_prompts(pipe: Any) -> None:
    """154 tokens, as compel makes them, for the call's prompts and for what is unwanted."""

    def long(first: str, second: str) -> Any:
        parts = [pipe.encode_prompt(text, "cpu", 1, False)[0] for text in (first, second)]
        return torch.cat([1.1 * parts[0], parts[1]], dim=1)

    call: dict[str, Any] = {"prompt": None, "negative_prompt": None}
    call["prompt_embeds"] = long("breakfast", "with tea")
    unwanted, other = long("egg", "sausage"), long("x", "y")
    own, trace = guided(pipe, RULE, {}, negative_prompt_embeds=unwanted, **call)
    listed, same = guided(
        pipe, RULE, {"negative_prompts": [unwanted]}, negative_prompt_embeds=other, **call
    )
    assert apart(listed, own) < CLOSE
    torch.testing.assert_close(same.log_posterior[:, 0], trace.log_posterior)
    # The call's own negative is then the unconditional one, of the same length.
    plain = run(pipe, guidance_scale=3.0, negative_prompt_embeds=other, **call)
    options: dict[str, Any] = {"negative_prompts": [unwanted], "cfg_scale": 3.0}
    zero, _ = guided(pipe, tracked_dng(0.0), options, negative_prompt_embeds=other, **call)
    assert apart(zero, plain) < CLOSE
    refused: list[tuple[dict[str, Any], Any, str]] = [
        ({}, long("", ""), "must be given, and not be empty.*embeddings 0 are those of the empty"),
        ({}, torch.zeros_like(other), "embeddings 0 are zero"),
        ({"cfg_scale": 3.0}, unwanted, "cfg_scale, which adds the empty prompt, cannot be part"),
        ({"negative_prompts": ["egg"]}, other, r"negative_prompts\[0\] cannot be part of this"),
    ]
    for options, negative, message in refused:
        with pytest.raises(ValueError, match=message):
            guided(pipe, RULE, options, negative_prompt_embeds=negative, **call)
    short = pipe.encode_prompt("egg", "cpu", 1, False)[0]
    with pytest.raises(ValueError, match="must be encoded like|cannot be part of this call"):
        guided(pipe, RULE, {"negative_prompts": [short]}, negative_prompt_embeds=other, **call)


@pytest.mark.parametrize("options", [{}, {"max_sequence_length": 128}, {"negative_prompt_3": ""}])
def test_nothing_of_any_length_is_no_negative(
    pipe_of: Callable[[str], Any], options: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match="must be given, and not be empty"):
        guided(pipe_of("sd3"), RULE, {}, negative_prompt="", **options)


def test_embeddings_for_one_negative_and_text_for_another(pipe: Any) -> None:
    def embedded(text: str) -> Any:
        return pipe.encode_prompt(text, "cpu", 1, False)[0]

    own, trace = guided(pipe, RULE, {"negative_prompts": ["egg", "tea"]})
    mixed, same = guided(pipe, RULE, {"negative_prompts": [embedded("egg"), "tea"]})
    assert torch.equal(mixed, own)
    assert torch.equal(same.log_posterior, trace.log_posterior)
    # Where the call's prompts are embeddings, text can still be added.
    call = {"prompt": None, "negative_prompt": None, "prompt_embeds": embedded(PROMPT)}
    given, _ = guided(
        pipe,
        RULE,
        {"negative_prompts": [embedded("egg"), "tea"]},
        negative_prompt_embeds=embedded("x"),
        **call,
    )
    assert torch.equal(given, own)
    # A row for every prompt of the call.
    rows = torch.cat([embedded("egg"), embedded("tea")])
    two = {"prompt": ["breakfast", "supper"], "seeds": (0, 1)}
    each, _ = guided(pipe, RULE, {"negative_prompts": [rows]}, negative_prompt=["x", "y"], **two)
    plain, _ = guided(pipe, RULE, {}, negative_prompt=["egg", "tea"], **two)
    assert apart(each, plain) < CLOSE


def test_pooled_embeddings_go_along(pipe_of: Callable[[str], Any]) -> None:
    pipe = pipe_of("xl")
    text, _, pooled, _ = pipe.encode_prompt("egg", device="cpu", do_classifier_free_guidance=False)
    own, _ = guided(pipe, RULE, {}, negative_prompt="egg")
    for given in (
        {"negative_prompt_embeds": text, "negative_pooled_prompt_embeds": pooled},
        {"prompt_embeds": text, "pooled_prompt_embeds": pooled},
    ):
        listed, _ = guided(pipe, RULE, {"negative_prompts": [given]})
        assert apart(listed, own) < CLOSE
    with pytest.raises(ValueError, match=r"negative_prompts\[0\] cannot be part.*pooled"):
        guided(pipe, RULE, {"negative_prompts": [text]})


def test_embeddings_that_cannot_be(pipe: Any) -> None:
    embedded = pipe.encode_prompt("egg", "cpu", 1, False)[0].detach()
    cases: list[tuple[Any, type[Exception], str]] = [
        ([{"prompt_embedding": embedded}], ValueError, "takes, .*got 'prompt_embedding'"),
        ([{"pooled_prompt_embeds": embedded}], ValueError, "takes, .*got 'pooled_prompt_embeds'"),
        ([{"prompt_embeds": embedded.numpy()}], TypeError, "as embeddings must be tensors"),
        ([{}], TypeError, "a tensor, or a mapping of names to tensors"),
        ([3], TypeError, "a tensor, or a mapping of names to tensors.*got 3 in it"),
        (embedded, TypeError, r"must be a sequence of str.*got a tensor of shape \(1, 77, 32\)"),
        ({"prompt_embeds": embedded}, TypeError, "must be a sequence of str"),
    ]
    for given, error, message in cases:
        with pytest.raises(error, match=f"negative_prompts.*{message}"):
            apply_guidance(pipe, RULE, negative_prompts=given)
    for rows in (3, 0):
        with pytest.raises(ValueError, match=f"must have 1 row, or 1, .*got {rows}"):
            guided(pipe, RULE, {"negative_prompts": [embedded.expand(1, -1, -1)[[0] * rows]]})
    for wrong in (embedded[..., :16], embedded[:, :50], embedded[0, 0]):
        with pytest.raises(ValueError, match="negative_prompts"):
            guided(pipe, RULE, {"negative_prompts": [wrong]})
    assert torch.isfinite(guided(pipe, RULE, {})[0]).all()


def test_numbers_of_tokens_are_no_embeddings(pipe: Any) -> None:
    whole = pipe.encode_prompt("egg", "cpu", 1, False)[0].detach().long()
    with pytest.raises((TypeError, ValueError), match="negative_prompts"):
        guided(pipe, RULE, {"negative_prompts": [whole]})


def test_numbers_of_tokens_in_the_call(pipe: Any) -> None:
    whole = pipe.encode_prompt("egg", "cpu", 1, False)[0].detach().long()
    call = {"negative_prompt": None, "negative_prompt_embeds": whole}
    assert torch.isfinite(run(pipe, **call)).all()  # diffusers takes them
    with pytest.raises((TypeError, ValueError), match="negative_prompt"):
        guided(pipe, RULE, {}, **call)


# ---------------------------------------------------------------------- what is one run


@pytest.mark.parametrize("name", ["CogView4Pipeline", "FluxPipeline", "StableDiffusionPipeline"])
def test_one_seed_for_two_prompts(pipe_of: Callable[[str], Any], name: str) -> None:
    """Equal latents in a batch, or in two calls of one step, are no sign of anything."""
    pipe = pipe_of(name)
    # Of equal length: CogView4 pads prompts to the longest of a call, and has no masks.
    prompts, negatives = ["breakfast", "tea, cake"], ["egg", "ham"]
    call = {"prompt": prompts, "negative_prompt": negatives, "generator": gens(0, 0)}
    both, trace = of_family(name, pipe, GENTLE, {}, **call)
    assert [record.steps for record in trace.runs] == [[0, 1, 2]]
    assert apart(both[:1], both[1:]) > FAR
    for image in (0, 1):
        alone, one = of_family(
            name,
            pipe,
            GENTLE,
            {},
            prompt=prompts[image],
            negative_prompt=negatives[image],
            generator=gens(0),
        )
        assert apart(both[image : image + 1], alone) < CLOSE
        np.testing.assert_allclose(
            trace.log_posterior[:, image], one.log_posterior[:, 0], rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "CogView4Pipeline", "FluxPipeline"])
def test_calls_that_are_alike_are_runs_of_their_own(
    pipe_of: Callable[[str], Any], name: str
) -> None:
    pipe = pipe_of(name)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* adds no noise")
        with apply_guidance(pipe, GENTLE) as trace:
            found = [final_latents(pipe, FAMILIES[name]) for _ in range(2)]
            # The positive prompt as the negative one too: both parts of the batch are the same.
            final_latents(pipe, FAMILIES[name], prompt="egg", negative_prompt="egg")
    assert torch.equal(*found)
    assert [record.steps for record in trace.runs] == [[0, 1, 2]] * 3
    assert torch.equal(trace.runs[0].log_posterior, trace.runs[1].log_posterior)
    np.testing.assert_allclose(trace.runs[2].log_posterior.exp(), 0.05, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"guess_mode": True}, {"control_guidance_end": 0.6}])
def test_a_control_network_in_its_ways(
    pipe_of: Callable[[str], Any], options: dict[str, Any]
) -> None:
    pipe = pipe_of("controlnet")
    own, _ = guided(pipe, RULE, {}, **options)
    added = {"negative_prompts": [NEGATIVE]}
    listed, _ = guided(pipe, RULE, added, negative_prompt="tea", **options)
    assert apart(listed, own) < CLOSE
    plain = run(pipe, negative_prompt=None, guidance_scale=3.0, **options)
    zero, _ = guided(pipe, tracked_dng(0.0), {"cfg_scale": 3.0}, **options)
    assert apart(zero, plain) < CLOSE
    assert apart(run(pipe, negative_prompt=None, guidance_scale=3.0, image=picture(2)), plain) > FAR


@pytest.mark.parametrize("guess_mode", [False, True])
def test_several_control_networks(pipe_of: Callable[[str], Any], guess_mode: bool) -> None:
    one = pipe_of("controlnet")
    second = copy.deepcopy(one.controlnet)
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.mul_(0.7)
    pipe = made(
        "StableDiffusionControlNetPipeline",
        {**one.components, "controlnet": [one.controlnet, second]},
        requires_safety_checker=False,
    )
    call: dict[str, Any] = {"image": [picture(1), picture(2)], "guess_mode": guess_mode}
    call["controlnet_conditioning_scale"] = [1.0, 0.5]
    own, trace = guided(pipe, RULE, {}, **call)
    options = {"negative_prompts": [NEGATIVE]}
    listed, same = guided(pipe, RULE, options, negative_prompt="tea", **call)
    assert apart(listed, own) < CLOSE
    torch.testing.assert_close(same.log_posterior[:, 0], trace.log_posterior, rtol=1e-4, atol=1e-4)
    plain = run(pipe, negative_prompt=None, guidance_scale=3.0, **call)
    options = {"negative_prompts": ["egg", "tea"], "cfg_scale": 3.0}
    zero, _ = guided(pipe, tracked_dng(0.0), options, negative_prompt="", **call)
    assert apart(zero, plain) < CLOSE
    alone = run(one, negative_prompt=None, guidance_scale=3.0)
    assert apart(alone, plain) > FAR


@pytest.mark.parametrize("images", [1, 2, 3, 4])
def test_other_numbers_of_images(pipe: Any, images: int) -> None:
    """Sums of batches of another size differ in their last digits, and in no others."""
    seeds = tuple(range(images))
    plain = run(pipe, seeds, negative_prompt=None, guidance_scale=6.5)
    zero, _ = guided(pipe, tracked_dng(0.0), {"cfg_scale": 6.5}, seeds=seeds)
    assert apart(zero, plain) < CLOSE
    again, _ = guided(pipe, tracked_dng(0.0), {"cfg_scale": 6.5}, seeds=seeds)
    assert torch.equal(again, zero)


@pytest.mark.parametrize("name", ["sd", "controlnet", "FluxPipeline"])
def test_steps_at_which_nothing_unwanted_is_evaluated(
    pipe_of: Callable[[str], Any], name: str
) -> None:
    """Then the user's negative and the positive prompt are left, as in a call of the pipeline."""
    pipe = pipe_of(name)
    rule = tracked_dng(10, prior=1e-3, temperature=1e-6)
    options: dict[str, Any] = {"negative_prompts": ["egg", "tea"], "cfg_scale": 3.0}
    call: dict[str, Any] = {"num_inference_steps": 6}

    def latents(**more: Any) -> tuple[Any, Any]:
        if name in FAMILIES:
            return of_family(name, pipe, rule, {**options, **more}, **call)
        return guided(pipe, rule, {**options, **more}, **call)

    expected, full = latents()
    with pytest.warns(UserWarning, match="skip_below should be well below"):
        found, trace = latents(skip_below=1.0)
    assert 0 < trace.evaluations < trace.evaluations_saved
    assert trace.evaluations + trace.evaluations_saved == full.evaluations
    # What is left out is a hundredth of the difference of two predictions.
    assert apart(found, expected) < 2e-2


# ---------------------------------------------------------------------- the settings of a call


def test_the_scale_of_a_lora_on_the_text_encoder(pipe: Any) -> None:
    import peft

    torch.manual_seed(3)
    lora = {"r": 4, "init_lora_weights": False}
    pipe.unet.add_adapter(peft.LoraConfig(target_modules=["to_k", "to_q", "to_v"], **lora))
    words = ["q_proj", "k_proj", "v_proj"]
    pipe.text_encoder.add_adapter(peft.LoraConfig(target_modules=words, **lora))
    with torch.no_grad():
        for name, parameter in pipe.text_encoder.named_parameters():
            if "lora" in name:
                parameter.mul_(5)
    pipe.set_progress_bar_config(disable=True)
    scales = [{"cross_attention_kwargs": {"scale": scale}} for scale in (1.0, 0.2)]
    own = [guided(pipe, RULE, {}, **scale)[0] for scale in scales]
    plain = [run(pipe, negative_prompt=None, guidance_scale=3.0, **scale) for scale in scales]
    # The scale changes between two calls under one guidance.
    with apply_guidance(pipe, RULE, negative_prompts=[NEGATIVE]):
        listed = [run(pipe, negative_prompt="tea", **scale) for scale in scales]
    with apply_guidance(pipe, tracked_dng(0.0), cfg_scale=3.0):
        zero = [run(pipe, **scale) for scale in scales]
    for found, expected in ((listed, own), (zero, plain)):
        assert all(apart(f, e) < CLOSE for f, e in zip(found, expected, strict=True))
        assert apart(*expected) > FAR
    with pytest.raises(ValueError, match="must be given, and not be empty"):
        guided(pipe, RULE, {}, negative_prompt="", **scales[1])


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("xl", [{}, {"clip_skip": 1}]),
        ("sd3", [{"max_sequence_length": 8}, {"max_sequence_length": 64}]),
        ("xl", [{}, {"prompt_2": "another", "negative_prompt_2": "egg, sausage"}]),
    ],
)
def test_prompts_are_encoded_anew_in_every_call(
    pipe_of: Callable[[str], Any], name: str, settings: list[dict[str, Any]]
) -> None:
    pipe = pipe_of(name)
    own = [guided(pipe, RULE, {}, **setting)[0] for setting in settings]
    assert apart(*own) > FAR
    with apply_guidance(pipe, RULE, negative_prompts=[NEGATIVE]):
        for setting, expected in zip(settings, own, strict=True):
            assert apart(run(pipe, **{"negative_prompt": "tea", **setting}), expected) < CLOSE


def test_a_word_that_is_learned_between_two_calls(pipe: Any) -> None:
    torch.manual_seed(5)
    vectors = torch.randn(2, 32)
    with apply_guidance(pipe, RULE, negative_prompts=["<egg>"]):
        before = run(pipe)
        pipe.load_textual_inversion(vectors, token="<egg>")
        after = run(pipe)
    assert apart(after, before) > FAR
    own, _ = guided(pipe, RULE, {}, negative_prompt="<egg>")
    assert apart(after, own) < CLOSE
    # It is its vectors that are read: two, of which neither may be left out.
    ids = pipe.tokenizer.convert_tokens_to_ids(["<egg>", "<egg>_1"])
    assert torch.equal(pipe.text_encoder.get_input_embeddings().weight[ids], vectors)
    pipe.text_encoder.get_input_embeddings().weight.data[ids[1]] *= -1
    assert apart(guided(pipe, RULE, {"negative_prompts": ["<egg>"]})[0], own) > FAR


def test_a_scheduler_that_is_exchanged_between_two_calls(pipe: Any) -> None:
    kinds = (DDPMScheduler, EulerAncestralDiscreteScheduler)
    schedulers = [kind.from_config(pipe.scheduler.config) for kind in kinds]
    expected = []
    for scheduler in schedulers:
        pipe.scheduler = scheduler
        expected.append(guided(pipe, RULE, {}))
    with apply_guidance(pipe, RULE) as trace:
        for scheduler, (latents, alone) in zip(schedulers, expected, strict=True):
            pipe.scheduler = scheduler
            assert torch.equal(run(pipe), latents)
            assert torch.equal(trace.log_posterior, alone.log_posterior)
    assert [record.scheduler for record in trace.runs] == [kind.__name__ for kind in kinds]
    assert all("step" not in vars(scheduler) for scheduler in schedulers)


# ---------------------------------------------------------------------- times


def test_times_that_are_fractions_reach_what_learned_the_unwanted() -> None:
    pipe = tiny.tiny_ddpm(0)
    pipe.scheduler = PosteriorFlowScheduler()
    network, told = copy.deepcopy(pipe.unet), []

    def unwanted(x: Any, t: Any) -> Any:
        told.extend(t.tolist())
        return network(x, t)

    with apply_guidance(pipe, RULE, unwanted=unwanted) as trace:
        pipe(batch_size=1, num_inference_steps=6, generator=gens(0)[0], output_type="np")
    np.testing.assert_allclose(told, trace.timesteps, rtol=1e-6)
    assert np.abs(trace.timesteps - trace.timesteps.round()).max() > 0.1
    # The same network as what is unwanted: there is no evidence, unless it is told other times.
    np.testing.assert_allclose(trace.log_posterior.exp(), 0.05, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("HiDreamImagePipeline", {"time": "timestep"}),
        ("FluxPipeline", {"time_unit": "timestep"}),
        ("AuraFlowPipeline", {"time_unit": "reversed fraction"}),
        ("ZImagePipeline", {"time_unit": "fraction"}),
        ("Lumina2Pipeline", {"time_unit": "reversed"}),
    ],
)
def test_names_and_units_of_time(
    pipe_of: Callable[[str], Any], name: str, wrong: dict[str, Any]
) -> None:
    pipe = pipe_of(name)
    _, trace = of_family(name, pipe, GENTLE, {})
    np.testing.assert_allclose(trace.timesteps, pipe.scheduler.timesteps, rtol=1e-6)
    with pytest.raises(ValueError, match="time"):
        of_family(name, pipe, GENTLE, {"layout": replace(LAYOUTS[name], **wrong)})


# ---------------------------------------------------------------------- channels


def test_a_predicted_variance_is_no_evidence(pipe_of: Callable[[str], Any]) -> None:
    """DeepFloyd IF's second stage: 3 channels of latents and 3 of a picture in, 6 out."""
    name = "IFSuperResolutionPipeline"
    pipe = pipe_of(name)
    plain, trace = of_family(name, pipe, GENTLE, {})
    assert trace.log_posterior.std() > 0

    def scrambled(module: Any, args: Any, output: Any) -> Any:
        output[0][:, 3:] = torch.randn(
            output[0][:, 3:].shape, generator=torch.Generator().manual_seed(9)
        )
        return output

    # From within the network, so that guidance sees it.
    conv = pipe.unet.conv_out
    handle = conv.register_forward_hook(lambda m, a, out: scrambled(m, a, (out,))[0])
    again, same = of_family(name, pipe, GENTLE, {})
    handle.remove()
    assert torch.equal(again, plain)
    assert torch.equal(same.log_posterior, trace.log_posterior)
    # Guidance in the channels of the image changes as always what is seen.
    assert apart(of_family(name, pipe, Unguided(), {})[0], plain) > FAR
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config, variance_type="learned_range")
    with pytest.raises(ValueError, match="learned_range.*Use variance_type='fixed_small'"):
        of_family(name, pipe, GENTLE, {})


@pytest.mark.parametrize(
    "name", ["StableDiffusionDepth2ImgPipeline", "StableDiffusionUpscalePipeline"]
)
def test_conditions_beside_the_latents(pipe_of: Callable[[str], Any], name: str) -> None:
    """Further channels are shown as they are, also where the network is differentiated."""
    pipe = ddim(pipe_of(name))
    channels = pipe.unet.config.in_channels
    with shown_to(pipe.unet) as calls, apply_guidance(pipe, GENTLE, divergence_probes=1) as trace:
        with answers_of(pipe.unet) as answers:
            final_latents(pipe, FAMILIES[name])
    first = answers[0][0]
    assert channels == first.shape[1] > 4
    assert torch.isfinite(trace.log_posterior).all() and trace.log_posterior.std() > 0
    assert len(calls) > len(answers)  # guidance's own, of the derivative
    # The positive prompt as what is unwanted has the same divergence: there is no evidence.
    options: dict[str, Any] = {"negative_prompts": [PROMPT], "divergence_probes": 1}
    _, none = of_family(name, pipe, GENTLE, options, prompt=PROMPT)
    np.testing.assert_allclose(none.log_posterior.exp(), 0.05, atol=1e-4)


# ---------------------------------------------------------------------- whose call it is


def test_two_pipelines_on_one_network(pipe: Any) -> None:
    other = ddim(StableDiffusionPipeline(**pipe.components, requires_safety_checker=False))
    other.set_progress_bar_config(disable=True)
    plain, fewer = run(other), run(other, num_inference_steps=3)
    with apply_guidance(pipe, RULE) as trace:
        with pytest.warns(UserWarning, match="called by something else.*such calls are not guided"):
            assert torch.equal(run(other), plain)
        expected = run(pipe)
        # It was said once; and whatever the guided one did last makes no difference.
        assert torch.equal(run(other), plain)
        with pytest.raises(ValueError, match="guidance_scale of the pipeline's call"):
            run(pipe, guidance_scale=1.0)
        assert torch.equal(run(other), plain)
        assert torch.equal(run(other, num_inference_steps=3), fewer)
        assert torch.equal(run(pipe), expected)
    assert [record.scheduler for record in trace.runs] == ["DDPMScheduler"] * 2
    assert apart(expected, run(pipe)) > FAR


MADE_FROM: dict[str, Callable[[Any], Any]] = {
    "from_pipe": lambda pipe: StableDiffusionImg2ImgPipeline.from_pipe(pipe),
    "auto": lambda pipe: diffusers.AutoPipelineForImage2Image.from_pipe(pipe),
    "its class": lambda pipe: StableDiffusionPipeline.from_pipe(pipe),
    # Classes of their own, for these are guided by nobody.
    "its type": lambda pipe: type(pipe)(**pipe.components, requires_safety_checker=False),
    "its type's from_pipe": lambda pipe: type(pipe).from_pipe(pipe),
}


@pytest.mark.filterwarnings("ignore:the network of a guided")
@pytest.mark.parametrize("how", MADE_FROM)
@pytest.mark.thinned(3)
def test_pipelines_that_are_made_from_a_guided_one(pipe: Any, how: str) -> None:
    def other() -> Any:
        found = MADE_FROM[how](pipe)
        found.set_progress_bar_config(disable=True)
        return found

    plain, own = run(other()), guided(other(), RULE, {})[0]
    with apply_guidance(pipe, RULE) as trace:
        run(pipe)
        inside = other()
        assert torch.equal(run(inside), plain)
    assert len(trace.runs) == 1
    assert torch.equal(run(inside), plain)
    assert torch.equal(guided(inside, RULE, {})[0], own)


def test_a_network_that_is_exchanged_inside_the_block(pipe: Any) -> None:
    stock, new = pipe.unet, tiny.tiny_stable_diffusion(3).unet
    plain = run(pipe)
    pipe.unet = new
    plain_new, (guided_new, _) = run(pipe), guided(pipe, RULE, {})
    pipe.unet = stock
    before = [dict(vars(network)) for network in (stock, new)]
    with apply_guidance(pipe, RULE) as trace:
        run(pipe)
        pipe.unet = new
        assert torch.equal(run(pipe), guided_new)
        assert vars(stock) == before[0]
        assert len(trace.runs) == 2
    assert [vars(network) for network in (stock, new)] == before
    assert torch.equal(run(pipe), plain_new)
    pipe.unet = stock
    assert torch.equal(run(pipe), plain)


def test_a_network_that_is_exchanged_in_mid_run(pipe: Any) -> None:
    stock, new = pipe.unet, tiny.tiny_stable_diffusion(3).unet
    plain = run(pipe)

    def exchange(pipe: Any, step: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            pipe.unet = new
        return kwargs

    with apply_guidance(pipe, RULE) as trace:
        expected = run(pipe)
        with pytest.raises(ValueError, match="is not the one that it had when its call began"):
            run(pipe, callback_on_step_end=exchange)
        pipe.unet = stock
        assert torch.equal(run(pipe), expected)
    assert [len(record.steps) for record in trace.runs] == [4, 2, 4]
    assert torch.equal(run(pipe), plain)


COPIES: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda each: pickle.loads(pickle.dumps(each)),
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("what", ["pipeline", "network"])
@pytest.mark.thinned(3)
def test_copies_of_what_is_guided(pipe: Any, how: str, what: str) -> None:
    plain = run(pipe)

    def copied() -> Any:
        each = COPIES[how](pipe if what == "pipeline" else pipe.unet)
        if what == "pipeline":
            return each
        return StableDiffusionPipeline(
            **{**pipe.components, "unet": each}, requires_safety_checker=False
        )

    with apply_guidance(pipe, RULE):
        expected = run(pipe)
        with pytest.raises(TypeError, match="guided .*cannot be copied or pickled"):
            copied()
        assert torch.equal(run(pipe), expected)
    other = copied()
    other.set_progress_bar_config(disable=True)
    assert torch.equal(run(other), plain)
    assert torch.equal(guided(other, RULE, {})[0], expected)
    assert torch.equal(run(pipe), plain)


def test_a_guided_pipeline_is_saved_as_what_it_is(pipe: Any, tmp_path: Any) -> None:
    run(pipe)  # which sets the tokenizer's padding
    pipe.save_pretrained(tmp_path / "plain")
    with apply_guidance(pipe, RULE, negative_prompts=["egg"]):
        run(pipe)
        pipe.save_pretrained(tmp_path / "guided")
        pipe.unet.save_pretrained(tmp_path / "network")
    names = [
        sorted(p.relative_to(tmp_path / kind).as_posix() for p in (tmp_path / kind).rglob("*"))
        for kind in ("plain", "guided")
    ]
    assert names[0] == names[1]
    for name in names[0]:
        files = [tmp_path / kind / name for kind in ("plain", "guided")]
        if files[0].is_file():
            assert files[0].read_bytes() == files[1].read_bytes(), name
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path / "guided")
    loaded.unet = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "network")
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(run(loaded), run(pipe))


def state_of(pipe: Any) -> dict[str, Any]:
    """Everything that is kept of a pipeline and its parts, by identity."""
    found: dict[str, Any] = {"type": type(pipe)}
    for name, part in {"": pipe, **pipe.components}.items():
        for key, value in getattr(part, "__dict__", {}).items():
            simple = isinstance(value, int | float | str | type(None) | bool)
            found[f"{name}.{key}"] = value if simple else id(value)
    return found


@pytest.mark.parametrize("name", ["sd", "controlnet", "sd3"])
def test_no_trace_is_left(pipe_of: Callable[[str], Any], name: str) -> None:
    pipe = pipe_of(name)
    run(pipe)

    def steady() -> dict[str, Any]:
        # What the scheduler makes of every call's timesteps is always new.
        return {k: v for k, v in state_of(pipe).items() if not k.startswith("scheduler._")}

    def forgotten(found: dict[str, Any]) -> dict[str, Any]:
        new = ("timesteps", "sigmas", "num_inference_steps", "noise_keys")
        return {k: None if k.removeprefix("scheduler.") in new else v for k, v in found.items()}

    before = steady()

    def fail(pipe: Any, step: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        raise KeyError("from a callback")

    with apply_guidance(pipe, RULE, negative_prompts=["egg"], cfg_scale=3.0):
        assert type(pipe) is not before["type"]
        assert type(pipe).__name__ == before["type"].__name__
        assert isinstance(pipe, before["type"])
        inside = steady()
        with pytest.raises(KeyError, match="from a callback"):
            run(pipe, callback_on_step_end=fail)
        assert forgotten(steady()) == forgotten(inside)
        with pytest.raises(ValueError, match="guidance_scale"):
            run(pipe, guidance_scale=0.5)
        with pytest.raises((TypeError, ValueError)):
            run(pipe, prompt=3)
        run(pipe)
    found = forgotten(steady())
    # Of a call that failed the pipeline itself keeps its arguments.
    assert found == forgotten(before)
    remove_guidance(pipe)
    assert forgotten(steady()) == found


def test_guidance_on_a_guided_pipeline(pipe: Any) -> None:
    with apply_guidance(pipe, RULE) as trace:
        expected = run(pipe)
        with pytest.raises(ValueError, match="pipe must not be guided already"):
            apply_guidance(pipe, NegativePrompting(1.0))
        assert torch.equal(run(pipe), expected)
        assert len(trace.runs) == 2
    assert torch.equal(guided(pipe, RULE, {})[0], expected)


def test_one_network_cannot_be_guided_through_two_pipelines(pipe: Any) -> None:
    other = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    third = copy.deepcopy(pipe)
    for each in (other, third):
        each.set_progress_bar_config(disable=True)
    plain, own = run(pipe), third.unet
    with apply_guidance(pipe, RULE), apply_guidance(third, NegativePrompting(1.0)) as second:
        expected, of_third = run(pipe), run(third)
        with pytest.raises(ValueError, match="must not share its network with a pipeline that is"):
            apply_guidance(other, RULE)
        assert type(other) is StableDiffusionPipeline
        third.unet = pipe.unet
        with pytest.raises(ValueError, match="must not share its network with a pipeline that is"):
            run(third)
        third.unet = own
        assert torch.equal(run(third), of_third)
        assert torch.equal(run(pipe), expected)
        assert len(second.runs) == 2
    for each in (pipe, other, third):
        assert torch.equal(run(each), plain)
    assert torch.equal(guided(other, RULE, {})[0], expected)


# ---------------------------------------------------------------------- which step it is


def karras(pipe: Any) -> Any:
    """Of which a long run tells its network many times twice."""
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(
        pipe.scheduler.config, use_karras_sigmas=True, algorithm_type="sde-dpmsolver++"
    )
    return pipe


def test_timesteps_that_come_twice(pipe: Any) -> None:
    pipe, number = karras(pipe), 220
    call: dict[str, Any] = {"seeds": (0,), "num_inference_steps": number}
    plain = run(pipe, guidance_scale=3.0, **call)
    found, trace = guided(pipe, tracked_dng(20, 1 / 11, temperature=0.0), {}, **call)
    assert trace.runs[0].steps == list(range(number))
    assert len(set(trace.timesteps)) < number - 10
    assert (np.diff(trace.time) < 0).all()
    # Errors of one step are handed on to the next, 220 times.
    assert apart(found, plain) < 100 * CLOSE


def test_a_start_at_a_timestep_that_comes_twice(pipe_of: Callable[[str], Any]) -> None:
    pipe = karras(pipe_of("img2img"))
    call: dict[str, Any] = {"num_inference_steps": 400, "strength": 0.02}
    plain = run(pipe, guidance_scale=3.0, **call)
    found, trace = guided(pipe, tracked_dng(20, 1 / 11, temperature=0.0), {}, **call)
    assert trace.runs[0].steps == list(range(392, 400))
    assert len(set(trace.timesteps)) < 8
    assert apart(found, plain) < CLOSE


def test_a_start_that_the_scheduler_looks_up(pipe_of: Callable[[str], Any]) -> None:
    """A pipeline of one's own that does not say where it begins, as those before set_begin_index.

    Of a timestep that comes more than once the scheduler then takes the second.
    """

    class Late(StableDiffusionImg2ImgPipeline):
        def get_timesteps(self, number: int, strength: float, device: Any) -> Any:
            same = (self.scheduler.timesteps == self.scheduler.timesteps[-1]).nonzero()
            self.first = int(same[1])
            return self.scheduler.timesteps[self.first :], number - self.first

    pipe = karras(made("StableDiffusionImg2ImgPipeline", pipe_of("img2img").components))
    late = Late(**pipe.components, requires_safety_checker=False)
    late.set_progress_bar_config(disable=True)
    taken: list[int] = []
    step = late.scheduler.step

    def watched(*args: Any, **kwargs: Any) -> Any:
        output = step(*args, **kwargs)
        taken.append(late.scheduler.step_index - 1)  # it has been counted up
        return output

    late.scheduler.step = functools.wraps(step)(watched)
    _, trace = guided(late, RULE, {}, num_inference_steps=400, image=picture())
    assert taken == list(range(late.first, 400))
    assert trace.runs[0].steps == taken


STARTS: dict[str, tuple[type, dict[str, Any]]] = {
    "DDIM": (DDIMScheduler, {}),  # which is never told where a run begins
    "DDPM": (DDPMScheduler, {}),
    "DPMSolver": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "Euler": (EulerDiscreteScheduler, {}),
    "Euler ancestral": (EulerAncestralDiscreteScheduler, {}),
}


@pytest.mark.filterwarnings("ignore:.*adds no noise")
@pytest.mark.parametrize("kind", STARTS)
def test_runs_that_start_in_the_middle(pipe_of: Callable[[str], Any], kind: str) -> None:
    pipe = pipe_of("img2img")
    scheduler, config = STARTS[kind]
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, **config)
    rule = tracked_dng(20, 1 / 11, temperature=0.0)
    for strength, first in ((1.0, 0), (0.7, 2), (0.17, 5)):  # the last leaves one step
        call: dict[str, Any] = {"num_inference_steps": 6, "strength": strength}
        found, trace = guided(pipe, rule, {}, **call)
        assert trace.runs[0].steps == list(range(first, 6)), strength
        np.testing.assert_allclose(trace.timesteps, pipe.scheduler.timesteps[first:], rtol=1e-6)
        assert apart(found, run(pipe, guidance_scale=3.0, **call)) < CLOSE, strength
        _, tracked = guided(pipe, RULE, {}, **call)
        np.testing.assert_allclose(tracked.log_posterior[0].exp(), 0.05, rtol=1e-5)
        if first < 5:
            assert tracked.log_posterior[1:].std() > 0
        # After the only step, which adds no noise, nothing has been learned but by Euler's.
        assert torch.isfinite(tracked.final_log_posterior).all()


def changed(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {"latents": kwargs["latents"] + 0.5}


def in_place(kwargs: dict[str, Any]) -> dict[str, Any]:
    kwargs["latents"].add_(0.5)
    return kwargs


def of_an_image(kwargs: dict[str, Any]) -> dict[str, Any]:
    kwargs["latents"][1] *= 1.5
    return kwargs


def kept(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {"latents": kwargs["latents"].clone()}


@pytest.mark.parametrize("change", [changed, in_place, of_an_image, kept])
def test_callbacks_that_change_latents(
    pipe: Any, change: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    def callback(pipe: Any, step: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        return change(kwargs) if step < 2 else kwargs

    with apply_guidance(pipe, RULE) as trace:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            run(pipe, callback_on_step_end=callback)
        words = [str(w.message) for w in said]
        assert len(words) == (change is not kept)
        assert all("the latents were changed before step 1" in w for w in words)
        plain = run(pipe)  # without a word
        np.testing.assert_allclose(trace.runs[0].log_posterior[1], trace.runs[1].log_posterior[1])
        assert torch.isfinite(plain).all()
    # Who tracks nothing has nothing to be wrong about.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        guided(pipe, NegativePrompting(1.0), {}, callback_on_step_end=callback)


@pytest.mark.parametrize("kind", ["DDPM", "DPMSolver", "Euler"])
@pytest.mark.filterwarnings("ignore:.*adds no noise")
def test_timesteps_of_the_call(pipe: Any, kind: str) -> None:
    scheduler, config = STARTS[kind]
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, **config)
    call: dict[str, Any] = {"timesteps": [901, 601, 201, 51]}
    plain = run(pipe, guidance_scale=3.0, **call)
    found, trace = guided(pipe, tracked_dng(20, 1 / 11, temperature=0.0), {}, **call)
    assert apart(found, plain) < CLOSE
    assert trace.timesteps.tolist() == call["timesteps"]
    assert trace.runs[0].steps == [0, 1, 2, 3]


def test_a_call_of_several_runs(pipe_of: Callable[[str], Any]) -> None:
    """FreeInit makes a video, adds new high frequencies to it, and makes it again."""
    name = "AnimateDiffPipeline"
    pipe = pipe_of(name)
    pipe.enable_free_init(num_iters=2)
    own, trace = of_family(name, pipe, RULE, {}, negative_prompt="egg")
    assert [record.steps for record in trace.runs] == [[0, 1, 2]] * 2
    for record in trace.runs:
        np.testing.assert_allclose(record.log_posterior[0].exp(), 0.05, rtol=1e-5)
    listed, _ = of_family(name, pipe, RULE, {"negative_prompts": ["egg"]}, negative_prompt="tea")
    assert apart(listed, own) < CLOSE


def test_a_call_within_a_call(pipe: Any) -> None:
    def again(pipe: Any, step: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        run(pipe)
        return kwargs

    with apply_guidance(pipe, RULE):
        expected = run(pipe)
        with pytest.raises(ValueError, match="must not be called again while a guided call"):
            run(pipe, callback_on_step_end=again)
        assert torch.equal(run(pipe), expected)


def test_a_callback_that_interrupts(pipe: Any) -> None:
    def stop(pipe: Any, step: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step >= 1
        return kwargs

    with apply_guidance(pipe, RULE) as trace:
        expected = run(pipe)
        stopped = run(pipe, callback_on_step_end=stop)
        again = run(pipe)
    assert [record.steps for record in trace.runs] == [[0, 1, 2, 3], [0, 1], [0, 1, 2, 3]]
    assert torch.equal(again, expected) and apart(stopped, expected) > FAR
    # What is known after the second step is what the third one began with.
    torch.testing.assert_close(
        trace.runs[1].final_log_posterior, trace.runs[0].log_posterior[2], rtol=0, atol=0
    )


# ---------------------------------------------------------------------- wrapped networks


class Wrapped(torch.nn.Module):  # type: ignore[misc]
    """As DataParallel and its like: all arguments are handed on, names are those of the inside."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        return self.module(*inputs, **kwargs)


def with_lora(network: Any) -> Any:
    import peft

    torch.manual_seed(3)
    config = {"r": 4, "init_lora_weights": False, "target_modules": ["to_k", "to_q", "to_v"]}
    return peft.get_peft_model(network, peft.LoraConfig(**config))


def by_name(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
    return (), {**dict(zip(("sample", "timestep"), args, strict=True)), **kwargs}


def by_place(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
    rest = {k: v for k, v in kwargs.items() if k != "encoder_hidden_states"}
    return (*args, kwargs["encoder_hidden_states"]), rest


def as_object(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
    return args, {**kwargs, "return_dict": True}


@pytest.mark.parametrize("way", [None, by_name, by_place, as_object])
@pytest.mark.parametrize("wrapper", [None, Wrapped, with_lora])
@pytest.mark.thinned(3)
def test_wrappers_and_ways_to_call_a_network(pipe: Any, wrapper: Any, way: Any) -> None:
    if wrapper is with_lora:
        # PEFT changes the network itself.
        inner, pipe.unet = pipe.unet, with_lora(pipe.unet)
        wrapped, pipe.unet = pipe.unet, inner
    else:
        wrapped = pipe.unet if wrapper is None else wrapper(pipe.unet)
    options: dict[str, Any] = {"negative_prompts": ["egg", "tea"], "cfg_scale": 3.0}
    calls = [(RULE, {}), (RULE, options)]
    expected = [guided(pipe, rule, dict(given))[0] for rule, given in calls]
    plain = run(pipe)
    pipe.unet = wrapped
    if way is not None:
        pipe.unet.register_forward_pre_hook(lambda m, a, k: way(a, k), with_kwargs=True)
    before = dict(vars(pipe.unet))
    for (rule, given), by_itself in zip(calls, expected, strict=True):
        assert apart(guided(pipe, rule, dict(given))[0], by_itself) < CLOSE
    assert vars(pipe.unet) == before
    assert apart(run(pipe), plain) < CLOSE


def test_arguments_of_a_call_by_place(pipe: Any) -> None:
    def latents(negative: str) -> Any:
        # prompt, height, width, steps, timesteps, sigmas, scale, negative, images
        call = (PROMPT, 16, 16, STEPS, None, None, 7.5, negative, 2)
        return pipe(*call, generator=gens(0, 1), output_type="latent", return_dict=False)[0]

    own, _ = guided(pipe, RULE, {})
    with apply_guidance(pipe, RULE):
        assert torch.equal(latents(NEGATIVE), own)
    with apply_guidance(pipe, RULE, negative_prompts=[NEGATIVE]):
        assert apart(latents("tea"), own) < CLOSE


def test_a_class_whose_call_hands_everything_on(pipe: Any) -> None:
    class Counting(StableDiffusionPipeline):
        calls = 0

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            type(self).calls += 1
            return super().__call__(*args, **kwargs)

    own = [guided(pipe, RULE, options)[0] for options in ({}, {"negative_prompts": ["egg"]})]
    counting = Counting(**pipe.components, requires_safety_checker=False)
    counting.set_progress_bar_config(disable=True)
    call = {"negative_prompt": NEGATIVE, "num_inference_steps": STEPS, "output_type": "latent"}
    for options, expected in zip(({}, {"negative_prompts": ["egg"]}), own, strict=True):
        with apply_guidance(counting, RULE, **options):
            found = counting(PROMPT, generator=gens(0, 1), num_images_per_prompt=2, **call)
        assert torch.equal(found.images, expected)


@pytest.mark.slow
def test_a_compiled_network_and_added_prompts(pipe: Any) -> None:
    options: dict[str, Any] = {"negative_prompts": ["egg", "tea"], "cfg_scale": 3.0}
    expected, _ = guided(pipe, RULE, options, num_inference_steps=2)
    torch._dynamo.reset()
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    assert apart(guided(pipe, RULE, options, num_inference_steps=2)[0], expected) < CLOSE


@pytest.mark.parametrize("as_tuple", [False, True])
def test_answers_of_any_kind_without_prompts(as_tuple: bool) -> None:
    class OwnLoop(diffusers.DDPMPipeline):
        """The usual ten lines, with a network called by name or by place."""

        @torch.no_grad()
        def __call__(self, generator: Any, by_name: bool = False) -> Any:
            x = torch.randn(2, 3, 16, 16, generator=generator)
            self.scheduler.set_timesteps(STEPS)
            for t in self.scheduler.timesteps:
                given = ((), {"sample": x, "timestep": t}) if by_name else ((x, t), {})
                out = self.unet(*given[0], **given[1], return_dict=not as_tuple)
                assert isinstance(out, tuple) == as_tuple
                made = out[0] if as_tuple else out.sample
                x = self.scheduler.step(made, t, x, generator=generator)[0]
            return x

    stock = tiny.tiny_ddpm(0)
    pipe = OwnLoop(unet=stock.unet, scheduler=DDPMScheduler(clip_sample=False))
    unwanted = tiny.tiny_unet(1)
    plain = pipe(gens(0)[0])
    with apply_guidance(pipe, tracked_dng(3.0, 0.1), unwanted=unwanted) as trace:
        found = [pipe(gens(0)[0], by_name=by_name) for by_name in (False, True)]
    assert torch.equal(*found)
    assert apart(found[0], plain) > FAR
    assert torch.equal(trace.runs[0].log_posterior, trace.runs[1].log_posterior)


# ---------------------------------------------------------------------- refusals and their reasons


def seen_by(pipe: Any, network: Any, call: Callable[[], Any]) -> list[Any]:
    """Latents that a pipeline's own call shows its network."""
    shapes: list[Any] = []
    forward = network.forward

    @functools.wraps(forward)
    def watched(*args: Any, **kwargs: Any) -> Any:
        shapes.append(args[0] if args else kwargs.get("sample", kwargs.get("hidden_states")))
        return forward(*args, **kwargs)

    network.forward = watched
    try:
        call()
    finally:
        del network.forward
    return shapes


def nearest(message: str) -> str:
    return message.rpartition("The nearest that can be is ")[2].split()[0]


def test_perturbed_attention_is_guided_too(pipe: Any) -> None:
    parts = {**pipe.components, "pag_applied_layers": ["mid"]}
    pag = made("StableDiffusionPAGPipeline", parts, requires_safety_checker=False)
    scales = (0.0, 3.0)
    stock = [run(pag, guidance_scale=3.0, pag_scale=scale) for scale in scales]
    assert apart(*stock) > FAR
    for scale, plain in zip(scales, stock, strict=True):
        found, _ = guided(pag, NegativePrompting(2.0), {}, pag_scale=scale)
        assert apart(found, plain) < CLOSE
        own, _ = guided(pag, RULE, {}, pag_scale=scale)
        options = {"negative_prompts": [NEGATIVE]}
        listed, _ = guided(pag, RULE, options, negative_prompt="tea", pag_scale=scale)
        assert apart(listed, own) < CLOSE


def test_perturbed_attention_does_not_stay(pipe: Any) -> None:
    parts = {**pipe.components, "pag_applied_layers": ["mid"]}
    pag = made("StableDiffusionPAGPipeline", parts, requires_safety_checker=False)
    before, plain = pag.unet.attn_processors, run(pipe)
    run(pag, pag_scale=3.0)
    assert pag.unet.attn_processors == before
    for options in ({}, {"negative_prompts": ["egg"]}):
        guided(pag, RULE, options, pag_scale=3.0)
        assert pag.unet.attn_processors == before
    # The network serves another pipeline too, which knows of no such attention.
    assert torch.equal(run(pipe), plain)


def test_windows_of_a_panorama(pipe: Any) -> None:
    pano = made("StableDiffusionPanoramaPipeline", pipe.components, requires_safety_checker=False)
    with pytest.raises(ValueError, match="sees overlapping windows, whose predictions") as refusal:
        apply_guidance(pano, RULE)
    assert nearest(str(refusal.value)) == "StableDiffusionPipeline"
    # Windows of 64 x 64 latents, 8 apart: two of them here, in each of two steps.
    size = {"height": 512, "width": 576, "num_inference_steps": 2}
    ddim(pano)
    shown = seen_by(pano, pano.unet, lambda: run(pano, seeds=(0,), view_batch_size=1, **size))
    assert len(shown) == 4 and {tuple(x.shape[2:]) for x in shown} == {(64, 64)}


def test_a_text_and_a_picture_at_once() -> None:
    parts = sd(in_channels=8)
    pipe = made("StableDiffusionInstructPix2PixPipeline", parts)
    with pytest.raises(ValueError, match="in three parts of its batch.*nearest") as refusal:
        apply_guidance(pipe, RULE)
    assert isinstance(LAYOUTS[nearest(str(refusal.value))], Layout)
    call = functools.partial(run, pipe, seeds=(0,), image=picture())
    shown = seen_by(pipe, pipe.unet, call)
    assert len(shown) == STEPS and {len(x) for x in shown} == {3}


def test_a_picture_side_by_side(pipe_of: Callable[[str], Any]) -> None:
    name = "DreamLitePipeline"
    pipe = pipe_of(name)
    with pytest.raises(ValueError, match="latents and a picture side by side.*nearest") as refusal:
        apply_guidance(pipe, RULE)
    assert isinstance(LAYOUTS[nearest(str(refusal.value))], Layout)
    made_of: list[Any] = []

    def stock() -> None:
        made_of.append(final_latents(pipe, FAMILIES[name]))

    shown = seen_by(pipe, pipe.unet, stock)
    assert shown[0].shape[-1] == 2 * made_of[0].shape[-1]


def test_attention_to_oneself_takes_another_call(pipe: Any) -> None:
    sag = made("StableDiffusionSAGPipeline", pipe.components, requires_safety_checker=False)
    with pytest.raises(ValueError, match="calls its network once more in every step") as refusal:
        apply_guidance(sag, RULE)
    assert isinstance(LAYOUTS[nearest(str(refusal.value))], Layout)
    ddim(sag)
    shown = seen_by(sag, sag.unet, lambda: run(sag, seeds=(0,), sag_scale=0.75))
    assert [len(x) for x in shown] == [2, 1] * STEPS


def test_skipped_layers_take_another_call(pipe_of: Callable[[str], Any]) -> None:
    pipe = pipe_of("sd3")
    skipping: dict[str, Any] = {"skip_guidance_layers": [0], "skip_layer_guidance_start": 0.0}
    skipping["skip_layer_guidance_stop"] = 0.9
    with apply_guidance(pipe, RULE) as trace:
        with pytest.raises(ValueError, match="skip_guidance_layers of the pipeline's call must be"):
            run(pipe, **skipping)
        run(pipe)
    assert len(trace.runs) == 1
    shown = seen_by(pipe, pipe.transformer, lambda: run(pipe, **skipping))
    assert len(shown) > STEPS


@pytest.mark.parametrize("name", ["sd", "xl"])
def test_predictions_that_are_rescaled(pipe_of: Callable[[str], Any], name: str) -> None:
    pipe = pipe_of(name)
    with apply_guidance(pipe, RULE) as trace:
        with pytest.raises(ValueError, match="guidance_rescale of the pipeline's call must be 0.0"):
            run(pipe, guidance_rescale=0.7)
        assert trace.runs == []
        run(pipe, guidance_rescale=0.0)
    plain = [run(pipe, guidance_scale=5.0, guidance_rescale=value) for value in (0.0, 0.7)]
    assert apart(*plain) > FAR


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"negative_prompt": ""}, "must be given, and not be empty"),
        ({"negative_prompt": [NEGATIVE, " "], "prompt": ["a", "b"]}, "prompt 1 has none"),
        ({"prompt": 3}, "`prompt` has to be of type"),
    ],
)
def test_a_refused_call_leaves_the_last_good_one(
    pipe: Any, tmp_path: Any, options: dict[str, Any], message: str
) -> None:
    with apply_guidance(pipe, RULE) as trace:
        with pytest.raises(ValueError, match=message):
            run(pipe, **options)
        with pytest.raises(ValueError, match="trace must have a run"):
            trace.plot(tmp_path / "none.png")
        run(pipe)
        good, scale = trace.last, trace.scale
        with pytest.raises(ValueError, match=message):
            run(pipe, **options)
        # A call may also fail after its first prediction, before its first step.
        taken = pipe.scheduler.step

        def broken(*args: Any, **kwargs: Any) -> Any:
            raise OSError("no room")

        pipe.scheduler.step = functools.wraps(taken)(broken)
        with pytest.raises(OSError, match="no room"):
            run(pipe)
        assert vars(pipe.scheduler).pop("step").__wrapped__ == taken
    assert trace.runs == [good] and trace.last is good
    assert torch.equal(trace.scale, scale)
    trace.plot(tmp_path / "scale.png")
    with Image.open(tmp_path / "scale.png") as drawn:
        assert drawn.size[0] > 400
    assert repr(trace) == "Trace(1 runs; last: DDPMScheduler, 4 steps)"


# ---------------------------------------------------------------------- DDIM's eta


def test_the_eta_of_a_call(pipe: Any) -> None:
    ancestral, reference = guided(pipe, RULE, {})
    ddim(pipe, set_alpha_to_one=True)
    with pytest.warns(UserWarning, match=r"DDIMScheduler adds no noise \(eta = 0,"):
        guided(pipe, RULE, {})
    with pytest.warns(UserWarning, match=r"DDIMScheduler adds no noise \(eta = 0,"):
        guided(pipe, RULE, {"eta": 0.0}, eta=0.0)
    for options in ({}, {"eta": 1.0}):  # with the noise of DDPM there is nothing to be said
        found, trace = guided(pipe, RULE, options, eta=1.0)
        assert apart(found, ancestral) < FAR
        np.testing.assert_allclose(trace.log_posterior, reference.log_posterior, atol=1e-3)
    for told, given in ((0.0, {"eta": 1.0}), (1.0, {}), (0.5, {"eta": 1.0})):
        with apply_guidance(pipe, RULE, eta=told) as trace:
            with pytest.raises(ValueError, match=f"eta must be what .* got {told:g}"):
                run(pipe, **given)
            assert trace.runs == []


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_eta_is_read_and_not_guessed_from_latents(pipe: Any, eta: float) -> None:
    """A callback that adds noise, or takes the mean off, says nothing of the sampler."""
    ddim(pipe, set_alpha_to_one=True)

    def noisy(pipe: Any, step: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        x = kwargs["latents"]
        if step == 0:
            noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
            kwargs["latents"] = x + 0.5 * noise
        return kwargs

    def centred(pipe: Any, step: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        x = kwargs["latents"]
        return {"latents": x - x.mean(dim=(2, 3), keepdim=True)} if step == 0 else kwargs

    for callback in (None, noisy, centred):
        traces = []
        for options in ({}, {"eta": eta}):
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                _, trace = guided(pipe, RULE, options, eta=eta, callback_on_step_end=callback)
            words = [str(w.message) for w in said]
            assert sum("adds no noise (eta = 0," in w for w in words) == (eta == 0.0)
            assert sum("latents were changed" in w for w in words) == (callback is not None)
            traces.append(trace.log_posterior)
        assert torch.equal(*traces)


# ---------------------------------------------------------------------- pictures as prompts


def ip_adapter(pipe: Any) -> Any:
    """Load an IP-Adapter of random weights into the pipeline's network."""
    unet = pipe.unet
    generator = torch.Generator().manual_seed(4)
    width, tokens, cross = 32, 4, unet.config.cross_attention_dim

    def drawn(*shape: int) -> Any:
        return 0.3 * torch.randn(shape, generator=generator)

    weights, number = {}, 1
    for name in unet.attn_processors:
        if name.endswith("attn2.processor"):
            hidden = 32
            weights[f"{number}.to_k_ip.weight"] = drawn(hidden, cross)
            weights[f"{number}.to_v_ip.weight"] = drawn(hidden, cross)
            number += 2
    projection = {
        "proj.weight": drawn(tokens * cross, width),
        "proj.bias": drawn(tokens * cross),
        "norm.weight": torch.ones(cross),
        "norm.bias": torch.zeros(cross),
    }
    state = {"image_proj": projection, "ip_adapter": weights}
    unet._load_ip_adapter_weights([state], low_cpu_mem_usage=False)
    return pipe


@pytest.mark.parametrize("name", ["sd", "xl"])
def test_an_adapter_for_pictures(pipe_of: Callable[[str], Any], name: str) -> None:
    pipe = ip_adapter(pipe_of(name))
    generator = torch.Generator().manual_seed(6)
    nothing, shown = torch.zeros(1, 1, 32), torch.randn(1, 1, 32, generator=generator)
    call = {"ip_adapter_image_embeds": [torch.cat([nothing, shown])]}
    pipe.set_ip_adapter_scale(0.8)
    plain = run(pipe, negative_prompt=None, guidance_scale=3.0, **call)
    other = {"ip_adapter_image_embeds": [torch.cat([nothing, -shown])]}
    assert apart(run(pipe, negative_prompt=None, guidance_scale=3.0, **other), plain) > FAR
    for rule in (tracked_dng(0.0), Unguided()):
        zero, _ = guided(pipe, rule, {"cfg_scale": 3.0}, **call)
        assert apart(zero, plain) < CLOSE
    own, trace = guided(pipe, RULE, {}, **call)
    with shown_to(pipe.unet) as calls:
        options: dict[str, Any] = {"negative_prompts": [NEGATIVE]}
        listed, same = guided(pipe, RULE, options, negative_prompt="tea", **call)
    assert apart(listed, own) < CLOSE
    torch.testing.assert_close(same.log_posterior[:, 0], trace.log_posterior, rtol=1e-4, atol=1e-4)
    # What is unwanted has the negative prompt's picture: none.
    rows = calls[-1]["added_cond_kwargs"]["image_embeds"][0]
    assert torch.equal(rows, torch.cat([shown, shown, nothing, nothing]))
    options["negative_prompts"] = ["egg", "tea"]
    two, trace = guided(pipe, RULE, {**options, "cfg_scale": 3.0}, **call)
    assert torch.isfinite(two).all() and trace.evaluations == 4 * STEPS


# ---------------------------------------------------------------------- rules beside a negative

USERS = "blurry"


def expected_of(rule: Any, p: Any, n: Any, u: Any, scale: float) -> np.ndarray:
    """The guided prediction at the first step, of positive, unwanted and the user's negative."""
    base = textbook.cfg(u, p, scale)
    if isinstance(rule, PerpNeg):
        return textbook.perp_neg(u, n, p - u, 1.5) + scale * (p - u)
    pushed = {
        NegativePrompting: lambda: textbook.negative_prompting(p, n, 1.5),
        SafeLatentDiffusion: lambda: textbook.sld(p, n, np.zeros_like(p), 0, 1.5, 0.01)[0],
        ContrastiveCFG: lambda: textbook.contrastive_cfg(p, n, 1.5, 1e-2),
        DynamicNegativeGuidance: lambda: textbook.dng(p, n, np.full(len(p), 0.1), 20.0),
        Unguided: lambda: p,
    }[type(rule)]()
    return base + (pushed - p)


@pytest.mark.parametrize(
    "rule",
    [
        NegativePrompting(1.5),
        SafeLatentDiffusion(1.5, threshold=0.01),
        ContrastiveCFG(1.5, 1e-2),
        PerpNeg(1.5, 4.0),
        tracked_dng(20.0, 0.1),
        Unguided(),
    ],
    ids=lambda rule: type(rule).__name__,
)
def test_one_unwanted_concept_beside_the_users_negative(pipe: Any, rule: Any) -> None:
    options: dict[str, Any] = {"negative_prompts": ["egg"]}
    if not isinstance(rule, PerpNeg):
        options["cfg_scale"] = 4.0
    with answers_of(pipe.unet) as answers:
        _, trace = guided(pipe, rule, options, negative_prompt=USERS)
    shown, t, found = answers[0]
    p, n, u, nothing = predictions(pipe, shown[:2], t, PROMPT, "egg", USERS, "")
    assert torch.equal(found[:2], found[2:])
    np.testing.assert_allclose(found[:2], expected_of(rule, p, n, u, 4.0), atol=CLOSE)
    # It is the user's negative and no empty one.
    wrong = expected_of(rule, p, n, nothing, 4.0)
    assert np.abs(found[:2].numpy() - wrong).max() > FAR
    assert trace.scale.shape == (STEPS, 2)
    if not isinstance(rule, DynamicNegativeGuidance | Unguided):
        with pytest.raises(ValueError, match="only DNG gives each"):
            apply_guidance(pipe, rule, negative_prompts=["egg", "tea"])


def test_rules_that_lead_have_no_concept_of_their_own(pipe: Any) -> None:
    with pytest.raises(ValueError, match="concepts must be None for ClassifierFreeGuidance"):
        apply_guidance(pipe, ClassifierFreeGuidance(3.0), negative_prompts=["egg"])


@pytest.mark.parametrize("cfg_scale", [None, 4.0])
def test_a_rule_for_each_negative(pipe: Any, cfg_scale: float | None) -> None:
    """base - sum_k g_k p_k (eps_k - eps) / (1 - sum_j p_j), at every step."""
    rules = [
        tracked_dng(30, 0.02, temperature=0.5),
        tracked_dng(9, 0.2, temperature=0.1),
    ]
    texts = ["egg", "tea"]
    with answers_of(pipe.unet) as answers:
        _, trace = guided(
            pipe,
            rules,
            {"negative_prompts": texts, "cfg_scale": cfg_scale},
            negative_prompt=USERS,
        )
    np.testing.assert_allclose(trace.log_posterior[0, :, 0].exp(), [0.02, 0.2], rtol=1e-5)
    assert np.abs(np.diff(trace.log_posterior, axis=0)).max() > 0.05
    strengths = np.array([30.0, 9.0])[:, None]
    for step, (shown, t, found) in enumerate(answers):
        eps, user, *others = predictions(pipe, shown[:2], t, PROMPT, USERS, *texts)
        posteriors = np.exp(trace.log_posterior[step].double().numpy())
        scales = strengths * posteriors / (1.0 - posteriors.sum(0))
        base = eps if cfg_scale is None else textbook.cfg(user, eps, cfg_scale)
        pushes = [
            textbook.per_sample(scale, eps) * (other - eps)
            for scale, other in zip(scales, others, strict=True)
        ]
        np.testing.assert_allclose(found[:2], base - sum(pushes), rtol=1e-5, atol=2e-5)
        np.testing.assert_allclose(trace.scale[step], scales.sum(0), rtol=1e-4)
    # Each by itself, in another order: it is the same guidance.
    again, _ = guided(pipe, rules[::-1], {"negative_prompts": texts[::-1]}, negative_prompt=USERS)
    first, _ = guided(pipe, rules, {"negative_prompts": texts}, negative_prompt=USERS)
    assert apart(again, first) < CLOSE
    for bad, message in (
        (rules[:1], "one for each unwanted concept, 2, got 1"),
        ([rules[0], NegativePrompting(1.0)], "must be DynamicNegativeGuidance for each concept"),
    ):
        with pytest.raises(ValueError, match=message):
            apply_guidance(pipe, bad, negative_prompts=texts)
    with pytest.raises(TypeError, match="give apply_guidance a rule for each"):
        tracked_dng(18, prior=[0.01, 0.1])  # type: ignore[arg-type]


# ---------------------------------------------------------------------- one run in two halves


@pytest.mark.parametrize("several", [False, True])
def test_two_halves_of_a_run(pipe_of: Callable[[str], Any], several: bool) -> None:
    """A base and a refiner that is the same network: what one knew the other goes on with."""
    base = pipe_of("xl")
    refiner = made("StableDiffusionXLImg2ImgPipeline", base.components, add_watermarker=False)
    options: dict[str, Any] = {"negative_prompts": ["egg", "tea"]} if several else {}
    call: dict[str, Any] = {"num_inference_steps": 6}
    whole, trace = guided(base, RULE, options, **call)
    generators = gens(0, 1)
    call["generator"] = generators
    with apply_guidance(base, RULE, **options) as first:
        half = run(base, denoising_end=0.5, **call)
    known = first.final_log_posterior
    given = {**options, "initial_log_posterior": known}
    later = {**call, "image": half, "denoising_start": 0.5}
    with apply_guidance(refiner, RULE, **given) as second:
        found = run(refiner, **later)
    assert [first.last.steps, second.last.steps] == [[0, 1], [2, 3, 4, 5]]
    torch.testing.assert_close(known, trace.log_posterior[2], rtol=1e-5, atol=1e-5)
    joined = torch.cat([first.log_posterior, second.log_posterior])
    torch.testing.assert_close(joined, trace.log_posterior, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        second.final_log_posterior, trace.final_log_posterior, rtol=1e-4, atol=1e-4
    )
    assert apart(found, whole) < CLOSE
    # Without it the second half begins with the prior.
    anew, _ = guided(refiner, RULE, options, **{**later, "generator": gens(0, 1)})
    told, _ = guided(refiner, RULE, given, **{**later, "generator": gens(0, 1)})
    assert apart(anew, told) > FAR


def test_what_a_run_cannot_begin_with(pipe: Any) -> None:
    start = torch.full((2,), -3.0)
    found, trace = guided(pipe, RULE, {"initial_log_posterior": start})
    np.testing.assert_allclose(trace.log_posterior[0], start)
    own, _ = guided(pipe, tracked_dng(40, prior=float(np.exp(-3.0))), {})
    assert apart(found, own) < CLOSE
    # Of a whole record the last step is taken.
    recorded = torch.stack([start - 1.0, start])
    assert torch.equal(guided(pipe, RULE, {"initial_log_posterior": recorded})[0], found)
    pair = {"negative_prompts": ["egg", "tea"]}
    cases: list[tuple[Any, dict[str, Any], Any, type[Exception], str]] = [
        (RULE, {}, [-3.0, -3.0], TypeError, "must be a tensor of floating-point numbers"),
        (RULE, {}, torch.tensor([-3, -3]), TypeError, "must be a tensor of floating-point"),
        (RULE, {}, torch.tensor([-3.0, 0.1]), ValueError, "must be at most 0.*got up to 0.1"),
        (RULE, {}, torch.tensor([-3.0, np.nan]), ValueError, "must be at most 0"),
        (RULE, {}, torch.tensor(-3.0), ValueError, r"must have shape \(B,\).*got \(\)"),
        (RULE, pair, start, ValueError, r"must have shape \(2, B\)"),
        (RULE, pair, start.expand(3, 2), ValueError, r"must have shape \(2, B\).*got \(3, 2\)"),
        (NegativePrompting(1.0), {}, start, ValueError, "must be None for Neg.* tracks none"),
    ]
    for rule, options, given, error, message in cases:
        with pytest.raises(error, match=f"initial_log_posterior {message}"):
            apply_guidance(pipe, rule, initial_log_posterior=given, **options)
    for rows in (1, 3):  # which only the call can tell
        with pytest.raises(ValueError, match=r"must have shape \(2,\) in this run, got"):
            guided(pipe, RULE, {"initial_log_posterior": torch.full((rows,), -3.0)})


# ---------------------------------------------------------------------- one network for both


def test_another_label_of_the_network_itself() -> None:
    torch.manual_seed(0)
    network = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(16, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        norm_num_groups=8,
        num_class_embeds=11,
    ).eval()

    class Conditional(diffusers.DDPMPipeline):
        """The usual ten lines: a network that takes labels."""

        @torch.no_grad()
        def __call__(self, labels: Any, generator: Any) -> Any:
            x = torch.randn(len(labels), 1, 8, 8, generator=generator)
            self.scheduler.set_timesteps(STEPS)
            for t in self.scheduler.timesteps:
                made = self.unet(x, t, class_labels=labels).sample
                x = self.scheduler.step(made, t, x, generator=generator).prev_sample
            return x

    pipe = Conditional(unet=network, scheduler=DDPMScheduler(clip_sample=False))
    anyone, rule = torch.tensor([10, 10]), tracked_dng(5.0, prior=0.1)
    plain = pipe(anyone, gens(0)[0])

    def tracked(unwanted: Any) -> tuple[Any, Any]:
        with apply_guidance(pipe, rule, unwanted=unwanted) as trace:
            return pipe(anyone, gens(0)[0]), trace.log_posterior

    own, posterior = tracked(Labelled(pipe.unet, 3))
    copied, same = tracked(Labelled(copy.deepcopy(pipe.unet), 3))
    assert apart(own, copied) < CLOSE
    torch.testing.assert_close(posterior, same, rtol=1e-4, atol=1e-4)
    assert apart(own, plain) > FAR
    _, none = tracked(Labelled(pipe.unet, 10))
    np.testing.assert_allclose(none.exp(), 0.1, rtol=1e-4)
    several, each = tracked([Labelled(pipe.unet, 3), Labelled(pipe.unet, 4)])
    np.testing.assert_allclose(each[1, 0], posterior[1], atol=0.5)
    assert apart(several, own) > FAR
    assert torch.equal(pipe(anyone, gens(0)[0]), plain)


# ---------------------------------------------------------------------- autocast


def test_sums_are_kept_from_autocast(pipe: Any) -> None:
    """With a network that is kept from it too, there is no rounding left."""
    forward = pipe.unet.forward

    @functools.wraps(forward)
    def exact(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", enabled=False):
            return forward(*args, **kwargs)

    pipe.unet.forward = exact
    text, unwanted, more = (
        pipe.encode_prompt(each, "cpu", 1, False)[0].detach() for each in (PROMPT, NEGATIVE, "tea")
    )
    call: dict[str, Any] = {"prompt": None, "negative_prompt": None, "prompt_embeds": text}
    call["negative_prompt_embeds"] = unwanted
    for options in ({}, {"negative_prompts": [unwanted, more], "cfg_scale": 3.0}):
        expected, exactly = guided(pipe, RULE, options, **call)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found, trace = guided(pipe, RULE, options, **call)
        assert apart(found, expected) < CLOSE
        assert trace.log_posterior.dtype == torch.float32
        np.testing.assert_allclose(trace.log_posterior, exactly.log_posterior, atol=1e-5)
        assert exactly.log_posterior.std() > 0.05


def test_networks_under_autocast(pipe: Any) -> None:
    if not attends_in_bfloat16():
        pytest.skip("this torch cannot attend in bfloat16 on this CPU")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = run(pipe, guidance_scale=3.0)
        found, _ = guided(pipe, NegativePrompting(2.0), {})
        listed, _ = guided(pipe, RULE, {"negative_prompts": [NEGATIVE]}, negative_prompt="tea")
        own, _ = guided(pipe, RULE, {})
    assert found.dtype == plain.dtype
    assert apart(found, plain) < 3e-2
    assert apart(listed, own) < 3e-2


def test_no_derivative_under_autocast(pipe: Any) -> None:
    ddim(pipe)
    with apply_guidance(pipe, RULE, divergence_probes=1) as trace:
        with (
            torch.autocast("cpu", dtype=torch.bfloat16),
            pytest.raises(ValueError, match="divergence_probes must be 0 under torch.autocast"),
        ):
            run(pipe)
        assert trace.runs == []
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=False):
            expected = run(pipe)
        assert torch.equal(run(pipe), expected)
    assert torch.isfinite(trace.log_posterior).all() and trace.log_posterior.std() > 0
    # The reason is torch's own: casts have no forward derivative.
    network = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 1), torch.nn.GroupNorm(2, 4))
    network.append(torch.nn.Conv2d(4, 4, 1))
    x = torch.ones(1, 4, 4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        with pytest.raises(RuntimeError, match="(?i)bfloat16"):
            torch.func.jvp(network, (x,), (x,))
