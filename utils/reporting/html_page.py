"""Pages of HTML that stand alone: their style, tables that sort, and cells."""

import math
from collections.abc import Sequence
from html import escape

_STYLE = """
:root { --ink: #1f2933; --soft: #616e7c; --line: #e4e7eb; --blue: #2f6f9f; --bar: #d6e6f2; }
* { box-sizing: border-box; }
body { margin: 0; background: #f5f7fa; color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 26px; margin: 0; }
h2 { font-size: 19px; margin: 0 0 6px; }
p { margin: 4px 0 12px; color: var(--soft); max-width: 90ch; }
a { color: var(--blue); }
nav a { margin-right: 16px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(220px, 1fr)); gap: 12px; margin: 18px 0; }
.card, section { background: #fff; border: 1px solid var(--line); border-radius: 8px; }
.card { padding: 12px 16px; }
.card b { display: block; font-size: 24px; font-variant-numeric: tabular-nums; }
.card span { color: var(--soft); font-size: 13px; }
section { padding: 18px 20px; margin-top: 18px; }
.columns { display: flex; flex-wrap: wrap; gap: 24px; align-items: flex-start; }
.columns > * { flex: 1 1 420px; min-width: 0; }
img { display: block; max-width: 100%; height: auto; }
.scroll { overflow: auto; max-height: 560px; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { padding: 4px 10px; text-align: left; border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
th { position: sticky; top: 0; background: #fff; box-shadow: 0 1px var(--line); font-weight: 600; cursor: pointer;
  user-select: none; white-space: nowrap; }
td.number, th.number { text-align: right; }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
td.share { background: linear-gradient(90deg, var(--bar) var(--part), transparent var(--part)); min-width: 92px; }
tbody tr:hover { background: #f0f4f8; }
code { font-size: 13px; overflow-wrap: anywhere; }
"""

_NUMBER = '<td class="number'

# Sorts a table by the column whose heading is clicked, again in the other direction; cells without a value stay last.
_SCRIPT = """
for (const table of document.querySelectorAll("table"))
  for (const heading of table.tHead.rows[0].cells)
    heading.addEventListener("click", () => {
      const place = heading.cellIndex, body = table.tBodies[0];
      const up = heading.dataset.up = heading.dataset.up === "1" ? "0" : "1";
      const value = row => row.cells[place].dataset.value ?? row.cells[place].textContent;
      const compare = (a, b) => {
        const [x, y] = [value(a), value(b)];
        if (x === "" || y === "") return (x === "") - (y === "");
        const order = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
        return up === "1" ? order : -order;
      };
      body.append(...[...body.rows].sort(compare));
    });
"""


def document(title: str, generator: str, content: str) -> str:
    """A page.

    Args:
        title: Its title, as text.
        generator: The program that wrote it.
        content: What it shows, in HTML.
    """
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="generator" content="{escape(generator)}">\n<meta name="viewport" content="width=device-width">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{content}\n</main>\n<script>{_SCRIPT}</script>\n</body>\n</html>\n"
    )


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that sorts by the heading that is clicked.

    Args:
        heads: The headings, as text; each is aligned as the cells below it.
        rows: Cells, from `text` and the others below; one row at least.
    """
    kinds = [' class="number"' if cell.startswith(_NUMBER) else "" for cell in rows[0]]
    head = "".join(f"<th{kind}>{escape(name)}</th>" for name, kind in zip(heads, kinds, strict=True))
    body = "\n".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'


def text(value: object) -> str:
    """A cell of text."""
    return f"<td>{escape(str(value))}</td>"


def count(value: int) -> str:
    """A cell of a whole number."""
    return f'{_NUMBER}" data-value="{value}">{value:,}</td>'


def share(value: float) -> str:
    """A cell of a share from 0 to 1, with a bar; an empty one where it is not a number."""
    if math.isnan(value):
        return f'{_NUMBER}" data-value=""></td>'
    return f'{_NUMBER} share" style="--part:{value:.1%}" data-value="{value:.6f}">{value:.1%}</td>'
