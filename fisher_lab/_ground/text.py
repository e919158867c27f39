"""Text made fit to be shown: what anybody may have written, and what stands in a docstring."""

from __future__ import annotations

import difflib
import inspect
import unicodedata
from collections.abc import Iterable
from typing import Any

UNSHOWN = "\N{REPLACEMENT CHARACTER}"
# Controls, halves of characters, separators of lines and paragraphs.
CATEGORIES = ("Cc", "Cs", "Zl", "Zp")
# What makes the text behind it run the other way, so that it reads as something that it is not.
DIRECTIONS = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")


def printable(text: str) -> str:
    """The text with a mark in place of every character that commands a terminal or a reader.

    Tabs and ends of lines stay.
    """
    if text.isascii() and text.isprintable():
        return text
    shown = []
    for character in text:
        is_command = unicodedata.category(character) in CATEGORIES
        turns = unicodedata.bidirectional(character) in DIRECTIONS
        keeps = character in "\t\n"
        shown.append(UNSHOWN if (is_command or turns) and not keeps else character)
    return "".join(shown)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The nearest of the known words, of any case, as a question to stand behind the word; empty
    where none is near.
    """
    by_lower = {name.lower(): name for name in known}
    if word in by_lower.values():
        return ""
    close = difflib.get_close_matches(str(word).lower(), list(by_lower), n=1)
    if not close:
        return ""
    return f" (did you mean {by_lower[close[0]]!r}?)"


def first_paragraph(documented: Any) -> str:
    """The first paragraph of a thing's docstring on one line, or the empty string."""
    text = inspect.getdoc(documented) or ""
    paragraph = text.split("\n\n")[0]
    return " ".join(paragraph.split())
