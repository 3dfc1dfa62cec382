"""Text from outside, such as the name of a data set or a label in a record, escaped for each format of a table.

HTML is escaped by its template, and JSON by the standard library.
"""

import re

LATEX = {
    "σ̄²": r"$\bar\sigma^2$",
    "σ̄": r"$\bar\sigma$",
    "²": r"$^2$",
    "ρ": r"$\rho$",
    "σ̂": r"$\hat\sigma$",
    "x̂0": r"$\hat{x}_0$",
    "η": r"$\eta$",
    "σ": r"$\sigma$",
    "τ": r"$\tau$",
    "±": r"$\pm$",
    "…": r"\ldots{}",
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}
# The longest first, then signs and characters outside ASCII.
_PIECES = [*map(re.escape, sorted(LATEX, key=len, reverse=True)), r"(?<![\w.])[+-](?=\d)", r"[^ -~]"]
_LATEX = re.compile("|".join(_PIECES))
# Only where it is markup: "alpha_bar[0]" and "S < T" stay readable.
_MARKDOWN = re.compile(r"[\\`*|]|<(?=[A-Za-z/!?])|&(?=[#\w])|(?<!\w)_|_(?!\w)|\](?=[(\[:])|~(?=~)")
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?")


def printable(value: object) -> str:
    """Return text in one line: line breaks, control characters and what no font has become spaces."""
    return "".join(character if character.isprintable() else " " for character in str(value))


def escape_markdown(value: object) -> str:
    """Return text as Markdown that shows it, also in a row of a table."""

    def replacement(match: re.Match[str]) -> str:
        return {"<": "&lt;", "&": "&amp;"}.get(match[0], f"\\{match[0]}")

    return _MARKDOWN.sub(replacement, printable(value))


def escape_csv(value: object) -> object:
    """Return an entry of a CSV file; text that spreadsheets would compute as a formula begins with an apostrophe."""
    formula = isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r"))
    return f"'{value}" if formula and not _NUMBER.fullmatch(str(value)) else value


def escape_latex(value: object) -> str:
    """Return text as LaTeX that prints it; a character that plain LaTeX lacks is shown by its code point."""

    def replacement(match: re.Match[str]) -> str:
        piece = match[0]
        if piece in "+-":  # a sign
            return f"${piece}$"
        return LATEX.get(piece) or f"[U+{ord(piece):04X}]"

    text = _LATEX.sub(replacement, str(value))
    return f"{{}}{text}" if text.startswith(("[", "*")) else text  # after a line break these would be its options
