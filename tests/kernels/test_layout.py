"""The kernel on batches that lie in memory in other ways than C order."""

from __future__ import annotations

import pytest
import torch

from dng_kernels import (
    StepPlan,
    StepResult,
    dng_step,
    guide,
    layout,
    noise_keys,
    standard_normal,
    update_posterior,
)
from dng_math import (
    ContrastiveCFG,
    DynamicNegativeGuidance,
    NegativePrompting,
    NoiseSchedule,
    PaperTracker,
    PerpNeg,
    SafeLatentDiffusion,
)

STEPS = 10
C = NoiseSchedule.linear(STEPS).coefficients()
# One rule without sums, one with sums behind, two with sums before, one with momentum.
PLANS = {
    "static": StepPlan(C, NegativePrompting(2.0)),
    "tracked": StepPlan(C, DynamicNegativeGuidance(1.0, PaperTracker(prior=0.1))),
    "contrastive": StepPlan(C, ContrastiveCFG(1.0, 0.01)),
    "perpendicular": StepPlan(C, PerpNeg()),
    "safe": StepPlan(C, SafeLatentDiffusion(threshold=0.5, slope=2.0)),
}
BACKENDS = ("triton", "cpu", "reference")
LAST, LAST_3D = torch.channels_last, torch.channels_last_3d


def normal(shape, step, device, dtype=torch.float32):
    return standard_normal(11, shape, step=step, device=device).to(dtype)


# ---------------------------------------------------------------- ways to lie in memory


def contiguous(shape, step, device):
    return normal(shape, step, device)


def channels_last(shape, step, device):
    return normal(shape, step, device).to(memory_format=LAST if len(shape) == 4 else LAST_3D)


def half_of_a_batch(shape, step, device):
    """As of a doubled batch: the second half."""
    return normal((2 * shape[0], *shape[1:]), step, device)[shape[0] :]


def every_other_sample(shape, step, device):
    return normal((2 * shape[0], *shape[1:]), step, device)[::2]


def some_channels(shape, step, device):
    """As of a network that predicts noise and variance at once."""
    return normal((shape[0], 2 * shape[1], *shape[2:]), step, device)[:, : shape[1]]


def later_channels(shape, step, device):
    return normal((shape[0], 2 * shape[1], *shape[2:]), step, device)[:, shape[1] :]


def some_channels_of_channels_last(shape, step, device):
    doubled = channels_last((shape[0], 2 * shape[1], *shape[2:]), step, device)
    return doubled[:, : shape[1]]


def half_of_a_channels_last_batch(shape, step, device):
    return channels_last((2 * shape[0], *shape[1:]), step, device)[shape[0] :]


def one_for_all(shape, step, device):
    """The same numbers for every sample, with a stride of 0."""
    return normal((1, *shape[1:]), step, device).expand(shape)


def one_number_for_all(shape, step, device):
    return normal((1,), step, device).view((1,) * len(shape)).expand(shape)


def transposed(shape, step, device):
    return normal((*shape[:-2], shape[-1], shape[-2]), step, device).transpose(-1, -2)


def batch_inside(shape, step, device):
    return normal((shape[1], shape[0], *shape[2:]), step, device).transpose(0, 1)


def with_gaps(shape, step, device):
    return normal((*shape[:-1], 2 * shape[-1]), step, device)[..., ::2]


def shifted(shape, step, device):
    """Starts where 16 bytes do not."""
    elements = torch.Size(shape).numel()
    return normal((elements + 1,), step, device)[1:].view(shape)


EVERYWHERE = [
    contiguous,
    half_of_a_batch,
    every_other_sample,
    one_for_all,
    one_number_for_all,
    batch_inside,
    with_gaps,
    shifted,
]
IN_PLANES = [
    transposed,
    channels_last,
    some_channels,
    later_channels,
    some_channels_of_channels_last,
    half_of_a_channels_last_batch,
]
# More than one chunk each, but for the last; no multiple of 4 or of a block among them.
SHAPES = {
    "vectors": ((3, 1301), EVERYWHERE[:5] + EVERYWHERE[6:]),
    "images": ((3, 5, 17, 19), EVERYWHERE + IN_PLANES),
    "videos": ((2, 3, 5, 11, 13), [contiguous, *IN_PLANES]),
    "one sample": ((1, 5, 17, 19), EVERYWHERE + IN_PLANES),
    "one channel": ((2, 1, 33, 37), [contiguous, *IN_PLANES]),
    "one row": ((2, 5, 1, 401), [contiguous, *IN_PLANES]),
    "one pixel": ((3, 7, 1, 1), [contiguous, *IN_PLANES]),
    "one number": ((3, 1), EVERYWHERE[:5] + EVERYWHERE[6:]),
}
CASES = [(name, way) for name, (_, ways) in SHAPES.items() for way in ways]


def order(tensor):
    """ "C" or "channels last", as the tensor's own numbers lie."""
    return "channels last" if layout.is_channels_last(tensor) else "C"


def assert_close(actual, expected):
    """To a few roundings of float32: products and sums are fused or not, sums reordered."""
    assert [a is None for a in actual] == [e is None for e in expected]
    for a, e in zip(actual, expected, strict=True):
        if a is not None:
            torch.testing.assert_close(a, e, rtol=2e-5, atol=2e-5)


def assert_all_close(results):
    """The first one close to every other."""
    for other in results[1:]:
        assert_close(results[0], other)


def backends(device):
    """Those that take steps there."""
    return [name for name in BACKENDS if name != "cpu" or device == "cpu"]


def arguments(plan, way, other, shape, device):
    """Every tensor in a way of its own: x in one, predictions in another."""
    given = {
        "x": way(shape, 0, device),
        "eps": other(shape, 1, device),
        "eps_neg": other(shape, 2, device),
        "state": plan.init_state(shape[0]),
        "momentum": None,
    }
    if plan.needs_momentum:
        given["momentum"] = 0.1 * way(shape, 3, device)
    if plan.needs_positive:
        given["eps_pos"] = way(shape, 4, device)
    return given


@pytest.mark.parametrize("others", [0, 3])
@pytest.mark.parametrize(("name", "way"), CASES, ids=lambda v: getattr(v, "__name__", v))
@pytest.mark.thinned(3)
def test_the_kernel_is_the_reference_however_a_batch_lies(name, way, others, kernel_device):
    """And its outputs lie as x does.

    Predictions lie as x does, or otherwise: channels last beside C order, one must be copied.
    """
    shape, ways = SHAPES[name]
    other = ways[(ways.index(way) + others) % len(ways)]
    plan = PLANS["tracked"].to(kernel_device)
    given = arguments(plan, way, other, shape, kernel_device)
    if others:
        given["noise"] = other(shape, 5, kernel_device)
    else:
        given |= {"seed": 5, "first_sample": 2**33 - 1}
    found = [
        dng_step(plan, 3, **given, return_guided=True, return_scale=True, backend=backend)
        for backend in backends(kernel_device)
    ]
    assert_all_close(found)
    for result in found:
        assert order(result.x_next) == order(result.eps_guided) == order(given["x"])
        assert result.x_next.stride() == layout.empty_like(given["x"], torch.float32).stride()


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(
    "way", [channels_last, some_channels, transposed, one_for_all], ids=lambda w: w.__name__
)
def test_every_rule_reads_every_layout(way, plan, kernel_device):
    plan, shape = PLANS[plan].to(kernel_device), (2, 5, 17, 19)
    given = arguments(plan, way, contiguous, shape, kernel_device)
    engines = backends(kernel_device)
    options = {"seed": 5, "return_guided": True, "return_scale": True}
    assert_all_close([dng_step(plan, 3, **given, **options, backend=b) for b in engines])
    x = given.pop("x")
    found = [guide(plan, 3, **given, return_scale=True, backend=b) for b in engines]
    assert_all_close(found)
    if plan.tracker is not None:
        inputs = x, found[0].eps_guided, given["eps"], given["eps_neg"], given["state"]
        assert_all_close([update_posterior(plan, 3, *inputs, backend=b) for b in engines])


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, LAST])
def test_outputs_may_be_given_in_the_order_of_x(memory_format, kernel_device):
    plan, shape = PLANS["tracked"].to(kernel_device), (2, 5, 17, 19)
    given = arguments(plan, contiguous, contiguous, shape, kernel_device)
    given["x"] = given["x"].to(memory_format=memory_format)
    expected = dng_step(plan, 3, **given, seed=5, return_guided=True, backend="triton")
    target, guided = (
        torch.full_like(given["x"], float("nan"), memory_format=memory_format) for _ in range(2)
    )
    out = StepResult(target, None, guided, None, None)
    for backend in backends(kernel_device):
        bound = 0.0 if backend == "triton" else 2e-5
        dng_step(plan, 3, **given, seed=5, out=out, backend=backend)
        torch.testing.assert_close(target, expected.x_next, rtol=bound, atol=bound)
        torch.testing.assert_close(guided, expected.eps_guided, rtol=bound, atol=bound)


# ---------------------------------------------------------------- noise from a seed


def noise_of(plan, shape, device, way=contiguous, backend="triton", **more):
    """What a seed makes in a step whose x and predictions are 0."""
    zero = torch.zeros_like(way(shape, 0, device))
    result = dng_step(plan, 3, zero, zero, zero, backend=backend, **more)
    return result.x_next / torch.tensor(plan.row(3).deviation, dtype=torch.float32)


@pytest.mark.parametrize("shape", [(3, 5, 17, 19), (2, 3, 5, 11, 13)], ids=["images", "videos"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_noise_does_not_depend_on_how_a_batch_lies(backend, shape, kernel_device):
    """Numbers belong to elements, in C order, wherever they are."""
    plan = PLANS["static"].to(kernel_device)
    if backend not in backends(kernel_device):
        pytest.skip("the fast path of CPUs")
    expected = noise_of(plan, shape, kernel_device, seed=7, backend=backend)
    exact = standard_normal(7, shape, step=3, device=kernel_device)
    # One rounding of the product with the deviation, one of the quotient; and 1e-7 of the normals.
    torch.testing.assert_close(expected, exact, rtol=4e-7, atol=4e-7)
    for way in IN_PLANES:
        got = noise_of(plan, shape, kernel_device, way, backend, seed=7)
        # The same words; a compiler may fuse the two programs in two ways.
        torch.testing.assert_close(got, expected, rtol=4e-7, atol=4e-7)


@pytest.mark.parametrize("way", [contiguous, channels_last], ids=lambda w: w.__name__)
@pytest.mark.parametrize("backend", BACKENDS)
def test_noise_does_not_depend_on_the_batch(backend, way, kernel_device):
    """Its size, its parts, its order: seed and sample index say everything, bit for bit."""
    if backend not in backends(kernel_device):
        pytest.skip("the fast path of CPUs")
    plan, shape = PLANS["static"].to(kernel_device), (5, 3, 9, 13)
    first = 2**32 - 2  # over the edge of a word
    whole = noise_of(plan, shape, kernel_device, way, backend, seed=2**63 + 5, first_sample=first)
    assert len(whole.flatten().unique()) == whole.numel()
    for i in range(5):
        alone = noise_of(
            plan,
            (1, *shape[1:]),
            kernel_device,
            way,
            backend,
            seed=2**63 + 5,
            first_sample=first + i,
        )
        assert torch.equal(alone[0], whole[i])
    keys = noise_keys(2**63 + 5, 5, first_sample=first, device=kernel_device)
    shuffled = [3, 0, 4, 4, 1]
    mixed = noise_of(plan, shape, kernel_device, way, backend, seed=keys[shuffled])
    assert torch.equal(mixed, whole[shuffled])


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("block", [256, 4096])
@pytest.mark.thinned(3)
def test_neither_noise_nor_step_depends_on_the_block(block, plan, kernel_device, monkeypatch):
    """Noise and x_next of a rule without sums bit for bit, sums to rounding."""
    shape = (2, 3, 31, 37)
    given = arguments(PLANS[plan], channels_last, contiguous, shape, kernel_device)

    def take():
        fresh = PLANS[plan].to(kernel_device)  # with a workspace for these chunks
        return dng_step(fresh, 3, **given, seed=5, return_scale=True, backend="triton")

    expected = take()
    monkeypatch.setitem(layout.LARGEST_BLOCKS, 4, block)
    assert layout.chunking(3 * 31 * 37, 4)[0] == block
    got = take()
    assert_close(got, expected)
    if plan in ("static", "tracked", "safe") and kernel_device == "cpu":
        # Compiled programs of two block sizes may fuse products and sums in two ways.
        assert torch.equal(got.x_next, expected.x_next)


# ---------------------------------------------------------------- chunks of a sample


def bits_equal(results):
    """The first one bit for bit every other, NaN included."""
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert a is b is None or torch.equal(a.view(torch.int32), b.view(torch.int32))


@pytest.mark.parametrize("plan", PLANS)
def test_a_batch_longer_than_an_axis_of_a_grid_is_the_same_batch(plan, kernel_device, monkeypatch):
    from dng_kernels import fused

    plan, shape = PLANS[plan].to(kernel_device), (3, 5, 17, 19)
    given = arguments(plan, contiguous, contiguous, shape, kernel_device)

    def take():
        return dng_step(plan, 3, **given, seed=5, return_scale=True, backend="triton")

    expected = take()
    monkeypatch.setattr(fused, "LARGEST_AXIS", 2)
    bits_equal([expected, take()])


@pytest.mark.parametrize("plan", ["tracked", "safe"])
# One, a few that are read early, and more.
@pytest.mark.parametrize("elements", [1000, 5 * 1024 - 3, 40 * 1024])
@pytest.mark.thinned(3)
def test_a_launch_leaves_the_workspace_as_it_found_it(plan, elements, kernel_device):
    """Or the next one would take its sums for there."""
    plan, shape = PLANS[plan].to(kernel_device), (2, elements)
    given = arguments(plan, contiguous, contiguous, shape, kernel_device)
    results = []
    for _ in range(2):
        results.append(dng_step(plan, 3, **given, seed=5, return_scale=True, backend="triton"))
        for tensor in plan.workspace(*shape):
            assert not tensor.any()
    bits_equal(results)
    expected = dng_step(plan, 3, **given, seed=5, return_scale=True, backend="reference")
    assert_close(results[0], expected)


@pytest.mark.parametrize("elements", [5 * 1024, 40 * 1024])
@pytest.mark.parametrize("value", [0.0, -0.0, float("nan"), -float("nan"), float("inf")])
@pytest.mark.thinned(3)
def test_any_sums_of_a_chunk_are_there(value, elements, kernel_device):
    """Sums of nothing but zeros in one chunk, sums that are no numbers in another."""
    plan, shape = PLANS["tracked"].to(kernel_device), (2, elements)
    given = arguments(plan, contiguous, contiguous, shape, kernel_device)
    given["eps_neg"][:, :1024] = given["eps"][:, :1024]
    given["eps_neg"][1, 2048:3072] = value
    found = [dng_step(plan, 3, **given, seed=5, backend=b) for b in ("triton", "reference")]
    for a, b in zip(*found, strict=True):
        if a is not None:
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5, equal_nan=True)
    assert not plan.workspace(*shape)[1].any()


# ---------------------------------------------------------------- far apart in memory


@pytest.fixture
def buffer(kernel_device):
    """4 GiB of float16 that nothing has touched: memory is committed a page at a time."""
    if kernel_device != "cpu":
        pytest.skip("on a GPU memory is committed at once; tests/kernels/test_gpu.py has such")
    try:
        return torch.empty(2**31 + 2**14, dtype=torch.float16)
    except RuntimeError as error:
        pytest.skip(f"no room for 4 GiB of addresses: {error}")


@pytest.mark.parametrize(("batch", "apart"), [(2, 2**31), (3, 2**30 + 8)], ids=str)
def test_samples_may_be_2_31_elements_apart(batch, apart, buffer):
    """A dozen pages of the buffer are touched; an offset of 32 bits would leave it.

    The first distance needs more than 32 bits; the second does not, but twice of it does.
    """
    plan, shape = PLANS["tracked"], (batch, 1301)
    x, eps, eps_neg, z = (
        buffer.as_strided(shape, (apart, 1), storage_offset=i * 2048) for i in range(4)
    )
    for i, tensor in enumerate((x, eps, eps_neg, z)):
        tensor.copy_(normal(shape, i, "cpu", torch.float16))
    state = plan.init_state(batch)
    kernel = dng_step(plan, 3, x, eps, eps_neg, state, noise=z, backend="triton")
    packed = [tensor.contiguous() for tensor in (x, eps, eps_neg)]
    expected = dng_step(plan, 3, *packed, state, noise=z.contiguous(), backend="reference")
    # One rounding of float16 more or less.
    torch.testing.assert_close(kernel.x_next, expected.x_next, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(kernel.state, expected.state, rtol=2e-5, atol=2e-5)
