"""Files that are whole or not there.

Everything a run leaves behind is written under a temporary name in the same folder, flushed to the
disk and renamed: whoever kills the process, and whenever the disk is full, a file under its own
name is the old one or the new one, never a part.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def _sync(path: Path) -> None:
    """Wait until the file, or the names in the folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path | str, write: Callable[[Path], None]) -> None:
    """Write a file through a temporary one beside it.

    Parameters
    ----------
    path : Path or str
        Where the file goes; its folder is made if it is missing.
    write : callable
        Called with the temporary path, where it leaves the content.

    Raises
    ------
    OSError
        Of the write, naming the path: the temporary file is gone and the old one is as it was.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(descriptor)
        temporary = Path(name)
        write(temporary)
        # A temporary file is its owner's alone; what it becomes is like any other file.
        temporary.chmod(0o666 & ~_umask())
        _sync(temporary)
        os.replace(temporary, path)
        temporary = None
        _sync(path.parent)
    except OSError as error:
        raise _named(error, path) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _named(error: OSError, path: Path) -> OSError:
    """The same error, which says what was to be written."""
    return type(error)(error.errno, f"{path} was not written: {error.strerror or error}")


def _umask() -> int:
    """The bits that new files of this process lack; the system tells only by setting them."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def write_text(path: Path | str, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all; raises as :func:`write_atomically`."""
    data = text.encode("utf-8")

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            file.write(data)

    write_atomically(path, write)


def append_line(path: Path | str, line: str) -> None:
    """Add a line to a text file, made if it is missing.

    Not atomic: a disk that is full, or a kill, may leave the start of the line behind.

    Raises
    ------
    OSError
        Of the write, naming the path.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        raise _named(error, path) from error


def write_json(path: Path | str, value: Any) -> None:
    """Write a value as indented JSON with sorted keys; raises as :func:`write_atomically`.

    Numbers that JSON does not have (NaN, infinity) are a ValueError.
    """
    write_text(path, json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")


def read_json(path: Path | str) -> Any:
    """The value in a JSON file.

    Raises
    ------
    OSError
        If there is no such file, or it cannot be read.
    ValueError
        If it does not hold JSON; naming it.
    """
    text = Path(path).read_bytes()
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(
            f"{path} is not JSON ({error}): it was damaged or is another file; remove it"
        ) from None


def save_tensors(
    path: Path | str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write named tensors as a safetensors file; raises as :func:`write_atomically`."""
    from safetensors.torch import save

    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    data = save(whole, None if metadata is None else dict(metadata))

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            file.write(data)

    write_atomically(path, write)


def load_tensors(path: Path | str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors, on the CPU, and metadata of a safetensors file.

    Raises
    ------
    OSError
        If there is no such file, or it cannot be read.
    ValueError
        If it is not a safetensors file, or a damaged one; naming it.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} must be a safetensors file, and there is none")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
            return tensors, dict(file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({error}): it was damaged or is another "
            "file; remove it, and what made it makes it again"
        ) from None


def append_record(path: Path, record: Mapping[str, Any], what: str = "line") -> None:
    """Add a record to a file of JSON lines and wait until it is on the disk.

    Parameters
    ----------
    path : Path
    record : mapping
        Of finite numbers.
    what : str
        What the file holds, for an error.

    Raises
    ------
    OSError
        If it cannot be written, naming the file; what was written of it is cut off.
    """
    line = json.dumps(record, sort_keys=True, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    before = path.stat().st_size if path.is_file() else 0
    try:
        with path.open("ab") as file:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        if path.is_file():
            os.truncate(path, before)
        reason = error.strerror or str(error)
        raise type(error)(error.errno, f"no {what} was added to {path}: {reason}") from error
