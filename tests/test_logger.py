"""Console, log file, metrics.jsonl, TensorBoard events and the curves drawn from them."""

import errno
import io
import json
import logging
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers_unit import ROOT
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from utils.config import default_config
from utils.curves import draw_curves
from utils.errors import UserError
from utils.logger import MetricsLog, read_metrics, setup_logging
from utils.metrics import Score
from utils.tracking import Tracker, check_tracking


@pytest.fixture
def logging_back():
    """Puts the root logger back as it was."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    root.handlers[:] = []
    yield
    for handler in root.handlers:
        handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)


def events(folder):
    """(tag, step, value) of all scalars in a folder, in the order of writing, and the steps that purges start at."""
    scalars, purges = [], []
    for path in sorted(folder.rglob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime_ns):
        content, at = path.read_bytes(), 0
        while at < len(content):
            length = int.from_bytes(content[at : at + 8], "little")
            event = Event.FromString(content[at + 12 : at + 12 + length])
            at += 16 + length
            if event.HasField("session_log"):
                purges.append(event.step)
            scalars += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
    return scalars, purges


# Console and file


def test_rank_0_writes_to_the_console_and_the_file(tmp_path, capsys, logging_back):
    setup_logging(True, tmp_path)
    logging.getLogger("train").info("learning %d", 3)
    assert capsys.readouterr().out.endswith(" learning 3\n")
    assert (tmp_path / "log_rank0.txt").read_text().endswith(" learning 3\n")


def test_names_that_are_no_text_are_told_of_in_codes(tmp_path, monkeypatch, logging_back):
    strict = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="strict")
    monkeypatch.setattr(sys, "stdout", strict)
    setup_logging(True, tmp_path)
    logging.getLogger().warning("%s is broken", os.fsdecode(b"caf\xe9.png"))
    told = strict.buffer.getvalue().decode(), (tmp_path / "log_rank0.txt").read_text(encoding="utf-8")
    assert all(text.endswith(" caf\\udce9.png is broken\n") for text in told)


def test_other_ranks_write_nothing(tmp_path, capsys, logging_back):
    setup_logging(False, tmp_path)
    logging.getLogger("train").info("learning")
    assert capsys.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


def test_setting_up_again_doubles_no_line(tmp_path, capsys, logging_back):
    setup_logging(True)
    setup_logging(True, tmp_path)
    setup_logging(True, tmp_path)
    logging.getLogger().info("once")
    assert capsys.readouterr().out.count("once") == 1
    assert (tmp_path / "log_rank0.txt").read_text().count("once") == 1


def test_a_resumed_runs_log_goes_on_in_the_same_file(tmp_path, capsys, logging_back):
    for word in ("first", "second"):
        setup_logging(True, tmp_path)
        logging.getLogger().info(word)
    lines = (tmp_path / "log_rank0.txt").read_text().splitlines()
    assert [line.split()[-1] for line in lines] == ["first", "second"]


@pytest.mark.parametrize("has_bar", [True, False])
def test_progress_goes_to_the_file_only_where_a_bar_shows_it(tmp_path, capsys, monkeypatch, logging_back, has_bar):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: has_bar, raising=False)
    setup_logging(True, tmp_path)
    logging.getLogger().info("step 3", extra={"progress": True})
    logging.getLogger().info("epoch done")
    out = capsys.readouterr().out
    assert ("step 3" in out) is not has_bar
    assert "epoch done" in out
    assert "step 3" in (tmp_path / "log_rank0.txt").read_text()


# metrics.jsonl and TensorBoard


def line(update, **values):
    return {"update": update, "epoch": 0, "loss": 1.0 / update, **values}


def written(folder, updates, start=0):
    log = MetricsLog(folder, start)
    for update in updates:
        log.write(line(update), {"loss": 1.0 / update})
    log.close()


def test_what_is_written_is_read_back(tmp_path):
    written(tmp_path, [1, 2, 3])
    assert read_metrics(tmp_path / "metrics.jsonl") == [line(1), line(2), line(3)]
    scalars, _ = events(tmp_path / "runs")
    assert scalars == [("loss", update, pytest.approx(1 / update)) for update in (1, 2, 3)]


def test_tensorboard_gets_the_published_tags(tmp_path):
    log = MetricsLog(tmp_path)
    log.write({"update": 4}, {"Acc@1": 71.5, "Acc@5": 90.0, "lr": 0.5, "grad_norm": 2.0})
    log.close()
    scalars, _ = events(tmp_path / "runs")
    found = [(tag.replace("Acc_", "Acc@"), step, value) for tag, step, value in scalars]
    assert found == [("Acc@1", 4, 71.5), ("Acc@5", 4, 90.0), ("lr", 4, 0.5), ("grad_norm", 4, 2.0)]


def test_a_line_is_on_disk_when_it_was_written(tmp_path):
    log = MetricsLog(tmp_path)
    log.write(line(1), {})
    assert read_metrics(tmp_path / "metrics.jsonl") == [line(1)]
    log.close()


def test_a_resumed_run_forgets_what_it_will_log_again(tmp_path):
    written(tmp_path, [2, 4, 6, 8])
    written(tmp_path, [6, 8], start=4)
    assert [values["update"] for values in read_metrics(tmp_path / "metrics.jsonl")] == [2, 4, 6, 8]
    _, purges = events(tmp_path / "runs")
    assert purges == [1, 5]  # TensorBoard drops what an earlier run wrote from there on


def test_a_run_that_starts_anew_forgets_everything(tmp_path):
    written(tmp_path, [2, 4])
    written(tmp_path, [2])
    assert [values["update"] for values in read_metrics(tmp_path / "metrics.jsonl")] == [2]
    _, purges = events(tmp_path / "runs")
    assert purges == [1, 1]


def test_a_line_cut_short_by_a_kill_is_left_out(tmp_path):
    written(tmp_path, [2, 4])
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + json.dumps(line(6))[:-9])
    assert read_metrics(path) == [line(2), line(4)]
    written(tmp_path, [6], start=4)
    assert read_metrics(path) == [line(2), line(4), line(6)]
    assert path.read_text().count("\n") == 3


def test_a_file_that_is_not_there_has_no_lines(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_every_line_is_json_also_where_a_number_is_none(tmp_path):
    log = MetricsLog(tmp_path)
    log.write({"update": 1, "loss": 0.5, "grad_norm": math.inf, "lr": math.nan}, {"grad_norm": math.inf})
    log.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"update": 1, "loss": 0.5, "grad_norm": None, "lr": None}
    draw_curves(tmp_path, 1, Score.measures)


@pytest.mark.parametrize("measure", ["acc1", "miou"])
def test_a_score_that_will_be_taken_again_is_forgotten(tmp_path, measure):
    lines = [score(2), progress(3), progress(4), score(4), progress(5)]
    for values in (lines[0], lines[3]):
        values[measure] = values.pop("acc1")
    text = "".join(json.dumps(values) + "\n" for values in lines)
    for is_scored, left in ((True, lines[:4]), (False, lines[:3])):
        (tmp_path / "metrics.jsonl").write_text(text)
        MetricsLog(tmp_path, 4, is_scored).close()
        assert read_metrics(tmp_path / "metrics.jsonl") == left


# Weights & Biases

WANDB = """
import json, pathlib

class Settings:
    pass

class Run:
    def __init__(self, path):
        self._path = path
    def _tell(self, kind, value):
        with open(self._path, "a") as file:
            file.write(json.dumps([kind, value]) + "\\n")
    def define_metric(self, name, step_metric):
        self._tell("axis", [name, step_metric])
    def log(self, values):
        if FAILS == "log":
            raise ConnectionError("the network is gone\\nand more")
        self._tell("log", values)
    def finish(self, exit_code):
        if FAILS == "finish":
            raise TimeoutError("not all was sent")
        self._tell("finish", exit_code)

def init(**settings):
    if FAILS == "init":
        raise RuntimeError("no API key\\nand more")
    run = Run(pathlib.Path(settings["dir"]) / "told.jsonl")
    run._tell("init", settings)
    return run
"""


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """Installs a wandb that writes what it is told into a file of the run's folder: `wandb(fails="log")`."""

    def install(fails=""):
        place = tmp_path / f"site_{fails}"
        place.mkdir()
        (place / "wandb.py").write_text(f"FAILS = {fails!r}\n{WANDB}")
        monkeypatch.syspath_prepend(place)
        monkeypatch.delitem(sys.modules, "wandb", raising=False)

    yield install
    sys.modules.pop("wandb", None)


def told(folder, kind):
    """What the wandb of the fixture was told."""
    lines = map(json.loads, (folder / "told.jsonl").read_text().splitlines())
    return [value for what, value in lines if what == kind]


def tracked(folder, project="digits"):
    folder.mkdir(exist_ok=True)
    config = default_config()
    config.WANDB = project
    return Tracker(folder, config)


def test_weights_and_biases_gets_the_scalars_of_tensorboard_over_updates(tmp_path, wandb):
    wandb()
    tracker = tracked(tmp_path / "run")
    log = MetricsLog(tmp_path / "run", tracker=tracker)
    log.write(line(1), {"loss": 1.0, "lr": 0.5})
    log.write(line(2, epoch=1), {"Acc@1": 71.5})
    log.close()
    assert told(tmp_path / "run", "axis") == [["*", "update"]]
    assert told(tmp_path / "run", "log") == [
        {"update": 1, "epoch": 0, "loss": 1.0, "lr": 0.5},
        {"update": 2, "epoch": 1, "Acc@1": 71.5},
    ]
    assert told(tmp_path / "run", "finish") == [0]
    [settings] = told(tmp_path / "run", "init")
    assert settings["project"] == "digits" and settings["name"] == "groupmixformer/default"
    assert settings["config"]["TRAIN"]["BASE_LR"] == 5e-4 and settings["config"]["WANDB"] == "digits"


def test_a_run_that_goes_on_goes_on_under_the_same_id_and_another_run_has_another(tmp_path, wandb):
    wandb()
    for name in ("one", "one", "other"):
        tracked(tmp_path / name).close()
    first, again = told(tmp_path / "one", "init")
    [other] = told(tmp_path / "other", "init")
    assert first["id"] == again["id"] == (tmp_path / "one" / "wandb_id").read_text()
    assert first["resume"] == "allow"
    assert other["id"] != first["id"]


def test_a_run_that_ends_with_an_error_has_failed(tmp_path, wandb):
    wandb()
    tracker = tracked(tmp_path / "run")
    with pytest.raises(UserError):
        try:
            raise UserError("broken")
        finally:
            tracker.close()
    assert told(tmp_path / "run", "finish") == [1]


@pytest.mark.parametrize("fails", ["init", "log", "finish"])
def test_a_network_that_fails_is_told_of_once_and_all_is_in_the_folder(tmp_path, wandb, caplog, fails):
    wandb(fails)
    tracker = tracked(tmp_path / "run")
    log = MetricsLog(tmp_path / "run", tracker=tracker)
    for update in (1, 2, 3):
        log.write(line(update), {"loss": 1.0})
    log.close()
    assert read_metrics(tmp_path / "run" / "metrics.jsonl") == [line(1), line(2), line(3)]
    [message] = [record.getMessage() for record in caplog.records]
    assert "nothing more goes to Weights & Biases (" in message and "\n" not in message


def test_a_project_without_wandb_is_refused(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()  # such as wandb leaves in the folder where it runs, and Python takes for a package
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    check_tracking("")
    with pytest.raises(UserError, match="WANDB is 'digits' but wandb is not installed: pip install wandb, or leave"):
        check_tracking("digits")


def test_training_tells_weights_and_biases_and_goes_on_under_the_same_id(tmp_path, wandb, train):
    wandb()
    run = train(tmp_path, opts="TRAIN.EPOCHS 1 WANDB digits")
    [settings] = told(run.folder, "init")
    logged = told(run.folder, "log")
    assert [values["update"] for values in logged] == [line["update"] for line in run.metrics()]
    assert logged[-1]["Acc@1"] == run.evaluations()[-1]["acc1"]
    assert settings["config"]["TRAIN"]["EPOCHS"] == 1
    assert told(run.folder, "finish") == [0]
    again = train(tmp_path, opts="TRAIN.EPOCHS 1 WANDB other")  # another project is no other run
    assert [each["id"] for each in told(again.folder, "init")] == [settings["id"]] * 2


def test_training_without_wandb_leaves_no_id(tmp_path, train):
    run = train(tmp_path, opts="TRAIN.EPOCHS 1")
    assert not (run.folder / "wandb_id").exists()


# When the disk fails


def disk_full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_metrics_are_cut_back_in_one_move(tmp_path, monkeypatch):
    written(tmp_path, [2, 4, 6])
    before = (tmp_path / "metrics.jsonl").read_text()
    monkeypatch.setattr(Path, "replace", disk_full)
    with pytest.raises(UserError, match=r"metrics\.jsonl cannot be written .*No space left"):
        MetricsLog(tmp_path, 2)
    assert (tmp_path / "metrics.jsonl").read_text() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "runs"]


def test_metrics_that_cannot_be_started_are_a_users_error(tmp_path):
    (tmp_path / "runs").write_text("a file where the folder of the events goes")
    with pytest.raises(UserError, match=r"cannot be written \((Not a directory|File exists)\)") as caught:
        MetricsLog(tmp_path)
    assert "\n" not in str(caught.value)


def test_metrics_that_cannot_be_written_are_a_users_error(tmp_path, monkeypatch):
    log = MetricsLog(tmp_path)
    monkeypatch.setattr("builtins.open", disk_full)
    with pytest.raises(UserError) as caught:
        log.write(line(1), {"loss": 1.0})
    monkeypatch.undo()
    assert str(caught.value).startswith(f"{tmp_path / 'metrics.jsonl'} cannot be written (No space left on device)")
    assert "\n" not in str(caught.value)
    log.close()


# A limit on the size of files acts as a full disk does.
FULL = """
import resource, sys, threading
from pathlib import Path
from utils.errors import UserError
from utils.logger import MetricsLog

log = MetricsLog(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    for update in range(1, 1000):
        log.write({"update": update, "loss": 1 / update}, {"loss": 1 / update, "lr": 0.1, "grad_norm": 1.0})
except UserError as error:
    print(error)
log.close()
print([thread for thread in threading.enumerate() if "Logger" in type(thread).__name__])  # they fail at the very end
"""


@pytest.mark.slow
def test_a_disk_that_fills_up_is_told_of_in_one_line_and_closing_does_not_fail(tmp_path):
    told = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert told.stdout == f"{tmp_path / 'metrics.jsonl'} cannot be written (File too large): free some space\n[]\n"
    assert told.stderr == ""
    assert told.returncode == 0


def test_a_log_file_on_a_full_disk_prints_nothing(tmp_path, capsys, monkeypatch, logging_back):
    setup_logging(True, tmp_path)
    [file] = [handler for handler in logging.getLogger().handlers if isinstance(handler, logging.FileHandler)]
    monkeypatch.setattr(file, "stream", FullFile(file.stream))
    logging.getLogger().info("learning")
    monkeypatch.undo()
    out, err = capsys.readouterr()
    assert out.endswith(" learning\n")
    assert err == ""


def test_a_console_that_is_gone_does_not_stop_a_run(tmp_path, monkeypatch, logging_back):
    setup_logging(True, tmp_path)
    monkeypatch.setattr(sys, "stdout", FullFile(sys.stdout))
    logging.getLogger().info("learning")
    assert (tmp_path / "log_rank0.txt").read_text().endswith(" learning\n")


class FullFile:
    """A file that nothing can be written to."""

    write = flush = staticmethod(disk_full)

    def __init__(self, file):
        self._file = file

    def __getattr__(self, name):
        return getattr(self._file, name)


# Curves


def drawn(folder, lines, updates_per_epoch=2):
    """Draws lines, and returns the picture."""
    (folder / "metrics.jsonl").write_text("".join(json.dumps(values) + "\n" for values in lines))
    draw_curves(folder, updates_per_epoch, Score.measures)
    with Image.open(folder / "curves.png") as image:
        assert image.format == "PNG"
        return image.convert("RGB")


def progress(update, **values):
    return {**line(update), "lr": 0.1, "grad_norm": 1.0, "images_per_s": 9.0, **values}


def score(update, **values):
    return {**line(update), "acc1": 10.0 * update, "acc5": 90.0, **values}


RUN = [progress(1), progress(2), score(2), progress(3), progress(4), score(4)]


def inked(image):
    """Pixels of the left and right, upper and lower quarter that are coloured and not grey."""
    width, height = image.size
    counts = []
    for top in (0, height // 2):
        for left in (0, width // 2):
            part = image.crop((left, top, left + width // 2, top + height // 2))
            counts.append(
                sum(count for count, (r, g, b) in part.getcolors(1 << 24) if max(r, g, b) - min(r, g, b) > 40)
            )
    return counts


def test_curves_begin_at_epoch_0_hold_every_point_and_have_a_colour_for_each_measure(tmp_path, monkeypatch):
    figures = []

    class Canvas(FigureCanvasAgg):
        def __init__(self, figure):
            super().__init__(figure)
            figures.append(figure)

    monkeypatch.setattr("utils.sheet.FigureCanvasAgg", Canvas)
    measures = {f"measure{number}": str(number) for number in range(6)}
    scores = [{"update": update, "epoch": 0, "loss": 0.5, **dict.fromkeys(measures, 50.0)} for update in (4, 6)]
    lines = [progress(2), progress(3), *scores]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(values) + "\n" for values in lines))
    draw_curves(tmp_path, 2, measures)
    for axis in figures[0].axes:
        left, right = axis.get_xlim()
        assert left == 0 and right >= max(line.get_xdata().max() for line in axis.lines)
    assert len({line.get_color() for line in figures[0].axes[1].lines}) == 6


def test_a_runs_curves_are_a_picture_of_four_panels(tmp_path):
    image = drawn(tmp_path, RUN)
    assert image.size[0] >= 800
    assert image.size[1] >= 500
    assert all(count > 50 for count in inked(image))


def test_a_moving_averages_accuracy_is_drawn_too(tmp_path):
    plain = drawn(tmp_path, RUN)
    ema = drawn(
        tmp_path, [{**values, "ema_acc1": 5.0 * values["update"]} if "acc1" in values else values for values in RUN]
    )
    assert inked(ema)[1] > inked(plain)[1]


@pytest.mark.parametrize(
    "lines",
    [
        [],
        [progress(1)],
        [score(2)],
        [progress(1, grad_norm=math.inf), progress(2, grad_norm=None), score(2, loss=math.nan)],
        [progress(update) for update in range(1, 200)],
    ],
    ids=["nothing", "one update", "one score", "no numbers", "many updates"],
)
def test_any_metrics_can_be_drawn(tmp_path, lines):
    assert drawn(tmp_path, lines).size[0] >= 800


def test_a_run_without_metrics_can_be_drawn(tmp_path):
    draw_curves(tmp_path, 3, Score.measures)
    Image.open(tmp_path / "curves.png").verify()


def test_a_picture_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    first = drawn(tmp_path, RUN[:3])
    monkeypatch.setattr("matplotlib.backends.backend_agg.FigureCanvasAgg.print_png", disk_full)
    with pytest.raises(UserError, match=r"curves\.png cannot be written \(.*No space left on device\)"):
        draw_curves(tmp_path, 2, Score.measures)
    with Image.open(tmp_path / "curves.png") as image:
        assert image.convert("RGB").tobytes() == first.tobytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "metrics.jsonl"]


def test_drawing_again_replaces_the_picture(tmp_path):
    first = drawn(tmp_path, RUN[:3])
    assert drawn(tmp_path, RUN).tobytes() != first.tobytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "metrics.jsonl"]
