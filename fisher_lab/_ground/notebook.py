"""Tables for notebooks: HTML that sorts at a click and loads nothing.

Texts may come from files that strangers wrote: every one goes through the template, which escapes
it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fisher_lab._ground.text import printable

# A click on a heading sorts by its column, a second one the other way; what has no number is last.
SORT = """
const heading = this, table = heading.closest('table'), body = table.tBodies[0];
const column = heading.cellIndex, up = heading.getAttribute('aria-sort') !== 'ascending';
for (const other of heading.parentNode.cells) other.removeAttribute('aria-sort');
heading.setAttribute('aria-sort', up ? 'ascending' : 'descending');
const key = (row) => row.cells[column].dataset.key;
const rows = [...body.rows], known = rows.filter((row) => key(row) !== undefined);
known.sort((a, b) => (up ? 1 : -1) * (key(a) - key(b)));
body.append(...known, ...rows.filter((row) => key(row) === undefined));
"""

TEMPLATE = """
<div class="fisher-lab" style="overflow-x: auto">
{% for line in heading %}<div>{{ line }}</div>
{% endfor %}
<table style="font-variant-numeric: tabular-nums">
<thead><tr>
{% for title in titles %}
<th scope="col" tabindex="0" style="cursor: pointer; text-align: {{ 'left' if loop.index <= names
else 'right' }}" title="sort" onclick="{{ sort }}"
onkeydown="if (event.key === 'Enter') this.click()">{{ title }}</th>
{% endfor %}
</tr></thead>
<tbody>
{% for line in lines %}
<tr>
{% for cell in line %}
<td style="white-space: nowrap; text-align: {{ 'left' if loop.index <= names else 'right' }}"
{% if cell.key is not none %} data-key="{{ cell.key }}"{% endif %}>{{ cell.text }}</td>
{% endfor %}
</tr>
{% endfor %}
</tbody>
</table>
</div>
"""


@dataclass(frozen=True)
class Cell:
    """What stands in one place of a table.

    Attributes:
        text: what is read.
        key: what is sorted by; None stands last.
    """

    text: str
    key: float | None = None


def html_table(
    titles: Sequence[str],
    lines: Sequence[Sequence[Cell]],
    heading: Sequence[str] = (),
    names: int = 1,
) -> str:
    """A table as HTML.

    Args:
        titles: of the columns.
        lines: the cells of each line.
        heading: lines of text above the table.
        names: how many columns, from the first, hold text; they stand left, numbers right.
    """
    # here, since most runs show no table in a notebook
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(TEMPLATE)
    shown = []
    for line in lines:
        shown.append([Cell(printable(cell.text), cell.key) for cell in line])
    return template.render(
        heading=[printable(text) for text in heading],
        titles=[printable(text) for text in titles],
        lines=shown,
        names=names,
        sort=SORT,
    )
