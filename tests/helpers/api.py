"""Print docs/api.md: the public names, one line each.

python -m tests.helpers.api > docs/api.md
"""

from __future__ import annotations

import inspect
import re
from importlib import import_module
from typing import Any

HEAD = """# Public names

`from PACKAGE import NAME`; `help(NAME)` has shapes, units, errors and the source of each. What is
not here may change without notice. This page is printed by `python -m tests.helpers.api`.
"""
PACKAGES = ("dng_math", "dng_kernels", "dng_models")
# Public names that no package exports, by module.
MODULES = {
    "dng_math.distances": (
        *("binomial_interval", "forbidden_mass", "frechet_distance"),
        *("kl_categorical", "wasserstein1"),
    ),
    "dng_models.pipelines.mixture_pipelines": ("MixtureDenoiser", "mixture_pipeline"),
    "dng_models.class_removal.calibration": ("calibrate",),
}


def first_line(value: Any) -> str:
    """The first paragraph of an object's docstring, as Markdown for a table cell."""
    paragraph = (inspect.getdoc(value) or "").partition("\n\n")[0]
    plain = re.sub(r":\w+:`~?([^`]*)`", r"`\1`", " ".join(paragraph.split()))
    return plain.replace("|", r"\|").replace("``", "`")


def page() -> str:
    parts = [HEAD]
    for module in (*PACKAGES, *MODULES):
        found = import_module(module)
        names = MODULES.get(module) or [name for name in found.__all__ if name[0] != "_"]
        told = [f"| `{name}` | {first_line(getattr(found, name))} |" for name in names]
        parts.append("\n".join([f"## {module}\n", "| name | |", "|---|---|", *told, ""]))
    return "\n".join(parts)


if __name__ == "__main__":
    print(page(), end="")
