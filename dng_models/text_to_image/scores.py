"""Similarity of two images, and detection of concepts, by CLIP (arXiv 2103.00020).

Similarity is the cosine of the projected image embeddings (CLIP's ``image_embeds``) of a guided
image and the unguided one of the same seed; it says how much guidance changed the image.  Whether
the unwanted concept is gone, which the paper does not measure, a detector says; the default one is
zero-shot.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from dng_models.pipelines.clip import Clip, ZeroShot, load_trained_clip
from dng_models.pipelines.judges import DetectorJudge, VisionLanguageJudge, load_vision_language
from dng_models.pipelines.tiny import tiny_clip
from dng_models.support import foreign
from dng_models.text_to_image.config import DEFAULT_CLIP, JUDGE, TINY

Array = NDArray[np.float64]
Images = Sequence[Image.Image]
Asked = Callable[[Sequence[str]], Any]


class Detector(Protocol):
    """Interface of a detector of concepts in images."""

    @property
    def name(self) -> str:
        """Name of the detector in the records."""
        ...

    def __call__(self, images: Images, concepts: Sequence[str]) -> ArrayLike:
        """Probability that each of K concepts is in each of N images, shape (N, K)."""
        ...


class Similarity(Protocol):
    """Interface of what gives images embeddings whose cosine is their similarity."""

    name: str
    device: torch.device

    def images(self, images: Images) -> Array:
        """Embeddings of N images, shape (N, F), float64, of unit length."""
        ...


def load_similarity(name: str, device: torch.device | str = "cpu") -> Similarity:
    """Load what measures similarity: the laboratory's judge ("judge"), or as :func:`load_clip`."""
    if name == JUDGE:
        # Only where it is asked for: it draws the world's pictures.
        from dng_models.text_to_image.laboratory.judge_scores import JudgeScores

        return JudgeScores(device)
    return load_clip(name, device)


def load_clip(name: str, device: torch.device | str = "cpu") -> Clip:
    """Load a CLIP model from the hub or a folder, or make the tiny one.

    Parameters
    ----------
    name : str
        Name on the hub, path of a folder, or "tiny".
    device : torch.device or str
        Where the model runs.

    Raises
    ------
    FileNotFoundError, ValueError
        As :func:`dng_models.pipelines.clip.load_trained_clip`.
    """
    if name == TINY:
        return Clip(*tiny_clip(), name, device)
    or_else = f"Or give --clip DIR, the folder of any CLIP model such as {DEFAULT_CLIP}"
    return load_trained_clip(name, device, or_else=or_else)


def load_asked(name: str, device: torch.device | str = "cpu") -> Asked:
    """Load what looks at images for the rule that asks.

    Parameters
    ----------
    name : str
        "judge", the laboratory's; "tiny"; or a CLIP model or a vision-language model of
        transformers, by its name on the hub or its folder.
    device : torch.device or str
        Where the model runs.

    Returns
    -------
    callable
        Makes the ``ask`` of :class:`dng_models.DynamicPrompts` from names of concepts.

    Raises
    ------
    FileNotFoundError, ValueError
        As :func:`load_clip` and :meth:`dng_models.VisionLanguageJudge.load`.
    """
    if name in (JUDGE, TINY) or _is_clip(name):
        detector = load_detector(name, load_similarity(name, device))
        assert detector is not None
        return partial(DetectorJudge, detector)
    model, processor = load_vision_language(name, device=device)
    return partial(VisionLanguageJudge, model, processor)


def _is_clip(name: str) -> bool:
    """Whether a configuration is CLIP's, or that of a model that cannot be found."""
    try:
        folder = Path(name) if Path(name).is_dir() else foreign.hub_folder(name)[0]
        told = foreign.read_object(folder / "config.json")
    except OSError:
        return True  # loading it as CLIP says what is missing
    return told.get("model_type") == "clip"


def load_detector(name: str, clip: Similarity) -> Detector | None:
    """Load a detector: zero-shot with the given CLIP ("clip") or another, or the laboratory's.

    Parameters
    ----------
    name : str
        "clip", the name of another CLIP model, "judge", or "none".
    clip : Similarity
        What measures similarity; the judge is its own detector.

    Returns
    -------
    Detector or None
        None for "none".

    Raises
    ------
    FileNotFoundError, ValueError
        As :func:`load_clip`.
    """
    if name == "none":
        return None
    found = clip if name in ("clip", clip.name) else load_similarity(name, clip.device)
    if isinstance(found, Clip):
        return ZeroShot(found)
    judge: Any = found  # the judge is both
    detector: Detector = judge
    return detector
