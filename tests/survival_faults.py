"""Starts a program in which something goes wrong: `python tests/survival_faults.py FAULTS train.py ...`.

FAULTS is a JSON list of {"at": moment, "do": action, "rank": number, "mark": file}. A fault happens once: where its
mark exists it has happened, even if in an earlier start; only "nan" happens whenever its moment comes.

Moments, with P a place for an update, counted from 0 over the whole run:
    step P.S        step S of update P begins
    update P        the gradients of update P are there
    updated P       the optimizer has taken update P
    scoring N       the network is about to score the Nth batch that this process scores, from 1
    writing FILE    half a megabyte of a checkpoint is written
    written FILE    it is about to be moved to its place
    moved FILE      it has been moved there
    removing FILE   it is about to be removed
Actions:
    kill            SIGKILL comes; between checkpoints only, unless the moment is one of their writing
    nan             the network answers with no numbers in that step
    hang            nothing happens any more, until SIGTERM or SIGKILL
    hold            nothing happens until a file MARK.go is there
    listen          nothing happens until a signal comes
"""

import json
import os
import runpy
import select
import signal
import sys
import threading
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[0] = str(REPOSITORY)
LIMIT_S = 120

import torch  # noqa: E402
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook  # noqa: E402
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook  # noqa: E402

import utils.seeding  # noqa: E402
from models.groupmixformer import GroupMixFormer  # noqa: E402
from utils.writer import BackgroundWriter  # noqa: E402

RANK = int(os.environ.get("RANK", 0))


class Faults:
    """What is to go wrong, and where the run is."""

    def __init__(self, faults):
        self.faults = [fault for fault in faults if fault["rank"] == RANK]
        self.place = self.scored = 0
        self.spoil = False
        self.writer = None

    def reach(self, moment):
        for fault in self.faults:
            if fault["at"] == moment:
                self.begin(fault["do"], Path(fault["mark"]))

    def begin(self, action, mark):
        if action == "nan":
            self.spoil = True
            return
        if mark.exists():
            return
        getattr(self, action)(mark)

    def kill(self, mark):
        if self.writer and threading.current_thread() is threading.main_thread():
            self.writer.wait()  # so that what the next start goes on from does not depend on the machine's speed
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)

    def hang(self, mark):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        mark.touch()
        time.sleep(10 * LIMIT_S)

    def hold(self, mark):
        mark.touch()
        end = time.monotonic() + LIMIT_S
        while not mark.with_name(mark.name + ".go").exists():
            if time.monotonic() > end:
                os._exit(99)
            time.sleep(0.01)

    def listen(self, mark):
        heard, told = os.pipe()
        os.set_blocking(told, False)
        before = signal.set_wakeup_fd(told)
        mark.touch()
        if not select.select([heard], [], [], LIMIT_S)[0]:
            os._exit(99)
        signal.set_wakeup_fd(before)


class HalfWritten:
    """A file in which a moment comes when half a megabyte is written."""

    def __init__(self, file, faults, name):
        self.file, self.faults, self.name, self.left = file, faults, name, 500_000

    def write(self, data):
        size = self.file.write(data)
        self.left -= len(data)
        if self.left < 0:
            self.left = float("inf")
            self.file.flush()
            self.faults.reach(f"writing {self.name}")
        return size

    def flush(self):
        self.file.flush()


def checkpoint_being_written():
    """The name of the checkpoint that this process has open beside its place; texts may be open there, too."""
    links = []
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            links.append(descriptor.readlink())
        except FileNotFoundError:
            continue
    (path,) = [path for path in links if path.suffixes[-2:] == [".pth", ".tmp"]]
    return path.stem


def patch(faults):
    """Lets the moments of training, scoring and writing be told."""
    number_for, save, replace, unlink = utils.seeding.number_for, torch.save, Path.replace, Path.unlink
    submit = BackgroundWriter.submit

    def telling_number_for(seed, purpose, *where):
        if purpose == "step":
            faults.place, step, _ = where
            faults.reach(f"step {faults.place}.{step}")
        return number_for(seed, purpose, *where)

    def telling_replace(path, target):
        faults.reach(f"written {Path(target).name}")
        moved = replace(path, target)
        faults.reach(f"moved {Path(target).name}")
        return moved

    def telling_unlink(path, *args, **kwargs):
        faults.reach(f"removing {path.name}")
        unlink(path, *args, **kwargs)

    def telling_submit(writer, job):
        faults.writer = writer
        submit(writer, job)

    def before_forward(module, _inputs):
        if isinstance(module, GroupMixFormer) and not module.training:
            faults.scored += 1
            faults.reach(f"scoring {faults.scored}")

    def after_forward(module, _inputs, output):
        if isinstance(module, GroupMixFormer) and faults.spoil:
            faults.spoil = False
            return output * float("nan")
        return output

    utils.seeding.number_for = telling_number_for
    torch.save = lambda state, file: save(state, HalfWritten(file, faults, checkpoint_being_written()))
    Path.replace, Path.unlink = telling_replace, telling_unlink
    BackgroundWriter.submit = telling_submit
    register_module_forward_pre_hook(before_forward)
    register_module_forward_hook(after_forward)
    register_optimizer_step_pre_hook(lambda *_: faults.reach(f"update {faults.place}"))
    register_optimizer_step_post_hook(lambda *_: faults.reach(f"updated {faults.place}"))


patch(Faults(json.loads(sys.argv[1])))
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
