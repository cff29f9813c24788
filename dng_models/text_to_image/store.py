"""What a run leaves in its folder, and how it survives whatever ends the process.

Every image is a PNG file and then a line of JSON, flushed to the disk, in a file of the process
that drew it.  When all are there the lines are merged, sorted, into ``images.jsonl``, which holds
nothing that depends on when, how often interrupted, or by how many processes it was made.  A line
that was torn, and an image without a line or with another digest than its line says, is made again
by whoever draws it; the line of an image that is lost stays until then.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dng_models.class_removal import files
from dng_models.text_to_image.config import Config, Point, check_same

Record = dict[str, Any]
COMMAND = "python -m dng_models.text_to_image"
SCORES = ("clip_cosine", "presence", "measured_by")


@dataclass(frozen=True)
class RunFolder:
    """Where everything of a run lies.

    Parameters
    ----------
    path : Path
        The folder, made when something is written.
    """

    path: Path

    @property
    def settings(self) -> Path:
        """What all images have in common, and the versions of what made them."""
        return self.path / "run.json"

    @property
    def table(self) -> Path:
        """The images, one a line."""
        return self.path / "images.jsonl"

    @property
    def work(self) -> Path:
        """The lines that are not in the table yet."""
        return self.path / "work"

    @property
    def figures(self) -> Path:
        """The plots."""
        return self.path / "figures"

    def lines_of(self, process: int) -> Path:
        """The file that a process adds its lines to."""
        return self.work / f"{process:04d}.jsonl"

    def image(self, point: Point, image: int) -> Path:
        """Where an image is."""
        return self.path / image_name(point, image)


def image_name(point: Point, image: int) -> str:
    """The file of an image, within the folder of the run."""
    return f"images/{point.key}/{image:06d}.png"


def strip_name(point: Point, seed: int) -> str:
    """The file of the way of an image of a point through time."""
    return f"paths/{point.key}/seed-{seed}.png"


# ---------------------------------------------------------------------- settings


def open_run(folder: RunFolder, config: Config, versions: Mapping[str, str]) -> None:
    """Write the settings of a run, or make sure that they are those of the images that are there.

    New prompts are added; versions that were not seen before too.  Settings of which there are no
    images yet bind nobody.

    Raises
    ------
    ValueError
        If a setting differs, naming it, or the file is damaged.
    """
    now = config.to_json() | {"versions": [dict(versions)]}
    before, drawn = read_settings(folder), read_records(folder)
    if before is not None and drawn:
        check_same(config, before, folder.path)
        now["prompts"] = before["prompts"] | now["prompts"]
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
    """What :func:`open_run` wrote, None where nothing was.

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
    """Drop a line that was torn, and those of images that are not as their lines say.

    By one process, before others read or write.

    Parameters
    ----------
    folder : RunFolder
    drawing : collection of str
        Files of the images that are drawn next.  The lines of others stay: nobody would know what
        was lost.

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
    """Make sure that all images are there, as their lines say, and the unguided ones with them.

    Raises
    ------
    FileNotFoundError
        If one is not: naming it and what makes it again.
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
    """Whether an image, and its way through time where that is kept, are as its line says."""
    path, strip = folder.path / record["file"], record.get("path")
    if not path.is_file() or digest(path) != record["sha256"]:
        return False
    if strip is None:
        return True
    way = folder.path / strip["file"]
    return way.is_file() and digest(way) == strip.get("sha256", digest(way))


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Add a line and wait until it is on the disk; :func:`files.append_record`."""
    files.append_record(path, record)


def read_records(folder: RunFolder) -> dict[str, Record]:
    """What is known of every image, by its file.

    Measurements count for the images that they were made of only.

    Raises
    ------
    ValueError
        If a line other than a torn last one is damaged, naming it.
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
    """Of an image and of the unguided one of its seed: what measurements are made of."""
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
    """What the table is sorted by."""
    unguided = record["kind"] == "none"
    return (
        *(record["prompt"], not unguided, record["rule"], record["kind"]),
        *(record["guidance_scale"], record["image"]),
    )


def write_table(folder: RunFolder, records: Iterable[Record]) -> None:
    """Write the sorted table, whole or not at all, and then drop the lines that it replaces."""
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
    """All images of a run, from the table and from what is not in it yet.

    In the order of the prompts of ``run.json``, then as the table.

    Raises
    ------
    FileNotFoundError
        If there is none.
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
    """Sixteen hexadecimal digits of a file's content."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
