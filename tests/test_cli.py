"""The shared command line: what it overrides, what it refuses, and how a program ends."""

import pytest
from helpers_unit import ROOT, noise, set_key, write_folder
from torch.utils.data import DataLoader

from data.datasets import FolderSource, ImageSamples
from utils.cli import config_from, make_parser, run
from utils.config import load_config, lookup
from utils.errors import UserError

FILE = str(ROOT / "configs" / "groupmixformer_tiny.yaml")

PUBLISHED_FLAGS = (  # noqa: SIM905
    "--cfg --opts --batch-size --data-path --zip --cache-mode --pretrained --resume --accumulation-steps "
    "--use-checkpoint --amp-opt-level --output --tag --eval --throughput --local_rank --model-type --model-file"
).split()

OVERRIDES = [
    (["--batch-size", "32"], "DATA.BATCH_SIZE", 32),
    (["--data-path", "some/folder"], "DATA.DATA_PATH", "some/folder"),
    (["--pretrained", "w.pth"], "MODEL.PRETRAINED", "w.pth"),
    (["--resume", "r.pth"], "MODEL.RESUME", "r.pth"),
    (["--accumulation-steps", "4"], "TRAIN.ACCUMULATION_STEPS", 4),
    (["--use-checkpoint"], "TRAIN.USE_CHECKPOINT", True),
    (["--amp-opt-level", "O0"], "AMP_OPT_LEVEL", "O0"),
    (["--precision", "bf16"], "PRECISION", "bf16"),
    (["--device", "cpu"], "DEVICE", "cpu"),
    (["--output", "out"], "OUTPUT", "out"),
    (["--tag", "2024"], "TAG", "2024"),
    (["--seed", "7"], "SEED", 7),
    (["--eval"], "EVAL_MODE", True),
    (["--throughput"], "THROUGHPUT_MODE", True),
    (["--model-type", "groupmixformer"], "MODEL.TYPE", "groupmixformer"),
]


def parsed(*words, file=FILE):
    return make_parser("A program.").parse_args(["--cfg", file, *words])


def configuration(*words, file=FILE):
    return config_from(parsed(*words, file=file))


def test_the_published_flags_are_all_there():
    known = make_parser("A program.")._option_string_actions
    assert [flag for flag in PUBLISHED_FLAGS if flag not in known] == []


def test_no_flag_has_a_default():
    values = vars(parsed())
    assert values.pop("cfg") == FILE
    assert {name for name, value in values.items() if value} == set()
    assert values.pop("zip") is False
    assert set(values.values()) == {None}


def test_without_flags_the_file_stands():
    assert configuration() == load_config(FILE)


@pytest.mark.parametrize(("words", "name", "value"), OVERRIDES, ids=[words[0] for words, _, _ in OVERRIDES])
def test_a_flag_overrides_its_key_and_no_other(words, name, value):
    config, untouched = configuration(*words), load_config(FILE)
    assert lookup(config, name) == value
    assert type(lookup(config, name)) is type(value)
    set_key(untouched, name, value)
    assert config == untouched


def test_options_override_the_file_and_flags_override_both(tmp_path):
    path = tmp_path / "given.yaml"
    path.write_text("TAG: file\nOUTPUT: file\nSEED: 1\n")
    config = configuration("--opts", "OUTPUT", "opts", "SEED", "2", "--seed", "3", file=str(path))
    assert (config.TAG, config.OUTPUT, config.SEED) == ("file", "opts", 3)
    config = configuration("--seed", "3", "--opts", "OUTPUT", "opts", "SEED", "2", file=str(path))
    assert (config.TAG, config.OUTPUT, config.SEED) == ("file", "opts", 3)


@pytest.mark.parametrize("words", [["--local_rank", "3"], ["--local-rank", "3"], ["--local_rank=3"]])
def test_old_launchers_may_pass_the_local_rank(words):
    assert configuration(*words) == load_config(FILE)


@pytest.mark.parametrize(
    "words",
    [
        ["--batchsize", "3"],
        ["--batch", "3"],
        ["--acc", "2"],
        ["--out", "x"],
        ["--ev"],
        ["stray"],
        ["--batch-size", "many"],
        ["--batch-size"],
        ["--amp-opt-level", "O3"],
        ["--precision", "fp8"],
        ["--device", "tpu"],
        ["--cache-mode", "all"],
    ],
    ids=" ".join,
)
def test_a_flag_that_is_none_ends_the_program(words, capsys):
    with pytest.raises(SystemExit) as caught:
        parsed(*words)
    assert caught.value.code == 2
    assert "error" in capsys.readouterr().err


def test_a_configuration_must_be_named():
    with pytest.raises(SystemExit) as caught:
        make_parser("A program.").parse_args([])
    assert caught.value.code == 2


@pytest.mark.parametrize("words", [["--zip"], ["--cache-mode", "part"], ["--zip", "--cache-mode", "no"]])
def test_zip_mode_is_refused_with_what_replaced_it(words):
    with pytest.raises(UserError, match=r"--opts DATA\.DATASET tar"):
        configuration(*words)


def test_only_our_model_file_and_type_are_taken():
    assert configuration("--model-file", "groupmixformer.py") == load_config(FILE)
    with pytest.raises(UserError, match=r"--model-file other\.py"):
        configuration("--model-file", "other.py")
    with pytest.raises(UserError, match=r"MODEL\.TYPE"):
        configuration("--model-type", "swin")


def test_the_merged_configuration_is_checked():
    with pytest.raises(UserError, match=r"DATA\.BATCH_SIZE"):
        configuration("--batch-size", "0")


# How a program ends


def ending(main, capsys):
    with pytest.raises(SystemExit) as caught:
        run(main)
    return caught.value.code, capsys.readouterr()


def test_a_program_that_succeeds_just_returns(capsys):
    seen = []
    run(lambda: seen.append(1))
    assert seen == [1]
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("environment", [{}, {"LOCAL_RANK": "0"}])
def test_a_users_error_is_one_line_and_exit_code_2(environment, monkeypatch, capsys):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    def main():
        raise UserError("x.yaml: unknown key A: did you mean B?")

    assert ending(main, capsys) == (2, ("", "error: x.yaml: unknown key A: did you mean B?\n"))


def broken_sample(tmp_path):
    """A folder with one broken image, its path, and samples of it."""
    root = write_folder(tmp_path / "train", {"a": 1}, noise, ".jpg")
    path = root / "a" / "000.jpg"
    path.write_bytes(path.read_bytes()[:200])
    return path, ImageSamples(FolderSource(root), lambda image: image, "RGB")


def test_a_users_error_in_a_loaders_worker_is_one_line_too(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    path, samples = broken_sample(tmp_path)
    code, (out, err) = ending(lambda: list(DataLoader(samples, num_workers=1)), capsys)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {path} is broken (")
    assert err.count("\n") == 1


def test_an_error_that_only_one_rank_meets_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "1")
    path, samples = broken_sample(tmp_path)
    code, (_, err) = ending(lambda: samples[0], capsys)
    assert code == 2
    assert str(path) in err


def test_an_interrupted_program_ends_quietly(capsys):
    def main():
        raise KeyboardInterrupt

    assert ending(main, capsys) == (130, ("", ""))


def test_an_error_of_the_code_keeps_its_traceback():
    def main():
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        run(main)
