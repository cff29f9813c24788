"""The benchmarks of the step run, check values first, and say what they did not measure."""

from __future__ import annotations

import contextlib
import csv
import io
import math
import re
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import contenders, harness, overhead, step, step_report, style
from benchmarks.__main__ import main
from benchmarks.contenders import (
    BOUND,
    COMPILED,
    COPY,
    EAGER,
    EMPTY,
    GIVEN,
    KERNEL,
    NAIVE,
    OURS,
    OWN,
    PUBLISHED,
    SEEDED,
    Case,
    Entry,
    label_of,
)
from benchmarks.device import (
    GRAPH,
    HOST_CALLS,
    HOST_LAPS,
    PLAIN,
    Device,
    cpu_device,
    host_clock,
    peak_bandwidth,
)
from benchmarks.harness import Settings
from benchmarks.published import Published
from benchmarks.step_report import StepRow
from dng_models.support.progress import showing
from tests.helpers import textbook
from tests.helpers.tolerances import CHAIN, error
from tests.models.support.test_interrupt import BESIDE_OTHERS, SECONDS, interrupted

TINY = Case("tiny", (3, 2, 6, 8), "tiny", True)
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
    compiled = step.compiled_entries

    def given(*arguments):
        """Half of what is compiled, which takes seconds each."""
        return [entry for entry in compiled(*arguments) if entry.noise == GIVEN]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "QUICK", contenders.CASES[:1])
        patch.setattr(step, "compiled_entries", given)
        return (*run("step", out), out)


def fake_gpu(**changes):
    """A device that is timed and captured as a GPU is, and computes on the CPU."""
    ticks = iter(range(10**6))
    device = Device(
        "gpu",
        torch.device("cpu"),
        # Every lap takes a microsecond longer than the one before it.
        clock=lambda run: (run(), 0.03 + 1e-6 * next(ticks))[1],
        cache=3 * 4 * 2 * 48 * 5,
        capture=lambda lap: lap,
        launches=lambda run: 1,
    )
    return replace(device, **changes)


# ---------------------------------------------------------------------- both commands


@pytest.mark.slow
def test_the_step_leaves_a_row_for_every_contender(quick_step):
    said, rows, _ = quick_step
    timed = [row for row in rows if row["median_s"]]
    names = {row["contender"] for row in rows if row["benchmark"] == "cpu"}
    for name in (PUBLISHED, NAIVE, OURS):
        for parts in ((EAGER, GIVEN), (EAGER, OWN), (COMPILED, GIVEN)):
            assert label_of(name, *parts) in names
    assert {label_of(OURS, EAGER, SEEDED), label_of(BOUND, EAGER, GIVEN), COPY} <= names
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
    by_name = {row["contender"]: row for row in timed}
    for name in (PUBLISHED, NAIVE):
        for form in (EAGER, COMPILED):
            row = by_name[label_of(name, form, GIVEN)]
            ours = BOUND if (name, form) == (PUBLISHED, EAGER) else OURS
            assert row["baseline"] == label_of(ours, form, GIVEN)
            assert f"{name}, {form} / {ours}, {form}, {GIVEN}" in said
    assert by_name[label_of(OURS, EAGER, SEEDED)]["baseline"] == label_of(OURS, EAGER, OWN)
    assert {row["met"] for row in rows} == {"", "not judged"}


@pytest.mark.slow
def test_a_table_is_told_again_without_measuring(quick_step, tmp_path, monkeypatch, capsys):
    said, _, out = quick_step
    monkeypatch.setattr(step, "PARTS", {"cpu": None})
    main(["step", "--read", str(out / "step_quick.csv"), "--out", str(tmp_path)])
    again = capsys.readouterr().out
    # A CSV has four digits, and so the last of three may differ.
    told = [text[text.index("report") : text.index("goals")] for text in (said, again)]
    told = [re.sub(r"[\d.]+", "0", text) for text in told]
    assert told[0] == told[1]
    assert [path.name for path in tmp_path.iterdir()] == ["step.png"]


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", "benchmark,case\n"])
def test_another_file_is_not_told(text, tmp_path, capsys):
    (tmp_path / "other.csv").write_text(text)
    with pytest.raises(SystemExit) as exit_:
        main(["step", "--read", str(tmp_path / "other.csv"), "--out", str(tmp_path)])
    assert exit_.value.code == 2
    assert "other.csv must be a table that this benchmark wrote" in capsys.readouterr().err


@pytest.mark.slow
def test_the_plot_is_drawn(quick_step):
    said, _, out = quick_step
    assert (out / "step_quick.png").stat().st_size > 10_000
    assert f"drawn to {out / 'step_quick.png'}" in said


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_every_contender_of_it_is_skipped_by_name(quick_step):
    said, rows, _ = quick_step
    skipped = [row for row in rows if row["benchmark"] == "gpu"]
    assert {row["note"] for row in skipped} == {"skipped: torch sees no GPU"}
    kernel = label_of(OURS, KERNEL, GIVEN)
    assert {kernel, COPY, EMPTY} <= {row["contender"] for row in skipped}
    assert f"skipped: torch sees no GPU: gpu, all, all, {kernel}" in said


def test_without_matplotlib_the_plot_is_skipped(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    row = StepRow("cpu", "tiny", "float32", 8, COPY, median_s=1.0)
    said = step.draw([row], tmp_path / "step.png", {})
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
    row = StepRow("cpu", "c", "float32", 1, "a", note="skipped: because")
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
    published = Published(c.betas, torch.float64, guidance_scale=1.5, temperature=0.7, offset=1e-4)
    now, p = torch.from_numpy(x), torch.full((4,), 0.2, dtype=torch.float64)
    for t in reversed(range(steps)):
        eps, eps_neg = (torch.from_numpy(f(now.numpy(), t)) for f in (predict, predict_neg))
        now, p = published.step(t, now, eps, eps_neg, p, torch.from_numpy(noises[t]))
    assert error(now.numpy(), expected) <= CHAIN
    assert error(p.numpy(), expected_p) <= CHAIN


def test_the_published_sequence_stays_in_the_dtype_of_its_tensors():
    device = cpu_device()
    t = contenders.make_tensors(TINY, torch.bfloat16, contenders.make_plan(device))
    published = Published(contenders.BETAS, torch.bfloat16)
    x_next, p = published.step(contenders.TIME, t.x, t.eps, t.eps_neg, t.p)
    assert x_next.dtype == p.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_published_step_is_ours(dtype):
    contenders.check_published(cpu_device(), dtype)


def test_a_published_posterior_that_is_nan_is_seen():
    t = contenders.make_tensors(TINY, torch.float32, contenders.make_plan(cpu_device()))
    published = Published(contenders.BETAS, torch.float32)
    with pytest.raises(AssertionError, match="NaN"):
        published.step(contenders.TIME, t.x, t.eps, t.eps_neg, t.p * math.nan, t.noise)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_eager_contender_takes_the_same_step(dtype):
    plan = contenders.make_plan(cpu_device())
    t = contenders.make_tensors(TINY, dtype, plan)
    for entry in contenders.eager_entries(plan, dtype, cpu_device()):
        contenders.check_entry(entry, t, plan, dtype)
        assert entry.run(t)[0].dtype == dtype


@pytest.mark.slow
def test_every_compiled_contender_takes_the_same_step():
    plan = contenders.make_plan(cpu_device())
    t = contenders.make_tensors(TINY, torch.bfloat16, plan)
    for entry in contenders.compiled_entries(plan, torch.bfloat16, cpu_device(), TINY):
        contenders.check_entry(entry, t, plan, torch.bfloat16)


@pytest.mark.parametrize("noise", [GIVEN, OWN])
def test_a_wrong_step_is_not_timed(noise):
    plan = contenders.make_plan(cpu_device())
    t = contenders.make_tensors(TINY, torch.float32, plan)
    wrong = Entry("it", lambda t: (t.x + 1.0, t.state), EAGER, noise)
    with pytest.raises(RuntimeError, match="not timed"):
        contenders.check_entry(wrong, t, plan, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_counted_from_the_tensors(dtype):
    plan = contenders.make_plan(cpu_device())
    t = contenders.make_tensors(TINY, dtype, plan)
    # x, both predictions and x_next, and the noise if it is read; log p is read and written.
    size = 3 * 2 * 6 * 8 * dtype.itemsize
    assert contenders.step_bytes(t, GIVEN) == 5 * size + 2 * 3 * 4
    assert contenders.step_bytes(t, OWN) == 4 * size + 2 * 3 * 4
    copy = next(e for e in contenders.other_entries(t, cpu_device()) if e.name == COPY)
    assert abs(copy.moved - contenders.step_bytes(t, GIVEN)) < 8


# ---------------------------------------------------------------------- the GPU's path


def test_rows_of_plain_and_captured_steps(monkeypatch):
    monkeypatch.setattr(step, "compiled_entries", lambda *arguments: [])
    fed = {}

    def interleaved(contenders, repeats, deadline):
        for contender in contenders:
            contender.run()
            fed[contender.name] = contender
        # The copy takes 1 s, a step that was bound 2 s, whatever else 6 s.
        known = {"copy (graph)": 1.0, "BoundStep, eager, given noise (graph)": 2.0}
        return {c.name: [known.get(c.name, 6.0)] * repeats for c in contenders}

    monkeypatch.setattr(harness, "interleaved", interleaved)
    device = fake_gpu(name="cpu")
    rows = step.time_case(TINY, torch.float32, device, Settings(3))
    found = {(row.contender, row.mode): row for row in rows}
    for contender in ("published, eager, given noise", "dng_step, eager, given noise", "copy"):
        assert {(contender, "plain"), (contender, "graph")} <= found.keys()
    row = found["BoundStep, eager, given noise", "graph"]
    assert row.floor_s == pytest.approx(1.0, rel=0.01)
    assert row.times_floor == pytest.approx(2.0, rel=0.01)
    published = found["published, eager, given noise", "graph"]
    assert published.ratio == 3.0 and published.baseline == "BoundStep, eager, given noise"
    assert published.met == "reached" and published.measured == "3x faster"
    assert "assertion" in published.note
    # Twice the cache, and every set in every lap.
    assert row.sets == 2 == fed["copy (graph)"].calls
    # ... and an eager contender is compared with an eager one, by name.
    lines = step.report(rows)
    assert any(
        line.startswith("| published, eager / BoundStep, eager, given noise | 3x") for line in lines
    )
    assert any(line.startswith("| BoundStep, eager / copy of its") for line in lines)


@pytest.mark.slow
def test_the_whole_gpu_path_with_the_kernel_interpreted():
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("the kernel is compiled here, and reads no tensors of the CPU")
    device = fake_gpu(kernel=True, peak=2e9, host=lambda run: (run(), 25e-6)[1])
    # Without the compiler: it has its own test, and takes seconds.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "compiled_entries", lambda *arguments: [])
        rows = step.time_case(TINY, torch.float32, device, Settings(1))
    names = {(row.contender, row.mode) for row in rows if row.median_s}
    for name in (
        "dng_step, Triton kernel, given noise",
        "dng_step, Triton kernel, noise of a seed",
        "naive, eager, given noise",
        "empty kernel",
        "copy",
    ):
        assert {(name, "plain"), (name, "graph")} <= names
    for row in rows:  # 2 GB/s at most, and 25 us of the host where it starts the calls one by one
        assert (row.peak_percent is None) == (row.bandwidth is None)
        if row.bandwidth is not None:
            assert row.peak_percent == pytest.approx(50.0 * row.bandwidth)
        assert row.host_s == (25e-6 if row.mode == PLAIN else None)
    told = step.report(rows)
    assert "gpu, float32, plain: percent of the card's peak bandwidth" in told
    assert any(line.startswith("| dng_step, Triton kernel, given noise | 25 µs") for line in told)
    assert ("dng_step, Triton kernel from the cache, given noise", "graph") in names
    by_name = {(row.contender, row.mode): row for row in rows}
    assert (
        by_name["empty kernel", "graph"].goal == "dng_step, Triton kernel in at most 1.5x the time"
    )
    assert by_name["published, eager, given noise", "plain"].goal == (
        "dng_step, Triton kernel at least 15x faster"
    )
    assert by_name["dng_step, Triton kernel, given noise", "graph"].goal == "one launch"
    assert by_name["dng_step, Triton kernel, given noise", "graph"].met == "reached"
    assert by_name["published, eager, own noise", "graph"].baseline == (
        "dng_step, Triton kernel, noise of a seed"
    )


@pytest.mark.parametrize(
    ("properties", "peak"),
    [
        # H100 SXM5: 5120 bits at 2619 MHz; A100 40 GB: 5120 bits at 1215 MHz
        ({"memory_clock_rate": 2_619_000, "memory_bus_width": 5120}, 3352.32e9),
        ({"memory_clock_rate": 1_215_000, "memory_bus_width": 5120}, 1555.2e9),
        ({"memory_clock_rate": 2_619_000}, None),
        ({"memory_clock_rate": 0, "memory_bus_width": 5120}, None),
        ({}, None),
    ],
)
def test_the_peak_is_of_the_cards_clock_and_bus(properties, peak):
    found = peak_bandwidth(SimpleNamespace(**properties))
    assert found == (None if peak is None else pytest.approx(peak))


def test_a_peak_that_torch_does_not_tell_is_left_empty_and_said():
    row = StepRow("gpu", "2^24 elements", "float32", 2**24, "copy", median_s=1.0, bandwidth=2.0)
    for rows, silent in (([row], True), ([replace(row, peak_percent=80.0)], False)):
        told = "\n".join(step.report(rows))
        assert ("this torch does not tell the card's peak bandwidth" in told) == silent
        assert ("| copy | 80% |" in told) != silent
        assert "| copy | 2 |" in told and "host time" not in told
    assert "GB/s" not in "\n".join(step.report([replace(row, benchmark="cpu")]))


def test_the_host_is_timed_alone(monkeypatch):
    """While a device is busy: between two waits for it, and with few enough launches."""
    said, clock = [], iter(range(10**6))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: said.append("wait"))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
    seconds = host_clock(lambda: said.append("call"))
    lap = ["wait", *["call"] * HOST_CALLS]
    assert said == [*lap * HOST_LAPS, "wait"]
    assert seconds == 1.0 / HOST_CALLS


def test_what_no_graph_can_hold_is_skipped_and_the_rest_is_timed(monkeypatch):
    monkeypatch.setattr(step, "compiled_entries", lambda *arguments: [])

    def refuse(lap):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    rows = step.time_case(TINY, torch.float32, fake_gpu(capture=refuse), Settings(1))
    skipped = [row for row in rows if row.mode == GRAPH]
    assert skipped and all("no graph can hold it" in row.note for row in skipped)
    assert all("and more" not in row.note for row in skipped)
    assert any(row.median_s for row in rows if row.mode == PLAIN)


def test_without_a_compiler_the_rest_is_timed(monkeypatch):
    def refuse(function, **options):
        def run(*arguments):
            raise RuntimeError("no C++ compiler is found")

        return run

    monkeypatch.setattr(torch, "compile", refuse)
    rows = step.time_case(TINY, torch.float32, cpu_device(), QUICK)
    notes = {row.contender: row.note for row in rows if COMPILED in row.contender}
    assert len(notes) == 6
    assert all(note.endswith("no C++ compiler is found") for note in notes.values())
    assert any(row.contender == label_of(OURS, EAGER, GIVEN) and row.median_s for row in rows)


def test_with_a_compiler_what_it_cannot_compile_is_an_error(monkeypatch):
    """It is ours: no contender is left out for it."""
    monkeypatch.setattr(step, "no_compiler", lambda device: "")

    def refuse(function, **options):
        def run(*arguments):
            raise RuntimeError("Unsupported")

        return run

    monkeypatch.setattr(torch, "compile", refuse)
    with pytest.raises(RuntimeError, match="Unsupported"):
        step.time_case(TINY, torch.float32, cpu_device(), QUICK)


def test_what_does_not_fit_in_memory_is_skipped():
    device = replace(cpu_device(), free=lambda: 1000.0)
    (row,) = step.time_case(TINY, torch.float32, device, QUICK)
    assert row.note.startswith("skipped: needs ") and "are free" in row.note


def test_the_sizes_and_goals_are_those_that_are_named():
    sizes = [case.elements for case in contenders.CASES]
    assert min(sizes) == 3 * 32 * 32 and max(sizes) == 2**28
    latents = [case.shape[0] for case in contenders.CASES if case.stable_diffusion]
    assert min(latents) == 1 and max(latents) == 64
    device = fake_gpu(kernel=True)
    tensors = contenders.make_tensors(TINY, torch.float32, contenders.make_plan(device))
    large = tensors._replace(x=torch.empty(step.LARGE // 4, device="meta"))
    copy = Entry(COPY, lambda t: None)
    assert step.goal_of(copy, GRAPH, TINY, tensors, device) is None
    goal = step.goal_of(copy, GRAPH, TINY, large, device)
    assert goal is not None and goal.reached(0.9, 1.0) and not goal.reached(0.89, 1.0)


def test_contenders_are_compared_with_ours_as_they_are_run():
    def baseline(device, *parts):
        return step.baseline_of(Entry(parts[0], lambda t: None, *parts[1:]), device)

    cpu, gpu = cpu_device(), fake_gpu(kernel=True)
    for name in (PUBLISHED, NAIVE):
        bound = BOUND if name == PUBLISHED else OURS
        assert baseline(cpu, name, EAGER, GIVEN) == label_of(bound, EAGER, GIVEN)
        assert baseline(cpu, name, COMPILED, GIVEN) == label_of(OURS, COMPILED, GIVEN)
        assert baseline(cpu, name, COMPILED, OWN) == label_of(OURS, COMPILED, OWN)
        assert baseline(gpu, name, COMPILED, GIVEN) == label_of(OURS, KERNEL, GIVEN)
        assert baseline(gpu, name, EAGER, OWN) == label_of(OURS, KERNEL, SEEDED)
    assert baseline(cpu, OURS, COMPILED, GIVEN) == label_of(OURS, EAGER, GIVEN)
    assert baseline(cpu, OURS, EAGER, SEEDED) == label_of(OURS, EAGER, OWN)
    assert baseline(cpu, COPY) == label_of(OURS, EAGER, GIVEN)


@pytest.mark.parametrize("posterior", [0.5, math.nan])
def test_a_wrong_published_posterior_is_not_timed(posterior):
    plan = contenders.make_plan(cpu_device())
    t = contenders.make_tensors(TINY, torch.float32, plan)
    right = contenders.eager_entries(plan, torch.float32, cpu_device())[0]
    contenders.check_entry(right, t, plan, torch.float32)
    wrong = replace(right, run=lambda t: (right.run(t)[0], torch.full_like(t.p, posterior)))
    with pytest.raises(RuntimeError, match="log p of published.*not timed"):
        contenders.check_entry(wrong, t, plan, torch.float32)


# ---------------------------------------------------------------------- the plot


def rows_of(device, contenders_, mode):
    """Times that grow with the size, each contender's apart from the others'."""
    return [
        StepRow(device, case.name, "float32", case.elements, label, mode, median_s=1e-9 * n * i)
        for case in contenders.CASES[:4]
        for i, (label, n) in enumerate(((each, case.elements) for each in contenders_), 1)
    ]


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_every_line_of_the_plot_is_named_beside_it(device, tmp_path, monkeypatch):
    if device == "cpu":
        parts = [(n, f, GIVEN) for n in (PUBLISHED, NAIVE, OURS) for f in (EAGER, COMPILED)]
        rows = rows_of(device, [*(label_of(*p) for p in parts), COPY], PLAIN)
    else:
        parts = [(PUBLISHED, EAGER, GIVEN), (NAIVE, COMPILED, GIVEN), (OURS, KERNEL, GIVEN)]
        names = [*(label_of(*p) for p in parts), COPY, EMPTY]
        rows = rows_of(device, names, PLAIN) + rows_of(device, names, GRAPH)
    figures = []
    monkeypatch.setattr(step_report, "save", lambda figure, path: figures.append(figure))
    where = {"cpu": "a CPU", "gpu": "a GPU", "torch_threads": "2", "torch": "2.x"}
    assert "drawn" in step.draw(rows, tmp_path / "step.png", where)
    (figure,) = figures
    assert f"a {device.upper()}" in figure.get_suptitle() and "torch 2.x" in figure.get_suptitle()
    for axes in figure.axes:
        assert len(axes.lines) == (4 if device == "cpu" else 5)
        colours = {text.get_color(): text.get_text() for text in axes.texts}
        assert colours.keys() == {line.get_color() for line in axes.lines}
        assert [label.get_text() for label in axes.get_xticklabels()] == [
            case.short for case in sorted(contenders.CASES[:4], key=lambda case: case.elements)
        ]


def test_names_beside_lines_do_not_touch():
    assert style.apart([0.1, 0.9], 0.2) == [0.1, 0.9]
    moved = style.apart([0.52, 0.5, 0.51, 0.0], 0.1)
    assert moved == pytest.approx([0.61, 0.41, 0.51, 0.0])
    moved = style.apart([0.3, 0.3, 0.2], 0.2)
    assert sorted(moved) == pytest.approx([0.8 / 3 - 0.2, 0.8 / 3, 0.8 / 3 + 0.2])


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(1e-7, "100 ns"), (1e-5, "10 µs"), (9.996e-4, "1 ms"), (0.0123, "12.3 ms"), (2.5, "2.5 s")],
)
def test_times_are_written_with_their_units(seconds, text):
    assert style.seconds_text(seconds) == text


def test_a_plot_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    figure = style.new_figure(1, 1)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"step.png was not written: No space"):
        step_report.save(figure, tmp_path / "step.png")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------- compilation


def test_a_log_says_what_compiles(monkeypatch, capsys):
    monkeypatch.setattr(step, "check_entry", lambda *arguments: None)
    entries = [Entry(NAIVE, lambda t: None, form, GIVEN) for form in (EAGER, COMPILED)]
    plan = contenders.make_plan(cpu_device())
    t = contenders.make_tensors(TINY, torch.float32, plan)
    with showing(True):
        step.check(entries, "tiny, float32", t, plan, torch.float32)
    assert "tiny, float32: compiling 1 steps" in capsys.readouterr().err
    step.check(entries, "tiny, float32", t, plan, torch.float32)
    assert capsys.readouterr().err == ""


COMPILES = """
import runpy, sys
from benchmarks import step
check = step.check_entry

def told(entry, *others):
    if entry.form == "compiled":
        print("compiling now", flush=True)
    check(entry, *others)

step.check_entry = told
sys.argv = ["benchmarks", "step", "--part", "cpu", "--quick", "--out", {out!r}]
runpy.run_module("benchmarks", run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize("whole_group", [False, True])
def test_ctrl_c_ends_a_compilation(tmp_path, whole_group):
    code = COMPILES.format(out=str(tmp_path))
    found = interrupted(["-c", code], "compiling now", whole_group=whole_group, wait=1.0)
    code, _, errors, seconds = found
    assert code == 130 and seconds < SECONDS + BESIDE_OTHERS
    lines = errors.splitlines()
    assert "compiling 6 steps" in lines[0] and lines[1:] == ["interrupted"]
    assert list(tmp_path.iterdir()) == []
