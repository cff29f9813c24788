"""Training of diffusion networks that can be killed at any time and resumed.

The random numbers of step k (rows of the batch, time steps, noise, omitted labels, flips) depend
only on (seed, k).  They are drawn for the batch of all processes together, of which each takes its
part.  A saved state therefore needs only weights, averages, moments of Adam, the running loss and
the number of steps, in one file.  A resumed training ends with the same bits as an uninterrupted
one, and one on several processes differs from it only by rounding.

The loss is DDPM's (arXiv 2006.11239, Eq. 14), the mean squared error of the predicted noise.  Time
steps are stratified over a batch: one in each of B equal intervals.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dng_kernels import StepPlan, dng_step
from dng_math import NoiseSchedule
from dng_math.rules import Unguided
from dng_models.class_removal import networks
from dng_models.class_removal.data import Dataset
from dng_models.support import files, foreign
from dng_models.support.processes import is_cpu, only_writer, versions
from dng_models.support.progress import Progress, seconds_at, seconds_of

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers import UNet2DModel
from dng_models.class_removal.training_config import (
    SCHEDULE_STEPS,
    Kind,
    TrainConfig,
    default_config,
)

STATE = networks.STATE
LOSS = "loss.jsonl"
GRID = "samples.png"
GRID_SIDE = 10
GRID_STEPS = 50
LOSS_BINS = 10
LOSS_COPIES = 256  # in each bin

# Purposes of random numbers; each seeds a stream of its own.
_ROWS, _TIMES, _NOISE, _LABELS, _FLIPS = range(5)


# ---------------------------------------------------------------------- randomness


class Draws(NamedTuple):
    """The random numbers of one step, for B images.

    Attributes
    ----------
    rows : ndarray, shape (B,)
        int64, indices of the images.
    times : ndarray, shape (B,)
        int64, time steps from 0 to 999.
    noise : ndarray, shape (B, C, H, W)
        float32, standard normal.
    unlabelled, flipped : ndarray, shape (B,)
        bool, images whose label is withheld, and images that are mirrored.
    """

    rows: NDArray[np.int64]
    times: NDArray[np.int64]
    noise: NDArray[np.float32]
    unlabelled: NDArray[np.bool_]
    flipped: NDArray[np.bool_]

    def part(self, index: int, count: int) -> Draws:
        """The part of process ``index`` of ``count`` processes; ``count`` must divide B."""
        size = len(self.rows) // count
        mine = slice(index * size, (index + 1) * size)
        return Draws(
            self.rows[mine],
            self.times[mine],
            self.noise[mine],
            self.unlabelled[mine],
            self.flipped[mine],
        )


def _rng(seed: int, purpose: int, number: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, purpose, number))))


@functools.lru_cache(maxsize=4)
def _order(seed: int, epoch: int, n: int) -> NDArray[np.int64]:
    """The order in which an epoch visits the images."""
    return _rng(seed, _ROWS, epoch).permutation(n)


def draws(config: TrainConfig, step: int, n: int, shape: tuple[int, int, int]) -> Draws:
    """The random numbers of a step, which depend only on the seed and the step.

    Parameters
    ----------
    config : TrainConfig
        Its batch size, seed, label dropout and flip are used.
    step : int
        Number of the step, from 0.
    n : int
        Number of images in the data, each visited once per epoch.
    shape : tuple of int
        (C, H, W) of an image.

    Returns
    -------
    Draws
        For the batch of all processes together.
    """
    batch, seed = config.batch_size, config.seed
    position = step * batch + np.arange(batch)
    epochs = position // n
    rows = np.empty(batch, dtype=np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        rows[here] = _order(seed, int(epoch), n)[position[here] % n]
    # Shuffle the strata, so that a place in the batch has no fixed range of times.
    rng = _rng(seed, _TIMES, step)
    strata = (rng.permutation(batch) + rng.random(batch)) / batch
    times = np.minimum((strata * SCHEDULE_STEPS).astype(np.int64), SCHEDULE_STEPS - 1)
    return Draws(
        rows=rows,
        times=times,
        noise=_rng(seed, _NOISE, step).standard_normal((batch, *shape), dtype=np.float32),
        unlabelled=_rng(seed, _LABELS, step).random(batch) < config.label_dropout,
        flipped=(_rng(seed, _FLIPS, step).random(batch) < 0.5) & config.flip,
    )


# ---------------------------------------------------------------------- training


def train_diffusion(
    dataset: Dataset,
    out: Path | str,
    config: TrainConfig | None = None,
    *,
    conditional: bool = False,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Path:
    """Train a network on the images of a data set that are not held out.

    A stopped training resumes from its last state; a finished one is not repeated.  Under
    ``accelerate launch`` or ``torchrun`` all processes train one network together.  (On a CPU
    ``accelerate launch`` starts a single process, whatever ``--num_processes`` says; use
    ``torchrun``.)

    Parameters
    ----------
    dataset : Dataset
        All classes, or ``dataset.only(name)`` for a network of one class.
    out : Path or str
        Folder of the network, in diffusers' layout, with ``training.json``, ``loss.jsonl`` and
        ``samples.png`` beside the weights.
    config : TrainConfig, optional
        Default :func:`default_config`.
    conditional : bool
        Whether the network takes labels, with ``len(dataset.classes)`` for "no label".
    device : torch.device or str, optional
        "cpu" or "cuda"; default the device that accelerate finds.
    progress : bool
        Whether to show the loss and the time left: a bar in a terminal, otherwise a line every half
        minute.

    Returns
    -------
    Path
        ``out``.

    Raises
    ------
    ValueError, TypeError
        If an argument is not allowed, ``out`` holds a state or a network of another configuration
        (the message names the field), a file there is damaged, or the loss is not finite.
    OSError
        If something cannot be written, or another process trains there; the last state is kept.
    """
    if not isinstance(dataset, Dataset):
        raise TypeError(f"dataset must be a Dataset, got {dataset!r}")
    data = dataset.train
    present = sorted(set(data.labels.tolist()))
    if not present:
        raise ValueError(f"dataset must have images to train on, got {dataset!r}")
    if config is None:
        kind: Kind = "conditional" if conditional else "class" if len(present) == 1 else "base"
        config = default_config(data, kind)
    out = Path(out)
    identity = _identity(data, config, conditional)
    if _is_finished(out, identity) and not _is_untidy(out):
        return out
    accelerator = _accelerator(config, device)
    if config.batch_size % accelerator.num_processes:
        raise ValueError(
            "batch_size must be a multiple of the number of processes, "
            f"{accelerator.num_processes}; got {config.batch_size}"
        )
    with only_writer(out, accelerator):
        # Another process may have finished the training while this one waited for the lock.
        if not _is_finished(out, identity):
            run = _Run(data, out, config, identity, accelerator, conditional)
            run.resume()
            run.train(progress)
            if accelerator.is_main_process:
                run.finish(dataset.held_out)
        elif accelerator.is_main_process and _has_unkept_state(out):
            (out / STATE).unlink(missing_ok=True)
        accelerator.wait_for_everyone()
    return out


def _identity(data: Dataset, config: TrainConfig, conditional: bool) -> dict[str, Any]:
    """Everything that the finished network depends on; ``data`` are the training images."""
    present = sorted(set(data.labels.tolist()))
    return {
        **config.identity,
        "size": config.size or networks.default_size(data.image_size),
        "dataset": data.name,
        "fingerprint": data.fingerprint,
        "classes": list(data.classes),
        "trained_on": [data.classes[label] for label in present],
        "conditional": conditional,
    }


def updates_left(
    dataset: Dataset, out: Path | str, config: TrainConfig, *, conditional: bool = False
) -> int:
    """The number of updates that :func:`train_diffusion` would do with the same arguments.

    Raises
    ------
    ValueError
        If it would refuse them: the folder holds a state or network of another configuration, no
        network exists for images of this size, or a file is damaged.
    """
    out, data = Path(out), dataset.train
    identity = _identity(data, config, conditional)
    if _is_finished(out, identity):
        return 0
    with torch.device("meta"):  # raises if the size is not possible, without using memory
        networks.make_unet(
            data.image_size, data.channels, num_classes=len(data.classes), size=config.size
        )
    path = out / STATE
    if not path.is_file():
        return config.steps
    step, _, configuration = _told(path, foreign.metadata(path))
    _same(configuration, identity, path)
    return config.steps - step


def seconds_per_update(
    dataset: Dataset,
    config: TrainConfig,
    *,
    conditional: bool = False,
    device: torch.device | str | None = None,
) -> float:
    """Seconds that an update of :func:`train_diffusion` takes here, measured on a few updates.

    Large batches are timed in part (:func:`dng_models.support.progress.seconds_at`).
    """
    accelerator = _accelerator(config, device)

    def seconds(batch_size: int) -> float:
        count = accelerator.num_processes
        fewer = replace(config, batch_size=batch_size * count)
        run = _Run(dataset.train, Path(), fewer, {}, accelerator, conditional)
        run.net.train()
        run.model = run.net
        return seconds_of(run.timed_update)

    return seconds_at(max(1, config.batch_size // accelerator.num_processes), seconds)


def _is_finished(out: Path, identity: dict[str, Any]) -> bool:
    """Whether a folder holds a finished network; ValueError if of another configuration."""
    if not (out / networks.METADATA).is_file():
        return False
    done = networks.read_metadata(out)
    _same(done.get("configuration"), identity, out / networks.METADATA)
    return networks.is_there(out)


def _is_untidy(out: Path) -> bool:
    """Whether a finished training was killed before it removed its lock and state."""
    return (out / files.LOCK).exists() or _has_unkept_state(out)


def _has_unkept_state(out: Path) -> bool:
    kept = networks.read_metadata(out).get("keep_state", True)
    return not kept and (out / STATE).is_file()


def _same(saved: object, wanted: dict[str, Any], path: Path) -> None:
    """Raise a ValueError naming the first field in which two configurations differ, if any."""
    if not isinstance(saved, dict):
        raise ValueError(f"{path} does not say how it was trained: choose another folder")
    for name, value in wanted.items():
        if saved.get(name) != value:
            raise ValueError(
                f"{path} is of another configuration: {name} is {saved.get(name)!r} there and "
                f"{value!r} here; remove it, or choose another folder"
            )


def _accelerator(config: TrainConfig, device: torch.device | str | None) -> Accelerator:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    wanted = None if device is None else torch.device(device)
    kind = None if wanted is None else wanted.type
    if wanted is not None and kind == "cuda" and wanted.index is not None:
        torch.cuda.set_device(wanted)
    # Accelerate keeps one precision per process; reset it, since trainings differ in precision.
    AcceleratorState._reset_state()
    accelerator = Accelerator(mixed_precision=config.mixed_precision, cpu=is_cpu(wanted))
    if kind is not None and accelerator.device.type != kind:
        raise ValueError(
            f"device must be one that is here, {accelerator.device.type!r} for accelerate; "
            f"got {device!r}"
        )
    return accelerator


def _not_a_state(path: Path) -> str:
    return f"{path} is not the state of a training here: remove it, or choose another folder"


def _told(path: Path, metadata: Mapping[str, str]) -> tuple[int, int, object]:
    """Step, number of summed losses and configuration, from the metadata of a state."""
    try:
        told = {name: foreign.parse_json(text, path) for name, text in metadata.items()}
        step, count = (foreign.member(told, name, int, path) for name in ("step", "loss_count"))
        return step, count, told["configuration"]
    except (KeyError, ValueError):
        raise ValueError(_not_a_state(path)) from None


class _Run:
    """One training: the network, its averaged weights, Adam and the current step."""

    def __init__(
        self,
        data: Dataset,
        out: Path,
        config: TrainConfig,
        identity: dict[str, Any],
        accelerator: Accelerator,
        conditional: bool,
    ) -> None:
        self.out, self.config, self.identity = out, config, identity
        self.accelerator = accelerator
        self.device = accelerator.device
        self.images = data.images.to(self.device)
        self.labels = data.labels.to(self.device)
        self.num_classes = len(data.classes)
        self.conditional = conditional
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            self.net = networks.make_unet(
                data.image_size,
                data.channels,
                num_classes=self.num_classes if conditional else None,
                size=config.size,
            ).to(self.device)
        self.names = [name for name, _ in self.net.named_parameters()]
        self.parameters = list(self.net.parameters())
        self.average = [p.detach().clone() for p in self.parameters]
        self.adam = torch.optim.Adam(self.parameters, lr=config.learning_rate, fused=True)
        self.step = 0
        self.loss_sum = torch.zeros((), dtype=torch.float64)
        self.loss_count = 0
        schedule = NoiseSchedule.linear(SCHEDULE_STEPS)
        self.alpha, self.sigma = (
            torch.tensor(values[1:], dtype=torch.float32, device=self.device)[:, None, None, None]
            for values in (schedule.alpha, schedule.sigma)
        )

    # The state

    def save(self) -> None:
        """Save the state; every process calls this, and the main one writes the file."""
        self._gather_loss()
        if not self.accelerator.is_main_process:
            return
        tensors = {"loss": self.loss_sum}
        moments = [self.adam.state[p] for p in self.parameters]
        for name, p, average, moment in zip(
            self.names, self.parameters, self.average, moments, strict=True
        ):
            tensors[f"weights.{name}"] = p
            tensors[f"average.{name}"] = average
            tensors[f"exp_avg.{name}"] = moment["exp_avg"]
            tensors[f"exp_avg_sq.{name}"] = moment["exp_avg_sq"]
        told = {
            "step": self.step,
            "loss_count": self.loss_count,
            "configuration": self.identity,
        }
        metadata = {name: json.dumps(value, sort_keys=True) for name, value in told.items()}
        files.save_tensors(self.out / STATE, tensors, metadata)

    def resume(self) -> None:
        """Load the saved state, if there is one, and prepare the network for training."""
        path = self.out / STATE
        if path.is_file():
            self._load(path)
        if self.accelerator.is_main_process:
            _truncate_log(self.out / LOSS, self.step)
        self.net.train()
        self.model = self.accelerator.prepare_model(self.net)
        self.accelerator.wait_for_everyone()

    def _load(self, path: Path) -> None:
        tensors, metadata = files.load_tensors(path)
        step, count, configuration = _told(path, metadata)
        _same(configuration, self.identity, path)
        kinds = ("weights", "average", "exp_avg", "exp_avg_sq")
        if tensors.keys() != {"loss", *(f"{kind}.{name}" for kind in kinds for name in self.names)}:
            raise ValueError(_not_a_state(path))
        with torch.no_grad():
            for name, p, average in zip(self.names, self.parameters, self.average, strict=True):
                p.copy_(tensors[f"weights.{name}"])
                average.copy_(tensors[f"average.{name}"])
        moments = {
            i: {
                "step": torch.tensor(float(step)),
                "exp_avg": tensors[f"exp_avg.{name}"],
                "exp_avg_sq": tensors[f"exp_avg_sq.{name}"],
            }
            for i, name in enumerate(self.names)
        }
        groups = self.adam.state_dict()["param_groups"]
        self.adam.load_state_dict({"state": moments, "param_groups": groups})
        self.step, self.loss_count, self.loss_sum = step, count, tensors["loss"]

    # The steps

    def train(self, progress: bool) -> None:
        """Do all remaining steps, with logs, states and grids."""
        config = self.config
        bar = Progress(
            config.steps,
            f"training {self.out.name}",
            initial=self.step,
            shown=progress and self.accelerator.is_main_process,
        )
        with bar:
            while self.step < config.steps:
                self.loss_sum += self.update().cpu().double()
                self.loss_count += 1
                self.step += 1
                bar.update()
                last = self.step == config.steps
                if last or self.step % config.log_every == 0:
                    bar.set_postfix(loss=f"{self._log():.4f}")
                if last or self.step % config.checkpoint_every == 0:
                    self.save()
                if config.grid_every and self.step % config.grid_every == 0 and not last:
                    self._grid(self.out / f"samples-{self.step:06d}.png")

    def rate(self) -> float:
        """Learning rate of the next step."""
        config = self.config
        rise = min(1.0, (self.step + 1) / (config.warmup_steps + 1))
        return (
            config.learning_rate * rise * 0.5 * (1 + math.cos(math.pi * self.step / config.steps))
        )

    def update(self) -> Tensor:
        """Update the weights and their average by one step; return the loss."""
        config, accelerator = self.config, self.accelerator
        shape = tuple(self.images.shape[1:])
        mine = draws(config, self.step, len(self.images), shape).part(  # type: ignore[arg-type]
            accelerator.process_index, accelerator.num_processes
        )
        rows, times, noise, unlabelled, flipped = (
            torch.from_numpy(values).to(self.device) for values in mine
        )
        clean = self.images[rows]
        if config.flip:
            clean = torch.where(flipped[:, None, None, None], clean.flip(-1), clean)
        x = self.alpha[times] * clean + self.sigma[times] * noise
        labels = None
        if self.conditional:
            labels = self.labels[rows].masked_fill(unlabelled, self.num_classes)
        eps = self.model(x, times, class_labels=labels).sample
        loss = torch.mean((eps.float() - noise) ** 2)
        accelerator.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.parameters, config.grad_clip)
        for group in self.adam.param_groups:
            group["lr"] = self.rate()
        self.adam.step()
        self.adam.zero_grad()
        # Averaging over a share of the steps so far forgets the random initial weights.
        decay = min(config.ema_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.parameters, 1.0 - decay)
        return loss.detach()

    def timed_update(self) -> None:
        """Do one update and wait until the device has finished it."""
        self.update().item()

    def _gather_loss(self) -> None:
        """Average the summed loss over processes; ValueError if it is not finite."""
        if self.accelerator.num_processes > 1:
            total = self.loss_sum.to(self.device)
            self.loss_sum = self.accelerator.reduce(total, reduction="mean").cpu()
        if not math.isfinite(self.loss_sum):
            raise ValueError(
                f"the loss is {float(self.loss_sum)} at step {self.step}: choose a lower "
                f"learning_rate than {self.config.learning_rate}"
            )

    def _log(self) -> float:
        """Append the mean loss since the last line to the log, and return it."""
        self._gather_loss()
        loss = float(self.loss_sum) / self.loss_count
        self.loss_sum, self.loss_count = torch.zeros_like(self.loss_sum), 0
        if self.accelerator.is_main_process:
            line = json.dumps({"learning_rate": self.rate(), "loss": loss, "step": self.step})
            files.append_line(self.out / LOSS, line)
        return loss

    # The end

    @contextmanager
    def _averaged(self) -> Iterator[UNet2DModel]:
        """The network with its averaged weights, for the duration of the context."""
        own = [p.detach().clone() for p in self.parameters]
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.average)
            self.net.eval()
            yield self.net
            self.net.train()
            torch._foreach_copy_(self.parameters, own)

    def _grid(self, path: Path) -> None:
        if self.accelerator.is_main_process:
            with self._averaged() as net:
                save_grid(net, path)

    def finish(self, held_out: Dataset) -> None:
        """Write the network with its losses and samples, and delete the state."""
        told: dict[str, Any] = {
            "configuration": self.identity,
            "classes": self.identity["classes"],
            "trained_on": self.identity["trained_on"],
            "num_images": len(self.images),
            "steps": self.step,
            "keep_state": self.config.keep_state,
            "loss": _last_loss(self.out / LOSS),
            "versions": versions("accelerate", "diffusers", "numpy", "torch"),
        }
        with self._averaged() as net:
            data = {
                "train": (self.images, self.labels),
                "held_out": (held_out.images, held_out.labels),
            }
            for name, (images, labels) in data.items():
                if len(images):
                    known = labels if self.conditional else None
                    bins = denoising_loss(net, images, known, bins=LOSS_BINS, copies=LOSS_COPIES)
                    told[f"{name}_loss"] = [float(value) for value in bins]
            save_grid(net, self.out / GRID)
            networks.save_network(self.out, net, metadata=told)
        if not self.config.keep_state:
            (self.out / STATE).unlink(missing_ok=True)


def _truncate_log(path: Path, step: int) -> None:
    """Drop log lines that are newer than the state, and a torn last line."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] > step:
                break
        except (ValueError, TypeError, KeyError, RecursionError):
            break
        kept.append(line + "\n")
    files.write_text(path, "".join(kept))


def _last_loss(path: Path) -> float:
    return json.loads(path.read_text(encoding="utf-8").splitlines()[-1])["loss"]


# ---------------------------------------------------------------------- measuring


@torch.no_grad()
def denoising_loss(
    net: UNet2DModel,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    bins: int = LOSS_BINS,
    copies: int = LOSS_COPIES,
    batch_size: int = 512,
    seed: int = 0,
) -> NDArray[np.float64]:
    """Mean squared error of the predicted noise, in bins of diffusion time.

    The noise and the time steps depend only on the seed, so that networks are compared on the same
    noised images.

    Parameters
    ----------
    net : UNet2DModel
        On any device.
    images : Tensor, shape (N, C, H, W)
        In [-1, 1].
    labels : Tensor, shape (N,), optional
        Class labels, int64; required by a conditional network.
    bins : int
        Number of equal intervals of the time steps.
    copies : int
        Number of noised images in each bin.
    batch_size : int
        Number of images per call of the network.
    seed : int
        Seed of the time steps and the noise.

    Returns
    -------
    ndarray of float64, shape (bins,)
        Mean squared error per pixel, the cleanest bin first.
    """
    device = next(net.parameters()).device
    schedule = NoiseSchedule.linear(SCHEDULE_STEPS)
    rng = np.random.Generator(np.random.Philox(seed))
    result = np.empty(bins)
    for b in range(bins):
        low, high = (SCHEDULE_STEPS * i // bins for i in (b, b + 1))
        rows = np.arange(copies) % len(images)
        times = low + rng.permutation(copies) * (high - low) // copies
        noise = rng.standard_normal((copies, *images.shape[1:]), dtype=np.float32)
        total = 0.0
        for start in range(0, copies, batch_size):
            part = slice(start, start + batch_size)
            row, time = torch.from_numpy(rows[part]), torch.from_numpy(times[part])
            eps = torch.from_numpy(noise[part]).to(device)
            alpha, sigma = (
                torch.tensor(values[1 + times[part]], dtype=torch.float32, device=device)
                for values in (schedule.alpha, schedule.sigma)
            )
            x = alpha[:, None, None, None] * images[row.to(images.device)].to(device)
            x += sigma[:, None, None, None] * eps
            told = None if labels is None else labels[row.to(labels.device)].to(device)
            guess = net(x, time.to(device), class_labels=told).sample
            total += float(torch.sum((guess.double() - eps.double()) ** 2))
        result[b] = total / (copies * math.prod(images.shape[1:]))
    return result


@torch.no_grad()
def save_grid(net: UNet2DModel, path: Path | str, *, seed: int = 0) -> None:
    """Draw 10 x 10 samples of a network as a PNG: 50 steps of DDPM, unguided.

    A conditional network draws one class per column.
    """
    from PIL import Image

    device = next(net.parameters()).device
    coefficients = NoiseSchedule.linear(SCHEDULE_STEPS).respace(GRID_STEPS).coefficients()
    plan = StepPlan(coefficients, Unguided(), clip=1.0, device=device)
    side, channels = net.config["sample_size"], net.config["in_channels"]
    n = GRID_SIDE**2
    labels = None
    if net.config["num_class_embeds"] is not None:
        classes = net.config["num_class_embeds"] - 1
        labels = torch.arange(n, device=device) % GRID_SIDE % classes
    rng = np.random.Generator(np.random.Philox(seed))
    x = torch.from_numpy(rng.standard_normal((n, channels, side, side), dtype=np.float32))
    x = x.to(device)
    for i, time in enumerate(coefficients.time):
        t = torch.full((n,), round(time * SCHEDULE_STEPS) - 1, device=device)
        eps = net(x, t, class_labels=labels).sample.float()
        x_next = dng_step(plan, i, x, eps, eps, seed=seed).x_next
        assert x_next is not None
        x = x_next
    pixels = ((x.clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8).cpu().numpy()
    sheet = np.full((GRID_SIDE, side + 1, GRID_SIDE, side + 1, channels), 255, dtype=np.uint8)
    grid = pixels.reshape(GRID_SIDE, GRID_SIDE, channels, side, side)
    sheet[:, :-1, :, :-1] = grid.transpose(0, 3, 1, 4, 2)
    flat = sheet.reshape(GRID_SIDE * (side + 1), GRID_SIDE * (side + 1), channels)[:-1, :-1]
    image = Image.fromarray(flat[..., 0] if channels == 1 else flat)
    files.write_atomically(path, functools.partial(image.save, format="PNG"))
