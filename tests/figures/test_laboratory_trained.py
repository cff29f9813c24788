"""The figure of trained networks beside exact predictions: its measures, tables and picture."""

from __future__ import annotations

import matplotlib.image
import numpy as np
import pytest
import torch

from dng_math import PaperTracker
from dng_models.text_to_image.laboratory import networks as laboratory_networks
from dng_models.text_to_image.laboratory.prompts import LABORATORY
from dng_models.text_to_image.laboratory.standard import laboratory_world
from figures import laboratory_trained, style
from figures.laboratory_trained import Data, _Networks
from tests.helpers.statistical import assert_proportion

PROMPTS = LABORATORY[-2:]


def data() -> Data:
    """Random numbers in the place of measured ones."""
    rng = np.random.default_rng(0)
    levels, steps, prompts = laboratory_trained.PRECISION, laboratory_trained.STEPS, 2
    return Data(
        names=("one", "two"),
        time=np.linspace(1.0, 0.05, levels),
        wrong=rng.random((3, levels)),
        chain_time=np.linspace(1.0, 0.0, steps + 1),
        log_loss=rng.random((3, prompts, steps + 1)),
        exact_loss=rng.random((prompts, levels)),
        temperature=rng.random((prompts, 2)),
        offset=rng.random(prompts),
        left=rng.random((3, 2, prompts)),
        cells=rng.random((3, 2, prompts)),
        images=rng.random((3, 2, prompts)),
        before=rng.random((2, prompts)),
        n=16,
    )


def test_the_figure_and_its_tables_show_the_data(tmp_path):
    shown = data()
    (figure,) = laboratory_trained.draw(shown).values()
    style.save(figure, tmp_path / "figure.png")
    assert matplotlib.image.imread(tmp_path / "figure.png").shape[1] == style.WIDTH * style.DPI
    errors, losses, left, changed = figure.axes
    for line, values in zip(errors.lines, shown.wrong, strict=True):
        np.testing.assert_array_equal(line.get_ydata(), values)
    for line, values in zip(losses.lines[1:], shown.log_loss.mean(1), strict=True):
        np.testing.assert_array_equal(line.get_ydata(), values)
    for panel, values in ((left, shown.left), (changed, shown.images)):
        heights = [[bar.get_height() for bar in bars] for bars in panel.containers]
        np.testing.assert_allclose(heights, values.mean(-1))
    text = laboratory_trained.summary(shown)
    assert f"| 1.00 | {' | '.join(f'{v:.3f}' for v in shown.wrong[:, 0])} |" in text
    for i, way in enumerate(laboratory_trained.WAYS):
        row = [values[i, 1].mean() for values in (shown.left, shown.cells, shown.images)]
        assert f"| {way.label} | 2 | {' | '.join(f'{v:.3f}' for v in row)} |" in text
    for place, name in enumerate(shown.names):
        assert f"| {name} | {shown.log_loss[0, place].mean():.3f} |" in text


def random_pipeline():
    """A pipeline of the laboratory's world that has learned nothing."""
    world = laboratory_world()
    tokenizer = laboratory_networks.trained_tokenizer(world)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        text = laboratory_networks.make_text_encoder(tokenizer, 16, 1)
        net = laboratory_networks.make_unet(world, 16, 16)
    return laboratory_networks.trained_pipeline(world, tokenizer, text.eval(), net.eval())


@pytest.fixture(scope="module")
def networks() -> _Networks:
    return _Networks(random_pipeline(), 64, 0)


@pytest.mark.slow
def test_exact_predictions_have_no_error_and_track_what_is_there(networks):
    """The same code with exact predictions in the network's place."""
    networks.trained = networks.exact
    try:
        _, wrong = networks.errors(PROMPTS[:1])
        exact, same = networks.evidence(PROMPTS[0])
    finally:
        del networks.trained
    assert wrong.max() == 0.0
    np.testing.assert_array_equal(exact.gap_sq, same.gap_sq)
    # By the end the pictures with the objects have all the evidence that there is, and no more.
    plain = PaperTracker(prior=PROMPTS[0].related_share)
    loss = laboratory_trained._loss(exact, plain)
    assert loss[0] == pytest.approx(
        -np.log(np.where(exact.forbidden, plain.prior, 1 - plain.prior)).mean(), rel=1e-6
    )
    assert loss[-1] < 0.5 * loss[0]


def test_the_labels_are_the_worlds_shares(networks):
    found = np.concatenate([networks.pictures(prompt, 5)[1] for prompt in LABORATORY])
    shares = [prompt.related_share for prompt in LABORATORY]
    assert np.ptp(shares) < 0.001  # so that the sum is binomial
    assert_proportion(int(found.sum()), len(found), float(np.mean(shares)))


@pytest.mark.slow
def test_the_command_draws_and_prints(tmp_path, capsys, monkeypatch):
    random_pipeline().save_pretrained(tmp_path / "pipe")
    monkeypatch.setattr(laboratory_trained, "IMAGES", (4, 4))
    laboratory_trained.main([str(tmp_path / "pipe"), "--quick", "--out", str(tmp_path)])
    assert (tmp_path / "laboratory_trained.png").is_file()
    told = capsys.readouterr().out
    assert "| exact predictions | 1 |" in told and "| trained network, calibrated | 2 |" in told


def test_a_folder_without_a_pipeline_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        laboratory_trained.main([str(tmp_path)])
    assert "must hold a finished pipeline" in capsys.readouterr().err
