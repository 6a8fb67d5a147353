"""A report's folder appears whole or not at all, and nothing but an earlier report is ever replaced."""

import signal
from pathlib import Path

import pytest
from helpers_unit import handle

from utils.errors import UserError
from utils.reporting.folder import GENERATOR, PAGE, check_report_folder, replacing


def write_earlier(folder):
    folder.mkdir()
    (folder / PAGE).write_text(f'<meta name="generator" content="{GENERATOR}">')
    (folder / "score.json").write_text("earlier")
    return folder


@pytest.mark.parametrize("before", ["nothing", "empty", "earlier"])
def test_new_and_empty_folders_and_earlier_reports_are_replaced(tmp_path, before):
    folder = tmp_path / "report"
    if before != "nothing":
        folder.mkdir() if before == "empty" else write_earlier(folder)
    check_report_folder(folder)
    with replacing(folder) as new:
        (new / PAGE).write_text("now")
    assert [path.name for path in folder.iterdir()] == [PAGE]
    assert (folder / PAGE).read_text() == "now"
    assert list(tmp_path.iterdir()) == [folder]


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    real, link = write_earlier(tmp_path / "real"), tmp_path / "link"
    link.symlink_to(real)
    with replacing(link) as new:
        (new / PAGE).write_text("now")
    assert link.is_symlink() and (real / PAGE).read_text() == "now"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), UserError("broken")])
def test_where_writing_fails_the_earlier_report_stays_and_nothing_else(tmp_path, error):
    folder = write_earlier(tmp_path / "report")
    with pytest.raises(UserError if isinstance(error, OSError) else type(error)) as told, replacing(folder) as new:
        (new / PAGE).write_text("half")
        raise error
    assert "No space left" in str(told.value) or not isinstance(error, OSError)
    assert (folder / "score.json").read_text() == "earlier"
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT], ids=lambda number: number.name)
def test_where_a_signal_ends_the_program_the_earlier_report_stays_and_nothing_else(tmp_path, request, number):
    handle(request, {number: signal.SIG_DFL})
    folder = write_earlier(tmp_path / "report")
    with pytest.raises(SystemExit) as end, replacing(folder) as new:
        (new / PAGE).write_text("half")
        signal.raise_signal(number)
    assert end.value.code == 128 + number
    assert (folder / "score.json").read_text() == "earlier"
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("moved", ["the earlier report", "the new one"])
def test_a_signal_amid_the_exchange_leaves_one_whole_report(tmp_path, request, monkeypatch, moved, moment):
    handle(request, {signal.SIGTERM: signal.SIG_DFL})
    folder = write_earlier(tmp_path / "report")
    rename = Path.rename

    def interrupted(path, target):
        ends = (path == folder) == (moved == "the earlier report")
        if ends and moment == "before":
            signal.raise_signal(signal.SIGTERM)
        result = rename(path, target)
        if ends and moment == "after":
            signal.raise_signal(signal.SIGTERM)
        return result

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(SystemExit), replacing(folder) as new:
        (new / PAGE).write_text("now")
    is_new = (moved, moment) == ("the new one", "after")
    assert [path.name for path in sorted(folder.iterdir())] == ([PAGE] if is_new else [PAGE, "score.json"])
    assert list(tmp_path.iterdir()) == [folder]


def test_a_folder_that_was_filled_meanwhile_is_not_replaced(tmp_path):
    folder = tmp_path / "report"
    with pytest.raises(UserError, match=r"notes\.txt"), replacing(folder) as new:
        (new / PAGE).write_text("now")
        folder.mkdir()
        (folder / "notes.txt").write_text("dear")
    assert (folder / "notes.txt").read_text() == "dear"
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("name", ["notes.txt", "photos"])
def test_a_folder_with_anything_else_in_it_is_refused_by_name(tmp_path, name):
    folder = write_earlier(tmp_path / "report")
    (folder / name).mkdir() if name == "photos" else (folder / name).touch()
    with pytest.raises(UserError, match=name):
        check_report_folder(folder)


def test_a_page_of_another_program_is_refused(tmp_path):
    (tmp_path / PAGE).write_text("<title>My home</title>")
    with pytest.raises(UserError, match="no report"):
        check_report_folder(tmp_path)


def test_a_file_and_a_folder_in_none_are_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        check_report_folder(tmp_path / "file")
    with pytest.raises(UserError, match="one that exists"):
        check_report_folder(tmp_path / "missing" / "report")
