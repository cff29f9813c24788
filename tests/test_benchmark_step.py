"""The benchmarks of the step run, check values first, and say what they did not measure."""

from __future__ import annotations

import contextlib
import csv
import io
import math
import sys
from dataclasses import replace

import numpy as np
import pytest

from benchmarks import harness
from benchmarks.__main__ import main
from benchmarks.harness import Settings
from tests import textbook
from tests.tolerances import CHAIN, error

torch = pytest.importorskip("torch")

from benchmarks import overhead, step  # noqa: E402  (they need torch)

TINY = step.Case("tiny", (3, 2, 6, 8), True)
QUICK = Settings(repeats=2, quick=True)
# torch's compiler warns of what is its own.
pytestmark = pytest.mark.filterwarnings("ignore:::torch", "ignore::DeprecationWarning")


def run(command: str, out) -> tuple[str, list[dict[str, str]]]:
    """What a quick run prints, and the lines of its CSV."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        main([command, "--quick", "--repeats", "1", "--out", str(out)])
    with (out / f"{command}_quick.csv").open(newline="", encoding="utf-8") as file:
        return said.getvalue(), list(csv.DictReader(file))


@pytest.fixture(scope="module")
def quick_step(tmp_path_factory):
    out = tmp_path_factory.mktemp("step")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "QUICK", step.CASES[:1])
        return (*run("step", out), out)


def fake_gpu(**changes):
    """A device that is timed and captured as a GPU is, and computes on the CPU."""
    ticks = iter(range(10**6))
    device = step.Device(
        "gpu",
        torch.device("cpu"),
        # Every lap takes a second longer than the one before it.
        clock=lambda run: (run(), 1.0 + next(ticks))[1],
        cache=3 * 4 * 2 * 48 * 5,
        capture=lambda lap: lap,
        launches=lambda run: 1,
    )
    return replace(device, **changes)


# ---------------------------------------------------------------------- both commands


def test_the_step_leaves_a_row_for_every_contender(quick_step):
    said, rows, _ = quick_step
    timed = [row for row in rows if row["median_s"]]
    names = {row["contender"] for row in rows if row["benchmark"] == "cpu"}
    given, own = step.GIVEN, step.OWN
    assert {f"published, {given}", f"published, {own}", f"reference, {given}"} <= names
    assert {f"reference, {own}", f"reference, seed, {own}", "copy"} <= names
    assert {f"torch.compile, {given}", f"torch.compile, {own}"} <= names
    for row in rows:
        assert bool(row["median_s"]) != row["note"].startswith("skipped: ")
        assert row["cpu"] and row["gpu"] and row["torch"] and row["date"]
    for row in timed:
        assert 0 < float(row["q25"]) <= float(row["median_s"]) <= float(row["q75"])
        assert float(row["ratio"]) > 0 and float(row["bandwidth"]) > 0
        assert math.isclose(
            float(row["times_floor"]),
            float(row["median_s"]) / float(row["floor_s"]),
            rel_tol=1e-2,
        )
    assert "floor" in said and "remain" in said
    assert {row["met"] for row in rows} == {"", "not judged"}


def test_the_plot_is_drawn(quick_step):
    pytest.importorskip("matplotlib")
    said, _, out = quick_step
    assert (out / "step_quick.png").stat().st_size > 10_000
    assert f"drawn to {out / 'step_quick.png'}" in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_every_contender_of_it_is_skipped_by_name(quick_step):
    said, rows, _ = quick_step
    skipped = [row for row in rows if row["benchmark"] == "gpu"]
    assert {row["note"] for row in skipped} == {"skipped: torch sees no GPU"}
    assert {"fused, given noise", "copy", "empty kernel"} <= {row["contender"] for row in skipped}
    assert "skipped: torch sees no GPU: gpu, all, all, fused, given noise" in said


def test_without_matplotlib_the_plot_is_skipped(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said = step.draw([], tmp_path / "step.png", {})
    assert said.startswith("no plot: ") and not any(tmp_path.iterdir())


def test_the_overhead_leaves_shares(tmp_path):
    said, rows = run("overhead", tmp_path)
    timed = {row["contender"]: row for row in rows if row["median_s"]}
    assert {overhead.NETWORK, overhead.WITH_PUBLISHED, overhead.WITH_OURS} <= timed.keys()
    for name in (overhead.WITH_PUBLISHED, overhead.WITH_OURS):
        assert float(timed[name]["share"]) < 1
        assert 0 < float(timed[name]["direct_share"]) < 1
    assert int(timed[overhead.NETWORK]["parameters"]) > 0
    if not torch.cuda.is_available():
        skipped = {row["network"]: row["note"] for row in rows if not row["median_s"]}
        assert skipped.keys() == {"SD 1.5", "SDXL"}
        assert all("skipped: no GPU" in note for note in skipped.values())
        assert "SDXL, network: skipped: no GPU" in said


def test_a_part_has_results_of_its_own(tmp_path, monkeypatch, capsys):
    row = step.StepRow("cpu", "c", "float32", 1, "a", note="skipped: because")
    monkeypatch.setattr(step, "PARTS", {"cpu": lambda settings: [row], "gpu": None})
    main(["step", "--part", "cpu", "--out", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["step_cpu.csv"]
    assert "no plot: nothing was timed" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["step", "--part", "tpu", "--out", str(tmp_path)])


# ---------------------------------------------------------------------- like with like


def test_the_published_sequence_is_the_published_chain():
    rng, steps = np.random.default_rng(0), 20
    c = textbook.ddpm_coefficients(steps, 1e-3, 0.2)
    x, noises = rng.standard_normal((4, 3, 5)), rng.standard_normal((steps, 4, 3, 5))

    def predict(x, t):
        return 0.8 * x + 0.01 * t

    def predict_neg(x, t):
        return 0.8 * x + 0.02 * np.sin(x)

    expected, expected_p = textbook.published_chain(
        c, predict, predict_neg, x, noises, 1.5, 0.2, temperature=0.7, offset=1e-4
    )
    published = step.Published(
        c.betas, torch.float64, guidance_scale=1.5, temperature=0.7, offset=1e-4
    )
    now, p = torch.from_numpy(x), torch.full((4,), 0.2, dtype=torch.float64)
    for t in reversed(range(steps)):
        eps, eps_neg = (torch.from_numpy(f(now.numpy(), t)) for f in (predict, predict_neg))
        now, p = published.step(t, now, eps, eps_neg, p, torch.from_numpy(noises[t]))
    assert error(now.numpy(), expected) <= CHAIN
    assert error(p.numpy(), expected_p) <= CHAIN


def test_the_published_sequence_stays_in_the_dtype_of_its_tensors():
    device = step.cpu_device()
    t = step.make_tensors(TINY, torch.bfloat16, step.make_plan(device))
    published = step.Published(step.BETAS, torch.bfloat16)
    x_next, p = published.step(step.TIME, t.x, t.eps, t.eps_neg, t.p)
    assert x_next.dtype == p.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_published_step_is_ours(dtype):
    step.check_published(step.cpu_device(), dtype)


def test_a_published_posterior_that_is_nan_is_seen():
    t = step.make_tensors(TINY, torch.float32, step.make_plan(step.cpu_device()))
    published = step.Published(step.BETAS, torch.float32)
    with pytest.raises(AssertionError, match="NaN"):
        published.step(step.TIME, t.x, t.eps, t.eps_neg, t.p * math.nan, t.noise)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_the_compiler_gets_is_the_step(dtype):
    plan = step.make_plan(step.cpu_device())
    t = step.make_tensors(TINY, dtype, plan)
    for noise in (step.GIVEN, step.OWN):

        def whole(t, noise=noise):
            z = t.noise if noise == step.GIVEN else None
            index = plan.index_of[step.STEP]
            return step.whole_step(plan.table, index, t.x, t.eps, t.eps_neg, z, t.state)

        step.check_entry(step.Entry("it", whole, noise), t, plan, dtype)


@pytest.mark.parametrize("noise", [step.GIVEN, step.OWN])
def test_a_wrong_step_is_not_timed(noise):
    plan = step.make_plan(step.cpu_device())
    t = step.make_tensors(TINY, torch.float32, plan)
    wrong = step.Entry("it", lambda t: (t.x + 1.0, t.state), noise)
    with pytest.raises(RuntimeError, match="not timed"):
        step.check_entry(wrong, t, plan, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_counted_from_the_tensors(dtype):
    plan = step.make_plan(step.cpu_device())
    t = step.make_tensors(TINY, dtype, plan)
    # x, both predictions and x_next, and the noise if it is read; log p is read and written.
    size = 3 * 2 * 6 * 8 * dtype.itemsize
    assert step.step_bytes(t, step.GIVEN) == 5 * size + 2 * 3 * 4
    assert step.step_bytes(t, step.OWN) == 4 * size + 2 * 3 * 4
    copy = next(e for e in step.other_entries(t, step.cpu_device()) if e.name == step.COPY)
    assert abs(copy.moved - step.step_bytes(t, step.GIVEN)) < 8


# ---------------------------------------------------------------------- the GPU's path


def test_rows_of_plain_and_captured_steps(monkeypatch):
    monkeypatch.setattr(step, "compiled_entries", lambda plan, device: [])
    fed = {}

    def interleaved(contenders, repeats):
        for contender in contenders:
            contender.run()
            fed[contender.name] = contender
        # The copy takes 1 s, ours 2 s, whatever else 6 s.
        known = {"copy (graph)": 1.0, "reference, given noise (graph)": 2.0}
        return {c.name: [known.get(c.name, 6.0)] * repeats for c in contenders}

    monkeypatch.setattr(harness, "interleaved", interleaved)
    device = fake_gpu(name="cpu")
    rows = step.time_case(TINY, torch.float32, device, Settings(3))
    found = {(row.contender, row.mode): row for row in rows}
    for contender in ("published, given noise", "reference, given noise", "copy"):
        assert {(contender, "plain"), (contender, "graph")} <= found.keys()
    row = found["reference, given noise", "graph"]
    assert row.floor_s == pytest.approx(1.0, rel=0.01)
    assert row.times_floor == pytest.approx(2.0, rel=0.01)
    published = found["published, given noise", "graph"]
    assert published.ratio == 3.0 and published.baseline == "reference, given noise"
    assert published.met == "reached" and published.measured == "3x faster"
    assert "assertion" in published.note
    # Twice the cache, and every set in every lap.
    assert row.sets == 2 == fed["copy (graph)"].calls
    line = next(line for line in step.report(rows) if "reference" in line)
    assert "2x the floor" in line


def test_the_whole_gpu_path_with_the_kernel_interpreted():
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("the kernel is compiled here, and reads no tensors of the CPU")
    device = fake_gpu(fused=True)
    # Without the compiler: it has its own test, and takes seconds.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "compiled_entries", lambda plan, device: [])
        rows = step.time_case(TINY, torch.float32, device, Settings(1))
    names = {(row.contender, row.mode) for row in rows if row.median_s}
    for name in ("fused, given noise", "fused, seed, own noise", "empty kernel", "copy"):
        assert {(name, "plain"), (name, "graph")} <= names
    assert ("fused, from the cache, given noise", "graph") in names
    by_name = {(row.contender, row.mode): row for row in rows}
    assert by_name["empty kernel", "graph"].goal == "fused in at most 1.5x the time"
    assert by_name["published, given noise", "plain"].goal == "fused at least 15x faster"
    assert by_name["fused, given noise", "graph"].goal == "one launch"
    assert by_name["fused, given noise", "graph"].met == "reached"
    assert by_name["published, own noise", "graph"].baseline == "fused, seed, own noise"


def test_what_no_graph_can_hold_is_skipped_and_the_rest_is_timed(monkeypatch):
    monkeypatch.setattr(step, "compiled_entries", lambda plan, device: [])

    def refuse(lap):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    rows = step.time_case(TINY, torch.float32, fake_gpu(capture=refuse), Settings(1))
    skipped = [row for row in rows if row.mode == step.GRAPH]
    assert skipped and all("no graph can hold it" in row.note for row in skipped)
    assert all("and more" not in row.note for row in skipped)
    assert any(row.median_s for row in rows if row.mode == step.PLAIN)


def test_without_a_compiler_the_rest_is_timed(monkeypatch):
    def refuse(function, **options):
        def run(*arguments):
            raise RuntimeError("no C++ compiler is found")

        return run

    monkeypatch.setattr(torch, "compile", refuse)
    rows = step.time_case(TINY, torch.float32, step.cpu_device(), QUICK)
    notes = {row.contender: row.note for row in rows if row.contender.startswith("torch.compile")}
    assert len(notes) == 3
    assert all(note.endswith("no C++ compiler is found") for note in notes.values())
    assert any(row.contender == "reference, given noise" and row.median_s for row in rows)


def test_what_does_not_fit_in_memory_is_skipped():
    device = replace(step.cpu_device(), free=lambda: 1000.0)
    (row,) = step.time_case(TINY, torch.float32, device, QUICK)
    assert row.note.startswith("skipped: needs ") and "are free" in row.note


def test_the_sizes_and_goals_are_those_that_are_named():
    sizes = [case.elements for case in step.CASES]
    assert min(sizes) == 3 * 32 * 32 and max(sizes) == 2**28
    latents = [case.shape[0] for case in step.CASES if case.stable_diffusion]
    assert min(latents) == 1 and max(latents) == 64
    device = fake_gpu(fused=True)
    tensors = step.make_tensors(TINY, torch.float32, step.make_plan(device))
    large = tensors._replace(x=torch.empty(step.LARGE // 4, device="meta"))
    copy = step.Entry(step.COPY, lambda t: None)
    assert step.goal_of(copy, step.GRAPH, TINY, tensors, device) is None
    goal = step.goal_of(copy, step.GRAPH, TINY, large, device)
    assert goal is not None and goal.reached(0.9, 1.0) and not goal.reached(0.89, 1.0)
