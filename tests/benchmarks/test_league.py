"""The league's table: its rows are what was measured, and a run goes on where it was."""

from __future__ import annotations

import csv

import pytest

from benchmarks import league
from benchmarks.__main__ import main
from benchmarks.harness import Settings
from benchmarks.league import LeagueRow
from dng_math.distances import binomial_interval
from dng_models.league.entries import LEAGUE, MORE
from dng_models.league.experiments import EASY, HARD, experiment
from dng_models.league.measures import SAMPLERS, Case

CASE = Case("2D, overlap", "deterministic", 50)
WEIGHTED = "DNG, weighted"


def made_up(case: Case, n: int, *, few: bool) -> list[LeagueRow]:
    """A row of every rule, without a chain."""
    names = [e.name for e in (*LEAGUE, *MORE)]
    return [
        LeagueRow(
            *(case.experiment, name, case.sampler, case.steps, n, "g", 1.0),
            *(0.0, 0.0, 0.1, 0.01, 0.5, 0.1, None, i + 1.0, 0.0, 0.25, 0.0, 2, 0, "yes"),
        )
        for i, name in enumerate(names)
    ]


@pytest.fixture
def asked(monkeypatch):
    """The cases that are measured, in one process."""
    seen: list[Case] = []

    def rows_of(case: Case, n: int, *, few: bool) -> list[LeagueRow]:
        seen.append(case)
        return made_up(case, n, few=few)

    monkeypatch.setattr(league, "rows_of", rows_of)
    monkeypatch.setattr(league, "PROCESSES", 1)
    return seen


def lines_of(path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_row_is_what_was_measured():
    """Every rule that can run there, every second strength, and the two that are no rules."""
    n = 50
    rows = league.rows_of(CASE, n, few=True)
    expected = [("unguided", None), ("ideal", None)]
    expected += [(e.name, s) for e in (*LEAGUE, *MORE) if e.name != WEIGHTED for s in e.few]
    assert [(row.contender, row.strength) for row in rows] == expected
    for row in rows:
        count = round(row.leak * n)
        assert (row.leak_low, row.leak_high) == binomial_interval(count, n)
        assert (row.benchmark, row.sampler, row.steps, row.n) == (
            "2D, overlap",
            *(CASE.sampler, 50, n),
        )
        assert row.limit == experiment("2D, overlap").limit
        assert row.leak <= row.limit or not row.best
        assert (row.distance_error is None) == (row.strength is None)
        assert row.frechet is None and row.kl >= 0
        asks = row.contender.startswith("VL-DNP")  # and pays for what it sees
        assert 1 < row.evaluations < 1.5 if asks else row.evaluations in (1, 2, 4)
    for entry in (*LEAGUE, *MORE):
        own = [row for row in rows if row.contender == entry.name]
        safe = [row.distance for row in own if row.leak <= row.limit]
        assert [row.distance for row in own if row.best] == ([min(safe)] if safe else [])
        published = [entry.published] if entry.published is not None and own else []
        assert [row.strength for row in own if row.published] == published


def test_a_quick_run_has_every_experiment_and_says_where_it_is(asked, tmp_path, capsys):
    main(["league", "--quick", "--out", str(tmp_path)])
    names = [*EASY, *HARD]
    assert {(c.experiment, c.sampler) for c in asked} == {(n, s) for n in names for s in SAMPLERS}
    assert {case.steps for case in asked} == {50}
    lines = lines_of(tmp_path / "league_quick.csv")
    assert len(lines) == len(asked) * len((*LEAGUE, *MORE))
    said = capsys.readouterr().out
    assert f"| rule | {' | '.join(names)} |" in said
    assert f"| DNG, exact |{' 1 (0.25) |' * len(names)}" in said
    main(["league", "--read", str(tmp_path / "league_quick.csv"), "--out", str(tmp_path)])
    assert f"| DNG, exact |{' 1 (0.25) |' * len(names)}" in capsys.readouterr().out


def test_a_full_run_has_fewer_steps_too_and_a_thousand_in_one_dimension(asked, tmp_path):
    main(["league", "--part", "apart", "--out", str(tmp_path), "--quiet"])
    found = {(case.experiment, case.steps) for case in asked}
    thousand = {name for name, steps in found if steps == 1000}
    assert thousand == {name for name in EASY if name.startswith("1D")}
    assert {(name, steps) for name in EASY for steps in (50, 10)} < found


def test_a_run_goes_on_where_it_was(asked, tmp_path):
    """What was there stays, byte for byte, and is not measured again."""
    arguments = ["league", "--part", "shares", "--out", str(tmp_path), "--quiet"]
    main(arguments)
    path = tmp_path / "league_shares.csv"
    whole = lines_of(path)
    first = path.read_text(encoding="utf-8").splitlines(keepends=True)
    rules = len((*LEAGUE, *MORE))
    path.write_text("".join(first[: 1 + 3 * rules]), encoding="utf-8")
    todo, _ = asked[3:], asked.clear()
    main([*arguments, "--resume"])
    assert asked == todo
    assert [{**line, "date": ""} for line in lines_of(path)] == [
        {**line, "date": ""} for line in whole
    ]


def test_no_case_begins_after_the_deadline(asked):
    assert league.shares(Settings(deadline=0.0)) == [] and asked == []


def test_a_rule_that_leaks_at_every_strength_has_a_dash():
    rows = made_up(CASE, 10, few=True)
    dash = [LeagueRow(**{**vars(rows[0]), "best": ""}), *rows[1:]]
    assert "| DNG, exact | – |" in league.report(dash)


@pytest.mark.slow
def test_two_processes_measure_what_one_does(monkeypatch):
    """A function of case and seed alone, whoever computes it."""
    monkeypatch.setattr(league, "SAMPLES", {True: 20})
    monkeypatch.setattr(league, "available_threads", lambda: 2)
    names = ["1D, 50 % forbidden"]
    kept: list[LeagueRow] = []
    rows = league._measured(Settings(quick=True, keep=kept.extend), names)
    assert sorted(map(repr, kept)) == sorted(map(repr, rows))
    alone = [row for s in SAMPLERS for row in league.rows_of(Case(names[0], s, 50), 20, few=True)]
    assert rows == alone
