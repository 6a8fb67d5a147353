"""Bad input ends at once, with one line that names the thing and says what to do."""

import os
import pathlib
import pickle
import shutil

import pytest
import torch

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent

# Configurations: what bad.yaml holds, and what the line must name.
BAD_FILES = {
    "empty": ("", ["bad.yaml"]),
    "text": ("batch size 64\n", ["bad.yaml"]),
    "list": ("- TRAIN\n- DATA\n", ["bad.yaml"]),
    "binary": (bytes(range(256)), ["bad.yaml"]),
    "zero bytes in it": ("TAG: a\0b\n", ["bad.yaml"]),
    "bracket left open": ("DATA:\n  BATCH_SIZE: [1\nTRAIN: 2\n", ["bad.yaml line 3"]),
    "tab": ("TRAIN:\n\tEPOCHS: 3\n", ["bad.yaml line 2"]),
    "two documents": ("TAG: a\n---\nTAG: b\n", ["bad.yaml line 2"]),
    "list for a key": ("? [TAG]\n: a\n", ["bad.yaml line 1"]),
    "date that is none": ("TAG: 2024-13-41\n", ["bad.yaml", "month"]),
    "code": ("TAG: !!python/object/apply:os.mkdir ['ran']\n", ["bad.yaml line 1"]),
    "unknown key": ("TRAIN:\n  EPOCH: 3\n", ["bad.yaml", "TRAIN.EPOCH:", "did you mean TRAIN.EPOCHS?"]),
    "unknown section": ("OPTIMIZER:\n  NAME: sgd\n", ["bad.yaml", "OPTIMIZER", "TRAIN"]),
    "key of another section": ("TRAIN:\n  BATCH_SIZE: 3\n", ["bad.yaml", "TRAIN.BATCH_SIZE"]),
    "duplicate key": (
        "TRAIN:\n  EPOCHS: 3\n  BASE_LR: 1.0e-3\n  EPOCHS: 4\n",
        ["bad.yaml line 2", "EPOCHS", "twice"],
    ),
    "duplicate section": ("TRAIN: {EPOCHS: 3}\nTAG: a\nTRAIN: {SAVE_UPDATES: 4}\n", ["bad.yaml", "TRAIN", "twice"]),
    "text for a number": ("DATA:\n  BATCH_SIZE: many\n", ["bad.yaml", "DATA.BATCH_SIZE", "'many'", "whole number"]),
    "fraction for a whole number": ("TRAIN:\n  EPOCHS: 1.5\n", ["bad.yaml", "TRAIN.EPOCHS", "1.5", "whole number"]),
    "word for True or False": ("TRAIN:\n  AUTO_RESUME: maybe\n", ["bad.yaml", "TRAIN.AUTO_RESUME", "True or False"]),
    "True for a number": ("DATA:\n  NUM_WORKERS: True\n", ["bad.yaml", "DATA.NUM_WORKERS", "whole number"]),
    "number for text": ("TAG: 2024\n", ["bad.yaml", "TAG", "2024", "text"]),
    "number for a list": ("MODEL:\n  GMA:\n    MLP_RATIOS: 4\n", ["bad.yaml", "MODEL.GMA.MLP_RATIOS", "list"]),
    "word in a list": (
        "MODEL:\n  GMA:\n    MLP_RATIOS: [4, four, 4, 4]\n",
        ["bad.yaml", "MODEL.GMA.MLP_RATIOS[1]", "'four'"],
    ),
    "value for a section": ("TRAIN: 3\n", ["bad.yaml", "TRAIN is 3 but holds keys"]),
    "section without keys": ("TRAIN:\nTAG: a\n", ["bad.yaml", "TRAIN is None but holds keys"]),
    "keys below a value": ("TRAIN:\n  EPOCHS:\n    FIRST: 3\n", ["bad.yaml", "TRAIN.EPOCHS", "whole number"]),
    "list of the wrong length": (
        "MODEL:\n  GMA:\n    SERIAL_DEPTHS: [1, 1, 1]\n",
        ["MODEL.GMA.SERIAL_DEPTHS", "3", "NUM_STAGES", "4"],
    ),
    "bounds of the wrong length": ("AUG:\n  SCALE: [0.5]\n", ["AUG.SCALE", "[0.5]"]),
    "bounds in the wrong order": ("AUG:\n  RATIO: [2.0, 0.5]\n", ["AUG.RATIO", "[2.0, 0.5]"]),
    "means for other channels": ("DATA:\n  MEAN: [0.5]\n", ["DATA.MEAN", "MODEL.GMA.IN_DIM", "3"]),
    # YAML itself takes a number with an exponent and no point for text.
    "exponent out of range": ("TRAIN:\n  BASE_LR: -5e-4\n", ["TRAIN.BASE_LR is -0.0005", "at least 0"]),
    "number that is none": ("TRAIN:\n  BASE_LR: .nan\n", ["TRAIN.BASE_LR is nan", "at least 0"]),
    "number out of range": ("TRAIN:\n  EPOCHS: 0\n", ["TRAIN.EPOCHS is 0", "at least 1"]),
    "share out of range": ("DATA:\n  MAX_BROKEN: 2\n", ["DATA.MAX_BROKEN is 2.0", "from 0 to 1"]),
    "longer warm-up than run": (
        "TRAIN:\n  EPOCHS: 3\n  WARMUP_EPOCHS: 4\n",
        ["TRAIN.WARMUP_EPOCHS 4", "TRAIN.EPOCHS 3"],
    ),
    "unknown choice": ("DATA:\n  ON_ERROR: ignore\n", ["DATA.ON_ERROR is 'ignore'", "stop, skip"]),
    "odd batch with mixup": ("DATA:\n  BATCH_SIZE: 5\nAUG:\n  CUTMIX: 0\n", ["DATA.BATCH_SIZE 5", "AUG.MIXUP"]),
    "odd batch with cutmix": ("DATA:\n  BATCH_SIZE: 5\nAUG:\n  MIXUP: 0\n", ["DATA.BATCH_SIZE 5", "AUG.CUTMIX"]),
    "two precisions": ("PRECISION: bf16\nAMP_OPT_LEVEL: O1\n", ["AMP_OPT_LEVEL O1", "PRECISION bf16"]),
    "setting that the network has not": (
        "MODEL:\n  GMA:\n    ATTN_DROP_RATE: 0.1\n",
        ["MODEL.GMA.ATTN_DROP_RATE", "0.1", "MODEL.GMA.DROP_RATE"],
    ),
    "base that is missing": ("BASE: nowhere.yaml\n", ["nowhere.yaml"]),
    "base that is no name": ("BASE: [1]\n", ["bad.yaml", "BASE is [1]"]),
    "base that is itself": ("BASE: ./bad.yaml\n", ["bad.yaml", "BASE", "circle"]),
    "checkpoint that is missing": ("MODEL:\n  RESUME: nowhere.pth\n", ["nowhere.pth"]),
}

# Command lines beside a good configuration: the words, and what the line must name.
BAD_WORDS = {
    "missing configuration": ("--cfg nowhere.yaml", ["nowhere.yaml", "--cfg"]),
    "configuration that is a folder": ("--cfg folder.yaml", ["folder.yaml"]),
    "configuration that is a program": ("--cfg config.py", ["config.py", ".yaml"]),
    "missing checkpoint": ("--resume nowhere.pth", ["nowhere.pth"]),
    "missing weights": ("--pretrained nowhere.pth", ["nowhere.pth"]),
    "weights that are a folder": ("--pretrained folder.yaml", ["folder.yaml"]),
    "option without a value": ("--opts DATA.BATCH_SIZE 4 TRAIN.EPOCHS", ["--opts", "TRAIN.EPOCHS"]),
    "no options": ("--opts", ["--opts"]),
    "options given twice": ("--opts TRAIN.EPOCHS 0 --opts SEED 1", ["TRAIN.EPOCHS is 0"]),
    "unknown option": ("--opts TRAIN.EPOCS 4", ["--opts", "TRAIN.EPOCS", "TRAIN.EPOCHS"]),
    "option for a section": ("--opts TRAIN 4", ["--opts", "TRAIN is 4 but holds keys"]),
    "option below a value": ("--opts TRAIN.EPOCHS.FIRST 4", ["--opts", "TRAIN.EPOCHS", "whole number"]),
    "option of the wrong type": ("--opts MODEL.GMA.MLP_RATIOS 4", ["--opts", "MODEL.GMA.MLP_RATIOS", "list"]),
    "option that is not YAML": ("--opts TRAIN.EPOCHS [4", ["--opts", "TRAIN.EPOCHS", "[4"]),
    "option that is no choice": (
        "--opts TRAIN.LR_SCHEDULER.NAME cosin",
        ["TRAIN.LR_SCHEDULER.NAME is 'cosin'", "cosine"],
    ),
    "batch of nothing": ("--batch-size 0", ["DATA.BATCH_SIZE is 0"]),
    "odd batch": ("--batch-size 5 --opts AUG.MIXUP 0.8", ["DATA.BATCH_SIZE 5", "AUG.MIXUP"]),
    "two precisions": ("--precision bf16 --amp-opt-level O1", ["AMP_OPT_LEVEL O1", "PRECISION bf16"]),
    "word for a number": ("--batch-size many", ["--batch-size", "many"]),
    "unknown choice": ("--precision fp8", ["--precision", "fp8", "bf16"]),
    "unknown flag": ("--epochs 3", ["--epochs 3"]),
    "misspelt flag": ("--batchsize 4", ["--batchsize 4"]),
    "abbreviated flag": ("--data D", ["--data D"]),
    "flag without its value": ("--tag", ["--tag"]),
    "word without a flag": ("leftover", ["leftover"]),
    "zip": ("--zip", ["--zip", "tar"]),
    "cache mode": ("--cache-mode part", ["--cache-mode", "tar"]),
    "another model file": ("--model-file swin.py", ["--model-file", "swin.py", "groupmixformer.py"]),
    "another model type": ("--model-type swin", ["MODEL.TYPE is 'swin'", "groupmixformer"]),
}

BOTH = ("train.py", "test.py")


# What is told before the seconds that importing torch takes


@pytest.fixture
def line_of(start, tmp_path):
    """Starts a program in an empty folder with something bad, and gives the one line that it ends with at once."""

    def run(program, *words):
        before = sorted(tmp_path.rglob("*"))
        words = [*words, "--output", "output"]
        result = start(REPOSITORY / program, *words, cwd=tmp_path, PYTHONPROFILEIMPORTTIME="1")
        imports, lines = [], []
        for line in result.stderr.splitlines():
            (imports if line.startswith("import time:") else lines).append(line)
        imported = {line.rpartition("|")[2].strip() for line in imports}
        assert result.code == 2
        assert result.stdout == ""
        (said,) = lines
        assert said.startswith("error: ")
        assert "utils.config" in imported
        assert not {"torch", "timm", "numpy"} & imported
        assert sorted(tmp_path.rglob("*")) == before
        return said

    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_configuration_is_one_line_at_once(line_of, tmp_path, name):
    held, named = BAD_FILES[name]
    (tmp_path / "bad.yaml").write_bytes(held if isinstance(held, bytes) else held.encode())
    said = line_of("train.py", "--cfg", "bad.yaml")
    assert [thing for thing in named if thing not in said] == [], said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "program"),
    [(name, program) for name in BAD_WORDS for program in BOTH if (name, program) != ("odd batch", "test.py")],
)
def test_bad_command_line_is_one_line_at_once(line_of, tiny_config, tmp_path, name, program):
    words, named = BAD_WORDS[name]
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "config.py").write_text("TAG = 'a'\n")
    said = line_of(program, *([] if "--cfg" in words else ["--cfg", tiny_config]), *words.split())
    assert [thing for thing in named if thing not in said] == [], said


@pytest.mark.slow
@pytest.mark.parametrize("program", BOTH)
def test_configuration_must_be_named(line_of, program):
    assert "--cfg" in line_of(program, "--data-path", "D")


# What is told by those who read the data, the checkpoints and the network's settings

# By name: the program, the function that makes something bad and gives its flags, and what the line must name.
CASES = {}


def case(name, *named, programs=("train.py",)):
    """Registers a function of (tree, scratch) that makes something bad and gives the flags that use it."""

    def register(make):
        for program in programs:
            CASES[f"{program} {name}"] = (program, make, named)
        return make

    return register


# Data


@case("no data path", "DATA.DATA_PATH", "--data-path", programs=BOTH)
def no_data_path(tree, scratch):
    return []


@case("missing data folder", "nowhere", "--data-path", programs=BOTH)
def missing_data_folder(tree, scratch):
    return ["--data-path", scratch / "nowhere"]


@case("empty data folder", "empty", "--data-path", programs=BOTH)
def empty_data_folder(tree, scratch):
    (scratch / "empty").mkdir()
    return ["--data-path", scratch / "empty"]


@case("no class folders", "images/", "has no class folders: put images in", programs=BOTH)
def no_class_folders(tree, scratch):
    for split in ("train", "val"):
        (scratch / "images" / split).mkdir(parents=True)
    return ["--data-path", scratch / "images"]


@case("missing validation folder", "data/val", "--data-path", programs=BOTH)
def missing_validation_folder(tree, scratch):
    shutil.copytree(tree / "train", scratch / "data" / "train")
    return ["--data-path", scratch / "data"]


@case("class without an image", "green_rows", "data/val", programs=BOTH)
def class_without_an_image(tree, scratch):
    shutil.copytree(tree, scratch / "data")
    for path in (scratch / "data" / "val" / "green_rows").iterdir():
        path.rename(path.with_suffix(".txt"))
    return ["--data-path", scratch / "data"]


@case("class only in training", "only in training: green_rows", "agree")
def class_only_in_training(tree, scratch):
    shutil.copytree(tree, scratch / "data")
    shutil.rmtree(scratch / "data" / "val" / "green_rows")
    return ["--data-path", scratch / "data"]


@case("class only in validation", "only in validation: red_rows", "agree")
def class_only_in_validation(tree, scratch):
    shutil.copytree(tree, scratch / "data")
    shutil.copytree(tree / "val" / "green_rows", scratch / "data" / "val" / "red_rows")
    return ["--data-path", scratch / "data"]


@case("classes of other names", "green_rows", "red_rows", "agree")
def classes_of_other_names(tree, scratch):
    shutil.copytree(tree, scratch / "data")
    (scratch / "data" / "val" / "green_rows").rename(scratch / "data" / "val" / "red_rows")
    return ["--data-path", scratch / "data"]


@case("another number of classes", "6 classes", "MODEL.GMA.NUM_CLASSES", "--opts MODEL.GMA.NUM_CLASSES 6")
def another_number_of_classes(tree, scratch):
    return ["--data-path", tree, "--opts", "MODEL.GMA.NUM_CLASSES", 1000]


@case("unknown data set", "DATA.DATASET", "imagnet", programs=BOTH)
def unknown_data_set(tree, scratch):
    return ["--data-path", tree, "--opts", "DATA.DATASET", "imagnet"]


@case("missing tar file", "train.tar")
def missing_tar_file(tree, scratch):
    return ["--data-path", tree, "--opts", "DATA.DATASET", "tar"]


# Settings


@case("widths that fit no heads", "42", "40")
def widths_that_fit_no_heads(tree, scratch):
    return ["--data-path", tree, "--opts", "MODEL.GMA.EMBEDDING_DIMS", "[40, 40, 40, 42]"]


@case("unknown optimizer", "TRAIN.OPTIMIZER.NAME", "adamv")
def unknown_optimizer(tree, scratch):
    return ["--data-path", tree, "--opts", "TRAIN.OPTIMIZER.NAME", "adamv"]


@case("unknown augmentation", "AUG.AUTO_AUGMENT", "random")
def unknown_augmentation(tree, scratch):
    return ["--data-path", tree, "--opts", "AUG.AUTO_AUGMENT", "random"]


@case("zero updates in an epoch", "48", "64", "--batch-size")
def zero_updates_in_an_epoch(tree, scratch):
    return ["--data-path", tree, "--batch-size", 64]


@case("GPU where there is none", "cuda", "--device cpu", programs=BOTH)
def gpu_where_there_is_none(tree, scratch):
    return ["--data-path", tree, "--device", "cuda"]


# Checkpoints


def flags_of_weights(path, tree):
    return ["--data-path", tree, "--pretrained", path]


@case("checkpoint that is a text", "text.pth", "no checkpoint", programs=BOTH)
def checkpoint_that_is_a_text(tree, scratch):
    (scratch / "text.pth").write_text("<html>Not found</html>\n")
    return flags_of_weights(scratch / "text.pth", tree)


@case("checkpoint of zero bytes", "empty.pth", "no checkpoint", programs=BOTH)
def checkpoint_of_zero_bytes(tree, scratch):
    (scratch / "empty.pth").touch()
    return flags_of_weights(scratch / "empty.pth", tree)


@case("checkpoint cut short", "short.pth", "no checkpoint", programs=BOTH)
def checkpoint_cut_short(tree, scratch):
    torch.save({"model": {"weight": torch.zeros(1000)}}, scratch / "whole.pth")
    (scratch / "short.pth").write_bytes((scratch / "whole.pth").read_bytes()[:2000])
    return flags_of_weights(scratch / "short.pth", tree)


@case("checkpoint of a list", "list.pth", "no checkpoint", programs=BOTH)
def checkpoint_of_a_list(tree, scratch):
    torch.save([1, 2, 3], scratch / "list.pth")
    return flags_of_weights(scratch / "list.pth", tree)


@case("checkpoint of another network", "other.pth", "stem.conv1.weight", programs=BOTH)
def checkpoint_of_another_network(tree, scratch):
    torch.save(
        {"model": {"head.fc.weight": torch.zeros(6, 40), "layer1.weight": torch.zeros(2)}}, scratch / "other.pth"
    )
    return flags_of_weights(scratch / "other.pth", tree)


@case("safetensors file that is none", "text.safetensors", "no checkpoint", programs=BOTH)
def safetensors_file_that_is_none(tree, scratch):
    (scratch / "text.safetensors").write_text("<html>Not found</html>\n")
    return flags_of_weights(scratch / "text.safetensors", tree)


class Code:
    """What makes a directory when it is unpickled."""

    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return os.mkdir, (str(self.place),)


@case("checkpoint with code", "code.pth", "nothing in it was run", programs=BOTH)
def checkpoint_with_code(tree, scratch):
    torch.save({"model": {}, "config": Code(scratch / "ran")}, scratch / "code.pth")
    return flags_of_weights(scratch / "code.pth", tree)


@case("pickle with code", "code.pkl", "nothing in it was run", programs=BOTH)
def pickle_with_code(tree, scratch):
    (scratch / "code.pkl").write_bytes(pickle.dumps({"model": Code(scratch / "ran")}))
    return flags_of_weights(scratch / "code.pkl", tree)


@case("resuming from mere weights", "weights.pth", "--pretrained")
def resuming_from_mere_weights(tree, scratch):
    torch.save({"model": {"weight": torch.zeros(2)}}, scratch / "weights.pth")
    return ["--data-path", tree, "--resume", scratch / "weights.pth"]


# Output


@case("output that is a file", "output", "--output")
def output_that_is_a_file(tree, scratch):
    (scratch / "output").write_text("")
    return ["--data-path", tree, "--output", scratch / "output"]


@case("folder of the run that is a file", "output/tiny/run", "--output")
def folder_of_the_run_that_is_a_file(tree, scratch):
    (scratch / "output" / "tiny").mkdir(parents=True)
    (scratch / "output" / "tiny" / "run").write_text("")
    return ["--data-path", tree, "--output", scratch / "output", "--tag", "run"]


@case("output on a file system that takes none", "--output")
def output_on_a_file_system_that_takes_none(tree, scratch):
    return ["--data-path", tree, "--output", "/proc/output"]


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_line(call, tree, tiny_config, tmp_path, monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    program, make, named = CASES[name]
    flags = make(tree, tmp_path)
    defaults = [] if "--cfg" in flags else ["--cfg", tiny_config]
    defaults += [] if "--output" in flags else ["--output", tmp_path / "never"]
    if program == "test.py" and "--pretrained" not in flags:
        defaults += ["--random-weights"]
    result = call(program, *defaults, *flags)
    assert result.code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    for thing in named:
        assert thing in line
    assert "Train:" not in result.stdout
    assert "Acc@1" not in result.stdout
    assert not (tmp_path / "never").exists()
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def broken_tree(tree, tmp_path):
    """The small tree with one validation image cut short, the second: that of rank 1 of two."""
    data = tmp_path / "broken"
    shutil.copytree(tree, data)
    path = sorted((data / "val").rglob("*.*g"))[1]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return data, path


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_image_is_named(call, tiny_config, broken_tree, workers):
    data, path = broken_tree
    words = ["--cfg", tiny_config, "--data-path", data, "--random-weights", "--opts", "DATA.NUM_WORKERS", workers]
    result = call("test.py", *words)
    assert result.code == 2
    (line,) = result.stderr.splitlines()
    assert str(path) in line
    assert "Acc@1" not in result.stdout


@pytest.mark.slow
def test_broken_image_of_another_rank_is_named(start, tiny_config, broken_tree):
    data, path = broken_tree
    result = start("test.py", "--cfg", tiny_config, "--data-path", data, "--random-weights", ranks=2)
    assert result.code != 0
    assert [line for line in result.errors if str(path) in line], result.stderr


@pytest.mark.slow
def test_started_program_prints_the_line_and_nothing_else(start, tmp_path, tiny_config):
    result = start("train.py", "--cfg", tiny_config, "--data-path", tmp_path / "nowhere")
    assert result.code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: {tmp_path / 'nowhere'} ")
    assert result.stdout == ""


@pytest.mark.slow
def test_one_rank_speaks_for_all(start, tmp_path, tiny_config):
    result = start("train.py", "--cfg", tiny_config, "--data-path", tmp_path / "nowhere", ranks=2)
    assert result.code != 0
    (error,) = result.errors
    assert "nowhere" in error
    assert "[rank" not in result.stderr  # no traceback of a rank; the launcher has one of its own
    assert result.stdout == ""
