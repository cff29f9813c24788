"""Figures and tables of a sweep: that what they show is what the rows say."""

from __future__ import annotations

import csv
import functools
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.image import imread
from matplotlib.patches import Rectangle

from dng_models.class_removal import compare, plot, plot_pictures, plot_reliability
from dng_models.class_removal.compare import at_equal_safety, methods_of, read_rows, weakest_safe
from dng_models.support import style
from dng_models.support.files import save_tensors, write_json

N = 1000
SETTINGS = {
    "dataset": "digits",
    "networks": "pair",
    "tracker": "paper",
    "hyperparameters": "paper",
    "prior": None,
    "temperature": None,
    "contrast": 1.0,
    "steps": 100,
    "seed": 0,
    "num_images": N,
}


def make_row(
    rule="np", scale=1.0, safety=0.01, kl=0.1, *, forget=("0",), metrics=None, key="", **config
):
    """A row; its intervals are wide enough to be seen and not symmetric."""
    numbers = {"kl": kl, "kl_smoothed": 2.0 if kl is None else kl}
    for name, value in (("kl", numbers["kl_smoothed"]), ("frechet", 3.0), ("frechet_pixels", 0.5)):
        numbers.setdefault(name, value)
        numbers |= {f"{name}_low": 0.8 * value, f"{name}_high": 1.5 * value}
    histogram = np.full(10, (1.0 - safety) / 9.0)
    histogram[0] = safety
    return {
        "key": key,
        "config": {
            **SETTINGS,
            "rule": rule,
            "guidance_scale": scale,
            "forget": list(forget),
            **config,
        },
        "metrics": {
            "num_images": N,
            "safety": safety,
            "safety_low": 0.5 * safety,
            "safety_high": 2.0 * safety + 0.003,
            "histogram": histogram.tolist(),
            **numbers,
            **(metrics or {}),
        },
    }


def sweep(forget=("0",)):
    return [
        make_row("none", 0.0, 0.1, 0.11, forget=forget),
        make_row("np", 1.0, 0.0, None, forget=forget),
        make_row("np", 0.2, 0.04, 0.08, forget=forget),
        make_row("np", 0.5, 0.005, 0.24, forget=forget),
        make_row("dng", 1.0, 0.015, 0.03, forget=forget),
        make_row("dng", 4.0, 0.002, 0.06, forget=forget),
        make_row("dng", 1.0, 0.01, 0.02, forget=forget, hyperparameters="calibrated"),
        make_row("dng", 4.0, 0.001, 0.04, forget=forget, hyperparameters="calibrated"),
    ]


def write_rows(folder, rows):
    (folder / "sweep.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def texts_inside(figure):
    """No text ends outside of the figure."""
    FigureCanvasAgg(figure).draw()
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    return box.x0 >= 0.0 and box.y0 >= 0.0 and box.x1 <= width and box.y1 <= height


@functools.cache
def curves_of_sweep():
    return plot.curves(sweep())


def line_of(axes, name):
    (line,) = [line for line in axes.get_lines() if line.get_label() == name]
    return line


def marked(axes, mark):
    """Points of that mark, of every method, in the coordinates of the data."""
    lines = [line for line in axes.get_lines() if line.get_gid() == mark]
    return np.concatenate([line.get_xydata() for line in lines])


# A curve


def test_a_curve_joins_the_scales_in_order_at_their_places():
    figure = curves_of_sweep()
    kl, features, pixels = figure.axes
    np.testing.assert_allclose(
        line_of(kl, "NP").get_xydata(), [[4.0, 0.08], [0.5, 0.24], [0.05, 2.0]]
    )
    np.testing.assert_allclose(line_of(features, "NP").get_ydata(), 3.0)
    np.testing.assert_allclose(line_of(pixels, "NP").get_ydata(), 0.5)
    np.testing.assert_allclose(
        line_of(kl, "DNG, calibrated").get_xydata(), [[1.0, 0.02], [0.1, 0.04]]
    )
    np.testing.assert_allclose(line_of(kl, "unguided").get_xydata(), [[10.0, 0.11]])
    assert line_of(kl, "unguided").get_linestyle() == "None"
    assert texts_inside(figure)


def test_bars_are_the_intervals_of_the_row_in_both_directions():
    axes = plot.curves([make_row(safety=0.01, kl=0.1)]).axes[0]
    horizontal, vertical = (
        c.get_segments()[0] for c in axes.collections if isinstance(c, LineCollection)
    )
    np.testing.assert_allclose(horizontal, [[0.5, 0.1], [2.3, 0.1]])
    np.testing.assert_allclose(vertical, [[1.0, 0.08], [1.0, 0.15]])


def test_none_forbidden_is_a_hollow_point_at_half_an_image_and_its_tick_says_0():
    figure = curves_of_sweep()
    for axes in figure.axes:
        np.testing.assert_allclose(marked(axes, "none forbidden")[:, 0], [0.05])
        assert 0.05 in marked(axes, "hollow")[:, 0]
        ticks = dict(zip(axes.get_xticks(), axes.get_xticklabels(), strict=True))
        assert ticks[0.05].get_text() == "0"
        assert axes.get_xlim()[0] < 0.05
    assert "half an image" in " ".join(text.get_text() for text in figure.legends[0].get_texts())


def test_without_such_points_there_is_neither_mark_nor_tick_nor_legend():
    figure = plot.curves([make_row(safety=0.01), make_row(scale=2.0, safety=0.001)])
    assert marked(figure.axes[0], "none forbidden").size == 0
    assert "0" not in [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert "half" not in " ".join(text.get_text() for text in figure.legends[0].get_texts())


def test_an_infinite_divergence_is_drawn_smoothed_with_an_arrow_and_in_its_panel_only():
    figure = plot.curves([make_row(safety=0.01, kl=None), make_row(scale=2.0, safety=0.001)])
    kl, features, _ = figure.axes
    np.testing.assert_allclose(marked(kl, "infinite"), [[1.0, 2.0]])
    np.testing.assert_allclose(marked(kl, "hollow"), [[1.0, 2.0]])
    assert marked(features, "infinite").size == 0
    assert "infinite" in " ".join(text.get_text() for text in figure.legends[0].get_texts())


def test_what_was_not_measured_has_no_point_and_no_panel():
    missing = {"kl": None, "kl_smoothed": None}
    rows = [make_row(scale=g, metrics=missing if g == 2.0 else {}) for g in (1.0, 2.0, 3.0)]
    for row in rows:
        row["metrics"]["frechet_pixels"] = None
    kl, features = plot.curves(rows).axes
    assert len(line_of(kl, "NP").get_xdata()) == 2
    assert len(line_of(features, "NP").get_xdata()) == 3


def test_each_class_has_its_row_of_panels():
    other = [make_row("np", 1.0, 0.03, 0.7, forget=("8",))]
    figure = plot.curves([*sweep(), *other])
    assert len(figure.axes) == 6
    np.testing.assert_allclose(line_of(figure.axes[3], "NP").get_xydata(), [[3.0, 0.7]])
    assert "class 8 forgotten" in figure.axes[3].get_title(loc="left")
    assert texts_inside(figure)


def test_the_dashed_line_is_what_chance_leaves_of_the_ideal():
    """(9 - 1)/(2 n) for nine remembered classes."""
    axes = curves_of_sweep().axes[0]
    np.testing.assert_allclose(marked(axes, "chance")[:, 1], 8 / (2 * N))


def test_scales_are_named_at_ends_of_curves_beside_their_points():
    axes = plot.curves([make_row("np", g, s) for g, s in ((0.2, 0.1), (0.4, 0.01), (1.5, 0.001))])
    named = {text.get_text(): text.xy for text in axes.axes[0].texts}
    assert named.keys() == {"0.2", "1.5"}
    np.testing.assert_allclose(named["1.5"], (0.1, 0.1))


def test_many_methods_differ_in_colour_or_marker_and_fit():
    rows = [
        make_row(rule, 1.0, 0.01 + 0.001 * i, tracker=tracker, hyperparameters=kind, networks=net)
        for net in ("pair", "conditional")
        for i, (rule, tracker, kind) in enumerate(
            [
                *((rule, "paper", "paper") for rule in ("none", "np", "sld", "ccfg", "perp-neg")),
                *(("dng", t, k) for t in ("paper", "log-odds") for k in ("paper", "calibrated")),
                ("dng", "paper", "own"),
                ("unheard-of", "paper", "paper"),
            ]
        )
    ]
    looks = plot._looks(methods_of(rows))
    assert len(looks) == len(set(looks.values())) == len(rows)
    assert len({(look.color, look.marker) for look in looks.values()}) == len(rows)
    assert texts_inside(plot.curves(rows))


# Axes


def labelled(axis):
    """The ticks within the limits of an axis that have a label, as they are drawn."""
    low, high = sorted(axis.get_view_interval())
    return [
        tick
        for tick, text in zip(axis.get_majorticklocs(), axis.get_majorticklabels(), strict=True)
        if low <= tick <= high and text.get_text()
    ]


@pytest.mark.parametrize("ratio", [1.01, 4.0, 9.0, 500.0])
def test_every_axis_of_the_curves_can_be_read(ratio):
    """Values and shares, each over that ratio, from numbers that no tick is at."""
    numbers = [0.13, 0.13 * ratio]
    rows = [
        make_row(
            scale=g,
            safety=0.0031 * 1.2**g,
            metrics={
                name + end: value
                for name in compare.QUANTITIES
                for end, value in (("", v), ("_low", v), ("_high", v))
            },
        )
        for g, v in enumerate(numbers, 1)
    ]
    for row in rows:
        row["metrics"] |= {f"safety{end}": row["metrics"]["safety"] for end in ("_low", "_high")}
    figure = plot.curves(rows)
    FigureCanvasAgg(figure).draw()
    for axes in figure.axes:
        assert axes.get_yscale() == axes.get_xscale() == "log"
        assert len(labelled(axes.yaxis)) >= 3 and len(labelled(axes.xaxis)) >= 2


def test_every_other_logarithmic_axis_can_be_read():
    times, x, scale, _ = walk()
    scale = np.linspace(3.1, 390.0, scale.size).reshape(scale.shape)
    strong = plot_pictures.trajectories(times, x, scale)
    data = calibration()
    for name, low in (("before", 0.11), ("after", 0.004), ("prior", 0.2)):
        data[name] = {key: [low] * 6 for key in ("log_loss", "brier")}
    losses = plot_reliability.reliability(data)
    for figure, places in ((strong, (1, 3)), (losses, (1, 2))):
        FigureCanvasAgg(figure).draw()
        for place in places:
            axes = figure.axes[place]
            assert axes.get_yscale() == "log" and len(labelled(axes.yaxis)) >= 3


# Methods


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"rule": "np", "hyperparameters": "calibrated"}, "NP"),
        ({"rule": "dng"}, "DNG, paper settings"),
        ({"rule": "dng", "hyperparameters": "calibrated"}, "DNG, calibrated"),
        (
            {"rule": "dng", "hyperparameters": "calibrated", "tracker": "log-odds"},
            "DNG log-odds, calibrated",
        ),
        ({"rule": "dng", "hyperparameters": "own"}, "DNG, own settings"),
        (
            {"rule": "dng", "hyperparameters": "own", "prior": 0.25, "temperature": 0.5},
            "DNG, prior 0.25, temperature 0.5",
        ),
        ({"rule": "dng", "temperature": 0.5}, "DNG, paper settings, temperature 0.5"),
        ({"rule": "sld", "networks": "conditional"}, "SLD, conditional network"),
    ],
)
def test_a_method_is_called_what_it_is(config, name):
    assert [method.name for method in methods_of([make_row(**config)])] == [name]


def test_methods_with_one_name_say_what_they_differ_in():
    rows = [
        make_row("ccfg", contrast=c, seed=s, num_images=n) for c, s, n in ((1, 0, 9), (2, 1, 8))
    ]
    assert [m.name for m in methods_of(rows)] == ["CCFG, contrast 1", "CCFG, contrast 2"]


def test_what_differs_with_the_class_alone_makes_no_other_method():
    rows = [make_row(forget=(c,), base=f"without-{c}") for c in "01"]
    assert [method.name for method in methods_of(rows)] == ["NP"]


# Numbers


def exact(scale, safety, value, low=None, high=None, **more):
    """A row whose share is known exactly and whose distances are all alike."""
    ends = {"safety_low": safety, "safety_high": safety} | {
        name + end: number
        for name in compare.QUANTITIES
        for end, number in (
            ("", value),
            ("_low", value if low is None else low),
            ("_high", value if high is None else high),
        )
    }
    return make_row("np", scale, safety, metrics={**ends, **more})


def test_at_equal_safety_the_distance_is_linear_in_the_logarithm():
    """log(0.01/0.02) / log(0.005/0.02) = 1/2; the values' half intervals add in quadrature."""
    rows = [exact(1.0, 0.02, 0.1, 0.08, 0.14), exact(3.0, 0.005, 0.3, 0.2, 0.5)]
    (found,) = at_equal_safety(rows, 0.01)
    assert (found["forget"], found["method"], found["safety"]) == ("0", "NP", 0.01)
    assert found["guidance_scale"] == pytest.approx(2.0)
    for name in compare.QUANTITIES:
        assert found[name] == pytest.approx(0.2)
        assert found[f"{name}_low"] == pytest.approx(0.2 - 0.5 * np.hypot(0.02, 0.1))
        assert found[f"{name}_high"] == pytest.approx(0.2 + 0.5 * np.hypot(0.04, 0.2))


def test_the_interval_of_a_share_moves_the_distance_along_the_line():
    """Down to 0.01 the weight is 0; up to 0.04 it is log(1/4)/log(1/8) = 2/3."""
    shares = {"safety_low": 0.01, "safety_high": 0.04}
    (found,) = at_equal_safety([exact(1.0, 0.02, 0.1, **shares), exact(3.0, 0.005, 0.3)], 0.01)
    assert found["kl"] == pytest.approx(0.2)
    assert found["kl_low"] == pytest.approx(0.1)
    assert found["kl_high"] == pytest.approx(0.1 + 0.2 * 2 / 3)


def test_no_share_is_left_of_none():
    """Half of 256 images is 0.195%: a tick at 0.1% would stand left of the 0."""
    few = {"num_images": 256}
    rows = [
        make_row(scale=1.0, safety=0.02, metrics=few),
        make_row(scale=2.0, safety=0.0, metrics=few),
    ]
    axes = plot.curves(rows).axes[0]
    ticks = sorted(zip(axes.get_xticks(), axes.get_xticklabels(), strict=True))
    assert ticks[0][1].get_text() == "0" and axes.get_xlim()[0] < 0.1


def test_none_forbidden_counts_as_half_an_image():
    """At 0.0005 of 1000; its interval reaches 0, which is infinitely far: the other end counts."""
    rows = [
        exact(1.0, 0.008, 0.1),
        exact(2.0, 0.0, 0.5, safety_low=0.0, safety_high=0.0),
    ]
    (found,) = at_equal_safety(rows, 0.002)
    assert found["kl"] == pytest.approx(0.1 + 0.4 * np.log(4) / np.log(16))
    assert found["kl_low"] == pytest.approx(0.1)
    assert at_equal_safety(rows, 0.0004)[0]["kl"] is None


def test_a_share_that_is_not_reached_gives_none():
    rows = [exact(1.0, 0.02, 0.1), exact(3.0, 0.005, 0.3), make_row("none", 0.0, 0.1)]
    for safety in (0.03, 0.001):
        (found,) = at_equal_safety(rows, safety)
        assert found["method"] == "NP"
        assert {
            found[name] for name in ("guidance_scale", "kl", "kl_low", "frechet_pixels_high")
        } == {None}
    assert at_equal_safety(rows[:1], 0.02)[0]["kl"] is None


def test_a_distance_that_is_missing_at_one_end_is_none_and_the_others_are_there():
    rows = [exact(1.0, 0.02, 0.1), exact(3.0, 0.005, 0.3, frechet=None)]
    (found,) = at_equal_safety(rows, 0.01)
    assert found["frechet"] is None
    assert found["frechet_pixels"] == pytest.approx(0.2)


def test_of_several_crossings_the_weakest_is_taken():
    rows = [exact(g, s, g) for g, s in ((4.0, 0.002), (3.0, 0.02), (2.0, 0.005), (1.0, 0.02))]
    assert at_equal_safety(rows, 0.01)[0]["guidance_scale"] == pytest.approx(1.5)


def ends_of(**values):
    """Metrics with their intervals: name=(value, low, high)."""
    return {
        name + end: number
        for name, three in values.items()
        for end, number in zip(("", "_low", "_high"), three, strict=True)
    }


def at_one_percent(rule, *, forget=("0",), kl=(0.1, 0.1, 0.1), **config):
    """Two rows between which the share is one percent, and all distances are what is said."""
    distances = config.pop("distances")
    return [
        make_row(
            rule,
            g,
            s,
            forget=forget,
            metrics=ends_of(safety=(s, s, s), kl=kl, **distances),
            **config,
        )
        for g, s in ((1.0, 0.02), (2.0, 0.005))
    ]


def distances(features, pixels):
    return {"distances": {"frechet": features, "frechet_pixels": pixels}}


def test_the_lead_is_over_the_nearest_other_method_in_each_quantity_alone():
    """20/5 and 3/2; the errors of the logarithms add in quadrature."""
    rows = [
        *at_one_percent("np", **distances((20.0, 18.0, 24.0), (9.0, 8.0, 10.0))),
        *at_one_percent("sld", **distances((30.0, 29.0, 31.0), (3.0, 2.7, 3.3))),
        *at_one_percent("dng", **distances((5.0, 4.0, 6.0), (2.0, 1.9, 2.1))),
        *at_one_percent(
            "dng", hyperparameters="calibrated", **distances((40.0, 36.0, 44.0), (6.0, 5.9, 6.1))
        ),
    ]
    rows += [make_row("none", 0.0, 0.1)]
    own, calibrated = compare.leads(rows, 0.01)
    assert (own["forget"], own["method"]) == ("0", "DNG, paper settings")
    assert (own["frechet_over"], own["frechet_pixels_over"]) == ("NP", "SLD")
    # Both rows of a method have the same distance and interval: at 1% its errors shrink, since
    # they are independent, so the lead's are taken from what the table at equal safety says.
    by_name = {found["method"]: found for found in at_equal_safety(rows, 0.01)}
    best, dng = by_name["NP"], by_name["DNG, paper settings"]
    assert own["frechet"] == pytest.approx(4.0)
    down = np.hypot(np.log(20.0 / best["frechet_low"]), np.log(dng["frechet_high"] / 5.0))
    up = np.hypot(np.log(best["frechet_high"] / 20.0), np.log(5.0 / dng["frechet_low"]))
    assert own["frechet_low"] == pytest.approx(4.0 * np.exp(-down))
    assert own["frechet_high"] == pytest.approx(4.0 * np.exp(up))
    assert own["frechet_pixels"] == pytest.approx(1.5)
    assert calibrated["frechet"] == pytest.approx(0.5)  # farther, and said so
    assert calibrated["frechet_pixels"] == pytest.approx(0.5)
    text = compare.lead_table(rows, 0.01)
    assert "| 0 | DNG, paper settings | 1.00 [1.00, 1.00] over NP | 4.00 [" in text
    assert "0.500 [" in text and "over SLD" in text


def test_an_end_of_zero_is_infinitely_far():
    best, own = (
        {"frechet": value, "frechet_low": 0.0, "frechet_high": high}
        for value, high in ((8.0, 9.0), (2.0, 3.0))
    )
    assert compare._ratio(best, own, "frechet") == (4.0, 0.0, np.inf)


def test_there_is_no_lead_without_another_method_for_the_same_class():
    one = (1.0, 1.0, 1.0)
    own = at_one_percent("dng", **distances(one, one))
    elsewhere = at_one_percent("np", forget=("8",), **distances(one, one))
    assert compare.leads(elsewhere, 0.01) == [] and compare.lead_table(elsewhere, 0.01) == ""
    for rows in (own, [*elsewhere, *own]):
        (alone,) = compare.leads(rows, 0.01)
        assert {alone[f"frechet{end}"] for end in ("", "_low", "_high", "_over")} == {None}


def test_the_comparison_has_the_settings_that_were_chosen_and_the_lead():
    of = distances((4.0, 3.0, 5.0), (1.0, 0.9, 1.1))
    tuned = {"gate": "absolute", "threshold": 0.3, "slope": 100.0, "t_lo": 0.25, "t_hi": 1.0}
    rows = [*at_one_percent("sld", **tuned, **of), *at_one_percent("dng", **of)]
    text = compare.comparison(rows, 0.01)
    assert text.startswith("At 1% forbidden") and "| setting |" in text
    assert "| 0 | SLD | gate absolute, threshold 0.3, t/T 0.25 to 1 | 1.5 |" in text
    assert "How many times nearer DNG is" in text
    assert "How many times" not in compare.comparison(rows[:2], 0.01)
    assert "| setting |" not in compare.comparison(rows[2:], 0.01)


def test_the_table_of_a_tuning_marks_what_is_chosen():
    def of(features, pixels, **config):
        return at_one_percent("sld", **distances((features,) * 3, (pixels,) * 3), **config)

    rows = [
        *of(9.0, 1.0),
        *of(4.0, 2.0, gate="absolute", threshold=0.3),
        *of(20.0, 0.5, t_lo=0.25),
        make_row("sld", 1.0, 0.02, t_lo=0.4),
    ]
    lines = compare.tuning_table(rows, 0.01).splitlines()
    assert lines[2] == "| 0 | SLD | as it is | 1.5 | 9.00 | 1.00 |"
    assert lines[3] == (
        "| **0** | **SLD** | **gate absolute, threshold 0.3** | **1.5** | **4.00** | **2.00** |"
    )
    assert lines[5] == "| 0 | SLD | t/T 0.4 to 1 | not reached, or given up |  |  |"
    assert sum("**" in line for line in lines) == 1


def test_the_weakest_safe_scale_or_else_the_safest():
    rows = [make_row("np", g, s) for g, s in ((2.0, 0.001), (1.0, 0.004), (0.5, 0.03))]
    rows += [make_row("sld", g, s) for g, s in ((1.0, 0.04), (2.0, 0.02), (3.0, 0.03))]
    assert [row["config"]["guidance_scale"] for row in weakest_safe(rows, 0.005)] == [1.0, 2.0]


def test_the_table_has_a_line_for_every_row_and_says_what_is_infinite():
    lines = compare.table(sweep()).splitlines()
    assert len(lines) == 2 + len(sweep())
    assert len({line.count("|") for line in lines}) == 1
    assert "| 0 | unguided |  | 1,000 | 10.00 [5.00, 20.30] | 0.110 [0.0880, 0.165] |" in lines[2]
    assert "| NP | 1 | 1,000 | 0.00 [0.00, 0.30] | inf; 2.00 [1.60, 3.00] |" in lines[5]
    assert "precision" not in lines[0]


def test_the_table_of_equal_safety_says_what_is_not_reached():
    text = compare.safety_table(sweep(), 0.005)
    assert "| 0 | NP | 0.5 | 0.240 [" in text
    assert "not reached" in compare.safety_table(sweep(), 0.08)


# Files of rows


def test_rows_are_read_as_they_were_written(tmp_path):
    write_rows(tmp_path, sweep())
    assert read_rows(tmp_path / "sweep.jsonl") == sweep()


def test_an_unfinished_last_line_is_passed_over(tmp_path):
    path = tmp_path / "sweep.jsonl"
    path.write_text(json.dumps(make_row()) + "\n" + json.dumps(make_row())[:50])
    assert read_rows(path) == [make_row()]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'config': 1}", "sweep.jsonl, line 2, is not JSON .*remove it"),
        ("[1, 2]", "line 2, must be an object with the objects 'config' and 'metrics', got"),
        ('{"config": {}}', "line 2, must be an object"),
        (
            json.dumps({"config": {"rule": "np"}, "metrics": {}}),
            "line 2, must have 'forget' in its 'config', which has rule",
        ),
    ],
)
def test_a_damaged_line_is_named(tmp_path, line, message):
    path = tmp_path / "sweep.jsonl"
    path.write_text(f"{json.dumps(make_row())}\n{line}\n{json.dumps(make_row())}\n")
    with pytest.raises(ValueError, match=message):
        plot.draw_all(tmp_path)
    assert not (tmp_path / "figures").exists()


def test_no_rows_are_an_error(tmp_path):
    (tmp_path / "sweep.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="sweep.jsonl must hold at least one row"):
        read_rows(tmp_path / "sweep.jsonl")
    with pytest.raises(ValueError, match="rows must hold at least one row"):
        plot.curves([])
    with pytest.raises(ValueError, match=re.escape("rows[0] must have 'safety' in its 'metrics'")):
        plot.curves([make_row(metrics={"safety": None})])
    with pytest.raises(FileNotFoundError):
        plot.draw_all(tmp_path / "nowhere")


# Histograms


def test_a_histogram_has_the_shares_their_intervals_and_the_ideal():
    figure = plot.histogram(weakest_safe(sweep(), 0.005))
    assert len([axes for axes in figure.axes if axes.get_visible()]) == 4
    axes = figure.axes[0]
    bars = {round(p.get_x() + 0.35): p.get_height() for p in axes.patches[:-1]}
    np.testing.assert_allclose([bars[i] for i in range(10)], [10.0] * 10)
    ideal = axes.patches[-1].get_data()
    np.testing.assert_allclose(ideal.values, [0.0, *[100 / 9] * 9])
    (intervals,) = axes.collections
    low, high = np.array(intervals.get_segments())[3][:, 1]
    assert 8.0 < low < 8.3 and 12.0 < high < 12.1  # of 100 in 1000
    assert texts_inside(figure)


def test_the_forbidden_classes_are_coloured_by_name():
    names = [f"kind {i}" for i in range(10)]
    rows = [make_row("dng", forget=("kind 2", "kind 5"))]
    axes = plot.histogram(rows, names).axes[0]
    vermillion = [
        p
        for p in axes.patches
        if p.get_facecolor()[:3] == pytest.approx((0.835, 0.369, 0), abs=0.01)
    ]
    assert sorted(round(p.get_x() + 0.35) for p in vermillion) == [2, 5]
    np.testing.assert_allclose(axes.patches[-1].get_data().values[[2, 5]], 0.0)
    np.testing.assert_allclose(axes.patches[-1].get_data().values[[0, 9]], 12.5)


def test_a_forgotten_class_without_a_name_is_an_error():
    with pytest.raises(ValueError, match="classes must name the forgotten 'cat', got 0, 1"):
        plot.histogram([make_row(forget=("cat",))])
    with pytest.raises(ValueError, match="classes must have the 10 names"):
        plot.histogram([make_row()], ["a", "b"])
    with pytest.raises(ValueError, match="'histogram' in its 'metrics'"):
        plot.histogram([make_row(metrics={"histogram": None})])


# Images


def test_a_grid_has_a_row_a_method_and_frames_what_is_marked():
    rng = np.random.default_rng(0)
    images = {name: rng.uniform(-1.5, 1.5, (5, 1, 8, 8)) for name in ("unguided", "NP, $g=1$")}
    figure = plot_pictures.grid(images, {"unguided": [False, True, False, False, True]})
    (axes,) = figure.axes
    frames = [p for p in axes.patches if isinstance(p, Rectangle)]
    centres = [np.add(p.get_xy(), (p.get_width() / 2, p.get_height() / 2)) for p in frames]
    np.testing.assert_allclose(centres, [[1.5, 0.5], [4.5, 0.5]])
    sheet = np.asarray(axes.images[0].get_array())
    assert sheet.shape == (20, 50)
    np.testing.assert_allclose(sheet[11:19, 21:29], np.clip(images["NP, $g=1$"][2, 0], -1, 1))
    assert texts_inside(figure)


def test_a_grid_in_colour_keeps_its_channels():
    images = np.zeros((2, 3, 32, 32))
    images[1, 0] = 1.0
    sheet = np.asarray(plot_pictures.grid({"a": images}).axes[0].images[0].get_array())
    assert sheet.shape == (36, 72, 3)
    np.testing.assert_allclose(sheet[18, 54], [1.0, 0.5, 0.5])
    np.testing.assert_allclose(sheet[0, 0], 1.0)


def test_long_names_are_wrapped():
    name = "DNG log-odds, calibrated, conditional network, temperature 0.25, $g=2$\n0.5% forbidden"
    assert texts_inside(plot_pictures.grid({name: np.zeros((16, 1, 8, 8))}))


@pytest.mark.parametrize(
    ("images", "marks", "message"),
    [
        ({}, None, "images_by_method must hold at least one"),
        ({"a": np.zeros((2, 2, 8, 8))}, None, "1 or 3 channels, got 2"),
        ({"a": np.zeros((2, 1, 8, 8)), "b": np.zeros((3, 1, 8, 8))}, None, "'b'.*shape"),
        ({"a": np.zeros((2, 1, 8, 8))}, {"b": [True, True]}, "marks must be of a; got 'b'"),
        ({"a": np.zeros((2, 1, 8, 8))}, {"a": [True]}, r"marks\['a'\] must have shape \(2,\)"),
    ],
)
def test_a_grid_refuses(images, marks, message):
    with pytest.raises(ValueError, match=message):
        plot_pictures.grid(images, marks)


def walk(steps=20, n=2):
    rng = np.random.default_rng(0)
    times = 1.0 - np.arange(steps) / steps
    x = np.broadcast_to(times[:, None, None, None, None], (steps, n, 1, 4, 4)).copy()
    return times, x, rng.uniform(0.5, 2.0, (steps, n)), np.log(rng.uniform(0.1, 0.9, (steps, n)))


def test_a_trajectory_has_the_scale_below_the_images_at_their_times():
    times, x, scale, log_posterior = walk()
    figure = plot_pictures.trajectories(
        times, x, scale, log_posterior, labels=["a", "b"], snapshots=5
    )
    strip, lines = figure.axes[0], figure.axes[1]
    (line,) = lines.get_lines()
    np.testing.assert_allclose(line.get_xydata(), np.transpose([times, scale[:, 0]]))
    assert lines.get_xlim() == (1.0, times[-1])
    # The pixels of a state are its time, and each is above its time on the axis below.
    shown = np.asarray(strip.images[0].get_array())[3, 3::6]
    span = times[0] - times[-1]
    np.testing.assert_allclose(shown, 1.0 - span * (np.arange(5) + 0.5) / 5, atol=0.026)
    outer, inner = strip.get_position(), lines.get_position()
    assert (outer.x0, outer.x1) == (inner.x0, inner.x1)
    assert inner.y1 <= outer.y0 + 1e-9
    (posterior,) = figure.axes[2].get_lines()
    np.testing.assert_allclose(posterior.get_ydata(), np.exp(log_posterior[:, 0]))
    assert texts_inside(figure)


def test_a_scale_over_decades_has_a_logarithmic_axis():
    times, x, scale, _ = walk()
    assert plot_pictures.trajectories(times, x, scale).axes[1].get_yscale() == "linear"
    scale[0] = 1e-3
    assert plot_pictures.trajectories(times, x, scale).axes[1].get_yscale() == "log"


def test_a_trajectory_refuses_what_does_not_fit():
    times, x, scale, log_posterior = walk()
    with pytest.raises(ValueError, match="times must decrease"):
        plot_pictures.trajectories(times[::-1], x, scale)
    with pytest.raises(ValueError, match=r"scale must have shape \(20, 2\)"):
        plot_pictures.trajectories(times, x, scale[:-1])
    with pytest.raises(ValueError, match="log_posterior must have shape"):
        plot_pictures.trajectories(times, x, scale, log_posterior[:, :1])
    with pytest.raises(ValueError, match="labels must be 2"):
        plot_pictures.trajectories(times, x, scale, labels=["a"])


# Calibration


def calibration():
    times = np.linspace(1.0, 0.0, 6)

    def losses(slope):
        loss = (0.3 + slope * (1.0 - times)).tolist()
        return {
            "log_loss": loss,
            "log_loss_low": [0.9 * x for x in loss],
            "log_loss_high": [1.1 * x for x in loss],
            "brier": [0.3 * x for x in loss],
        }

    diagram = {
        "confidence": [0.1, None, 0.9],
        "frequency": [0.2, None, 0.7],
        "low": [0.1, None, 0.5],
        "high": [0.3, None, 0.8],
        "count": [1000, 0, 10],
    }
    return {
        "times": times.tolist(),
        "before": losses(3.0),
        "after": losses(-0.2),
        "prior": losses(0.0),
        "reliability": {"before": diagram, "after": {**diagram, "frequency": [0.1, None, 0.9]}},
        "profile": {
            "times": times.tolist(),
            "values": times.tolist(),
            "low": (0.8 * times).tolist(),
            "high": (1.2 * times).tolist(),
        },
        "label": "digits, class 0",
    }


def test_a_reliability_diagram_leaves_out_empty_bins_and_shows_how_full_the_others_are():
    figure = plot_reliability.reliability(calibration())
    before, after = [c for c in figure.axes[0].collections if isinstance(c, PathCollection)]
    np.testing.assert_allclose(before.get_offsets(), [[0.1, 0.2], [0.9, 0.7]])
    np.testing.assert_allclose(after.get_offsets(), [[0.1, 0.1], [0.9, 0.9]])
    assert before.get_sizes()[0] > before.get_sizes()[1]
    assert texts_inside(figure)


def test_losses_and_the_weight_are_drawn_over_time():
    data = calibration()
    figure = plot_reliability.reliability(data)
    _, loss, brier, weight = figure.axes
    for name, label in (("prior", "the prior alone"), ("after", "calibrated")):
        drawn = line_of(loss, label).get_xydata()
        np.testing.assert_allclose(drawn, np.transpose([data["times"], data[name]["log_loss"]]))
        np.testing.assert_allclose(line_of(brier, label).get_ydata(), data[name]["brier"])
    assert len(loss.collections) == 3 and len(brier.collections) == 0
    np.testing.assert_allclose(line_of(weight, "fitted weight").get_ydata(), data["times"])
    assert loss.get_xlim() == weight.get_xlim() == (1.0, 0.0)
    assert figure.get_suptitle() == "digits, class 0"


def test_a_calibration_may_lack_what_it_is_compared_with_but_no_other_entry():
    data = calibration()
    del data["prior"], data["before"], data["reliability"]["before"]
    assert len(plot_reliability.reliability(data).axes[1].get_lines()) == 1
    del data["after"]
    with pytest.raises(ValueError, match="calibration must have 'after', got times, reliability"):
        plot_reliability.reliability(data)


def saved_calibration():
    """As the calibration of a class is written; every curve is told by its slope."""
    data = calibration()

    def judged(slope):
        loss = [slope * (1.0 - t) + 0.3 for t in data["times"]]
        names = (
            f"{score}{end}" for score in ("log_loss", "brier") for end in ("", "_low", "_high")
        )
        diagram = data["reliability"]["after"].items()
        full = {name: [value for value in values if value is not None] for name, values in diagram}
        full["count"] = [1000, 10]
        return dict.fromkeys(names, loss) | {"reliability": full}

    fit = {
        "prior": 0.1,
        "p_max": 0.5,
        "offset_nats": 0.1,
        "offset_low": 0.0,
        "offset_high": 0.2,
        "times": [0.0, 0.6],
        "temperature": [0.1, 0.9],
        "temperature_low": [0.05, 0.5],
        "temperature_high": [0.2, 1.5],
    }
    report = {
        "prior alone": judged(0.0),
        "log-odds, paper's settings": judged(2.0),
        "paper, paper's settings": judged(1.0),
        "paper": judged(-0.1),
        "paper, constant": judged(-0.05),
        "log-odds": judged(-0.2),
        "log-odds, constant": judged(-0.15),
        "time": data["times"],
    }
    fits = {
        f"{kind}{end}": {"tracker": kind, **fit}
        for kind in ("paper", "log-odds")
        for end in ("", ", constant")
    }
    return {"version": 1, "about": {}, "fits": fits, "report": report}


def test_a_saved_calibration_is_compared_with_what_its_tracker_was_before(tmp_path):
    write_json(tmp_path / "0.json", saved_calibration())
    found = plot._calibrations(tmp_path / "0.json")
    assert found.keys() == {"paper", "log-odds"}
    for tracker, before, after, constant in (
        ("paper", 1.0, -0.1, -0.05),
        ("log-odds", 2.0, -0.2, -0.15),
    ):
        last = {
            role: found[tracker][role]["log_loss"][-1] - 0.3
            for role in ("prior", "before", "constant", "after")
        }
        expected = {"prior": 0.0, "before": before, "constant": constant, "after": after}
        assert last == pytest.approx(expected)
        assert found[tracker]["profile"]["times"] == [0.0, 0.6, 1.0]
        assert found[tracker]["profile"]["high"] == [0.2, 1.5, 1.5]
    del (saved := saved_calibration())["report"]
    write_json(tmp_path / "1.json", saved)
    with pytest.raises(ValueError, match="1.json has no 'report'"):
        plot._calibrations(tmp_path / "1.json")


# Everything


@pytest.fixture
def coarse(monkeypatch):
    """Fewer pixels are sooner written."""
    monkeypatch.setattr(style, "DPI", 50)


@pytest.fixture
def run(tmp_path, coarse):
    """A folder with a bit of everything, and its rows."""
    rows = [
        make_row("none", 0.0, 0.1, key="key0"),
        make_row("np", 0.5, 0.005, key="key1"),
        make_row("np", 0.2, 0.04, key="key2"),
        make_row("none", 0.0, 0.2, forget=("cat", "dog/wolf"), key="key3"),
    ]
    write_rows(tmp_path, rows)
    for key in ("key0", "key1"):
        save_tensors(
            tmp_path / "samples" / key / "images.safetensors",
            {"images": torch.zeros(20, 1, 8, 8), "labels": torch.arange(20) % 10},
        )
    times, x, scale, log_posterior = map(torch.from_numpy, walk())
    save_tensors(
        tmp_path / "samples" / "key2" / "trajectories.safetensors",
        {"times": times, "x": x, "scale": scale, "log_posterior": log_posterior},
    )
    write_json(tmp_path / "calibration" / "dog%2Fwolf.json", saved_calibration())
    return tmp_path, rows


def test_everything_is_drawn_that_there_is_data_for(run):
    out, rows = run
    written = plot.draw_all(out)
    assert {path.relative_to(out).as_posix() for path in written} == {
        "figures/curves.png",
        "figures/histogram_0.png",
        "figures/grid_0.png",
        "figures/trajectories_0_NP_g-0.2.png",
        "figures/reliability_dog_2Fwolf_paper.png",
        "figures/reliability_dog_2Fwolf_log-odds.png",
        "table.csv",
        "table.md",
    }
    for path in written[:-2]:
        pixels = imread(path)[:, :, :3]
        assert pixels.shape[1] <= style.WIDTH * style.DPI + 1
        assert 0.005 < (pixels.min(axis=2) < 0.9).mean() < 0.7, path
    text = (out / "table.md").read_text(encoding="utf-8")
    assert text.startswith("At 0.5% forbidden") and compare.table(rows) in text


def test_a_setting_is_named_unless_another_has_the_name():
    rows = [
        make_row("np", 0.2, 0.04, key="a"),
        make_row("np", 0.5, 0.04, key="b"),
        make_row("np", 0.5, 0.04, key="c", seed=1),
    ]
    assert plot._setting_names(rows) == {"a": "0_NP_g-0.2"}


def test_the_csv_has_every_number_of_every_row(run):
    _, rows = run
    read = list(csv.DictReader(compare.csv_table(rows).splitlines()))
    assert len(read) == len(rows) and {line["setting"] for line in read} == {""}
    tuned = make_row("np", t_lo=0.25, t_hi=1.0)
    assert "NP,t/T 0.25 to 1," in compare.csv_table([tuned])
    by_scale = {
        (line["forget"], line["method"], float(line["guidance_scale"])): line for line in read
    }
    for row in rows:
        (name,) = {m.name for m in compare.methods_of(rows) if row in m.rows}
        line = by_scale[compare.forgotten_by(row), name, row["config"]["guidance_scale"]]
        for key, value in row["metrics"].items():
            if key == "histogram":
                shares = [float(line[f"share_{i}"]) for i in range(len(value))]
                np.testing.assert_allclose(shares, value, rtol=1e-5)
            elif value is None:
                assert line[key] == ""
            else:
                assert float(line[key]) == pytest.approx(value, rel=1e-5)


def test_names_of_the_classes_come_from_the_classifier(run):
    out, rows = run
    shutil.rmtree(out / "calibration")
    names = ["cat", "dog/wolf", "0", *"3456789"]
    write_json(out / "networks" / "classifier" / "config.json", {"classes": names})
    written = {path.name for path in plot.draw_all(out)}
    assert {"histogram_0.png", "histogram_cat_dog_wolf.png"} <= written
    pictures, marks = plot._samples([out], rows[:2], names)
    assert list(pictures) == ["unguided\n10% forbidden", "NP, $g=0.5$\n0.5% forbidden"]
    for name in pictures:
        assert pictures[name].shape == (16, 1, 8, 8)
        assert np.flatnonzero(marks[name]).tolist() == [2, 12]


def test_with_two_kinds_of_networks_each_has_its_curves_too(tmp_path, coarse):
    rows = [
        make_row(networks=name, metrics={"histogram": None}) for name in ("pair", "conditional")
    ]
    write_rows(tmp_path, rows)
    written = [path.name for path in plot.draw_all(tmp_path)]
    assert written == [
        "curves.png",
        "curves_conditional.png",
        "curves_pair.png",
        "table.md",
        "table.csv",
    ]


def test_several_runs_are_drawn_as_one(tmp_path, monkeypatch):
    """A setting that two have is taken from the first."""
    drawn = []
    monkeypatch.setattr(plot, "curves", drawn.append)
    monkeypatch.setattr(plot, "histogram", lambda *_: None)
    monkeypatch.setattr(style, "save", lambda *_: None)
    runs = [tmp_path / name for name in ("one", "other")]
    rows = [
        make_row("np", scale, share, key=f"{scale}") for scale, share in ((0.2, 0.02), (0.5, 0))
    ]
    for run in runs:
        run.mkdir()
    write_rows(runs[0], rows[:1])
    write_rows(runs[1], [make_row("np", 0.2, 0.3, key="0.2"), rows[1]])
    assert compare.read_tables(runs, "sweep.jsonl") == rows
    written = plot.draw_all(tmp_path / "out", data=runs)
    assert drawn == [rows]
    assert compare.table(rows) in written[-2].read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="data must name at least one folder"):
        plot.draw_all(tmp_path / "out", data=[])


def test_a_damaged_file_of_images_is_named(tmp_path, coarse):
    write_rows(tmp_path, [make_row(key="key0")])
    path = tmp_path / "samples" / "key0" / "images.safetensors"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="key0.images.safetensors is not a whole"):
        plot.draw_all(tmp_path)


def test_a_figure_that_cannot_be_written_leaves_the_older_one(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    figure = plot_pictures.grid({"a": np.zeros((2, 1, 8, 8))})
    style.save(figure, path)
    before = path.read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(figure, "savefig", full)
    with pytest.raises(OSError, match="a.png was not written: No space left on device"):
        style.save(figure, path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def imports(code):
    """What a fresh interpreter prints."""
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return run.stdout.strip()


def test_without_matplotlib_there_are_numbers_and_an_error_that_says_what_to_install():
    said = imports(
        "import sys; sys.modules['matplotlib'] = None\n"
        "import dng_models.class_removal.compare\n"
        "try:\n    import dng_models.class_removal.plot\n"
        "except ImportError as error:\n    print(error)"
    )
    assert (
        "plot needs matplotlib, which is not installed: pip install 'dng-toolkit[figures]'" in said
    )


def test_plotting_does_not_load_torch():
    code = "import sys, dng_models.class_removal.plot; print('torch' in sys.modules)"
    assert imports(code) == "False"


# Names and images of others


@pytest.mark.parametrize(
    "name",
    [
        r"$\nothing$",
        *(pytest.param(each, marks=pytest.mark.slow) for each in ("dog $x_$", "$", "a$b$c")),
    ],
)
def test_names_that_are_no_mathematics_are_drawn(tmp_path, coarse, name):
    rows = [
        make_row("none", 0.0, 0.1, forget=(name,)),
        make_row("np", 0.5, 0.02, forget=(name,)),
        make_row("dng", 2.0, 0.01, forget=(name,), calibration=name, hyperparameters="calibrated"),
    ]
    classes = [name, *(f"${i}_" for i in range(9))]
    images = np.zeros((2, 1, 8, 8))
    times = np.linspace(1.0, 0.0, 3)
    for figure in (
        plot.curves(rows),
        plot.histogram(rows, classes),
        plot_pictures.grid({f"{name}\nforgotten": images, "NP, $g=1$": images}),
        plot_pictures.trajectories(
            times, np.zeros((3, 1, 1, 8, 8)), np.ones((3, 1)), labels=[name]
        ),
        plot_reliability.reliability({**calibration(), "label": name}),
    ):
        style.save(figure, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 0


def test_only_digits_are_drawn_as_negatives(tmp_path, coarse):
    """Grey photographs are not turned inside out, whatever the command."""
    white = np.ones((2, 1, 8, 8))

    def shown(**options):
        (axes,) = plot_pictures.grid({"unguided": white}, **options).axes
        (image,) = axes.images
        return image.to_rgba(image.get_array())[4, 4, 0]

    assert shown() == 1.0 and shown(negative=True) == 0.0
    for dataset, like, negative in (
        ("digits", None, True),
        ("mnist", None, True),
        ("photos", None, False),
        ("cifar10", None, False),
        ("mine.parquet", "mnist", True),
    ):
        row = make_row("none", 0.0, 0.1, dataset=dataset, like=like)
        assert plot_pictures.is_ink(row) is negative
        # And of a run's folder.
        folder = tmp_path / f"{dataset}{like}" / "samples" / "key"
        states = torch.ones(2, 1, 1, 8, 8)
        tensors = {"times": torch.tensor([1.0, 0.5]), "x": states, "scale": torch.ones(2, 1)}
        save_tensors(folder / "trajectories.safetensors", tensors)
        write_json(folder / "config.json", row["config"])
        image = plot._trajectories(folder / "trajectories.safetensors").axes[0].images[0]
        assert image.to_rgba(image.get_array())[4, 4, 0] == (0.0 if negative else 1.0)
