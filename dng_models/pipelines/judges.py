"""What looks at images for :class:`.dynamic_prompts.DynamicPrompts`: CLIP, or a model that talks.

A judge is a callable ``judge(images, step)`` with the names of the ``concepts`` that it looks for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from torch import Tensor

from dng_math import checks
from dng_models.pipelines.clip import Clip, ZeroShot, load_trained_clip, load_whole
from dng_models.pipelines.dynamic_prompts import checked_names
from dng_models.support import foreign

Images = Sequence[Image.Image]
QUESTION = (
    "Which of these can be seen in the picture: {concepts}? Answer with their names as they are "
    "written here, separated by commas, and nothing else; if none of them can be seen, answer "
    "none."
)
NONE = "none"


class DetectorJudge:
    """Names what a detector finds.

    Parameters
    ----------
    detector : callable
        ``detector(images, concepts)`` gives the probability of each of K concepts in each of N
        images, shape (N, K).
    concepts : sequence of str
        Names of the concepts, as the detector is asked for them.
    threshold : float
        Least probability at which a concept counts as seen, in (0, 1].

    Raises
    ------
    ValueError, TypeError
        Naming the argument, its value and what is allowed.
    """

    def __init__(
        self,
        detector: Callable[[Images, Sequence[str]], ArrayLike],
        concepts: Sequence[str],
        threshold: float = 0.5,
    ) -> None:
        if not callable(detector):
            raise TypeError(f"detector must be callable, got {checks.shown(detector)}")
        self.detector = detector
        self.concepts = checked_names(concepts)
        self.threshold = checks.real("threshold", threshold, "in (0, 1]", 0.0, 1.0, closed="(]")

    def probabilities(self, images: Images) -> NDArray[np.float64]:
        """Probability of every concept in every image, shape (N, K).

        Raises
        ------
        ValueError
            If the detector gives another shape, or something that is no probability.
        """
        found = np.asarray(self.detector(images, self.concepts), dtype=np.float64)
        wanted = (len(images), len(self.concepts))
        if found.shape != wanted or not np.all((found >= 0.0) & (found <= 1.0)):
            raise ValueError(
                f"detector must give probabilities of shape {wanted}, got {found.shape}, from "
                f"{np.min(found, initial=np.inf):g} to {np.max(found, initial=-np.inf):g}"
            )
        return found

    def __call__(self, images: Images, step: int) -> list[tuple[str, ...]]:
        """The concepts that each image shows."""
        return [
            tuple(name for name, own in zip(self.concepts, row, strict=True) if own)
            for row in (self.probabilities(images) >= self.threshold).tolist()
        ]


class ClipJudge(DetectorJudge):
    """Zero-shot CLIP: whether "a photo of X" fits an image better than "a photo".

    Parameters
    ----------
    model : str or Clip
        Name of a CLIP model on the hub, a folder, or a loaded :class:`.clip.Clip`.
    concepts : sequence of str
        Names of the concepts.
    threshold : float
        Least probability of the concept's text at which it counts as seen, in (0, 1].
    template, neutral : str
        As for :class:`.clip.ZeroShot`.
    device : torch.device or str
        Where a model that is loaded by name runs.

    Raises
    ------
    FileNotFoundError, ValueError, TypeError
        Naming the argument, its value and what is allowed; or as
        :func:`.clip.load_trained_clip`.

    Examples
    --------
    >>> judge = ClipJudge("openai/clip-vit-large-patch14", ["egg", "sausage"])
    >>> judge([image], 9)
    [('egg',)]
    """

    def __init__(
        self,
        model: str | Clip,
        concepts: Sequence[str],
        threshold: float = 0.5,
        *,
        template: str = "a photo of {}",
        neutral: str = "a photo",
        device: torch.device | str = "cpu",
    ) -> None:
        if not isinstance(model, str | Clip):
            raise TypeError(
                f"model must be the name of a CLIP model, a folder or a Clip, got "
                f"{checks.shown(model)}"
            )
        checked_names(concepts)
        checks.real("threshold", threshold, "in (0, 1]", 0.0, 1.0, closed="(]")
        clip = load_trained_clip(model, device) if isinstance(model, str) else model
        super().__init__(ZeroShot(clip, template, neutral), concepts, threshold)


class VisionLanguageJudge:
    """Asks a model that sees and talks which of the concepts are in a picture.

    Each picture is a question of its own, answered greedily.  The answer is read strictly: names of
    concepts between commas, or "none"; case, spaces and a full stop at the end do not matter.

    Parameters
    ----------
    model, processor
        A generating vision-language model of transformers and its processor, with a chat template;
        :meth:`load` loads both by name.
    concepts : sequence of str
        Names of the concepts; no comma may be in one, and none may be "none".
    question : str
        The question, with ``{concepts}`` for the names.
    max_new_tokens : int
        Longest answer; a longer one is cut, and then mostly no name of a concept.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, its value and what is allowed.
    """

    may_ramble = True
    """An answer may be anything: see ``on_error`` of :class:`.dynamic_prompts.DynamicPrompts`."""

    def __init__(
        self,
        model: Any,
        processor: Any,
        concepts: Sequence[str],
        *,
        question: str = QUESTION,
        max_new_tokens: int = 64,
    ) -> None:
        if not hasattr(model, "generate"):
            raise TypeError(
                "model must be a generating model of transformers, got a "
                f"{type(model).__name__}; VisionLanguageJudge.load(name, concepts) loads one"
            )
        if not getattr(processor, "chat_template", None):
            raise ValueError(
                "processor must have a chat template, with which a question and a picture become "
                f"the model's input, got a {type(processor).__name__} without one"
            )
        self.concepts = checked_names(concepts)
        self._by_answer = {_as_answered(name): name for name in self.concepts}
        for name in self.concepts:
            if "," in name or _as_answered(name) in ("", NONE):
                raise ValueError(
                    f"concepts must be names that an answer can be told from, without commas and "
                    f"not {NONE!r}, got {name!r}"
                )
        if len(self._by_answer) < len(self.concepts):
            raise ValueError(
                f"concepts must differ in more than case and spaces, got {self.concepts}"
            )
        if not isinstance(question, str) or "{concepts}" not in question:
            raise ValueError(f"question must have {{concepts}} for the names, got {question!r}")
        self.question = question.replace("{concepts}", ", ".join(self.concepts))
        self.max_new_tokens = checks.integer("max_new_tokens", max_new_tokens, 1)
        self.model, self.processor = model.eval(), processor

    @classmethod
    def load(
        cls,
        name: str,
        concepts: Sequence[str],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> VisionLanguageJudge:
        """Load a model and its processor from the hub or a folder, and ask it.

        Parameters
        ----------
        name : str
            Name on the hub or path of a folder of a model that transformers'
            ``AutoModelForImageTextToText`` knows (LLaVA, Qwen-VL, SmolVLM, PaliGemma ...).
        concepts : sequence of str
            Names of the concepts.
        device : torch.device or str
            Where it runs.
        dtype : torch.dtype, optional
            Of the weights; None: what transformers loads them in.
        **options
            ``question`` and ``max_new_tokens``.

        Raises
        ------
        FileNotFoundError
            If it is not on this machine and cannot be downloaded.
        ValueError
            If its folder holds or names code, weights that are pickles, damaged, missing or not
            finite, or another kind of model.
        """
        model, processor = load_vision_language(name, device=device, dtype=dtype)
        return cls(model, processor, concepts, **options)

    def read(self, answer: str) -> tuple[str, ...]:
        """The names in an answer, in the order of the concepts.

        Raises
        ------
        ValueError
            If it is anything but names of concepts between commas, or "none".
        """
        parts = [_as_answered(part) for part in answer.strip().removesuffix(".").split(",")]
        if parts == [NONE]:
            return ()
        unknown = [part for part in parts if part not in self._by_answer]
        if unknown:
            raise ValueError(
                f"the model must answer with names of {', '.join(map(repr, self.concepts))} "
                f"between commas, or {NONE!r}, got {checks.shown(answer)}"
            )
        found = {self._by_answer[part] for part in parts}
        return tuple(name for name in self.concepts if name in found)

    @torch.no_grad()
    def answer(self, image: Image.Image) -> str:
        """What the model answers to the question about a picture."""
        talk = [
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": image},
                    {"type": "text", "text": self.question},
                ],
            }
        ]
        prompt = self.processor.apply_chat_template(talk, add_generation_prompt=True)
        given = self.processor(text=[prompt], images=[image], return_tensors="pt")
        given = given.to(self.model.device)
        for name, value in given.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                given[name] = value.to(self.model.dtype)
        made = self.model.generate(
            **given, max_new_tokens=self.max_new_tokens, do_sample=False, num_beams=1
        )
        new = made[:, given["input_ids"].shape[1] :]
        text: str = self.processor.batch_decode(new, skip_special_tokens=True)[0]
        return text

    def __call__(self, images: Images, step: int) -> list[tuple[str, ...]]:
        """The concepts that each image shows; raises as :meth:`read`."""
        return [self.read(self.answer(image)) for image in images]


def _as_answered(name: str) -> str:
    """A name as answers are compared: without case, and with single spaces."""
    return " ".join(name.lower().split())


def load_vision_language(
    name: str, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> tuple[Any, Any]:
    """Load a vision-language model and its processor; arguments and errors of ``load``."""
    if not isinstance(name, str) or not name:
        raise TypeError(f"name must be a name on the hub or a folder, got {checks.shown(name)}")
    folder, revision = Path(name), None
    try:
        if folder.is_dir():
            if not (folder / "config.json").is_file():
                raise FileNotFoundError("it has no config.json")
            foreign.check_model(folder)
        else:
            folder, revision = foreign.hub_folder(name)
            foreign.check_model(folder, weights=False)
        _check_kind(folder)
        model, processor = _load(name, revision or "main")
    except OSError as error:
        said = foreign.reason(error, 200)
        if Path(name).exists():
            raise FileNotFoundError(
                f"there is no vision-language model in {name} ({said})"
            ) from error
        raise FileNotFoundError(
            f"the vision-language model {name!r} is not on this machine, as safetensors, and could "
            f"not be downloaded ({said}). Where there is a network: 'hf download {name}'. Or give "
            "the folder of any such model"
        ) from error
    return model.to(device=device, dtype=dtype).eval(), processor


def _check_kind(folder: Path) -> None:
    """Refuse a model that transformers does not know as one that sees and talks."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as KNOWN,
    )

    kind = foreign.read_object(folder / "config.json").get("model_type")
    if kind not in KNOWN:
        raise ValueError(
            f"{folder} must hold a vision-language model that transformers generates text with "
            f"(AutoModelForImageTextToText), got one of model_type {foreign.shown(kind)}"
        )


def _load(name: str, revision: str) -> tuple[Any, Any]:
    """Load a model whose configurations have been checked; its weights are checked here."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    what = "vision-language model"
    return load_whole(what, AutoModelForImageTextToText, AutoProcessor, name, revision)
