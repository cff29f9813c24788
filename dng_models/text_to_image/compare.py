"""Results of a run as tables: prompts, similarities, Q and detections.

The functions take records, the lines of ``images.jsonl``; torch is not needed.
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
from dng_models.support.metrics import Estimate
from dng_models.text_to_image.config import IDEAL, JUDGE, KINDS, METHODS, UNGUIDED, Kind
from dng_models.text_to_image.paper_q import Selectivity, selectivity
from dng_models.text_to_image.prompts import Prompt, split

Array = NDArray[np.float64]
Record = Mapping[str, Any]
FEW_RULES = 3  # with more, tables have a row for each rule
PRESENT = 0.5  # lowest probability at which a concept counts as found

# The paper's printed Q (Eq. 23): mean and standard deviation over its five prompts.  Its values for
# single prompts are left out, because its tables number the prompts differently.
PAPER_Q: dict[str, tuple[float, float]] = {"np": (0.007, 0.014), "dng": (0.052, 0.022)}


@dataclass(frozen=True, eq=False)
class Cell:
    """The N images of one prompt, rule, negative and guidance scale.

    Attributes
    ----------
    prompt, rule, kind : str
        Name of the prompt, name of the rule, and kind of the negative.
    guidance_scale : float
    records : tuple of mapping
        One record for each image, sorted by image number.
    """

    prompt: str
    rule: str
    kind: Kind
    guidance_scale: float
    records: tuple[Record, ...]

    @property
    def images(self) -> tuple[int, ...]:
        """Numbers of the images."""
        return tuple(record["image"] for record in self.records)

    def cosines(self, images: Iterable[int] | None = None) -> Array:
        """CLIP cosine of all, or the chosen, images to the unguided ones; shape (N,)."""
        chosen = set(self.images if images is None else images)
        return np.array([r["clip_cosine"] for r in self.records if r["image"] in chosen])

    @property
    def mean_scale(self) -> float:
        """Mean of the dynamic scale over steps and images."""
        return float(np.mean([np.mean(_numbers(record["scale"])) for record in self.records]))


def _numbers(values: Sequence[float | None]) -> Array:
    return np.array([0.0 if value is None else value for value in values])


def cells(records: Iterable[Record]) -> list[Cell]:
    """Group the records by prompt, rule, kind and guidance scale, in order of appearance."""
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
    """Result of a prompt and a rule, at the guidance scales that both negatives have.

    Attributes
    ----------
    prompt, rule : str
    scales : tuple of float
        The S guidance scales, ascending.
    selectivity : Selectivity
        Q, mean gap and ratio, with the mean similarities.
    images : int
        Number of images at each scale.
    """

    prompt: str
    rule: str
    scales: tuple[float, ...]
    selectivity: Selectivity
    images: int


def summaries(records: Iterable[Record]) -> list[Summary]:
    """Q, mean gap and ratio of every prompt and rule, over the images that all scales have.

    Parameters
    ----------
    records : iterable of mapping
        Measured images.

    Returns
    -------
    list of Summary
        Prompts in order of appearance, rules in that of
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
    by = {kind: {c.guidance_scale: c for c in found if c.kind == kind} for kind in KINDS}
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

    Returns
    -------
    Estimate or None
        None if no detector was run.
    """
    shares = [any_found(record, concepts) for record in cell.records]
    if any(share is None for share in shares):
        return None
    hits = sum(bool(share) for share in shares)
    low, high = binomial_interval(hits, len(shares))
    return Estimate(hits / len(shares), float(low), float(high))


def any_found(record: Record, concepts: Sequence[str]) -> bool | None:
    """Whether the detector found at least one of the concepts; None if no detector was run."""
    found = record.get("presence")
    if found is None:
        return None
    return any((found.get(concept) or 0.0) >= PRESENT for concept in concepts)


def would_be_forbidden(
    records: Iterable[Record], prompt: str, concepts: Sequence[str]
) -> tuple[int, ...]:
    """Images of a prompt in which at least one of the concepts is found without guidance.

    Returns
    -------
    tuple of int
        Numbers of the images, ascending; empty if no detector was run.
    """
    return tuple(
        sorted(
            record["image"]
            for record in records
            if (record["prompt"], record["rule"]) == (prompt, UNGUIDED)
            and any_found(record, concepts)
        )
    )


def mean_probability(cell: Cell, concepts: Sequence[str]) -> float | None:
    """Mean probability of the concepts over all images; None if no detector was run."""
    means = []
    for record in cell.records:
        found = record.get("presence")
        if found is None:
            return None
        means.append(np.mean([found.get(concept) or 0.0 for concept in concepts]))
    return float(np.mean(means))


def unguided_of(found: Iterable[Cell]) -> dict[str, Cell]:
    """The cell of the unguided images of each prompt, by the prompt's name."""
    return {cell.prompt: cell for cell in found if cell.rule == UNGUIDED}


# ---------------------------------------------------------------------- the laboratory's truth


def by_the_judge(records: Iterable[Record]) -> bool:
    """Whether the laboratory's judge measured the similarities."""
    return any(record.get("measured_by", {}).get("clip") == JUDGE for record in records)


@dataclass(frozen=True)
class Truth:
    """What the laboratory's judge says of a method at a scale, over N images of all prompts.

    Attributes
    ----------
    rule : str
    guidance_scale : float
    images : int
        N, the number of images of each negative.
    before, still_there : Estimate
        Share of images with something of the related negative: without guidance, and with it.
    others_changed : float
        Under the related negative, the share of cells that changed, of those that showed nothing
        unwanted.
    cells_changed : float
        As that, under the unrelated negative.
    images_changed : Estimate
        Share of images in which one of those cells changed.
    ghosts : float
        Share of all cells, under both negatives, that are no picture of the world.
    """

    rule: str
    guidance_scale: float
    images: int
    before: Estimate
    still_there: Estimate
    others_changed: float
    cells_changed: float
    images_changed: Estimate
    ghosts: float


@dataclass(frozen=True, eq=False)
class _Seen:
    """Of N images with I cells: which show the unwanted, had nothing of it, changed, are ghosts."""

    there: NDArray[np.bool_]
    others: NDArray[np.bool_]
    changed: NDArray[np.bool_]
    ghosts: NDArray[np.bool_]


def truths(records: Sequence[Record]) -> list[Truth]:
    """What the judge says of every method and scale; empty if it did not look at all images.

    Parameters
    ----------
    records : sequence of mapping
        Measured images.

    Returns
    -------
    list of Truth
        Unguided first, then in the order of :data:`dng_models.text_to_image.config.METHODS`.
    """
    if not records or any(record.get("seen") is None for record in records):
        return []
    negatives = {
        (record["prompt"], record["kind"]): split(record["negative"])
        for record in records
        if record["kind"] != "none"
    }
    groups: dict[tuple[str, float], dict[str, list[Record]]] = {}
    for record in records:
        where = groups.setdefault((record["rule"], record["guidance_scale"]), {})
        for kind in KINDS if record["kind"] == "none" else (record["kind"],):
            if (record["prompt"], kind) in negatives:
                where.setdefault(kind, []).append(record)
    order = (UNGUIDED, *METHODS)
    found = []
    for rule, scale in sorted(groups, key=lambda each: (order.index(each[0]), each[1])):
        kinds = groups[rule, scale]
        if kinds.keys() < set(KINDS):
            continue
        related, unrelated = (_seen(kinds[kind], kind, negatives) for kind in KINDS)
        had = [
            bool(set(r["seen"]["before"]) & {*negatives[r["prompt"], KINDS[0]]})
            for r in kinds[KINDS[0]]
        ]
        ghosts = np.concatenate([related.ghosts.ravel(), unrelated.ghosts.ravel()])
        found.append(
            Truth(
                rule,
                scale,
                len(had),
                _share(np.array(had)),
                _share(np.any(related.there, axis=1)),
                float(related.changed.sum() / max(related.others.sum(), 1)),
                float(unrelated.changed.sum() / max(unrelated.others.sum(), 1)),
                _share(np.any(unrelated.changed, axis=1)),
                float(ghosts.mean()),
            )
        )
    return found


def _seen(
    records: Sequence[Record],
    kind: str,
    negatives: Mapping[tuple[str, str], tuple[str, ...]],
) -> _Seen:
    there, others, changed, ghosts = [], [], [], []
    for record in records:
        unwanted = negatives[record["prompt"], kind]
        there.append([cell in unwanted for cell in record["seen"]["cells"]])
        others.append([cell not in unwanted for cell in record["seen"]["before"]])
        changed.append(record["seen"]["changed"])
        ghosts.append(record["seen"]["ghosts"])
    free = np.array(others)
    return _Seen(np.array(there), free, np.array(changed) & free, np.array(ghosts))


def _share(hits: NDArray[Any]) -> Estimate:
    low, high = binomial_interval(int(hits.sum()), len(hits))
    return Estimate(float(hits.mean()), float(low), float(high))


def truth_table(records: Sequence[Record]) -> str:
    """What the laboratory's judge says by method and scale, as Markdown; empty without it."""
    lines = []
    for one in truths(records):
        unguided = one.rule == UNGUIDED
        row = [
            "unguided" if unguided else METHODS[one.rule].label,
            "" if unguided or one.rule == IDEAL else f"{one.guidance_scale:g}",
            _interval(one.still_there, 3),
            fixed(one.others_changed, 3),
            fixed(one.cells_changed, 3),
            _interval(one.images_changed, 3),
            fixed(one.ghosts, 3),
            str(one.images),
        ]
        lines.append(f"| {' | '.join(row)} |")
    if not lines:
        return ""
    header = [
        "| method | scale | related: still there | other cells changed "
        "| unrelated: cells changed | images changed | ghosts | images |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    note = (
        "What the laboratory's judge sees, over all prompts. Related negative: share of images "
        "that still have what it names, and share of the cells without it that changed. Unrelated "
        "negative: share of the cells, and of the images, that changed, though nothing should. "
        "Ghosts: cells that are no picture of the world. With 95% intervals.\n"
    )
    return "\n".join([*header, *lines]) + f"\n\n{note}"


# ---------------------------------------------------------------------- tables


def prompt_table(prompts: Sequence[Prompt]) -> str:
    """The prompts and their hyperparameters as Markdown, like the paper's Table 1."""
    titles = ["prompt", "positive prompt", "related negative", "unrelated negative"]
    fields = ["prior", "temperature", "offset", "np_scale", "dng_scale"]
    fields += ["offset_nats"] if any(each.offset_nats for each in prompts) else []
    if any(each.related_share is not None for each in prompts):
        fields += ["related_share", "unrelated_share", "composed_scale"]
    named = {"np_scale": "NP scale", "dng_scale": "DNG scale"}
    titles += [named.get(field, field.replace("_", " ")) for field in fields]
    lines = [f"| {' | '.join(titles)} |", "|---|---|---|---|" + "---:|" * len(fields)]
    for each in prompts:
        texts = (each.name, each.prompt, each.related, each.unrelated)
        numbers = [getattr(each, field) for field in fields]
        shown = ["" if number is None else f"{number:g}" for number in numbers]
        row = [*map(_in_a_cell, texts), *shown]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def _in_a_cell(text: str) -> str:
    """Put a text on one line and escape the bars, for a cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")


def table(records: Sequence[Record]) -> str:
    """Q, mean gap and ratio by prompt and rule, the paper's Q, and detections, as Markdown.

    Where the laboratory's judge looked, what it saw comes first, and stands for the detections.
    """
    found = summaries(records)
    rules = [rule for rule in METHODS if any(each.rule == rule for each in found)]
    judged = by_the_judge(records)
    lines = _by_rule(found, rules) if len(rules) > FEW_RULES else _by_prompt(found, rules, judged)
    images = sorted({each.images for each in found})
    scales = sorted({len(each.scales) for each in found})
    text = "\n".join(lines) + "\n\n"
    text += (
        "Q, as the paper defines it (Eq. 23): with the line of unrelated against related "
        "similarity to the unguided image, fitted over the scales, its height over the diagonal at "
        "the middle of the related range; – where the scales (one, or all of one similarity) "
        f"define no line. Mean gap: unrelated minus related, mean over {_range(scales)} scales. "
        f"Both of {_range(images)} images a point, with 95% intervals; more is better. Ratio: "
        "change by the unrelated negative for every unit of change by the related one; 0 is best. "
        "Averages with the standard deviation over prompts.\n"
    )
    if judged:
        text += "Similarity is the share of the cells that stayed as they were.\n"
    truth = truth_table(records)
    if truth:
        return f"{truth}\n{text}"
    detections = detection_table(records)
    return text if not detections else f"{text}\n{detections}"


def _by_rule(found: Sequence[Summary], rules: Sequence[str]) -> list[str]:
    """Lines of a table with a row for each rule, and Q of every prompt."""
    prompts = list(dict.fromkeys(each.prompt for each in found))
    titles = ["method", *(f"Q: {_in_a_cell(prompt)}" for prompt in prompts)]
    titles += ["Q: average", "mean gap", "ratio"]
    lines = [f"| {' | '.join(titles)} |", "|---|" + "---:|" * (len(titles) - 1)]
    for rule in rules:
        by = {each.prompt: each.selectivity for each in found if each.rule == rule}
        row = [METHODS[rule].label]
        row += [_interval(by[prompt].q, 3) if prompt in by else "" for prompt in prompts]
        row += _averages(list(by.values()))
        lines.append(f"| {' | '.join(row)} |")
    return lines


def _averages(values: Sequence[Selectivity]) -> list[str]:
    return [
        _spread([one.q.value for one in values], 3),
        _spread([one.gap.value for one in values], 3),
        _spread([one.ratio.value for one in values], 2),
    ]


def _by_prompt(found: Sequence[Summary], rules: Sequence[str], judged: bool) -> list[str]:
    """Lines of a table with a row for each prompt, and all numbers of every rule."""
    lines = [
        "| prompt | "
        + " | ".join(f"{METHODS[r].label}: Q | mean gap | ratio" for r in rules)
        + " |",
        "|---|" + "---:|---:|---:|" * len(rules),
    ]
    by = {(each.prompt, each.rule): each.selectivity for each in found}
    prompts = list(dict.fromkeys(each.prompt for each in found))
    for prompt in prompts:
        row = [_in_a_cell(prompt)]
        for rule in rules:
            one = by.get((prompt, rule))
            row += (
                ["", "", ""]
                if one is None
                else [_interval(one.q, 3), _interval(one.gap, 3), _interval(one.ratio, 2)]
            )
        lines.append(f"| {' | '.join(row)} |")
    averages, printed = ["average"], ["the paper, Stable Diffusion 2"]
    for rule in rules:
        values = [one for (_, name), one in by.items() if name == rule]
        averages += _averages(values)
        paper = PAPER_Q.get(rule)
        printed += ["" if paper is None else f"{paper[0]:.3f} ± {paper[1]:.3f}", "", ""]
    lines.append(f"| {' | '.join(averages)} |")
    if not judged:
        lines.append(f"| {' | '.join(printed)} |")
    return lines


def q_table(records: Sequence[Record]) -> str:
    """Q, mean gap and ratio with their intervals as CSV, one line per prompt and rule."""
    output = io.StringIO()
    estimates = ("q", "gap", "ratio")
    names = ["prompt", "rule", "scales", "images"]
    for name in ("q", "mean_gap", "ratio"):
        names += [name, f"{name}_low", f"{name}_high"]
    writer = csv.writer(output, lineterminator="\n")
    writer.writerow([*names, "slope", "intercept", "q_of_the_paper"])
    for one in summaries(records):
        result = one.selectivity
        numbers = [end for name in estimates for end in getattr(result, name)]
        paper = PAPER_Q.get(one.rule, (math.nan,))[0]
        writer.writerow(
            [
                *(one.prompt, one.rule, " ".join(f"{scale:g}" for scale in one.scales), one.images),
                *(_or_nothing(each) for each in (*numbers, result.slope, result.intercept, paper)),
            ]
        )
    return output.getvalue()


def _or_nothing(value: float) -> str:
    return f"{value:.6g}" if math.isfinite(value) else ""


def detection_table(records: Sequence[Record]) -> str:
    """How often each negative's concepts are found at each rule's largest scale, as Markdown."""
    found = cells(records)
    unguided = unguided_of(found)
    lines = []
    for prompt in dict.fromkeys(cell.prompt for cell in found):
        for rule in METHODS:
            row = [_in_a_cell(prompt), METHODS[rule].label]
            for kind in KINDS:
                of = [c for c in found if (c.prompt, c.rule, c.kind) == (prompt, rule, kind)]
                last = max(of, key=lambda cell: cell.guidance_scale, default=None)
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
                    row.insert(2, f"{last.guidance_scale:g}")
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
        "mean similarity to the unguided image.\n"
    )
    return "\n".join([*header, *lines]) + f"\n\n{note}" if lines else ""


def csv_table(records: Sequence[Record]) -> str:
    """All measurements as CSV, one line per prompt, rule, negative and guidance scale."""
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
            "guidance_scale": cell.guidance_scale,
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
    """Format a number with a fixed number of decimals, and zero without a minus sign."""
    return f"{round(value, digits) + 0.0:.{digits}f}"


def _spread(values: Sequence[float], digits: int) -> str:
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return "–"
    mean = fixed(float(np.mean(finite)), digits)
    return mean if len(finite) < 2 else f"{mean} ± {np.std(finite, ddof=1):.{digits}f}"


def _range(values: Sequence[int]) -> str:
    return f"{values[0]}" if len(values) == 1 else f"{values[0]} to {values[-1]}"
