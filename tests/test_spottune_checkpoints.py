"""Published SpotTune checkpoints: pickled modules, of which nothing is run; names, layouts, misfits."""

import collections
import copy
import io
import pickle
import sys
import types

import pytest
import torch
from hostile import Effect
from official_keys import official_shapes, official_state
from torch import nn

from dynexec import models
from dynexec.models import load_official
from dynexec.models.inert import Inert, load_inert, state_of


def test_parameters_are_those_of_the_published_checkpoints():
    with torch.device("meta"):
        net = models.create_model("spottune_resnet26")
    assert {key: tuple(v.shape) for key, v in net.backbone.state_dict().items()} == official_shapes("net", "spottune")
    agent = {k: shape for k, shape in official_shapes("agent", "spottune").items() if not k.startswith("parallel_")}
    assert {key: tuple(v.shape) for key, v in net.policy.network.state_dict().items()} == agent


def checkpoint(prefix=""):
    states = [official_state(section, "spottune") for section in ("net", "agent")]
    return dict(zip(("net", "agent"), [{prefix + k: v for k, v in state.items()} for state in states]))


def is_loaded(net, source):
    own = net.backbone.state_dict()
    agent = net.policy.network.state_dict()
    return all(torch.equal(own[k], v) for k, v in source["net"].items()) and all(
        torch.equal(agent[k], v) for k, v in source["agent"].items() if k in agent
    )


@pytest.mark.parametrize("prefix", ["", "module."])
def test_states(prefix):
    net, source = models.create_model("spottune_resnet26"), checkpoint()
    given = {part: {prefix + k: v for k, v in state.items()} for part, state in source.items()}
    report = load_official(net, given | {"epoch": 3})
    assert (report.loaded, report.absent, report.info) == (("backbone", "policy"), (), {"epoch": 3})
    assert len(report.dropped) == 36 and all(name.startswith("parallel_blocks.") for name in report.dropped)
    assert is_loaded(net, source)


class Pickled(nn.Module):
    """A stand-in for a class of the authors' code: a tree of modules with some parameters."""

    def __init__(self, state):
        super().__init__()
        children = collections.defaultdict(dict)
        for key, value in state.items():
            name, dot, rest = key.partition(".")
            if dot:
                children[name][rest] = value
            elif name in ("running_mean", "running_var", "num_batches_tracked"):
                self.register_buffer(name, value)
            else:
                self.register_parameter(name, nn.Parameter(value))
        for name, child in children.items():
            self.add_module(name, Pickled(child))


@pytest.fixture
def authors_code():
    """The module that the pickles name, there while they are written and gone when they are read."""
    module = types.ModuleType("spottune_models")
    module.ResNet = Pickled
    before = Pickled.__module__, Pickled.__qualname__
    Pickled.__module__, Pickled.__qualname__ = "spottune_models", "ResNet"
    sys.modules["spottune_models"] = module
    yield
    sys.modules.pop("spottune_models", None)
    Pickled.__module__, Pickled.__qualname__ = before


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("zipped", [False, True])
def test_files_of_pickled_modules(authors_code, tmp_path, zipped, parallel):
    """As the authors saved them: their classes are not there, and nothing in the file is run."""
    source, path = checkpoint(), tmp_path / "set.t7"
    modules = {part: Pickled(state) for part, state in source.items()}
    if parallel:
        modules = {part: nn.DataParallel(module) for part, module in modules.items()}
    torch.save(modules | {"note": Effect()}, path, _use_new_zipfile_serialization=zipped)
    del sys.modules["spottune_models"]
    net = models.create_model("spottune_resnet26")
    report = load_official(net, path)
    assert report.loaded == ("backbone", "policy") and is_loaded(net, source) and not Effect.happened


def test_a_file_that_does_not_fit_changes_nothing(authors_code, tmp_path):
    source, path = checkpoint(), tmp_path / "set.t7"
    del source["net"]["blocks.1.2.bn1.weight"]
    source["net"]["linear.weight"] = torch.rand(1000, 256)
    torch.save({part: Pickled(state) for part, state in source.items()}, path)
    net = models.create_model("spottune_resnet26")
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=r"(?s)missing: blocks.1.2.bn1.weight.*linear.weight \(1000, 256\)"):
        load_official(net, path)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def pretrained(state):
    """The names that the pre-training code has for the parameters of a network without a second set of weights."""
    renamed = {}
    for key, value in state.items():
        parts = key.split(".")
        if parts[0] == "parallel_blocks":
            continue
        if parts[0] == "blocks":
            _, segment, block, layer, *rest = parts
            names = {"conv1": "conv1.conv", "bn1": "conv1.bns.0", "conv2": "conv2.1.conv", "bn2": "conv2.1.bns.0"}
            key = ".".join([f"layer{int(segment) + 1}", block, names[layer], rest[-1]])
        else:
            names = {
                "conv1": "pre_layers_conv.conv",
                "bn1": "pre_layers_conv.bns.0",
                "bn2": "end_bns.0",
                "linear": "linears.0",
            }
            key = ".".join([names[parts[0]], *parts[1:]])
        renamed[key] = value
    return renamed


def test_a_pretrained_network_goes_into_both_sets_of_weights():
    state = official_state("net", "spottune")
    net = models.create_model("spottune_resnet26")
    linear = net.backbone.linear.weight.clone()
    report = load_official(net, {"net": pretrained(state)})
    assert (report.loaded, report.absent) == (("backbone",), ("policy",))
    assert report.dropped == ("linear.weight", "linear.bias")
    own = net.backbone.state_dict()
    for key, value in state.items():
        if key.startswith("blocks."):
            assert torch.equal(own[key], value) and torch.equal(own[f"parallel_{key}"], value)
    assert torch.equal(own["conv1.weight"], state["conv1.weight"]) and torch.equal(own["linear.weight"], linear)


@pytest.mark.parametrize(
    "source, message",
    [
        ({"agent": {}}, "has the entries 'agent': expected 'net' and 'agent'"),
        ({"net": 3}, r"source\['net'\] must map names to tensors, got int"),
        ({"net": {1: torch.ones(1)}}, "must have names for the backbone"),
    ],
)
def test_unknown_layouts(source, message):
    with pytest.raises(ValueError, match=message):
        load_official(models.create_model("spottune_resnet26"), source)


def test_inert_objects_do_nothing(tmp_path):
    """Of a hostile file there are only objects without a behaviour."""
    path = tmp_path / "acts.t7"
    torch.save({"a": Effect(), "b": torch.arange(3.0), "c": collections.OrderedDict(d=io.BytesIO)}, path)
    loaded = load_inert(path)
    assert not Effect.happened and torch.equal(loaded["b"], torch.arange(3.0))
    assert state_of(loaded["a"]) is None and state_of(object()) is None


def stream(main, path):
    """A file of the older format with that pickle in it, and no storages."""
    parts = [pickle.dumps(0x1950A86A20F9469CFC6C, 2), pickle.dumps(1001, 2), pickle.dumps({}, 2), main]
    path.write_bytes(b"".join([*parts, pickle.dumps([], 2)]))
    return path


HOSTILE = {
    "calls": b"\x80\x02cos\nsystem\nU\x0etouch happened\x85R.",
    "instance": b"\x80\x02(U\x0etouch happenedios\nsystem\n.",
    "build on a function": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}U\x08__name__U\x08poisoneds\x86b.",
    "build on a class": b"\x80\x02ctorch\nFloatStorage\nN}U\x08poisonedU\x03yess\x86b.",
    "a class whose source changed": (
        b"\x80\x02(U\x06modulecm\nhappened\nN}(U\x0cdump_patchesI01\nU\x0c__qualname__U\x08Identityu\x86b"
        b"U\x01fU\x05othertQ."
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files(name, tmp_path, monkeypatch):
    """Nothing runs, nothing is written, and torch is what it was."""
    monkeypatch.chdir(tmp_path)
    path = stream(HOSTILE[name], tmp_path / "hostile.t7")
    load_inert(path)
    with pytest.raises(ValueError):
        load_official(models.create_model("spottune_resnet26"), path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["hostile.t7"]
    assert torch._utils._rebuild_tensor_v2.__name__ == "_rebuild_tensor_v2"
    assert not hasattr(torch.FloatStorage, "poisoned")


def test_files_of_other_versions_of_the_classes(authors_code, tmp_path, monkeypatch):
    """The older format holds the source code of every class, which is another one today."""
    source, path = checkpoint(), tmp_path / "set.t7"
    other = lambda kind: (["class Other:\n"], 1, "other.py")  # noqa: E731
    monkeypatch.setattr(torch.serialization, "get_source_lines_and_file", other, raising=False)
    modules = {part: Pickled(state) for part, state in source.items()}
    torch.save(modules, path, _use_new_zipfile_serialization=False)
    assert b"class Other" in path.read_bytes()
    net = models.create_model("spottune_resnet26")
    load_official(net, path)
    assert is_loaded(net, source)


def inert_module(**attributes):
    module = Inert()
    module.attributes = {"_parameters": {}, "_buffers": {}, "_modules": {}} | attributes
    return module


def test_modules_that_hold_each_other():
    loop, leaf = inert_module(), inert_module(_parameters={"weight": torch.ones(1)})
    loop.attributes["_modules"]["again"] = loop
    for module in (loop, inert_module(_buffers=3), inert_module(_modules={1: leaf})):
        with pytest.raises(ValueError, match="a pickled module must"):
            state_of(module)
    many = leaf
    for _ in range(20):  # a million in a few bytes
        many = inert_module(_modules={"a": many, "b": many})
    with pytest.raises(ValueError, match="nor 10000 others"):
        state_of(many)
    assert state_of(inert_module(_modules={"a": leaf, "b": leaf})).keys() == {"a.weight", "b.weight"}


@pytest.mark.parametrize("zipped", [False, True])
def test_damaged_files_of_modules(authors_code, tmp_path, zipped):
    path = tmp_path / "set.t7"
    torch.save({"net": Pickled(official_state("agent", "spottune"))}, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    net = models.create_model("spottune_resnet26")
    for end in (len(whole) // 3, len(whole) - 40):
        path.write_bytes(whole[:end])
        with pytest.raises(ValueError, match="damaged"):
            load_official(net, path)
