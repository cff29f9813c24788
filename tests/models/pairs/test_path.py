"""The path tracker in the sampler: exact chains, estimates of divergences, and what has none."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import dng_math
from dng_kernels import noise_keys
from dng_math import (
    DDIM,
    DDPM,
    DynamicNegativeGuidance,
    GaussianMixture,
    NoiseSchedule,
    PathTracker,
    TimeProfile,
    noise,
)
from dng_models.pairs.divergence import predictions_and_traces, quieter
from dng_models.pairs.sampling import sample
from tests.helpers.tolerances import WHOLE_CHAIN, error

LINEAR = NoiseSchedule.linear()
MODES = GaussianMixture([0.1, 0.2, 0.3, 0.4], [[-3.0], [-1.0], [1.0], [3.0]], [0.16] * 4)


def denoiser(components):
    """The noise that an exact mixture in one dimension predicts, in torch, so with derivatives."""
    part = MODES if components is None else MODES.restrict(components)
    live = part.weights > 0
    weights, means, variances = (
        torch.tensor(np.asarray(v)[live])
        for v in (part.weights, part.means[:, 0], part.covariances)
    )

    def predict(x, t):
        alpha, sigma = (float(v[int(t[0]) + 1]) for v in (LINEAR.alpha, LINEAR.sigma))
        spread = alpha**2 * variances + sigma**2
        now = x.to(weights.dtype)
        share = torch.softmax(
            weights.log() - 0.5 * spread.log() - (now - alpha * means) ** 2 / (2 * spread), dim=1
        )
        # sigma times minus the score
        eps = (share * sigma * (now - alpha * means) / spread).sum(1, keepdim=True)
        return eps.to(x.dtype)

    return predict


def exact_noise(seed):
    def draw(step, first_image, shape):
        options = {"stream": noise.INITIAL_STREAM} if step is None else {"step": step}
        z = noise.standard_normal(seed, shape[0], shape[1], first_sample=first_image, **options)
        return torch.from_numpy(z)

    return draw


TRACKERS = {
    "rest": PathTracker(0.2, offset_nats=0.3),
    "base": PathTracker(0.2, compare="base", probes=2),
    "profile": PathTracker(0.2, TimeProfile((0.1, 0.6), (0.5, 0.9))),
}


@pytest.mark.parametrize("sampler", [DDIM(0.0), DDPM()], ids=["ddim", "ddpm"])
@pytest.mark.parametrize(
    "forbidden",
    [pytest.param([1], marks=pytest.mark.slow), [[1], [0, 3]]],
    ids=["one", "two"],
)
@pytest.mark.parametrize("name", TRACKERS)
@pytest.mark.thinned(3)
def test_in_one_dimension_the_chain_is_the_exact_one(name, forbidden, sampler):
    """There a random sign gives the derivative itself, so nothing is estimated."""
    rule = DynamicNegativeGuidance(1.0, TRACKERS[name])
    several = isinstance(forbidden[0], list)
    expected = dng_math.sample(
        MODES, LINEAR.respace(20), rule, n=11, first_sample=6, forbidden=forbidden,
        sampler=sampler, seed=3, record=["scale", "trajectory", "tracked"],
    )  # fmt: skip
    got = sample(
        denoiser(None), [denoiser(c) for c in forbidden] if several else denoiser(forbidden), rule,
        shape=(1,), num_images=11, first_image=6, batch_size=4, schedule=LINEAR, steps=20,
        sampler=sampler, noise=exact_noise(3), dtype=torch.float64,
        record=["scale", "x", "log_posterior"],
    )  # fmt: skip
    tracked = expected.tracked if several else expected.tracked[:, 0]
    assert error(got.records["x"], expected.trajectory) < WHOLE_CHAIN
    assert error(got.records["log_posterior"], tracked) < WHOLE_CHAIN
    assert error(got.log_posterior, tracked[-1]) < WHOLE_CHAIN


MATRIX = torch.tensor(
    [[1.0, 0.5, -0.3], [0.2, -2.0, 0.4], [0.0, 0.7, 0.5]], dtype=torch.float64
)  # fmt: skip


def traces_of(matrix, images, step, probes=1):
    """Estimates of the trace of a linear map's matrix, for so many images."""
    size = len(matrix)
    x = torch.randn(images, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    keys = noise_keys(1, images)
    found, traces, _ = predictions_and_traces(lambda at: [at @ matrix.T], x, keys, step, probes)
    torch.testing.assert_close(found[0], x @ matrix.T)
    return traces[0]


@pytest.mark.parametrize("step", [0, 3, 50])
def test_traces_are_estimated_without_bias(step):
    """For a linear map: mean and variance over 4,096 images; false alarm 1e-6 (5 sigma)."""
    traces = traces_of(MATRIX, 4096, step)
    off = MATRIX + MATRIX.T
    variance = float(torch.triu(off, 1).square().sum())
    bound = 5.0 * math.sqrt(variance / 4096)
    assert abs(float(traces.mean()) - float(MATRIX.trace())) < bound
    assert 0.8 < float(traces.var()) / variance < 1.2
    assert len(set(traces.tolist())) > 3  # signs differ between images
    # The diagonal has no error at all.
    alone = traces_of(torch.diag(MATRIX.diag()), 64, step)
    torch.testing.assert_close(alone, torch.full_like(alone, float(MATRIX.trace())))


def test_spreads_are_zero_on_average():
    x = torch.randn(4096, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    maps = (MATRIX, torch.diag(MATRIX.diag()))
    for probes in (1, 2):
        spreads = predictions_and_traces(
            lambda at: [at @ each.T for each in maps], x, noise_keys(1, 4096), 3, probes
        )[2]
        assert abs(float(spreads[1].mean())) < 5.0 * float(spreads[1].std()) / math.sqrt(4096)
        assert torch.equal(spreads[0], torch.zeros_like(spreads[0]))


@settings(max_examples=15)
@given(st.integers(2, 40), st.integers(0, 2**32 - 1), st.integers(0, 9), st.sampled_from([1, 3]))
def test_errors_cancel_over_a_cycle_of_steps(size, seed, first, probes):
    """As many directions as the next power of 2, wherever they begin and however many a step."""
    rng = np.random.default_rng(seed)
    matrix = torch.from_numpy(rng.normal(size=(size, size)))
    cycle = 2 ** (size - 1).bit_length()
    steps = cycle  # of three directions each: three cycles
    found = torch.stack([traces_of(matrix, 3, first + step, probes) for step in range(steps)])
    torch.testing.assert_close(found.mean(0), torch.full((3,), float(matrix.trace())).double())
    if size > 2:
        assert float(found.std(0).min()) > 0.0


def test_a_part_of_a_cycle_is_better_than_independent_signs():
    """16 of 64 directions: the mean's variance is at most that of as many independent ones."""
    rng = np.random.default_rng(0)
    matrix = torch.from_numpy(rng.normal(size=(64, 64)))
    found = torch.stack([traces_of(matrix, 2000, step) for step in range(16)]).mean(0)
    off = matrix + matrix.T
    independent = float(torch.triu(off, 1).square().sum()) / 16
    assert float(found.var()) < independent


def test_the_part_of_two_components_is_estimated_without_error():
    """Two components of one covariance: the base's Jacobian differs by -(o/sigma^2) d d^T alone."""
    sigma, means = 0.7, torch.tensor([[1.0, -0.5, 0.3, 0.8], [-0.6, 0.4, 0.9, -1.0]]).double()
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def eps(x, which):
        logits = -((x[:, None] - means) ** 2).sum(-1) / (2.0 * (0.2 + sigma**2))
        share = torch.softmax(logits[:, which], 1)
        mean = torch.einsum("bk,kd->bd", share, means[which])
        return sigma * (x - mean) / (0.2 + sigma**2)

    def predict(at):
        return [eps(at, [0, 1]), eps(at, [0])]

    _, traces, spreads = predictions_and_traces(predict, x, noise_keys(5, 50), 0, 1)
    to_score = -1.0 / sigma
    plain = (traces[1:] - traces[:1]) * to_score
    logits = -((x[:, None] - means) ** 2).sum(-1) / (2.0 * (0.2 + sigma**2))
    log_p = torch.log_softmax(logits, 1)[:, 0]
    exact = torch.stack(
        [torch.func.jacfwd(lambda at, k=k: predict(at[None])[k][0])(row).trace()
         for row in x for k in (0, 1)]
    ).reshape(50, 2)  # fmt: skip
    exact = (exact[:, 1] - exact[:, 0]) * to_score
    known = log_p.exp() < 0.99
    better = quieter(plain, spreads[1:] * to_score**2, log_p[None])
    torch.testing.assert_close(better[0][known], exact[known])
    assert (plain[0] - exact).abs().max() > 0.1


def tiny(seed):
    torch.manual_seed(seed)
    return UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 16),
        layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


# Networks of nothing but random numbers: their evidence is large.
RULE = DynamicNegativeGuidance(1.0, PathTracker(0.3, temperature=1e-3))
RUN = {"shape": (1, 8, 8), "steps": 4, "batch_size": 4, "sampler": DDIM(0.0)}


@pytest.mark.slow
def test_an_image_of_networks_does_not_depend_on_how_many_are_made():
    nets = tiny(0), tiny(1)
    many = sample(*nets, RULE, num_images=6, record=["log_posterior"], **RUN)
    few = sample(*nets, RULE, num_images=2, first_image=3, record=["log_posterior"], **RUN)
    assert torch.equal(many.images[3:5], few.images)
    assert torch.equal(many.records["log_posterior"][:, 3:5], few.records["log_posterior"])
    assert len(torch.unique(many.log_posterior)) == 6


def test_no_warning_of_noise_that_is_not_needed(recwarn):
    sample(tiny(0), tiny(1), RULE, num_images=1, **RUN)
    assert not [str(w.message) for w in recwarn if "eta" in str(w.message)]


class Stubborn(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass


class Layer(nn.Module):
    def forward(self, x):
        return Stubborn.apply(x)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inside = nn.Sequential(nn.Identity(), Layer())

    def forward(self, x, t):
        return self.inside(x)


def test_a_network_without_a_forward_derivative_is_refused_by_its_layer():
    with pytest.raises(ValueError, match=r"probes must be 0.*inside\.1 \(Layer\).*DDPM's noise"):
        sample(Net(), Net(), RULE, num_images=1, **RUN)
    without = DynamicNegativeGuidance(1.0, PathTracker(0.3, probes=0))
    sample(Net(), Net(), without, num_images=1, **RUN | {"sampler": DDPM()})
    with pytest.warns(UserWarning, match="eta is 0"):
        sample(Net(), Net(), without, num_images=1, **RUN)


def test_a_prediction_that_hides_its_derivative_is_refused():
    """It would be taken for one that does not depend on x, without a word."""
    with pytest.raises(ValueError, match="does not change with x"):
        sample(lambda x, t: 0.5 * x, lambda x, t: 0.5 * x.detach(), RULE, num_images=1, **RUN)
    # torch.no_grad() hides nothing of forward derivatives.
    two = torch.no_grad()(lambda x, t: 0.6 * x)
    sample(lambda x, t: 0.5 * x, two, RULE, num_images=1, **RUN)


def test_a_noise_prediction_at_no_signal_is_refused():
    with pytest.raises(ValueError, match="alpha"):
        sample(tiny(0), tiny(1), RULE, num_images=1, **RUN | {"schedule": NoiseSchedule.flow(4)})
