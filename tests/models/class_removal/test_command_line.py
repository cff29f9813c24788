"""The command line: what it says, what it refuses, and that it does what it says."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dng_models.class_removal import classifier, commands, plan, train
from dng_models.class_removal.__main__ import main, make_parser
from dng_models.class_removal.classifier import ClassifierConfig, train_classifier
from dng_models.class_removal.config import Config
from dng_models.class_removal.data import load_dataset
from dng_models.class_removal.networks import save_network
from dng_models.support import files
from tests.helpers.tiny_networks import tiny

ROOT = Path(__file__).resolve().parents[3]
COMMANDS = ("run", "train", "calibrate", "sample", "evaluate", "sweep", "tune", "plot", "convert")
FEW = ("--device", "cpu", "--quiet")
SHORT = (*FEW, "--steps", "4", "--num-images", "12", "--batch-size", "12")


@pytest.fixture(scope="module")
def networks(tmp_path_factory) -> Path:
    """Those of a run, untrained but for the classifier."""
    folder = tmp_path_factory.mktemp("run") / "networks"
    save_network(folder / "base", tiny(0))
    save_network(folder / "class-0", tiny(1))
    save_network(folder / "conditional", tiny(2, labels=11))
    save_network(folder / "coloured", tiny(3, channels=3))
    save_network(folder / "large", tiny(4, side=16))
    data = load_dataset("digits")
    train_classifier(data, folder / "classifier", ClassifierConfig(steps=40), progress=False)
    return folder


@pytest.fixture
def out(networks, tmp_path) -> Path:
    """The folder of a new run with those networks."""
    (tmp_path / "networks").symlink_to(networks)
    return tmp_path


def parsers() -> dict[str, argparse.ArgumentParser]:
    """The parser of every command."""
    (commands_,) = make_parser()._subparsers._group_actions
    return commands_.choices


def refused(capsys, *arguments: object) -> str:
    """The one line that a command ends with."""
    assert main([str(each) for each in arguments]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    (line,) = [line for line in told.err.splitlines() if line.startswith("python -m")]
    assert "Traceback" not in told.err
    return line


# ---------------------------------------------------------------------- help


def test_help_answers_at_once_and_without_torch():
    code = (
        "import sys; from dng_models.class_removal.__main__ import make_parser\n"
        "print(make_parser().format_help())\n"
        "print({'torch', 'diffusers', 'transformers', 'datasets'} & sys.modules.keys() or 'light')"
    )
    started = time.perf_counter()
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert time.perf_counter() - started < 5.0  # about 0.2 s where nothing else runs
    assert run.stdout.splitlines()[-1] == "light"
    for command in COMMANDS:
        assert re.search(rf"^  {command} +\w", run.stdout, re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_in_full_lines(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    told = capsys.readouterr().out
    assert "examples:" in told and f"dng_models.class_removal {command}" in told
    examples = told.split("examples:")[1]
    for line in told.replace(examples, "").splitlines():
        assert len(line) <= 100
    # Every option says what it is for.
    assert not re.search(r"^  --[\w-]+( [A-Z_]+)*$\n(?! {10})", told, re.MULTILINE)


def test_the_examples_in_the_help_are_commands():
    parser = make_parser()
    texts = [parser.format_help(), *(each.format_help() for each in parsers().values())]
    pattern = r"^  python -m dng_models.class_removal (.*?)(?: {3,}.*)?$"
    lines = re.findall(pattern, "\n".join(texts), re.MULTILINE)
    assert len(lines) > 15
    for line in lines:
        assert parser.parse_args(line.split()).command == line.split()[0]


def test_every_option_of_a_setting_is_a_field_and_every_field_an_option():
    given = vars(make_parser().parse_args(["sample", "--interval", "0.1", "0.9"]))
    options = {action.dest for action in parsers()["sample"]._actions}
    elsewhere = {"t_lo", "t_hi", "autocast", "classifier", "fid"}
    assert given["interval"] == [0.1, 0.9]
    assert set(Config().to_json()) - elsewhere <= options


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("command", ["train", "run"])
def test_a_precision_that_training_refuses_is_not_offered(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--mixed-precision", "fp16"])
    told = capsys.readouterr().err
    assert "invalid choice: 'fp16'" in told and "bf16" in told


def test_a_class_that_does_not_exist_lists_those_that_do(out, capsys):
    line = refused(capsys, "sweep", "--forget", "12", "--out", out, *FEW)
    assert "class must be one of 0, 1, 2" in line and line.endswith("got '12'")


def test_an_unknown_file_is_refused(out, capsys):
    line = refused(capsys, "sweep", "--dataset", out / "no.parquet", "--out", out, *FEW)
    assert "no.parquet" in line and "no such file" in line


def test_an_unknown_method_is_refused_before_anything_is_loaded(out, capsys, monkeypatch):
    monkeypatch.setattr(commands, "Materials", None)
    line = refused(capsys, "sweep", "--rules", "dgn", "--out", out, *FEW)
    assert "rules must be one of 'none', 'np'" in line and "got 'dgn'" in line


def test_a_value_that_is_not_allowed_is_refused(out, capsys):
    line = refused(capsys, "sample", "--steps", "2000", "--out", out, *FEW)
    assert "steps must be an integer from 1 to 1000, got 2000" in line


def test_a_network_that_is_not_there_says_how_to_train_it(out, capsys):
    line = refused(capsys, "sample", "--forget", "7", "--rule", "np", "--out", out, *SHORT)
    assert "there is no network in" in line and "class-7" in line
    command = line.split("train it with: ")[1].split()
    assert command[:3] == ["python", "-m", "dng_models.class_removal"]
    given = make_parser().parse_args(command[3:])
    assert (given.command, given.forget, given.only) == ("train", ["7"], ["class"])


def test_a_calibration_that_is_not_there_says_how_to_make_it(out, capsys):
    line = refused(capsys, "sample", "--hyperparameters", "calibrated", "--out", out, *SHORT)
    command = line.split("make it with: ")[1].split()
    assert make_parser().parse_args(command[3:]).command == "calibrate"


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ("coloured", "8 x 8 pixels and 3 channels, and those of digits have 8 x 8 pixels and 1"),
        ("large", "16 x 16 pixels and 1 channel, and those of digits have 8 x 8 pixels"),
        ("conditional", "must take no labels, and takes 11"),
    ],
)
def test_a_network_of_other_images_is_refused(out, capsys, network, message):
    base = out / "networks" / network
    line = refused(capsys, "sample", "--rule", "none", "--base", base, "--out", out, *SHORT)
    assert message in line and str(base) in line


def test_a_damaged_network_is_refused_by_name(networks, tmp_path, capsys):
    broken = tmp_path / "broken"
    save_network(broken, tiny(0))
    weights = broken / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    line = refused(capsys, "sample", "--rule", "none", "--base", broken, "--out", tmp_path, *SHORT)
    assert str(broken) in line and "damaged" in line


def test_one_image_is_no_data_set(tmp_path, capsys):
    folder = tmp_path / "data" / "cat"
    folder.mkdir(parents=True)
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(folder / "one.png")
    line = refused(capsys, "sweep", "--dataset", tmp_path / "data", "--out", tmp_path, *FEW)
    assert "must have at least 2" in line


def test_a_device_that_is_not_here_is_refused(out, capsys):
    line = refused(capsys, "sample", "--out", out, "--device", "abacus")
    assert "device must be one that is here, got 'abacus'" in line


def test_a_plot_of_nothing_is_refused(tmp_path, capsys):
    line = refused(capsys, "plot", "--out", tmp_path / "nothing")
    assert "sweep.jsonl" in line


# One's own data


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """A folder of three classes, one of which has a name that no shell and no figure likes."""
    folder = tmp_path_factory.mktemp("own") / "photos"
    rng = np.random.default_rng(0)
    for number, name in enumerate(("cat", "dog $x_$", "owl")):
        (folder / name).mkdir(parents=True)
        for i in range(12):
            pixels = rng.integers(60 * number, 60 * number + 60, (8, 8)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


@pytest.mark.parametrize("command", ["run", "train", "calibrate", "sample", "sweep", "evaluate"])
def test_no_class_of_ones_own_data_is_forgotten_unasked(photos, tmp_path, capsys, command):
    images = [photos / "cat"] if command == "evaluate" else []
    line = refused(capsys, command, *images, "--dataset", photos, "--out", tmp_path / "o", *FEW)
    assert "forget must be given for" in line and "cat, dog $x_$, owl" in line
    assert "--forget cat" in line and not (tmp_path / "o").exists()
    line = refused(
        capsys, command, *images, "--dataset", photos, "--forget", "fox", "--out", tmp_path, *FEW
    )
    assert "class must be one of cat, dog $x_$, owl" in line


def test_a_base_needs_no_forgotten_class(photos, tmp_path, capsys):
    arguments = ["train", "--dataset", photos, "--only", "base", "classifier", "--plan"]
    assert main([str(each) for each in (*arguments, "--out", tmp_path / "o", *FEW)]) == 0
    assert "train base: 4,000 updates" in capsys.readouterr().out


def test_an_unreadable_class_is_not_passed_over(photos, tmp_path, capsys, monkeypatch):
    data = tmp_path / "data"
    shutil.copytree(photos, data)
    asked = "sweep", "--dataset", data, "--forget", "cat", "--out", tmp_path / "o", *FEW
    allowed = os.access
    with monkeypatch.context() as patch:  # these tests may be root's, who may read everything
        patch.setattr(os, "access", lambda at, mode: "3.png" not in str(at) and allowed(at, mode))
        line = refused(capsys, *asked)
        assert "3.png cannot be read (Permission denied)" in line and "would be missing" in line
    (data / "cat" / "link.png").symlink_to(data / "nothing.png")
    assert "link.png cannot be read" in refused(capsys, *asked)
    (data / "cat" / "link.png").unlink()
    (data / "elk").mkdir()
    (data / "elk" / "a.heic").write_bytes(b"another format")
    line = refused(capsys, *asked)
    assert "elk has no image among its 1 files (such as a.heic)" in line


def test_a_plan_is_printed_and_nothing_done(photos, tmp_path, capsys, monkeypatch):
    for module, name in ((train, "seconds_per_update"), (classifier, "seconds_per_update")):
        monkeypatch.setattr(module, name, lambda *_, **__: 0.5)
    monkeypatch.setattr(plan, "seconds_to_fit", lambda *_: 7.0)
    monkeypatch.setattr(plan, "seconds_per_step", lambda *_: 0.25)
    monkeypatch.setattr(plan, "seconds_to_measure", lambda *_: 2.0)
    monkeypatch.setattr(commands, "train_diffusion", None)
    monkeypatch.setattr(commands, "sweep", None)
    out = tmp_path / "o"
    arguments = ["run", "--dataset", photos, "--forget", "owl", "--out", out, "--plan", *FEW]
    assert main(list(map(str, arguments))) == 0
    told = capsys.readouterr().out
    assert "36 images of 8 x 8 in grey, 3 classes" in told and "on cpu" in told
    for part in (
        "train base: 4,000 updates of 64 images",
        "train class-owl: 2,200 updates of 64 images",
        "train classifier: 1,600 updates of 64 images",
        "calibrate owl, pair: 8 held-out images, 2 paths of 100 steps each",
        "draw and measure 1 setting, unguided, pair: 1,024 images of 1000 steps",
        "draw and measure 10 settings, guided, pair: 1,024 images of 1000 steps",
    ):
        assert part in told
    # 7,800 updates, and 11 settings of 16 batches of 1,000 steps, 2 s each to measure.
    total = 7800 * 0.5 + 7.0 + 100 * 0.25 + 11 * (16_000 * 0.25 + 2.0)
    assert f"about {total / 3600:.0f} h" in told.splitlines()[-2]
    assert "shorter: --quick" in told.splitlines()[-1]
    assert "conditional" not in told and not out.exists()
    assert main(list(map(str, [*arguments, "--conditional"]))) == 0
    assert "train conditional: 5,000 updates" in capsys.readouterr().out
    assert main(list(map(str, [*arguments, "--quick"]))) == 0
    told = capsys.readouterr()
    assert "train base: 1,500 updates" in told.out and "64 images of 50 steps" in told.out
    assert told.err.startswith("QUICK RUN: 64 images a setting, 50 steps, networks of 750 and 1500")
    assert "its numbers are no results" in told.err


def test_a_plan_knows_what_is_there(out, capsys):
    arguments = [
        "sweep",
        "--rules",
        "none",
        "np",
        "--guidance-scale",
        "0.5",
        "--out",
        str(out),
        *SHORT,
    ]
    assert main([*arguments, "--plan"]) == 0
    told = capsys.readouterr().out
    assert "draw and measure 1 setting, guided, pair: 12 images of 4 steps" in told
    assert not (out / "sweep.jsonl").exists()
    assert main([*arguments]) == 0
    capsys.readouterr()
    assert main([*arguments, "--plan"]) == 0
    assert "everything is there, nothing is left to do" in capsys.readouterr().out


def test_large_images_are_made_small_for_a_quick_run(tmp_path):
    def fields(side, width=None):
        folder = tmp_path / f"{side}" / "cat"
        folder.mkdir(parents=True)
        Image.new("RGB", (width or side, side)).save(folder / "a.png")
        (tmp_path / f"{side}" / "dog").mkdir()
        Image.new("RGB", (width or side, side)).save(tmp_path / f"{side}" / "dog" / "a.png")
        return commands._quick_fields(Config(dataset=str(folder.parent))).get("image_size")

    assert [fields(8), fields(28), fields(27), fields(32)] == [None, None, 16, 16]
    assert fields(24, width=20) == 16
    given = Config(dataset=str(tmp_path / "32"), image_size=20)
    assert "image_size" not in commands._quick_fields(given)


def test_what_is_given_by_name_is_looked_at_before_anything_is_trained(out, capsys, monkeypatch):
    monkeypatch.setattr(commands, "_train", None)
    new = out / "new"
    for option, value, message in (
        ("--base", out / "networks" / "coloured", "8 x 8 pixels and 3 channels"),
        ("--base", "./nets", "no such file or folder"),
        ("--classifier", "x/y/z", "no such file or folder"),
        ("--classifier", out / "networks" / "base", "classifier"),
    ):
        line = refused(capsys, "run", option, value, "--out", new, *FEW)
        assert message in line
    # A network of another configuration in the folder of one class, after that of the base.
    folder = out / "other" / "networks" / "class-0"
    folder.mkdir(parents=True)
    (folder / "training.json").write_text('{"configuration": {"steps": 3}}')
    line = refused(capsys, "train", "--out", out / "other", *FEW)
    assert "class-0" in line and "is of another configuration" in line


@pytest.mark.slow
def test_a_quick_run_on_ones_own_data_does_all_of_it(photos, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "dog $x_$"
    arguments = ["run", "--quick", "--dataset", str(photos), "--forget", name, "--device", "cpu"]
    assert main([*arguments, "--train-steps", "10", "--steps", "4"]) == 0
    told = capsys.readouterr()
    assert "plan: " in told.err and "QUICK RUN" in told.err and "--conditional" in told.err
    out = tmp_path / "runs" / "photos-quick"
    assert {path.name for path in (out / "networks").iterdir()} == {
        "base",
        "class-dog %24x_%24",
        "classifier",
    }
    assert (out / "table.md").read_text().startswith("QUICK RUN")
    assert {"curves.png", "histogram_dog_x__.png", "grid_dog_x__.png"} <= {
        path.name for path in (out / "figures").iterdir()
    }


def test_debug_shows_where_an_error_comes_from(out):
    with pytest.raises(ValueError, match="steps must be"):
        main(["sample", "--steps", "2000", "--debug", "--out", str(out)])


def test_an_interrupted_command_says_that_it_goes_on(out, capsys, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "sweep", interrupted)
    assert main(["sweep", "--rules", "none", "--out", str(out), *SHORT]) == 130
    told = capsys.readouterr().err
    assert "the same command goes on from here" in told and "Traceback" not in told


# ---------------------------------------------------------------------- what is done


def test_sample_and_evaluate(out, capsys):
    arguments = ["sample", "--rule", "np", "--guidance-scale", "0.5", "--out", str(out), *SHORT]
    assert main([*arguments, "--trajectories", "2"]) == 0
    folder = Path(capsys.readouterr().out.strip())
    assert folder.parent == out / "samples"
    config = Config.from_json(files.read_json(folder / "config.json"))
    assert (config.rule, config.guidance_scale, config.steps, config.key) == (
        "np",
        0.5,
        4,
        folder.name,
    )
    assert len(files.load_tensors(folder / "images.safetensors")[0]["images"]) == 12
    assert files.load_tensors(folder / "trajectories.safetensors")[0]["x"].shape == (4, 2, 1, 8, 8)

    assert main(["evaluate", str(folder), *FEW]) == 0
    metrics = json.loads(capsys.readouterr().out)
    assert metrics == files.read_json(folder / "metrics.json")
    assert metrics["num_images"] == 12 and 0.0 <= metrics["safety"] <= 1.0


def test_evaluate_reads_pictures(out, capsys):
    data = load_dataset("digits")
    pictures = out / "pictures"
    pictures.mkdir()
    for i in range(40):
        pixels = ((data.images[i, 0] + 1.0) * 127.5).round().to(torch.uint8).numpy()
        Image.fromarray(pixels).save(pictures / f"{i}.png")
    assert main(["evaluate", str(pictures), "--forget", "3", "--out", str(out), *FEW]) == 0
    metrics = json.loads(capsys.readouterr().out)
    share = float((data.labels[:40] == 3).float().mean())
    assert metrics["num_images"] == 40 and abs(metrics["safety"] - share) < 0.15
    Image.fromarray(np.zeros((9, 8), np.uint8)).save(pictures / "odd.png")
    line = refused(capsys, "evaluate", pictures, "--out", out, *FEW)
    assert "odd.png has 8 x 9 pixels" in line


def test_evaluate_turns_photographs_and_names_files_that_it_cannot_read(tmp_path):
    pixels = np.zeros((8, 8), np.uint8)
    pixels[:4] = 255
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(pixels).rotate(180).save(tmp_path / "a.jpg", exif=exif, quality=95)
    Image.fromarray(pixels).rotate(180).convert("CMYK").save(
        tmp_path / "b.jpg", exif=exif, quality=95
    )
    images = commands._read_images(tmp_path, (1, 8, 8))
    assert torch.all(images[:, :, :3] > 0.9) and torch.all(images[:, :, 5:] < -0.9)
    assert commands._read_images(tmp_path, (3, 8, 8)).shape == (2, 3, 8, 8)
    (tmp_path / "c.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"c\.png cannot be decoded"):
        commands._read_images(tmp_path, (1, 8, 8))
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(tmp_path / "c.png")
    with pytest.raises(ValueError, match=r"8 bits a channel.*c\.png has mode 'I;16'"):
        commands._read_images(tmp_path, (1, 8, 8))


def test_a_sweep_prints_its_table_and_plot_draws_it(out, capsys):
    arguments = [
        "sweep",
        "--rules",
        "none",
        "np",
        "--guidance-scale",
        "0.5",
        "--forget",
        "0",
        "3",
        "--each",
    ]
    arguments += ["--networks", "conditional", "--out", str(out), *SHORT]
    assert main(arguments) == 0
    told = capsys.readouterr().out
    rows = [json.loads(line) for line in (out / "sweep.jsonl").read_text().splitlines()]
    assert [(row["config"]["forget"], row["config"]["rule"]) for row in rows] == [
        (["0"], "none"),
        (["0"], "np"),
        (["3"], "none"),
        (["3"], "np"),
    ]
    assert len(told.splitlines()) == 6
    assert main(["plot", "--out", str(out)]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("At 0.5% forbidden")
    drawn = [line for line in told if line.startswith(str(out))]
    assert str(out / "figures" / "curves.png") in drawn
    assert all(Path(path).stat().st_size > 0 for path in drawn)


@pytest.mark.slow
def test_a_run_does_all_of_it_and_goes_on_where_it_was(tmp_path, capsys, monkeypatch):
    """With trainings of a few steps, and few settings."""
    plan = [("pair", "none", (0.0,)), ("pair", "np", (0.5,)), ("pair", "dng-calibrated", (2.0,))]
    plan.append(("conditional", "dng-calibrated", (2.0,)))
    monkeypatch.setattr(commands, "FULL", plan)
    monkeypatch.setattr(commands, "PATHS", 1)
    monkeypatch.setattr(commands, "ClassifierConfig", lambda flips: ClassifierConfig(steps=40))
    arguments = ["run", "--train-steps", "20", "--forget", "1", "--out", str(tmp_path), *SHORT]
    assert main(arguments) == 0
    told = capsys.readouterr().out
    networks = {path.name for path in (tmp_path / "networks").iterdir()}
    assert networks == {"base", "class-1", "conditional", "classifier"}
    calibrations = {path.name for path in (tmp_path / "calibration").iterdir()}
    assert calibrations == {"1.json", "1-conditional.json"}
    table = (tmp_path / "sweep.jsonl").read_bytes()
    assert len(table.splitlines()) == len(plan)
    names = {Path(line).name for line in told.splitlines() if line.endswith(".png")}
    assert {"curves.png", "histogram_1.png", "grid_1.png"} <= names
    assert any(name.startswith("trajectories_") for name in names)
    for name in ("train_diffusion", "train_classifier", "collect"):
        monkeypatch.setattr(commands, name, None)
    assert main(arguments) == 0
    assert (tmp_path / "sweep.jsonl").read_bytes() == table


def test_convert_is_the_converter(tmp_path, capsys):
    line = refused(capsys, "convert", tmp_path / "none.pt", "--out", tmp_path / "net")
    assert "none.pt" in line
