"""The experiment with its default model, the laboratory: what it draws, counts and says."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dng_math import DynamicNegativeGuidance
from dng_math.distances import binomial_interval
from dng_models import estimate_prior
from dng_models.pipelines.tiny import tiny_stable_diffusion
from dng_models.text_to_image import compare, dry_run, pipelines, priors, store
from dng_models.text_to_image.__main__ import main
from dng_models.text_to_image.config import JUDGE, PAPER_MODEL, TINY, Config, Point
from dng_models.text_to_image.generation import Materials, generate, measure
from dng_models.text_to_image.laboratory import choices
from dng_models.text_to_image.laboratory.judge import Judge
from dng_models.text_to_image.laboratory.judge_scores import JudgeScores
from dng_models.text_to_image.laboratory.pipelines import laboratory_pipeline
from dng_models.text_to_image.laboratory.prompts import LABORATORY
from dng_models.text_to_image.laboratory.standard import laboratory_world
from dng_models.text_to_image.priors import Prior
from dng_models.text_to_image.prompts import PAPER, Prompt
from dng_models.text_to_image.store import RunFolder

ROOT = Path(__file__).resolve().parents[3]
BREAKFAST = LABORATORY[-1]
FEW = ("--only", BREAKFAST.name, "--device", "cpu", "--quiet", "--num-images", "6", "--steps", "8")
RULES = ("np", "dng", "dng-empty", "dng-bare", "ideal")


# ---------------------------------------------------------------------- settings


def test_without_a_word_the_laboratory_is_asked_for_everything():
    config = Config()
    assert config.prompts == LABORATORY and config.clip == JUDGE
    assert {"np", "dng", "dng-empty", "dng-bare", "dng-log-odds", "sld", "ideal"} == set(
        config.rules
    )
    assert all(config.texts(point) for point in config.points())


def test_other_models_do_what_the_paper_did():
    config = Config(model="somewhere")
    assert config.prompts == PAPER and config.rules == ("np", "dng")
    point = Point(PAPER[0], "dng", "related", 27.0)
    assert config.texts(point) == (PAPER[0].prompt, ("Chalices, candles",))
    assert config.hyperparameters(point) == {
        **{"prior": 0.01, "temperature": 0.2, "offset": 0.004},
        "tracker": "paper",
    }
    assert config.scales_of("dng", PAPER[0])[-1] == 27.0


@pytest.mark.parametrize(
    ("rule", "texts", "reference", "prior", "scale"),
    [
        ("dng", ("an english breakfast, with egg, sausage",), "positive", 0.7, 2.0),
        ("dng-empty", ("egg, sausage",), "unconditional", 0.7, 2.0),
        ("dng-bare", ("egg, sausage",), "positive", 0.25, 6.0),
        ("dng-path", ("an english breakfast, with egg, sausage",), "positive", 0.7, 2.0),
    ],
)
def test_forms_of_a_negative(rule, texts, reference, prior, scale):
    config = Config(rules=(rule,))
    point = Point(BREAKFAST, rule, "related", 1.0)
    assert config.texts(point) == ("an english breakfast", texts)
    assert config.reference_of(point) == reference
    found = config.hyperparameters(point)
    assert found["prior"] == prior and found.get("offset_nats", 0.0) == 3.0 * (rule == "dng-bare")
    assert config.rule(point).posterior.prior == prior
    assert config.scales_of(rule, BREAKFAST)[-1] == scale


def test_the_ideal_is_a_caption():
    config = Config()
    point = Point(BREAKFAST, "ideal", "related", 1.0)
    assert config.texts(point) == ("an english breakfast without egg, sausage", ())
    assert config.scales_of("ideal", BREAKFAST) == (1.0,)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": "x", "rules": ("ideal",)}, "rules must be without 'ideal' for the prompt 'medi"),
        ({"model": "x", "rules": ("dng-empty",)}, "prior must be 'measured' for 'dng-empty'"),
        (
            {"model": "x", "negative_template": "{positive} {negative}"},
            "prior must be 'measured' for 'dng' with negative_template .* or the prompt 'medieval",
        ),
        ({"model": "x", "rules": ("dng-path",)}, "offset of the prompt 'medieval feast' must be 0"),
        ({"prior": "measured", "detector": "none"}, "detector must not be 'none' where prior is"),
        ({"negative_template": "without"}, "negative_template must be a text with {negative}"),
    ],
)
def test_what_a_rule_lacks_is_said(given, message):
    with pytest.raises(ValueError, match=message):
        Config(**given)


def test_folders_of_before_there_was_a_choice_can_be_added_to():
    from dng_models.text_to_image.config import check_same

    config = Config(model=PAPER_MODEL)
    before = json.loads(json.dumps(config.to_json()))
    for name in ("negative_template", "prior"):
        del before["settings"][name]
    for fields in before["prompts"].values():
        for name in ("offset_nats", "related_share", "unrelated_share", "composed_scale"):
            del fields[name]
    check_same(config, before, Path("run"))
    other = dataclasses.replace(config, negative_template="no {negative}")
    with pytest.raises(ValueError, match="negative_template was '{negative}' and is"):
        check_same(other, before, Path("run"))


# ---------------------------------------------------------------------- a run


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> tuple[RunFolder, str]:
    """A small run of the command, and what it printed."""
    out = tmp_path_factory.mktemp("laboratory")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dng_models.support.style.DPI", 30)
        printed: list[str] = []
        patch.setattr("builtins.print", lambda *told, **_: printed.extend(map(str, told)))
        assert main(["run", "--out", str(out), *FEW, "--rules", *RULES]) == 0
    return RunFolder(out), "\n".join(printed)


def opened(folder: RunFolder, record: dict, name: str = "file") -> Image.Image:
    return Image.open(folder.path / record[name]).convert("RGB")


def test_every_method_is_drawn_with_both_negatives(ran):
    folder, _ = ran
    found = store.read_table(folder)
    points = {(r["rule"], r["kind"], r["guidance_scale"]) for r in found}
    assert len(points) == 1 + 2 * (4 * 2 + 1) and len(found) == 6 * len(points)
    assert {(r["rule"], *r["negative_prompts"]) for r in found if r["kind"] == "related"} == {
        ("np", "an english breakfast, with egg, sausage"),
        ("dng", "an english breakfast, with egg, sausage"),
        ("dng-empty", "egg, sausage"),
        ("dng-bare", "egg, sausage"),
        ("ideal",),
    }


def test_records_say_what_the_judge_sees(ran):
    """Looked at anew, image by image."""
    folder, _ = ran
    judge = Judge(laboratory_world())
    for record in store.read_table(folder)[::7]:
        now = judge.look([np.asarray(opened(folder, record))])
        before = judge.look([np.asarray(opened(folder, record, "unguided"))])
        changed = now.changed(before)[0]
        assert record["seen"]["changed"] == changed.tolist()
        assert record["clip_cosine"] == pytest.approx(1.0 - changed.mean(), abs=1e-6)
        names = ("blank", *judge.world.objects)
        assert record["seen"]["cells"] == [names[cell] for cell in now.cells[0]]
        for concept, probability in record["presence"].items():
            assert (probability > 0.5) == now.has(concept)[0]


def test_the_truth_is_counted_from_the_images(ran):
    folder, printed = ran
    judge = Judge(laboratory_world())
    found = store.read_table(folder)
    truths = {(one.rule, one.guidance_scale): one for one in compare.truths(found)}
    for kind, rule, scale in (("related", "np", 1.0), ("unrelated", "np", 1.0)):
        group = [
            r for r in found if (r["rule"], r["kind"], r["guidance_scale"]) == (rule, kind, scale)
        ]
        now = judge.look([np.asarray(opened(folder, r)) for r in group])
        before = judge.look([np.asarray(opened(folder, r, "unguided")) for r in group])
        objects = BREAKFAST.negative(kind).split(", ")
        free = ~before.shows(*objects)
        changed = now.changed(before) & free
        truth = truths[rule, scale]
        if kind == "related":
            assert truth.still_there.value == pytest.approx(now.has(*objects).mean())
            assert truth.before.value == pytest.approx(before.has(*objects).mean())
            assert truth.others_changed == pytest.approx(changed.sum() / free.sum())
        else:
            assert truth.cells_changed == pytest.approx(changed.sum() / free.sum())
            assert truth.images_changed.value == pytest.approx(changed.any(1).mean())
            low, high = binomial_interval(int(changed.any(1).sum()), len(group))
            assert truth.images_changed[1:] == pytest.approx((low, high))
    assert truths["ideal", 1.0].still_there.value == 0.0
    assert truths["none", 0.0].cells_changed == 0.0
    assert "| ideal |  | 0.000 [" in printed and "What the laboratory's judge sees" in printed
    assert "the paper, Stable Diffusion 2" not in printed


def test_figures_and_tables_are_there(ran):
    folder, _ = ran
    names = {path.name for path in folder.figures.iterdir()}
    assert {
        *("similarities.png", "detections.png", "scales_dng.png", "scales_dng-empty.png"),
        *("grid_english-breakfast_related.png", "grid_english-breakfast_unrelated.png"),
    } <= names
    assert any(name.startswith("trajectories_english-breakfast_seed-") for name in names)
    assert not any("ideal" in name for name in names)
    text = (folder.path / "table.md").read_text()
    assert "related share" in text and "| 0.7 | 0.012 | 2 |" in text


def test_more_rules_than_a_few_have_a_row_each(ran):
    folder, printed = ran
    assert "| method | Q: english breakfast | Q: average | mean gap | ratio |" in printed
    from dng_models.text_to_image import plot

    figure = plot.grid(store.read_table(folder), BREAKFAST.name, "related", folder.path, columns=3)
    assert len(figure.axes) == 3 * (1 + len(RULES))  # each at its largest scale
    followed = plot._followed(store.read_table(folder), BREAKFAST.name)
    assert {record["rule"] for record in followed} == {"none", "np", "dng", "ideal"}


def test_frames_say_what_the_judge_saw():
    from dng_models.support.style import BLUE, VERMILLION
    from dng_models.text_to_image.plot import _frame

    seen = {
        "before": ["egg", "blank", "bread", "blank"],
        "changed": [True, False, False, False],
        "ghosts": [False] * 4,
    }
    record = {"presence": {"egg": 0.0}, "seen": seen}
    assert _frame(record, ("egg",)) is None  # only the unwanted changed
    assert _frame({**record, "presence": {"egg": 1.0}}, ("egg",)) == VERMILLION
    other = {**seen, "changed": [False, True, False, False]}
    assert _frame({**record, "seen": other}, ("egg",)) == BLUE
    ghost = {**seen, "ghosts": [False, False, False, True]}
    assert _frame({**record, "seen": ghost}, ("egg",)) == BLUE


def test_a_second_run_has_nothing_to_do(ran, monkeypatch):
    folder, _ = ran
    before = folder.table.read_bytes()
    monkeypatch.setattr(pipelines, "draw", None)
    config = Config(prompts=(BREAKFAST,), rules=RULES, num_images=6, steps=8)
    materials = Materials(folder, device="cpu")
    generate(config, materials, progress=False)
    measure(config, materials, progress=False)
    assert folder.table.read_bytes() == before


def test_clip_measures_the_laboratorys_images_too(ran, tmp_path):
    """The same measures as of any model; the judge's are then left out."""
    config = Config(
        prompts=(BREAKFAST,), rules=("np",), fractions=(1.0,), num_images=2, steps=2, clip=TINY
    )
    materials = Materials(RunFolder(tmp_path), device="cpu")
    generate(config, materials, progress=False)
    measure(config, materials, progress=False)
    found = store.read_table(materials.folder)
    assert all("seen" not in r and 0.0 < r["clip_cosine"] <= 1.0 + 1e-6 for r in found)
    assert compare.truths(found) == [] and not compare.by_the_judge(found)


def test_similarity_is_the_share_of_cells_that_stayed():
    scores, world = JudgeScores(), laboratory_world()
    model = scores.judge.model
    one = model.sample("a dinner table", 12, generator=0).latents
    other = one.clone()
    other[::2, :, 0, 0] = model.sample("a holiday", 6, generator=1).latents[:, :, 0, 0]
    a, b = (scores.judge.look(each) for each in (one, other))
    cosines = np.sum(scores.embeddings(a) * scores.embeddings(b), axis=1)
    np.testing.assert_allclose(cosines, 1.0 - a.changed(b).mean(1), atol=1e-12)
    assert cosines.min() < 1.0 and world.cells == 4
    np.testing.assert_allclose(np.linalg.norm(scores.embeddings(a), axis=1), 1.0)


# ---------------------------------------------------------------------- priors


def test_priors_are_counted_in_unguided_images_and_kept(tmp_path):
    config = Config(
        prompts=(dataclasses.replace(BREAKFAST, related_share=None, unrelated_share=None),),
        **{"rules": ("dng", "dng-bare"), "fractions": (1.0,), "num_images": 5, "steps": 6},
        prior="measured",
    )
    materials = Materials(RunFolder(tmp_path), device="cpu")
    generate(config, materials, progress=False)
    known = priors.read(materials.folder.priors)[BREAKFAST.name]
    found = store.read_table(materials.folder)
    unguided = [r for r in found if r["rule"] == "none"]
    counted = sum(compare.any_found(r, ("egg", "sausage")) for r in unguided)
    assert known["related"] == Prior(counted, 5)
    for record in found:
        if record["rule"] == "dng":
            assert record["hyperparameters"]["prior"] == known[record["kind"]].value
        if record["rule"] == "dng-bare":
            assert record["hyperparameters"]["prior"] == 0.25
    # More images do not change what guided ones depend on, and nothing is drawn again.
    before = {r["file"]: r["sha256"] for r in found}
    more = dataclasses.replace(config, num_images=7)
    generate(more, materials, progress=False)
    assert priors.read(materials.folder.priors)[BREAKFAST.name] == known
    after = {r["file"]: r["sha256"] for r in store.read_table(materials.folder)}
    assert len(after) == 7 * 5 and before.items() <= after.items()
    assert "5 [" in priors.table({BREAKFAST.name: known}, [BREAKFAST.name])


def test_a_damaged_file_of_priors_is_named(tmp_path):
    path = tmp_path / "priors.json"
    priors.write(path, {"a": {"related": Prior(1, 3), "unrelated": Prior(0, 3)}})
    assert priors.read(path)["a"]["related"] == Prior(1, 3)
    path.write_text('{"a": {"related": {"found": 5, "images": 3}}}')
    with pytest.raises(ValueError, match="does not hold the priors of a run: remove it"):
        priors.read(path)
    assert priors.read(tmp_path / "none.json") == {}
    assert priors.table({}, ["a"]) == ""


def test_a_measured_prior_for_any_model(tmp_path):
    """A composed negative and a measured prior, with the networks that stand for real ones."""
    out = tmp_path / "out"
    (tmp_path / "mine.json").write_text(
        json.dumps([{"name": "tea", "prompt": "a tea.", "related": "cup", "unrelated": "car"}])
    )
    arguments = ["generate", "--tiny", "--quiet", "--device", "cpu", "--out", str(out)]
    arguments += ["--prompts", str(tmp_path / "mine.json"), "--rules", "dng"]
    arguments += ["--relative-scales", "1", "--num-images", "2", "--steps", "2"]
    arguments += ["--negative-template", "{positive} with a {negative}", "--prior", "measured"]
    assert main(arguments) == 0
    found = store.read_table(RunFolder(out))
    assert [r["negative_prompts"] for r in found if r["kind"] == "related"] == [
        ["a tea with a cup"]
    ] * 2
    known = priors.read(out / "priors.json")["tea"]
    assert {r["hyperparameters"]["prior"] for r in found if r["kind"] == "related"} == {
        known["related"].value
    }


def test_estimate_prior_counts_with_the_judge():
    pipe = laboratory_pipeline()
    call = {"num_inference_steps": 10, "guidance_scale": 1.0}
    prior = estimate_prior(
        pipe, BREAKFAST.prompt, BREAKFAST.related, images=10, batch_size=4, **call
    )
    images = pipe(
        [BREAKFAST.prompt] * 10,
        generator=[torch.Generator().manual_seed(i) for i in range(10)],
        **call,
    ).images
    judged = Judge(laboratory_world()).look([np.asarray(image) for image in images])
    assert prior == Prior(int(judged.has("egg", "sausage").sum()), 10)
    assert prior.interval == pytest.approx(binomial_interval(prior.found, 10))
    assert 0.0 < Prior(0, 64).value < 0.01
    # Trackers take it, even where the unwanted is everywhere.
    assert DynamicNegativeGuidance.tracked(1.0, Prior(64, 64).value).posterior.prior == 0.98


def test_estimate_prior_takes_a_detector_and_names_what_is_wrong():
    pipe = tiny_stable_diffusion()
    pipe.set_progress_bar_config(disable=True)

    def second(images, concepts):
        found = np.zeros((len(images), len(concepts)))
        found[1:, 1] = 0.5
        return found

    call = {"num_inference_steps": 1, "images": 4, "batch_size": 2}
    assert estimate_prior(pipe, "a", "egg, ham", detector=second, **call) == Prior(2, 4)
    with pytest.raises(ValueError, match="detector must be given for a pipeline that is not the"):
        estimate_prior(pipe, "a", "egg", **call)
    with pytest.raises(ValueError, match=r"probabilities of shape \(2, 1\), got \(2,\)"):
        estimate_prior(pipe, "a", "egg", detector=lambda i, c: np.zeros(len(i)), **call)
    with pytest.raises(ValueError, match="negative must name at least one concept, got ', '"):
        estimate_prior(pipe, "a", ", ", detector=second, **call)
    with pytest.raises(ValueError, match="images must be an integer >= 1, got 0"):
        estimate_prior(pipe, "a", "b", detector=second, images=0)
    with pytest.raises(ValueError, match="found must be an integer from 0 to 3, got 4"):
        Prior(4, 3)


# ---------------------------------------------------------------------- a dry run


@pytest.mark.parametrize("rule", ["none", "np", "dng", "dng-empty", "perp-neg", "ideal"])
@pytest.mark.parametrize("cfg_scale", [None, 2.0])
def test_evaluations_are_the_networks_rows(rule, cfg_scale):
    """Counted in the network; a begun call sees more, in its first step."""
    rules = ("np",) if rule == "none" else (rule,)
    config = Config(rules=rules, steps=3, cfg_scale=cfg_scale)
    pipe = laboratory_pipeline()
    rows: list[tuple[int, float]] = []
    forward = pipe.unet.forward

    def counted(sample, timestep, *args, **given):
        rows.append((len(sample), float(timestep)))
        return forward(sample, timestep, *args, **given)

    pipe.unet.forward = counted
    kind = "none" if rule == "none" else "related"
    point = Point(BREAKFAST, rule, kind, 0.0 if rule == "none" else 1.0)
    pipelines.draw(pipe, config, point, [0, 1])
    last = min(t for _, t in rows)
    assert sum(n for n, t in rows if t == last) == 2 * dry_run.rows(config, point)


def test_a_dry_run_says_much_and_draws_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pipelines, "draw", None)
    out = tmp_path / "out"
    assert main(["run", "--dry-run", "--device", "cpu", "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert "laboratory: StableDiffusionPipeline" in told and "trackers can follow it" in told
    assert f"{135 * 48:,}: 135 points" in told and "minutes on one core" in told
    assert not out.exists()


def test_a_dry_run_of_a_folder_finds_what_would_go_wrong(tmp_path, capsys):
    tiny_stable_diffusion().save_pretrained(tmp_path / "model")
    arguments = ["run", "--model", str(tmp_path / "model"), "--clip", "tiny", "--dry-run"]
    arguments += ["--device", "cpu", "--scheduler", "own"]
    with pytest.warns(UserWarning, match="of more than 77 tokens are cut"):
        assert main([*arguments, "--out", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    assert "DDIMScheduler" in told and "TOO LITTLE NOISE for paper trackers" in told
    assert "CUT at 77 tokens: 'A grand medieval feast" in told
    assert re.search(r"about \S+ hours of an H100, from SD 1.5's 0.05728 s", told)
    assert "2,720: 85 points" in told


def test_expected_times_are_the_measured_ones():
    with (ROOT / "benchmarks" / "results" / "overhead_h100.csv").open(encoding="utf-8") as file:
        rows = [
            row
            for row in csv.DictReader(file)
            if (row["contender"], row["mode"], row["batch"])
            == ("network", "plain", str(dry_run.BATCH))
        ]
    assert {(r["network"], int(r["parameters"]), float(r["median_s"])) for r in rows} == {
        (each.name, each.parameters, each.seconds) for each in dry_run.H100
    }


# ---------------------------------------------------------------------- choices


def test_needed_priors_are_those_of_the_exact_model():
    """The ratio at which an image with the unwanted ends, from the model's own densities."""
    scores = JudgeScores()
    model = scores.judge.model
    x = model.sample("an english breakfast with egg", 4).latents.double()
    exact = type(model)(model.world, dtype=torch.float64)
    at = (x, 1.0, 0.0)
    bare = exact.log_prob(*at, "egg, sausage") - exact.log_prob(*at, BREAKFAST.prompt)
    empty = exact.log_prob(*at, "egg, sausage") - exact.log_prob(*at, "")
    both = "an english breakfast, with egg, sausage"
    composed = exact.log_prob(*at, both) - exact.log_prob(*at, BREAKFAST.prompt)
    for ratio, prior in ((bare, 1.093), (empty, 0.182), (composed, 0.700)):
        np.testing.assert_allclose(np.exp(-ratio.numpy()), prior, atol=6e-4)
    line = next(line for line in choices.needed_priors().splitlines() if "| egg, sausage |" in line)
    assert line == "| english breakfast | egg, sausage | 0.700 | 1.093 | 4.69 | 0.182 |"


def test_a_row_of_choices_is_what_is_drawn():
    laboratory = choices.Laboratory(6, (BREAKFAST,))

    def rule(prompt: Prompt, kind: str):
        return DynamicNegativeGuidance.tracked(1.0, prompt.share(kind))

    setting = choices.Setting(("a",), rule, steps=8)
    left, others, cells, images = laboratory.measure(setting)
    before = laboratory.unguided(BREAKFAST, setting)
    after, posterior = laboratory.draw(BREAKFAST, "related", setting)
    assert left == after.has("egg", "sausage").mean() < before.has("egg", "sausage").mean()
    assert 0.0 <= others < 1.0 and cells <= images
    assert posterior.shape == (6,)
    text = choices.measured_table(laboratory, "name", [setting], tracking=True)
    assert text.splitlines()[2].startswith(f"| a | {left:.3f} | {others:.3f} |")
    assert len(text.splitlines()[2].split("|")) == 2 + 7
