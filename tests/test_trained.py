"""A trained classifier from its checkpoint alone, and what its classes are called."""

import argparse

import pytest
import torch
import yaml
from helpers_unit import configured, equal

from data.names import class_labels
from models.build import build_model
from models.published import to_published
from utils import checkpoint
from utils.cli import Parser
from utils.errors import UserError
from utils.trained import add_trained_arguments, load_trained, trained_from

CLASSES = ["ant", "bee", "n01440764"]


@pytest.fixture(scope="module")
def config():
    tiny = {"EMBEDDING_DIMS": [40] * 4, "SERIAL_DEPTHS": [1] * 4, "MLP_RATIOS": [2] * 4, "NUM_CLASSES": 3}
    return configured(**{f"MODEL__GMA__{name}": value for name, value in tiny.items()}, DATA__IMG_SIZE=32)


@pytest.fixture(scope="module")
def networks(config):
    return [build_model(config, len(CLASSES)) for _ in range(2)]


@pytest.fixture
def state(config, networks):
    """What a run saves, as far as it matters here."""
    plain, average = (network.state_dict() for network in networks)
    best = {"epoch": 0, "of": "ema", "acc1": 50.0}
    return {"model": plain, "ema": average, "best": best, "config": config.dump(), "classes": CLASSES}


@pytest.fixture
def load(tmp_path):
    """Saves a checkpoint and loads the classifier."""

    def save_and_load(state, cfg=None, weights="auto"):
        checkpoint.save(state, tmp_path / "c.pth")
        return load_trained(tmp_path / "c.pth", cfg, weights)

    return save_and_load


@pytest.fixture
def cfg(tmp_path, config):
    path = tmp_path / "tiny.yaml"
    path.write_text(config.dump())
    return path


def holds(trained, network):
    return equal(trained.network.state_dict(), network.state_dict())


def without(state, *names):
    return {name: value for name, value in state.items() if name not in names}


# Which weights


@pytest.mark.parametrize(("of", "weights", "is_ema"), [
    ("ema", "auto", True), ("model", "auto", False), ("ema", "model", False), ("model", "ema", True),
])  # fmt: skip
def test_weights_are_those_asked_for_and_auto_takes_what_the_best_epoch_was_chosen_by(
    load, state, networks, of, weights, is_ema
):
    trained = load({**state, "best": {**state["best"], "of": of}}, weights=weights)
    assert trained.is_ema == is_ema
    assert holds(trained, networks[is_ema]) and not holds(trained, networks[not is_ema])


@pytest.mark.parametrize("best", [None, 83.4, {}], ids=str)
def test_auto_takes_the_weights_where_no_best_epoch_is_known_or_no_moving_average(load, state, networks, best):
    trained = load({**state, "best": best})
    assert not trained.is_ema and holds(trained, networks[0])
    assert holds(load(without(state, "best")), networks[0])
    assert holds(load(without(state, "ema")), networks[0])


def test_a_moving_average_that_is_asked_for_and_missing_is_an_error(load, state):
    for missing in ({**state, "ema": None}, without(state, "ema")):
        with pytest.raises(UserError, match=r"c\.pth holds no moving average: use --weights model"):
            load(missing, weights="ema")


# Which configuration


def test_all_comes_from_the_checkpoint_and_the_network_is_in_evaluation_mode(load, state, config, tmp_path):
    trained = load(state)
    assert trained.config == config
    assert trained.classes == CLASSES and trained.labels == ["ant", "bee", "tench, Tinca tinca"]
    assert trained.source == tmp_path / "c.pth" and equal(trained.state["ema"], state["ema"])
    assert not any(module.training for module in trained.network.modules())


def test_keys_that_are_newer_than_the_checkpoint_have_their_defaults(load, state, config):
    older = yaml.safe_load(state["config"])
    del older["TEST"], older["DATA"]["LOADING"], older["KEEP"]
    assert load({**state, "config": yaml.safe_dump(older)}).config == config


def test_keys_that_are_gone_are_named(load, state):
    with pytest.raises(UserError, match=r"the configuration in .*c\.pth: unknown key MODEL\.GAM"):
        load({**state, "config": "MODEL: {GAM: 1}"})


def test_values_that_cannot_work_are_named_with_their_file(load, state, cfg):
    with pytest.raises(UserError, match=r"the configuration in .*c\.pth: .*IMG_SIZE is 8"):
        load({**state, "config": "DATA: {IMG_SIZE: 8}"})
    cfg.write_text("DATA: {IMG_SIZE: 8}")
    with pytest.raises(UserError, match=r"^[^:]*tiny\.yaml: DATA\.IMG_SIZE is 8"):
        load(state, cfg)


@pytest.mark.parametrize("saved", ["{", "5", ""])
def test_configuration_that_cannot_be_read_is_an_error(load, state, saved):
    with pytest.raises(UserError, match=r"the configuration in .*c\.pth cannot be read: .* --cfg"):
        load({**state, "config": saved})


@pytest.mark.parametrize("saved", [None, {"MODEL": {"NAME": "groupmixformer"}}], ids=["none", "published"])
def test_checkpoint_without_our_configuration_asks_for_one(load, state, saved):
    with pytest.raises(UserError, match=r"c\.pth holds no configuration: .* --cfg"):
        load({**state, "config": saved})
    with pytest.raises(UserError, match="holds no configuration"):
        load(without(state, "config"))


def test_published_weights_are_loaded_with_a_configuration(load, state, networks, cfg):
    trained = load({"model": to_published(state["model"]), "max_accuracy": 83.4, "config": {"TAG": "t"}}, cfg)
    assert holds(trained, networks[0])
    assert trained.classes is None and trained.labels == ["0", "1", "2"]


def test_bare_weights_are_loaded_with_a_configuration(state, networks, cfg, tmp_path):
    torch.save(to_published(state["model"]), tmp_path / "bare.pth")
    assert holds(load_trained(tmp_path / "bare.pth", cfg), networks[0])


def test_configuration_given_takes_the_place_of_the_checkpoints(load, state, cfg):
    cfg.write_text(cfg.read_text().replace("IMG_SIZE: 32", "IMG_SIZE: 64"))
    assert load(state, cfg).config.DATA.IMG_SIZE == 64


def test_a_configuration_to_train_batches_that_cannot_be_mixed_serves_to_load(load, state, cfg, networks):
    cfg.write_text(cfg.read_text().replace("BATCH_SIZE: 128", "BATCH_SIZE: 127"))
    trained = load(state, cfg)
    assert trained.config.DATA.BATCH_SIZE == 127 and trained.config.AUG.MIXUP > 0
    assert holds(trained, networks[1])


def test_configuration_of_another_network_names_what_does_not_fit(load, state, cfg):
    cfg.write_text(cfg.read_text().replace("- 40\n    - 40\n    - 40\n    - 40", "- 40\n    - 40\n    - 40\n    - 80"))
    with pytest.raises(UserError, match=r"c\.pth does not fit the network: .*stages\.3"):
        load(state, cfg)


def test_number_of_classes_that_nothing_tells_is_an_error(load, state, cfg):
    cfg.write_text(cfg.read_text().replace("NUM_CLASSES: 3", "NUM_CLASSES: 0"))
    with pytest.raises(UserError, match=r"does not tell its number of classes: set MODEL\.GMA\.NUM_CLASSES"):
        load(without(state, "classes"), cfg)


def test_names_of_classes_tell_their_number(load, state, networks):
    assert holds(load({**state, "config": state["config"].replace("NUM_CLASSES: 3", "NUM_CLASSES: 0")}), networks[1])


# The flags


def parsed(*words) -> argparse.Namespace:
    parser = Parser("Test.")
    add_trained_arguments(parser)
    return parser.parse_args(list(map(str, words)))


def test_flags_name_what_is_loaded(state, networks, cfg, tmp_path):
    checkpoint.save(state, tmp_path / "c.pth")
    assert holds(trained_from(parsed("--checkpoint", tmp_path / "c.pth")), networks[1])
    assert holds(trained_from(parsed("--checkpoint", tmp_path / "c.pth", "--weights", "model")), networks[0])
    checkpoint.save({"model": state["model"]}, tmp_path / "bare.pth")
    assert holds(trained_from(parsed("--checkpoint", tmp_path / "bare.pth", "--cfg", cfg)), networks[0])
    with pytest.raises(UserError, match="--checkpoint"):
        parsed("--weights", "model")
    with pytest.raises(UserError, match="is no file"):
        trained_from(parsed("--checkpoint", tmp_path / "missing.pth"))


# Names of classes


def test_a_thousand_nameless_classes_have_imagenets_words():
    labels = class_labels(None, 1000)
    assert len(labels) == 1000
    assert (labels[0], labels[291]) == ("tench, Tinca tinca", "lion, king of beasts, Panthera leo")
    assert labels[999].startswith("toilet tissue")


def test_other_numbers_of_nameless_classes_are_called_by_their_numbers():
    assert class_labels(None, 3) == ["0", "1", "2"]


def test_synsets_have_imagenets_words_in_any_order_and_other_names_stay():
    synsets = ["n02129165", "cat", "n01440764", "n00005787", "n99999999"]  # the fourth is only in ImageNet-22K
    words = ["lion, king of beasts, Panthera leo", "cat", "tench, Tinca tinca", "benthos", "n99999999"]
    assert class_labels(synsets, 5) == words


def test_every_synset_of_imagenet_1k_has_the_words_that_its_number_has():
    synsets = ["n01440764", "n01443537", "n04399382", "n15075141"]  # the third is not in timm's list of 22K
    words = class_labels(None, 1000)
    assert class_labels(synsets, 4) == [words[0], words[1], words[850], words[999]]
