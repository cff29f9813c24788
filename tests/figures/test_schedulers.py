"""The figure of diffusers' schedulers: that it is legible, and that what it says is in its data."""

from __future__ import annotations

import dataclasses
import itertools

import diffusers
import matplotlib
import matplotlib.image
import numpy as np
import pytest

from dng_models.support.style import RC
from figures import schedulers, style
from figures.__main__ import draw_figures
from tests.figures.test_figures import assert_logarithmic_axes_are_readable
from tests.helpers.tolerances import error

pytestmark = [
    # Computing it takes twenty seconds; the schedulers have tests of their own.
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        # diffusers' DEIS gives tensors to NumPy's functions.
        "ignore:__array_wrap__ must accept context:DeprecationWarning"
    ),
]


@pytest.fixture(scope="module")
def data() -> schedulers.Data:
    return schedulers.compute(quick=True)


@pytest.fixture(scope="module")
def figure(data):
    (figure,) = schedulers.draw(data).values()
    return figure


def group(data, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Errors and masses of a group's rows."""
    sizes = [len(rows) for rows in schedulers.GROUPS.values()]
    start = sum(sizes[:index])
    rows = slice(start, start + sizes[index])
    return data.error[rows], data.mass[rows]


def test_every_row_is_run(data):
    assert data.error.shape == data.mass.shape == data.correlation.shape
    assert data.error.shape == (len(schedulers.ROWS), 2, len(schedulers.QUICK_STEPS))
    for values in (data.error, data.mass, data.correlation):
        assert np.isfinite(values).all()
    names = [row.scheduler for row in schedulers.ROWS]
    for name in ("DDPMScheduler", "UniPCMultistepScheduler", "PosteriorFlowScheduler"):
        assert name in names


def test_the_groups_are_what_their_names_say(data):
    """Means over 256 images, whose standard errors are 0.006 and 0.02; at 50 steps."""
    (noisy, noisy_mass), (less, less_mass), (repaired, _) = (group(data, i) for i in range(3))
    assert noisy[..., -1].max() < 0.08 < 0.09 < less[..., -1].min()
    assert noisy_mass[..., -1].max() < 0.07 < less_mass[..., -1].mean()
    assert repaired[..., -1].max() < 0.1
    # DDPM and Euler ancestral are one sampler.
    np.testing.assert_allclose(noisy[0], noisy[1], atol=3e-3)


def test_the_prior_s_error_is_that_of_the_noisiest_latents(data):
    """Against the posterior written out, at 10,000 points: standard errors of the two 3e-4."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alpha = np.sqrt(np.prod(1.0 - betas))
    variance = alpha**2 * 0.25 + 1.0 - alpha**2
    x = np.sqrt(1.0 - alpha**2) * np.random.default_rng(7).normal(size=(10_000, 8))
    apart = ((x[:, None] - alpha * schedulers.MIXTURE.means) ** 2).sum(-1) / (2.0 * variance)
    posterior = np.exp(-apart)[:, 0] / np.exp(-apart).sum(1)
    assert abs(np.abs(posterior - 0.25).mean() - data.prior_error) < 2e-3


def test_the_schedulers_are_those_that_are_named():
    for row in schedulers.ROWS:
        scheduler = schedulers.scheduler_of(row)
        assert type(scheduler).__name__ == row.scheduler
        for name, value in row.options.items():
            assert scheduler.config[name] == value
        if not isinstance(scheduler, diffusers.FlowMatchEulerDiscreteScheduler):
            assert scheduler.config.timestep_spacing == "trailing"
            assert error(scheduler.config.beta_end, 0.012) < 1e-12


def test_it_is_written_at_print_quality(figure, tmp_path):
    path = tmp_path / "schedulers.png"
    style.save(figure, path)
    image = matplotlib.image.imread(path)
    assert image.shape[1] == round(style.WIDTH * style.DPI)
    assert 0.02 < (image[:, :, :3].min(axis=2) < 0.9).mean() < 0.6


def test_nothing_is_clipped_or_covered(figure):
    with matplotlib.rc_context(RC):
        figure.draw_without_rendering()
    page = figure.bbox
    labels = [axis.label for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)]
    titles = [axes._left_title for axes in figure.axes]
    names = [text for axes in figure.axes for text in axes.texts]
    assert len(names) == 2 * len(schedulers.NAMES)
    texts = [text for text in (*labels, *names, *titles) if text.get_text()]
    artists = [*texts, *figure.legends, figure._suptitle]
    for artist in artists:
        box = artist.get_window_extent()
        assert box.x0 >= page.x0 - 1 and box.x1 <= page.x1 + 1, artist
        assert box.y0 >= page.y0 - 1 and box.y1 <= page.y1 + 1, artist
    boxes = [text.get_window_extent() for text in (*names, *titles) if text.get_text()]
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other)
    (legend,) = figure.legends
    assert not any(legend.get_window_extent().overlaps(axes.bbox) for axes in figure.axes)
    assert_logarithmic_axes_are_readable(figure)


def curves(axes):
    """Of schedulers, not the lines to compare with."""
    return [line for line in axes.lines if line.get_marker() in ("o", "s")]


def test_every_scheduler_is_a_curve_inside_of_the_panels_of_its_group(figure, data):
    panels = np.reshape(figure.axes, (2, len(schedulers.GROUPS)))
    for line, values in zip(panels, (data.error, data.mass), strict=True):
        first = 0
        for axes, rows in zip(line, schedulers.GROUPS.values(), strict=True):
            part = values[first : first + len(rows), schedulers.DRAWN]
            first += len(rows)
            low, high = axes.get_ylim()
            assert low < part.min() and part.max() < high
            drawn = sorted(tuple(curve.get_ydata()) for curve in curves(axes))
            np.testing.assert_allclose(drawn, sorted(map(tuple, part)))


def test_the_names_beside_the_curves_are_those_of_the_rows():
    """Every scheduler of a group is named beside the curves of its start, but for variants."""
    short = {
        "DDPMScheduler": "DDPM",
        "DDIMScheduler": "DDIM",
        "EulerAncestralDiscreteScheduler": "Euler ancestral",
        "EulerDiscreteScheduler": "Euler",
        "DPMSolverMultistepScheduler": "DPM-Solver++",
        "UniPCMultistepScheduler": "UniPC",
        "DEISMultistepScheduler": "DEIS",
        "PosteriorFlowScheduler": "flow,\nposterior step",
        "FlowMatchEulerDiscreteScheduler": "flow Euler",
    }
    for group, rows in enumerate(schedulers.GROUPS.values()):
        for row in rows:
            assert short[row.scheduler] in schedulers.NAMES[group, row.pure]


def test_rows_that_are_not_run_are_left_out(data):
    holes = data.error.copy()
    holes[0, :, -1] = np.nan
    (figure,) = schedulers.draw(dataclasses.replace(data, error=holes)).values()
    lengths = sorted(len(curve.get_xdata()) for curve in curves(figure.axes[0]))
    assert lengths[0] == len(data.steps) - 1 and set(lengths[1:]) == {len(data.steps)}
    assert "nan" not in schedulers.summary(dataclasses.replace(data, error=holes))


def test_the_summary_is_the_table(data):
    text = schedulers.summary(data)
    assert text.count("\n") == 1 + len(schedulers.GROUPS) + 2 * len(schedulers.ROWS)
    for value in (data.error[3, 1, 0], data.mass[5, 0, 1], data.prior_error):
        assert f"{value:.4f}" in text
    assert "$" not in text and "\\" not in text


def test_without_diffusers_it_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr("figures.__main__.find_spec", lambda name: name != "diffusers" or None)
    with pytest.raises(ValueError, match="schedulers needs diffusers: pip install"):
        draw_figures(["schedulers"], out=tmp_path)
