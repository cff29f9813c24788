"""The figures of the text-to-image experiment: what is drawn, and that it can be read."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PathCollection
from matplotlib.image import imread
from matplotlib.text import Text
from PIL import Image

from dng_models.text_to_image import plot, store
from dng_models.text_to_image.config import METHODS, RULES
from dng_models.text_to_image.store import RunFolder
from tests.models.text_to_image.test_compare import records, uneven

# Those that need nothing more of a prompt.
MANY = tuple(
    rule
    for rule in RULES
    if rule not in ("dng-empty", "dng-path", "ideal") and not METHODS[rule].from_empty
)


@pytest.fixture
def coarse(monkeypatch):
    """Figures of few pixels, where only what was written is looked at."""
    monkeypatch.setattr("dng_models.support.style.DPI", 30)


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    """Of a run with pictures, of which those of image 0 were followed through time."""
    folder = RunFolder(tmp_path)
    found = records()
    for record in found:
        path = folder.path / record["file"]
        path.parent.mkdir(parents=True, exist_ok=True)
        # Another colour for every image and setting.
        shade = (40 * record["image"], int(10 * record["guidance_scale"]), 200)
        Image.new("RGB", (8, 8), shade).save(path)
        record["sha256"] = store.digest(path)
        if record["image"] == 0 and record["guidance_scale"] in (0.0, 2.0, 10.0):
            name = record["file"].replace("images/", "paths/")
            (folder.path / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 8), shade).save(folder.path / name)
            record["path"] = {"file": name, "time": [0.5, 0.0]}
    digests = {record["file"]: record["sha256"] for record in found}
    for record in found:
        record["measured_by"] = {"of": [record["sha256"], digests[record["unguided"]]]}
    store.write_table(folder, found)
    return folder


def legend(figure) -> list[str]:
    return [text.get_text() for each in figure.legends for text in each.get_texts()]


def panels(figure) -> list:
    return [axes for axes in figure.axes if axes.axison]


def overlapping(texts: list[Text]) -> list[tuple[str, str]]:
    """Pairs of texts that lie on each other, by more than a rounding of pixels."""
    shown = [text for text in texts if text.get_visible() and text.get_text().strip()]
    boxes = [(text.get_text(), text.get_window_extent()) for text in shown]
    return [
        (a, b)
        for (a, one), (b, other) in itertools.combinations(boxes, 2)
        if min(one.x1, other.x1) - max(one.x0, other.x0) > 1
        and min(one.y1, other.y1) - max(one.y0, other.y0) > 1
    ]


def check_readable(figure, *, within: float = 2.0) -> None:
    """No text on another one, none outside."""
    FigureCanvasAgg(figure).draw()
    texts = [text for text in figure.findobj(Text) if text.get_text().strip()]
    ticks = {
        tick
        for axes in figure.axes
        for axis in (axes.xaxis, axes.yaxis)
        for each in axis.get_major_ticks() + axis.get_minor_ticks()
        for tick in (each.label1, each.label2)
    }
    assert overlapping([text for text in texts if text not in ticks]) == []
    width, height = figure.get_size_inches() * figure.dpi
    for text in texts:
        if text in ticks or not text.get_visible():
            continue
        box = text.get_window_extent()
        assert box.x0 > -within and box.x1 < width + within, text.get_text()
        assert box.y0 > -within and box.y1 < height + within, text.get_text()


# ---------------------------------------------------------------------- similarities


def test_points_lines_and_q_of_every_rule():
    figure = plot.similarities(records())
    first, second, q = panels(figure)
    assert [axes.get_title(loc="left")[-3:] for axes in (first, second)] == ["cat", "dog"]
    for axes in (first, second):
        points = [
            each.get_offsets() for each in axes.collections if isinstance(each, PathCollection)
        ]
        np.testing.assert_allclose(points[0], [[0.9, 0.95], [0.8, 0.9]])
        np.testing.assert_allclose(points[1], [[0.9, 1.0], [0.8, 1.0]])
        labels = [text.get_text() for text in axes.get_legend().get_texts()]
        assert labels == ["NP: Q = 0.075", "DNG: Q = 0.150"]
        fitted = {line.get_label(): line.get_xydata() for line in axes.lines}
        np.testing.assert_allclose(fitted["NP: Q = 0.075"], [[0.8, 0.9], [0.9, 0.95]])
    assert {"NP", "DNG", "unguided"} < set(legend(figure))
    hollow = {line.get_gid(): line.get_xdata()[0] for line in q.lines if line.get_gid()}
    assert hollow == {"paper-np": 0.007, "paper-dng": 0.052}
    names = [text.get_text() for text in q.get_yticklabels()]
    assert names == ["cat", "dog", "average"]


@pytest.mark.parametrize(
    ("rules", "names"),
    [
        (("np", "dng"), tuple("abcde")),
        (MANY, ("a", "b")),
        (("dng",), ("A rather long name of a prompt",)),
    ],
)
def test_similarities_can_be_read(rules, names):
    check_readable(plot.similarities(records(rules=rules, names=names)))


def test_one_scale_has_points_and_no_line():
    few = [r for r in records(names=("cat",)) if r["guidance_scale"] in (0.0, 2.0, 10.0)]
    axes = panels(plot.similarities(few))[0]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["NP: no line, no Q", "DNG: no line, no Q"]
    gap = panels(plot.similarities(few))[-1]
    assert gap.get_xlabel() == "mean gap: unrelated minus related"
    assert {float(x) for line in gap.lines if len(line.get_xdata()) == 1 for x in line.get_xdata()}
    assert not any(line.get_gid() for line in gap.lines)  # the paper prints no mean gap
    check_readable(plot.similarities(few))


def test_the_line_of_the_papers_q_is_named_by_it():
    """.65 x 5/14 by hand; the mean gap of these is .2."""
    figure = plot.similarity(uneven(), "cat")
    (axes,) = panels(figure)
    assert figure.get_suptitle() == "cat"
    assert axes.get_legend() is None and legend(figure)[:2] == ["NP: Q = 0.232", "unguided"]
    check_readable(figure)
    with pytest.raises(ValueError, match="there are no images of 'cow' with both"):
        plot.similarity(uneven(), "cow")


# ---------------------------------------------------------------------- scales and ways


def test_scales_are_those_of_the_largest_guidance_scale():
    figure = plot.scales(records(), "dng")
    for axes in panels(figure):
        lines = [line.get_ydata() for line in axes.lines]
        # Four images and their median, of both negatives.
        assert len(lines) == 2 * (4 + 1)
        for line in lines:
            np.testing.assert_allclose(line, [10.0, 5.0])
        assert axes.get_xlim()[0] > axes.get_xlim()[1]
    assert legend(figure)[:2] == ["related negative", "unrelated negative"]
    check_readable(figure)
    with pytest.raises(ValueError, match="there are no images of rule 'sld'"):
        plot.scales(records(), "sld")


def test_ways_are_of_the_followed_images_with_scale_and_posterior(folder):
    found = store.read_table(folder)
    figure = plot.trajectories(found, "cat", folder.path)
    scale, posterior = panels(figure)
    assert len(figure.axes) == 5 + 2
    np.testing.assert_allclose(scale.lines[0].get_ydata(), [2.0, 1.0])
    assert len(scale.lines) == 4 and len(posterior.lines) == 2
    np.testing.assert_allclose(posterior.lines[0].get_ydata(), np.exp([-4.0, -1.0]))
    assert legend(figure) == [
        f"{label}, $g={g}$ {kind}"
        for label, g in (("NP", 2), ("DNG", 10))
        for kind in ("related", "unrelated")
    ]
    check_readable(figure)
    with pytest.raises(ValueError, match="no image of 'cow' that was followed"):
        plot.trajectories(found, "cow", folder.path)


def test_several_concepts_have_a_posterior_each(folder):
    found = store.read_table(folder)
    for record in found:
        if record["log_posterior"] is not None:
            record["log_posterior"] = [[-4.0, -3.0], [-2.0, None]]
    posterior = panels(plot.trajectories(found, "dog", folder.path))[1]
    assert len(posterior.lines) == 2 * 2


# ---------------------------------------------------------------------- images and detections


def test_a_grid_has_a_row_for_every_rule_and_scale(folder):
    found = store.read_table(folder)
    figure = plot.grid(found, "cat", "related", folder.path, columns=3)
    assert len(figure.axes) == 3 * (1 + 2 * 2)
    shown = np.array([axes.images[0].get_array()[0, 0] for axes in figure.axes]).reshape(5, 3, 3)
    np.testing.assert_array_equal(shown[:, :, 0], np.tile([0, 40, 80], (5, 1)))
    np.testing.assert_array_equal(shown[:, 0, 1], [0, 10, 20, 50, 100])
    texts = [text.get_text() for text in figure.texts]
    assert texts[:2] == ["cat", "related negative: mat, fur (found: in the unguided image)"]
    assert texts[2:] == ["unguided", "NP, $g=1$", "NP, $g=2$", "DNG, $g=5$", "DNG, $g=10$"]
    marked = [f"seed {seed}: found" for seed in (7, 8, 9)]
    assert [axes.get_title() for axes in figure.axes[:3]] == marked
    check_readable(figure)
    with pytest.raises(ValueError, match="there are no images of 'cow' with its related"):
        plot.grid(found, "cow", "related", folder.path)
    with pytest.raises(ValueError, match="columns must be an integer >= 1, got 0"):
        plot.grid(found, "cat", "related", folder.path, columns=0)


def test_an_image_that_would_be_forbidden_is_shown(folder):
    found = store.read_table(folder)
    for record in found:
        if record["kind"] == "none" and record["image"] < 3:
            record["presence"] = {"mat": 0.1, "fur": 0.2, "a car": 0.3}
    figure = plot.grid(found, "cat", "related", folder.path, columns=2)
    assert [axes.get_title() for axes in figure.axes[:2]] == ["seed 7", "seed 10: found"]
    shown = [axes.images[0].get_array()[0, 0, 0] for axes in figure.axes]
    assert shown == [0, 120] * 5  # image 3, in every row
    figure = plot.grid(found, "cat", "unrelated", folder.path, columns=2)
    assert [axes.get_title() for axes in figure.axes[:2]] == ["seed 7", "seed 8"]
    # And of those that were followed through time.
    for record in found:
        if record["image"] == 3 and record["guidance_scale"] in (0.0, 2.0, 10.0):
            record["path"] = {"file": record["file"], "time": [0.5, 0.0]}
    figure = plot.trajectories(found, "cat", folder.path)
    texts = [text.get_text() for text in figure.texts]
    assert texts == ["cat", "decoded latents, seed 10; found: mat, fur in the image"]
    rows = [text.get_text() for axes in figure.axes[:5] for text in axes.texts][:1]
    assert rows == ["unguided\nfound"]
    said = [axes.texts[0].get_text() for axes in figure.axes[1:5]]
    assert said[0] == "NP, $g=2$\nrelated\nnot found"
    check_readable(figure)


def test_scales_have_ticks_that_can_be_read(folder):
    found = store.read_table(folder)
    for low in (0.9, 1e-7):
        for record in found:
            record["scale"], record["log_posterior"] = [1.0, low], [0.0, float(np.log(low))]
        figures = [plot.trajectories(found, "cat", folder.path)]
        figures += [plot.scales(found, "dng")] if low < 0.5 else []
        for figure in figures:
            FigureCanvasAgg(figure).draw()
            for axes in panels(figure):
                ticks = [t.get_text() for t in axes.get_yticklabels() if t.get_text()]
                assert len(ticks) >= 3 and "1" in ticks


def test_detections_start_at_the_unguided_images():
    figure = plot.detections(records())
    for axes in panels(figure):
        curves = [line.get_ydata() for line in axes.lines]
        assert len(curves) == 4
        np.testing.assert_allclose(curves[0], [100.0, 50.0, 0.0])
        np.testing.assert_allclose(curves[1], [0.0, 0.0, 0.0])
    check_readable(figure)
    with pytest.raises(ValueError, match="records must have detections, and have none"):
        plot.detections(records(detect=False))


def test_every_rule_has_its_own_look():
    looks = [plot.LOOKS[rule] for rule in METHODS]
    assert len({(look.color, look.marker) for look in looks}) == len(RULES)


# ---------------------------------------------------------------------- all of them


@pytest.mark.slow
def test_all_figures_of_a_folder(folder, coarse):
    written = plot.draw_all(folder.path)
    assert [path.name for path in written] == [
        *("similarities.png", "similarities_cat.png", "similarities_dog.png"),
        *("detections.png", "scales_dng.png"),
        *("trajectories_cat_seed-7.png", "grid_cat_related.png", "grid_cat_unrelated.png"),
        *("trajectories_dog_seed-7.png", "grid_dog_related.png", "grid_dog_unrelated.png"),
    ]
    for path in written:
        ink = (imread(path)[:, :, :3].min(axis=2) < 0.9).mean()
        assert 0.01 < ink < 0.9, path


def test_prompts_come_in_the_order_of_the_run(folder):
    folder.settings.write_text('{"settings": {}, "versions": [], "prompts": {"dog": 1, "cat": 1}}')
    found = store.read_table(folder)
    assert list(dict.fromkeys(record["prompt"] for record in found)) == ["dog", "cat"]
    folder.settings.unlink()
    found = store.read_table(folder)
    assert list(dict.fromkeys(record["prompt"] for record in found)) == ["cat", "dog"]


def test_a_picture_that_is_gone_is_named(folder, coarse):
    gone = folder.path / "images" / "cat" / "np-related-2" / "000001.png"
    gone.unlink()
    with pytest.raises(FileNotFoundError, match="000001.png is gone"):
        plot.draw_all(folder.path)


def test_figures_of_nothing_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="there are no images"):
        plot.draw_all(Path(tmp_path))
