"""Files are whole or not there, whatever happens in the middle of a write."""

from __future__ import annotations

import errno
import json
import os
import resource
import stat
import struct

import pytest
import torch

from dng_models.support import files


def no_space(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_text_and_json_come_back(tmp_path):
    files.write_text(tmp_path / "new" / "a.txt", "zwölf\n")
    assert (tmp_path / "new" / "a.txt").read_bytes() == "zwölf\n".encode()
    files.write_json(tmp_path / "a.json", {"b": [1, 2.5], "a": None})
    assert files.read_json(tmp_path / "a.json") == {"a": None, "b": [1, 2.5]}
    text = (tmp_path / "a.json").read_text()
    assert text.index('"a"') < text.index('"b"') and text.endswith("}\n")


def test_lines_are_added(tmp_path):
    for line in ("one", "two"):
        files.append_line(tmp_path / "new" / "log", line)
    assert (tmp_path / "new" / "log").read_text() == "one\ntwo\n"


def test_a_file_is_readable_as_others_are(tmp_path):
    files.write_text(tmp_path / "a", "")
    (tmp_path / "b").write_text("")
    mode_a, mode_b = (stat.S_IMODE((tmp_path / name).stat().st_mode) for name in "ab")
    assert mode_a == mode_b


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, call):
    path = tmp_path / "a.json"
    files.write_json(path, 1)
    monkeypatch.setattr(os, call, no_space)
    with pytest.raises(OSError, match="a.json was not written: No space left") as caught:
        files.write_json(path, 2)
    assert caught.value.errno == errno.ENOSPC
    assert os.listdir(tmp_path) == ["a.json"]
    assert json.loads(path.read_text()) == 1


@pytest.fixture
def small_disk():
    """The system's own refusal: no file of this process may grow above 4096 bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_write_that_the_system_refuses_halfway(tmp_path, small_disk):
    path = tmp_path / "state.safetensors"
    files.save_tensors(path, {"a": torch.arange(10)})
    with pytest.raises(OSError, match="state.safetensors was not written: File too large"):
        files.save_tensors(path, {"a": torch.zeros(10_000)})
    assert os.listdir(tmp_path) == ["state.safetensors"]
    assert torch.equal(files.load_tensors(path)[0]["a"], torch.arange(10))


def test_a_line_that_the_system_refuses_names_the_file(tmp_path, small_disk):
    with pytest.raises(OSError, match="log was not written: File too large"):
        files.append_line(tmp_path / "log", "x" * 5000)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_what_interrupts_a_write_leaves_nothing_behind(tmp_path, error):
    def write(temporary):
        temporary.write_text("half")
        raise error

    with pytest.raises(error):
        files.write_atomically(tmp_path / "a", write)
    assert os.listdir(tmp_path) == []


def test_numbers_that_json_has_not_are_refused_before_the_write(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(tmp_path / "a.json", float("inf"))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b"\xff\xfe"])
def test_damaged_json_is_named(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match="a.json is not JSON"):
        files.read_json(tmp_path / "a.json")


def test_tensors_and_metadata_come_back(tmp_path):
    tensors = {"a": torch.randn(3, 4).T, "b": torch.tensor(2.0, requires_grad=True)}
    files.save_tensors(tmp_path / "t", tensors, {"step": "7"})
    loaded, metadata = files.load_tensors(tmp_path / "t")
    assert loaded.keys() == tensors.keys() and metadata == {"step": "7"}
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor.detach())


def test_a_missing_tensor_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="state must be a safetensors file"):
        files.load_tensors(tmp_path / "state")


def test_a_damaged_tensor_file_is_named(tmp_path):
    path = tmp_path / "state"
    files.save_tensors(path, {"a": torch.zeros(100)})
    whole = path.read_bytes()
    for damaged in (b"", whole[:7], whole[:-1], whole[: len(whole) // 2], b"PK" + whole):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="state is not a whole safetensors file"):
            files.load_tensors(path)
    path.write_bytes(struct.pack("<Q", 2**60) + whole[8:])
    with pytest.raises(ValueError, match="state is not a whole safetensors file"):
        files.load_tensors(path)
