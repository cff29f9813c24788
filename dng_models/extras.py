"""Packages that not everybody has: what to install where one is missing, and what they say.

Only the standard library is imported, so that it can be asked where nothing else is there.
"""

from __future__ import annotations

import logging

# The smallest extra that brings a package (import names on the left).
EXTRAS = {
    "matplotlib": "figures",
    "sklearn": "figures",
    "tqdm": "figures",
    "torch": "kernels",
    "triton": "kernels",
    "accelerate": "models",
    "datasets": "models",
    "diffusers": "models",
    "huggingface_hub": "models",
    "PIL": "models",
    "pyarrow": "models",
    "safetensors": "models",
    "torchmetrics": "models",
    "transformers": "models",
    "torch_fidelity": "fid",
}


def cure(package: str, extra: str | None = None) -> str:
    """The command that installs a package, by its name in an import.

    Parameters
    ----------
    package : str
        Such as ``"sklearn"``.
    extra : str, optional
        Of dng-toolkit, where what needs the package needs more than it; default the smallest one
        that brings it.
    """
    root = package.partition(".")[0]
    extra = extra or EXTRAS.get(root)
    return f"pip install {root}" if extra is None else f"pip install 'dng-toolkit[{extra}]'"


def told(who: str, error: ImportError, extra: str | None = None) -> str:
    """One line: who needs which package, and how to get it.

    An error that is not about a missing optional package keeps its own words.

    Parameters
    ----------
    who : str
        What cannot run, such as ``"dng_models.sample"``.
    error : ImportError
        That it ended with.
    extra : str, optional
        As for :func:`cure`.
    """
    root = (error.name or "").partition(".")[0]
    if not isinstance(error, ModuleNotFoundError) or root not in EXTRAS:
        return str(error)
    return f"{who} needs {root}, which is not installed: {cure(root, extra)}"


def _is_not_about_torchvision(record: logging.LogRecord) -> bool:
    return "requires torchvision (not installed); falling back" not in record.getMessage()


def hush_torchvision() -> None:
    """Leave out that transformers found no torchvision, which nothing here uses.

    For command lines only: a user's own program keeps what transformers says to it.  The message
    comes when diffusers is imported, once for each of two image processors.
    """
    logger = logging.getLogger("transformers.utils.import_utils")
    if _is_not_about_torchvision not in logger.filters:
        logger.addFilter(_is_not_about_torchvision)
