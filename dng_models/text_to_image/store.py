"""The files of a run's folder, and how they survive an interruption.

For every image a process writes a PNG file and then a line of JSON to its own file, both flushed
to the disk.  When all images exist, the lines are merged and sorted into ``images.jsonl``, which
does not depend on time, interruptions or the number of processes.  An image is drawn again if its
line is missing or incomplete, or has a different digest; the line of a lost image stays until then.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dng_models.support import files
from dng_models.text_to_image.config import Config, Point, check_same

Record = dict[str, Any]
COMMAND = "python -m dng_models.text_to_image"
SCORES = ("clip_cosine", "presence", "seen", "measured_by")


@dataclass(frozen=True)
class RunFolder:
    """Paths of the files of a run.

    Parameters
    ----------
    path : Path
        The folder, made when something is written.
    """

    path: Path

    @property
    def settings(self) -> Path:
        """File of the settings that all images share, and of the package versions."""
        return self.path / "run.json"

    @property
    def table(self) -> Path:
        """File of the records, one line per image."""
        return self.path / "images.jsonl"

    @property
    def priors(self) -> Path:
        """File of the measured priors."""
        return self.path / "priors.json"

    @property
    def work(self) -> Path:
        """Folder of the records that are not in the table yet."""
        return self.path / "work"

    @property
    def figures(self) -> Path:
        """Folder of the plots."""
        return self.path / "figures"

    def lines_of(self, process: int) -> Path:
        """File that a process appends its records to."""
        return self.work / f"{process:04d}.jsonl"

    def image(self, point: Point, image: int) -> Path:
        """Path of an image."""
        return self.path / image_name(point, image)


def image_name(point: Point, image: int) -> str:
    """Path of an image, relative to the run's folder."""
    return f"images/{point.key}/{image:06d}.png"


def strip_name(point: Point, seed: int) -> str:
    """Path of the strip of a followed image, relative to the run's folder."""
    return f"paths/{point.key}/seed-{seed}.png"


# ---------------------------------------------------------------------- settings


def open_run(folder: RunFolder, config: Config, versions: Mapping[str, str]) -> None:
    """Write the settings of a run, or check that they are those of the existing images.

    New prompts and new versions are added.  Without images, old settings are replaced.

    Parameters
    ----------
    folder : RunFolder
    config : Config
    versions : mapping
        From :func:`dng_models.support.processes.versions`.

    Raises
    ------
    ValueError
        If a setting differs (the message names it), the file is damaged, or it is missing while
        there are images.
    """
    now = config.to_json() | {"versions": [dict(versions)]}
    before, drawn = read_settings(folder), read_records(folder)
    if before is not None and drawn:
        check_same(config, before, folder.path)
        now["prompts"] = before["prompts"] | now["prompts"]
        now["settings"] = before["settings"] | now["settings"]
        if dict(versions) in before["versions"]:
            now["versions"] = before["versions"]
        else:
            now["versions"] = [*before["versions"], dict(versions)]
    elif drawn:
        raise ValueError(
            f"{folder.path} has images, and {folder.settings.name}, which says how they were "
            "made, is gone: use another --out"
        )
    if now != before:
        # Not sorted: prompts keep their order, which the figures follow.
        files.write_text(folder.settings, json.dumps(now, indent=2, allow_nan=False) + "\n")


def read_settings(folder: RunFolder) -> dict[str, Any] | None:
    """Read the settings that :func:`open_run` wrote; None if there are none.

    Raises
    ------
    ValueError
        If the file is damaged.
    """
    if not folder.settings.is_file():
        return None
    found = files.read_json(folder.settings)
    if not isinstance(found, dict) or {"settings", "prompts", "versions"} - found.keys():
        raise ValueError(f"{folder.settings} does not hold the settings of a run: remove it")
    return found


# ---------------------------------------------------------------------- lines


def repair(folder: RunFolder, drawing: Collection[str] = ()) -> None:
    """Remove incomplete lines, and those of images that are missing or changed.

    One process calls it before the others read or write.

    Parameters
    ----------
    folder : RunFolder
    drawing : collection of str
        Files of the images that are drawn next.  The lines of other images stay, because they are
        the only trace of a lost image.

    Raises
    ------
    ValueError
        If a line other than a torn last one is damaged.
    """
    if not folder.path.is_dir():
        return
    sound = [
        record
        for record in read_records(folder).values()
        if record["file"] not in drawing or _is_whole(folder, record)
    ]
    if sound or folder.table.is_file() or folder.work.is_dir():
        write_table(folder, sound)


def check_images(folder: RunFolder, records: Iterable[Record]) -> None:
    """Check that all images exist unchanged, and that every guided one has its unguided one.

    Raises
    ------
    FileNotFoundError
        If an image is missing or changed; the message names it and the command that draws it.
    """
    by_file = {record["file"]: record for record in records}
    lost = [name for name, record in by_file.items() if not _is_whole(folder, record)]
    needed = dict.fromkeys(record["unguided"] for record in by_file.values())
    lost += [name for name in needed if name not in by_file]
    if lost:
        others = f" and {len(lost) - 1} others" if len(lost) > 1 else ""
        raise FileNotFoundError(
            f"{folder.path / lost[0]}{others} must be as they were drawn, and are gone or changed: "
            f"'{COMMAND} generate --out {folder.path}', with the options that they were drawn "
            "with, draws them again"
        )


def _is_whole(folder: RunFolder, record: Record) -> bool:
    """Whether an image, and its strip if it has one, exist with the digests in its record."""
    path, strip = folder.path / record["file"], record.get("path")
    if not path.is_file() or digest(path) != record["sha256"]:
        return False
    if strip is None:
        return True
    way = folder.path / strip["file"]
    return way.is_file() and digest(way) == strip.get("sha256", digest(way))


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Append a record and wait until it is on the disk, as :func:`.files.append_record`."""
    files.append_record(path, record)


def read_records(folder: RunFolder) -> dict[str, Record]:
    """Read the records of all images, by file name.

    Measurements of an image that has been drawn anew since are left out.

    Raises
    ------
    ValueError
        If a line is damaged, unless it is an incomplete last one; the message names it.
    """
    drawn: dict[str, Record] = {}
    measured: dict[str, Record] = {}
    for path in [folder.table, *sorted(folder.work.glob("*.jsonl"))]:
        for record in _lines(path):
            scores = {name: record.pop(name) for name in SCORES if name in record}
            if "sha256" in record:
                drawn[record["file"]] = record
            if scores:
                measured[record["file"]] = scores
    for name, scores in measured.items():
        if name in drawn and scores["measured_by"]["of"] == _measured_digests(drawn, drawn[name]):
            drawn[name] |= scores
    return drawn


def _measured_digests(records: Mapping[str, Record], record: Record) -> list[str | None]:
    """Digests of an image and of its unguided one, on which its measurements depend."""
    unguided = records.get(record["unguided"], {})
    return [record["sha256"], unguided.get("sha256")]


def _lines(path: Path) -> Iterable[Record]:
    data = path.read_bytes() if path.is_file() else b""
    for number, line in enumerate(data.split(b"\n")[:-1], 1):
        try:
            record = json.loads(line)
            record["file"]
        except (ValueError, TypeError, KeyError):
            raise ValueError(
                f"{path}, line {number} is no line of an image: remove it, and the image is drawn "
                "again"
            ) from None
        yield record


def order(record: Mapping[str, Any]) -> tuple[Any, ...]:
    """Sort key of the table: prompt, unguided first, rule, kind, guidance scale, image."""
    unguided = record["kind"] == "none"
    return (
        *(record["prompt"], not unguided, record["rule"], record["kind"]),
        *(record["guidance_scale"], record["image"]),
    )


def write_table(folder: RunFolder, records: Iterable[Record]) -> None:
    """Write the sorted table atomically, and then remove the files that it replaces."""
    lines = [
        json.dumps(record, sort_keys=True, allow_nan=False) + "\n"
        for record in sorted(records, key=order)
    ]
    files.write_text(folder.table, "".join(lines))
    for path in folder.work.glob("*.jsonl"):
        path.unlink()
    if folder.work.is_dir() and not any(folder.work.iterdir()):
        folder.work.rmdir()


def read_table(folder: RunFolder) -> list[Record]:
    """Read the records of all images, whether they are in the table yet or not.

    Returns
    -------
    list of dict
        In the order of the prompts in ``run.json``, then as in the table.

    Raises
    ------
    FileNotFoundError
        If there are no images.
    ValueError
        If a file is damaged.
    """
    prompts = list((read_settings(folder) or {"prompts": {}})["prompts"])
    records = sorted(
        read_records(folder).values(),
        key=lambda record: (
            prompts.index(record["prompt"]) if record["prompt"] in prompts else len(prompts),
            *order(record),
        ),
    )
    if not records:
        raise FileNotFoundError(
            f"there are no images in {folder.path}: {folder.table.name} is missing, which "
            f"'{COMMAND} generate' writes"
        )
    return records


def digest(path: Path) -> str:
    """First sixteen hexadecimal digits of the SHA-256 of a file's content."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
