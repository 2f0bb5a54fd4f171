"""Baselines compute what the network computes, and what does not is found before it is timed."""

import json
from functools import partial

import pytest
import torch
import toys
from bench_toys import EAGER, TINY, ShiftsColumns, run, tiny

from dynexec import convert, decide
from dynexec.report import baselines, nets, rows, tables


@pytest.fixture(scope="module")
def model():
    return nets.build(TINY)


@pytest.fixture(scope="module")
def images():
    return nets.make_images(4, 16)


def converted(style):
    model = toys.STYLES[style]()
    return model, convert(model).num_blocks


@pytest.mark.parametrize("style", toys.STYLES)
@pytest.mark.parametrize("baseline", [*EAGER, baselines.DenseFrozen, baselines.Dynexec], ids=lambda b: b.name)
def test_baselines_compute_the_same(style, baseline):
    model, num_blocks = converted(style)
    images = toys.images(5)
    candidate = baseline(model, images, threads=1)
    choices = [torch.rand(5, num_blocks) < 0.5, torch.zeros(5, num_blocks) > 0, torch.ones(5, num_blocks) > 0]
    for decisions in choices:
        with torch.inference_mode(), decide(torch.ones_like(decisions) if baseline.dense else decisions):
            expected = model(images)
        with torch.inference_mode():
            torch.testing.assert_close(candidate(images, decisions), expected, rtol=1e-4, atol=1e-4)


def test_baselines_leave_the_model_alone(model, images):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    run(model, images)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("baseline", [baselines.OnnxRuntime, baselines.OpenVino], ids=lambda b: b.name)
@pytest.mark.parametrize("own", [True, False])
def test_exported_baselines_compute_the_same(model, baseline, own):
    if baseline.missing():
        pytest.skip(baseline.missing())
    network = model if own else converted("mobilenet")[0]
    images = nets.make_images(3, 16)
    with torch.inference_mode():
        expected = getattr(network, "backbone", network)(images)
        output = baseline(network, images, threads=1)(images, None)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)


def test_compiled_baseline_computes_the_same():
    if baselines.DenseCompiled.missing():
        pytest.skip(baselines.DenseCompiled.missing())
    model, images = nets.build(nets.Net(lambda: tiny((1,) * 2), 8, (2,))), nets.make_images(2, 8)
    with torch.inference_mode():
        output = baselines.DenseCompiled(model, images, threads=1)(images, None)
        torch.testing.assert_close(output, model.backbone(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("own", [True, False])
def test_the_librarys_baseline_runs_every_convolution_folded(model, own, monkeypatch):
    """And in one call each: with its bias, which BatchNorm is folded into, its addition and its ReLU.

    The bias of a projection shortcut is added by the convolution that the shortcut is added to.
    """
    pytest.importorskip("triton", reason="needs Triton")
    from dynexec.executors import launch_program
    from dynexec.kernels import conv

    class AsItIs:  # no graph, which only a GPU has
        def __init__(self, function, layout):
            self.function, self.failed = function, {}

        def __call__(self, images, decisions, variant):
            return self.function(images, decisions)

    ran, run = [], launch_program._run_by_library
    monkeypatch.setattr(baselines, "Graphs", AsItIs)
    monkeypatch.setattr(launch_program, "_run_by_library", lambda step, *rest: ran.append(step) or run(step, *rest))
    monkeypatch.setattr(conv, "conv", None)  # none of our own
    network = model if own else converted("timm")[0]
    backbone, images = getattr(network, "backbone", network), nets.make_images(3, 16)
    with torch.inference_mode():
        library = baselines.DenseLibrary(network, images, threads=1)
        output = library(images, None)
        torch.testing.assert_close(output, backbone(images), rtol=1e-4, atol=1e-4)
    layers = sum(isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)) for module in backbone.modules())
    assert len(ran) == layers
    projections = 0 if own else sum(getattr(block, "downsample", None) is not None for block in backbone.modules())
    assert sum(step.conv.bias is None for step in ran) == projections
    assert own or projections > 0
    library.graphs.failed["dense"] = "out of memory"
    with pytest.raises(RuntimeError, match="no CUDA graph: out of memory"):
        library(images, None)


def test_a_projection_that_is_not_the_librarys_keeps_its_bias():
    """With more padding on one side than on the other, a kernel of ours runs it."""
    pytest.importorskip("triton", reason="needs Triton")

    class Uneven(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 8, 3, 2, 1)
            self.shortcut = torch.nn.Sequential(torch.nn.ZeroPad2d((0, 1, 0, 1)), torch.nn.Conv2d(3, 8, 3, 2))

        def forward(self, x):
            return torch.relu(self.conv(x) + self.shortcut(x))

    net, x = Uneven().eval(), torch.randn(2, 3, 8, 8)
    with torch.inference_mode():
        packed = baselines.pack_module(net.to(memory_format=torch.channels_last), x)
        module, _ = baselines.make_segments(packed.__self__, partial(baselines.LibraryPrograms, 0))
        torch.testing.assert_close(module.forward(x), net(x), rtol=1e-4, atol=1e-4)


def test_missing_packages_and_failures_are_said(model, images):
    class Absent(baselines.DenseEager):
        name, needs = "absent", ("no_such_package",)

    class Broken(baselines.DenseEager):
        name = "broken"

        def prepare(self, model, images, threads):
            raise NotImplementedError("no such layer\nand more")

    (row,) = run(model, images, baselines=(*EAGER, Absent, Broken))
    assert row["unavailable"] == {
        "absent": "not installed: no_such_package",
        "broken": "NotImplementedError: no such layer",
    }
    assert "not installed" in tables.markdown([row])


class IgnoresDecisions(baselines.Dynexec):
    def __call__(self, images, decisions):
        return super().__call__(images, torch.ones_like(decisions))


class SwapsSamples(baselines.Dynexec):
    def __call__(self, images, decisions):
        return super().__call__(images, decisions).flip(0)


class LosesOneSample(baselines.Dynexec):
    def __call__(self, images, decisions):
        logits = super().__call__(images, decisions).clone()
        logits[-1] = float("nan")
        return logits


@pytest.mark.parametrize("wrong", [IgnoresDecisions, ShiftsColumns, SwapsSamples, LosesOneSample])
def test_gate_catches_a_wrong_executor(model, images, wrong):
    (row,) = run(model, images, executor=wrong)
    assert row["failed"] == ["dynexec"]
    assert "dynexec" not in row["milliseconds"] and "masked eager" in row["milliseconds"]
    assert (row["realised"], row["efficiency"], row["saved_share"], row["planning_share"]) == (None,) * 4
    assert row["realised_against"] == {}
    assert "WRONG: dynexec" in tables.markdown([row])
    rows.check_row(json.loads(json.dumps(row, allow_nan=False)))


def test_gate_catches_a_wrong_baseline(model, images):
    class Fast(baselines.DenseEager):
        name = "fast"

        def __call__(self, images, decisions):
            return torch.zeros(len(images), 5)

    (row,) = run(model, images, baselines=(*EAGER, Fast))
    assert row["failed"] == ["fast"] and "fast" not in row["milliseconds"]
    assert row["strongest_dense"] == "dense eager" and row["realised"] is not None


def test_gate_passes_a_right_executor(model, images):
    for row in run(model, images, keeps=(0.0, 0.5, 1.0)):
        assert row["failed"] == [] and row["max_error"]["dynexec"] < 1e-5
        assert row["realised"] > 0


def test_gate_needs_decisions_that_matter(images):
    model = nets.build(TINY)
    for block in (block for segment in model.backbone.blocks for block in segment):
        block.bn2.weight.zero_()
        block.bn2.bias.zero_()
    with pytest.raises(ValueError, match="prove nothing"):
        run(model, images)
