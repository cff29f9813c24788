"""Dynamic Negative Guidance on trained networks: samplers, measurements and experiments.

The public names are loaded on first use, so that a command line that only prints its help does not
pay for torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__all__ = ["Labelled", "Samples", "sample"]

if TYPE_CHECKING:
    from dng_models.sampling import Labelled, Samples, sample
else:
    # Hidden from type checkers, to which a module __getattr__ says that every name exists.
    def __getattr__(name):
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from dng_models import sampling

        return getattr(sampling, name)

    def __dir__():
        return sorted({*globals(), *__all__})
