"""The experiment's prompts in the laboratory's world, after the paper's five."""

from __future__ import annotations

from dng_models.text_to_image.prompts import Prompt

# A negative that stands alone needs an offset, and these settings were the best of a few
# (docs/choosing.md).  With the negative composed with the prompt, the prior is the share of
# unguided images that have it, and a scale of 1 is exact but for the tracker's error.
_ALONE = {"prior": 0.25, "temperature": 1.0, "offset": 0.0, "offset_nats": 3.0, "dng_scale": 6.0}
_COMPOSED = {"related_share": 0.7, "unrelated_share": 0.012, "composed_scale": 2.0}

LABORATORY: tuple[Prompt, ...] = tuple(
    Prompt(name, f"{article} {name}", related, unrelated, np_scale=1.0, **_ALONE, **_COMPOSED)
    for article, name, related, unrelated in (
        ("a", "medieval feast", "chalice, candle", "football"),
        ("a", "dinner table", "flower, wine glass", "sunglasses"),
        ("an", "art workshop", "paintbrush, canvas", "bicycle"),
        ("an", "antique store", "lamp, book", "toothbrush"),
        ("an", "english breakfast", "egg, sausage", "skyline"),
    )
)
