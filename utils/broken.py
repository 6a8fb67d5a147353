"""What becomes of a run that meets broken images."""

import logging
from pathlib import Path

from yacs.config import CfgNode

from utils.checkpoint import write_text
from utils.errors import BrokenDataError, listing

_log = logging.getLogger(__name__)
LIST = "broken.txt"


def add_broken(known: list[str], complaints: list[str], data: CfgNode, images: int, folder: Path | None) -> None:
    """Stops the run at the first broken image, or lists them and stops when there are too many.

    Args:
        known: Complaints about the run's broken images so far; new ones are added in place.
        complaints: About images that others have just taken the place of, or would have.
        data: The configuration's DATA, which says whether to go on (ON_ERROR) and up to which share (MAX_BROKEN).
        images: Number of training images, 0 where a stream does not tell.
        folder: Where the list goes; None on ranks that do not write.

    Raises:
        BrokenDataError: Where broken images are not replaced, or too many are broken.
        UserError: If the list cannot be written.
    """
    if data.ON_ERROR == "stop":
        raise BrokenDataError(f"{complaints[0]}: mend or remove it, or set DATA.ON_ERROR skip")
    new = [complaint for complaint in dict.fromkeys(complaints) if complaint not in known]
    known += new
    if not new:
        return
    _log.warning("%d broken training image(s) so far, replaced by others: %s", len(known), listing(new))
    if folder:
        write_text(folder / LIST, "".join(f"{complaint}\n" for complaint in known))
    if images and len(known) > data.MAX_BROKEN * images:
        raise BrokenDataError(
            f"{len(known)} of {images} training images are broken, the last one {known[-1]}: "
            "mend them, or raise DATA.MAX_BROKEN"
        )
