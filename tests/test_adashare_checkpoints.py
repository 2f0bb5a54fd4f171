"""Published AdaShare checkpoints: names, layouts, misfits."""

import official_keys
import pytest
import torch

from dynexec.models import load_official
from dynexec.models.adashare import adashare_resnet

# Official name: depth, channels of the tasks.
PUBLISHED = {
    "cityscapes_2task": (34, (19, 1)),
    "nyu_v2_2task": (18, (40, 3)),
    "nyu_v2_3task": (34, (40, 3, 1)),
    "taskonomy_5task": (34, (17, 3, 1, 1, 1)),
    "resnet101_2task": (101, (19, 1)),
}


def make(depth=18, **options):
    small = dict(blocks=(2, 2, 1, 2), widths=(4, 8, 8, 16), head_width=6, policy_widths=(4, 4, 6, 8))
    return adashare_resnet(depth, num_classes=(5, 3, 1), **small, **options)


def official_shapes(*sections):
    """Name to shape, of the sections of a checkpoint together."""
    return {
        name: shape
        for section in sections
        for name, shape in official_keys.official_shapes(section, "adashare").items()
    }


def meta_state(shapes):
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_of_the_published_checkpoints(name):
    depth, classes = PUBLISHED[name]
    with torch.device("meta"):
        net = adashare_resnet(depth, num_classes=classes)
    state = meta_state(official_shapes(f"resnet{depth} backbone", f"{name} tasks"))
    ((module, renamed),) = net.read_official({"mtl-net": state}, "source").parts.values()
    assert module is net
    expected = {key: value.shape for key, value in net.state_dict().items()}
    assert {key: value.shape for key, value in renamed.items()} == expected


def test_parameters_of_the_instance_variant():
    with torch.device("meta"):
        net = adashare_resnet(18, num_classes=(40, 3), instance_policy=True)
    state = official_shapes("resnet18 backbone", "nyu_v2_2task tasks", "nyu_v2_2task policynet")
    state = meta_state({key: shape for key, shape in state.items() if not key.endswith("_logits")})
    found = net.read_official({"mtl-net": state}, "source")
    assert len(found.dropped) == 54 and all(key.startswith("policynet.parallel_") for key in found.dropped)
    renamed = found.parts["network"][1]
    expected = {key: value.shape for key, value in net.state_dict().items()}
    assert {key: value.shape for key, value in renamed.items()} == expected


def official_state(net):
    """The network's state under the official names, with other values."""
    state = {}
    for key, value in net.state_dict().items():
        key = key.replace("backbone.stem.", "backbone.")
        if key.startswith("heads."):
            _, task, _, branch, rest = key.split(".", 4)
            key = f"task{int(task) + 1}_fc1_c{branch}.{rest}"
        elif key.startswith("policy."):
            key = key.removeprefix("policy.")
            key = key if key.endswith("_logits") else f"policynet.{key}"
        state[key] = torch.rand_like(value) + 0.5 if value.is_floating_point() else value + 7
    return state


@pytest.mark.parametrize("instance_policy", [False, True])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_loading(tmp_path, instance_policy, nested, prefix):
    net = make(101, instance_policy=instance_policy)
    state = official_state(net)
    source = {prefix + key: value for key, value in state.items()}
    if nested:
        source = {"mtl-net": source, "weights": {"state": {}}, "alphas": {"state": {}}, "iter": 19600, "temp": 0.5}
    torch.save(source, tmp_path / "best_model.pth.tar")
    report = load_official(net, tmp_path / "best_model.pth.tar")
    assert (report.loaded, report.absent, report.dropped) == (("network",), (), ())
    assert report.info == ({"iter": 19600, "temp": 0.5} if nested else {})
    assert torch.equal(net.backbone.stem.conv1.weight, state["backbone.conv1.weight"])
    assert torch.equal(net.heads[2].branches[3].conv3.bias, state["task3_fc1_c3.conv3.bias"])
    if instance_policy:
        assert torch.equal(net.policy.linear.weight, state["policynet.linear.weight"])
    else:
        assert torch.equal(net.policy()[1], state["task2_logits"])


def test_misfits_are_listed_and_nothing_is_loaded():
    net = make()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    state = official_state(net)
    del state["task1_logits"], state["backbone.bn1.bias"]
    state |= {"task4_fc1_c0.conv1.bias": torch.rand(6), "extra": torch.rand(1), "task2_logits": torch.rand(9, 2)}
    with pytest.raises(ValueError) as error:
        load_official(net, {"mtl-net": state, "iter": 1})
    assert str(error.value).splitlines() == [
        "source does not fit this network, which is left as it was:",
        "  network, missing: backbone.stem.bn1.bias, policy.task1_logits",
        "  network, unexpected: heads.3.branches.0.conv1.bias, extra",
        "  network, of another shape: policy.task2_logits (9, 2) instead of (7, 2)",
    ]
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert load_official(net, {"mtl-net": official_state(net)}).loaded == ("network",)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({}, "source has the entries : expected 'mtl-net', or parameters by name"),
        ({"agent": {}, "iter": 1}, "source has the entries 'agent', 'iter': expected 'mtl-net'"),
        ({"mtl-net": 3}, r"source\['mtl-net'\] must map names to tensors, got int"),
        ({"mtl-net": {1: torch.ones(1)}}, r"source must have names for the network, got the keys 1"),
        ({1: torch.ones(1)}, "source must have names for the network, got the keys 1"),
    ],
)
def test_unknown_layouts(source, message):
    with pytest.raises(ValueError, match=message):
        load_official(make(), source)
