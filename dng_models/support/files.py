"""Atomic writes, and folders with one writer at a time.

Every file of a run is written under a temporary name in the same folder, flushed to the disk and
renamed: if the process is killed or the disk is full, the file is the old one or the new one,
never a part.

The writer of a folder, and of each temporary file, holds the system's lock (flock) on a file there.
The lock ends with the process, however that ends.  The next writer can therefore tell what a killed
process left from what a living one is writing, even after a restart, and removes it.
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

from dng_models.support import foreign

if TYPE_CHECKING:
    from torch import Tensor

LOCK = ".dng-lock"
_PART = ".part"
# tempfile names end in eight characters of its alphabet.
_TEMPORARY = re.compile(rf"\..+\.[a-z0-9_]{{8}}{re.escape(_PART)}", re.DOTALL)
_SHOWN = 200  # characters of a command line in a message
_held: dict[str, tuple[int, int]] = {}  # folder: process and thread that have locked it


# ---------------------------------------------------------------------- one writer at a time


@contextmanager
def only_writer(folder: Path | str) -> Iterator[None]:
    """Lock a folder for this thread, and remove the temporary files that killed writers left.

    The same thread may enter again within the block.  A missing folder is made, and removed again
    if it stays empty.  On a file system without locks there is a warning, nothing is locked and
    nothing is removed.

    Parameters
    ----------
    folder : Path or str
        The lock stands for the folder and everything below it.

    Raises
    ------
    BlockingIOError
        If another process or thread has locked it; the message names it and says what to do.
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
            # Removed before it is unlocked: whoever has just opened it sees that it is gone.
            with suppress(OSError):
                path.unlink()
            if descriptor is not None:
                os.close(descriptor)
    finally:
        for each in made:
            with suppress(OSError):  # not empty
                each.rmdir()


def _acquire(folder: Path, path: Path) -> int | None:
    """Open and lock a folder's lock file, and write its owner; None where there are no locks."""
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
        os.close(descriptor)  # its owner has just removed it: try again with a new one


def _try_lock(descriptor: int) -> bool:
    """Lock an open file for this process; False if another has it, OSError without locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the one at that path."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _boot() -> str:
    """Id of the running system: the same in all its containers, different after a restart."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _say_who(descriptor: int, path: Path) -> None:
    """Write who has the lock, for the error messages of other processes."""
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
    """Read who has the lock, or had it when killed; empty if the file does not say."""
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
    """Refuse a lock file of another computer: some network file systems do not share locks."""
    host, boot = writer.get("host"), writer.get("boot")
    if host is not None and host != platform.node() and (not boot or boot != _boot()):
        raise BlockingIOError(
            f"{_occupied(folder, writer)}.  It is on another computer, and not known from here to "
            f"have ended: if it has, remove {path}"
        )


def clean(folder: Path | str, *, below: bool = True) -> None:
    """Remove the temporary files in a folder whose writers have ended.

    The files of living processes stay; without locks on the file system, all of them stay.

    Parameters
    ----------
    folder : Path or str
        May be missing: then nothing happens.
    below : bool
        Whether to look into subfolders too; links are not followed.
    """
    for directory, folders, names in os.walk(folder):
        if not below:
            folders.clear()
        for name in names:
            if _TEMPORARY.fullmatch(name):
                _remove_left(Path(directory, name))


def _remove_left(path: Path) -> None:
    """Remove a temporary file that is not locked."""
    # The file may vanish at any time or be another user's; the file system may lack locks.
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
        try:
            if _try_lock(descriptor):
                path.unlink()
        finally:
            os.close(descriptor)


# ---------------------------------------------------------------------- whole files


def _sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
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
        ``write(temporary)`` writes the content to the temporary path.

    Raises
    ------
    OSError
        If it cannot be written, naming the path; the temporary file is removed and an existing
        file stays unchanged.
    """
    path = Path(path)
    temporary: Path | None = None
    descriptor = -1
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = _temporary(path)
        write(temporary)
        # mkstemp gives access to the owner alone; the final file gets the usual permissions.
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
    """Create a temporary file beside a path, open and locked so that :func:`clean` skips it."""
    while True:
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=_PART, dir=path.parent)
        try:
            mine = _try_lock(descriptor)
        except OSError:
            mine = True  # without locks, clean() removes nothing
        if mine and os.fstat(descriptor).st_nlink:
            return descriptor, Path(name)
        os.close(descriptor)  # clean() removed it before it was locked


def _named(error: OSError, path: Path) -> OSError:
    """The same error with a message that names the file."""
    return type(error)(error.errno, f"{path} was not written: {error.strerror or error}")


def _umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def write_text(path: Path | str, text: str) -> None:
    """Write a text file in UTF-8 atomically; raises as :func:`write_atomically`."""
    data = text.encode("utf-8")

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            file.write(data)

    write_atomically(path, write)


def append_line(path: Path | str, line: str) -> None:
    """Append a line to a text file, and wait until it is on the disk.

    A missing file is created.  If the process is killed meanwhile, a part of the line may remain.

    Raises
    ------
    OSError
        If it cannot be written, naming the path; a part of the line is removed again.
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
        # If the file could not be opened, nothing was added.
        if path.is_file() and path.stat().st_size > before:
            os.truncate(path, before)
        raise


def write_json(path: Path | str, value: Any) -> None:
    """Write a value as indented JSON with sorted keys; raises as :func:`write_atomically`.

    NaN and infinities, which JSON does not have, are a ValueError.
    """
    write_text(path, json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")


def read_json(path: Path | str) -> Any:
    """Read a JSON file that :func:`write_json` wrote, with :func:`.foreign.read_json`.

    Raises
    ------
    OSError
        If there is no such file, or it cannot be read.
    ValueError
        If it is not JSON, holds NaN or infinities, or is too large; the message names the file.
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
    """Read the tensors (on the CPU) and the metadata of a file, as :func:`.foreign.load_tensors`.

    Raises
    ------
    OSError
        If there is no such file, or it cannot be read.
    ValueError
        If it is not a safetensors file, damaged, or larger than the memory; the message names it.
    """
    return foreign.load_tensors(path)


def append_record(path: Path, record: Mapping[str, Any], what: str = "line") -> None:
    """Append a record to a file of JSON lines, and wait until it is on the disk.

    Parameters
    ----------
    path : Path
    record : mapping
        JSON values; its numbers must be finite.
    what : str
        What one line stands for, for the error message.

    Raises
    ------
    OSError
        If it cannot be written, naming the file; a part of the line is removed again.
    ValueError
        If a number is NaN or infinite.
    """
    line = json.dumps(record, sort_keys=True, allow_nan=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _append(path, line)
    except OSError as error:
        reason = error.strerror or str(error)
        raise type(error)(error.errno, f"no {what} was added to {path}: {reason}") from error
