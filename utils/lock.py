"""One run in a folder at a time."""

import errno
import fcntl
import logging
import os
import socket
from contextlib import AbstractContextManager, suppress
from pathlib import Path

from utils.errors import UserError, reason

_log = logging.getLogger(__name__)
_TAKEN = (errno.EACCES, errno.EAGAIN)


class RunLock(AbstractContextManager["RunLock"]):
    """Holds a folder for this process. The system lets go of it when the process ends, however it ends.

    Args:
        folder: The folder; it gets a file `lock`, which names the host and the process.

    Raises:
        UserError: If another process holds the folder.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / "lock"
        self._file = open(path, "a+")  # noqa: SIM115 - open as long as the lock is held
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _TAKEN:
                self._file.seek(0)
                holder = self._file.read().strip() or "another process"
                self._file.close()
                raise UserError(f"{folder} is in use by {holder}: choose another --tag, or stop that run") from None
            _log.warning("%s cannot be locked (%s): see that no second run writes there", folder, reason(error))
        self._file.truncate(0)
        with suppress(OSError):  # a full disk: the lock holds without its text
            self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            self._file.flush()

    def __exit__(self, *_error: object) -> None:
        with suppress(OSError):
            self._file.truncate(0)
            self._file.close()
