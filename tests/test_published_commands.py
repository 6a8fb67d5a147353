"""The published commands, word for word, with a published-style configuration file."""

import shlex
import socket
import subprocess
from pathlib import Path

import pytest
import torch
from torch.distributed import launch

from utils.cli import config_from, make_parser

REPOSITORY = Path(__file__).resolve().parent.parent

FLAGS = (
    "--data-path D --batch-size 64 --output O --cfg ./configs/groupmixformer_small.yaml "
    "--model-type groupmixformer --model-file groupmixformer.py --tag groupmixformer_small"
)
TRAIN = f"python3 -m torch.distributed.launch --nproc_per_node 8 --nnodes 1 --use_env train.py {FLAGS}"
TEST = (
    "CUDA_VISIBLE_DEVICES=1 OMP_NUM_THREADS=1 "
    f"python3 -m torch.distributed.launch --nproc_per_node 1 --nnodes 1 --use_env test.py {FLAGS}"
)

# Every key of the published files, as they write them, for a network and images that a CPU can train.
PUBLISHED = """\
BASE: ['']
DATA:
  BATCH_SIZE: 128
  DATASET: imagenet
  IMG_SIZE: 64
  INTERPOLATION: bicubic
  PIN_MEMORY: True
  NUM_WORKERS: 0
MODEL:
  TYPE: groupmixformer
  NAME: groupmixformer
  RESUME: ''
  PRETRAINED: ''
  LABEL_SMOOTHING: 0.1
  GMA:
    PATCH_SIZE: 4
    IN_DIM: 3
    NUM_STAGES: 4
    NUM_CLASSES: 6
    EMBEDDING_DIMS: [40, 40, 40, 40]
    SERIAL_DEPTHS: [1, 1, 1, 1]
    NUM_HEADS: 8
    MLP_RATIOS: [2, 2, 2, 2]
    QKV_BIAS: True
    QKV_SCALE: None
    DROP_RATE: 0.
    ATTN_DROP_RATE: 0.
    DROP_PATH_RATE: 0.1
TRAIN:
  START_EPOCH: 0
  EPOCHS: 2
  WARMUP_EPOCHS: 1
  WEIGHT_DECAY: 0.05
  BASE_LR: 5e-4
  WARMUP_LR: 5e-7
  MIN_LR: 5e-6
  CLIP_GRAD: 5.0
  AUTO_RESUME: True
  ACCUMULATION_STEPS: 0
  USE_CHECKPOINT: False
  LR_SCHEDULER:
    NAME: cosine
    DECAY_EPOCHS: 30
    DECAY_RATE: 0.1
  OPTIMIZER:
    NAME: adamw
    EPS: 1e-8
    BETAS: [0.9, 0.999]
    MOMENTUM: 0.9
AUG:
  COLOR_JITTER: 0.4
  AUTO_AUGMENT: rand-m9-mstd0.5-inc1
  REPROB: 0.25
  REMODE: pixel
  RECOUNT: 1
  MIXUP: 0.8
  CUTMIX: 1.0
  CUTMIX_MINMAX: None
  MIXUP_PROB: 1.0
  MIXUP_SWITCH_PROB: 0.5
  MIXUP_MODE: batch
TEST:
  CROP: True
AMP_OPT_LEVEL: ''
OUTPUT: ''
TAG: default
SAVE_FREQ: 1
PRINT_FREQ: 10
SEED: 0
EVAL_MODE: False
THROUGHPUT_MODE: False
"""


@pytest.fixture(scope="session")
def checkout(shared, make_images):
    """A folder in which the published commands work: the programs, a configuration file, and images enough."""

    def fill(folder):
        for name in ("train.py", "test.py"):
            (folder / name).symlink_to(REPOSITORY / name)
        (folder / "configs").mkdir()
        (folder / "configs" / "groupmixformer_small.yaml").write_text(PUBLISHED)
        make_images(folder / "D" / "train", 132, seed=0)
        make_images(folder / "D" / "val", 17, seed=1)

    return shared("checkout", fill)


@pytest.fixture(scope="session")
def in_shell(checkout, user_environment):
    """Runs a command in that folder as a shell does, with a port of its own: the launcher's is the same for all."""

    def run(command):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            environment = user_environment(PET_MASTER_PORT=str(free.getsockname()[1]))
        done = subprocess.run(
            command, shell=True, cwd=checkout, env=environment, capture_output=True, text=True, timeout=240, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture(scope="session")
def published_run(in_shell, checkout, shared):
    """The folder of a run of the published training command, on two processes instead of eight."""
    command = TRAIN.replace("--nproc_per_node 8", "--nproc_per_node 2")
    shared("published_run", lambda _: in_shell(command))
    return checkout / "O" / "groupmixformer" / "groupmixformer_small"


@pytest.mark.slow
def test_published_training_command_trains(published_run):
    assert torch.load(published_run / "last.pth", weights_only=True)["progress"]["epoch"] == 2
    log = (published_run / "log_rank0.txt").read_text()
    assert "Train: [1/2][1/1]" in log  # 132 images are one update of 2 x 64
    assert " * Acc@1 " in log


@pytest.mark.slow
def test_published_test_command_scores(published_run, in_shell):
    said = in_shell(f"{TEST} --resume O/groupmixformer/groupmixformer_small/best.pth")
    accuracy = torch.load(published_run / "best.pth", weights_only=True)["best"]["acc1"]
    (line,) = [line for line in said.splitlines() if "Acc@" in line]
    assert line.startswith(f" * Acc@1 {accuracy:.3f} Acc@5 ")


@pytest.mark.slow
def test_published_test_command_without_weights_names_those_of_the_run(published_run, checkout, call, monkeypatch):
    # The published program scored a network that knew nothing, without a word.
    monkeypatch.chdir(checkout)
    result = call("test.py", *shlex.split(FLAGS))
    assert result.code == 2
    (error,) = result.errors
    assert "--resume O/groupmixformer/groupmixformer_small/best.pth" in error


@pytest.mark.parametrize(("command", "ranks", "program"), [(TRAIN, 8, "train.py"), (TEST, 1, "test.py")])
@pytest.mark.parametrize("launched_by_us", ["--use_env", ""])
def test_published_words_are_understood(command, ranks, program, launched_by_us, checkout, monkeypatch):
    monkeypatch.chdir(checkout)
    _, _, after = command.replace("--use_env", launched_by_us).partition("-m torch.distributed.launch ")
    arguments = launch.parse_args(shlex.split(after))
    assert (int(arguments.nproc_per_node), int(arguments.nnodes), arguments.training_script) == (ranks, 1, program)
    words = arguments.training_script_args + ([] if arguments.use_env else ["--local-rank=0"])
    config = config_from(make_parser("").parse_args(words))
    assert (config.DATA.DATA_PATH, config.DATA.BATCH_SIZE, config.OUTPUT) == ("D", 64, "O")
    assert (config.MODEL.TYPE, config.TAG) == ("groupmixformer", "groupmixformer_small")


@pytest.mark.parametrize("flag", ["--local_rank=3", "--local-rank=3", "--local_rank 3", "--local-rank 3"])
def test_local_rank_of_any_launcher_is_taken(flag, checkout, monkeypatch):
    monkeypatch.chdir(checkout)
    config_from(make_parser("").parse_args([*shlex.split(FLAGS), *flag.split()]))


def test_flags_that_are_not_given_leave_the_file_alone(checkout):
    config = config_from(make_parser("").parse_args(["--cfg", str(checkout / "configs" / "groupmixformer_small.yaml")]))
    assert (config.DATA.BATCH_SIZE, config.TAG, config.SEED) == (128, "default", 0)
    assert config.TRAIN.BASE_LR == 5e-4
    assert config.TRAIN.OPTIMIZER.EPS == 1e-8
    assert config.MODEL.GMA.QKV_SCALE is None
    assert config.AUG.CUTMIX_MINMAX is None


def test_options_override_the_file_and_flags_the_options(checkout):
    words = shlex.split(f"--cfg {checkout}/configs/groupmixformer_small.yaml --batch-size 32 --opts TRAIN.EPOCHS 1")
    words += ["TRAIN.CLIP_GRAD", "5", "DATA.BATCH_SIZE", "16"]
    config = config_from(make_parser("").parse_args(words))
    assert (config.TRAIN.EPOCHS, config.TRAIN.CLIP_GRAD, config.DATA.BATCH_SIZE) == (1, 5.0, 32)
    assert isinstance(config.TRAIN.CLIP_GRAD, float)
