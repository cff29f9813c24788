"""What the commands do; :mod:`dng_models.class_removal.__main__` reads their arguments."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dng_math import NoiseSchedule, checks
from dng_models.class_removal import compare, plan
from dng_models.class_removal.calibration import (
    OF_STEPS,
    AnyEvidence,
    AnyTracker,
    calibrate,
    report_table,
)
from dng_models.class_removal.classifier import ClassifierConfig, train_classifier
from dng_models.class_removal.config import (
    CALIBRATED,
    FEWER_FOR_DIGITS,
    PRECISIONS,
    Config,
    Networks,
)
from dng_models.class_removal.data import (
    SPLIT_NAMES,
    Dataset,
    first_size,
    held_out_rows,
    read_image,
)
from dng_models.class_removal.evaluation import evaluate
from dng_models.class_removal.evidence import collect, collect_along_paths
from dng_models.class_removal.generation import generate, piece_count, trajectories
from dng_models.class_removal.judge import classifier_files
from dng_models.class_removal.materials import Materials, same_schedule
from dng_models.class_removal.methods import METHODS, settings
from dng_models.class_removal.networks import Size, is_there
from dng_models.class_removal.run_folder import SHIPPED, RunFolder
from dng_models.class_removal.sweeps import (
    Row,
    keep_samples,
    label,
    read_table,
    sweep,
    without_broken,
)
from dng_models.class_removal.train import train_diffusion
from dng_models.class_removal.training_config import (
    SCHEDULE_STEPS,
    Kind,
    TrainConfig,
    default_config,
)
from dng_models.class_removal.tuning import expected, tune
from dng_models.support import files, foreign, metrics
from dng_models.support.progress import Progress

# What the plan suggests when a command would take long.
_FEWER = "--num-images and --steps are fewer images and steps"
_SMALLER = (
    "--image-size and --size small make smaller networks, --train-steps trains them for less long"
)
SHORTER = {
    "run": f"--quick shows in minutes that everything works; {_SMALLER}; {_FEWER}; or a GPU",
    "train": f"{_SMALLER}; or a GPU",
    "calibrate": "--paths and --path-steps; or a GPU",
    "sweep": f"{_FEWER}; --rules and --guidance-scale name fewer settings; or a GPU",
}

# What a whole run draws: kind of networks, method, guidance scales.  A setting of 1,024 digits
# takes half a minute; the whole run, with training, a quarter of an hour.
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
PATHS, PATH_STEPS = 2, 100  # a run calibrates on so many noising paths of each image
# A quick run on data without shipped networks.  Time per update is proportional to the number of
# pixels; the numbers of updates are chosen to take minutes on two cores.
QUICK_SIDE, QUICK_SMALLER = 28, 16  # images of a side above the first are resized to the second
QUICK_FIELDS: dict[str, Any] = {"num_images": 64, "steps": 50, "batch_size": 64}
QUICK_UPDATES, QUICK_PIXEL_UPDATES, QUICK_JUDGE_UPDATES = 1500, 256_000, 300
QUICK_PATHS, QUICK_PATH_STEPS, QUICK_HELD_OUT = 1, 50, 128
FOLLOWED = 6  # images whose trajectories a run draws


# ---------------------------------------------------------------------- from arguments


def _config(given: argparse.Namespace, **fields: Any) -> Config:
    """The configuration that the arguments describe; ``fields`` are defaults."""
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
    """The folder of the run: ``--out``, or one in ``runs`` named after the data set."""
    if given.out is not None:
        return Path(given.out)
    path = Path(dataset)
    name = path.resolve().name
    if path.is_file():
        name = path.resolve().parent.name if path.stem in SPLIT_NAMES else path.stem
    return Path("runs", name + suffix)


def _materials(given: argparse.Namespace, config: Config, *, forgets: bool = True) -> Materials:
    """The materials of a run: its folder, its device and what it loads.

    Raises
    ------
    ValueError
        If ``forgets`` (the command needs the forgotten classes) and they are not given, unless the
        data are digits.  For other data there is no sensible default.
    """
    folder = RunFolder(_folder(given, config.dataset))
    if getattr(given, "shipped", False):
        shipped = _shipped(config, "--shipped")
        folder = RunFolder(_folder(given, config.dataset, "-shipped"), shipped)
    materials = _with(given, folder)
    if forgets:
        _require_forget(given, config, materials)
    return materials


def _require_forget(given: argparse.Namespace, config: Config, materials: Materials) -> None:
    if "forget" in vars(given) or config.paper_name in ("digits", "mnist"):
        return
    classes = materials.dataset(config).classes
    raise ValueError(
        f"forget must be given for {config.dataset}: one of its classes {', '.join(classes)}, or "
        f"several (such as --forget {shlex.quote(classes[0])})"
    )


def _with(given: argparse.Namespace, folder: RunFolder) -> Materials:
    inception = getattr(given, "inception", None)
    return Materials(folder, device=given.device, inception=inception)


def _one_by_one(config: Config, materials: Materials, each: bool) -> list[Config]:
    """One configuration for all forgotten classes together, or (``each``) one per class."""
    config = materials.resolved(config)
    if not each:
        return [config]
    return [dataclasses.replace(config, forget=(name,)) for name in config.forget]


def _shows(given: argparse.Namespace, materials: Materials) -> bool:
    """Whether this process shows progress bars."""
    return not given.quiet and materials.processes.is_main_process


# ---------------------------------------------------------------------- train


def train_command(given: argparse.Namespace) -> None:
    """Train the networks of a run, or those named by ``--only``."""
    config = _config(given)
    parts: tuple[str, ...] = ("base", "class", "classifier")
    if config.networks == "conditional":
        parts = ("conditional", "classifier")
    parts = given.only or parts
    materials = _materials(given, config, forgets="class" in parts)
    trainings = _trainings(given, config, materials, parts)
    if not _planned(
        given, config, materials, lambda: plan.of_trainings(trainings, materials.device)
    ):
        _train(given, materials, trainings)


def _trainings(
    given: argparse.Namespace, config: Config, materials: Materials, parts: Sequence[str]
) -> list[plan.Training]:
    """The trainings of these parts of the run.

    Raises
    ------
    ValueError
        If one of them cannot be done, because of its sizes or of what is in its folder.
    """
    dataset, folder = materials.dataset(config), materials.folder
    quick = _is_quick(given, config)
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

    def diffusion(kind: Kind, data: Dataset, out: Path) -> plan.Training:
        trained = default_config(dataset, kind)
        if quick:
            trained = _quick_training(dataset, kind, trained)
        trained = dataclasses.replace(trained, **options)
        return plan.Training(out, data, trained, conditional=kind == "conditional")

    found = []
    if "base" in parts:
        found.append(diffusion("base", dataset, folder.networks / "base"))
    if "class" in parts:
        for name in materials.resolved(config).forget:
            found.append(diffusion("class", dataset.only(name), folder.class_network(name)))
    if "conditional" in parts:
        found.append(diffusion("conditional", dataset, folder.networks / "conditional"))
    if "classifier" in parts:
        # Small images are taken to be drawings such as digits, which a mirror changes.
        photographs = dataset.image_size > 28
        judge = ClassifierConfig(flips=photographs if given.flip is None else given.flip)
        if quick:
            judge = dataclasses.replace(judge, steps=QUICK_JUDGE_UPDATES)
        found.append(plan.Training(folder.networks / "classifier", dataset, judge))
    for training in found:
        training.updates_left()
    return found


def _quick_training(dataset: Dataset, kind: Kind, trained: TrainConfig) -> TrainConfig:
    """A training with few updates, fewer for larger images; a class network gets half as many."""
    updates = min(QUICK_UPDATES, QUICK_PIXEL_UPDATES // dataset.image_size**2)
    steps = updates // 2 if kind == "class" else updates
    return dataclasses.replace(trained, steps=steps, batch_size=64, size="small")


def _train(
    given: argparse.Namespace, materials: Materials, trainings: Sequence[plan.Training]
) -> None:
    """Train networks, except those that are finished."""
    shown = not given.quiet
    for training in trainings:
        config, out = training.config, training.out
        if isinstance(config, TrainConfig):
            train_diffusion(
                training.dataset,
                out,
                config,
                conditional=training.conditional,
                device=materials.device.type,
                progress=shown,
            )
            continue
        finished = classifier_files(out) and not (out / files.LOCK).exists()
        with nullcontext() if finished else materials.only_writer(out):
            if materials.processes.is_main_process:
                train_classifier(
                    training.dataset, out, config, device=materials.device, progress=shown
                )
            materials.processes.wait_for_everyone()


def _missing(
    given: argparse.Namespace, config: Config, materials: Materials, kinds: set[Networks]
) -> list[plan.Training]:
    """The trainings of the networks of a run that are missing or not finished."""
    folder = materials.folder
    places = {
        "base": [] if config.base else [folder.networks / "base"],
        "class": [folder.class_network(name) for name in materials.resolved(config).forget],
        "conditional": [folder.networks / "conditional"] if "conditional" in kinds else [],
    }
    missing = [part for part, paths in places.items() if not all(is_there(path) for path in paths)]
    if not config.classifier and not classifier_files(folder.networks / "classifier"):
        missing.append("classifier")
    return _trainings(given, config, materials, missing)


# ---------------------------------------------------------------------- the plan


def _writing(given: argparse.Namespace, materials: Materials) -> AbstractContextManager[None]:
    """Lock the folder of the run for writing; ``--plan`` writes nothing and takes no lock."""
    return nullcontext() if given.plan else materials.only_writer(materials.folder.path)


def _planned(
    given: argparse.Namespace,
    config: Config,
    materials: Materials,
    parts: Callable[[], list[plan.Part]],
) -> bool:
    """Print what will be done and how long it will take; return whether ``--plan`` was given.

    The command does not ask for confirmation: it can be interrupted without losing anything.
    """
    if given.plan or _shows(given, materials):
        data = materials.dataset(config)
        count, channels, side, _ = data.images.shape
        kind = "in colour" if channels == 3 else "in grey"
        about = (
            f"{config.dataset}, {count:,} images of {side} x {side} {kind}, {len(data.classes)} "
            f"classes, into {materials.folder.path}, on {materials.device}"
        )
        shorter = "" if getattr(given, "quick", False) else SHORTER.get(given.command, "")
        text = plan.told(parts(), about, shorter)
        print(text, file=sys.stdout if given.plan else sys.stderr, flush=True)
    return bool(given.plan)


# ---------------------------------------------------------------------- calibrate


def calibrate_command(given: argparse.Namespace) -> None:
    """Calibrate the trackers for the given networks, one class after the other."""
    follows = getattr(given, "tracker", "paper") == "path"
    config = _config(given, rule="dng", hyperparameters="own" if follows else "paper")
    materials = _materials(given, config)
    each_class = _one_by_one(config, materials, True)
    if not given.report:
        checks.integer("paths", given.paths, 1)
        checks.integer("path_steps", given.path_steps, 1, 1000)
        with _writing(given, materials):
            # Load all networks first, so that a missing one is reported before any fit.
            for each in each_class:
                materials.models(each)
            numbers = {"paths": given.paths, "steps": given.path_steps}
            if _planned(
                given,
                config,
                materials,
                lambda: plan.of_calibrations(each_class, materials, **numbers),
            ):
                return
            for each in each_class:
                path = _calibrate(each, materials, **numbers, progress=_shows(given, materials))
                if materials.processes.is_main_process:
                    print(path)
    if materials.processes.is_main_process:
        found = {each.forget[0]: materials.calibration(each) for each in each_class}
        print(report_table(found), end="")


def _calibrate(
    config: Config,
    materials: Materials,
    paths: int,
    steps: int,
    *,
    progress: bool,
    most: int | None = None,
) -> Path:
    """Calibrate one class and one kind of networks, on at most ``most`` images; return the file."""
    (name,) = config.forget
    path = materials.folder.own_calibration(name, config.networks, config.tracker)
    if materials.processes.is_main_process:
        follows = config.tracker == "path"
        config = dataclasses.replace(
            config, rule="dng", hyperparameters="own" if follows else "paper"
        )
        models, held_out = materials.models(config), materials.dataset(config).held_out
        if most is not None and most < len(held_out):
            rows = held_out_rows(held_out.labels.numpy(), most / len(held_out))
            held_out = held_out.chosen(torch.from_numpy(rows))
        images = held_out.images, (held_out.labels == held_out.index_of(name)).numpy()
        shared: dict[str, Any] = {
            "schedule": models.schedule,
            "steps": steps,
            "paths": paths,
            "prediction_type": models.prediction_type,
            "seed": config.seed,
            "batch_size": config.batch_size,
            "device": materials.device,
            "progress": f"calibrating {name}, {config.networks}" if progress else None,
        }
        networks = models.base, models.unwanted[0]
        evidence: AnyEvidence
        before: dict[str, AnyTracker]
        with materials.threads(config):
            if follows:
                evidence = collect_along_paths(*networks, *images, probes=config.probes, **shared)
                before = {"path, uncalibrated": materials.tracker(config)}
            else:
                evidence = collect(*networks, *images, clip=config.clip, **shared)
                before = {
                    f"{kind}, paper's settings": materials.tracker(
                        dataclasses.replace(config, tracker=kind)
                    )
                    for kind in OF_STEPS
                }
        calibrate(
            evidence,
            prior=materials.share(config),
            before=before,
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
    """Draw the images of one setting and keep them."""
    config = _config(given)
    materials = _materials(given, config)
    with materials.only_writer(materials.folder.path):
        _sample(given, materials.resolved(config), materials)


def _sample(given: argparse.Namespace, config: Config, materials: Materials) -> None:
    checks.integer("trajectories", given.trajectories, 0)
    materials.models(config)
    materials.judge(config)  # fail before drawing if it is missing
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
    """Measure images from a file or folder; write and print the metrics."""
    source: Path = given.images
    folder = source if source.is_dir() else source.parent
    told = folder / "config.json"
    fields = _read_config(told).to_json() if told.is_file() else {}
    config = _config(given, **fields)
    materials = _materials(given, config, forgets="forget" not in fields)
    if given.out is None and folder.resolve().parent.name == "samples":
        materials = _with(given, RunFolder(folder.resolve().parent.parent))
    config = materials.resolved(config)
    images = _read_images(source, tuple(materials.dataset(config).images.shape[1:]))
    with materials.threads(config):
        found = evaluate(images, materials.reference(config), materials.judge(config))
    files.clean(folder, below=False)
    files.write_json(folder / "metrics.json", found)
    print(json.dumps(found, indent=2, sort_keys=True))


def _read_config(path: Path) -> Config:
    """The setting in a ``config.json`` beside images."""
    try:
        return Config.from_json(files.read_json(path))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is no setting of this version ({foreign.reason(error)}): move it away, and "
            "say by options what the images are"
        ) from None


def _read_images(source: Path, shape: tuple[int, ...]) -> Tensor:
    """Images in [-1, 1] from a safetensors file, a folder with one, or a folder of PNG or JPEG."""
    channels, height, width = shape
    file = source / "images.safetensors" if source.is_dir() else source
    if file.is_file():
        images = files.load_tensors(file)[0].get("images")
        if images is None or tuple(images.shape[1:]) != shape:
            raise ValueError(
                f"{file} must hold a tensor 'images' of shape (N, {channels}, {height}, {width}), "
                f"got {'none' if images is None else tuple(images.shape)}"
            )
        return metrics.float_images(f"images in {file}", images)
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
    config = _config(given, rule="none", guidance_scale=0.0)
    # Report a wrong rule before anything is loaded.
    first = config.forget[:1] if given.each else config.forget
    settings(dataclasses.replace(config, forget=first), given.rules, given.guidance_scales)
    materials = _materials(given, config)
    configs = [
        setting
        for each in _one_by_one(config, materials, given.each)
        for setting in settings(each, given.rules, given.guidance_scales)
    ]
    with _writing(given, materials):
        _require_materials(configs, materials)
        if _planned(
            given,
            config,
            materials,
            lambda: plan.of_settings(_pending(configs, materials), materials),
        ):
            return
        rows = sweep(configs, materials, keep_images=given.keep_images, progress=not given.quiet)
    _print_table(materials, rows)


def _pending(configs: Sequence[Config], materials: Materials) -> list[Config]:
    """The settings that the run's table does not have yet."""
    known = {row["key"] for row in read_table(materials.folder.table)}
    each = dict.fromkeys(materials.resolved(config) for config in configs)
    return [config for config in each if config.key not in known]


def _require_materials(configs: Sequence[Config], materials: Materials) -> None:
    """Load everything that the settings need, so that errors appear before the long work."""
    for config in configs:
        materials.sources(config)
        if config.fid:
            materials.inception()


def tune_command(given: argparse.Namespace) -> None:
    """Choose the best setting of every method, and measure it."""
    config = _config(given, rule="none", guidance_scale=0.0)
    first = config.forget[:1] if given.each else config.forget
    settings(dataclasses.replace(config, forget=first), given.rules)
    materials = _materials(given, config)
    bases = _one_by_one(config, materials, given.each)
    if _planned(given, config, materials, lambda: _tuning_parts(given, bases, materials)):
        return
    rows: list[Row] = []
    with materials.only_writer(materials.folder.path):
        for each in bases:
            rows += tune(
                each,
                materials,
                given.rules,
                safety=given.safety,
                tuning_images=given.tuning_images,
                progress=not given.quiet,
            )
    if materials.processes.is_main_process:
        print(compare.comparison(rows, given.safety), end="")


def _tuning_parts(
    given: argparse.Namespace, bases: Sequence[Config], materials: Materials
) -> list[plan.Part]:
    """Estimate what a tuning still has to draw, by subtracting the rows of its tables."""
    several = [expected(each, given.rules, given.tuning_images) for each in bases]
    tables = materials.folder.tuning, materials.folder.table
    return [
        dataclasses.replace(part, what=f"about: {part.what}")
        for configs, table in zip(zip(*several, strict=True), tables, strict=True)
        for part in plan.of_settings(
            [config for each in configs for config in each][len(read_table(table)) :], materials
        )
    ]


def _print_table(materials: Materials, rows: Sequence[Row]) -> None:
    if materials.processes.is_main_process:
        print(compare.table(rows), end="")


# ---------------------------------------------------------------------- plot, convert


def plot_command(given: argparse.Namespace) -> None:
    """Draw the figures of a run."""
    from dng_models.class_removal import plot

    dataset = getattr(given, "dataset", Config.dataset)
    folder = _folder(given, dataset)
    files.clean(folder, below=False)
    files.clean(RunFolder(folder).figures)
    data = [folder] if given.data is None else given.data
    calibrations = None
    if given.shipped:
        calibrations = _shipped(Config(dataset=dataset), "--shipped") / "calibration"
    written = plot.draw_all(folder, safety=given.safety, data=data, calibrations=calibrations)
    print(compare.comparison(compare.read_tables(data, "sweep.jsonl"), given.safety))
    for path in written:
        print(path)


def convert_command(given: argparse.Namespace) -> None:
    """Convert a published network."""
    from dng_models.class_removal import conversion

    files.clean(given.out, below=False)
    text = conversion.main(
        given.checkpoint, given.out, image_size=given.image_size, entry=given.entry
    )
    print(text)


# ---------------------------------------------------------------------- run


def run_command(given: argparse.Namespace) -> None:
    """Train, calibrate, draw, measure and plot what is missing of a whole run."""
    fields: dict[str, Any] = {}
    if given.quick:
        asked = _config(given, rule="none", guidance_scale=0.0)
        is_shipped = (SHIPPED / asked.dataset / "base").is_dir()
        fields = {"num_images": QUICK_IMAGES} if is_shipped else _quick_fields(asked)
    config = _config(given, rule="none", guidance_scale=0.0, **fields)
    folder = RunFolder(_folder(given, config.dataset))
    if given.quick:
        shipped = None if _is_quick(given, config) else _shipped(config, "--quick")
        folder = RunFolder(_folder(given, config.dataset, "-quick"), shipped=shipped)
    materials = _with(given, folder)
    _require_forget(given, config, materials)
    with _writing(given, materials):
        _run(given, config, materials)


def _is_quick(given: argparse.Namespace, config: Config) -> bool:
    """Whether this is a quick run on data without shipped networks, which trains its own."""
    return getattr(given, "quick", False) and not (SHIPPED / config.dataset / "base").is_dir()


def _quick_fields(config: Config) -> dict[str, Any]:
    """Fields of a quick run on data without shipped networks: small images, and few of them."""
    fields = dict(QUICK_FIELDS)
    if config.image_size is None and not (config.base or config.classifier):
        height, width = first_size(
            config.dataset,
            image_column=config.image_column,
            label_column=config.label_column,
            split=config.split,
        )
        halvings = 2 if height <= 8 else 4
        if height != width or height > QUICK_SIDE or height % halvings:
            fields["image_size"] = QUICK_SMALLER
    return fields


def _run(given: argparse.Namespace, config: Config, materials: Materials) -> None:
    each = _one_by_one(config, materials, given.each)
    conditional = given.conditional
    if conditional is None:
        conditional = config.dataset == "digits"
    steps = [
        step
        for step in (QUICK if given.quick else FULL)
        # Only DNG takes several forgotten classes at once, with a network for each.
        if (len(each[0].forget) == 1 or METHODS[step[1]]["rule"] in ("none", "dng"))
        and (conditional or step[0] == "pair")
    ]
    if given.conditional and given.quick:
        steps += [step for step in FULL if step[0] == "conditional"]
    quick = _is_quick(given, config)
    numbers: dict[str, Any] = {"paths": PATHS, "steps": PATH_STEPS}
    if quick:
        numbers = {"paths": QUICK_PATHS, "steps": QUICK_PATH_STEPS, "most": QUICK_HELD_OUT}
    trainings = []
    if materials.folder.shipped is None:
        trainings = _missing(given, config, materials, {networks for networks, _, _ in steps})
    _require_given(config, materials)
    configs: list[Config] = []
    calibrations: list[Config] = []
    for one in each:
        for networks, method, scales in steps:
            # A base that was given belongs to the pair, not to the conditional network.
            base = one.base if networks == "pair" else None
            kind = dataclasses.replace(one, networks=networks, base=base)
            if METHODS[method].get("hyperparameters") in CALIBRATED:
                calibrations += _uncalibrated(kind, materials)
            configs += settings(kind, [method], scales)
    calibrations = list(dict.fromkeys(calibrations))

    def parts() -> list[plan.Part]:
        size: Size | None = "small" if quick else given.size
        pending = _pending(configs, materials)
        return [
            *plan.of_trainings(trainings, materials.device),
            *plan.of_calibrations(calibrations, materials, **numbers, size=size),
            *plan.of_settings(pending, materials, size),
        ]

    shown = _shows(given, materials)
    heading = _quick_heading(config, trainings) if given.quick else ""
    if heading and (shown or given.plan):
        print(heading, file=sys.stderr)
    if _planned(given, config, materials, parts):
        return
    if shown and not conditional:
        told = "no conditional network is trained, which would forget any class: --conditional"
        print(told, file=sys.stderr)
    _train(given, materials, trainings)
    for one in calibrations:
        _calibrate(
            one,
            materials,
            numbers["paths"],
            numbers["steps"],
            progress=shown,
            most=numbers.get("most"),
        )
    rows = sweep(configs, materials, progress=not given.quiet)
    if materials.processes.is_main_process:
        _draw(rows, materials, heading, progress=shown)
        if heading:
            print(heading)
    _print_table(materials, rows)
    if materials.processes.is_main_process:
        print("NP and SLD have their authors' settings here; tune finds their best, and CCFG's")


def _quick_heading(config: Config, trainings: Sequence[plan.Training]) -> str:
    """The heading that says above the numbers of a quick run how they were made."""
    updates = [t.config.steps for t in trainings if isinstance(t.config, TrainConfig)]
    trained = f", networks of {' and '.join(map(str, sorted(set(updates))))} updates" * bool(
        updates
    )
    resized = f" resized to {config.image_size} x {config.image_size}" * bool(config.image_size)
    return (
        f"QUICK RUN: {config.num_images} images{resized} a setting, {config.steps} steps{trained}."
        "  It shows that everything works; its numbers are no results."
    )


def _draw(rows: Sequence[Row], materials: Materials, heading: str, *, progress: bool) -> None:
    """Draw the figures of a run and print their paths; put ``heading`` above its table."""
    from dng_models.class_removal import plot

    _follow(rows, materials, progress=progress)
    folder = materials.folder.path
    for path in plot.draw_all(folder, classes=materials.dataset(_of(rows[0])).classes):
        if heading and path.name == "table.md":
            files.write_text(path, f"{heading}\n\n{path.read_text(encoding='utf-8')}")
        print(path)


def _of(row: Row) -> Config:
    return Config.from_json(row["config"])


def _require_given(config: Config, materials: Materials) -> None:
    """Load the base and the classifier that were given, so that errors appear before long work.

    Raises
    ------
    ValueError
        If one does not fit the data, or the base does not fit the class networks trained here.
    OSError
        If one does not exist.
    """
    if config.base is not None:
        base = materials.network(config.base, config, conditional=False)
        trained = NoiseSchedule.linear(SCHEDULE_STEPS)
        if base.prediction_type != "epsilon" or not same_schedule(base.schedule, trained):
            raise ValueError(
                f"base must predict noise on DDPM's linear schedule, as the networks of classes "
                f"that are trained here do; {config.base} predicts {base.prediction_type!r} on "
                f"{base.schedule!r}"
            )
    if config.classifier is not None:
        materials.judge(config)
    if config.fid:
        materials.inception()


def _shipped(config: Config, option: str) -> Path:
    """Folder of the networks shipped for the data set; ValueError, naming ``option``, if none."""
    shipped = SHIPPED / config.dataset
    if not (shipped / "base").is_dir():
        there = ", ".join(sorted(path.name for path in SHIPPED.glob("*/"))) or "none here"
        raise ValueError(
            f"dataset must be one whose networks come with the package for {option} "
            f"({there}), got {config.dataset!r}"
        )
    return shipped


def _uncalibrated(config: Config, materials: Materials) -> list[Config]:
    """One configuration for every forgotten class that is not calibrated yet."""
    return [
        dataclasses.replace(config, forget=(name,))
        for name in config.forget
        if not materials.folder.calibration(name, config.networks).is_file()
    ]


def _follow(rows: Sequence[Row], materials: Materials, *, progress: bool) -> None:
    """Save trajectories of some images under DNG, half of them forbidden without guidance."""
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
