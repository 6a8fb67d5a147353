"""Bad input ends at once, with one line that names the thing and says what to do."""

import os
import pickle
import shutil

import pytest
import torch

# By name: the program, the function that makes something bad and gives its flags, and what the line must name.
CASES = {}


def case(name, *named, programs=("train.py",)):
    """Registers a function of (tree, scratch, config) that makes something bad and gives the flags that use it."""

    def register(make):
        for program in programs:
            CASES[f"{program} {name}"] = (program, make, named)
        return make

    return register


BOTH = ("train.py", "test.py")


# Data


@case("no data path", "DATA.DATA_PATH", "--data-path", programs=BOTH)
def no_data_path(tree, scratch, config):
    return []


@case("missing data folder", "nowhere", "--data-path", programs=BOTH)
def missing_data_folder(tree, scratch, config):
    return ["--data-path", scratch / "nowhere"]


@case("empty data folder", "empty", "--data-path", programs=BOTH)
def empty_data_folder(tree, scratch, config):
    (scratch / "empty").mkdir()
    return ["--data-path", scratch / "empty"]


@case("no class folders", "images/", "add", programs=BOTH)
def no_class_folders(tree, scratch, config):
    for split in ("train", "val"):
        (scratch / "images" / split).mkdir(parents=True)
    return ["--data-path", scratch / "images"]


@case("missing validation folder", "data/val", "--data-path", programs=BOTH)
def missing_validation_folder(tree, scratch, config):
    shutil.copytree(tree / "train", scratch / "data" / "train")
    return ["--data-path", scratch / "data"]


@case("class without an image", "green_rows", "data/val", programs=BOTH)
def class_without_an_image(tree, scratch, config):
    shutil.copytree(tree, scratch / "data")
    for path in (scratch / "data" / "val" / "green_rows").iterdir():
        path.rename(path.with_suffix(".txt"))
    return ["--data-path", scratch / "data"]


@case("class only in training", "only in training: green_rows", "agree")
def class_only_in_training(tree, scratch, config):
    shutil.copytree(tree, scratch / "data")
    shutil.rmtree(scratch / "data" / "val" / "green_rows")
    return ["--data-path", scratch / "data"]


@case("class only in validation", "only in validation: red_rows", "agree")
def class_only_in_validation(tree, scratch, config):
    shutil.copytree(tree, scratch / "data")
    shutil.copytree(tree / "val" / "green_rows", scratch / "data" / "val" / "red_rows")
    return ["--data-path", scratch / "data"]


@case("classes of other names", "green_rows", "red_rows", "agree")
def classes_of_other_names(tree, scratch, config):
    shutil.copytree(tree, scratch / "data")
    (scratch / "data" / "val" / "green_rows").rename(scratch / "data" / "val" / "red_rows")
    return ["--data-path", scratch / "data"]


@case("another number of classes", "6 classes", "MODEL.GMA.NUM_CLASSES", "--opts MODEL.GMA.NUM_CLASSES 6")
def another_number_of_classes(tree, scratch, config):
    return ["--data-path", tree, "--opts", "MODEL.GMA.NUM_CLASSES", 1000]


@case("unknown data set", "DATA.DATASET", "imagnet", programs=BOTH)
def unknown_data_set(tree, scratch, config):
    return ["--data-path", tree, "--opts", "DATA.DATASET", "imagnet"]


@case("missing tar file", "train.tar")
def missing_tar_file(tree, scratch, config):
    return ["--data-path", tree, "--opts", "DATA.DATASET", "tar"]


# Configuration


def write(scratch, text):
    path = scratch / "bad.yaml"
    path.write_text(text)
    return path


@case("missing configuration", "nowhere.yaml", "--cfg", programs=BOTH)
def missing_configuration(tree, scratch, config):
    return ["--cfg", scratch / "nowhere.yaml"]


@case("configuration that is a folder", "configs.yaml", programs=BOTH)
def configuration_that_is_a_folder(tree, scratch, config):
    (scratch / "configs.yaml").mkdir()
    return ["--cfg", scratch / "configs.yaml"]


@case("configuration that is not YAML", "bad.yaml line")
def configuration_that_is_not_yaml(tree, scratch, config):
    return ["--cfg", write(scratch, "DATA:\n  BATCH_SIZE: [1\nTRAIN: 2\n")]


@case("configuration of code", "bad.yaml")
def configuration_of_code(tree, scratch, config):
    return ["--cfg", write(scratch, f"TAG: !!python/object/apply:os.mkdir ['{scratch / 'ran'}']\n")]


@case("empty configuration", "bad.yaml")
def empty_configuration(tree, scratch, config):
    return ["--cfg", write(scratch, "")]


@case("unknown key", "bad.yaml", "TRAIN.EPOCH", "did you mean TRAIN.EPOCHS?", programs=BOTH)
def unknown_key(tree, scratch, config):
    return ["--cfg", write(scratch, "TRAIN:\n  EPOCH: 3\n")]


@case("unknown section", "bad.yaml", "OPTIMIZER")
def unknown_section(tree, scratch, config):
    return ["--cfg", write(scratch, "OPTIMIZER:\n  NAME: sgd\n")]


@case("duplicate key", "bad.yaml", "EPOCHS", "twice", programs=BOTH)
def duplicate_key(tree, scratch, config):
    return ["--cfg", write(scratch, "TRAIN:\n  EPOCHS: 3\n  BASE_LR: 1.0e-3\n  EPOCHS: 4\n")]


@case("value of the wrong type", "bad.yaml", "DATA.BATCH_SIZE", "'many'", "whole number", programs=BOTH)
def value_of_the_wrong_type(tree, scratch, config):
    return ["--cfg", write(scratch, "DATA:\n  BATCH_SIZE: many\n")]


@case("number for a list", "MODEL.GMA.MLP_RATIOS", "list")
def number_for_a_list(tree, scratch, config):
    return ["--opts", "MODEL.GMA.MLP_RATIOS", 4]


@case("fraction for a whole number", "TRAIN.EPOCHS", "1.5", "whole number")
def fraction_for_a_whole_number(tree, scratch, config):
    return ["--opts", "TRAIN.EPOCHS", 1.5]


@case("base that is missing", "nowhere.yaml")
def base_that_is_missing(tree, scratch, config):
    return ["--cfg", write(scratch, "BASE: nowhere.yaml\n")]


@case("bases in a circle", "bad.yaml", "BASE")
def bases_in_a_circle(tree, scratch, config):
    return ["--cfg", write(scratch, "BASE: bad.yaml\n")]


@case("option without a value", "--opts", "TRAIN.EPOCHS")
def option_without_a_value(tree, scratch, config):
    return ["--opts", "DATA.BATCH_SIZE", 4, "TRAIN.EPOCHS"]


@case("unknown option", "--opts", "TRAIN.EPOCS", "TRAIN.EPOCHS", programs=BOTH)
def unknown_option(tree, scratch, config):
    return ["--opts", "TRAIN.EPOCS", 4]


@case("widths that fit no heads", "42", "40")
def widths_that_fit_no_heads(tree, scratch, config):
    return ["--data-path", tree, "--opts", "MODEL.GMA.EMBEDDING_DIMS", "[40, 40, 40, 42]"]


@case("lists of different lengths", "MODEL.GMA.SERIAL_DEPTHS", "4")
def lists_of_different_lengths(tree, scratch, config):
    return ["--opts", "MODEL.GMA.SERIAL_DEPTHS", "[1, 1, 1]"]


@case("setting that the network has not", "MODEL.GMA.ATTN_DROP_RATE", "0.1", "MODEL.GMA.DROP_RATE")
def setting_that_the_network_has_not(tree, scratch, config):
    return ["--opts", "MODEL.GMA.ATTN_DROP_RATE", 0.1]


@case("unknown optimizer", "TRAIN.OPTIMIZER.NAME", "adamv")
def unknown_optimizer(tree, scratch, config):
    return ["--data-path", tree, "--opts", "TRAIN.OPTIMIZER.NAME", "adamv"]


@case("unknown schedule", "TRAIN.LR_SCHEDULER.NAME", "cosin", "cosine")
def unknown_schedule(tree, scratch, config):
    return ["--opts", "TRAIN.LR_SCHEDULER.NAME", "cosin"]


@case("unknown augmentation", "AUG.AUTO_AUGMENT", "random")
def unknown_augmentation(tree, scratch, config):
    return ["--data-path", tree, "--opts", "AUG.AUTO_AUGMENT", "random"]


@case("odd batch with mixup", "DATA.BATCH_SIZE", "odd", "AUG.MIXUP")
def odd_batch_with_mixup(tree, scratch, config):
    return ["--data-path", tree, "--batch-size", 5, "--opts", "AUG.MIXUP", 0.8]


@case("odd batch with cutmix", "DATA.BATCH_SIZE", "odd", "AUG.CUTMIX")
def odd_batch_with_cutmix(tree, scratch, config):
    return ["--data-path", tree, "--batch-size", 5, "--opts", "AUG.CUTMIX", 1.0]


@case("zero updates in an epoch", "48", "64", "--batch-size")
def zero_updates_in_an_epoch(tree, scratch, config):
    return ["--data-path", tree, "--batch-size", 64]


@case("batch of nothing", "DATA.BATCH_SIZE", "0", programs=BOTH)
def batch_of_nothing(tree, scratch, config):
    return ["--data-path", tree, "--batch-size", 0]


@case("longer warm-up than run", "TRAIN.WARMUP_EPOCHS", "TRAIN.EPOCHS")
def longer_warm_up_than_run(tree, scratch, config):
    return ["--opts", "TRAIN.WARMUP_EPOCHS", 20]


# Command line


@case("GPU where there is none", "cuda", "--device cpu", programs=BOTH)
def gpu_where_there_is_none(tree, scratch, config):
    return ["--data-path", tree, "--device", "cuda"]


@case("zip", "--zip", "tar", programs=BOTH)
def zip_flag(tree, scratch, config):
    return ["--data-path", tree, "--zip"]


@case("cache mode", "--cache-mode", "tar", programs=BOTH)
def cache_mode_flag(tree, scratch, config):
    return ["--data-path", tree, "--cache-mode", "part"]


@case("another model file", "--model-file", "swin.py", "groupmixformer.py", programs=BOTH)
def another_model_file(tree, scratch, config):
    return ["--data-path", tree, "--model-file", "swin.py"]


@case("another model type", "MODEL.TYPE", "swin", "groupmixformer", programs=BOTH)
def another_model_type(tree, scratch, config):
    return ["--data-path", tree, "--model-type", "swin"]


# Checkpoints


def flags_of_weights(path, tree):
    return ["--data-path", tree, "--pretrained", path]


@case("missing checkpoint", "nowhere.pth", programs=BOTH)
def missing_checkpoint(tree, scratch, config):
    return flags_of_weights(scratch / "nowhere.pth", tree)


@case("checkpoint that is a folder", "folder.pth", programs=BOTH)
def checkpoint_that_is_a_folder(tree, scratch, config):
    (scratch / "folder.pth").mkdir()
    return flags_of_weights(scratch / "folder.pth", tree)


@case("checkpoint that is a text", "text.pth", "no checkpoint", programs=BOTH)
def checkpoint_that_is_a_text(tree, scratch, config):
    (scratch / "text.pth").write_text("<html>Not found</html>\n")
    return flags_of_weights(scratch / "text.pth", tree)


@case("checkpoint of zero bytes", "empty.pth", "no checkpoint", programs=BOTH)
def checkpoint_of_zero_bytes(tree, scratch, config):
    (scratch / "empty.pth").touch()
    return flags_of_weights(scratch / "empty.pth", tree)


@case("checkpoint cut short", "short.pth", "no checkpoint", programs=BOTH)
def checkpoint_cut_short(tree, scratch, config):
    torch.save({"model": {"weight": torch.zeros(1000)}}, scratch / "whole.pth")
    (scratch / "short.pth").write_bytes((scratch / "whole.pth").read_bytes()[:2000])
    return flags_of_weights(scratch / "short.pth", tree)


@case("checkpoint of a list", "list.pth", "no checkpoint", programs=BOTH)
def checkpoint_of_a_list(tree, scratch, config):
    torch.save([1, 2, 3], scratch / "list.pth")
    return flags_of_weights(scratch / "list.pth", tree)


@case("checkpoint of another network", "other.pth", "stem.conv1.weight", programs=BOTH)
def checkpoint_of_another_network(tree, scratch, config):
    torch.save(
        {"model": {"head.fc.weight": torch.zeros(6, 40), "layer1.weight": torch.zeros(2)}}, scratch / "other.pth"
    )
    return flags_of_weights(scratch / "other.pth", tree)


@case("safetensors file that is none", "text.safetensors", "no checkpoint", programs=BOTH)
def safetensors_file_that_is_none(tree, scratch, config):
    (scratch / "text.safetensors").write_text("<html>Not found</html>\n")
    return flags_of_weights(scratch / "text.safetensors", tree)


class Code:
    """What makes a directory when it is unpickled."""

    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return os.mkdir, (str(self.place),)


@case("checkpoint with code", "code.pth", "nothing in it was run", programs=BOTH)
def checkpoint_with_code(tree, scratch, config):
    torch.save({"model": {}, "config": Code(scratch / "ran")}, scratch / "code.pth")
    return flags_of_weights(scratch / "code.pth", tree)


@case("pickle with code", "code.pkl", "nothing in it was run", programs=BOTH)
def pickle_with_code(tree, scratch, config):
    (scratch / "code.pkl").write_bytes(pickle.dumps({"model": Code(scratch / "ran")}))
    return flags_of_weights(scratch / "code.pkl", tree)


@case("resuming from mere weights", "weights.pth", "--pretrained")
def resuming_from_mere_weights(tree, scratch, config):
    torch.save({"model": {"weight": torch.zeros(2)}}, scratch / "weights.pth")
    return ["--data-path", tree, "--resume", scratch / "weights.pth"]


# Output


@case("output that is a file", "output", "--output")
def output_that_is_a_file(tree, scratch, config):
    (scratch / "output").write_text("")
    return ["--data-path", tree, "--output", scratch / "output"]


@case("folder of the run that is a file", "output/tiny/run", "--output")
def folder_of_the_run_that_is_a_file(tree, scratch, config):
    (scratch / "output" / "tiny").mkdir(parents=True)
    (scratch / "output" / "tiny" / "run").write_text("")
    return ["--data-path", tree, "--output", scratch / "output", "--tag", "run"]


@case("output on a file system that takes none", "--output")
def output_on_a_file_system_that_takes_none(tree, scratch, config):
    return ["--data-path", tree, "--output", "/proc/output"]


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_line(call, tree, tiny_config, tmp_path, monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    program, make, named = CASES[name]
    flags = make(tree, tmp_path, tiny_config)
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
    assert not list((tmp_path / "never").rglob("config.yaml"))  # no run was begun
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("program", ["train.py", "test.py"])
@pytest.mark.parametrize("flags", [["--epochs", "3"], ["--batchsize", "4"], ["--data", "D"], ["leftover"]])
def test_unknown_flags_are_refused(call, tiny_config, program, flags):
    result = call(program, "--cfg", tiny_config, *flags)
    assert result.code == 2
    assert f"unrecognized arguments: {' '.join(flags)}" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize("program", ["train.py", "test.py"])
def test_configuration_must_be_named(call, program):
    result = call(program, "--data-path", "D")
    assert result.code == 2
    assert "--cfg" in result.stderr.splitlines()[-1]


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
