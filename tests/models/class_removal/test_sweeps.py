"""The sweep: whoever is killed, however many draw, the table is the same to the byte.

The networks are tiny and untrained: what is tested is the order of things, not the images.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from dng_models.class_removal import sweeps as sweeping
from dng_models.class_removal.__main__ import main
from dng_models.class_removal.config import Config
from dng_models.class_removal.generation import generate, trajectories
from dng_models.class_removal.materials import Materials
from dng_models.class_removal.networks import save_network
from dng_models.class_removal.run_folder import RunFolder
from dng_models.class_removal.sweeps import append_row, read_table, sweep
from dng_models.support import files
from tests.helpers.tiny_networks import tiny

ROOT = Path(__file__).resolve().parents[3]
BASE = Config(rule="none", guidance_scale=0.0, steps=5, num_images=20, batch_size=8)
OWN = {"hyperparameters": "own", "temperature": 0.1}
CONFIGS = [
    BASE,
    dataclasses.replace(BASE, rule="np", guidance_scale=0.5),
    dataclasses.replace(BASE, rule="dng", guidance_scale=1.0, **OWN),
]


@pytest.fixture(scope="module")
def undisturbed(networks, tmp_path_factory) -> bytes:
    """The table of a sweep that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "networks").symlink_to(networks)
    sweep(CONFIGS, Materials(RunFolder(folder), device="cpu"), progress=False)
    return (folder / "sweep.jsonl").read_bytes()


class Stopped(Exception):
    """Stands for whatever ends a process."""


def stopped_at(monkeypatch, target, name: str, call: int, after: bool) -> None:
    """Make a function end the process at one of its calls, before or after its work."""
    work, calls = getattr(target, name), []

    def stopping(*args, **kwargs):
        calls.append(name)
        if len(calls) == call and not after:
            raise Stopped
        result = work(*args, **kwargs)
        if len(calls) == call:
            raise Stopped
        return result

    monkeypatch.setattr(target, name, stopping)


# ---------------------------------------------------------------------- the table


def test_a_row_says_everything(undisturbed):
    rows = [json.loads(line) for line in undisturbed.splitlines()]
    assert [Config.from_json(row["config"]) for row in rows] == CONFIGS
    assert [row["key"] for row in rows] == [config.key for config in CONFIGS]
    for row in rows:
        assert set(row) == {"base", "config", "key", "metrics", "sources", "summary", "versions"}
        assert row["metrics"]["num_images"] == 20
        assert len(row["metrics"]["histogram"]) == 10
        assert {"dng", "diffusers", "numpy", "python", "torch", "device"} <= set(row["versions"])
        assert list(row) == sorted(row)
    assert rows[0]["summary"]["mean_scale"] == 0.0 and rows[1]["summary"]["mean_scale"] == 0.5
    assert 0.0 < rows[2]["summary"]["mean_posterior"] < 1.0
    assert set(rows[2]["sources"]) == {"base", "unwanted-0", "classifier"}


def test_the_line_of_a_row_names_its_divergence_as_what_it_is(undisturbed):
    """The table has the divergence itself, which may be infinite."""
    row = json.loads(undisturbed.splitlines()[1])
    line = sweeping._told(CONFIGS[1], row)
    assert f"smoothed KL {row['metrics']['kl_smoothed']:.3f}, Frechet" in line
    assert line.startswith("np g=0.5, without 0: ")


@pytest.mark.slow
def test_a_table_of_its_own_keeps_no_images(materials, undisturbed):
    table = materials.folder.tuning
    rows = sweep(CONFIGS, materials, table=table, keep_first=False, progress=False)
    assert table.read_bytes() == undisturbed and not materials.folder.table.exists()
    assert not (materials.folder.path / "samples").exists()
    again = sweep(CONFIGS, materials, table=table, keep_first=False, progress=False)
    assert again == rows and not (materials.folder.path / "samples").exists()


def test_nothing_is_drawn_twice(materials, undisturbed, monkeypatch):
    first = sweep(CONFIGS, materials, progress=False)
    monkeypatch.setattr(sweeping, "generate", None)
    assert sweep(CONFIGS, materials, progress=False) == first
    assert materials.folder.table.read_bytes() == undisturbed
    assert sweep([CONFIGS[1]], materials, progress=False) == [first[1]]


@pytest.mark.parametrize(
    ("module", "name", "call", "after"),
    [
        # Three pieces a setting, then its samples.
        pytest.param("files", "save_tensors", 1, False, marks=pytest.mark.slow),
        pytest.param("files", "save_tensors", 6, True, marks=pytest.mark.slow),
        pytest.param("files", "save_tensors", 8, False, marks=pytest.mark.slow),
        ("sweeping", "append_row", 2, False),
        pytest.param("sweeping", "append_row", 2, True, marks=pytest.mark.slow),
    ],
)
def test_a_sweep_that_was_stopped_anywhere_ends_with_the_same_table(
    materials, undisturbed, module, name, call, after
):
    with pytest.MonkeyPatch.context() as patch:
        stopped_at(patch, {"files": files, "sweeping": sweeping}[module], name, call, after)
        with pytest.raises(Stopped):
            sweep(CONFIGS, materials, progress=False)
    fresh = Materials(materials.folder, device="cpu")
    sweep(CONFIGS, fresh, progress=False)
    assert materials.folder.table.read_bytes() == undisturbed
    work = materials.folder.path / "work"
    assert list(work.iterdir()) == []


@pytest.mark.slow
def test_a_killed_process_loses_a_batch_and_no_more(materials, undisturbed):
    """SIGKILL in the middle of the second setting, after its first piece."""
    arguments = [
        *("sweep", "--rules", "none", "np", "--guidance-scale", "0.5", "--steps", "5", "--quiet"),
        *("--num-images", "20", "--batch-size", "8", "--device", "cpu"),
        *("--out", str(materials.folder.path)),
    ]
    code = f"""
import os, signal
import torch
from dng_models.support import files
from dng_models.class_removal.__main__ import main
torch.set_num_threads(1)  # as in the process that made the table to compare with
save, calls = files.save_tensors, []
def killing(path, *rest):
    save(path, *rest)
    calls.append(path)
    if len(calls) == 5:  # three pieces and the samples of the first setting are before it
        os.kill(os.getpid(), signal.SIGKILL)
files.save_tensors = killing
main({arguments!r})
"""
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert materials.folder.table.read_bytes() == undisturbed.splitlines(keepends=True)[0]
    pieces = list(materials.folder.work(CONFIGS[1]).iterdir())
    assert [piece.name for piece in pieces] == ["000000.safetensors"]
    drawn = pieces[0].stat().st_mtime_ns
    sweep(CONFIGS[:2], materials, keep_images=True, progress=False)
    assert pieces[0].stat().st_mtime_ns == drawn
    sweep(CONFIGS, materials, progress=False)
    assert materials.folder.table.read_bytes() == undisturbed


@pytest.mark.parametrize(
    "cut", [40, *(pytest.param(each, marks=pytest.mark.slow) for each in (1, 500))]
)
def test_a_torn_last_line_is_made_again(materials, undisturbed, cut):
    materials.folder.table.write_bytes(undisturbed[:-cut])
    assert len(read_table(materials.folder.table)) == len(CONFIGS) - 1
    sweep(CONFIGS, materials, progress=False)
    assert materials.folder.table.read_bytes() == undisturbed


def test_a_damaged_line_before_the_last_is_an_error_that_names_it(materials, undisturbed):
    lines = undisturbed.splitlines(keepends=True)
    materials.folder.table.write_bytes(b"".join([lines[0], lines[1][:50] + b"\n", lines[2]]))
    with pytest.raises(ValueError, match=r"sweep.jsonl, line 2 is not a row of a sweep"):
        sweep(CONFIGS, materials, progress=False)


def test_a_full_disk_leaves_the_table_as_it_was(tmp_path, monkeypatch):
    table = tmp_path / "sweep.jsonl"
    append_row(table, {"key": "a"})
    before = table.read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no row was added to .*sweep.jsonl: No space left"):
        append_row(table, {"key": "b"})
    assert table.read_bytes() == before


def test_numbers_that_json_does_not_have_are_null(tmp_path):
    append_row(tmp_path / "t", {"a": [float("inf"), 1.0], "b": {"c": float("nan")}})
    assert (tmp_path / "t").read_text() == '{"a": [null, 1.0], "b": {"c": null}}\n'


@pytest.mark.slow
def test_rows_of_other_networks_do_not_join_a_table(materials, networks):
    sweep(CONFIGS[:2], materials, progress=False)
    link = materials.folder.networks
    link.unlink()
    link.mkdir()
    for name in ("class-0", "class-1", "classifier"):
        (link / name).symlink_to(networks / name)
    save_network(link / "base", tiny(7))
    with pytest.raises(ValueError, match="rows that were made with another base"):
        sweep(CONFIGS, Materials(materials.folder, device="cpu"), progress=False)


def test_another_class_s_calibration_is_not_a_changed_one():
    own = Config(hyperparameters="calibrated")
    row = {"config": own.to_json(), "key": own.key, "sources": {"calibration": "a"}}
    stronger = dataclasses.replace(own, guidance_scale=2.0)
    with pytest.raises(ValueError, match="made with another calibration"):
        sweeping._check_sources(stronger, {"calibration": "b"}, [row])
    borrowed = dataclasses.replace(stronger, calibration="1")
    sweeping._check_sources(borrowed, {"calibration": "b"}, [row])


def test_what_is_missing_for_a_later_setting_is_known_before_the_first(materials, monkeypatch):
    monkeypatch.setattr(sweeping, "generate", None)
    later = dataclasses.replace(BASE, rule="dng", hyperparameters="calibrated")
    with pytest.raises(FileNotFoundError, match="there is no calibration"):
        sweep([BASE, later], materials, progress=False)
    with pytest.raises(FileNotFoundError, match="there is no network in .*class-5"):
        sweep([BASE, dataclasses.replace(CONFIGS[1], forget=("5",))], materials, progress=False)


def test_settings_with_broken_images_have_a_row_that_says_so(materials):
    """Of a push that no float32 holds after two steps."""
    config = dataclasses.replace(BASE, rule="np", guidance_scale=1e20)
    with pytest.warns(UserWarning, match="8 of 8 images are not finite"):
        (row,) = sweep([config], materials, progress=False)
    assert row["summary"]["not_finite"] == 20
    assert row["metrics"]["num_images"] == 20


# ---------------------------------------------------------------------- images


def test_images_do_not_depend_on_how_many_there_are(materials):
    config = CONFIGS[2]
    few = generate(dataclasses.replace(config, num_images=5), materials)
    many = generate(config, materials)
    assert few.images.shape == (5, 1, 8, 8) and many.images.shape == (20, 1, 8, 8)
    assert torch.equal(few.images, many.images[:5])
    assert torch.equal(few.log_posterior, many.log_posterior[:5])
    assert torch.equal(few.mean_scale, many.mean_scale[:5])


def test_more_images_continue_those_that_are_there(materials):
    config = CONFIGS[1]
    generate(dataclasses.replace(config, num_images=8), materials)
    piece = materials.folder.work(config) / "000000.safetensors"
    drawn = piece.stat().st_mtime_ns
    generate(config, materials)
    assert piece.stat().st_mtime_ns == drawn
    assert len(list(piece.parent.iterdir())) == 3


@pytest.mark.parametrize("damage", [b"", b"not a piece", None])
def test_a_damaged_piece_is_drawn_again(materials, damage):
    config = CONFIGS[0]
    whole = generate(config, materials)
    piece = materials.folder.work(config) / "000001.safetensors"
    piece.write_bytes(piece.read_bytes()[:-100] if damage is None else damage)
    assert torch.equal(generate(config, materials).images, whole.images)


def test_pieces_of_another_network_are_drawn_again(materials, networks):
    config = dataclasses.replace(CONFIGS[0], base=str(materials.folder.path / "own"))
    save_network(materials.folder.path / "own", tiny(8))
    first = generate(config, materials)
    save_network(materials.folder.path / "own", tiny(9))
    second = generate(config, Materials(materials.folder, device="cpu"))
    assert not torch.equal(first.images, second.images)


@pytest.mark.slow
def test_another_batch_size_changes_nothing_but_rounding(materials):
    """Images to 1e-4 of their size, and with them what is measured."""
    config = CONFIGS[1]
    rows = sweep([config, dataclasses.replace(config, batch_size=20)], materials, progress=False)
    one, other = (row["metrics"] for row in rows)
    assert one["histogram"] == other["histogram"] and one["safety"] == other["safety"]
    for name in ("frechet", "frechet_pixels"):
        assert abs(one[name] - other[name]) < 1e-3 * one[name]
    images = [
        generate(dataclasses.replace(config, batch_size=size), materials).images for size in (8, 20)
    ]
    assert torch.allclose(*images, rtol=1e-4, atol=1e-4 * float(images[0].abs().max()))


def test_a_conditional_network_forgets_any_class_or_several(materials):
    config = dataclasses.replace(CONFIGS[2], networks="conditional", forget=("3",))
    one = generate(config, materials)
    both = generate(dataclasses.replace(config, forget=("3", "7")), materials)
    assert one.log_posterior.shape == (20,) and both.log_posterior.shape == (2, 20)
    assert not torch.equal(one.images, both.images)
    unguided = generate(dataclasses.replace(config, rule="none"), materials)
    assert unguided.log_posterior is None


def test_several_classes_have_a_network_each(materials):
    config = dataclasses.replace(CONFIGS[2], forget=("0", "1"))
    assert generate(config, materials).log_posterior.shape == (2, 20)


def test_trajectories_end_in_the_images(materials):
    config = CONFIGS[2]
    kept = trajectories(config, materials, [0, 3, 11])
    images = generate(config, materials).images[[0, 3, 11]]
    assert kept["times"].shape == (5,) and kept["scale"].shape == (5, 3)
    assert kept["log_posterior"].shape == (5, 3)
    # The last step ends at sigma = 0, in the predicted image itself.
    scale = float(images.abs().max())
    np.testing.assert_allclose(kept["x"][-1], images, rtol=1e-4, atol=1e-5 * scale)


def test_the_first_images_and_their_configuration_stay(materials):
    sweep(CONFIGS[:1], materials, progress=False)
    folder = materials.folder.samples(CONFIGS[0])
    tensors, _ = files.load_tensors(folder / "images.safetensors")
    assert tensors["images"].shape == (16, 1, 8, 8)
    assert tensors["labels"].shape == tensors["mean_scale"].shape == (16,)
    assert Config.from_json(files.read_json(folder / "config.json")) == CONFIGS[0]
    assert (folder / "grid.png").read_bytes().startswith(b"\x89PNG")


# ---------------------------------------------------------------------- processes


LAUNCHED = """
import sys
import threading
from accelerate import PartialState
from dng_models.class_removal.__main__ import main
status = main(sys.argv[1:])
sys.stdout.write("processes: %d\\n" % PartialState().num_processes)
sys.exit(status)
"""


@pytest.mark.slow
def test_two_processes_write_the_same_table(materials, tmp_path):
    """Through torchrun: on a CPU ``accelerate launch --num_processes 2`` starts only one."""
    arguments = [
        *(
            "sweep",
            "--rules",
            "none",
            "np",
            "dng",
            "--guidance-scale",
            "0.5",
            "--steps",
            "5",
            "--quiet",
        ),
        *("--hyperparameters", "own", "--temperature", "0.1"),
        *("--num-images", "20", "--batch-size", "8", "--device", "cpu"),
    ]
    (tmp_path / "launched.py").write_text(LAUNCHED)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    tables = []
    for count, launcher in ((1, []), (2, torchrun)):
        out = tmp_path / str(count)
        out.mkdir()
        (out / "networks").symlink_to(materials.folder.networks)
        script = [str(tmp_path / "launched.py"), *arguments, "--out", str(out)]
        run = subprocess.run(
            [sys.executable, *launcher, *script],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stderr
        assert run.stdout.count(f"processes: {count}") == count
        tables.append((out / "sweep.jsonl").read_bytes())
    assert tables[0] == tables[1]


def test_the_calibration_may_be_that_of_another_class_or_a_file(tmp_path):
    materials = Materials(RunFolder(tmp_path), device="cpu")
    own = Config(hyperparameters="calibrated")
    calibrations = tmp_path / "calibration"
    assert materials.calibration_file(own) == calibrations / "0.json"
    other = dataclasses.replace(own, calibration="1", networks="conditional")
    assert materials.calibration_file(other) == calibrations / "1-conditional.json"
    with pytest.raises(
        FileNotFoundError, match=r"calibrate --dataset digits --forget 1 --networks"
    ):
        materials.calibration(other)
    (tmp_path / "mine.json").write_text("{}")
    named = dataclasses.replace(own, calibration=str(tmp_path / "mine.json"))
    assert materials.calibration_file(named) == tmp_path / "mine.json"


# ---------------------------------------------------------------------- one at a time, and whole


def test_a_second_sweep_of_a_table_is_refused(materials, capsys):
    """Two at once gave every row twice."""
    folder, refused = materials.folder.path, []
    command = ["sweep", "--rules", "none", "--device", "cpu", "--quiet", "--out", str(folder)]

    def second():
        refused.append(main(command))

    with files.only_writer(folder):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert refused == [2] and not materials.folder.table.exists()
    (line,) = capsys.readouterr().err.splitlines()
    assert f"is being written to by process {os.getpid()} on" in line and "--out" in line


def test_what_a_killed_sweep_left_goes_and_a_classifier_is_what_is_loaded(
    materials, undisturbed, networks
):
    materials.folder.networks.unlink()
    shutil.copytree(networks, materials.folder.networks)
    classifier = materials.folder.networks / "classifier"
    left = [
        classifier / ".model.safetensors.abcd1234.part",
        materials.folder.path / ".sweep.jsonl.abcd1234.part",
        materials.folder.samples(BASE) / ".grid.png.abcd_234.part",
    ]
    for path in left:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half")
    for name in ("README.md", ".model.safetensors.abcd1234", "old.safetensors"):
        (classifier / name).write_text("of no account")
    sweep(CONFIGS, materials, progress=False)
    assert materials.folder.table.read_bytes() == undisturbed
    assert not any(path.exists() for path in left)


@pytest.mark.parametrize(
    "damage",
    [
        "all",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("images.safetensors", "config.json", "grid.png", "cut")
        ),
    ],
)
def test_kept_images_that_are_lost_are_drawn_again(materials, undisturbed, damage, monkeypatch):
    sweep(CONFIGS, materials, progress=False)
    samples = materials.folder.samples(CONFIGS[2])
    before = {path.name: path.read_bytes() for path in samples.iterdir()}
    if damage == "all":
        shutil.rmtree(samples)
    elif damage == "cut":
        (samples / "images.safetensors").write_bytes(before["images.safetensors"][:-9])
    else:
        (samples / damage).unlink()
    monkeypatch.setattr(sweeping, "evaluate", None)  # what was measured stays
    sweep(CONFIGS, materials, progress=False)
    assert {path.name: path.read_bytes() for path in samples.iterdir()} == before
    assert materials.folder.table.read_bytes() == undisturbed
    assert list((materials.folder.path / "work").iterdir()) == []


def test_a_network_of_which_a_file_is_gone_names_the_command(materials, networks):
    materials.folder.networks.unlink()
    shutil.copytree(networks, materials.folder.networks)
    (materials.folder.networks / "base" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"or not all of it; train it .* --only base"):
        sweep(CONFIGS, materials, progress=False)
    (materials.folder.networks / "classifier" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no classifier .* --only classifier"):
        sweep(CONFIGS, materials, progress=False)
