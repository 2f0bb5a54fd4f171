"""Stochastic depth in two processes, of which one keeps no sample: the gradients of one process on both batches."""

import warnings

import torch
from drop_path_toys import ALMOST_1, DropPath, ViTBlock, assert_same
from torch import distributed, multiprocessing, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import dynexec
from dynexec.nn import SubsetDropPath


def branch():
    return nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6), nn.GELU()).double()


class Net(nn.Module):
    """A branch of its own that rank 1 never keeps, and a converted block."""

    def __init__(self, own):
        super().__init__()
        self.own, self.first, self.second = own, branch(), branch()
        self.drop_path, self.block = SubsetDropPath(0.5) if own else DropPath(0.5), ViTBlock(6, rate=0.5).double()

    def forward(self, x):
        for function in (self.first, lambda rows: self.second(rows)):
            x = self.drop_path(x, function) if self.own else x + self.drop_path(function(x))
        return self.block(x)

    def set_rate(self, rate):
        self.drop_path.drop_prob = self.block.drop_path1.drop_prob = rate
        return self


def step(model, rank, x):
    torch.manual_seed(rank)
    model(x[rank]).square().sum().backward()


def train_on_a_rank(rank, store, states, x, expected):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    for kind in (DistributedDataParallel, shard):
        net = Net(own=True).set_rate((0.5, ALMOST_1)[rank])
        net.load_state_dict(states)
        dynexec.convert(net, stochastic_depth=True)
        model = kind(net)
        for _ in range(2):  # a second step fails where a gradient was missing in the first
            net.zero_grad()
            step(model, rank, x)
            gradients = [parameter.grad for parameter in net.parameters()]
            assert_same([getattr(gradient, "full_tensor", lambda g=gradient: g)() for gradient in gradients], expected)
    distributed.destroy_process_group()


def shard(net):
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(net.block, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def test_two_processes_of_which_one_keeps_nothing(tmp_path):
    net, x = Net(own=False), torch.randn(2, 6, 7, 6).double()
    for rank in (0, 1):
        step(net.set_rate((0.5, ALMOST_1)[rank]), rank, x)
    expected = [parameter.grad / 2 for parameter in net.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arguments = tmp_path / "store", net.state_dict(), x, expected
        multiprocessing.spawn(train_on_a_rank, arguments, nprocs=2)
