"""Packed data sets: the folder's samples and nothing else, or nothing at all; and tar files that others packed."""

import errno
import io
import json
import os
import pickle
import shlex
import shutil
import signal
import tarfile
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers_unit import ALONE, CPU, configured, handle, noise, small_data_config, write_folder, write_tar
from PIL import Image
from torch.utils.data import DataLoader, Dataset

import tools.datasets.packing
from data.build import build_eval_data, build_train_data
from data.datasets import FolderSource, open_split
from data.tar import TarSource
from tools.datasets.ahead import ahead
from tools.datasets.packing import Sample, plan, read_back, write
from utils.dist import World
from utils.errors import UserError

PROGRAM = "tools/pack_dataset.py"
LONG = "long" * 40

# Classes and folders whose order depends on how names are compared, and names that are easily lost on the way.
NAMES = [
    *("n2/1.png", "n10/1.png", "n10/10.png", "n10/9.png", "N1/1.JPEG", "n 3/with space.jpg", "é/日本 ½².Png"),
    *("a/x/1.png", "a/x-y/1.png", "a/x/z/1.png", "a/1.webp", "a/B.bmp", "a/.hidden.png", "a-b/1.TIF", "a.b/1.png"),
    *("a/x/n2/1.png", f"{LONG}/{LONG}/{LONG}.png", "a/\udcff.png", "a/new\nline.png", "a/.index.json.png"),
    f"ö/{'日' * 60}.png",  # the last one, with a character that a header's name field cuts in two
]


def write_odd(root):
    """A split with all of `NAMES`, what the folder's reader leaves out, and links."""
    for number, name in enumerate(NAMES):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = io.BytesIO()
        noise(number, (5 + number, 4)).save(stream, "PNG")
        path.write_bytes(stream.getvalue())
    (root / "a" / "notes.txt").write_text("text")
    (root / "top.png").write_bytes(path.read_bytes())
    (root / "a" / "link.png").symlink_to(root / "n2" / "1.png")
    (root / "linked").symlink_to(root / "n10")
    return root


@pytest.fixture
def odd(tmp_path):
    """A data set with odd names."""
    for split in ("train", "val"):
        write_odd(tmp_path / "D" / split)
    return tmp_path / "D"


@pytest.fixture
def root(tmp_path):
    """A small data set."""
    write_folder(tmp_path / "D" / "train", {"ant": 7, "bee": 5, "cat": 9}, suffix=".JPEG")
    write_folder(tmp_path / "D" / "val", {"ant": 4, "bee": 6, "cat": 3}, lambda number: noise(100 + number))
    return tmp_path / "D"


@pytest.fixture
def pack(call, tmp_path):
    """Packs a data set and returns where it was packed to."""

    def run(root, *flags, name="P"):
        result = call(PROGRAM, "--data-path", root, "--output", tmp_path / name, *flags)
        assert (result.code, result.stderr) == (0, "")
        return tmp_path / name

    return run


def samples_of_folder(folder):
    """(bytes, class name, class number) by index, read from the files."""
    source = FolderSource(folder)
    paths = [Path(source.name(index)) for index in range(len(source))]
    return [
        (path.read_bytes(), source.class_of(index), source.classes.index(source.class_of(index)))
        for index, path in enumerate(paths)
    ]


def samples_of_tar(root, split="train"):
    source = TarSource(root, split)
    return [(source.content(index), source.class_of(index), source.read(index)[1]) for index in range(len(source))]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# Tar files are the folder


@pytest.mark.parametrize("size", [None, "6K", "1"], ids=["one file", "some files", "a file an image"])
def test_packed_folder_has_the_same_samples_at_the_same_indices(pack, odd, size):
    packed = pack(odd, *(["--shard-size", size] if size else []))
    for split in ("train", "val"):
        assert samples_of_tar(packed, split) == samples_of_folder(odd / split)
        assert TarSource(packed, split).classes == FolderSource(odd / split).classes
    assert len(samples_of_tar(packed)) == len(NAMES) + 1 + 3  # a link to a file, and one to a folder of three
    files = sorted(path.name for path in packed.iterdir())
    count = len(files) // 2
    assert count == {None: 1, "6K": count, "1": len(NAMES) + 4}[size] and (size != "6K" or 2 < count < len(NAMES))
    assert files[0] == (f"train-00000-of-{count:05d}.tar" if size else "train.tar")


def test_sizes_are_given_in_powers_of_1024_in_letters_of_either_case(pack, root, monkeypatch):
    sizes = []
    monkeypatch.setattr(tools.datasets.packing, "plan", lambda *given: sizes.append(given[3]) or plan(*given))
    for number, size in enumerate(("7000", "9K", "9k", "3M", "2g", "1T")):
        pack(root, "--shard-size", size, name=f"P{number}")
    assert sizes[::2] == sizes[1::2] == [7000, 9 * 1024, 9 * 1024, 3 * 1024**2, 2 * 1024**3, 1024**4]


def test_samples_of_a_packed_folder_are_named_by_file_and_path(pack, root):
    packed = pack(root)
    source = open_split(configured(DATA__DATASET="tar", DATA__DATA_PATH=str(packed)), "val", is_training=False)
    assert source.name(4) == f"{packed}/val.tar/bee/004.png"


def test_packed_files_are_equal_whenever_the_images_are(pack, root):
    first = pack(root)
    copy = shutil.copytree(root, root.parent / "copy", copy_function=shutil.copyfile)
    os.utime(copy / "train" / "ant" / "000.JPEG", (1, 1))
    assert contents(pack(copy, name="Q")) == contents(first)


class Reader(Dataset):
    """Whether a source gives what it should, read many times."""

    def __init__(self, source, contents):
        self.source, self.contents = source, contents

    def __len__(self):
        return 2

    def __getitem__(self, number):
        indices = [(7 + number) * step % len(self.contents) for step in range(5000)]
        return all(self.source.content(index) == self.contents[index] for index in indices)


def test_processes_read_a_file_that_is_already_open_without_disturbing_each_other(pack, root):
    source = TarSource(pack(root), "train")
    contents = [source.content(index) for index in range(len(source))]
    assert list(DataLoader(Reader(source, contents), batch_size=None, num_workers=2)) == [True, True]


def test_a_copy_opens_the_files_itself(pack, root):
    source = TarSource(pack(root), "train")
    content = source.content(3)
    assert pickle.loads(pickle.dumps(source)).content(3) == content


def result_of(run):
    """The last checkpoint, without the names of the data and what depends on those."""
    return {name: value for name, value in run.checkpoint().items() if name not in ("config", "checksum")}


@pytest.mark.slow
def test_training_on_a_packed_folder_is_training_on_the_folder(
    pack, train, differences, tree, tmp_path, everything_random
):
    packed = pack(tree, "--shard-size", "60K")
    opts = f"{everything_random} TRAIN.EPOCHS 2 TRAIN.SAVE_UPDATES 4"
    whole = train(tmp_path / "folder", opts=opts)
    other = train(tmp_path / "tar", "--data-path", packed, opts=f"{opts} DATA.DATASET tar")
    assert other.numbers() == whole.numbers() and other.evaluations()
    assert differences(result_of(whole), result_of(other)) == []
    output = tmp_path / "both"  # a run that goes on inside its second epoch, on the other form
    later = shutil.ignore_patterns("last.pth", "ckpt_epoch_2.pth")
    shutil.copytree(whole.folder, output / "tiny" / "run", ignore=later)
    both = train(output, "--data-path", packed, "--allow-changes", opts=f"{opts} DATA.DATASET tar")
    assert "Train: [1/2][5/8]" in both.result.stdout and "Train: [1/2][4/8]" not in both.result.stdout
    assert differences(result_of(whole), result_of(both)) == []


# Tar files of other makers


@pytest.mark.parametrize("prefix", ["", "./", "/"])
def test_a_tar_file_of_another_maker_is_its_folder_too(odd, tmp_path, prefix):
    (odd / "train" / "a" / "link.png").unlink()
    (odd / "train" / "linked").unlink()
    with tarfile.open(tmp_path / "train.tar", "w") as file:
        for path in sorted((odd / "train").rglob("*.*"), reverse=True):
            if path.is_file():
                member = file.gettarinfo(path)
                member.name = prefix + str(path.relative_to(odd / "train"))  # `add` would take a slash in front away
                file.addfile(member, path.open("rb"))
    assert samples_of_tar(tmp_path) == samples_of_folder(odd / "train")


def test_a_member_that_was_written_again_replaces_the_first(root, tmp_path):
    write_tar(tmp_path / "train.tar", root / "train")
    noise(7).save(root / "train" / "bee" / "009.JPEG")
    with tarfile.open(tmp_path / "train.tar", "a") as file:
        file.add(root / "train" / "bee" / "009.JPEG", "bee/009.JPEG")
    assert samples_of_tar(tmp_path) == samples_of_folder(root / "train")


@pytest.mark.parametrize(
    ("arcname", "told"), [("imagenet/train", "all images lie below imagenet/train/"), ("x", "all images lie below x/")]
)
def test_a_tar_file_with_another_folder_around_the_classes_is_refused(root, tmp_path, arcname, told):
    with tarfile.open(tmp_path / "train.tar", "w") as file:
        file.add(root / "train", arcname)
    with pytest.raises(UserError, match=told):
        TarSource(tmp_path, "train")


def test_a_tar_file_of_links_is_refused(root, tmp_path):
    (root / "train" / "ant" / "link.png").symlink_to(root / "train" / "bee" / "007.JPEG")
    write_tar(tmp_path / "train.tar", root / "train")
    with pytest.raises(UserError, match=r"train\.tar .*ant/link\.png is a link"):
        TarSource(tmp_path, "train")


def test_files_of_one_class_each_are_a_split_whatever_folders_it_has(root, tmp_path):
    for number, name in enumerate(("ant", "bee", "cat")):
        with tarfile.open(tmp_path / f"train-{number:05d}-of-00003.tar", "w") as file:
            file.add(root / "train" / name, f"{name}/images")
    assert [content for content, *_ in samples_of_tar(tmp_path)] == [
        content for content, *_ in samples_of_folder(root / "train")
    ]


def test_files_that_are_numbered_otherwise_are_not_a_splits(root, tmp_path):
    write_tar(tmp_path / "train-0-of-1.tar", root / "train")
    with pytest.raises(UserError, match=r"train\.tar does not exist"):
        TarSource(tmp_path, "train")


# Damage


def flipped(content, header):
    return content[:header] + bytes([content[header] ^ 1]) + content[header + 1 :]


def zeroed(content, header):
    return content[:header] + bytes(512) + content[header + 512 :]


def cut_within(content, header):
    return content[: header + 100]


def cut_before(content, header):
    return content[:header]


@pytest.mark.parametrize("spoil", [flipped, zeroed, cut_within, cut_before])
def test_a_damaged_tar_file_without_an_index_is_refused(root, tmp_path, spoil):
    path = write_tar(tmp_path / "train.tar", root / "train")
    with tarfile.open(path) as file:
        header = file.getmembers()[-3].offset
    path.write_bytes(spoil(path.read_bytes(), header))
    with pytest.raises(UserError, match=rf"train\.tar .*(damaged|cut off) at byte {header:,}"):
        TarSource(tmp_path, "train")


@pytest.mark.parametrize("keep", [0.5, 0.9, -1024, -512, -1])
def test_a_packed_file_that_is_cut_short_is_refused(pack, root, keep):
    path = pack(root) / "train.tar"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep) if keep > 0 else keep])
    with pytest.raises(UserError, match=r"train\.tar cannot be opened \(.*\): copy or pack it again"):
        TarSource(path.parent, "train")


def test_a_file_that_was_packed_in_another_order_around_its_index_is_refused(pack, root):
    path = pack(root) / "train.tar"
    with tarfile.open(path) as file:
        first, *rest = [(member, file.extractfile(member).read()) for member in file]
    with path.open("wb") as stream:
        for member, content in (first, *reversed(rest)):
            stream.write(member.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512))
        stream.write(bytes(1024))
    with pytest.raises(UserError, match="not as ordered as when it was packed"):
        TarSource(path.parent, "train")


@pytest.mark.parametrize("number", [0, 1, -1])
def test_a_missing_file_of_several_is_refused(pack, root, number):
    packed = pack(root, "--shard-size", "9K")
    path = sorted(packed.glob("train*"))[number]
    path.unlink()
    with pytest.raises(UserError, match=f"{path.name} does not exist"):
        TarSource(packed, "train")


def test_a_file_that_is_cut_short_while_it_is_read_is_complained_of(pack, root):
    packed = pack(root)
    source = TarSource(packed, "train")
    source.content(0)
    os.truncate(packed / "train.tar", 5000)
    with pytest.raises(OSError, match=r"train\.tar ends within it"):
        source.content(20)


def test_a_file_that_is_replaced_after_it_was_indexed_is_complained_of(pack, root):
    packed = pack(root)
    source = TarSource(packed, "train")
    content = (packed / "train.tar").read_bytes()
    (packed / "train.tar").unlink()
    (packed / "train.tar").write_bytes(content)
    with pytest.raises(OSError, match=r"train\.tar was replaced since this run began"):
        source.content(20)


def test_no_more_than_some_files_are_open_at_a_time(pack, root, monkeypatch):
    monkeypatch.setattr("data.tar._MOST_OPEN", 2)
    packed = pack(root, "--shard-size", "1")
    source = TarSource(packed, "train")
    wanted = [content for content, *_ in samples_of_folder(root / "train")]
    before = len(list(Path("/proc/self/fd").iterdir()))
    assert [source.content(index) for index in [*range(21), *range(21)]] == [*wanted, *wanted]
    assert len(list(Path("/proc/self/fd").iterdir())) == before + 2


def test_an_image_is_read_to_its_end_where_the_system_gives_it_in_parts(pack, root, monkeypatch):
    packed, pread = pack(root), os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, offset: pread(file, min(size, 1000), offset))
    assert samples_of_tar(packed) == samples_of_folder(root / "train")


# WebDataset shards


def members_of(path):
    with tarfile.open(path) as file:
        return [(member.name, file.extractfile(member).read()) for member in file]


@pytest.mark.parametrize("size", [None, "6K"])
def test_shards_hold_every_image_of_the_folder_once_with_its_class_number(pack, odd, size):
    packed = pack(odd, "--form", "wds", *(["--shard-size", size] if size else []))
    info = json.loads((packed / "_info.json").read_text())
    assert info["classes"] == FolderSource(odd / "train").classes
    for split in ("train", "val"):
        listed, found = info["splits"][split], []
        assert (listed["name"], listed["num_samples"]) == (split, len(NAMES) + 4)
        for name, length in zip(listed["filenames"], listed["shard_lengths"], strict=True):
            members = members_of(packed / name)
            assert len(members) == 2 * length
            for (image, content), (label, target) in zip(members[::2], members[1::2], strict=True):
                assert image.partition(".")[0] == label.removesuffix(".cls")
                assert image.partition(".")[2] in ("jpg", "png", "webp")  # what timm's reader asks for
                found.append((int(image.partition(".")[0]), content, int(target)))
        wanted = [(index, content, target) for index, (content, _, target) in enumerate(samples_of_folder(odd / split))]
        assert sorted(found) == wanted and found != wanted
    names = {name for split in info["splits"].values() for name in split["filenames"]}
    assert {path.name for path in packed.iterdir()} == names | {"_info.json"}
    assert len(names) > 4


def test_shards_are_the_same_for_a_seed_and_others_for_another(pack, root):
    first, again, other = (
        contents(pack(root, "--form", "wds", "--shard-size", "1G", "--seed", seed, name=f"P{number}"))
        for number, seed in enumerate((1, 1, 2))
    )
    assert first == again
    assert [name for name in first if first[name] != other[name]] == [name for name in first if name.endswith(".tar")]


def test_small_data_has_a_shard_for_each_of_many_loader_processes(pack, tmp_path):
    write_folder(tmp_path / "D" / "train", {"ant": 50, "bee": 60})
    write_folder(tmp_path / "D" / "val", {"ant": 3, "bee": 6})
    packed = pack(tmp_path / "D", "--form", "wds")
    assert (len(list(packed.glob("train-*"))), len(list(packed.glob("val-*")))) == (64, 1)
    assert max(len(members_of(path)) for path in packed.glob("train-*")) <= 2 * 3


def test_fewer_images_than_that_have_a_shard_each(pack, root):
    assert len(list(pack(root, "--form", "wds").glob("train-*"))) == 21


def test_a_shard_holds_images_of_all_classes(pack, tmp_path):
    write_folder(tmp_path / "D" / "train", {"ant": 30, "bee": 30})
    write_folder(tmp_path / "D" / "val", {"ant": 1, "bee": 1})
    shards = sorted(pack(tmp_path / "D", "--form", "wds", "--shard-size", "60K").glob("train*"))
    assert len(shards) > 3
    for shard in shards:
        labels = Counter(content for name, content in members_of(shard) if name.endswith(".cls"))
        assert min(labels[b"0"], labels[b"1"]) > 2


def scored(config, ranks):
    parts = [build_eval_data(config, World(rank, ranks, CPU), ["ant", "bee", "cat"], 3) for rank in range(ranks)]
    assert all((part.classes, part.images) == (["ant", "bee", "cat"], 13) for part in parts)
    batches = [batch for part in parts for batch in part.loader]
    return sorted(
        (image.numpy().tobytes(), int(label)) for batch in batches for image, label in zip(*batch[:2], strict=True)
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_the_stream_scores_every_image_of_the_folder_once_on_any_number_of_ranks(pack, root, workers):
    packed = pack(root, "--form", "wds", "--shard-size", "9K")
    config = small_data_config(packed, DATA__DATASET="wds/", DATA__NUM_WORKERS=workers)
    wanted = small_data_config(root)
    assert scored(config, 1) == scored(config, 3) == scored(wanted, 1)
    data = build_train_data(config, ALONE)
    assert (data.classes, len(list(data.loader))) == (["ant", "bee", "cat"], data.steps_per_epoch)


def test_the_stream_gives_images_of_every_kind_as_the_folder_does(pack, root):
    grey = np.asarray(noise(1).convert("L")).astype(np.uint16) * 257
    Image.fromarray(grey).save(root / "val" / "ant" / "000.png")
    noise(2).convert("RGBA").save(root / "val" / "ant" / "001.png")
    noise(3).convert("P").save(root / "val" / "ant" / "002.png", transparency=4)
    packed = pack(root, "--form", "wds")
    assert scored(small_data_config(packed, DATA__DATASET="wds/"), 1) == scored(small_data_config(root), 1)


def test_fewer_training_shards_than_loader_processes_are_refused(pack, root, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(8)), raising=False)
    packed = pack(root, "--form", "wds", "--shard-size", "22K")
    assert len(list(packed.glob("train-*"))) == 4

    def build(workers, ranks):
        config = small_data_config(packed, DATA__DATASET="wds/", DATA__NUM_WORKERS=workers, DATA__BATCH_SIZE=1)
        return build_train_data(config, World(0, ranks, CPU))

    for workers, ranks in ((4, 1), (2, 2), (1, 4), (0, 4)):
        assert build(workers, ranks).steps_per_epoch
    with pytest.raises(UserError, match=r"P has 4 .* 6 loader processes on 2 .*: lower DATA\.NUM_WORKERS to 2 or pack"):
        build(3, 2)
    with pytest.raises(UserError, match=r"5 loader processes on 5 rank\(s\), and each needs one: pack again"):
        build(0, 5)


# Nothing or all


def no_output(root):
    return sorted(path.name for path in root.parent.iterdir()) == ["D"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--data-path", "{D}"], "--output"),
        (["--output", "{P}"], "--data-path"),
        (["--data-path", "{D}", "--output", "{P}", "--form", "zip"], "--form"),
        (["--data-path", "{D}", "--output", "{P}", "--shard-size", "4Q"], "--shard-size 4Q: give a number of bytes"),
        (["--data-path", "{D}", "--output", "{P}", "--shard-size", "0"], "--shard-size 0: give a number of bytes"),
        (["--data-path", "{D}/nowhere", "--output", "{P}"], "nowhere/train is no folder"),
        (["--data-path", "{D}", "--output", "{D}"], "D exists: name another"),
        (["--data-path", "{D}", "--output", "{D}/train/ant/000.JPEG"], "000.JPEG exists: name another"),
        (["--data-path", "{D}", "--output", "{P}/within"], "P/within: name a place in a folder that exists"),
    ],
)
def test_a_wrong_command_line_ends_in_one_line_and_nothing_is_written(call, root, words, said):
    result = call(PROGRAM, *(word.format(D=root, P=root.parent / "P") for word in words))
    assert (result.code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert said in result.errors[0] and no_output(root)


def dangling(folder):
    (folder / "ant" / "bad.png").symlink_to(folder / "nowhere.png")
    return "bad.png: No such file"


def empty(folder):
    (folder / "ant" / "bad.png").touch()
    return "bad.png: empty"


def pipe(folder):
    os.mkfifo(folder / "ant" / "bad.png")
    return "bad.png: no file"


def loop(folder):
    (folder / "ant" / "bad.png").symlink_to("bad.png")
    return "bad.png: Too many levels of symbolic links"


def class_without_images(folder):
    (folder / "dog").mkdir()
    return "dog"


def class_of_one_split(folder):
    write_folder(folder, {"dog": 1})
    return "only in"


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("spoil", [dangling, empty, pipe, loop, class_without_images, class_of_one_split])
def test_a_folder_that_cannot_be_packed_is_refused_before_anything_is_written(call, root, monkeypatch, spoil, split):
    monkeypatch.setattr(tools.datasets.packing, "write", None)
    said = spoil(root / split)
    result = call(PROGRAM, "--data-path", root, "--output", root.parent / "P")
    assert (result.code, result.stderr.count("\n")) == (2, 1)
    assert said in result.errors[0] and no_output(root)


def test_a_file_that_may_not_be_read_is_refused_before_anything_is_written(call, root, monkeypatch):
    monkeypatch.setattr(tools.datasets.packing, "write", None)
    monkeypatch.setattr(os, "access", lambda path, _mode: Path(path).name != "003.JPEG")  # root may read all
    result = call(PROGRAM, "--data-path", root, "--output", root.parent / "P")
    assert result.code == 2 and "ant/003.JPEG: no permission to read it" in result.errors[0] and no_output(root)


def test_all_files_that_cannot_be_packed_are_counted(call, root):
    for number in range(7):
        (root / "train" / "bee" / f"bad{number}.png").touch()
    result = call(PROGRAM, "--data-path", root, "--output", root.parent / "P")
    assert "7 file(s) cannot be packed" in result.errors[0] and "and 2 more" in result.errors[0]


@pytest.mark.parametrize("form", tools.datasets.packing.FORMS)
def test_as_much_space_as_the_files_take_is_asked_for_before_anything_is_written(call, pack, odd, monkeypatch, form):
    flags, free = ("--form", form, "--shard-size", "6K"), [2**40]
    monkeypatch.setattr(shutil, "disk_usage", lambda _folder: SimpleNamespace(free=free[0]))
    packed = pack(odd, *flags)
    free[0] = sum(path.stat().st_size for path in packed.glob("*.tar"))
    shutil.rmtree(packed)
    shutil.rmtree(pack(odd, *flags))
    free[0] -= 1
    result = call(PROGRAM, "--data-path", odd, "--output", packed, *flags)
    assert result.code == 2 and "GiB free, but" in result.errors[0] and no_output(odd)


@pytest.mark.parametrize(
    ("end", "code"),
    [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130), (OSError(28, "No space left on device"), 2)],
    ids=["SIGTERM", "SIGHUP", "SIGINT", "full disk"],
)
@pytest.mark.parametrize("form", tools.datasets.packing.FORMS)
def test_nothing_is_left_of_packing_that_is_ended(call, root, monkeypatch, request, form, end, code):
    handlers = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGHUP: signal.SIG_DFL,
    }
    handle(request, handlers)
    seen, remove = [], shutil.rmtree

    def give(source, sample):
        if len(seen) == 25:  # in the second split
            if isinstance(end, OSError):
                raise end
            os.kill(os.getpid(), end)
        seen.append(sample)
        return (source / sample.name).read_bytes()

    def remove_while_signalled(folder, **settings):
        for number in handlers:
            os.kill(os.getpid(), number)
        remove(folder, **settings)

    monkeypatch.setattr(tools.datasets.packing, "_content", give)
    monkeypatch.setattr(shutil, "rmtree", remove_while_signalled)
    result = call(PROGRAM, "--data-path", root, "--output", root.parent / "P", "--form", form)
    assert (result.code, result.stderr.count("\n")) == (code, int(code == 2))
    assert no_output(root) and (code != 2 or "No space left on device): free some space" in result.errors[0])
    assert {number: signal.getsignal(number) for number in handlers} == handlers


def test_packing_goes_on_where_signals_are_to_be_ignored(pack, root, monkeypatch, request):
    handle(request, {signal.SIGHUP: signal.SIG_IGN})
    content = tools.datasets.packing._content
    monkeypatch.setattr(
        tools.datasets.packing, "_content", lambda *given: os.kill(os.getpid(), signal.SIGHUP) or content(*given)
    )
    assert samples_of_tar(pack(root)) == samples_of_folder(root / "train")


def test_space_is_asked_for_only_where_it_is_missing(call, root, monkeypatch):
    def fail(*_given):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(tools.datasets.packing, "_content", fail)
    result = call(PROGRAM, "--data-path", root, "--output", root.parent / "P")
    assert "cannot be written ([Errno 5] Input/output error): choose another place" in result.errors[0]


def test_a_folder_left_by_a_killed_program_is_named(call, root):
    (root.parent / "P.part").mkdir()
    result = call(PROGRAM, "--data-path", root, "--output", root.parent / "P")
    assert result.code == 2 and f"{root.parent}/P.part exists: remove it" in result.errors[0]
    assert (root.parent / "P.part").is_dir()


def test_an_empty_folder_may_be_the_output(pack, root):
    (root.parent / "P").mkdir()
    assert samples_of_tar(pack(root)) == samples_of_folder(root / "train")


@pytest.mark.parametrize("form", tools.datasets.packing.FORMS)
def test_what_reads_back_otherwise_is_not_kept(call, root, monkeypatch, form):
    sync = os.fsync

    def spoil(file):
        sync(file)
        os.pwrite(file, b"spoilt", os.fstat(file).st_size - 4000)

    monkeypatch.setattr(os, "fsync", spoil)
    result = call(PROGRAM, "--data-path", root, "--output", root.parent / "P", "--form", form)
    assert result.code == 2 and "does not read back as it was written" in result.errors[0]
    assert no_output(root)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda first, *others: others,
        lambda *found: found[:-1],
        lambda *found: (*found, found[-1]),
        lambda first, *others: (((first[0][0], 2), first[1]), *others),
        lambda first, second, *others: ((second[0], first[1]), second, *others),
    ],
    ids=["the first is lost", "the last is lost", "one too many", "another class", "another name"],
)
def test_files_that_read_back_as_other_images_are_not_kept(call, root, monkeypatch, spoil):
    monkeypatch.setattr(tools.datasets.packing, "read_back", lambda *given: iter(spoil(*read_back(*given))))
    result = call(PROGRAM, "--data-path", root, "--output", root.parent / "P")
    assert result.code == 2 and "does not read back as it was written" in result.errors[0]
    assert no_output(root)


def test_an_image_that_changes_while_it_is_packed_is_named(root, tmp_path):
    (shard,) = plan("tar", "train", [Sample(0, "ant/000.JPEG", 0, 5)], None)
    with pytest.raises(UserError, match=r"ant/000\.JPEG changed while it was packed"):
        list(write("tar", tmp_path, root / "train", shard))


def test_results_come_in_order_from_a_bounded_number_of_items_ahead():
    begun = []
    for number, result in enumerate(ahead(lambda item: begun.append(item) or item, range(2000))):
        assert result == number and len(begun) <= number + 256
    assert number == 1999


def test_what_is_queued_is_given_up_after_an_error():
    begun = []

    def do(item):
        begun.append(item)
        time.sleep(0.02)
        return 1 // item

    with pytest.raises(ZeroDivisionError):
        list(ahead(do, range(200)))
    assert len(begun) < 100


# What is said


def test_the_command_line_that_it_ends_with_opens_the_data(call, root, tmp_path):
    for form, size in (("tar", "9G"), ("wds", "9K")):
        result = call(
            *(PROGRAM, "--data-path", root, "--output", tmp_path / f"a {form}", "--form", form, "--shard-size", size)
        )
        assert "21 images in" in result.stdout.splitlines()[0] and "13 images in" in result.stdout.splitlines()[1]
        name = "tar" if form == "tar" else "wds/"
        words = ["--data-path", str(tmp_path / f"a {form}"), "--opts", "DATA.DATASET", name]
        assert shlex.split(result.stdout.splitlines()[2])[-5:] == words
    shards = len(list((tmp_path / "a wds").glob("train*")))
    assert f"at most {shards} loader processes on" in result.stdout.splitlines()[3]
    result = call(*(PROGRAM, "--data-path", root, "--output", tmp_path / "one", "--form", "wds", "--shard-size", "9G"))
    assert "at most 1 loader process on" in result.stdout.splitlines()[3]


def test_packed_files_are_checked_as_their_folder_is(call, pack, root, tmp_path):
    packed, reports = pack(root, "--shard-size", "9K"), []
    for flags in (["--data-path", root], ["--data-path", packed, "--dataset", "tar"]):
        result = call("tools/check_data.py", *flags, "--workers", 1, "--json", tmp_path / "report.json")
        assert result.code == 0
        reports.append(json.loads((tmp_path / "report.json").read_text()))
    for key in ("train", "val"):
        assert reports[0][key] == reports[1][key]
