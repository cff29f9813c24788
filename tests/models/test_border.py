"""The border of dng_models: bad input is refused where it is given, by name and value.

A table of bad arguments of the public functions outside of class removal.  Each must end in a
TypeError or ValueError that names the argument, says what it must be, and shows what it was.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

import dng_models
from dng_math import (
    DDPM,
    ClassifierFreeGuidance,
    DynamicNegativeGuidance,
    GaussianMixture,
    LimitedInterval,
    LogOddsTracker,
    NegativePrompting,
    NoiseSchedule,
    PaperTracker,
    PerpNeg,
    SafeLatentDiffusion,
    Unguided,
)
from dng_models import apply_guidance, sample
from dng_models.pairs.sampling import timesteps
from dng_models.pipelines import guider as guider_module
from dng_models.pipelines import tiny
from dng_models.pipelines.guided_chain import GuidedChain
from dng_models.pipelines.layouts import Layout
from dng_models.pipelines.mixture_denoiser import MixtureDenoiser
from dng_models.pipelines.mixture_pipelines import mixture_pipeline, run_mixture
from dng_models.pipelines.trace import Trace
from dng_models.pipelines.transitions import scheduler_run, transition
from dng_models.text_to_image import prompts, scores
from dng_models.text_to_image.config import Config
from dng_models.text_to_image.prompts import Prompt

SURROGATE = "half of a \ud83d"
NAN, INF = math.nan, math.inf
RULE = DynamicNegativeGuidance.tracked()
TEXTS = {"name": "a", "prompt": "b", "related": "c", "unrelated": "d"}
MIXTURE = GaussianMixture([0.5, 0.5], [[1.0] * 8, [-1.0] * 8], [1.0, 1.0])


def still(x: Any, t: Any) -> Any:
    return 0.0 * x


class Pipes:
    """Tiny pipelines, each built once."""

    def __init__(self) -> None:
        self.built: dict[str, Any] = {}

    def __call__(self, name: str) -> Any:
        if name not in self.built:
            self.built[name] = getattr(tiny, f"tiny_{name}")()
            self.built[name].set_progress_bar_config(disable=True)
        dng_models.remove_guidance(self.built[name])
        return self.built[name]


PIPES = Pipes()


# ---------------------------------------------------------------------- functions


def guided(pipe: str = "stable_diffusion", rule: Any = RULE, **options: Any) -> None:
    apply_guidance(PIPES(pipe), rule, **options)


def called(
    rule: Any = RULE,
    options: dict[str, Any] | None = None,
    pipe: str = "stable_diffusion",
    **call: Any,
) -> None:
    """A guided call of a pipeline."""
    given = {"prompt": "tea", "negative_prompt": "egg", "num_inference_steps": 2, **call}
    with apply_guidance(PIPES(pipe), rule, **(options or {})):
        PIPES.built[pipe](**given, output_type="latent")


def ddpm_called(unwanted: Any) -> None:
    pipe = PIPES("ddpm")
    with apply_guidance(pipe, RULE, unwanted=unwanted):
        pipe(num_inference_steps=2)


def sampled(base: Any = still, unwanted: Any = still, rule: Any = RULE, **options: Any) -> None:
    given = {"shape": (2,), "num_images": 2, "steps": 2, "batch_size": 2, **options}
    sample(base, unwanted, rule, **given)


def guider(**options: Any) -> Any:
    if guider_module.GuiderOutput is None:
        pytest.skip("diffusers 0.35 has guiders of another interface")
    return dng_models.DynamicNegativeGuider(**options)


def set_in_guider(method: str, **options: Any) -> None:
    getattr(guider(), method)(**options)


def shown_to_guider(**options: Any) -> None:
    scheduler = DDPMScheduler()
    scheduler.set_timesteps(2)
    x = torch.zeros(1, 4, 2, 2)
    given = {"scheduler": scheduler, "latents": x, "timestep": scheduler.timesteps[0], **options}
    guider().show_latents(**given)


def pipeline(kind: str = "DNGStableDiffusionPipeline", **call: Any) -> None:
    """A call of a pipeline that takes guidance."""
    name = "ddpm" if kind == "DNGDDPMPipeline" else "stable_diffusion"
    pipe = PIPES(name)
    if name == "ddpm":
        made = dng_models.DNGDDPMPipeline(pipe.unet, pipe.scheduler, unwanted_unet=pipe.unet)
        given: dict[str, Any] = {"num_inference_steps": 2}
    else:
        made = dng_models.DNGStableDiffusionPipeline(
            **pipe.components, requires_safety_checker=False
        )
        given = {"prompt": "tea", "negative_prompt": "egg", "num_inference_steps": 2}
    made.set_progress_bar_config(disable=True)
    made(**{**given, "rule": RULE, **call})


def ddpm_pipeline(**options: Any) -> None:
    pipe = PIPES("ddpm")
    given = {"unet": pipe.unet, "scheduler": pipe.scheduler, "unwanted_unet": pipe.unet}
    dng_models.DNGDDPMPipeline(**{**given, **options})


def blocks(blocks: Any) -> None:
    dng_models.add_latents_block(blocks)


def drawn_trace(path: Any) -> None:
    """Draw the trace of a run that was made here."""
    chain = GuidedChain(RULE)
    scheduler = DDPMScheduler()
    scheduler.set_timesteps(2)
    x = torch.zeros(1, 4)
    chain.observe(scheduler, x, scheduler.timesteps[0])
    chain.guide(x, x)
    chain.trace.plot(path)


def run_of(scheduler: Any = None, **options: Any) -> None:
    scheduler_run(scheduler, **options)


def one_step(scheduler: Any = None, step: Any = 0, **options: Any) -> None:
    if scheduler is None:
        scheduler = DDPMScheduler()
        scheduler.set_timesteps(2)
    transition(scheduler, step, **options)


def denoiser(**options: Any) -> None:
    given = {
        "mixture": MIXTURE,
        "concepts": [[0]],
        "shape": (2, 2, 2),
        "scheduler": DDPMScheduler(clip_sample=False),
        **options,
    }
    MixtureDenoiser(**given)


def mixture_run(**options: Any) -> None:
    pipe = mixture_pipeline(MIXTURE, [[0]], (2, 2, 2), DDPMScheduler(clip_sample=False))
    run_mixture(**{"pipe": pipe, "rule": RULE, "images": 1, "steps": 2, **options})


def prompt(**options: Any) -> None:
    Prompt(**{**TEXTS, **options})


# ---------------------------------------------------------------------- the table


@dataclass(frozen=True)
class Bad:
    """An argument of a function, and values that it cannot have.

    ``names``: what the message must name, if that is not the argument.
    """

    call: Callable[..., Any]
    argument: str
    values: tuple[Any, ...]
    names: str = ""


NO_NUMBER: tuple[Any, ...] = ("7", [1.0], True, NAN, INF, 1j)
NO_INTEGER: tuple[Any, ...] = ("2", 1.5, True, -1)
NO_RULE: tuple[Any, ...] = (None, "dng", 3, DynamicNegativeGuidance, DynamicNegativeGuidance())

TABLE: tuple[Bad, ...] = (
    # apply_guidance
    Bad(
        partial(lambda **g: apply_guidance(g["pipe"], RULE)),
        "pipe",
        (None, "sd", torch.nn.Linear(1, 1), diffusers.StableDiffusionPipeline, 3),
    ),
    Bad(guided, "rule", (*NO_RULE, [], ["dng"], [RULE, RULE])),
    Bad(
        partial(guided, negative_prompts=["egg", "tea"]),
        "rule",
        ([RULE], [RULE] * 3, [RULE, NegativePrompting(1.0)], [RULE, DynamicNegativeGuidance()]),
    ),
    Bad(guided, "rule", (DynamicNegativeGuidance(1.0, PaperTracker()),), "prior"),
    Bad(
        guided,
        "rule",
        (LimitedInterval(DynamicNegativeGuidance(1.0, LogOddsTracker()), 0.1, 0.9),),
        "prior",
    ),
    Bad(guided, "cfg_scale", (*NO_NUMBER, "pipeline")),
    Bad(guided, "eta", (*NO_NUMBER, -0.1, 1.5)),
    Bad(guided, "divergence_probes", (*NO_INTEGER, None)),
    Bad(guided, "skip_below", (*NO_NUMBER, 0.0, -1.0)),
    Bad(guided, "mask", ([1], "mask", np.ones(3), torch.tensor([NAN]), torch.tensor([2.0]))),
    Bad(
        guided,
        "initial_log_posterior",
        (
            -1.0,
            [-1.0],
            np.zeros(2),
            torch.zeros(2, dtype=torch.int64),
            torch.zeros(2, 2, 2),
            torch.tensor([0.5]),
            torch.tensor([NAN]),
            torch.tensor(0.0),
        ),
    ),
    Bad(
        guided,
        "negative_prompts",
        (
            "egg",
            [],
            ["egg", ""],
            [3],
            [None],
            3,
            {"egg": 1},
            [SURROGATE],
            ["egg", "  "],
            torch.zeros(1, 2, 3),
            [{}],
            [{"prompt_embeds": 3}],
            [{"colour": torch.zeros(1)}],
            {"egg"},
            [b"egg"],
        ),
    ),
    Bad(guided, "negative_classes", ([3], "3", 3)),
    Bad(guided, "unwanted", (still, [], 3)),
    Bad(guided, "layout", ("unet", {"network": "unet"}, 3)),
    Bad(partial(guided, "ddpm"), "unwanted", (None, 3, "unet", [still, 3])),
    Bad(partial(guided, "ddpm", unwanted=still), "negative_prompts", (["egg"], "egg")),
    Bad(partial(guided, "ddpm", unwanted=still), "cfg_scale", (2.0,)),
    Bad(partial(guided, rule=PerpNeg(1.0)), "cfg_scale", (2.0,)),
    Bad(
        partial(guided, rule=ClassifierFreeGuidance(2.0)),
        "negative_prompts",
        (["egg"],),
        "concepts",
    ),
    Bad(
        partial(guided, rule=SafeLatentDiffusion(1.0)),
        "negative_prompts",
        (["a", "b"],),
        "concepts",
    ),
    Bad(lambda **g: dng_models.remove_guidance(g["pipe"]), "pipe", (None, "sd", 3)),
    # a guided call
    Bad(called, "negative_prompt", (None, "", "  ", [""], SURROGATE)),
    Bad(called, "prompt", (SURROGATE,)),
    Bad(called, "guidance_scale", (1.0, 0.0, None, "7", [1.0, 5.0], NAN)),
    Bad(called, "guidance_rescale", (0.5,)),
    Bad(partial(called, options={"eta": 0.5}), "eta", (0.2,)),
    # hyperparameters
    *(
        Bad(function, argument, values)
        for function in (DynamicNegativeGuidance.tracked, guider)
        for argument, values in (
            ("guidance_scale", NO_NUMBER),
            ("prior", (*NO_NUMBER, 0.0, 1.0, -0.1)),
            ("temperature", (*NO_NUMBER, -0.1)),
            ("offset", NO_NUMBER),
            ("offset_nats", NO_NUMBER),
            ("p_min", (*NO_NUMBER, -0.1, 0.999)),
            ("p_max", (*NO_NUMBER, 1.0, 0.0)),
            ("tracker", ("exact", None, 3)),
            ("variance", ("tiny", None, 3)),
        )
    ),
    Bad(guider, "cfg_scale", NO_NUMBER),
    Bad(guider, "start", (*NO_NUMBER, 1.0, -0.1)),
    Bad(guider, "stop", (*NO_NUMBER, 1.5, -0.1)),
    Bad(guider, "enabled", (1, "yes", None)),
    Bad(
        partial(set_in_guider, "set_negative"),
        "embeddings",
        (3, [], {}, "egg", {1: 2}, {"a": None}),
    ),
    Bad(partial(set_in_guider, "set_unconditional"), "embeddings", (3, {}, {"a": "b"})),
    Bad(
        partial(set_in_guider, "encode_negative", pipe=None),
        "prompt",
        (None, "", 3, " ", SURROGATE),
    ),
    Bad(partial(set_in_guider, "encode_negative", prompt="egg"), "pipe", (None, 3, "sd")),
    Bad(partial(set_in_guider, "encode_unconditional"), "pipe", (None, 3)),
    Bad(shown_to_guider, "scheduler", (None, "ddpm", 3)),
    Bad(shown_to_guider, "latents", (None, np.zeros((1, 4)), [1.0])),
    Bad(shown_to_guider, "timestep", (None, "t", torch.zeros(0))),
    Bad(shown_to_guider, "mask", ([1], np.ones(3))),
    Bad(shown_to_guider, "eta", (2.0, "1", NAN)),
    Bad(blocks, "blocks", (None, 3, "blocks", PIPES)),
    # pipelines
    Bad(pipeline, "rule", ("dng", 3, DynamicNegativeGuidance, DynamicNegativeGuidance()), "rule"),
    Bad(pipeline, "negative_prompts", ("egg", [3])),
    Bad(pipeline, "cfg_scale", NO_NUMBER),
    Bad(pipeline, "divergence_probes", (-1, 1.5, "2", None)),
    Bad(pipeline, "skip_below", (0.0, "1")),
    Bad(partial(pipeline, rule=None), "cfg_scale", (2.0,)),
    Bad(partial(pipeline, rule=None), "divergence_probes", (1,)),
    Bad(partial(pipeline, "DNGDDPMPipeline"), "unwanted", (3, "unet", [])),
    Bad(ddpm_pipeline, "unwanted_unet", (None, 3, torch.nn.Linear(1, 1))),
    # sample
    Bad(sampled, "base", (None, 3, "unet")),
    Bad(sampled, "unwanted", (None, 3, [], [still, None])),
    Bad(sampled, "rule", (None, "dng", 3, DynamicNegativeGuidance, DynamicNegativeGuidance())),
    Bad(
        sampled,
        "rule",
        (
            DynamicNegativeGuidance(1.0, PaperTracker()),
            DynamicNegativeGuidance(1.0, PaperTracker(prior=0.1, divergence=True)),
        ),
        "(prior|rule)",
    ),
    Bad(partial(sampled, rule=NegativePrompting(1.0)), "unwanted", ([still, still],)),
    Bad(partial(sampled, rule=ClassifierFreeGuidance(2.0)), "positive", (None, 3)),
    Bad(sampled, "shape", (2, "2", (2.5,), (-1,), (0,), ("a",), None, (True,), ())),
    Bad(sampled, "num_images", (0, *NO_INTEGER, None)),
    Bad(sampled, "schedule", (3, "linear", NoiseSchedule, [0.1, 0.2])),
    Bad(sampled, "steps", (0, *NO_INTEGER, 10**6)),
    Bad(sampled, "sampler", ("ddpm", 3, DDPM)),
    Bad(sampled, "prediction_type", ("noise", None, 3)),
    Bad(sampled, "clip", ("1", -1.0, 0.0, NAN, True)),
    Bad(sampled, "seed", (-1, 2**64, 1.5, "0", None, True)),
    Bad(
        sampled,
        "noise",
        (3, "normal", torch.zeros(2, 2), lambda *a: None, lambda *a: np.ones((2, 2))),
    ),
    Bad(sampled, "first_image", NO_INTEGER),
    Bad(sampled, "batch_size", (0, *NO_INTEGER)),
    Bad(sampled, "device", ("abacus", 3.5, "cuda:99", [])),
    Bad(sampled, "dtype", (torch.float16, "float32", np.float32, None)),
    Bad(sampled, "autocast", (torch.float32, "bfloat16", True)),
    Bad(sampled, "evaluation", ("both", None)),
    Bad(sampled, "record", (5, "scale", ["colour"], None, [1])),
    Bad(sampled, "progress", (3, True)),
    *(
        Bad(sampled, role, (answer,), rf"{role}")
        for role in ("base", "unwanted")
        for answer in (
            lambda x, t: None,
            lambda x, t: x.numpy(),
            lambda x, t: x[:, :1],
            lambda x, t: 1.0,
            lambda x, t: [x],
            lambda x, t: x.to(torch.int64),
            lambda x, t: torch.complex(x, x),
        )
    ),
    # what learned only the unwanted, in a pipeline's call
    *(
        Bad(ddpm_called, "unwanted", (answer,))
        for answer in (
            lambda x, t: None,
            lambda x, t: x.numpy(),
            lambda x, t: x[:, :1],
            lambda x, t: x.to(torch.int64),
        )
    ),
    Bad(lambda **g: timesteps(**g), "schedule", (None, "linear", 3)),
    Bad(lambda **g: timesteps(NoiseSchedule.linear(), **g), "steps", (0, "2", 1.5, 10**6)),
    # traces
    Bad(
        drawn_trace,
        "path",
        (None, 3, "scale", "scale.doc", b"scale.png", "", Path("nowhere/at/all/scale.png")),
    ),
    Bad(lambda path: Trace().plot(path), "path", (None, "scale.doc")),
    # schedulers, steps, layouts
    Bad(lambda **g: dng_models.EtaDDIMScheduler(**g), "eta", (*NO_NUMBER, -0.1, 1.1)),
    Bad(lambda **g: dng_models.PosteriorFlowScheduler(**g), "eta", (*NO_NUMBER, -0.1, 1.1)),
    Bad(lambda **g: dng_models.PosteriorFlowScheduler(**g), "stochastic_sampling", (True,)),
    Bad(run_of, "scheduler", (None, "ddpm", 3, DDPMScheduler)),
    Bad(one_step, "step", (-1, 2, 1.5, "0", None, True)),
    Bad(one_step, "eta", ("1", 2.0, NAN)),
    Bad(lambda **g: Layout(**g), "network", ("unet", (), (3,), None)),
    Bad(lambda **g: Layout(**g), "calls", ("twice", None)),
    Bad(lambda **g: Layout(**g), "first", ("last",)),
    Bad(lambda **g: Layout(**g), "text", ("a", (), (3,))),
    Bad(lambda **g: Layout(**g), "sign", (0, 2, "1")),
    # exact mixtures
    Bad(denoiser, "mixture", (None, 3, "mixture")),
    Bad(denoiser, "concepts", (3, "ab", [[7]], [["a"]], None, [3])),
    Bad(denoiser, "shape", ((2, 2), (3, 2, 2), 8, "2", (2.0, 2, 2), (-2, -2, 2), None)),
    Bad(denoiser, "dtype", (torch.int64, "float32", None)),
    Bad(denoiser, "scheduler", (None, "ddpm", DDPMScheduler)),
    Bad(mixture_run, "images", (0, 1.5, "2", None)),
    Bad(mixture_run, "steps", (0, 1.5, "2")),
    Bad(mixture_run, "rule", (Unguided(), "dng", None)),
    Bad(mixture_run, "eta", ("1", 2.0)),
    Bad(mixture_run, "pipe", (None, 3)),
    Bad(mixture_run, "seed", ("0", 1.5, None)),
    # text to image
    *(Bad(prompt, field, (None, 3, "", "  ", SURROGATE)) for field in TEXTS),
    Bad(prompt, "related", (", ,",)),
    *(Bad(prompt, field, NO_NUMBER) for field in ("prior", "temperature", "offset", "np_scale")),
    Bad(prompt, "dng_scale", (*NO_NUMBER, 0.0, -1.0)),
    Bad(lambda **g: prompts.load(**g), "source", (3, None, ""), "prompts"),
    *(
        Bad(lambda **g: Config(**g), field, values)
        for field, values in (
            ("model", (None, 3, "")),
            ("prompts", ((), ("a",), 3)),
            ("rules", ((), ("np", "np"), ("dgn",), 3, "np")),
            ("guidance_scales", ((), (-1.0,), ("a",), 3, (NAN,), (0.0,))),
            ("fractions", ((), (-1.0,), ("a",), 3)),
            ("num_images", (0, *NO_INTEGER)),
            ("seed", (2**63, *NO_INTEGER)),
            ("steps", (0, 1001, *NO_INTEGER)),
            ("scheduler", ("pndm", None)),
            ("cfg_scale", NO_NUMBER),
            ("t_hi", (*NO_NUMBER, 1.5)),
            ("t_lo", (*NO_NUMBER, -0.5)),
            ("height", (7, 1.5, "64")),
            ("dtype", ("float64", torch.float32)),
            ("split_negatives", (1, "yes", None)),
            ("contrast", (*NO_NUMBER, -1.0)),
            ("ask", (3, "")),
            ("clip", (3, "")),
            ("detector", (None, 3, "")),
        )
    ),
    Bad(lambda **g: scores.ZeroShot(cast("Any", None), **g), "template", ("a photo", 3, None)),
)

CASES = [
    pytest.param(bad, value, id=f"{number}-{bad.argument}")
    for number, (bad, value) in enumerate((bad, value) for bad in TABLE for value in bad.values)
]


@pytest.mark.filterwarnings("ignore:.* adds no noise", "ignore:.*dropped", "ignore::FutureWarning")
@pytest.mark.parametrize(("bad", "value"), CASES)
def test_bad_input_is_refused_by_name(bad: Bad, value: Any) -> None:
    with pytest.raises((TypeError, ValueError, FileNotFoundError)) as caught:
        bad.call(**{bad.argument: value})
    message = str(caught.value)
    assert re.search(rf"\b{bad.names or bad.argument}", message), message
    assert " must " in message, message
    assert re.search(r"\bgot\b|: .* has|, not ", message), message
    assert len(message) < 600, message


def test_the_table_is_long() -> None:
    assert len(CASES) >= 150
