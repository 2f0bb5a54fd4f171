"""freeze: every executor gives the eager network's output, whatever the decisions, batch, layout and batch history."""

import copy
import itertools
import json
import pickle
import re
import subprocess
import sys

import pytest
import torch
import toys
from engine_programs import needs_engine
from torch import nn

import dynexec
from dynexec.executors import backends
from dynexec.executors.block import run_rows
from dynexec.executors.candidate import halves
from dynexec.executors.engine import engine_missing
from dynexec.executors.stage import EXECUTORS
from dynexec.models import adashare_resnet, create_model
from dynexec.nn.context import active_execution

TOLERANCE = 1e-5
ALL_EXECUTORS = [*EXECUTORS, *(() if engine_missing() else ("fused", "resident"))]
freezing = sys.modules["dynexec.executors.freeze"]  # the module: the package has the function under this name


@pytest.fixture
def no_engine(monkeypatch):
    """Networks run by layer, as where the native part is missing."""
    monkeypatch.setattr(backends, "engine_missing", lambda: "switched off by a test")


def converted(style):
    model = toys.STYLES[style]()
    return model, dynexec.convert(model).num_blocks


def relative_error(actual, expected):
    return float((actual - expected).abs().max() / expected.abs().max()) if expected.numel() else 0.0


@pytest.mark.parametrize("executor", [None, *ALL_EXECUTORS])
@pytest.mark.parametrize("style", toys.STYLES)
def test_frozen_network_equals_eager(style, executor):
    model, num_blocks = converted(style)
    frozen = dynexec.freeze(model, toys.images(4), executor=executor)
    for n in (1, 2, 5, 33):
        for layout in (torch.contiguous_format, torch.channels_last):
            x = toys.images(n, layout=layout)
            for name, decisions in toys.decision_patterns(n, num_blocks):
                untouched = x.clone()
                error = relative_error(frozen(x, decisions), toys.run(model, x, decisions))
                assert error < TOLERANCE, (name, n, layout)
                assert torch.equal(x, untouched)


@pytest.mark.parametrize("executor", ALL_EXECUTORS)
def test_other_image_sizes_and_an_empty_batch(executor):
    model, num_blocks = converted("timm")
    frozen = dynexec.freeze(model, toys.images(2), executor=executor)
    x = toys.images(3, size=18)
    decisions = torch.rand(3, num_blocks) < 0.5
    assert relative_error(frozen(x, decisions), toys.run(model, x, decisions)) < TOLERANCE
    assert frozen(x[:0], decisions[:0]).shape == (0, 5)


def test_float64_runs_without_onednn():
    model, num_blocks = converted("torchvision")
    frozen = dynexec.freeze(model.double(), toys.images(2).double())
    x, decisions = toys.images(3).double(), torch.rand(3, num_blocks) < 0.5
    assert relative_error(frozen(x, decisions), toys.run(model, x, decisions)) < 1e-12


@pytest.mark.parametrize("executor", [None, *ALL_EXECUTORS])
def test_autocast_changes_nothing(executor):
    model, num_blocks = converted("timm")
    x, decisions = toys.images(4), torch.rand(4, num_blocks) < 0.5
    policy = toys.Policy(num_blocks)
    expected = dynexec.freeze(model, x, executor=executor, policy=policy)(x, decisions)
    with torch.autocast("cpu", torch.bfloat16):
        frozen = dynexec.freeze(model, x, executor=executor, policy=policy)
        assert torch.equal(frozen(x, decisions), frozen(x, decisions).float())
        assert relative_error(frozen(x, decisions), expected) < 1e-6
        y, used = frozen(x, return_decisions=True)
        assert torch.is_autocast_enabled("cpu")
    assert y.dtype == torch.float32 and torch.equal(used, frozen(x, return_decisions=True)[1])


def test_nan_of_one_sample_does_not_reach_others():
    model, num_blocks = converted("torchvision")
    for executor in ALL_EXECUTORS:
        frozen = dynexec.freeze(model, toys.images(2), executor=executor)
        x = toys.images(4)
        x[1] = float("nan")
        decisions = torch.ones(4, num_blocks, dtype=torch.bool)
        decisions[1] = False
        output = frozen(x, decisions)
        others = [0, 2, 3]
        assert relative_error(output[others], toys.run(model, x[others], decisions[others])) < TOLERANCE


@pytest.mark.parametrize("executor", [None, *ALL_EXECUTORS])
def test_a_parameter_that_is_added_has_no_samples(executor):
    """Though with an example of one it has the shape of the stream."""

    class Embedded(toys.Network):
        def __init__(self):
            super().__init__(8, [[toys.BasicBlock(8, 8)]], 8)
            self.place = nn.Parameter(torch.randn(1, 8, 11, 11))

        def forward(self, x):
            x = torch.relu(self.stem[1](self.stem[0](x)) + 2 * self.place)
            return self.head(self.layers(x).mean((2, 3)))

    model = toys.finish(Embedded())
    dynexec.convert(model)
    try:
        frozen = dynexec.freeze(model, toys.images(1, size=11), executor=executor)
    except RuntimeError as error:
        assert executor == "resident" and "it does not know" in str(error)
        return
    for n in (3, 1, 0):
        x, decisions = toys.images(n, size=11), torch.rand(n, 1) < 0.5
        torch.testing.assert_close(frozen(x, decisions), toys.run(model, x, decisions), rtol=1e-4, atol=1e-5)


def test_model_and_example_are_not_changed():
    model, _ = converted("timm")
    before, x = copy.deepcopy(model.state_dict()), toys.images(2)
    untouched = x.clone()
    model.train()
    dynexec.freeze(model, x)
    assert model.training and torch.equal(x, untouched)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("channels", [7, 8])
@pytest.mark.parametrize("executor", ALL_EXECUTORS)
def test_a_stage_input_that_others_read_is_not_overwritten(executor, channels):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, channels, 3, padding=1)
            self.block = toys.BasicBlock(channels, channels)

        def forward(self, x):
            x = self.stem(x)
            return self.block(x) - 2 * x

    model = toys.finish(Twice())
    dynexec.convert(model)
    frozen = dynexec.freeze(model, toys.images(2), executor=executor)
    x, decisions = toys.images(3), torch.tensor([[True], [False], [True]])
    assert relative_error(frozen(x, decisions), toys.run(model, x, decisions)) < TOLERANCE


@pytest.mark.parametrize("samples", [1, 2, 3, 7])
@pytest.mark.parametrize("executor", ALL_EXECUTORS)
def test_samples_at_once_change_nothing(samples, executor):
    model, num_blocks = converted("torchvision")
    frozen = dynexec.freeze(model, toys.images(4), executor=executor)
    frozen.samples_at_once = samples
    for n in (0, 1, 6, 7):
        x, decisions = toys.images(n), torch.rand(n, num_blocks) < 0.5
        output, replay = frozen(x, decisions, return_decisions=True)
        assert torch.equal(replay, decisions)
        assert relative_error(output, toys.run(model, x, decisions)) < TOLERANCE


def test_a_network_that_mixes_samples_is_never_split(no_engine, monkeypatch):
    times = itertools.count(1)
    monkeypatch.setattr(
        freezing, "seconds", lambda function, device: 1000 ** next(times)
    )  # the smallest size is the fastest

    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = toys.torchvision_style()

        def forward(self, x):
            y = self.body(x)
            return y - y.mean(0)

    model = toys.finish(Centred())
    dynexec.convert(model)
    assert dynexec.freeze(model, toys.images(8)).samples_at_once is None
    separate = toys.torchvision_style()
    dynexec.convert(separate)
    assert dynexec.freeze(separate, toys.images(8)).samples_at_once is not None


def test_blocks_called_with_constants():
    class Calls(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3, padding=1)
            self.block = toys.InvertedResidual(8, 8)

        def forward(self, x):
            return self.block(self.block.expand[0].weight.sum() + self.stem(x), drop_connect_rate=0.25)

    model = toys.finish(Calls())
    dynexec.convert(model)
    frozen = dynexec.freeze(model, toys.images(2))
    x, decisions = toys.images(3), torch.tensor([[True], [False], [True]])
    assert relative_error(frozen(x, decisions), toys.run(model, x, decisions)) < TOLERANCE


def test_policy_decides_and_decisions_replay():
    net = toys.finish(create_model("blockdrop_resnet32_cifar10"))
    frozen = dynexec.freeze(net, torch.randn(2, 3, 32, 32))
    x = torch.randn(3, 3, 32, 32)
    output, decisions = frozen(x, return_decisions=True)
    with torch.no_grad():
        expected, expected_decisions = net(x, return_decisions=True)
    assert torch.equal(decisions, expected_decisions)
    assert relative_error(output, expected) < TOLERANCE
    assert torch.equal(frozen(x, decisions), output)
    assert torch.equal(frozen(x, decisions[0]), frozen(x, decisions[:1].expand(3, -1)))


@needs_engine
def test_hooks_of_the_backward_pass_cost_nothing():
    model, num_blocks = converted("torchvision")
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.BatchNorm2d)):
            module.register_full_backward_hook(lambda *_: None)
    frozen = dynexec.freeze(model, toys.images(2), executor="resident")
    x, decisions = toys.images(3), torch.rand(3, num_blocks) < 0.5
    assert relative_error(frozen(x, decisions), toys.run(model, x, decisions)) < 1e-5


def test_hooked_layers_still_run():
    model, num_blocks = converted("torchvision")
    model.layers[0][0].conv1.register_forward_hook(lambda module, inputs, output: 2 * output)
    frozen = dynexec.freeze(model, toys.images(2))
    x, decisions = toys.images(3), torch.ones(num_blocks, dtype=torch.bool)
    assert relative_error(frozen(x, decisions), toys.run(model, x, decisions)) < TOLERANCE


def test_executor_with_wrong_output_is_refused(monkeypatch, no_engine):
    model, num_blocks = converted("torchvision")
    run = EXECUTORS["grouped"].run
    monkeypatch.setattr(EXECUTORS["grouped"], "run", lambda stage, x, parts: run(stage, x, parts) * 1.01)
    frozen = dynexec.freeze(model, toys.images(2))
    assert all("grouped" in stage.refused for stage in frozen.stages)
    assert "grouped refused" in frozen.explain()
    with monkeypatch.context() as patch:
        patch.setattr(EXECUTORS["grouped"], "prepare", lambda *_: pytest.fail("samples are grouped for nothing"))
        frozen(toys.images(4), torch.rand(4, num_blocks) < 0.5)
    with pytest.raises(RuntimeError, match="grouped"):
        dynexec.freeze(model, toys.images(2), executor="grouped")


def test_nobody_waits_for_a_device_to_say_which_rows_run():
    """The meta device stands in for a GPU: it has no values to read."""
    x, index = torch.empty(5, 8, 3, 3, device="meta"), torch.empty(3, dtype=torch.int32, device="meta")
    sizes = []
    assert run_rows(lambda x, s: sizes.append(len(x)) or x, x, x, index, 2) is x and sizes == [2, 1]


def test_cheapest_executor_is_chosen_per_stage_and_route(no_engine):
    model, num_blocks = converted("torchvision")
    frozen = dynexec.freeze(model, toys.images(4))
    for _, decisions in toys.decision_patterns(4, num_blocks):
        route = dynexec.Route.from_decisions(decisions)
        for stage in frozen.stages:
            seconds, _ = stage.predict(route)
            assert seconds[stage.choose(route)[0]] == min(seconds.values())
    assert all(word in frozen.explain() for word in ("stage 0", "compact", "masked", "grouped", "keep 0.5"))


def test_costs_are_measured_once_and_those_of_another_version_are_replaced(tmp_path, no_engine):
    model, _ = converted("torchvision")
    path = tmp_path / "costs.json"
    path.write_text("")  # as of tempfile
    dynexec.freeze(model, toys.images(2), cost_cache=path)
    first = json.loads(path.read_text())
    assert first["version"] == 1 and len(first["entries"]) == 4  # three kinds of block, and samples at once
    dynexec.freeze(model, toys.images(2), cost_cache=path)
    assert json.loads(path.read_text()) == first
    path.write_text(json.dumps({**first, "version": 0}))
    dynexec.freeze(model, toys.images(2), cost_cache=path)
    assert json.loads(path.read_text())["version"] == 1


def test_another_process_finds_the_costs(tmp_path):
    """Among them those of a shortcut with F.pad, a function, whose repr has its address."""
    path = tmp_path / "costs.json"
    program = (
        "import sys, dynexec, torch; from dynexec.models import create_model;"
        "model = create_model('blockdrop_resnet32_cifar10').backbone.eval();"
        "dynexec.freeze(model, torch.rand(2, 3, 32, 32), cost_cache=sys.argv[1])"
    )
    found = []
    for _ in range(2):
        subprocess.run([sys.executable, "-c", program, path], check=True)
        found.append(json.loads(path.read_text())["entries"])
    assert len(found[0]) >= 4 and found[0] == found[1]


@pytest.mark.parametrize("n", [0, 1, 2, 5, 64])
def test_half_of_the_samples_keep_a_block(n):
    half = halves(n, 40)
    assert half.shape == (n, 40) and half.dtype == torch.bool
    for size in (n - n % 2, n // 4 * 2):
        assert (half[:size].sum(0) * 2 == size).all()
    assert n < 2 or 0 < half[0].sum() < 40
    assert n < 5 or not torch.equal(half[0], half[2])


def test_memory_does_not_grow_over_a_thousand_calls():
    resident = lambda: int(open("/proc/self/statm").read().split()[1])  # pages  # noqa: E731, SIM115
    model, num_blocks = converted("timm")
    frozen = dynexec.freeze(model, toys.images(8))
    x = toys.images(8, size=32)
    for _ in range(200):
        frozen(x, torch.rand(8, num_blocks) < torch.rand(()))
    before = resident()
    for _ in range(1000):
        frozen(x, torch.rand(8, num_blocks) < torch.rand(()))
    assert resident() - before < 500  # 2 MB


@pytest.mark.parametrize(
    ("decisions", "error", "message"),
    [
        (None, ValueError, "no policy"),
        (torch.ones(3, 4, dtype=torch.bool), ValueError, r"\[3, 5\] or \[5\]"),
        (torch.ones(2, 5, dtype=torch.bool), ValueError, r"\[3, 5\]"),
        (torch.full((3, 5), float("nan")), TypeError, "NaN"),
        (torch.ones(3, 5, dtype=torch.bool, device="meta"), ValueError, "meta"),
    ],
)
def test_bad_decisions(decisions, error, message):
    model, _ = converted("torchvision")
    frozen = dynexec.freeze(model, toys.images(2))
    with pytest.raises(error, match=message):
        frozen(toys.images(3), decisions)


@pytest.mark.parametrize("order", [[0], [1, 0], [0, 1, 1]])
def test_blocks_that_do_not_run_once_in_order(order):
    class Ordered(toys.Network):
        def forward(self, x):
            x = self.stem(x)
            for number in order:
                x = self.layers[0][number](x)
            return self.head(x.mean((2, 3)))

    model = toys.finish(Ordered(8, [[toys.BasicBlock(8, 8), toys.BasicBlock(8, 8)]], 8))
    dynexec.convert(model)
    with pytest.raises(ValueError, match=re.escape(f"the columns {order}, and must run each of its 2 blocks once")):
        dynexec.freeze(model, toys.images(2))


def test_decisions_around_freeze_have_no_effect():
    model, num_blocks = converted("torchvision")
    with dynexec.decide(torch.zeros(3, num_blocks, dtype=torch.bool)) as around:
        frozen = dynexec.freeze(model, toys.images(2))
        assert active_execution() is around
    x, decisions = toys.images(3), torch.rand(3, num_blocks) < 0.5
    assert relative_error(frozen(x, decisions), toys.run(model, x, decisions)) < 1e-5


def test_statistics_of_the_batch_are_refused():
    model, _ = converted("torchvision")
    norm = model.get_submodule("layers.1.0.bn2")
    norm.running_mean = norm.running_var = None
    with pytest.raises(ValueError, match="BatchNorm of block 'layers.1.0' has no running statistics"):
        dynexec.freeze(model, toys.images(2))
    block = model.get_submodule("layers.1.0")
    with pytest.raises(ValueError, match="BatchNorm of the model itself has no running statistics"):
        dynexec.freeze(block, torch.randn(2, 8, 5, 5))


def test_bad_arguments():
    model, _ = converted("torchvision")
    with pytest.raises(ValueError, match="convert"):
        dynexec.freeze(toys.torchvision_style(), toys.images(2))
    with pytest.raises(ValueError, match=r"\[N, C, H, W\]"):
        dynexec.freeze(model, torch.ones(3))
    with pytest.raises(ValueError, match="on one device, the CPU or a GPU, got cpu, meta"):
        dynexec.freeze(model, toys.images(2).to("meta"))
    with pytest.raises(ValueError, match="fastest"):
        dynexec.freeze(model, toys.images(2), executor="fastest")
    with pytest.raises(TypeError, match="save the original model"):
        pickle.dumps(dynexec.freeze(model, toys.images(2)))


@needs_engine
@pytest.mark.parametrize("fastest", ["resident", "fused", "layers"])
def test_the_fastest_way_to_run_stays(monkeypatch, fastest):
    model, num_blocks = converted("torchvision")
    times = dict.fromkeys(("resident", "fused", "layers"), 2.0) | {fastest: 1.0}
    monkeypatch.setattr(freezing, "race", lambda *_: times)
    frozen = dynexec.freeze(model, toys.images(4))
    assert f"-> {fastest}" in frozen.explain()
    assert bool(frozen.segments) == (fastest != "layers") and bool(frozen.stages) == (fastest == "layers")
    x, decisions = toys.images(5), torch.rand(5, num_blocks) < 0.5
    assert relative_error(frozen(x, decisions), toys.run(model, x, decisions)) < TOLERANCE


@pytest.mark.parametrize("routed", [False, True])
def test_choices_can_be_pinned_to_a_file(tmp_path, monkeypatch, routed):
    if routed:
        model = adashare_resnet(18, num_classes=[4, 3], blocks=(1, 1, 1, 1), widths=(8, 8, 8, 8), head_width=8).eval()
        images = torch.rand(2, 3, 32, 32)
    else:
        (model, _), images = converted("torchvision"), toys.images(4)
    path = tmp_path / "costs.json"
    with pytest.raises(ValueError, match=r"costs.json' holds no times for .*measure=True first"):
        dynexec.freeze(model, images, cost_cache=path, measure=False)
    assert not path.exists()
    first = dynexec.freeze(model, images, cost_cache=path)
    monkeypatch.setattr("time.perf_counter", lambda: pytest.fail("measured"))
    pinned = dynexec.freeze(model, images, cost_cache=path, measure=False)
    assert pinned.explain() == first.explain()
