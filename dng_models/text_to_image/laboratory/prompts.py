"""The experiment's prompts in the laboratory's world, after the paper's five."""

from __future__ import annotations

from dng_models.text_to_image.prompts import Prompt

# With the negative composed with the prompt, the prior is the share of unguided images that have
# it, no offset is needed, and a scale of 1 is exact but for the tracker's error.
_COMPOSED = {"prior": 0.7, "temperature": 1.0, "offset": 0.0, "np_scale": 1.0, "dng_scale": 2.0}

LABORATORY: tuple[Prompt, ...] = tuple(
    Prompt(name, f"{article} {name}", related, unrelated, **_COMPOSED)
    for article, name, related, unrelated in (
        ("a", "medieval feast", "chalice, candle", "football"),
        ("a", "dinner table", "flower, wine glass", "sunglasses"),
        ("an", "art workshop", "paintbrush, canvas", "bicycle"),
        ("an", "antique store", "lamp, book", "toothbrush"),
        ("an", "english breakfast", "egg, sausage", "skyline"),
    )
)
