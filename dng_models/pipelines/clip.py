"""A CLIP model (arXiv 2103.00020): embeddings of images and texts, and which text fits better."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dng_models.support import foreign

Array = NDArray[np.float64]
Images = Sequence[Image.Image]
OR_ELSE = "Or give the folder of any CLIP model"


class Clip:
    """A CLIP model that gives embeddings of unit length.

    Parameters
    ----------
    model, processor
        transformers' ``CLIPModel`` and ``CLIPProcessor``.
    name : str
        Name of the model in the records.
    device : torch.device or str
        Where the model runs.
    """

    def __init__(
        self, model: Any, processor: Any, name: str, device: torch.device | str = "cpu"
    ) -> None:
        self.model = model.to(device).eval()
        self.processor = processor
        self.name = name
        self.device = torch.device(device)

    @torch.no_grad()
    def images(self, images: Images) -> Array:
        """Embeddings of N images, shape (N, F), float64."""
        pixels = self.processor.image_processor(list(images), return_tensors="pt")["pixel_values"]
        pooled = self.model.vision_model(pixel_values=pixels.to(self.device)).pooler_output
        return _unit(self.model.visual_projection(pooled))

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Array:
        """Embeddings of K texts, shape (K, F), float64."""
        tokens = self.processor.tokenizer(
            list(texts), padding=True, truncation=True, return_tensors="pt"
        ).to(self.device)
        pooled = self.model.text_model(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        ).pooler_output
        return _unit(self.model.text_projection(pooled))

    @cached_property
    def logit_scale(self) -> float:
        """Factor of the cosines in CLIP's softmax."""
        return float(self.model.logit_scale.detach().exp())


def _unit(embeddings: Tensor) -> Array:
    values = embeddings.cpu().double().numpy()
    unit: Array = values / np.linalg.norm(values, axis=1, keepdims=True)
    return unit


class ZeroShot:
    """Zero-shot detection: softmax of CLIP's cosines to "a photo of X" and "a photo".

    It only says which of the two texts fits better: compare its numbers with those of the unguided
    images rather than with 0 or 1.

    Parameters
    ----------
    clip : Clip
    template, neutral : str
        Text with ``{}`` for the concept, and the text that it is compared with.

    Raises
    ------
    ValueError
        If the template has no place for the concept.
    """

    def __init__(
        self, clip: Clip, template: str = "a photo of {}", neutral: str = "a photo"
    ) -> None:
        if not isinstance(template, str) or "{}" not in template:
            raise ValueError(f"template must have {{}} for the concept, got {template!r}")
        self.clip = clip
        self.template = template
        self.neutral = neutral

    @property
    def name(self) -> str:
        """Name of the CLIP model, with the two texts."""
        return f"{self.clip.name}: {self.template!r} against {self.neutral!r}"

    def __call__(self, images: Images, concepts: Sequence[str]) -> Array:
        """Probability of each concept's text against the neutral one, shape (N, K)."""
        texts = [self.template.format(concept.lower()) for concept in concepts]
        embeddings = self.clip.texts([*texts, self.neutral])
        cosines = self.clip.images(images) @ embeddings.T
        against = self.clip.logit_scale * (cosines[:, -1:] - cosines[:, :-1])
        probabilities: Array = 1.0 / (1.0 + np.exp(np.minimum(against, 700.0)))
        return probabilities


def load_trained_clip(
    name: str, device: torch.device | str = "cpu", *, or_else: str = OR_ELSE
) -> Clip:
    """Load a CLIP model from the hub or a folder.

    Parameters
    ----------
    name : str
        Name on the hub, or path of a folder.
    device : torch.device or str
        Where the model runs.
    or_else : str
        What to do where it cannot be downloaded, for the message.

    Raises
    ------
    FileNotFoundError
        If it is not on this machine and cannot be downloaded; the message says what to download.
    ValueError
        If its folder holds or names code, or weights that are pickles, damaged, missing or not
        finite.
    """
    folder, revision = Path(name), None
    try:
        if folder.is_dir():
            if not (folder / "config.json").is_file():
                raise FileNotFoundError("it has no config.json")
            foreign.check_model(folder)
            return _load_clip(name, device)
        folder, revision = foreign.hub_folder(name)
        foreign.check_model(folder, weights=False)
        return _load_clip(name, device, revision or "main")
    except OSError as error:
        said = foreign.reason(error, 200)
        if Path(name).exists():
            raise FileNotFoundError(f"there is no CLIP model in {name} ({said})") from error
        raise FileNotFoundError(
            f"the CLIP model {name!r} is not on this machine, as safetensors, and could not be "
            f"downloaded ({said}). Where there is a network: 'hf download {name}' (older: "
            f"huggingface-cli download). {or_else}; of one whose weights are pickles, "
            f"{foreign.CONVERT}"
        ) from error


def _load_clip(name: str, device: torch.device | str, revision: str | None = None) -> Clip:
    """Load a CLIP model whose configurations have been checked; its weights are checked here."""
    from transformers import CLIPConfig, CLIPModel, CLIPProcessor

    if revision is None:
        foreign.check_size(lambda told: CLIPModel(CLIPConfig.from_dict(told)), name)
    model, processor = load_whole("CLIP model", CLIPModel, CLIPProcessor, name, revision or "main")
    return Clip(model, processor, name, device)


def load_whole(
    what: str, model_class: Any, processor_class: Any, name: str, revision: str
) -> tuple[Any, Any]:
    """Load a model of transformers and its processor, if all of its weights are there and finite.

    Parameters
    ----------
    what : str
        What it should be, for messages.
    model_class, processor_class : type
        With ``from_pretrained``.
    name, revision : str
        A name on the hub and its revision, or a folder; its configurations have been checked.

    Returns
    -------
    model, processor

    Raises
    ------
    OSError
        If it is not there.
    ValueError
        If it is damaged, something else, or has weights that are missing or not finite.
    """
    where: dict[str, Any] = {"revision": revision, "trust_remote_code": False}
    try:
        model, report = model_class.from_pretrained(
            name, use_safetensors=True, output_loading_info=True, **where
        )
        processor = processor_class.from_pretrained(name, **where)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # what a damaged folder raises depends on where it is damaged
        raise ValueError(
            f"{name} does not hold a whole {what} ({foreign.reason(error)}): it was damaged, or is "
            "another model; remove it and get it again"
        ) from error
    if report["missing_keys"]:
        # Transformers fills them with random numbers and only warns.
        raise ValueError(
            f"{name} must be a trained {what}, but lacks the weights "
            f"{', '.join(sorted(report['missing_keys'])[:4])}"
        )
    foreign.require_finite_network(name, model)
    return model, processor
