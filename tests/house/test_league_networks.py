"""What docs/league.md says of trained networks is what commands print from the repository."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dng_models.class_removal import compare
from dng_models.class_removal.config import Config
from dng_models.class_removal.data import load_dataset
from dng_models.class_removal.kernel_width import likeliest_bandwidth
from dng_models.class_removal.materials import digest_of, files_digest
from dng_models.class_removal.run_folder import SHIPPED

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
LEAGUE = RESULTS / "class_removal_league"
SECTION = "\n## On trained networks\n"
PAGE = (ROOT / "docs" / "league.md").read_text(encoding="utf-8").partition(SECTION)[2]


@pytest.fixture(scope="module")
def rows():
    return compare.read_tables([RESULTS / "class_removal_digits", LEAGUE], "sweep.jsonl")


@pytest.fixture(scope="module")
def train():
    return load_dataset("digits").train


@pytest.fixture(scope="module")
def new():
    return compare.read_rows(LEAGUE / "sweep.jsonl")


def test_the_table_is_that_of_the_rows(rows):
    lines = compare.safety_table(rows, 0.01).splitlines()
    of_zeros = [line for line in lines if line.startswith(("| forgotten", "| 0 "))]
    assert len(of_zeros) > 10
    assert [line for line in of_zeros if line not in PAGE] == []


def test_numbers_of_the_text_are_of_the_rows(rows):
    """Every number with an interval outside of the table, and the shares that are left."""
    text = "\n".join(line for line in PAGE.splitlines() if not line.startswith("|"))
    told = re.findall(r"[\d.]+ \[[\d.]+, [\d.]+\]", text.replace("\n", " "))
    published = compare.read_rows(RESULTS / "class_removal_published" / "sweep.jsonl")
    printed = compare.table(rows) + compare.table(published)
    assert len(told) >= 7 and [each for each in told if each not in printed] == []
    for line in ("| SPELL | 3 | 1,024 | 0.59 ", "| SPELL | 2.5 | 1,024 | 3.42 "):
        assert line in printed
    assert "| SPELL | 2 | 1,024 | 8.01 " in printed
    assert "| DNG, calibrated | 3.1 | 1,024 | 0.59 " in printed


def test_the_rows_are_of_what_ships(new, train):
    for row in [*new, *compare.read_rows(RESULTS / "class_removal_published" / "sweep.jsonl")]:
        config = Config.from_json(row["config"])
        assert config.key == row["key"]
        assert (config.seed, config.num_images, config.steps) == (0, 1024, 100)
        sources = row["sources"]
        assert sources["classifier"] == files_digest(SHIPPED / "digits" / "classifier")
        if config.reads_images:
            (name,) = config.forget
            images = train.images[train.labels == int(name)]
            assert sources["images-0"] == digest_of({"images": images})


def test_the_kernels_are_as_wide_as_the_page_says(train):
    zeros = train.images[train.labels == 0]
    assert len(zeros) == 142 and f"{likeliest_bandwidth(zeros):.2f}" == "0.24"
    assert "142 zeros" in PAGE and "(0.24, " in PAGE
