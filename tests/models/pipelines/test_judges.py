"""What looks at images: detectors, CLIP, and a model that talks, whose weights say what it says."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image

from dng_models.pipelines import judges
from dng_models.pipelines.clip import Clip, ZeroShot
from dng_models.pipelines.dynamic_prompts import DynamicPrompts
from dng_models.pipelines.hook import apply_guidance
from dng_models.pipelines.judges import ClipJudge, DetectorJudge, VisionLanguageJudge
from dng_models.pipelines.tiny import tiny_clip, tiny_stable_diffusion
from dng_models.support import foreign
from tests.helpers.talking import tiny_llava

CONCEPTS = ("egg", "sausage")
PICTURES = [Image.new("RGB", (20, 20), colour) for colour in ("red", "green", "white")]


# ---------------------------------------------------------------------- detectors


def test_a_detector_says_yes_from_the_threshold_on():
    asked: list[Any] = []

    def detector(images, concepts):
        asked.append((list(images), tuple(concepts)))
        return np.array([[0.5, 0.4], [0.2, 0.1], [0.9, 1.0]])

    assert DetectorJudge(detector, CONCEPTS)(PICTURES, 3) == [("egg",), (), CONCEPTS]
    assert DetectorJudge(detector, CONCEPTS, 1.0)(PICTURES, 3) == [(), (), ("sausage",)]
    assert asked[0] == (PICTURES, CONCEPTS)


@pytest.mark.parametrize(
    "given", [[[0.5], [0.5], [0.5]], [[0.5, 1.5]] * 3, [[0.5, np.nan]] * 3, [[-0.1, 0.0]] * 3]
)
def test_what_is_no_probability_is_refused(given):
    with pytest.raises(ValueError, match=r"detector must give probabilities of shape \(3, 2\)"):
        DetectorJudge(lambda images, concepts: given, CONCEPTS)(PICTURES, 0)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"detector": 3}, TypeError, "detector must be callable"),
        ({"concepts": "egg"}, TypeError, "concepts must be a sequence"),
        ({"concepts": ()}, ValueError, "concepts must be one or more"),
        ({"threshold": 0.0}, ValueError, "threshold must be"),
        ({"threshold": 1.5}, ValueError, "threshold must be"),
    ],
)
def test_bad_arguments_of_a_detector(options, kind, message):
    with pytest.raises(kind, match=message):
        DetectorJudge(**{"detector": lambda i, c: [], "concepts": CONCEPTS, **options})


# ---------------------------------------------------------------------- CLIP


@pytest.fixture(scope="module")
def clip() -> Clip:
    return Clip(*tiny_clip(), "tiny")


def test_clip_is_asked_zero_shot(clip):
    probabilities = ZeroShot(clip)(PICTURES, CONCEPTS)
    least, largest = probabilities.min(), probabilities.max()
    assert least < largest  # random weights, but they see
    judge = ClipJudge(clip, CONCEPTS, float((least + largest) / 2))
    expected = [
        tuple(name for name, p in zip(CONCEPTS, row, strict=True) if p >= judge.threshold)
        for row in probabilities
    ]
    assert judge(PICTURES, 0) == expected and 0 < sum(map(len, expected)) < 6


def test_clip_is_loaded_by_name_and_guides_a_pipeline(tmp_path, clip):
    clip.model.save_pretrained(tmp_path)
    clip.processor.save_pretrained(tmp_path)
    judge = ClipJudge(str(tmp_path), CONCEPTS, 1e-6)
    pipe = tiny_stable_diffusion()
    with apply_guidance(pipe, DynamicPrompts(judge, at=(1,), of=2), cfg_scale=2.0) as trace:
        pipe("a breakfast", num_inference_steps=2, output_type="latent")
    assert trace.questions[0].shown == (CONCEPTS,)


def test_a_clip_that_is_nowhere_says_what_to_download(monkeypatch, tmp_path):
    def missing(name, **options):
        raise OSError(f"Cannot load model {name}")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", missing)
    monkeypatch.setattr(foreign, "ask_hub", lambda name, kind: False)
    with pytest.raises(FileNotFoundError, match="'hf download some/clip'.*the folder of any CLIP"):
        ClipJudge("some/clip", CONCEPTS)
    with pytest.raises(FileNotFoundError, match="there is no CLIP model in"):
        ClipJudge(str(tmp_path), CONCEPTS)
    with pytest.raises(TypeError, match="model must be the name of a CLIP model"):
        ClipJudge(None, CONCEPTS)


# ---------------------------------------------------------------------- a model that talks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of the model that says "sausage , egg"."""
    place = tmp_path_factory.mktemp("llava")
    model, processor = tiny_llava("sausage , egg .")
    model.save_pretrained(place)
    processor.save_pretrained(place)
    yield place


def test_a_model_is_loaded_by_name_asked_and_read(folder):
    judge = VisionLanguageJudge.load(str(folder), CONCEPTS)
    assert judge.answer(PICTURES[0]) == "sausage , egg ."
    assert judge(PICTURES, 0) == [CONCEPTS] * 3
    assert "egg, sausage?" in judge.question
    cut = VisionLanguageJudge.load(str(folder), CONCEPTS, max_new_tokens=1, dtype=torch.bfloat16)
    assert cut.model.dtype == torch.bfloat16 and cut(PICTURES[:1], 0) == [("sausage",)]


def test_it_guides_a_pipeline():
    pipe = tiny_stable_diffusion()
    for said, shown in (("none", ()), ("egg", ("egg",))):
        judge = VisionLanguageJudge(*tiny_llava(said), CONCEPTS)
        with apply_guidance(pipe, DynamicPrompts(judge, at=(1,), of=2), cfg_scale=2.0) as trace:
            pipe("a breakfast", num_inference_steps=2, output_type="latent")
        assert trace.questions[0].shown == (shown,)


def test_an_answer_that_names_something_else_ends_the_run():
    judge = VisionLanguageJudge(*tiny_llava("user: egg"), CONCEPTS)
    pipe = tiny_stable_diffusion()
    with (
        apply_guidance(pipe, DynamicPrompts(judge, at=(0,), of=2)),
        pytest.raises(ValueError, match="the model must answer with names of 'egg', 'sausage'"),
    ):
        pipe("a breakfast", num_inference_steps=2, output_type="latent")


@pytest.mark.parametrize(
    ("answer", "names"),
    [
        ("none", ()),
        ("None.", ()),
        ("egg", ("egg",)),
        (" Egg. ", ("egg",)),
        ("sausage, EGG", CONCEPTS),
        ("egg,  egg", ("egg",)),
        ("", None),
        ("egg, none", None),
        ("an egg", None),
        ("egg and sausage", None),
        ("eggs", None),
        ("egg,", None),
        ("Yes, I can see an egg.", None),
        ("no", None),
        ("egg..", None),
    ],
)
def test_answers_are_read_strictly(answer, names):
    judge = VisionLanguageJudge(*tiny_llava("none"), CONCEPTS)
    if names is not None:
        assert judge.read(answer) == names
        return
    with pytest.raises(ValueError, match=r"names of 'egg', 'sausage' between commas, or 'none'"):
        judge.read(answer)


def test_names_of_two_words_are_names():
    judge = VisionLanguageJudge(*tiny_llava("none"), ["Wine  glass", "egg"])
    assert judge.read("egg, wine glass") == ("Wine  glass", "egg")


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"model": torch.nn.Linear(2, 2)}, TypeError, "model must be a generating model"),
        ({"processor": object()}, ValueError, "processor must have a chat template"),
        ({"concepts": ["egg, sausage"]}, ValueError, "concepts must be names that an answer"),
        ({"concepts": ["None"]}, ValueError, "concepts must be names that an answer"),
        ({"concepts": ["egg", "EGG"]}, ValueError, "concepts must differ in more than case"),
        ({"question": "What is there?"}, ValueError, r"question must have {concepts}"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be"),
    ],
)
def test_bad_arguments_of_a_model_that_talks(options, kind, message):
    model, processor = tiny_llava("none")
    given = {"model": model, "processor": processor, "concepts": CONCEPTS, **options}
    with pytest.raises(kind, match=message):
        VisionLanguageJudge(**given)


def test_folders_that_hold_something_else(tmp_path, monkeypatch, folder, clip):
    with pytest.raises(FileNotFoundError, match="there is no vision-language model in"):
        VisionLanguageJudge.load(str(tmp_path), CONCEPTS)
    clip.model.save_pretrained(tmp_path / "clip")
    with pytest.raises(ValueError, match="must hold a vision-language model .* 'clip'"):
        VisionLanguageJudge.load(str(tmp_path / "clip"), CONCEPTS)
    with pytest.raises(TypeError, match="name must be a name on the hub or a folder"):
        VisionLanguageJudge.load(None, CONCEPTS)

    def missing(name, **options):
        raise OSError(f"Cannot load model {name}")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", missing)
    monkeypatch.setattr(foreign, "ask_hub", lambda name, kind: False)
    with pytest.raises(FileNotFoundError, match="'hf download some/llava'"):
        VisionLanguageJudge.load("some/llava", CONCEPTS)
    (tmp_path / "damaged").mkdir()
    for each in folder.iterdir():
        if each.name not in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(each, tmp_path / "damaged")
    with pytest.raises(ValueError, match="does not hold a whole vision-language model"):
        VisionLanguageJudge.load(str(tmp_path / "damaged"), CONCEPTS)
    (folder / "modeling_llava.py").write_text("print('never run')")
    try:
        with pytest.raises(ValueError, match="is code, which is never run here"):
            VisionLanguageJudge.load(str(folder), CONCEPTS)
    finally:
        (folder / "modeling_llava.py").unlink()


def test_weights_that_are_missing_or_not_finite(tmp_path):
    model, processor = tiny_llava("none")
    processor.save_pretrained(tmp_path)
    with torch.no_grad():
        model.get_output_embeddings().weight[0, 0] = np.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="weights that are NaN or infinite"):
        judges.load_vision_language(str(tmp_path))
    sound, _ = tiny_llava("none")
    state = {name: t for name, t in sound.state_dict().items() if "lm_head" not in name}
    sound.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match="must be a trained vision-language model, but lacks"):
        judges.load_vision_language(str(tmp_path))
