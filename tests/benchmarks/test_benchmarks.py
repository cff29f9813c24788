"""The benchmarks run, compare like with like, and say what they did not measure."""

from __future__ import annotations

import contextlib
import csv
import io
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from benchmarks import harness, mixture, rivals
from benchmarks.__main__ import COMMANDS, main
from benchmarks.harness import Contender, Goal, Row, Settings
from tests.helpers.statistical import FALSE_ALARM
from tests.helpers.tolerances import CHAIN, error

ROOT = Path(__file__).resolve().parents[2]
QUICK = Settings(repeats=1, quick=True)
COLUMNS = (
    *("benchmark", "contender", "n", "steps", "median_s", "q25", "q75", "memory_mib"),
    *("ratio_to_dng_math", "goal", "measured", "met", "note"),
    *("cpu", "cores", "os", "python", "dng_math", *harness.PACKAGES, "date"),
)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """What one small run of everything prints, and the lines of its CSV."""
    out, said = tmp_path_factory.mktemp("results"), io.StringIO()
    with contextlib.redirect_stdout(said):
        main(["mixture", "--quick", "--repeats", "1", "--out", str(out)])
    with (out / "mixture_quick.csv").open(newline="", encoding="utf-8") as file:
        return said.getvalue(), list(csv.DictReader(file))


def test_every_part_leaves_rows(quick):
    _, rows = quick
    found = {row["benchmark"] for row in rows}
    kinds = {f"{what} ({kind})" for what in ("log_prob", "score") for kind in ("full", "diagonal")}
    assert found == {"chain", "digits step", "memory", *kinds}
    for row in rows:
        assert tuple(row) == COLUMNS
        measured = row["median_s"] or row["memory_mib"]
        assert bool(measured) != row["note"].startswith("skipped: ")
        assert row["cpu"] and row["date"]
        if row["median_s"]:
            assert 0 < float(row["q25"]) <= float(row["median_s"]) <= float(row["q75"])
            assert float(row["ratio_to_dng_math"]) > 0


def test_the_contenders_of_the_chain_are_all_named(quick):
    said, rows = quick
    names = {row["contender"] for row in rows if row["benchmark"] == "chain"} - {
        "torch, one thread"
    }
    ours, numpys = {"dng_math", "dng_math, one thread"}, {"numpy", "numpy, in place"}
    expected = {*ours, *numpys, "numpy primitives", "torch", "jax"}
    assert names == expected
    assert all(name in said for name in names)


def test_small_sizes_do_not_judge_goals(quick):
    said, rows = quick
    assert {row["met"] for row in rows} == {"", "not judged"}
    assert "not judged: chain, numpy: dng_math at least 15x faster" in said


def test_a_recorded_chain_shows_in_the_memory(quick):
    _, rows = quick
    grown = [float(row["memory_mib"]) for row in rows if row["benchmark"] == "memory"]
    if sys.platform == "linux":
        assert grown[2] > max(grown[:2])


@pytest.mark.parametrize("missing", ["torch", "jax"])
def test_a_contender_that_is_not_installed_is_skipped_by_name(missing, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setitem(sys.modules, "jax", None)
    row = next(row for row in mixture.chain(QUICK) if row.contender == missing)
    assert row.note.startswith("skipped: ") and missing in row.note
    assert row.median_s is None and row.met == ""
    assert row.note in harness.table([row])


def test_without_scikit_learn_the_rest_runs(monkeypatch):
    for name in ("sklearn", "sklearn.mixture", "sklearn.datasets"):
        monkeypatch.setitem(sys.modules, name, None)
    rows = mixture.densities(QUICK)
    skipped = [row for row in rows if row.note.startswith("skipped")]
    assert {row.contender for row in skipped} == {"scikit-learn"} and len(rows) == 3 * len(skipped)
    assert [row.note[:7] for row in mixture.digits(QUICK)] == ["skipped"]


def test_every_number_that_the_page_says_of_speed_is_printed(tmp_path, capsys):
    section = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
    for command in COMMANDS:
        for path in sorted((ROOT / "benchmarks" / "results").glob(f"{command}*.csv")):
            main([command, "--read", str(path), "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    lines = {line.strip() for line in printed.splitlines()}
    tables = [line for line in section.splitlines() if line.startswith("|")]
    assert len(tables) > 5 and [line for line in tables if line not in lines] == []
    said = re.findall(r"[\d.]+x to [\d.]+x|\b[\d.]+ (?:s|ms|µs)\b", section.replace("\n", " "))
    assert [number for number in said if number not in printed] == []
    assert any("x to " in number for number in said)


# ---------------------------------------------------------------------- like with like


@pytest.mark.parametrize("library", ["numpy", "numpy, in place", "torch"])
def test_the_rival_chain_fed_the_same_noise_is_the_same_chain(library):
    xp = pytest.importorskip(library.partition(",")[0])
    job, n = rivals.four_modes(1000), 700
    same = mixture.same_noise(n, 5)

    def draw(step, out):
        z = np.empty(n)
        same(step, z)
        out[:] = xp.asarray(z)

    if library == "numpy":
        x, log_p = rivals.plain_chain(job, n, draw)
    else:
        x, log_p = rivals.eager_chain(xp, job, n, draw)
    ours = mixture.sample(
        job.mixture, job.schedule, job.rule, n=n, forbidden=[job.forbidden], seed=5
    )
    assert ours.log_posterior is not None
    assert error(x, ours.x[:, 0]) <= CHAIN
    assert error(log_p, ours.log_posterior[0]) <= CHAIN


@pytest.mark.parametrize("library", ["numpy", "numpy, in place", "torch", "jax"])
def test_the_rival_chain_with_its_own_noise_has_the_same_law(library):
    module = pytest.importorskip(library.partition(",")[0])
    job, n = rivals.four_modes(100), 20_000
    chains = {
        "numpy": lambda: rivals.numpy_chain(job, n, 0, in_place=False),
        "numpy, in place": lambda: rivals.numpy_chain(job, n, 0, in_place=True),
        "torch": lambda: rivals.torch_chain(module, job, n, 0),
        "jax": lambda: rivals.jax_chain(module, job, n)(0),
    }
    x, expected = chains[library](), mixture.fused_chain(job, n, 1)
    assert stats.ks_2samp(x, expected).pvalue > FALSE_ALARM
    mixture.check_modes(library, job, x, expected)
    with pytest.raises(RuntimeError, match="in the modes"):
        mixture.check_modes(library, job, np.abs(x), expected)


# ---------------------------------------------------------------------- the harness


def test_contenders_take_turns_after_their_warm_up():
    calls: list[str] = []
    contenders = [
        Contender("a", lambda: calls.append("a")),
        Contender("b", lambda: calls.append("b"), warm_up=lambda: calls.append("warm"), rounds=1),
    ]
    seconds = harness.interleaved(contenders, 2)
    assert calls == ["a", "warm", "a", "b", "a"]
    assert [len(values) for values in seconds.values()] == [2, 1]


def test_ratios_are_medians_over_rounds_and_goals_are_judged_by_them(monkeypatch):
    seconds = {"dng_math": [1.0, 2.0, 4.0], "slow": [3.0, 8.0, 8.0], "once": [7.0]}
    monkeypatch.setattr(harness, "interleaved", lambda contenders, repeats, deadline: seconds)
    goals = {
        "dng_math": Goal("at most 3 s", most_seconds=3.0),
        "slow": Goal("3x", least_ratio=3.0),
        "once": Goal("at most 0.1x the time", least_ratio=10.0),
    }
    contenders = [Contender(name, harness.nothing, goal=goals[name]) for name in seconds]
    rows = harness.compare("b", contenders, Settings(3), n=1, per=2)
    assert [row.ratio_to_dng_math for row in rows] == [1.0, 3.0, 7.0]
    assert [row.median_s for row in rows] == [1.0, 4.0, 3.5]
    assert [row.met for row in rows] == ["reached", "reached", "missed"]


def test_a_bound_below_one_is_said_as_the_time_it_takes():
    assert Goal("", least_ratio=0.5).measured(0.25, 1.0) == "4x the time"
    assert Goal("", least_ratio=3.0).measured(2.5, 1.0) == "2.5x faster"
    assert Goal("", most_seconds=3.0).measured(2.5, 1.25) == "1.25 s"


@pytest.mark.parametrize("wrong", [1.1, np.nan, np.inf])
def test_a_wrong_result_is_not_timed(wrong):
    harness.check_close("it", [1.0, 1e6], [1.0, 1e6 + 1.0], 1e-5)
    with pytest.raises(RuntimeError, match="it is off by"):
        harness.check_close("it", [1.0, wrong], [1.0, 1.0], 1e-5)


def test_a_full_run_writes_what_a_quick_one_leaves_alone(tmp_path, monkeypatch, capsys):
    row = Row("b", "dng_math", 1, goal="g", measured="m", met="missed")
    monkeypatch.setattr(mixture, "PARTS", {"part": lambda settings: [row]})
    for arguments in (["--quick"], []):
        main(["mixture", "--out", str(tmp_path), *arguments])
    assert {path.name for path in tmp_path.iterdir()} == {"mixture.csv", "mixture_quick.csv"}
    assert "missed: b, dng_math: g; m" in capsys.readouterr().out


def test_the_committed_results_are_written_only_where_they_are_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mixture, "PARTS", {"part": lambda settings: [Row("b", "dng_math", 1)]})
    main(["mixture"])
    assert list(Path("benchmarks/results").iterdir()) == []
    assert [path.name for path in Path("benchmarks/out").iterdir()] == ["mixture.csv"]
    assert "written to benchmarks/out/mixture.csv" in capsys.readouterr().out
    main(["mixture", "--out", "benchmarks/results"])
    assert [path.name for path in Path("benchmarks/results").iterdir()] == ["mixture.csv"]


def test_a_folder_that_cannot_be_written_to_is_known_before_anything_is_measured(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(mixture, "PARTS", {"part": None})
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as exit_:
        main(["mixture", "--out", str(tmp_path / "file")])
    assert exit_.value.code == 2
    said = capsys.readouterr().err
    assert f"--out {tmp_path / 'file'} cannot be written to: it is a file" in said


@pytest.mark.parametrize("name", ["mixture.csv", "mixture.png"])
def test_a_folder_in_the_place_of_a_result_is_known_before_anything_is_measured(
    name, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(mixture, "PARTS", {"part": None})
    (tmp_path / name).mkdir()
    with pytest.raises(SystemExit) as exit_:
        main(["mixture", "--out", str(tmp_path)])
    assert exit_.value.code == 2
    assert f"cannot be written to: {name} in it is a folder" in capsys.readouterr().err


def test_what_was_written_is_read_as_it_was(tmp_path):
    rows = [
        Row("b", "dng_math", 1, 2, 0.5, 0.25, 0.75, note="a, note"),
        Row("b", "other", 1, memory_mib=3.0),
    ]
    harness.write_csv(tmp_path / "b.csv", rows, {"cpu": "a CPU", "date": "today"})
    assert harness.read_csv(tmp_path / "b.csv", Row) == (rows, {"cpu": "a CPU", "date": "today"})


@pytest.mark.parametrize("command", COMMANDS)
def test_committed_results_can_be_told_again(command, tmp_path, capsys):
    """What docs/speed.md says of them is printed by this."""
    path = ROOT / "benchmarks" / "results" / f"{command}.csv"
    if not path.exists():
        pytest.skip(f"no results of {command} are committed")
    main([command, "--read", str(path), "--out", str(tmp_path)])
    assert "cpu: " in capsys.readouterr().out


@pytest.mark.parametrize("quiet", [False, True])
def test_what_is_timed_is_named_unless_it_is_to_be_quiet(quiet, tmp_path, monkeypatch, capsys):
    def part(settings):
        contenders = [Contender("dng_math", harness.nothing), Contender("other", harness.nothing)]
        return harness.compare("b", contenders, settings, n=1)

    monkeypatch.setattr(mixture, "PARTS", {"part": part})
    monkeypatch.setattr("dng_models.support.progress.FIRST_LINE", 0.0)
    main(["mixture", "--quick", "--repeats", "2", "--out", str(tmp_path), *["--quiet"] * quiet])
    lines = capsys.readouterr().err.splitlines()
    assert lines == [] if quiet else lines[0].startswith("dng_math, warm-up: 1/6 runs, ")


def test_a_missing_package_is_named_with_the_cure(monkeypatch, capsys):
    for name in ("step", "contenders", "device", "published", "step_report"):
        monkeypatch.delitem(sys.modules, f"benchmarks.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(SystemExit):
        main(["step"])
    said = capsys.readouterr().err
    assert "needs torch" in said and "pip install 'dng-toolkit[models]'" in said


def test_the_threads_of_torch_are_those_of_before():
    import torch

    before = torch.get_num_threads()
    job = rivals.four_modes(10)
    contenders = mixture._torch(job, 1000, mixture.fused_chain(job, 1000, 1))
    for contender in contenders:
        contender.run()
        assert torch.get_num_threads() == before


def test_make_benchmark_runs_every_command():
    line = next(
        line
        for line in (ROOT / "Makefile").read_text(encoding="utf-8").splitlines()
        if line.startswith("BENCHMARKS")
    )
    assert line.partition("=")[2].split() == list(COMMANDS)


def test_the_list_names_commands_and_parts(capsys):
    main(["--list"])
    said = capsys.readouterr().out
    assert all(f"{name}: " in said for name in ("mixture", *mixture.PARTS))


@pytest.mark.parametrize("arguments", [[], ["mixture", "--repeats", "0"], ["mixtures"]])
def test_wrong_arguments_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert "error: " in capsys.readouterr().err


def test_a_disk_that_is_full_afterwards_is_one_line_and_no_half_table(
    tmp_path, monkeypatch, capsys
):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mixture, "PARTS", {"part": lambda settings: [Row("b", "dng_math", 1)]})
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(SystemExit, match=r"error: .*mixture.csv was not written: No space left"):
        main(["mixture", "--out", str(tmp_path)])
    assert "dng_math" in capsys.readouterr().out  # what was measured is said
    assert list(tmp_path.iterdir()) == []
