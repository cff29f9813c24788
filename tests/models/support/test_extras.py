"""Packages that are not installed: one line with the cure; and no word of torchvision."""

from __future__ import annotations

import logging
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from dng_models.support import extras

ROOT = Path(__file__).resolve().parents[3]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("package", "extra", "command"),
    [
        ("matplotlib.figure", None, "pip install 'dng-toolkit[figures]'"),
        ("torch", None, "pip install 'dng-toolkit[kernels]'"),
        ("torch", "models", "pip install 'dng-toolkit[models]'"),
        ("torch_fidelity", None, "pip install 'dng-toolkit[fid]'"),
        ("jax", None, "pip install jax"),
    ],
)
def test_the_cure_is_a_command(package, extra, command):
    assert extras.cure(package, extra) == command


def test_every_extra_that_is_named_exists():
    assert set(extras.EXTRAS.values()) <= PROJECT["project"]["optional-dependencies"].keys()


def test_only_a_missing_optional_package_gets_a_cure():
    missing = ModuleNotFoundError("No module named 'diffusers'", name="diffusers")
    assert extras.told("it", missing) == (
        "it needs diffusers, which is not installed: pip install 'dng-toolkit[models]'"
    )
    own = ModuleNotFoundError("No module named 'dng_models.x'", name="dng_models.x")
    assert extras.told("it", own) == "No module named 'dng_models.x'"
    old = ImportError("cannot import name 'x' from 'torch'", name="torch")
    assert extras.told("it", old) == "cannot import name 'x' from 'torch'"


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("package", ["torch", "diffusers"])
def test_a_public_name_without_its_package_names_the_cure(package):
    code = f"import sys; sys.modules[{package!r}] = None\n"
    for name in ("apply_guidance", "DNGDDPMPipeline"):
        line = run(f"{code}from dng_models import {name}").stderr.splitlines()[-1]
        assert line == (
            f"ModuleNotFoundError: dng_models.{name} needs {package}, which is not installed: "
            "pip install 'dng-toolkit[models]'"
        )


@pytest.mark.parametrize("program", ["class_removal", "text_to_image"])
def test_a_command_without_its_packages_is_one_line(program, tmp_path):
    code = "import sys; sys.modules['torch'] = None\n"
    code += f"from dng_models.{program}.__main__ import main\n"
    code += f"sys.exit(main(['run', '--quiet', '--out', {str(tmp_path)!r}]))"
    found = run(code)
    (line,) = found.stderr.splitlines()
    assert found.returncode == 2 and line.startswith(f"python -m dng_models.{program}: error: ")
    assert "needs torch" in line and "pip install 'dng-toolkit[models]'" in line


def test_only_the_lines_about_torchvision_are_left_out(caplog):
    logger = logging.getLogger("transformers.utils.import_utils")
    extras.hush_torchvision()
    extras.hush_torchvision()
    try:
        with caplog.at_level(logging.WARNING, logger=logger.name):
            logger.propagate = True
            logger.warning(
                "`CLIPImageProcessor` requires torchvision (not installed); falling back"
            )
            logger.warning("something else")
        assert [record.message for record in caplog.records] == ["something else"]
        assert logger.filters.count(extras._is_not_about_torchvision) == 1
    finally:
        logger.removeFilter(extras._is_not_about_torchvision)


@pytest.mark.slow
def test_what_a_command_loads_says_nothing_of_torchvision():
    code = "from dng_models.support.command_line import what_is_said\n"
    code += "with what_is_said(quiet=True):\n    from diffusers import StableDiffusionPipeline"
    found = run(code)
    assert found.returncode == 0 and "torchvision" not in found.stderr


def test_every_package_of_the_wheel_is_typed():
    wheel = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel == {"packages": ["dng_math", "dng_kernels", "dng_models"]}
    for package in wheel["packages"]:
        assert (ROOT / package / "py.typed").is_file()
