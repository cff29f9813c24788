"""Benchmarks that must end in time, that write what they have, and that go on where they were."""

from __future__ import annotations

import time

import pytest

from benchmarks import __main__ as program
from benchmarks import harness, step
from benchmarks.__main__ import ON_GPU, main
from benchmarks.device import cpu_device
from benchmarks.harness import LEAST_ROUNDS, Contender, Settings
from benchmarks.step_report import StepRow


def test_rounds_stop_at_the_deadline_but_three_are_made():
    contenders = [Contender("a", lambda: None), Contender("b", lambda: None, rounds=1)]
    late = harness.interleaved(contenders, 9, time.monotonic() - 1.0)
    assert (len(late["a"]), len(late["b"])) == (LEAST_ROUNDS, 1)
    early = harness.interleaved(contenders, 5, time.monotonic() + 60.0)
    assert (len(early["a"]), len(early["b"])) == (5, 1)


def test_every_comparison_has_its_part_of_the_time():
    settings = Settings(deadline=time.monotonic() + 100.0)
    assert settings.share(4).deadline == pytest.approx(time.monotonic() + 25.0, abs=1.0)
    assert settings.share(1).deadline == pytest.approx(settings.deadline, abs=1.0)
    assert Settings(deadline=time.monotonic() - 5.0).share(2).deadline <= time.monotonic()
    assert Settings().share(3).deadline == float("inf")


@pytest.mark.parametrize(
    ("once", "sets", "calls"),
    [(1e-6, 10, 256), (1e-3, 4, 5), (1e-3, 200, 50), (1.0, 256, 1), (0.01, 3, 3)],
)
def test_a_lap_of_slow_steps_does_not_use_every_set(once, sets, calls):
    assert step.calls_of_lap(once, [None] * sets, cpu_device()) == calls


@pytest.fixture
def sizes(monkeypatch):
    """Steps of two sizes and dtypes that take no time, and a list of what was timed."""
    timed = []

    def time_case(case, dtype, device, settings):
        name = str(dtype).removeprefix("torch.")
        timed.append((case.name, name))
        if len(timed) == time_case.stops_after:
            raise KeyboardInterrupt
        return [StepRow(device.name, case.name, name, case.elements, "dng_step", median_s=1.0)]

    time_case.stops_after = None
    monkeypatch.setattr(step, "time_case", time_case)
    monkeypatch.setattr(step, "check_published", lambda device, dtype: None)
    monkeypatch.setattr(step, "PARTS", {"cpu": step.cpu})
    return time_case, timed


def undated(path):
    """Lines of a table without their last column."""
    return [line.rpartition(",")[0] for line in path.read_text().splitlines()]


def test_what_was_timed_is_written_at_once_and_a_run_goes_on_where_it_was(sizes, tmp_path, capsys):
    time_case, timed = sizes
    given = ["step", "--quick", "--out", str(tmp_path)]
    time_case.stops_after = 2
    with pytest.raises(KeyboardInterrupt):
        main(given)
    path = tmp_path / "step_quick.csv"
    assert len(path.read_text().splitlines()) == 2  # the head, and the one size that was done

    time_case.stops_after, first = None, timed[0]
    timed.clear()
    main([*given, "--resume"])
    assert first not in timed and len(timed) >= 1
    whole = undated(path)
    assert len(whole) == 2 + len(timed)
    timed.clear()
    main([*given, "--resume"])
    assert timed == [] and undated(path) == whole
    capsys.readouterr()

    main(given)  # without --resume everything anew
    assert len(timed) == len(whole) - 1


def test_a_table_of_another_machine_is_not_gone_on_with(sizes, tmp_path, capsys, monkeypatch):
    given = ["step", "--quick", "--out", str(tmp_path)]
    main(given)
    own = harness.machine
    monkeypatch.setattr(program, "machine", lambda **more: own(**more) | {"torch": "1.0"})
    before = (tmp_path / "step_quick.csv").read_bytes()
    with pytest.raises(SystemExit) as stopped:
        main([*given, "--resume"])
    assert stopped.value.code == 2
    assert "--resume" in (said := capsys.readouterr().err) and "torch" in said and "1.0 now" in said
    assert (tmp_path / "step_quick.csv").read_bytes() == before


def test_all_of_a_gpu_is_one_call_of_parts_that_are_there(monkeypatch, tmp_path):
    asked = []
    inner = program.main

    def part(arguments=None):
        asked.append(arguments)

    options = program.make_parser().parse_args(["gpu", "--out", str(tmp_path), "--quick"])
    monkeypatch.setattr(program, "main", part)
    program.gpu(options)
    assert inner is not program.main and len(asked) == len(ON_GPU)
    assert sum(ON_GPU.values()) == pytest.approx(1.0)
    for given, (command, name) in zip(asked, ON_GPU, strict=True):
        parsed = program.make_parser().parse_args(given)
        assert parsed.resume and parsed.quick and parsed.part == name
        assert name in __import__(f"benchmarks.{command}", fromlist=["PARTS"]).PARTS
    assert sum(program.make_parser().parse_args(given).seconds for given in asked) == (
        pytest.approx(540.0)
    )


@pytest.mark.parametrize("arguments", [["step", "--seconds", "0"], ["gpu", "--seconds", "-1"]])
def test_no_time_is_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert "--seconds must be positive" in capsys.readouterr().err
