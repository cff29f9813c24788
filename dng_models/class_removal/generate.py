"""Images of a setting, drawn in pieces that outlive the process.

A piece is one batch of the networks, images [i B, (i + 1) B), and a file: whoever is killed has
lost the batch that was being drawn.  Image i is a function of the seed and of i alone, so the
pieces may be drawn in any order, by any number of processes, in several goes, and more of them can
be added later.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from dng_kernels.plan import PredictionType
from dng_math import DDPM, NoiseSchedule
from dng_math.guidance import Rule
from dng_math.posterior import LogOddsTracker, PaperTracker
from dng_models.class_removal import files, networks
from dng_models.class_removal.calibrate import Calibration
from dng_models.class_removal.classifier import Judge, classifier_files, load_classifier
from dng_models.class_removal.config import TOWARD, Config, RunFolder, tracker_of
from dng_models.class_removal.data import Dataset, load_dataset
from dng_models.class_removal.evaluate import Reference
from dng_models.class_removal.pretrained import Pretrained, load_denoiser
from dng_models.metrics import FrechetInception
from dng_models.processes import Place
from dng_models.sampling import Denoiser, Labelled, Samples, sample
from dng_models.threads import torch_threads

SMALL_SIDE = 28
COMMAND = "python -m dng_models.class_removal"


@dataclass(frozen=True, eq=False)
class Models:
    """The networks of a setting.

    Attributes
    ----------
    base, positive : callable
        (x, t) to a prediction of the noise; positive is None where the rule needs none.
    forgetful : tuple of callable
        One for every forgotten class, or one for all of them.
    schedule : NoiseSchedule
        That they were trained on.
    prediction : {"epsilon", "v_prediction", "sample"}
        What they return.
    sources : dict of str
        A digest of the weights of each network, by its part.
    """

    base: Denoiser
    forgetful: tuple[Denoiser, ...]
    positive: Denoiser | None
    schedule: NoiseSchedule
    prediction: PredictionType
    sources: dict[str, str]


@dataclass(frozen=True, eq=False)
class Generated:
    """Images of a setting, n of them.

    Attributes
    ----------
    images : Tensor, shape (n, C, H, W)
        float32, in [-1, 1] up to the errors of the networks.
    log_posterior : Tensor, shape (n,) or (M, n), or None
        At the end of the chain, where the rule tracks one.
    mean_scale : Tensor, shape (n,)
        Of the guidance, over the steps.
    """

    images: Tensor
    log_posterior: Tensor | None
    mean_scale: Tensor


class Materials(Place):
    """What settings need besides themselves; each thing is loaded once.

    Parameters
    ----------
    folder : RunFolder
        Of the run, with its networks and calibrations.
    device : torch.device or str, optional
        Default: the accelerator of this process, else the CPU.
    inception : Path or str, optional
        Weights of Inception, for FID; default those that torch-fidelity has.
    """

    def __init__(
        self,
        folder: RunFolder,
        *,
        device: torch.device | str | None = None,
        inception: Path | str | None = None,
    ) -> None:
        super().__init__(device)
        self.folder = folder
        self._inception = inception
        self._loaded: dict[Any, Any] = {}

    @contextmanager
    def threads(self, config: Config) -> Iterator[None]:
        """One thread for small images on a CPU.

        Some convolutions of small batches are split between threads, so that their bits depend on
        how many there are, which ``accelerate launch`` changes; and small networks gain nothing
        from more of them.  More processes use more cores.
        """
        small = self.dataset(config).image_size <= SMALL_SIDE and self.device.type == "cpu"
        # Sums of NumPy depend on the threads of its BLAS.
        with threadpool_limits(1, user_api="blas"), torch_threads(count=1 if small else None):
            yield

    def _once(self, key: tuple[Any, ...], load: Callable[[], Any]) -> Any:
        if key not in self._loaded:
            self._loaded[key] = load()
        return self._loaded[key]

    def dataset(self, config: Config) -> Dataset:
        """The data of a setting."""
        options = {
            name: getattr(config, name)
            for name in (
                *("image_column", "label_column", "split"),
                *("held_out", "image_size", "channels"),
            )
        }
        key = ("dataset", config.dataset, *options.values())
        loaded: Dataset = self._once(key, lambda: load_dataset(config.dataset, **options))
        return loaded

    def resolved(self, config: Config) -> Config:
        """The same setting with the names of its classes, of which numbers may have been given."""
        dataset = self.dataset(config)

        def name(given: str) -> str:
            return dataset.classes[dataset.index_of(given)]

        return replace(
            config,
            forget=tuple(name(given) for given in config.forget),
            toward=None if config.toward is None else name(config.toward),
        )

    def network(self, where: Path | str, config: Config, *, conditional: bool) -> Pretrained:
        """A network that fits the data of a setting; a folder, or a name on the hub.

        Raises
        ------
        FileNotFoundError
            If it is not there.
        ValueError
            If its images or labels are not those of the data, or a file is damaged.
        """
        if isinstance(where, Path) and not networks.is_there(where):
            part = where.name if where.name in ("base", "conditional") else "class"
            raise FileNotFoundError(
                f"there is no network in {where}, or not all of it; train it with: {COMMAND} train "
                f"--dataset {config.dataset} --forget {' '.join(config.forget)} --only {part} "
                f"--out {self.folder.path}"
            )
        found: Pretrained = self._once(
            ("network", str(where)), lambda: load_denoiser(where, device=self.device)
        )
        dataset = self.dataset(config)
        shape = tuple(dataset.images.shape[1:])
        if found.shape != shape:
            raise ValueError(
                f"the network {where} makes images of {_shape_text(found.shape)}, and those of "
                f"{dataset.name} have {_shape_text(shape)}: train one for them, or load them in "
                "its shape (--image-size, --channels)"
            )
        labels = len(dataset.classes) + 1 if conditional else None
        if found.num_classes != labels:
            wanted = "no labels" if labels is None else f"{labels} labels, the last for 'none'"
            raise ValueError(
                f"the network {where} must take {wanted}, and takes {found.num_classes or 'none'}"
            )
        return found

    def _digest(self, net: nn.Module) -> str:
        def digest() -> str:
            sha = hashlib.sha256()
            for name, value in sorted(net.state_dict().items()):
                sha.update(name.encode())
                sha.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
            return sha.hexdigest()[:12]

        return str(self._once(("digest", id(net)), digest))

    def models(self, config: Config) -> Models:
        """The networks of a setting.

        Raises
        ------
        FileNotFoundError
            If one was not trained.
        ValueError
            If one is damaged or does not fit the data.
        """
        folder, dataset = self.folder, self.dataset(config)
        needs_forgetful = config.rule not in ("none", *TOWARD)
        if config.networks == "conditional":
            where = config.base or folder.networks / "conditional"
            base = self.network(where, config, conditional=True)

            def labelled(name: str) -> Labelled:
                return Labelled(base.net, dataset.index_of(name))

            return Models(
                base=Labelled(base.net, len(dataset.classes)),
                forgetful=tuple(labelled(name) for name in config.forget if needs_forgetful),
                positive=None if config.toward is None else labelled(config.toward),
                schedule=base.schedule,
                prediction=base.prediction,
                sources={"conditional": self._digest(base.net)},
            )

        places: dict[str, Path | str] = {"base": config.base or folder.networks / "base"}
        if needs_forgetful:
            classes = [folder.class_network(name) for name in config.forget]
            named: Sequence[Path | str] = config.forgetful or classes
            places |= {f"forgetful-{i}": place for i, place in enumerate(named)}
        if config.positive is not None:
            places["positive"] = config.positive
        elif config.toward is not None:
            places["positive"] = folder.class_network(config.toward)
        nets = {part: self.network(p, config, conditional=False) for part, p in places.items()}
        base = nets["base"]
        for part, net in nets.items():
            if net.prediction != base.prediction or not same_schedule(net.schedule, base.schedule):
                raise ValueError(
                    f"the networks must predict the same on one noise schedule: {places[part]} "
                    f"predicts {net.prediction!r} on {net.schedule!r}, {places['base']} "
                    f"{base.prediction!r} on {base.schedule!r}"
                )
        return Models(
            base=base.net,
            forgetful=tuple(net.net for part, net in nets.items() if part.startswith("forgetful")),
            positive=nets["positive"].net if "positive" in nets else None,
            schedule=base.schedule,
            prediction=base.prediction,
            sources={part: self._digest(net.net) for part, net in nets.items()},
        )

    def share(self, config: Config) -> float:
        """Of what is forgotten in the data; of each class, where each has its own network."""
        dataset = self.dataset(config)
        forgotten = torch.tensor([dataset.index_of(name) for name in config.forget])
        posteriors = len(config.forgetful) or len(config.forget)
        return float(torch.isin(dataset.labels, forgotten).double().mean()) / posteriors

    def rule(self, config: Config) -> Rule:
        """The guidance rule of a setting, with what the data and the calibration decide."""
        return config.guidance(self.tracker(config))

    def tracker(self, config: Config) -> PaperTracker | LogOddsTracker:
        """DNG's tracker in a setting."""
        calibration = self.calibration(config) if config.needs_calibration else None
        return tracker_of(config, share=self.share(config), calibration=calibration)

    def calibration(self, config: Config) -> Calibration:
        """What was fitted for the first forgotten class, or for the one that a setting names.

        Raises
        ------
        FileNotFoundError
            If nothing was.
        """
        path = self.calibration_file(config)
        if not path.is_file():
            name = config.calibration or config.forget[0]
            raise FileNotFoundError(
                f"there is no calibration in {path}; make it with: {COMMAND} calibrate --dataset "
                f"{config.dataset} --forget {name} --networks {config.networks} "
                f"--out {self.folder.path}"
            )
        loaded: Calibration = self._once(("calibration", path), lambda: Calibration.load(path))
        return loaded

    def calibration_file(self, config: Config) -> Path:
        """Where the calibration of a setting is."""
        name = config.calibration or config.forget[0]
        return (
            Path(name) if Path(name).is_file() else self.folder.calibration(name, config.networks)
        )

    def judge(self, config: Config) -> Judge:
        """The classifier.

        Raises
        ------
        FileNotFoundError
            If it was not trained.
        """
        where = config.classifier or self.folder.networks / "classifier"
        if isinstance(where, Path) and len(classifier_files(where)) < 2:
            raise FileNotFoundError(
                f"there is no classifier in {where}, or not all of it; train it with: {COMMAND} "
                f"train --dataset {config.dataset} --only classifier --out {self.folder.path}"
            )
        classes = self.dataset(config).classes
        loaded: Judge = self._once(
            ("judge", str(where)), lambda: load_classifier(where, classes, self.device)
        )
        return loaded

    def sources(self, config: Config) -> dict[str, str]:
        """Digests of all files that decide the row of a setting, by what they are.

        Raises what :meth:`models`, :meth:`judge` and :meth:`calibration` raise.
        """
        self.judge(config)
        where = config.classifier or self.folder.networks / "classifier"
        sources = self.models(config).sources | {"classifier": _files_digest(where)}
        if config.needs_calibration:
            self.calibration(config)  # it is there, and whole
            sources["calibration"] = _files_digest(self.calibration_file(config))
        return sources

    def inception(self) -> FrechetInception:
        """The network of FID."""
        loaded: FrechetInception = self._once(
            ("inception",),
            lambda: FrechetInception(weights=self._inception, device=self.device),
        )
        return loaded

    def reference(self, config: Config) -> Reference:
        """What the images of a setting are compared with."""
        judge = self.judge(config)
        loaded: Reference = self._once(
            ("reference", id(judge), config.forget, config.fid),
            lambda: Reference.of(
                self.dataset(config).train,
                judge,
                config.forget,
                inception=self.inception() if config.fid else None,
                cache=self.folder.path / "inception",
            ),
        )
        return loaded


def same_schedule(one: NoiseSchedule, other: NoiseSchedule) -> bool:
    """Whether two noise schedules are one, but for rounding."""
    return len(one) == len(other) and np.allclose(one.alpha, other.alpha, rtol=1e-6)


def _files_digest(where: Path | str) -> str:
    """Of a file, or of what a classifier is loaded from; a name on the hub is its own."""
    path = Path(where)
    if not path.exists():
        return str(where)
    sha = hashlib.sha256()
    for file in classifier_files(path) if path.is_dir() else [path]:
        sha.update(file.read_bytes())
    return sha.hexdigest()[:12]


def _shape_text(shape: Sequence[int]) -> str:
    channels, height, width = shape
    return f"{height} x {width} pixels and {channels} channel{'s' if channels > 1 else ''}"


# ---------------------------------------------------------------------- pieces


def piece_count(config: Config) -> int:
    """Number of batches that hold the images of a setting."""
    return -(-config.num_images // config.batch_size)


def generate(
    config: Config,
    materials: Materials,
    *,
    advance: Callable[[int], object] | None = None,
) -> Generated | None:
    """The images of a setting, from the pieces that exist and from new ones.

    Every process that ``accelerate launch`` started calls it, and draws its share.

    Parameters
    ----------
    config : Config
        With the names of its classes (:meth:`Materials.resolved`).
    materials : Materials
    advance : callable, optional
        Called with a number of pieces that have been drawn or found.

    Returns
    -------
    Generated, or None in processes other than the main one

    Raises
    ------
    OSError
        If a piece cannot be written; those before it stay.
    """
    processes, folder = materials.processes, materials.folder.work(config)
    models, rule = materials.models(config), materials.rule(config)
    label = _label(config, rule, models)
    count = piece_count(config)
    for i in range(processes.process_index, count, processes.num_processes):
        path = _path(folder, i)
        if not _is_sound(path, label, config.batch_size):
            with materials.threads(config):
                piece = _piece(_draw(config, materials, models, rule, i))
            files.save_tensors(path, piece, {"made_of": label})
        if advance is not None:
            advance(min(processes.num_processes, count - i))
    processes.wait_for_everyone()
    if not processes.is_main_process:
        return None
    pieces = [files.load_tensors(_path(folder, i))[0] for i in range(count)]
    return _assembled(pieces, config.num_images)


def _path(folder: Path, piece: int) -> Path:
    return folder / f"{piece:06d}.safetensors"


def _label(config: Config, rule: Rule, models: Models) -> str:
    """All that decides a piece, for its metadata: networks may have changed since it was drawn."""
    made_of = {"images": config.images_key, "rule": repr(rule), "sources": models.sources}
    return json.dumps(made_of, sort_keys=True)


def _is_sound(path: Path, label: str, batch_size: int) -> bool:
    """Whether a piece is there, whole and of this making."""
    try:
        tensors, metadata = files.load_tensors(path)
    except (FileNotFoundError, ValueError):
        return False
    return metadata.get("made_of") == label and len(tensors["images"]) == batch_size


def _draw(
    config: Config,
    materials: Materials,
    models: Models,
    rule: Rule,
    batch: int,
    record: Sequence[str] = ("scale",),
    progress: str | None = None,
) -> Samples:
    """One batch of images, and what was recorded of their chains."""
    forgetful = models.forgetful
    return sample(
        models.base,
        forgetful if len(forgetful) > 1 else next(iter(forgetful), None),
        rule,
        shape=tuple(materials.dataset(config).images.shape[1:]),
        num_images=config.batch_size,
        schedule=models.schedule,
        steps=config.steps,
        prediction=models.prediction,
        sampler=DDPM(config.variance),
        clip=config.clip,
        positive=models.positive,
        seed=config.seed,
        first_image=batch * config.batch_size,
        batch_size=config.batch_size,
        device=materials.device,
        autocast=None if config.autocast is None else getattr(torch, config.autocast),
        record=record,
        progress=progress,
    )


def _piece(samples: Samples) -> dict[str, Tensor]:
    kept = {
        "images": samples.images,
        "mean_scale": samples.records["scale"].double().mean(dim=0),
    }
    if samples.log_posterior is not None:
        kept["log_posterior"] = samples.log_posterior
    return kept


def _assembled(pieces: Sequence[Mapping[str, Tensor]], num_images: int) -> Generated:
    """Pieces in their order, the last one cut."""

    def joined(name: str, axis: int) -> Tensor:
        values = torch.cat([piece[name] for piece in pieces], dim=axis)
        return values.narrow(axis, 0, num_images)

    return Generated(
        images=joined("images", 0),
        log_posterior=joined("log_posterior", -1) if "log_posterior" in pieces[0] else None,
        mean_scale=joined("mean_scale", -1),
    )


def trajectories(
    config: Config,
    materials: Materials,
    images: Sequence[int],
    *,
    progress: str | None = None,
) -> dict[str, Tensor]:
    """What happens on the way to some images of a setting.

    Parameters
    ----------
    config : Config
    materials : Materials
    images : sequence of int
        Their numbers, n of them.
    progress : str, optional
        Name on a progress bar; None shows none.

    Returns
    -------
    dict of Tensor
        For S steps: ``times`` (S,), ``x`` (S, n, C, H, W), what the guided prediction takes the
        image to be, ``scale`` (S, n), and, where the rule tracks one, ``log_posterior`` (S, n)
        of the class (of several, their sum).
    """
    models, rule = materials.models(config), materials.rule(config)
    record = ["x0", "scale"]
    if config.rule == "dng":
        record.append("log_posterior")
    with materials.threads(config):
        drawn = {
            batch: _draw(config, materials, models, rule, batch, record, progress)
            for batch in sorted({i // config.batch_size for i in images})
        }

    def kept(name: str, axis: int) -> Tensor:
        rows = [
            drawn[i // config.batch_size].records[name].select(axis, i % config.batch_size)
            for i in images
        ]
        return torch.stack(rows, dim=axis)

    first = next(iter(drawn.values()))
    result = {
        "times": torch.from_numpy(first.time[:-1].copy()),
        "x": kept("x0", 1),
        "scale": kept("scale", 1),
    }
    if config.rule == "dng":
        log_posterior = kept("log_posterior", -1)[:-1]
        several = log_posterior.ndim == 3
        result["log_posterior"] = log_posterior.logsumexp(dim=1) if several else log_posterior
    return result
