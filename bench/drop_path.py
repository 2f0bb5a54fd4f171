"""Stochastic depth: a training step that computes the kept samples only, against DropPath.

    python bench/drop_path.py                # prints the table
    python bench/drop_path.py --write        # also into docs/stochastic_depth.md

Two networks as timm writes them, with a DropPath of the same rate in every block. ``dynexec.convert`` changes a copy.
First, with the same seed, outputs and all gradients are compared; no time is printed where they differ. Then forward
and backward are timed in turns on one thread: medians of its CPU time, which is the elapsed time where nothing else
runs. Memory is the sum of bytes of the tensors that autograd saves for the backward pass, each storage once and without
the parameters: the activations at their peak, not what the allocator holds; a mean over draws. The theoretical factor
is the ratio of FLOPs of DropPath's step to those of a step that computes (1 - rate) of each branch.
"""

import argparse
import copy
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import dynexec
from dynexec.executors.memory import keep_freed_memory
from dynexec.measure.timing import compare
from dynexec.report.arguments import positive
from dynexec.report.tables import write_generated

DOCS = Path(__file__).parents[1] / "docs" / "stochastic_depth.md"
RATES = (0.1, 0.2, 0.3, 0.4, 0.5)
DRAWS = 4  # that memory is averaged over


class DropPath(nn.Module):
    """As in timm."""

    def __init__(self, drop_prob):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep_prob = 1 - self.drop_prob
        return x * x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep_prob).div_(keep_prob)


def mlp(dim):
    return nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        n, tokens, dim = x.shape
        q, k, v = self.qkv(x).reshape(n, tokens, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, tokens, dim))


class ViTBlock(nn.Module):
    def __init__(self, dim, rate):
        super().__init__()
        self.norm1, self.attn, self.drop_path1 = nn.LayerNorm(dim), Attention(dim, 3), DropPath(rate)
        self.norm2, self.mlp, self.drop_path2 = nn.LayerNorm(dim), mlp(dim), DropPath(rate)

    def forward(self, x):
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class ConvNeXtBlock(nn.Module):
    def __init__(self, dim, rate):
        super().__init__()
        self.conv_dw, self.norm = nn.Conv2d(dim, dim, 7, padding=3, groups=dim), nn.LayerNorm(dim, eps=1e-6)
        self.mlp, self.gamma, self.drop_path = mlp(dim), nn.Parameter(torch.ones(dim)), DropPath(rate)

    def forward(self, x):
        shortcut = x
        x = self.mlp(self.norm(self.conv_dw(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        return self.drop_path(x.mul(self.gamma.reshape(1, -1, 1, 1))) + shortcut


class Tokens(nn.Module):
    """Maps to tokens, with one more for the class."""

    def forward(self, x):
        return F.pad(x.flatten(2).transpose(1, 2), (0, 0, 1, 0))


def vit(rate):
    """As ViT-Tiny/16 at 224 px: 12 blocks on 197 tokens of 192."""
    blocks = [ViTBlock(192, rate) for _ in range(12)]
    return nn.Sequential(nn.Conv2d(3, 192, 16, 16), Tokens(), *blocks, nn.LayerNorm(192), nn.Linear(192, 10))


def convnext(rate):
    """As ConvNeXt-Atto: stages of 2, 2, 6 and 2 blocks of 40 to 320 channels."""
    layers, inputs = [], 3
    for outputs, depth, stride in ((40, 2, 4), (80, 2, 2), (160, 6, 2), (320, 2, 2)):
        layers += [nn.Conv2d(inputs, outputs, stride, stride), *(ConvNeXtBlock(outputs, rate) for _ in range(depth))]
        inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(320, 10))


NETWORKS = {"vit": (vit, 224), "convnext": (convnext, 128)}


def step(model, images):
    """One forward and backward; the output."""
    for parameter in model.parameters():
        parameter.grad = None
    y = model(images)
    y.square().mean().backward()
    return y.detach()


def check(dense, subset, images, seed):
    """The largest relative error of the output and of any gradient under the same draws; RuntimeError above 1e-4."""
    outputs = []
    for model in (dense, subset):
        torch.manual_seed(seed)
        outputs.append([step(model, images), *(parameter.grad for parameter in model.parameters())])
    error = max(((a - b).norm() / b.norm().clamp(min=1e-12)).item() for b, a in zip(*outputs))
    if not error < 1e-4:
        raise RuntimeError(f"outputs or gradients differ from DropPath's by {error:.1e}, relative: nothing is timed")
    return error


def saved_megabytes(model, forward):
    """MB that autograd saves in ``forward()``, each storage once, parameters of ``model`` not."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage  # held, so that its address is not given away again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        assert forward().requires_grad
    return sum(storage.nbytes() for pointer, storage in storages.items() if pointer not in own) / 1e6


def set_rates(model, rate):
    for module in model.modules():
        if isinstance(module, DropPath):
            module.drop_prob = rate


def flops(model, images, rate):
    """FLOPs of one step at this rate."""
    set_rates(model, rate)
    with FlopCounterMode(display=False) as counter:
        step(model, images)
    return counter.get_total_flops()


def measure(name, batch, rounds):
    """Rows of the table: for every rate the cells behind the network and the batch."""
    make, size = NETWORKS[name]
    torch.manual_seed(0)
    dense, images = make(RATES[0]).train(), torch.randn(batch, 3, size, size)
    models = {rate: copy.deepcopy(dense) for rate in RATES}
    for rate, model in models.items():
        set_rates(model, rate)
        dynexec.convert(model, stochastic_depth=True)
        set_rates(dense, rate)
        check(dense, model, images, seed=batch)
    everything, fixed = flops(dense, images, 0.0), flops(copy.deepcopy(models[RATES[0]]), images, 1 - 1e-12)
    set_rates(dense, RATES[0])
    memory = {
        rate: sum(saved_megabytes(model, partial(model, images)) for _ in range(DRAWS)) / DRAWS
        for rate, model in [("dense", dense), *models.items()]
    }
    calls = {"dense": lambda: step(dense, images)}
    calls |= {str(rate): lambda model=model: step(model, images) for rate, model in models.items()}
    timed = compare(calls, seconds=0, min_rounds=rounds, max_rounds=rounds)
    full = timed.timings["dense"].cpu_median
    for rate in RATES:
        seconds, theory = timed.timings[str(rate)].cpu_median, everything / (fixed + (1 - rate) * (everything - fixed))
        times = f"{full * 1e3:.0f} | {seconds * 1e3:.0f} | {full / seconds:.2f} | {theory:.2f}"
        yield f"{rate} | {times} | {memory['dense']:.1f} | {memory[rate]:.1f} | {memory['dense'] / memory[rate]:.2f}"
    print(f"{name}, batch {batch}: elapsed times of DropPath, taken twice, differ by {timed.spread:.1%}")


def case(text):
    """Network and batch size, as they are written in ``CASES``."""
    name, _, batch = text.partition(":")
    if name not in NETWORKS or not batch:
        raise argparse.ArgumentTypeError(f"must be network:batch with a network of {list(NETWORKS)}, got {text!r}")
    return name, positive(batch)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write the table into docs/stochastic_depth.md")
    cases = f"network:batch; default: {' '.join(CASES)}"
    parser.add_argument("--cases", nargs="+", type=case, help=cases, metavar="CASE")
    parser.add_argument("--rounds", type=positive, default=5)
    args = parser.parse_args()
    if args.write and args.cases:
        parser.error("--write is for all cases")
    torch.set_num_threads(1)
    keep_freed_memory()  # as an allocator of a GPU does, for both alike
    lines = [HEADER]
    print(HEADER, end="")
    for name, batch in args.cases or map(case, CASES):
        for cells in measure(name, batch, args.rounds):
            lines.append(f"| {name} | {batch} | {cells} |\n")
            print(lines[-1], end="", flush=True)
    if args.write:
        write_generated(DOCS, "drop_path", "".join(lines))


CASES = ("vit:16", "vit:2", "convnext:16")
HEADER = (
    "| network | batch | rate | DropPath, ms | subset, ms | factor | FLOPs say | DropPath, MB | subset, MB | factor |\n"
    "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|\n"
)

if __name__ == "__main__":
    main()
