"""The prompts of the experiment, their negatives and their hyperparameters.

Each positive prompt has two negatives.  The related one names things that belong in the image and
shall be removed; the unrelated one names things that would not be in it anyway, so that an ideal
rule leaves the image unchanged.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dng_math import checks
from dng_models.support import foreign

TEXTS = ("name", "prompt", "related", "unrelated")
SHARES = ("related_share", "unrelated_share")


@dataclass(frozen=True)
class Prompt:
    """A positive prompt with its two negatives and the hyperparameters of its guidance.

    Parameters
    ----------
    name : str
        Short name, for tables, figures and files.
    prompt, related, unrelated : str
        The positive prompt and its two negatives; commas in a negative separate its concepts.
    prior, temperature, offset : float
        Settings of DNG's tracker (arXiv 2410.14398, Eq. 12) for a negative that stands alone, for
        steps as the paper takes them.
    np_scale, dng_scale : float
        Guidance scales at which negative prompting and DNG change images about equally; the
        default sweep uses fractions of them.
    offset_nats : float
        Offset of the tracker over the whole run, for any number of steps; added to ``offset``.
    related_share, unrelated_share : float, optional
        Shares of the unguided images that have what the negatives name: priors of a negative that
        is composed with the prompt, or compared with the empty one.  None: to be measured.
    composed_scale : float
        Guidance scale of DNG with such a negative, which needs neither temperature nor offset.

    Raises
    ------
    ValueError, TypeError
        If a field is not allowed; the message names it, its value and what is allowed.
    """

    name: str
    prompt: str
    related: str
    unrelated: str
    prior: float = 0.01
    temperature: float = 0.2
    offset: float = 0.003
    np_scale: float = 2.55
    dng_scale: float = 21.0
    offset_nats: float = 0.0
    related_share: float | None = None
    unrelated_share: float | None = None
    composed_scale: float = 2.0

    def __post_init__(self) -> None:
        for field in TEXTS:
            text = getattr(self, field)
            if not isinstance(text, str):
                raise TypeError(f"{field} must be a text, got {text!r}")
            if not text.strip():
                raise ValueError(f"{field} must be a text that is not empty, got {text!r}")
            try:
                text.encode()
            except UnicodeEncodeError:
                raise ValueError(
                    f"{field} must be text that UTF-8 can hold (no half of a surrogate pair), got "
                    f"{text!r}"
                ) from None
        if self.name.count("$") > 1:
            raise ValueError(
                f"name must not have more than one $, between which figures would read a formula; "
                f"got {self.name!r}"
            )
        for field in ("related", "unrelated"):
            if not split(getattr(self, field)):
                raise ValueError(
                    f"{field} must name at least one concept, got {getattr(self, field)!r}"
                )
        numbers = {
            "prior": checks.real("prior", self.prior, "in (0, 1)", 0.0, 1.0, closed="()"),
            "temperature": checks.non_negative("temperature", self.temperature),
            "offset": checks.finite("offset", self.offset),
            "np_scale": checks.positive("np_scale", self.np_scale),
            "dng_scale": checks.positive("dng_scale", self.dng_scale),
            "offset_nats": checks.finite("offset_nats", self.offset_nats),
            "composed_scale": checks.positive("composed_scale", self.composed_scale),
        }
        for field in SHARES:
            share = getattr(self, field)
            if share is not None:
                numbers[field] = checks.real(field, share, "in (0, 1)", 0.0, 1.0, closed="()")
        for field, number in numbers.items():
            object.__setattr__(self, field, number)

    def negative(self, kind: str) -> str:
        """The negative prompt of a kind, "related" or "unrelated"; a ValueError for another."""
        checks.choice("kind", kind, ("related", "unrelated"))
        return self.related if kind == "related" else self.unrelated

    def share(self, kind: str) -> float | None:
        """The share of unguided images that have what a negative names; None if not known."""
        checks.choice("kind", kind, ("related", "unrelated"))
        return self.related_share if kind == "related" else self.unrelated_share


def split(negative: str) -> tuple[str, ...]:
    """Split a negative prompt at its commas into concepts."""
    return tuple(part for each in negative.split(",") if (part := each.strip()))


# The prompts of Koulischer et al. (ICLR 2025), for Stable Diffusion 2.
PAPER: tuple[Prompt, ...] = (
    Prompt(
        name="medieval feast",
        prompt="A grand medieval feast set in a great hall, filled with long tables covered in "
        "bountiful platters of food, goblets, and flickering light, with knights and nobles "
        "enjoying the lavish spread.",
        related="Chalices, candles",
        unrelated="Kids playing football",
        prior=0.01,
        temperature=0.2,
        offset=0.004,
        np_scale=3.4,
        dng_scale=27.0,
    ),
    Prompt(
        name="dinner table",
        prompt="A beautifully set dinner table, with elegant arrangements, a variety of enticing "
        "dishes, and delicate decor that speaks to the sophistication of the meal.",
        related="Flowers, wine glasses",
        unrelated="A person wearing sunglasses",
        prior=0.01,
        temperature=0.3,
        offset=0.003,
        np_scale=1.7,
        dng_scale=12.0,
    ),
    Prompt(
        name="art workshop",
        prompt="An inspiring art workshop filled with creativity, featuring a wide range of tools "
        "and materials used by participants working on their individual projects.",
        related="Paintbrush, canvases",
        unrelated="A bicycle in the rain",
        prior=0.01,
        temperature=0.2,
        offset=0.002,
        np_scale=1.7,
        dng_scale=27.0,
    ),
    Prompt(
        name="antique store",
        prompt="A charming antique store with shelves and tables filled with unique and historical "
        "treasures, offering a glimpse into the past.",
        related="Lamps, old books",
        unrelated="An electric toothbrush",
        prior=0.01,
        temperature=0.2,
        offset=0.004,
        np_scale=2.55,
        dng_scale=21.0,
    ),
    Prompt(
        name="English breakfast",
        prompt="A classic British breakfast, featuring a diverse selection of cooked delights, "
        "perfect for a filling and flavorful start to the day.",
        related="Egg, sausage",
        unrelated="The view of a skyline",
        prior=0.01,
        temperature=0.3,
        offset=0.003,
        np_scale=3.4,
        dng_scale=18.0,
    ),
)


def load(
    source: str | Path, named: Mapping[str, tuple[Prompt, ...]] | None = None
) -> tuple[Prompt, ...]:
    """Load the paper's prompts, others that have a name, or those of a file.

    Parameters
    ----------
    source : str or Path
        "paper", another name, or a JSON file with a list of objects that have the fields of
        :class:`Prompt`: ``name``, ``prompt``, ``related`` and ``unrelated``; the numbers may be
        left out.

    named : mapping, optional
        Prompts by the other names.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError, TypeError
        If the file does not hold such a list; the message names the entry and the field.
    """
    names = {"paper": PAPER, **(named or {})}
    known = ", ".join(map(repr, names))
    if not isinstance(source, str | Path) or source == "":
        raise TypeError(f"prompts must be {known} or a JSON file of prompts, got {source!r}")
    if source in names:
        return names[str(source)]
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(
            f"prompts must be {known} or a JSON file of prompts, and there is no file {source}"
        )
    try:
        entries = foreign.read_json(path, "mend what is wrong there")
    except ValueError as error:
        raise ValueError(f"prompts must be a JSON file, and {error}") from None
    if not isinstance(entries, list) or not entries:
        raise ValueError(
            f"{path} must hold a list of at least one prompt, as [{{'name': ..., 'prompt': ..., "
            "'related': ..., 'unrelated': ...}], got "
            f"{'an empty list' if entries == [] else type(entries).__name__}"
        )
    prompts = tuple(from_json(entry, f"{path}, prompt {i}") for i, entry in enumerate(entries, 1))
    check_names(prompts)
    return prompts


def from_json(entry: Any, where: str) -> Prompt:
    """Make a prompt from its JSON object.

    Parameters
    ----------
    entry : mapping
        The fields of :class:`Prompt`.
    where : str
        Where the object is, for messages.

    Raises
    ------
    TypeError, ValueError
        If a field is unknown, missing or not allowed.
    """
    if not isinstance(entry, Mapping):
        raise TypeError(f"{where}: must be an object, got {foreign.shown(entry)}")
    fields = [field.name for field in dataclasses.fields(Prompt)]
    unknown = sorted(entry.keys() - set(fields))
    missing = [field for field in TEXTS if field not in entry]
    if unknown:
        raise ValueError(
            f"{where}: there is no field {', '.join(map(repr, unknown))}; fields are "
            f"{', '.join(fields)}"
        )
    if missing:
        raise ValueError(f"{where}: {', '.join(missing)} must be given")
    try:
        return Prompt(**entry)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{where}: {error}") from None


def check_names(prompts: Sequence[Prompt]) -> None:
    """Raise a ValueError if the files of two prompts would have the same name."""
    seen: dict[str, str] = {}
    for prompt in prompts:
        key = file_name(prompt.name)
        if key in seen:
            raise ValueError(
                f"name must be another for each prompt, got {seen[key]!r} and {prompt.name!r}"
            )
        seen[key] = prompt.name


def file_name(name: str) -> str:
    """Turn a prompt's name into the name of a folder: lower case, words joined by hyphens."""
    kept = "".join(c if c.isalnum() else " " for c in name.lower())
    return "-".join(kept.split()) or "prompt"
