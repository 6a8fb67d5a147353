"""Training on CUDA devices: started as a user starts it, on each precision, and on all devices over NCCL."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

REPOSITORY = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.gpu

CONFIG = """
DATA: {BATCH_SIZE: 8, IMG_SIZE: 64, NUM_WORKERS: 0}
MODEL:
  NAME: tiny
  GMA: {NUM_CLASSES: 2, EMBEDDING_DIMS: [40, 40, 40, 40], SERIAL_DEPTHS: [1, 1, 1, 1], MLP_RATIOS: [2, 2, 2, 2]}
TRAIN: {EPOCHS: 3, WARMUP_EPOCHS: 0, BASE_LR: 0.05, EMA_DECAY: 0.5, ACCUMULATION_STEPS: 2}
AUG: {AUTO_AUGMENT: none, REPROB: 0.0}
DEVICE: cuda
PRINT_FREQ: 1
"""


@pytest.fixture
def tree(tmp_path) -> Path:
    """Dark and bright noise, 32 images of each to train on and 5 to score."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 32), ("val", 5)):
        for level, name in ((60, "dark"), (190, "bright")):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = generator.normal(level, 20, (64, 64, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    return tmp_path


def train(tree: Path, ranks: int, *arguments: str, tag: str = "default") -> list[dict[str, float]]:
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [*launcher, "train.py", "--cfg", str(tree / "tiny.yaml"), "--data-path", str(tree), *arguments]
    subprocess.run([*command, "--output", str(tree / "out"), "--tag", tag], cwd=REPOSITORY, check=True, timeout=600)
    lines = (tree / "out" / "tiny" / tag / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "images_per_s"} for line in lines]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_training_learns_on_a_gpu_in_each_precision(tree, precision):
    lines = train(tree, 1, "--precision", precision)
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[-1]["acc1"] == 100


def test_a_compiled_network_learns_with_checkpointing(tree):
    lines = train(tree, 1, "--use-checkpoint", "--opts", "TRAIN.COMPILE", "True")
    assert lines[-1]["acc1"] == 100


def test_all_gpus_train_together_with_synchronised_norms(tree):
    ranks = torch.cuda.device_count()
    batch_size = 4 if ranks > 1 else 8
    epochs = 3 * ranks * batch_size // 8  # updates as many as of one GPU
    lines = train(tree, ranks, "--batch-size", str(batch_size), "--opts", "TRAIN.EPOCHS", str(epochs))
    assert lines[-1]["acc1"] == 100


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_deterministic_key_makes_equal_runs_and_equal_resumed_ones(tree, precision):
    options = ["--precision", precision, "--opts", "DETERMINISTIC", "True", "TRAIN.SAVE_UPDATES", "1", "KEEP", "9"]
    whole, again = (train(tree, 1, *options, tag=tag) for tag in ("whole", "again"))
    assert again == whole
    folder = tree / "out" / "tiny" / "again"
    newest = sorted(folder.glob("ckpt_epoch_*"))[-2]  # of the middle of the last epoch
    assert torch.load(newest, weights_only=True)["progress"]["place"] > 0
    shutil.copyfile(newest, folder / "last.pth.new")
    (folder / "last.pth.new").replace(folder / "last.pth")
    assert train(tree, 1, *options, tag="again") == whole
    ends = [torch.load(tree / "out" / "tiny" / tag / "last.pth", weights_only=True) for tag in ("whole", "again")]
    for part in ("model", "ema"):
        assert all(torch.equal(ends[0][part][name], ends[1][part][name]) for name in ends[0][part])
