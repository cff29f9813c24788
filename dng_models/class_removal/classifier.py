"""The classifier that judges images: a small one that is trained here, or any of Hugging Face.

Safety is what the judge says, so its own errors are the floor of every curve: the confusion of the
small one on held-out images is kept beside its weights.  Its training shifts, turns and scales the
images by little and adds little noise, for a judge of generated images sees some that are not quite
in place or not quite clean; strong augmentation would make it sure of broken ones.

All that is random about step k of the training is a function of (seed, k).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from dng_math import _checks
from dng_models import foreign, metrics
from dng_models.class_removal import files
from dng_models.progress import Progress, seconds_of
from dng_models.threads import torch_threads, work_of

if TYPE_CHECKING:
    from dng_models.class_removal.data import Dataset

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
KIND = "dng_models.SmallClassifier"
FEATURES = 64
SMALLEST_SIDE = 4  # the resolution of the last convolution, at most
BATCH = 256
# Files of a classifier.  Weights in one file, in several or of torch: the first kind that is there
# is the one that is loaded.
_CONFIGS = (CONFIG, "preprocessor_config.json", "processor_config.json")
_WEIGHTS = (WEIGHTS, "model[-.]*safetensors*", "pytorch_model[-.]*bin*")


# ---------------------------------------------------------------------- the network


class SmallClassifier(nn.Module):
    """Convolutions, in stages that halve the side, then two linear layers.

    Parameters
    ----------
    image_size, channels, num_classes : int
    width : int
        Channels of the first stage; the second has twice as many, the others three times.
    layers : int
        Convolutions of every stage but the first, which has one.
    """

    def __init__(
        self, image_size: int, channels: int, num_classes: int, width: int = 24, layers: int = 1
    ) -> None:
        super().__init__()
        self.image_shape = (channels, image_size, image_size)
        side, stage, entering = image_size, 1, width
        body: list[nn.Module] = _convolution(channels, width, stride=1)
        while side > SMALLEST_SIDE:
            stage += 1
            leaving = width * min(stage, 3)
            body += _convolution(entering, leaving, stride=2)
            for _ in range(layers - 1):
                body += _convolution(leaving, leaving, stride=1)
            entering = leaving
            side = math.ceil(side / 2)
        self.body = nn.Sequential(
            *body, nn.Flatten(), nn.Linear(entering * side**2, FEATURES), nn.SiLU()
        )
        self.head = nn.Linear(FEATURES, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """What the last linear layer sees, shape (N, 64), of images (N, C, H, W) in [-1, 1]."""
        features: Tensor = self.body(images)
        return features

    def forward(self, images: Tensor) -> Tensor:
        """Logits, shape (N, classes)."""
        logits: Tensor = self.head(self.features(images))
        return logits


def _convolution(entering: int, leaving: int, stride: int) -> list[nn.Module]:
    convolution = nn.Conv2d(entering, leaving, 3, stride=stride, padding=1)
    return [convolution, nn.GroupNorm(8, leaving), nn.SiLU()]


# ---------------------------------------------------------------------- training


@dataclass(frozen=True)
class ClassifierConfig:
    """How the small classifier is trained.

    Parameters
    ----------
    steps, batch_size, learning_rate
        Of AdamW; the rate warms up for 50 steps and falls to 0 as a cosine.
    seed : int
        Of all that is random.
    width, layers : int
        Of :class:`SmallClassifier`; ``width`` is a multiple of 8.
    shift : float
        Largest shift, as a share of the side.
    turn : float
        Largest angle, in degrees.
    zoom : float
        Largest change of scale, as a share.
    noise : float
        Largest standard deviation of the added noise, in units of pixels in [-1, 1].
    flips : bool
        Whether images are mirrored left to right at random, which no digit survives.
    """

    steps: int = 1600
    batch_size: int = 64
    learning_rate: float = 3e-3
    seed: int = 0
    width: int = 24
    layers: int = 1
    shift: float = 0.08
    turn: float = 8.0
    zoom: float = 0.1
    noise: float = 0.3
    flips: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "layers"):
            _checks.integer(name, getattr(self, name), 1)
        _checks.integer("seed", self.seed, 0)
        if _checks.integer("width", self.width, 8) % 8:
            raise ValueError(f"width must be a multiple of 8, got {self.width}")
        _checks.positive("learning_rate", self.learning_rate)
        for name in ("shift", "turn", "zoom", "noise"):
            _checks.non_negative(name, getattr(self, name))
        _checks.boolean("flips", self.flips)


def train_classifier(
    dataset: Dataset,
    out: Path | str,
    config: ClassifierConfig | None = None,
    *,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Path:
    """Train on ``dataset.train``, count the errors on ``dataset.held_out``, and save both.

    The folder gets ``model.safetensors`` and, last, ``config.json`` with the classes, the
    configuration, the held-out accuracy and the confusion matrix, whose rows are the true classes
    and whose columns are the judged ones.  A classifier that is there already, of the same data
    set and configuration, is not trained again.

    Parameters
    ----------
    dataset : Dataset
    out : Path or str
        The folder.
    config : ClassifierConfig, optional
    device : torch.device or str, optional
        Default: a GPU if there is one.
    progress : bool
        Whether a bar is shown.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    ValueError
        If the folder holds another classifier, or the data set has images that are not square or
        holds out none.
    OSError
        If the disk is full or the folder cannot be written.
    """
    config = ClassifierConfig() if config is None else config
    out = Path(out)
    made_from = _made_from(dataset, config)
    if (out / CONFIG).is_file():
        _require_same(out, made_from)
        if (out / WEIGHTS).is_file():
            return out
    _, channels, height, width = dataset.images.shape
    if height != width:
        raise ValueError(f"dataset must have square images, got {height} x {width} pixels")
    held_out = dataset.held_out
    if not len(held_out):
        raise ValueError("dataset must hold out images to count errors on, and holds out none")

    where = _device(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        net = SmallClassifier(height, channels, len(dataset.classes), config.width, config.layers)
    net.to(where).train()
    # A step is three calls: forward, and backward for the weights and for what is before them.
    work = 3 * work_of((config.batch_size, channels, height, height), [net])
    with torch_threads(work=work if where.type == "cpu" else None):
        _fit(net, dataset.train, config, where, progress)

    judge = judge_of(net, dataset.classes, where)
    confusion = _confusion(held_out.labels, judge.judge(held_out.images)[0], len(dataset.classes))
    files.save_tensors(out / WEIGHTS, net.state_dict(), {"format": "pt"})
    accuracy = float(np.trace(confusion) / confusion.sum())
    description = {"kind": KIND, "held_out_accuracy": accuracy, "confusion": confusion.tolist()}
    files.write_json(out / CONFIG, made_from | description | {"torch": torch.__version__})
    return out


def updates_left(dataset: Dataset, out: Path | str, config: ClassifierConfig) -> int:
    """How many updates :func:`train_classifier` would do; a ValueError where it would refuse."""
    out = Path(out)
    if (out / CONFIG).is_file():
        _require_same(out, _made_from(dataset, config))
        if (out / WEIGHTS).is_file():
            return 0
    return config.steps


def seconds_per_update(
    dataset: Dataset, config: ClassifierConfig, device: torch.device | str | None = None
) -> float:
    """How long an update of :func:`train_classifier` takes here, found out by doing some."""
    where, train = _device(device), dataset.train
    _, channels, side, _ = dataset.images.shape
    with torch.random.fork_rng(devices=[]):
        net = SmallClassifier(side, channels, len(dataset.classes), config.width, config.layers)
    net.to(where).train()
    few = dataclasses.replace(config, steps=1)
    work = 3 * work_of((config.batch_size, channels, side, side), [net])
    with torch_threads(work=work if where.type == "cpu" else None):
        return seconds_of(lambda: _fit(net, train, few, where, False))


def _made_from(dataset: Dataset, config: ClassifierConfig) -> dict[str, Any]:
    """What says that a classifier is the one that would be trained."""
    return {
        "classes": list(dataset.classes),
        "dataset": dataset.name,
        "fingerprint": dataset.fingerprint,
        "shape": list(dataset.images.shape[1:]),
        "training": dataclasses.asdict(config),
    }


def judge_of(net: SmallClassifier, classes: Sequence[str], device: torch.device) -> Judge:
    """A judge by a network that is at hand."""
    net.to(device).eval().requires_grad_(False)
    return Judge(tuple(classes), _own(net), net.image_shape, device)


def _require_same(out: Path, made_from: dict[str, Any]) -> None:
    """The classifier in the folder is the one that would be trained."""
    found = files.read_json(out / CONFIG)
    for name, wanted in made_from.items():
        has = found.get(name) if isinstance(found, dict) else None
        if has != wanted:
            raise ValueError(
                f"out holds another classifier: {out / CONFIG} has {name} {has!r} and not "
                f"{wanted!r}; remove the folder, or name another one"
            )


def _fit(
    net: SmallClassifier, train: Dataset, config: ClassifierConfig, device: torch.device, bar: bool
) -> None:
    images, labels = train.images.to(device), train.labels.to(device)
    optimizer = torch.optim.AdamW(net.parameters(), config.learning_rate, weight_decay=0.01)
    steps = Progress(config.steps, "training the classifier", shown=bar)
    for step in steps.over(range(config.steps)):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * _rate(step, config.steps)
        drawn = torch.from_numpy(_batch(len(images), step, config)).to(device)
        logits = net(_augment(images[drawn], step, config))
        # Soft targets: what only looks a little like a digit should not be certainly one.
        loss = functional.cross_entropy(logits, labels[drawn], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if step % 50 == 0:
            steps.set_postfix(loss=f"{loss.item():.3f}")


def _rate(step: int, steps: int) -> float:
    """Linear warm-up over 50 steps, then a cosine to 0."""
    return min(1.0, (step + 1) / 50) * 0.5 * (1.0 + math.cos(math.pi * step / steps))


def _batch(n: int, step: int, config: ClassifierConfig) -> NDArray[np.int64]:
    """Indices of a step: the images in random order, again and again in another order."""
    place = step * config.batch_size + np.arange(config.batch_size)
    epochs = place // n
    orders = {
        int(e): np.random.default_rng((config.seed, 0, e)).permutation(n) for e in np.unique(epochs)
    }
    return np.array([orders[int(e)][p] for e, p in zip(epochs, place % n, strict=True)])


def _augment(images: Tensor, step: int, config: ClassifierConfig) -> Tensor:
    """Shift, turn, scale, perhaps mirror, and add noise; what comes in from outside is black."""
    rng = np.random.default_rng((config.seed, 1, step))
    n = len(images)
    uniform = rng.uniform(-1.0, 1.0, (5, n, 1))
    angle = np.deg2rad(config.turn) * uniform[0]
    scale = 1.0 + config.zoom * uniform[1]
    # In units of half a side, as grid_sample counts.
    shift = 2.0 * config.shift * uniform[2:4]
    mirror = np.where(config.flips & (uniform[4] > 0.0), -1.0, 1.0)
    across = np.concatenate([mirror * scale * np.cos(angle), -scale * np.sin(angle), shift[0]], 1)
    down = np.concatenate([mirror * scale * np.sin(angle), scale * np.cos(angle), shift[1]], 1)
    noise = rng.uniform(0.0, config.noise, (n, 1, 1, 1)) * rng.standard_normal(images.shape)

    maps = torch.from_numpy(np.stack([across, down], axis=1)).to(images)
    grid = functional.affine_grid(maps, list(images.shape), align_corners=False)
    # Black is -1, and what is outside of the image is 0 to grid_sample.
    moved = functional.grid_sample(images + 1.0, grid, align_corners=False) - 1.0
    return moved + torch.from_numpy(noise).to(images)


def _confusion(truth: Tensor, judged: NDArray[np.int64], classes: int) -> NDArray[np.int64]:
    """Counts by (true class, judged class)."""
    pairs = truth.cpu().numpy() * classes + judged
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def _device(device: torch.device | str | None) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


# ---------------------------------------------------------------------- the judge


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
    """A classifier of images in [-1, 1], by whatever network.

    Attributes
    ----------
    classes : tuple of str
        A predicted label is an index into them.
    network : callable
        From images (B, C, H, W) in [-1, 1] to labels (B,) and features (B, F).
    image_shape : tuple of int, or None
        (C, H, W) of the images that the network takes; None for any.
    device : torch.device
    confusion : ndarray of int64, shape (C, C), or None
        Held-out images by true and judged class, where they were counted.
    """

    classes: tuple[str, ...]
    network: Callable[[Tensor], tuple[Tensor, Tensor]]
    image_shape: tuple[int, int, int] | None
    device: torch.device
    confusion: NDArray[np.int64] | None = None

    def judge(
        self, images: Tensor, batch_size: int = BATCH
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Label and features of every image.

        The network always sees whole batches, so an image's features have the same bits however
        many images come with it.

        Parameters
        ----------
        images : Tensor, shape (N, C, H, W)
            Floats in [-1, 1], clamped, or uint8, as a data set reads them.  What other ranges are
            found out, :func:`dng_models.metrics.float_images` says.
        batch_size : int

        Returns
        -------
        predicted : ndarray of int64, shape (N,)
        features : ndarray of float64, shape (N, F)
            What the network's last linear layer sees.

        Raises
        ------
        TypeError, ValueError
            If images are no such tensor.
        """
        images = self._checked(images)
        batch_size = _checks.integer("batch_size", batch_size, 1)
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
        """How often it is wrong about the forbidden classes, if that was counted.

        Raises
        ------
        ValueError
            If a name is not one of the classes.
        """
        if self.confusion is None:
            return None
        places = [self.classes.index(_checks.choice("forget", c, self.classes)) for c in forget]
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
    """What a classifier is loaded from, sorted; empty unless there are weights and ``config.json``.

    What else lies in the folder decides nothing.
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
    """A judge: a classifier of :func:`train_classifier`, or an image classifier of Hugging Face.

    Parameters
    ----------
    name_or_dir : Path or str
        A folder, or the name of a model of the hub that ``AutoModelForImageClassification`` and
        ``AutoImageProcessor`` load.
    classes : sequence of str
        Those of the data.  The classifier must have the same; order, case and underscores for
        spaces do not matter to a model of Hugging Face.
    device : torch.device or str, optional
        Default: a GPU if there is one.

    Raises
    ------
    FileNotFoundError
        If a folder lacks a file.
    OSError
        If a model is neither on the hub nor on this machine.
    ValueError
        If the classes differ, a file is damaged, the weights are pickles or not finite, the folder
        holds code or names some, or the model has no trained linear last layer.

    Notes
    -----
    Nothing in a folder or repository is run: :mod:`dng_models.foreign`.
    """
    where, classes = _device(device), tuple(classes)
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
    """A confusion matrix from a file."""
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
    except Exception as error:  # what a damaged folder raises depends on where it is damaged
        raise ValueError(
            f"{name} does not hold a whole image classifier ({foreign.reason(error)}): it was "
            "damaged, or is another model; remove it and get it again"
        ) from error
    if report["missing_keys"]:
        # Transformers fills them with random numbers and only warns.
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
    """What the model takes, of images in [-1, 1]: 8-bit colour images first, as in its training."""
    if images.shape[1] == 1:
        images = images.expand(-1, 3, -1, -1)
    eight_bit = ((images + 1.0) * 127.5).round().to(torch.uint8).cpu()
    batch = processor(
        images=list(eight_bit.numpy()), input_data_format="channels_first", return_tensors="pt"
    )
    return {name: value.to(images.device) for name, value in batch.items()}


def _head(name: str, model: nn.Module) -> nn.Linear:
    """The last linear layer, which gives the logits."""
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
