"""Estimates of how long things take: what is timed, and what is said."""

from __future__ import annotations

import time

import pytest
import torch

from dng_models.class_removal import plan
from dng_models.class_removal.classifier import ClassifierConfig
from dng_models.class_removal.config import Config
from dng_models.class_removal.data import load_dataset
from dng_models.class_removal.materials import Materials
from dng_models.class_removal.run_folder import SHIPPED, RunFolder
from dng_models.class_removal.training_config import TrainConfig
from dng_models.support.progress import seconds_at, seconds_of

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "1 s"),
        (44.4, "44 s"),
        (89.0, "89 s"),
        (90.0, "1.5 min"),
        (1500.0, "25 min"),
        (3.5 * 3600.0, "3.5 h"),
        (35 * 3600.0, "35 h"),
        (30 * 86400.0, "30 days"),
    ],
)
def test_durations_are_rounded(seconds, text):
    assert plan.duration(seconds) == text


def test_a_plan_adds_up():
    parts = [plan.Part("train base", 600.0), plan.Part("draw", 3000.0)]
    lines = plan.told(parts, "digits", "less").splitlines()
    assert lines[0].startswith("plan: digits; times are estimates")
    assert [line.split("about ")[1] for line in lines[1:4]] == ["10 min", "50 min", "60 min"]
    assert lines[4] == "  shorter: less"
    assert "shorter" not in plan.told(parts[:1], "digits", "less")
    assert "nothing is left to do" in plan.told([], "digits")


def test_the_first_time_does_not_count_unless_it_is_long(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def taking(*durations):
        waiting = iter(durations)

        def work():
            now[0] += next(waiting)

        return work

    assert seconds_of(taking(0.5, 0.2, 0.1, 0.2, 0.3), 1.0) == pytest.approx(0.2)
    assert seconds_of(taking(5.0), 1.0) == pytest.approx(5.0)


def test_only_what_is_left_is_timed_and_networks_of_one_size_once(tmp_path, monkeypatch):
    data = load_dataset("digits")
    diffusion = TrainConfig(steps=100, batch_size=4)
    trainings = [
        plan.Training(tmp_path / "base", data, diffusion),
        plan.Training(tmp_path / "class-0", data.only("0"), TrainConfig(steps=40, batch_size=4)),
        plan.Training(tmp_path / "classifier", data, ClassifierConfig(steps=30)),
    ]
    timed = []
    monkeypatch.setattr(
        plan.Training, "seconds_per_update", lambda self, _: timed.append(self) or 0.5
    )
    found = plan.of_trainings(trainings, CPU)
    assert [part.seconds for part in found] == [50.0, 20.0, 15.0] and len(timed) == 2
    monkeypatch.setattr(plan.Training, "updates_left", lambda self: 0)
    assert plan.of_trainings(trainings, CPU) == []


@pytest.mark.slow
def test_updates_and_steps_are_done_and_leave_nothing(tmp_path):
    data = load_dataset("digits")
    for training in (
        plan.Training(tmp_path / "base", data, TrainConfig(batch_size=2)),
        plan.Training(tmp_path / "c", data, ClassifierConfig(batch_size=2)),
    ):
        assert 0.0 < training.seconds_per_update(CPU) < 60.0
    config = Config(rule="np", steps=10, num_images=8, batch_size=2)
    for folder in (RunFolder(tmp_path), RunFolder(tmp_path, SHIPPED / "digits")):
        materials = Materials(folder, device="cpu")
        assert 0.0 < plan.seconds_per_step(config, materials) < 60.0
        assert 0.0 < plan.seconds_to_measure(config, materials) < 60.0
    assert list(tmp_path.iterdir()) == []


def test_what_is_long_is_tried_at_smaller_sizes_only():
    tried = []

    def taking(seconds):
        def at(size):
            tried.append(size)
            return seconds(size)

        return at

    # A fixed cost is not multiplied where the whole is short; a long whole is never done.
    assert seconds_at(64, taking(lambda size: 0.05 + 0.001 * size)) == pytest.approx(0.114)
    assert tried == [2, 8, 32, 64]
    tried.clear()
    assert seconds_at(128, taking(lambda size: 0.5 * size)) == pytest.approx(64.0)
    assert tried == [2, 8]
    assert seconds_at(1, lambda size: 3.0) == 3.0
