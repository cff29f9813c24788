"""Drawing and measuring the images of a run, by several processes and with interruptions.

Images are always drawn in whole batches that start at a multiple of the batch size.  If some images
of a batch exist, the batch is drawn again and only the missing ones are kept.  The rounding of the
networks depends on the shape of a batch, so this gives every image the same bits each time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from threadpoolctl import threadpool_limits

from dng_math import checks
from dng_models.support import files
from dng_models.support.processes import Place, versions
from dng_models.support.progress import Progress
from dng_models.support.threads import torch_threads
from dng_models.text_to_image import compare, pipelines, priors, scores, store
from dng_models.text_to_image.config import (
    JUDGE,
    KINDS,
    LABORATORIES,
    METHODS,
    PAPER_MODEL,
    TINY,
    UNGUIDED,
    Config,
    Point,
    check_same,
)
from dng_models.text_to_image.prompts import split
from dng_models.text_to_image.store import Record, RunFolder

Array = NDArray[np.float64]
Batch = tuple[Point, tuple[int, ...]]
BATCH, LABORATORY_BATCH = 4, 48
Followed = dict[Point, set[int]]  # images whose latents along the run are kept as a strip


class Materials(Place):
    """Folder, device, processes and models of a run; each model is loaded once, when needed.

    Parameters
    ----------
    folder : RunFolder
    device : torch.device or str, optional
        Default: the accelerator of this process, else the CPU.
    batch_size : int, optional
        Images per network call, at least 1.  Default: 48 in the laboratory, and 4 elsewhere.

    Raises
    ------
    TypeError, ValueError
        If ``batch_size`` is not an integer of at least 1.
    """

    def __init__(
        self,
        folder: RunFolder,
        *,
        device: torch.device | str | None = None,
        batch_size: int | None = None,
    ) -> None:
        super().__init__(device)
        self.folder = folder
        self.batch_size = batch_size
        if batch_size is not None:
            checks.integer("batch_size", batch_size, 1)
        self._clips: dict[str, scores.Similarity] = {}
        self._asked: dict[str, scores.Asked] = {}
        self._detectors: dict[tuple[str, str], scores.Detector | None] = {}
        self._pipe: Any = None
        self._unguided: dict[tuple[str, ...], Array] = {}

    def pipeline(self, config: Config) -> Any:
        """The pipeline; raises as :func:`dng_models.text_to_image.pipelines.load_pipeline`."""
        if self._pipe is None:
            pipelines.quiet()
            self._pipe = pipelines.load_pipeline(config, self.device)
        return self._pipe

    def batch(self, model: str) -> int:
        """Images per network call of a model."""
        if self.batch_size is not None:
            return self.batch_size
        return LABORATORY_BATCH if model in LABORATORIES else BATCH

    def clip(self, config: Config) -> scores.Similarity:
        """CLIP; raises as :func:`dng_models.text_to_image.scores.load_similarity`."""
        return self._similarity(config.clip)

    def _similarity(self, name: str) -> scores.Similarity:
        if name not in self._clips:
            pipelines.quiet()
            self._clips[name] = scores.load_similarity(name, self.device)
        return self._clips[name]

    def judge(self, config: Config) -> Any:
        """The laboratory's judge, if it measures; else None."""
        return self._similarity(JUDGE) if JUDGE in (config.clip, config.detector) else None

    def detector(self, config: Config) -> scores.Detector | None:
        """The detector of concepts that the configuration names; None for "none"."""
        key = (config.detector, config.clip)
        if key not in self._detectors:
            self._detectors[key] = scores.load_detector(config.detector, self.clip(config))
        return self._detectors[key]

    def ask(self, config: Config, concepts: Sequence[str]) -> Any:
        """What looks for concepts; raises as :func:`dng_models.text_to_image.scores.load_asked`."""
        if config.ask not in self._asked:
            pipelines.quiet()
            self._asked[config.ask] = scores.load_asked(config.ask, self.device)
        return self._asked[config.ask](concepts)

    def check_asked(self, config: Config) -> None:
        """Load what is asked, if a rule asks; raises as :meth:`ask`."""
        for point in config.points():
            if point.rule != UNGUIDED and METHODS[point.rule].asks:
                self.ask(config, config.concepts(point))

    def unguided(self, config: Config, group: Sequence[Record]) -> Array:
        """CLIP embeddings of the unguided images of a group; cached for the next scale."""
        key = (config.clip, *(record["unguided"] for record in group))
        if key not in self._unguided:
            images = [_open(self.folder, record["unguided"]) for record in group]
            self._unguided[key] = self.clip(config).images(images)
        return self._unguided[key]


@contextmanager
def threads(config: Config) -> Iterator[None]:
    """Use one thread for the tiny networks and the laboratory's models.

    The bits depend on the number of threads, which are no faster there.
    """
    one = 1 if config.model in (TINY, *LABORATORIES) else None
    with threadpool_limits(1, user_api="blas"), torch_threads(count=one):
        yield


def batches(config: Config, batch_size: int, *, unguided: bool = False) -> list[Batch]:
    """All batches of a run, or of its unguided images: each a point and the numbers of images."""
    images = range(config.num_images)
    return [
        (point, tuple(images[first : first + batch_size]))
        for point in config.points()
        if point.rule == UNGUIDED or not unguided
        for first in images[::batch_size]
    ]


# ---------------------------------------------------------------------- drawing


def generate(
    config: Config, materials: Materials, *, unguided: bool = False, progress: bool = True
) -> None:
    """Draw the images of a run that are missing, and strips of latents for some of them.

    Two images of each prompt are followed, with their latents along the run kept as a strip: the
    first one, and the first one in which the detector finds the related negative without guidance.
    The latter is known only after :func:`measure`; another call then draws its strips.  Every
    process that ``accelerate launch`` started calls this function and draws its share.

    Where priors are to be measured, the unguided images are drawn and measured first.

    Parameters
    ----------
    config : Config
    materials : Materials
    unguided : bool
        Whether to draw the unguided images only.
    progress : bool
        Whether to show progress.

    Raises
    ------
    FileNotFoundError
        If the pipeline cannot be loaded.
    ValueError
        If the folder has images of other settings, or a damaged file.
    OSError
        If a file cannot be written, or another process writes to the folder; finished images stay.
    """
    with materials.only_writer(materials.folder.path):
        if config.prior == "measured" and not unguided:
            config = with_measured_priors(config, materials, progress=progress)
        _generate(config, materials, unguided, progress)


def with_measured_priors(config: Config, materials: Materials, *, progress: bool = True) -> Config:
    """Count in the unguided images how often the detector finds what the negatives name.

    They are drawn and measured if they are not there yet.  What was counted once is kept in
    ``priors.json`` and does not change when more images are drawn, because guided images depend on
    it.

    Parameters
    ----------
    config, materials, progress
        As for :func:`generate`.

    Returns
    -------
    Config
        With the shares of the prompts, as :attr:`.priors.Prior.value`.

    Raises
    ------
    FileNotFoundError, ValueError, OSError
        As for :func:`generate` and :func:`measure`.
    """
    with materials.only_writer(materials.folder.path):
        folder, processes = materials.folder, materials.processes
        known = priors.read(folder.priors)
        if any(prompt.name not in known for prompt in config.prompts):
            _generate(config, materials, True, progress)
            _measure_all(config, materials, None, progress)
            if processes.is_main_process:
                known |= _counted(config, materials, known)
                priors.write(folder.priors, known)
            processes.wait_for_everyone()
            known = priors.read(folder.priors)
    return dataclasses.replace(
        config,
        prompts=tuple(
            dataclasses.replace(
                prompt,
                related_share=known[prompt.name]["related"].value,
                unrelated_share=known[prompt.name]["unrelated"].value,
            )
            for prompt in config.prompts
        ),
    )


def _counted(
    config: Config, materials: Materials, known: Mapping[str, Any]
) -> dict[str, dict[str, priors.Prior]]:
    """Count the priors of the prompts that are not known."""
    unguided = compare.unguided_of(compare.cells(store.read_table(materials.folder)))
    found: dict[str, dict[str, priors.Prior]] = {}
    for prompt in config.prompts:
        if prompt.name in known:
            continue
        records = unguided[prompt.name].records[: config.num_images]
        found[prompt.name] = {
            kind: priors.Prior(
                sum(
                    bool(compare.any_found(record, split(prompt.negative(kind))))
                    for record in records
                ),
                len(records),
            )
            for kind in KINDS
        }
    return found


def _generate(config: Config, materials: Materials, unguided: bool, progress: bool) -> None:
    processes, folder = materials.processes, materials.folder
    size = materials.batch(config.model)
    if processes.is_main_process:
        every = batches(config, size, unguided=unguided)
        names = {store.image_name(point, image) for point, images in every for image in images}
        store.repair(folder, names)
    processes.wait_for_everyone()
    records = store.read_records(folder)
    before = store.read_settings(folder)
    if records and before is not None:
        check_same(config, before, folder.path)
    followed = _followed(config, records)
    pending = [
        (point, images)
        for point, images in batches(config, size, unguided=unguided)
        if any(_lacks(point, image, records, followed) for image in images)
    ]
    # No process may write a record before all have read the existing ones.
    processes.wait_for_everyone()
    if pending:
        count = sum(len(images) for _, images in batches(config, size, unguided=unguided))
        _draw_all(config, materials, records, followed, pending, count, progress)
    processes.wait_for_everyone()
    if processes.is_main_process and pending:
        store.write_table(folder, store.read_records(folder).values())
    processes.wait_for_everyone()


def _draw_all(
    config: Config,
    materials: Materials,
    records: Mapping[str, Record],
    followed: Followed,
    pending: Sequence[Batch],
    count: int,
    progress: bool,
) -> None:
    """Draw this process's share of the batches that lack images; count is of all images."""
    processes, folder = materials.processes, materials.folder
    pipe = materials.pipeline(config)
    if processes.is_main_process:
        names = ("torch", "numpy", "diffusers", "transformers")
        store.open_run(folder, config, versions(*names, device=materials.device))
    # Even if a process is killed, no image may exist without the settings it was made with.
    processes.wait_for_everyone()
    lacking = [
        sum(_lacks(point, image, records, followed) for image in images)
        for point, images in pending
    ]
    missing = sum(lacking)
    # Existing images that only lack their strip count once more.
    new = sum(
        store.image_name(point, image) not in records
        for point, images in pending
        for image in images
    )
    total = count + missing - new
    lines = folder.lines_of(processes.process_index)
    shown = progress and processes.is_main_process
    with (
        threads(config),
        Progress(total, unit="image", initial=total - missing, shown=shown) as bar,
    ):
        for first in range(0, len(pending), processes.num_processes):
            together = pending[first : first + processes.num_processes]
            if processes.process_index < len(together):
                point, images = together[processes.process_index]
                bar.set_description(point.key)
                _draw_batch(config, materials, pipe, records, followed, point, images, lines)
            bar.update(sum(lacking[first : first + processes.num_processes]))


def _draw_batch(
    config: Config,
    materials: Materials,
    pipe: Any,
    records: Mapping[str, Record],
    followed: Followed,
    point: Point,
    images: Sequence[int],
    lines: Any,
) -> None:
    """Draw a batch and keep what is missing: first an image's files, then its record."""
    folder = materials.folder
    lacking = [image for image in images if _lacks(point, image, records, followed)]
    wanted = [image for image in lacking if image in followed.get(point, ())]
    asks = point.rule != UNGUIDED and METHODS[point.rule].asks
    ask = materials.ask(config, config.concepts(point)) if asks else None
    drawn = pipelines.draw(pipe, config, point, images, followed=wanted, ask=ask)
    for image, each in zip(images, drawn, strict=True):
        if image not in lacking:
            continue
        name = store.image_name(point, image)
        if name in records:
            record = {k: v for k, v in records[name].items() if k not in store.SCORES}
        else:
            _save_png(folder, name, each.pixels)
            record = _record(config, point, image, each)
            record["sha256"] = store.digest(folder.path / name)
        if each.strip is not None and each.strip_time is not None:
            way = store.strip_name(point, config.seed + image)
            _save_png(folder, way, each.strip)
            record["path"] = {
                "file": way,
                "time": _rounded(each.strip_time),
                "sha256": store.digest(folder.path / way),
            }
        store.append(lines, record)


def _followed(config: Config, records: Mapping[str, Record]) -> Followed:
    """Images to follow, for each unguided point and each point at the largest scale."""
    found: Followed = {}
    for prompt in config.prompts:
        (unguided,) = (p for p in config.points() if p.prompt == prompt and p.kind == "none")
        names = [store.image_name(unguided, image) for image in range(config.num_images)]
        chosen = {0}
        # After an interrupted measurement, an earlier image may turn out to be the first.
        if all("measured_by" in records.get(name, {}) for name in names):
            looked_at = [records[name] for name in names]
            found_in = compare.would_be_forbidden(looked_at, prompt.name, split(prompt.related))
            chosen |= set(found_in[:1])
        for point in config.points():
            largest = point.kind == "none" or (
                point.guidance_scale == config.scales_of(point.rule, point.prompt)[-1]
            )
            if point.prompt == prompt and largest:
                found[point] = chosen
    return found


def _lacks(point: Point, image: int, records: Mapping[str, Record], followed: Followed) -> bool:
    """Whether an image, or the strip that it should have, is missing."""
    record = records.get(store.image_name(point, image))
    return record is None or (image in followed.get(point, ()) and "path" not in record)


def _save_png(folder: RunFolder, name: str, pixels: pipelines.Pixels) -> None:
    picture = Image.fromarray(pixels)
    files.write_atomically(
        folder.path / name, lambda temporary: picture.save(temporary, format="PNG")
    )


def _record(config: Config, point: Point, image: int, drawn: pipelines.Drawn) -> Record:
    """The record of an image; it contains nothing that changes between runs."""
    asked = {"questions": drawn.questions} if drawn.questions else {}
    return {
        **asked,
        "prompt": point.prompt.name,
        "kind": point.kind,
        "negative": point.negative,
        "concepts": list(config.concepts(point)),
        "negative_prompts": list(config.texts(point)[1]),
        "rule": point.rule,
        "hyperparameters": config.hyperparameters(point),
        "guidance_scale": point.guidance_scale,
        "image": image,
        "seed": config.seed + image,
        "file": store.image_name(point, image),
        "unguided": store.image_name(point.unguided, image),
        "finite": drawn.finite,
        "time": _rounded(drawn.time),
        "scale": _rounded(drawn.scale),
        "log_posterior": None if drawn.log_posterior is None else _rounded(drawn.log_posterior),
        "evaluations": drawn.evaluations,
        "evaluations_saved": drawn.evaluations_saved,
    }


def _rounded(values: Array) -> Any:
    """Nested lists of the values to six digits; None for those that are not finite."""
    if values.ndim > 1:
        return [_rounded(row) for row in values]
    return [float(f"{value:.6g}") if np.isfinite(value) else None for value in values]


# ---------------------------------------------------------------------- measuring


def measure(
    config: Config,
    materials: Materials,
    *,
    detector: scores.Detector | None = None,
    progress: bool = True,
) -> None:
    """Measure every image of the folder that was not measured by this CLIP and this detector.

    All images of the folder are measured, not only those of ``config``, so that all its numbers
    are comparable.  Every process calls this function and measures its share.

    Parameters
    ----------
    config : Config
        Only its ``clip`` and ``detector`` are used.
    materials : Materials
    detector : Detector, optional
        Used instead of the one that ``config`` names.
    progress : bool
        Whether to show progress.

    Raises
    ------
    FileNotFoundError
        If there are no images, one of them is missing or changed (the message says what draws it
        again), or a model cannot be loaded.
    ValueError
        If a file is damaged, or the detector's result has the wrong shape.
    OSError
        If a file cannot be written, or another process writes to the folder.
    """
    with materials.only_writer(materials.folder.path):
        _measure_all(config, materials, detector, progress)


def _measure_all(
    config: Config, materials: Materials, detector: scores.Detector | None, progress: bool
) -> None:
    processes, folder = materials.processes, materials.folder
    if processes.is_main_process:
        store.repair(folder)
    processes.wait_for_everyone()
    table = store.read_table(folder)
    store.check_images(folder, table)
    records = {record["file"]: record for record in table}
    if detector is None:
        detector = materials.detector(config)
    by = {"clip": config.clip, "detector": None if detector is None else detector.name}
    judge = materials.judge(config)
    if judge is not None:
        by["judge"] = judge.name
    settings = store.read_settings(folder)
    size = materials.batch(PAPER_MODEL if settings is None else settings["settings"]["model"])
    # Grouped as they were drawn, because CLIP's rounding depends on the batch.
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in table:
        place = record["image"] // size
        groups.setdefault((*store.order(record)[:-1], place), []).append(record)
    pending = [
        group for group in groups.values() if not all(_is_measured(each, by) for each in group)
    ]
    processes.wait_for_everyone()
    share = pending[processes.process_index :: processes.num_processes]
    concepts = _concepts(folder)
    lines = folder.lines_of(processes.process_index)
    shown = progress and processes.is_main_process and pending
    with (
        threads(config),
        Progress(len(share), "measuring", unit="batch", shown=bool(shown)) as bar,
    ):
        for group in share:
            _measure(group, records, concepts, materials, config, detector, by, lines)
            bar.update(1)
    processes.wait_for_everyone()
    if processes.is_main_process and pending:
        store.write_table(folder, store.read_records(folder).values())
    processes.wait_for_everyone()


def _is_measured(record: Record, by: Mapping[str, str | None]) -> bool:
    done = record.get("measured_by", {})
    return all(done.get(name, "") == value for name, value in by.items())


def _concepts(folder: RunFolder) -> dict[str, tuple[str, ...]]:
    """Concepts to look for in the images of each prompt: those of both its negatives."""
    settings = store.read_settings(folder)
    if settings is None:
        raise FileNotFoundError(f"there is no {folder.settings}, which names the prompts")
    return {
        name: tuple(dict.fromkeys(split(fields["related"]) + split(fields["unrelated"])))
        for name, fields in settings["prompts"].items()
    }


def _measure(
    group: Sequence[Record],
    records: Mapping[str, Record],
    concepts: Mapping[str, tuple[str, ...]],
    materials: Materials,
    config: Config,
    detector: scores.Detector | None,
    by: Mapping[str, str | None],
    lines: Any,
) -> None:
    """Measure the images of one batch."""
    folder, clip = materials.folder, materials.clip(config)
    images = [_open(folder, record["file"]) for record in group]
    embeddings = clip.images(images)
    if group[0]["kind"] == "none":
        cosines = np.ones(len(group))
    else:
        cosines = np.sum(embeddings * materials.unguided(config, group), axis=1)
    looked_for = concepts[group[0]["prompt"]]
    seen: list[dict[str, Any] | None] = [None] * len(group)
    judge = materials.judge(config)
    if judge is not None:
        unguided = [_open(folder, record["unguided"]) for record in group]
        seen = judge.seen(images, unguided)
    found = None
    if detector is not None:
        found = np.asarray(detector(images, looked_for), dtype=np.float64)
        if found.shape != (len(group), len(looked_for)):
            raise ValueError(
                f"the detector must give probabilities of shape {(len(group), len(looked_for))}, "
                f"got {found.shape}"
            )
    for row, record in enumerate(group):
        of = [record["sha256"], records[record["unguided"]]["sha256"]]
        presence = None
        if found is not None:
            presence = dict(zip(looked_for, _rounded(found[row]), strict=True))
        store.append(
            lines,
            {
                "file": record["file"],
                "clip_cosine": _rounded(cosines)[row],
                "presence": presence,
                **({} if judge is None else {"seen": seen[row]}),
                "measured_by": {**by, "of": of},
            },
        )


def _open(folder: RunFolder, name: str) -> Image.Image:
    path = folder.path / name
    if not path.is_file():
        raise FileNotFoundError(f"the image {path} is gone: 'generate' draws it again")
    with Image.open(path) as picture:
        return picture.convert("RGB")
