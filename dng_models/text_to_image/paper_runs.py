"""Which command gives which table and figure of the paper, and how long it takes on a GPU."""

from __future__ import annotations

from typing import Any, NamedTuple

from dng_models.pipelines.negative_template import COMPOSED
from dng_models.text_to_image.config import PAPER_MODEL, Config
from dng_models.text_to_image.dry_run import evaluations, hours
from dng_models.text_to_image.prompts import PAPER

# The U-Net of Stable Diffusion 2, which draws 768 x 768 pixels: its size needs no weights.
PARAMETERS = 865_910_724
LATENTS = 96


class Run(NamedTuple):
    """A command of the experiment with Stable Diffusion.

    Attributes
    ----------
    gives : str
        What its folder holds, by the paper's numbers.
    words : str
        Options of the command line behind model and folder.
    settings : dict
        The same as fields of :class:`.config.Config`.
    """

    gives: str
    words: str
    settings: dict[str, Any]


RUNS = (
    Run(
        "Table 1 (prompts) and Q by prompt (Eq. 23): `table.md`, `q.csv`; Fig. 5: "
        "`trajectories_*.png`; Figs. 6 and 6a: `similarities*.png`; Fig. 12: `scales_dng.png`; "
        "Figs. 16 to 23: `grid_*.png`",
        "",
        {},
    ),
    Run(
        "one prompt of these, as a first look",
        "--only 'English breakfast' --num-images 8",
        {"only": "English breakfast", "num_images": 8},
    ),
    Run(
        "the same with SLD, contrastive CFG and Perp-Neg beside, which the paper does not run here",
        "--rules np dng sld ccfg perp-neg",
        {"rules": ("np", "dng", "sld", "ccfg", "perp-neg")},
    ),
    Run(
        "what the laboratory teaches: negatives composed with the prompt, priors that are counted, "
        "no offset",
        f'--rules np dng --negative-template "{COMPOSED}" --prior measured',
        {"rules": ("np", "dng"), "negative_template": COMPOSED, "prior": "measured"},
    ),
)


def config_of(run: Run) -> Config:
    """The configuration of a command's run."""
    settings = dict(run.settings)
    if "only" in settings:
        name = settings.pop("only")
        settings["prompts"] = tuple(each for each in PAPER if each.name == name)
    return Config(model=PAPER_MODEL, **settings)


def table() -> str:
    """The commands as a table in Markdown, with images, evaluations and hours of an H100.

    The hours are those of :func:`.dry_run.hours`: a measured step of another U-Net, in proportion
    to parameters and latents.
    """
    lines = ["| gives | command | images | evaluations | H100 hours |", "|---|---|---:|---:|---:|"]
    for run in RUNS:
        config = config_of(run)
        images = len(config.points()) * config.num_images
        count = evaluations(config)
        words = f"run --model {PAPER_MODEL} {run.words}".rstrip()
        time, _ = hours(count, PARAMETERS, LATENTS**2)
        lines.append(f"| {run.gives} | `{words}` | {images:,} | {count:,} | {time:.2g} |")
    return "\n".join(lines)
