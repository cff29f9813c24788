"""What docs/choosing.md and docs/oracle.md say of the laboratory is what their commands print."""

from __future__ import annotations

from pathlib import Path

import pytest

from dng_models.text_to_image.laboratory import choices, oracle
from dng_models.text_to_image.laboratory.oracle import OracleLaboratory

DOCS = Path(__file__).resolve().parents[3] / "docs"
PROGRAM = "python -m dng_models.text_to_image"


def told(page: str, command: str) -> list[list[str]]:
    """Cells of the table that a page says a command prints."""
    text = (DOCS / page).read_text(encoding="utf-8")
    comment = f"<!-- {PROGRAM} {command} -->\n"
    assert text.count(comment) == 1
    return cells(text.partition(comment)[2].partition("\n\n")[0])


def cells(table: str) -> list[list[str]]:
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def assert_same(printed: str, page: list[list[str]], images: int) -> None:
    """Equal settings, and measurements that differ by what a few images are.

    On another CPU a product's last bit decides a few images otherwise.
    """
    now = cells(printed)
    last = [i for i, name in enumerate(page[0]) if name in ("step", "steps", "time", "scale")][-1]
    settings = last + 1
    assert now[:2] == page[:2]
    for row, said in zip(now[2:], page[2:], strict=True):
        assert row[:settings] == said[:settings]
        for cell, before in zip(row[settings:], said[settings:], strict=True):
            # Shares have three decimals, numbers of evaluations out of 50 one.
            largest = 50 if len(before.partition(".")[2]) == 1 else 1
            assert float(cell) == pytest.approx(float(before), abs=3.5 * largest / images), said


def test_the_page_on_choices_has_the_priors_that_are_needed():
    assert cells(choices.part("needed")) == told("choosing.md", "choices --part needed")


@pytest.mark.slow  # up to a minute each
@pytest.mark.parametrize(("name", "images"), [("forms", 160), ("priors", 160), ("steps", 64)])
def test_the_tables_of_choices_are_printed(name, images):
    assert_same(choices.part(name), told("choosing.md", f"choices --part {name}"), images)


@pytest.mark.slow  # up to a minute each
@pytest.mark.parametrize("name", oracle.PARTS)
def test_the_tables_of_the_oracle_are_printed(name):
    assert_same(oracle.part(name), told("oracle.md", f"oracle --part {name}"), 160)


def test_the_page_on_the_oracle_has_a_row_for_every_setting():
    rows = told("oracle.md", "oracle --part rules")[2:]
    names = [setting.names for setting in oracle.compared(OracleLaboratory(1))]
    assert [tuple(row[:3]) for row in rows] == names
    steps = [row[0] for row in told("oracle.md", "oracle --part gate")[2:]]
    assert steps == ["0", *map(str, oracle.ASKED_AT), "49"]
