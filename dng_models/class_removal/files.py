"""Files that are whole or not there, in folders with one writer at a time.

Everything a run leaves behind is written under a temporary name in the same folder, flushed to the
disk and renamed: whoever kills the process, and whenever the disk is full, a file under its own
name is the old one or the new one, never a part.

Who writes to a folder, and who writes a temporary file, holds the system's lock on a file there
(flock), which ends with the process however it ends.  So what a killed process left is known from
what a living one is writing, after a restart of the machine too, and the next writer removes it.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import re
import shlex
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dng_models import foreign

if TYPE_CHECKING:
    from torch import Tensor

LOCK = ".dng-lock"
_PART = ".part"
# The names of tempfile: eight characters of its alphabet.
_TEMPORARY = re.compile(rf"\..+\.[a-z0-9_]{{8}}{re.escape(_PART)}", re.DOTALL)
_SHOWN = 200  # characters of a command line in a message
_held: dict[str, tuple[int, int]] = {}  # folders: process and thread that write to them


# ---------------------------------------------------------------------- one writer at a time


@contextmanager
def only_writer(folder: Path | str) -> Iterator[None]:
    """Be the only one that writes to a folder, and remove what killed writers left there.

    Within it the same thread may ask again.  A folder that is missing is made; it goes again if
    nothing was put into it.  On a file system without locks there is a warning, and nothing is
    kept apart or removed.

    Parameters
    ----------
    folder : Path or str
        With all that is below it, but for what is itself such a folder.

    Raises
    ------
    BlockingIOError
        If another process, or thread, writes there: it is named, and what can be done.
    OSError
        If the folder cannot be written to.
    """
    folder = Path(folder)
    name, me = os.path.realpath(folder), (os.getpid(), threading.get_ident())
    if _held.get(name) == me:
        yield
        return
    path = folder / LOCK
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = _acquire(folder, path)
        except BlockingIOError:
            raise
        except OSError as error:
            raise type(error)(
                error.errno, f"{folder} cannot be written to: {error.strerror or error}"
            ) from error
        _held[name] = me
        try:
            if descriptor is not None:
                clean(folder)
            yield
        finally:
            del _held[name]
            # Before it is unlocked: who opens it now sees that it is not the folder's any more.
            with suppress(OSError):
                path.unlink()
            if descriptor is not None:
                os.close(descriptor)
    finally:
        for each in made:
            with suppress(OSError):  # there is something in it
                each.rmdir()


def _acquire(folder: Path, path: Path) -> int | None:
    """The locked file of a folder, which says who has it; None where there are no locks."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            mine = _try_lock(descriptor)
        except OSError as error:
            os.close(descriptor)
            warnings.warn(
                f"{folder} is on a file system without locks ({error.strerror}): nothing keeps a "
                "second process from writing there; start one at a time",
                stacklevel=4,
            )
            return None
        try:
            writer = _writer(descriptor)
            if not mine:
                raise BlockingIOError(_occupied(folder, writer))
            if _is_at(descriptor, path):
                _check_elsewhere(folder, path, writer)
                _say_who(descriptor, path)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its writer has just finished and removed it


def _try_lock(descriptor: int) -> bool:
    """Lock an open file for this process; False if another has it, OSError without locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _boot() -> str:
    """What names the running system: one for all its containers, another after a restart."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _say_who(descriptor: int, path: Path) -> None:
    """Write who has the lock, for the others' messages."""
    told = {
        "pid": os.getpid(),
        "host": platform.node(),
        "boot": _boot(),
        "command": shlex.join(sys.orig_argv)[:_SHOWN],
        "since": datetime.now().astimezone().isoformat(" ", "seconds"),
    }
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(told).encode(), 0)
    except OSError:
        path.unlink()
        raise


def _writer(descriptor: int) -> dict[str, Any]:
    """What the lock says of who has it, or had it when killed; empty if it says nothing."""
    try:
        told = json.loads(os.pread(descriptor, 1 << 16, 0))
    except (ValueError, RecursionError):
        return {}
    return told if isinstance(told, dict) else {}


def _named_writer(writer: Mapping[str, Any]) -> str:
    known = {name: writer.get(name, "unknown") for name in ("pid", "host", "since", "command")}
    return "process {pid} on {host}, since {since} ({command})".format(**known)


def _occupied(folder: Path, writer: Mapping[str, Any]) -> str:
    return (
        f"{folder} is being written to by {_named_writer(writer)}: wait until it is done, stop it, "
        "or use another folder (--out)"
    )


def _check_elsewhere(folder: Path, path: Path, writer: Mapping[str, Any]) -> None:
    """Locks of some network file systems are not seen by other computers."""
    host, boot = writer.get("host"), writer.get("boot")
    if host is not None and host != platform.node() and (not boot or boot != _boot()):
        raise BlockingIOError(
            f"{_occupied(folder, writer)}.  It is on another computer, and not known from here to "
            f"have ended: if it has, remove {path}"
        )


def clean(folder: Path | str, *, below: bool = True) -> None:
    """Remove the temporary files in a folder whose writers are gone.

    Those that a living process writes stay, and so do all where the file system has no locks.

    Parameters
    ----------
    folder : Path or str
        Nothing happens if it is not there.
    below : bool
        Whether to look into the folders in it too; links are not followed.
    """
    for directory, folders, names in os.walk(folder):
        if not below:
            folders.clear()
        for name in names:
            if _TEMPORARY.fullmatch(name):
                _remove_left(Path(directory, name))


def _remove_left(path: Path) -> None:
    """Remove a temporary file that nobody holds the lock of."""
    # It may vanish at any time, be another user's, or on a file system without locks.
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
        try:
            if _try_lock(descriptor):
                path.unlink()
        finally:
            os.close(descriptor)


# ---------------------------------------------------------------------- whole files


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
    descriptor = -1
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = _temporary(path)
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
        if descriptor >= 0:
            os.close(descriptor)


def _temporary(path: Path) -> tuple[int, Path]:
    """A new file beside another, open and locked: :func:`clean` leaves it alone."""
    while True:
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=_PART, dir=path.parent)
        try:
            mine = _try_lock(descriptor)
        except OSError:
            mine = True  # without locks nobody removes it
        if mine and os.fstat(descriptor).st_nlink:
            return descriptor, Path(name)
        os.close(descriptor)  # found by clean() before it was locked


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
    """Add a line to a text file, made if it is missing, and wait until it is on the disk.

    A kill may leave the start of the line behind.

    Raises
    ------
    OSError
        Of the write, naming the path; what was written of the line is cut off.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _append(path, line)
    except OSError as error:
        raise _named(error, path) from error


def _append(path: Path, line: str) -> None:
    before = path.stat().st_size if path.is_file() else 0
    try:
        with path.open("ab") as file:
            file.write(f"{line}\n".encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        # A file that cannot even be opened has nothing to be cut off.
        if path.is_file() and path.stat().st_size > before:
            os.truncate(path, before)
        raise


def write_json(path: Path | str, value: Any) -> None:
    """Write a value as indented JSON with sorted keys; raises as :func:`write_atomically`.

    Numbers that JSON does not have (NaN, infinity) are a ValueError.
    """
    write_text(path, json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")


def read_json(path: Path | str) -> Any:
    """The value in a JSON file that :func:`write_json` wrote; :func:`dng_models.foreign.read_json`.

    Raises
    ------
    OSError
        If there is no such file, or it cannot be read.
    ValueError
        If it does not hold JSON, or more than any of ours; naming it.
    """
    return foreign.read_json(path, finite=True)


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
    """Tensors, on the CPU, and metadata of a file; :func:`dng_models.foreign.load_tensors`.

    Raises
    ------
    OSError
        If there is no such file, or it cannot be read.
    ValueError
        If it is not a safetensors file, or a damaged one, or larger than the memory; naming it.
    """
    return foreign.load_tensors(path)


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
    line = json.dumps(record, sort_keys=True, allow_nan=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _append(path, line)
    except OSError as error:
        reason = error.strerror or str(error)
        raise type(error)(error.errno, f"no {what} was added to {path}: {reason}") from error
