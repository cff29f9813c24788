"""Kill a tiny run by SIGKILL at every call that changes files, start it again, and compare.

``python -m tests.helpers.killed_everywhere NAME FOLDER [EVERY]`` prints JSON as its last line: how
many such calls there were, how many were tried, and what was wrong at each.  The run is a fork of
this process, in which everything is loaded, so that a try takes no longer than the run.  An audit
hook sees its calls (open for writing, rename, remove, mkdir, rmdir, truncate, chmod, flock), and
wrappers see ``os.fsync``, ``os.pwrite`` and ``os.close``; the process may be killed before each.
At an fsync the last bytes of the file are cut off in every other run, as by an interrupted write.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch

Prepared = tuple[Callable[[Path], None], Callable[[Path], None]]
EVENTS = {
    *("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod"),
    *("os.symlink", "shutil.rmtree", "fcntl.flock"),
}
WRITING = os.O_WRONLY | os.O_RDWR


# ---------------------------------------------------------------------- what is run


def the_sweep(shared: Path) -> Prepared:
    """A sweep over two settings with tiny networks."""
    from dng_models.class_removal.classifier import ClassifierConfig, train_classifier
    from dng_models.class_removal.config import Config
    from dng_models.class_removal.data import load_dataset
    from dng_models.class_removal.materials import Materials
    from dng_models.class_removal.networks import save_network
    from dng_models.class_removal.run_folder import RunFolder
    from dng_models.class_removal.sweeps import sweep
    from tests.helpers.tiny_networks import tiny

    for seed, name in enumerate(("base", "class-0")):
        save_network(shared / name, tiny(seed))
    data = load_dataset("digits")
    train_classifier(data, shared / "classifier", ClassifierConfig(steps=5), progress=False)
    base = Config(rule="none", guidance_scale=0.0, steps=2, num_images=12, batch_size=6)
    guided = base.to_json() | {"rule": "np", "guidance_scale": 0.5}
    loaded: dict[Any, Any] = {}

    def prepare(folder: Path) -> None:
        (folder / "networks").symlink_to(shared)

    def run(folder: Path) -> None:
        materials = Materials(RunFolder(folder), device="cpu")
        materials._loaded = loaded
        sweep([base, Config.from_json(guided)], materials, progress=False)

    return prepare, run


def the_training(shared: Path) -> Prepared:
    """A training run of four steps with two checkpoints."""
    from dng_models.class_removal import train, training_config
    from dng_models.class_removal.data import load_dataset

    train.GRID_SIDE, train.GRID_STEPS, train.LOSS_BINS, train.LOSS_COPIES = 2, 2, 1, 2
    data = load_dataset()
    config = training_config.TrainConfig(
        steps=4, batch_size=2, warmup_steps=1, checkpoint_every=2, log_every=1, grid_every=3
    )

    def run(folder: Path) -> None:
        train.train_diffusion(data, folder / "network", config, device="cpu", progress=False)

    return lambda folder: None, run


def the_calibration(shared: Path) -> Prepared:
    """The command ``calibrate`` for one class."""
    from dng_models.class_removal.__main__ import main
    from dng_models.class_removal.networks import save_network
    from tests.helpers.tiny_networks import tiny

    for seed, name in enumerate(("base", "class-0")):
        save_network(shared / name, tiny(seed))

    def prepare(folder: Path) -> None:
        (folder / "networks").symlink_to(shared)

    def run(folder: Path) -> None:
        arguments = ["--forget", "0", "--paths", "1", "--path-steps", "2", "--device", "cpu"]
        status = main(["calibrate", *arguments, "--out", str(folder), "--quiet", "--debug"])
        assert status == 0

    return prepare, run


def the_images(shared: Path) -> Prepared:
    """The command ``run`` of text_to_image without its figures."""
    import dataclasses

    from dng_models.text_to_image import commands, pipelines
    from dng_models.text_to_image.config import TINY, Config
    from dng_models.text_to_image.generation import Materials, generate, measure
    from dng_models.text_to_image.prompts import PAPER
    from dng_models.text_to_image.store import RunFolder

    pipelines.quiet()
    config = Config(
        model=TINY, clip=TINY, prompts=(PAPER[1],), rules=("np",), fractions=(1.0,), steps=1
    )
    config = dataclasses.replace(config, num_images=3)
    first = Materials(RunFolder(shared), device="cpu", batch_size=2)
    first.pipeline(config)
    first.detector(config)

    def run(folder: Path) -> None:
        materials = Materials(RunFolder(folder), device="cpu", batch_size=2)
        materials._pipe, materials._clips = first._pipe, first._clips
        materials._detectors = first._detectors
        generate(config, materials, progress=False)
        measure(config, materials, progress=False)
        generate(config, materials, progress=False)
        commands._write_tables(materials.folder)

    return lambda folder: None, run


RUNS = {
    "sweep": the_sweep,
    "training": the_training,
    "calibration": the_calibration,
    "images": the_images,
}


# ---------------------------------------------------------------------- counting and killing


class Calls:
    """Counts the calls of this process that change something in a folder, and kills it at one."""

    def __init__(self, folder: Path, kill_at: int) -> None:
        self.folder, self.kill_at, self.count = str(folder), kill_at, 0
        sys.addaudithook(self._heard)
        for name in ("fsync", "pwrite", "close"):
            setattr(os, name, self._counting(name, getattr(os, name)))

    def _counting(self, name: str, call: Callable[..., object]) -> Callable[..., object]:
        def counted(descriptor: int, *rest: object) -> object:
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            tear = name == "fsync" and self.count % 2 == 1 and os.path.isfile(path)
            self._about(path, tear)
            return call(descriptor, *rest)

        return counted

    def _heard(self, event: str, arguments: tuple[object, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            # The flags, because os.open, which opens locks and temporary files, has no mode.
            if isinstance(flags, int) and flags & WRITING:
                self._about(path)
        elif event in EVENTS:
            path = arguments[0]
            if isinstance(path, int):
                path = os.readlink(f"/proc/self/fd/{path}")
            self._about(path)

    def _about(self, path: object, tear: bool = False) -> None:
        if not isinstance(path, str | os.PathLike) or not os.fspath(path).startswith(self.folder):
            return
        self.count += 1
        if self.count == self.kill_at:
            if tear:
                os.truncate(path, max(0, os.path.getsize(path) - 7))
            os.kill(os.getpid(), signal.SIGKILL)


def forked(work: Callable[[], None], log: Path) -> int:
    """Do some work in a fork, and return its exit status; negative for a signal."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            with log.open("a") as file, redirect_stdout(file), redirect_stderr(file):
                try:
                    work()
                    status = 0
                except BaseException:
                    traceback.print_exc(file=file)
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def contents(folder: Path) -> dict[str, bytes | None]:
    """Contents of every file in a folder, by relative path; None for subfolders."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def differences(found: dict[str, bytes | None], wanted: dict[str, bytes | None]) -> list[str]:
    """Differences of two contents, in words."""
    more = [f"{name} is left" for name in found.keys() - wanted.keys()]
    fewer = [f"{name} is missing" for name in wanted.keys() - found.keys()]
    other = [f"{n} differs" for n in found.keys() & wanted.keys() if found[n] != wanted[n]]
    return sorted([*more, *fewer, *other])


def main(name: str, folder: Path, every: int = 1) -> dict[str, object]:
    """Kill a run at every ``every``-th call; return the counts, and what was wrong by call."""
    torch.set_num_threads(1)
    folder = folder.resolve()
    shared = folder / "shared"
    shared.mkdir()
    prepare, run = RUNS[name](shared)
    log = folder / "log"

    def fresh() -> Path:
        path = Path(tempfile.mkdtemp(dir=folder))
        prepare(path)
        return path

    run(fresh())  # loads and compiles once what every fork would else load and compile again
    whole, counted = fresh(), folder / "count"

    def count() -> None:
        calls = Calls(whole, 0)
        run(whole)
        counted.write_text(str(calls.count))

    assert forked(count, log) == 0, log.read_text()
    wanted, total = contents(whole), int(counted.read_text())
    wrong: dict[int, list[str]] = {}
    tried = range(1, total + 1, every)
    for number in tried:
        path = fresh()

        def killed(path: Path = path, number: int = number) -> None:
            Calls(path, number)
            run(path)

        log.write_text("")
        if (status := forked(killed, log)) != -signal.SIGKILL:
            wrong[number] = [f"was not killed but ended with {status}: {log.read_text()}"]
            continue
        if (status := forked(lambda path=path: run(path), log)) != 0:
            wrong[number] = [f"ended with {status} when started again: {log.read_text()}"]
        elif found := differences(contents(path), wanted):
            wrong[number] = found
    return {"points": total, "tried": len(tried), "wrong": wrong}


if __name__ == "__main__":
    options = sys.argv[1:]
    result = main(options[0], Path(options[1]), *map(int, options[2:]))
    sys.stdout.write(f"\n{json.dumps(result)}\n")
