"""Names of others in figures, and tables on terminals that know ASCII only."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from dng_models.support.printable import drawable, plain, print_anything

ROOT = Path(__file__).resolve().parents[3]
# What Matplotlib would read as mathematics and abort at, and what it would draw as another name.
NAMES = (r"$\nothing$", "$x_$", "a$b$c", "$", "$$", "50% $", r"\$", r"a\$b$c$", "{$^$}", "x\udcff")


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_drawn_as_it_is(name):
    from matplotlib.figure import Figure

    figure = Figure()
    text = figure.text(0.5, 0.5, plain(name))
    text.get_window_extent()
    alone, is_math = text._preprocess_math(text.get_text())
    assert not is_math and alone == name.replace("\udcff", "?")
    # And beside mathematics of our own.
    text.set_text(f"{plain(name)}, $g=1$")
    text.get_window_extent()


@pytest.mark.parametrize(
    ("text", "drawn"),
    [
        ("NP, $g=1$\n2% forbidden", "NP, $g=1$\n2% forbidden"),
        ("a $x_$ b", r"a \$x_\$ b"),
        (r"class \$a, $g=2$", r"class \$a, $g=2$"),
        ("$g=1$\n$\\nothing$", "\\$g=1\\$\n\\$\\nothing\\$"),
        ("x\udcff", "x?"),
    ],
)
def test_mathematics_stays_where_it_is_some(text, drawn):
    assert drawable(text) == drawn


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_whatever_is_printed_arrives(monkeypatch, encoding):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    print_anything()
    print("Fréchet −1 × λ 猫 \udcff")
    stream.flush()
    told = stream.buffer.getvalue().decode(encoding)
    wanted = {
        "ascii": "Frechet -1 x lambda ? ?",
        "latin-1": "Fréchet -1 × lambda ? ?",
        "utf-8": r"Fréchet −1 × λ 猫 \udcff",
    }
    assert told == wanted[encoding] + "\n"


TABLE = """
import sys, types
from dng_models.support import command_line
from dng_models.class_removal import compare
metrics = {"num_images": 9, "safety": .1, "safety_low": 0., "safety_high": .2, "frechet": 1.}
row = {"config": {"rule": "np", "forget": ["\\xc4"], "guidance_scale": 1.0}, "metrics": metrics}
module = types.ModuleType("commands_of_the_test")
module.table_command = lambda given: print(compare.table([row]))
sys.modules[module.__name__] = module
parser, command = command_line.commands_of("program", "", "")
command("table", "", "").add_argument("--debug", action="store_true")
sys.exit(command_line.run("program", parser, module.__name__, ["table"]))
"""


def test_a_table_is_printed_where_the_locale_is_c():
    """With Python's UTF-8 mode off, which it otherwise turns on by itself."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONIOENCODING"}
    env |= {"LC_ALL": "C", "PYTHONUTF8": "0"}
    run = subprocess.run([sys.executable, "-c", TABLE], cwd=ROOT, env=env, capture_output=True)
    assert run.returncode == 0, run.stderr.decode()
    told = run.stdout.decode("ascii")
    assert "Frechet, features" in told and "| A | NP |" in told


@pytest.mark.parametrize("program", ["figures", "benchmarks"])
def test_the_other_command_lines_print_anything_too(monkeypatch, program):
    module = import_module(f"{program}.__main__")
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    if program == "figures":
        monkeypatch.setattr(next(iter(module.FIGURES.values())), "TITLE", "Fréchet")
    else:
        monkeypatch.setattr(module, "COMMANDS", {"nothing": "Fréchet"})
    monkeypatch.setattr(sys, "stdout", stream)
    module.main(["--list"])
    stream.flush()
    assert b"Frechet" in stream.buffer.getvalue()
