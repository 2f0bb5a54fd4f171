"""Published checkpoints: every layout is understood, nothing is half loaded, no code runs unasked."""

import io
import pickle
import types

import pytest
import torch
from hostile import Effect
from official_keys import holds, official_state, prefixed, snapshot, without_counters
from torch import nn

from dynexec import models
from dynexec.models import load_official

NAME = "resnet32_cifar10"


@pytest.fixture
def net():
    return models.create_model(f"blockdrop_{NAME}")


@pytest.fixture
def backbone():
    return official_state(f"{NAME} backbone")


@pytest.fixture
def policy():
    return official_state(f"{NAME} policy")


def base_names(state):
    """The names of ordinary residual networks: layer1.0.conv1, layer1.0.downsample.0."""
    renamed = {}
    for name, value in state.items():
        kind, *rest = name.split(".")
        if kind == "blocks":
            name = f"layer{int(rest[0]) + 1}." + ".".join(rest[1:])
        elif kind == "ds":
            name = f"layer{int(rest[0]) + 1}.0.downsample." + ".".join(rest[1:])
        renamed[name] = value
    return renamed


@pytest.mark.parametrize("change", [lambda state: state, without_counters, prefixed])
def test_fine_tuned(net, backbone, policy, change):
    source = {"agent": change(policy), "resnet": change(backbone), "epoch": 2000, "reward": 0.195, "acc": 0.936}
    report = load_official(net, source)
    assert (report.loaded, report.absent, report.dropped) == (("backbone", "policy"), (), ())
    assert report.info == {"epoch": 2000, "reward": 0.195, "acc": 0.936}
    assert str(report) == "loaded backbone and policy"
    assert holds(net.backbone, without_counters(backbone)) and holds(net.policy, without_counters(policy))
    assert net(torch.rand(2, 3, 32, 32)).isfinite().all()


@pytest.mark.parametrize("entry", ["agent", "net"])
def test_policy_only_leaves_the_backbone(net, policy, entry):
    before = snapshot(net)
    report = load_official(net, {entry: without_counters(policy), "epoch": 3})
    assert (report.loaded, report.absent) == (("policy",), ("backbone",))
    assert str(report) == "loaded policy; the checkpoint has no backbone, left as before"
    assert holds(net.policy, without_counters(policy))
    assert all(torch.equal(value, before[f"backbone.{name}"]) for name, value in net.backbone.state_dict().items())


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("change", [base_names, lambda state: prefixed(base_names(without_counters(state)))])
def test_base_network(net, backbone, nested, change):
    state = change(backbone)
    report = load_official(net, {"state_dict": state, "arch": "resnet"} if nested else state)
    assert (report.loaded, report.absent) == (("backbone",), ("policy",))
    assert report.info == ({"arch": "resnet"} if nested else {})
    assert holds(net.backbone, without_counters(backbone))


def test_imagenet_network_one_part_after_the_other():
    net = models.create_model("blockdrop_resnet101_imagenet")
    backbone, policy = (official_state(f"resnet101_imagenet {part}") for part in ("backbone", "policy"))
    assert load_official(net, base_names(backbone)).loaded == ("backbone",)
    assert load_official(net, {"agent": policy}).loaded == ("policy",)
    assert holds(net.backbone, backbone) and holds(net.policy, policy)


def test_unused_classifier_of_old_policies_is_dropped(net, policy):
    old = policy | {"features.fc.weight": torch.rand(10, 64), "features.fc.bias": torch.rand(10)}
    report = load_official(net, {"agent": old})
    assert report.dropped == ("features.fc.weight", "features.fc.bias")
    assert holds(net.policy, policy)


def test_from_a_file(net, backbone, policy, tmp_path):
    path = tmp_path / "ckpt_E_2000.t7"
    torch.save({"agent": policy, "resnet": backbone, "epoch": 2000}, path)
    assert load_official(net, path).info == {"epoch": 2000}
    assert load_official(net, str(path)).loaded == ("backbone", "policy")
    assert holds(net.backbone, backbone) and holds(net.policy, policy)
    with pytest.raises(FileNotFoundError):
        load_official(net, tmp_path / "absent.t7")


class Python2Pickler(pickle._Pickler):
    """Writes strings as Python 2 did, as bytes."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_text(self, text):
        data = text.encode("latin1")
        self.write(pickle.SHORT_BINSTRING + bytes([len(data)]) + data)
        self.memoize(text)

    dispatch[str] = save_text


def write_as_python2(checkpoint, path):
    """A file in the layout of PyTorch 0.3 under Python 2."""

    def dump(value, file, protocol):
        Python2Pickler(file, protocol).dump(value)

    module = types.SimpleNamespace(__name__="pickle", Pickler=Python2Pickler, dump=dump)
    torch.save(checkpoint, path, pickle_module=module, pickle_protocol=2, _use_new_zipfile_serialization=False)


def test_a_python2_file(net, backbone, policy, tmp_path):
    path = tmp_path / "old.t7"
    source = {"agent": without_counters(policy), "resnet": without_counters(backbone), "acc": 0.9}
    write_as_python2(source, path)
    assert b"X\x05\x00\x00\x00agent" not in path.read_bytes()  # no unicode string: really Python 2's
    for weights_only in (True, False):
        assert load_official(net, path, weights_only=weights_only).info == {"acc": 0.9}
    assert holds(net.backbone, without_counters(backbone))
    write_as_python2(source | {"note": "caf\xe9"}, path)
    with pytest.raises(ValueError, match="weights_only=False"):
        load_official(net, path)
    assert load_official(net, path, weights_only=False).info["note"] == "caf\xe9"


@pytest.mark.parametrize("python2", [True, False])
def test_code_runs_only_when_asked(net, backbone, policy, tmp_path, python2):
    path = tmp_path / "acts.t7"
    source = {"agent": policy, "resnet": backbone, "acc": Effect(0.5)}
    write_as_python2(source, path) if python2 else torch.save(source, path)
    before = snapshot(net)
    with pytest.raises(ValueError, match=r"If you trust it.*weights_only=False.*: GLOBAL \S+ was not an allowed"):
        load_official(net, path)
    assert not Effect.happened
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert load_official(net, path, weights_only=False).info == {"acc": 0.5}
    assert Effect.happened


def damaged(name, state):
    """A file's content that torch.load fails on, each in another way."""
    file = io.BytesIO()
    torch.save(state, file, _use_new_zipfile_serialization="zip" in name)
    whole = file.getvalue()
    return {
        "empty": b"",
        "page": b"<!DOCTYPE html>\n<html><body>404</body></html>",
        "text": b"hello world\n",
        "git lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "pickle": pickle.dumps(state | {"note": 1}),
        "old pickle": pickle.dumps([1], protocol=2),
        "legacy, no end": whole[:-10],
        "legacy, half": whole[: len(whole) // 2],
        "legacy, begun": whole[:15],
        "zip, half": whole[: len(whole) // 2],
        "zip, begun": whole[:100],
    }[name]


@pytest.mark.parametrize("weights_only", [True, False])
@pytest.mark.parametrize(
    "name",
    ["empty", "page", "text", "git lfs", "pickle", "old pickle"]
    + ["legacy, no end", "legacy, half", "legacy, begun", "zip, half", "zip, begun"],
)
def test_a_damaged_file_is_named_and_nothing_is_advised(net, backbone, tmp_path, name, weights_only):
    path = tmp_path / "damaged.t7"
    path.write_bytes(damaged(name, backbone))
    with pytest.raises(ValueError, match=rf"damaged.t7' \({path.stat().st_size} bytes\) is not a checkpoint") as error:
        load_official(net, path, weights_only=weights_only)
    text = str(error.value)
    assert "weights_only" not in text and "documentation" not in text
    assert text.split("torch.load said: ")[1]


@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"state_dict": state}])
def test_parameters_without_names(net, tmp_path, wrap):
    source = wrap({1: torch.ones(2), "conv1.weight": torch.ones(2)})
    with pytest.raises(ValueError, match="source must have names for the backbone, got the keys 1$"):
        load_official(net, source)
    torch.save(source, tmp_path / "keys.t7")
    with pytest.raises(ValueError, match=r"source '.*keys.t7' must have names for the backbone, got the keys 1$"):
        load_official(net, tmp_path / "keys.t7")


def test_misfits_are_listed_together_and_nothing_is_loaded(net, backbone, policy):
    before = snapshot(net)
    del backbone["blocks.1.2.bn1.weight"]
    backbone["blocks.1.5.conv1.weight"] = torch.rand(32, 32, 3, 3)
    backbone["fc.weight"] = torch.rand(100, 64)
    policy["logit.weight"] = [1.0]
    with pytest.raises(ValueError) as error:
        load_official(net, {"agent": policy, "resnet": backbone})
    assert str(error.value).splitlines() == [
        "source does not fit this network, which is left as it was:",
        "  backbone, missing: blocks.1.2.bn1.weight",
        "  backbone, unexpected: blocks.1.5.conv1.weight",
        "  backbone, of another shape: fc.weight (100, 64) instead of (10, 64)",
        "  policy, of another shape: logit.weight is a list",
    ]
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_a_fitting_part_is_not_loaded_when_the_other_does_not_fit(net, backbone, policy):
    before = snapshot(net)
    del policy["logit.bias"]
    with pytest.raises(ValueError, match="policy, missing: logit.bias"):
        load_official(net, {"agent": policy, "resnet": backbone})
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("other", ["module.conv1.weight", "layer2.0.conv1.weight"])
def test_one_parameter_under_two_names(net, backbone, policy, other):
    before = snapshot(net)
    name = {"layer2.0.conv1.weight": "blocks.1.0.conv1.weight"}.get(other, "conv1.weight")
    with pytest.raises(ValueError, match=f"has two values for one parameter: '{name}' and '{other}'$"):
        load_official(net, {"agent": policy, "resnet": backbone | {other: backbone[name]}})
    assert holds(net, before)


def test_a_base_network_with_a_policy(net, backbone, policy):
    report = load_official(net, {"state_dict": base_names(backbone), "agent": policy, "epoch": 3})
    assert (report.loaded, report.info) == (("backbone", "policy"), {"epoch": 3})
    assert load_official(net, {"state_dict": backbone, "agent": "ppo"}).info == {"agent": "ppo"}
    assert holds(net.backbone, backbone) and holds(net.policy, policy)


def test_of_another_network_altogether_every_name_is_named(net):
    state = official_state("resnet110_cifar10 backbone")
    with pytest.raises(ValueError) as error:
        load_official(net, {"state_dict": state})
    assert all(f" {name}" in str(error.value) for name in state.keys() - net.backbone.state_dict().keys())


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"weights": 1, "epoch": 2}, "'weights', 'epoch': expected 'agent' and 'resnet'"),
        ({}, "expected 'agent' and 'resnet'"),
        ({"agent": nn.Linear(2, 2)}, r"source\['agent'\] must map names to tensors, got Linear"),
    ],
)
def test_unknown_layouts(net, source, message):
    with pytest.raises(ValueError, match=message):
        load_official(net, source)


def test_wrong_kinds(net, tmp_path):
    with pytest.raises(TypeError, match="source must be a path or a mapping, got BytesIO"):
        load_official(net, io.BytesIO())
    with pytest.raises(TypeError, match="net must be one of the networks of dynexec.models .*, got Linear"):
        load_official(nn.Linear(2, 2), {})
    path = tmp_path / "list.pt"
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="holds a list, expected a dict"):
        load_official(net, path)


@pytest.mark.parametrize(
    "how, words",
    [("meta", "on the meta device: call to_empty first: conv1.weight"),
     ("inference", "made in inference mode, which nothing can be written to: conv1.weight"),
     ("expanded", "expanded, so that several values are in one place: fc.bias")],
)  # fmt: skip
def test_a_network_that_takes_no_values_is_not_half_loaded(net, backbone, policy, how, words):
    if how == "meta":
        net = net.to("meta")
    elif how == "inference":
        with torch.inference_mode():
            net = models.create_model(f"blockdrop_{NAME}")
    else:
        net.backbone.fc.bias = nn.Parameter(torch.zeros(1).expand(10))
    before = snapshot(net)
    with pytest.raises(ValueError, match=f"backbone, {words}"):
        load_official(net, {"agent": policy, "resnet": backbone})
    assert how == "meta" or holds(net, before)


def test_parameters_that_are_not_initialized(net, backbone, policy):
    backbone["conv1.weight"] = nn.UninitializedParameter()
    with pytest.raises(ValueError, match="backbone, of another shape: conv1.weight is not initialized"):
        load_official(net, {"agent": policy, "resnet": backbone})
