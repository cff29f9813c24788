"""What a captured graph reads and writes of a plan outlives the plan.

Without a GPU there is no capture: these tests say that there is one, and look at what is kept.
tests/kernels/test_gpu.py replays graphs whose plans are gone.
"""

from __future__ import annotations

import gc
import weakref
from importlib.util import find_spec

import pytest
import torch

from dng_kernels import BoundStep, StepPlan, _known, _operator, bound, dng_step, guide
from dng_math import DDPM, DynamicNegativeGuidance, NoiseSchedule

C = NoiseSchedule.linear(4).coefficients(DDPM())
RULE = DynamicNegativeGuidance.tracked(1.0, prior=0.2, temperature=0.3)
SHAPE = (2, 3, 4, 4)
pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


@pytest.fixture(autouse=True)
def nothing_kept():
    StepPlan.release_captured()
    yield
    StepPlan.release_captured()


def bound_step(plan, x, eps, eps_neg, state, noise):
    BoundStep(plan, x, eps, eps_neg, state, noise=noise, backend="triton")(1)


def stepped(plan, x, eps, eps_neg, state, noise):
    dng_step(plan, 1, x, eps, eps_neg, state, noise=noise, backend="triton")


def guided(plan, x, eps, eps_neg, state, noise):
    guide(plan, 1, eps, eps_neg, state, backend="triton")


def taken_by(take):
    """References to what the kernel reads and writes of a plan that is gone, and to an input."""
    plan = StepPlan(C, RULE)
    x, eps, eps_neg, noise = torch.randn(4, *SHAPE).unbind()
    state = plan.init_state(len(x))
    of_plan = [plan.table, plan.indices[1], *plan.workspace(2, 48)]
    take(plan, x, eps, eps_neg, state, noise)
    return [weakref.ref(each) for each in (plan, *of_plan, state)]


TAKES = [stepped, *(pytest.param(each, marks=pytest.mark.slow) for each in (guided, bound_step))]


@pytest.mark.parametrize("take", TAKES)
def test_a_graph_keeps_what_it_reads_of_a_plan_until_it_is_released(take, monkeypatch):
    for module in (_known, _operator, bound):
        monkeypatch.setattr(module, "capturing", lambda device: True)
    plan, *of_plan, state = taken_by(take)
    gc.collect()
    assert plan() is None and state() is None  # a graph's user keeps the tensors of a step
    assert all(each() is not None for each in of_plan)
    assert StepPlan.release_captured() == len(of_plan)
    assert all(each() is None for each in of_plan)
    assert StepPlan.release_captured() == 0


@pytest.mark.slow
@pytest.mark.parametrize("take", TAKES)
def test_nothing_is_kept_where_nothing_is_captured(take):
    left = taken_by(take)
    gc.collect()
    assert all(each() is None for each in left)
    assert StepPlan.release_captured() == 0
