"""Docstrings are written to be read as plain text; here they become markup for the API reference.

What is a sign of a formula (`|F|_F`, `G * A`) is kept from being read as markup, and what stands in
single backticks is a link where it is a name of ours.
"""

import re

NAME = re.compile(r"[A-Za-z_][\w.]*(\(\))?")
REFERENCE = re.compile(r"(^ +|; )([A-Za-z_][\w.]*)(?=[,:;]|\.?$)")
SEE_ALSO = re.compile(r"\bSee also: ([\w., ]+)")


def to_markup(app, what, name, obj, options, lines) -> None:  # noqa: ARG001 - sphinx asks so
    """Rewrite the lines of a docstring in place."""
    result = []
    doctest = False
    see_also = False
    for line in lines:
        # a section ends where the next begins
        see_also = line.startswith("See Also:") or (see_also and line[:1] in (" ", ""))
        if see_also:
            line = REFERENCE.sub(r"\1`\2`", line)
        # a doctest ends with an empty line
        doctest = bool(line.strip()) and (doctest or line.lstrip().startswith(">>>"))
        result.append(line if doctest else marked(line))
    if what == "property":
        result.insert(0, "")  # napoleon takes what stands before a colon for a type
    lines[:] = result


def marked(line: str) -> str:
    """One line of plain text as markup."""
    line = SEE_ALSO.sub(lambda found: "See also: " + linked(found[1]), line)
    parts = line.split("`")
    if len(parts) % 2 == 0:
        return escaped(line)  # a backtick without its other
    for place, part in enumerate(parts):
        if place % 2 == 0:
            parts[place] = escaped(part)
        elif NAME.fullmatch(part):
            parts[place] = f"`{part}`"
        else:
            parts[place] = f"``{part}``"
    return "".join(parts)


def linked(names: str) -> str:
    """The names of a list in backticks."""
    return re.sub(r"\b[A-Za-z]\w+", lambda found: f"`{found[0]}`", names)


def escaped(text: str) -> str:
    """Plain text without what would be markup."""
    return re.sub(r"([\\*|]|_(?=\W|$))", r"\\\1", text)
