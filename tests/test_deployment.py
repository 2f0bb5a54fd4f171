"""save and load: what was frozen here is frozen there, and a folder that is not what was saved says so."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import toys
from torch import nn

import dynexec
from dynexec.deployment.network import describe
from dynexec.executors.proof import relative_error
from dynexec.models import create_model, spottune_resnet26
from dynexec.nn import Adapter, DynamicNetwork

safetensors = pytest.importorskip("safetensors.torch")
saving = sys.modules["dynexec.deployment.save"]  # the module: the package has the function under this name
MANIFEST, WEIGHTS, EXAMPLE = "manifest.json", "weights.safetensors", "example.safetensors"


def blockdrop():
    return toys.finish(create_model("blockdrop_resnet32_cifar10", blocks=(1, 2, 1), widths=(4, 8, 8), num_classes=3))


def same(frozen, net, inputs, decisions):
    with torch.no_grad():
        return relative_error(frozen(inputs, decisions), net(inputs, decisions)) < 1e-4


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder, and the network in it; not to be changed."""
    torch.manual_seed(0)
    folder, net = tmp_path_factory.mktemp("saved") / "net", blockdrop()
    dynexec.save(net, folder, torch.randn(3, 3, 16, 16))
    return folder, net


def test_another_process_loads_it(saved, tmp_path):
    folder, net = saved
    x, decisions = torch.randn(5, 3, 16, 16), torch.rand(5, 4) < 0.5
    with torch.no_grad():
        expected = [net(x, decisions), *net(x, return_decisions=True)]
    safetensors.save_file({"x": x, "decisions": decisions}, tmp_path / "asked")
    program = """
import sys, dynexec, safetensors.torch
folder, asked, answer = sys.argv[1:]
frozen, given = dynexec.load(folder), safetensors.torch.load_file(asked)
outputs = [frozen(**given), *frozen(given["x"], return_decisions=True)]
safetensors.torch.save_file({str(number): output.contiguous() for number, output in enumerate(outputs)}, answer)
"""
    subprocess.run([sys.executable, "-c", program, folder, tmp_path / "asked", tmp_path / "answer"], check=True)
    answer = safetensors.load_file(tmp_path / "answer")
    assert relative_error([answer[str(number)].double() for number in range(3)], expected) < 1e-4


@pytest.mark.parametrize("style", toys.STYLES)
def test_converted_models(style, tmp_path):
    model, twin, blocks = toys.converted(style)
    policy = toys.Policy(blocks)
    dynexec.save(model, tmp_path / "net", toys.images(3), policy=policy)
    unconverted, other = toys.finish(copy.deepcopy(twin), seed=1), toys.Policy(blocks)
    before = copy.deepcopy(unconverted.state_dict())
    x, decisions = toys.images(4), torch.rand(4, blocks) < 0.5
    net = DynamicNetwork(model, policy)
    dynexec.convert(twin)
    for given in ((unconverted, other), (twin, other), (DynamicNetwork(twin, other), None)):
        frozen = dynexec.load(tmp_path / "net", given[0], policy=given[1])
        assert same(frozen, net, x, decisions)
        assert torch.equal(frozen(x, return_decisions=True)[1], policy(x) >= 0.5)
    assert all(torch.equal(value, before[name]) for name, value in unconverted.state_dict().items())
    assert type(unconverted.layers[0][0]) is type(toys.STYLES[style]().layers[0][0])


def test_two_sets_of_weights(tmp_path):
    model, twin = toys.torchvision_style(), toys.torchvision_style()
    blocks = dynexec.convert(model, match="layers.1.*", fine_tune="convolutions").num_blocks
    for block in model.layers[1]:
        toys.finish(block.fine_tuned, seed=2)
    dynexec.save(model, tmp_path / "net", toys.images(2))
    frozen = dynexec.load(tmp_path / "net", twin)
    x, decisions = toys.images(4), torch.rand(4, blocks) < 0.5
    assert same(frozen, DynamicNetwork(model), x, decisions)


def test_networks_by_name(tmp_path):
    nets = {
        "spottune": toys.finish(create_model("spottune_resnet26", blocks=(1, 1, 1), widths=(8, 8, 8), num_classes=3)),
        "adashare": toys.finish(
            create_model("adashare_resnet18", num_classes=[3, 2], blocks=(1, 1, 1, 1), widths=(4, 8, 8, 8))
        ),
    }
    x = torch.randn(2, 3, 32, 32)
    for name, net in nets.items():
        dynexec.save(net, tmp_path / name, x)
        frozen = dynexec.load(tmp_path / name)
        with torch.no_grad():
            expected, decided = net(x, return_decisions=True)
        outputs, used = frozen(x, return_decisions=True)
        assert relative_error(outputs, expected) < 1e-4 and torch.equal(used, decided)


def test_inputs_by_name(tmp_path):
    """A network of parts whose inputs are a dict, and more of them than the example keeps."""
    net = toys.finish(
        create_model("adamml", modalities=("rgb", "sound"), num_classes=3, num_frames=1, depth=18, policy_size=32)
    )
    inputs = {"rgb": torch.randn(9, 1, 1, 3, 32, 32), "sound": torch.randn(9, 1, 1, 1, 32, 32)}
    dynexec.save(net, tmp_path / "net", inputs)
    assert json.loads((tmp_path / "net" / MANIFEST).read_text())["batch_size"] == 9
    frozen, few = dynexec.load(tmp_path / "net"), {name: value[:2] for name, value in inputs.items()}
    decisions = torch.tensor([[[True, False]], [[True, True]]])
    assert same(frozen, net, few, decisions)
    with pytest.raises(ValueError, match="policy must be None for a network that has its own"):
        dynexec.load(tmp_path / "net", net, policy=toys.Policy(4))


def test_autocast_changes_nothing_of_what_is_saved(saved, tmp_path):
    _, net = saved
    x = torch.randn(2, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        dynexec.save(net, tmp_path / "net", x)
    dynexec.load(tmp_path / "net")
    with torch.autocast("cpu", torch.bfloat16):
        dynexec.load(tmp_path / "net")


def test_tied_weights_and_other_dtypes(tmp_path):
    model = toys.torchvision_style().double()
    model.layers[0][1].conv1.weight = model.layers[0][0].conv1.weight
    model.twice = nn.Parameter(model.head.weight.data[:2])  # a part of another one's memory
    blocks = dynexec.convert(model).num_blocks
    dynexec.save(model, tmp_path / "net", toys.images(2).double())
    other = toys.torchvision_style()
    other.twice = nn.Parameter(torch.zeros(2, 16))
    frozen = dynexec.load(tmp_path / "net", other)  # float32, whose weights are not used
    x, decisions = toys.images(3).double(), torch.rand(3, blocks) < 0.5
    assert frozen.dtype == torch.float64 and same(frozen, DynamicNetwork(model), x, decisions)


def test_options_are_those_that_were_saved_unless_others_are_given(tmp_path):
    dynexec.save(blockdrop(), tmp_path / "net", torch.randn(2, 3, 16, 16), executor="masked", dtype=torch.float64)
    frozen = dynexec.load(tmp_path / "net")
    assert frozen.dtype == torch.float64 and all(stage.executor == "masked" for stage in frozen.stages)
    assert dynexec.load(tmp_path / "net", dtype=torch.float32, executor="compact").dtype == torch.float32


def test_what_load_would_refuse_is_not_saved(tmp_path):
    shapes = {"blocks": (1, 1, 1), "widths": (1, 1, 1)}
    for num_classes, is_described in ((2**20, True), (2**20 + 1, False)):
        net = create_model("blockdrop_resnet32_cifar10", **shapes, num_classes=num_classes)
        assert (describe(net)["network"] is not None) == is_described
    dynexec.save(blockdrop(), tmp_path / "net", torch.randn(2**16 + 1, 3, 4, 4))
    assert json.loads((tmp_path / "net" / MANIFEST).read_text())["batch_size"] == 2**16


def test_all_differences_to_the_users_model_are_named(tmp_path):
    model, twin, _ = toys.converted()
    dynexec.save(model, tmp_path / "net", toys.images(2))
    twin.head = nn.Linear(16, 9)
    twin.more = nn.Linear(2, 2, bias=False)
    del twin.stem[1]
    before = copy.deepcopy(twin.state_dict())
    with pytest.raises(ValueError) as caught:
        dynexec.load(tmp_path / "net", twin)
    for word in ("missing: backbone.more.weight", "unexpected: backbone.stem.1.", "backbone.head.weight (5, 16)"):
        assert word in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in twin.state_dict().items())


def test_code_that_computes_something_else_is_found(tmp_path):
    model, twin, blocks = toys.converted()
    policy = toys.Policy(blocks)
    dynexec.save(model, tmp_path / "net", toys.images(2), policy=policy)
    changed = copy.deepcopy(twin)
    changed.stem[1].eps = 0.1
    with pytest.raises(RuntimeError, match="the output differs by"):
        dynexec.load(tmp_path / "net", changed, policy=policy)

    class Opposite(toys.Policy):
        def forward(self, images):
            return 1 - super().forward(images)

    with pytest.raises(RuntimeError, match="policy decides otherwise"):
        dynexec.load(tmp_path / "net", twin, policy=Opposite(blocks))


def test_what_an_adapter_split_must_be_converted_again(tmp_path):
    model, twin = toys.torchvision_style(), toys.torchvision_style()
    match = Adapter(toys.BasicBlock)
    dynexec.convert(model.layers[0], match=match)
    dynexec.save(model, tmp_path / "net", toys.images(2))
    with pytest.raises(ValueError, match="convert it as it was when saved"):
        dynexec.load(tmp_path / "net", twin)
    dynexec.convert(twin.layers[0], match=match)
    x, decisions = toys.images(3), torch.rand(3, 2) < 0.5
    assert same(dynexec.load(tmp_path / "net", twin), DynamicNetwork(model), x, decisions)


def test_a_network_that_was_not_made_by_name_needs_the_model(tmp_path):
    net = toys.finish(spottune_resnet26(blocks=(1, 1), widths=(8, 8), num_classes=3))
    dynexec.save(net, tmp_path / "net", torch.randn(2, 3, 16, 16))
    with pytest.raises(ValueError, match="model must be given"):
        dynexec.load(tmp_path / "net")
    dynexec.load(tmp_path / "net", spottune_resnet26(blocks=(1, 1), widths=(8, 8), num_classes=3))


def test_a_network_that_was_changed_after_it_was_created_needs_the_model(tmp_path):
    net = blockdrop()
    net.backbone.fc = nn.Linear(8, 9)
    dynexec.save(net, tmp_path / "net", torch.randn(2, 3, 16, 16))
    assert json.loads((tmp_path / "net" / MANIFEST).read_text())["network"] is None


def test_an_interrupted_save_leaves_the_old_folder_or_none(tmp_path, monkeypatch):
    net, x, folder = blockdrop(), torch.randn(2, 3, 16, 16), tmp_path / "net"

    def interrupt(*_):
        raise KeyboardInterrupt

    rename = Path.rename

    def interrupt_the_last_one(path, target):
        made = target == folder and not path.name.endswith(".old")
        return interrupt() if made else rename(path, target)

    steps = [(Path, "write_bytes", interrupt), (saving.Manifest, "write", interrupt), (saving, "_sync", interrupt)]
    steps.append((Path, "rename", interrupt_the_last_one))
    for old in (None, "there"):
        if old is not None:
            dynexec.save(net, folder, x)
        before = {path.name: path.read_bytes() for path in folder.iterdir()} if old else None
        for owner, name, function in steps:
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(owner, name, function)
                dynexec.save(net, folder, x)
            assert sorted(tmp_path.iterdir()) == ([folder] if old else [])
            assert old is None or before == {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("old", [False, True])
def test_another_process_saves_at_the_same_time(tmp_path, monkeypatch, old):
    """Its folder gets in between, once before ours and once where the old one was."""
    net, x, folder = blockdrop(), torch.randn(2, 3, 16, 16), tmp_path / "net"
    if old:
        dynexec.save(net, folder, x)
    rename, others = Path.rename, []

    def meanwhile(path, target):
        if target == folder and len(others) < 2:
            others.append(path)
            folder.mkdir()
            for name in (MANIFEST, WEIGHTS, EXAMPLE):
                (folder / name).write_text("of the other process")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", meanwhile)
    dynexec.save(net, folder, x)
    assert len(others) == 2 and [path.name for path in tmp_path.iterdir()] == ["net"]
    assert same(dynexec.load(folder), net, x, torch.ones(4, dtype=torch.bool))


def test_what_appears_meanwhile_and_is_not_ours_is_left_alone(tmp_path, monkeypatch):
    rename, folder, others = Path.rename, tmp_path / "net", []

    def meanwhile(path, target):
        if target == folder and not others:
            others.append(path)
            folder.mkdir()
            (folder / "thesis.txt").write_text("mine")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", meanwhile)
    with pytest.raises(FileExistsError, match="holds other things"):
        dynexec.save(blockdrop(), folder, torch.randn(2, 3, 16, 16))
    assert (folder / "thesis.txt").read_text() == "mine" and [path.name for path in tmp_path.iterdir()] == ["net"]


def test_folders_with_the_names_of_files_are_left_alone(tmp_path):
    for name in (MANIFEST, WEIGHTS, EXAMPLE):
        (tmp_path / "net" / name).mkdir(parents=True)
    with pytest.raises(FileExistsError, match="holds other things"):
        dynexec.save(blockdrop(), tmp_path / "net", torch.randn(2, 3, 16, 16))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs to lack a device")
@pytest.mark.parametrize("device", ["cuda", "cuda:3"])
def test_a_device_that_is_not_there(saved, device):
    with pytest.raises(ValueError, match=f"^device must be one that torch can use here, got '{device}': "):
        dynexec.load(saved[0], device=device)


def test_an_example_of_another_dtype(tmp_path):
    net, x = blockdrop(), torch.randn(2, 3, 16, 16)
    dynexec.save(net, tmp_path / "net", x.double())
    assert same(dynexec.load(tmp_path / "net"), net, x, torch.ones(4, dtype=torch.bool))


def test_an_old_folder_is_replaced_and_another_one_left_alone(tmp_path):
    net, x, folder = blockdrop(), torch.randn(2, 3, 16, 16), tmp_path / "net"
    dynexec.save(net, folder, x)
    with torch.no_grad():
        net.backbone.fc.weight.mul_(2)
    dynexec.save(net, folder, x)
    assert [path.name for path in tmp_path.iterdir()] == ["net"]
    assert same(dynexec.load(folder), net, x, torch.ones(4, dtype=torch.bool))
    other = tmp_path / "other"
    other.mkdir()
    dynexec.save(net, other, x)
    for path in other.iterdir():
        path.unlink()
    (other / "thesis.txt").write_text("mine")
    for name in ("one", MANIFEST, WEIGHTS, EXAMPLE):
        with pytest.raises(FileExistsError, match="holds other things"):
            dynexec.save(net, other, x)
        (other / name).write_text("mine, too")
    with pytest.raises(FileExistsError, match="holds other things"):
        dynexec.save(net, other / "one", x)
    assert (other / "thesis.txt").read_text() == "mine" and len(list(tmp_path.iterdir())) == 2


def test_bad_arguments(saved, tmp_path):
    folder, net = saved
    x = torch.randn(2, 3, 16, 16)
    for error, message, arguments in (
        (ValueError, "no dynamic blocks", (toys.torchvision_style(), tmp_path / "net", x)),
        (ValueError, r"\[N, C, H, W\]", (net, tmp_path / "net", x[0])),
        (
            TypeError,
            "example_input must be of floating-point numbers, got torch.int64",
            (net, tmp_path / "net", x.long()),
        ),
        (FileNotFoundError, "in a folder that exists, got '.*/missing/net'$", (net, tmp_path / "missing" / "net", x)),
        (FileNotFoundError, f"got '.*{MANIFEST}/net'$", (net, folder / MANIFEST / "net", x)),
    ):
        with pytest.raises(error, match=message):
            dynexec.save(*arguments)
    for error, message, options in (
        (ValueError, "executor must be None or one of .*'switched'.*, got 1", {"executor": 1}),
        (ValueError, "executor must be None or one of .*, got 'quick'", {"executor": "quick"}),
        (TypeError, "winograd must be True or False", {"winograd": 1}),
        (ValueError, "dtype must be None or one of", {"dtype": torch.float8_e5m2}),
    ):
        with pytest.raises(error, match=message):
            dynexec.save(net, tmp_path / "net", x, **options)
    with pytest.raises(TypeError, match="model must be an nn.Module or None"):
        dynexec.load(folder, "blockdrop")
    with pytest.raises(ValueError, match="policy must be None"):
        dynexec.load(folder, policy=toys.Policy(4))
    assert not list(tmp_path.iterdir())


def test_without_safetensors(saved, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"pip install 'dynexec\[deploy\]'"):
        dynexec.load(saved[0])
