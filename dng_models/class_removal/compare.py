"""Comparison of the methods of a sweep: tables, and distances at an equal forbidden share.

A row is a dictionary with two entries that matter here: ``config``, in which ``forget``, ``rule``,
``guidance_scale``, ``networks`` and, for DNG, ``tracker`` and ``hyperparameters`` identify a point
of a curve, and ``metrics``, what :mod:`dng_models.class_removal.evaluation` measured on its images.
A method is everything in the configuration except the scale, the class, the seed and the numbers of
images; where two methods would have the same name, the name says what they differ in.

Two values have no finite logarithm, and neither may be dropped, since they belong to the safest and
the worst points of a sweep.  A forbidden share of 0 in n images counts as half an image.  The KL
divergence from the ideal is infinite when a remembered class is empty; it is replaced by the
divergence with half a count added to every class.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dng_math import checks
from dng_models.class_removal.config import LATER, Config
from dng_models.support import foreign
from dng_models.support.printable import plain

__all__ = [
    "at_equal_safety",
    "csv_table",
    "lead_table",
    "leads",
    "read_rows",
    "read_tables",
    "safety_table",
    "table",
    "tuning_table",
    "weakest_safe",
]

Row = Mapping[str, Any]
Quantity = Literal["kl", "frechet", "frechet_pixels"]
QUANTITIES: tuple[Quantity, ...] = ("kl", "frechet", "frechet_pixels")
DISTANCES = ("KL (nats)", "Fréchet, features", "Fréchet, pixels")

NAMES = {
    "none": "unguided",
    "np": "NP",
    "sld": "SLD",
    "ccfg": "CCFG",
    "perp-neg": "Perp-Neg",
    "cfg": "CFG",
    "cg": "CG",
    "fbg": "FBG",
    "geoguide": "GeoGuide",
    "cfg++": "CFG++",
    "spell": "SPELL",
}
# Fields of a configuration: AMOUNT and the scale are not part of the method, only DNG reads
# TRACKER, and NUMBERS override the values of the paper, of a calibration or of the tracker itself.
AMOUNT = {"forget", "seed", "num_images", "batch_size"}
NUMBERS = ("prior", "temperature", "offset", "offset_nats", "p_min", "p_max", "track_lo")
TRACKER = {"tracker", "tracker_variance", "hyperparameters", "calibration", "probes", *NUMBERS}
SETTINGS = {
    "paper": "paper settings",
    "calibrated": "calibrated",
    "calibrated-constant": "one temperature",
    "own": "own settings",
}
UNSCALED = ("none", "fbg")  # rules that read no scale


@dataclass(frozen=True)
class Measured:
    """A value with its 95% interval; ``infinite`` if it stands for an infinite divergence."""

    value: float
    low: float
    high: float
    infinite: bool = False


def measured(row: Row, quantity: Quantity) -> Measured | None:
    """A distance of a row with its interval, or None if it was not measured."""
    value = _number(row, quantity)
    infinite = quantity == "kl" and value is None
    if infinite:
        value = _number(row, "kl_smoothed")
    if value is None:
        return None
    low, high = _number(row, f"{quantity}_low"), _number(row, f"{quantity}_high")
    return Measured(value, value if low is None else low, value if high is None else high, infinite)


def _number(row: Row, name: str) -> float | None:
    """A metric of a row, or None if it is missing or not finite."""
    value = row["metrics"].get(name)
    return None if value is None or not math.isfinite(value) else float(value)


def forbidden_share(row: Row) -> Measured:
    """The forbidden share of a row with its interval; half an image if no image is forbidden."""
    metrics = row["metrics"]
    value = metrics["safety"] or 0.5 / metrics["num_images"]
    return Measured(value, metrics["safety_low"], metrics["safety_high"])


def none_forbidden(row: Row) -> bool:
    """Whether no image of the row is forbidden."""
    return bool(row["metrics"]["safety"] == 0)


BASES = {"good": "", "unsure": "unsure", "bad": "NOT GOOD ENOUGH", "unchecked": "not checked"}


def base_verdict(row: Row) -> str:
    """The verdict of :mod:`dng_models.class_removal.base` on the base, in words for a table.

    Empty if the base is good enough to be guided, or the row is older than the check.
    """
    told = row.get("base")
    verdict = told.get("verdict") if isinstance(told, Mapping) else None
    return BASES.get(verdict, "") if isinstance(verdict, str) else ""


def base_is_bad(row: Row) -> bool:
    """Whether the base is known not to be good enough to be guided."""
    return base_verdict(row) == BASES["bad"]


def forgotten_by(row: Row) -> str:
    """The forgotten classes, as one name."""
    return ", ".join(row["config"]["forget"])


def scale_of(row: Row) -> float:
    """The guidance scale, 0 for a rule without one; of SPELL the radius."""
    config = row["config"]
    return 0.0 if config["rule"] in UNSCALED else float(config[_scale_field(config)])


def _scale_field(config: Mapping[str, Any]) -> str:
    return "radius" if config["rule"] == "spell" else "guidance_scale"


def _fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a configuration that belong to its method."""
    skipped = AMOUNT | {_scale_field(config)}
    if config["rule"] != "dng":
        skipped |= TRACKER
    return {name: value for name, value in config.items() if name not in skipped}


def _given(config: Mapping[str, Any], name: str) -> bool:
    """Whether a setting has a number that is not its default."""
    return config.get(name) not in (None, LATER.get(name))


def _base_name(config: Mapping[str, Any]) -> str:
    rule = config["rule"]
    parts = [NAMES.get(rule, rule)]
    if rule == "dng":
        given = [f"{_words(n)} {config[n]:g}" for n in NUMBERS if _given(config, n)]
        settings = config.get("hyperparameters", "paper")
        named = {"log-odds": "DNG log-odds", "path": "DNG path"}
        parts = [named.get(str(config.get("tracker")), "DNG")]
        if settings != "own" or not given:
            parts.append(SETTINGS.get(settings, settings))
        parts += given
        if config.get("calibration") is not None:
            parts.append(f"as fitted for {config['calibration']}")
    if _given(config, "negative") and rule not in UNSCALED:
        parts[0] += " from images"
    if config.get("networks") == "conditional":
        parts.append("conditional network")
    if _given(config, "solver"):
        parts.append("DPM-Solver++ 2M")
    elif _given(config, "eta"):
        parts.append("DDIM" if config["eta"] == 0 else f"eta {config['eta']:g}")
    return ", ".join(parts)


def _words(name: str) -> str:
    return name.replace("_", " ")


def chosen_settings(config: Mapping[str, Any]) -> str:
    """What a tuning changed from the defaults, in words; empty if nothing."""
    defaults = {field.name: field.default for field in dataclasses.fields(Config)}
    changed = {
        name: config[name]
        for name in ("gate", "threshold", "slope", "contrast", "bandwidth")
        if name in config and config[name] != defaults[name]
    }
    if config["rule"] == "spell":
        changed["g"] = config["guidance_scale"]
    parts = [f"{name} {_plain(value)}" for name, value in changed.items()]
    low, high = config.get("t_lo", 0.0), config.get("t_hi", 1.0)
    if (low, high) != (0.0, 1.0):
        parts.append(f"t/T {low:g} to {high:g}")
    return ", ".join(parts)


@dataclass(frozen=True)
class Method:
    """A method by name, with its rows of all classes."""

    name: str
    rows: tuple[Row, ...]

    def of(self, forget: str) -> list[Row]:
        """The rows of a forgotten class, in order of guidance scale."""
        return sorted((row for row in self.rows if forgotten_by(row) == forget), key=scale_of)

    @property
    def rule(self) -> str:
        """The name of the guidance rule."""
        return str(self.rows[0]["config"]["rule"])

    def at(self, row: Row) -> str:
        """The name with the guidance scale of a row, for a figure."""
        name = plain(self.name)
        letter = "r" if self.rule == "spell" else "g"
        return name if self.rule in UNSCALED else f"{name}, ${letter}={scale_of(row):g}$"


def methods_of(rows: Sequence[Row]) -> list[Method]:
    """The rows grouped by method, every method with a unique name."""
    by_base: dict[str, list[Row]] = {}
    for row in rows:
        by_base.setdefault(_base_name(row["config"]), []).append(row)
    named: dict[str, list[Row]] = {}
    for base, members in by_base.items():
        varying = _varying(members)
        for row in members:
            parts = [f"{_words(name)} {_plain(row['config'].get(name))}" for name in varying]
            named.setdefault(", ".join([base, *parts]), []).append(row)
    methods = [Method(name, tuple(members)) for name, members in named.items()]
    rank = {rule: place for place, rule in enumerate([*NAMES, "dng"])}
    return sorted(methods, key=lambda method: rank.get(method.rule, len(rank)))


def _varying(rows: Iterable[Row]) -> list[str]:
    """The fields of the method in which rows of one base name and one class differ."""
    seen: dict[tuple[str, str], set[str]] = {}
    for row in rows:
        for name, value in _fields(row["config"]).items():
            seen.setdefault((forgotten_by(row), name), set()).add(json.dumps(value, sort_keys=True))
    return sorted({name for (_, name), values in seen.items() if len(values) > 1})


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, (int, float)) else str(value)


def classes_forgotten(rows: Iterable[Row]) -> list[str]:
    """The forgotten classes of the rows, sorted, without repetition."""
    return sorted({forgotten_by(row) for row in rows})


def checked(rows: Sequence[Row]) -> list[Row]:
    """The rows as a list; raises ValueError if there is none, or one is no row of a sweep."""
    for place, row in enumerate(rows):
        problem = _problem(row)
        if problem:
            raise ValueError(f"rows[{place}] {problem}")
    if not rows:
        raise ValueError("rows must hold at least one row of a sweep's table, got none")
    return list(rows)


def _problem(row: Any) -> str | None:
    """What is wrong with a row of the table, or None."""
    needed = {
        "config": ("rule", "forget", "guidance_scale"),
        "metrics": ("num_images", "safety", "safety_low", "safety_high"),
    }
    if not isinstance(row, Mapping) or not all(isinstance(row.get(p), Mapping) for p in needed):
        return f"must be an object with the objects 'config' and 'metrics', got {row!r:.80}"
    for part, names in needed.items():
        for name in names:
            if row[part].get(name) is None:
                return f"must have {name!r} in its {part!r}, which has {', '.join(row[part])}"
    config, metrics = row["config"], row["metrics"]
    forget = config["forget"]
    if not isinstance(forget, list | tuple) or not all(isinstance(each, str) for each in forget):
        return f"must have names of classes in 'forget', got {foreign.shown(forget)}"
    if not isinstance(config["rule"], str) or not _is_number(config["guidance_scale"]):
        told = foreign.shown((config["rule"], config["guidance_scale"]))
        return f"must have a text as 'rule' and a number as 'guidance_scale', got {told}"
    for name, value in metrics.items():
        values = value if name == "histogram" and isinstance(value, list) else [value]
        if not all(each is None or _is_number(each) for each in values):
            return f"must have numbers in its 'metrics', got {name} = {foreign.shown(value)}"
    if not metrics["num_images"] > 0:
        return f"must have a positive 'num_images', got {metrics['num_images']}"
    return None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def read_rows(path: Path | str) -> list[dict[str, Any]]:
    """Read the rows of a sweep's table.

    Parameters
    ----------
    path : Path or str
        A file with a JSON object on each line.  Empty lines are skipped, and so is a last line that
        a killed writer left unfinished.

    Returns
    -------
    list of dict
        In the order of the file.

    Raises
    ------
    OSError
        If there is no such file, or it cannot be read.
    ValueError
        If a line is not a row (the message gives its number), or there is no row.
    """
    path = Path(path)
    rows = []
    *lines, last = foreign.read_text(path).split("\n")
    for number, line in enumerate([*lines, last], start=1):
        if not line.strip():
            continue
        try:
            row = foreign.parse_json(line, f"{path}, line {number},", "remove it", finite=True)
        except ValueError:
            if number > len(lines):
                break
            raise
        problem = _problem(row)
        if problem:
            raise ValueError(f"{path}, line {number}, {problem}")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} must hold at least one row, got an empty table")
    return rows


def read_tables(folders: Sequence[Path | str], name: str) -> list[dict[str, Any]]:
    """Read the rows of one table of several runs, of which each setting counts once.

    Parameters
    ----------
    folders : sequence of Path or str
        The runs; of a setting that several have, the row of the first is kept.
    name : str
        Name of the table in each folder.

    Raises
    ------
    OSError, ValueError
        As for :func:`read_rows`.
    """
    rows: list[dict[str, Any]] = []
    for folder in folders:
        known = {row.get("key") for row in rows} - {None}
        rows += [r for r in read_rows(Path(folder) / name) if r.get("key") not in known]
    return rows


def at_equal_safety(rows: Sequence[Row], safety: float) -> list[dict[str, Any]]:
    """Every method at one forbidden share, interpolated between its two scales that enclose it.

    With w = log(safety/s_0) / log(s_1/s_0), where s_0 and s_1 are the forbidden shares at
    neighbouring scales g_0 < g_1, a distance is (1 - w) v_0 + w v_1, and the scale likewise.  If
    several pairs enclose the share, the one with the weakest scales is taken.  A share of 0 counts
    as half an image.

    For the interval, each of s_0, s_1, v_0 and v_1 is moved to the ends of its own interval, with
    w kept in [0, 1], and the changes of the result are added in quadrature, upward and downward
    ones separately, as if the errors were independent.  An infinite divergence enters with half a
    count added to every class.

    Parameters
    ----------
    rows : sequence of mapping
        Rows of a sweep's table, of any methods and classes.
    safety : float
        Forbidden share in (0, 1).

    Returns
    -------
    list of dict
        For each forgotten class and each method with a scale: ``forget``, ``method``, ``rule`` and
        ``setting`` (str, :func:`chosen_settings`), ``safety``, and, as floats, ``guidance_scale``
        and ``kl`` (nats), ``frechet`` and ``frechet_pixels``, each with ``_low`` and ``_high``.
        The floats are None where the shares of the method do not enclose ``safety``, or the
        quantity was not measured.

    Raises
    ------
    TypeError, ValueError
        If ``safety`` is not in (0, 1), or a row is invalid.
    """
    rows = checked(rows)
    safety = checks.real("safety", safety, "in (0, 1)", 0.0, 1.0, closed="()")
    methods = methods_of(rows)
    return [
        _at_safety(method, forget, safety)
        for forget in classes_forgotten(rows)
        for method in methods
        if method.rule not in UNSCALED and method.of(forget)
    ]


def _at_safety(method: Method, forget: str, safety: float) -> dict[str, Any]:
    members = method.of(forget)
    found: dict[str, Any] = {"forget": forget, "method": method.name, "rule": method.rule}
    found |= {
        "setting": chosen_settings(members[0]["config"]),
        "safety": safety,
        "guidance_scale": None,
    }
    found |= {f"{q}{end}": None for q in QUANTITIES for end in ("", "_low", "_high")}
    for first, second in itertools.pairwise(members):
        shares = forbidden_share(first), forbidden_share(second)
        if shares[0].value == shares[1].value or not (
            min(s.value for s in shares) <= safety <= max(s.value for s in shares)
        ):
            continue
        weight = _weight(safety, shares[0].value, shares[1].value)
        found["guidance_scale"] = (1.0 - weight) * scale_of(first) + weight * scale_of(second)
        for quantity in QUANTITIES:
            ends = measured(first, quantity), measured(second, quantity)
            if ends[0] is not None and ends[1] is not None:
                values = _interpolated(safety, shares, (ends[0], ends[1]))
                for suffix, value in zip(("", "_low", "_high"), values, strict=True):
                    found[quantity + suffix] = value
        break
    return found


def _weight(safety: float, first: float, second: float) -> float:
    """Weight of the second share, in [0, 1]; if a share is 0, the other has all the weight."""
    if first == 0.0 or second == 0.0:
        return 0.0 if first else 1.0
    if first == second:
        return 0.5
    return min(1.0, max(0.0, math.log(safety / first) / math.log(second / first)))


def _interpolated(
    safety: float, shares: tuple[Measured, Measured], values: tuple[Measured, Measured]
) -> tuple[float, float, float]:
    """A distance at the forbidden share ``safety``, and the ends of its interval."""

    def at(inputs: Sequence[float]) -> float:
        weight = _weight(safety, inputs[0], inputs[1])
        return (1.0 - weight) * inputs[2] + weight * inputs[3]

    inputs = [*shares, *values]
    middle = [item.value for item in inputs]
    value = at(middle)
    down = up = 0.0
    for place, item in enumerate(inputs):
        changes = [
            at([*middle[:place], end, *middle[place + 1 :]]) - value
            for end in (item.low, item.high)
        ]
        down = math.hypot(down, min(0.0, *changes))
        up = math.hypot(up, max(0.0, *changes))
    return value, max(0.0, value - down), value + up


def leads(rows: Sequence[Row], safety: float) -> list[dict[str, Any]]:
    """How many times nearer DNG is than the best other method, at one forbidden share.

    For each quantity separately, the other method is the one with the smallest distance b, so that
    nobody chooses the baseline.  With DNG's distance d the lead is b / d, below 1 where DNG is
    farther.  Its interval adds the errors of log b and log d in quadrature, as if they were
    independent; rows of one seed share their noise, so it is rather too wide.

    Parameters
    ----------
    rows, safety
        As for :func:`at_equal_safety`.

    Returns
    -------
    list of dict
        For each forgotten class and each DNG method that reaches the share: ``forget`` and
        ``method`` (str), ``safety``, and the leads ``kl``, ``frechet`` and ``frechet_pixels``, each
        with ``_low``, ``_high`` and ``_over``, the name of the other method.  A lead is None if no
        other method reaches the share.

    Raises
    ------
    TypeError, ValueError
        As for :func:`at_equal_safety`.
    """
    found = [each for each in at_equal_safety(rows, safety) if each["guidance_scale"] is not None]
    result = []
    for own in (each for each in found if each["rule"] == "dng"):
        others = [o for o in found if o["rule"] != "dng" and o["forget"] == own["forget"]]
        lead: dict[str, Any] = {name: own[name] for name in ("forget", "method", "safety")}
        for quantity in QUANTITIES:
            known = [other for other in others if other[quantity] is not None]
            values: tuple[float | None, ...] = (None, None, None)
            name = None
            if known and own[quantity]:
                best = min(known, key=lambda other: float(other[quantity]))
                values, name = _ratio(best, own, quantity), best["method"]
            for suffix, value in zip(("", "_low", "_high"), values, strict=True):
                lead[quantity + suffix] = value
            lead[f"{quantity}_over"] = name
        result.append(lead)
    return result


def _ratio(
    best: Mapping[str, Any], own: Mapping[str, Any], quantity: Quantity
) -> tuple[float, float, float]:
    """b / d and the ends of its interval; where b_low or d_low is 0, that end is 0 or infinite."""
    (b, b_low, b_high), (d, d_low, d_high) = (
        [float(each[quantity + end]) for end in ("", "_low", "_high")] for each in (best, own)
    )
    down = math.hypot(math.log(b / b_low), math.log(d_high / d)) if b_low else math.inf
    up = math.hypot(math.log(b_high / b), math.log(d / d_low)) if d_low else math.inf
    return b / d, b / d * math.exp(-down), b / d * math.exp(up)


def weakest_safe(rows: Sequence[Row], safety: float = 0.005) -> list[Row]:
    """For every method and class the row with the weakest safe scale, or else the safest row.

    Parameters
    ----------
    rows : sequence of mapping
        Rows of a sweep's table.
    safety : float
        The largest forbidden share that counts as safe, in [0, 1].

    Returns
    -------
    list of mapping
        Ordered by class, then by method; includes the unguided row of each class.

    Raises
    ------
    TypeError, ValueError
        If ``safety`` is not in [0, 1], or a row is invalid.
    """
    rows = checked(rows)
    safety = checks.real("safety", safety, "in [0, 1]", 0.0, 1.0, closed="[]")
    chosen, methods = [], methods_of(rows)
    for forget in classes_forgotten(rows):
        for method in methods:
            members = method.of(forget)
            safe = [row for row in members if row["metrics"]["safety"] <= safety]
            if members:
                chosen.append(
                    safe[0] if safe else min(members, key=lambda row: row["metrics"]["safety"])
                )
    return chosen


def table(rows: Sequence[Row]) -> str:
    """A Markdown table of the rows, with 95% intervals.

    Parameters
    ----------
    rows : sequence of mapping
        Rows of a sweep's table.

    Returns
    -------
    str
        Ordered by class, method and scale (g; of SPELL the radius), with a line feed at the end.
        After an infinite divergence stands the finite one with half a count added to every class.

    Raises
    ------
    ValueError
        If a row is invalid, or there is none.
    """
    rows = checked(rows)
    head = (
        *("forgotten", "method", "g", "images", "forbidden (%)"),
        *(*DISTANCES, "precision", "recall", "base"),
    )
    lines, methods = [], methods_of(rows)
    for forget in classes_forgotten(rows):
        for method in methods:
            for row in method.of(forget):
                metrics = row["metrics"]
                low, high = metrics["safety_low"], metrics["safety_high"]
                lines.append(
                    (
                        forget,
                        method.name,
                        "" if method.rule in UNSCALED else f"{scale_of(row):g}",
                        f"{metrics['num_images']:,}",
                        f"{100 * metrics['safety']:.2f} [{100 * low:.2f}, {100 * high:.2f}]",
                        *(_written(measured(row, quantity)) for quantity in QUANTITIES),
                        *(
                            "" if metrics.get(name) is None else f"{metrics[name]:.3f}"
                            for name in ("precision", "recall")
                        ),
                        base_verdict(row),
                    )
                )
    return _markdown(head, lines)


def csv_table(rows: Sequence[Row]) -> str:
    """The rows as CSV: the columns that name them, then every measured number to six digits.

    Takes the arguments and raises the errors of :func:`table`.  An infinite divergence is an empty
    cell.
    """
    rows = checked(rows)
    numbers = sorted(
        {name for row in rows for name, value in row["metrics"].items() if name != "histogram"}
    )
    counted = max(len(row["metrics"].get("histogram") or ()) for row in rows)
    names = ("dataset", "forget", "method", "setting", "guidance_scale", "steps", "seed")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*names, *numbers, *(f"share_{i}" for i in range(counted))])
    for forget in classes_forgotten(rows):
        for method in methods_of(rows):
            for row in method.of(forget):
                config, metrics = row["config"], row["metrics"]
                own = {name: config.get(name) for name in names}
                own |= {"forget": forget, "method": method.name}
                own |= {"setting": chosen_settings(config)}
                own |= {"guidance_scale": config.get(_scale_field(config))}
                shares = metrics.get("histogram") or ()
                cells = [*own.values(), *(metrics.get(name) for name in numbers), *shares]
                writer.writerow([f"{c:.6g}" if isinstance(c, float) else c for c in cells])
    return text.getvalue()


def safety_table(rows: Sequence[Row], safety: float) -> str:
    """A Markdown table of what :func:`at_equal_safety` returns for the same arguments."""
    head = ("forgotten", "method", "setting", "g", *DISTANCES)
    lines = []
    for found in at_equal_safety(rows, safety):
        scale = (
            "not reached" if found["guidance_scale"] is None else f"{found['guidance_scale']:.3g}"
        )
        names = found["forget"], found["method"], found["setting"]
        lines.append((*names, scale, *(_written(_of(found, each)) for each in QUANTITIES)))
    return _markdown(head, lines, texts=3)


def lead_table(rows: Sequence[Row], safety: float) -> str:
    """A Markdown table of what :func:`leads` returns for the same arguments; "" if it is empty."""
    lines = [
        (
            found["forget"],
            found["method"],
            *(
                ""
                if found[each] is None
                else f"{_written(_of(found, each))} over {found[f'{each}_over']}"
                for each in QUANTITIES
            ),
        )
        for found in leads(rows, safety)
    ]
    return _markdown(("forgotten", "method", *DISTANCES), lines) if lines else ""


def comparison(rows: Sequence[Row], safety: float) -> str:
    """Markdown: all methods at one forbidden share, and DNG's lead over the best other method.

    Takes the arguments and raises the errors of :func:`at_equal_safety`.
    """
    told = (
        f"At {100.0 * safety:g}% forbidden, interpolated between scales, with 95% intervals:\n\n"
        f"{safety_table(rows, safety)}"
    )
    lead = lead_table(rows, safety)
    if lead:
        told += (
            "\nHow many times nearer DNG is than the nearest other method there (below 1: farther)"
            f":\n\n{lead}"
        )
    return told


def tuning_table(rows: Sequence[Row], safety: float) -> str:
    """A Markdown table of the settings that a tuning compared, with the chosen one in bold.

    Parameters
    ----------
    rows : sequence of mapping
        Rows of ``tuning.jsonl`` (:mod:`dng_models.class_removal.tuning`).
    safety : float
        Forbidden share in (0, 1) at which they were compared.

    Returns
    -------
    str
        Ordered by class and method, as the rows are; the chosen setting's row is bold.

    Raises
    ------
    TypeError, ValueError
        As for :func:`at_equal_safety`.
    """
    settings: dict[tuple[str, str], dict[str, list[Row]]] = {}
    for row in checked(rows):
        method = forgotten_by(row), _base_name(row["config"])
        setting = chosen_settings(row["config"])
        settings.setdefault(method, {}).setdefault(setting, []).append(row)
    lines = []
    for method, members in settings.items():
        found = {name: at_equal_safety(each, safety)[0] for name, each in members.items()}
        chosen = min(found, key=lambda name: badness(found[name]))
        for name, at in found.items():
            reached = at["guidance_scale"] is not None
            cells = (
                *method,
                name or "as it is",
                f"{at['guidance_scale']:.3g}" if reached else "not reached, or given up",
                *(f"{at[each]:#.3g}" if reached else "" for each in QUANTITIES[1:]),
            )
            bold = name == chosen and reached
            lines.append(tuple(f"**{cell}**" if bold and cell else cell for cell in cells))
    return _markdown(("forgotten", "method", "setting", "g", *DISTANCES[1:]), lines, texts=3)


def badness(found: Mapping[str, Any]) -> float:
    """The score that tuning minimises: the product of the two Frechet distances.

    The product keeps features or pixels alone from deciding.  Infinite if either distance is None.
    """
    both = found["frechet"], found["frechet_pixels"]
    return math.inf if None in both else float(both[0] * both[1])


def _of(found: Mapping[str, Any], quantity: Quantity) -> Measured | None:
    """A distance of :func:`at_equal_safety` or :func:`leads` with its interval, or None."""
    if found[quantity] is None:
        return None
    return Measured(*(found[quantity + end] for end in ("", "_low", "_high")))


def _written(number: Measured | None) -> str:
    if number is None:
        return ""
    value, low, high = (f"{x:#.3g}".rstrip(".") for x in (number.value, number.low, number.high))
    return f"{'inf; ' if number.infinite else ''}{value} [{low}, {high}]"


def _markdown(head: Sequence[str], lines: Sequence[Sequence[str]], texts: int = 2) -> str:
    """A Markdown table without empty columns; columns after the first ``texts`` align right."""
    kept = [i for i in range(len(head)) if i < 2 or any(line[i] for line in lines)]
    rule = ["---" if i < texts else "---:" for i in range(len(head))]
    return "".join(
        "| " + " | ".join(line[i].replace("|", r"\|") for i in kept) + " |\n"
        for line in (head, rule, *lines)
    )
