"""Labelled images, from scikit-learn's digits to any data set that the ``datasets`` library reads.

Images are float32 in [-1, 1], the space of diffusion.  A fixed part of every class is held out: no
network is trained on it, and calibration and the accuracy of classifiers are measured on it.
"""

from __future__ import annotations

import errno
import hashlib
import os
import struct
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dng_math import checks
from dng_models.support import foreign
from dng_models.support.progress import progress_bar

if TYPE_CHECKING:
    import datasets
    from PIL import Image
    from torch import Tensor

HELD_OUT = 0.2
SPLIT_SEED = 0
HUB_NAMES = {"mnist": "ylecun/mnist", "cifar10": "uoft-cs/cifar10"}
SPLIT_NAMES = ("train", "test", "validation", "data")
LABEL_NAMES = ("label", "labels", "fine_label", "class", "cls", "target", "digit")
IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "ppm", "pgm")


@dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled images.

    Subsets keep ``classes``, so a class has the same number in all of them.

    Attributes
    ----------
    images : Tensor, shape (N, C, H, W)
        float32, in [-1, 1].
    labels : Tensor, shape (N,)
        int64, positions in ``classes``.
    classes : tuple of str
        Names of the classes that have images in the whole data set.
    name : str
        Name of the data set.
    is_held_out : Tensor, shape (N,)
        bool; default a fifth of every class, by :func:`held_out_rows`.
    source_classes : tuple of str
        Names of all classes in the numbering of the source, including those without images;
        default ``classes``.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    name: str
    is_held_out: Tensor | None = None
    source_classes: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.source_classes is None:
            object.__setattr__(self, "source_classes", self.classes)
        if self.is_held_out is None:
            import torch

            rows = torch.from_numpy(held_out_rows(self.labels.numpy(), HELD_OUT))
            object.__setattr__(self, "is_held_out", rows)

    def __len__(self) -> int:
        """Number of images."""
        return len(self.images)

    def __repr__(self) -> str:
        """Name, counts and sizes."""
        n, c, h, w = self.images.shape
        return f"Dataset({self.name!r}, {n} images of {c} x {h} x {w}, {len(self.classes)} classes)"

    @property
    def image_size(self) -> int:
        """Side of the images in pixels."""
        return self.images.shape[-1]

    @property
    def channels(self) -> int:
        """Number of colour channels C."""
        return self.images.shape[1]

    @property
    def train(self) -> Dataset:
        """The images that networks are trained on."""
        return self._where(~self._held_out)

    @property
    def held_out(self) -> Dataset:
        """The images that no network sees in training."""
        return self._where(self._held_out)

    @property
    def _held_out(self) -> Tensor:
        assert self.is_held_out is not None
        return self.is_held_out

    @property
    def fingerprint(self) -> str:
        """Twelve hexadecimal digits of a hash of the images, labels and classes."""
        digest = hashlib.sha256(repr((self.classes, tuple(self.images.shape))).encode())
        digest.update(self.images.contiguous().numpy().tobytes())
        digest.update(self.labels.contiguous().numpy().tobytes())
        return digest.hexdigest()[:12]

    def only(self, classes: str | int | Iterable[str | int]) -> Dataset:
        """The images of one class or of several, by name or number."""
        return self._where(self._of(classes))

    def without(self, classes: str | int | Iterable[str | int]) -> Dataset:
        """The images of all other classes."""
        return self._where(~self._of(classes))

    def index_of(self, name_or_number: str | int) -> int:
        """Position of a class in ``classes``, given by its name or by its number in the source.

        Raises
        ------
        ValueError
            If there is no such class, or it has no images; the message lists the classes.
        """
        assert self.source_classes is not None
        text = str(name_or_number)
        if name_or_number in self.source_classes:
            wanted = str(name_or_number)
        elif text.isdecimal() and int(text) < len(self.source_classes):
            wanted = self.source_classes[int(text)]
        else:
            raise ValueError(
                f"class must be one of {', '.join(self.classes)} or a number from 0 to "
                f"{len(self.source_classes) - 1}; got {name_or_number!r}"
            )
        if wanted not in self.classes:
            raise ValueError(
                f"class must be one of those that {self.name} has images of, "
                f"{', '.join(self.classes)}; got {name_or_number!r}, and {wanted!r} has none"
            )
        return self.classes.index(wanted)

    def _of(self, classes: str | int | Iterable[str | int]) -> Tensor:
        import torch

        wanted = [classes] if isinstance(classes, str | int) else list(classes)
        return torch.isin(self.labels, torch.tensor([self.index_of(c) for c in wanted]).long())

    def chosen(self, rows: Tensor) -> Dataset:
        """The images that a mask of shape (N,) selects."""
        return self._where(rows)

    def _where(self, rows: Tensor) -> Dataset:
        return replace(
            self,
            images=self.images[rows],
            labels=self.labels[rows],
            is_held_out=self._held_out[rows],
        )


def held_out_rows(labels: NDArray[np.integer], share: float) -> NDArray[np.bool_]:
    """Choose rows to hold out: a share of all, in the proportions of the classes.

    If ``share`` > 0, a class of two or more images has at least one held-out and one other image.
    The same arguments always give the same rows.

    Parameters
    ----------
    labels : ndarray of int, shape (N,)
        Class of every row.
    share : float
        Share to hold out, in [0, 1).

    Returns
    -------
    ndarray of bool, shape (N,)
        True for held-out rows.
    """
    classes, counts = np.unique(labels, return_counts=True)
    exact = counts * share
    held = np.floor(exact).astype(np.int64)
    missing = ceil(len(labels) * share) - held.sum()
    held[np.argsort(held - exact, kind="stable")[:missing]] += 1
    if share > 0:
        held = np.clip(held, np.minimum(counts - 1, 1), counts - 1)
    rows = np.zeros(len(labels), dtype=np.bool_)
    rng = np.random.Generator(np.random.Philox(SPLIT_SEED))
    for label, number in zip(classes, held, strict=True):
        rows[rng.permutation(np.flatnonzero(labels == label))[:number]] = True
    return rows


def load_dataset(
    dataset: str | Path = "digits",
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    split: str = "train",
    held_out: float = HELD_OUT,
    image_size: int | None = None,
    channels: int | None = None,
) -> Dataset:
    """Read a labelled data set of images.

    Parameters
    ----------
    dataset : str or Path
        "digits", scikit-learn's 1,797 digits of 8 x 8 pixels; "mnist" or "cifar10" from the Hugging
        Face hub; a parquet file; a folder with one sub-folder of images per class; or any other
        name on the hub.  Photographs are rotated according to their EXIF orientation.
    image_column, label_column : str, optional
        Needed if the data set has several columns of that kind; default the only one, or the only
        one of a usual name ("label", or "cls" of a webdataset).  Labels are names, whole numbers,
        or True and False.
    split : str
        Split of a hub data set.
    held_out : float
        Share of the images that no network is trained on, in [0, 1).
    image_size : int, optional
        The central square of every image is resized to this side, in pixels; default unchanged.
    channels : {1, 3}, optional
        Convert to grey or colour; default unchanged.

    Returns
    -------
    Dataset
        ``classes`` are those that have images; ``source_classes`` keeps the numbers of the others.

    Raises
    ------
    ValueError, TypeError
        If an argument is not allowed, or the data cannot be used: columns are missing or ambiguous,
        images are missing, animated, of several sizes, not square or transparent, labels are
        missing, or a class has a single image.
    FileNotFoundError, OSError
        If there is no such file, or the hub cannot be reached.
    """
    held_out = checks.real("held_out", held_out, "in [0, 1)", 0.0, 1.0, closed="[)")
    if image_size is not None:
        image_size = checks.integer("image_size", image_size, 1)
    if channels not in (None, 1, 3):
        raise ValueError(f"channels must be 1 (grey), 3 (colour) or None, got {channels!r}")
    if dataset == "digits":
        for argument, value in (
            ("image_column", image_column),
            ("label_column", label_column),
            ("image_size", image_size),
        ):
            if value is not None:
                raise ValueError(f"{argument} must be None for the digits, got {value!r}")
        if channels == 3:
            raise ValueError("channels must be 1 or None for the digits, got 3")
        return _digits(held_out)
    table = _read(dataset, split)
    images, rows, names = _columns(table, dataset, image_column, label_column)
    pixels = _pixels(table, images, image_size, channels)
    return _dataset(pixels, rows, names, _name(dataset), held_out)


def first_size(
    dataset: str | Path,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    split: str = "train",
) -> tuple[int, int]:
    """Height and width, in pixels, of the first image of a data set, before any resizing.

    Takes the arguments and raises the errors of :func:`load_dataset`; decodes no other image.
    """
    import datasets

    if dataset == "digits":
        return 8, 8
    table = _read(dataset, split)
    column, _, _ = _columns(table, dataset, image_column, label_column)
    first = table.select([0]).select_columns([column])
    array = _array(
        first.cast_column(column, datasets.Image(decode=False))[0][column], 0, None, 3, square=False
    )
    return array.shape[0], array.shape[1]


def _name(dataset: str | Path) -> str:
    """The stem of a path, or its parent's name if the stem is only that of a split ("train")."""
    path = Path(dataset)
    if not path.exists():
        return str(dataset)
    path = path.resolve()
    return path.parent.name if path.stem in SPLIT_NAMES else path.stem


def _dataset(
    pixels: NDArray[np.float32],
    labels: NDArray[np.int64],
    classes: Sequence[str],
    name: str,
    held_out: float,
) -> Dataset:
    """Check the classes, leave out those without images, and choose the held-out images."""
    import torch

    source_classes = tuple(classes)
    present, labels = np.unique(labels, return_inverse=True)
    labels = labels.reshape(-1).astype(np.int64)
    classes = [source_classes[number] for number in present]
    for class_name, count in zip(classes, np.bincount(labels), strict=True):
        if count < 2:
            raise ValueError(
                f"every class of {name} must have at least 2 images (one is held out), "
                f"but {class_name!r} has {count} of {len(labels)}"
            )
    if len(classes) < 2:
        raise ValueError(f"{name} must have at least 2 classes, got {list(classes)}")
    return Dataset(
        images=torch.from_numpy(pixels),
        labels=torch.from_numpy(labels),
        classes=tuple(classes),
        name=name,
        is_held_out=torch.from_numpy(held_out_rows(labels, held_out)),
        source_classes=source_classes,
    )


def _digits(held_out: float) -> Dataset:
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = (digits.images[:, None] / 8.0 - 1.0).astype(np.float32)
    names = [str(digit) for digit in digits.target_names]
    return _dataset(pixels, digits.target.astype(np.int64), names, "digits", held_out)


# ---------------------------------------------------------------------- reading


def _read(dataset: str | Path, split: str) -> datasets.Dataset:
    """The rows of a file, a folder or a hub data set, with images not decoded yet."""
    import datasets

    path = Path(dataset)
    if path.is_file() and path.suffix != ".parquet":
        raise ValueError(f"dataset must be a parquet file, a folder or a name, got the file {path}")
    if path.is_file():
        foreign.check_table(path)
        where: tuple[str, dict[str, Any]] = ("parquet", {"data_files": str(path)})
    elif path.is_dir():
        _require_readable(path)
        where = ("imagefolder", {"data_dir": str(path), "drop_labels": False})
    else:
        foreign.require_hub_name("dataset", dataset)
        where = (HUB_NAMES.get(str(dataset), str(dataset)), {})
        if int(datasets.__version__.split(".")[0]) < 4:
            # Before version 4 a data set could be a script, which the library offered to run.
            where[1]["trust_remote_code"] = False
    # Ask the hub once first: the library itself tries five times for a missing data set, and again
    # without a connection.
    reached = path.exists() or foreign.ask_hub(where[0], "dataset")
    try:
        with nullcontext() if reached else foreign.hub_offline():
            return datasets.load_dataset(where[0], split=split, **where[1])
    except (datasets.exceptions.DatasetGenerationError, OSError, ValueError) as error:
        if path.exists() or not isinstance(error, OSError):
            raise ValueError(f"dataset '{dataset}' cannot be read: {_reason(error)}") from error
        raise FileNotFoundError(
            f"dataset '{dataset}' is no local file or folder, and the Hugging Face hub "
            f"{'did not give it' if reached else 'cannot be reached'}: {_reason(error)}"
        ) from error


def _require_readable(folder: Path) -> None:
    """Refuse a folder with unreadable parts, which the library would skip silently."""
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

    def refuse(error: OSError) -> None:
        raise ValueError(
            f"{error.filename} cannot be read ({error.strerror}), and its images would be missing "
            "in the data: give yourself the right to (chmod), or move it out"
        )

    for directory, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        shown = [name for name in names if not name.startswith((".", "__"))]
        images = [name for name in shown if Path(name).suffix.lower() in ImageFolder.EXTENSIONS]
        if shown and not images and not folders and Path(directory) != folder:
            raise ValueError(
                f"{directory} has no image among its {len(shown)} files (such as {shown[0]}), and "
                "its class would be missing in the data: convert them to PNG or JPEG, or move it "
                "out"
            )
        for name in images:
            path = Path(directory, name)
            if not path.is_file():
                refuse(OSError(errno.ENOENT, "it is no file, or a link to none", str(path)))
            if not os.access(path, os.R_OK):
                refuse(PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path)))


def _reason(error: BaseException) -> str:
    """Type and message of the innermost cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"


def _columns(
    table: datasets.Dataset, dataset: str | Path, image: str | None, label: str | None
) -> tuple[str, NDArray[np.int64], list[str]]:
    """Name of the image column, the labels, and the names of the classes."""
    features = table.features
    listed = ", ".join(features)

    def named(role: str, given: str | None, fitting: list[str], usual: list[str]) -> str:
        if given is not None:
            if given not in features:
                raise ValueError(
                    f"{role}_column must be one of the columns of {dataset}, {listed}; "
                    f"got {given!r}"
                )
            if given not in fitting:
                raise ValueError(
                    f"{role}_column must hold {role}s, and {given!r} of {dataset} holds "
                    f"{features[given]}"
                )
            return given
        if len(usual) != 1:
            found = f"several: {', '.join(usual)}" if usual else "none"
            raise ValueError(
                f"{dataset} must have one {role} column, or {role}_column must name it; "
                f"found {found} (columns: {listed})"
            )
        return usual[0]

    images = [name for name in features if _is_image(features[name])]
    # Bytes may be anything; only the name of their column says that they are images.
    encoded = [name for name in features if _is_bytes(features[name])]
    likely = images or [name for name in encoded if name.lower() in IMAGE_NAMES]
    image = named("image", image, images + encoded, likely)

    labels = [name for name in features if name != image and _is_label(features[name])]
    # Some programs write whole numbers with nulls as floats; other floats are measurements.
    floats = [name for name in features if _is_float(features[name])]
    # The keys and addresses of a webdataset identify single rows.
    likely = [name for name in labels if not (name.startswith("__") and name.endswith("__"))]
    usual = [name for name in likely + floats if name.lower() in LABEL_NAMES]
    label = named("label", label, labels + floats, usual or likely)
    return image, *_labels(table, label)


def _is_image(feature: Any) -> bool:
    """Whether a column holds images, or the struct with bytes that parquet stores them as."""
    import datasets

    return isinstance(feature, datasets.Image) or (isinstance(feature, dict) and "bytes" in feature)


def _holds(feature: Any, kinds: Sequence[str]) -> bool:
    import datasets

    return isinstance(feature, datasets.Value) and feature.dtype.rstrip("0123456789") in kinds


def _is_bytes(feature: Any) -> bool:
    return _holds(feature, ("binary", "large_binary"))


def _is_float(feature: Any) -> bool:
    return _holds(feature, ("float",))


def _is_label(feature: Any) -> bool:
    import datasets

    kinds = ("int", "uint", "string", "large_string", "bool")
    return isinstance(feature, datasets.ClassLabel) or _holds(feature, kinds)


def _labels(table: datasets.Dataset, column: str) -> tuple[NDArray[np.int64], list[str]]:
    import datasets

    values = table[column][:]
    for row, value in enumerate(values):
        # The hub writes -1 for a withheld label; NaN is not equal to itself.
        if value is None or value != value or value in (-1, ""):
            raise ValueError(
                f"every image must have a label, and row {row} of {column!r} has none ({value!r})"
            )
        if isinstance(value, float) and not value.is_integer():
            raise ValueError(
                f"labels must be names or whole numbers, and row {row} of {column!r} has {value!r}"
            )
    feature = table.features[column]
    if isinstance(feature, datasets.ClassLabel):
        for row, value in enumerate(values):
            if not 0 <= value < len(feature.names):
                raise ValueError(
                    f"labels must be from 0 to {len(feature.names) - 1}, of the names of "
                    f"{column!r}, and row {row} has {value}"
                )
        return np.array(values, dtype=np.int64), list(feature.names)
    if _is_float(feature):
        values = [int(value) for value in values]
    names, labels = np.unique(np.array(values), return_inverse=True)
    return labels.reshape(-1).astype(np.int64), [str(name) for name in names]


# ---------------------------------------------------------------------- pixels


def _pixels(
    table: datasets.Dataset, column: str, image_size: int | None, channels: int | None
) -> NDArray[np.float32]:
    """All images, shape (N, C, H, W), in [-1, 1]."""
    import datasets

    encoded = table.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    arrays: list[NDArray[np.uint8]] = []
    for row, item in enumerate(progress_bar(encoded, "reading images", unit="image", leave=False)):
        array = _array(item[column], row, image_size, channels)
        if arrays and array.shape != arrays[0].shape:
            raise ValueError(
                f"all images must be alike, but image 0 is {_shape(arrays[0])} and image {row} is "
                f"{_shape(array)}: choose an image_size or channels"
            )
        if not arrays:
            # One byte per value, then four for float32.
            foreign.require_memory(
                f"{len(encoded)} images of {_shape(array)}",
                len(encoded) * array.size * 5,
                "choose a smaller image_size",
            )
        arrays.append(array)
    if not arrays:
        raise ValueError("the data set must have images, and it is empty")
    stacked = np.stack(arrays).transpose(0, 3, 1, 2)
    return np.ascontiguousarray(stacked, dtype=np.float32) / np.float32(127.5) - np.float32(1.0)


def _shape(array: NDArray[np.uint8]) -> str:
    height, width, channels = array.shape
    return f"{height} x {width} in {'grey' if channels == 1 else 'colour'}"


def _array(
    item: dict[str, Any] | None,
    row: int,
    image_size: int | None,
    channels: int | None,
    *,
    square: bool = True,
) -> NDArray[np.uint8]:
    """One decoded image, uint8, shape (H, W, C)."""
    from io import BytesIO

    if item is None or (item["bytes"] is None and item["path"] is None):
        raise ValueError(f"every row must have an image, and row {row} has none")
    source = item["path"] if item["bytes"] is None else BytesIO(item["bytes"])
    image = read_image(source, f"image {row}", channels)
    if image_size is not None:
        image = _resized(image, image_size)
    if square and image.width != image.height:
        raise ValueError(
            f"images must be square, but image {row} has {image.width} x {image.height} pixels: "
            "choose an image_size, which cuts and resizes them"
        )
    array = np.asarray(image, dtype=np.uint8)
    return array[..., None] if array.ndim == 2 else array


def read_image(
    source: str | Path | IO[bytes], name: str, channels: int | None = None
) -> Image.Image:
    """Read an image, upright, in grey or colour, with 8 bits per channel.

    Parameters
    ----------
    source : str, Path or binary file
    name : str
        What the image is called in messages.
    channels : {1, 3}, optional
        Convert to grey or colour; default unchanged.

    Returns
    -------
    PIL.Image.Image
        Of mode "L" or "RGB".

    Raises
    ------
    ValueError
        If it cannot be decoded, has several frames or more than 8 bits per channel, or has an alpha
        channel and ``channels`` is not given (with ``channels`` alpha is dropped).
    """
    from PIL import ImageOps

    broken = OSError, SyntaxError, ValueError, EOFError, struct.error
    opened = foreign.open_image(source, name)
    try:
        with opened:
            # A camera's second frame is a preview or a depth map.
            frames = 1 if opened.format == "MPO" else getattr(opened, "n_frames", 1)
            opened.load()
            image = ImageOps.exif_transpose(opened)
    except broken as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"{name} cannot be decoded: {error}") from error
    if frames > 1:
        raise ValueError(f"images must have one frame, but {name} has {frames}")
    return _converted(image, name, channels)


def _converted(image: Image.Image, name: str, channels: int | None) -> Image.Image:
    """The image converted to mode "L" or "RGB"."""
    alpha = ("LA", "PA", "RGBA", "RGBa", "La")
    if image.mode not in ("1", "L", "P", "RGB", "CMYK", "YCbCr", *alpha):
        raise ValueError(
            f"images must have 8 bits a channel, grey or colour, but {name} has mode {image.mode!r}"
        )
    transparent = image.mode in alpha or "transparency" in image.info
    if transparent and channels is None:
        raise ValueError(
            f"images must not have an alpha channel, but {name} is {image.mode}: "
            "choose channels=1 or channels=3, which drops it"
        )
    if channels is None:
        channels = 1 if image.mode in ("1", "L") else 3
    # Between some modes Pillow's direct conversion fails, warns or is wrong.
    through = {"P": "RGBA", "PA": "RGBA", "RGBa": "RGBA", "La": "LA"}.get(image.mode)
    if transparent and through is not None:
        image = image.convert(through)
    return image.convert("L" if channels == 1 else "RGB")


def _resized(image: Image.Image, side: int) -> Image.Image:
    """The central square of an image, resized."""
    from PIL import Image

    short = min(image.size)
    left, top = (image.width - short) // 2, (image.height - short) // 2
    box = (left, top, left + short, top + short)
    return image.resize((side, side), Image.Resampling.LANCZOS, box=box)
