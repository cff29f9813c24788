"""Optional packages: which extra to install when one is missing.

This module imports only the standard library, so that it works where nothing else is installed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

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
        Import name, such as ``"sklearn"``.
    extra : str, optional
        An extra of dng-toolkit, for a caller that needs more than this package; default the
        smallest extra that brings it.
    """
    root = package.partition(".")[0]
    extra = extra or EXTRAS.get(root)
    return f"pip install {root}" if extra is None else f"pip install 'dng-toolkit[{extra}]'"


def told(who: str, error: ImportError, extra: str | None = None) -> str:
    """One line that says who needs which package, and how to install it.

    An error that is not about a missing optional package keeps its own message.

    Parameters
    ----------
    who : str
        What cannot run, such as ``"dng_models.sample"``.
    error : ImportError
        The error that was raised.
    extra : str, optional
        As for :func:`cure`.
    """
    root = (error.name or "").partition(".")[0]
    if not isinstance(error, ModuleNotFoundError) or root not in EXTRAS:
        return str(error)
    return f"{who} needs {root}, which is not installed: {cure(root, extra)}"


@contextmanager
def needed_by(who: str) -> Iterator[None]:
    """Give a failed import in this block a message that says how to install the package."""
    try:
        yield
    except ImportError as error:
        root = (error.name or "").partition(".")[0]
        raise ImportError(told(who, error), name=root) from error


def _is_not_about_torchvision(record: logging.LogRecord) -> bool:
    return "requires torchvision (not installed); falling back" not in record.getMessage()


def hush_torchvision() -> None:
    """Hide transformers' message that torchvision is missing, which nothing here uses.

    For command lines only: a user's own program keeps the messages of transformers.  This one
    comes when diffusers is imported, once for each of two image processors.
    """
    logger = logging.getLogger("transformers.utils.import_utils")
    if _is_not_about_torchvision not in logger.filters:
        logger.addFilter(_is_not_about_torchvision)
