"""Figures of what is inside a network, made as a user makes them, and what they show."""

import runpy
import sys

import numpy as np
import pytest
import torch
from helpers_unit import ROOT, configured, noise
from PIL import Image

from data.files import find_images, spread
from data.transforms import eval_transform
from models.attention_maps import AttentionMap
from models.build import build_model
from models.receptive_fields import receptive_fields
from tools.visualizing.attention import attention_figure, place_of
from tools.visualizing.class_activation import Activation, cam_figure, class_number, grad_cam
from tools.visualizing.figures import save_figure
from tools.visualizing.inputs import OWN_SIZE, Inputs
from tools.visualizing.receptive_field import average_fields, field_figure
from utils.errors import UserError
from utils.trained import load_trained

CPU = torch.device("cpu")
CLASSES = ["n01440764", "ant", "7"]


def write_checkpoint(path, channels=3, **values):
    config = configured(
        MODEL__GMA__EMBEDDING_DIMS=[40, 40, 40, 40],
        MODEL__GMA__SERIAL_DEPTHS=[1, 2, 1, 1],
        MODEL__GMA__MLP_RATIOS=[1, 1, 1, 1],
        MODEL__GMA__IN_DIM=channels,
        DATA__IMG_SIZE=64,
        DATA__MEAN=[0.4] * channels,
        DATA__STD=[0.2] * channels,
        **values,
    )
    torch.manual_seed(0)
    network = build_model(config, len(CLASSES))
    torch.save({"model": network.state_dict(), "config": config.dump(), "classes": CLASSES}, path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint of a network with random weights and two images, one of them grey."""
    folder = tmp_path_factory.mktemp("visualize")
    write_checkpoint(folder / "rgb.pth")
    noise(1, (90, 70)).save(folder / "one.png")
    noise(2, (64, 64)).convert("L").save(folder / "two.jpg")
    (folder / "broken.png").write_bytes(b"\x89PNG no")
    return folder


@pytest.fixture
def visualize(monkeypatch, capsys, folder, tmp_path):
    """Runs the tool on the folder's checkpoint; returns exit code, output, errors and the figure's path."""

    def run(kind, *words, output="f.png", checkpoint="rgb.pth"):
        given = [kind, *words, "--checkpoint", folder / checkpoint, "--output", tmp_path / output, "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", ["tools/visualize.py", *map(str, given)])
        code = 0
        try:
            runpy.run_path(str(ROOT / "tools/visualize.py"), run_name="__main__")
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        return code, out, err, tmp_path / output

    return run


# As a user starts it


def test_attention_is_drawn_for_the_last_block_of_every_stage(visualize, folder):
    code, out, err, path = visualize("attention", folder / "one.png")
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "stage 0, block 0: token (8, 8) of 16 x 16 tokens",
        "stage 1, block 1: token (4, 4) of 8 x 8 tokens",
        "stage 2, block 0: token (2, 2) of 4 x 4 tokens",
        "stage 3, block 0: token (1, 1) of 2 x 2 tokens",
    ]
    assert min(Image.open(path).size) > 500


def test_attention_of_chosen_blocks_at_a_place_of_an_image_of_any_size(visualize, folder):
    words = ("--stage", 1, 0, "--block", "all", "--token", 0, 89, "--size", "own")
    code, out, _, _ = visualize("attention", folder / "one.png", *words)
    assert code == 0
    assert out.splitlines() == [
        "stage 1, block 0: token (0, 11) of 9 x 12 tokens",
        "stage 1, block 1: token (0, 11) of 9 x 12 tokens",
        "stage 0, block 0: token (0, 22) of 18 x 23 tokens",
    ]


def test_cam_tells_the_likeliest_class_of_each_image_and_its_probability(visualize, folder):
    code, out, err, path = visualize("cam", folder / "one.png", folder / "two.jpg")
    assert (code, err) == (0, "")
    trained = load_trained(folder / "rgb.pth")
    inputs = Inputs(trained.config, None, CPU)
    for line, name in zip(out.splitlines(), ("one.png", "two.jpg"), strict=True):
        with torch.no_grad():
            likeliest = trained.network(inputs.batch(inputs.read(folder / name)))[0].softmax(0).max(0)
        assert line == f"{folder / name}: {trained.labels[likeliest.indices]} ({likeliest.values:.1%})"
    assert min(Image.open(path).size) > 100


def test_cam_takes_classes_by_name_and_a_stage(visualize, folder):
    words = ("--class", "ant", "--class", "tench", "--stage", 1)
    code, out, _, _ = visualize("cam", folder / "one.png", *words)
    assert code == 0
    assert out.split(": ")[1].startswith("ant (") and ", tench, Tinca tinca (" in out


def test_receptive_fields_are_averaged_over_a_folder_and_told_in_figures(visualize, folder, tmp_path):
    images = tmp_path / "images"
    for number in range(4):
        (images / str(number % 2)).mkdir(parents=True, exist_ok=True)
        noise(number, (70, 80)).save(images / str(number % 2) / f"{number}.png")
    code, out, err, path = visualize("receptive-field", images, "--images", 3, "--untrained", "--stage", 0, 3)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert "over 3 images of 64 x 64 pixels" in lines[0]
    assert [line.split(" | ")[:2] for line in lines[3:]] == [
        ["| trained", "0"],
        ["| trained", "3"],
        ["| fresh weights", "0"],
        ["| fresh weights", "3"],
    ]
    assert min(Image.open(path).size) > 300


@pytest.mark.parametrize(("ending", "start"), [(".pdf", b"%PDF"), (".svg", b"<?xml"), (".PNG", b"\x89PNG")])
def test_the_ending_of_the_output_chooses_its_format(visualize, folder, ending, start):
    code, _, _, path = visualize("attention", folder / "two.jpg", "--stage", 3, output=f"figure{ending}")
    assert code == 0 and path.read_bytes().startswith(start)


@pytest.mark.parametrize("kind", ["attention", "cam", "receptive-field"])
def test_grey_networks_that_recompute_are_looked_into_too(visualize, folder, kind):
    write_checkpoint(folder / "grey.pth", channels=1, TRAIN__USE_CHECKPOINT=True)
    code, _, err, path = visualize(kind, folder / "one.png", checkpoint="grey.pth")
    assert (code, err) == (0, "") and path.exists()


BAD = {
    "attention {}/none.png": "none.png cannot be read as an image (No such file or directory)",
    "cam {}/one.png {}/broken.png": "broken.png cannot be read as an image",
    "receptive-field {}/none": "none does not exist",
    "receptive-field {}/rgb.pth": "rgb.pth cannot be read as an image",
    "receptive-field {}/one.png --images 0": "--images: 0: give a whole number, at least 1",
    "receptive-field {}/one.png {}/two.jpg --size own": "two.jpg is 64 x 64 pixels and the images before it are not",
    "attention {}/one.png --stage 4": "--stage 4: the network has stages 0 to 3",
    "cam {}/one.png --stage -1": "--stage -1: the network has stages 0 to 3",
    "attention {}/one.png --block 1": "--block 1: stage 0 has blocks 0 to 0",
    "attention {}/one.png --token 64 0": "--token 64 0: is not in the image of 64 x 64 pixels",
    "attention {}/one.png --token -1 0": "--token -1 0: -1 is neither a pixel's number nor a share",
    "attention {}/one.png --dpi 0": "--dpi: 0: give a whole number, from 1 to 1200",
    "cam {}/one.png --dpi 99999": "--dpi: 99999: give a whole number, from 1 to 1200",
    "attention {}/one.png --size big": "'big' is neither a number of pixels nor 'own'",
    "cam {}/one.png --class bee": "--class bee: is no class; name one such as tench, Tinca tinca, ant, 7, or 0 to 2",
    "cam {}/one.png --class 3": "--class 3: is no class",
    "cam": "the following arguments are required: IMAGE",
    "look {}/one.png": "invalid choice: 'look'",
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(visualize, folder, tmp_path, words):
    code, out, err, _ = visualize(*words.format(folder, folder).split())
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and BAD[words] in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("output", ["f.gif", "none/f.png", "."])
def test_an_output_that_cannot_be_written_is_refused_before_the_checkpoint_is_read(visualize, folder, output):
    code, _, err, _ = visualize("cam", folder / "one.png", output=output, checkpoint="none.pth")
    assert code == 2 and "--output" in err and err.count("\n") == 1


def test_a_missing_captum_is_named_with_what_installs_it(visualize, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    code, _, err, _ = visualize("cam", folder / "one.png")
    assert code == 2 and err == "error: captum is missing: pip install -r requirements-downstream.txt\n"


# What is read


def test_images_are_what_an_evaluation_sees_or_whole(folder):
    config = configured(DATA__IMG_SIZE=48)
    image = Image.open(folder / "one.png")
    wanted = eval_transform(config).augment(image.copy())
    assert torch.equal(Inputs(config, None, CPU).read(folder / "one.png"), wanted)
    assert torch.equal(Inputs(configured(DATA__IMG_SIZE=224), 48, CPU).read(folder / "one.png"), wanted)
    whole = Inputs(config, OWN_SIZE, CPU).read(folder / "one.png")
    assert np.array_equal(whole.permute(1, 2, 0), np.asarray(image))
    assert config.DATA.IMG_SIZE == 48


def test_of_many_images_some_at_equal_distances_are_taken(tmp_path):
    for number in range(10):
        (tmp_path / f"{number // 5}").mkdir(exist_ok=True)
        noise(number).save(tmp_path / f"{number // 5}" / f"{number}.png")
    (tmp_path / "notes.txt").write_text("no image")
    assert [path.stem for path in spread(find_images([tmp_path]), 4)] == ["0", "2", "5", "7"]
    assert [path.stem for path in spread(find_images([tmp_path / "1", tmp_path / "0" / "3.png"]), 99)] == list("567893")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no images"):
        find_images([tmp_path / "empty"])


@pytest.mark.parametrize(
    ("token", "place"),
    [(("0", "0"), (0.5 / 40, 0.5 / 80)), (("39", "79"), (39.5 / 40, 79.5 / 80)), (("0.25", "1.0"), (0.25, 1.0))],
)
def test_a_token_is_named_by_pixels_or_with_a_point_by_shares(token, place):
    assert place_of(token, (40, 80)) == pytest.approx(place)


@pytest.mark.parametrize("token", [("1.1", "0.5"), ("40", "0"), ("0", "80"), ("x", "0"), ("nan", "0"), ("1e1", "0")])
def test_a_token_outside_the_image_is_refused(token):
    with pytest.raises(UserError, match="--token"):
        place_of(token, (40, 80))


def test_a_class_is_found_by_name_then_label_then_word_then_number():
    labels = ["crane", "tench, Tinca tinca", "2", "crane"]
    names = ["n1", "n2", "0", "n4"]
    assert class_number("n4", names, labels) == 3
    assert class_number("0", names, labels) == 2
    assert class_number("1", names, labels) == 1
    assert class_number("Tinca Tinca", names, labels) == 1
    assert class_number("3", None, ["a", "b", "c", "d"]) == 3
    with pytest.raises(UserError, match="any of the classes 0, 3: give the number"):
        class_number("crane", names, labels)


# What is drawn


@pytest.fixture(scope="module")
def trained(folder):
    trained = load_trained(folder / "rgb.pth")
    trained.network.double()
    return trained


def test_grad_cam_is_the_stages_output_weighted_by_its_mean_gradients(trained):
    image = torch.randn(1, 3, 64, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    network, least = trained.network, 0.0
    for stage, number in [(1, 0), (2, 0), (2, 1), (2, 2), (3, 0), (3, 1), (3, 2)]:
        kept = []
        hook = network.stages[stage].register_forward_hook(lambda _stage, _in, out, kept=kept: kept.append(out))
        logit = network(image)[0, number]
        hook.remove()
        (gradient,) = torch.autograd.grad(logit, kept[0])
        evidence = (gradient.mean((2, 3), keepdim=True) * kept[0]).sum(1, keepdim=True).detach()
        wanted = torch.nn.functional.interpolate(evidence.relu(), (64, 96), mode="bilinear")[0, 0]
        torch.testing.assert_close(grad_cam(network, image, number, stage), wanted)
        least = min(least, float(evidence.min()))
    assert least < 0  # so that something is cut off


def test_fields_are_averaged_over_images_and_networks_stay_apart(trained, folder):
    inputs = Inputs(trained.config, None, CPU)
    network = load_trained(folder / "rgb.pth").network
    torch.manual_seed(9)
    other = build_model(trained.config, 3).eval()
    files = [folder / "one.png", folder / "two.jpg"]
    fields = average_fields([network, other], [2], files, inputs)
    batch = torch.cat([inputs.batch(inputs.read(path)) for path in files])
    for each, wanted in zip(fields, (network, other), strict=True):
        torch.testing.assert_close(each, receptive_fields(wanted, batch, [2]).double() / 2, rtol=1e-4, atol=1e-8)


def test_attention_panels_hold_the_weights_on_a_scale_with_zero_in_the_middle():
    weights = torch.tensor([[[0.5, -1.5], [0.0, 0.25]], [[0.0, 0.0], [0.0, 0.0]]])
    each = AttentionMap(2, 5, (0, 1), weights, ["tokens", "3x3 groups"])
    figure = attention_figure(torch.zeros(1, 20, 40, dtype=torch.uint8), [each])
    image, first, second = figure.axes[:3]
    assert image.get_ylabel() == "stage 2, block 5\n2 x 2 tokens"
    assert (first.get_title(), second.get_title()) == ("head 0\ntokens", "head 1\n3x3 groups")
    assert np.array_equal(first.images[0].get_array(), weights[0])
    assert first.images[0].get_clim() == (-1.5, 1.5) and second.images[0].get_clim() == (-1, 1)
    assert first.images[0].get_extent() == [0, 40, 20, 0]
    assert (first.get_xlabel(), second.get_xlabel()) == ("±1.5   Σ -0.75", "±0   Σ 0")
    for axis in (image, first, second):
        (box,) = axis.patches
        assert (box.get_xy(), box.get_width(), box.get_height()) == ((20, 0), 20, 10)


def test_cam_panels_hold_each_images_evidence_and_say_where_there_is_none():
    images = [torch.zeros(3, 8, 8, dtype=torch.uint8), torch.zeros(1, 8, 6, dtype=torch.uint8)]
    ramp = torch.arange(64.0).reshape(8, 8)
    found = [[Activation("a", 0.75, ramp)], [Activation("a very long name that does not end", 0.5, torch.zeros(8, 6))]]
    axes = cam_figure(images, found, 3).axes
    assert [axis.get_title() for axis in axes[:4]] == [
        "",
        "a (75.0%)",
        "",
        "a very long name th… (50.0%)\nno evidence for it",
    ]
    assert np.allclose(axes[1].images[1].get_array(), ramp / 63)
    assert float(axes[3].images[1].get_array().max()) == 0


def test_dollars_in_a_classs_name_are_drawn_as_they_are(tmp_path):
    found = [[Activation("$_{$", 0.5, torch.ones(8, 8))]]
    save_figure(cam_figure([torch.zeros(3, 8, 8, dtype=torch.uint8)], found, 3), tmp_path / "cam.png", 40)


def test_field_panels_show_shares_of_the_largest_gradient_and_the_squares():
    field = torch.full((9, 9), 1e-9, dtype=torch.float64)
    field[3:6, 3:6] = 2.0
    axes = field_figure(field[None, None], ["trained"], [1], [(4, 4)]).axes
    assert axes[0].get_xlabel() == "20%: 3, 50%: 3, 95%: 3 px" and axes[0].get_title() == "stage 1"
    shown = axes[0].images[0].get_array()
    assert float(shown.max()) == 1 and float(shown.min()) == pytest.approx(1e-4)
    assert {(box.get_xy(), box.get_width()) for box in axes[0].patches} == {((3, 3), 3)}
