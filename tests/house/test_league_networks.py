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
    lines = [line for line in compare.safety_table(rows, 0.01).splitlines() if "|" in line]
    assert len(lines) > 30
    assert [line for line in lines if line not in PAGE] == []


def test_numbers_of_the_text_are_of_the_rows(rows):
    """Every number with an interval outside of the table, and the shares that are left."""
    text = "\n".join(line for line in PAGE.splitlines() if not line.startswith("|"))
    told = re.findall(r"[\d.]+\s+\[[\d.]+, [\d.]+\]", text)
    published = compare.read_rows(RESULTS / "class_removal_published" / "sweep.jsonl")
    printed = compare.table(rows) + compare.table(published)
    assert len(told) >= 5
    assert [each for each in told if " ".join(each.split()) not in printed] == []
    assert "| 8 | SPELL | 3.3 | 1,024 | 1.17 " in printed
    assert "| 8 | SPELL | 3.8 | 1,024 | 0.00 " in printed


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


def test_the_images_and_their_kernels_are_as_the_page_says(train):
    images = [train.images[train.labels == digit] for digit in (0, 1, 8)]
    assert [len(each) for each in images] == [142, 145, 139] and "(142, 145 and 139)" in PAGE
    assert [f"{likeliest_bandwidth(each):.2f}" for each in images] == ["0.24", "0.24", "0.32"]
    assert "(0.24, 0.24\n  and 0.32, in values" in PAGE
