"""Converted models in capacity mode as files of PyTorch's own: exported programs, and libraries of AOTInductor."""

import os
import shutil

import pytest
import torch
import toys

import dynexec
from dynexec.models import create_model
from dynexec.nn import DynamicNetwork

BATCH = torch.export.Dim("batch", min=1, max=64)


def export(net, *arguments, **options):
    """The program of a DynamicNetwork for batches of 1 to 64."""
    shapes = {name: {0: BATCH} for name, _ in zip(("images", "decisions"), arguments)} | dict.fromkeys(options)
    with torch.no_grad():
        return torch.export.export(net, arguments, options, dynamic_shapes=shapes)


@pytest.mark.parametrize("name", ["blockdrop_resnet32_cifar10", "spottune_resnet26"])
def test_an_exported_policy_decides(name, tmp_path):
    net = toys.finish(create_model(name, blocks=(1, 1), widths=(8, 8), num_classes=3))
    options = {"mode": "capacity", "return_decisions": True}
    torch.export.save(export(net, torch.randn(4, 3, 8, 8), **options), tmp_path / "net.pt2")
    program = torch.export.load(tmp_path / "net.pt2").module()
    for n in (1, 5):
        x = torch.randn(n, 3, 8, 8)
        with torch.no_grad():
            output, decisions = program(x, **options)
            expected, decided = net(x, return_decisions=True)
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(decisions, decided)


@pytest.mark.skipif(
    not any(map(shutil.which, (os.environ.get("CXX", ""), "g++", "clang++"))), reason="needs a C++ compiler"
)
def test_a_compiled_library_follows_decisions(tmp_path):
    block = toys.finish(toys.InvertedResidual(4, 4))
    dynexec.convert(block)
    net = DynamicNetwork(block).eval()
    program = export(net, torch.randn(4, 4, 5, 5), torch.rand(4, 1) < 0.5, mode="capacity")
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "net.pt2"))
    compiled = torch._inductor.aoti_load_package(path)
    for keep in ([[True]], [[False], [True], [False]], [[False]] * 5):
        x, decisions = torch.randn(len(keep), 4, 5, 5), torch.tensor(keep)
        with torch.no_grad():
            expected = net(x, decisions)
        torch.testing.assert_close(compiled(x, decisions, mode="capacity"), expected, rtol=1e-4, atol=1e-4)
