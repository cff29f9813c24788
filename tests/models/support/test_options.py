"""Options that are declared once: their checks, their docstring and their command line."""

from __future__ import annotations

import argparse
import inspect
import json
import math
from dataclasses import asdict, fields
from typing import Any, Literal

import pytest

from dng_models.class_removal.config import Config as ClassRemoval
from dng_models.class_removal.training_config import TrainConfig
from dng_models.support import options
from dng_models.support.options import between, integer, option, settings
from dng_models.text_to_image.config import Config as TextToImage


def words(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str) or not all(isinstance(each, str) for each in value):
        raise TypeError(f"{name} must be words, got {value!r}")
    return tuple(value)


@settings
class Tea:
    """One pot of tea."""

    kind: str = option("green", "kind of the leaves")
    vendor: str | None = option(None, "who sold them", metavar="SHOP", shown="unknown")
    minutes: int = option(3, "minutes in the water", check=integer(0, 10))
    cups: int = option(0, "cups that are filled", check=integer(0))
    heat: float = option(0.8, "share of boiling", check=between(0.0, 1.0, "(]"))
    weight: float | None = option(None, "grams of leaves")
    pot: Literal["clay", "glass"] = option("clay", "material of the pot")
    lid: Literal["clay", "wood"] | None = option(None, "material of the lid")
    milk: bool = option(False, "add milk")
    guests: tuple[str, ...] = option(("Ann", "Bo"), "who drinks", check=words, metavar="GUEST")
    notes: tuple[str, ...] | None = option(None, "what was said", check=words)

    def __post_init__(self) -> None:
        options.check(self)


def parser(*names: str, **changes: Any) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="tea")
    options.add(made, Tea, *(names or [field.name for field in fields(Tea)]), **changes)
    return made


# ---------------------------------------------------------------------- checks


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("kind", 3, "kind must be a text, got 3"),
        ("kind", None, "kind must be a text, got None"),
        ("vendor", 3, "vendor must be a text, got 3"),
        ("minutes", 11, "minutes must be an integer from 0 to 10, got 11"),
        ("minutes", 1.0, "minutes must be an integer from 0 to 10, got 1.0"),
        ("minutes", None, "minutes must be an integer from 0 to 10, got None"),
        ("cups", -1, "cups must be an integer >= 0, got -1"),
        ("heat", 0.0, r"heat must be in \(0, 1\], got 0.0"),
        ("heat", "1", r"heat must be a real number \(in \(0, 1\]\), got '1'"),
        ("weight", math.nan, "weight must be finite, got nan"),
        ("pot", "iron", "pot must be one of 'clay', 'glass'; got 'iron'"),
        ("pot", None, "pot must be one of 'clay', 'glass'; got None"),
        ("lid", "glass", "lid must be one of 'clay', 'wood'; got 'glass'"),
        ("milk", 1, "milk must be True or False, got 1"),
        ("guests", "Ann", "guests must be words, got 'Ann'"),
        ("notes", (3,), r"notes must be words, got \(3,\)"),
    ],
)
def test_a_bad_value_is_refused_by_name(field, value, message):
    with pytest.raises((ValueError, TypeError), match=message):
        Tea(**{field: value})


def test_none_is_a_value_of_an_optional_field():
    assert Tea(vendor=None, weight=None, lid=None, notes=None) == Tea()


def test_equal_values_are_equal_json():
    one, other = Tea(heat=1, weight=2, guests=["Ann"]), Tea(heat=1.0, weight=2.0, guests=("Ann",))
    assert one == other and json.dumps(asdict(one)) == json.dumps(asdict(other))
    assert Tea.minutes == Tea().minutes == 3


# ---------------------------------------------------------------------- the command line


def test_what_is_not_given_is_not_there():
    assert vars(parser().parse_args([])) == {}


def test_arguments_have_the_types_of_the_fields():
    line = "--kind black --vendor Lu --minutes 4 --heat 0.5 --pot glass --lid wood --milk --guests"
    given = vars(parser().parse_args([*line.split(), "Cy", "Di"]))
    assert given == {
        **{"kind": "black", "vendor": "Lu", "minutes": 4, "heat": 0.5, "pot": "glass"},
        **{"lid": "wood", "milk": True, "guests": ["Cy", "Di"]},
    }
    assert Tea(**given).guests == ("Cy", "Di")


@pytest.mark.parametrize("line", ["--pot iron", "--minutes 1.5", "--heat hot", "--milk yes"])
def test_an_argument_of_another_type_is_refused(line, capsys):
    with pytest.raises(SystemExit):
        parser().parse_args(line.split())
    assert "error: " in capsys.readouterr().err


def test_help_shows_meaning_placeholder_and_default():
    told = " ".join(parser().format_help().split())
    for part in (
        "--kind NAME kind of the leaves (default: green) ",
        "--vendor SHOP who sold them (default: unknown) ",
        "--minutes N minutes in the water (default: 3) ",
        "--cups N cups that are filled (default: 0) ",
        "--heat X share of boiling (default: 0.8) ",
        "--weight X grams of leaves --pot",
        "--pot {clay,glass} material of the pot (default: clay) ",
        "--lid {clay,wood} material of the lid --milk add milk --guests",
        "--guests GUEST [GUEST ...] who drinks (default: Ann Bo) ",
    ):
        assert part in told


def test_a_command_may_say_it_otherwise():
    minutes = parser("minutes", flag="--time", help="how long", shown="long").format_help()
    assert "--time N    how long (default: long)" in minutes
    assert "(default" not in parser("minutes", shown="").format_help()
    given = parser("minutes", dest="tea_minutes", default=None, choices=(1, 2)).parse_args([])
    assert vars(given) == {"tea_minutes": None}


def test_an_interval_is_a_pair():
    made = argparse.ArgumentParser()
    options.add_interval(made, "--when")
    assert made.parse_args(["--when", "0.1", "1"]).interval == [0.1, 1.0]


@pytest.mark.parametrize("device", [True, False])
def test_options_of_a_run(device):
    made = argparse.ArgumentParser()
    options.run_group(made, "runs/tea", device=device)
    given = vars(made.parse_args([]))
    assert given == {"out": None} | ({"device": None} if device else {})
    assert "folder of the run (default: runs/tea)" in made.format_help()


# ---------------------------------------------------------------------- the docstring


def test_the_docstring_describes_the_options():
    told = inspect.getdoc(Tea)
    assert told.startswith("One pot of tea.\n\nParameters\n----------\nkind : str\n    Kind of")
    for part in (
        "vendor : str, optional\n    Who sold them (default: unknown).\n",
        'pot : {"clay", "glass"}\n    Material of the pot (default: clay).\n',
        "guests : tuple of str\n    Who drinks (default: Ann Bo).\n",
    ):
        assert part in told


@pytest.mark.parametrize("cls", [ClassRemoval, TextToImage, TrainConfig])
def test_every_field_of_an_experiment_is_described(cls):
    lines = inspect.getdoc(cls).splitlines()
    for field in fields(cls):
        (place,) = (i for i, line in enumerate(lines) if line.startswith(f"{field.name} : "))
        assert lines[place + 1].startswith("    ")
    # A type is one line, however many choices it has.
    assert all(len(line) <= 100 for line in lines if line.startswith("    "))
