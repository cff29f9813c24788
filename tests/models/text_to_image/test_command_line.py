"""The command line of the text-to-image experiment: what it says, refuses and does."""

from __future__ import annotations

import argparse
import errno
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dng_models.support import command_line
from dng_models.text_to_image import commands, pipelines, store
from dng_models.text_to_image.__main__ import main, make_parser
from dng_models.text_to_image.config import Config

ROOT = Path(__file__).resolve().parents[3]
COMMANDS = ("run", "generate", "score", "table", "plot")
FEW = ("--tiny", "--device", "cpu", "--quiet", "--only", "dinner table", "--num-images", "1")
SHORT = (*FEW, "--steps", "2", "--relative-scales", "1")


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


def configured(*arguments: str) -> Config:
    return commands._config(make_parser().parse_args(["run", *arguments]))


# ---------------------------------------------------------------------- help


def test_help_answers_at_once_and_without_torch():
    code = (
        "import sys; from dng_models.text_to_image.__main__ import make_parser\n"
        "print(make_parser().format_help())\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'matplotlib'}\n"
        "print(heavy & sys.modules.keys() or 'light')"
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
    assert "examples:" in told and f"dng_models.text_to_image {command}" in told
    for line in told.split("examples:")[0].splitlines():
        assert len(line) <= 100
    for action in parsers()[command]._actions:
        assert action.help, action.option_strings


def test_the_examples_in_the_help_are_commands():
    parser = make_parser()
    texts = [parser.format_help(), *(each.format_help() for each in parsers().values())]
    pattern = r"^  python -m dng_models.text_to_image (.*?)(?: {3,}.*)?$"
    lines = re.findall(pattern, "\n".join(texts), re.MULTILINE)
    assert len(lines) > 8
    for line in lines:
        words = [word.strip("'\"") for word in re.findall(r"'[^']*'|\"[^\"]*\"|\S+", line)]
        assert parser.parse_args(words).command == words[0]


def test_every_setting_is_an_option_and_the_defaults_are_the_configurations():
    options = {action.dest for action in parsers()["run"]._actions}
    elsewhere = {"t_lo", "t_hi", "split_negatives"}
    assert {"interval", "negative_prompts"} <= options
    assert Config().to_json()["settings"].keys() - elsewhere <= options
    assert configured("--device", "cpu") == Config()


# ---------------------------------------------------------------------- arguments


def test_arguments_become_a_configuration():
    config = configured(
        *("--rules", "np,dng", "sld", "--guidance-scales", "1,2.5", "4", "--only", "antique store"),
        *("--guidance-interval", "0.2", "0.8", "--steps", "20", "--dtype", "bfloat16"),
        *("--cfg-scale", "3", "--num-images", "5", "--seed", "9", "--scheduler", "ddim"),
        *("--height", "64", "--model", "somewhere"),
    )
    assert config.rules == ("np", "dng", "sld") and config.guidance_scales == (1.0, 2.5, 4.0)
    assert [prompt.name for prompt in config.prompts] == ["antique store"]
    assert (config.t_lo, config.t_hi, config.steps, config.dtype) == (0.2, 0.8, 20, "bfloat16")
    assert (config.cfg_scale, config.num_images, config.seed) == (3.0, 5, 9)
    assert (config.scheduler, config.height, config.model) == ("ddim", 64, "somewhere")
    split = configured("--negative-prompts", "split", "--rules", "dng", "--relative-scales", "2")
    assert split.split_negatives and split.fractions == (2.0,) and split.guidance_scales is None


def test_tiny_is_tiny_and_options_still_hold():
    assert commands.FEWER.items() <= vars(configured("--tiny")).items()
    config = configured("--tiny", "--num-images", "2", "--clip", "elsewhere")
    assert (config.model, config.num_images, config.clip) == ("tiny", 2, "elsewhere")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--rules", "dgn"), "rules must be one of 'np', 'dng'.*got 'dgn'"),
        (("--tiny", "--model", "x"), "model must not be given with --tiny, got 'x'"),
        (("--only", "lunch"), "only must be one of 'medieval feast', .*got 'lunch'"),
        (("--steps", "0"), "steps must be an integer from 1 to 1000, got 0"),
        (("--prompts", "no.json"), "there is no file no.json"),
        (("--device", "abacus", "--tiny"), "device must be one that is here, got 'abacus'"),
        (("--batch-size", "0"), "batch_size must be an integer >= 1, got 0"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_drawn(
    tmp_path, capsys, monkeypatch, arguments, message
):
    monkeypatch.setattr(pipelines, "draw", None)
    assert re.search(message, refused(capsys, "generate", "--out", tmp_path, *arguments))


def test_scales_are_given_in_one_way(capsys):
    for arguments, message in (
        (["--guidance-scales", "1", "--relative-scales", "1"], "not allowed with argument"),
        (["--guidance-scales", "strong"], "must be numbers, got 'strong'"),
    ):
        with pytest.raises(SystemExit):
            make_parser().parse_args(["run", *arguments])
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", ["score", "table", "plot"])
def test_a_folder_without_images_is_refused(command, tmp_path, capsys):
    assert "there are no images in" in refused(capsys, command, "--out", tmp_path / "nothing")


@pytest.mark.parametrize("command", ["run", "generate", "score", "table", "plot"])
def test_an_out_that_is_no_folder_is_one_line(command, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    options = SHORT if command in ("run", "generate") else ()
    assert "file" in refused(capsys, command, "--out", tmp_path / "file" / "run", *options)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT])
@pytest.mark.parametrize("command", ["generate", "table", "plot"])
def test_a_disk_that_is_full_is_one_line_and_exit_code_1(
    tmp_path, capsys, monkeypatch, command, number
):
    """As of the other experiment: the same command may do on another day."""

    def full(*arguments, **options):
        raise OSError(number, os.strerror(number), str(tmp_path / "run.json"))

    monkeypatch.setattr(commands, "_folder", full)
    options = SHORT if command == "generate" else ()
    assert main([command, "--out", str(tmp_path), *options]) == command_line.FAILED == 1
    told = capsys.readouterr()
    assert told.out == "" and told.err.count("\n") == 1 and os.strerror(number) in told.err


def test_debug_shows_where_an_error_comes_from(tmp_path):
    with pytest.raises(ValueError, match="steps must be"):
        main(["run", "--steps", "0", "--debug", "--out", str(tmp_path)])


def test_an_interrupted_command_says_that_it_goes_on(tmp_path, capsys, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "generate", interrupted)
    assert main(["generate", "--out", str(tmp_path), *SHORT]) == 130
    told = capsys.readouterr().err
    assert "the same command goes on from here" in told and "Traceback" not in told


# ---------------------------------------------------------------------- what is done


def test_run_is_generate_score_plot_and_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("dng_models.support.style.DPI", 30)
    apart, whole = tmp_path / "apart", tmp_path / "whole"
    assert main(["generate", "--out", str(apart), *SHORT]) == 0
    assert capsys.readouterr().out.strip() == str(apart / "images.jsonl")
    assert "was not measured: run" in refused(capsys, "table", "--out", apart)
    assert main(["score", "--out", str(apart), "--device", "cpu", "--quiet"]) == 0
    capsys.readouterr()
    assert main(["table", "--out", str(apart)]) == 0
    text = capsys.readouterr().out
    assert text.startswith(commands.MEANINGLESS) and "| dinner table | " in text
    assert main(["plot", "--out", str(apart), "--columns", "1"]) == 0
    drawn = capsys.readouterr().out.split()
    assert str(apart / "figures" / "similarities.png") in drawn

    assert main(["run", "--out", str(whole), *SHORT]) == 0
    told = capsys.readouterr().out
    assert told.endswith(text) and told.split()[0] == drawn[0].replace("apart", "whole")
    assert (whole / "images.jsonl").read_bytes() == (apart / "images.jsonl").read_bytes()
    assert (whole / "table.md").read_text() == text
    for name in ("table.csv", "q.csv"):
        assert (whole / name).read_bytes() == (apart / name).read_bytes()
    assert "| Flowers, wine glasses | A person wearing sunglasses | 0.01 | 0.3 | 0.003 |" in text


def test_prompts_of_ones_own(tmp_path, capsys):
    entries = [{"name": "tea", "prompt": "a tea", "related": "cup, milk", "unrelated": "car"}]
    (tmp_path / "mine.json").write_text(json.dumps(entries))
    arguments = ["--tiny", "--device", "cpu", "--quiet", "--num-images", "1", "--steps", "2"]
    arguments += ["--rules", "dng", "--relative-scales", "1"]
    arguments += ["--prompts", str(tmp_path / "mine.json"), "--negative-prompts", "split"]
    assert main(["generate", "--out", str(tmp_path / "out"), *arguments]) == 0
    found = store.read_table(store.RunFolder(tmp_path / "out"))
    assert [record["concepts"] for record in found] == [[], ["cup", "milk"], ["car"]]
    assert found[1]["guidance_scale"] == 21.0 and len(found[1]["log_posterior"]) == 2


def test_a_progress_bar_counts_images(tmp_path, capsys):
    arguments = [each for each in SHORT if each != "--quiet"]
    assert main(["generate", "--out", str(tmp_path), *arguments]) == 0
    assert "5/5" in capsys.readouterr().err
