"""Names of others in what is drawn, and any text on a terminal that has fewer characters.

Only the standard library is imported.
"""

from __future__ import annotations

import codecs
import sys
import unicodedata

_ERRORS = "dng_models.printable"
# What is printed here and is no letter with an accent, in ASCII.
_ASCII = {
    **{"–": "-", "—": "-", "−": "-", "×": "x", "±": "+-", "…": "...", "·": "*", "∞": "inf"},
    **{"λ": "lambda", "σ": "sigma", "μ": "mu", "τ": "tau", "‖": "||", "∥": "||", "≤": "<="},
    **{"≥": ">=", "→": "->", "µ": "u"},
}


def plain(text: str) -> str:
    """A name as Matplotlib draws it: character by character, whatever it is.

    Between two dollars Matplotlib reads mathematics, and aborts where there is none that it knows;
    a name of a file may hold bytes that are no character at all, which no font has.

    Parameters
    ----------
    text : str
        A name that somebody else gave; not a text with mathematics of our own around it.
    """
    return text.encode("utf-8", "replace").decode("utf-8").replace("$", r"\$")


def drawable(text: str) -> str:
    """A text that may have mathematics in it, as :func:`plain` where Matplotlib can read none."""
    from matplotlib.mathtext import MathTextParser

    for line in text.split("\n"):
        if line.count("$") - line.count(r"\$") > 1:
            try:
                MathTextParser("path").parse(line.encode("utf-8", "replace").decode("utf-8"))
            except ValueError:
                return plain(text.replace(r"\$", "$"))
    return text.encode("utf-8", "replace").decode("utf-8")


def _replaced(error: UnicodeError) -> tuple[str, int]:
    """What stands for characters that an encoding does not have, for :mod:`codecs`."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(map(_nearest, text)), error.end


def _nearest(character: str) -> str:
    letters = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode("ascii")
    return _ASCII.get(character) or letters or "?"


def print_anything() -> None:
    """Let this process print characters that its terminal or file does not have.

    For command lines, before anything is printed.  Where the locale is C and Python's UTF-8 mode
    is off, standard output knows ASCII only, and a table would end in a UnicodeEncodeError; from
    now on "Fréchet" is "Frechet" there.
    """
    codecs.register_error(_ERRORS, _replaced)
    for stream in (sys.stdout, sys.stderr):
        encoding = getattr(stream, "encoding", None) or "utf-8"
        if hasattr(stream, "reconfigure"):
            # Names of files hold what is no character also where the terminal has all of them.
            own = codecs.lookup(encoding).name != "utf-8"
            stream.reconfigure(errors=_ERRORS if own else "backslashreplace")
