"""What is drawn can be read: ticks of logarithmic axes, letters of panels; settings are left."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure

from dng_models.support import style

ROOT = Path(__file__).resolve().parents[3]


def labelled(axis) -> list[tuple[float, object]]:
    """The labelled ticks of an axis inside its limits, and their texts."""
    low, high = sorted(axis.get_view_interval())
    return [
        (tick.get_loc(), tick.label1)
        for tick in axis.get_major_ticks()
        if tick.label1.get_text() and low <= tick.get_loc() <= high
    ]


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize(
    ("limits", "first", "last"),
    [
        ((1e-3, 1e3), "0.001", "1000"),
        ((0.006, 0.3), "0.01", "0.3"),
        ((4.0, 9.0), "4", "9"),
        ((1.01, 1.04), "1.01", "1.04"),
        ((1e-9, 1e9), "$10^{-9}$", "$10^{9}$"),
        ((2e-7, 1e-6), "$2\\times10^{-7}$", "$10^{-6}$"),
    ],
)
def test_a_logarithmic_axis_has_readable_ticks_whatever_its_range(limits, first, last, flipped):
    figure = Figure(figsize=(2.5, 2.0))
    axes = figure.add_subplot()
    axes.set_xscale("log")
    style.log_ticks(axes.xaxis)
    axes.set_xlim(*(limits[::-1] if flipped else limits))
    axes.set_yticks([])
    figure.draw_without_rendering()
    ticks = labelled(axes.xaxis)
    texts = [text.get_text() for _, text in sorted(ticks, key=lambda tick: tick[0])]
    assert style.FEWEST <= len(texts) <= style.MOST
    assert texts[0] == first and texts[-1] == last
    if "$" not in first:
        np.testing.assert_allclose([float(t) for t in texts], sorted(v for v, _ in ticks))


@pytest.mark.parametrize("middle", [0.003, 0.13, 4.7, 58.0, 910.0])
@pytest.mark.parametrize("span", [1.05, 1.6, 3.0, 9.0, 25.0, 1e3, 1e7])
def test_a_logarithmic_axis_has_three_to_seven_labels_between_any_limits(middle, span):
    low, high = middle / span**0.5, middle * span**0.5
    ticks = style.ticks_between(low, high)
    assert style.FEWEST <= len(ticks) <= style.MOST
    assert len({style._written(tick) for tick in ticks}) == len(ticks)


def test_a_logarithmic_axis_has_labels_whatever_it_spans():
    rng = np.random.default_rng(0)
    for low, span in zip(
        10 ** rng.uniform(-12, 3, 500), 10 ** rng.uniform(-3, 8, 500), strict=True
    ):
        high = low * (1.0 + span)
        ticks = style.ticks_between(low, high)
        assert 3 <= len(ticks) <= 14 and ticks == sorted(set(ticks))
        assert low * (1 - 1e-8) <= ticks[0] and ticks[-1] <= high * (1 + 1e-8)
        assert not low <= 1.0 <= high or min(abs(tick - 1.0) for tick in ticks) < 1e-9


def test_panels_have_letters_beyond_z():
    assert [style.letter(place) for place in (0, 25, 26, 51, 52, 27 * 26)] == [
        *("a", "z", "aa", "az", "ba", "aaa"),
    ]


def test_a_style_is_left_behind_by_what_drew():
    before = dict(matplotlib.rcParams)
    assert style.applied(lambda: matplotlib.rcParams["font.size"])() == style.RC["font.size"]
    assert dict(matplotlib.rcParams) == before


def test_colours_are_named_without_matplotlib():
    code = "import sys; sys.modules['matplotlib'] = None\n"
    code += "from dng_models.support import style; print(style.BLUE)\n"
    code += "style.applied(print)()"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout == style.BLUE + "\n" and run.returncode == 1
    assert "ImportError: drawing needs Matplotlib: pip install 'dng-toolkit[figures]'" in run.stderr
