"""Drawing and measuring with the tiny pipeline: images, resuming, processes, loading.

What is tested is the order of things and what is written, not the images, which are noise.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from transformers import CLIPModel

from dng_models.pipelines.tiny import (
    tiny_clip,
    tiny_ddpm,
    tiny_stable_diffusion,
    tiny_stable_diffusion_3,
    tiny_stable_diffusion_xl,
)
from dng_models.support import files
from dng_models.text_to_image import generation as generating
from dng_models.text_to_image import pipelines, scores, store
from dng_models.text_to_image.config import METHODS, PAPER_MODEL, RULES, TINY, Config, Point
from dng_models.text_to_image.generation import Materials, generate, measure
from dng_models.text_to_image.prompts import PAPER
from dng_models.text_to_image.store import RunFolder

ROOT = Path(__file__).resolve().parents[3]
DINNER = PAPER[1]
# With what every rule needs: shares, and no offset that belongs to the paper's variance.
COMPLETE = dataclasses.replace(DINNER, offset=0.0, related_share=0.5, unrelated_share=0.1)
CONFIG = Config(model=TINY, clip=TINY, prompts=(DINNER,), fractions=(1.0,), num_images=3, steps=3)
POINTS = CONFIG.points()
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def quiet() -> None:
    """The tiny tokenizer reads bytes, and every prompt of the paper is cut."""
    pipelines.quiet()


@pytest.fixture(scope="module")
def pipe():
    return pipelines.load_pipeline(CONFIG, CPU)


@pytest.fixture(scope="module")
def clip():
    return scores.load_clip(TINY)


@pytest.fixture
def materials(tmp_path, pipe, clip) -> Materials:
    return fresh(tmp_path, pipe, clip)


def fresh(path, pipe, clip) -> Materials:
    """Of a new process, which has loaded what another test has."""
    materials = Materials(RunFolder(path), device="cpu", batch_size=2)
    materials._pipe, materials._clips[TINY] = pipe, clip
    return materials


def run(materials: Materials, config: Config = CONFIG) -> None:
    generate(config, materials, progress=False)
    measure(config, materials, progress=False)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, pipe, clip) -> dict[str, bytes]:
    """What a run leaves that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run(fresh(folder, pipe, clip))
    return contents(folder)


def lines(found: dict[str, bytes]) -> list[dict]:
    return [json.loads(line) for line in found["images.jsonl"].splitlines()]


def pixels(pipe, point: Point, images, config: Config = CONFIG):
    drawn = pipelines.draw(pipe, config, point, images)
    return np.array([each.pixels for each in drawn], dtype=np.int64)


def plain(pipe, **given) -> np.ndarray:
    """Images 0 and 1 of the pipeline itself."""
    found = pipe(
        [DINNER.prompt] * 2,
        num_inference_steps=CONFIG.steps,
        generator=[torch.Generator().manual_seed(seed) for seed in (0, 1)],
        output_type="pt",
        **given,
    ).images
    return pipelines._pixels(found).astype(np.int64)


# ---------------------------------------------------------------------- images


def test_a_line_says_everything(undisturbed):
    found = lines(undisturbed)
    assert len(found) == 3 * (1 + 2 * 2)
    assert [store.order(each) for each in found] == sorted(store.order(each) for each in found)
    by = {(r["rule"], r["kind"], r["guidance_scale"], r["image"]): r for r in found}
    assert len(by) == len(found)
    dng = by["dng", "related", 12.0, 2]
    assert dng["negative"] == "Flowers, wine glasses" and dng["seed"] == 2
    assert dng["hyperparameters"] == {
        **{"prior": 0.01, "temperature": 0.3, "offset": 0.003},
        "tracker": "paper",
    }
    assert len(dng["scale"]) == len(dng["log_posterior"]) == len(dng["time"]) == 3
    prior = math.exp(dng["log_posterior"][0])
    assert prior == pytest.approx(0.01, rel=1e-5)  # six digits are written
    assert dng["scale"][0] == pytest.approx(12.0 * prior / (1.0 - prior), rel=1e-5)
    assert (dng["evaluations"], dng["evaluations_saved"]) == (3, 0)
    assert dng["presence"].keys() == {"Flowers", "wine glasses", "A person wearing sunglasses"}
    assert 0.0 < dng["clip_cosine"] < 1.0
    np_line = by["np", "unrelated", 1.7, 0]
    assert np_line["scale"] == [1.7] * 3 and np_line["log_posterior"] is None
    unguided = by["none", "none", 0.0, 0]
    assert (unguided["clip_cosine"], unguided["negative"], unguided["scale"]) == (
        1.0,
        None,
        [0] * 3,
    )
    for record in found:
        assert f"{record['file']}" in undisturbed and record["finite"]
        picture = undisturbed[record["file"]]
        assert picture.startswith(b"\x89PNG")
    settings = json.loads(undisturbed["run.json"])
    assert settings["settings"]["model"] == TINY and settings["prompts"].keys() == {DINNER.name}
    assert {"torch", "diffusers", "transformers", "dng"} <= settings["versions"][0].keys()


def test_the_first_image_is_followed_through_time(undisturbed):
    followed = [record for record in lines(undisturbed) if "path" in record]
    assert {(r["rule"], r["kind"], r["guidance_scale"], r["image"]) for r in followed} == {
        ("none", "none", 0.0, 0),
        *(("np", kind, 1.7, 0) for kind in ("related", "unrelated")),
        *(("dng", kind, 12.0, 0) for kind in ("related", "unrelated")),
    }
    assert sum(name.startswith("paths/") for name in undisturbed) == len(followed)
    names = {
        f"{r['rule']} {r['kind']} {r['guidance_scale']:g}": r["path"]["file"] for r in followed
    }
    assert names["none none 0"] == "paths/dinner-table/unguided/seed-0.png"
    assert names["dng related 12"] == "paths/dinner-table/dng-related-12/seed-0.png"
    config = dataclasses.replace(CONFIG, fractions=(0.5, 1.0))
    kept = [point.guidance_scale for point in generating._followed(config, {})]
    assert kept == [0.0, 1.7, 1.7, 12.0, 12.0]
    for record in followed:
        assert record["path"]["time"][-1] == 0.0 and len(record["path"]["time"]) == 3


def test_the_way_through_time_ends_in_the_image(pipe):
    """The decoder has the same latents; to one of 255 levels, for it sees a smaller batch."""
    for model in (pipe, small(tiny_stable_diffusion_3()), small(tiny_stable_diffusion_xl())):
        other, drawn = pipelines.draw(model, CONFIG, POINTS[-1], [0, 1], followed=[1, 7])
        assert other.strip is None and other.strip_time is None
        last = drawn.strip[:, -drawn.pixels.shape[1] :]
        assert np.abs(last.astype(int) - drawn.pixels.astype(int)).max() <= 1


class Seen:
    """A detector that finds the first related concept in images whose mean is what it was told."""

    name = "seen"

    def __init__(self, means) -> None:
        self.means = means

    def __call__(self, images, concepts):
        found = np.zeros((len(images), len(concepts)))
        for row, image in enumerate(images):
            found[row, 0] = float(np.asarray(image).mean() in self.means)
        return found


def test_what_would_be_forbidden_is_followed_once_it_is_known(materials, undisturbed, tmp_path):
    """The ways of the first image that the detector found something in, beside those of image 0."""
    run(materials)
    folder = materials.folder
    holds = [
        np.asarray(Image.open(folder.image(POINTS[0], i)).convert("RGB")).mean() for i in (1, 2)
    ]
    measure(CONFIG, materials, detector=Seen(holds), progress=False)
    before = contents(folder.path)
    # A measurement that was stopped before it came to the first one says nothing yet.
    known = {record["file"]: record for record in lines(before)}
    assert generating._followed(CONFIG, known)[POINTS[0]] == {0, 1}
    del known[store.image_name(POINTS[0], 1)]["measured_by"]
    assert generating._followed(CONFIG, known)[POINTS[0]] == {0}
    generate(CONFIG, materials, progress=False)
    after = contents(folder.path)
    ways = {f"{part}/seed-{i}.png" for i in (0, 1) for part in WAYS}
    assert {name for name in after if name.startswith("paths/")} == ways
    assert {n: v for n, v in after.items() if n in before and n != "images.jsonl"} == {
        n: v for n, v in before.items() if n != "images.jsonl"
    }
    for old, new in zip(lines(before), lines(after), strict=True):
        followed = new["image"] == 1 and new["guidance_scale"] in (0.0, 1.7, 12.0)
        assert ("path" in new) == (followed or "path" in old)
        assert new | {"path": 0} == old | {"path": 0}  # measurements stay
        if followed:
            last = np.asarray(Image.open(folder.path / new["path"]["file"]))
            image = np.asarray(Image.open(folder.path / new["file"]))
            last = last[:, -image.shape[1] :].astype(int)
            assert np.abs(last - image).max() <= 1
    # And again: nothing is left to be done.
    generate(CONFIG, materials, progress=False)
    assert contents(folder.path) == after


WAYS = [f"paths/{point.key}" for point in POINTS]


def small(pipe):
    """A tiny pipeline with the scheduler of a run."""
    pipelines.set_scheduler(pipe, "auto")
    return pipe


@pytest.mark.parametrize("rule", ["none", "np", "dng"])
def test_the_seed_decides_the_image(pipe, rule):
    """Whatever else is in the batch: to one of 255 levels, for networks round by batch."""
    (point,) = [p for p in POINTS if (p.rule, p.kind) in {(rule, "none"), (rule, "related")}][-1:]
    together = pixels(pipe, point, [0, 1, 2])
    alone = pixels(pipe, point, [2])
    assert np.abs(together[2] - alone[0]).max() <= 1
    assert np.abs(together[2] - together[1]).max() > 20
    shifted = pixels(pipe, point, [0], dataclasses.replace(CONFIG, seed=2))
    assert np.abs(shifted[0] - alone[0]).max() <= 1


def test_unguided_is_the_plain_pipeline(pipe):
    np.testing.assert_allclose(
        pixels(pipe, POINTS[0], [0, 1]), plain(pipe, guidance_scale=1.0), atol=1
    )
    config = dataclasses.replace(CONFIG, cfg_scale=4.0)
    np.testing.assert_allclose(
        pixels(pipe, POINTS[0], [0, 1], config), plain(pipe, guidance_scale=4.0), atol=1
    )


def test_negative_prompting_is_the_pipelines_own_with_one_more(pipe):
    """p - g (n - p) = n + (1 + g) (p - n)."""
    point = next(p for p in POINTS if (p.rule, p.kind, p.guidance_scale) == ("np", "related", 1.7))
    own = plain(pipe, negative_prompt=[DINNER.related] * 2, guidance_scale=2.7)
    np.testing.assert_allclose(pixels(pipe, point, [0, 1]), own, atol=1)
    assert np.abs(own - plain(pipe, guidance_scale=1.0)).max() > 5


@pytest.mark.parametrize(
    ("rule", "cfg_scale"),
    [
        *((rule, 3.0 if METHODS[rule].from_empty else None) for rule in RULES if rule != "ideal"),
        *(("dng", 3.0), ("dng-empty", 3.0), ("perp-neg", 3.0), ("nag", 3.0)),
    ],
)
@pytest.mark.thinned(2)
def test_every_rule_draws(pipe, rule, cfg_scale):
    config = dataclasses.replace(CONFIG, prompts=(COMPLETE,), rules=(rule,), cfg_scale=cfg_scale)
    unguided = pixels(pipe, POINTS[0], [0], config)
    point = Point(COMPLETE, rule, "related", 4.0)
    # Of three steps every one asks: everything is held from the first on.
    ask = (lambda images, step: [config.concepts(point)] * len(images)) if rule == "ask" else None
    (drawn,) = pipelines.draw(pipe, config, point, [0], ask=ask)
    # Of a rule of attention, only a gate takes the negative's prediction.
    each = 0 if rule in ("nag", "vsf") else len(config.concepts(point))
    assert drawn.finite and drawn.evaluations == 3 * each
    tracks = rule.startswith("dng") or rule == "nag-gated"
    assert (drawn.log_posterior is not None) == tracks
    assert len(drawn.questions) == (3 if rule == "ask" else 0)
    # Not much where the posterior is small, but something.
    strong = dataclasses.replace(point, guidance_scale=400.0)
    (pushed,) = pipelines.draw(pipe, config, strong, [0], ask=ask)
    # Three steps are within the warm-up of the lower levels of SLD.
    waits = rule in ("sld-weak", "sld-medium", "sld-strong")
    assert (np.abs(pushed.pixels.astype(float) - unguided).max() > 0) != waits


def test_perp_neg_without_a_push_is_the_unguided_image(pipe):
    """Its base is another one, the unconditional prediction; the positive prompt is put back."""
    for cfg_scale in (None, 3.0):
        config = dataclasses.replace(CONFIG, rules=("perp-neg",), cfg_scale=cfg_scale)
        found = pixels(pipe, Point(DINNER, "perp-neg", "related", 1e-9), [0, 1], config)
        np.testing.assert_allclose(found, pixels(pipe, POINTS[0], [0, 1], config), atol=1)


def test_concepts_that_are_split_have_a_posterior_each(pipe):
    config = dataclasses.replace(CONFIG, rules=("dng",), split_negatives=True)
    for kind, count in (("related", 2), ("unrelated", 1)):
        (drawn,) = pipelines.draw(pipe, config, Point(DINNER, "dng", kind, 5.0), [1])
        assert drawn.log_posterior.shape == (count, 3) and drawn.evaluations == 3 * count
        np.testing.assert_allclose(drawn.log_posterior[:, 0], math.log(0.01), rtol=1e-6)


def test_an_interval_leaves_the_rest_unguided(pipe):
    config = dataclasses.replace(CONFIG, t_lo=0.3, t_hi=0.6)
    (drawn,) = pipelines.draw(pipe, config, POINTS[1], [0])
    inside = (drawn.time >= 0.3) & (drawn.time <= 0.6)
    assert 0 < inside.sum() < 3
    np.testing.assert_array_equal(drawn.scale[inside], np.float32(POINTS[1].guidance_scale))
    np.testing.assert_array_equal(drawn.scale[~inside], 0.0)


def test_size_of_the_images(pipe):
    config = dataclasses.replace(CONFIG, height=24, width=32)
    assert pixels(pipe, POINTS[1], [0], config).shape == (1, 24, 32, 3)


def test_an_image_that_is_no_number_is_black_and_says_so(materials):
    config = dataclasses.replace(
        CONFIG, rules=("np",), guidance_scales=(1e30,), num_images=1, steps=1
    )
    run(materials, config)
    found = [r for r in store.read_table(materials.folder) if r["rule"] == "np"]
    assert [record["finite"] for record in found] == [False, False]
    for record in found:
        assert math.isfinite(record["clip_cosine"])


# ---------------------------------------------------------------------- pipelines


@pytest.mark.parametrize("make", [tiny_stable_diffusion_xl, tiny_stable_diffusion_3])
def test_other_pipelines_draw(make):
    pipe = small(make())
    config = dataclasses.replace(CONFIG, cfg_scale=2.0)
    together = pixels(pipe, POINTS[-1], [0, 1], config)
    assert np.abs(together[1] - pixels(pipe, POINTS[-1], [1], config)[0]).max() <= 1
    (drawn,) = pipelines.draw(pipe, config, POINTS[-1], [0])
    assert drawn.finite and drawn.log_posterior.shape == (3,)


@pytest.mark.parametrize(
    ("make", "name", "expected"),
    [
        (tiny_stable_diffusion, "auto", "DDPMScheduler"),
        (tiny_stable_diffusion, "ddpm", "DDPMScheduler"),
        (tiny_stable_diffusion, "ddim", "EtaDDIMScheduler"),
        (tiny_stable_diffusion, "euler-ancestral", "EulerAncestralDiscreteScheduler"),
        (tiny_stable_diffusion, "sde-dpm++", "DPMSolverMultistepScheduler"),
        (tiny_stable_diffusion, "own", "DDIMScheduler"),
        (tiny_stable_diffusion_3, "auto", "PosteriorFlowScheduler"),
        (tiny_stable_diffusion_3, "flow", "PosteriorFlowScheduler"),
    ],
)
def test_schedulers_by_name(make, name, expected):
    pipe = make()
    before = pipe.scheduler.config
    pipelines.set_scheduler(pipe, name)
    assert type(pipe.scheduler).__name__ == expected
    assert not pipe.scheduler.config.get("clip_sample", False)
    for kept in ("beta_end", "steps_offset", "shift", "num_train_timesteps"):
        assert pipe.scheduler.config.get(kept) == before.get(kept)


def test_schedulers_of_another_kind_are_refused():
    with pytest.raises(ValueError, match="scheduler must be flow, auto or own .*got 'ddpm'"):
        pipelines.set_scheduler(tiny_stable_diffusion_3(), "ddpm")
    with pytest.raises(ValueError, match="scheduler must be ddpm, .*DDIMScheduler; got 'flow'"):
        pipelines.set_scheduler(tiny_stable_diffusion(), "flow")


def test_a_saved_pipeline_and_a_saved_clip_are_loaded(tmp_path, materials):
    saved = tmp_path / "pipeline"
    tiny_stable_diffusion(5).save_pretrained(saved)
    for part in tiny_clip(3):
        part.save_pretrained(tmp_path / "clip")
    config = dataclasses.replace(
        CONFIG, model=str(saved), clip=str(tmp_path / "clip"), num_images=1
    )
    own = Materials(RunFolder(tmp_path / "out"), device="cpu")
    with pytest.warns(UserWarning, match="of more than 77 tokens are cut, of the prompts dinner"):
        run(own, config)
    found = store.read_table(own.folder)
    assert len(found) == len(POINTS) and all("clip_cosine" in record for record in found)
    expected = tiny_stable_diffusion(5)
    pipelines.set_scheduler(expected, "auto")
    drawn = pixels(expected, POINTS[0], [0], config)
    with Image.open(own.folder.image(POINTS[0], 0)) as picture:
        np.testing.assert_array_equal(np.asarray(picture), drawn[0])


def test_a_folder_without_a_pipeline_is_named(tmp_path):
    config = dataclasses.replace(CONFIG, model=str(tmp_path))
    with pytest.raises(FileNotFoundError, match=f"there is no diffusers pipeline in {tmp_path}"):
        pipelines.load_pipeline(config, CPU)
    with pytest.raises(FileNotFoundError, match=f"there is no CLIP model in {tmp_path}"):
        scores.load_clip(str(tmp_path))


def test_a_pipeline_without_prompts_is_refused(tmp_path):
    tiny_ddpm().save_pretrained(tmp_path / "ddpm")
    config = dataclasses.replace(CONFIG, model=str(tmp_path / "ddpm"))
    with pytest.raises(ValueError, match="must be a text-to-image pipeline .*is a DDPMPipeline"):
        pipelines.load_pipeline(config, CPU)


def test_weights_that_are_not_here_say_what_to_download(monkeypatch):
    """As of a machine without a network and without a cache."""

    def missing(name, **options):
        raise OSError(f"Cannot load model {name}")

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", missing)
    monkeypatch.setattr(CLIPModel, "from_pretrained", missing)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", missing)
    with pytest.raises(FileNotFoundError) as error:
        pipelines.load_pipeline(Config(model=PAPER_MODEL), CPU)
    for part in (
        "'stabilityai/stable-diffusion-2' is not on this machine",
        "'hf download stabilityai/stable-diffusion-2'",
        "'hf download openai/clip-vit-large-patch14'",
        "huggingface-cli download",
        "--model DIR",
        "--clip DIR",
        "leave --model out",
    ):
        assert part in str(error.value)
    with pytest.raises(FileNotFoundError, match="'hf download some/clip' .*--clip DIR"):
        scores.load_clip("some/clip")


# ---------------------------------------------------------------------- resuming


class Stopped(Exception):
    """Stands for whatever ends a process."""


def stopped_at(monkeypatch, target, name: str, call: int, after: bool) -> None:
    """Make a function end the process at one of its calls, before or after its work."""
    work, calls = getattr(target, name), []

    def stopping(*args, **kwargs):
        calls.append(name)
        if len(calls) == call and not after:
            raise Stopped
        result = work(*args, **kwargs)
        if len(calls) == call:
            raise Stopped
        return result

    monkeypatch.setattr(target, name, stopping)


def test_nothing_is_drawn_or_measured_twice(materials, undisturbed, monkeypatch):
    run(materials)
    assert contents(materials.folder.path) == undisturbed
    monkeypatch.setattr(pipelines, "draw", None)
    monkeypatch.setattr(generating, "_measure", None)
    monkeypatch.setattr(pipelines, "load_pipeline", None)
    run(Materials(materials.folder, device="cpu"))
    assert contents(materials.folder.path) == undisturbed


@pytest.mark.parametrize(
    ("target", "name", "call", "after"),
    [
        (pipelines, "draw", 2, False),
        pytest.param(store, "append", 7, True, marks=pytest.mark.slow),
        (store, "append", 20, True),  # one of a measurement
        pytest.param(files, "write_atomically", 2, False, marks=pytest.mark.slow),  # first image
        (store, "write_table", 2, True),
        pytest.param(store, "write_table", 3, False, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_was_stopped_anywhere_leaves_the_same_files(
    materials, undisturbed, target, name, call, after
):
    with pytest.MonkeyPatch.context() as patch:
        stopped_at(patch, target, name, call, after)
        with pytest.raises(Stopped):
            run(materials)
    run(materials)
    assert contents(materials.folder.path) == undisturbed


def test_only_what_is_missing_is_written_again(materials, undisturbed, monkeypatch):
    """A torn line, an image that is cut short and one that is gone."""
    run(materials)
    folder, point = materials.folder, POINTS[3]
    folder.image(point, 0).unlink()
    cut = folder.image(POINTS[2], 2)
    cut.write_bytes(cut.read_bytes()[:50])
    folder.lines_of(5).parent.mkdir()
    folder.lines_of(5).write_bytes(undisturbed["images.jsonl"].splitlines()[0][:-9])
    drawn = []
    draw = pipelines.draw

    def noted(pipe, config, point, images, **options):
        drawn.append((point.key, images))
        return draw(pipe, config, point, images, **options)

    monkeypatch.setattr(pipelines, "draw", noted)
    untouched = folder.image(point, 1).stat().st_mtime_ns
    run(materials)
    assert drawn == [(POINTS[2].key, (2,)), (point.key, (0, 1))]
    assert contents(folder.path) == undisturbed
    # It was in the batch that was drawn again.
    assert folder.image(point, 1).stat().st_mtime_ns == untouched


@pytest.mark.parametrize(
    "lost",
    [
        "guided",
        "strip",
        *(
            pytest.param(each, marks=pytest.mark.slow)
            for each in ("unguided", "cut", "unguided line")
        ),
    ],
)
def test_an_image_that_is_lost_is_said_and_drawn_again_by_what_is_said(
    materials, undisturbed, lost
):
    """``score`` dropped its line, and ``table`` then sent to ``score`` for ever."""
    run(materials)
    folder = materials.folder
    name = store.image_name(POINTS[0 if "unguided" in lost else 3], 0)
    if lost == "strip":
        (folder.path / store.strip_name(POINTS[3], 0)).unlink()
    elif lost == "cut":
        (folder.path / name).write_bytes(undisturbed[name][:60])
    elif lost == "unguided line":
        kept = [record for record in lines(contents(folder.path)) if record["file"] != name]
        store.write_table(folder, kept)
    else:
        (folder.path / name).unlink()
    before = folder.table.read_bytes()
    for _ in range(2):  # and again: nothing is dropped
        with pytest.raises(FileNotFoundError) as error:
            measure(CONFIG, materials, progress=False)
        assert name in str(error.value)
        assert f"text_to_image generate --out {folder.path}'" in str(error.value)
        assert folder.table.read_bytes().count(b"\n") == before.count(b"\n")
    run(materials)
    assert contents(folder.path) == undisturbed


def test_drawing_others_does_not_forget_what_is_lost(materials):
    run(materials)
    lost = store.image_name(POINTS[3], 2)
    (materials.folder.path / lost).unlink()
    fewer = dataclasses.replace(CONFIG, num_images=2)
    generate(fewer, materials, progress=False)
    with pytest.raises(FileNotFoundError, match=f"{lost} must be as"):
        measure(fewer, materials, progress=False)
    generate(CONFIG, materials, progress=False)
    measure(CONFIG, materials, progress=False)


def test_a_second_run_in_a_folder_is_refused(materials):
    refused = []

    def second():
        for work in (generate, measure):
            try:
                work(CONFIG, materials, progress=False)
            except BlockingIOError as error:
                refused.append(str(error))

    with files.only_writer(materials.folder.path):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert len(refused) == 2
    assert all("is being written to by process" in line for line in refused)
    assert contents(materials.folder.path) == {}


def test_what_a_killed_run_left_goes(materials, undisturbed):
    for name in ("images/a/.000000.png.abcd1234.part", ".images.jsonl.abcd1234.part"):
        path = materials.folder.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half")
    run(materials)
    assert contents(materials.folder.path) == undisturbed


def test_more_of_everything_can_be_added(materials, undisturbed):
    less = dataclasses.replace(CONFIG, rules=("np",), num_images=2)
    run(materials, less)
    assert len(store.read_table(materials.folder)) == 2 * 3
    run(materials)
    assert contents(materials.folder.path) == undisturbed


def test_other_settings_are_refused_before_anything_is_loaded(materials, undisturbed):
    run(materials)
    other = Materials(materials.folder, device="cpu")
    with pytest.raises(ValueError, match="made with other settings .steps was 3 and is 4.: use an"):
        generate(dataclasses.replace(CONFIG, steps=4), other, progress=False)
    changed = dataclasses.replace(DINNER, unrelated="A car")
    with pytest.raises(ValueError, match="unrelated was 'A person .*' and is 'A car'"):
        generate(dataclasses.replace(CONFIG, prompts=(changed,)), other, progress=False)
    assert other._pipe is None and contents(materials.folder.path) == undisturbed


# ---------------------------------------------------------------------- measuring


def test_similarity_is_the_cosine_of_the_image_embeddings(materials, clip):
    """Against transformers' own, of one image at a time; the rest is float32's rounding."""
    run(materials, dataclasses.replace(CONFIG, num_images=2))
    for record in store.read_table(materials.folder)[::3]:
        pictures = [
            Image.open(materials.folder.path / record[name]).convert("RGB")
            for name in ("file", "unguided")
        ]
        embeds = []
        for picture in pictures:
            inputs = clip.processor(text=["x"], images=picture, return_tensors="pt")
            with torch.no_grad():
                embeds.append(clip.model(**inputs).image_embeds[0].double())
        expected = float(torch.nn.functional.cosine_similarity(*embeds, dim=0))
        assert record["clip_cosine"] == pytest.approx(expected, abs=3e-6)


def test_the_detector_is_clips_softmax_between_two_texts(clip):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8))
    found = scores.ZeroShot(clip)([picture], ["Egg", "Wine glasses"])
    for concept, probability in zip(("egg", "wine glasses"), found[0], strict=True):
        texts = [f"a photo of {concept}", "a photo"]
        inputs = clip.processor(text=texts, images=picture, return_tensors="pt", padding=True)
        with torch.no_grad():
            expected = clip.model(**inputs).logits_per_image.softmax(dim=1)[0, 0]
        assert probability == pytest.approx(float(expected), abs=1e-5)
    with pytest.raises(ValueError, match="template must have {} for the concept, got 'a photo'"):
        scores.ZeroShot(clip, "a photo")


class Bright:
    """A detector of one's own: whatever is asked for, it looks at the light."""

    name = "bright"

    def __call__(self, images, concepts):
        light = [np.asarray(image).mean() / 255.0 for image in images]
        return np.repeat(np.array(light)[:, None], len(concepts), axis=1)


def test_another_detector_measures_again_and_one_can_be_ones_own(materials, undisturbed):
    run(materials)
    measure(CONFIG, materials, detector=Bright(), progress=False)
    found = store.read_table(materials.folder)
    for record in found:
        assert record["measured_by"]["detector"] == "bright"
        light = np.asarray(Image.open(materials.folder.path / record["file"])).mean() / 255.0
        assert set(record["presence"].values()) == {float(f"{light:.6g}")}
    measure(dataclasses.replace(CONFIG, detector="none"), materials, progress=False)
    assert {r["presence"] for r in store.read_table(materials.folder)} == {None}
    measure(CONFIG, materials, progress=False)
    assert contents(materials.folder.path) == undisturbed


def test_a_detector_of_the_wrong_shape_is_refused(materials):
    class Scalar(Bright):
        def __call__(self, images, concepts):
            return np.zeros(len(images))

    generate(dataclasses.replace(CONFIG, num_images=1), materials, progress=False)
    with pytest.raises(ValueError, match=r"must give probabilities of shape \(1, 3\), got \(1,\)"):
        measure(CONFIG, materials, detector=Scalar(), progress=False)


# ---------------------------------------------------------------------- processes

ARGUMENTS = [
    *("run", "--tiny", "--only", DINNER.name, "--relative-scales", "1"),
    *("--num-images", "3", "--steps", "3", "--batch-size", "2", "--quiet"),
]
ON_CPU = ("--device", "cpu")
LAUNCHED = """
import sys
from accelerate import PartialState
from dng_models.text_to_image.__main__ import main
status = main(sys.argv[1:])
sys.stdout.write("processes: %d\\n" % PartialState().num_processes)
sys.exit(status)
"""


def data(folder: Path) -> dict[str, bytes]:
    """What a run leaves, without figures and tables."""
    return {
        name: data
        for name, data in contents(folder).items()
        if not name.startswith(("figures/", "table.", "q.csv"))
    }


@pytest.mark.slow
def test_a_killed_process_loses_a_batch_and_no_more(tmp_path, undisturbed, pipe, clip):
    code = f"""
import os, signal
from dng_models.text_to_image import store
from dng_models.text_to_image.__main__ import main
append, calls = store.append, []
def killing(path, record):
    append(path, record)
    calls.append(path)
    if len(calls) == 8:
        os.kill(os.getpid(), signal.SIGKILL)
store.append = killing
main({[*ARGUMENTS, *ON_CPU, "--out", str(tmp_path)]!r})
"""
    run_ = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run_.returncode == -signal.SIGKILL, run_.stderr
    folder = RunFolder(tmp_path)
    # Three unguided images, which are measured first, by three lines more, and two of a rule: what
    # was finished is in the table already.
    kept = [folder.lines_of(0), tmp_path / "images.jsonl"]
    lines = [line for path in kept if path.exists() for line in path.read_bytes().splitlines()]
    assert len(set(lines)) == len(lines) == 5
    written = folder.image(POINTS[0], 0).stat().st_mtime_ns
    run(fresh(tmp_path, pipe, clip))
    assert folder.image(POINTS[0], 0).stat().st_mtime_ns == written
    assert data(tmp_path) == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize("device", [ON_CPU, ()], ids=["cpu", "not told"])
def test_two_processes_leave_the_same_files(tmp_path, undisturbed, device):
    """Through torchrun: on a CPU ``accelerate launch --num_processes 2`` starts only one."""
    if not device and torch.accelerator.is_available():
        pytest.skip("the images were drawn on a CPU, and here is an accelerator")
    (tmp_path / "launched.py").write_text(LAUNCHED)
    run_ = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
            *(str(tmp_path / "launched.py"), *ARGUMENTS, *device, "--out", str(tmp_path / "out")),
        ],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        capture_output=True,
        text=True,
    )
    assert run_.returncode == 0, run_.stderr
    assert run_.stdout.count("processes: 2") == 2
    assert data(tmp_path / "out") == undisturbed
