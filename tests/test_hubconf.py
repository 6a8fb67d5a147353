"""torch.hub.load from this folder."""

import importlib.util
import runpy

import pytest
import torch
from helpers_unit import ROOT, configured

from models import GroupMixFormer
from models.published import to_published
from utils import checkpoint
from utils.errors import UserError

VARIANTS = {"miny": 5_733_120, "tiny": 10_949_152, "small": 22_421_320, "base": 45_827_272, "large": 71_833_648}
GMA = {
    "MODEL__GMA__EMBEDDING_DIMS": [40, 40, 40, 40],
    "MODEL__GMA__SERIAL_DEPTHS": [1, 1, 1, 1],
    "MODEL__GMA__NUM_CLASSES": 3,
}


def load(name, *words, **settings):
    return torch.hub.load(str(ROOT), name, *words, source="local", trust_repo=True, **settings)


@pytest.fixture
def network():
    return GroupMixFormer(num_classes=3, embed_dims=(40, 40, 40, 40), depths=(1, 1, 1, 1)).eval()


def test_the_entry_points_are_the_variants_and_a_trained_network_and_nothing_else():
    """torch.hub lists what can be called and has no underscore before its name."""
    names = runpy.run_path(str(ROOT / "hubconf.py"))
    entries = {name for name, value in names.items() if callable(value) and not name.startswith("_")}
    assert entries == {*(f"groupmixformer_{size}" for size in VARIANTS), "trained"}
    assert all(names[name].__doc__ for name in entries)


def test_what_it_depends_on_is_named_as_it_is_imported():
    dependencies = runpy.run_path(str(ROOT / "hubconf.py"))["dependencies"]
    assert "timm" in dependencies and all(importlib.util.find_spec(name) for name in dependencies)


@pytest.mark.parametrize("size", VARIANTS)
def test_a_variant_is_loaded_with_its_parameters(size):
    network = load(f"groupmixformer_{size}", device="meta")
    assert sum(parameter.numel() for parameter in network.parameters()) == VARIANTS[size]


def test_a_variant_takes_the_settings_of_timms():
    network = load("groupmixformer_small", num_classes=7, in_chans=1, embed_dims=(40,) * 4, depths=(1,) * 4)
    assert network(torch.zeros(2, 1, 32, 32)).shape == (2, 7)


def test_a_checkpoint_of_a_run_is_loaded_as_it_is(network, tmp_path):
    state = {"model": network.state_dict(), "config": configured(**GMA).dump(), "classes": ["a", "b", "c"]}
    checkpoint.save(state, tmp_path / "best.pth")
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(load("trained", str(tmp_path / "best.pth"))(images), network(images))


def test_published_weights_are_loaded_with_their_configuration(network, tmp_path):
    torch.save({"model": to_published(network.state_dict())}, tmp_path / "published.pth")
    (tmp_path / "tiny.yaml").write_text(configured(**GMA).dump())
    images = torch.randn(2, 3, 64, 64)
    again = load("trained", str(tmp_path / "published.pth"), cfg=str(tmp_path / "tiny.yaml"))
    assert torch.equal(again(images), network(images))
    with pytest.raises(UserError, match="--cfg"):
        load("trained", str(tmp_path / "published.pth"))
