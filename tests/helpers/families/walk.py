"""Every pipeline class that the installed diffusers exports."""

from __future__ import annotations

import diffusers


def pipeline_classes() -> dict[str, type]:
    """Pipeline classes by name, without those that need a package that is not installed."""
    found = {}
    for name in sorted(dir(diffusers)):
        try:
            kind = getattr(diffusers, name)
        except (ImportError, RuntimeError):
            continue
        if isinstance(kind, type) and issubclass(kind, diffusers.DiffusionPipeline):
            found[name] = kind
    return found
