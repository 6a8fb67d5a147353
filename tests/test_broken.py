"""What becomes of a run that meets broken images."""

import errno
import logging

import pytest
from helpers_unit import configured

from utils import broken
from utils.broken import add_broken
from utils.errors import BrokenDataError, UserError


def data(on_error="skip", share=0.5):
    return configured(DATA__ON_ERROR=on_error, DATA__MAX_BROKEN=share).DATA


def complaint(number):
    return f"train/a/{number}.png of class a is broken (image file is truncated)"


def test_the_first_broken_image_stops_a_run_that_does_not_skip(tmp_path):
    known = []
    with pytest.raises(BrokenDataError) as caught:
        add_broken(known, [complaint(3), complaint(5)], data("stop", 1.0), 100, tmp_path)
    assert str(caught.value) == f"{complaint(3)}: mend or remove it, or set DATA.ON_ERROR skip"
    assert known == []
    assert list(tmp_path.iterdir()) == []


def test_broken_images_are_listed_as_they_come(tmp_path):
    known = []
    add_broken(known, [complaint(3)], data(), 100, tmp_path)
    assert (tmp_path / broken.LIST).read_text() == f"{complaint(3)}\n"
    add_broken(known, [complaint(5), complaint(4)], data(), 100, tmp_path)
    assert known == [complaint(3), complaint(5), complaint(4)]
    assert (tmp_path / broken.LIST).read_text().splitlines() == known
    assert [path.name for path in tmp_path.iterdir()] == [broken.LIST]


def test_an_image_is_counted_and_told_of_once(tmp_path, caplog):
    known = []
    for _ in range(5):
        add_broken(known, [complaint(3), complaint(4), complaint(3)], data(share=0.02), 100, tmp_path)
    assert known == [complaint(3), complaint(4)]
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert caplog.records[0].message.startswith("2 broken training image(s) so far")
    assert complaint(3) in caplog.records[0].message


def test_a_resumed_run_goes_on_with_the_list_that_it_knows(tmp_path):
    known = [complaint(number) for number in range(3)]
    add_broken(known, [complaint(2), complaint(7)], data(), 100, tmp_path)
    assert known == [complaint(0), complaint(1), complaint(2), complaint(7)]
    assert (tmp_path / broken.LIST).read_text().splitlines() == known


@pytest.mark.parametrize(("share", "most"), [(0.0, 0), (0.01, 2), (0.5, 100), (1.0, 200)])
def test_a_run_gives_up_above_the_share(tmp_path, share, most):
    known = []
    if most:
        add_broken(known, [complaint(number) for number in range(most)], data(share=share), 200, tmp_path)
    with pytest.raises(BrokenDataError) as caught:
        add_broken(known, [complaint("one more")], data(share=share), 200, tmp_path)
    assert str(caught.value).startswith(f"{most + 1} of 200 training images are broken, the last one")
    assert complaint("one more") in str(caught.value)
    assert "DATA.MAX_BROKEN" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len((tmp_path / broken.LIST).read_text().splitlines()) == most + 1  # what it gave up at is listed too


def test_a_stream_that_does_not_tell_its_length_has_no_share():
    known = []
    add_broken(known, [complaint(number) for number in range(500)], data(share=0.0), 0, None)
    assert len(known) == 500


def test_ranks_that_do_not_write_count_the_same(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    known = []
    add_broken(known, [complaint(1)], data(share=0.01), 100, None)
    with pytest.raises(BrokenDataError, match="2 of 100"):
        add_broken(known, [complaint(2)], data(share=0.01), 100, None)
    assert list(tmp_path.iterdir()) == []


def test_a_list_that_cannot_be_written_is_a_users_error(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", fail)
    with pytest.raises(UserError, match=r"broken\.txt cannot be written .*No space left"):
        add_broken([], [complaint(1)], data(), 100, tmp_path)
    assert list(tmp_path.iterdir()) == []
