"""The exact model: against a list of all pictures, against itself, and its samples."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from dng_models.text_to_image.laboratory.captions import Event, parse
from dng_models.text_to_image.laboratory.conditions import condition
from dng_models.text_to_image.laboratory.exact_model import ExactModel
from dng_models.text_to_image.laboratory.standard import laboratory_world
from tests.helpers.small_worlds import OBJECTS, SCENES, events, listed, small_world
from tests.helpers.statistical import FALSE_ALARM, assert_mean_close, assert_proportion
from tests.helpers.tolerances import LOG_PROB, error

WORLD = small_world()
MODEL = ExactModel(WORLD, dtype=torch.float64)
CAPTIONS = (
    "",
    "the sea",
    "ball",
    "ball, cup",
    "a ball and a cup",
    "a room with cup",
    "a room with egg, ball",
    "the sea with a ball and an egg and a cup",
    "the sea without egg",
    "ball without cup, egg",
    "a room with a ball with cup, egg",
    "a room with ball, cup with cup, egg without egg",
)
QUESTIONS = (
    ("", "ball"),
    ("", "the sea"),
    ("", "a room with egg, cup"),
    ("the sea", "the sea with egg, ball"),
    ("the sea", "egg, ball"),
    ("the sea", "a ball and an egg"),
    ("the sea with a ball", "a ball and an egg"),
    ("a room with ball, cup", "cup, egg"),
    ("a room with ball, cup", "a cup and an egg without ball"),
    ("a room without egg", "egg, cup"),
    ("ball", "the sea without cup"),
)
# The last: variance exploding, and so noisy that hardly anything is known.
LEVELS = ((1.0, 0.0), (0.9, 0.3), (0.6, 0.8), (0.1, 0.995), (0.0, 1.0), (1.0, 2.5))


def points(alpha: float, sigma: float, n: int = 24, seed: int = 0) -> torch.Tensor:
    """Noisy pictures, and some that are none."""
    pictures = MODEL.sample("", n, generator=seed).latents
    generator = torch.Generator().manual_seed(seed + 1)
    noise = torch.randn(pictures.shape, generator=generator, dtype=torch.float64)
    return alpha * pictures + (sigma + 0.1) * noise


def flat(x: torch.Tensor) -> np.ndarray:
    return x.flatten(1).numpy()


def restricted(event: Event):
    found = listed()
    return found.mixture.restrict(found.where(event))


# ---------------------------------------------------------------------- against the list


def test_the_list_has_every_picture_and_the_worlds_centre():
    found = listed()
    assert found.mixture.n_components == 2 * 7**4
    assert error(WORLD.centre, found.centre) < LOG_PROB


@pytest.mark.parametrize("caption", CAPTIONS)
def test_density_and_means_are_those_of_the_list(caption):
    mixture = restricted(parse(caption, WORLD))
    for alpha, sigma in LEVELS:
        x = points(alpha, sigma)
        noisy = mixture.diffuse(alpha, sigma)
        assert error(MODEL.log_prob(x, alpha, sigma, caption), noisy.log_prob(flat(x))) < LOG_PROB
        x0, noise = MODEL.x0_and_noise(x, alpha, sigma, caption)
        if sigma > 0.0:
            assert error(flat(x0), mixture.posterior_mean(flat(x), alpha, sigma)) < LOG_PROB
            assert error(flat(noise), -sigma * noisy.score(flat(x))) < LOG_PROB
        else:
            assert error(flat(x0), flat(x)) < LOG_PROB
            assert error(flat(noise), 0.0) < LOG_PROB


@pytest.mark.parametrize("caption, question", QUESTIONS)
def test_posteriors_are_those_of_the_list(caption, question):
    found, known = listed(), parse(caption, WORLD)
    asked = set(found.where(parse(question, WORLD)))
    # Places of the question's pictures in the mixture of the caption's.
    yes = [i for i, each in enumerate(found.where(known)) if each in asked]
    mixture = restricted(known)
    rest = sorted(set(range(mixture.n_components)) - set(yes))
    for alpha, sigma in LEVELS:
        x = points(alpha, sigma)
        holds, fails = MODEL.log_posterior(x, alpha, sigma, caption, question)
        noisy = mixture.diffuse(alpha, sigma)
        assert error(holds, noisy.log_posterior(flat(x), yes)) < LOG_PROB
        assert error(fails, noisy.log_posterior(flat(x), rest)) < LOG_PROB


@pytest.mark.parametrize("caption", CAPTIONS)
def test_the_judges_posterior_is_that_of_the_list(caption):
    found = listed()
    places = found.where(parse(caption, WORLD))
    scenes = np.array([found.scenes[i] for i in places])
    shown = np.array([[name or "" for name in found.shown[i]] for i in places])
    for alpha, sigma in LEVELS:
        x = points(alpha, sigma)
        posterior = MODEL.posterior(x, alpha, sigma, caption)
        shares = restricted(parse(caption, WORLD)).diffuse(alpha, sigma).responsibilities(flat(x))
        for i, scene in enumerate(SCENES):
            assert error(posterior.scene[:, i], shares[:, scenes == scene.name].sum(1)) < LOG_PROB
        for cell, (k, name) in itertools.product(range(4), enumerate(("", *OBJECTS))):
            expected = shares[:, shown[:, cell] == name].sum(1)
            assert error(posterior.cells[:, cell, k], expected) < LOG_PROB


@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (3, 1)])
@pytest.mark.parametrize("caption", ["", "a room with ball, cup", "egg without ball"])
def test_worlds_of_other_shapes(shape, caption):
    world, found = small_world(*shape), listed(*shape)
    model = ExactModel(world, dtype=torch.float64)
    x = 0.5 * model.sample("", 20).latents + 0.3
    mixture = found.mixture.restrict(found.where(parse(caption, world)))
    expected = mixture.diffuse(0.5, 0.4).log_prob(flat(x))
    assert error(model.log_prob(x, 0.5, 0.4, caption), expected) < LOG_PROB
    expected = mixture.posterior_mean(flat(x), 0.5, 0.4)
    assert error(flat(model.x0(x, 0.5, 0.4, caption)), expected) < LOG_PROB


@pytest.mark.parametrize("caption", CAPTIONS)
def test_probabilities_of_captions_are_those_of_the_list(caption):
    found, event = listed(), parse(caption, WORLD)
    total = found.mixture.weights[found.where(event)].sum()
    assert error(condition(WORLD, event).log_prior, np.log(total)) < LOG_PROB


def test_the_nearest_picture_is_that_of_the_list():
    x = points(1.0, 0.4)
    means = listed().mixture.means
    squares = ((flat(x)[:, None] - means) ** 2).sum(-1)
    nearest = MODEL.nearest(x)
    pictures = MODEL.pictures(nearest.scene, nearest.cells, nearest.variants)
    assert error(flat(pictures), means[squares.argmin(1)]) < LOG_PROB
    total = (nearest.distance**2).sum(1) * WORLD.scale**2 * 3 * WORLD.cell**2
    assert error(total, squares.min(1)) < LOG_PROB


# ---------------------------------------------------------------------- batches


def test_a_batch_of_different_captions_and_levels_is_each_by_itself():
    captions, levels = zip(*itertools.product(CAPTIONS, LEVELS), strict=True)
    x = torch.cat([points(*level, n=1, seed=i) for i, level in enumerate(levels)])
    alpha, sigma = (torch.tensor(each, dtype=torch.float64) for each in zip(*levels, strict=True))
    together = MODEL.conditions(captions)
    x0, noise = MODEL.x0_and_noise(x, alpha, sigma, together)
    density = MODEL.log_prob(x, alpha, sigma, captions)
    holds, fails = MODEL.log_posterior(x, alpha, sigma, captions, "the sea with egg, cup")
    posterior = MODEL.posterior(x, alpha, sigma, together)
    for i, caption in enumerate(captions):
        one, level = x[i : i + 1], (float(alpha[i]), float(sigma[i]))
        alone = MODEL.x0_and_noise(one, *level, caption)
        assert error(x0[i : i + 1], alone[0]) < LOG_PROB
        assert error(noise[i : i + 1], alone[1]) < LOG_PROB
        assert error(density[i], MODEL.log_prob(one, *level, caption)) < LOG_PROB
        answers = MODEL.log_posterior(one, *level, caption, "the sea with egg, cup")
        assert error(holds[i], answers[0]) < LOG_PROB
        assert error(fails[i], answers[1]) < LOG_PROB
        shown = MODEL.posterior(one, *level, caption)
        assert error(posterior.scene[i], shown.scene) < LOG_PROB
        assert error(posterior.cells[i], shown.cells) < LOG_PROB


def test_a_question_that_the_caption_answers():
    x = points(0.6, 0.8, n=4)
    for question, answer in (("the sea", 0), ("egg", 1), ("a room with cup", 1)):
        logs = MODEL.log_posterior(x, 0.6, 0.8, "the sea without egg", question)
        assert error(logs[answer], 0.0) < LOG_PROB
        assert torch.all(logs[1 - answer] == -torch.inf)


# ---------------------------------------------------------------------- identities

LEVEL = st.tuples(st.floats(0.05, 1.0), st.floats(0.05, 2.0))
SEED = st.integers(0, 2**16)


def possible(event: Event) -> bool:
    return len(listed().where(event)) > 0


@given(events(), events(), LEVEL, SEED)
def test_what_holds_and_what_does_not_make_up_the_whole(event, question, level, seed):
    assume(possible(event))
    x = points(*level, n=3, seed=seed)
    yes, no = MODEL.log_posterior(x, *level, event, question)
    assert error(torch.logaddexp(yes, no), 0.0) < LOG_PROB


@given(events(most_lists=1), st.frozensets(st.sampled_from(OBJECTS), min_size=1), LEVEL, SEED)
def test_the_composed_negative_leads_to_the_prediction_without_it(event, negative, level, seed):
    unwanted = event & Event(required=frozenset({negative}))
    ideal = event & Event(excluded=negative)
    assume(possible(unwanted) and possible(ideal))
    x = points(*level, n=3, seed=seed)
    base, pushed = MODEL.x0(x, *level, event), MODEL.x0(x, *level, unwanted)
    yes, no = MODEL.log_posterior(x, *level, event, unwanted)
    odds = torch.exp(yes - no)
    assume(float(odds.max()) < 1e6)  # beyond, the identity itself cancels
    guided = base - odds[:, None, None, None] * (pushed - base)
    assert error(guided, MODEL.x0(x, *level, ideal)) < LOG_PROB * max(1.0, float(odds.max()))


@given(events(), LEVEL, SEED)
def test_the_noise_is_the_gradient_of_the_density(event, level, seed):
    assume(possible(event))
    x = points(*level, n=3, seed=seed)
    generator = torch.Generator().manual_seed(seed + 2)
    step = 1e-5 * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    ends = [MODEL.log_prob(x + sign * step, *level, event) for sign in (1.0, -1.0)]
    slope = -(MODEL.x0_and_noise(x, *level, event)[1] * step).sum((1, 2, 3)) / level[1]
    # A third derivative times 1e-15, and rounding by 1e-16 of densities up to 1e4.
    assert torch.all(((ends[0] - ends[1]) / 2.0 - slope).abs() < 1e-10)


@given(events(), LEVEL, SEED)
def test_tweedies_formula(event, level, seed):
    assume(possible(event))
    x = points(*level, n=3, seed=seed)
    x0, noise = MODEL.x0_and_noise(x, *level, event)
    assert error(level[0] * x0 + level[1] * noise, x) < LOG_PROB


def test_the_predictions_have_a_forward_derivative():
    x = points(0.6, 0.8, n=3)
    step = torch.ones_like(x)

    def prediction(x):
        return MODEL.x0(x, 0.6, 0.8, ["a room with egg, ball", "", "cup without egg"])

    _, slope = torch.func.jvp(prediction, (x,), (step,))
    ends = [prediction(x + sign * 1e-5 * step) for sign in (1.0, -1.0)]
    assert error(slope, (ends[0] - ends[1]) / 2e-5) < 1e-8


# ---------------------------------------------------------------------- the laboratory's world

# Rounding of float32 in exponents of up to 1e5, of which a picture's density is the sum.
ROUNDED = {"x0": 1e-4, "log_prob": 1e-5, "posterior": 0.02}


@pytest.mark.parametrize("level", [(0.07, 0.998), (0.5, 0.866), (0.9, 0.436), (0.999, 0.04)])
def test_float32_is_float64_rounded(level):
    world = laboratory_world()
    single, double = ExactModel(world), ExactModel(world, dtype=torch.float64)
    captions = ["", "egg, sausage", "a holiday with football", "an english breakfast"] * 2
    pictures = single.sample(captions).latents
    noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(1))
    x = level[0] * pictures + level[1] * noise
    wide = x.double()
    assert single.x0(x, *level, captions).dtype == torch.float32
    gap = single.x0(x, *level, captions) - double.x0(wide, *level, captions)
    assert gap.abs().max() < ROUNDED["x0"]
    expected = double.log_prob(wide, *level, captions)
    assert error(single.log_prob(x, *level, captions), expected) < ROUNDED["log_prob"]
    for one, two in zip(
        single.log_posterior(x, *level, captions, "a holiday with football, jar"),
        double.log_posterior(wide, *level, captions, "a holiday with football, jar"),
        strict=True,
    ):
        assert error(one, two) < ROUNDED["posterior"]


def test_half_precision_is_computed_in_single():
    world = laboratory_world()
    model = ExactModel(world)
    x = model.sample("a holiday", 2).latents.half()
    assert torch.equal(model.x0(x, 0.5, 0.8, ""), model.x0(x.float(), 0.5, 0.8, ""))


# ---------------------------------------------------------------------- samples

N = 4000


def test_samples_have_the_probabilities_of_the_list():
    found = listed()
    captions = ("", "a room with ball, cup with egg", "the sea without egg")
    claims = [(caption, name) for caption in captions for name in (*OBJECTS, "a room")]
    for caption, name in claims:
        drawn = MODEL.sample(caption, N, generator=3)
        places = found.where(parse(caption, WORLD))
        weights = found.mixture.weights[places] / found.mixture.weights[places].sum()
        if name in OBJECTS:
            there = (drawn.cells == 1 + OBJECTS.index(name)).any(1)
            is_there = np.array([name in found.shown[i] for i in places])
        else:
            there = drawn.scene == 0
            is_there = np.array([found.scenes[i] == name for i in places])
        expected = float(min(weights[is_there].sum(), 1.0))
        assert_proportion(int(there.sum()), N, expected, FALSE_ALARM / len(claims))


def test_samples_are_normal_about_the_pictures_that_they_name():
    drawn = MODEL.sample("", N, generator=4)
    residual = drawn.latents - MODEL.pictures(drawn.scene, drawn.cells, drawn.variants)
    unit = flat(residual / (WORLD.scale * WORLD.bandwidth))
    assert_mean_close(unit, 0.0, std=1.0, alpha=FALSE_ALARM / 2.0)
    # A square of a normal number has variance 2; a picture has D of them.
    dimensions = unit.shape[1]
    std = (2.0 / dimensions) ** 0.5
    assert_mean_close((unit**2).mean(1), 1.0, std=std, alpha=FALSE_ALARM / 2.0)


def test_variants_are_equally_likely_and_cells_alike():
    drawn = MODEL.sample("a room", N, generator=5)
    ball = (drawn.cells == 1).numpy()
    assert_proportion(int(ball.sum()), ball.size, 0.3, FALSE_ALARM / 3.0)
    assert_proportion(int(ball[:, 3].sum()), N, 0.3, FALSE_ALARM / 3.0)
    second = int((drawn.variants[drawn.cells == 1] == 1).sum())
    assert_proportion(second, int(ball.sum()), 0.5, FALSE_ALARM / 3.0)


def test_samples_depend_on_the_seed_alone():
    one, two = (
        ExactModel(WORLD, dtype=dtype).sample(CAPTIONS, generator=7)
        for dtype in (torch.float32, torch.float64)
    )
    assert torch.equal(one.cells, two.cells) and torch.equal(one.variants, two.variants)
    assert error(one.latents, two.latents) < 1e-6
    assert not torch.equal(one.latents, ExactModel(WORLD).sample(CAPTIONS, generator=8).latents)


@pytest.mark.slow
def test_samples_are_the_same_in_every_process():
    code = """
from dng_models.text_to_image.laboratory.exact_model import ExactModel
from tests.helpers.small_worlds import small_world
captions = ["a ball and a cup with cup, egg", "a cup and an egg", "egg, ball with ball, cup"] * 5
print(ExactModel(small_world()).sample(captions).cells.tolist())
"""
    outputs = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=Path(__file__).resolve().parents[3],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "2", "3")
    ]
    assert len(set(outputs)) == 1


# ---------------------------------------------------------------------- errors

X = torch.zeros(3, 12, 2, 2, dtype=torch.float64)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: ExactModel(WORLD, dtype=torch.float16), TypeError, "dtype must be torch.float32"),
        (
            lambda: MODEL.x0(X[:, :5], 1.0, 1.0, ""),
            ValueError,
            r"x must be latents of shape \(B, 12",
        ),
        (
            lambda: MODEL.x0(X, torch.ones(2), 1.0, ""),
            ValueError,
            r"alpha must .* got shape \(2,\)",
        ),
        (lambda: MODEL.x0(X, 1.0, torch.ones(3, 1), ""), ValueError, "sigma must"),
        (lambda: MODEL.x0(X, 1.0, 1.0, ["", ""]), ValueError, "given must have one .* 3 .* got 2"),
        (lambda: MODEL.x0(X, 1.0, 1.0, MODEL.conditions("", 2)), ValueError, "of 3 images, got 2"),
        (lambda: MODEL.x0(X, 1.0, 1.0, []), TypeError, "given must be a caption"),
        (lambda: MODEL.x0(X, 1.0, 1.0, 3), TypeError, "given must be a caption"),
        (lambda: MODEL.x0(X, 1.0, 1.0, "a bal"), ValueError, "no 'bal'; did you mean 'ball'"),
        (lambda: MODEL.log_posterior(X, 1.0, 1.0, ""), ValueError, "question must be given"),
        (
            lambda: MODEL.log_posterior(X, 1.0, 1.0, MODEL.conditions("", 3)),
            ValueError,
            "made with a question",
        ),
        (lambda: MODEL.conditions("", 3, question=["", ""]), ValueError, "question must have one"),
    ],
)
def test_errors(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


def test_a_caption_that_cannot_happen_is_an_error():
    narrow = ExactModel(small_world(1, 1))
    with pytest.raises(ValueError, match="can happen in 1 cells, got 'a ball and a cup'"):
        narrow.conditions("a ball and a cup", 2)
    with pytest.raises(ValueError, match="can happen"):
        MODEL.conditions(
            Event(required=frozenset({frozenset({"egg"})}), excluded=frozenset({"egg"})), 2
        )


def test_too_many_lists_are_an_error():
    world = laboratory_world()
    several = world.objects[:12]
    lists = frozenset(frozenset({each, "skyline"}) for each in several)
    with pytest.raises(ValueError, match="fewer different lists"):
        ExactModel(world).conditions(Event(required=lists), 1)


def test_conditions_are_kept():
    assert MODEL.conditions(["egg", ""]) is MODEL.conditions(["egg", ""])
