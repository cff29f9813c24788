"""Foreign names in figures, and any text on a terminal that lacks some characters.

Only the standard library is imported.
"""

from __future__ import annotations

import codecs
import sys
import unicodedata

_ERRORS = "dng_models.support.printable"
# ASCII for the characters printed here that NFKD does not reduce to plain letters.
_ASCII = {
    **{"–": "-", "—": "-", "−": "-", "×": "x", "±": "+-", "…": "...", "·": "*", "∞": "inf"},
    **{"λ": "lambda", "σ": "sigma", "μ": "mu", "τ": "tau", "‖": "||", "∥": "||", "≤": "<="},
    **{"≥": ">=", "→": "->", "µ": "u"},
}


def plain(text: str) -> str:
    """Escape a name so that Matplotlib draws it literally.

    Matplotlib parses text between two dollars as mathematics and fails where it cannot; a file
    name may hold bytes that no font can draw.

    Parameters
    ----------
    text : str
        A name from outside, such as a file's; not a text that contains intended mathematics.
    """
    return text.encode("utf-8", "replace").decode("utf-8").replace("$", r"\$")


def drawable(text: str) -> str:
    """Keep a text's mathematics if Matplotlib can parse it; otherwise escape as :func:`plain`."""
    from matplotlib.mathtext import MathTextParser

    for line in text.split("\n"):
        if line.count("$") - line.count(r"\$") > 1:
            try:
                MathTextParser("path").parse(line.encode("utf-8", "replace").decode("utf-8"))
            except ValueError:
                return plain(text.replace(r"\$", "$"))
    return text.encode("utf-8", "replace").decode("utf-8")


def _replaced(error: UnicodeError) -> tuple[str, int]:
    """Error handler for :mod:`codecs`: replace characters that an encoding lacks."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(map(_nearest, text)), error.end


def _nearest(character: str) -> str:
    letters = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode("ascii")
    return _ASCII.get(character) or letters or "?"


def print_anything() -> None:
    """Let this process print characters that the encoding of its output does not have.

    Command lines call it before they print.  Where the locale is C and Python's UTF-8 mode is off,
    standard output is ASCII only, and a table would end in a UnicodeEncodeError; after this call
    it shows "Frechet" for "Fréchet".
    """
    codecs.register_error(_ERRORS, _replaced)
    for stream in (sys.stdout, sys.stderr):
        encoding = getattr(stream, "encoding", None) or "utf-8"
        if hasattr(stream, "reconfigure"):
            # UTF-8 has all characters, but file names may contain bytes that are none.
            own = codecs.lookup(encoding).name != "utf-8"
            stream.reconfigure(errors=_ERRORS if own else "backslashreplace")
