"""A sweep: draw and measure settings one after the other, into a table of JSON lines.

The table is the only state of a sweep.  A row is written when its setting is finished, and contains
nothing that changes between runs, such as times.  A sweep that is killed and restarted, on any
number of processes, therefore ends with the same table as one that was not interrupted.
"""

from __future__ import annotations

import math
import os
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dng_models.class_removal import base
from dng_models.class_removal.config import Config
from dng_models.class_removal.evaluation import evaluate
from dng_models.class_removal.generation import Generated, generate, piece_count
from dng_models.class_removal.materials import Materials
from dng_models.support import files, foreign
from dng_models.support.processes import versions
from dng_models.support.progress import Progress, say

Row = dict[str, Any]
SHOWN = 16  # images of every setting that are kept for the grids


def sweep(
    configs: Iterable[Config],
    materials: Materials,
    *,
    keep_images: bool = False,
    keep_first: bool = True,
    table: Path | None = None,
    progress: bool = True,
) -> list[Row]:
    """Draw and measure every setting that the table does not have yet.

    Every process that ``accelerate launch`` started calls this.  If the table has a setting whose
    kept images are missing or damaged, those images are drawn again.

    Parameters
    ----------
    configs : iterable of Config
        The settings, in the order in which they are drawn and returned.
    materials : Materials
        Networks, data and classifier; the table is in its folder.
    keep_images : bool
        Keep all images of a setting, in pieces, so that more can be added.
    keep_first : bool
        Keep the first 16 images of a setting, for the grids.
    table : Path, optional
        Default: ``sweep.jsonl`` of the folder.
    progress : bool
        Whether to show a bar and print a line per setting.

    Returns
    -------
    list of dict
        The rows of these settings, in their order; in processes other than the main one, only
        those that the table had before.

    Raises
    ------
    ValueError
        If the table has rows of other networks, or is damaged before its last line.
    OSError
        If something cannot be written, or another process writes to the folder; finished rows are
        kept.
    """
    configs = list(dict.fromkeys(materials.resolved(config) for config in configs))
    table = materials.folder.table if table is None else table
    with materials.only_writer(materials.folder.path):
        return _sweep(configs, materials, table, keep_images, keep_first, progress)


def _sweep(
    configs: Sequence[Config],
    materials: Materials,
    table: Path,
    keep_images: bool,
    keep_first: bool,
    progress: bool,
) -> list[Row]:
    processes, folder = materials.processes, materials.folder
    if processes.is_main_process:
        _drop_torn_line(table)
    processes.wait_for_everyone()
    rows = {row["key"]: row for row in read_table(table)}
    pending = [config for config in configs if config.key not in rows]
    measured = [config for config in configs if config.key in rows]
    lost = [config for config in measured if keep_first and _lost(materials, config)]
    if processes.is_main_process and not keep_images:
        for config in measured:
            shutil.rmtree(folder.work(config), ignore_errors=True)
    # Every process must have read the table before a row is written.
    processes.wait_for_everyone()
    # Raises now, and not in the middle of the sweep, if something is missing.
    sources = {config.key: materials.sources(config) for config in [*pending, *lost]}
    for config in [*pending, *lost]:
        _check_sources(config, sources[config.key], rows.values())
    for config in lost:
        _draw_lost(config, materials, keep_images, progress)
    bases = _checked_bases(pending, materials, rows.values(), progress)
    shown = progress and processes.is_main_process and pending
    total = sum(map(piece_count, pending))
    with Progress(total, unit="batch", shown=bool(shown)) as bar:
        for done, config in enumerate(pending, len(configs) - len(pending) + 1):
            bar.set_description(f"setting {done}/{len(configs)}, {label(config)}")
            generated = generate(config, materials, advance=bar.update)
            if generated is not None:
                row = _measured(config, materials, generated, sources[config.key])
                row["base"] = bases[config.key]
                if keep_first:
                    with materials.threads(config):
                        _keep_first(config, materials, generated)
                append_row(table, row)
                rows[config.key] = row
                if progress:
                    say(_told(config, row), sys.stderr)
                if not keep_images:
                    shutil.rmtree(folder.work(config), ignore_errors=True)
            processes.wait_for_everyone()
    return [rows[config.key] for config in configs if config.key in rows]


def _checked_bases(
    pending: Sequence[Config], materials: Materials, rows: Iterable[Row], progress: bool
) -> dict[str, dict[str, Any] | None]:
    """The result of the base check for every pending setting, by the setting's key.

    The unguided images drawn for a check are kept if a pending setting uses them too.
    """
    known: dict[str, dict[str, Any] | None]
    known = {row["base"]["key"]: row["base"] for row in rows if row.get("base")}
    drawn = {config.images_key for config in pending}
    found: dict[str, dict[str, Any] | None] = {}
    told: set[str] = set()
    for config in pending:
        few = base.unguided(config, materials)
        if few.key not in known:
            known[few.key] = base.checked(config, materials)
            if materials.processes.is_main_process and few.images_key not in drawn:
                shutil.rmtree(materials.folder.work(few), ignore_errors=True)
            materials.processes.wait_for_everyone()
        found[config.key] = known[few.key]
        result = known[few.key]
        if result is not None and few.key not in told:
            told.add(few.key)
            if result["verdict"] == base.BAD or (progress and result["verdict"] != base.GOOD):
                say(base.warning(result, config), sys.stderr)
    return found


def _lost(materials: Materials, config: Config) -> bool:
    """Whether a file that :func:`keep_samples` writes is missing or damaged."""
    folder = materials.folder.samples(config)
    try:
        files.load_tensors(folder / "images.safetensors")
        files.read_json(folder / "config.json")
    except (FileNotFoundError, ValueError):
        return True
    return not (folder / "grid.png").is_file()


def _draw_lost(config: Config, materials: Materials, keep_images: bool, progress: bool) -> None:
    """Draw again only those images of a setting that are kept."""
    few = replace(config, num_images=min(SHOWN, config.num_images))
    if progress and materials.processes.is_main_process:
        say(f"{label(config)}: its samples are gone or damaged, drawn again", sys.stderr)
    generated = generate(few, materials)
    if generated is not None:
        with materials.threads(config):
            _keep_first(config, materials, generated)
        if not keep_images:
            shutil.rmtree(materials.folder.work(config), ignore_errors=True)
    materials.processes.wait_for_everyone()


def _keep_first(config: Config, materials: Materials, generated: Generated) -> None:
    """Keep the first images of a setting, with the labels the classifier gives them."""
    images, _ = without_broken(generated.images[:SHOWN])
    labels, _ = materials.judge(config).judge(images)
    keep_samples(materials, config, generated, torch.from_numpy(labels))


def label(config: Config) -> str:
    """The name of a setting in progress bars and printed lines."""
    name: str = config.rule
    if config.rule == "dng":
        name = f"dng {config.tracker} {config.hyperparameters}"
    if config.negative == "images" and config.reads_images:
        name += " from images"
    if config.networks == "conditional":
        name += " conditional"
    if config.rule in ("none", "fbg"):
        return name
    return f"{name} {'r' if config.rule == 'spell' else 'g'}={config.strength:g}"


def _told(config: Config, row: Row) -> str:
    """The main metrics of a row in one line of text."""
    found = row["metrics"]
    return (
        f"{label(config)}, without {', '.join(config.forget)}: {100 * found['safety']:.2f}% "
        f"[{100 * found['safety_low']:.2f}, {100 * found['safety_high']:.2f}] forbidden, smoothed "
        f"KL {found['kl_smoothed']:.3f}, Frechet {found['frechet']:.3g}, of pixels "
        f"{found['frechet_pixels']:.3g}"
    )


# ---------------------------------------------------------------------- a row


def _measured(
    config: Config, materials: Materials, generated: Generated, sources: dict[str, str]
) -> Row:
    """Measure the images of a setting and return its row of the table."""
    images, broken = without_broken(generated.images)
    with materials.threads(config):
        judge, reference = materials.judge(config), materials.reference(config)
        metrics = evaluate(images, reference, judge)
    summary: dict[str, float] = {
        "mean_scale": float(generated.mean_scale.mean()),
        "not_finite": broken,
    }
    if generated.log_posterior is not None and config.rule == "dng":
        posterior = generated.log_posterior.double().exp()
        summary["mean_posterior"] = float(posterior.reshape(-1, len(images)).mean())
    return {
        "config": config.to_json(),
        "key": config.key,
        "metrics": metrics,
        "sources": sources,
        "summary": summary,
        "versions": versions("torch", "numpy", "diffusers", device=materials.device),
    }


def without_broken(images: Tensor) -> tuple[Tensor, int]:
    """Replace pixels that are not finite; return the images and how many had such pixels.

    Guidance that is too strong can exceed the range of a float.  NaN becomes 0, and infinite pixels
    become -1 or 1.
    """
    broken = int((~torch.isfinite(images)).flatten(1).any(dim=1).sum())
    return images.nan_to_num(nan=0.0, posinf=1.0, neginf=-1.0), broken


def keep_samples(
    materials: Materials, config: Config, generated: Generated, labels: Tensor
) -> Path:
    """Write the first images of a setting, a sheet of them, and the setting; return the folder.

    Parameters
    ----------
    materials : Materials
        Determines the folder.
    config : Config
    generated : Generated
        All n images.
    labels : Tensor of int64, shape (k,)
        Predicted classes of the first k <= n images, which are the ones that are kept.

    Returns
    -------
    Path
        A folder with ``config.json``, ``grid.png`` (at most 64 images) and ``images.safetensors``,
        which holds ``images``, ``labels``, ``mean_scale`` and, if a posterior is tracked,
        ``log_posterior``.
    """
    folder, count = materials.folder.samples(config), len(labels)
    tensors = {
        "images": generated.images[:count],
        "labels": labels,
        "mean_scale": generated.mean_scale[:count],
    }
    if generated.log_posterior is not None:
        tensors["log_posterior"] = generated.log_posterior[..., :count]
    files.save_tensors(folder / "images.safetensors", tensors)
    files.write_json(folder / "config.json", config.to_json())
    write_sheet(folder / "grid.png", generated.images[: min(count, 64)])
    return folder


def write_sheet(path: Path, images: Tensor) -> None:
    """Write images, clamped to [-1, 1], as a PNG in rows of eight; small ones are enlarged."""
    from PIL import Image

    n, channels, height, width = images.shape
    columns = min(8, n)
    rows = -(-n // columns)
    pixels = ((images.clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8)
    sheet = torch.full((channels, rows * (height + 1) - 1, columns * (width + 1) - 1), 255)
    for i, image in enumerate(pixels):
        top, left = i // columns * (height + 1), i % columns * (width + 1)
        sheet[:, top : top + height, left : left + width] = image
    array = sheet.to(torch.uint8).movedim(0, -1)[..., : 3 if channels >= 3 else 1]
    shown = Image.fromarray(array.squeeze(-1).numpy())
    factor = max(1, 64 // height)
    enlarged = shown.resize((factor * shown.width, factor * shown.height), Image.Resampling.NEAREST)
    files.write_atomically(path, lambda temporary: enlarged.save(temporary, format="PNG"))


# ---------------------------------------------------------------------- the table


def read_table(path: Path) -> list[Row]:
    """Read the rows of a table; an empty list if there is no table.

    An incomplete last line, left by a killed writer, is ignored.

    Raises
    ------
    ValueError
        If another line is damaged; the message gives its number.
    """
    rows = []
    for number, line in enumerate(_whole_lines(path), 1):
        try:
            row = foreign.parse_json(line, "it", "it was damaged", finite=True)
            Config.from_json(row["config"])
            if not isinstance(row["key"], str) or not isinstance(row["sources"], dict):
                raise ValueError("its key and sources are of other types")
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{path}, line {number} is not a row of a sweep ({error}): remove the line, and "
                "its setting is drawn again"
            ) from None
        rows.append(row)
    return rows


def _whole_lines(path: Path) -> list[bytes]:
    return path.read_bytes().split(b"\n")[:-1] if path.is_file() else []


def _drop_torn_line(path: Path) -> None:
    whole = sum(len(line) + 1 for line in _whole_lines(path))
    if path.is_file() and path.stat().st_size > whole:
        os.truncate(path, whole)


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Add a row to a table and wait until it is on the disk.

    Raises
    ------
    OSError
        If it cannot be written; the table is unchanged.
    """
    files.append_record(path, _finite(row), "row")


def _finite(value: Any) -> Any:
    """The same value with None in place of NaN and infinities, which JSON cannot express."""
    if isinstance(value, Mapping):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---------------------------------------------------------------------- what rows are made of


def _check_sources(config: Config, sources: Mapping[str, str], rows: Iterable[Row]) -> None:
    """Raise a ValueError if a row that names the same networks was made with other weights."""
    for row in rows:
        other = Config.from_json(row["config"])
        if _names(other) != _names(config):
            continue
        for part, digest in row["sources"].items():
            if sources.get(part, digest) != digest:
                raise ValueError(
                    f"the table has rows that were made with another {part} (row {row['key']}: "
                    f"{digest}, now {sources[part]}): what would be added cannot be compared with "
                    "them; use another --out, or remove the table"
                )


def _names(config: Config) -> tuple[Any, ...]:
    return (
        *(config.dataset, config.networks, config.base, config.forget, config.unwanted),
        *(config.toward, config.positive, config.classifier, config.tracker),
        config.calibration,
    )
