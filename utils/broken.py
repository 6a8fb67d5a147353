"""What becomes of a run that meets broken images."""

import logging
from pathlib import Path

from utils.checkpoint import write_text
from utils.errors import BrokenDataError, listing

_log = logging.getLogger(__name__)
LIST = "broken.txt"


class BrokenImages:
    """Stops the run at the first broken image, or lists them and stops when there are too many.

    Args:
        skip: Whether broken images are replaced by others.
        most: Share of the training images that may be broken.
        images: Number of training images, 0 where a stream does not tell.
        folder: Where the list goes; None on ranks that do not write.
    """

    def __init__(self, skip: bool, most: float, images: int, folder: Path | None) -> None:
        self._skip, self._most, self._images, self._folder = skip, most, images, folder

    def add(self, known: list[str], complaints: list[str]) -> None:
        """Adds complaints to those that are known, in place.

        Raises:
            BrokenDataError: Where broken images are not replaced, or too many are broken.
            UserError: If the list cannot be written.
        """
        if not self._skip:
            raise BrokenDataError(f"{complaints[0]}: mend or remove it, or set DATA.ON_ERROR skip")
        new = [complaint for complaint in dict.fromkeys(complaints) if complaint not in known]
        known += new
        if not new:
            return
        _log.warning("%d broken training image(s) so far, replaced by others: %s", len(known), listing(new))
        if self._folder:
            text = "".join(f"{complaint}\n" for complaint in known)
            write_text(self._folder / LIST, text)
        if self._images and len(known) > self._most * self._images:
            raise BrokenDataError(
                f"{len(known)} of {self._images} training images are broken, the last one {known[-1]}: "
                "mend them, or raise DATA.MAX_BROKEN"
            )
