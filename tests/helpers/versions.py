"""Which versions of other packages are installed, for tests that need newer ones."""

from __future__ import annotations

from importlib.metadata import version

from packaging.version import Version


def before(package: str, limit: str) -> bool:
    """Whether a package's installed version is before a limit, as numbers and not as text."""
    return Version(version(package)) < Version(limit)
