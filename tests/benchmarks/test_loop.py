"""The benchmark of whole runs: that what it times is one run, however it is launched."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks import loop
from benchmarks.device import cpu_device
from benchmarks.harness import Settings
from dng_kernels import standard_normal

SHAPE = (2, 3, 32, 32)
QUICK = Settings(repeats=2, quick=True)


def flat(x, time):
    """A network that sees both, and takes no time."""
    return 0.1 * x + 1e-4 * time.float().reshape(-1, 1, 1, 1)


def capturing(lap):
    """What stands for a graph where there is none: it ran once before, as in a capture."""
    lap()
    return lap


def test_every_contender_makes_the_same_run(monkeypatch):
    monkeypatch.setattr(loop, "network", lambda place, width: ("flat", 0, flat))
    device = replace(cpu_device(), capture=capturing)
    with torch.inference_mode():
        rows = loop.run(device, 2, 32, 6, QUICK)
    assert [row.contender for row in rows] == [
        loop.PUBLISHED,
        loop.EAGER,
        loop.BOUND,
        loop.ONE_STEP,
        loop.WHOLE,
    ]
    assert all(row.median_s > 0 and row.speedup > 0 for row in rows)
    assert rows[0].speedup == 1.0
    assert all(row.contender in line for row, line in zip(rows, loop.report(rows), strict=True))


def test_a_bound_run_that_is_another_is_not_timed(monkeypatch):
    monkeypatch.setattr(loop, "network", lambda place, width: ("flat", 0, flat))
    monkeypatch.setattr(loop.BoundStep, "rebind", lambda self, **tensors: None)
    with (
        torch.inference_mode(),
        pytest.raises(RuntimeError, match=r"BoundStep, eager is not the run of dng_step, eager"),
    ):
        loop.run(cpu_device(), 2, 32, 6, QUICK)


def test_a_graph_of_something_else_is_not_timed(monkeypatch):
    monkeypatch.setattr(loop, "network", lambda place, width: ("flat", 0, flat))
    device = replace(cpu_device(), capture=lambda lap: lambda: None)
    with (
        torch.inference_mode(),
        pytest.raises(RuntimeError, match="graph of a step is not the run that it captured"),
    ):
        loop.run(device, 2, 32, 6, QUICK)


def test_what_no_graph_can_hold_is_said(monkeypatch):
    monkeypatch.setattr(loop, "network", lambda place, width: ("flat", 0, flat))

    def refuse(lap):
        raise RuntimeError("operation not permitted when stream is capturing")

    with torch.inference_mode():
        rows = loop.run(replace(cpu_device(), capture=refuse), 2, 32, 6, QUICK)
    assert [row.contender for row in rows if row.note] == [loop.ONE_STEP, loop.WHOLE]
    assert "not permitted" in loop.report(rows)[-1]


def test_a_run_that_is_another_is_not_timed():
    device = cpu_device()
    with torch.inference_mode():
        ours = loop.OurRun(flat, SHAPE, device.place, loop.make_plan(device))
        loop.check(flat, SHAPE, device, ours)
        ours.start += 0.01
        with pytest.raises(RuntimeError, match="x of a run is off by"):
            loop.check(flat, SHAPE, device, ours)


@pytest.mark.slow
def test_a_run_begins_at_the_noise_and_ends_at_the_last_step():
    device = cpu_device()
    with torch.inference_mode():
        ours = loop.OurRun(flat, SHAPE, device.place, loop.make_plan(device))
        ours.reset()
        assert torch.equal(ours.x, standard_normal(loop.SEED, SHAPE))
        ours.many(loop.STEPS)
        assert int(ours.step) == loop.STEPS
        assert torch.isfinite(ours.x).all()
        first = ours.x.clone()
        ours.reset()
        ours.many(loop.STEPS)
        assert torch.equal(ours.x, first)


@pytest.mark.slow
def test_parts_run_here():
    rows = loop.cpu(QUICK)
    assert [row.contender for row in rows] == [loop.PUBLISHED, loop.EAGER, loop.BOUND]
    assert rows[0].parameters > 1_000_000
    if not torch.cuda.is_available():
        assert loop.gpu(QUICK)[0].note.startswith("skipped: no GPU")
