"""The figures: that they are drawn and legible, and that what they claim is true of their data."""

from __future__ import annotations

import functools
import itertools
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure
from scipy import stats

from dng_math import DDIM, DynamicNegativeGuidance, LogOddsTracker, NoiseSchedule, sample
from dng_math.distances import ks_critical_value
from dng_models.support.style import RC
from figures import guidance_1d, score_fields, style, tracker_steps
from figures.__main__ import FIGURES, draw_figures, main
from tests.helpers.statistical import FALSE_ALARM, assert_mean_close
from tests.helpers.tolerances import SCORE, error

ROOT = Path(__file__).resolve().parents[2]
NAMES = (
    "guidance_1d",
    "update_geometry",
    "posterior_tracking",
    "score_fields",
    "tracker_steps",
    "path_tracker",
)


@functools.cache
def data(name: str):
    return FIGURES[name].compute(quick=True, seed=0)


@functools.cache
def drawn(name: str) -> dict[str, Figure]:
    return FIGURES[name].draw(data(name))


# ---------------------------------------------------------------------- drawing


@pytest.mark.parametrize("name", NAMES)
def test_a_figure_is_written_at_print_quality(name, tmp_path):
    for stem, figure in drawn(name).items():
        assert stem.startswith(name)
        path = tmp_path / f"{stem}.png"
        style.save(figure, path)
        image = matplotlib.image.imread(path)
        assert image.shape[1] == round(style.WIDTH * style.DPI)
        assert path.stat().st_size > 50_000
        ink = (image[:, :, :3].min(axis=2) < 0.9).mean()
        assert 0.02 < ink < 0.6


@pytest.mark.parametrize("name", NAMES)
def test_no_text_is_clipped_and_no_title_runs_into_another(name):
    for figure in drawn(name).values():
        with matplotlib.rc_context(RC):
            figure.draw_without_rendering()
        titles = [axes._left_title for axes in figure.axes if axes._left_title.get_text()]
        labels = [axis.label for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)]
        texts = [text for axes in figure.axes for text in axes.texts]
        artists = [*titles, *labels, *texts, *figure.legends, figure._suptitle]
        page = figure.bbox
        for artist in filter(None, artists):
            box = artist.get_window_extent()
            assert box.x0 >= page.x0 - 1 and box.x1 <= page.x1 + 1, artist
            assert box.y0 >= page.y0 - 1 and box.y1 <= page.y1 + 1, artist
        boxes = [title.get_window_extent() for title in titles]
        for one, other in itertools.combinations(boxes, 2):
            assert not one.overlaps(other)
        for legend in figure.legends:
            box = legend.get_window_extent()
            assert not any(box.overlaps(axes.bbox) for axes in figure.axes)


@pytest.mark.parametrize("name", NAMES)
def test_a_summary_is_text_with_finite_numbers(name):
    text = FIGURES[name].summary(data(name))
    assert any(character.isdigit() for character in text)
    assert "nan" not in text and "inf" not in text


def test_methods_differ_in_colour_and_also_without_it():
    methods = [value for value in vars(style).values() if isinstance(value, style.Method)]
    assert len(methods) == 9
    assert len({method.color for method in methods}) == len(methods)
    assert len({method.marker for method in methods}) == len(methods)


def labelled(axis) -> list[tuple[float, object]]:
    """The labelled ticks of an axis inside its limits, and their texts."""
    low, high = sorted(axis.get_view_interval())
    return [
        (tick.get_loc(), tick.label1)
        for tick in axis.get_major_ticks()
        if tick.label1.get_text() and low <= tick.get_loc() <= high
    ]


def assert_logarithmic_axes_are_readable(figure: Figure) -> None:
    """Three labels or more on each, none over another; what shares its ticks is labelled once."""
    with matplotlib.rc_context(RC):
        figure.draw_without_rendering()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            if axis.get_scale() not in ("log", "symlog") or not axis.get_visible():
                continue
            ticks = labelled(axis)
            assert len(ticks) >= 3, (axes.get_title("left"), axis)
            shown = [text for _, text in ticks if text.get_visible()]
            boxes = [text.get_window_extent() for text in shown]
            assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2)), axis


@pytest.mark.parametrize("name", NAMES)
def test_values_can_be_read_on_logarithmic_axes(name):
    for figure in drawn(name).values():
        assert_logarithmic_axes_are_readable(figure)


def test_the_style_does_not_leak():
    before = dict(matplotlib.rcParams)
    FIGURES["update_geometry"].draw(data("update_geometry"))
    assert dict(matplotlib.rcParams) == before


def test_the_same_seed_gives_the_same_file_and_another_seed_another(tmp_path):
    module = FIGURES["update_geometry"]
    files = []
    for i, seed in enumerate((0, 0, 1)):
        (figure,) = module.draw(module.compute(quick=True, seed=seed)).values()
        path = tmp_path / f"{i}.svg"
        style.save(figure, path)
        files.append(path.read_bytes())
    assert files[0] == files[1] != files[2]


# ---------------------------------------------------------------------- the command


def test_both_formats_are_written(tmp_path, capsys):
    arguments = ["update_geometry", "--quick", "--out", str(tmp_path), "--format", "png", "svg"]
    assert main(arguments) == 0
    assert {path.name for path in tmp_path.iterdir()} == {
        "update_geometry.png",
        "update_geometry.svg",
    }
    assert ElementTree.parse(tmp_path / "update_geometry.svg").getroot().tag.endswith("svg")
    assert capsys.readouterr().out.startswith("update_geometry [")


def test_an_unknown_figure_is_refused_before_anything_is_drawn(tmp_path, capsys):
    message = "figure must be one of guidance_1d, .*; got 'guidance_3d'"
    with pytest.raises(ValueError, match=message):
        draw_figures(["update_geometry", "guidance_3d"], out=tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with pytest.raises(SystemExit) as exit_:
        main(["guidance_3d"])
    assert exit_.value.code == 2
    assert "got 'guidance_3d'" in capsys.readouterr().err


def test_the_command_says_where_its_files_went(tmp_path, capsys):
    arguments = ["--quick", "--out", str(tmp_path), "--format", "png", "svg"]
    assert main(["update_geometry", *arguments]) == 0
    told = capsys.readouterr()
    files = [str(tmp_path / f"update_geometry.{suffix}") for suffix in ("png", "svg")]
    assert told.out.splitlines()[-1] == f"written to {', '.join(files)}"
    # A log says what it is at.
    assert told.err.splitlines()[0] == "drawing update_geometry, 1 of 1"


def test_a_figure_that_takes_minutes_says_so_in_a_terminal_too(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(FIGURES["update_geometry"], "MINUTES", 7, raising=False)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert main(["update_geometry", "--out", str(tmp_path)]) == 0
    assert "drawing update_geometry, 1 of 1: about 7 minutes on two idle" in capsys.readouterr().err
    assert main(["update_geometry", "--quick", "--out", str(tmp_path)]) == 0
    assert "minutes" not in capsys.readouterr().err  # which is for the full figure


@pytest.mark.slow
def test_quiet_is_quiet(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("dng_models.support.progress.FIRST_LINE", 0.0)
    assert main(["guidance_1d", "--quick", "--out", str(tmp_path)]) == 0
    assert "guidance_1d: 1/" in capsys.readouterr().err  # progress inside of a figure
    assert main(["guidance_1d", "--quick", "--quiet", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().err == ""


def test_a_folder_that_cannot_be_written_to_is_known_before_anything_is_drawn(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(FIGURES["update_geometry"], "compute", None)
    (tmp_path / "file").write_text("")
    assert main(["update_geometry", "--out", str(tmp_path / "file" / "out")]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert str(tmp_path / "file" / "out") in line and "cannot be written to" in line


def test_a_disk_that_is_full_is_one_line_with_the_file(tmp_path, capsys, monkeypatch):
    def full(figure, path, **options):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    assert main(["update_geometry", "--quick", "--quiet", "--out", str(tmp_path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert str(tmp_path / "update_geometry.png") in line and "No space left" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", ["matplotlib", "sklearn"])
def test_without_a_package_the_command_names_the_cure(package):
    code = f"import runpy, sys; sys.modules[{package!r}] = None\n"
    code += "sys.argv = ['figures']; runpy.run_module('figures', run_name='__main__')"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2
    (line,) = run.stderr.splitlines()
    assert package in line and "pip install 'dng-toolkit[figures]'" in line


def test_a_figure_whose_packages_are_missing_is_left_out(tmp_path, capsys, monkeypatch):
    cheap = ("update_geometry", "class_removal_networks")
    monkeypatch.setattr("figures.__main__.FIGURES", {name: FIGURES[name] for name in cheap})
    monkeypatch.setattr("figures.__main__.find_spec", lambda name: name != "diffusers" or None)
    written = draw_figures(out=tmp_path, quick=True)
    assert [path.name for path in written] == ["update_geometry.png"]
    assert "left out: class_removal_networks needs diffusers" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"needs diffusers: pip install 'dng-toolkit\[models\]'"):
        draw_figures(["class_removal_networks"], out=tmp_path)


def test_an_unknown_format_is_refused(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--format", "gif"])
    assert exit_.value.code == 2
    assert "gif" in capsys.readouterr().err


def test_the_list_names_every_figure():
    run = subprocess.run(
        [sys.executable, "-m", "figures", "--list"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    lines = run.stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(FIGURES)
    for line, module in zip(lines, FIGURES.values(), strict=True):
        assert module.PAPER in line and module.TITLE in line
        assert line.endswith(" minutes]") == hasattr(module, "MINUTES")


# ---------------------------------------------------------------------- what they claim


def panel(color: str):
    return next(p for p in data("guidance_1d").panels if p.method.color == color)


def test_exact_dng_and_its_equal_reach_the_target_and_the_others_do_not():
    """Kolmogorov-Smirnov at a false-alarm rate of 1e-6, for each of the four samples."""
    critical = ks_critical_value(data("guidance_1d").n, FALSE_ALARM)
    assert data("guidance_1d").ks_critical == critical
    for method in (style.CFG, style.DNG_EXACT):
        assert panel(method.color).ks < critical, method.label
    for method in (style.UNGUIDED, style.NP):
        assert panel(method.color).ks > critical, method.label


def test_at_scale_one_cfg_towards_what_is_allowed_is_exact_dng():
    """As in the paper, where all have lambda = 1: the chains amplify rounding by 1e3 at most."""
    assert [getattr(rule, "guidance_scale", 1.0) for _, _, rule in guidance_1d.METHODS] == [1.0] * 4
    difference = np.abs(panel(style.CFG.color).samples - panel(style.DNG_EXACT.color).samples).max()
    assert data("guidance_1d").cfg_minus_dng == difference < 1e-9
    np.testing.assert_allclose(
        panel(style.CFG.color).lines, panel(style.DNG_EXACT.color).lines, rtol=0, atol=1e-9
    )


def test_the_distances_of_guidance_1d_are_those_of_its_samples():
    """SciPy's statistic against the target's distribution function, written out."""
    allowed = np.delete(guidance_1d.MEANS, guidance_1d.FORBIDDEN)

    def cdf(x):
        z = (np.asarray(x)[:, None] - allowed) / guidance_1d.DEVIATION
        return stats.norm.cdf(z).mean(axis=1)

    for shown in data("guidance_1d").panels:
        assert error(shown.ks, stats.kstest(shown.samples, cdf).statistic) < 1e-9


def test_forbidden_mass_is_the_prior_unguided_and_gone_with_exact_dng():
    """Empirical Bernstein at a false-alarm rate of 1e-6."""
    shown = panel(style.UNGUIDED.color)
    mixture = guidance_1d.MIXTURE
    posterior = np.exp(mixture.log_posterior(shown.samples[:, None], [guidance_1d.FORBIDDEN]))
    assert_mean_close(posterior, 0.25, bounds=(0.0, 1.0))
    assert panel(style.DNG_EXACT.color).forbidden_mass < 1e-4


def test_negative_prompting_empties_modes_that_nobody_forbade():
    """Allowed modes hold a quarter each without guidance; what NP leaves there is counted."""

    def share(method, mean):
        near = np.abs(panel(method.color).samples - mean) < 4 * guidance_1d.DEVIATION
        return near.mean()

    allowed = np.delete(guidance_1d.MEANS, guidance_1d.FORBIDDEN)
    assert min(share(style.UNGUIDED, mean) for mean in allowed) > 0.2
    assert max(share(style.NP, mean) for mean in allowed) < 0.01
    assert min(share(style.DNG_EXACT, mean) for mean in allowed) > 0.3


def test_the_lines_share_their_start_and_dng_turns_those_that_head_for_the_forbidden_mode():
    shown = data("guidance_1d")
    heading = shown.heads_for_forbidden
    assert 1 <= heading.sum() < len(heading)
    for each in shown.panels:
        np.testing.assert_array_equal(each.lines[0], shown.panels[0].lines[0])
    mean = guidance_1d.MEANS[guidance_1d.FORBIDDEN]
    assert (np.abs(panel(style.UNGUIDED.color).lines[-1, heading] - mean) < 1.0).all()
    assert (np.abs(panel(style.DNG_EXACT.color).lines[-1] - mean) > 1.0).all()


def test_the_images_show_all_particles():
    for each in data("guidance_1d").panels:
        mass = each.density.sum(axis=1) * guidance_1d.BIN
        assert mass.min() > 0.9999 and mass.max() < 1.0001


def test_the_image_without_guidance_is_the_density_of_the_chain():
    """Bin by bin, at 1e-6 in all (the normal tail of a binomial count, where it is not small)."""
    shown = data("guidance_1d")
    samples = panel(style.UNGUIDED.color).samples
    expected = panel(style.UNGUIDED.color).density[-1] * guidance_1d.BIN * shown.n
    counts = np.histogram(samples, shown.edges)[0]
    large = expected > 50
    z = (counts - expected)[large] / np.sqrt(expected[large])
    # Discretisation and the bins' own width may each shift a count by one deviation.
    assert large.sum() > 40
    assert np.abs(z).max() < stats.norm.isf(FALSE_ALARM / 2 / large.sum()) + 2


def test_the_boundaries_are_those_of_the_nearer_mean():
    shown = data("update_geometry")
    points = np.stack(np.meshgrid(*shown.grid), axis=-1)

    def distance_sq(mean):
        return np.sum((points - mean) ** 2, axis=-1)

    to_forbidden = distance_sq(shown.mean_forbidden)
    for grid, other in ((shown.paper_grid, shown.mean), (shown.log_odds_grid, shown.mean_rest)):
        nearer = distance_sq(other) - to_forbidden
        clear = np.abs(nearer) > 1e-9
        np.testing.assert_array_equal(grid[clear] > 0, nearer[clear] > 0)


def test_the_base_mean_lies_between_the_forbidden_one_and_the_rest():
    shown = data("update_geometry")
    p = shown.posterior
    between = p * shown.mean_forbidden + (1 - p) * shown.mean_rest
    assert error(shown.mean, between) < 1e-12


def test_the_log_odds_update_is_nearer_to_the_exact_one():
    shown = data("update_geometry")
    assert (np.abs(shown.log_odds - shown.exact) < np.abs(shown.paper - shown.exact)).all()
    probable = np.exp(
        -0.5
        * np.sum((np.stack(np.meshgrid(*shown.grid), axis=-1) - shown.mean) ** 2, axis=-1)
        / shown.deviation**2
    )

    def mean_error(grid):
        return np.average(np.abs(grid - shown.exact_grid), weights=probable)

    assert mean_error(shown.log_odds_grid) < 0.8 * mean_error(shown.paper_grid)


def test_the_examples_rise_disagree_and_fall():
    shown = data("update_geometry")
    np.testing.assert_array_equal(np.sign(shown.paper), [1, -1, -1])
    np.testing.assert_array_equal(np.sign(shown.log_odds), [1, 1, -1])
    np.testing.assert_array_equal(np.sign(shown.exact), [1, 1, -1])


def test_the_log_odds_tracker_leaves_less_of_the_forbidden_mode():
    """Given their sum the two counts are Binomial(1/2) if the trackers leave the same: 1e-6.

    That is for independent samples; these share their noise, which makes them more alike.
    """
    paper, log_odds = data("posterior_tracking").panels
    counts = [int((each.samples < -2.0).sum()) for each in (paper, log_odds)]
    assert stats.binom.cdf(counts[1], sum(counts), 0.5) < FALSE_ALARM
    for each, count in zip((paper, log_odds), counts, strict=True):
        assert abs(each.forbidden_mass - count / len(each.samples)) < 1e-3
        assert each.forbidden_mass < 0.02


def test_the_tracked_posterior_follows_the_exact_one():
    shown = data("posterior_tracking")
    lines = shown.exact.shape[1] // 2
    assert (shown.exact[-1, :lines] < 0.5).all() and (shown.exact[-1, lines:] >= 0.5).all()
    for each in shown.panels:
        np.testing.assert_allclose(each.tracked[0], 0.25, rtol=1e-12)
        assert 0 < each.error < 0.03
        assert np.abs(each.tracked - shown.exact).mean() < 0.03


def test_dng_is_guidance_towards_all_that_is_kept():
    """s - g o (s_c - s) = s + g (s_r - s), written with the scores of the kept modes."""
    shown = data("score_fields")
    schedule = NoiseSchedule.linear(score_fields.STEPS)
    step = score_fields.STEP
    noisy = score_fields.MIXTURE.diffuse(schedule.alpha[step], schedule.sigma[step])
    points = shown.points.reshape(-1, 2)
    kept = noisy.restrict([0, 1]).score(points).reshape(shown.score.shape)
    expected = shown.score + score_fields.SCALE * (kept - shown.score)
    assert error(shown.fields[2].total, expected) < 10 * SCORE


def test_the_unguided_score_is_shown_once():
    (figure,) = drawn("score_fields").values()
    titles = [axes._left_title.get_text() for axes in figure.axes]
    assert sum("unguided" in title for title in titles) == 1
    assert sum(bool(title) for title in titles) == 1 + 2 * len(score_fields.RULES)


def test_negative_prompting_pushes_kept_modes_and_dng_does_not():
    shown = data("score_fields")
    _, negative, dynamic = (np.linalg.norm(f.guidance, axis=-1) for f in shown.fields)
    for mean in shown.means[:2]:
        near = np.linalg.norm(shown.points - mean, axis=-1) < 0.3
        assert near.sum() >= 2
        assert negative[near].min() > 1.0
        assert dynamic[near].max() < 0.01 * negative[near].min()
    at_forbidden = np.linalg.norm(shown.points - shown.means[2], axis=-1) < 0.3
    assert negative[at_forbidden].max() < 1.0 < dynamic[at_forbidden].min()


def test_the_colours_cover_every_arrow():
    shown = data("score_fields")
    for vectors in (shown.score, *(f.total for f in shown.fields)):
        assert np.linalg.norm(vectors, axis=-1).max() < score_fields.HIGHEST


def tracked(values, eta: float, posterior: int):
    """(place, steps) of a tracker: 0 paper's, 1 log-odds; with divergence 2 and 3; exact 4."""
    return values[:, tracker_steps.ETAS.index(eta), posterior]


@pytest.mark.parametrize("tracker", [0, 1])
def test_without_noise_more_steps_do_not_help_but_the_divergence_does(tracker):
    """Means of 1000 values in [0, 1]; the factors are far outside what chance explains."""
    shown = data("tracker_steps")
    many, few = shown.steps.index(1000), shown.steps.index(50)
    for values in (shown.error, shown.mass):
        plain = tracked(values, 0.0, tracker)
        assert (plain[:, many] > 0.7 * plain[:, few]).all()
    plain = tracked(shown.error, 0.0, tracker)
    corrected = tracked(shown.error, 0.0, tracker + 2)
    assert (plain[:, many] > 5 * corrected[:, many]).all()


@pytest.mark.parametrize("tracker", [0, 1])
def test_with_noise_more_steps_help(tracker):
    shown = data("tracker_steps")
    values = tracked(shown.error, 1.0, tracker)
    assert (values[:, shown.steps.index(1000)] < 0.5 * values[:, shown.steps.index(50)]).all()


def test_an_inner_mode_is_harder_to_track_in_few_steps():
    shown = data("tracker_steps")
    outer, inner = shown.error[:, 0, :2, shown.steps.index(50)]
    assert (inner > 1.5 * outer).all()


def test_the_exact_posterior_leaves_nothing():
    shown = data("tracker_steps")
    enough = np.array(shown.steps) >= 50
    assert shown.mass[:, :, 4][..., enough].max() < 1e-3
    assert (shown.mass[:, :, :2, enough].mean(axis=(0, 1, 3)) > 0.01).all()


def test_the_correction_is_nil_for_a_ddpm_step():
    """Which is why the figure does not run those chains."""
    schedule = NoiseSchedule.linear(1000).respace(20)
    ends = [
        sample(
            tracker_steps.MIXTURE,
            schedule,
            DynamicNegativeGuidance(1.0, LogOddsTracker(divergence=divergence)),
            n=100,
            forbidden=[0],
            sampler=DDIM(1.0),
        ).log_posterior
        for divergence in (False, True)
    ]
    np.testing.assert_allclose(*ends, rtol=1e-12)


def test_what_a_deterministic_chain_keeps_is_the_error_of_the_prior():
    """With no signal left at T the corrected log-odds tracker loses nearly all of its error."""
    shown = data("tracker_steps")
    outer = list(tracker_steps.PLACES).index("outer")
    kept = tracked(shown.error, 0.0, 3)[outer, shown.steps.index(1000)]
    assert kept > shown.prior_error[outer]
    forbidden = [tracker_steps.PLACES["outer"]]
    result = sample(
        tracker_steps.MIXTURE,
        NoiseSchedule.cosine(1000),
        DynamicNegativeGuidance(0.0, LogOddsTracker(divergence=True)),
        n=shown.n,
        forbidden=forbidden,
        sampler=DDIM(0.0),
    )
    exact = np.exp(tracker_steps.MIXTURE.log_posterior(result.x, forbidden))
    assert np.abs(np.exp(result.log_posterior[0]) - exact).mean() < 0.25 * kept


def test_what_is_drawn_without_torch_is_drawn_where_torch_is_not_installed():
    """``make figures`` installs no torch; a module that imported it stopped all figures."""
    program = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
from figures.__main__ import FIGURES, main
module = FIGURES["path_tracker"]
module.draw(module.compute(quick=True, seed=0))
sys.exit(main(["--list"]))
"""
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert "path_tracker" in run.stdout
