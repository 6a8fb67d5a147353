"""Kill a training run at random moments, start it again each time, and compare it with one that was left alone.

Usage:
    python tools/soak.py --kills 50 --ranks 2

Trains a tiny network on noise, with all that is random in training turned on, and with two loader processes. SIGKILL
hits a rank, the launcher, or all of them. Ends with exit code 1 if the two runs differ in a single bit.
"""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import checkpoint
from utils.cli import Parser, at_least, run
from utils.logger import read_metrics

_CLASSES, _TRAIN_IMAGES, _VAL_IMAGES = 4, 64, 18
_BATCH = 8  # images of a step over all ranks, of which each takes two or more, as mixup pairs them
_MOST_LINES = 12  # of the log, after which a run is killed
_PATIENCE_S = 120

_CONFIG = """
DATA: {{BATCH_SIZE: {batch}, IMG_SIZE: 32, NUM_WORKERS: 2}}
MODEL:
  NAME: soak
  GMA:
    NUM_CLASSES: 0
    EMBEDDING_DIMS: [40, 40, 40, 40]
    SERIAL_DEPTHS: [1, 1, 1, 1]
    MLP_RATIOS: [2, 2, 2, 2]
    DROP_RATE: 0.1
    DROP_PATH_RATE: 0.2
TRAIN: {{EPOCHS: {epochs}, WARMUP_EPOCHS: 1, BASE_LR: 0.1, EMA_DECAY: 0.9, ACCUMULATION_STEPS: 2, SAVE_UPDATES: 3}}
DEVICE: cpu
KEEP: 1
PRINT_FREQ: 1
"""


def main() -> None:
    """Parses, runs both, compares."""
    parser = Parser(__doc__)
    parser.add_argument(
        "--kills", type=at_least(1), default=50, metavar="N", help="how often to kill the run (default 50)"
    )
    parser.add_argument(
        "--ranks", type=at_least(1, _BATCH // 2), default=1, metavar="N", help="processes that train (default 1)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the moments and the victims")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        sys.exit(soak(Path(name), arguments.kills, arguments.ranks, random.Random(arguments.seed)))


def soak(folder: Path, kills: int, ranks: int, chance: random.Random) -> int:
    """Trains twice, once undisturbed, and prints what came of it.

    Args:
        folder: For data and runs.
        kills: How often to kill the second run.
        ranks: Processes that train.
        chance: Chooses moments and victims.

    Returns:
        0 if both runs ended alike, else 1.
    """
    write_images(folder)
    (folder / "soak.yaml").write_text(_CONFIG.format(batch=_BATCH // ranks, epochs=kills))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    command = [*(launcher if ranks > 1 else [sys.executable]), "train.py", "--cfg", str(folder / "soak.yaml")]
    command += ["--data-path", str(folder), "--output", str(folder), "--tag"]
    finish(start([*command, "whole"], folder / "whole.log"), folder / "whole.log")

    victims, log = Counter(), folder / "killed.log"
    for number in range(1, kills + 1):
        victim = kill_once([*command, "killed"], log, chance)
        if victim is None:
            print(f"the run had ended before kill {number}")
            break
        victims[victim] += 1
        print(f"kill {number} of {kills}: {victim}", flush=True)
    finish(start([*command, "killed"], log), log)

    hashes = {name: outcome(folder / "soak" / name) for name in ("whole", "killed")}
    hit = ", ".join(f"{name} {count}" for name, count in sorted(victims.items()))
    updates = len([line for line in read_metrics(folder / "soak" / "whole" / "metrics.jsonl") if "lr" in line])
    print(f"{sum(victims.values())} kills ({hit}) in {updates} updates on {ranks} rank(s)")
    for name, value in hashes.items():
        print(f"{name:>6}: {value}")
    same = hashes["whole"] == hashes["killed"]
    print("equal, bit for bit" if same else "DIFFERENT")
    return 0 if same else 1


def write_images(folder: Path) -> None:
    """Writes train/ and val/ with images of noise."""
    generator = np.random.default_rng(0)
    for split, count in (("train", _TRAIN_IMAGES), ("val", _VAL_IMAGES)):
        for number in range(count):
            path = folder / split / f"class{number % _CLASSES}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(0, 256, (48, 48, 3), dtype=np.uint8)).save(path)


def start(command: list[str], log: Path) -> subprocess.Popen:
    """Starts a program whose output is added to a log."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    root = Path(__file__).resolve().parent.parent
    with open(log, "a") as file:
        return subprocess.Popen(command, cwd=root, env=environment, stdout=file, stderr=file, start_new_session=True)


def finish(process: subprocess.Popen, log: Path) -> None:
    """Waits for a program to end well.

    Raises:
        SystemExit: If it does not.
    """
    if process.wait():
        sys.exit(f"the run ended with code {process.returncode}:\n" + log.read_text()[-2000:])


def kill_once(command: list[str], log: Path, chance: random.Random) -> str | None:
    """Starts the run, kills a part of it at a random moment, and waits until all of it has gone.

    Returns:
        What was killed; None if the run ended before.
    """
    lines_before = count_lines(log)
    process = start(command, log)
    wanted = lines_before + chance.randint(1, _MOST_LINES)
    while count_lines(log) < wanted:
        if process.poll() is not None:
            return None
        time.sleep(0.01)
    time.sleep(chance.uniform(0, 0.3))
    ranks = children(process.pid)
    everything = [process.pid, *ranks, *(worker for rank in ranks for worker in children(rank))]
    choices = {"all": everything}
    if "torch.distributed.run" in command:  # else the program itself is the only rank
        choices |= {"the launcher": [process.pid], **{f"rank {rank}": [pid] for rank, pid in enumerate(ranks)}}
    victim = chance.choice(sorted(choices))
    for pid in choices[victim]:
        with suppress(ProcessLookupError):  # some end by themselves once others have gone
            os.kill(pid, signal.SIGKILL)
    process.wait()
    patience = time.monotonic() + _PATIENCE_S
    while any(map(is_alive, everything)):
        if time.monotonic() > patience:
            sys.exit(f"after killing {victim}, something is still running:\n" + log.read_text()[-2000:])
        time.sleep(0.05)
    return victim


def count_lines(log: Path) -> int:
    """Lines of a log."""
    return log.read_bytes().count(b"\n") if log.exists() else 0


def children(pid: int) -> list[int]:
    """The processes that a process started, oldest first."""
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def is_alive(pid: int) -> bool:
    """Whether a process runs: a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def outcome(folder: Path) -> str:
    """A hash of all that a run ended with, and of every update's loss."""
    state = checkpoint.load(folder / checkpoint.LAST)
    lines = [
        {key: line[key] for key in line if key != "images_per_s"} for line in read_metrics(folder / "metrics.jsonl")
    ]
    parts = {key: state[key] for key in ("model", "ema", "optimizer", "scaler", "progress", "best")}
    return hashlib.sha256((checkpoint.digest(parts) + json.dumps(lines)).encode()).hexdigest()


if __name__ == "__main__":
    run(main)
