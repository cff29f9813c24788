"""The path tracker's update: against exact chains, in every form, layout and precision.

This file is also the program that compiles its kernels ahead of time (see ``test_compiled``).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from dng_kernels import (
    BoundStep,
    PathMemory,
    StepPlan,
    dng_step,
    guide,
    update_path,
    update_posterior,
)
from dng_kernels._border import HAS_TRITON
from dng_math import (
    DDIM,
    DDPM,
    DynamicNegativeGuidance,
    LogOddsTracker,
    NoiseSchedule,
    PathTracker,
    TimeProfile,
    divergence_gap,
    predict,
    sample,
)
from tests.helpers.mixtures import moderate

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
BACKENDS = ["reference", pytest.param("triton", marks=needs_triton)]
# For tests that call the interpreter often, which takes milliseconds a call.
MOSTLY_TORCH = ["reference", pytest.param("triton", marks=[needs_triton, pytest.mark.slow])]
ROOT = Path(__file__).parents[2]
CASES = {
    "linear, noise": (NoiseSchedule.linear().respace(12), "epsilon"),
    "linear, x0": (NoiseSchedule.linear().respace(12), "sample"),
    "linear, velocity": (NoiseSchedule.linear().respace(12), "v_prediction"),
    "exploding, noise": (NoiseSchedule.variance_exploding(12, rho=7.0), "epsilon"),
    "flow": (NoiseSchedule.flow(12), "flow_prediction"),
    "flow, x0": (NoiseSchedule.flow(12), "sample"),
}


@pytest.mark.parametrize("backend", MOSTLY_TORCH)
@pytest.mark.parametrize("compare", ["rest", "base"])
@pytest.mark.parametrize("case", CASES)
def test_states_are_those_of_exact_chains(case, compare, backend):
    """Of dng_math's, whose points and exact predictions it is given; float64 to rounding."""
    schedule, prediction_type = CASES[case]
    mixture = moderate(7, "diagonal", 5, 6)
    tracker = PathTracker(0.3, 0.9, offset_nats=0.4, compare=compare)
    rule = DynamicNegativeGuidance(1.0, tracker)
    for sampler in (DDIM(0.0), DDPM()):
        chain = sample(
            mixture, schedule, rule, n=9, forbidden=[1], sampler=sampler,
            record=["trajectory", "tracked"],
        )  # fmt: skip
        c = schedule.coefficients(sampler)
        plan = StepPlan(c, rule, prediction_type=prediction_type)
        for dtype in [torch.float32] if backend == "triton" else [torch.float64, torch.float32]:
            memory, state = PathMemory(), plan.init_state(9, dtype)
            for i in range(len(c)):
                x, alpha, sigma = chain.trajectory[i], float(c.alpha_t[i]), float(c.sigma_t[i])
                at = predict(
                    mixture, x, alpha, sigma, rule, forbidden=[1],
                    prediction_type=prediction_type, log_posterior=-1.0,
                )  # fmt: skip
                gap = divergence_gap(mixture, x, alpha, sigma, forbidden=[1])[0]
                given = (torch.tensor(v, dtype=dtype) for v in (x, at.base, at.negative[0]))
                state = update_path(
                    tracker, memory, *given, state, alpha, sigma,
                    divergence_gap=torch.tensor(gap, dtype=dtype),
                    prediction_type=prediction_type, offset=0.4 / len(c), backend=backend,
                )  # fmt: skip
                assert state.dtype == dtype
                tolerance = 1e-10 if dtype == torch.float64 else 2e-4
                found = plan.log_posterior(state.double()).numpy()
                np.testing.assert_allclose(found, chain.tracked[i, 0], tolerance, tolerance)


def walk(shape, steps=30, seed=0):
    """Points of a chain in many dimensions: x, eps, eps_neg, level, divergence gap; float64."""
    generator = torch.Generator().manual_seed(seed)
    normal = lambda: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    x, eps, delta = normal(), normal(), 0.05 * normal()
    schedule = NoiseSchedule.scaled_linear().respace(steps)
    for alpha, sigma in zip(schedule.alpha[:0:-1], schedule.sigma[:0:-1], strict=True):
        yield x, eps, eps + delta, float(alpha), float(sigma), delta.flatten(1).sum(1) / 10.0
        eps = 0.98 * eps + 0.199 * normal()
        delta = 0.95 * delta + 0.02 * normal()
        x = 0.97 * x + 0.1 * eps + 0.1 * normal()


def states(walk_of, dtype, backend="reference", narrow=None, layout=None, tracker=None):
    tracker = PathTracker(0.1) if tracker is None else tracker
    memory, state, found = PathMemory(), None, []
    for x, eps, neg, alpha, sigma, gap in walk_of:
        if state is None:
            state = torch.full((len(x),), float(tracker.init(np.array(0.1))), dtype=dtype)
        kinds = (dtype, narrow or dtype, narrow or dtype)
        given = [t.to(k, copy=True) for t, k in zip((x, eps, neg), kinds, strict=True)]
        if layout is not None:
            given = [layout(each) for each in given]
        state = update_path(
            tracker, memory, *given, state, alpha, sigma, divergence_gap=gap.to(dtype),
            backend=backend,
        )  # fmt: skip
        for each in given:
            each.fill_(torch.nan)  # the caller may reuse what it gave
        found.append(state.double())
    return torch.stack(found)


@pytest.mark.parametrize("backend", MOSTLY_TORCH)
def test_float32_keeps_the_digits_at_stable_diffusions_size(backend):
    """16,384 elements: within 1e-4 nats a step of float64, the change of each step by itself."""
    tracker = PathTracker(0.1, p_max=0.5, p_min=0.0, compare="base")
    double = states(walk((2, 4, 64, 64)), torch.float64, tracker=tracker)
    single = states(walk((2, 4, 64, 64)), torch.float32, backend, tracker=tracker)
    assert (double.diff(dim=0).abs() > 1e-3).any()
    assert (double - single).diff(dim=0).abs().max() < 1e-4


def halves(tensor):
    """One half of a doubled batch, whose samples have gaps between them."""
    doubled = torch.stack([tensor, tensor], dim=1)
    return doubled[:, 0]


LAYOUTS = {
    "channels last": lambda tensor: tensor.contiguous(memory_format=torch.channels_last),
    "half of a batch": halves,
    "transposed": lambda tensor: tensor.transpose(2, 3).contiguous().transpose(2, 3),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 4, 8, 8), (2, 3, 7, 5), (1, 4, 24, 48)])
def test_any_layout_is_read_as_it_lies(layout, shape, backend):
    plain = states(walk(shape, 4), torch.float32, "reference")
    laid = states(walk(shape, 4), torch.float32, backend, layout=LAYOUTS[layout])
    torch.testing.assert_close(laid, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_predictions_of_16_bits(narrow, backend):
    """The sums are of the rounded predictions, in float32."""
    rounded = [
        (x, eps.to(narrow).double(), neg.to(narrow).double(), *rest)
        for x, eps, neg, *rest in walk((2, 4, 16, 16), 6)
    ]
    expected = states(rounded, torch.float64)
    found = states(walk((2, 4, 16, 16), 6), torch.float32, backend, narrow=narrow)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@needs_triton
def test_a_sample_does_not_depend_on_its_batch():
    """Bit for bit from the kernel."""
    whole = states(walk((5, 4, 20, 20), 5), torch.float32, "triton")
    alone = states(
        [(x[3:4], e[3:4], n[3:4], a, s, g[3:4]) for x, e, n, a, s, g in walk((5, 4, 20, 20), 5)],
        torch.float32,
        "triton",
    )
    assert torch.equal(whole[:, 3:4], alone)


@pytest.mark.parametrize("backend", ["reference", "cpu", *BACKENDS[1:]])
@pytest.mark.parametrize("compare", ["rest", "base"])
def test_steps_guide_by_the_state_and_leave_it(compare, backend):
    """As with the tracker of transitions in the same state, whose steps would change it."""
    path = PathTracker(0.3, compare=compare)
    c = NoiseSchedule.linear().respace(10).coefficients()
    plans = [
        StepPlan(c, DynamicNegativeGuidance(2.0, tracker)) for tracker in (path, path.first_order)
    ]
    x, eps, neg, noise = torch.randn(4, 3, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    state = torch.tensor([-1.0, -3.0, -0.2])
    given = {"noise": noise, "return_guided": True, "return_scale": True, "backend": backend}
    found, other = (dng_step(plan, 4, x, eps, neg, state, **given) for plan in plans)
    assert torch.equal(found.state, state) and not torch.equal(other.state, state)
    assert torch.equal(found.eps_guided, other.eps_guided)
    assert torch.equal(found.x_next, other.x_next) and torch.equal(found.scale, other.scale)
    assert torch.equal(plans[0].log_posterior(state), plans[1].log_posterior(state))
    assert torch.equal(plans[0].init_state(2), plans[1].init_state(2))
    alone = guide(plans[0], 4, eps, neg, state, backend=backend)
    assert torch.equal(alone.eps_guided, found.eps_guided)
    bound = BoundStep(plans[0], x, eps, neg, state, noise=noise, backend=backend)
    torch.testing.assert_close(bound(4).x_next, found.x_next)
    assert torch.equal(bound.result.state, state)
    with pytest.raises(ValueError, match="update_path"):
        update_posterior(plans[0], 4, x, x, eps, neg, state)
    with pytest.raises(ValueError, match="divergence_gap"):
        dng_step(plans[0], 4, x, eps, neg, state, noise=noise, divergence_gap=state)


def test_no_samples():
    state = states(walk((0, 3, 4), 3), torch.float32)
    assert state.shape == (3, 0)


# ---------------------------------------------------------------- bad input


def good(**changed):
    one = torch.zeros(2, 3)
    arguments = {
        "tracker": PathTracker(0.1), "memory": PathMemory(), "x": one, "eps": one, "eps_neg": one,
        "state": torch.zeros(2), "alpha": 0.8, "sigma": 0.6, "divergence_gap": torch.zeros(2),
    }  # fmt: skip
    return arguments | changed


def seen(**level):
    """A memory that holds a point."""
    memory = PathMemory()
    update_path(**good(memory=memory, **level))
    return memory


FLOW = {"prediction_type": "flow_prediction"}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tracker": LogOddsTracker(0.1)}, "tracker must be a PathTracker.*LogOdds"),
        ({"memory": None}, "memory must be a PathMemory.*None"),
        ({"x": torch.zeros(2, 3, dtype=torch.int64)}, "x must be a floating-point"),
        ({"eps": torch.zeros(2, 4)}, "eps"),
        ({"eps_neg": None}, "eps_neg"),
        ({"state": torch.zeros(3)}, r"state must have shape \(2,\)"),
        ({"state": torch.zeros(2, dtype=torch.float64)}, "state must be float32"),
        ({"divergence_gap": 0.0}, "divergence_gap must be a tensor"),
        ({"alpha": -0.1}, "alpha.*-0.1"),
        ({"alpha": float("nan")}, "alpha.*nan"),
        ({"sigma": 0.0}, "sigma.*0"),
        ({"alpha": 0.0, "sigma": 1.0}, "prediction_type must not be 'epsilon' at alpha = 0"),
        ({"prediction_type": "noise"}, "prediction_type.*noise"),
        ({"tracker": PathTracker(0.1, TimeProfile((0.1,), (1.0,)))}, "temperature must be given"),
        ({"temperature": -1.0}, "temperature.*-1"),
        ({"offset": float("inf")}, "offset.*inf"),
        ({"backend": "cpu"}, "backend.*'cpu'"),
        ({"x": torch.zeros(2, 3, requires_grad=True)}, "x.*grad"),
        ({"memory": seen(), "alpha": 0.6, "sigma": 0.8}, "sigma/alpha must not be higher"),
        (
            {"memory": seen(), "x": torch.zeros(2, 4), "eps": torch.zeros(2, 4),
             "eps_neg": torch.zeros(2, 4)},
            r"x must be of shape \(2, 3\)",
        ),
        (
            {"memory": seen(alpha=0.0, sigma=1.0, **FLOW), "alpha": 0.0, "sigma": 1.0, **FLOW},
            "alpha must be above 0 after",
        ),
    ],
)  # fmt: skip
def test_bad_input_names_the_argument(changed, message):
    with pytest.raises((TypeError, ValueError), match=message):
        update_path(**good(**changed))


def test_a_failed_call_leaves_the_memory_as_it_was():
    memory = seen()
    level = memory.level
    with pytest.raises(ValueError, match="higher"):
        update_path(**good(memory=memory, alpha=0.6, sigma=0.8))
    assert memory.level == level
    memory.reset()
    update_path(**good(memory=memory, alpha=0.6, sigma=0.8))


# ---------------------------------------------------------------- what the machine code is like


@pytest.mark.slow
@needs_triton
def test_the_kernels_compile_without_spills_and_read_16_bytes_at_a_time(tmp_path):
    """For sm_80, sm_90 and sm_100, with predictions of 32 and of 16 bits, at every point."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    ran = subprocess.run(
        [sys.executable, "-m", __spec__.name],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    if "without cuobjdump" in ran.stderr:
        pytest.skip(ran.stderr.strip().splitlines()[-1])
    assert ran.returncode == 0, ran.stderr[-4000:]
    lines = [json.loads(line) for line in ran.stdout.splitlines()]
    assert len(lines) == 3 * 2 * 2
    for line in lines:
        assert line["stack"] == line["local"] == 0, line
        # Of 1,024 elements a block and 128 threads: 8 of each tensor a thread.
        narrow = 1 if line["dtype"] == "bf16" else 2
        expected = (2 if line["first"] else 6) + 2 * narrow
        assert (line["ld128"], line["st128"]) == (expected, 4), line


def main(folder):
    """Compile the kernel of the sums; one line of JSON for each variant."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from dng_kernels import _path_kernels
    from tests.kernels.test_compiled import ARCHITECTURES, TOOLS, tool_for

    if not os.access(TOOLS / "cuobjdump", os.X_OK):
        sys.exit("Triton came without cuobjdump, which reads machine code")
    for architecture in ARCHITECTURES:
        for dtype in ("fp32", "bf16"):
            for first in (True, False):
                tensors = {"x": "*fp32", "eps": f"*{dtype}", "eps_neg": f"*{dtype}"}
                tensors |= dict.fromkeys(("kept_x", "kept_delta", "partials"), "*fp32")
                sizes = ("D", "chunk", "chunks", "x_stride", "eps_stride", "eps_neg_stride",
                         "kept_stride")  # fmt: skip
                numbers = ("twice_on_x", "on_prediction", "here", "there")
                constants = {"FIRST": first, "BLOCK": 1024}
                signature = tensors | dict.fromkeys(sizes, "i32") | dict.fromkeys(numbers, "fp32")
                names = list(signature | constants)
                divisible = [*tensors, *(size for size in sizes if size != "chunks")]
                source = ASTSource(
                    _path_kernels.path_sums,
                    signature=signature | dict.fromkeys(constants, "constexpr"),
                    constexprs=constants,
                    attrs={(names.index(n),): [["tt.divisibility", 16]] for n in divisible},
                )
                target = GPUTarget("cuda", architecture, 32)
                kernel = triton.compile(source, target=target)
                tool = tool_for(kernel, folder)
                usage = re.search(r"STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", tool("-res-usage"))
                code = tool("-sass")
                line = {
                    "architecture": architecture, "dtype": dtype, "first": first,
                    "stack": int(usage[1]), "local": int(usage[2]),
                    "ld128": len(re.findall(r"\bLDG\.E\.128\b", code)),
                    "st128": len(re.findall(r"\bSTG\.E\.128\b", code)),
                }  # fmt: skip
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        main(Path(place))
