"""What a run came to: similarities, Q and detections of every prompt and rule, as tables.

It reads records, the lines of ``images.jsonl``, and loads no torch.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dng_math.distances import binomial_interval
from dng_models.metrics import Estimate, Selectivity, selectivity
from dng_models.text_to_image.config import KINDS, METHODS, UNGUIDED, Kind
from dng_models.text_to_image.prompts import split

Array = NDArray[np.float64]
Record = Mapping[str, Any]
PRESENT = 0.5  # from this probability on a concept counts as found

# Q as the paper prints it: mean and standard deviation over its five prompts.  Its values for
# single prompts are left out, for it numbers the prompts differently from table to table.
PAPER_Q: dict[str, tuple[float, float]] = {"np": (0.007, 0.014), "dng": (0.052, 0.022)}


@dataclass(frozen=True, eq=False)
class Cell:
    """The images of one prompt, rule, negative and scale; N of them.

    Attributes
    ----------
    prompt, rule, kind : str
    scale : float
    records : tuple of mapping
        In the order of the images.
    """

    prompt: str
    rule: str
    kind: Kind
    scale: float
    records: tuple[Record, ...]

    @property
    def images(self) -> tuple[int, ...]:
        """Their numbers."""
        return tuple(record["image"] for record in self.records)

    def cosines(self, images: Iterable[int] | None = None) -> Array:
        """CLIP similarity to the unguided images, of all or some of the images."""
        chosen = set(self.images if images is None else images)
        return np.array([r["clip_cosine"] for r in self.records if r["image"] in chosen])

    @property
    def mean_scale(self) -> float:
        """Of the dynamic scale, over steps and images."""
        return float(np.mean([np.mean(_numbers(record["scale"])) for record in self.records]))


def _numbers(values: Sequence[float | None]) -> Array:
    return np.array([0.0 if value is None else value for value in values])


def cells(records: Iterable[Record]) -> list[Cell]:
    """The records by what they are of, in the order that they come in."""
    found: dict[tuple[str, str, Kind, float], list[Record]] = {}
    for record in records:
        key = (record["prompt"], record["rule"], record["kind"], record["guidance_scale"])
        found.setdefault(key, []).append(record)
    return [
        Cell(prompt, rule, kind, scale, tuple(sorted(group, key=lambda each: int(each["image"]))))
        for (prompt, rule, kind, scale), group in found.items()
    ]


@dataclass(frozen=True, eq=False)
class Summary:
    """A prompt and a rule: what both negatives did at the scales that both have.

    Attributes
    ----------
    prompt, rule : str
    scales : tuple of float
        S of them.
    selectivity : Selectivity
        With the mean similarities.
    images : int
    """

    prompt: str
    rule: str
    scales: tuple[float, ...]
    selectivity: Selectivity
    images: int


def summaries(records: Iterable[Record]) -> list[Summary]:
    """Q of every prompt and rule, of the images that all their points have.

    Prompts in the order that they come in, rules in that of
    :data:`dng_models.text_to_image.config.METHODS`.

    Raises
    ------
    ValueError
        If an image was not measured, or no prompt and rule has both negatives at one scale.
    """
    found = cells(records)
    for cell in found:
        for record in cell.records:
            if record.get("clip_cosine") is None:
                raise ValueError(
                    f"the image {record['file']} was not measured: run "
                    "'python -m dng_models.text_to_image score' on the folder"
                )
    result = []
    for prompt in dict.fromkeys(cell.prompt for cell in found):
        for rule in METHODS:
            of = [cell for cell in found if (cell.prompt, cell.rule) == (prompt, rule)]
            summary = _summary(prompt, rule, of)
            if summary is not None:
                result.append(summary)
    if not result:
        raise ValueError(
            "no prompt has images with its related and its unrelated negative at one scale"
        )
    return result


def _summary(prompt: str, rule: str, found: Sequence[Cell]) -> Summary | None:
    by = {kind: {c.scale: c for c in found if c.kind == kind} for kind in KINDS}
    scales = sorted(by["related"].keys() & by["unrelated"].keys())
    chosen = [by[kind][scale] for kind in KINDS for scale in scales]
    if not chosen:
        return None
    images = set(chosen[0].images).intersection(*(cell.images for cell in chosen))
    if not images:
        return None
    related, unrelated = (
        np.array([by[kind][scale].cosines(images) for scale in scales]) for kind in KINDS
    )
    return Summary(
        prompt=prompt,
        rule=rule,
        scales=tuple(scales),
        selectivity=selectivity(related, unrelated),
        images=len(images),
    )


# ---------------------------------------------------------------------- detections


def presence(cell: Cell, concepts: Sequence[str]) -> Estimate | None:
    """Share of the images in which at least one of the concepts is found, with its interval.

    None where nothing was looked for.
    """
    shares = [_any_found(record, concepts) for record in cell.records]
    if any(share is None for share in shares):
        return None
    hits = sum(bool(share) for share in shares)
    low, high = binomial_interval(hits, len(shares))
    return Estimate(hits / len(shares), float(low), float(high))


def _any_found(record: Record, concepts: Sequence[str]) -> bool | None:
    found = record.get("presence")
    if found is None:
        return None
    return any((found.get(concept) or 0.0) >= PRESENT for concept in concepts)


def mean_probability(cell: Cell, concepts: Sequence[str]) -> float | None:
    """Mean over the images of the mean probability of the concepts; None where there is none."""
    means = []
    for record in cell.records:
        found = record.get("presence")
        if found is None:
            return None
        means.append(np.mean([found.get(concept) or 0.0 for concept in concepts]))
    return float(np.mean(means))


def unguided_of(found: Iterable[Cell]) -> dict[str, Cell]:
    """The unguided images of each prompt."""
    return {cell.prompt: cell for cell in found if cell.rule == UNGUIDED}


# ---------------------------------------------------------------------- tables


def table(records: Sequence[Record]) -> str:
    """Q by prompt and rule, as in the paper, with what it prints; then the detections; Markdown."""
    found = summaries(records)
    rules = [rule for rule in METHODS if any(each.rule == rule for each in found)]
    lines = [
        "| prompt | " + " | ".join(f"{METHODS[r].label}: Q | ratio" for r in rules) + " |",
        "|---|" + "---:|---:|" * len(rules),
    ]
    by = {(each.prompt, each.rule): each.selectivity for each in found}
    prompts = list(dict.fromkeys(each.prompt for each in found))
    for prompt in prompts:
        row = [prompt]
        for rule in rules:
            one = by.get((prompt, rule))
            row += ["", ""] if one is None else [_interval(one.q, 3), _interval(one.ratio, 2)]
        lines.append(f"| {' | '.join(row)} |")
    averages, printed = ["average"], ["the paper, Stable Diffusion 2"]
    for rule in rules:
        values = [one for (_, name), one in by.items() if name == rule]
        averages += [
            _spread([one.q.value for one in values], 3),
            _spread([one.ratio.value for one in values], 2),
        ]
        paper = PAPER_Q.get(rule)
        printed += ["" if paper is None else f"{paper[0]:.3f} ± {paper[1]:.3f}", ""]
    lines += [f"| {' | '.join(averages)} |", f"| {' | '.join(printed)} |"]
    images = sorted({each.images for each in found})
    scales = sorted({len(each.scales) for each in found})
    text = "\n".join(lines) + "\n\n"
    text += (
        f"Q: CLIP similarity to the unguided image, unrelated minus related negative, mean over "
        f"{_range(scales)} scales and {_range(images)} images a point, with its 95% interval; "
        "more is better. Ratio: change by the unrelated negative for every unit of change by the "
        "related one; 0 is best. Averages with the standard deviation over prompts.\n"
    )
    detections = detection_table(records)
    return text if not detections else f"{text}\n{detections}"


def detection_table(records: Sequence[Record]) -> str:
    """At the largest scale of each rule: are the concepts of the negative gone?  Markdown."""
    found = cells(records)
    unguided = unguided_of(found)
    lines = []
    for prompt in dict.fromkeys(cell.prompt for cell in found):
        for rule in METHODS:
            row = [prompt, METHODS[rule].label]
            for kind in KINDS:
                of = [c for c in found if (c.prompt, c.rule, c.kind) == (prompt, rule, kind)]
                last = max(of, key=lambda cell: cell.scale, default=None)
                if last is None or prompt not in unguided:
                    row += ["", ""]
                    continue
                concepts = split(last.records[0]["negative"])
                ends = [presence(unguided[prompt], concepts), presence(last, concepts)]
                if ends[0] is None or ends[1] is None:
                    return ""
                row += [
                    f"{100 * ends[0].value:.0f}% → {100 * ends[1].value:.0f}% "
                    f"[{100 * ends[1].low:.0f}, {100 * ends[1].high:.0f}]",
                    f"{float(np.mean(last.cosines())):.3f}",
                ]
                if kind == "related":
                    row.insert(2, f"{last.scale:g}")
            if any(row[2:]):
                lines.append(f"| {' | '.join(row)} |")
    header = [
        "| prompt | rule | scale | related concepts found | similarity "
        "| unrelated concepts found | similarity |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    note = (
        "Share of the images in which the detector finds at least one concept of the negative "
        "prompt, without guidance and at the largest scale, with its 95% interval; similarity: "
        "mean CLIP cosine to the unguided image.\n"
    )
    return "\n".join([*header, *lines]) + f"\n\n{note}" if lines else ""


def csv_table(records: Sequence[Record]) -> str:
    """A line for every prompt, rule, negative and scale."""
    found = cells(records)
    unguided = unguided_of(found)
    output = io.StringIO()
    names = [
        *("prompt", "rule", "negative", "guidance_scale", "images", "clip_cosine"),
        *("clip_cosine_error", "mean_scale", "present", "present_low", "present_high"),
        *("present_unguided", "probability", "probability_unguided", "not_finite"),
    ]
    writer = csv.DictWriter(output, names, lineterminator="\n")
    writer.writeheader()
    for cell in found:
        if cell.rule == UNGUIDED:
            continue
        cosines = cell.cosines()
        error = float(np.std(cosines, ddof=1) / math.sqrt(len(cosines))) if len(cosines) > 1 else 0
        concepts = split(cell.records[0]["negative"])
        now = presence(cell, concepts)
        before = presence(unguided[cell.prompt], concepts) if cell.prompt in unguided else None
        row: dict[str, Any] = {
            "prompt": cell.prompt,
            "rule": cell.rule,
            "negative": cell.kind,
            "guidance_scale": cell.scale,
            "images": len(cell.records),
            "clip_cosine": float(np.mean(cosines)),
            "clip_cosine_error": error,
            "mean_scale": cell.mean_scale,
            "not_finite": sum(not record["finite"] for record in cell.records),
        }
        if now is not None:
            row |= {"present": now.value, "present_low": now.low, "present_high": now.high}
            row["probability"] = mean_probability(cell, concepts)
        if before is not None:
            row["present_unguided"] = before.value
            row["probability_unguided"] = mean_probability(unguided[cell.prompt], concepts)
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
    return output.getvalue()


def _interval(found: Estimate, digits: int) -> str:
    if not math.isfinite(found.value):
        return "–"
    value, low, high = (fixed(number, digits) for number in found)
    return f"{value} [{low}, {high}]"


def fixed(value: float, digits: int) -> str:
    """With so many digits, and no minus before nothing but zeros."""
    return f"{round(value, digits) + 0.0:.{digits}f}"


def _spread(values: Sequence[float], digits: int) -> str:
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return "–"
    mean = fixed(float(np.mean(finite)), digits)
    return mean if len(finite) < 2 else f"{mean} ± {np.std(finite, ddof=1):.{digits}f}"


def _range(values: Sequence[int]) -> str:
    return f"{values[0]}" if len(values) == 1 else f"{values[0]} to {values[-1]}"
