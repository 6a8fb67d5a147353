"""tools/average_checkpoints.py: means that are the literal ones, what is taken and what is refused."""

import json
import math

import pytest
import torch
from helpers_unit import configured, equal, examples
from hypothesis import given
from hypothesis import strategies as st

from models.build import build_model
from models.published import to_published
from tools.runs.averaging import Mean, greedy, look, uniform
from utils import checkpoint
from utils.metrics import Score
from utils.trained import load_trained

CLASSES = ["ant", "bee", "cow"]
TINY = {"EMBEDDING_DIMS": [40] * 4, "SERIAL_DEPTHS": [1] * 4, "MLP_RATIOS": [2.0] * 4, "NUM_CLASSES": 3}


@pytest.fixture(scope="module")
def config():
    return configured(**{f"MODEL__GMA__{name}": value for name, value in TINY.items()}, DATA__IMG_SIZE=32)


@pytest.fixture(scope="module")
def states(config):
    """What runs of three seeds save, as far as it matters here."""
    states = []
    for seed in range(3):
        torch.manual_seed(seed)
        plain, average = (build_model(config, 3).state_dict() for _ in range(2))
        for name in plain:
            if name.endswith("num_batches_tracked"):
                plain[name] += 100 + seed
            elif "running" in name:
                plain[name] += torch.rand(plain[name].shape)
        of = "model" if seed < 2 else "ema"
        best = {"epoch": seed, "of": of, "acc1": 50.0}
        states.append({"model": plain, "ema": average, "best": best, "config": config.dump(), "classes": CLASSES})
    return states


@pytest.fixture
def save(tmp_path):
    """Writes checkpoints 0.pth, 1.pth, ... and gives their paths."""

    def save_all(*states):
        for number, state in enumerate(states):
            checkpoint.save(state, tmp_path / f"{number}.pth")
        return [tmp_path / f"{number}.pth" for number in range(len(states))]

    return save_all


@pytest.fixture
def average(call, tmp_path):
    """Averages into soup.pth and loads it."""

    def run(*words):
        (tmp_path / "soup.pth").unlink(missing_ok=True)
        result = call("tools/average_checkpoints.py", *words, "--output", tmp_path / "soup.pth")
        assert result.code == 0, result.stderr
        return torch.load(tmp_path / "soup.pth", weights_only=True), result

    return run


@pytest.fixture
def refused(call, tmp_path):
    """The one line that a command is refused by; nothing is written."""

    def run(*words, output="soup.pth"):
        before = sorted(tmp_path.rglob("*"))
        result = call("tools/average_checkpoints.py", *words, "--output", tmp_path / output)
        assert (result.code, result.stdout) == (2, "")
        assert result.stderr.count("\n") == 1
        assert sorted(tmp_path.rglob("*")) == before
        (error,) = result.errors
        return error

    return run


def literal_mean(all_weights):
    """The mean as one writes it down: floating-point tensors summed up in double precision, integers of the first."""
    mean = {}
    for name, first in all_weights[0].items():
        total = torch.zeros(first.shape, dtype=torch.float64)
        for weights in all_weights:
            total = total + weights[name].to(torch.float64)
        mean[name] = (total / len(all_weights)).to(first.dtype) if first.dtype.is_floating_point else first
    return mean


# The mean


@pytest.mark.parametrize("weights", ["model", "ema"])
def test_uniform_average_is_the_literal_mean(average, save, states, weights):
    soup, result = average(*save(*states), "--weights", weights)
    assert equal(soup["model"], literal_mean([state[weights] for state in states]))
    assert result.stdout.endswith("soup.pth: the mean of 3 of 3 checkpoints\n") and result.stderr == ""


def test_each_checkpoint_gives_the_weights_that_its_best_epoch_was_chosen_by(average, save, states, tmp_path):
    soup, _ = average(*save(*states))
    names = ["model", "model", "ema"]
    assert equal(soup["model"], literal_mean([state[name] for state, name in zip(states, names, strict=True)]))
    of = [{"path": str(tmp_path / f"{number}.pth"), "weights": name} for number, name in enumerate(names)]
    assert soup["averaged"] == {"recipe": "uniform", "of": of}


def test_counters_of_batch_norms_are_the_first_networks(average, save, states):
    soup, _ = average(*save(*states), "--weights", "model")
    counters = [value for name, value in soup["model"].items() if name.endswith("num_batches_tracked")]
    assert counters and all(value.dtype == torch.int64 and value == 100 for value in counters)


def test_mean_is_added_up_in_double_precision():
    large, small = torch.tensor([2.0**24]), torch.tensor([1.0])
    mean = Mean.of({"w": large})
    for _ in range(7):
        mean = mean.plus({"w": small})
    single, exact = sum([large, *[small] * 7]) / 8, torch.tensor([(2**24 + 7) / 8], dtype=torch.float64).float()
    assert equal(mean.weights()["w"], exact) and not equal(single, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mean_of_equal_weights_is_those_bit_for_bit(dtype):
    weights = {"w": torch.randn(50, generator=torch.Generator().manual_seed(0)).to(dtype)}
    assert equal(Mean.of(weights).plus(weights).plus(weights).weights(), weights)


# What is written


def test_average_is_taken_as_a_checkpoint_of_its_own(average, save, states, config, tmp_path):
    soup, _ = average(*save(*states))
    trained = load_trained(tmp_path / "soup.pth")
    assert equal(trained.network.state_dict(), soup["model"])
    assert not trained.is_ema and trained.classes == CLASSES and trained.config == config


def test_average_can_be_averaged_on(average, save, states, tmp_path):
    average(*save(*states))
    (tmp_path / "soup.pth").rename(tmp_path / "first.pth")
    soup, _ = average(tmp_path / "first.pth", tmp_path / "0.pth")
    first = torch.load(tmp_path / "first.pth", weights_only=True)["model"]
    assert equal(soup["model"], literal_mean([first, states[0]["model"]]))


def test_published_weights_are_averaged_with_ours_and_without_a_configuration(average, save, states, tmp_path):
    torch.save({"model": to_published(states[0]["model"]), "max_accuracy": 83.4}, tmp_path / "published.pth")
    torch.save(to_published(states[1]["model"]), tmp_path / "bare.pth")
    soup, _ = average(tmp_path / "published.pth", tmp_path / "bare.pth")
    assert equal(soup["model"], literal_mean([states[0]["model"], states[1]["model"]]))
    assert soup["config"] is None and soup["classes"] is None
    mixed, _ = average(tmp_path / "published.pth", *save(states[1]))
    assert equal(mixed["model"], soup["model"])
    assert mixed["config"] == states[1]["config"] and mixed["classes"] == CLASSES
    turned, _ = average(*save(states[1]), tmp_path / "published.pth")
    assert equal(turned["model"], literal_mean([states[1]["model"], states[0]["model"]]))
    assert turned["config"] == states[1]["config"] and turned["classes"] == CLASSES


def test_configuration_given_takes_the_place_of_the_checkpoints(average, save, states, config, tmp_path):
    larger = config.clone()
    larger.DATA.IMG_SIZE = 64
    (tmp_path / "larger.yaml").write_text(larger.dump())
    paths = save(states[0], {**states[1], "config": larger.dump()})
    soup, _ = average(*paths, "--cfg", tmp_path / "larger.yaml")
    assert soup["config"] == larger.dump()


def test_same_weights_count_once(average, save, states, tmp_path):
    paths = save(states[0], states[1])
    (tmp_path / "best.pth").hardlink_to(paths[1])
    soup, result = average(*paths, tmp_path / "best.pth")
    assert equal(soup["model"], literal_mean([states[0]["model"], states[1]["model"]]))
    assert f"best.pth holds the same weights as {paths[1]}: they count once" in result.stdout
    assert len(soup["averaged"]["of"]) == 2


# The greedy recipe


def points(*values):
    """Checkpoints of networks of two numbers."""
    return [{"model": {"w": torch.tensor(value, dtype=torch.float64)}} for value in values]


def literal_greedy(values, accuracy):
    """The recipe as the paper writes it down."""
    order = sorted(range(len(values)), key=lambda number: -accuracy([values[number]]))
    taken = []
    for number in order:
        if not taken or accuracy([values[i] for i in [*taken, number]]) >= accuracy([values[i] for i in taken]):
            taken.append(number)
    return taken


coordinates = st.integers(-8, 8).map(float)


@examples(40)
@given(st.lists(st.tuples(coordinates, coordinates), min_size=2, max_size=6, unique=True))
def test_greedy_takes_what_the_literal_recipe_takes_and_is_no_worse_than_the_best(tmp_path_factory, values):
    folder = tmp_path_factory.mktemp("points")
    for number, state in enumerate(points(*values)):
        checkpoint.save(state, folder / f"{number}.pth")

    def correct(point):
        return max(0, 1000 - round(40 * math.hypot(*point)))

    def score(weights):
        return Score(1000, correct(weights["w"].tolist()), 1000, 0.0)

    def accuracy(some):
        return correct([math.fsum(numbers) / len(some) for numbers in zip(*some, strict=True)])

    found = look([folder / f"{number}.pth" for number in range(len(values))], "auto", with_configs=True)
    mean, taken, reached = greedy(found, score)
    wanted = literal_greedy(values, accuracy)
    assert [int(one.path.stem) for one in taken] == wanted and mean.count == len(wanted)
    assert reached.correct1 == score(mean.weights()).correct1 >= max(correct(value) for value in values)


def test_greedy_says_what_each_step_gave(tmp_path, save, capsys):
    paths = save(*points((4, 0), (0, 3), (0, -3), (90, 0)))

    def score(weights):
        return Score(100, max(0, 100 - round(weights["w"].norm().item())), 100, 0.0)

    _, taken, reached = greedy(look(paths, "auto", with_configs=True), score)
    assert [one.path.name for one in taken] == ["1.pth", "2.pth"] and reached.correct1 == 100
    lines = capsys.readouterr().out.replace(f"{tmp_path}/", "").splitlines()
    assert lines == [
        "0.pth: Acc@1 96.000 Acc@5 100.000",
        "1.pth: Acc@1 97.000 Acc@5 100.000",
        "2.pth: Acc@1 97.000 Acc@5 100.000",
        "3.pth: Acc@1 10.000 Acc@5 100.000",
        "begin with 1.pth",
        "with 2.pth: Acc@1 100.000 Acc@5 100.000, taken",
        "with 0.pth: Acc@1 99.000 Acc@5 100.000, left out",
        "with 3.pth: Acc@1 70.000 Acc@5 100.000, left out",
    ]


@pytest.mark.slow
def test_greedy_average_scores_in_test_py_what_it_says_and_no_less_than_the_best(
    trained, average, call, tree, tiny_config, tmp_path
):
    paths = [trained.folder / f"ckpt_epoch_{epoch}.pth" for epoch in range(1, 5)]
    soup, result = average(*paths, "--greedy", "--data-path", tree, "--weights", "model", "--batch-size", 5)

    def correct(path):
        where = ("--cfg", tiny_config, "--data-path", tree, "--resume", path, "--json", tmp_path / "score.json")
        assert call("test.py", *where, "--weights", "model").code == 0
        return json.loads((tmp_path / "score.json").read_text())["correct1"]

    reached, singles = correct(tmp_path / "soup.pth"), [correct(path) for path in paths]
    record = soup["averaged"]
    assert record["recipe"] == "greedy" and record["images"] == 17
    assert record["acc1"] == 100 * reached / 17 and reached >= max(singles)
    assert record["of"][0]["path"] == str(paths[singles.index(max(singles))])
    for path, single in zip(paths, singles, strict=True):
        assert f"{path}: Acc@1 {100 * single / 17:.3f} Acc@5" in result.stdout
    taken = [torch.load(one["path"], weights_only=True)["model"] for one in record["of"]]
    assert equal(soup["model"], literal_mean(taken))


@pytest.mark.slow
def test_average_is_what_predict_and_train_start_from(trained, average, call, tree, tiny_config, tmp_path):
    average(trained.folder / "ckpt_epoch_3.pth", trained.folder / "ckpt_epoch_4.pth")
    soup = tmp_path / "soup.pth"
    result = call("tools/predict.py", "--checkpoint", soup, tree / "val", "--topk", 1, "--workers", 0)
    assert result.code == 0 and len(result.stdout.splitlines()) == 17
    where = ("--cfg", tiny_config, "--data-path", tree, "--output", tmp_path / "output", "--device", "cpu")
    assert call("train.py", *where, "--eval", "--pretrained", soup).code == 0
    (error,) = call("train.py", *where, "--resume", soup).errors
    assert "--pretrained" in error


# What is refused, in one line


def test_tensors_that_differ_are_named(refused, save, states):
    weights = states[1]["model"]
    head = {name: value for name, value in weights.items() if name != "head.fc.bias"}
    error = refused(*save(states[0], {**states[1], "model": head}))
    assert "1.pth lacks head.fc.bias" in error and "0.pth has" in error
    error = refused(*save(states[0], {**states[1], "model": {**weights, "extra.weight": torch.zeros(1)}}))
    assert "1.pth has extra.weight" in error and "0.pth lacks" in error
    error = refused(*save(states[0], {**states[1], "model": {**weights, "head.fc.weight": torch.zeros(4, 40)}}))
    assert "head.fc.weight is [4, 40] and not [3, 40]" in error


def test_values_that_are_no_numbers_are_named(refused, save, states):
    weights = {**states[1]["model"], "head.fc.bias": torch.tensor([0.0, math.nan, 0.0])}
    error = refused(*save(states[0], {**states[1], "model": weights}))
    assert "1.pth" in error and "head.fc.bias" in error


def test_values_that_are_no_tensors_are_named(refused, save, states):
    weights = {**states[1]["model"], "epoch": 7}
    assert "1.pth holds no weights under epoch" in refused(*save(states[0], {**states[1], "model": weights}))


def test_other_classes_are_named(refused, save, states):
    error = refused(*save(states[0], {**states[1], "classes": ["ant", "cow", "bee"]}))
    assert "1.pth has other classes than" in error and "cow for bee" in error


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("NUM_HEADS: 8", "NUM_HEADS: 4", "MODEL.GMA.NUM_HEADS 4"),
        ("IMG_SIZE: 32", "IMG_SIZE: 64", "DATA.IMG_SIZE 64"),
        ("CROP: true", "CROP: false", "TEST.CROP False"),
        ("INTERPOLATION: bicubic", "INTERPOLATION: bilinear", "DATA.INTERPOLATION bilinear"),
    ],
)
def test_settings_that_the_tensors_do_not_tell_are_named(refused, save, states, old, new, told):
    assert old in states[1]["config"]
    error = refused(*save(states[0], {**states[1], "config": states[1]["config"].replace(old, new)}))
    assert told in error and "--cfg" in error


def test_settings_of_training_may_differ(average, save, states):
    other = states[1]["config"].replace("EPOCHS: 300", "EPOCHS: 20").replace("SEED: 0", "SEED: 1")
    assert other != states[1]["config"]
    soup, _ = average(*save(states[0], {**states[1], "config": other}))
    assert soup["config"] == states[0]["config"]


def test_configuration_of_another_network_is_refused(refused, save, states, config, tmp_path):
    other = config.clone()
    other.MODEL.GMA.EMBEDDING_DIMS = [40, 40, 40, 80]
    (tmp_path / "other.yaml").write_text(other.dump())
    assert "does not fit" in refused(*save(*states), "--cfg", tmp_path / "other.yaml")


def test_missing_moving_average_is_refused(refused, save, states):
    assert "1.pth holds no moving average" in refused(*save(states[0], {**states[1], "ema": None}), "--weights", "ema")


def test_same_weights_alone_are_refused(call, save, states, tmp_path):
    result = call("tools/average_checkpoints.py", *save(states[0], states[0]), "--output", tmp_path / "soup.pth")
    assert result.code == 2 and "all checkpoints hold the same weights" in result.errors[0]
    assert not (tmp_path / "soup.pth").exists()


@pytest.mark.parametrize(
    ("words", "output", "told"),
    [
        (["0.pth"], "soup.pth", "two or more"),
        (["0.pth", "missing.pth"], "soup.pth", "missing.pth: no such file"),
        (["0.pth", "1.pth"], "missing/soup.pth", "folder that exists"),
        (["0.pth", "1.pth"], "soup.safetensors", "end the name in .pth"),
        (["0.pth", "1.pth"], "1.pth", "1.pth exists: name another, nothing is written over"),
        (["0.pth", "1.pth", "--greedy"], "soup.pth", "--data-path"),
        (["0.pth", "1.pth", "--data-path", "D"], "soup.pth", "--greedy"),
        (["0.pth", "1.pth", "--workers", "2"], "soup.pth", "--greedy"),
        (["0.pth", "1.pth", "--greedy", "--data-path", "D", "--batch-size", "0"], "soup.pth", "--batch-size: 0"),
        (["0.pth", "1.pth", "--greedy", "--data-path", "D"], "soup.pth", "D is no folder"),
    ],
    ids=lambda words: " ".join(words) if isinstance(words, list) else None,
)
def test_what_cannot_be_done_is_refused(refused, save, states, monkeypatch, tmp_path, words, output, told):
    save(states[0], states[1])
    monkeypatch.chdir(tmp_path)
    assert told in refused(*words, output=output)


def test_uniform_reads_each_checkpoint_as_it_was_looked_at(save, states):
    found = look(save(*states), "ema", with_configs=True)
    assert equal(uniform(found).weights(), literal_mean([state["ema"] for state in states]))
