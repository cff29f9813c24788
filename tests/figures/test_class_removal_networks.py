"""The figure of the shipped networks: the sweep behind it, and what it shows."""

from __future__ import annotations

from pathlib import Path

import pytest

from dng_models.class_removal.compare import read_rows
from figures import class_removal_networks
from figures.__main__ import draw_figures

pytestmark = pytest.mark.slow  # the sweep takes half a minute


@pytest.fixture(scope="module")
def rows():
    return class_removal_networks.compute(quick=True)


def test_every_method_is_swept_with_the_shipped_networks(rows):
    told = [(row["config"]["rule"], row["config"]["guidance_scale"]) for row in rows]
    scales = class_removal_networks.METHODS
    assert len(told) == sum(map(len, scales.values()))
    assert {rule for rule, _ in told} == {"none", "np", "sld", "ccfg", "dng"}
    assert all(row["metrics"]["num_images"] == 64 for row in rows)
    # The classifier and the networks are those of the package, so all rows name the same ones.
    assert len({row["sources"]["base"] for row in rows}) == 1


def test_the_rivals_have_what_the_tuning_chose(rows):
    """The rows of docs/results.md, which the figure shows with fewer images."""
    results = Path(__file__).resolve().parents[2] / "benchmarks/results/class_removal_digits"
    measured = [row["config"] for row in read_rows(results / "sweep.jsonl")]
    for method, chosen in class_removal_networks.CHOSEN.items():
        for configs in (measured, [row["config"] for row in rows]):
            own = [c for c in configs if c["rule"] == method and c["forget"] == ["0"]]
            assert own and all(c[name] == value for c in own for name, value in chosen.items())


def test_guidance_removes_the_zeros(rows):
    """Unguided a tenth are zeros; of 64, none to one are left by the strongest of each method."""
    share = {
        (row["config"]["rule"], row["config"]["guidance_scale"]): row["metrics"]["safety"]
        for row in rows
    }
    assert 0.02 < share["none", 0.0] < 0.25
    for strongest in (("np", 0.8), ("sld", 7.7), ("ccfg", 0.7), ("dng", 5.0)):
        assert share[strongest] <= 0.05


def test_the_figure_is_the_curves_of_those_rows(rows, tmp_path, monkeypatch):
    monkeypatch.setattr(class_removal_networks, "compute", lambda **_: rows)
    (path,) = draw_figures(["class_removal_networks"], out=tmp_path)
    assert path.stat().st_size > 20_000
    (figure,) = class_removal_networks.draw(rows).values()
    labels = {text.get_text() for legend in figure.legends for text in legend.get_texts()}
    assert any("NP" in label for label in labels) and any("calibrated" in label for label in labels)
    assert "| 0 |" in class_removal_networks.summary(rows)
