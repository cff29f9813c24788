"""Negatives that are chosen by what looks at the images, inside real pipelines."""

from __future__ import annotations

import copy
import functools
import pickle
import warnings
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dng_math import (
    DDIM,
    AskedNegative,
    DynamicNegativeGuidance,
    GaussianMixture,
    LimitedInterval,
    NegativePrompting,
    NoiseSchedule,
)
from dng_math import sample as sample_mixture
from dng_math.rules import ASKED_AT
from dng_models.pipelines import tiny
from dng_models.pipelines.decoding import ImageDecoder
from dng_models.pipelines.dynamic_prompts import DynamicPrompts
from dng_models.pipelines.guided_chain import GuidedChain
from dng_models.pipelines.hook import apply_guidance, remove_guidance
from dng_models.pipelines.mixture_pipelines import mixture_pipeline
from dng_models.pipelines.trace import Trace
from figures.schedulers import BETAS
from tests.helpers.families import built
from tests.helpers.families.base import attends_in_bfloat16, final_latents

PROMPT = "A classic British breakfast"
STEPS, IMAGES = 4, 3
# Float32 networks, shown batches of another size; see test_hook.
CLOSE = 1e-5


def always(*names: str) -> Callable[[Any, int], list[tuple[str, ...]]]:
    return lambda images, step: [names] * len(images)


def never(images: Any, step: int) -> list[tuple[str, ...]]:
    return [()] * len(images)


def rule(ask: Any = never, concepts: Any = ("egg",), scale: float = 3.0, **options: Any) -> Any:
    return DynamicPrompts(ask, concepts, scale, **{"at": (0,), "of": None, **options})


@pytest.fixture(scope="module")
def pipe() -> Any:
    made = tiny.tiny_stable_diffusion(0)
    made.scheduler = DDPMScheduler.from_config(made.scheduler.config)
    return made


@pytest.fixture(autouse=True)
def unguided(pipe: Any) -> None:
    remove_guidance(pipe)


def run(pipe: Any, **given: Any) -> Any:
    """Latents; one generator an image."""
    told = {"num_inference_steps": STEPS, "output_type": "latent", "prompt": [PROMPT] * IMAGES}
    generator = [torch.Generator().manual_seed(seed) for seed in range(IMAGES)]
    return pipe(generator=generator, **{**told, **given}).images


def apart(a: Any, b: Any) -> float:
    """Largest difference, relative to the largest value."""
    return float((a - b).abs().max() / b.abs().max())


# ---------------------------------------------------------------------- what it must reduce to


@pytest.mark.parametrize("cfg_scale", [None, 3.0])
def test_seeing_nothing_is_the_stock_call_bit_for_bit(pipe, cfg_scale):
    with apply_guidance(pipe, rule(), cfg_scale=cfg_scale) as trace:
        found = run(pipe)
    # Without classifier-free guidance the stock call has half the rows.
    plain = run(pipe, guidance_scale=cfg_scale or 1.0)
    assert torch.equal(found, plain) if cfg_scale else apart(found, plain) < CLOSE
    assert (trace.evaluations, trace.evaluations_saved) == (0, STEPS * IMAGES)
    assert trace.scale.eq(0.0).all() and trace.scale.shape == (STEPS, IMAGES)
    assert [question.shown for question in trace.questions] == [((),) * IMAGES]


@pytest.mark.parametrize("cfg_scale", [None, 3.0])
def test_always_seeing_it_is_negative_prompting(pipe, cfg_scale):
    with apply_guidance(
        pipe, NegativePrompting(2.0), negative_prompts=["egg"], cfg_scale=cfg_scale
    ):
        expected = run(pipe)
    seen = rule(always("egg"), scale=2.0, reference="positive")
    with apply_guidance(pipe, seen, cfg_scale=cfg_scale) as trace:
        found = run(pipe)
    assert apart(found, expected) < CLOSE
    assert apart(found, run(pipe, guidance_scale=cfg_scale or 1.0)) > 100 * CLOSE
    assert (trace.evaluations, trace.evaluations_saved) == (STEPS * IMAGES, 0)
    assert trace.scale.eq(2.0).all()


def test_the_published_form_is_measured_from_the_unconditional(pipe):
    """u + w (c - u) - g (n - u) is u + (w - g)(c - u) - g (n - c)."""
    w, g = 5.0, 1.5
    with apply_guidance(pipe, NegativePrompting(g), negative_prompts=["egg"], cfg_scale=w - g):
        expected = run(pipe)
    with apply_guidance(pipe, rule(always("egg"), scale=g), cfg_scale=w):
        found = run(pipe)
    assert apart(found, expected) < CLOSE
    with apply_guidance(pipe, rule(always("egg"), scale=g, reference="positive"), cfg_scale=w):
        assert apart(run(pipe), expected) > 100 * CLOSE


def test_without_a_prediction_beneath_there_is_one_to_measure_from(pipe):
    with apply_guidance(pipe, rule(always("egg"))):
        one = run(pipe)
    with apply_guidance(pipe, rule(always("egg"), reference="positive")):
        assert torch.equal(run(pipe), one)


def chain_of(asking: DynamicPrompts, cfg_scale: float | None, x: torch.Tensor) -> GuidedChain:
    """A chain at its first step, shown the network's input x."""
    scheduler = DDPMScheduler()
    scheduler.set_timesteps(4)
    chain = GuidedChain(asking, concepts=len(asking.names), cfg_scale=cfg_scale)
    chain.observe(scheduler, x, scheduler.timesteps[0])
    return chain


@given(
    seed=st.integers(0, 2**32 - 1),
    held=st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=4),
    cfg_scale=st.none() | st.floats(-2.0, 9.0),
    scale=st.floats(-3.0, 15.0),
    reference=st.sampled_from(["positive", "unconditional"]),
)
@settings(max_examples=25)
def test_the_push_is_from_the_mean_of_what_is_held(seed, held, cfg_scale, scale, reference):
    """In float64, for every number of concepts and images."""
    names = ("egg", "sausage", "tomato")
    answers = [[n for n, own in zip(names, row, strict=True) if own] for row in held]
    draw = torch.Generator().manual_seed(seed)
    x, u, c, *n = torch.randn((6, len(held), 2, 3), generator=draw, dtype=torch.float64)
    asking = rule(lambda images, step: answers, names, scale, reference=reference)
    chain = chain_of(asking, cfg_scale, x)
    chain.look(c, u)
    assert chain.to_evaluate().tolist() == np.array(held).T.tolist()
    found = chain.guide(c, n, u)
    for image, row in enumerate(held):
        base = c[image] if cfg_scale is None else u[image] + cfg_scale * (c[image] - u[image])
        of = u if reference == "unconditional" and cfg_scale is not None else c
        pushes = [n[k][image] - of[image] for k, own in enumerate(row) if own]
        push = sum(pushes) / len(pushes) if pushes else torch.zeros_like(base)
        torch.testing.assert_close(found[image], base - scale * push, rtol=1e-12, atol=1e-12)
        assert float(chain.trace.scale[0, image]) == pytest.approx(scale * any(row))


# ---------------------------------------------------------------------- each image its own


def test_each_image_has_its_own_answers_and_pays_for_them_only(pipe):
    answers = {0: [["egg"], [], ["sausage", "egg"]], 2: [[], [], ["sausage"]]}
    rows: list[int] = []
    seen = rule(
        lambda images, step: answers[step], ("egg", "sausage"), reference="positive", at=(0, 2)
    )
    network = pipe.unet.forward

    def counted(sample, *args, **kwargs):
        rows.append(len(sample))
        return network(sample, *args, **kwargs)

    pipe.unet.forward = counted
    try:
        with apply_guidance(pipe, seen) as trace:
            found = run(pipe)
    finally:
        pipe.unet.forward = network
    # At a question the negatives follow in a second call, once it is known which are needed.
    assert rows == [3, 3, 6, 3, 1, 4]
    assert trace.evaluations == 2 * 3 + 2 * 1
    assert trace.evaluations_saved == 2 * STEPS * IMAGES - 8
    assert trace.last.evaluations_of_images == [2, 0, 4 + 2]
    assert [q.step for q in trace.questions] == [0, 2]
    # Names come in the order of the concepts.
    assert trace.questions[0].shown == (("egg",), (), ("egg", "sausage"))
    assert trace.questions[1].shown == ((), (), ("sausage",))
    assert trace.scale.tolist() == [[3.0, 0.0, 3.0]] * 2 + [[0.0, 0.0, 3.0]] * 2
    plain = run(pipe, guidance_scale=1.0)
    assert apart(found[1], plain[1]) < CLOSE < apart(found[0], plain[0])


# A network that is called once for each prompt, and two whose added prompts take their own calls.
@pytest.mark.parametrize(
    "name",
    [
        "CogView4Pipeline",
        "ZImagePipeline",
        pytest.param("SanaPAGPipeline", marks=pytest.mark.slow),
    ],
)
def test_layouts_of_other_kinds(name):
    family, other = built(name)

    def latents(rule: Any, **options: Any) -> tuple[torch.Tensor, Trace]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with apply_guidance(other, rule, **options) as trace:
                return final_latents(other, family), trace

    def asked(ask: Any) -> Any:
        return rule(ask, ("egg", "sausage"), 2.0, reference="positive", decode=lambda x: x)

    for cfg_scale in (None, 3.0):
        given = {"cfg_scale": cfg_scale}
        found, trace = latents(asked(always("egg")), **given)
        expected, _ = latents(NegativePrompting(2.0), negative_prompts=["egg"], **given)
        assert apart(found, expected) < 2e-5
        none, saved = latents(asked(never), **given)
        plain, _ = latents(NegativePrompting(0.0), negative_prompts=["egg"], **given)
        assert apart(none, plain) < 2e-5 < apart(found, plain)
        assert saved.evaluations == 0 and trace.evaluations == trace.scale.numel()


def test_classes_in_place_of_prompts():
    family, dit = built("DiTPipeline")
    with apply_guidance(dit, NegativePrompting(2.0), negative_classes=[1]):
        expected = final_latents(dit, family)
    seen = rule(always("cat"), {"dog": 0, "cat": 1}, 2.0, decode=lambda x: x)
    with apply_guidance(dit, seen) as trace:
        found = final_latents(dit, family)
    assert apart(found, expected) < 2e-5
    assert trace.questions[0].shown[0] == ("cat",)


def test_a_limited_interval_pushes_inside_it_only(pipe):
    with apply_guidance(pipe, LimitedInterval(rule(always("egg")), 0.0, 0.5)) as trace:
        run(pipe)
    inside = trace.time <= 0.5
    assert 0 < inside.sum() < STEPS
    assert (trace.scale > 0).all(1).tolist() == inside.tolist()
    assert trace.evaluations == IMAGES * int(inside.sum())


# ---------------------------------------------------------------------- what is looked at, and when


def test_the_published_steps_and_others():
    assert DynamicPrompts(never, ["egg"]).asked_at(50) == set(ASKED_AT)
    assert DynamicPrompts(never, ["egg"]).asked_at(100) == {2 * step for step in ASKED_AT}
    assert DynamicPrompts(never, ["egg"]).asked_at(10) == {1, 2, 3, 4, 5, 6, 8}
    assert DynamicPrompts(never, ["egg"]).asked_at(1) == {0}
    assert rule(at=(7, 3, 3)).asked_at(10) == {3, 7} and rule(at=(3,), of=4).asked_at(8) == {6}


def test_pictures_of_x0_are_shown_with_the_index_of_their_step(pipe):
    shown: list[Any] = []

    def ask(images, step):
        shown.append((step, images))
        return [()] * len(images)

    with apply_guidance(pipe, rule(ask, at=(1, 3)), cfg_scale=3.0) as trace:
        final = run(pipe)
    assert [step for step, _ in shown] == [1, 3] == [one.step for one in trace.questions]
    assert all(isinstance(picture, Image.Image) for _, images in shown for picture in images)
    np.testing.assert_allclose([one.time for one in trace.questions], trace.time[[1, 3]])
    # DDPM's last step leads to x0 itself.
    decoded = pipe.vae.decode(final / pipe.vae.config.scaling_factor, return_dict=False)[0]
    pixels = (0.5 * decoded + 0.5).clamp(0, 1).movedim(1, -1).detach().numpy()
    for picture, expected in zip(shown[-1][1], pixels, strict=True):
        np.testing.assert_allclose(np.asarray(picture) / 255, expected, atol=0.51 / 255)


@pytest.mark.parametrize("cfg_scale", [None, 2.5])
def test_x0_is_that_of_the_prediction_without_the_negative(cfg_scale):
    """In an exact mixture: u + w (c - u) of predictions that are known."""
    pipe = mixture_pipe()
    looked: list[torch.Tensor] = []

    def ask(x0, step):
        looked.append(x0.clone())
        return [["first"]] * len(x0)

    asking = DynamicPrompts(
        ask, {"first": pipe.unet.embeddings(1, 0)}, 1.0, at=(0, 3), of=None, decode=lambda x0: x0
    )
    inputs: list[tuple[torch.Tensor, Any]] = []
    with apply_guidance(pipe, asking, cfg_scale=cfg_scale):
        draw_mixture(pipe, 4, 5, inputs, prompt=1)
    for step, x0 in zip((0, 3), looked, strict=True):
        x, t = inputs[step]
        alpha, sigma = pipe.unet.noise_level(t)
        ones = torch.ones(4, dtype=torch.long)
        c, u = (pipe.unet.predict(x, t, place * ones) for place in (2, 0))
        noise = c if cfg_scale is None else u + cfg_scale * (c - u)
        expected = (x - sigma * noise) / alpha
        torch.testing.assert_close(x0.double(), expected.double(), rtol=1e-4, atol=1e-4)


def test_schedulers_limits_of_x0_are_those_of_what_is_looked_at(pipe):
    looked: list[torch.Tensor] = []

    def ask(x0, step):
        looked.append(x0)
        return [()] * len(x0)

    own = pipe.scheduler
    pipe.scheduler = DDPMScheduler.from_config(own.config, clip_sample=True, clip_sample_range=0.7)
    try:
        with apply_guidance(pipe, rule(ask, decode=lambda x0: x0), cfg_scale=3.0):
            run(pipe)
    finally:
        pipe.scheduler = own
    assert float(looked[0].abs().max()) == pytest.approx(0.7)


# ---------------------------------------------------------------------- the exact posterior


@functools.cache
def _mixture(centres: tuple[float, ...]) -> GaussianMixture:
    means = np.zeros((len(centres), 4))
    means[:, 0] = centres
    return GaussianMixture([1 / len(centres)] * len(centres), means, [0.09] * len(centres))


def mixture_pipe(centres: tuple[float, ...] = (-2.0, 2.0), forbidden: int = 0) -> Any:
    scheduler = DDPMScheduler(**BETAS, clip_sample=False)
    others = [k for k in range(len(centres)) if k != forbidden]
    concepts = [[forbidden], others]
    return mixture_pipeline(_mixture(centres), concepts, (4, 1, 1), scheduler)


def draw_mixture(pipe, images: int, steps: int, inputs: list[Any], prompt: int | None = None):
    """Latents of a guided run; the network's inputs and times are appended."""
    network = pipe.unet
    watching = network.register_forward_pre_hook(
        lambda module, given: inputs.append((given[0][:images].clone(), given[1]))
    )
    place = {} if prompt is None else {"prompt_embeds": network.embeddings(images, prompt)}
    try:
        return pipe(
            **{
                **network.prompts(images),
                **place,
                "negative_prompt_embeds": network.embeddings(images),
            },
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        ).images
    finally:
        watching.remove()
        # The first calls, with which the layout is checked, begin runs that are stopped.
        del inputs[:-steps]


def gate_and_posterior(
    centres: tuple[float, ...], forbidden: int, images: int = 256, steps: int = 50
) -> tuple[np.ndarray, np.ndarray]:
    """Whether the exact classifier sees the forbidden mode in x0, and its posterior at x_t."""
    pipe = mixture_pipe(centres, forbidden)
    line = np.array(centres)

    def ask(x0, step):
        nearest = np.abs(x0.flatten(1)[:, :1].numpy() - line).argmin(1)  # equal shares and widths
        return [["it"] if mode == forbidden else [] for mode in nearest]

    asking = DynamicPrompts(
        ask,
        {"it": pipe.unet.embeddings(1, 0)},
        0.0,
        at=range(steps),
        of=None,
        decode=lambda x0: x0,
    )
    inputs: list[Any] = []
    with apply_guidance(pipe, asking) as trace:
        draw_mixture(pipe, images, steps, inputs)
        exact = [pipe.unet.log_posterior(x, t).exp().numpy() for x, t in inputs]
    seen = np.array([[bool(names) for names in one.shown] for one in trace.questions])
    return seen, np.array(exact)


def test_of_two_modes_the_gate_is_the_posterior_at_every_time():
    """By symmetry x0 lies on the side of the likelier mode, at any noise."""
    seen, exact = gate_and_posterior((-2.0, 2.0), 0)
    sure = np.abs(exact - 0.5) > 1e-3
    assert sure.mean() > 0.9
    np.testing.assert_array_equal(seen[sure], (exact >= 0.5)[sure])


def test_an_outer_mode_is_seen_late_and_a_middle_one_at_once():
    """Early x0 is the mean of all modes: it is near the middle one, and far from the outer ones."""
    for forbidden, at_first in ((0, 0.0), (1, 1.0)):
        seen, exact = gate_and_posterior((-2.0, 0.0, 2.0), forbidden)
        agrees = (seen == (exact >= 0.5)).mean(1)
        assert (seen[:5] == at_first).all()
        assert exact[0].mean() == pytest.approx(1 / 3, abs=0.02)
        # At the end both are sure; between modes 6.7 widths apart hardly anything is.
        assert agrees[-1] == 1.0 and np.abs(seen[-1] - exact[-1]).mean() < 0.01
        error = np.abs(seen - exact).mean(1)
        assert error[0] == pytest.approx(1 / 3 if at_first == 0.0 else 2 / 3, abs=0.02)
        assert error[-1] < error[30] < error[0]
        if forbidden == 0:
            # Of the images that end in the outer mode, none was seen in the first tenth.
            ends = exact[-1] > 0.5
            assert ends.sum() > 40 and not seen[:5, ends].any() and seen[-1, ends].all()


@pytest.mark.parametrize("cfg_scale", [None, 1.5])
def test_a_pipeline_is_the_rule_of_dng_math(cfg_scale):
    """Float64 and no noise: the answers are the same, and the latents to rounding."""
    mixture, steps, images, led = _mixture((-2.0, 0.0, 2.0)), 20, 64, [0, 1]
    scheduler = DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=True)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()  # of float32, as its steps are
    pipe = mixture_pipeline(mixture, [[0], led], (4, 1, 1), scheduler, dtype=torch.float64)
    answers: list[np.ndarray] = []

    def shows(x0: np.ndarray, step: int) -> np.ndarray:
        answers.append(mixture.posterior(x0, [0]) > 0.5)
        return answers[-1]

    def ask(x0, step):
        return [["it"] if one else [] for one in shows(x0.flatten(1).numpy(), step)]

    asking = DynamicPrompts(
        ask, {"it": pipe.unet.embeddings(1, 0).double()}, 3.0, decode=lambda x0: x0
    )
    inputs: list[Any] = []
    with apply_guidance(pipe, asking, cfg_scale=cfg_scale) as trace:
        found = draw_mixture(pipe, images, steps, inputs, prompt=1 if cfg_scale else None)
    in_pipeline, answers = np.array(answers), []
    beneath = {} if cfg_scale is None else {"cfg_scale": cfg_scale, "positive": led}
    schedule = NoiseSchedule.from_alpha_bar(
        scheduler.alphas_cumprod[scheduler.timesteps.flip(0)].numpy()
    )
    expected = sample_mixture(
        mixture,
        schedule,
        AskedNegative(shows, 3.0),
        n=images,
        forbidden=[0],
        sampler=DDIM(0.0),
        initial=inputs[0][0].flatten(1).double().numpy(),
        engine="reference",
        record=["scale"],
        **beneath,
    )
    np.testing.assert_array_equal(in_pipeline, np.array(answers))
    np.testing.assert_array_equal(trace.scale.numpy(), expected.scale[:, 0])
    np.testing.assert_allclose(found.flatten(1).numpy(), expected.x, rtol=0, atol=1e-9)
    held = expected.scale[:, 0] > 0
    assert 0 < held.mean() < 0.9 and (held[1:] != held[:-1]).any()
    assert trace.evaluations == held.sum()


def test_on_an_exact_mixture_it_removes_for_less_than_dng():
    """Of 512 images a third is in the outer mode; a binomial share of 0 to 1/2 of these is left."""
    pipe = mixture_pipe((-2.0, 0.0, 2.0), 0)
    shares, costs = [], []
    for guide in (
        DynamicPrompts(never, {"it": pipe.unet.embeddings(1, 0)}, 4.0, decode=lambda x0: x0),
        DynamicPrompts(
            lambda x0, step: [["it"] if one < -1.0 else [] for one in x0.flatten(1)[:, 0]],
            {"it": pipe.unet.embeddings(1, 0)},
            4.0,
            decode=lambda x0: x0,
        ),
        DynamicNegativeGuidance.tracked(1.0, 1 / 3),
    ):
        with apply_guidance(pipe, guide) as trace:
            found = draw_mixture(pipe, 512, 50, [])
        shares.append(float((found.flatten(1)[:, 0] < -1.0).float().mean()))
        costs.append(trace.evaluations / 512)
    # Six standard errors of 512 images are 0.125.
    assert shares[0] == pytest.approx(1 / 3, abs=0.125)
    assert shares[1] < shares[0] - 0.125
    assert costs[0] == 0.0 < costs[1] < 25.0 < costs[2] == 50.0


# ---------------------------------------------------------------------- answers that cannot be

BAD_ANSWERS = {
    "a concept of nobody": (
        [["egg"], ["ham"], []],
        ValueError,
        "names of 'egg', got 'ham' for image 1",
    ),
    "too few": ([["egg"]], ValueError, "one answer for each of 3 images, got 1"),
    "a name for a sequence": (["egg", [], []], TypeError, "got 'egg' for image 0"),
    "a text": ("egg", TypeError, "must return a sequence"),
    "nothing": (None, TypeError, "must return a sequence"),
    "probabilities": ([0.5, 0.1, 0.9], TypeError, "got 0.5 for image 0"),
    "a mapping": ([{"egg": False}, {}, {}], TypeError, "for image 0"),
    "a number of a concept": ([[0], [], []], ValueError, "got 0 for image 0"),
}


@pytest.mark.parametrize("name", BAD_ANSWERS)
def test_an_answer_that_cannot_be_ends_the_run(pipe, name):
    answer, kind, message = BAD_ANSWERS[name]
    with (
        apply_guidance(pipe, rule(lambda images, step: answer)),
        pytest.raises(kind, match=message),
    ):
        run(pipe)


class OutOfOrder(Exception):
    """What an ask of one's own may raise."""


def failing(images: Any, step: int) -> Any:
    raise OutOfOrder("the camera is covered")


@pytest.mark.parametrize("what", ["ask", "decode", "another number of images"])
def test_errors_leave_nothing_behind(pipe, what):
    broken = {
        "ask": {"ask": failing},
        "decode": {"decode": lambda x0: failing(x0, 0)},
        "another number of images": {"decode": lambda x0: x0[1:]},
    }[what]
    kind = ValueError if what == "another number of images" else OutOfOrder
    plain = run(pipe)
    before = {**pipe.unet.__dict__}, {**pipe.scheduler.__dict__}.keys(), type(pipe)
    with apply_guidance(pipe, rule(**{"at": (2,), **broken})) as trace:
        with pytest.raises(kind):
            run(pipe)
        assert "step" not in pipe.scheduler.__dict__
        assert trace.runs == [trace.last] and len(trace.last.steps) == 2
    assert (pipe.unet.__dict__, pipe.scheduler.__dict__.keys(), type(pipe)) == before
    assert torch.equal(run(pipe), plain)
    # The first question comes before anything was guided: such a run is not recorded.
    with apply_guidance(pipe, rule(**{"at": (0,), **broken})) as trace, pytest.raises(kind):
        run(pipe)
    assert trace.runs == []


def test_a_run_goes_on_as_told_and_says_so_once(pipe):
    answers = {0: [["egg"], [], []], 1: None, 2: [["ham"], [], []], 3: [[], ["egg"], []]}
    asking = rule(lambda images, step: answers[step], at=(0, 1, 2, 3), on_error="keep")
    with (
        apply_guidance(pipe, asking) as trace,
        pytest.warns(UserWarning, match="question at step 1 had no answer .TypeError: ask") as told,
    ):
        found = run(pipe)
    assert len([each for each in told if "had no answer" in str(each.message)]) == 1
    shown = [one.shown for one in trace.questions]
    assert shown == [(("egg",), (), ())] * 3 + [((), ("egg",), ())]
    errors = [one.error for one in trace.questions]
    assert errors[0] is None is errors[3]
    assert errors[1].startswith("TypeError: ask must return") and "'ham'" in errors[2]
    sound = rule(lambda images, step: answers[step], at=(0, 3))
    with apply_guidance(pipe, sound):
        assert apart(run(pipe), found) < CLOSE


def test_nothing_is_held_before_an_answer(pipe):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with apply_guidance(pipe, rule(failing, on_error="keep"), cfg_scale=2.0) as trace:
            found = run(pipe)
    assert torch.equal(found, run(pipe, guidance_scale=2.0))
    assert trace.questions[0].error == "OutOfOrder: the camera is covered"


def test_what_ends_a_process_is_not_kept_back(pipe):
    def interrupted(images, step):
        raise KeyboardInterrupt

    with (
        apply_guidance(pipe, rule(interrupted, on_error="keep")),
        pytest.raises(KeyboardInterrupt),
    ):
        run(pipe)


def test_ask_may_call_the_network_unguided(pipe):
    """Its calls are its own business, and not steps of the run."""

    def ask(images, step):
        text = torch.zeros(1, 77, pipe.unet.config.cross_attention_dim)
        with torch.no_grad():
            pipe.unet(torch.zeros(1, 4, 8, 8), 10, encoder_hidden_states=text)
        return [["egg"]] * len(images)

    with apply_guidance(pipe, rule(ask)):
        found = run(pipe)
    with apply_guidance(pipe, rule(always("egg"))):
        assert torch.equal(run(pipe), found)


# ---------------------------------------------------------------------- what cannot be


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"ask": "egg"}, TypeError, r"ask must be a callable \(images, step\), got 'egg'"),
        ({"ask": DynamicPrompts}, TypeError, "ask must be a callable"),
        ({"concepts": None}, ValueError, "concepts must be given where ask has no concepts"),
        ({"concepts": "egg"}, TypeError, "concepts must be a sequence of names"),
        ({"concepts": []}, ValueError, "concepts must be one or more"),
        ({"concepts": ["egg", "egg"]}, ValueError, "concepts must be one or more, each once"),
        ({"concepts": ["egg", " "]}, ValueError, "concepts must have names that are not empty"),
        ({"concepts": {3: "egg"}}, TypeError, "concepts must have names that are str, got 3"),
        ({"guidance_scale": float("nan")}, ValueError, "guidance_scale must be"),
        ({"reference": "negative"}, ValueError, "reference must be"),
        ({"at": ()}, TypeError, "at must be a sequence of one or more steps"),
        ({"at": "5"}, TypeError, "at must be a sequence of one or more steps"),
        ({"at": b"5"}, TypeError, "at must be a sequence of one or more steps"),
        ({"at": (-1,)}, ValueError, "at must be an integer"),
        ({"at": (50,)}, ValueError, "at must be an integer from 0 to 49, got 50"),
        ({"at": (1.5,)}, TypeError, "at must be an integer"),
        ({"of": 0}, ValueError, "of must be an integer >= 1"),
        ({"decode": "vae"}, TypeError, "decode must be a callable from latents"),
        ({"on_error": "stop"}, ValueError, "on_error must be"),
    ],
)
def test_bad_arguments(options, kind, message):
    with pytest.raises(kind, match=message):
        DynamicPrompts(**{"ask": never, "concepts": ["egg"], **options})


def test_concepts_may_be_those_of_what_is_asked():
    class Judge:
        concepts = ("egg", "sausage")

        def __call__(self, images: Sequence[Any], step: int) -> list[list[str]]:
            return [[] for _ in images]

    asking = DynamicPrompts(Judge())
    assert asking.names == ("egg", "sausage") and asking.prompts == ["egg", "sausage"]
    assert DynamicPrompts(Judge(), {"egg": "a breakfast with egg"}).prompts == [
        "a breakfast with egg"
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"negative_prompts": ["ham"]}, "negative_prompts must be None for DynamicPrompts"),
        ({"negative_classes": [3]}, "negative_classes must be None for DynamicPrompts"),
        ({"images": torch.zeros(1, 4, 8, 8)}, "images must be None for DynamicPrompts"),
        ({"negative_template": "{positive} {negative}"}, "negative_template must be None"),
        ({"skip_below": 0.1}, "skip_below must be None for DynamicPrompts"),
        ({"initial_log_posterior": torch.zeros(3)}, "initial_log_posterior must be None"),
    ],
)
def test_options_that_it_has_no_use_for(pipe, options, message):
    with pytest.raises(ValueError, match=message):
        apply_guidance(pipe, rule(), **options)
    assert type(pipe).__call__ is type(tiny.tiny_stable_diffusion(0)).__call__


def test_places_where_it_cannot_be(pipe):
    with pytest.raises(ValueError, match="rule must be another one for a DDPMPipeline"):
        apply_guidance(tiny.tiny_ddpm(), rule(), unwanted=tiny.tiny_unet(1))
    with pytest.raises(ValueError, match="rule must be DynamicPrompts itself"):
        apply_guidance(pipe, [rule()])
    with pytest.raises(ValueError, match="decode must be given.*has no VAE"):
        apply_guidance(mixture_pipe(), rule(concepts={"it": torch.ones(1, 1, 3)}))
    mixture, schedule = _mixture((-2.0, 2.0)), NoiseSchedule.linear(4)
    with pytest.raises(TypeError, match="DynamicPrompts looks at images"):
        sample_mixture(mixture, schedule, rule(), forbidden=[0], n=2, engine="reference")
    with pytest.raises((TypeError, ValueError), match="rule"):
        sample_mixture(mixture, schedule, rule(), forbidden=[0], n=2)
    with pytest.raises(
        ValueError, match=r"concepts must be 1, those of DynamicPrompts\(.*got None"
    ):
        GuidedChain(rule())


def test_latents_that_the_vae_does_not_decode_as_they_are():
    family, flux = built("FluxPipeline")
    with (
        warnings.catch_warnings(),
        apply_guidance(flux, rule()),
        pytest.raises(ValueError, match="decode must be given.*packed to tokens"),
    ):
        warnings.simplefilter("ignore")
        final_latents(flux, family)


def test_a_question_must_be_put_once_and_in_time():
    x = torch.zeros(2, 1, 2)
    chain = chain_of(rule(), None, x)
    assert chain.asks
    with pytest.raises(ValueError, match=r"look\(\) must come before guide\(\) at step 0"):
        chain.guide(x, [x])
    chain.look(x)
    assert not chain.asks
    with pytest.raises(ValueError, match=r"look\(\) must be called where a question is due"):
        chain.look(x)
    with pytest.raises(ValueError, match="negatives must be 1 predictions"):
        chain.guide(x)


def test_a_trace_with_questions_is_pickled_copied_and_drawn(pipe, tmp_path):
    with apply_guidance(pipe, rule(always("egg"), at=(1, 2))) as trace:
        run(pipe)
    for other in (pickle.loads(pickle.dumps(trace)), copy.deepcopy(trace)):
        assert other.questions == trace.questions and len(other.questions) == 2
    trace.plot(tmp_path / "scale.svg")
    assert (tmp_path / "scale.svg").is_file()


def test_where_there_is_no_vae_the_latents_are_pixels():
    unet = SimpleNamespace(config=SimpleNamespace(in_channels=3))
    decode = ImageDecoder(SimpleNamespace(unet=unet))
    x0 = torch.tensor([-1.0, 0.0, 1.0, 3.0, float("nan")]).expand(1, 3, 2, 5)
    (picture,) = decode(x0)
    np.testing.assert_array_equal(np.asarray(picture)[0, :, 0], [0, 128, 255, 255, 0])
    with pytest.raises(ValueError, match=r"decode must be given.*have shape \(1, 4, 2, 5\)"):
        decode(torch.zeros(1, 4, 2, 5))


def test_networks_in_half_precision_are_looked_at_too():
    if not attends_in_bfloat16():
        pytest.skip("this torch cannot attend in bfloat16 on this CPU")
    half = tiny.tiny_stable_diffusion(0).to(torch.bfloat16)
    half.set_progress_bar_config(disable=True)
    with apply_guidance(half, rule(always("egg"), scale=2.0), cfg_scale=3.0) as trace:
        found = run(half)
    assert found.dtype == torch.bfloat16 and bool(found.isfinite().all())
    assert trace.questions[0].shown == (("egg",),) * IMAGES
    with apply_guidance(half, rule(never), cfg_scale=3.0):
        unseen = run(half)
    assert torch.equal(unseen, run(half, guidance_scale=3.0))
