"""The kernel that runs whole networks for small images, on the bench of csrc/testing; the compiled one needs a GPU."""

import copy
import json
import re
import shutil
import subprocess
import sys
from functools import partial

import pytest
import torch
import toys
from cuda_on_cpu import SOURCES, build

import dynexec
from dynexec import native
from dynexec.executors import backends
from dynexec.executors.block import pack_module
from dynexec.executors.launches import LaunchPrograms
from dynexec.executors.partition import pack_stages
from dynexec.executors.proof import relative_error
from dynexec.executors.resident import Resident
from dynexec.executors.segment import make_segments
from dynexec.models.blockdrop import BasicBlock, BlockDropPolicy, SegmentedResNet
from dynexec.nn.context import decide

needs_bench = pytest.mark.skipif(
    shutil.which("g++") is None or not SOURCES.exists(), reason="needs g++ and the source tree"
)
TOLERANCE = {torch.float16: 5e-4, torch.bfloat16: 5e-3}  # measured: 5e-5 and 4e-4
# Blocks: the first ones of stages two and three are numbers 2 and 4.
BLOCKS = (2, 2, 2)
DECISIONS = torch.tensor(
    [[1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0], [1, 1, 0, 1, 0, 1], [0, 0, 1, 0, 1, 0]]
).bool()


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return build(tmp_path_factory.mktemp("resident"), "run_resident")


def network(blocks=BLOCKS, outputs=7, dtype=torch.float16, size=32):
    """A model with random BatchNorm statistics and weights of 16 bits, and its program."""
    model = toys.finish(SegmentedResNet(BasicBlock, blocks, (16, 32, 64), num_classes=outputs)).to(dtype)
    dynexec.convert(model)
    return model, program(model, torch.randn(1, 3, size, size, dtype=dtype))


def program(model, x, columns=None):
    columns = sum(block.placement is not None for block in model.modules() if isinstance(block, BasicBlock)) or columns
    with torch.no_grad():
        graph, _ = pack_stages(model, x, None, 1)
        _, (segment,) = make_segments(graph, partial(LaunchPrograms, columns))
    (found,) = segment.programs.values()
    return found


def make_policy():
    """One for BLOCKS, with decisions of both kinds, and as the kernel takes it."""
    features = SegmentedResNet(BasicBlock, (1, 1, 1), (16, 32, 64))
    policy = toys.finish(BlockDropPolicy(features, sum(BLOCKS))).half()
    with torch.no_grad():
        x = torch.randn(8, 3, 32, 32, dtype=torch.float16)
        policy.logit.weight *= 50  # clear ones
        policy.logit.bias -= policy.logit(policy.features(x)).mean(0)
        _, (segment,) = make_segments(pack_module(policy, x[:1]).__self__, partial(LaunchPrograms, 0))
    (found,) = segment.programs.values()
    return policy, found.resident()


def run(bench, tmp_path, x, resident, decisions=None, policy=None, order=None, blocks=1, seeds=(1,)):
    """Results, decisions of the policy, and what was counted."""
    path = tmp_path / "batch"
    images = x if x.is_contiguous() else x.permute(0, 2, 3, 1)
    header = torch.tensor([int(x.dtype == torch.bfloat16), x.shape[-1], int(x.is_contiguous())])
    tensors = [header, images, order, decisions]
    for part in (resident, policy):
        if part is None:
            tensors += [None] * 6
        else:
            n = part.network
            ends = torch.tensor(n.ends, dtype=torch.int32)
            tensors += [n.weights, n.biases, n.convs, n.head, n.head_biases, ends]
    with path.open("wb") as file:
        for tensor in tensors:
            raw = b"" if tensor is None else tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
            file.write(len(raw).to_bytes(8, "little") + bytes(8) + raw + bytes(-len(raw) % 16))
    command = [bench, path, str(blocks), *map(str, seeds)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if result.returncode:
        raise RuntimeError(result.stdout + result.stderr)
    raw = bytearray((tmp_path / "batch.out").read_bytes())
    outputs = len(resident.network.head)
    results = torch.frombuffer(raw, dtype=torch.float32, count=len(x) * outputs).view(len(x), outputs)
    rest = raw[4 * len(x) * outputs :]
    decided = torch.frombuffer(rest, dtype=torch.uint8).view(len(x), -1) if rest else None
    return results, decided, json.loads(result.stdout)


def expected(model, x, decisions):
    with torch.no_grad(), decide(decisions):
        return copy.deepcopy(model).double()(x.double())


@needs_bench
@pytest.mark.parametrize("blocks", [1, 2, 4])
@pytest.mark.parametrize("dtype, size", [(torch.float16, 32), (torch.bfloat16, 32), (torch.float16, 28)])
def test_results_are_the_models(bench, tmp_path, dtype, size, blocks):
    """All blocks, none, one, first ones of stages dropped, only these kept; in several schedules with the same bits."""
    model, found = network(dtype=dtype, size=size)
    x = torch.randn(len(DECISIONS), 3, size, size, dtype=dtype)
    results, _, _ = run(bench, tmp_path, x, found.resident(), DECISIONS, blocks=blocks, seeds=(1, 2))
    other_layout = x.to(memory_format=torch.channels_last)
    assert torch.equal(run(bench, tmp_path, other_layout, found.resident(), DECISIONS, blocks=blocks)[0], results)
    wanted = expected(model, x, DECISIONS)
    for result, want in zip(results, wanted, strict=True):
        assert relative_error(result[None], want[None]) < TOLERANCE[dtype]


@needs_bench
def test_resnet110(bench, tmp_path):
    model = toys.finish(SegmentedResNet(BasicBlock, (18, 18, 18), (16, 32, 64), num_classes=10)).half()
    for block in model.modules():
        if isinstance(block, BasicBlock):
            block.bn2.weight.data *= 0.1  # or the activations of random weights would not fit into 16 bits
    dynexec.convert(model)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float16)
    found = program(model, x)
    decisions = torch.rand(2, 54) < 0.5
    results, _, _ = run(bench, tmp_path, x, found.resident(), decisions)
    assert relative_error(results, expected(model, x, decisions)) < 4 * TOLERANCE[torch.float16]


@needs_bench
@pytest.mark.parametrize("blocks", [1, 4])
def test_twenty_schedules_give_the_same_bits(bench, tmp_path, blocks):
    _, found = network((1, 1, 1), outputs=3)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float16)
    run(bench, tmp_path, x, found.resident(), DECISIONS[[0, 3], :3], blocks=blocks, seeds=range(20))


@needs_bench
def test_what_is_dropped_is_neither_computed_nor_fetched(bench, tmp_path):
    _, found = network()
    x = torch.randn(1, 3, 32, 32, dtype=torch.float16)
    resident = found.resident()
    # Products of 16x16x8: all convolutions of identity blocks have the same number, those that halve the half of it.
    products = {True: 16 * 72, False: 16 * 36}
    table = resident.network.convs[:, 1].tolist()
    for decisions in DECISIONS:
        counted = run(bench, tmp_path, x, resident, decisions[None])[2]
        kept = decisions.nonzero().flatten().tolist()
        assert counted["products"] == 16 * 72 + sum(products[block not in (2, 4)] + products[True] for block in kept)
        assert counted["copied_bytes"] == table[0] + sum(table[1 + 2 * block] + table[2 + 2 * block] for block in kept)


@needs_bench
def test_the_convolutions_have_no_bank_conflicts(bench, tmp_path):
    _, found = network()
    x = torch.randn(1, 3, 32, 32, dtype=torch.float16)
    accesses = run(bench, tmp_path, x, found.resident(), DECISIONS[:1])[2]["accesses"]
    core = {name: of for name, of in accesses.items() if re.search(r"convolve|::store<|Weights", name)}
    # With stride 2 eight neighbouring outputs read every second pixel, which lie in half of the banks.
    halving = {name for name in core if "STRIDE = 2" in name}
    assert len(core) == 5 + 3 + 5 and len(halving) == 2
    assert {name: of[1] for name, of in core.items() if of[1] and name not in halving} == {}
    assert all(conflicts == 4 * count for name, (count, conflicts) in core.items() if name in halving)


@needs_bench
@pytest.mark.parametrize("blocks", [1, 2])
def test_a_policy_decides_in_the_same_launch(bench, tmp_path, blocks):
    model, found = network()
    policy, decides = make_policy()
    x = torch.randn(4, 3, 32, 32, dtype=torch.float16)
    with torch.no_grad():
        probabilities = policy(x)
    decisions = probabilities >= 0.5
    assert 0 < decisions.sum() < decisions.numel() and (probabilities - 0.5).abs().min() > 1e-3
    results, decided, _ = run(bench, tmp_path, x, found.resident(), policy=decides, blocks=blocks, seeds=(1, 2))
    assert torch.equal(decided.bool(), decisions)
    assert relative_error(results, expected(model, x, decisions)) < TOLERANCE[torch.float16]


@needs_bench
def test_any_order_of_the_samples(bench, tmp_path):
    _, found = network((1, 1, 1))
    x = torch.randn(3, 3, 32, 32, dtype=torch.float16)
    plain, _, _ = run(bench, tmp_path, x, found.resident(), DECISIONS[:3, :3])
    order = torch.tensor([2, 0, 1], dtype=torch.int32)
    assert torch.equal(run(bench, tmp_path, x, found.resident(), DECISIONS[:3, :3], order=order)[0], plain)
    with pytest.raises(RuntimeError, match=r"used by two threads: 4 bytes at \d+ .* of results"):
        run(bench, tmp_path, x, found.resident(), DECISIONS[:3, :3], order=order * 0)


@needs_bench
@pytest.mark.parametrize(
    "what, instead, error, blocks",
    [
        ("    wait<0>();\n    all_barrier();\n    if", "    all_barrier();\n    if", "still being copied", 1),
        (
            "    wait<0>();\n    all_barrier();\n    if",
            "    wait<0>();\n    if",
            "another thread|nothing wrote|copied",
            1,
        ),
        ("if (me == 0) clear_pixel", "if (me == 1) clear_pixel", "nothing wrote", 1),
        ("stage < 2 ? second *", "stage < 2 ? 0 * second *", "another thread|copied", 1),
        ("if (row == 0 && me > 0)", "if (row == 0 && me > 9)", "nothing wrote", 2),
        ("      cluster_barrier();", "      barrier();", "no barrier of the cluster", 2),
    ],
    ids=["no wait", "no barrier", "no border", "one slot for all weights", "no remote rows", "barrier of the block"],
)
def test_a_planted_mistake_is_found(tmp_path, what, instead, error, blocks):
    source = (SOURCES.parent / "cuda" / "resident.h").read_text()
    assert source.count(what) == 1
    copy = tmp_path / "csrc"
    shutil.copytree(SOURCES.parent, copy)
    (copy / "cuda" / "resident.h").write_text(source.replace(what, instead))
    bench = build(tmp_path, "run_resident", copy / "testing", "-O0")
    _, found = network((1, 1, 1))
    x = torch.randn(1, 3, 32, 32, dtype=torch.float16)
    with pytest.raises(RuntimeError, match=error):
        run(bench, tmp_path, x, found.resident(), DECISIONS[:1, :3], blocks=blocks, seeds=range(5))


class Odd(SegmentedResNet):
    def forward(self, x):
        return super().forward(torch.sigmoid(x))


@pytest.mark.parametrize(
    "message, size, dtype, depths, widths, more",
    [
        ("not in torch.float32", 32, torch.float32, (1, 1, 1), (16, 32, 64), {}),
        ("multiple of 4 up to 32", 40, torch.float16, (1, 1, 1), (16, 32, 64), {}),
        ("must give 16 channels", 32, torch.float16, (1, 1, 1), (8, 16, 32), {}),
        ("three stages", 32, torch.float16, (1, 1, 1), (16, 32, 48), {}),
        ("none may be missing", 32, torch.float16, (1, 1), (16, 32), {}),
        ("a linear layer", 32, torch.float16, (1, 1, 1), (16, 32, 64), {"num_classes": None}),
        (r"must be \[3, S, S\]", 28, torch.float16, (1, 1, 1), (16, 32, 64), {"in_channels": 1}),
        ("more than stem", 32, torch.float16, (1, 1, 1), (16, 32, 64), {"kind": Odd}),
        ("with stride 1, padding 1 and ReLU, got kernel", 32, torch.float16, (1, 1, 1), (16, 32, 64), {"kernel": 1}),
    ],
)
def test_other_networks_are_refused_with_a_reason(message, size, dtype, depths, widths, more):
    kind, classes = more.get("kind", SegmentedResNet), more.get("num_classes", 3)
    channels = more.get("in_channels", 3)
    model = kind(BasicBlock, depths, widths, num_classes=classes, in_channels=channels)
    if "kernel" in more:
        model.blocks[0][0].conv1 = torch.nn.Conv2d(16, 16, 1, bias=False)
    model = toys.finish(model).to(dtype)
    dynexec.convert(model)
    with pytest.raises(ValueError, match=message):
        program(model, torch.randn(1, channels, size, size, dtype=dtype)).resident()


def test_image_sizes_have_one_network_together():
    """Graphs of a size need its weights also when there have been programs of eight other sizes since."""
    model, _ = network((1, 1, 1))
    x = torch.randn(1, 3, 28, 28, dtype=torch.float16)
    with torch.no_grad():
        graph, _ = pack_stages(model, x, None, 1)
        _, (segment,) = make_segments(graph, partial(LaunchPrograms, 3))
        for size in (32, 24):
            segment.find_program(torch.randn(1, 3, size, size, dtype=torch.float16))
        wide = segment.find_program(torch.randn(1, 3, 8, 12, dtype=torch.float16))
    first, *others = [program.resident() for program in segment.programs.values() if program is not wide]
    assert len(others) == 2 and all(other is first for other in others)
    with pytest.raises(ValueError, match="multiple of 4"):
        wide.resident()


def test_freeze_puts_the_policy_into_the_launch(monkeypatch):
    """With the launch replaced by what it should compute, by layers."""
    model, _ = network((2, 2, 2))
    policy, _ = make_policy()
    calls = []

    def launch(self, x, decisions, policy=None):
        calls.append("policy" if policy is not None else "network")
        if policy is not None:
            with torch.no_grad():
                decisions.copy_(decide_by(x) >= 0.5)
        return expected(model, x, decisions).to(x.dtype)[:, :, None, None]

    decide_by = copy.deepcopy(policy)
    monkeypatch.setattr(Resident, "launch", launch)
    module = sys.modules["dynexec.executors.freeze"]
    monkeypatch.setattr(module, "choose_backend", lambda device, _, invariant: backends.kernels(device, invariant))
    x = torch.randn(3, 3, 32, 32, dtype=torch.float16)
    frozen = dynexec.freeze(model, x, policy=policy, executor="resident")
    calls.clear()
    y, decisions = frozen(x, return_decisions=True)
    assert calls == ["policy"] and torch.equal(decisions, decide_by(x) >= 0.5)
    frozen(x, decisions)
    assert calls == ["policy", "network"]
    assert relative_error(y, expected(model, x, decisions)) < 1e-2
    wide = torch.randn(1, 3, 8, 12, dtype=torch.float16)  # no size for the kernel: the others run
    assert relative_error(frozen(wide, decisions[:1]), expected(model, wide, decisions[:1])) < 1e-2
    assert calls == ["policy", "network"]
    decide_by.logit.bias.data += 100  # a launch that decides otherwise
    frozen = dynexec.freeze(model, x, policy=policy, executor="resident")
    assert "policy not in the resident kernel" in frozen.explain()
    calls.clear()
    frozen(x)
    assert calls == ["network"]


@pytest.mark.skipif(native.cuda_missing() is not None, reason=str(native.cuda_missing()))
@pytest.mark.parametrize("batch", [1, 5, 40, 300])  # clusters of four, of two or four, of two, none
@pytest.mark.parametrize("dtype, size", [(torch.float16, 32), (torch.bfloat16, 32), (torch.float16, 28)])
def test_on_a_gpu(dtype, size, batch):
    model, _ = network(dtype=dtype, size=size)
    x = torch.randn(batch, 3, size, size, device="cuda", dtype=dtype)
    frozen = dynexec.freeze(model.cuda(), x, executor="resident")
    assert "no CUDA graph" not in frozen.explain()
    for keep in (0.5, 0.0, 1.0):
        decisions = torch.rand(batch, 6, device="cuda") < keep
        for given in (x, x.contiguous(memory_format=torch.channels_last)):
            assert relative_error(frozen(given, decisions), expected(model, x, decisions)) < 2 * TOLERANCE[dtype]


@pytest.mark.skipif(native.cuda_missing() is not None, reason=str(native.cuda_missing()))
@pytest.mark.parametrize("batch", [2, 300])
def test_a_policy_on_a_gpu(batch):
    model, _ = network()
    policy, _ = make_policy()
    x = torch.randn(batch, 3, 32, 32, device="cuda", dtype=torch.float16)
    frozen = dynexec.freeze(model.cuda(), x, policy=policy.cuda(), executor="resident")
    assert "policy not in the resident kernel" not in frozen.explain() and frozen.one_launch
    for _ in range(3):
        x.normal_()
        y, decisions = frozen(x, return_decisions=True)
        probabilities = policy(x).float()
        sure = (probabilities - 0.5).abs() > 0.01
        assert torch.equal(decisions[sure], probabilities[sure] >= 0.5)
        assert relative_error(y, expected(model, x, decisions)) < 2 * TOLERANCE[torch.float16]


def test_without_a_gpu_there_is_a_reason():
    _, found = network((1, 1, 1))
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="needs a GPU"):
            found.resident()(torch.randn(1, 3, 32, 32).half(), DECISIONS[:1, :3])
