"""tools/score_sets.py: each set by its protocol, every image once, on trees whose answers can be counted by hand."""

import json
from pathlib import Path

import pytest
import torch
from helpers_unit import ALONE, CPU, ROOT, configured, noise, refuse_to_list
from PIL import Image
from timm.data import ImageNetInfo, RealLabelsImagenet
from torch import nn
from torchvision.transforms.functional import pil_to_tensor

from data.finish import Normalize
from models.build import build_model
from tools.imagenet_sets.corruption_error import (
    ALEXNET_CLEAN_ERROR,
    ALEXNET_ERRORS,
    SEVERITIES,
    corruption_error,
    relative_corruption_error,
)
from tools.imagenet_sets.report import corruption_row, corruptions_table, mean_row, sets_table
from tools.imagenet_sets.sets import (
    PUBLISHED_IMAGES,
    ClassFolders,
    RealSource,
    find_corruptions,
    folder_synsets,
    imagenet_synsets,
    missing_corruptions,
    network_numbers,
    real_labels,
    set_synsets,
    v2_variant,
)
from tools.score_sets import Scorer, score_corrupted
from utils import checkpoint
from utils.errors import UserError
from utils.metrics import Score
from utils.precision import Precision

SYNSETS = imagenet_synsets()
NUMBERS = {synset: number for number, synset in enumerate(SYNSETS)}
LABELS = real_labels()
SIZE = 32


def small_config():
    return configured(
        DATA__IMG_SIZE=SIZE,
        DATA__BATCH_SIZE=250,
        DATA__NUM_WORKERS=0,
        MODEL__GMA__EMBEDDING_DIMS=[40, 40, 40, 40],
        MODEL__GMA__SERIAL_DEPTHS=[1, 1, 1, 1],
        DEVICE="cpu",
    )


# Images whose colour says what the network answers


def colour(first, second):
    return first & 255, second & 255, first >> 8 | second >> 8 << 2


def answer(path, first, second):
    """Writes an image that makes `Reader` answer two classes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (SIZE, SIZE), colour(first, second)).save(path, "PNG")


class Reader(nn.Module):
    """Answers by an image's colour: two classes, then the others from 0 on; numbered in another order if asked."""

    def __init__(self, order=range(1000)):
        super().__init__()
        data = small_config().DATA
        self.mean, self.std = (torch.tensor(values).view(3, 1, 1) for values in (data.MEAN, data.STD))
        self.order = list(order)

    def forward(self, images):
        red, green, blue = ((images * self.std + self.mean) * 255).round().long()[:, :, 0, 0].T
        logits = -torch.arange(1000.0).repeat(len(images), 1)
        logits.scatter_(1, (green + (blue >> 2 << 8))[:, None], 1.0)
        logits.scatter_(1, (red + ((blue & 3) << 8))[:, None], 2.0)
        return logits[:, self.order]


def ranking(first, second, among):
    """The classes in the order in which `Reader` has them, those that are not asked for left out."""
    return [number for number in dict.fromkeys([first, second, *among]) if number in among]


def answers_for(number):
    """What the images of a class make `Reader` answer: the class, or it second, or it not at all."""
    other, another = (number + 1) % 1000, (number + 500) % 1000
    return [(number, other), (other, number), (other, another)][number % 3]


def counted(numbers, among=range(1000)):
    """The score of one image of each class, one by one."""
    orders = {number: ranking(*answers_for(number), among) for number in numbers}
    first = [number for number in numbers if orders[number][0] == number]
    return len(numbers), len(first), sum(number in orders[number][:5] for number in numbers)


def scorer_of(network=None, numbers=NUMBERS, **others):
    return Scorer(network or Reader(), numbers, small_config(), ALONE, Precision("fp32", "cpu"), **others)


def counts(score):
    return score.images, score.correct1, score.correct5


def folders_of(root, name):
    return ClassFolders(root, folder_synsets(root, set_synsets(name)))


@pytest.fixture(scope="module")
def trees(shared):
    """Three sets, an image of each class, whose answers are those of `answers_for`."""

    def fill(folder):
        for number in range(1000):
            answer(folder / "ImageNet-V2" / str(number) / "image.jpeg", *answers_for(number))
        for name in ("ImageNet-A", "ImageNet-R"):
            for synset in set_synsets(name):
                answer(folder / name / synset / "image.jpg", *answers_for(NUMBERS[synset]))

    return shared("imagenet sets", fill)


# What is known of the sets


@pytest.mark.parametrize("letter", ["a", "r"])
def test_the_subsets_are_timms_by_their_indices_too(letter):
    indices = Path(ImageNetInfo.__init__.__code__.co_filename).parent / "_info" / f"imagenet_{letter}_indices.txt"
    synsets = set_synsets(f"ImageNet-{letter.upper()}")
    assert [NUMBERS[synset] for synset in synsets] == [int(line) for line in indices.read_text().split()]
    assert len(synsets) == 200


def test_real_labels_most_of_the_validation_images():
    assert len(LABELS) == PUBLISHED_IMAGES["ImageNet"]
    assert sum(map(bool, LABELS)) == PUBLISHED_IMAGES["ImageNet-ReaL"]


def test_nameless_networks_of_1000_classes_are_numbered_as_imagenet_and_others_by_their_names():
    assert network_numbers(None, 1000) == NUMBERS
    numbers = network_numbers(SYNSETS[::-1], 1000)
    assert (numbers[SYNSETS[0]], numbers[SYNSETS[999]]) == (999, 0)


@pytest.mark.parametrize("classes", [None, ["cat", "dog"], [*SYNSETS[:999], "n00000000"], [*SYNSETS, "n00000000"]])
def test_networks_of_other_classes_are_refused(classes):
    with pytest.raises(UserError, match="classes are not ImageNet-1K's"):
        network_numbers(classes, len(classes or "ab"))


@pytest.mark.parametrize(
    ("path", "variant"),
    [
        ("imagenetv2-matched-frequency-format-val", "matched-frequency"),
        ("imagenetv2-threshold0.7-format-val", "threshold0.7"),
        ("imagenetv2-top-images/all", "top-images"),
        ("mine", "mine"),
    ],
)
def test_a_folder_of_imagenet_v2_names_its_variant(tmp_path, path, variant):
    assert v2_variant(tmp_path / path) == variant


# Class folders


def test_numbered_folders_are_class_numbers_and_no_places_in_the_order_of_their_names(trees):
    synsets = folder_synsets(trees / "ImageNet-V2", SYNSETS)
    assert synsets[:4] == [SYNSETS[0], SYNSETS[1], SYNSETS[10], SYNSETS[100]]
    assert sorted(synsets) == SYNSETS


def test_class_folders_that_are_missing_or_too_many_are_named(tmp_path):
    wanted = set_synsets("ImageNet-A")
    for name in (*wanted[2:], "5", "n01440764"):
        (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=f"lacks {wanted[0]}, {wanted[1]}; has besides 5, n01440764: unpack"):
        folder_synsets(tmp_path, wanted)


def test_a_class_that_is_there_by_name_and_by_number_is_refused(tmp_path):
    for name in (*SYNSETS, "7"):
        (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=f"has besides {SYNSETS[7]}"):
        folder_synsets(tmp_path, SYNSETS)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="gone is no folder"):
        folder_synsets(tmp_path / "gone", SYNSETS)


# Scores of class folders


def test_images_in_numbered_folders_are_scored_by_their_class(trees):
    expected = counted(range(1000))
    assert expected[:2] == (1000, 334) and expected[2] >= 667
    assert counts(scorer_of().classes(folders_of(trees / "ImageNet-V2", "ImageNet-V2"))) == expected


def test_a_network_that_numbers_its_classes_otherwise_is_matched_by_name(trees):
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(0)).tolist()
    numbers = network_numbers([SYNSETS[number] for number in order], 1000)
    folders = folders_of(trees / "ImageNet-R", "ImageNet-R")
    assert counts(scorer_of(Reader(order), numbers).classes(folders)) == counts(scorer_of().classes(folders))


@pytest.mark.parametrize("name", ["ImageNet-A", "ImageNet-R"])
def test_classes_outside_a_subset_take_no_part(trees, name):
    subset = [NUMBERS[synset] for synset in set_synsets(name)]
    expected = counted(subset, among=subset)
    assert expected[1] > counted(subset)[1]  # an answer outside the subset gives way to the right one
    assert counts(scorer_of().classes(folders_of(trees / name, name))) == expected


def test_a_class_without_images_is_named(tmp_path, trees):
    for synset in set_synsets("ImageNet-A"):
        (tmp_path / synset).mkdir()
    with pytest.raises(UserError, match=f"classes without images .*{set_synsets('ImageNet-A')[0]}"):
        scorer_of().classes(folders_of(tmp_path, "ImageNet-A"))


# ReaL


@pytest.fixture
def real(tmp_path):
    """The first 40 validation images, in two folders and under two kinds of names; six have no label."""
    for number in range(1, 41):
        labels = [*LABELS[number - 1], 3]
        first, second = [(labels[-1], 4), (labels[0], 4), (5, labels[0]), (5, 6)][number % 4]
        suffix = "" if number % 2 else "_n01751748"
        answer(tmp_path / f"part{number % 3}" / f"ILSVRC2012_val_{number:08d}{suffix}.JPEG", first, second)
    (tmp_path / "notes.txt").write_text("no image")
    return tmp_path


def test_a_folder_that_cannot_be_read_is_named_and_not_passed_over(real, monkeypatch):
    refuse_to_list(monkeypatch, real / "part1")
    with pytest.raises(UserError, match="part1 cannot be read"):
        RealSource(real)
    with pytest.raises(UserError, match="part1 cannot be read"):
        folder_synsets(real / "part1", [])


def test_real_counts_any_of_an_images_labels_as_timm_does(real):
    source = RealSource(real)
    of_timm = RealLabelsImagenet([f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, 50_001)])
    labelled = [number for number in range(1, 41) if LABELS[number - 1]]
    paths = {int(path.stem[15:23]): path for path in real.rglob("*.JPEG")}
    assert [source.name(index) for index in range(len(source))] == [str(paths[number]) for number in labelled]
    for number in range(1, 41):
        red, green, blue = Image.open(paths[number]).getpixel((0, 0))
        logits = -torch.arange(1000.0)[None]
        logits[0, green + (blue >> 2 << 8)], logits[0, red + ((blue & 3) << 8)] = 1.0, 2.0
        of_timm.add_result(logits)
    score = scorer_of().labels(source)
    assert score.images == len(labelled) == 36
    assert (score.acc1, score.acc5) == pytest.approx((of_timm.get_accuracy(1), of_timm.get_accuracy(5)))
    assert 0 < score.correct1 < score.correct5 < score.images


def test_real_labels_are_matched_by_name_too(real):
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(1)).tolist()
    numbers = network_numbers([SYNSETS[number] for number in order], 1000)
    score = scorer_of(Reader(order), numbers).labels(RealSource(real))
    assert counts(score) == counts(scorer_of().labels(RealSource(real)))


@pytest.mark.parametrize("name", ["n01440764_1.JPEG", "ILSVRC2012_val_00050001.JPEG", "ILSVRC2012_val_00000000.JPEG"])
def test_an_image_of_another_name_is_no_validation_image(real, name):
    answer(real / name, 0, 1)
    with pytest.raises(UserError, match=rf"{name} has not its name in ILSVRC2012"):
        RealSource(real)


def test_a_validation_image_that_is_there_twice_is_refused(real):
    answer(real / "again" / "ILSVRC2012_val_00000002.JPEG", 0, 1)
    with pytest.raises(UserError, match="are the same validation image"):
        RealSource(real)


def test_a_folder_without_labelled_images_is_refused(tmp_path):
    answer(tmp_path / "ILSVRC2012_val_00000001.JPEG", 0, 1)  # which ReaL has no label for
    with pytest.raises(UserError, match="holds no ILSVRC2012_val_"):
        RealSource(tmp_path)


# ImageNet-C


def corruption_folders(root, group_of, lacking=()):
    for corruption in ALEXNET_ERRORS:
        for severity in SEVERITIES:
            if f"{corruption}/{severity}" not in lacking:
                (root / group_of(corruption) / corruption / str(severity)).mkdir(parents=True)
    return root


@pytest.mark.parametrize("group", ["", "noise"])
def test_corruptions_are_found_with_and_without_a_group(tmp_path, group):
    root = corruption_folders(tmp_path, lambda corruption: group)
    (tmp_path / "extra" / "spatter" / "1").mkdir(parents=True)
    found = find_corruptions(root)
    assert list(found) == list(ALEXNET_ERRORS) and len(found) == 15
    assert all(list(severities) == [1, 2, 3, 4, 5] for severities in found.values())
    assert found["fog"][3] == root / group / "fog" / "3"
    assert missing_corruptions(found) == []


def test_missing_corruptions_and_severities_are_named(tmp_path):
    lacking = ["snow/2", "fog/1", "fog/2", "fog/3", "fog/4", "fog/5"]
    found = find_corruptions(corruption_folders(tmp_path, lambda corruption: "g", lacking))
    assert missing_corruptions(found) == ["snow/2", "fog"]


def test_a_corruption_that_is_there_twice_is_refused(tmp_path):
    for group in ("noise", "old"):
        (tmp_path / group / "shot_noise" / "1").mkdir(parents=True)
    with pytest.raises(UserError, match="are the same corruption"):
        find_corruptions(tmp_path)


def test_a_folder_without_corruptions_is_told_the_layout(tmp_path):
    with pytest.raises(UserError, match=r"<corruption>/<severity>/<class>"):
        find_corruptions(tmp_path)


def test_alexnets_errors_are_100_percent_exactly():
    for corruption, error in ALEXNET_ERRORS.items():
        assert corruption_error(corruption, [error] * 5) == 100
        assert relative_corruption_error(corruption, [error] * 5, ALEXNET_CLEAN_ERROR) == 100


class Remembered:
    """Stands for a scorer: what it says of a folder depends on the folder only."""

    def __init__(self):
        self.asked = []

    def classes(self, folders, is_corrupted=False):
        assert is_corrupted
        self.asked.append(folders)
        corruption, severity = folders
        return Score(1000, 900 - 97 * severity - 13 * list(ALEXNET_ERRORS).index(corruption), 950, 1.0)


def test_mce_is_what_a_literal_loop_gives_over_the_75_folders():
    scorer, clean = Remembered(), Score(1000, 930, 990, 0.3)
    folders = {name: {severity: (name, severity) for severity in SEVERITIES} for name in ALEXNET_ERRORS}
    scores = score_corrupted(scorer, folders, is_main=True)
    assert scorer.asked == [(corruption, severity) for corruption in ALEXNET_ERRORS for severity in SEVERITIES]
    total = relative = 0.0
    for place, of_alexnet in enumerate(ALEXNET_ERRORS.values()):
        ours = theirs = added = added_theirs = 0.0
        for severity in range(1, 6):
            error = 1 - (900 - 97 * severity - 13 * place) / 1000
            ours += error
            theirs += of_alexnet
            added += error - 0.07
            added_theirs += of_alexnet - 0.4345
        total += 100 * ours / theirs / 15
        relative += 100 * added / added_theirs / 15
    mean = mean_row({corruption: corruption_row(corruption, scores[corruption], clean) for corruption in scores})
    assert (mean.ce, mean.relative_ce) == pytest.approx((total, relative))
    assert mean.images == 75_000
    assert mean.errors[1] == pytest.approx(100 * (0.1 + 0.097 + 0.013 * 7))
    assert mean.error == pytest.approx(sum(mean.errors.values()) / 5)


def some_rows(clean=None, lacking=()):
    every = {
        corruption: {s: Score(100, 40, 60, 1.0) for s in SEVERITIES if f"{corruption}/{s}" not in lacking}
        for corruption in ALEXNET_ERRORS
    }
    return {corruption: corruption_row(corruption, scores, clean) for corruption, scores in every.items()}


def test_there_is_no_mean_where_a_severity_is_missing_and_the_table_says_so():
    rows = some_rows(lacking=["snow/2"])
    assert mean_row(rows) is None
    assert rows["snow"].ce is None and rows["frost"].ce == pytest.approx(60 / 0.826572)
    lines = corruptions_table(rows, ["snow/2"]).splitlines()
    assert "| snow | 400 | 60.000 |  | 60.000 | 60.000 | 60.000 |  |  |" in lines
    assert lines[-1] == "No mCE, which takes all of ImageNet-C; missing: snow/2."
    assert "mean |" not in lines[-3]


def test_there_is_no_mean_where_a_corruption_is_missing():
    rows = some_rows()
    del rows["fog"]
    assert mean_row(rows) is None


def test_the_relative_mce_needs_the_clean_error():
    assert mean_row(some_rows()).relative_ce is None
    assert "relative" not in corruptions_table(some_rows(), [])
    clean = Score(100, 80, 90, 1.0)
    expected = sum(100 * 0.4 / (error - 0.4345) for error in ALEXNET_ERRORS.values()) / 15
    assert mean_row(some_rows(clean)).relative_ce == pytest.approx(expected)
    assert f"relative mCE {expected:.3f}, in percent of AlexNet's." in corruptions_table(some_rows(clean), [])


class Recorder(nn.Module):
    """Remembers its input."""

    def forward(self, images):
        self.images = images
        return torch.zeros(len(images), 1000)


@pytest.mark.parametrize("crop", [False, True])
def test_corrupted_images_stay_whole_unless_they_are_to_be_cropped(tmp_path, crop):
    image = noise(3, (SIZE, SIZE))
    (tmp_path / SYNSETS[5]).mkdir()
    image.save(tmp_path / SYNSETS[5] / "image.png")
    folders, network = ClassFolders(tmp_path, [SYNSETS[5]]), Recorder()
    scorer, norm = scorer_of(network, crop_corrupted=crop), Normalize(small_config(), CPU)
    scorer.classes(folders, is_corrupted=True)
    corrupted = network.images
    assert torch.equal(corrupted, norm(pil_to_tensor(image)[None])) != crop
    scorer.classes(folders)
    assert torch.equal(corrupted, network.images) == crop


# The program


def shade(number):
    """The colour of a class's images for the small network, another for each class."""
    return number % 10 * 25 + 10, number // 10 % 10 * 25 + 10, number // 100 * 25 + 10


@pytest.fixture(scope="module")
def sets(shared):
    """All sets, for a network that can tell colours: an image of each class, some in the colour of another class."""

    def fill(folder):
        seen = [number + (number % 3 == 0) for number in range(1000)]
        images = [Image.new("RGB", (SIZE, SIZE), shade(number % 1000)) for number in seen]

        def write(path, number):
            path.parent.mkdir(parents=True, exist_ok=True)
            images[number].save(path, "PNG")

        for number, synset in enumerate(SYNSETS):
            write(folder / "val" / synset / f"ILSVRC2012_val_{number + 1:08d}.JPEG", number)
            write(folder / "imagenetv2-threshold0.7" / str(number) / "image.png", number)
        for name in ("ImageNet-A", "ImageNet-R"):
            for synset in set_synsets(name):
                write(folder / name / synset / "image.png", NUMBERS[synset])
        (folder / "c" / "weather" / "snow").mkdir(parents=True)
        (folder / "c" / "fog").mkdir()
        (folder / "c" / "weather" / "snow" / "2").symlink_to(folder / "val")
        (folder / "c" / "fog" / "5").symlink_to(folder / "val")

    return shared("imagenet sets of colours", fill)


@pytest.fixture(scope="module")
def weights(shared):
    """A checkpoint of a small network that knows the 1000 synsets in another order, and most of their colours."""

    def fill(folder):
        torch.manual_seed(0)
        config = small_config()
        network = build_model(config, 1000).eval()
        order = torch.randperm(1000).tolist()
        data, norm = config.DATA, Normalize(config, CPU)
        images = torch.tensor([shade(number) for number in order], dtype=torch.uint8)[:, :, None, None]
        with torch.inference_mode():
            features = network.forward_features(norm(images.expand(-1, -1, data.IMG_SIZE, data.IMG_SIZE)))
            features = network.forward_head(features, pre_logits=True).double()
            centre = features.mean(0)
            weight = 1e5 * (features - centre)  # the nearest feature gets the largest logit
            network.head.fc.weight.copy_(weight)
            network.head.fc.bias.copy_(-weight @ centre - (weight * (features - centre)).sum(1) / 2)
        state = {"model": network.state_dict(), "config": config.dump(), "classes": [SYNSETS[n] for n in order]}
        checkpoint.save(state, folder / "best.pth")

    return shared("network of colours", fill) / "best.pth"


def everything(sets):
    named = {"--val": "val", "--real": "val", "--sketch": "val", "--imagenet-v2": "imagenetv2-threshold0.7"}
    named |= {"--imagenet-a": "ImageNet-A", "--imagenet-r": "ImageNet-R", "--imagenet-c": "c"}
    return [word for flag, name in named.items() for word in (flag, sets / name)]


@pytest.fixture(scope="module")
def alone(call, shared, weights, sets):
    """What one process prints and writes of all sets."""

    def fill(folder):
        result = call(
            "tools/score_sets.py", "--checkpoint", weights, *everything(sets), "--json", folder / "scores.json"
        )
        assert result.code == 0, result.stderr
        (folder / "out.txt").write_text(result.stdout)

    folder = shared("scores of sets", fill)
    return (folder / "out.txt").read_text(), json.loads((folder / "scores.json").read_text())


def test_every_set_has_its_row_and_its_counts(alone, weights):
    out, report = alone
    titles = ["ImageNet", "ImageNet-ReaL", "ImageNet-V2 threshold0.7", "ImageNet-A", "ImageNet-R", "ImageNet-Sketch"]
    assert [row["set"] for row in report["sets"]] == titles
    labelled = sum(map(bool, LABELS[:1000]))
    assert [row["images"] for row in report["sets"]] == [1000, labelled, 1000, 200, 200, 1000]
    assert report["weights"] == str(weights) and report["precision"] == "fp32"
    for row in report["sets"]:
        acc1, acc5 = (100 * row[name] / row["images"] for name in ("correct1", "correct5"))
        assert f"| {row['set']} | {row['images']:,} | {acc1:.3f} | {acc5:.3f} |" in out.splitlines()
    val, _, v2, a, r, sketch = report["sets"]
    assert 0.5 < val["correct1"] / 1000 < 0.67  # the colours of every third class are another's
    assert (v2["correct1"], sketch["correct5"]) == (val["correct1"], val["correct5"])
    assert a["acc1"] > val["acc1"] and r["acc1"] > val["acc1"]  # most other classes are left out
    assert "ImageNet-A has 200 images here, and 7500 as published" in out
    assert out.count("folders of ImageNet-C have 50000 images as published, but here snow/2 1000, fog/5 1000") == 1


def test_the_plain_set_scores_as_the_scoring_program_does(call, alone, weights, sets, tmp_path):
    (tmp_path / "c.yaml").write_text(small_config().dump())
    words = ["--cfg", tmp_path / "c.yaml", "--data-path", sets, "--resume", weights, "--json", tmp_path / "s.json"]
    result = call("test.py", *words)
    assert result.code == 0, result.stderr
    score = json.loads((tmp_path / "s.json").read_text())
    names = ("images", "correct1", "correct5")
    assert [score[name] for name in names] == [alone[1]["sets"][0][name] for name in names]


def test_a_part_of_imagenet_c_has_errors_and_no_mce(alone):
    out, report = alone
    part, val = report["imagenet_c"], report["sets"][0]
    error = 100 - val["acc1"]
    assert part["mce"] is None and part["mean"] is None and part["relative_mce"] is None
    assert part["corruptions"]["snow"]["errors"] == {"2": pytest.approx(error)}
    assert list(part["corruptions"]) == ["snow", "fog"]
    assert f"| fog | 1,000 |  |  |  |  | {error:.3f} |  |  |" in out
    assert part["missing"][:2] == ["gaussian_noise", "shot_noise"] and "snow/1" in part["missing"]
    assert "lacks gaussian_noise, shot_noise" in out and "No mCE" in out


@pytest.mark.slow
def test_two_ranks_score_as_one_does(start, alone, weights, sets, tmp_path):
    words = ["--checkpoint", weights, *everything(sets), "--batch-size", 33, "--json", tmp_path / "scores.json"]
    result = start("tools/score_sets.py", *words, ranks=2)
    assert result.code == 0, result.stderr
    report = json.loads((tmp_path / "scores.json").read_text())
    assert report["ranks"] == 2
    assert (report["sets"], report["imagenet_c"]) == (alone[1]["sets"], alone[1]["imagenet_c"])
    assert result.stdout.count("| ImageNet-R |") == 1  # only one of them speaks


def test_a_fused_network_scores_alike(call, alone, weights, sets, tmp_path):
    words = ["--checkpoint", weights, "--a", sets / "ImageNet-A", "--fuse", "--json", tmp_path / "s.json"]
    result = call("tools/score_sets.py", *words)
    assert result.code == 0, result.stderr
    report = json.loads((tmp_path / "s.json").read_text())
    assert report["fused"] and "imagenet_c" not in report
    assert report["sets"][0]["correct5"] == pytest.approx(alone[1]["sets"][3]["correct5"], abs=2)


def test_a_broken_image_stops_the_scoring_and_is_named(call, weights, sets, tmp_path):
    for synset in set_synsets("ImageNet-A"):
        (tmp_path / "a" / synset).mkdir(parents=True)
        (tmp_path / "a" / synset / "image.png").symlink_to(sets / "ImageNet-A" / synset / "image.png")
    broken = tmp_path / "a" / set_synsets("ImageNet-A")[7] / "broken.png"
    broken.write_bytes(b"no image")
    words = ["--checkpoint", weights, "--a", tmp_path / "a", "--json", tmp_path / "s.json"]
    result = call("tools/score_sets.py", *words)
    assert result.code == 2 and len(result.errors) == 1
    assert result.errors[0].startswith(f"{broken} of class {broken.parent.name} is broken")
    assert not (tmp_path / "s.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no set to score"),
        (["--a", "gone"], "gone is no folder"),
        (["--c", "gone"], "gone holds none of ImageNet-C's corruptions"),
        (["--real", "gone"], "gone is no folder"),
        (["--a", "gone", "--batch-size", "0"], "--batch-size: 0: give a whole number, at least 1"),
        (["--a", "gone", "--workers", "-1"], "--workers: -1: give a whole number, at least 0"),
        (["--a", "gone", "--json", "gone/s.json"], "--json gone/s.json: name a file in a folder that exists"),
    ],
)
def test_bad_input_is_one_line(call, words, message):
    result = call("tools/score_sets.py", "--checkpoint", "best.pth", *words)
    assert result.code == 2
    assert len(result.errors) == 1 and message in result.errors[0]


def test_a_network_of_other_classes_is_refused_before_anything_is_scored(call, sets, tmp_path):
    config = small_config()
    state = {"model": build_model(config, 3).state_dict(), "config": config.dump(), "classes": ["a", "b", "c"]}
    checkpoint.save(state, tmp_path / "other.pth")
    result = call("tools/score_sets.py", "--checkpoint", tmp_path / "other.pth", "--a", sets / "ImageNet-A")
    assert result.code == 2
    assert result.errors[0].startswith("the network's 3 classes are not ImageNet-1K's")


def test_the_document_shows_the_tables_as_they_are_printed():
    document = (ROOT / "docs" / "score_sets.md").read_text().splitlines()
    rows = some_rows(Score(100, 80, 90, 1.0))
    shown = [*sets_table([]).splitlines(), *corruptions_table(rows, []).splitlines()[:2]]
    assert set(shown) <= set(document)
    assert [name for line in document for name in rows if line.startswith(f"| {name} | 250,000 |")] == list(rows)
