"""Lines on the console."""

import sys

from tqdm import tqdm


def say(line: str) -> None:
    """Prints a line above the progress bar; letters that the terminal lacks are printed as codes."""
    encoding = sys.stdout.encoding or "utf-8"
    tqdm.write(line.encode(encoding, "backslashreplace").decode(encoding), file=sys.stdout)
