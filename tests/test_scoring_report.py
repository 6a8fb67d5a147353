"""`test.py --report`: all that was said of every image, in one folder, whole or not at all."""

import csv
import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from helpers_unit import noise
from PIL import Image

from utils.errors import UserError
from utils.reporting import scoring_report
from utils.reporting.outcomes import Outcomes
from utils.reporting.scoring_report import distinct_labels, write_report

FILES = {
    "index.html", "score.json", "classes.csv", "confusions.csv", "calibration.csv", "images.csv",
    "confusion_matrix.png", "reliability.png", "mistakes.png",
}  # fmt: skip
FACTS = {"acc1": 50.0, "acc5": 100.0, "loss": 0.5, "images": 4, "weights": "w.pth"}


@pytest.fixture(scope="module")
def weights(trained):
    """A checkpoint that knows some of the validation images and not others."""
    return trained.folder / "ckpt_epoch_2.pth"


@pytest.fixture(scope="module")
def score(call, tree, tiny_config):
    """Runs test.py inside this process: `score(*flags, data=tree, code=0)`."""

    def run(*flags, data=tree, code=0):
        result = call("test.py", "--cfg", tiny_config, "--data-path", data, *flags)
        assert result.code == code, result.stderr
        return result

    return run


class Drawn:
    """Four images, of which each is another noise."""

    def read(self, index):
        return noise(index), 0

    def name(self, index):
        return f"/data/val/{index}.png"


def table(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def outcomes_of(targets, predictions):
    targets, predictions = np.array(targets), np.array(predictions)
    sure = np.linspace(0.6, 0.9, len(targets))
    return Outcomes(
        targets, predictions, sure, np.where(targets == predictions, sure, 0.1), np.full(len(targets), True)
    )


def write(folder, outcomes, classes=("cat", "dog"), pictures=None):
    write_report(folder, outcomes, list(classes), list(classes), pictures, FACTS)
    return folder


class Links(HTMLParser):
    """Everything that a page refers to."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found += [value for name, value in attributes if name in ("href", "src")]


# What test.py writes


@pytest.mark.slow
def test_report_tells_of_every_image_once_and_the_line_is_the_same_as_without(weights, score, tree, tmp_path):
    plain, told = score("--resume", weights), score("--resume", weights, "--report", tmp_path / "report")
    assert [line for line in told.stdout.splitlines() if "Acc@1" in line] == [
        line for line in plain.stdout.splitlines() if "Acc@1" in line
    ]
    assert {path.name for path in (tmp_path / "report").iterdir()} == FILES
    rows = table(tmp_path / "report" / "images.csv")
    paths = [row["image"] for row in rows]
    assert paths == sorted(map(str, (tree / "val").rglob("*.*g")))
    assert [row["class"] for row in rows] == [path.split("/")[-2] for path in paths]
    summary = json.loads((tmp_path / "report" / "score.json").read_text())
    right = sum(row["class"] == row["predicted"] for row in rows)
    assert 0 < right < 17
    assert (summary["images"], summary["correct1"], summary["acc1"]) == (17, right, 100 * right / 17)
    assert summary["correct5"] == sum(int(row["in_top5"]) for row in rows)
    surprise = -np.log([float(row["class_probability"]) for row in rows])
    assert summary["loss"] == pytest.approx(surprise.mean(), rel=1e-4)
    assert all(float(row["confidence"]) >= float(row["class_probability"]) for row in rows)


@pytest.mark.slow
def test_tables_agree_with_one_another(weights, score, tmp_path):
    score("--resume", weights, "--report", tmp_path / "report")
    images, classes, pairs, bins = (
        table(tmp_path / "report" / f"{name}.csv") for name in ("images", "classes", "confusions", "calibration")
    )
    for row in classes:
        of_class = [image for image in images if image["class"] == row["class"]]
        hits = sum(image["predicted"] == row["class"] for image in of_class)
        assert (int(row["images"]), int(row["correct"])) == (len(of_class), hits)
        assert float(row["accuracy"]) == float(row["recall"]) == pytest.approx(hits / len(of_class), rel=1e-5)
        assert int(row["predicted"]) == sum(image["predicted"] == row["class"] for image in images)
    for pair in pairs:
        wanted = (pair["class"], pair["predicted"])
        assert int(pair["images"]) == sum((image["class"], image["predicted"]) == wanted for image in images)
    assert sum(int(pair["images"]) for pair in pairs) == sum(image["class"] != image["predicted"] for image in images)
    assert sum(int(row["images"]) for row in bins) == len(images)


@pytest.mark.slow
def test_number_of_ranks_changes_nothing(weights, score, start, tree, tiny_config, tmp_path):
    words = ["--cfg", tiny_config, "--data-path", tree, "--resume", weights, "--batch-size", 2]
    result = start("test.py", *words, "--report", tmp_path / "two", ranks=2)
    assert result.code == 0, result.stderr
    assert result.stdout.count("Acc@1") == 1
    score("--resume", weights, "--report", tmp_path / "one")
    one, two = (table(tmp_path / name / "images.csv") for name in ("one", "two"))
    for alone, shared in zip(one, two, strict=True):
        for name in ("confidence", "class_probability"):
            assert float(alone.pop(name)) == pytest.approx(float(shared.pop(name)), rel=1e-3)
        assert alone == shared
    for name in ("classes.csv", "confusions.csv"):
        assert (tmp_path / "one" / name).read_text() == (tmp_path / "two" / name).read_text()
    sizes = {Image.open(tmp_path / "two" / name).size for name in ("confusion_matrix.png", "reliability.png")}
    assert all(min(size) > 300 for size in sizes)


@pytest.mark.slow
def test_tar_files_and_timms_data_sets_give_the_same_report_as_the_folder(weights, score, call, tree, tmp_path):
    assert call("tools/pack_dataset.py", "--data-path", tree, "--output", tmp_path / "tar").code == 0
    score("--resume", weights, "--report", tmp_path / "a")
    score("--resume", weights, "--report", tmp_path / "b", "--opts", "DATA.DATASET", "tar", data=tmp_path / "tar")
    score("--resume", weights, "--report", tmp_path / "c", "--opts", "DATA.DATASET", "torch/image_folder")
    for name in ("classes.csv", "confusions.csv", "calibration.csv"):
        assert len({(tmp_path / report / name).read_text() for report in "abc"}) == 1
    assert len({(tmp_path / report / "mistakes.png").read_bytes() for report in "abc"}) == 1
    names = [[row["image"] for row in table(tmp_path / report / "images.csv")] for report in "abc"]
    assert names[0] == names[2]
    assert names[1] == [name.replace(str(tree / "val"), str(tmp_path / "tar/val.tar")) for name in names[0]]


@pytest.mark.slow
def test_a_stream_has_no_names_and_no_sheet_and_the_page_says_so(weights, score, call, tree, tmp_path):
    assert call("tools/pack_dataset.py", "--data-path", tree, "--output", tmp_path / "wds", "--form", "wds").code == 0
    score("--resume", weights, "--report", tmp_path / "a")
    score("--resume", weights, "--report", tmp_path / "b", "--opts", "DATA.DATASET", "wds/", data=tmp_path / "wds")
    assert {path.name for path in (tmp_path / "b").iterdir()} == FILES - {"mistakes.png"}
    assert (tmp_path / "a" / "classes.csv").read_text() == (tmp_path / "b" / "classes.csv").read_text()
    assert {row["image"] for row in table(tmp_path / "b" / "images.csv")} == {""}
    page = (tmp_path / "b" / "index.html").read_text()
    assert "is a stream" in page and "mistakes.png" not in page


@pytest.mark.slow
def test_classes_without_images_have_no_accuracy(weights, score, tree, tmp_path):
    for name in ("amber_rows", "violet_rows"):
        shutil.copytree(tree / "val" / name, tmp_path / "some" / "val" / name)
    score("--resume", weights, "--report", tmp_path / "report", data=tmp_path / "some")
    rows = {row["class"]: row for row in table(tmp_path / "report" / "classes.csv")}
    assert len(rows) == 6
    assert {name for name, row in rows.items() if row["images"] != "0"} == {"amber_rows", "violet_rows"}
    for name, row in rows.items():
        assert (row["accuracy"] == row["recall"] == row["f1"] == row["accuracy5"] == "") == (row["images"] == "0"), name
    assert json.loads((tmp_path / "report" / "score.json").read_text())["classes_with_images"] == 2
    assert "2 of 6" in (tmp_path / "report" / "index.html").read_text()


def test_weights_that_name_no_classes_are_reported_by_those_of_the_data(score, tmp_path):
    score("--random-weights", "--report", tmp_path / "report")
    assert table(tmp_path / "report" / "classes.csv")[0]["class"] == "amber_columns"


# What is refused


@pytest.mark.parametrize("place", ["missing/report", "full"])
def test_a_place_for_no_report_is_refused_before_scoring(score, tmp_path, place):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    result = score("--random-weights", "--report", tmp_path / place, code=2)
    (error,) = result.errors
    assert str(tmp_path / place) in error
    assert "Acc@1" not in result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_a_throughput_has_no_report(score, tmp_path):
    (error,) = score("--throughput", "--report", tmp_path / "report", code=2).errors
    assert "--throughput" in error and "--report" in error


def test_where_a_report_cannot_be_written_the_score_is_told_and_nothing_is_left(score, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(scoring_report, "draw_reliability", fail)
    result = score("--random-weights", "--report", tmp_path / "report", code=2)
    (error,) = result.errors
    assert "No space left" in error
    assert result.stdout.count("Acc@1") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_image_that_is_gone_since_it_was_scored_is_named(tmp_path):
    class Gone(Drawn):
        def read(self, index):
            raise FileNotFoundError(2, "No such file")

    with pytest.raises(UserError, match=re.escape("/data/val/1.png")):
        write(tmp_path / "report", outcomes_of([0, 0], [0, 1]), pictures=Gone())
    assert list(tmp_path.iterdir()) == []


# What the page shows


@pytest.mark.parametrize(
    ("targets", "predictions", "classes"),
    [
        ([0, 0], [0, 0], ["only"]),
        ([0, 1, 1], [0, 1, 1], ["cat", "dog"]),
        ([0, 1, 1], [1, 0, 0], ["cat", "dog"]),
        ([4, 4], [0, 4], list("abcdefg")),
        ([0], [1], ["<b>&\"'", "$x$ \udcff"]),
    ],
)
def test_any_outcome_has_a_page_that_needs_nothing_but_the_files_beside_it(tmp_path, targets, predictions, classes):
    folder = write(tmp_path / "report", outcomes_of(targets, predictions), classes, Drawn())
    page = (folder / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\(", page)
    files = {link for link in Links(page).found if not link.startswith("#")}
    assert files == {path.name for path in folder.iterdir()} - {"index.html"} - (
        {"confusions.csv"} if targets == predictions else set()
    )
    assert {link[1:] for link in Links(page).found if link.startswith("#")} == set(
        re.findall(r'section id="(\w+)"', page)
    )
    assert (folder / "mistakes.png").exists() == (targets != predictions)
    assert "<b>" not in page.replace('class="card"><b>', "")


def test_page_lists_the_surest_mistakes_with_what_was_said_and_what_they_are(tmp_path):
    folder = write(tmp_path / "report", outcomes_of([0, 1, 0, 1], [1, 1, 0, 0]), pictures=Drawn())
    section = (folder / "index.html").read_text().split('id="mistakes"')[1].split("</section>")[0]
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", section)
    assert cells == [
        *("cat", "90.0%", "dog", "10.0%", "/data/val/3.png"),
        *("dog", "60.0%", "cat", "10.0%", "/data/val/0.png"),
    ]
    assert Image.open(folder / "mistakes.png").width == 2 * 202 + 10


def test_page_puts_the_least_accurate_classes_first_and_those_without_images_last(tmp_path):
    folder = write(tmp_path / "report", outcomes_of([0, 0, 1, 3], [0, 1, 1, 0]), list("abcd"))
    section = (folder / "index.html").read_text().split('id="classes"')[1].split("</section>")[0]
    assert re.findall(r"<td>(\w)</td>", section) == ["d", "a", "b", "c"]


def test_bytes_of_names_that_are_no_text_are_kept_in_tables(tmp_path):
    class Odd(Drawn):
        def name(self, index):
            return b"\xff.png".decode(errors="surrogateescape")

    folder = write(tmp_path / "report", outcomes_of([0], [1]), pictures=Odd())
    assert b"\xff.png,cat,dog" in (folder / "images.csv").read_bytes()


def test_a_network_that_answers_with_no_numbers_still_has_a_report(tmp_path):
    nothing = np.full(2, np.nan)
    outcomes = Outcomes(np.array([0, 1]), np.array([0, 0]), nothing, nothing, np.array([True, True]))
    assert (write(tmp_path / "report", outcomes, pictures=Drawn()) / "index.html").is_file()


def test_labels_are_the_first_words_of_imagenets_and_tell_namesakes_apart():
    classes = ["n02012849", "n03126707", "n01440764", "a, b"]
    labels = ["crane", "crane", "tench, Tinca tinca", "a, b"]
    assert distinct_labels(classes, labels) == ["crane (n02012849)", "crane (n03126707)", "tench", "a, b"]
