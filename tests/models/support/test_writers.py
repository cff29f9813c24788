"""One writer at a time for a folder, and nothing stays behind of those that were killed."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from dng_models.support import files

ROOT = Path(__file__).resolve().parents[3]
HOLDS = """
import sys, time
from dng_models.support import files
with files.only_writer(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""
WRITES = """
import sys, time
from dng_models.support import files
def slowly(temporary):
    temporary.write_text("half")
    print("writing", flush=True)
    time.sleep(60)
files.write_atomically(sys.argv[1], slowly)
"""


@pytest.fixture
def other(request):
    """Start another process with a path, and wait until it says that it is there."""
    started = []

    def start(code: str, path: Path) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", code, path], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout.readline()
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def killed(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()


# ---------------------------------------------------------------------- one at a time


def test_a_second_writer_is_told_who_the_first_is_and_what_to_do(tmp_path, other):
    process = other(HOLDS, tmp_path)
    with pytest.raises(BlockingIOError) as error, files.only_writer(tmp_path):
        pass
    said = str(error.value)
    assert f"{tmp_path} is being written to by process {process.pid} on {platform.node()}" in said
    assert "stop it" in said and "--out" in said
    # It is known by whatever name.
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(BlockingIOError), files.only_writer(tmp_path / "link"):
        pass


def test_a_killed_writer_is_no_writer(tmp_path, other):
    killed(other(HOLDS, tmp_path))
    assert os.listdir(tmp_path) == [files.LOCK]
    with files.only_writer(tmp_path):
        assert json.loads((tmp_path / files.LOCK).read_text())["pid"] == os.getpid()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("content", ["", "{", "7", '{"pid": 1}'])
def test_what_a_lock_says_does_not_hold_it(tmp_path, content):
    """After a restart of the machine too, where another process may have that number."""
    (tmp_path / files.LOCK).write_text(content)
    before = {"pid": os.getpid(), "host": platform.node(), "boot": "another"}
    for left in (content, json.dumps(before)):
        (tmp_path / files.LOCK).write_text(left)
        with files.only_writer(tmp_path):
            pass
    assert os.listdir(tmp_path) == []


def test_a_container_that_was_killed_is_on_this_computer(tmp_path, monkeypatch):
    """Its name is another one, the running system is not."""
    monkeypatch.setattr(files, "_boot", lambda: "this")
    (tmp_path / files.LOCK).write_text('{"pid": 1, "host": "container", "boot": "this"}')
    with files.only_writer(tmp_path):
        pass


def test_another_computer_s_lock_is_not_taken_over(tmp_path):
    """On some network file systems it is held there and looks free here."""
    lock = tmp_path / files.LOCK
    lock.write_text('{"pid": 12, "host": "elsewhere", "boot": "another"}')
    with pytest.raises(BlockingIOError) as error, files.only_writer(tmp_path):
        pass
    assert "process 12 on elsewhere" in str(error.value) and f"remove {lock}" in str(error.value)
    lock.unlink()
    with files.only_writer(tmp_path):
        pass


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, code):
    def none(descriptor, operation):
        raise OSError(code, os.strerror(code))

    left = tmp_path / ".a.json.abcd_123.part"
    left.write_text("")
    monkeypatch.setattr(fcntl, "flock", none)
    with (
        pytest.warns(UserWarning, match="without locks .*start one at a time"),
        files.only_writer(tmp_path),
    ):
        files.write_json(tmp_path / "a.json", 1)
    # Nobody knows whether its writer lives.
    assert sorted(os.listdir(tmp_path)) == [left.name, "a.json"]


def test_the_same_thread_may_ask_again_and_another_may_not(tmp_path):
    refused = []

    def another():
        try:
            with files.only_writer(tmp_path):
                pass
        except BlockingIOError as error:
            refused.append(str(error))

    with files.only_writer(tmp_path):
        with files.only_writer(tmp_path):
            pass
        assert (tmp_path / files.LOCK).exists()
        thread = threading.Thread(target=another)
        thread.start()
        thread.join()
    assert len(refused) == 1 and f"process {os.getpid()} " in refused[0]


def test_a_folder_that_was_made_for_nothing_goes_again(tmp_path):
    with pytest.raises(ValueError), files.only_writer(tmp_path / "new" / "run"):
        raise ValueError
    assert os.listdir(tmp_path) == []
    with files.only_writer(tmp_path / "new" / "run"):
        (tmp_path / "new" / "run" / "a").write_text("")
    assert os.listdir(tmp_path / "new" / "run") == ["a"]


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch, code):
    def refusing(*_):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite" if code == errno.ENOSPC else "open", refusing)
        with (
            pytest.raises(OSError, match=f"{tmp_path} cannot be written to") as error,
            files.only_writer(tmp_path),
        ):
            pass
    assert error.value.errno == code and os.listdir(tmp_path) == []
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(OSError, match="cannot be written to"),
        files.only_writer(tmp_path / "file" / "run"),
    ):
        pass


def _counting(folder: str, turns: int) -> None:
    """Count up in a file, as only a single writer can."""
    done = 0
    while done < turns:
        try:
            with files.only_writer(folder):
                path = Path(folder, "count")
                files.write_text(path, str(int(path.read_text()) + 1))
                done += 1
        except BlockingIOError:
            pass


@pytest.mark.slow
def test_writers_that_come_and_go_are_never_two(tmp_path):
    """The lock file is removed and made anew each time, which must not make room for two."""
    (tmp_path / "count").write_text("0")
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_counting, args=(str(tmp_path), 100)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert (tmp_path / "count").read_text() == "300"
    assert os.listdir(tmp_path) == ["count"]


# ---------------------------------------------------------------------- what is left behind


def test_a_temporary_file_of_a_living_writer_stays_and_of_a_killed_one_goes(tmp_path, other):
    run = tmp_path / "run"
    process = other(WRITES, run / "samples" / "a.json")
    (temporary,) = (run / "samples").iterdir()
    with files.only_writer(run):
        assert temporary.read_text() == "half"
    killed(process)
    with files.only_writer(run):
        assert not temporary.exists()


def test_only_what_is_a_temporary_file_of_ours_is_removed(tmp_path):
    kept = [".gitignore", ".a.json.original", ".a.json.part", "a.json.abcd1234.part", "x.part"]
    for name in [*kept, ".a.json.abcd1234.part"]:
        (tmp_path / name).write_text("")
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / ".b.abcd1234.part").write_text("")
    files.clean(tmp_path, below=False)
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, "below"])
    assert len(os.listdir(tmp_path / "below")) == 1
    files.clean(tmp_path)
    assert os.listdir(tmp_path / "below") == []
    files.clean(tmp_path / "nothing")


def test_a_link_is_not_followed(tmp_path):
    (tmp_path / "theirs").write_text("theirs")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".a.abcd1234.part").symlink_to(tmp_path / "theirs")
    files.clean(tmp_path / "run")
    assert (tmp_path / "theirs").read_text() == "theirs"


def test_a_temporary_file_that_is_taken_for_a_left_one_is_made_again(tmp_path, monkeypatch):
    """Between its making and its lock, the moment in which nothing shows that it lives."""
    lock, calls = files._try_lock, []

    def late(descriptor):
        calls.append(descriptor)
        if len(calls) == 1:
            files.clean(tmp_path)  # which locks and removes it
        return lock(descriptor)

    monkeypatch.setattr(files, "_try_lock", late)
    files.write_json(tmp_path / "a.json", 1)
    assert files.read_json(tmp_path / "a.json") == 1 and os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("command", ["train", "calibrate", "sample", "sweep", "run"])
def test_a_folder_that_cannot_be_written_to_is_one_line(tmp_path, capsys, command):
    from dng_models.class_removal.__main__ import main

    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "run"
    assert main([command, "--device", "cpu", "--quiet", "--out", str(out)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(out) in line and "cannot be written to: Not a directory" in line
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("program", ["class_removal", "text_to_image", "figures", "benchmarks"])
def test_a_machine_that_cannot_write_is_status_1_for_every_command_line(
    tmp_path, capsys, monkeypatch, program, code
):
    """What was given wrongly is 2, as is a folder that is a file."""
    from importlib import import_module

    def refusing(*_, **__):
        raise OSError(code, os.strerror(code))

    main = import_module(
        f"dng_models.{program}.__main__" if "_" in program else f"{program}.__main__"
    ).main
    arguments = {
        "class_removal": ["train", "--device", "cpu", "--quiet"],
        "text_to_image": ["run", "--tiny", "--device", "cpu", "--quiet"],
        "figures": ["update_geometry", "--quiet"],
        "benchmarks": ["mixture", "--quiet"],
    }[program]
    monkeypatch.setattr(files, "_acquire", refusing)
    monkeypatch.setattr("tempfile.TemporaryFile", refusing)
    try:
        status = main([*arguments, "--out", str(tmp_path / "run")])
    except SystemExit as exit_:
        status = exit_.code
    assert status == 1
    told = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(told) == 1 and str(tmp_path / "run") in told[0]
    assert os.strerror(code) in told[0]
