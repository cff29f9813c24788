"""What docs/path.md says of trained digits is what commands print from the repository."""

from __future__ import annotations

from pathlib import Path

import pytest

from dng_models.class_removal import compare
from dng_models.class_removal.__main__ import main
from dng_models.class_removal.config import Config
from dng_models.class_removal.materials import files_digest
from dng_models.class_removal.run_folder import SHIPPED

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "path.md").read_text(encoding="utf-8")
CALIBRATIONS = SHIPPED / "digits" / "calibration"


RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture(scope="module")
def rows():
    return compare.read_rows(RESULTS / "class_removal_path" / "sweep.jsonl")


@pytest.fixture(scope="module")
def others():
    return compare.read_rows(RESULTS / "class_removal_path_1_and_8" / "sweep.jsonl")


def tables(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("|")]


def test_the_tables_are_those_of_the_rows(rows):
    at_equal_safety = [line for line in tables(compare.comparison(rows, 0.01)) if "[" in line]
    lines = [*tables(compare.table(rows)), *at_equal_safety]
    assert len(lines) > 20
    assert [line for line in lines if line not in PAGE] == []


def test_the_table_of_other_digits_is_that_of_their_rows(others):
    at_equal_safety = [line for line in tables(compare.safety_table(others, 0.01)) if "[" in line]
    assert len(at_equal_safety) == 8
    assert [line for line in at_equal_safety if line not in PAGE] == []
    printed = compare.table(others)
    for solver, share, kl in (("DDIM", "1.95", "0.0430"), ("DPM-Solver++ 2M", "2.54", "0.0501")):
        assert f"| 1 | DNG path, calibrated, {solver} | 2 | 512 | {share} " in printed
        assert f" {kl} [" in printed


def test_the_rows_are_of_the_networks_and_calibrations_that_ship(rows, others):
    for row in rows + others:
        config = Config.from_json(row["config"])
        assert config.key == row["key"]
        assert row["sources"]["classifier"] == files_digest(SHIPPED / "digits" / "classifier")
        if "calibration" in row["sources"]:
            suffix = "-path" if config.tracker == "path" else ""
            fitted = CALIBRATIONS / f"{config.forget[0]}{suffix}.json"
            assert row["sources"]["calibration"] == files_digest(fitted)


def test_the_calibrations_are_reported_as_the_page_has_them(capsys):
    arguments = ["calibrate", "--shipped", "--tracker", "path", "--report", "--device", "cpu"]
    assert main([*arguments, "--forget", "0", "1", "8"]) == 0
    printed = tables(capsys.readouterr().out)
    assert len(printed) == 5
    assert [line for line in printed if line not in PAGE] == []
