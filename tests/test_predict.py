"""tools/predict.py, run as a user runs it: what it prints and writes, in which order, and what it refuses."""

import csv
import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_unit import CPU, configured, noise, refuse_to_list, write_folder
from PIL import Image

from data.files import find_images, image_suffixes, spread
from data.finish import Normalize
from data.transforms import eval_transform
from models.build import build_model
from tools.predict import predict
from tools.runs.predictions import Guess, Prediction, draw_sheet, write_csv
from utils import checkpoint
from utils.errors import UserError
from utils.precision import Precision

CLASSES = ["ant", "bee", "n01440764", "n02129165"]
LABELS = ["ant", "bee", "tench, Tinca tinca", "lion, king of beasts, Panthera leo"]


@pytest.fixture(scope="module")
def config():
    tiny = {"EMBEDDING_DIMS": [40] * 4, "SERIAL_DEPTHS": [1] * 4, "MLP_RATIOS": [2] * 4}
    return configured(**{f"MODEL__GMA__{name}": value for name, value in tiny.items()}, DATA__IMG_SIZE=32)


@pytest.fixture(scope="module")
def network(config):
    torch.manual_seed(0)
    network = build_model(config, len(CLASSES)).eval()
    with torch.no_grad():  # fresh weights are so small that all images look alike
        for parameter in network.parameters():
            parameter *= 2 if parameter.ndim > 1 else 1
        network.head.fc.weight *= 10
    return network


@pytest.fixture(scope="module")
def weights(config, network, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "best.pth"
    checkpoint.save({"model": network.state_dict(), "config": config.dump(), "classes": CLASSES}, path)
    return path


def coloured(number):
    """Noise with an even part of another colour for each number."""
    image = noise(number)
    image.paste(((97 * number) % 256, (53 * number) % 256, (151 * number) % 256), (0, 0, 10 + 4 * number, 36))
    return image


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("images"), {"ant": 3, "bee": 4}, coloured)


@pytest.fixture
def predicted(call, weights, tmp_path):
    """Predicts, and reads what is written."""

    def run(*words, code=0, checkpoint=weights):
        path = tmp_path / "predicted.json"
        result = call("tools/predict.py", "--checkpoint", checkpoint, "--json", path, "--workers", 0, *words)
        assert result.code == code, result.stderr
        return json.loads(path.read_text()), result

    return run


@pytest.fixture
def refused(call, weights):
    """The one line that a command is refused by."""

    def run(*words, checkpoint=weights):
        result = call("tools/predict.py", "--checkpoint", checkpoint, *words)
        assert (result.code, result.stdout) == (2, "")
        assert result.stderr.count("\n") == 1
        (error,) = result.errors
        return error

    return run


def paths(report):
    return [image["path"] for image in report["images"]]


def probabilities(report):
    """Probabilities by class, of all images."""
    return np.array([
        [guess["probability"] for guess in sorted(image["top"], key=lambda guess: guess["number"])]
        for image in report["images"]
    ])  # fmt: skip


# What is predicted


@pytest.mark.slow
def test_accuracy_of_the_first_classes_is_what_test_py_scores(trained, call, tree, tiny_config, predicted, tmp_path):
    best = trained.folder / "best.pth"
    where = ("--cfg", tiny_config, "--data-path", tree, "--resume", best, "--ema", "--json", tmp_path / "score.json")
    assert call("test.py", *where).code == 0
    score = json.loads((tmp_path / "score.json").read_text())
    report, _ = predicted(tree / "val", checkpoint=best)
    truths = [Path(path).parent.name for path in paths(report)]
    names = [[guess["name"] for guess in image["top"]] for image in report["images"]]
    assert report["weights"] == "ema" and len(truths) == score["images"]
    assert 0 < score["correct1"] < score["correct5"]
    assert sum(top[0] == truth for top, truth in zip(names, truths, strict=True)) == score["correct1"]
    assert sum(truth in top for top, truth in zip(names, truths, strict=True)) == score["correct5"]


def test_probabilities_are_the_softmax_of_each_image_by_itself(predicted, folder, config, network):
    report, _ = predicted(folder)
    assert len(report["images"]) == 7
    for image in report["images"]:
        transform, finish = eval_transform(config), Normalize(config, CPU)
        pixels = transform.augment(transform.decode(Image.open(image["path"])))
        with torch.inference_mode():
            wanted = network(finish(pixels[None])).softmax(dim=1)[0].tolist()
        numbers = sorted(range(len(CLASSES)), key=lambda number: -wanted[number])
        assert [guess["number"] for guess in image["top"]] == numbers
        assert [guess["probability"] for guess in image["top"]] == pytest.approx([wanted[i] for i in numbers], abs=1e-5)
        assert [guess["name"] for guess in image["top"]] == [CLASSES[i] for i in numbers]
        assert [guess["label"] for guess in image["top"]] == [LABELS[i] for i in numbers]


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 0), (3, 0), (7, 0), (2, 2)])
def test_batches_and_loader_processes_change_nothing(predicted, folder, batch_size, workers):
    one, _ = predicted(folder)
    other, _ = predicted(folder, "--batch-size", batch_size, "--workers", workers)
    assert paths(one) == paths(other)
    np.testing.assert_allclose(probabilities(one), probabilities(other), atol=1e-5)
    assert np.ptp(probabilities(one), axis=0).max() > 0.1  # images differ, so that another order would show


def test_fused_network_answers_alike(predicted, folder):
    (one, _), (other, _) = predicted(folder), predicted(folder, "--fuse")
    assert (one["fused"], other["fused"]) == (False, True)
    np.testing.assert_allclose(probabilities(one), probabilities(other), atol=1e-5)


def test_half_precision_answers_nearly_alike(predicted, folder):
    (one, _), (other, _) = predicted(folder), predicted(folder, "--precision", "bf16")
    assert not np.array_equal(probabilities(one), probabilities(other))
    np.testing.assert_allclose(probabilities(one), probabilities(other), atol=0.05)


def test_published_weights_need_a_configuration_and_no_more(predicted, refused, folder, config, network, tmp_path):
    torch.save({"model": network.state_dict()}, tmp_path / "published.pth")
    assert "--cfg" in refused(folder, checkpoint=tmp_path / "published.pth")
    config = config.clone()
    config.MODEL.GMA.NUM_CLASSES = len(CLASSES)
    (tmp_path / "tiny.yaml").write_text(config.dump())
    report, _ = predicted(folder, "--cfg", tmp_path / "tiny.yaml", checkpoint=tmp_path / "published.pth")
    assert {
        (guess["number"], guess["name"], guess["label"]) for image in report["images"] for guess in image["top"]
    } == {(number, None, str(number)) for number in range(4)}
    np.testing.assert_array_equal(probabilities(report), probabilities(predicted(folder)[0]))


def test_answers_that_are_no_numbers_are_an_error():
    loader = [(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), None, ["", ""])]
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 3))
    torch.nn.init.constant_(network[1].bias, math.nan)
    with pytest.raises(UserError, match="fp16 are no numbers"):
        list(predict(network, loader, torch.Tensor.float, Precision("fp16", "cpu"), CPU, topk=2))


# What is printed and written


def test_each_image_has_a_line_with_its_first_classes_and_their_probabilities(predicted, folder):
    report, result = predicted(folder, "--topk", 2)
    assert result.stderr == ""
    words = {"ant": "ant", "bee": "bee", "n01440764": "tench", "n02129165": "lion"}
    assert result.stdout.splitlines() == [
        f"{image['path']}: "
        + ", ".join(f"{words[guess['name']]} ({guess['probability']:.1%})" for guess in image["top"])
        for image in report["images"]
    ]
    assert all(len(image["top"]) == 2 for image in report["images"])


def test_table_holds_a_row_for_each_class_of_an_image(call, predicted, weights, folder, tmp_path):
    report, _ = predicted(folder, "--topk", 3)
    words = ("--topk", 3, "--csv", tmp_path / "p.csv", "--workers", 0)
    assert call("tools/predict.py", "--checkpoint", weights, folder, *words).code == 0
    with open(tmp_path / "p.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    wanted = [
        {"path": image["path"], "rank": str(rank), **{name: str(value) for name, value in guess.items()}}
        for image in report["images"]
        for rank, guess in enumerate(image["top"], 1)
    ]
    assert rows == wanted and len(rows) == 21


def test_table_goes_through_a_link_as_the_report_does_and_into_a_pipe(tmp_path):
    (tmp_path / "link.csv").symlink_to(tmp_path / "file.csv")
    write_csv([Prediction(tmp_path / "a.png", [Guess(0, "ant", "ant", 0.5)], "")], tmp_path / "link.csv")
    assert (tmp_path / "link.csv").is_symlink() and "ant" in (tmp_path / "file.csv").read_text()
    os.mkfifo(tmp_path / "pipe")
    with ThreadPoolExecutor(1) as pool:
        read = pool.submit((tmp_path / "pipe").read_text)
        write_csv([], tmp_path / "pipe")
        assert read.result() == "path,rank,number,name,label,probability\n"
    assert (tmp_path / "pipe").is_fifo()


def test_sheet_shows_whole_images_of_all_kinds(predicted, tmp_path):
    images = write_folder(tmp_path / "images", {"ant": 3}, lambda number: noise(number, (700 * number + 1, 40)))
    (images / "broken.png").write_bytes(b"no image")
    _, result = predicted(images, "--topk", 1, "--sheet", tmp_path / "sheet.png", code=1)
    assert f"{tmp_path / 'sheet.png'} shows 3 of 3 images" in result.stderr
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width == 3 * 202 + 10 and sheet.height > 192 + 20


@pytest.mark.parametrize(("folder", "colour"), [("ant", 1), ("bee", 0), ("photos", None)])
def test_sheet_tells_right_from_wrong_where_the_folder_is_a_class(tmp_path, folder, colour):
    (tmp_path / folder).mkdir()
    path = tmp_path / folder / "0.png"
    Image.new("RGB", (9, 9), "white").save(path)
    draw_sheet([Prediction(path, [Guess(0, "ant", "ant", 0.9)], "")], ["ant", "bee"], tmp_path / "sheet.png")
    pixels = np.asarray(Image.open(tmp_path / "sheet.png")).astype(int)
    vivid = pixels[np.ptp(pixels, axis=2) > 80]
    assert set(vivid.argmax(axis=1)) == ({colour} if colour is not None else set())


@pytest.mark.parametrize("count", [0, 1, 59, 60, 61, 500])
def test_images_of_a_sheet_are_evenly_spread(count):
    drawn = spread(list(range(count)), 60)
    assert len(drawn) == min(count, 60) and drawn[:1] == list(range(min(count, 1)))
    assert not drawn or max(np.diff([*drawn, count])) - min(np.diff([*drawn, count])) <= 1


def test_names_that_are_no_text_are_printed_and_written(predicted, call, weights, tmp_path):
    (tmp_path / "images").mkdir()
    odd = os.fsencode(tmp_path / "images") + b'/\xff,"\n.png'
    noise(0).save(tmp_path / "0.png")
    (tmp_path / "0.png").replace(os.fsdecode(odd))
    report, result = predicted(tmp_path / "images", "--sheet", tmp_path / "sheet.png")
    assert os.fsencode(report["images"][0]["path"]) == odd
    assert "\\udcff" in result.stdout
    words = ("--csv", tmp_path / "p.csv", "--topk", 1, "--workers", 0)
    assert call("tools/predict.py", "--checkpoint", weights, tmp_path / "images", *words).code == 0
    with open(tmp_path / "p.csv", newline="", errors="surrogateescape") as file:
        assert [os.fsencode(row["path"]) for row in csv.DictReader(file)] == [odd]


# Broken images


def test_broken_images_are_named_and_the_others_are_done(predicted, tmp_path):
    images = write_folder(tmp_path / "images", {"ant": 2, "bee": 2})
    whole, _ = predicted(images)
    (images / "ant" / "0a.jpg").write_bytes(b"no image")
    cut = (images / "bee" / "002.png").read_bytes()[:300]
    (images / "bee" / "004.png").write_bytes(cut)
    (images / "empty.webp").touch()
    report, result = predicted(images, "--batch-size", 2, code=1)
    broken = [images / name for name in ("ant/0a.jpg", "bee/004.png", "empty.webp")]
    assert paths(report) == paths(whole)
    np.testing.assert_allclose(probabilities(report), probabilities(whole), atol=1e-5)
    assert [entry["path"] for entry in report["broken"]] == list(map(str, broken))
    lines = result.stderr.splitlines()
    assert all(line.startswith(f"passed over: {path} is broken (") for line, path in zip(lines, broken, strict=True))
    assert not any(str(path) in result.stdout for path in broken)


def test_if_all_images_are_broken_the_report_is_empty(predicted, tmp_path):
    (tmp_path / "photo.heic").write_bytes(b"no image")
    report, _ = predicted(tmp_path / "photo.heic", "--sheet", tmp_path / "sheet.png", code=1)
    assert report["images"] == [] and len(report["broken"]) == 1
    assert (tmp_path / "sheet.png").is_file()


# Which images


def test_images_come_in_the_order_of_the_arguments_and_in_folders_by_their_paths(tmp_path):
    names = "b/10.png b/9.JPG b/deep/er/1.tiff c.png a/notes.txt a/z.webp a/data.h5 a/clip.mpg"
    for path in map(tmp_path.joinpath, names.split()):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    in_b = [tmp_path / "b" / name for name in ("10.png", "9.JPG", "deep/er/1.tiff")]
    assert find_images([tmp_path / "b", tmp_path / "a"]) == [*in_b, tmp_path / "a" / "z.webp"]
    in_order = [tmp_path / "a" / "z.webp", *in_b, tmp_path / "c.png", tmp_path / "link" / "z.webp"]
    assert find_images([tmp_path]) == in_order
    assert find_images([in_b[1], tmp_path / "a" / "notes.txt", tmp_path / "b"]) == [
        in_b[1], tmp_path / "a" / "notes.txt", in_b[0], in_b[2],
    ]  # fmt: skip


def test_a_link_to_a_folder_that_it_is_in_is_not_followed(tmp_path):
    image = tmp_path / "a" / "b" / "x.png"
    image.parent.mkdir(parents=True)
    image.touch()
    (tmp_path / "a" / "b" / "up").symlink_to("..")
    (tmp_path / "a" / "here").symlink_to(".")
    (tmp_path / "a" / "again").symlink_to("b")
    assert find_images([tmp_path]) == [tmp_path / "a" / "again" / "x.png", image]


def test_what_pil_writes_and_reads_is_found_and_read(tmp_path):
    Image.init()
    for suffix, form in Image.registered_extensions().items():
        if form in Image.SAVE and form in Image.OPEN and suffix in image_suffixes():
            for mode in ("RGB", "1", "L"):
                try:
                    Image.new(mode, (16, 16)).save(tmp_path / f"image{suffix}", format=form)
                    break
                except (OSError, ValueError):  # not of this mode
                    (tmp_path / f"image{suffix}").unlink(missing_ok=True)
    found = find_images([tmp_path])
    assert len(found) > 30
    assert {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"} <= image_suffixes()
    readable = {path.suffix for path in found} - {".eps", ".ps"}  # which need Ghostscript
    for path in found:
        if path.suffix in readable:
            Image.open(path).load()


# What is refused, in one line


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["missing.png"], ["missing.png does not exist"]),
        (["empty"], ["empty holds no images"]),
        (["a.png", "--json", "missing/p.json"], ["--json missing/p.json", "folder"]),
        (["a.png", "--csv", "empty"], ["--csv empty"]),
        (["a.png", "--sheet", "missing/p.png"], ["--sheet missing/p.png"]),
        (["a.png", "--sheet", "p.jpg"], ["p.jpg", ".png"]),
        (["a.png", "--json", "p.json", "--csv", "p.csv"], ["--json", "--csv"]),
        (["a.png", "--topk", "0"], ["--topk: 0", "at least 1"]),
        (["a.png", "--batch-size", "0"], ["--batch-size: 0", "at least 1"]),
        (["a.png", "--workers", "-1"], ["--workers: -1", "at least 0"]),
        ([], ["IMAGE_OR_FOLDER"]),
    ],
    ids=lambda words: " ".join(words),
)
def test_what_cannot_be_done_is_refused_before_the_checkpoint_is_read(refused, tmp_path, monkeypatch, words, told):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    noise(0).save(tmp_path / "a.png")
    error = refused(*words, checkpoint=tmp_path / "not there.pth")
    assert all(part in error for part in told)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "empty"]


def test_more_classes_than_there_are_are_refused(refused, folder):
    assert "4 classes" in refused(folder, "--topk", 5)


def test_missing_checkpoint_and_a_gpu_that_is_not_there_are_refused(refused, folder, tmp_path):
    assert "not there.pth" in refused(folder, checkpoint=tmp_path / "not there.pth")
    if not torch.cuda.is_available():
        assert "--device cpu" in refused(folder, "--device", "cuda")


def test_folder_that_cannot_be_read_is_refused(tmp_path, monkeypatch):
    (tmp_path / "below").mkdir()
    refuse_to_list(monkeypatch, tmp_path / "below")
    with pytest.raises(UserError, match=rf"{tmp_path}/below cannot be read \(Permission denied\)"):
        find_images([tmp_path])
