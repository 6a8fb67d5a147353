"""Hidden folders beside a place are gone in the end, whatever happens."""

import shutil
import signal

import pytest
from helpers_unit import handle

from utils.beside import folder_beside


def test_a_signal_during_the_removal_does_not_interrupt_it(tmp_path, request, monkeypatch):
    handle(request, {signal.SIGTERM: signal.SIG_DFL})
    remove = shutil.rmtree

    def signalled(*arguments, **options):
        signal.raise_signal(signal.SIGTERM)
        remove(*arguments, **options)

    monkeypatch.setattr(shutil, "rmtree", signalled)
    with folder_beside(tmp_path / "report") as folder:
        (folder / "page").touch()
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_names_tell_what_is_to_appear(tmp_path):
    with folder_beside(tmp_path / "report") as folder:
        assert folder.parent == tmp_path
        assert folder.name.startswith(".report.")


def test_a_folder_that_is_not_there_is_an_error_of_the_disk(tmp_path):
    with pytest.raises(FileNotFoundError), folder_beside(tmp_path / "missing" / "report"):
        pass
