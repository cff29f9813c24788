"""What the documents say of trained networks is what commands print from the repository."""

from __future__ import annotations

from pathlib import Path

import pytest

from dng_models.class_removal import compare
from dng_models.class_removal.__main__ import main
from dng_models.class_removal.config import Config
from dng_models.class_removal.materials import files_digest
from dng_models.class_removal.methods import TUNED, settings
from dng_models.class_removal.run_folder import SHIPPED
from dng_models.support import style

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
DATA = RESULTS / "class_removal_digits"
TRAINED = "\n## Class removal with trained networks\n"
PAGE = (ROOT / "docs" / "results.md").read_text(encoding="utf-8").partition(TRAINED)[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def rows():
    return compare.read_rows(DATA / "sweep.jsonl")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """What the command of the page leaves in its folder."""
    out = tmp_path_factory.mktemp("drawn")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(style, "DPI", 40)  # fewer pixels are sooner written
        arguments = ["plot", "--data", str(DATA), "--shipped", "--safety", "0.01"]
        assert main([*arguments, "--out", str(out)]) == 0
    return out


def tables(text: str) -> list[str]:
    """Lines of tables."""
    return [line for line in text.splitlines() if line.startswith("|")]


@pytest.mark.slow
def test_the_figures_are_drawn_from_the_rows_in_the_repository(drawn):
    names = {path.name for path in (drawn / "figures").iterdir()}
    assert {"curves.png", "reliability_0_paper.png"} <= names
    assert {f"histogram_{digit}.png" for digit in (0, 1, 8)} <= names
    assert not (DATA / "figures").exists()


@pytest.mark.slow
def test_every_table_of_the_page_is_printed(rows, drawn, capsys):
    for networks in ("pair", "conditional"):
        arguments = ["calibrate", "--shipped", "--report", "--forget", "0", "1", "8"]
        assert main([*arguments, "--networks", networks, "--device", "cpu"]) == 0
    printed = {*tables(capsys.readouterr().out), *tables((drawn / "table.md").read_text("utf-8"))}
    told = tables(PAGE)
    assert len(told) > 50
    assert [line for line in told if line not in printed] == []
    at_one_percent = compare.comparison(rows, 0.01)
    assert [line for line in tables(at_one_percent) if line not in PAGE] == []


def test_the_readme_has_lines_of_the_lead(rows):
    lines = tables(compare.lead_table(rows, 0.01))
    calibrated = [line for line in lines if "| DNG, calibrated |" in line]
    assert len(calibrated) == 3
    assert [line for line in [lines[0], *calibrated] if line not in README] == []


@pytest.mark.slow
def test_the_csv_has_the_same_rows(drawn):
    written = (drawn / "table.csv").read_text(encoding="utf-8")
    assert written == (RESULTS / "class_removal_digits.csv").read_text(encoding="utf-8")


def test_the_rows_are_those_of_the_networks_and_settings_that_ship(rows):
    """Of every method that a tuning compares and every digit, with seeds that differ."""
    chosen_from = compare.read_rows(DATA / "tuning.jsonl")
    methods = [settings(Config(), [method], [1.0])[0] for method in TUNED]
    for digit in ("0", "1", "8"):
        found = [row["config"] for row in rows if row["config"]["forget"] == [digit]]
        for method in methods:
            names = ("rule", "tracker", "hyperparameters") if method.rule == "dng" else ("rule",)
            assert any(all(c[n] == getattr(method, n) for n in names) for c in found)
    for table, seed, images in ((rows, 0, 1024), (chosen_from, 1, 256)):
        for row in table:
            config = Config.from_json(row["config"])
            assert config.key == row["key"]
            assert (config.seed, config.num_images, config.steps) == (seed, images, 100)
            if "calibration" in row["sources"]:
                fitted = SHIPPED / "digits" / "calibration" / f"{config.forget[0]}.json"
                assert row["sources"]["calibration"] == files_digest(fitted)
            classifier = SHIPPED / "digits" / "classifier"
            assert row["sources"]["classifier"] == files_digest(classifier)
