"""Networks that nobody trained, and a run that has them."""

from __future__ import annotations

from pathlib import Path

import pytest

from dng_models.class_removal.classifier import ClassifierConfig, train_classifier
from dng_models.class_removal.data import load_dataset
from dng_models.class_removal.materials import Materials
from dng_models.class_removal.networks import save_network
from dng_models.class_removal.run_folder import RunFolder
from tests.helpers.tiny_networks import tiny


@pytest.fixture(scope="session")
def networks(tmp_path_factory) -> Path:
    """The networks of a run, untrained but for the classifier."""
    folder = tmp_path_factory.mktemp("run") / "networks"
    for seed, name in enumerate(("base", "class-0", "class-1")):
        save_network(folder / name, tiny(seed))
    save_network(folder / "conditional", tiny(3, labels=11))
    data = load_dataset("digits")
    train_classifier(data, folder / "classifier", ClassifierConfig(steps=40), progress=False)
    return folder


@pytest.fixture
def materials(networks, tmp_path) -> Materials:
    """Those of a run in a new folder."""
    (tmp_path / "networks").symlink_to(networks)
    return Materials(RunFolder(tmp_path), device="cpu")
