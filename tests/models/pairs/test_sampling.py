"""The sampler of dng_models: with exact denoisers it is dng_math's, with networks the paper's."""

from __future__ import annotations

import math
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel

import dng_math
import dng_models
from dng_math import (
    CRG,
    DDIM,
    DDPM,
    SPELL,
    CFGPlusPlus,
    ClassifierFreeGuidance,
    ContrastiveCFG,
    DynamicNegativeGuidance,
    FeedbackGuidance,
    FeynmanKac,
    GaussianMixture,
    GeoGuide,
    ImageReferenced,
    LimitedInterval,
    LogOddsTracker,
    NegativePrompting,
    NoiseSchedule,
    PaperTracker,
    PathTracker,
    PerpNeg,
    SafeLatentDiffusion,
    SignedNegative,
    TimeProfile,
    Unguided,
    noise,
)
from dng_math.rules import innermost
from dng_models.pairs.denoisers import Labelled
from dng_models.pairs.sampling import sample, timesteps
from tests.helpers import textbook
from tests.helpers.tolerances import CHAIN_FLOAT32, STEP, WHOLE_CHAIN, error

LINEAR = NoiseSchedule.linear()
RNG = np.random.default_rng(5)
MIXTURE = GaussianMixture(
    [0.1, 0.15, 0.2, 0.25, 0.3], 1.5 * RNG.normal(size=(5, 3)), RNG.uniform(0.1, 0.4, (5, 3))
)
FORBIDDEN, POSITIVE = [1], [3, 4]
STEPS = 20
MILD = {"prior": 0.15, "temperature": 0.2, "p_min": 0.0}  # so that states end at no clamp
PROFILE = MILD | {"temperature": TimeProfile((0.1, 0.6), (0.05, 0.3))}

RULES = {
    "unguided": Unguided(),
    "np": NegativePrompting(0.5),
    "sld": SafeLatentDiffusion(0.5, 0.3, slope=2.0, warmup_steps=3),
    "contrastive": ContrastiveCFG(1.0, 0.5),
    "paper": DynamicNegativeGuidance(1.5, PaperTracker(**MILD)),
    "log-odds": DynamicNegativeGuidance(1.0, LogOddsTracker(**MILD)),
    "profile": DynamicNegativeGuidance(1.0, PaperTracker(**PROFILE)),
    "interval": LimitedInterval(DynamicNegativeGuidance(1.5, PaperTracker(**MILD)), 0.2, 0.7),
    "cfg": ClassifierFreeGuidance(1.5),
    "fbg": FeedbackGuidance(temperature=0.2, step_offset=-0.1),
    # While there is noise: later the positive prediction is the base, and has no direction.
    "perp-neg": LimitedInterval(PerpNeg(0.7, 0.4), 0.5),
    "geoguide": LimitedInterval(GeoGuide(0.5), 0.4),
    "cfg++": CFGPlusPlus(0.3),
    "hybrid": FeedbackGuidance(temperature=0.2, step_offset=-0.1, cfg_scale=1.5, sigma_lo=0.5),
    "spell": LimitedInterval(SPELL(MIXTURE.means[1:3], 1.5, 0.5), 0.1),
}
# With classifier-free guidance of this scale beneath, towards these.
LED_TO, CFG_SCALE = [1, 3, 4], 1.5
BENEATH = {
    "signed": SignedNegative(0.5),
    "sld": SafeLatentDiffusion.preset("weak", 0.5),
    "contrastive": ContrastiveCFG.published(0.5, 0.5),
    "from the positive": DynamicNegativeGuidance(1.5, PaperTracker(**MILD)),
    "from the unconditional": DynamicNegativeGuidance(1.0, LogOddsTracker(**MILD), "unconditional"),
    "crg": LimitedInterval(CRG(0.05), 0.4),
    "spell": SPELL(MIXTURE.means[1:3], 1.5, 0.5),
}
SEVERAL = [[1], [0, 3]]


def denoiser(components: list[int] | None):
    """The noise that an exact mixture predicts, as a network with a timestep for its time."""
    part = MIXTURE if components is None else MIXTURE.restrict(components)

    def predict(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        index = int(t[0]) + 1
        assert torch.all(t == t[0])
        alpha, sigma = LINEAR.alpha[index], LINEAR.sigma[index]
        now = x.double().numpy()
        x0 = part.posterior_mean(now, alpha, sigma)
        return torch.from_numpy((now - alpha * x0) / sigma).to(x.dtype)

    return predict


def exact_noise(seed: int):
    """The random numbers of dng_math.sample."""

    def draw(step: int | None, first_image: int, shape: tuple[int, ...]) -> torch.Tensor:
        options = {"stream": noise.INITIAL_STREAM} if step is None else {"step": step}
        z = noise.standard_normal(seed, shape[0], shape[1], first_sample=first_image, **options)
        return torch.from_numpy(z)

    return draw


def same_chain(
    rule, forbidden, unwanted, sampler, dtype, *, positive=POSITIVE, both=None, **options
):
    """The chain of networks and that of dng_math; ``both`` are arguments of both."""
    both = both or {}
    beneath = "cfg_scale" in both
    expected = dng_math.sample(
        MIXTURE,
        LINEAR.respace(STEPS),
        rule,
        n=11,
        first_sample=6,
        forbidden=forbidden,
        positive=positive if rule.needs_positive or beneath else None,
        sampler=sampler,
        seed=3,
        **both,
        record=["scale", "trajectory"]
        + (["tracked"] if hasattr(innermost(rule), "posterior") else []),
    )
    got = sample(
        denoiser(None),
        unwanted,
        rule,
        positive=denoiser(positive),
        seed=3,
        **both,
        shape=(3,),
        num_images=11,
        first_image=6,
        batch_size=4,
        schedule=LINEAR,
        steps=STEPS,
        sampler=sampler,
        noise=exact_noise(3),
        dtype=dtype,
        record=["scale", "x", "log_posterior"],
        **options,
    )
    return got, expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", RULES)
@pytest.mark.thinned(3)
def test_exact_denoisers_give_the_exact_chain(name, dtype):
    bound = WHOLE_CHAIN if dtype == torch.float64 else CHAIN_FLOAT32
    for sampler in (DDPM(), DDPM("large")):
        got, expected = same_chain(RULES[name], FORBIDDEN, denoiser(FORBIDDEN), sampler, dtype)
        assert error(got.images, expected.x) < max(bound, 1e-6)  # images are float32
        assert error(got.records["x"], expected.trajectory) < bound
        assert error(got.records["scale"], expected.scale[:, 0]) < bound * 10
        assert np.array_equal(got.time, expected.time)
        if expected.tracked is not None:
            assert error(got.records["log_posterior"], expected.tracked[:, 0]) < bound
            assert error(got.log_posterior, expected.log_posterior[0]) < bound
            assert len(np.unique(got.records["log_posterior"])) > expected.tracked.size / 3


@pytest.mark.parametrize("name", BENEATH)
def test_with_guidance_beneath_it_is_the_exact_chain_too(name):
    rule, both = BENEATH[name], {"cfg_scale": CFG_SCALE}
    got, expected = same_chain(
        rule,
        FORBIDDEN,
        denoiser(FORBIDDEN),
        DDPM("large"),
        torch.float64,
        positive=LED_TO,
        both=both,
    )
    assert error(got.records["x"], expected.trajectory) < WHOLE_CHAIN
    assert error(got.records["scale"], expected.scale[:, 0]) < WHOLE_CHAIN * 10
    if expected.tracked is not None:
        assert error(got.records["log_posterior"], expected.tracked[:, 0]) < WHOLE_CHAIN


@pytest.mark.parametrize("reference", ["positive", "unconditional"])
def test_several_concepts_are_measured_from_either(reference):
    rule = DynamicNegativeGuidance(1.0, LogOddsTracker(**MILD), reference)
    got, expected = same_chain(
        rule,
        SEVERAL,
        [denoiser(each) for each in SEVERAL],
        DDPM(),
        torch.float64,
        positive=[0, 1, 3, 4],
        both={"cfg_scale": CFG_SCALE},
    )
    assert error(got.records["x"], expected.trajectory) < WHOLE_CHAIN
    assert error(got.records["log_posterior"], expected.tracked) < WHOLE_CHAIN


# ---------------------------------------------------------------- weights

WEIGHTED = {
    "paper": (DynamicNegativeGuidance(2.0, PaperTracker(**MILD)), FORBIDDEN, FeynmanKac()),
    "several": (
        DynamicNegativeGuidance(0.5, LogOddsTracker(**MILD)),
        SEVERAL,
        FeynmanKac(0.9, largest_increment=1.0),
    ),
    "never": (DynamicNegativeGuidance(3.0, LogOddsTracker(**MILD)), FORBIDDEN, FeynmanKac(0.0)),
    "always": (
        LimitedInterval(DynamicNegativeGuidance(2.0, PaperTracker(**MILD)), 0.1, 0.9),
        FORBIDDEN,
        FeynmanKac(1.0),
    ),
}


@pytest.mark.parametrize("name", WEIGHTED)
def test_a_weighted_population_is_that_of_the_exact_theory(name):
    """Its weights, effective sizes and ancestors, in a population that no batch begins."""
    rule, forbidden, weights = WEIGHTED[name]
    several = isinstance(forbidden[0], list)
    unwanted = [denoiser(each) for each in forbidden] if several else denoiser(forbidden)
    got, expected = same_chain(
        rule, forbidden, unwanted, DDPM("large"), torch.float64, both={"weights": weights}
    )
    assert error(got.records["x"], expected.trajectory) < WHOLE_CHAIN
    assert error(got.log_weights, expected.log_weights) < WHOLE_CHAIN
    assert error(got.ess, expected.ess) < WHOLE_CHAIN
    assert got.log_weights.shape == (11,) and got.ess.shape == (STEPS + 1,)
    assert float(got.ess.min()) < 11.0, "nothing was weighed"


def path_network(components):
    """An exact denoiser with derivatives, of a mixture of spheres that torch computes itself."""
    part = MIXTURE if components is None else MIXTURE.restrict(components)
    means = torch.from_numpy(np.array(part.means))
    log_weights = torch.from_numpy(np.log(part.weights / part.weights.sum()))

    def predict(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        index = int(t[0]) + 1
        alpha, sigma = float(LINEAR.alpha[index]), float(LINEAR.sigma[index])
        v = (0.3 * alpha) ** 2 + sigma**2
        gaps = x[:, None] - alpha * means
        share = torch.softmax(log_weights - (gaps * gaps).sum(-1) / (2.0 * v), dim=1)
        return sigma / v * (share[..., None] * gaps).sum(1)

    return predict


@pytest.mark.parametrize("tracker", [PaperTracker(prior=0.15), PathTracker(prior=0.15)])
def test_a_population_is_a_function_of_seed_size_and_step(tracker):
    """In any batches; another number of images is another population, and without resampling none.

    The path tracker's memory of the last point goes on from the ancestors.
    """
    rule = DynamicNegativeGuidance(3.0, tracker)
    options = {"shape": (3,), "steps": 12, "seed": 4, "dtype": torch.float64}

    def drawn(number, batch, weights):
        return sample(
            path_network(None),
            path_network(FORBIDDEN),
            rule,
            num_images=number,
            batch_size=batch,
            weights=weights,
            **options,
        )

    whole = drawn(12, 12, FeynmanKac(0.9))
    parts = drawn(12, 5, FeynmanKac(0.9))
    assert float(whole.ess.min()) < 0.9 * 12
    assert error(parts.images, whole.images) < 1e-6 and error(parts.ess, whole.ess) < 1e-9
    fewer = drawn(6, 5, FeynmanKac(0.9))
    assert not torch.allclose(fewer.images, whole.images[:6])
    free, alone = drawn(12, 5, FeynmanKac(0.0)), drawn(6, 5, FeynmanKac(0.0))
    assert torch.equal(free.images[:6], alone.images)
    assert error(alone.log_weights, free.log_weights[:6]) < 1e-9


@pytest.mark.parametrize(
    ("options", "error_type", "words"),
    [
        ({"weights": 0.5}, TypeError, "weights must be a FeynmanKac, got 0.5"),
        (
            {"rule": NegativePrompting(), "weights": FeynmanKac()},
            ValueError,
            "weighted must be False",
        ),
        ({"weights": FeynmanKac(), "clip": 1.0}, ValueError, "clip is None"),
        ({"cfg_scale": "x"}, TypeError, "cfg_scale"),
        ({"cfg_scale": 2.0, "positive": None}, TypeError, "positive must be a network"),
        ({"rule": CFGPlusPlus(), "cfg_scale": 2.0}, ValueError, "cfg_scale must be None"),
        ({"rule": CRG()}, ValueError, "cfg_scale must be given for CRG"),
        ({"rule": ImageReferenced([[0.0]], 0.1)}, ValueError, "unwanted=PointsDenoiser"),
        ({"rule": SPELL([[0.0]], 1.0)}, ValueError, "points of SPELL must have the 3 numbers"),
    ],
)
def test_what_cannot_be_sampled_is_refused_by_name(options, error_type, words):
    given = {"rule": DynamicNegativeGuidance(1.0, PaperTracker(prior=0.1))} | {
        "positive": denoiser(POSITIVE),
        **options,
    }
    with pytest.raises(error_type, match=words):
        sample(
            denoiser(None),
            denoiser(FORBIDDEN),
            given.pop("rule"),
            shape=(3,),
            num_images=2,
            steps=3,
            **given,
        )


@pytest.mark.parametrize("tracker", [PaperTracker, LogOddsTracker])
def test_several_concepts_each_have_their_posterior(tracker):
    rule = DynamicNegativeGuidance(1.0, tracker(**MILD))
    unwanted = [denoiser(part) for part in SEVERAL]
    got, expected = same_chain(rule, SEVERAL, unwanted, DDPM(), torch.float64)
    assert error(got.records["x"], expected.trajectory) < WHOLE_CHAIN
    assert error(got.records["log_posterior"], expected.tracked) < WHOLE_CHAIN
    assert error(got.log_posterior, expected.log_posterior) < WHOLE_CHAIN
    assert error(got.records["scale"], expected.scale.sum(axis=1)) < WHOLE_CHAIN
    assert got.log_posterior.shape == (2, 11)


def test_the_cap_of_several_concepts_is_that_of_the_theory():
    """Posteriors that add up to more than p_max."""
    rule = DynamicNegativeGuidance(0.5, PaperTracker(prior=0.45, temperature=0.1, p_max=0.6))
    unwanted = [denoiser(part) for part in SEVERAL]
    got, expected = same_chain(rule, SEVERAL, unwanted, DDPM(), torch.float64)
    assert np.exp(expected.tracked).sum(axis=1).max() > 0.6
    assert error(got.records["x"], expected.trajectory) < WHOLE_CHAIN


# ---------------------------------------------------------------- networks


def tiny(seed: int, **options) -> UNet2DModel:
    torch.manual_seed(seed)
    return UNet2DModel(
        sample_size=4,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(4, 4),
        norm_num_groups=2,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        add_attention=False,
        **options,
    ).eval()


PUBLISHED = {
    "paper": (DDPM(), PaperTracker(prior=0.1, temperature=0.7, offset=2e-4)),
    "published": (
        DDPM("large"),
        PaperTracker(prior=0.1, temperature=0.7, offset=2e-4, variance="published"),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_networks_follow_algorithms_1_and_2_for_a_whole_chain(name):
    """Every step of a chain of 100, with the options of the paper and of the authors' program."""
    sampler, tracker = PUBLISHED[name]
    base, unwanted = tiny(0).double(), tiny(1).double()
    n, steps = 5, 100
    rng = np.random.default_rng(2)
    start, noises = rng.normal(size=(n, 16)), rng.normal(size=(steps, n, 16))
    schedule = NoiseSchedule.linear(steps)

    def draw(step, first_image, shape):
        z = start / schedule.sigma[-1] if step is None else noises[steps - 1 - step]
        return torch.from_numpy(z[first_image : first_image + shape[0]].reshape(shape))

    def predict(net):
        def call(x, t):
            with torch.no_grad():
                images = torch.from_numpy(x.reshape(-1, 1, 4, 4))
                return net(images, torch.full((len(x),), t)).sample.numpy().reshape(x.shape)

        return call

    states = []
    chain = textbook.paper_chain if name == "paper" else textbook.published_chain
    c = textbook.ddpm_coefficients(steps)
    x, last = chain(
        c,
        lambda x, t: (states.append(x), predict(base)(x, t))[1],
        predict(unwanted),
        start,
        noises,
        guidance_scale=4.0,
        prior=0.1,
        temperature=0.7,
        offset=2e-4,
    )
    got = sample(
        base,
        unwanted,
        DynamicNegativeGuidance(4.0, tracker),
        shape=(1, 4, 4),
        num_images=n,
        batch_size=n,
        schedule=schedule,
        sampler=sampler,
        noise=draw,
        dtype=torch.float64,
        record=["x", "log_posterior"],
    )
    expected = np.stack([*states, x]).reshape(steps + 1, n, 1, 4, 4)
    assert error(got.records["x"], expected) < STEP
    log_last = last if name == "paper" else np.log(last)
    assert error(got.log_posterior, log_last) < STEP
    moved = got.records["log_posterior"].exp()
    assert moved.std() > 0.01  # the posterior did something


def test_an_image_does_not_depend_on_how_many_are_made():
    base, unwanted = tiny(0), tiny(1)
    rule = DynamicNegativeGuidance(2.0, PaperTracker(prior=0.3))
    options = {"shape": (1, 4, 4), "steps": 5, "batch_size": 16, "seed": 7, "record": ["scale"]}
    whole = sample(base, unwanted, rule, num_images=40, **options)
    part = sample(base, unwanted, rule, num_images=9, first_image=12, **options)
    assert torch.equal(part.images, whole.images[12:21])
    assert torch.equal(part.log_posterior, whole.log_posterior[12:21])
    assert torch.equal(part.records["scale"], whole.records["scale"][:, 12:21])
    other = sample(base, unwanted, rule, num_images=9, first_image=12, **options | {"seed": 8})
    assert not torch.equal(other.images, part.images)


def test_another_batch_size_changes_rounding_only():
    base, unwanted = tiny(0), tiny(1)
    rule = DynamicNegativeGuidance(2.0, PaperTracker(prior=0.3))
    options = {"shape": (1, 4, 4), "steps": 20, "num_images": 10}
    images = [sample(base, unwanted, rule, batch_size=b, **options).images for b in (3, 10)]
    assert error(images[0], images[1]) < 1e-4


@pytest.mark.parametrize("rule", [NegativePrompting(0.5), PerpNeg(0.5)], ids=str)
def test_stacked_networks_are_the_separate_ones(rule):
    nets = [tiny(0), tiny(1), tiny(2)]
    options = {"shape": (1, 4, 4), "steps": 5, "num_images": 4, "batch_size": 4}
    together, apart = (
        sample(nets[0], nets[1], rule, positive=nets[2], evaluation=evaluation, **options).images
        for evaluation in ("stacked", "separate")
    )
    assert error(together, apart) < 1e-4


def test_a_conditional_network_is_called_once_for_both_predictions():
    net = tiny(0, num_class_embeds=4)
    calls = []

    def counted(x, t, class_labels):
        calls.append((len(x), class_labels.tolist()))
        return net(x, t, class_labels=class_labels)

    rule = DynamicNegativeGuidance(2.0, PaperTracker(prior=0.3))
    options = {"shape": (1, 4, 4), "steps": 5, "num_images": 2, "batch_size": 2}
    together = sample(Labelled(counted, 3), Labelled(counted, 1), rule, **options)
    assert calls == [(4, [3, 3, 1, 1])] * 5
    apart = sample(
        lambda x, t: net(x, t, class_labels=torch.full_like(t, 3)),
        lambda x, t: net(x, t, class_labels=torch.full_like(t, 1)),
        rule,
        **options,
    )
    assert error(together.images, apart.images) < 1e-4
    several = sample(Labelled(net, 3), [Labelled(net, 1), Labelled(net, 2)], rule, **options)
    assert several.log_posterior.shape == (2, 2)


def test_autocast_leaves_x_and_the_posterior_in_float32():
    base, unwanted = tiny(0), tiny(1)
    rule = DynamicNegativeGuidance(2.0, PaperTracker(prior=0.3))
    options = {"shape": (1, 4, 4), "steps": 10, "num_images": 4, "batch_size": 4}
    full = sample(base, unwanted, rule, **options)
    half = sample(base, unwanted, rule, autocast=torch.bfloat16, **options)
    assert half.images.dtype == half.log_posterior.dtype == torch.float32
    assert not torch.equal(half.images, full.images)
    assert (half.images - full.images).norm() < 0.02 * full.images.norm()  # 8 bits


def test_a_network_with_dropout_samples_without_it_and_is_left_as_it_was():
    net = tiny(0, dropout=0.5).train()
    options = {"shape": (1, 4, 4), "steps": 3, "num_images": 2, "batch_size": 2}
    first, second = (sample(net, None, Unguided(), **options).images for _ in range(2))
    assert torch.equal(first, second) and net.training


def test_clipping_bounds_the_image():
    options = {"shape": (1, 4, 4), "steps": 10, "num_images": 4, "batch_size": 4}
    free = sample(tiny(0), tiny(1), NegativePrompting(20.0), record=["x0"], **options)
    held = sample(tiny(0), tiny(1), NegativePrompting(20.0), record=["x0"], clip=1.0, **options)
    assert free.images.abs().max() > 1 and held.images.abs().max() <= 1
    assert torch.equal(held.records["x0"][-1], held.images)
    assert error(free.records["x0"][-1], free.images) < 1e-5


@pytest.mark.parametrize("steps", [1, 7, 100, 1000])
def test_timesteps_are_those_of_the_schedule(steps):
    kept = LINEAR.respace(steps)
    for t, alpha in zip(timesteps(LINEAR, steps), kept.alpha[:0:-1], strict=True):
        assert math.isclose(LINEAR.alpha[t + 1], alpha, rel_tol=1e-15)
    assert timesteps(LINEAR, steps)[0] == 999


def test_progress_names_what_is_done(capsys):
    options = {"shape": (1, 4, 4), "steps": 3, "num_images": 2, "batch_size": 2}
    sample(tiny(0), None, Unguided(), progress="guiding", **options)
    assert re.search("guiding.*6/6|guiding.*3/3", capsys.readouterr().err)


# ---------------------------------------------------------------- bad input

NET = denoiser(None)
GOOD = {"shape": (3,), "num_images": 1, "steps": 2, "batch_size": 1}
DNG = DynamicNegativeGuidance(1.0, PaperTracker(prior=0.1))
BAD = [
    ((NET, NET, Unguided()), {"num_images": 0}, "num_images must be.*0"),
    ((NET, NET, Unguided()), {"batch_size": 0}, "batch_size must be.*0"),
    ((NET, NET, Unguided()), {"first_image": -1}, "first_image must be.*-1"),
    ((NET, NET, Unguided()), {"steps": 1001}, "steps must be.*1001"),
    ((NET, NET, Unguided()), {"record": ["scales"]}, "record must be one of.*scales"),
    ((NET, NET, Unguided()), {"prediction_type": "noise"}, "prediction_type must be one of.*noise"),
    ((NET, NET, Unguided()), {"evaluation": "both"}, "evaluation must be one of.*both"),
    ((NET, NET, Unguided()), {"schedule": 1000}, "schedule must be a NoiseSchedule, got 1000"),
    ((NET, NET, Unguided()), {"dtype": torch.float16}, "dtype must be torch.float32 or"),
    ((NET, NET, Unguided()), {"autocast": torch.float32}, "autocast must be torch.bfloat16"),
    ((3, NET, Unguided()), {}, "base must be a network or a callable.*3"),
    ((NET, None, NegativePrompting()), {}, "unwanted must be a network.*None"),
    ((NET, [], DNG), {}, "unwanted must not be an empty"),
    ((NET, [NET, NET], NegativePrompting()), {}, "only DNG.*posterior"),
    ((NET, NET, PerpNeg()), {}, "positive must be a network.*None"),
    ((NET, NET, ClassifierFreeGuidance()), {}, "positive must be a network.*None"),
    ((NET, NET, DynamicNegativeGuidance(1.0, PaperTracker())), {}, "prior must be given"),
    (
        (NET, NET, DynamicNegativeGuidance(1.0, PaperTracker(prior=0.1, divergence=True))),
        {},
        "divergence=False",
    ),
    ((lambda x, t: x[:, :2], NET, Unguided()), {}, r"predictions of shape \(1, 3\).*\(1, 2\)"),
    ((NET, NET, NegativePrompting()), {"evaluation": "stacked"}, "not a torch module"),
    (
        (tiny(0), tiny(0, num_class_embeds=2), NegativePrompting()),
        {"evaluation": "stacked"},
        "configurations differ in num_class_embeds",
    ),
    ((NET, NET, Unguided()), {"noise": lambda *_: torch.zeros(2, 2)}, "noise must return"),
]


@pytest.mark.parametrize(("arguments", "options", "message"), BAD)
def test_bad_input(arguments, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        sample(*arguments, **GOOD | options)


def test_images_that_are_not_finite_are_warned_of():
    with pytest.warns(UserWarning, match="1 of 1 images are not finite: the guidance scale"):
        sample(NET, denoiser(FORBIDDEN), NegativePrompting(1e30), **GOOD)


def test_a_sampler_without_the_trackers_noise_is_warned_of():
    with pytest.warns(UserWarning, match="eta is 0.*will be wrong") as caught:
        sample(NET, denoiser(FORBIDDEN), DNG, sampler=DDIM(0.0), **GOOD)
    assert len(caught) == 1  # and not once more by the plan of its steps
    sample(NET, denoiser(FORBIDDEN), DNG, sampler=DDIM(1.0), **GOOD)


def test_public_names_are_loaded_on_first_use():
    code = "import sys, dng_models; print('torch' in sys.modules, dng_models.sample.__module__)"
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout.split() == ["False", "dng_models.pairs.sampling"]
    assert set(dng_models.__all__) <= set(dir(dng_models))
    with pytest.raises(AttributeError, match="no attribute 'sampel'"):
        dng_models.sampel  # noqa: B018


@pytest.mark.gpu
def test_images_of_a_gpu_are_those_of_the_cpu(monkeypatch):
    """100 steps of small networks in float32, by the reference here and by the kernel there."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    nets = tiny(0), tiny(1)
    rule = DynamicNegativeGuidance(1.0, PaperTracker(prior=0.2, temperature=0.5))
    options = {"shape": (1, 8, 8), "num_images": 6, "batch_size": 4, "seed": 3, "steps": 100}
    here = sample(*nets, rule, device="cpu", **options)
    for net in nets:
        net.to("cuda")
    there = [sample(*nets, rule, device="cuda", **options) for _ in range(2)]
    assert torch.equal(there[0].images, there[1].images)
    assert torch.equal(there[0].log_posterior, there[1].log_posterior)
    # A step rounds by 6e-8 of numbers up to 10, and passes a difference on about as it was.
    scale = here.images.abs().max()
    assert (there[0].images - here.images).abs().max() < 1e-3 * scale
    torch.testing.assert_close(there[0].log_posterior, here.log_posterior, atol=1e-2, rtol=0.0)
