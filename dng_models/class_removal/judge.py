"""The classifier that judges images, and its errors: trained here or loaded from Hugging Face."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dng_math import checks
from dng_models.class_removal.small_classifier import (
    CONFIG,
    KIND,
    WEIGHTS,
    SmallClassifier,
    device_of,
)
from dng_models.support import foreign, metrics

BATCH = 256
# Files of a classifier.  Weights are in one safetensors file, in several, or in torch's format; the
# first kind that exists is loaded.
_CONFIGS = (CONFIG, "preprocessor_config.json", "processor_config.json")
_WEIGHTS = (WEIGHTS, "model[-.]*safetensors*", "pytorch_model[-.]*bin*")


class Errors(NamedTuple):
    """How often a judge is wrong about forbidden classes, on held-out images.

    Attributes
    ----------
    false_alarms : float
        Share of the other classes' images that it calls forbidden: the safety of perfect samples.
    misses : float
        Share of the forbidden classes' images that it calls allowed.
    """

    false_alarms: float
    misses: float


@dataclass(frozen=True, eq=False)
class Judge:
    """A classifier of images in [-1, 1], with any network.

    Attributes
    ----------
    classes : tuple of str
        Names of the K classes; a predicted label is an index into them.
    network : callable
        Maps images (B, C, H, W) in [-1, 1] to labels (B,) and features (B, F).
    image_shape : tuple of int, or None
        (C, H, W) of the images that the network takes; None for any.
    device : torch.device
        Device of the network.
    confusion : ndarray of int64, shape (K, K), or None
        Number of held-out images by true and predicted class; None if they were not counted.
    """

    classes: tuple[str, ...]
    network: Callable[[Tensor], tuple[Tensor, Tensor]]
    image_shape: tuple[int, int, int] | None
    device: torch.device
    confusion: NDArray[np.int64] | None = None

    def judge(
        self, images: Tensor, batch_size: int = BATCH
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Classify images: the label and the features of each.

        Incomplete batches are padded, so an image's features have the same bits however many images
        come with it.

        Parameters
        ----------
        images : Tensor, shape (N, C, H, W)
            Floats in [-1, 1] (values outside are clamped), or uint8 as a data set reads them.
            :func:`dng_models.support.metrics.float_images` describes which other ranges are
            detected.
        batch_size : int
            Number of images per call of the network.

        Returns
        -------
        predicted : ndarray of int64, shape (N,)
            Index of the predicted class.
        features : ndarray of float64, shape (N, F)
            Input of the network's last linear layer.

        Raises
        ------
        TypeError, ValueError
            If ``images`` is no such tensor, or has another shape than the network takes.
        """
        images = self._checked(images)
        batch_size = checks.integer("batch_size", batch_size, 1)
        predicted, features = [], []
        for first in range(0, len(images), batch_size):
            batch = images[first : first + batch_size].to(self.device, torch.float32).clamp(-1, 1)
            missing = batch_size - len(batch)
            padding = batch[:1].expand(missing, *batch.shape[1:])
            with torch.no_grad():
                labels, seen = self.network(torch.cat([batch, padding]))
            predicted.append(labels[: len(batch)].cpu().numpy().astype(np.int64))
            features.append(seen[: len(batch)].cpu().numpy().astype(np.float64))
        return np.concatenate(predicted), np.concatenate(features)

    def errors(self, forget: Sequence[str]) -> Errors | None:
        """Error rates on the forbidden classes; None if the classifier has no confusion matrix.

        Parameters
        ----------
        forget : sequence of str
            Names of the forbidden classes.

        Raises
        ------
        ValueError
            If a name is not one of the classes.
        """
        if self.confusion is None:
            return None
        places = [self.classes.index(checks.choice("forget", c, self.classes)) for c in forget]
        forbidden = np.isin(np.arange(len(self.classes)), places)
        allowed_rows, forbidden_rows = self.confusion[~forbidden], self.confusion[forbidden]
        return Errors(
            false_alarms=float(allowed_rows[:, forbidden].sum() / allowed_rows.sum()),
            misses=float(forbidden_rows[:, ~forbidden].sum() / forbidden_rows.sum()),
        )

    def _checked(self, images: Tensor) -> Tensor:
        floats = metrics.float_images("images", images)
        if self.image_shape is not None and tuple(floats.shape[1:]) != self.image_shape:
            raise ValueError(
                f"images must have shape (N, *{self.image_shape}), as the classifier was trained "
                f"on, got {tuple(floats.shape)}"
            )
        return floats


def classifier_files(directory: Path) -> list[Path]:
    """The files a classifier is loaded from, sorted; empty without weights or ``config.json``.

    Other files in the folder are ignored.
    """
    weights = next((found for pattern in _WEIGHTS if (found := list(directory.glob(pattern)))), [])
    if not weights or not (directory / CONFIG).is_file():
        return []
    configs = [directory / name for name in _CONFIGS]
    return sorted([*weights, *(path for path in configs if path.is_file())])


def load_classifier(
    name_or_dir: Path | str,
    classes: Sequence[str],
    device: torch.device | str | None = None,
) -> Judge:
    """Load a judge: a classifier of :func:`train_classifier` or of Hugging Face.

    Parameters
    ----------
    name_or_dir : Path or str
        A folder, or the name of a model on the hub that ``AutoModelForImageClassification`` and
        ``AutoImageProcessor`` load.
    classes : sequence of str
        Classes of the data; the classifier must have the same.  For a model of Hugging Face their
        order, case and underscores for spaces may differ.
    device : torch.device or str, optional
        Default: a GPU if there is one.

    Returns
    -------
    Judge

    Raises
    ------
    FileNotFoundError
        If a folder lacks a file.
    OSError
        If a model is neither on the hub nor on this machine.
    ValueError
        If the classes differ, a file is damaged, the weights are pickles or not finite, the folder
        contains or names code, or the model has no trained linear last layer.

    Notes
    -----
    No code in a folder or repository is run: see :mod:`dng_models.support.foreign`.
    """
    where, classes = device_of(device), tuple(classes)
    directory = Path(name_or_dir)
    if directory.is_dir():
        if not (directory / CONFIG).is_file():
            raise FileNotFoundError(
                f"{directory} must be the folder of a classifier; it has no {CONFIG}"
            )
        description = foreign.read_object(directory / CONFIG)
        if description.get("kind") == KIND:
            return _load_own(directory, description, classes, where)
    elif directory.is_file():
        raise ValueError(
            f"classifier must be a folder or a name on the Hugging Face hub, got the file "
            f"{directory}"
        )
    else:
        foreign.require_hub_name("classifier", name_or_dir)
    return _load_hugging_face(str(name_or_dir), classes, where)


def _load_own(
    directory: Path, description: dict[str, Any], classes: tuple[str, ...], device: torch.device
) -> Judge:
    told, path = directory / CONFIG, directory / WEIGHTS
    found = foreign.member(description, "classes", list, told)
    if tuple(found) != classes:
        raise _other_classes(directory, list(map(str, found)), classes)
    training = foreign.member(description, "training", dict, told)
    sizes = {name: foreign.member(training, name, int, told) for name in ("width", "layers")}
    shape = foreign.member(description, "shape", list, told)
    if len(shape) != 3 or not all(isinstance(side, int) and side > 0 for side in shape):
        raise ValueError(f"'shape' in {told} must be three positive integers, got {shape!r}")
    confusion = _counts(foreign.member(description, "confusion", list, told), len(classes), told)
    held = foreign.shapes(path)
    channels, side, _ = shape
    net: SmallClassifier = foreign.outline(
        lambda sizes: SmallClassifier(side, channels, len(classes), **sizes), sizes, told, held
    )
    wanted = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    if wanted != held:
        name = next(n for n in (*wanted, *held) if wanted.get(n) != held.get(n))
        raise ValueError(
            f"{path} does not hold the weights of the network in {CONFIG}: {name} has shape "
            f"{held.get(name)} in the file and {wanted.get(name)} in the network"
        )
    weights, _ = foreign.load_tensors(path, finite=True)
    net.load_state_dict(weights, assign=True)
    net.float().to(device).eval().requires_grad_(False)
    return Judge(classes, _own(net), net.image_shape, device, confusion)


def _counts(confusion: list[Any], classes: int, where: Path) -> NDArray[np.int64]:
    """The confusion matrix in a file's description, checked."""
    try:
        counts = np.array(confusion, dtype=np.int64)
    except (ValueError, TypeError, OverflowError):
        counts = np.zeros(0, dtype=np.int64)
    if counts.shape != (classes, classes) or (counts < 0).any():
        raise ValueError(
            f"'confusion' in {where} must be counts by true and judged class, {classes} x {classes}"
        )
    return counts


def _own(net: SmallClassifier) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    def network(images: Tensor) -> tuple[Tensor, Tensor]:
        features = net.features(images)
        return net.head(features).argmax(dim=1), features

    return network


def _load_hugging_face(name: str, classes: tuple[str, ...], device: torch.device) -> Judge:
    from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification

    directory, revision = Path(name), None
    if directory.is_dir():
        foreign.check_model(directory)
    else:
        directory, revision = foreign.hub_folder(name)
        foreign.check_model(directory, weights=False)
    where: dict[str, Any] = {"trust_remote_code": False, "revision": revision or "main"}
    try:
        if revision is None:
            config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
            make = AutoModelForImageClassification.from_config
            foreign.check_size(lambda _: make(config, trust_remote_code=False), directory)
        model, report = AutoModelForImageClassification.from_pretrained(
            name, output_loading_info=True, use_safetensors=True, **where
        )
        processor = AutoImageProcessor.from_pretrained(name, **where)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a damaged folder can raise almost any type
        raise ValueError(
            f"{name} does not hold a whole image classifier ({foreign.reason(error)}): it was "
            "damaged, or is another model; remove it and get it again"
        ) from error
    if report["missing_keys"]:
        # Transformers only warns, and fills missing weights with random numbers.
        raise ValueError(
            f"{name} must be a trained image classifier, but lacks the weights "
            f"{', '.join(sorted(report['missing_keys']))}"
        )
    foreign.require_finite_network(name, model)
    labels = [model.config.id2label[i] for i in range(model.config.num_labels)]
    places = {_plain(label): i for i, label in enumerate(classes)}
    if sorted(map(_plain, labels)) != sorted(places):
        raise _other_classes(name, labels, classes)
    to_index = torch.tensor([places[_plain(label)] for label in labels], device=device)
    model.to(device).eval().requires_grad_(False)
    head = _head(name, model)

    def network(images: Tensor) -> tuple[Tensor, Tensor]:
        entered: list[Tensor] = []
        hook = head.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0]))
        try:
            logits = model(**_processed(processor, images)).logits
        finally:
            hook.remove()
        return to_index[logits.argmax(dim=1)], entered[-1].reshape(len(images), -1)

    return Judge(classes, network, None, device)


def _processed(processor: Any, images: Tensor) -> dict[str, Tensor]:
    """Inputs of the model for images in [-1, 1], made from 8-bit colour images as in training."""
    if images.shape[1] == 1:
        images = images.expand(-1, 3, -1, -1)
    eight_bit = ((images + 1.0) * 127.5).round().to(torch.uint8).cpu()
    batch = processor(
        images=list(eight_bit.numpy()), input_data_format="channels_first", return_tensors="pt"
    )
    return {name: value.to(images.device) for name, value in batch.items()}


def _head(name: str, model: nn.Module) -> nn.Linear:
    """The last linear layer with one output per class, which gives the logits."""
    count = model.config.num_labels  # type: ignore[union-attr]
    heads = [
        layer
        for layer in model.modules()
        if isinstance(layer, nn.Linear) and layer.out_features == count
    ]
    if not heads:
        raise ValueError(f"{name} must end in a linear layer of {count} logits, and has none")
    return heads[-1]


def _plain(label: str) -> str:
    return label.strip().lower().replace("_", " ")


def _other_classes(where: Path | str, found: Sequence[str], wanted: Sequence[str]) -> ValueError:
    return ValueError(
        f"the classifier {where} must have the classes of the data, {', '.join(wanted)}; "
        f"it has {', '.join(found)}"
    )
