"""Class removal from the command line: ``python -m dng_models.class_removal COMMAND``.

Nothing heavy is imported before the arguments are parsed, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dng_models.class_removal.config import (
    CALIBRATION_PATHS,
    FEWER_FOR_DIGITS,
    PRECISIONS,
    RULES,
    TRAINING_PRECISIONS,
    Config,
)
from dng_models.class_removal.methods import DEFAULT_METHODS, LADDERS, METHODS, TUNED
from dng_models.class_removal.training_config import TrainConfig
from dng_models.support import command_line, options

PROGRAM = "python -m dng_models.class_removal"
PARTS = ("base", "class", "conditional", "classifier")
STEPS = f"{FEWER_FOR_DIGITS['steps']} for digits, else {Config.steps}"
BATCH_SIZES = f"{FEWER_FOR_DIGITS['batch_size']} for digits, else {Config.batch_size}"

DESCRIPTION = """\
Teach a diffusion model a data set, teach a second one the class that it must not draw, and guide
the first away from the second: the class removal of Dynamic Negative Guidance (arXiv 2410.14398,
Figs. 4, 10, 11, 13-15), with negative prompting and SLD beside it.

  run        all of the following on one data set, with figures and a table at the end
  train      the networks: base, one for each forgotten class, conditional, classifier
  calibrate  fit DNG's temperature and offset on held-out labelled images
  sample     draw images of one setting
  evaluate   measure images: forbidden share, KL, Frechet distance, precision, recall, FID
  sweep      draw and measure many settings, into a table of JSON lines
  tune       choose the best setting of every method at one forbidden share, and measure it anew
  plot       draw the curves, histograms and grids of a table
  convert    turn a published class network into a folder that diffusers reads

Every command says more: %(prog)s COMMAND --help
"""
EPILOG = """\
What a run leaves in its folder (--out, by default runs/NAME of the data set):

  networks/         base, class-NAME, conditional, classifier; diffusers' layout, safetensors
  calibration/      NAME.json of every calibrated class
  sweep.jsonl       one setting a line: configuration, metrics with 95%% intervals, versions
  tuning.jsonl      the same of the settings that 'tune' chose from
  samples/KEY/      images, configuration and a sheet of every setting
  figures/          the plots; table.md and table.csv are beside sweep.jsonl
  work/             pieces of what is being drawn; emptied as settings are finished

Everything resumes: the same command, started again, goes on where it was stopped, and leaves the
same files. One process, or launch of several, writes to a folder at a time; another is refused.
"accelerate launch -m dng_models.class_removal sweep ..." (on CPUs, where that starts
one process only, "torchrun --nproc-per-node 2 -m ...") spreads train, sample and sweep over
processes; sample and sweep give the same numbers, trainings differ by rounding.

examples:
  %(prog)s run --quick                     shipped digits, 3 minutes on two cores
  %(prog)s run                             digits, trained here: 15 minutes
  %(prog)s train --dataset mnist --forget 0
  %(prog)s sweep --dataset mnist --forget 0 --rules none np dng-paper --guidance-scale 0.5 1 2
"""


# ---------------------------------------------------------------------- options


def _data_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    options.add(group, Config, "dataset", "image_column", "label_column", "split", "held_out")
    options.add(group, Config, "image_size")
    options.add(group, Config, "channels", choices=(1, 3), metavar=None)
    options.add(group, Config, "like")


def _forget_option(parser: argparse.ArgumentParser) -> Any:
    group = parser.add_argument_group("what is forgotten, and by which networks")
    options.add(group, Config, "forget", shown="0 of digits and mnist; to be given for other data")
    return group


def _network_options(group: Any) -> None:
    options.add(group, Config, "networks", "base", "unwanted", "positive", "toward")


def _judge_options(group: Any) -> None:
    options.add(group, Config, "classifier", "fid")
    group.add_argument(
        "--inception",
        type=Path,
        metavar="FILE",
        help="torch-fidelity's weights of Inception (default: those that it has or downloads)",
    )


def _rule_options(parser: argparse.ArgumentParser, *, several: bool) -> None:
    group = parser.add_argument_group("guidance")
    if several:
        ladders = "; ".join(
            f"{rule}: {' '.join(f'{scale:g}' for scale in ladder)}"
            for rule, ladder in LADDERS.items()
        )
        _methods_option(group, DEFAULT_METHODS)
        group.add_argument(
            "--guidance-scale",
            dest="guidance_scales",
            nargs="+",
            type=float,
            metavar="G",
            help=f"guidance scales of every method, of spell its radii (default: {ladders})",
        )
    else:
        # Not choices: the configuration says why a rule cannot run.
        options.add(group, Config, "rule", choices=None, metavar=f"{{{','.join(RULES)}}}")
        options.add(group, Config, "guidance_scale", "radius")
    options.add(group, Config, "negative", "bandwidth")
    options.add(group, Config, "tracker", "hyperparameters", "calibration")
    options.add(group, Config, "prior", "temperature", "offset", "offset_nats", "p_min", "p_max")
    options.add(group, Config, "probes", "track_lo")
    options.add(group, Config, "tracker_variance", "threshold", "gate", "slope", "momentum")
    options.add(group, Config, "momentum_decay", "warmup_steps", "contrast", "pi", "lambda_max")
    options.add(group, Config, "positive_scale")
    options.add_interval(group, "--interval")


def _methods_option(group: Any, default: Sequence[str]) -> None:
    group.add_argument(
        "--rule",
        "--rules",
        dest="rules",
        nargs="+",
        metavar="RULE",
        default=list(default),
        help=f"methods, in the order of the rows: {', '.join(METHODS)}, or a rule of "
        f"{', '.join(RULES)} with the hyperparameters below (default: {' '.join(default)})",
    )


def _safety_option(group: Any, default: float) -> None:
    group.add_argument(
        "--safety",
        type=float,
        default=default,
        metavar="SHARE",
        help="forbidden share at which methods are compared (default: %(default)s)",
    )


def _shipped_option(group: Any) -> None:
    group.add_argument(
        "--shipped",
        action="store_true",
        help="networks, classifier and calibrations that come with the package (digits 0, 1, 8)",
    )


def _chain_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("images")
    options.add(group, Config, "steps", shown=STEPS)
    options.add(group, Config, "num_images", "seed")
    options.add(group, Config, "batch_size", shown=BATCH_SIZES)
    options.add(group, Config, "variance", "eta", "solver", "clip")


def _run_options(
    parser: argparse.ArgumentParser, precisions: Sequence[str] = tuple(PRECISIONS)
) -> None:
    group = options.run_group(parser, "runs/NAME of the data")
    group.add_argument(
        "--mixed-precision",
        choices=precisions,
        default=None,
        help="in which the networks compute (default: no)",
    )
    _common_options(group)


def _plan_option(group: Any) -> None:
    group.add_argument(
        "--plan",
        action="store_true",
        help="say what would be done and about how long it would take here, and stop",
    )


def _common_options(group: Any) -> None:
    group.add_argument("--quiet", action="store_true", help="no progress bars, and no plan")
    group.add_argument("--debug", action="store_true", help="show where an error comes from")


def _train_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "training", "Defaults depend on the size of the images and on the network."
    )

    def add(name: str, dest: str | None = None, shown: str | None = "") -> None:
        options.add(group, TrainConfig, name, shown=shown, dest=dest or name, default=None)

    add("steps", "train_steps")
    add("batch_size", "train_batch_size")
    add("learning_rate")
    add("seed", "train_seed", shown=None)
    add("size", shown=None)
    add("flip")
    add("checkpoint_every")
    add("keep_state")


# ---------------------------------------------------------------------- the parser


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser, command = command_line.commands_of(PROGRAM, DESCRIPTION, EPILOG)
    run = command(
        "run",
        "Train what is missing, calibrate, sweep, plot, and print the table.\n\n"
        "With --quick the networks that ship with the package (digits) draw fewer images: under 3\n"
        "minutes on two cores.  In full, digits take at most 15, of which 6 for the training.",
        "--quick\n\n--dataset cifar10 --base google/ddpm-cifar10-32 --forget airplane",
    )
    run.add_argument(
        "--quick",
        action="store_true",
        help="minutes instead of hours, in a folder of its own (runs/NAME-quick): of digits the "
        "shipped networks and 256 images a setting; of other data small networks, few updates, "
        "images and steps, on images of at most 28 pixels (larger ones are made 16 x 16)",
    )
    _data_options(run)
    group = _forget_option(run)
    _each_option(group)
    group.add_argument(
        "--conditional",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="train one conditional network too, and draw with it beside the pair (default: of "
        "digits only)",
    )
    options.add(group, Config, "base", help="base network: a folder or a hub name", shown="")
    _judge_options(group)
    _chain_options(run)
    _train_options(run)
    _run_options(run, TRAINING_PRECISIONS)
    _plan_option(run)

    train = command(
        "train",
        "Train networks on the images that are not held out, into DIR/networks.\n\n"
        "The base network sees all classes, a class network one, a conditional network all with\n"
        "their labels.  What is finished is not trained again; what was stopped goes on, with the\n"
        "bits of a training that was not.",
        "\n--dataset mnist --forget 0 1 2 3\n--dataset digits --only conditional classifier\n"
        "--dataset photos/ --image-size 32 --forget cat --size small",
    )
    _data_options(train)
    group = _forget_option(train)
    options.add(group, Config, "networks", help="decides what --only is by default")
    group.add_argument(
        "--only",
        nargs="+",
        choices=PARTS,
        metavar="PART",
        help=f"what to train, of {', '.join(PARTS)} (default: base class classifier; conditional "
        "classifier with --networks conditional)",
    )
    _train_options(train)
    _run_options(train, TRAINING_PRECISIONS)
    _plan_option(train)

    calibrate = command(
        "calibrate",
        "Fit the temperature and the offset of trackers to trained networks, and print what was\n"
        "gained.\n\n"
        "The reverse of a forward-noised path of a held-out labelled image is a true reverse\n"
        "path: the tracker is run along it and compared with the label.  The result carries over\n"
        "to other numbers of steps; --hyperparameters calibrated uses it.",
        "--dataset digits --forget 0\n--shipped --forget 0 --tracker path --path-steps 50\n"
        "--dataset mnist --forget 0 1 --networks conditional\n"
        "--shipped --report --forget 0 1 8",
    )
    calibrate.add_argument(
        "--report", action="store_true", help="fit nothing, print the table of what was fitted"
    )
    _shipped_option(calibrate)
    _data_options(calibrate)
    _network_options(_forget_option(calibrate))
    group = calibrate.add_argument_group("paths")
    group.add_argument(
        "--paths",
        type=int,
        default=CALIBRATION_PATHS,
        metavar="N",
        help="noisings of every held-out image (default: %(default)s)",
    )
    group.add_argument(
        "--path-steps", type=int, default=100, metavar="N", help="(default: %(default)s)"
    )
    group.add_argument(
        "--tracker",
        choices=("path",),
        default=argparse.SUPPRESS,
        help="fit the path tracker, into a file of its own (default: the paper's and the log-odds)",
    )
    options.add(group, Config, "probes")
    options.add(group, Config, "seed", help="seed of the noise")
    options.add(
        group,
        Config,
        "batch_size",
        help="paths that the networks see at once",
        shown=BATCH_SIZES,
    )
    _run_options(calibrate)
    _plan_option(calibrate)

    sample = command(
        "sample",
        "Draw images of one setting, into DIR/samples/KEY: images.safetensors, config.json and\n"
        "grid.png.  More images of the same setting continue the ones that are there.",
        "--forget 0 --rule dng --guidance-scale 2 --num-images 64\n"
        "--rule np --guidance-scale 0.4 --steps 50\n"
        "--rule dng --hyperparameters calibrated --trajectories 6",
    )
    _data_options(sample)
    _network_options(_forget_option(sample))
    _rule_options(sample, several=False)
    _chain_options(sample)
    sample.add_argument(
        "--trajectories",
        type=int,
        default=0,
        metavar="N",
        help="also keep predicted images, scales and posteriors of every step for the first N "
        "images, in trajectories.safetensors",
    )
    _run_options(sample)

    evaluate = command(
        "evaluate",
        "Measure images against the data without the forgotten classes, print the metrics and\n"
        "write them beside the images.",
        "runs/digits/samples/0123456789ab\nmy_images/ --dataset mnist --forget 0 --fid",
        needs="IMAGES ",
    )
    evaluate.add_argument(
        "images",
        type=Path,
        metavar="IMAGES",
        help="folder of 'sample' (its configuration holds where no option says otherwise), a "
        ".safetensors file with a tensor 'images' in [-1, 1], or a folder of PNG or JPEG files",
    )
    _data_options(evaluate)
    _judge_options(_forget_option(evaluate))
    _run_options(evaluate)

    sweep = command(
        "sweep",
        "Draw and measure every method at every guidance scale, a row of DIR/sweep.jsonl each.\n\n"
        "Rows that are there are not made again.  Killed and started again, the sweep leaves the\n"
        "table that an undisturbed one leaves, and several processes change no byte of it.",
        "\n--dataset mnist --forget 0 1 2 3 --each --num-images 10240 --batch-size 1024\n"
        "--rules dng --tracker log-odds --hyperparameters own --temperature 0.1 "
        "--guidance-scale 1 2",
    )
    _data_options(sweep)
    group = _forget_option(sweep)
    _each_option(group)
    _network_options(group)
    _judge_options(group)
    _rule_options(sweep, several=True)
    _chain_options(sweep)
    sweep.add_argument(
        "--keep-images",
        action="store_true",
        help="keep all images, so that --num-images can be raised; else the first 16",
    )
    _shipped_option(sweep)
    _run_options(sweep)
    _plan_option(sweep)

    tune = command(
        "tune",
        "Choose the best setting of every method at one forbidden share, and measure it anew.\n\n"
        "NP, SLD and contrastive CFG choose among intervals of guidance, gates, thresholds,\n"
        "slopes and contrasts, by the product of both Frechet distances of a few images\n"
        "(DIR/tuning.jsonl).  What was chosen is measured with another seed and all images\n"
        "(DIR/sweep.jsonl), so that being the best of many flatters nobody.  DNG has nothing to\n"
        "choose but the scales that enclose the share.  Resumes as 'sweep' does.",
        "--shipped --forget 0 1 8 --each\n--dataset mnist --forget 0 --rules np dng-calibrated",
    )
    _data_options(tune)
    group = _forget_option(tune)
    _each_option(group)
    _network_options(group)
    _judge_options(group)
    group = tune.add_argument_group("choice")
    _methods_option(group, TUNED)
    _safety_option(group, 0.01)
    group.add_argument(
        "--tuning-images",
        type=int,
        default=256,
        metavar="N",
        help="images of a setting that is chosen from, with the seed after --seed "
        "(default: %(default)s)",
    )
    _chain_options(tune)
    _shipped_option(tune)
    _plan_option(tune)
    _run_options(tune)

    plot = command(
        "plot",
        "Draw everything that the folder of a run has data for, into DIR/figures: curves of KL\n"
        "and Frechet distance over the forbidden share, histograms, grids, trajectories,\n"
        "reliability; and print the comparison at one forbidden share.",
        "--out runs/digits\n--data benchmarks/results/class_removal_digits --shipped --safety 0.01",
    )
    _safety_option(plot, 0.005)
    plot.add_argument(
        "--data",
        type=Path,
        nargs="+",
        metavar="DIR",
        help="folders of the runs that are drawn together, if --out is only for the figures "
        "(default: --out)",
    )
    plot.add_argument(
        "--shipped", action="store_true", help="draw the calibrations that come with the package"
    )
    options.add(plot, Config, "dataset", help="names the folder where --out does not")
    plot.add_argument("--out", type=Path, metavar="DIR", help="folder of the run")
    _common_options(plot)

    convert = command(
        "convert",
        "Turn a published class network, {'net': state_dict} with keys all_modules.N..., into a\n"
        "folder that UNet2DModel.from_pretrained reads.  Only weights are loaded, no code.",
        "airplane.pt --out runs/cifar10/networks/class-airplane",
        needs="CHECKPOINT.pt --out DIR ",
    )
    convert.add_argument(
        "checkpoint", type=Path, metavar="CHECKPOINT.pt", help="the published file"
    )
    convert.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder of the network"
    )
    convert.add_argument(
        "--image-size", type=int, default=32, metavar="PIXELS", help="(default: %(default)s)"
    )
    convert.add_argument(
        "--entry",
        default="net",
        metavar="NAME",
        help="of the checkpoint that holds the weights (default: %(default)s)",
    )
    _common_options(convert)
    return parser


def _each_option(group: Any) -> None:
    group.add_argument(
        "--each",
        action="store_true",
        help="forget each of the classes on its own, one after the other, instead of all at once",
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status.

    Parameters
    ----------
    arguments : sequence of str, optional
        Words after the program's name.  Default: those of this process.
    """
    return command_line.run(PROGRAM, make_parser(), "dng_models.class_removal.commands", arguments)


if __name__ == "__main__":
    sys.exit(main())
