"""The command line that train.py and test.py share, and how a program ends on bad input."""

import argparse
import errno
import math
import multiprocessing
import os
import select
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from yacs.config import CfgNode

from utils.config import check, check_folder, default_config, load_config, merge_options, merge_value
from utils.errors import BrokenDataError, OneRankError, Stopped, UserError, is_out_of_memory, reason

# flag -> the key that it overrides
_KEYS = {
    "batch_size": "DATA.BATCH_SIZE",
    "data_path": "DATA.DATA_PATH",
    "pretrained": "MODEL.PRETRAINED",
    "resume": "MODEL.RESUME",
    "accumulation_steps": "TRAIN.ACCUMULATION_STEPS",
    "use_checkpoint": "TRAIN.USE_CHECKPOINT",
    "amp_opt_level": "AMP_OPT_LEVEL",
    "precision": "PRECISION",
    "device": "DEVICE",
    "output": "OUTPUT",
    "tag": "TAG",
    "seed": "SEED",
    "eval": "EVAL_MODE",
    "throughput": "THROUGHPUT_MODE",
    "allow_changes": "TRAIN.ALLOW_CHANGES",
    "elastic": "TRAIN.ELASTIC",
    "model_type": "MODEL.TYPE",
}
_MODEL_FILE = "groupmixformer.py"


class Parser(argparse.ArgumentParser):
    """argparse's, whose errors are one line as all others are, and which takes no abbreviations."""

    def __init__(self, description: str, **settings: Any) -> None:
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=form, allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        """Raises what `run` turns into a line."""
        raise UserError(f"{message}: --help tells the flags")


def at_least(least: int, most: float = math.inf) -> Callable[[str], int]:
    """An argparse type: a whole number that is not below `least`, nor above `most`."""

    def number(text: str) -> int:
        with suppress(ValueError):
            if least <= int(text) <= most:
                return int(text)
        bounds = f"at least {least}" if most == math.inf else f"from {least} to {most}"
        raise argparse.ArgumentTypeError(f"{text}: give a whole number, {bounds}")

    return number


def make_parser(
    description: str,
    data: str = "folder that holds train/ and val/",
    scores: bool = False,
    measures_throughput: bool = True,
) -> Parser:
    """The flags of the published command line and a few more; none has a default, so only what is given overrides.

    Args:
        description: What the program does.
        data: What --data-path names.
        scores: Whether the program only scores, as with --eval, and is told which weights by flags more.
        measures_throughput: Whether it has --throughput.
    """
    parser = Parser(description)
    parser.add_argument("--cfg", required=True, metavar="FILE", help="configuration, such as those in configs/")
    parser.add_argument(
        "--opts", nargs="+", action="extend", metavar="KEY VALUE", help="keys of the configuration to override"
    )
    parser.add_argument("--data-path", metavar="DIR", help=data)
    parser.add_argument("--batch-size", type=int, metavar="N", help="images of one micro-batch on each rank")
    if scores:
        parser.add_argument("--pretrained", metavar="FILE", help="weights to score")
        parser.add_argument("--resume", metavar="FILE", help="checkpoint to score, the same as --pretrained")
        add_weights_choice(parser).add_argument(
            "--random-weights", action="store_const", const="random", dest="weights", help="those of a fresh network"
        )
    else:
        parser.add_argument("--pretrained", metavar="FILE", help="weights to start from, or to score with --eval")
        parser.add_argument("--resume", metavar="FILE", help="checkpoint to go on from, or to score with --eval")
    parser.add_argument(
        "--allow-changes", action="store_true", default=None, help="go on with a run under other settings"
    )
    parser.add_argument(
        "--elastic", action="store_true", default=None, help="go on with a run on another number of ranks"
    )
    parser.add_argument("--accumulation-steps", type=int, metavar="N", help="micro-batches of one update")
    parser.add_argument("--use-checkpoint", action="store_true", default=None, help="recompute activations")
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16", "fp16"], help="arithmetic of the network")
    parser.add_argument("--amp-opt-level", choices=["O0", "O1", "O2"], help="apex's name for --precision")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], help="where to compute")
    parser.add_argument("--output", metavar="DIR", help="outputs go to DIR/<MODEL.NAME>/<tag>/")
    parser.add_argument("--tag", metavar="T", help="name of the run")
    parser.add_argument("--seed", type=int, metavar="N", help="seed of all randomness")
    parser.add_argument("--eval", action="store_true", default=scores or None, help="score the weights and stop")
    if measures_throughput:
        parser.add_argument("--throughput", action="store_true", default=None, help="measure images/s and stop")
    parser.add_argument("--model-type", metavar="T", help="groupmixformer")
    parser.add_argument("--model-file", metavar="F", help=_MODEL_FILE)
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # old launchers pass it
    parser.add_argument("--zip", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--cache-mode", choices=["no", "full", "part"], help=argparse.SUPPRESS)
    return parser


def add_weights_choice(parser: Parser) -> argparse._MutuallyExclusiveGroup:
    """The flags that say which of a checkpoint's weights are meant: `weights` is 'auto', 'model' or 'ema'.

    Returns:
        Their group, of which one flag may be given.
    """
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--weights",
        choices=["auto", "model", "ema"],
        default="auto",
        help="the trained weights, or their moving average; auto takes what its best epoch was chosen by",
    )
    group.add_argument("--ema", action="store_const", const="ema", dest="weights", help="the same as --weights ema")
    return group


def config_from(
    arguments: argparse.Namespace,
    defaults: Callable[[], CfgNode] = default_config,
    check: Callable[[CfgNode], None] = check,
) -> CfgNode:
    """The checked configuration: file, then --opts, then flags, each overriding what came before.

    Args:
        arguments: What `make_parser` parsed.
        defaults: Gives all keys of the task.
        check: Refuses values that cannot work.

    Raises:
        UserError: If the file, a key, a value or a flag is wrong.
    """
    if arguments.zip or arguments.cache_mode:
        raise UserError(
            "--zip and --cache-mode are gone: pack with tools/pack_dataset.py and use --opts DATA.DATASET tar"
        )
    if arguments.model_file not in (None, _MODEL_FILE):
        raise UserError(f"--model-file {arguments.model_file}: the network is in {_MODEL_FILE}; leave the flag out")
    config = load_config(arguments.cfg, defaults)
    if arguments.eval:  # what a run began with is not what is to be scored with its config.yaml
        config.MODEL.RESUME = config.MODEL.PRETRAINED = ""
    merge_options(config, arguments.opts or [])
    for flag, name in _KEYS.items():
        value = getattr(arguments, flag, None)  # not all programs have all flags
        if value is not None:
            merge_value(config, name, value, f"--{flag.replace('_', '-')}")
    try:
        check(config)
        check_folder(config)
    except UserError as error:
        raise UserError(f"{arguments.cfg} with the flags: {error}") from None
    has_begun = Path(config.OUTPUT, config.MODEL.NAME, config.TAG).is_dir()  # and may need none of them any more
    for path in (config.MODEL.RESUME, config.MODEL.PRETRAINED):
        if path and not Path(path).is_file() and not has_begun:
            raise UserError(f"{path} is no file: name a checkpoint")
        if path and getattr(arguments, "weights", "") == "random":
            raise UserError(f"--random-weights scores a network that knows nothing, not {path}: leave one of them out")
    return config


def check_report(path: Path | None, flag: str = "--json", ending: str = "") -> None:
    """Refuses a file for a report that cannot be written, before the work that it is to report.

    Args:
        path: The file, if any is asked for.
        flag: What names it on the command line.
        ending: How its name must end, such as '.png'; in any case of letters.

    Raises:
        UserError: If it is a folder, in none or in one that cannot be written to, or its name ends otherwise.
    """
    if path and (path.is_dir() or not path.parent.is_dir()):
        raise UserError(f"{flag} {path}: name a file in a folder that exists")
    if path and (path.is_file() or not path.exists()) and not os.access(path.parent, os.W_OK):
        raise UserError(f"{flag} {path}: {path.parent} cannot be written to; name a file in another folder")
    if path and not path.name.lower().endswith(ending):
        raise UserError(f"{flag} {path}: end the name in {ending}")


def check_new(path: Path, flag: str, ending: str = "") -> None:
    """Refuses a place for a file as `check_report` does, and one where something is already.

    Raises:
        UserError: If it is.
    """
    if path.exists():
        raise UserError(f"{flag} {path} exists: name another, nothing is written over")
    check_report(path, flag, ending)


def check_pictures(folder: Path | None, count: int) -> None:
    """Refuses a folder that pictures cannot be saved in, and a number of pictures that is none.

    Args:
        folder: The folder to make or fill, if any is asked for.
        count: The number of pictures.

    Raises:
        UserError: If the folder is a file, or there is nothing to draw.
    """
    if folder and folder.exists() and not folder.is_dir():
        raise UserError(f"--save-pictures {folder} is a file: name a folder")
    if count < 1:
        raise UserError(f"--pictures {count}: draw at least 1, or leave --save-pictures out")


def run(main: Callable[[], None]) -> None:
    """Runs a program; an error that the user can mend becomes one line and exit code 2, a signal 128 + its number,
    and so does output that nobody reads any more.

    Every rank meets the same error, so only the first of each machine speaks; a lost rank, and data that a loader's
    process cannot read, not every rank may meet.
    """
    if sys.platform == "linux":
        multiprocessing.set_start_method("fork", force=True)  # Python 3.14's way lets loaders outlive a killed program
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        # A loader's process hands its error over with a traceback above it; the message is the last line.
        message = str(error).splitlines()[-1].removeprefix(f"{BrokenDataError.__module__}.{BrokenDataError.__name__}: ")
        _fail(message, of_all_ranks=not isinstance(error, OneRankError))
    except RuntimeError as error:
        if is_out_of_memory(error):
            _fail(
                f"memory ran out ({reason(error).partition('. GPU')[0]}): make batches smaller (--batch-size), or in "
                "training recompute activations (TRAIN.USE_CHECKPOINT)",
                of_all_ranks=False,
            )
        if "DataLoader worker" not in str(error):
            raise
        _fail(
            f"{reason(error)}: where memory ran out, use fewer loader processes (DATA.NUM_WORKERS, --workers); "
            "then start the same command again",
            of_all_ranks=False,
        )
    except BrokenPipeError:
        if _is_output_read():
            raise
        # As head does it when it has enough. What is left to write must not be complained of at the end either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            _fail(f"{error.filename} has a name that is too long for a file: shorten it", of_all_ranks=True)
        if error.errno == errno.EACCES and error.filename:
            _fail(f"{error.filename}: {error.strerror}: mend its permissions or name another", of_all_ranks=False)
        raise
    except Stopped as stopped:
        sys.exit(128 + stopped.signal)
    except KeyboardInterrupt:
        sys.exit(130)


def _fail(message: str, of_all_ranks: bool) -> NoReturn:
    """Ends with a line, which of an error that all ranks meet only the first of each machine says."""
    if not of_all_ranks or int(os.environ.get("LOCAL_RANK", 0)) == 0:
        print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def _is_output_read() -> bool:
    poll = select.poll()
    poll.register(sys.stdout, 0)  # for nothing but that the other end is closed
    return not poll.poll(0)
