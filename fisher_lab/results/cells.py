"""Names as cells of a CSV file that a spreadsheet takes for text, not for formulas.

A spreadsheet computes a cell that begins with =, +, -, @, a tab or the end of a line, and what it
computes may read files or call programs ("CSV injection", OWASP). An apostrophe in front makes text
of it. Which character separates cells depends on the reader's country, so that one is put wherever
a cell might begin; where apostrophes stand there already, they become one more, so that reading
takes away exactly what writing has put.
"""

from __future__ import annotations

import re

SEPARATORS = ",;\t\r\n"
# also the wide forms, which some spreadsheets read alike
FORMULA = "=+\\-@\t\r\n＝＋－＠"
# at the beginning of a cell: the apostrophes that stand there, before a formula
WRITTEN = re.compile(f"(^|[{SEPARATORS}])('*)(?=[{FORMULA}])")
READ = re.compile(f"(^|[{SEPARATORS}])'('*)(?=[{FORMULA}])")
JSON_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')


def escaped(name: str) -> str:
    """The name with an apostrophe wherever a spreadsheet might see the beginning of a formula."""
    return WRITTEN.sub(r"\1'\2", name)


def unescaped(cell: str) -> str:
    """The name that `escaped` made this cell of."""
    return READ.sub(r"\1\2", cell)


def unseparated(json: str) -> str:
    r"""JSON in which no string can be cut into cells: separators in it are written as
    \u002c, ...
    """
    return JSON_STRING.sub(_coded, json)


def _coded(string: re.Match[str]) -> str:
    # json.dumps has written tabs and ends of lines as \t, \r and \n already.
    text = string.group()
    text = text.replace(",", r"\u002c")
    return text.replace(";", r"\u003b")
