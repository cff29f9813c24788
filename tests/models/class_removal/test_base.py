"""Whether a base is good enough to be guided: held-out images are, blanks and noise are not."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from dng_models.class_removal import base, compare
from dng_models.class_removal.config import Config
from dng_models.class_removal.data import load_dataset
from dng_models.class_removal.judge import load_classifier
from dng_models.class_removal.materials import Materials
from dng_models.class_removal.run_folder import SHIPPED, RunFolder
from dng_models.class_removal.sweeps import sweep
from tests.helpers.tiny_networks import tiny

CONFIG = Config(rule="np", guidance_scale=0.5, forget=("1",), steps=4, num_images=32, batch_size=32)


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits")


@pytest.fixture(scope="module")
def judge(digits):
    return load_classifier(SHIPPED / "digits" / "classifier", digits.classes, "cpu")


def test_images_of_the_data_are_good(digits, judge):
    images = digits.train.images[torch.randperm(1000, generator=torch.Generator().manual_seed(0))]
    told = base.check(images[:200], digits, judge, ("1",))
    assert told["verdict"] == "good" and told["num_images"] == 200
    # As near as held-out ones, and far from what forgetting changes.
    for name in base.QUANTITIES:
        gap = told[name] - told[f"{name}_held_out"]
        assert gap < 0.3 * told[f"{name}_without"]
    assert abs(told["forbidden"] - told["forbidden_held_out"]) < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["blank", "noise", "one image"])
def test_blanks_are_not_taken_for_the_forbidden_class_in_silence(digits, judge, kind):
    noise = torch.randn((64, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    images = {
        "blank": 0.01 * noise - 1.0,
        "noise": noise.clamp(-1.0, 1.0),
        "one image": digits.train.images[:1] + 0.01 * noise,
    }[kind]
    told = base.check(images.clamp(-1.0, 1.0), digits, judge, ("1",))
    assert told["verdict"] == "bad"
    text = base.warning(told, CONFIG)
    assert text.startswith("WARNING: the network base is not good enough to be guided")
    assert "train it longer (--train-steps" in text
    share = f"{100 * told['forbidden']:.0f}% of them forbidden"
    assert share in text and (kind != "blank" or told["forbidden"] == 1.0)


def test_too_few_images_tell_nothing_and_are_not_drawn(tmp_path):
    materials = Materials(RunFolder(tmp_path, SHIPPED / "digits"), device="cpu")
    told = base.checked(dataclasses.replace(CONFIG, num_images=31), materials)
    assert told["verdict"] == "unchecked" and list(tmp_path.iterdir()) == []
    assert "needs 32 unguided and held-out images, and there are 31" in base.warning(told, CONFIG)


def test_what_is_looked_at_is_the_base_alone(tmp_path):
    materials = Materials(RunFolder(tmp_path, SHIPPED / "digits"), device="cpu")
    guided = dataclasses.replace(CONFIG, rule="dng", hyperparameters="calibrated", num_images=1024)
    few = base.unguided(guided, materials)
    assert (few.rule, few.num_images, few.steps) == ("none", 256, 4)
    assert few == base.unguided(dataclasses.replace(CONFIG, num_images=300), materials)
    # Its images are those of the unguided setting of a sweep, so that none is drawn twice.
    row = dataclasses.replace(CONFIG, rule="none", guidance_scale=0.0)
    assert few.images_key == row.images_key


@pytest.mark.slow
def test_a_sweep_with_an_untrained_base_warns_and_marks_its_rows(tmp_path, capsys, monkeypatch):
    from dng_models.class_removal import materials

    monkeypatch.setattr(
        materials.Materials,
        "network",
        lambda *_, **__: _Loaded(tiny(0).eval().requires_grad_(False)),
    )
    materials = Materials(RunFolder(tmp_path, SHIPPED / "digits"), device="cpu")
    rows = sweep([CONFIG], materials, progress=False)
    assert rows[0]["base"]["verdict"] == "bad"
    assert json.loads((tmp_path / "sweep.jsonl").read_text()) == rows[0]
    err = capsys.readouterr().err
    assert err.count("WARNING: the network base is not good enough") == 1
    assert "NOT GOOD ENOUGH" in compare.table(rows)
    # Only what is in the table stays of what was drawn to look at the base.
    assert not (tmp_path / "work").exists() or not any((tmp_path / "work").iterdir())
    # A second sweep knows it without drawing, and says it again.
    monkeypatch.setattr(base, "checked", None)
    more = sweep(
        [CONFIG, dataclasses.replace(CONFIG, guidance_scale=0.6)], materials, progress=False
    )
    assert more[1]["base"] == more[0]["base"]
    assert capsys.readouterr().err.count("WARNING") == 1
    from dng_models.class_removal import plot

    for figure in (plot.curves(rows), plot.histogram(rows)):
        assert "not good enough to be guided" in figure.get_suptitle()
    good = [{**row, "base": {"verdict": "good"}} for row in rows]
    assert plot.curves(good).get_suptitle() == ""
    assert "GOOD" not in compare.table(good)


class _Loaded:
    def __init__(self, net):
        from dng_math import NoiseSchedule

        self.net, self.schedule, self.prediction_type = net, NoiseSchedule.linear(), "epsilon"
