"""A sweep: settings drawn and measured one after the other, into a table of JSON lines.

The table is all that a sweep remembers.  A row is written when its setting is finished, and holds
nothing that depends on when or how fast it was: killed anywhere and started again, on any number
of processes, a sweep leaves the table that it would have left undisturbed.
"""

from __future__ import annotations

import math
import os
import platform
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dng_math
from dng_models import foreign
from dng_models.class_removal import base, files
from dng_models.class_removal.config import Config
from dng_models.class_removal.evaluate import evaluate
from dng_models.class_removal.generate import Generated, Materials, generate, piece_count
from dng_models.progress import Progress, say

Row = dict[str, Any]
SHOWN = 16  # images of every setting that stay for the grids


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

    Every process that ``accelerate launch`` started calls it.  Of a setting that the table has and
    whose kept images are gone or damaged, these are drawn again.

    Parameters
    ----------
    configs : iterable of Config
        In the order of the rows.
    materials : Materials
        Networks, data and classifier; the table is in its folder.
    keep_images : bool
        Keep all images of a setting, in pieces, so that more can be added.
    keep_first : bool
        Keep the first 16 images of a setting, for the grids.
    table : Path, optional
        Default: ``sweep.jsonl`` of the folder.
    progress : bool
        Show a bar.

    Returns
    -------
    list of dict
        The rows of these settings, in their order.

    Raises
    ------
    ValueError
        If the table has rows of other networks, or is damaged before its last line.
    OSError
        If something cannot be written, or another process writes to the folder; what was finished
        stays.
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
    # Nobody writes a row before everybody has read the table.
    processes.wait_for_everyone()
    # Whatever is missing should be known now, not when its turn comes.
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
    """What there is to say of the base of every setting, before any of them is believed.

    Unguided images that are looked at are not drawn again, if they are a setting themselves.
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
    """Whether some of what :func:`keep_samples` writes is gone or damaged."""
    folder = materials.folder.samples(config)
    try:
        files.load_tensors(folder / "images.safetensors")
        files.read_json(folder / "config.json")
    except (FileNotFoundError, ValueError):
        return True
    return not (folder / "grid.png").is_file()


def _draw_lost(config: Config, materials: Materials, keep_images: bool, progress: bool) -> None:
    """Draw the images of a setting that stay, and only these, once more."""
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
    """Keep the first images of a setting, with what the classifier says of them."""
    images, _ = without_broken(generated.images[:SHOWN])
    labels, _ = materials.judge(config).judge(images)
    keep_samples(materials, config, generated, torch.from_numpy(labels))


def label(config: Config) -> str:
    """What a setting is called on a progress bar and in the printed table."""
    name: str = config.rule
    if config.rule == "dng":
        name = f"dng {config.tracker} {config.hyperparameters}"
    if config.networks == "conditional":
        name += " conditional"
    return name if config.rule in ("none", "fbg") else f"{name} g={config.scale:g}"


def _told(config: Config, row: Row) -> str:
    """A row in a line."""
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
    """The row of a setting."""
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
        "versions": versions(materials.device),
    }


def without_broken(images: Tensor) -> tuple[Tensor, int]:
    """Images with finite pixels only, and how many of them had others.

    A push that is too strong can leave the range of a float.
    """
    broken = int((~torch.isfinite(images)).flatten(1).any(dim=1).sum())
    return images.nan_to_num(nan=0.0, posinf=1.0, neginf=-1.0), broken


def versions(device: torch.device) -> dict[str, str]:
    """Of what the numbers were made with, and on what."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "python": platform.python_version(),
        "device": name,
        "dng": dng_math.__version__,
        **{package: version(package) for package in ("torch", "numpy", "diffusers")},
    }


def keep_samples(
    materials: Materials, config: Config, generated: Generated, labels: Tensor
) -> Path:
    """Write the first images of a setting, a sheet of them, and the setting; returns the folder.

    As many as there are labels (the judge's).  ``images.safetensors`` has ``images``, ``labels``,
    ``mean_scale`` and, where a posterior is tracked, ``log_posterior``.
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
    """A PNG of images in rows of eight, clamped to [-1, 1]; small ones are enlarged."""
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
    """The rows of a table; none if there is no table.

    A last line that was torn by whatever killed its writer is no row.

    Raises
    ------
    ValueError
        If another line is damaged; naming it.
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
        If it cannot be written; the table is as it was.
    """
    files.append_record(path, _finite(row), "row")


def _finite(value: Any) -> Any:
    """The same with None for the numbers that JSON does not have."""
    if isinstance(value, Mapping):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---------------------------------------------------------------------- what rows are made of


def _check_sources(config: Config, sources: Mapping[str, str], rows: Iterable[Row]) -> None:
    """All rows of a table that name the same networks were made with the same ones."""
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
        *(config.dataset, config.networks, config.base, config.forget, config.forgetful),
        *(config.toward, config.positive, config.classifier, config.tracker),
        config.calibration,
    )
