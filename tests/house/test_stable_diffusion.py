"""docs/stable_diffusion.md: its table is printed, and its commands are what they say."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from dng_models.text_to_image import paper_runs
from dng_models.text_to_image.__main__ import main, make_parser
from dng_models.text_to_image.commands import _config
from dng_models.text_to_image.config import PAPER_MODEL

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "stable_diffusion.md").read_text(encoding="utf-8")


def test_the_table_is_printed(capsys):
    assert main(["paper"]) == 0
    command = "<!-- python -m dng_models.text_to_image paper -->\n"
    assert PAGE.partition(command)[2].partition("\n\n")[0] == capsys.readouterr().out.rstrip("\n")


@pytest.mark.parametrize("run", paper_runs.RUNS, ids=lambda run: run.words or "all")
def test_the_words_of_a_command_are_its_settings(run):
    words = ["run", "--model", PAPER_MODEL, "--device", "cpu", *shlex.split(run.words)]
    assert _config(make_parser().parse_args(words)) == paper_runs.config_of(run)


def test_the_size_of_the_network_is_that_of_stable_diffusion_2():
    with torch.device("meta"):
        net = UNet2DConditionModel(
            sample_size=paper_runs.LATENTS,
            cross_attention_dim=1024,
            attention_head_dim=(5, 10, 20, 20),
            use_linear_projection=True,
        )
    assert sum(p.numel() for p in net.parameters()) == paper_runs.PARAMETERS
