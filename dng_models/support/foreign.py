"""Checks of files and folders from outside before they are used.

Checkpoints, pipelines, classifiers, tables and images come from others, and may be damaged or
malicious.  Three rules hold for all of them:

*   No code in them is run.  Weights must be safetensors; classes must be those of diffusers,
    transformers or this package, even where diffusers would allow others.
*   Sizes are checked before memory is allocated: no file may claim more than it holds.
*   A fault is a ``ValueError`` (``FileNotFoundError`` where something is missing) that names the
    file and says what to do.

The checks are about files; whether the numbers in them make sense is left to their readers.
"""

from __future__ import annotations

import difflib
import errno
import importlib
import json
import math
import os
import re
import struct
import sys
import textwrap
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

from dng_models.support.progress import is_shown, say

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor, nn

MIB = 2**20
JSON_BYTES = 64 * MIB  # the largest real ones, vocabularies of tokenizers, have a few MiB
TEXT_BYTES = 1024 * MIB  # a row of a sweep has about 2 KiB
PIXELS = 2**27  # per image: 134 million, more than any camera's
UNPACKED_BYTES, UNPACKED_RATIO = 256 * MIB, 32  # limits of a table; the larger one counts
STORED_RATIO = 4  # limit for a checkpoint's archive, whose entries torch does not compress
SMALL = 2**20  # numbers that a network may have in excess of its weights
ROWS = 1024  # rows of a table that are unpacked at once, at most

HUB_SECONDS = 10  # timeout of a request to the hub
HUB_NAME = r"\w[\w.-]*(/\w[\w.-]*)?"
# Suffixes that mean a file; names on the hub may end in others, such as ".5-large".
FILE_SUFFIXES = (
    *(".parquet", ".arrow", ".csv", ".tsv", ".json", ".jsonl", ".txt", ".zip", ".tar", ".gz"),
    *(".tgz", ".npy", ".npz", ".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
    *(".safetensors", ".py", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5"),
)

INDEX = "model_index.json"
ADAPTER = "adapter_config.json"
CODE = (".py", ".pyc", ".so")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".msgpack", ".h5")
# Names of the files in which diffusers and transformers look for a network's weights.
STEMS = ("diffusion_pytorch_model", "model")
LIBRARIES = ("diffusers", "transformers", "dng_models")
# Settings of a configuration that name code, or weights in another format or place.
CALLING = ("auto_map", "custom_pipeline", "custom_pipelines", "transformers_weights")
ATTENTION = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
# Formats that only hold pixels; others start programs (EPS) or are not camera images.
FORMATS = (
    *("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF"),
    *("TGA", "ICO"),
)

CONVERT = (
    "read them once where you trust them, with from_pretrained(DIR, use_safetensors=False) of "
    "their class, and write them with save_pretrained"
)
REMOVE = "it was damaged or is another file; remove it"
AGAIN = "get or make it again"


# ---------------------------------------------------------------------- JSON


def read_json(path: Path | str, cure: str = REMOVE, *, finite: bool = False) -> Any:
    """Read the value in a JSON file.

    Parameters
    ----------
    path : Path or str
    cure : str
        What to do with a file that is not JSON, for the message.
    finite : bool
        Whether to refuse NaN and infinities, which Python reads although JSON does not have them.

    Raises
    ------
    OSError
        If there is no such file, or it cannot be read.
    ValueError
        If it is not JSON, too large, or nested too deeply; the message names the file.
    """
    path = Path(path)
    return parse_json(_bytes(path, JSON_BYTES), path, cure, finite=finite)


def read_text(path: Path | str) -> str:
    """Read a file of JSON lines as text; raises as :func:`read_json`, and if it is not UTF-8."""
    path = Path(path)
    try:
        return _bytes(path, TEXT_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text in UTF-8 ({error}): {REMOVE}") from None


def parse_json(
    text: bytes | str, where: Path | str, cure: str = REMOVE, *, finite: bool = False
) -> Any:
    """Parse a JSON text; raises a ValueError as :func:`read_json`, naming ``where`` it is."""
    try:
        # float() silently makes an infinity of a number that is too large.
        kinds: dict[str, Any] = {"parse_constant": _refuse, "parse_float": _finite}
        return json.loads(text, **(kinds if finite else {}))
    except RecursionError:
        raise ValueError(f"{where} is not JSON (it is nested too deeply): {cure}") from None
    except ValueError as error:
        raise ValueError(f"{where} is not JSON ({error}): {cure}") from None


def _refuse(text: str) -> float:
    raise ValueError(f"it has the number {text}")


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _refuse(text)


def read_object(path: Path | str, *, finite: bool = False) -> dict[str, Any]:
    """Read a JSON object; raises as :func:`read_json`, and ValueError for another value."""
    value = read_json(path, finite=finite)
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {shown(value)}")
    return value


def member(
    record: Mapping[str, Any], name: str, kind: type | tuple[type, ...], where: Path | str
) -> Any:
    """Return a value of a JSON object after checking its type; booleans do not count as numbers.

    Raises
    ------
    ValueError
        If it is missing or of another type; the message says ``where`` the object is.
    """
    if name not in record:
        raise ValueError(f"{where} has no {name!r}: it was damaged or is another file; {AGAIN}")
    value = record[name]
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        wanted = " or ".join(each.__name__ for each in kinds)
        raise ValueError(f"{name!r} in {where} must be of type {wanted}, got {shown(value)}")
    return value


def numbers(
    record: Mapping[str, Any], name: str, where: Path | str, count: int | None = None
) -> tuple[float, ...]:
    """Return a list of finite numbers in a JSON object, as :func:`member`.

    The list must have ``count`` numbers, or by default at least one.

    Raises
    ------
    ValueError
        If it is missing, or not such a list; the message says ``where`` the object is.
    """
    values = member(record, name, list, where)
    for value in values:
        if not isinstance(value, int | float) or isinstance(value, bool) or not _is_finite(value):
            raise ValueError(f"{name!r} in {where} must be finite numbers, got {shown(value)}")
    if len(values) != count if count is not None else not values:
        wanted = "at least one number" if count is None else f"{count} numbers"
        raise ValueError(f"{name!r} in {where} must be {wanted}, got {len(values)}")
    return tuple(values)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond all floats
        return False


def shown(value: object) -> str:
    """A value from outside as a short text for a message."""
    try:
        return textwrap.shorten(repr(value), 80, placeholder=" ...")[:120]
    except (RecursionError, ValueError):
        return f"a {type(value).__name__}"


def _bytes(path: Path, most: int) -> bytes:
    """Read a regular file of at most ``most`` bytes; reading a pipe could wait for ever."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} must be a regular file")
    size = path.stat().st_size
    if size > most:
        raise ValueError(
            f"{path} has {size / MIB:.0f} MiB, and what it should be has no more than "
            f"{most / MIB:.0f}: it is another file; remove it"
        )
    return path.read_bytes()


# ---------------------------------------------------------------------- tensors


def load_tensors(
    path: Path | str, *, finite: bool = False
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors, on the CPU, and the metadata of a safetensors file.

    Parameters
    ----------
    path : Path or str
    finite : bool
        Whether to refuse NaN and infinities.

    Raises
    ------
    OSError
        If there is no such file, or it cannot be read.
    ValueError
        If it is not a safetensors file, damaged, or larger than the memory; the message names it.
    """
    path = Path(path)
    with _opened(path) as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
        metadata = dict(file.metadata() or {})
    if finite:
        require_finite(path, tensors.items())
    return tensors, metadata


def metadata(path: Path | str) -> dict[str, str]:
    """Read the metadata of a safetensors file; raises as :func:`load_tensors`."""
    with _opened(Path(path)) as file:
        return dict(file.metadata() or {})


def shapes(path: Path | str) -> dict[str, tuple[int, ...]]:
    """Read the shapes of the tensors in a safetensors file; raises as :func:`load_tensors`."""
    with _opened(Path(path)) as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}


class _opened:
    """An opened safetensors file, whose header is checked; errors name the file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> Any:
        from safetensors import safe_open

        if not self._path.is_file():
            raise FileNotFoundError(f"{self._path} must be a safetensors file, and there is none")
        size, memory = self._path.stat().st_size, _memory()
        if size > memory:
            raise ValueError(
                f"{self._path} has {size / 2**30:.0f} GiB, more than the {memory / 2**30:.0f} GiB "
                "of this machine's memory"
            )
        try:
            self._file = safe_open(self._path, framework="pt", device="cpu")
            return self._file.__enter__()  # type: ignore[no-untyped-call]
        except Exception as error:
            raise self._named(error) from None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._file.__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        if isinstance(error, Exception):
            raise self._named(error) from None

    def _named(self, error: Exception) -> Exception:
        if isinstance(error, OSError | MemoryError):
            return error
        return ValueError(
            f"{self._path} is not a whole safetensors file ({error}): it was damaged or is another "
            "file; remove it, and what made it makes it again"
        )


def _memory() -> int:
    """Size of this machine's memory, in bytes."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return sys.maxsize


def require_memory(what: str, size: int, cure: str) -> None:
    """Refuse what would need more memory than this machine has.

    Parameters
    ----------
    what : str
        What needs the memory, for the message.
    size : int
        Bytes that it needs.
    cure : str
        What to do instead, for the message.

    Raises
    ------
    ValueError
        If ``size`` exceeds the memory.
    """
    memory = _memory()
    if size > memory:
        raise ValueError(
            f"{what} would take {size / 2**30:.0f} GiB, more than the {memory / 2**30:.0f} GiB of "
            f"this machine's memory: {cure}"
        )


def require_finite(where: Path | str, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse weights that are NaN or infinite; later errors would not point to them.

    Raises
    ------
    ValueError
        If there are such weights; the message says ``where``, and names the first tensor.
    """
    import torch

    for name, tensor in tensors:
        # torch has no arithmetic for 8-bit floats.
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            continue
        # A finite sum proves that all are finite; an infinite one may be an overflow.
        if torch.isfinite(tensor.detach().sum(dtype=torch.float64)):
            continue
        broken = int((~torch.isfinite(tensor)).sum())
        if broken:
            half = " in float16, which ends at 65504" if tensor.dtype == torch.float16 else ""
            raise ValueError(
                f"{where} has weights that are NaN or infinite{half} ({broken} of "
                f"{tensor.numel()} in {name}): its training diverged, or the file was damaged; "
                f"{'try another --dtype, or ' if half else ''}{AGAIN}"
            )


def require_finite_network(where: Path | str, network: nn.Module, part: str = "") -> None:
    """Apply :func:`require_finite` to a network's state; ``part`` is a prefix of the names."""
    prefix = f"{part}." if part else ""
    # Buffers outside the state may be infinite on purpose, such as attention masks.
    require_finite(where, ((prefix + name, t) for name, t in network.state_dict().items()))


def outline(make: Any, config: Any, where: Path | str, held: Mapping[str, Any]) -> Any:
    """Make a network without memory for its weights, from an untrusted configuration.

    Parameters
    ----------
    make : callable
        ``make(config)`` gives the network.
    config
        The configuration.
    where : Path or str
        Where the configuration is, for messages.
    held : mapping
        Tensors of the weights, by name: a network cannot have more layers than tensors.

    Raises
    ------
    ValueError
        If the network cannot be made; the message names the file.
    """
    import torch

    require_layers(config, where, len(held))
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            return make(config)
    except MemoryError:
        raise
    except Exception as error:  # a class may raise anything for a wrong setting
        raise ValueError(
            f"{where} describes no network that can be made ({reason(error)}): {AGAIN}"
        ) from error


def require_layers(config: Any, where: Path | str, most: int) -> None:
    """Refuse a configuration with more layers than tensors, which could take for ever to make.

    Raises
    ------
    ValueError
        If there are more than ``most`` layers; the message names the file and the setting.
    """
    for name, value in _settings(config):
        counts = "layers" in name or "depth" in name
        for count in value if isinstance(value, list | tuple) else [value]:
            if counts and isinstance(count, int) and count > max(most, 1):
                raise ValueError(
                    f"{where} has {name} = {shown(value)}, and the weights beside it are only "
                    f"{most} tensors: they are not of one network; {AGAIN}"
                )


def _settings(config: Any) -> Iterator[tuple[str, Any]]:
    """Names and values of a configuration, including nested ones."""
    waiting = [config]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Mapping):
            yield from ((str(name), each) for name, each in value.items())
            waiting += value.values()
        elif isinstance(value, list | tuple):
            waiting += value


# ---------------------------------------------------------------------- folders of models


def check_model(folder: Path | str, *, weights: bool = True) -> None:
    """Check the folder of one network, processor or scheduler before it is loaded.

    Parameters
    ----------
    folder : Path or str
    weights : bool
        Whether it must hold a network's weights, as safetensors.

    Raises
    ------
    FileNotFoundError
        If there are no weights.
    ValueError
        If it holds or names code, its weights are pickles or an adapter's, or a file is damaged;
        the message names the file and says what to do.
    """
    folder = Path(folder)
    _check_names(folder)
    for path in sorted(folder.glob("*.json")):
        _check_json(path)
    if weights:
        require_tensors(folder)
    if (folder / INDEX).is_file():
        check_pipeline(folder)


def _check_names(folder: Path) -> None:
    """Refuse files of code and of adapters in the folder."""
    for path in sorted(folder.iterdir()):
        if path.suffix in CODE:
            raise ValueError(
                f"{path} is code, which is never run here: remove it, if the rest of the folder is "
                "made of classes of diffusers and transformers"
            )
        if path.name == ADAPTER:
            raise ValueError(
                f"{path} makes an adapter of the folder, to a network elsewhere: merge it "
                "(merge_and_unload of peft) and save the whole network"
            )


def _check_json(path: Path) -> None:
    """Check that a file is JSON and, if it is a configuration, names no code."""
    value = read_json(path)
    if path.name not in ("config.json", INDEX) and not path.name.endswith("_config.json"):
        return
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {shown(value)}")
    kind = value.get("_class_name")
    if kind is not None and not isinstance(kind, str):
        raise ValueError(
            f"{path} has _class_name = {shown(kind)}: it must be the name of one class of "
            "diffusers, for code that comes with a folder is never run here"
        )
    for name, each in _settings(value):
        if name in CALLING and each:
            raise ValueError(
                f"{path} has {name} = {shown(each)}, which names code or weights that are never "
                "loaded here: remove that line, if the class is one of diffusers or transformers"
            )
        if name in ATTENTION and "/" in str(each):
            raise ValueError(
                f"{path} has {name} = {shown(each)}, which is code from the hub and never run "
                "here: remove that line"
            )


def require_tensors(folder: Path | str) -> dict[str, tuple[int, ...]]:
    """Read the shapes of all tensors in a network's folder, by name.

    Raises
    ------
    FileNotFoundError
        If there are no weights.
    ValueError
        If all weights are pickles, they are damaged, or their index points elsewhere.
    """
    folder = Path(folder)
    found: dict[str, tuple[int, ...]] = {}
    for path in weight_files(folder):
        found |= shapes(path)
    if found:
        return found
    pickles = pickles_in(folder)
    if pickles:
        raise ValueError(
            f"{folder} has weights as {', '.join(pickles)} only, a format that can hold code; "
            f"they must be safetensors: {CONVERT}"
        )
    raise FileNotFoundError(
        f"there are no weights in {folder}: {' or '.join(f'{s}.safetensors' for s in STEMS)} is "
        f"needed; of a repository that has others only, {CONVERT}"
    )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files from which a network is loaded.

    Raises
    ------
    FileNotFoundError
        If a part that an index names is missing.
    ValueError
        If an index is damaged, or names another place or format.
    """
    found = []
    for stem in STEMS:
        whole, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
        if whole.is_file():
            found.append(whole)
        if not index.is_file():
            continue
        parts = member(read_object(index), "weight_map", dict, index)
        for part in sorted({str(part) for part in parts.values()}):
            if Path(part).name != part or not part.endswith(".safetensors"):
                raise ValueError(
                    f"{index} names {part!r}, and must name safetensors files beside it"
                )
            if not (folder / part).is_file():
                raise FileNotFoundError(f"{folder / part} is missing, a part of the weights there")
            found.append(folder / part)
    return found


def pickles_in(folder: Path) -> list[str]:
    """Names of the files in formats that can run code when they are loaded."""
    return sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)


def check_pipeline(folder: Path | str, *, weights: bool = True) -> None:
    """Check the folder of a diffusers pipeline before ``from_pretrained`` loads it.

    Diffusers 0.35 imports whatever ``model_index.json`` names: a module in the folder, in that of
    a part, or from the working directory, and even a file named ``None.py``.

    Parameters
    ----------
    folder : Path or str
    weights : bool
        Whether the networks must have weights; False before they are downloaded.

    Raises
    ------
    FileNotFoundError
        If there is no ``model_index.json``, or a part lacks its weights.
    ValueError
        If a class is not one of diffusers, transformers or this package, and as
        :func:`check_model`.
    """
    folder = Path(folder)
    index = folder / INDEX
    if not index.is_file():
        raise FileNotFoundError(f"there is no {INDEX} in {folder}")
    _check_names(folder)
    _check_json(index)
    told = read_object(index)
    import diffusers
    from torch import nn

    kind = told.get("_class_name")
    pipeline = getattr(diffusers, kind, None) if isinstance(kind, str) else None
    if not (isinstance(pipeline, type) and issubclass(pipeline, diffusers.DiffusionPipeline)):
        raise ValueError(
            f"{index} has _class_name = {shown(kind)}, and must name a pipeline of diffusers "
            f"({diffusers.__version__} has none of that name)"
        )
    for name, made in parts(folder).items():
        if (folder / name).is_dir():
            check_model(folder / name, weights=weights and issubclass(made, nn.Module))


def parts(folder: Path | str) -> dict[str, type]:
    """Classes of a pipeline's parts, by name.

    Raises
    ------
    OSError, ValueError
        As :func:`check_pipeline`.
    """
    index = Path(folder) / INDEX
    told = read_object(index).items()
    found = {name: _component(index, name, each) for name, each in told if name[:1] != "_"}
    return {name: made for name, made in found.items() if made is not None}


def _component(index: Path, name: str, value: Any) -> type | None:
    """The class of a pipeline's part; None for an empty part or a setting."""
    # Diffusers takes everything for a part that can be unpacked into two.
    is_part = isinstance(value, list) or (isinstance(value, str | dict) and len(value) == 2)
    if not is_part or (isinstance(value, list) and not any(map(_names, value))):
        return None
    if not name.isidentifier() or not isinstance(value, list) or len(value) != 2:
        raise ValueError(
            f"{index} has {shown(name)}: {shown(value)}, and a part of a pipeline must be a name "
            "with [library, class]"
        )
    library, kind = value
    if library is None and kind is None:
        return None
    if not (isinstance(library, str) and isinstance(kind, str) and kind.isidentifier()):
        found = None
    else:
        found = _module(library)
    if found is None:
        raise ValueError(
            f"{index} takes {name} from {shown(value)}: it must be a class of diffusers, "
            "transformers or dng_models, for code that comes with a pipeline is never run here"
        )
    # If the class is missing, the name may be an old one, which diffusers maps to a new one.
    made = getattr(found, kind, object)
    if not isinstance(made, type):
        raise ValueError(f"{index} takes {name} from {shown(value)}, which is no class")
    if kind == "AutoModel" or kind.startswith("AutoPipeline"):
        raise ValueError(
            f"{index} takes {name} from {shown(value)}: name the class itself, which "
            f"{name}/config.json has as _class_name"
        )
    return made


def _names(value: object) -> bool:
    return isinstance(value, str)


def _module(library: str) -> Any:
    """The module of one of the libraries; None for any other name."""
    first, *rest = library.split(".")
    if first == "dng_models" and all(part.isidentifier() for part in rest):
        try:
            return importlib.import_module(library)
        except ModuleNotFoundError:
            return None
    if library in LIBRARIES:
        return importlib.import_module(library)
    # Modules of diffusers' pipelines have parts too, such as the safety checker.
    from diffusers import pipelines

    if not library.isidentifier() or not hasattr(pipelines, library):
        return None
    module = getattr(pipelines, library)
    name = getattr(module, "__name__", "")
    return module if name == f"diffusers.pipelines.{library}" else None


def hub_folder(name: str) -> tuple[Path, str | None]:
    """Download the configurations of a model on the hub, before anything else.

    They are for :func:`check_model` or :func:`check_pipeline`.

    Returns
    -------
    folder : Path
        Folder of the configurations in the hub's cache.
    revision : str or None
        Their commit, if it is known.

    Raises
    ------
    OSError
        If they cannot be downloaded and are not in the cache; at once if the name is a path.
    """
    from huggingface_hub import snapshot_download

    is_there = ask_hub(name, "model")
    try:
        found = Path(
            snapshot_download(name, allow_patterns=["*.json"], local_files_only=not is_there)
        )
    except ValueError as error:
        raise FileNotFoundError(f"{shown(name)} is no name on the hub ({reason(error)})") from error
    is_commit = len(found.name) == 40 and found.parent.name == "snapshots"
    return found, found.name if is_commit else None


# ---------------------------------------------------------------------- paths, or names on the hub


def is_path(name: str | Path) -> bool:
    """Whether a name without a file or folder was meant as a path, not as a name on the hub."""
    text = str(name)
    return (
        isinstance(name, Path)
        or text.startswith((".", "~", "/"))
        or text.endswith("/")
        or Path(text).suffix.lower() in FILE_SUFFIXES
        or ("/" in text and Path(text).parent.is_dir())
        or re.fullmatch(HUB_NAME, text) is None
    )


def require_hub_name(what: str, name: str | Path) -> None:
    """Refuse a path that does not exist, before the hub is asked for it.

    Raises
    ------
    FileNotFoundError
        If the name is a path; the message names ``what`` it is for, and a similar existing path.
    """
    if is_path(name):
        raise FileNotFoundError(
            f"{what} must be a file, a folder or a name on the Hugging Face hub, got {name!r:.400}:"
            f" there is no such file or folder{_nearly(Path(name))}"
        )


def _nearly(path: Path) -> str:
    """A hint for a message: an existing path with a similar name, or a missing folder."""
    try:
        names = [each.name for each in path.parent.iterdir()]
    except OSError:
        return f", and no folder {path.parent}"
    found = difflib.get_close_matches(path.name, names, 1)
    return f" (did you mean {path.parent / found[0]}?)" if found else ""


def ask_hub(name: str, kind: Literal["model", "dataset"]) -> bool:
    """Ask the hub for a repository, for at most :data:`HUB_SECONDS`.

    Returns
    -------
    bool
        True if the hub has it; False if the hub cannot be reached, so that only the cache is left.

    Raises
    ------
    FileNotFoundError
        If the hub does not have it, or the name is a path.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    require_hub_name(kind, name)
    if is_shown():
        told = f"there is no file or folder {name}: asking the Hugging Face hub for a {kind}"
        say(f"{told} of that name, for at most {HUB_SECONDS} s", sys.stderr)
    try:
        HfApi().repo_info(name, repo_type=kind, timeout=HUB_SECONDS)
    except (RepositoryNotFoundError, HFValidationError):
        raise FileNotFoundError(
            f"there is no file or folder {name}{_nearly(Path(name))}, and the Hugging Face hub has "
            f"no {kind} of that name (or it is private)"
        ) from None
    except Exception:  # huggingface_hub's network errors differ between versions
        return False
    return True


@contextmanager
def hub_offline() -> Iterator[None]:
    """Use only the hub's cache in this block, without requests to the hub."""
    import datasets
    import huggingface_hub

    places: tuple[Any, ...] = (datasets.config, huggingface_hub.constants)
    before = [place.HF_HUB_OFFLINE for place in places]
    for place in places:
        place.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value


def require_size(network: nn.Module, folder: Path | str) -> None:
    """Refuse a network with far more parameters than its folder, before memory is allocated.

    A smaller mismatch is left to the loading function, which can name the missing weights.

    Parameters
    ----------
    network : Module
        From :func:`outline`.
    folder : Path or str
        Folder of the weights.

    Raises
    ------
    ValueError
        If the network is too large; the message has both counts.
    """
    held = sum(map(math.prod, require_tensors(folder).values()))
    wanted = sum(parameter.numel() for parameter in network.parameters())
    if wanted > 2 * held + SMALL:
        raise ValueError(
            f"the weights in {folder} are {held:,} numbers, and the network in its config.json has "
            f"{wanted:,}: some are missing, or they are of another network; {AGAIN}"
        )


def check_size(make: Callable[[dict[str, Any]], nn.Module], folder: Path | str) -> None:
    """Apply :func:`require_size` to the network that ``make`` makes from ``config.json``.

    Some classes of older versions cannot be made without memory; for them only the number of
    layers is checked.

    Raises
    ------
    OSError, ValueError
        As :func:`read_json`, :func:`require_tensors`, :func:`require_layers` and
        :func:`require_size`.
    """
    path = Path(folder) / "config.json"
    config, held = read_object(path), require_tensors(folder)
    require_layers(config, path, len(held))
    try:
        network = outline(make, config, path, held)
    except ValueError:
        return
    require_size(network, folder)


# ---------------------------------------------------------------------- checkpoints of torch


def check_archive(path: Path | str) -> None:
    """Check the checksums and sizes of a torch checkpoint, if it is a zip archive.

    Torch ignores the checksums, so that a flipped bit would silently change a weight.  Other
    checkpoints have no checksums and pass.

    Raises
    ------
    ValueError
        If a checksum is wrong, the archive is damaged, or it would unpack to much more than its
        size; the message names it.
    """
    path = Path(path)
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
            packed = path.stat().st_size
            if unpacked > STORED_RATIO * packed:
                raise ValueError(
                    f"{path} cannot be loaded as weights alone: it has {packed / MIB:.1f} MiB and "
                    f"would unpack to {unpacked / MIB:,.0f}, which torch never writes"
                )
            broken = archive.testzip()
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(
            f"{path} cannot be loaded as weights alone: it is damaged ({error}); {AGAIN}"
        ) from None
    except Exception as error:  # from zlib, or for a damaged table of contents
        if isinstance(error, ValueError) and str(error).startswith(str(path)):
            raise
        raise ValueError(
            f"{path} cannot be loaded as weights alone: it is damaged ({reason(error)}); {AGAIN}"
        ) from None
    if broken is not None:
        raise ValueError(
            f"{path} cannot be loaded as weights alone: it is damaged (the checksum of {broken} is "
            f"wrong); {AGAIN}"
        )


def require_stored(path: Path, tensors: Iterable[Tensor]) -> None:
    """Refuse tensors that are much larger than their file, such as views that repeat few numbers.

    Raises
    ------
    ValueError
        If they are too large; the message names the file.
    """
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    held = path.stat().st_size
    if size > STORED_RATIO * held:
        raise ValueError(
            f"{path} has {held / MIB:.1f} MiB, and its tensors would take {size / MIB:,.0f}: it is "
            f"damaged, or made to fill the memory; {AGAIN}"
        )


# ---------------------------------------------------------------------- images and tables


def open_image(source: str | Path | IO[bytes], name: str) -> Image.Image:
    """Open an image file, without decoding it yet.

    Parameters
    ----------
    source : str, Path or binary file
    name : str
        Name of the image in messages.

    Raises
    ------
    ValueError
        If its format is not one of :data:`FORMATS`, or it has more than :data:`PIXELS` pixels.
    OSError
        If the file cannot be read.
    """
    from PIL import Image

    Image.init()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            image = Image.open(source, formats=[each for each in FORMATS if each in Image.OPEN])
        except Image.DecompressionBombError:
            raise ValueError(_too_many_pixels(name, "")) from None
        except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise ValueError(f"{name} cannot be decoded: {error}") from error
    if image.width * image.height > PIXELS:
        size = f" {image.width} x {image.height} ="
        image.close()
        raise ValueError(_too_many_pixels(name, size))
    return image


def _too_many_pixels(name: str, size: str) -> str:
    return (
        f"{name} unpacks to{size} more than {PIXELS / 1e6:.0f} million pixels: it is damaged, or "
        "made to fill the memory; remove it"
    )


def check_table(path: Path | str) -> None:
    """Check that a parquet file is whole, and how much it unpacks to, a few rows at a time.

    Raises
    ------
    ValueError
        If it is damaged, or unpacks to more than 256 MiB and 32 times its size.
    """
    import pyarrow
    from pyarrow import parquet

    path = Path(path)
    size = path.stat().st_size
    most = max(UNPACKED_BYTES, UNPACKED_RATIO * size)
    try:
        with parquet.ParquetFile(path) as file:
            told = file.metadata
            groups = [told.row_group(i) for i in range(told.num_row_groups)]
            columns = [group.column(j) for group in groups for j in range(told.num_columns)]
            _require_unpacked(path, size, sum(c.total_uncompressed_size for c in columns), most)
            # Rows may share a dictionary's value, which is unpacked for each row.
            largest = max((c.total_uncompressed_size for c in columns), default=1)
            rows = max(1, min(ROWS, 2 * UNPACKED_BYTES // max(largest, 1)))
            unpacked = 0
            for batch in file.iter_batches(batch_size=rows):
                unpacked += batch.nbytes
                _require_unpacked(path, size, unpacked, most)
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(
            f"{path} cannot be read: it is no whole parquet file ({reason(error)}); {AGAIN}"
        ) from None


def _require_unpacked(path: Path, size: int, unpacked: int, most: int) -> None:
    if unpacked > most:
        raise ValueError(
            f"{path} has {size / MIB:.1f} MiB and unpacks to more than {most / MIB:,.0f}: images "
            "do not, it is another table, or made to fill the memory"
        )


# ---------------------------------------------------------------------- at the command lines

# Errors of the machine and its disks, as opposed to wrong input.
FAILURES = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOMEM),
    *(errno.EROFS, errno.EACCES, errno.EPERM),
)
# Errors of libraries that read files, by name, so that the libraries need not be imported.
LIBRARY_ERRORS = (
    ("PIL.Image", "DecompressionBombError"),
    ("safetensors", "SafetensorError"),
    ("datasets.exceptions", "DatasetsError"),
    ("datasets.exceptions", "DatasetGenerationError"),
    ("pyarrow", "ArrowException"),
    ("torch", "OutOfMemoryError"),
)


def is_expected(error: BaseException) -> bool:
    """Whether an error is due to the input or the machine, rather than a fault of the program."""
    kinds = ValueError, TypeError, OSError, ImportError, MemoryError, RecursionError
    if isinstance(error, (*kinds, EOFError, zipfile.BadZipFile)):
        return True
    for module, name in LIBRARY_ERRORS:
        kind = getattr(sys.modules.get(module), name, None)
        if kind is not None and isinstance(error, kind):
            return True
    return _is_allocation(error)


def _is_allocation(error: BaseException) -> bool:
    """Whether memory ran out, for which torch raises a RuntimeError on a CPU."""
    return isinstance(error, MemoryError) or "can't allocate memory" in str(error)


def is_failure(error: BaseException) -> bool:
    """Whether the machine failed (such as a full disk), so that the command may succeed later."""
    out_of_memory = getattr(sys.modules.get("torch"), "OutOfMemoryError", MemoryError)
    return (
        (isinstance(error, OSError) and error.errno in FAILURES)
        or isinstance(error, out_of_memory)
        or _is_allocation(error)
    )


def reason(error: BaseException, width: int = 300) -> str:
    """An error's message as one line of text; its type if it has no message."""
    kind = type(error).__name__
    text = textwrap.shorten(str(error), width, placeholder=" ...")
    if isinstance(error, MemoryError) or _is_allocation(error):
        return f"there is not enough memory ({text or kind}): give smaller sizes or batches"
    if isinstance(error, RecursionError):
        return f"something is nested too deeply ({text or kind})"
    return text if text and not isinstance(error, KeyError) else f"{kind} {text}".strip()
