"""Lines on the console, and tables for it."""

import sys
from collections.abc import Callable, Sequence

from tqdm import tqdm


def say(line: str) -> None:
    """Prints a line above the progress bar; letters that the terminal lacks are printed as codes."""
    encoding = sys.stdout.encoding or "utf-8"
    tqdm.write(line.encode(encoding, "backslashreplace").decode(encoding), file=sys.stdout)


def aligned(rows: Sequence[Sequence[str]], justify: Callable[[str, int], str] = str.ljust) -> list[str]:
    """Rows as lines of columns, the first one to the left and the others as `str.ljust` or `str.rjust` puts them."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(justify, row[1:], widths[1:])]).rstrip() for row in rows]


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows as a table of Markdown, the first one as its head; columns but the first one are to the right."""
    head, *body = rows
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(map(markdown_row, (head, rule, *body)))


def markdown_row(cells: Sequence[str]) -> str:
    """A line of such a table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
