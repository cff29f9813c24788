"""A guided chain by itself, between a scheduler and predictions from anywhere."""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, DDIMScheduler, DDPMScheduler
from torch import Tensor

import dng_kernels
import dng_models
from dng_math import DynamicNegativeGuidance, FeedbackGuidance, LimitedInterval
from dng_models.pipelines import guided_run, tiny
from dng_models.pipelines.call_watched import _first_step
from dng_models.pipelines.clip import _unit
from dng_models.pipelines.dynamic_prompts import DynamicPrompts
from dng_models.pipelines.guided_chain import GuidedChain
from dng_models.pipelines.hook import apply_guidance
from dng_models.pipelines.scheduler_reading import position
from dng_models.pipelines.skipping import LONGEST_SKIP
from dng_models.text_to_image.laboratory.pipelines import BETAS
from tests.helpers import textbook
from tests.helpers.tolerances import STEP, error

tracked = DynamicNegativeGuidance.tracked
SHAPE = (3, 4, 2, 2)
STEPS = 5


def steps_of(kind: type, **options: Any) -> Any:
    """A scheduler with its timesteps set."""
    scheduler = kind(**{**BETAS, "clip_sample": False, **options})
    scheduler.set_timesteps(STEPS)
    return scheduler


def random(count: int, seed: int = 0) -> list[Tensor]:
    """Tensors in float64 whose numbers float32 has too."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(SHAPE, generator=generator).double() for _ in range(count)]


# ---------------------------------------------------------------------- precision

# x0 limits that no plan expresses: posteriors are updated with the limited x0 itself.
THRESHOLDING = {"thresholding": True, "sample_max_value": 1.5}
LIMITED: dict[str, Callable[[], Any]] = {
    "DDPM, thresholding": lambda: steps_of(DDPMScheduler, **THRESHOLDING),
    "DDIM, thresholding": lambda: steps_of(DDIMScheduler, **THRESHOLDING),
    "DDIM, clip_sample": lambda: steps_of(DDIMScheduler, clip_sample=True),
}
TRACKERS: dict[str, Any] = {
    "paper": tracked(3.0, 0.2, temperature=0.05),
    "log-odds": tracked(3.0, 0.2, temperature=0.05, tracker="log-odds"),
    "path": tracked(3.0, 0.2, temperature=0.05, tracker="path"),
    "fbg": FeedbackGuidance(),
}


def derivable(at: Tensor) -> list[Tensor]:
    """Stands in for a network where its derivative is needed."""
    return [0.3 * at.sin(), 0.5 * at.cos()]


def tracked_by(chain: GuidedChain, scheduler: Any, of_x: Any, of_predictions: Any) -> Tensor:
    """The posteriors of every step along latents and predictions of two dtypes, shape (S, B)."""
    found = []
    for i, t in enumerate(scheduler.timesteps):
        x, *predictions = random(4, i)
        positive, negative, empty = (p.to(of_predictions) for p in predictions)
        chain.observe(scheduler, x.to(of_x), t)
        others = [negative] if chain.needs_negative else []
        guided = chain.guide(positive, others, empty, network=derivable)
        assert guided.dtype == of_predictions
        run = chain._run
        assert run is not None and run.state is not None
        found.append(run.log_posterior(run.state))
    return torch.stack(found)


@pytest.mark.parametrize("limit", LIMITED)
@pytest.mark.parametrize(("tracker", "probes"), [*((name, 0) for name in TRACKERS), ("paper", 1)])
def test_every_precision_is_guided_whatever_limits_x0(limit, tracker, probes):
    eta = 0.5 if probes and limit.startswith("DDIM") else 1.0
    found = {}
    wide = (torch.float64, torch.float32)
    for dtypes in itertools.product(wide, (*wide, torch.bfloat16)):
        chain = GuidedChain(TRACKERS[tracker], eta=eta, divergence_probes=probes)
        found[dtypes] = tracked_by(chain, LIMITED[limit](), *dtypes)
    expected = found[torch.float32, torch.float32]
    assert expected.std(1).max() > 0.05
    for dtypes, each in found.items():
        assert each.dtype == (torch.float64 if dtypes[1] == torch.float64 else torch.float32)
        # Two digits of bfloat16, and differences of squares of them.
        close = 0.2 if torch.bfloat16 in dtypes else 1e-4
        torch.testing.assert_close(each.float(), expected, rtol=close, atol=close)


@pytest.mark.parametrize("limit", ["DDIM, thresholding", "DDIM, clip_sample"])
def test_a_limited_posterior_has_all_digits_of_a_run_in_float64(limit):
    """By the paper's update, from what the scheduler's own step gives without its noise."""
    scheduler = LIMITED[limit]()
    for name in ("alphas_cumprod", "final_alpha_cumprod"):
        setattr(scheduler, name, getattr(scheduler, name).double())
    found = tracked_by(GuidedChain(TRACKERS["paper"], eta=1.0), scheduler, *[torch.float64] * 2)
    log_p = np.full(SHAPE[0], np.log(0.2))
    stride = scheduler.config.num_train_timesteps // STEPS
    for i, t in enumerate(scheduler.timesteps[:-1]):
        (x, *predictions), x_next = random(4, i), random(4, i + 1)[0].numpy()
        means = [
            scheduler.step(p, t, x, eta=1.0, variance_noise=0.0 * x).prev_sample.numpy()
            for p in predictions[:2]
        ]
        ends = (scheduler.alphas_cumprod[int(at)] for at in (t, t - stride))
        alpha_t, sigma_t, alpha_s, sigma_s = (
            float(end) for a in ends for end in (a.sqrt(), (1.0 - a).sqrt())
        )
        v = textbook.step_variance(alpha_t, sigma_t, alpha_s, sigma_s, "small")
        log_p = textbook.paper_update(log_p, x_next, *means, v, 0.05)
        assert error(found[i + 1], log_p) < STEP


@pytest.mark.parametrize("of_predictions", [torch.float64, torch.float32, torch.bfloat16])
def test_points_are_compared_with_latents_in_float64(of_predictions):
    """Whatever the dtype of the predictions, beside which theirs must stand."""
    points = random(1, 9)[0]
    found = []
    for of_x in (torch.float32, torch.float64):
        chain = GuidedChain(TRACKERS["paper"], points=points.to(of_x))
        found.append(tracked_by(chain, steps_of(DDPMScheduler), of_x, of_predictions))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
    assert found[0].std() > 0.01


def test_a_thresholding_pipeline_in_float64():
    alone = tiny.tiny_ddpm().to(torch.float64)
    alone.scheduler = LIMITED["DDPM, thresholding"]()
    alone.set_progress_bar_config(disable=True)
    unwanted = tiny.tiny_unet(1).to(torch.float64)
    with apply_guidance(alone, TRACKERS["paper"], unwanted=unwanted) as trace:
        alone(num_inference_steps=3)
    assert trace.log_posterior is not None and trace.log_posterior.std() > 0


# ---------------------------------------------------------------------- devices without float64


class Narrow(Tensor):
    """A tensor as on a device that has no float64, such as MPS; a plain one once on the CPU."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = super().__torch_function__(func, types, args, kwargs or {})
        if func is Tensor.cpu:
            return found.as_subclass(Tensor)
        if isinstance(found, cls) and found.dtype == torch.float64:
            raise TypeError("this device has no float64")
        return found


def test_timesteps_are_read_where_there_is_no_float64():
    scheduler = steps_of(DDPMScheduler)
    timesteps = scheduler.timesteps
    scheduler.timesteps = timesteps.as_subclass(Narrow)
    with pytest.raises(TypeError, match="no float64"):
        scheduler.timesteps.double()
    for told in (None, float(timesteps[2]) + 1.0):
        assert _first_step(scheduler, told) == (0 if told is None else 2)
    for i, t in enumerate(timesteps):
        assert position(scheduler, float(t)) == i
    chain = GuidedChain(TRACKERS["paper"])
    for i, t in enumerate(scheduler.timesteps):
        x, positive, negative = (each.float() for each in random(3, i))
        assert chain.observe(scheduler, x, t) == i
        chain.guide(positive, negative)


def test_embeddings_are_read_where_there_is_no_float64():
    found = _unit(torch.tensor([[3.0, 4.0]]).as_subclass(Narrow))
    np.testing.assert_array_equal(found, [[0.6, 0.8]])


@pytest.mark.parametrize("package", [dng_kernels, dng_models])
def test_what_goes_to_the_cpu_is_widened_there(package):
    """For what no test runs without such a device: float64 after ``cpu()``, not before."""
    before = re.compile(r"(?<!\.cpu\(\))\.double\(\)\.([a-z]+\(\)\.)*(cpu\(|numpy\(force)")
    paths = sorted(Path(package.__file__).parent.rglob("*.py"))
    assert len(paths) > 10
    assert [str(path) for path in paths if before.search(path.read_text(encoding="utf-8"))] == []


# ---------------------------------------------------------------------- what is skipped


def skipping() -> tuple[GuidedChain, Any]:
    """A chain that skips whatever it may, and its scheduler."""
    scheduler = steps_of(DDPMScheduler)
    scheduler.set_timesteps(12)
    return GuidedChain(TRACKERS["paper"], skip_below=1e9), scheduler


@pytest.mark.filterwarnings("ignore:skip_below should be:UserWarning")
def test_a_step_that_is_not_asked_about_has_all_of_its_predictions():
    """Not those of the step before: what is given counts, and is evidence."""
    chain, scheduler = skipping()
    asked, expected = [], []
    for i, t in enumerate(scheduler.timesteps):
        x, positive, negative = (each.float() for each in random(3, i))
        chain.observe(scheduler, x, t)
        unasked = i == LONGEST_SKIP
        if not unasked:
            found = chain.to_evaluate()
            assert found is not None
            asked.append(bool(found.all()))
        guided = chain.guide(positive, negative)
        scale = chain.trace.last.scale[-1].reshape(-1, 1, 1, 1)
        assert bool((scale > 0).all())
        pushed = positive - scale * (negative - positive)
        seen = unasked or asked[-1]
        expected.append(seen)
        torch.testing.assert_close(guided, pushed if seen else positive)
    run = chain.trace.last
    moved = (run.log_posterior[1:] != run.log_posterior[:-1]).all(1)
    assert moved.tolist() == expected[:-1]
    # At the first step, at the one that was not asked about, and not again just after it.
    assert expected == [i in (0, LONGEST_SKIP) for i in range(12)]
    assert run.evaluations == 2 * SHAPE[0] and run.evaluations_saved == 10 * SHAPE[0]


@pytest.mark.filterwarnings("ignore:skip_below should be:UserWarning")
@pytest.mark.parametrize(("batch", "error"), [(0, ValueError), (2.0, TypeError), (2, ValueError)])
def test_a_batch_that_is_not_that_of_the_latents_is_refused(batch, error):
    chain, scheduler = skipping()
    chain.observe(scheduler, random(1)[0], scheduler.timesteps[0])
    with pytest.raises(error, match=f"batch must be .*got {batch}"):
        chain.to_evaluate(batch)


@pytest.mark.filterwarnings("ignore:skip_below should be:UserWarning")
def test_a_batch_that_is_not_that_of_the_predictions_is_refused():
    chain, scheduler = skipping()
    chain.begin(scheduler, 0)
    chain.to_evaluate(2)
    x = random(1)[0]
    with pytest.raises(ValueError, match="positive must have 2 images, .*to_evaluate.*, got 3"):
        chain.guide(x, x)
    chain.to_evaluate(3)
    chain.guide(x, x)
    chain.took(x, x)
    with pytest.raises(ValueError, match="batch must be 3, .*got 2"):
        chain.to_evaluate(2)


# ---------------------------------------------------------------------- the state of a run


def test_what_a_run_remembers_is_read():
    """Its tensors are as large as the latents: none is kept for nobody."""
    read = set()
    for path in Path(guided_run.__file__).parent.glob("*.py"):
        names = ("run", "self") if path.name == "guided_run.py" else ("run",)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                if isinstance(node.value, ast.Name) and node.value.id in names:
                    read.add(node.attr)
    assert [own.name for own in fields(guided_run.GuidedRun) if own.name not in read] == []


# ---------------------------------------------------------------------- what is given

EACH = [tracked(3.0, 0.2), tracked(1.0, 0.1)]
WITH_UNCONDITIONAL: dict[str, tuple[Any, dict[str, Any]]] = {
    "cfg": (TRACKERS["paper"], {"cfg_scale": 2.0}),
    "reference": (TRACKERS["paper"], {"reference": "unconditional"}),
    "leads": (TRACKERS["fbg"], {}),
    "each": (EACH, {"concepts": 2, "cfg_scale": 2.0}),
    "union": (TRACKERS["paper"], {"concepts": 2, "cfg_scale": 2.0}),
}
# Of these shapes some broadcast to the latents, (3, 4, 2, 2).
WRONG = {
    "one image": lambda p: p[:1],
    "one channel": lambda p: p[:, :1],
    "another dimension": lambda p: p[None],
    "fewer rows": lambda p: p[:, :, :1],
}


def at_first_step(rule: Any, **options: Any) -> tuple[GuidedChain, Tensor]:
    """A chain that was shown latents, and these."""
    chain, scheduler, (x,) = GuidedChain(rule, **options), steps_of(DDPMScheduler), random(1)
    chain.observe(scheduler, x, scheduler.timesteps[0])
    return chain, x


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", WITH_UNCONDITIONAL)
@pytest.mark.parametrize("argument", ["positive", "negatives", "unconditional"])
def test_a_prediction_of_another_shape_is_refused(argument, name, wrong):
    rule, options = WITH_UNCONDITIONAL[name]
    chain, x = at_first_step(rule, **options)
    given = {"positive": x, "negatives": [x] * (chain.concepts or 1), "unconditional": x}
    bad = WRONG[wrong](x)
    if argument == "negatives":
        given["negatives"][-1] = bad
    else:
        given[argument] = bad
    if argument == "negatives" and not chain.needs_negative:
        chain.guide(**given)  # which are not read
        return
    message = re.escape(f"{argument} must have the shape of the latents, {SHAPE}, got ")
    with pytest.raises(ValueError, match=message + re.escape(str(tuple(bad.shape)))):
        chain.guide(**given)


@pytest.mark.parametrize("argument", ["positive", "negatives", "unconditional"])
def test_what_is_no_prediction_is_refused_by_name(argument):
    chain, x = at_first_step(TRACKERS["paper"], cfg_scale=2.0)
    given = {"positive": x, "negatives": [x], "unconditional": x}
    given[argument] = [None] if argument == "negatives" else x.numpy()
    with pytest.raises(TypeError, match=f"{argument} must be a tensor"):
        chain.guide(**given)


@pytest.mark.parametrize("wrong", WRONG)
def test_latents_of_another_shape_than_were_shown_are_refused(wrong):
    chain, x = at_first_step(TRACKERS["paper"])
    bad = WRONG[wrong](x)
    with pytest.raises(ValueError, match="x must have the shape of the latents, .* got"):
        chain.guide(bad, bad, x=bad)


@pytest.mark.parametrize(("concepts", "points"), [(None, False), (2, False), (None, True)])
@pytest.mark.parametrize("returned", [0, 1, 2, 3, 4])
def test_a_network_must_return_all_predictions_and_no_other(returned, points, concepts):
    options = {"points": random(1)[0]} if points else {"concepts": concepts}
    chain, x = at_first_step(TRACKERS["path"], **options)
    wanted = 1 + (0 if points else concepts or 1)

    def network(at: Tensor) -> list[Tensor]:
        return [(k + 1.0) * at.sin() for k in range(returned)]

    negatives = [] if points else [x] * (concepts or 1)
    if returned == wanted:
        chain.guide(x, negatives, network=network)
        return
    message = f"network must return {wanted} predictions of the shape of x, .* got {returned}"
    with pytest.raises(ValueError, match=message):
        chain.guide(x, negatives, network=network)


@pytest.mark.parametrize("wrong", WRONG)
def test_a_network_must_return_predictions_of_the_shape_of_x(wrong):
    chain, x = at_first_step(TRACKERS["path"])
    message = r"network must return 2 predictions of the shape of x, \(3, 4, 2, 2\), got .*"
    with pytest.raises(ValueError, match=message + re.escape(str(tuple(WRONG[wrong](x).shape)))):
        chain.guide(x, x, network=lambda at: [at.sin(), WRONG[wrong](at.cos())])


ASKING = DynamicPrompts(lambda images, step: [()] * len(images), ["egg"], at=(0,), of=None)


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("argument", ["positive", "unconditional", "x"])
def test_a_prediction_of_another_shape_is_not_looked_at(argument, wrong):
    chain, x = at_first_step(ASKING, concepts=1, cfg_scale=2.0)
    given = {"positive": x, "unconditional": x, "x": x}
    given[argument] = WRONG[wrong](x)
    with pytest.raises(ValueError, match=f"{argument} must have the shape of the latents"):
        chain.look(**given)
    assert chain.asks


def test_what_is_looked_at_needs_the_unconditional_prediction():
    """It was the image of the positive prediction alone, and nothing said so."""
    chain, x = at_first_step(ASKING, concepts=1, cfg_scale=2.0)
    with pytest.raises(ValueError, match="unconditional must be given .*cfg_scale=2.0"):
        chain.look(x)


# ---------------------------------------------------------------------- samplers without noise


@pytest.mark.parametrize(
    ("kind", "has_network", "way_out"),
    [
        (DDIMScheduler, True, r"\. Either set pipe\.scheduler = .*, or give divergence_probes=1, "),
        (DDIMScheduler, False, r"\. Set pipe\.scheduler = EtaDDIM.*eta=1\.0\)$"),
        (CogVideoXDDIMScheduler, True, r"\. Give divergence_probes=1, .*a step$"),
        (CogVideoXDDIMScheduler, False, "$"),
    ],
)
def test_a_warning_of_too_little_noise_offers_what_there_is(kind, has_network, way_out):
    chain = GuidedChain(TRACKERS["paper"], has_network=has_network)
    with pytest.warns(UserWarning, match="adds no noise .* however many steps are taken" + way_out):
        chain.begin(steps_of(kind), 0)


# ---------------------------------------------------------------------- scale 0

UNPUSHED: dict[str, tuple[Any, int | None]] = {
    "one": (tracked(0.0, 0.2), None),
    "union": (tracked(0.0, 0.2), 2),
    "each": ([tracked(0.0, 0.2), tracked(0.0, 0.1)], 2),
    "each, after its interval": ([LimitedInterval(rule, 0.0, 0.1) for rule in EACH], 2),
    "asking": (ASKING, 1),
}


@pytest.mark.parametrize("cfg_scale", [None, 2.0])
@pytest.mark.parametrize("name", UNPUSHED)
def test_a_scale_of_0_leaves_the_bits_of_the_pipelines_own_guidance(name, cfg_scale):
    """In 16 bits too, which round a combination in float32 otherwise."""
    rule, concepts = UNPUSHED[name]
    chain, _ = at_first_step(rule, concepts=concepts, cfg_scale=cfg_scale)
    positive, empty, *others = (each.bfloat16() for each in random(4, 1))
    others = others[: concepts or 1]
    if chain.asks:
        chain.look(positive, empty)
    guided = chain.guide(positive, others, empty)
    expected = positive if cfg_scale is None else empty + cfg_scale * (positive - empty)
    assert torch.equal(guided, expected)
    assert bool((chain.trace.last.scale == 0).all())
    if cfg_scale is not None:
        wide = empty.float() + cfg_scale * (positive.float() - empty.float())
        assert not torch.equal(expected, wide.bfloat16())


def test_only_images_without_any_push_are_left_as_they_are():
    """Two pushes of opposite signs have a sum of 0, and push."""
    opposed = [tracked(2.0, 0.2), tracked(-2.0, 0.2)]
    chain, _ = at_first_step(opposed, concepts=2, cfg_scale=2.0)
    positive, empty, *others = (each.float() for each in random(4, 1))
    guided = chain.guide(positive, others, empty)
    assert bool((chain.trace.last.scale == 0).all())
    base = empty + 2.0 * (positive - empty)
    pushed = base - 2.0 * 0.2 / (1.0 - 0.4) * (others[0] - others[1])
    torch.testing.assert_close(guided, pushed, rtol=1e-5, atol=1e-5)
