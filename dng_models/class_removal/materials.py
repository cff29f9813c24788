"""Everything the settings of a run share, loaded once: networks, data, calibrations and judge."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from dng_math import NoiseSchedule
from dng_math.rules import Rule
from dng_math.schedules import PredictionType
from dng_models.class_removal import networks
from dng_models.class_removal.calibration import Calibration
from dng_models.class_removal.config import TOWARD, AnyTracker, Config, tracker_of
from dng_models.class_removal.data import Dataset, load_dataset
from dng_models.class_removal.evaluation import Reference
from dng_models.class_removal.judge import Judge, classifier_files, load_classifier
from dng_models.class_removal.kernel_width import likeliest_bandwidth
from dng_models.class_removal.pretrained import Pretrained, load_denoiser
from dng_models.class_removal.run_folder import RunFolder
from dng_models.pairs.denoisers import Denoiser, Labelled
from dng_models.pairs.points import PointsDenoiser
from dng_models.support.inception import FrechetInception
from dng_models.support.processes import Place
from dng_models.support.threads import torch_threads

SMALL_SIDE = 28
COMMAND = "python -m dng_models.class_removal"


@dataclass(frozen=True, eq=False)
class Models:
    """The networks of a setting.

    Attributes
    ----------
    base, positive : callable
        Map (x, t) to a prediction; ``positive`` is None if the rule needs none.
    unwanted : tuple of callable
        One network for every forgotten class, or one for all of them, or the kernel mixture on the
        training images of each; empty if the rule needs none.
    schedule : NoiseSchedule
        The schedule that they were trained on.
    prediction_type : {"epsilon", "v_prediction", "sample"}
        What they predict.
    sources : dict of str to str
        A digest of the weights of each network, or of the images in its place, by its role.
    """

    base: Denoiser
    unwanted: tuple[Denoiser, ...]
    positive: Denoiser | None
    schedule: NoiseSchedule
    prediction_type: PredictionType
    sources: dict[str, str]


class Materials(Place):
    """Loads what settings need: networks, data, calibrations, judge; each thing once.

    Parameters
    ----------
    folder : RunFolder
        Folder of the run, with its networks and calibrations.
    device : torch.device or str, optional
        Default: the accelerator of this process, else the CPU.
    inception : Path or str, optional
        Inception weights for FID; default those of torch-fidelity.
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
        """Use one thread for small images on a CPU.

        Some convolutions of small batches are split between threads, so their bits depend on the
        number of threads, which ``accelerate launch`` changes.  Small networks gain nothing from
        more threads; more processes do use more cores.
        """
        small = self.dataset(config).image_size <= SMALL_SIDE and self.device.type == "cpu"
        # NumPy's sums depend on the number of BLAS threads.
        with threadpool_limits(1, user_api="blas"), torch_threads(count=1 if small else None):
            yield

    def _once(self, key: tuple[Any, ...], load: Callable[[], Any]) -> Any:
        if key not in self._loaded:
            self._loaded[key] = load()
        return self._loaded[key]

    def dataset(self, config: Config) -> Dataset:
        """The data set of a setting."""
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
        """The same setting with class names in place of any class numbers."""
        dataset = self.dataset(config)

        def name(given: str) -> str:
            return dataset.classes[dataset.index_of(given)]

        return replace(
            config,
            forget=tuple(name(given) for given in config.forget),
            toward=None if config.toward is None else name(config.toward),
        )

    def network(self, where: Path | str, config: Config, *, conditional: bool) -> Pretrained:
        """Load a network, and check that it fits the data of a setting.

        Parameters
        ----------
        where : Path or str
            A folder, or a name on the hub.
        config : Config
        conditional : bool
            Whether the network must take the labels of the data.

        Raises
        ------
        FileNotFoundError
            If there is no such network.
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
        return str(self._once(("digest", id(net)), lambda: digest_of(net.state_dict())))

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
        if config.reads_images:
            return self._by_images(config)
        needs_unwanted = config.rule not in ("none", *TOWARD)
        if config.networks == "conditional":
            where = config.base or folder.networks / "conditional"
            base = self.network(where, config, conditional=True)

            def labelled(name: str) -> Labelled:
                return Labelled(base.net, dataset.index_of(name))

            return Models(
                base=Labelled(base.net, len(dataset.classes)),
                unwanted=tuple(labelled(name) for name in config.forget if needs_unwanted),
                positive=None if config.toward is None else labelled(config.toward),
                schedule=base.schedule,
                prediction_type=base.prediction_type,
                sources={"conditional": self._digest(base.net)},
            )

        places: dict[str, Path | str] = {"base": config.base or folder.networks / "base"}
        if needs_unwanted:
            classes = [folder.class_network(name) for name in config.forget]
            named: Sequence[Path | str] = config.unwanted or classes
            places |= {f"unwanted-{i}": place for i, place in enumerate(named)}
        if config.positive is not None:
            places["positive"] = config.positive
        elif config.toward is not None:
            places["positive"] = folder.class_network(config.toward)
        nets = {part: self.network(p, config, conditional=False) for part, p in places.items()}
        base = nets["base"]
        for part, net in nets.items():
            if net.prediction_type != base.prediction_type or not same_schedule(
                net.schedule, base.schedule
            ):
                raise ValueError(
                    f"the networks must predict the same on one noise schedule: {places[part]} "
                    f"predicts {net.prediction_type!r} on {net.schedule!r}, {places['base']} "
                    f"{base.prediction_type!r} on {base.schedule!r}"
                )
        return Models(
            base=base.net,
            unwanted=tuple(net.net for part, net in nets.items() if part.startswith("unwanted")),
            positive=nets["positive"].net if "positive" in nets else None,
            schedule=base.schedule,
            prediction_type=base.prediction_type,
            sources={part: self._digest(net.net) for part, net in nets.items()},
        )

    def _by_images(self, config: Config) -> Models:
        """The models of a setting whose negatives are training images."""
        models = self.models(replace(config, rule="none", negative="network", bandwidth=None))
        parts = [self.forbidden_images(config, name) for name in config.forget]
        unwanted: list[Denoiser] = []
        if config.rule != "spell":
            for images in parts:
                width = config.bandwidth
                width = likeliest_bandwidth(images) if width is None else width
                kernels = PointsDenoiser(images, models.schedule, width, models.prediction_type)
                unwanted.append(kernels)
        digests = {f"images-{i}": digest_of({"images": images}) for i, images in enumerate(parts)}
        return replace(models, unwanted=tuple(unwanted), sources=models.sources | digests)

    def forbidden_images(self, config: Config, name: str) -> Tensor:
        """Training images of a class, (K, C, H, W), in [-1, 1]."""
        train = self.dataset(config).train
        return train.images[train.labels == train.index_of(name)]

    def share(self, config: Config) -> float:
        """Share of the forgotten classes in the data, divided by the number of unwanted networks.

        This is the prior of each posterior.
        """
        dataset = self.dataset(config)
        forgotten = torch.tensor([dataset.index_of(name) for name in config.forget])
        posteriors = len(config.unwanted) or len(config.forget)
        return float(torch.isin(dataset.labels, forgotten).double().mean()) / posteriors

    def rule(self, config: Config) -> Rule:
        """The guidance rule of a setting; its tracker follows from the data and calibration."""
        points = None
        if config.rule == "spell":
            images = [self.forbidden_images(config, name) for name in config.forget]
            points = torch.cat(images).flatten(1).double().numpy()
        return config.guidance_rule(self.tracker(config), points)

    def tracker(self, config: Config) -> AnyTracker:
        """DNG's tracker of a setting."""
        calibration = self.calibration(config) if config.needs_calibration else None
        return tracker_of(config, share=self.share(config), calibration=calibration)

    def calibration(self, config: Config) -> Calibration:
        """The calibration of a setting: of its first forgotten class unless it names another.

        Raises
        ------
        FileNotFoundError
            If there is no such calibration.
        """
        path = self.calibration_file(config)
        if not path.is_file():
            name = config.calibration or config.forget[0]
            raise FileNotFoundError(
                f"there is no calibration in {path}; make it with: {COMMAND} calibrate --dataset "
                f"{config.dataset} --forget {name} --networks {config.networks} "
                f"{'--tracker path ' if config.tracker == 'path' else ''}"
                f"--out {self.folder.path}"
            )
        loaded: Calibration = self._once(("calibration", path), lambda: Calibration.load(path))
        return loaded

    def calibration_file(self, config: Config) -> Path:
        """The path of the calibration of a setting."""
        name = config.calibration or config.forget[0]
        if Path(name).is_file():
            return Path(name)
        return self.folder.calibration(name, config.networks, config.tracker)

    def judge(self, config: Config) -> Judge:
        """The classifier that judges the images of a setting.

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
        """Digests of everything a setting's row depends on: networks, classifier, calibration.

        Raises the errors of :meth:`models`, :meth:`judge` and :meth:`calibration`.
        """
        self.judge(config)
        where = config.classifier or self.folder.networks / "classifier"
        sources = self.models(config).sources | {"classifier": files_digest(where)}
        if config.needs_calibration:
            self.calibration(config)  # raises if it is missing or damaged
            sources["calibration"] = files_digest(self.calibration_file(config))
        return sources

    def inception(self) -> FrechetInception:
        """The Inception network that measures FID."""
        loaded: FrechetInception = self._once(
            ("inception",),
            lambda: FrechetInception(weights=self._inception, device=self.device),
        )
        return loaded

    def reference(self, config: Config) -> Reference:
        """The reference that the images of a setting are compared with."""
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


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """Digest of tensors and their names."""
    sha = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        sha.update(name.encode())
        sha.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:12]


def same_schedule(one: NoiseSchedule, other: NoiseSchedule) -> bool:
    """Whether two noise schedules are equal up to rounding."""
    return len(one) == len(other) and np.allclose(one.alpha, other.alpha, rtol=1e-6)


def files_digest(where: Path | str) -> str:
    """Digest of a file, or of the files of a classifier; a hub name is returned unchanged."""
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
