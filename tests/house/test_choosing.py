"""The numbers of docs/choosing.md are those that its commands print."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dng_models.text_to_image.laboratory import choices

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8")
# Of another CPU, where an image may decide otherwise: a few of 160 images, or 64 in the last table.
CLOSE = {"needed": 0.0011, "forms": 0.06, "priors": 0.06, "steps": 0.1}


def told(part: str) -> list[str]:
    """Lines of the table that the page says a command prints."""
    command = f"<!-- python -m dng_models.text_to_image choices --part {part} -->\n"
    assert PAGE.count(command) == 1
    return PAGE.partition(command)[2].partition("\n\n")[0].splitlines()


def split(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_exact_table_is_printed():
    assert told("needed") == choices.part("needed").splitlines()


@pytest.mark.parametrize(
    ("part", "settings"),
    [
        ("forms", choices.forms),
        ("priors", choices.prior_factors),
        ("steps", choices.step_settings),
    ],
)
def test_tables_have_a_row_for_every_setting(part, settings):
    rows = [split(line) for line in told(part)[2:]]
    names = [setting.names for setting in settings()]
    assert [tuple(row[: len(name)]) for row, name in zip(rows, names, strict=True)] == names
    numbers = [[float(cell) for cell in row[len(names[0]) :]] for row in rows]
    assert all(0.0 <= number <= 1.0 for row in numbers for number in row)


@pytest.mark.slow  # minutes; the other tables are of the same code, and take minutes more each
@pytest.mark.parametrize("part", ["forms"])
def test_the_tables_are_printed(part):
    printed = choices.part(part).splitlines()
    assert printed[:2] == told(part)[:2]
    for line, said in zip(printed[2:], told(part)[2:], strict=True):
        number = re.compile(r"\d\.\d{3}(?= \|)")
        assert number.sub("#", line) == number.sub("#", said)
        values = [[float(each) for each in number.findall(text)] for text in (line, said)]
        assert values[0] == pytest.approx(values[1], abs=CLOSE[part]), said
