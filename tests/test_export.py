"""tools/export.py: what it writes answers as the network does, tells about itself, and is whole or not there."""

import contextlib
import importlib.util
import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import onnx
import onnxruntime
import pytest
import timm
import torch
import yaml
from helpers_unit import ROOT, configured, handle
from PIL import Image

import tools.exporting.timm_folder
from data.finish import Normalize
from data.transforms import eval_transform
from models import GroupMixFormer
from tools.exporting.capture import capture
from tools.exporting.card import model_card
from tools.exporting.checking import check_answers, sizes_to_check
from tools.exporting.deployed import deploy
from tools.exporting.draft import draft_of
from tools.exporting.timm_folder import variant_of, write_folder
from utils import checkpoint
from utils.errors import UserError
from utils.trained import load_trained

CLASSES = ["amber_columns", "amber_rows", "green_columns", "green_rows", "violet_columns", "violet_rows"]
DIMS = {"embed_dims": [40], "depths": [1], "mlp_ratios": [2.0]}


def filled(network):
    """The network with weights and statistics of which none is what it starts with, and logits of some size."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator)
                tensor.copy_(1 + noise.abs() / 4 if name.endswith("running_var") else tensor + noise / 10)
    return network


@pytest.fixture(scope="session")
def trained_file(tmp_path_factory) -> Path:
    """A checkpoint of a run, of a network of one stage: its moving average is other weights than its own."""
    config = configured(
        DATA__DATA_PATH="/home/someone/gratings",
        DATA__IMG_SIZE=64,
        DATA__NUM_WORKERS=0,
        MODEL__NAME="tiny",
        MODEL__GMA__NUM_STAGES=1,
        MODEL__GMA__NUM_CLASSES=6,
        MODEL__GMA__EMBEDDING_DIMS=DIMS["embed_dims"],
        MODEL__GMA__SERIAL_DEPTHS=DIMS["depths"],
        MODEL__GMA__MLP_RATIOS=DIMS["mlp_ratios"],
        TRAIN__EMA_DECAY=0.9,
        TRAIN__LR_BATCH=48,
        TRAIN__WARMUP_UPDATES=8,
        DISTILL__TEACHER="someones/large.pth",
    )
    state = {
        "model": GroupMixFormer(num_classes=6, **DIMS).state_dict(),
        "ema": filled(GroupMixFormer(num_classes=6, **DIMS)).state_dict(),
        "progress": {"epoch": 4, "place": 0, "updates": 32, "images_per_update": 6, "ranks": 1},
        "best": {"epoch": 3, "of": "ema", "acc1": 87.5},
        "config": config.dump(),
        "classes": CLASSES,
        "versions": {"torch": "9.9.9"},
    }
    path = tmp_path_factory.mktemp("export") / "best.pth"
    checkpoint.save(state, path)
    return path


@pytest.fixture(scope="session")
def network(trained_file):
    return load_trained(trained_file).network


@pytest.fixture(scope="session")
def export(call, trained_file):
    """Runs the tool: `export(output, form, *flags)`."""

    def run(output, form, *flags, source=trained_file):
        return call("tools/export.py", "--checkpoint", source, "--form", form, "--output", output, *flags)

    return run


@pytest.fixture(scope="session")
def onnx_export(export, tree, tmp_path_factory):
    """An ONNX file, and what was said when it was made and scored."""
    output = tmp_path_factory.mktemp("onnx") / "tiny.onnx"
    result = export(output, "onnx", "--data-path", tree)
    assert result.code == 0, result.stderr
    return output, result


def answers(path, images):
    return torch.from_numpy(onnxruntime.InferenceSession(path).run(["logits"], {"images": images.numpy()})[0])


def difference(given, wanted):
    return ((given - wanted).abs().max() / wanted.abs().max()).item()


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


# ONNX


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 3, 32, 32), (5, 3, 47, 90), (2, 3, 129, 33)])
def test_an_onnx_file_answers_as_the_network_on_sizes_that_it_was_not_checked_on(onnx_export, network, shape):
    with torch.inference_mode():
        assert difference(answers(onnx_export[0], noise(*shape)), network(noise(*shape))) < 1e-5


@pytest.mark.slow
def test_an_onnx_file_is_fused_and_names_its_axes_and_tells_how_to_make_its_input(onnx_export):
    model = onnx.load(onnx_export[0])
    axes = [[dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
            for value in (*model.graph.input, *model.graph.output)]  # fmt: skip
    assert axes == [["batch", 3, "height", "width"], ["batch", 6]]
    told = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(told["classes"]) == json.loads(told["labels"]) == CLASSES
    assert json.loads(told["mean"]) == [0.485, 0.456, 0.406] and json.loads(told["std"]) == [0.229, 0.224, 0.225]
    assert (told["size"], told["crop_pct"], told["crop_mode"], told["channels"]) == ("64", "0.875", "center", "RGB")
    assert (told["fused"], told["weights"]) == ("true", "moving average")
    assert sum(node.op_type == "BatchNormalization" for node in model.graph.node) == 1  # the last, which stays


@pytest.mark.slow
def test_the_accuracy_before_and_after_is_printed(onnx_export, network, trained_file, call, tree):
    """Beside what test.py says of the same weights and images."""
    _, before, after = (line.split(" | ") for line in onnx_export[1].stdout.splitlines()[1:4])
    assert (before[0], after[0]) == ("| the network", "| tiny.onnx")
    config = trained_file.with_name("config.yaml")
    config.write_text(load_trained(trained_file).config.dump())
    scored = call("test.py", "--cfg", config, "--data-path", tree, "--resume", trained_file, "--ema").stdout
    assert f"Acc@1 {before[2]} Acc@5 {before[3]}" in scored
    assert before[2:5] == after[2:5]


@pytest.mark.slow
def test_int8_rounds_the_matrices_and_leaves_the_convolutions(onnx_export, export, network, tmp_path):
    output = tmp_path / "int8.onnx"
    result = export(output, "onnx", "--precision", "int8")
    assert result.code == 0, result.stderr
    kinds = [node.op_type for node in onnx.load(output).graph.node]
    whole = [node.op_type for node in onnx.load(onnx_export[0]).graph.node]
    assert kinds.count("Conv") == whole.count("Conv") > 0
    # Of a block: five projections to queries, keys and values, three proxies, the output and two of the MLP; the head.
    assert kinds.count("MatMulInteger") == 5 + 3 + 1 + 2 + 1
    assert "12 matrices" in result.stderr and list(tmp_path.iterdir()) == [output]
    assert output.stat().st_size < onnx_export[0].stat().st_size
    with torch.inference_mode():
        off = difference(answers(output, noise(2, 3, 64, 80)), network(noise(2, 3, 64, 80)))
    assert 1e-5 < off < 0.2


# torch


@pytest.mark.slow
@pytest.mark.parametrize(("flags", "least", "most"), [((), 0, 1e-5), (("--precision", "bf16"), 1e-5, 5e-2)])
def test_a_torch_export_file_answers_as_the_network_without_its_code(export, network, tmp_path, flags, least, most):
    output = tmp_path / "tiny.pt2"
    result = export(output, "torch-export", *flags)
    assert result.code == 0, result.stderr
    told = {"information.json": ""}
    program = torch.export.load(output, extra_files=told)
    assert json.loads(json.loads(told["information.json"])["classes"]) == CLASSES
    weight = torch.bfloat16 if flags else torch.float32
    assert {tensor.dtype for tensor in program.state_dict.values() if tensor.is_floating_point()} == {weight}
    for shape in [(1, 3, 32, 32), (3, 3, 47, 90)]:
        with torch.inference_mode():
            given = program.module()(noise(*shape))
            assert given.dtype == torch.float32
            assert least <= difference(given, network(noise(*shape))) <= most
    with pytest.raises(AssertionError, match=r"31|32"):
        program.module()(noise(1, 3, 31, 64))


@pytest.mark.slow
def test_a_captured_network_takes_one_image_that_ends_as_one_token():
    network = filled(GroupMixFormer(num_classes=6, embed_dims=(40,) * 4, depths=(1,) * 4)).eval()
    run = capture(deploy(network, fused=True, precision="fp32"), 3).module()
    with torch.inference_mode():
        assert difference(run(noise(1, 3, 32, 32)), network(noise(1, 3, 32, 32))) < 1e-5


@pytest.mark.slow
def test_compiled_code_answers_as_the_network(export, network, tmp_path):
    output = tmp_path / "tiny.pt2"
    result = export(output, "aoti")
    assert result.code == 0, result.stderr
    package = torch._inductor.aoti_load_package(str(output))
    assert json.loads(package.get_metadata()["labels"]) == CLASSES
    for shape in [(1, 3, 32, 32), (3, 3, 47, 90)]:
        with torch.inference_mode():
            assert difference(package(noise(*shape)), network(noise(*shape))) < 1e-4


# timm


@pytest.mark.slow
def test_timm_makes_the_same_network_of_the_folder(export, network, tmp_path):
    result = export(tmp_path / "hub", "timm", "--license", "mit")
    assert result.code == 0, result.stderr
    again = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
    assert torch.equal(again(noise(2, 3, 64, 48)), network(noise(2, 3, 64, 48)))
    assert again.pretrained_cfg["label_names"] == CLASSES
    other = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True, num_classes=3, in_chans=1).eval()
    assert other(noise(2, 1, 64, 48)).shape == (2, 3)
    backbone = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True, features_only=True, out_indices=(0,))
    (feature,) = backbone.eval()(noise(1, 3, 64, 48))
    assert torch.equal(feature, network.forward_intermediates(noise(1, 3, 64, 48), [0], intermediates_only=True)[0])


@pytest.mark.slow
def test_a_folder_for_timm_may_name_classes_by_any_letters_and_is_readable(trained_file, tmp_path, ascii_locale):
    trained = replace(load_trained(trained_file), classes=None, labels=["Käse", *CLASSES[1:]])
    write_folder(trained, tmp_path / "hub", None)
    assert "Käse" in (tmp_path / "hub/README.md").read_text(encoding="utf-8")
    (tmp_path / "other").touch()
    assert {path.stat().st_mode for path in (tmp_path / "hub").iterdir()} == {(tmp_path / "other").stat().st_mode}


@pytest.mark.slow
def test_timm_makes_the_networks_input_of_an_image(export, trained_file, tmp_path, tree):
    export(tmp_path / "hub", "timm")
    model = timm.create_model(f"local-dir:{tmp_path / 'hub'}")
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    path = next((tree / "val").rglob("*.png"))
    trained = load_trained(trained_file)
    ours = eval_transform(trained.config)
    pixels = ours.augment(ours.decode(Image.open(path)))
    finish = Normalize(trained.config, torch.device("cpu"))
    assert torch.equal(transform(Image.open(path)), finish(pixels[None])[0])


@pytest.mark.slow
def test_a_published_variant_is_found_by_its_tensors(export, tmp_path):
    network = filled(timm.create_model("groupmixformer_miny", num_classes=1000))
    torch.save({"model": network.state_dict()}, tmp_path / "miny.pth")
    cfg = ROOT / "configs/groupmixformer_miny.yaml"
    result = export(tmp_path / "hub", "timm", "--cfg", cfg, source=tmp_path / "miny.pth")
    assert result.code == 0, result.stderr
    again = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
    assert torch.equal(again(noise(1, 3, 64, 64)), network.eval()(noise(1, 3, 64, 64)))
    config = json.loads((tmp_path / "hub/config.json").read_text())
    assert config["architecture"] == "groupmixformer_miny" and len(config["label_names"]) == 1000
    assert config["label_names"][0].startswith("tench")
    card = (tmp_path / "hub/README.md").read_text()
    assert "- Variant: groupmixformer_miny" in card and "5,733,120" in card and "1,349,779,632" in card
    # The file tells nothing about these, so neither does the card.
    assert not any(word in card for word in ("Accuracy", "How it was trained", "license:", "Versions"))


@pytest.mark.slow
def test_a_network_of_other_dims_is_no_variant(network):
    assert variant_of(network) is None
    assert variant_of(timm.create_model("groupmixformer_miny", depths=(3, 3, 12, 3), device="meta")) is None


@pytest.mark.slow
def test_a_model_card_says_what_the_checkpoint_tells(export, tmp_path):
    export(tmp_path / "hub", "timm", "--license", "cc-by-4.0")
    card = (tmp_path / "hub/README.md").read_text()
    for words in (
        "license: cc-by-4.0",
        "# tiny",
        "[40], [1], [2.0]",
        "Kind: moving average",
        "87.500 % top-1 on the split `val`",
        "4 epochs, 32 updates",
        "Learning rate: 0.0005 for 48 images an update, cosine, 8 updates of warm-up",
        "Teacher: large.pth",
        "6 on 1 process(es)",
        "Data: `gratings`, split `train`",
        "decay 0.9",
        "torch 9.9.9",
        "6: amber_columns",
    ):
        assert words in card
    assert "someone" not in card and "Started from" not in card


@pytest.mark.slow
def test_a_model_card_claims_no_accuracy_for_other_weights_than_were_scored(export, tmp_path):
    export(tmp_path / "hub", "timm", "--weights", "model")
    card = (tmp_path / "hub/README.md").read_text()
    assert "Kind: weights as trained" in card and "87.5" not in card


def test_a_model_card_claims_no_accuracy_of_the_best_epoch_for_updates_after_it(trained_file, tmp_path):
    state = checkpoint.load(trained_file)
    state["progress"] |= {"place": 3, "updates": 35}
    checkpoint.save(state, tmp_path / "last.pth")
    card = model_card(load_trained(tmp_path / "last.pth"), None, None)
    assert "4 epochs, 35 updates" in card and "87.5" not in card


def test_a_model_card_names_data_that_lies_in_no_folder(trained_file, tmp_path):
    state = checkpoint.load(trained_file)
    config = yaml.safe_load(state["config"])
    config["DATA"] |= {"DATASET": "hfds/someone/gratings", "DATA_PATH": ""}
    checkpoint.save(state | {"config": yaml.safe_dump(config)}, tmp_path / "best.pth")
    card = model_card(load_trained(tmp_path / "best.pth"), None, None)
    assert "Data: `hfds/someone/gratings`, split `train`" in card


# Whole or not there


@pytest.mark.slow
def test_a_file_that_answers_otherwise_is_removed(export, tmp_path, monkeypatch):
    right = tools.exporting.timm_folder.open_folder

    def wrong(folder):
        model = right(folder)
        return lambda images: model(images) * 1.001

    monkeypatch.setattr(tools.exporting.timm_folder, "open_folder", wrong)
    result = export(tmp_path / "hub", "timm")
    assert result.code == 2 and len(result.errors) == 1
    assert "0.001 of the largest one off on 1 image(s) of 64 x 64" in result.errors[0]
    assert list(tmp_path.iterdir()) == []


def test_answers_are_compared_on_three_sizes_one_of_them_odd_and_not_square():
    (one, *_), small, (several, height, width) = sizes_to_check(64)
    assert one == 1 and small[1] == 32 and several > 1
    assert height != width and height % 2 == width % 2 == 1


def test_answers_are_compared_in_both_layouts():
    """A grey image in channels_last passes for contiguous, and some runtimes then read it as what it is not."""
    strides = []

    def run(images):
        strides.append(images.stride()[1])
        return images.mean((2, 3))

    check_answers(run, lambda images: images.mean((2, 3)), 1, 64, 1e-4)
    assert strides[0] == 64 * 64 and strides[1:] == [1, 1]


@pytest.mark.parametrize(
    "run",
    [
        lambda images: torch.full((len(images), 4), float("nan")),
        lambda images: torch.ones(len(images), 3),
        lambda images: torch.ones(len(images), 4) * (1 if images.shape[2] == 64 else 1.1),
    ],
    ids=["not a number", "another shape", "only the usual size is right"],
)
def test_wrong_answers_are_told(run):
    with pytest.raises(UserError, match="removed"):
        check_answers(run, lambda images: torch.ones(len(images), 4), 3, 64, 1e-4)


@pytest.mark.parametrize("error", [UserError, OSError, KeyboardInterrupt])
def test_nothing_is_left_of_a_draft_that_fails(tmp_path, error):
    with pytest.raises((UserError, KeyboardInterrupt)), draft_of(tmp_path / "a.onnx") as draft:
        draft.write_text("half")
        raise error("the disk is full")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT], ids=lambda number: number.name)
def test_nothing_is_left_of_a_draft_that_a_signal_ends(tmp_path, request, number):
    handle(request, {number: signal.SIG_DFL})
    with pytest.raises(SystemExit) as end, draft_of(tmp_path / "a.onnx") as draft:
        draft.write_text("half")
        with contextlib.suppress(Exception):  # as libraries do
            signal.raise_signal(number)
    assert end.value.code == 128 + number
    assert signal.getsignal(number) == signal.SIG_DFL
    assert list(tmp_path.iterdir()) == []


def test_a_signal_that_is_ignored_ends_no_draft(tmp_path, request):
    handle(request, {signal.SIGHUP: signal.SIG_IGN})  # as nohup does
    with draft_of(tmp_path / "a.onnx") as draft:
        signal.raise_signal(signal.SIGHUP)
        draft.write_text("whole")
    assert (tmp_path / "a.onnx").read_text() == "whole"


def test_a_whole_draft_takes_its_place_alone(tmp_path):
    with draft_of(tmp_path / "a.onnx") as draft:
        draft.write_text("whole")
        draft.with_name("helper").write_text("gone")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.onnx", "whole")]


# Bad input

WRONG = {
    "int8 for aoti": (("aoti", "a.pt2", "--precision", "int8"), "use --form onnx"),
    "int8 for torch": (("torch-export", "a.pt2", "--precision", "int8"), "use --form onnx"),
    "bf16 for onnx": (("onnx", "a.onnx", "--precision", "bf16"), "use int8, or --form torch-export"),
    "bf16 for timm": (("timm", "a", "--precision", "bf16"), "leave --precision out"),
    "another ending": (("onnx", "a.pt2"), "end the name in .onnx"),
    "no such folder": (("onnx", "none/a.onnx"), "in a folder that exists"),
    "no such data": (("onnx", "a.onnx", "--data-path", "nowhere"), "nowhere"),
    "a licence for no card": (("onnx", "a.onnx", "--license", "mit"), "--license is for timm's model card"),
    "no such form": (("tflite", "a.tflite"), "tflite"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_written_is_told_at_once(export, tmp_path, case):
    (form, name, *flags), words = WRONG[case]
    result = export(tmp_path / name, form, *flags)
    assert result.code == 2 and len(result.errors) == 1 and words in result.errors[0]
    assert "tracing" not in result.stderr and list(tmp_path.iterdir()) == []


def test_a_file_that_exists_is_left_alone(export, tmp_path):
    (tmp_path / "a.onnx").write_text("mine")
    result = export(tmp_path / "a.onnx", "onnx")
    assert result.code == 2 and "exists" in result.errors[0]
    assert (tmp_path / "a.onnx").read_text() == "mine"


def test_a_missing_package_is_named_with_what_installs_it(export, tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else found(name))
    result = export(tmp_path / "a.onnx", "onnx")
    assert result.code == 2
    assert "onnxscript" in result.errors[0] and "pip install -r requirements-downstream.txt" in result.errors[0]


def test_a_missing_compiler_is_told_before_anything_is_traced(export, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    result = export(tmp_path / "a.pt2", "aoti")
    assert result.code == 2 and "C++ compiler" in result.errors[0] and "tracing" not in result.stderr
