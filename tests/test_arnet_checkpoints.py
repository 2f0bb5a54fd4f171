"""AR-Net's published checkpoints: names and shapes, every layout, nothing half loaded."""

import pytest
import torch
from official_keys import holds, official_shapes, prefixed, snapshot, without_counters

from dynexec.models import load_official
from dynexec.models.arnet import PUBLISHED, build_arnet
from dynexec.models.mobilenet import MobileNetV2


def official_state(section, prefix=""):
    """Random values under the official names that begin with ``prefix``, which is taken away."""
    return {
        name.removeprefix(prefix): torch.tensor(7) if name.endswith("tracked") else torch.rand(shape) * 0.1 + 0.01
        for name, shape in official_shapes(section, "arnet").items()
        if name.startswith(prefix)
    }


def flat_names(state, prefix):
    """MobileNetV2's blocks with the other of their two published namings."""
    renamed = {}
    for name, value in state.items():
        if name.startswith(f"{prefix}features.") and ".conv." in name:
            block, _, layer = name.removeprefix(f"{prefix}features.").partition(".conv.")
            nested = ["0.0", "0.1", "1", "2"] if block == "1" else ["0.0", "0.1", "1.0", "1.1", "2", "3"]
            place, _, parameter = layer.rpartition(".")
            place = ["0", "1", "3", "4", "6", "7"][nested.index(place)]
            name = f"{prefix}features.{block}.conv.{place}.{parameter}"
        renamed[name] = value
    return renamed


def own_names(state):
    """Official names to ours."""
    return {
        name if name.startswith(("base_model_list.", "new_fc_list.")) else f"policy.{name}": value
        for name, value in state.items()
    }


def is_as_before(net, before, changed=()):
    """Whether all values are, but those under names that begin with one of ``changed``."""
    own = net.state_dict()
    return all(torch.equal(own[name], value) for name, value in before.items() if not name.startswith(tuple(changed)))


@pytest.fixture(scope="module")
def net():
    return build_arnet()


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_of_the_published_checkpoints(name):
    with torch.device("meta"):
        network = build_arnet(**PUBLISHED[name])
    expected = own_names(official_shapes(name.removeprefix("arnet_"), "arnet"))
    assert len(expected) == {"arnet_resnet": 980, "arnet_efficientnet": 1762}[name]
    assert {key: tuple(value.shape) for key, value in network.state_dict().items()} == expected


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("flat", [False, True])
def test_whole_networks(name, flat):
    network = build_arnet(**PUBLISHED[name])
    state = official_state(name.removeprefix("arnet_"))
    given = prefixed(flat_names(state, "lite_backbone.") if flat else state)
    assert ("module.lite_backbone.features.1.conv.4.weight" in given) == flat
    source = {"epoch": 50, "arch": "resnet50", "state_dict": given, "optimizer": {}, "best_prec1": 73.8}
    report = load_official(network, source)
    assert (report.loaded, report.absent, report.dropped) == (("network",), (), ())
    assert report.info == {"epoch": 50, "arch": "resnet50", "optimizer": {}, "best_prec1": 73.8}
    assert holds(network, own_names(state))


def test_flat_names_number_the_layers_of_a_block():
    state = MobileNetV2().state_dict()
    names = flat_names(state, "")
    for number, layers in ((1, "0134"), (2, "013467"), (17, "013467")):
        places = {name.split(".")[3] for name in names if name.startswith(f"features.{number}.conv.")}
        assert places == set(layers)
    assert names["features.1.conv.3.weight"].shape == (16, 32, 1, 1)
    assert names["features.2.conv.3.weight"].shape == (96, 1, 3, 3)
    assert names["features.2.conv.6.weight"].shape == (24, 96, 1, 1)


def test_bare_parameters_and_files(net, tmp_path):
    state = official_state("resnet")
    assert load_official(net, without_counters(state)).info == {}
    assert holds(net, own_names(without_counters(state)))
    torch.save({"state_dict": prefixed(state), "epoch": 3}, tmp_path / "ckpt.best.pth.tar")
    assert load_official(net, tmp_path / "ckpt.best.pth.tar").info == {"epoch": 3}


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_network_of_one_resolution_goes_to_the_backbone_that_it_fits(net, number):
    body, head = (official_state("resnet", f"{part}.{number}.") for part in ("base_model_list", "new_fc_list"))
    before = snapshot(net)
    state = prefixed(prefixed(body, "base_model.") | prefixed(head, "new_fc."))
    report = load_official(net, {"state_dict": state, "epoch": 10})
    others = tuple(f"backbone {other}" for other in range(3) if other != number)
    assert (report.loaded, report.absent) == ((f"backbone {number}", "its head"), (*others, "policy"))
    assert holds(net.base_model_list[number], body) and holds(net.new_fc_list[number], head)
    assert is_as_before(net, before, [f"base_model_list.{number}.", f"new_fc_list.{number}."])


@pytest.mark.parametrize("flat", [False, True])
def test_a_mobilenet_of_one_resolution_becomes_the_policys(net, flat):
    state = official_state("resnet", "lite_backbone.")
    body = flat_names(state, "") if flat else state
    given = prefixed(body, "base_model.") | {"new_fc.weight": torch.ones(200, 1280), "new_fc.bias": torch.ones(200)}
    report = load_official(net, {"state_dict": prefixed(given)})
    assert report.loaded == ("policy.lite_backbone",)
    assert report.absent == ("backbone 0", "backbone 1", "backbone 2", "rest of the policy")
    assert report.dropped == ("new_fc.weight", "new_fc.bias")
    assert holds(net.policy.lite_backbone, state)


def test_one_resolution_that_fits_several_backbones_is_refused():
    network = build_arnet((18, 18), resolutions=(64, 48, 32), num_frames=2)
    body, head = official_state("resnet", "base_model_list.2."), official_state("resnet", "new_fc_list.2.")
    before = snapshot(network)
    state = prefixed(body, "base_model.") | prefixed(head, "new_fc.")
    with pytest.raises(
        ValueError, match=r"source fits the backbones 0, 1: load it into the one that it is for, as net"
    ):
        load_official(network, {"state_dict": state})
    assert is_as_before(network, before)


def test_misfits_are_listed_and_nothing_is_loaded(net):
    before = snapshot(net)
    state = official_state("resnet")
    del state["rnn.bias_hh"]
    state["base_model_list.3.conv1.weight"] = torch.rand(64, 3, 7, 7)
    state["linear.weight"] = torch.rand(5, 512)
    with pytest.raises(ValueError) as error:
        load_official(net, {"state_dict": prefixed(state)})
    assert str(error.value).splitlines() == [
        "source does not fit this network, which is left as it was:",
        "  network, missing: policy.rnn.bias_hh",
        "  network, unexpected: base_model_list.3.conv1.weight",
        "  network, of another shape: policy.linear.weight (5, 512) instead of (7, 512)",
    ]
    body = official_state("resnet", "base_model_list.1.")
    del body["layer3.5.bn1.weight"]
    with pytest.raises(ValueError, match="backbone 1, missing: layer3.5.bn1.weight\n  its head, missing: weight, bias"):
        load_official(net, {"state_dict": prefixed(body, "base_model.")})
    assert is_as_before(net, before)


def test_efficientnet_weights_do_not_fit_resnets(net):
    with pytest.raises(ValueError, match="(?s)network, missing: .*network, unexpected: ") as error:
        load_official(net, {"state_dict": official_state("efficientnet")})
    assert " base_model_list.2._blocks.15._bn2.weight" in str(error.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({}, "expected 'state_dict', or parameters with names such as 'base_model_list.0.conv1.weight'"),
        ({"agent": {}, "resnet": {}}, "has the entries 'agent', 'resnet': expected 'state_dict'"),
        ({"state_dict": {"conv1.weight": torch.ones(1)}}, r"source\['state_dict'\] has the entries 'conv1.weight'"),
        ({"state_dict": [1]}, r"source\['state_dict'\] must map names to tensors, got list"),
        ({1: 2, "base_model_list.0.conv1.weight": 3}, "must have names for the network, got the keys 1$"),
    ],
)
def test_unknown_layouts(net, source, message):
    with pytest.raises(ValueError, match=message):
        load_official(net, source)
