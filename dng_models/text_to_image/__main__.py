"""Text to image from the command line: ``python -m dng_models.text_to_image COMMAND``.

Nothing heavy is imported before the arguments are parsed, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from dng_models.support import command_line, options
from dng_models.text_to_image.config import DEFAULT_CLIP, Config
from dng_models.text_to_image.laboratory.training_config import LaboratoryTraining

PROGRAM = "python -m dng_models.text_to_image"

DESCRIPTION = """\
Ask a text-to-image model for pictures without something: the experiment of Dynamic Negative
Guidance with Stable Diffusion (arXiv 2410.14398, Table 1, Figs. 5, 6, 12, 16-23). A negative prompt
that is related to the picture should change it; one that has nothing to do with it should leave it
alone.

Without --model, a laboratory is asked: diffusers' pipeline on a small world of pictures, drawn by
the program, whose network is exact. A judge says what each image shows, and the ideal images are
known. Nothing is downloaded. With --model, the same for any pipeline of diffusers, judged by CLIP.

  run        all of the following
  generate   draw the images: prompts x rules x related and unrelated negative x scales
  score      CLIP similarity to the unguided images, and whether the unwanted is found in them
  table      prompts and hyperparameters, the paper's Q by prompt and rule, and the detections
  plot       similarities, scales over time, trajectories, images, detections
  train-laboratory  a Stable Diffusion pipeline on the laboratory's world, and judge it exactly
  oracle     what docs/oracle.md says: a judge that looks, beside the tracked posterior
  choices    what docs/choosing.md says: negative, prior, offset and steps, in the laboratory
  paper      which command gives which table and figure of the paper, and its hours on a GPU

Every command says more: %(prog)s COMMAND --help
"""
EPILOG = """\
What a run leaves in its folder (--out, by default runs/text_to_image):

  images/PROMPT/POINT/000000.png   the images by number, of which the first has the seed --seed
  paths/PROMPT/POINT/seed-N.png    images on their way through time, at the largest scales: the
                                   first, and the first that holds the unwanted without guidance
  images.jsonl                     one image a line: prompt, rule, hyperparameters, seed, posterior
                                   and scale of every step, similarity, detections
  run.json                         what all images have in common; versions
  table.md                         prompts (paper, Table 1), Q, detections
  table.csv, q.csv                 numbers by point, and by prompt and rule
  figures/                         trajectories_* (paper, Fig. 5), similarities (6), similarities_*
                                   (6a), scales_* (12), grid_* (16-23), detections
  priors.json                      what was counted with --prior measured
  work/                            lines of images that are not in images.jsonl yet

Everything resumes at the image: the same command, started again, goes on where it was stopped and
leaves the same files. More images, prompts, rules and scales can be added; other settings are
refused. One process, or launch of several, writes to a folder at a time; another is refused.
"accelerate launch -m dng_models.text_to_image run ..." (on CPUs, where that starts one process
only, "torchrun --nproc-per-node 2 -m ...") spreads the images over processes, with the same result.

examples:
  %(prog)s run                             the laboratory: no weights, three minutes
  %(prog)s run --quick                     fewer images and steps of it: under a minute
  %(prog)s run --model DIR --dry-run       checks, evaluations and expected time of a run
  %(prog)s run --model stabilityai/stable-diffusion-2 --out runs/sd2
  %(prog)s run --model DIR --only "dinner table" --rules np dng sld --num-images 8
"""


# ---------------------------------------------------------------------- options


def _names(text: str) -> tuple[str, ...]:
    return tuple(part for each in text.split(",") if (part := each.strip()))


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in _names(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be numbers, got {text!r}") from None


class _Joined(argparse.Action):
    """Join values that commas or spaces separate into one tuple."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, tuple(part for each in values for part in each))


def _drawing_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    options.add(group, Config, "model")
    group.add_argument(
        "--tiny",
        action="store_true",
        help="a tiny random Stable Diffusion and a tiny CLIP instead, few steps and images: shows "
        "that what a real one needs works, and nothing else",
    )
    group.add_argument(
        "--quick", action="store_true", help="fewer steps and images, where they are not given"
    )
    options.add(group, Config, "dtype", shown="float16 on a GPU, else float32")
    group = parser.add_argument_group(
        "what is drawn", "Rules and scales are separated by commas or spaces."
    )
    group.add_argument(
        "--prompts",
        metavar="FILE",
        help="'paper', 'laboratory', or a JSON file: a list of objects with name, prompt, related, "
        "unrelated, and if they differ from the defaults prior, temperature, offset, offset_nats, "
        "np_scale, dng_scale, and for composed negatives related_share, unrelated_share, "
        "composed_scale (default: the model's)",
    )
    group.add_argument(
        "--only", nargs="+", metavar="NAME", help="of the prompts, those with these names"
    )
    options.add(group, Config, "rules", type=_names, action=_Joined)
    scales = group.add_mutually_exclusive_group()
    options.add(scales, Config, "guidance_scales", type=_numbers, action=_Joined)
    options.add(
        scales, Config, "fractions", flag="--relative-scales", type=_numbers, action=_Joined
    )
    options.add(group, Config, "negative_template", "prior")
    options.add(group, Config, "num_images", "seed", "height", "width")

    group = parser.add_argument_group("how it is drawn")
    options.add(group, Config, "steps", "scheduler", "cfg_scale", "reference")
    options.add_interval(group, "--guidance-interval")
    group.add_argument(
        "--negative-prompts",
        choices=("whole", "split"),
        default="whole",
        help="split: the concepts between the commas of a negative prompt each have a posterior; "
        "DNG only (default: whole)",
    )
    options.add(group, Config, "contrast")
    options.add(
        group,
        Config,
        "ask",
        shown=f"{DEFAULT_CLIP}; judge in the laboratory, and a tiny one in a tiny run",
    )


def _scoring_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is measured")
    options.add(
        group,
        Config,
        "clip",
        shown=f"{DEFAULT_CLIP}; judge in the laboratory, and a tiny one in a tiny run",
    )
    options.add(group, Config, "detector")


def _run_options(parser: argparse.ArgumentParser, *, networks: bool = True) -> None:
    group = options.run_group(parser, "runs/text_to_image", device=networks)
    if networks:
        group.add_argument(
            "--batch-size",
            type=int,
            metavar="N",
            help="images that the networks see at once (default: 4, in the laboratory 48)",
        )
        group.add_argument("--quiet", action="store_true", help="no progress bars")
    group.add_argument("--debug", action="store_true", help="show where an error comes from")


def _table_options(parser: argparse.ArgumentParser, parts: Sequence[str], told: str) -> None:
    """Options of a command that prints the tables of a page."""
    parser.add_argument("--part", nargs="+", choices=parts, help=f"{told} (default: all)")
    parser.add_argument(
        "--num-images",
        type=int,
        default=32,
        metavar="N",
        help="images of each prompt and negative (default: %(default)s)",
    )
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")


# ---------------------------------------------------------------------- the parser


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser, command = command_line.commands_of(PROGRAM, DESCRIPTION, EPILOG)
    run = command(
        "run",
        "Draw what is missing, measure it, plot it, and print the table.\n\n"
        "In the laboratory, five prompts with seven methods at two scales are 135 points of 48\n"
        "images. The paper's prompts, two rules and four scales are 85 points; with 32 images\n"
        "each that is 2,720 images, of 50 steps on a doubled batch.",
        "--quick\n--model stabilityai/stable-diffusion-2 --prompts paper --rules np,dng --out sd2\n"
        "--model DIR --clip DIR --rules np dng sld --relative-scales 0.5 1\n"
        "--model DIR --negative-template '{positive}, with {negative}' --prior measured --dry-run",
    )
    run.add_argument(
        "--dry-run",
        action="store_true",
        help="load and check everything, say how much would be drawn and how long it would take, "
        "and draw nothing",
    )
    _drawing_options(run)
    _scoring_options(run)
    _run_options(run)

    generate = command(
        "generate",
        "Draw the images that are not there yet, into DIR/images.",
        "--only 'dinner table' --rules dng --guidance-scales 1 2 4",
    )
    _drawing_options(generate)
    _run_options(generate)

    score = command(
        "score",
        "Measure all images of a folder: CLIP similarity to the unguided image of the same seed,\n"
        "and the probability that each concept of the negative prompts is in them.\n\n"
        "Another --clip or --detector measures again.",
        "--out sd2\n--out sd2 --detector DIR",
    )
    _scoring_options(score)
    _run_options(score)

    table = command(
        "table",
        "Print the prompts with their hyperparameters (paper, Table 1), the paper's Q (Eq. 23)\n"
        "and the mean gap by prompt and rule, beside what the paper prints, and how often the\n"
        "unwanted is found; write table.md, table.csv and q.csv.",
        "--out sd2",
    )
    _run_options(table, networks=False)

    plot = command(
        "plot",
        "Draw everything that the folder of a run has data for, into DIR/figures.",
        "--out sd2\n--out sd2 --columns 4",
    )
    plot.add_argument(
        "--columns",
        type=int,
        default=6,
        metavar="N",
        help="images in a row of a grid (default: %(default)s)",
    )
    _run_options(plot, networks=False)
    choices = command(
        "choices",
        "Print the tables of docs/choosing.md: measure in the laboratory which form of a\n"
        "negative, prior, offset and number of steps are right. About 5 minutes on one core.",
        "\n--part needed\n--part priors --num-images 16",
    )
    _table_options(
        choices,
        ("needed", "forms", "priors", "steps"),
        "the priors that are needed, exactly; forms of a negative; wrong priors; steps and "
        "trackers",
    )
    oracle = command(
        "oracle",
        "Print the tables of docs/oracle.md: in the laboratory, how a judge of images on the way\n"
        "agrees with the exact posterior, and what pushing away what it sees leaves, changes and\n"
        "costs beside DNG. About 2 minutes on one core.",
        "\n--part gate\n--part rules --num-images 16",
    )
    _table_options(
        oracle, ("gate", "rules"), "the judge's answers over time; rules beside each other"
    )
    paper = command(
        "paper",
        "Print the table of docs/stable_diffusion.md: which command gives which table and figure\n"
        "of the paper, with its images, evaluations and expected hours on a GPU. It needs no\n"
        "weights.",
        "",
    )
    paper.add_argument("--debug", action="store_true", help="show where an error comes from")
    training = command(
        "train-laboratory",
        "Train a Stable Diffusion pipeline on the laboratory's world: text encoder and UNet, from\n"
        "nothing, by the world's exact predictions. What is finished is not trained again; what\n"
        "was stopped goes on, with the bits of a training that was not. DIR is then a model for\n"
        "--model, and for from_pretrained of diffusers.",
        "--quick --out runs/quick\n--judge\n--judge --num-images 300",
    )
    group = training.add_argument_group("training")
    group.add_argument(
        "--quick", action="store_true", help="a few updates of tiny networks, which learn nothing"
    )
    options.add(group, LaboratoryTraining, "steps", "batch_size", "chains", "channels", "seed")
    options.add(group, LaboratoryTraining, "learning_rate", "difference_weight", "mismatched")
    group = training.add_argument_group("gate")
    group.add_argument(
        "--judge",
        action="store_true",
        help="draw images of the finished pipeline, judge them exactly, print what is there, and "
        "write it to DIR/gate.json; exit status 1 if the pipeline does not pass",
    )
    group.add_argument(
        "--num-images",
        type=int,
        default=1000,
        metavar="N",
        help="images of each of six kinds of captions (default: %(default)s)",
    )
    group = options.run_group(training, "runs/laboratory")
    options.add(group, LaboratoryTraining, "checkpoint_every")
    group.add_argument("--quiet", action="store_true", help="no progress bars")
    group.add_argument("--debug", action="store_true", help="show where an error comes from")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status.

    Parameters
    ----------
    arguments : sequence of str, optional
        Words after the program's name.  Default: those of this process.
    """
    return command_line.run(PROGRAM, make_parser(), "dng_models.text_to_image.commands", arguments)


if __name__ == "__main__":
    sys.exit(main())
