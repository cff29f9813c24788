"""DPM-Solver++ 2M in class removal: against diffusers' pipeline, and the exact posterior."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from dng_kernels import standard_normal
from dng_math import DynamicNegativeGuidance, NegativePrompting, PathTracker, Unguided
from dng_models.class_removal.calibration import Calibration
from dng_models.class_removal.commands import _calibrate
from dng_models.class_removal.config import Config
from dng_models.class_removal.generation import generate, trajectories
from dng_models.class_removal.second_order import sample_second_order
from tests.models.class_removal.test_calibration import LINE, LINEAR, on_a_line

RUN = {
    "shape": (1,),
    "num_images": 256,
    "schedule": LINEAR,
    "steps": 20,
    "device": torch.device("cpu"),
}


def test_unguided_it_is_the_solver_of_diffusers():
    """A loop by hand, with betas instead of their schedule."""
    got = sample_second_order(on_a_line(None), [], Unguided(), **RUN | {"seed": 4})
    scheduler = DPMSolverMultistepScheduler(
        beta_schedule="linear", beta_start=1e-4, beta_end=0.02, timestep_spacing="trailing"
    )
    scheduler.set_timesteps(20)
    x = standard_normal(4, (256, 1))
    for t in scheduler.timesteps:
        eps = on_a_line(None)(x, t.expand(256))
        x = scheduler.step(eps, t, x).prev_sample
    torch.testing.assert_close(got.images, x, rtol=1e-4, atol=1e-5)
    assert got.log_posterior is None and got.records == {}
    assert got.time.shape == (21,) and got.time[0] == 1.0 and got.time[-1] == 0.0


def test_the_posterior_is_the_exact_one():
    """Mean |tracked - exact| at the last point, with 256 images guided away."""
    rule = DynamicNegativeGuidance(2.0, PathTracker(0.2))
    record = ("log_posterior", "scale", "x0")
    got = sample_second_order(on_a_line(None), [on_a_line([0])], rule, record=record, **RUN)
    assert {name: tuple(each.shape) for name, each in got.records.items()} == {
        "log_posterior": (21, 256), "scale": (20, 256), "x0": (20, 256, 1),
    }  # fmt: skip
    # The clean images are as sure of their class as the last point was.
    at_end = np.exp(LINE.log_posterior(got.images.double().numpy(), [0]))
    tracked = got.log_posterior.double().exp().numpy()
    assert np.abs(tracked - at_end).mean() < 0.03
    assert at_end.mean() < 0.05  # 0.2 without guidance


def test_several_classes_and_what_is_refused():
    unwanted = [on_a_line([0]), on_a_line([2])]
    rule = DynamicNegativeGuidance(1.0, PathTracker(0.25))
    got = sample_second_order(on_a_line(None), unwanted, rule, **RUN)
    assert got.log_posterior.shape == (2, 256)
    left = LINE.log_posterior(got.images.double().numpy(), [1])
    assert np.exp(left).mean() > 0.8  # half without guidance
    with pytest.raises(ValueError, match="must have a path tracker"):
        sample_second_order(
            on_a_line(None), unwanted[:1], DynamicNegativeGuidance.tracked(1.0, 0.2), **RUN
        )
    sample_second_order(on_a_line(None), unwanted[:1], NegativePrompting(0.1), **RUN)


@pytest.mark.slow
def test_what_calibrates_the_path_tracker_is_what_draws_with_it(materials):
    """Two points of a path each, so that the fit is soon done."""
    config = materials.resolved(
        Config(
            forget=("0",), rule="dng", tracker="path", hyperparameters="calibrated", eta=0.0,
            solver="dpm++2m", steps=3, num_images=2, batch_size=64,
        )
    )  # fmt: skip
    with pytest.raises(FileNotFoundError, match="make it with: .* --tracker path"):
        materials.rule(config)
    shipped = materials.folder.path / "shipped" / "calibration" / "0-path.json"
    shipped.parent.mkdir(parents=True)
    shipped.touch()
    networks = materials.folder.networks
    for each in networks.iterdir():
        (shipped.parents[1] / each.name).symlink_to(each)
    materials.folder = replace(materials.folder, shipped=shipped.parents[1])
    path = _calibrate(config, materials, 1, 2, progress=False, most=64)
    assert shipped.read_bytes() == b""
    assert path == materials.folder.path / "calibration" / "0-path.json"
    fitted = Calibration.load(path)
    assert fitted.kinds == ("path",) and fitted.about["num_images"] == 64
    tracker = materials.rule(config).posterior
    assert isinstance(tracker, PathTracker) and tracker.compare == "base"
    assert tracker.temperature == fitted.tracker("path").temperature
    assert materials.sources(config)["calibration"]
    assert generate(replace(config, batch_size=2), materials).images.shape == (2, 1, 8, 8)


@pytest.mark.slow
def test_a_setting_is_drawn_with_it(materials):
    config = materials.resolved(
        Config(
            forget=("0",), rule="dng", tracker="path", hyperparameters="own", temperature=1e-3,
            eta=0.0, solver="dpm++2m", steps=4, num_images=4, batch_size=4,
        )
    )  # fmt: skip
    two, one = (
        generate(each, materials) for each in (config, replace(config, solver="first-order"))
    )
    assert two.images.shape == one.images.shape == (4, 1, 8, 8)
    assert not torch.equal(two.images, one.images)
    kept = trajectories(config, materials, [0, 2])
    assert kept["x"].shape == (4, 2, 1, 8, 8) and kept["log_posterior"].shape == (4, 2)
    torch.testing.assert_close(kept["scale"].mean(0), two.mean_scale[[0, 2]].float())
