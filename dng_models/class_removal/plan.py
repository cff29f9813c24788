"""What a command is going to do, and about how long it will take on this machine.

The estimates come from timing: a few updates of every network that is to be trained, and a few
steps of a chain with and without guidance, are run at their actual sizes.  Networks that do not
exist yet are replaced by ones with random weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import unquote

import torch

from dng_math.rules import DynamicNegativeGuidance, NegativePrompting, Rule, Unguided
from dng_math.trackers import PathTracker
from dng_models.class_removal import classifier, judge, networks, train
from dng_models.class_removal.calibration import seconds_to_fit
from dng_models.class_removal.classifier import ClassifierConfig
from dng_models.class_removal.config import TOWARD, Config, RuleName
from dng_models.class_removal.data import Dataset, held_out_rows
from dng_models.class_removal.evaluation import Reference, evaluate
from dng_models.class_removal.generation import piece_count
from dng_models.class_removal.judge import Judge
from dng_models.class_removal.materials import Materials
from dng_models.class_removal.small_classifier import SmallClassifier
from dng_models.class_removal.training_config import TrainConfig
from dng_models.pairs.denoisers import Denoiser, Labelled
from dng_models.pairs.sampling import sample
from dng_models.support.progress import seconds_at, seconds_of

TIMED_STEPS = 2
REFERENCE = 512  # images of the data in the reference that the measuring is timed with
MEASURED = 1024  # at most so many images are measured for it
LONG = 30 * 60.0  # seconds; a longer plan suggests how to shorten it


@dataclass(frozen=True)
class Part:
    """One item of a plan.

    Attributes
    ----------
    what : str
        What will be done, in words.
    seconds : float
        Estimated time in seconds.
    """

    what: str
    seconds: float


@dataclass(frozen=True, eq=False)
class Training:
    """The training of one network, whether it is still to be done or finished.

    Attributes
    ----------
    out : Path
        Folder of the network.
    dataset : Dataset
    config : TrainConfig or ClassifierConfig
        The latter trains a classifier.
    conditional : bool
        Whether a diffusion network takes labels.
    """

    out: Path
    dataset: Dataset
    config: TrainConfig | ClassifierConfig
    conditional: bool = False

    def updates_left(self) -> int:
        """Number of updates that are left; ValueError if the network cannot be trained there."""
        if isinstance(self.config, ClassifierConfig):
            return classifier.updates_left(self.dataset, self.out, self.config)
        return train.updates_left(self.dataset, self.out, self.config, conditional=self.conditional)

    def seconds_per_update(self, device: torch.device) -> float:
        """Measured time of one update on this machine, in seconds."""
        if isinstance(self.config, ClassifierConfig):
            return classifier.seconds_per_update(self.dataset, self.config, device)
        return train.seconds_per_update(
            self.dataset, self.config, conditional=self.conditional, device=device.type
        )


# ---------------------------------------------------------------------- the parts


def of_trainings(trainings: Sequence[Training], device: torch.device) -> list[Part]:
    """The parts of a plan for trainings that are not finished; equal sizes are timed only once.

    Raises
    ------
    ValueError
        If one of them cannot be done; raised before any is timed.
    """
    left = [training.updates_left() for training in trainings]
    timed: dict[object, float] = {}
    parts = []
    for training, updates in zip(trainings, left, strict=True):
        if not updates:
            continue
        config = training.config
        kind: object = ClassifierConfig
        if isinstance(config, TrainConfig):
            kind = training.conditional, config.size, config.batch_size, config.mixed_precision
        if kind not in timed:
            timed[kind] = training.seconds_per_update(device)
        what = f"train {unquote(training.out.name)}: {updates:,} updates"
        parts.append(Part(f"{what} of {config.batch_size} images", updates * timed[kind]))
    return parts


def of_calibrations(
    configs: Sequence[Config],
    materials: Materials,
    *,
    paths: int,
    steps: int,
    most: int | None = None,
    size: networks.Size | None = None,
) -> list[Part]:
    """The parts of a plan for calibrations, each on at most ``most`` images."""
    if not configs:
        return []
    images = len(materials.dataset(configs[0]).held_out)
    images = images if most is None else min(images, most)
    fit = seconds_to_fit(images, paths, steps)
    parts = []
    for config in configs:
        batches = -(-images * paths // config.batch_size)
        rule: RuleName = "dng" if config.tracker == "path" else "np"
        guided = replace(config, rule=rule, guidance_scale=1.0, forget=config.forget[:1])
        each = seconds_per_step(guided, materials, size)
        parts.append(
            Part(
                f"calibrate {config.forget[0]}, {config.networks}: {images} held-out images, "
                f"{paths} path{'s' * (paths > 1)} of {steps} steps each",
                batches * steps * each + fit,
            )
        )
    return parts


def of_settings(
    configs: Sequence[Config], materials: Materials, size: networks.Size | None = None
) -> list[Part]:
    """The parts of a plan for settings that are drawn and measured, grouped by equal cost."""
    if not configs:
        return []
    measuring = seconds_to_measure(configs[0], materials)
    timed: dict[object, float] = {}
    groups: dict[str, list[float]] = {}
    for config in configs:
        calls = _calls(config)
        of_networks = config.networks, config.base, config.autocast
        key = of_networks, calls, _probes(config), config.batch_size
        if key not in timed:
            timed[key] = seconds_per_step(config, materials, size)
        seconds = piece_count(config) * config.steps * timed[key]
        seconds = seconds / materials.processes.num_processes + measuring
        name = (
            f"{'unguided' if calls == 1 else 'guided'}, {config.networks}: "
            f"{config.num_images:,} images of {config.steps} steps"
        )
        groups.setdefault(name, []).append(seconds)
    return [
        Part(f"draw and measure {len(each)} setting{'s' * (len(each) > 1)}, {name}", sum(each))
        for name, each in groups.items()
    ]


def _calls(config: Config) -> int:
    """Number of network predictions per step."""
    if config.rule == "none":
        return 1
    networks_away = config.rule not in TOWARD and not config.reads_images
    several = (len(config.unwanted) or len(config.forget)) if networks_away else 0
    positive = config.toward is not None or config.positive is not None
    return 1 + several + positive


def _probes(config: Config) -> int:
    """Number of forward derivatives per step."""
    return config.probes if config.rule == "dng" and config.tracker == "path" else 0


def seconds_per_step(
    config: Config, materials: Materials, size: networks.Size | None = None
) -> float:
    """Measured time of one step for one batch, in seconds.

    All guidance rules cost about the same, but for the derivatives of a path tracker.  With
    guidance, two networks are timed and the time is scaled to the number of predictions.
    """
    calls = _calls(config)
    rule: Rule = Unguided() if calls == 1 else NegativePrompting(1.0)
    if _probes(config):
        rule = DynamicNegativeGuidance(1.0, PathTracker(0.1, probes=config.probes))
    net, labels = _network(config, materials, size)
    denoisers: list[Denoiser] = [net] * 2
    if labels is not None:
        denoisers = [Labelled(net, labels), Labelled(net, 0)]
    shape = tuple(materials.dataset(config).images.shape[1:])

    def seconds(batch: int) -> float:
        def draw() -> None:
            sample(
                denoisers[0],
                None if calls == 1 else denoisers[1],
                rule,
                shape=shape,
                num_images=batch,
                steps=TIMED_STEPS,
                batch_size=batch,
                device=materials.device,
                autocast=None if config.autocast is None else getattr(torch, config.autocast),
                record=("scale",),
            )

        with materials.threads(config):
            return seconds_of(draw) / TIMED_STEPS

    found = seconds_at(config.batch_size, seconds)
    # A rule for several classes needs a prediction for each of them.
    return found * max(1.0, calls / 2) if calls > 1 else found


def _network(
    config: Config, materials: Materials, size: networks.Size | None
) -> tuple[torch.nn.Module, int | None]:
    """The base network (or a random one of its size) and its "no label", None without labels."""
    dataset = materials.dataset(config)
    conditional = config.networks == "conditional"
    labels = len(dataset.classes) if conditional else None
    where = config.base or materials.folder.networks / ("conditional" if conditional else "base")
    if not isinstance(where, Path) or networks.is_there(where):
        return materials.network(where, config, conditional=conditional).net, labels
    with torch.random.fork_rng(devices=[]):
        net = networks.make_unet(
            dataset.image_size, dataset.channels, num_classes=labels, size=size
        )
    return net.to(materials.device).eval().requires_grad_(False), labels


def seconds_to_measure(config: Config, materials: Materials) -> float:
    """Estimated time of a setting's metrics without FID, in seconds."""
    train_images, count = materials.dataset(config).train, min(config.num_images, MEASURED)
    share = min(0.5, REFERENCE / len(train_images))
    rows = torch.from_numpy(held_out_rows(train_images.labels.numpy(), share))
    some = train_images.chosen(rows)
    judge = _judge(config, materials)
    reference = Reference.of(some, judge, config.forget)
    images = some.images[torch.arange(count) % len(some)]
    if count < 4:
        return 0.0
    with materials.threads(config):
        seconds = seconds_of(lambda: evaluate(images, reference, judge), 0.0)
    return seconds * config.num_images / count


def _judge(config: Config, materials: Materials) -> Judge:
    """The classifier of a setting, or a random one of its size if there is none yet."""
    where = config.classifier or materials.folder.networks / "classifier"
    if not isinstance(where, Path) or len(judge.classifier_files(where)) > 1:
        return materials.judge(config)
    dataset = materials.dataset(config)
    shape = dataset.images.shape[1:]
    with torch.random.fork_rng(devices=[]):
        net = SmallClassifier(shape[1], shape[0], len(dataset.classes))
    return classifier.judge_of(net, dataset.classes, materials.device)


# ---------------------------------------------------------------------- in words


def duration(seconds: float) -> str:
    """A duration in words, to one or two digits, since it is only an estimate."""
    if seconds < 1.5:
        return "1 s"
    for unit, size in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 1.5 * size:
            number = seconds / size
            return f"{number:.0f} {unit}" if number >= 9.5 else f"{number:.1f} {unit}"
    return f"{seconds:.0f} s"


def told(parts: Iterable[Part], about: str, shorter: str = "") -> str:
    """The text of a plan: a line per part, then the total, then ``shorter`` if that is long."""
    parts = list(parts)
    if not parts:
        return f"plan: {about}: everything is there, nothing is left to do"
    total = sum(part.seconds for part in parts)
    lines = [*((part.what, part.seconds) for part in parts), ("together", total)]
    width = max(len(what) for what, _ in lines)
    text = [f"plan: {about}; times are estimates, from a few steps done here"]
    text += [f"  {what:{width}}  about {duration(seconds)}" for what, seconds in lines]
    if shorter and total > LONG:
        text.append(f"  shorter: {shorter}")
    return "\n".join(text)
