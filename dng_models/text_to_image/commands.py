"""The experiment's commands; :mod:`dng_models.text_to_image.__main__` parses their arguments."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import torch

from dng_math import checks
from dng_models.support import files
from dng_models.text_to_image import compare, priors, prompts, store
from dng_models.text_to_image.config import (
    LABORATORIES,
    THE_LABORATORY,
    TINY,
    Config,
    defaults_of,
    prompts_from_json,
)
from dng_models.text_to_image.generation import Materials, generate, measure
from dng_models.text_to_image.laboratory.prompts import LABORATORY
from dng_models.text_to_image.store import RunFolder

MEANINGLESS = "Of tiny random networks: these numbers show that everything works, and nothing else."
# Defaults with --tiny.
FEWER: dict[str, Any] = {"model": TINY, "clip": TINY, "steps": 6, "num_images": 4}
# Defaults with --quick.
QUICK: dict[str, Any] = {"steps": 15, "num_images": 8}


def _config(given: argparse.Namespace) -> Config:
    """Make the configuration from the parsed arguments."""
    names = {field.name for field in dataclasses.fields(Config)}
    told = {
        name: value
        for name, value in vars(given).items()
        if name in names - {"prompts"} and value is not None
    }
    if given.tiny:
        if "model" in told:
            raise ValueError(f"model must not be given with --tiny, got {told['model']!r}")
        told = FEWER | told
    if given.quick:
        told = QUICK | told
    if "dtype" not in told:
        # The exact model computes in float32 whatever its latents are, and the others are small.
        small = told.get("model", Config.model) in (TINY, *LABORATORIES)
        on_gpu = not small and _is_gpu(given.device)
        told["dtype"] = "float16" if on_gpu else "float32"
    if given.interval is not None:
        told["t_lo"], told["t_hi"] = given.interval
    told["split_negatives"] = given.negative_prompts == "split"
    if given.prompts is not None:
        chosen = prompts.load(given.prompts, {THE_LABORATORY: LABORATORY})
    else:
        chosen = defaults_of(told.get("model", Config.model))["prompts"]
    if given.only:
        by_name = {prompt.name: prompt for prompt in chosen}
        for name in given.only:
            checks.choice("only", name, tuple(by_name))
        chosen = tuple(by_name[name] for name in dict.fromkeys(given.only))
    return Config(prompts=chosen, **told)


def _is_gpu(device: str | None) -> bool:
    return torch.cuda.is_available() if device is None else device.startswith("cuda")


def _folder(given: argparse.Namespace) -> RunFolder:
    """The folder of the run."""
    if given.out is not None:
        return RunFolder(given.out)
    tiny = getattr(given, "tiny", False)
    return RunFolder(Path("runs", "text_to_image-tiny" if tiny else "text_to_image"))


def _materials(given: argparse.Namespace) -> Materials:
    return Materials(_folder(given), device=given.device, batch_size=given.batch_size)


def generate_command(given: argparse.Namespace) -> None:
    """Draw the images."""
    config, materials = _config(given), _materials(given)
    generate(config, materials, progress=not given.quiet)
    if materials.processes.is_main_process:
        print(materials.folder.table)


def score_command(given: argparse.Namespace) -> None:
    """Measure the images."""
    materials = _materials(given)
    measure(_measuring(given, materials.folder), materials, progress=not given.quiet)
    if materials.processes.is_main_process:
        print(materials.folder.table)


def _measuring(given: argparse.Namespace, folder: RunFolder) -> Config:
    """Configuration for measuring a folder: its model, and the CLIP and detector to use."""
    settings = store.read_settings(folder)
    if settings is None:
        raise FileNotFoundError(f"there are no images in {folder.path}: 'generate' draws them")
    model = settings["settings"]["model"]
    return Config(
        model=model,
        clip=getattr(given, "clip", TINY if model == TINY else defaults_of(model)["clip"]),
        detector=getattr(given, "detector", Config.detector),
    )


def table_command(given: argparse.Namespace) -> None:
    """Print and write the tables."""
    folder = _folder(given)
    files.clean(folder.path, below=False)
    print(_write_tables(folder), end="")


def _write_tables(folder: RunFolder) -> str:
    records = store.read_table(folder)
    text = compare.table(records)
    settings = store.read_settings(folder)
    if settings is not None:
        chosen = prompts_from_json(settings["prompts"], folder.settings)
        if settings["settings"].get("prior") == "measured":
            counted = priors.table(priors.read(folder.priors), [each.name for each in chosen])
            text = f"{counted}\n{text}" if counted else text
        text = f"{compare.prompt_table(chosen)}\n{text}"
        if settings["settings"]["model"] == TINY:
            text = f"{MEANINGLESS}\n\n{text}"
    files.write_text(folder.path / "table.md", text)
    files.write_text(folder.path / "table.csv", compare.csv_table(records))
    files.write_text(folder.path / "q.csv", compare.q_table(records))
    return text


def plot_command(given: argparse.Namespace) -> None:
    """Draw the figures."""
    from dng_models.text_to_image import plot

    folder = _folder(given)
    files.clean(folder.figures)
    for path in plot.draw_all(folder.path, columns=given.columns):
        print(path)


def choices_command(given: argparse.Namespace) -> None:
    """Print the tables of docs/choosing.md."""
    from dng_models.text_to_image.laboratory import choices

    for name in given.part or choices.PARTS:
        print(choices.part(name, given.num_images), flush=True)


def oracle_command(given: argparse.Namespace) -> None:
    """Print the tables of docs/oracle.md."""
    from dng_models.text_to_image.laboratory import oracle

    for name in given.part or oracle.PARTS:
        print(oracle.part(name, given.num_images), flush=True)


def paper_command(given: argparse.Namespace) -> None:
    """Print which command gives which table and figure of the paper."""
    from dng_models.text_to_image import paper_runs

    print(paper_runs.table())


def train_laboratory_command(given: argparse.Namespace) -> None:
    """Train a pipeline on the laboratory's world, and judge it."""
    from dng_models.support.processes import Place
    from dng_models.text_to_image.laboratory import train
    from dng_models.text_to_image.laboratory.gate import judge_folder
    from dng_models.text_to_image.laboratory.training_config import QUICK, LaboratoryTraining

    told = {
        name: value
        for name, value in vars(given).items()
        if name in {field.name for field in dataclasses.fields(LaboratoryTraining)}
    }
    config = dataclasses.replace(QUICK if given.quick else LaboratoryTraining(), **told)
    out = Path("runs", "laboratory") if given.out is None else given.out
    device = Place(given.device).device
    print(train.train_laboratory(out, config, device=device, progress=not given.quiet))
    if given.judge:
        verdict = judge_folder(
            out, images=given.num_images, device=device, progress=not given.quiet
        )
        print(verdict.table())
        if not verdict.passed:
            raise SystemExit(1)


def run_command(given: argparse.Namespace) -> None:
    """Draw the images, measure them, and write the figures and tables."""
    from dng_models.text_to_image import dry_run, plot

    config, materials = _config(given), _materials(given)
    if given.dry_run:
        print(dry_run.report(config, materials), end="")
        return
    with materials.only_writer(materials.folder.path):
        # Load the models first: a missing one should fail before hours of drawing.
        materials.pipeline(config)
        materials.detector(config)
        materials.check_asked(config)
        # Once unguided images are measured, the images to follow are known.
        generate(config, materials, unguided=True, progress=not given.quiet)
        measure(config, materials, progress=not given.quiet)
        generate(config, materials, progress=not given.quiet)
        measure(config, materials, progress=not given.quiet)
        if materials.processes.is_main_process:
            for path in plot.draw_all(materials.folder.path):
                print(path)
            print(_write_tables(materials.folder), end="")
