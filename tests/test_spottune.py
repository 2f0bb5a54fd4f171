"""SpotTune: structure, what each image runs, the policy, published checkpoints."""

import collections
import copy
import io
import pickle
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from official_keys import official_shapes, official_state
from torch import nn
from toys import decision_patterns, finish

import dynexec
from dynexec import models
from dynexec.executors.proof import relative_error
from dynexec.measure import count_flops
from dynexec.models import load_official
from dynexec.models.inert import Inert, load_inert, state_of
from dynexec.policy import exponential_temperature

EXACT = 1e-5


def small(**options):
    """Five blocks in three segments."""
    net = models.spottune_resnet26(blocks=(2, 1, 2), widths=(6, 8, 12), stem_width=3, num_classes=5, **options)
    finish(net)
    for block in (block for segment in net.backbone.parallel_blocks for block in segment):
        finish(block, seed=1)
    return net


def masked_forward(net, images, weights, *, relu_behind_stem=False, swapped=False):
    """The published arithmetic: both sets of weights on all images, multiplied by the mask."""
    backbone = net.backbone
    x = backbone.bn1(backbone.conv1(images))
    x = F.relu(x) if relu_behind_stem else x
    column = 0
    for segment, parallel in zip(backbone.blocks, backbone.parallel_blocks):
        for number, pair in enumerate(zip(segment, parallel)):
            a = weights[:, column].reshape(-1, 1, 1, 1)
            a = 1 - a if swapped else a
            shortcut = x
            if number == 0:
                half = F.avg_pool2d(x, 2)
                missing = pair[0].conv1.out_channels - half.shape[1]
                shortcut = torch.cat((half, half.new_zeros(len(half), missing, *half.shape[2:])), 1)
            first, second = (F.relu(shortcut + b.bn2(b.conv2[1](F.relu(b.bn1(b.conv1(x)))))) for b in pair)
            x = first * (1 - a) + second * a
            column += 1
    x = F.relu(backbone.bn2[0](x))
    return backbone.linear(x.mean((2, 3)))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("samples", [1, 5])
def test_output_is_that_of_the_masked_network(samples, layout):
    net = small()
    images = torch.randn(samples, 3, 24, 40).contiguous(memory_format=layout)
    frozen = dynexec.freeze(net, images)
    for _, decisions in decision_patterns(samples, 5):
        with torch.no_grad():
            expected = masked_forward(net, images, decisions.float())
            for mode in ("exact", "capacity"):
                assert relative_error(net(images, decisions, mode=mode), expected) <= EXACT
            assert relative_error(net(images, soft_decisions=decisions.float()), expected) <= EXACT
        assert relative_error(frozen(images, decisions), expected) <= EXACT
        assert torch.equal(frozen(images, decisions), frozen(images, decisions))


def test_traps():
    """A ReLU behind the stem, or True for the pre-trained weights, would be another network."""
    net = small()
    images, decisions = torch.randn(4, 3, 24, 24), torch.rand(4, 5) < 0.5
    with torch.no_grad():
        y = net(images, decisions)
        for trap in ({"relu_behind_stem": True}, {"swapped": True}):
            assert relative_error(masked_forward(net, images, decisions.float(), **trap), y) > 0.02


def test_soft_decisions_train_the_policy():
    """Gradients reach the policy through the weights, as through the published arithmetic."""
    net = small().train()
    twin = copy.deepcopy(net)
    images = torch.randn(4, 3, 16, 16)
    generator = torch.Generator().manual_seed(3)
    weights = net.policy.sample_soft(images, generator=generator)
    assert set(weights.detach().unique().tolist()) <= {0.0, 1.0} and weights.shape == (4, 5)
    net(images, soft_decisions=weights).square().sum().backward()
    again = twin.policy.sample_soft(images, generator=generator.manual_seed(3))
    masked_forward(twin, images, again).square().sum().backward()
    assert net.policy.network.linear.weight.grad.abs().sum() > 0
    for (name, a), b in zip(net.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-3, msg=name)
    with pytest.raises(ValueError, match="decisions must be None"):
        net(images, weights.bool(), soft_decisions=weights)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_what_of_the_pretrained_weights_is_frozen(batch_norm):
    net = small()
    frozen = {id(parameter) for parameter in net.freeze_pretrained(batch_norm)}
    for name, parameter in net.named_parameters():
        pretrained = name.startswith("backbone.blocks.")
        expected = pretrained and (".conv" in name or batch_norm)
        assert parameter.requires_grad != expected and (id(parameter) in frozen) == expected, name


def test_policy():
    net = small()
    images = torch.randn(6, 3, 16, 16)
    with torch.no_grad():
        logits, probabilities = net.policy.logits(images), net.policy(images)
        torch.testing.assert_close(probabilities, logits.softmax(-1)[..., 1])
        y, decisions = net(images, return_decisions=True)
        assert torch.equal(decisions, logits[..., 1] >= logits[..., 0])
        assert torch.equal(net(images, decisions), y)
        frozen = dynexec.freeze(net, images)
        z, chosen = frozen(images, return_decisions=True)
        sure = (probabilities - 0.5).abs() > 1e-3
        assert torch.equal(chosen[sure], decisions[sure])
        if sure.all():
            assert relative_error(z, y) <= EXACT
        drawn = [net.policy.sample(images, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert drawn[0].dtype == torch.bool and drawn[0].shape == (6, 5)
    assert exponential_temperature(7, decay=1) == 5


def test_samples_are_drawn_with_their_probabilities():
    net = small()
    images = torch.randn(1, 3, 16, 16).expand(4000, 3, 16, 16)
    with torch.no_grad():
        row = net.policy.logits(images[:1])
        net.policy.logits = lambda images: row.expand(len(images), -1, -1)
        drawn = net.policy.sample(images, generator=torch.Generator().manual_seed(0)).float().mean(0)
        torch.testing.assert_close(drawn, net.policy(images[:1])[0], rtol=0, atol=0.04)


@pytest.mark.parametrize("style", ["exact", "frozen"])
def test_a_sample_does_not_depend_on_its_batch(style):
    net = small()
    images, decisions = torch.randn(5, 3, 16, 24), torch.rand(5, 5) < 0.5
    run = net if style == "exact" else dynexec.freeze(net, images)
    with torch.no_grad():
        whole = run(images, decisions)
        for n in range(5):
            assert relative_error(run(images[n : n + 1], decisions[n : n + 1]), whole[n : n + 1]) <= EXACT


def test_copies():
    net = small()
    images, decisions = torch.randn(3, 3, 16, 16), torch.rand(3, 5) < 0.5
    with torch.no_grad():
        y = net(images, decisions)
        for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            assert torch.equal(twin(images, decisions), y)
            twin.backbone.parallel_blocks[0][0].conv1.weight.zero_()  # the blocks use the very modules that are saved
            assert not torch.equal(twin(images, torch.ones(5).bool()), net(images, torch.ones(5).bool()))
        other = models.spottune_resnet26(blocks=(2, 1, 2), widths=(6, 8, 12), stem_width=3, num_classes=5).eval()
        other.load_state_dict(net.state_dict())
        assert torch.equal(other(images, decisions), y)


@pytest.mark.parametrize(
    "decisions, error, message",
    [
        (torch.ones(3, 4).bool(), ValueError, "decisions has 4 columns"),
        (torch.ones(2, 5).bool(), ValueError, "decisions has 2 rows"),
        (torch.ones(3, 5), TypeError, "decisions must be bool"),
        (torch.ones(3, 5).long(), TypeError, "use decisions.bool"),
    ],
)
def test_wrong_decisions(decisions, error, message):
    net = small()
    images = torch.randn(3, 3, 16, 16)
    with pytest.raises(error, match=message):
        net(images, decisions)
    with pytest.raises(error):
        dynexec.freeze(net, images)(images, decisions)


@pytest.mark.parametrize("shape", [(2, 3, 20, 16), (2, 3, 16, 9), (3, 16, 16)])
def test_images_that_cannot_be_halved(shape):
    with pytest.raises(ValueError, match="images must be .* multiples of 8"):
        small()(torch.randn(shape))


def test_policy_must_fit():
    with pytest.raises(ValueError, match="policy gives 6 logits, but backbone has 2 blocks"):
        models.SpotTune(
            models.spottune.SpotTuneResNet((1, 1), (4, 8), 5),
            models.spottune.SpotTunePolicy(models.spottune.SpotTuneResNet((1, 1), (4, 8), 6, choices=False)),
        )


def test_flops():
    """Whatever is decided, an image runs one path (2.16 GFLOPs at 72 pixels) and the policy (0.439)."""
    with torch.device("meta"):
        net = models.create_model("spottune_resnet26")
        flops = count_flops(net, torch.empty(1, 3, 72, 72))
    assert (round(flops.dense / 1e9, 2), round(flops.policy / 1e9, 3)) == (2.16, 0.439)
    assert flops.block == (0,) * 12
    both = 2 * flops.dense - 2 * (72 * 72 * 32 * 27 + 256 * 10)  # stem and classifier run once
    assert round(both / 1e9, 2) == 4.31
    assert flops.of(torch.rand(2, 12) < 0.5).tolist() == [flops.dense + flops.policy] * 2


# Published checkpoints


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


class Effect:
    happened = False

    def __reduce__(self):
        return Effect.act, ()

    @staticmethod
    def act():
        Effect.happened = True


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


def test_what_is_no_tree_of_modules():
    loop = inert_module()
    loop.attributes["_modules"]["again"] = loop
    leaf = inert_module()
    for module in (
        loop,
        inert_module(_modules={"a": leaf, "b": leaf}),
        inert_module(_buffers=3),
        inert_module(_modules={1: leaf}),
    ):
        with pytest.raises(ValueError, match="a pickled module must"):
            state_of(module)


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
