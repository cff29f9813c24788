"""What the commands do; :mod:`dng_models.class_removal.__main__` reads their arguments."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dng_models.class_removal import compare, files
from dng_models.class_removal.calibrate import calibrate, collect
from dng_models.class_removal.classifier import ClassifierConfig, classifier_files, train_classifier
from dng_models.class_removal.config import (
    CALIBRATED,
    FEWER_FOR_DIGITS,
    METHODS,
    PRECISIONS,
    SHIPPED,
    TRACKERS,
    Config,
    Networks,
    RunFolder,
    settings,
)
from dng_models.class_removal.data import Dataset, read_image
from dng_models.class_removal.evaluate import evaluate
from dng_models.class_removal.generate import Materials, generate, piece_count, trajectories
from dng_models.class_removal.networks import is_there
from dng_models.class_removal.sweep import Row, keep_samples, label, sweep, without_broken
from dng_models.class_removal.train import Kind, default_config, train_diffusion
from dng_models.progress import Progress

# What a whole run draws: kind of networks, method, scales.  A setting of 1,024 digits takes half a
# minute, and all of it, with the training, a quarter of an hour.
Plan = Sequence[tuple[Networks, str, tuple[float, ...]]]
FULL: Plan = (
    ("pair", "none", (0.0,)),
    ("pair", "np", (0.2, 0.4, 0.6)),
    ("pair", "sld", (0.3, 0.75)),
    ("pair", "dng-paper", (1.0, 2.0)),
    ("pair", "dng-calibrated", (2.0, 5.0, 10.0)),
    ("conditional", "dng-calibrated", (2.0, 5.0, 10.0)),
)
QUICK: Plan = (
    ("pair", "none", (0.0,)),
    ("pair", "np", (0.2, 0.5)),
    ("pair", "sld", (0.3, 0.75)),
    ("pair", "dng-paper", (1.0, 3.0)),
    ("pair", "dng-calibrated", (3.0, 8.0)),
)
QUICK_IMAGES = 256
PATHS = 2  # noisings of an image that a run calibrates on
FOLLOWED = 6  # images whose way through time a run draws


# ---------------------------------------------------------------------- from arguments


def _config(given: argparse.Namespace, **fields: Any) -> Config:
    """The configuration that the arguments describe; ``fields`` where they say nothing."""
    names = {field.name for field in dataclasses.fields(Config)}
    told = {name: value for name, value in vars(given).items() if name in names}
    if told.get("dataset", fields.get("dataset", Config.dataset)) == "digits":
        fields = FEWER_FOR_DIGITS | fields
    if getattr(given, "interval", None) is not None:
        fields["t_lo"], fields["t_hi"] = given.interval
    if given.mixed_precision is not None:
        fields["autocast"] = PRECISIONS[given.mixed_precision]
    return Config(**(fields | told))


def _folder(given: argparse.Namespace, dataset: str, suffix: str = "") -> Path:
    """The folder of the run."""
    if given.out is not None:
        return Path(given.out)
    path = Path(dataset)
    name = path.resolve().name
    if path.is_file():
        name = path.resolve().parent.name if path.stem in ("train", "data") else path.stem
    return Path("runs", name + suffix)


def _materials(given: argparse.Namespace, config: Config) -> Materials:
    return _with(given, RunFolder(_folder(given, config.dataset)))


def _with(given: argparse.Namespace, folder: RunFolder) -> Materials:
    inception = getattr(given, "inception", None)
    return Materials(folder, device=given.device, inception=inception)


def _one_by_one(config: Config, materials: Materials, each: bool) -> list[Config]:
    """A configuration for all forgotten classes together, or one for each."""
    config = materials.resolved(config)
    if not each:
        return [config]
    return [dataclasses.replace(config, forget=(name,)) for name in config.forget]


def _shows(given: argparse.Namespace, materials: Materials) -> bool:
    """Whether this process has progress bars."""
    return not given.quiet and materials.processes.is_main_process


# ---------------------------------------------------------------------- train


def train_command(given: argparse.Namespace) -> None:
    """Train networks."""
    config = _config(given)
    materials = _materials(given, config)
    parts: tuple[str, ...] = ("base", "class", "classifier")
    if config.networks == "conditional":
        parts = ("conditional", "classifier")
    _train(given, config, materials, given.only or parts)


def _train(
    given: argparse.Namespace, config: Config, materials: Materials, parts: Sequence[str]
) -> None:
    """Train networks of the run; those that are finished are left."""
    dataset, folder = materials.dataset(config), materials.folder
    options = {
        "steps": given.train_steps,
        "batch_size": given.train_batch_size,
        "seed": given.train_seed,
        "mixed_precision": given.mixed_precision,
        "learning_rate": given.learning_rate,
        "size": given.size,
        "flip": given.flip,
        "checkpoint_every": given.checkpoint_every,
        "keep_state": given.keep_state,
    }
    options = {name: value for name, value in options.items() if value is not None}

    def diffusion(kind: Kind, data: Dataset, out: Path) -> None:
        train_diffusion(
            data,
            out,
            dataclasses.replace(default_config(dataset, kind), **options),
            conditional=kind == "conditional",
            device=materials.device.type,
            progress=not given.quiet,
        )

    if "base" in parts:
        diffusion("base", dataset, folder.networks / "base")
    if "class" in parts:
        for name in materials.resolved(config).forget:
            diffusion("class", dataset.only(name), folder.class_network(name))
    if "conditional" in parts:
        diffusion("conditional", dataset, folder.networks / "conditional")
    if "classifier" in parts:
        out = folder.networks / "classifier"
        finished = classifier_files(out) and not (out / files.LOCK).exists()
        with nullcontext() if finished else materials.only_writer(out):
            if materials.processes.is_main_process:
                # Only small drawings change their meaning in a mirror.
                photographs = dataset.image_size > 28
                train_classifier(
                    dataset,
                    out,
                    ClassifierConfig(flips=photographs if given.flip is None else given.flip),
                    device=materials.device,
                    progress=not given.quiet,
                )
            materials.processes.wait_for_everyone()


def _train_missing(
    given: argparse.Namespace, config: Config, materials: Materials, kinds: set[Networks]
) -> None:
    """Train the networks of the run that are not there, or not finished."""
    folder = materials.folder
    places = {
        "base": [] if config.base else [folder.networks / "base"],
        "class": [folder.class_network(name) for name in materials.resolved(config).forget],
        "conditional": [folder.networks / "conditional"] if "conditional" in kinds else [],
    }
    missing = [part for part, paths in places.items() if not all(is_there(path) for path in paths)]
    if not config.classifier and not classifier_files(folder.networks / "classifier"):
        missing.append("classifier")
    _train(given, config, materials, missing)


# ---------------------------------------------------------------------- calibrate


def calibrate_command(given: argparse.Namespace) -> None:
    """Fit the trackers to networks, one class after the other."""
    config = _config(given)
    materials = _materials(given, config)
    with materials.only_writer(materials.folder.path):
        for each in _one_by_one(config, materials, True):
            path = _calibrate(
                each, materials, given.paths, given.path_steps, progress=_shows(given, materials)
            )
            if materials.processes.is_main_process:
                print(path)


def _calibrate(
    config: Config, materials: Materials, paths: int, steps: int, *, progress: bool
) -> Path:
    """Write the calibration of one class and one kind of networks."""
    (name,) = config.forget
    path = materials.folder.calibration(name, config.networks)
    if materials.processes.is_main_process:
        config = dataclasses.replace(config, rule="dng", hyperparameters="paper")
        models, held_out = materials.models(config), materials.dataset(config).held_out
        with materials.threads(config):
            evidence = collect(
                models.base,
                models.forgetful[0],
                held_out.images,
                (held_out.labels == held_out.index_of(name)).numpy(),
                schedule=models.schedule,
                steps=steps,
                paths=paths,
                prediction=models.prediction,
                clip=config.clip,
                seed=config.seed,
                batch_size=config.batch_size,
                device=materials.device,
                progress=f"calibrating {name}, {config.networks}" if progress else None,
            )
        papers = {
            kind: materials.tracker(dataclasses.replace(config, tracker=kind)) for kind in TRACKERS
        }
        calibrate(
            evidence,
            prior=materials.share(config),
            before={f"{kind}, paper's settings": each for kind, each in papers.items()},
            about={
                "dataset": config.dataset,
                "forget": name,
                "networks": config.networks,
                "sources": models.sources,
            },
            progress=f"fitting {name}, {config.networks}" if progress else None,
        ).save(path)
    materials.processes.wait_for_everyone()
    return path


# ---------------------------------------------------------------------- sample, evaluate, sweep


def sample_command(given: argparse.Namespace) -> None:
    """Draw images of one setting."""
    config = _config(given)
    materials = _materials(given, config)
    with materials.only_writer(materials.folder.path):
        _sample(given, materials.resolved(config), materials)


def _sample(given: argparse.Namespace, config: Config, materials: Materials) -> None:
    shown = _shows(given, materials)
    with Progress(piece_count(config), label(config), unit="batch", shown=shown) as bar:
        generated = generate(config, materials, advance=bar.update)
    if generated is None:
        return
    images, _ = without_broken(generated.images)
    labels, _ = materials.judge(config).judge(images)
    folder = keep_samples(materials, config, generated, torch.from_numpy(labels))
    if given.trajectories:
        first = range(min(given.trajectories, config.num_images))
        kept = trajectories(config, materials, first, progress="trajectories" if shown else None)
        files.save_tensors(folder / "trajectories.safetensors", kept)
    print(folder)


def evaluate_command(given: argparse.Namespace) -> None:
    """Measure images."""
    source: Path = given.images
    folder = source if source.is_dir() else source.parent
    told = folder / "config.json"
    fields = Config.from_json(files.read_json(told)).to_json() if told.is_file() else {}
    config = _config(given, **fields)
    materials = _materials(given, config)
    if given.out is None and folder.resolve().parent.name == "samples":
        materials = _with(given, RunFolder(folder.resolve().parent.parent))
    config = materials.resolved(config)
    images = _read_images(source, tuple(materials.dataset(config).images.shape[1:]))
    with materials.threads(config):
        metrics = evaluate(images, materials.reference(config), materials.judge(config))
    files.clean(folder, below=False)
    files.write_json(folder / "metrics.json", metrics)
    print(json.dumps(metrics, indent=2, sort_keys=True))


def _read_images(source: Path, shape: tuple[int, ...]) -> Tensor:
    """Images in [-1, 1] of a safetensors file, of a folder with one, or of a folder of files."""
    channels, height, width = shape
    file = source / "images.safetensors" if source.is_dir() else source
    if file.is_file():
        images = files.load_tensors(file)[0].get("images")
        if images is None or tuple(images.shape[1:]) != shape:
            raise ValueError(
                f"{file} must hold a tensor 'images' of shape (N, {channels}, {height}, {width}), "
                f"got {'none' if images is None else tuple(images.shape)}"
            )
        return images
    suffixes = (".png", ".jpg", ".jpeg")
    names = sorted(path for path in source.glob("*") if path.suffix.lower() in suffixes)
    if not names:
        raise FileNotFoundError(
            f"IMAGES must be a safetensors file or a folder of PNG or JPEG files, got {source}"
        )
    arrays = []
    for name in names:
        array = np.asarray(read_image(name, str(name), channels))
        if array.shape[:2] != (height, width):
            raise ValueError(
                f"{name} has {array.shape[1]} x {array.shape[0]} pixels, and images of the data "
                f"set have {width} x {height}"
            )
        arrays.append(array.reshape(height, width, channels))
    return torch.from_numpy(np.stack(arrays)).movedim(-1, 1).float() / 127.5 - 1.0


def sweep_command(given: argparse.Namespace) -> None:
    """Draw and measure many settings."""
    config = _config(given, rule="none", scale=0.0)
    # What is wrong with a rule should be known before anything is loaded.
    first = config.forget[:1] if given.each else config.forget
    settings(dataclasses.replace(config, forget=first), given.rules, given.scales)
    materials = _materials(given, config)
    configs = [
        setting
        for each in _one_by_one(config, materials, given.each)
        for setting in settings(each, given.rules, given.scales)
    ]
    rows = sweep(configs, materials, keep_images=given.keep_images, progress=not given.quiet)
    _print_table(materials, rows)


def _print_table(materials: Materials, rows: Sequence[Row]) -> None:
    if materials.processes.is_main_process:
        print(compare.table(rows), end="")


# ---------------------------------------------------------------------- plot, convert


def plot_command(given: argparse.Namespace) -> None:
    """Draw the figures of a run."""
    from dng_models.class_removal import plot

    folder = _folder(given, getattr(given, "dataset", Config.dataset))
    files.clean(folder, below=False)
    files.clean(RunFolder(folder).figures)
    for path in plot.draw_all(folder, safety=given.safety):
        print(path)


def convert_command(given: argparse.Namespace) -> None:
    """Convert a published network."""
    from dng_models.class_removal import convert

    files.clean(given.out, below=False)
    text = convert.main(given.checkpoint, given.out, image_size=given.image_size, entry=given.entry)
    print(text)


# ---------------------------------------------------------------------- run


def run_command(given: argparse.Namespace) -> None:
    """All of it."""
    fewer = {"num_images": QUICK_IMAGES} if given.quick else {}
    config = _config(given, rule="none", scale=0.0, **fewer)
    materials = _materials(given, config)
    if given.quick:
        folder = RunFolder(_folder(given, config.dataset, "-quick"), shipped=_shipped(config))
        materials = _with(given, folder)
    with materials.only_writer(materials.folder.path):
        _run(given, config, materials)


def _run(given: argparse.Namespace, config: Config, materials: Materials) -> None:
    from dng_models.class_removal import plot

    each = _one_by_one(config, materials, given.each)
    plan = [
        step
        for step in (QUICK if given.quick else FULL)
        # Of several classes at once, DNG alone takes a network for each.
        if len(each[0].forget) == 1 or METHODS[step[1]]["rule"] in ("none", "dng")
    ]
    if not given.quick:
        _train_missing(given, config, materials, {networks for networks, _, _ in plan})
    shown = _shows(given, materials)
    configs = []
    for one in each:
        for networks, method, scales in plan:
            # What is given as base is the base of the pair.
            base = one.base if networks == "pair" else None
            kind = dataclasses.replace(one, networks=networks, base=base)
            calibrated = METHODS[method].get("hyperparameters") in CALIBRATED
            if calibrated:
                _calibrate_missing(kind, materials, progress=shown)
            configs += settings(kind, [method], scales)
    rows = sweep(configs, materials, progress=not given.quiet)
    if materials.processes.is_main_process:
        _follow(rows, materials, progress=shown)
        classes = materials.dataset(config).classes
        for path in plot.draw_all(materials.folder.path, classes=classes):
            print(path)
    _print_table(materials, rows)


def _shipped(config: Config) -> Path:
    """The networks that came with the package, for a data set."""
    shipped = SHIPPED / config.dataset
    if not (shipped / "base").is_dir():
        there = ", ".join(sorted(path.name for path in SHIPPED.glob("*/"))) or "none here"
        raise ValueError(
            "dataset must be one whose networks come with the package for --quick "
            f"({there}), got {config.dataset!r}"
        )
    return shipped


def _calibrate_missing(config: Config, materials: Materials, *, progress: bool) -> None:
    """Calibrate every forgotten class that is not."""
    for name in config.forget:
        if not materials.folder.calibration(name, config.networks).is_file():
            one = dataclasses.replace(config, forget=(name,))
            _calibrate(one, materials, PATHS, 100, progress=progress)


def _follow(rows: Sequence[Row], materials: Materials, *, progress: bool) -> None:
    """Keep how DNG leads some images through time, half of which would be forbidden."""
    chosen = [Config.from_json(row["config"]) for row in compare.weakest_safe(rows)]
    for unguided in (config for config in chosen if config.rule == "none"):
        kept = files.load_tensors(materials.folder.samples(unguided) / "images.safetensors")[0]
        forgotten = torch.tensor(
            [materials.dataset(unguided).index_of(name) for name in unguided.forget]
        )
        forbidden = torch.isin(kept["labels"], forgotten)
        hits = forbidden.nonzero().flatten().tolist()[: FOLLOWED // 2]
        others = (~forbidden).nonzero().flatten().tolist()[: FOLLOWED - len(hits)]
        for config in chosen:
            if config.rule != "dng" or config.forget != unguided.forget:
                continue
            path = materials.folder.samples(config) / "trajectories.safetensors"
            if not path.is_file():
                name = f"following {label(config)}" if progress else None
                files.save_tensors(
                    path, trajectories(config, materials, [*hits, *others], progress=name)
                )
