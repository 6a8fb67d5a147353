"""The small programs, started as a user starts them, and the functions behind them."""

import ast
import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from sklearn.datasets import load_digits

from models import GroupMixFormer
from models.published import to_published
from tools.prepare_digits import write_digits
from utils import checkpoint

REPOSITORY = Path(__file__).resolve().parent.parent
TOOLS = sorted((REPOSITORY / "tools").glob("*.py"))
PROGRAMS = [REPOSITORY / task / name for task in ("", "segmentation", "detection") for name in ("train.py", "test.py")]
TINY = {"embed_dims": (40, 40, 40, 40), "depths": (1, 1, 1, 1), "num_classes": 3}


@pytest.fixture
def start(monkeypatch, capsys):
    """Runs a program in this process and returns its exit code, output and errors."""

    def run(program: str, *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [program, *map(str, arguments)])
        try:
            runpy.run_path(str(REPOSITORY / program), run_name="__main__")
            code = 0
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def weights(tmp_path) -> Path:
    path = tmp_path / "published.pth"
    torch.save({"model": to_published(GroupMixFormer(**TINY).state_dict())}, path)
    return path


@pytest.mark.parametrize("path", PROGRAMS + TOOLS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_the_commands_that_a_help_shows_stand_in_one_line_each(path):
    shown = ast.get_docstring(ast.parse(path.read_text()))
    assert [line for line in shown.splitlines() if len(line) > 120] == []


@pytest.mark.parametrize("name", ["convert_checkpoint", "flops", "soak"])
def test_a_wrong_flag_is_one_line(start, name):
    code, out, err = start(f"tools/{name}.py", "--wrong")
    assert code == 2 and out == ""
    (line,) = err.splitlines()
    assert line.startswith("error: ") and line.endswith(": --help tells the flags")


@pytest.mark.slow
def test_flops_prints_every_size_beside_the_papers_figures_without_a_configuration(start):
    code, out, _ = start("tools/flops.py", "--img-size", 32)
    assert code == 0
    names = [line.split(" | ")[0] for line in out.splitlines()[2:]]
    assert names == [f"| groupmixformer_{size}" for size in ("miny", "tiny", "small", "base", "large")]
    parameters = [line.split(" | ")[1] for line in out.splitlines()[2:]]
    assert parameters == ["5,733,120", "10,949,152", "22,421,320", "45,827,272", "71,833,648"]
    assert out.splitlines()[-1].endswith("| 70.3M | 36.1G |")


@pytest.mark.slow
def test_flops_of_a_configuration_are_fvcores_with_and_without_what_it_leaves_out(start, tmp_path):
    code, out, _ = start(
        "tools/flops.py", "--cfg", REPOSITORY / "configs/groupmixformer_miny.yaml", "--json", tmp_path / "f.json"
    )
    counts = json.loads((tmp_path / "f.json").read_text())
    assert code == 0
    assert (counts["parameters"], counts["flops"]) == (5_733_120, 1_349_779_632)
    softmax_elements = 2 * 3136 * 32 + 56 * 56 * 32 + 3 * 784 * 64 + 12 * 196 * 128 + 4 * 49 * 128
    assert counts["by_operator"]["softmax"] == 5 * softmax_elements
    assert counts["by_operator"]["mean"] == 7 * 7 * 160
    assert counts["by_operator"]["einsum"] == 15_253_200
    assert counts["all_flops"] == sum(counts["by_operator"].values()) > counts["flops"]
    assert counts["uncounted"] == {} and "not counted" not in out
    assert counts["modules"]["head.fc"] == [161_000, 160_000, 160_000, 1000]
    assert sum(counts["modules"][name][1] for name in ("stem", "stages", "norm", "head")) == counts["flops"]


@pytest.mark.slow
def test_flops_table_goes_down_to_the_depth_asked_for(start):
    arguments = ("tools/flops.py", "--cfg", REPOSITORY / "configs/groupmixformer_miny.yaml", "--img-size", 32)
    _, shallow, _ = start(*arguments, "--depth", 1)
    _, deep, _ = start(*arguments, "--depth", 3)
    assert "conv1" not in shallow and "conv1" in deep
    assert "patch_embed" in deep and "conv_dw" not in deep
    assert shallow.startswith("groupmixformer_miny at 32 x 32")


def test_flops_needs_the_number_of_classes_from_the_configuration(start, tmp_path):
    (tmp_path / "c.yaml").write_text("MODEL: {GMA: {NUM_CLASSES: 0}}")
    code, _, err = start("tools/flops.py", "--cfg", tmp_path / "c.yaml")
    assert code == 2 and "NUM_CLASSES is 0" in err


def test_conversion_there_and_back_keeps_every_tensor(start, weights, tmp_path):
    ours, back = tmp_path / "ours.safetensors", tmp_path / "back.pth"
    assert start("tools/convert_checkpoint.py", weights, ours)[0] == 0
    assert start("tools/convert_checkpoint.py", ours, back, "--to", "published")[0] == 0
    before, after = torch.load(weights)["model"], torch.load(back)["model"]
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    GroupMixFormer(**TINY).load_state_dict(safetensors.torch.load_file(ours))


def test_conversion_takes_the_moving_average_when_asked_and_refuses_where_there_is_none(start, weights, tmp_path):
    state = torch.load(weights)["model"]
    average = {name: tensor + 1 for name, tensor in state.items()}
    torch.save({"model": state, "ema": average}, tmp_path / "run.pth")
    assert start("tools/convert_checkpoint.py", tmp_path / "run.pth", tmp_path / "e.pth", "--ema")[0] == 0
    converted = torch.load(tmp_path / "e.pth")["model"]
    assert torch.equal(converted["head.fc.bias"], average["head.bias"])
    code, _, err = start("tools/convert_checkpoint.py", weights, tmp_path / "n.pth", "--ema")
    assert code == 2 and "no moving average" in err and not (tmp_path / "n.pth").exists()


def test_conversion_takes_and_tells_what_the_best_epoch_of_a_run_was_chosen_by(start, weights, tmp_path):
    state = torch.load(weights)["model"]
    checkpoint.save({"model": state, "ema": state, "best": {"of": "ema"}}, tmp_path / "run.pth")
    _, average, _ = start("tools/convert_checkpoint.py", tmp_path / "run.pth", tmp_path / "a.pth")
    _, plain, _ = start("tools/convert_checkpoint.py", tmp_path / "run.pth", tmp_path / "b.pth", "--weights", "model")
    assert average.endswith(f"a.pth: {len(state)} tensors of the moving average under our names\n")
    assert plain.endswith(f"b.pth: {len(state)} tensors under our names\n")


def test_conversion_into_a_folder_that_is_not_there_is_refused(start, weights, tmp_path):
    code, _, err = start("tools/convert_checkpoint.py", weights, tmp_path / "no" / "o.pth")
    assert code == 2 and "no/o.pth: name a file in a folder that exists" in err


def test_safetensors_may_be_read_by_whom_the_umask_lets(start, weights, tmp_path):
    start("tools/convert_checkpoint.py", weights, tmp_path / "a.safetensors")
    (tmp_path / "other").touch()
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_conversion_names_a_tensor_that_no_groupmixformer_has(start, weights, tmp_path):
    state = torch.load(weights)["model"]
    torch.save({"model": state | {"extra.weight": torch.zeros(1)}}, weights)
    code, _, err = start("tools/convert_checkpoint.py", weights, tmp_path / "o.pth")
    assert code == 2 and "extra.weight" in err and not (tmp_path / "o.pth").exists()


def test_conversion_refuses_another_ending(start, weights, tmp_path):
    code, _, err = start("tools/convert_checkpoint.py", weights, tmp_path / "o.onnx")
    assert code == 2 and ".safetensors" in err


@pytest.mark.parametrize("name", ["published.pth", "other.safetensors"], ids=["its input", "another file"])
def test_conversion_writes_over_nothing(start, weights, tmp_path, name):
    (tmp_path / "other.safetensors").write_bytes(b"kept")
    before = (tmp_path / name).read_bytes()
    code, _, err = start("tools/convert_checkpoint.py", weights, tmp_path / name)
    assert code == 2 and f"{tmp_path / name} exists: name another, nothing is written over" in err
    assert (tmp_path / name).read_bytes() == before


def test_digits_in_the_place_of_a_file_are_refused(start, tmp_path):
    (tmp_path / "file").touch()
    code, _, err = start("tools/prepare_digits.py", tmp_path / "file")
    assert code == 2 and "Not a directory" in err and err.endswith(": choose another place\n")


def test_digits_are_all_written_once_with_their_pixels_and_the_same_split_every_time(tmp_path):
    counts = write_digits(tmp_path / "a")
    write_digits(tmp_path / "b")
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.png"))
    assert counts == {"train": 1437, "val": 360}
    assert files == sorted(path.relative_to(tmp_path / "b") for path in (tmp_path / "b").rglob("*.png"))
    images, labels = load_digits(return_X_y=True)
    assert sorted(int(path.stem) for path in files) == list(range(len(labels)))
    for path in files[::200]:
        number, (_, label, _) = int(path.stem), path.parts
        pixels = torch.tensor(np.asarray(Image.open(tmp_path / "a" / path)), dtype=torch.float64).flatten() * 16 / 255
        assert int(label) == labels[number]
        assert (pixels.round() == torch.tensor(images[number])).all()
