"""The paths of all files of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from dng_math.trackers import TrackerName
from dng_models.class_removal.config import Config, Networks

SHIPPED = Path(__file__).resolve().parent / "checkpoints"


@dataclass(frozen=True)
class RunFolder:
    """The paths of all files of a run.

    Parameters
    ----------
    path : Path
        The folder; it is created when something is written.
    shipped : Path, optional
        Folder of networks that came with the package, used instead of the run's own.
    """

    path: Path
    shipped: Path | None = None

    @property
    def networks(self) -> Path:
        """Folder of the networks: base, class-NAME, conditional, classifier."""
        return self.shipped or self.path / "networks"

    @property
    def table(self) -> Path:
        """File with the rows of the sweeps."""
        return self.path / "sweep.jsonl"

    @property
    def tuning(self) -> Path:
        """File with the rows from which a tuning chose settings."""
        return self.path / "tuning.jsonl"

    @property
    def figures(self) -> Path:
        """Folder of the figures."""
        return self.path / "figures"

    def class_network(self, name: str) -> Path:
        """Folder of the network that was trained on one class."""
        return self.networks / f"class-{_file_name(name)}"

    def calibration(self, name: str, networks: Networks, tracker: TrackerName = "paper") -> Path:
        """File of the calibration for a forgotten class, a kind of networks and a tracker, to read.

        It is the run's own, unless only the shipped networks come with one.
        """
        own = self.own_calibration(name, networks, tracker)
        if self.shipped is not None and not own.is_file():
            shipped = self.shipped / own.relative_to(self.path)
            return shipped if shipped.is_file() else own
        return own

    def own_calibration(
        self, name: str, networks: Networks, tracker: TrackerName = "paper"
    ) -> Path:
        """File that a calibration of this run is written to.

        The paper's and the log-odds tracker share a file.
        """
        suffix = "" if networks == "pair" else f"-{networks}"
        suffix += "-path" if tracker == "path" else ""
        return self.path / "calibration" / f"{_file_name(name)}{suffix}.json"

    def samples(self, config: Config) -> Path:
        """Folder of the kept images of a setting."""
        return self.path / "samples" / config.key

    def work(self, config: Config) -> Path:
        """Folder of the pieces of a setting that is being drawn."""
        return self.path / "work" / config.images_key


def _file_name(name: str) -> str:
    return quote(name, safe=" ")
