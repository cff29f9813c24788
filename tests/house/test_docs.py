"""The documents point to what exists: sections, tests, functions, files and headings.

Formulas are kept to what GitHub's Markdown leaves alone: it reads a page as Markdown first, which
takes backslashes before punctuation, underscores after it, and lists and quotes at the start of a
line for its own.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent
while not (ROOT / "pyproject.toml").exists():
    ROOT = ROOT.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
THEORY = ROOT / "docs" / "theory.md"
CODE = [
    path
    for folder in ("dng_math", "dng_kernels", "dng_models", "benchmarks", "figures", "tests")
    for path in sorted((ROOT / folder).rglob("*.py"))
]

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def prose(text: str) -> str:
    """The page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def headings(text: str) -> list[str]:
    return re.findall(r"^#+ (.*)$", prose(text), flags=re.MULTILINE)


def anchors(text: str) -> set[str]:
    """What a heading is linked by: lower case, no punctuation, hyphens; repeated ones numbered."""
    found: set[str] = set()
    for heading in headings(text):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        anchor = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        name, repeated = anchor, 0
        while name in found:
            repeated += 1
            name = f"{anchor}-{repeated}"
        found.add(name)
    return found


def broken_links(page: Path) -> list[str]:
    """Relative links of a page, those to images too, that lead to nothing."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page.read_text(encoding="utf-8"))):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if re.match(r"[a-z]+:", link):
            continue
        if not target.exists():
            broken.append(link)
        elif anchor and anchor not in anchors(target.read_text(encoding="utf-8")):
            broken.append(link)
    return broken


def sections(text: str) -> set[str]:
    """Numbers of the sections of a page."""
    return {number for heading in headings(text) for number in re.findall(r"^[\d.]*\d", heading)}


def wrong_sections(text: str, known: set[str]) -> list[str]:
    """References to sections that docs/theory.md does not have, or in another form than this one:

    docs/theory.md, section 4.2, or sections 4.1 and 4.2, on one line or on two.
    """
    flat = re.sub(r"\s+", " ", re.sub(r"\n\s*#", "\n", text))
    wrong = []
    for following in re.findall(r"docs/theory\.md(.{0,60})", flat):
        told = re.match(r",? sections? (\d[\d.]*)((?:,? and |, )\d[\d.]*)*", following)
        if told is not None:
            numbers = re.findall(r"\d+(?:\.\d+)*", told.group())
            wrong += [number for number in numbers if number not in known]
        elif re.match(r"\W*(section|§|\d)", following):
            wrong.append(f"docs/theory.md{following}")
    wrong += re.findall(r"\btheory \d[\d.]*", flat)
    return wrong


HAZARDS = (
    r"\\[!-/:-@\[-`{-~]",  # a backslash before punctuation is an escape
    r"(?<![\w\\])_|\*",  # an underscore after punctuation, or a star, is emphasis
    r"[<>&~]|\\operatorname",  # tags, entities, strikes; a macro that GitHub refuses
    r"^\s*([-+#]|\d+[.)])(\s|$)|^\s*$",  # lists, headings and paragraphs at the start of a line
)


def misread(text: str) -> list[str]:
    """What GitHub's Markdown would take for its own in the formulas of a page."""
    bare = re.sub(r"`[^`\n]*`", "``", prose(text))
    displayed = re.findall(r"\$\$\n?(.*?)\n?\$\$", bare, flags=re.DOTALL)
    found = [f for f in displayed if any(re.search(h, f, re.MULTILINE) for h in HAZARDS)]
    bare = re.sub(r"\$\$.*?\$\$", "", bare, flags=re.DOTALL)
    for match in re.finditer(r"\$(.*?)\$", bare, flags=re.DOTALL):
        formula, before, after = match.group(1), bare[: match.start()], bare[match.end() :]
        apart = re.search(r"(^|[\s(])$", before[-1:]) and re.search(r"^([\s.,:;!?)]|$)", after[:1])
        in_table = before[before.rfind("\n") + 1 :].startswith("|")
        if (
            not apart
            or formula != formula.strip()
            or "\n" in formula
            or ("|" in formula and in_table)
            or any(re.search(hazard, formula) for hazard in HAZARDS)
        ):
            found.append(formula)
    return found


def functions(path: Path, prefix: str = "") -> set[str]:
    """Names of the functions that a file defines."""
    source = path.read_text(encoding="utf-8")
    return set(re.findall(rf"^ *def ({prefix}\w+)\(", source, flags=re.MULTILINE))


@each_page
def test_links_lead_somewhere(page):
    assert broken_links(page) == []


@each_page
def test_formulas_are_left_alone_by_markdown(page):
    assert misread(page.read_text(encoding="utf-8")) == []


def test_code_cites_sections_that_exist():
    known = sections(THEORY.read_text(encoding="utf-8"))
    assert {"1", "6.11"} <= known
    this = Path(__file__).resolve()
    wrong = {
        str(path.relative_to(ROOT)): found
        for path in CODE
        if path != this and (found := wrong_sections(path.read_text(encoding="utf-8"), known))
    }
    assert wrong == {}


def test_the_theory_cites_its_own_sections():
    text = THEORY.read_text(encoding="utf-8")
    told = set(re.findall(r"[Ss]ections? (\d[\d.]*\d|\d)", text))
    told |= set(re.findall(r"[Ss]ections [\d.]+ and (\d[\d.]*\d|\d)", text))
    assert told and told <= sections(text) | {"2"}  # "DNG section 2" is the paper's


@each_page
def test_tests_that_are_named_exist(page):
    known = {name for path in CODE for name in functions(path, "test_")}
    text = page.read_text(encoding="utf-8")
    assert set(re.findall(r"`(test_\w+)`", text)) <= known


def missing_files(text: str) -> list[str]:
    """Paths in code style that do not exist: files by their ending, folders by their slash."""
    told = re.findall(r"`([\w.*/-]+(?:\.(?:py|md|toml|txt)|/))`", prose(text))
    return [name for name in told if not any(_matches(name))]


def _matches(name: str) -> Iterator[Path]:
    """What a path names, from the top of the repository; a file without a folder may be a test."""
    yield from ROOT.glob(name.rstrip("/"))
    if "/" not in name:
        yield from (ROOT / "tests").rglob(name)


def test_files_that_are_named_exist():
    text = (ROOT / "docs" / "development.md").read_text(encoding="utf-8")
    assert "dng_math/equations.py" in text
    assert missing_files(text) == []


def test_missing_files_are_seen():
    text = "`tests/house/test_docs.py` `test_d*s.py` `tests/` "
    text += "`none.py` `dng_math/none.py` `none/` `a.b`"
    assert missing_files(text) == ["none.py", "dng_math/none.py", "none/"]


def test_every_section_with_a_derivation_names_its_test():
    text = THEORY.read_text(encoding="utf-8")
    parts = re.split(r"^(?=###? )", text, flags=re.MULTILINE)
    derived = [part for part in parts if "(derived)" in part]
    assert len(derived) >= 8
    assert [part.splitlines()[0] for part in derived if "`test_" not in part] == []


def test_equations_that_are_named_exist():
    known = functions(ROOT / "dng_math" / "equations.py")
    named = re.findall(r"Code: ((?:`\w+`(?:, )?)+)", THEORY.read_text(encoding="utf-8"))
    told = {name for names in named for name in re.findall(r"\w+", names)}
    assert len(told) > 10
    assert told <= known


def uncited(text: str) -> list[str]:
    """Formulas that are called derived, in words of their own, and name no section.

    "(derived; docs/theory.md, section 6.3)" and "Derived; docs/theory.md, section 6.3." do.
    """
    flat = re.sub(r"\s+", " ", text)
    return re.findall(
        r"\((?:derived)\b(?!; docs/theory\.md, section).{0,20}"
        r"|\bDerived\b(?!; docs/theory\.md, section).{0,20}",
        flat,
    )


def test_what_is_called_derived_names_its_section():
    packages = [path for path in CODE if path.relative_to(ROOT).parts[0].startswith("dng_")]
    texts = {path: path.read_text(encoding="utf-8") for path in packages}
    assert sum("erived; docs/theory.md" in text for text in texts.values()) >= 1
    assert {path.name: found for path, text in texts.items() if (found := uncited(text))} == {}


# ---------------------------------------------------------------- what the checks see


def test_broken_links_are_seen(tmp_path):
    page = tmp_path / "page.md"
    (tmp_path / "other.md").write_text("# A heading, with `code`\n\n# Twice\n# Twice\n")
    good = "[a](other.md) [b](other.md#a-heading-with-code) [c](https://x.y) [d](#here)\n# Here\n"
    page.write_text(good + "[e](other.md#twice-1)\n```\n[f](none.md)\n```\n")
    assert broken_links(page) == []
    page.write_text("[a](none.md) ![b](none.png) [c](other.md#none) [d](#none)\n# Here\n")
    assert len(broken_links(page)) == 4


def test_wrong_sections_are_seen():
    known = {"2", "4.1", "4.2"}
    good = "(docs/theory.md, section 4.2).  docs/theory.md,\n    sections 2 and 4.1; more"
    assert wrong_sections(good, known) == []
    assert wrong_sections("# docs/theory.md, section\n# 4.2: so", known) == []
    assert wrong_sections("docs/theory.md, section 4.3.", known) == ["4.3"]
    assert wrong_sections("docs/theory.md, sections 4.1 and 5", known) == ["5"]
    assert wrong_sections("the page docs/theory.md as a whole", known) == []
    others = (
        "docs/theory.md 4.2",
        "docs/theory.md (section 4.2)",
        "docs/theory.md, § 4.2",
        "theory 4",
    )
    for other in others:
        assert len(wrong_sections(other, known)) == 1


def test_derivations_without_a_section_are_seen():
    assert (
        uncited("(derived;\n    docs/theory.md, section 6.3)  Derived; docs/theory.md, section 1")
        == []
    )
    for bad in ("Several (derived): so", "Derived from that.", "(derived; see docs/theory.md)"):
        assert len(uncited(bad)) == 1


@pytest.mark.parametrize(
    "formula",
    [
        r"$\hat{x}_0$",
        r"$a\,b$",
        r"$a \\ b$",
        r"$x^*$",
        "$a < b$",
        "$x$s",
        "2$x$",
        "$ x $",
        "$a\nb$",
        "$$\na\n+ b\n$$",
        "$$\na\n- b\n$$",
        "$$\na\n\nb\n$$",
        r"$$\operatorname{div}$$",
        "| $|a|$ |",
    ],
)
def test_formulas_that_markdown_breaks_are_seen(formula):
    assert misread(f"text {formula} text" if formula[0] == "$" else formula) != []


def test_formulas_that_it_leaves_alone_pass():
    fine = r"$\hat x_0$, ($a_{ts}$) and `$\hat{x}_0$`: $\mathrm{Var}[x_s \mid x_t]$." + "\n\n"
    assert (
        misread(fine + "$$\na = b +\n\\tfrac{1}{2} c\n$$\n\n$$|a|^2 = b$$\n\n| $a$ | $b$ |") == []
    )


def examples() -> Iterator[tuple[str, str, str]]:
    """Page, program, and what the page says that it prints: the next block, or code after it."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for found in re.finditer(
            r"^```python\n(.*?)^```\n\n(prints.*?)(?=\n\n)", text, re.M | re.S
        ):
            program, said = found.groups()
            if said.endswith(":") and (
                block := re.match(r"\n\n```\n(.*?)```", text[found.end() :], re.S)
            ):
                yield page.name, program, block[1]
            else:
                yield page.name, program, " ".join(re.findall(r"`([^`]+)`", said))


def close(printed: str, said: str) -> bool:
    """The same words, and numbers but for what another CPU rounds otherwise."""
    number = r"-?\d+\.?\d*"
    words = [re.sub(number, "#", text).split() for text in (printed, said)]
    values = [[float(value) for value in re.findall(number, text)] for text in (printed, said)]
    return words[0] == words[1] and values[0] == pytest.approx(values[1], rel=0.02, abs=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("page", "program", "said"), list(examples()))
def test_an_example_prints_what_its_page_says(page, program, said, tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert close(run.stdout, said), (run.stdout, said)


def test_the_examples_are_found():
    pages = ["README.md"] * 3 + ["attention.md"] * 2 + ["experiments.md", "path.md"]
    assert [page for page, *_ in examples()] == pages


@pytest.mark.parametrize(
    ("printed", "said", "same"),
    [("a 0.1234", "a 0.1235", True), ("a 0.12", "a 0.14", False), ("b 1.0", "a 1.0", False)],
)
def test_what_is_printed_is_compared(printed, said, same):
    assert close(printed, said) is same


@each_page
def test_code_for_python_is_python(page):
    for program in re.findall(r"^```python\n(.*?)^```", page.read_text("utf-8"), re.M | re.S):
        ast.parse(program)


@pytest.mark.slow  # it imports everything
def test_the_page_of_public_names_is_the_printed_one():
    from tests.helpers import api

    assert (ROOT / "docs" / "api.md").read_text(encoding="utf-8") == api.page()
