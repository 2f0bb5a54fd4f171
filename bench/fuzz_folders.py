"""Saved networks for bench/fuzz.py: folders that are damaged, or forged so that every hash fits."""

import copy
import json
import os
import resource
import shutil
import struct
from hashlib import sha256
from pathlib import Path

import safetensors.torch
import torch
from fuzz_files import acted, draw, mutate_bytes, pick, write_pickle
from torch import nn

import dynexec
from dynexec.deployment.example import Example
from dynexec.executors.proof import TOLERANCE, relative_error
from dynexec.models import adashare_resnet, create_model
from dynexec.nn import DynamicNetwork

MANIFEST, WEIGHTS, EXAMPLE = "manifest.json", "weights.safetensors", "example.safetensors"
FILES = MANIFEST, WEIGHTS, EXAMPLE
MEMORY = 2**30  # bytes that loading may take besides what the process has
NUMBERS = [0, -1, 1, 2, 3, 7, 2**31, 2**63, 10**30, 10**400, 1.5, float("nan"), float("inf"), -0.0, True]
OTHERS = [None, "", "text", "../x", "\ud800", "x" * 10_000, [], {}, [[[]]], {"": None}, [None], ["*"], ["layers.?"]]
ENTRIES = {  # what a liar would write for them
    "format": [2, 0, "1", True, 1.0],
    "batch_size": [0, -5, 10**9, 10**30, "3", 2],
    "num_blocks": [0, 1, 5, 10**30, None],
    "name": ["spottune_resnet26", "arnet_resnet", "adashare_resnet18", "create_model", "__class__"],
    "arguments": [{"name": "adamml"}, {"blocks": [10**7, 10**7]}, {"widths": [10**9] * 4}, {"path": "/etc/passwd"}],
    "blocks": [[10**8] * 3, [1, 2], [0, 2, 1], [-1, 2, 1], ["1"], 3, [1.0, 2, 1], [1] * 10**5],
    "widths": [[10**12] * 3, [4, 4], [0] * 3, [-4] * 3, [10**400] * 3],
    "num_classes": [10**12, 0, -1, "3", [3], 4],
    "match": [["nothing"], ["1"], ["2", "1"], ["*"], ["[!"], ["*a" * 30], ["1"] * 10**5, "1"],
    "batch_norm": ["kept", "frozen", "none"],
    "fine_tune": ["all", "nothing", "something"],
    "dtype": ["float64", "bfloat16", "float16", "int8", "float8_e5m2", "load"],
    "executor": ["masked", "compact", "grouped", "resident", "eval"],
    "winograd": [False, 0, None],
    "batch_invariant": [True, 1, "yes"],
}
DTYPES = [torch.bool, torch.uint8, torch.int64, torch.float16, torch.float64, torch.complex64, torch.float8_e5m2]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return torch.relu(x + self.conv(x))


def residual():
    return nn.Sequential(nn.Conv2d(3, 4, 3), Block(), Block(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()


def saved_folders(folder):
    """Networks that are loaded by name, with the user's model, and with one of parts.

    A damaged file must be refused. A forged folder is refused, or the network computes what was saved, unless its
    weights say otherwise. Memory is limited, and the user's model stays as it was.
    """
    torch.manual_seed(0)
    shapes = {"blocks": (1, 2, 1), "widths": (4, 4, 8), "num_classes": 3}
    named, own = create_model("blockdrop_resnet32_cifar10", **shapes).eval(), residual()
    adashare = adashare_resnet(18, num_classes=[3, 2], blocks=(1, 1), widths=(4, 8), head_width=4).eval()
    dynexec.convert(own)
    cases = []
    for net, model in ((named, None), (DynamicNetwork(own), residual()), (adashare, copy.deepcopy(adashare))):
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(torch.randn_like(parameter) / 8)
        dynexec.save(net, f"{folder}/{len(cases)}", torch.randn(3, 3, 16, 16))
        cases.append((net, model, Path(f"{folder}/{len(cases)}")))
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))

    def attempt(generator):
        net, model, whole = pick(generator, cases)
        path = Path(folder) / "net"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(whole, path)
        forge = pick(generator, (damage, forge_manifest, forge_manifest, forge_tensors))
        forge(path, generator)
        before = None if model is None else copy.deepcopy(model.state_dict())
        kinds = None if model is None else [type(module) for module in model.modules()]
        refused, frozen = load(path, model, f"{folder}/costs.json")
        assert not acted(folder), "code from the folder was executed"
        if model is not None:
            assert equal(model.state_dict(), before), "the model has other weights"
            assert [type(module) for module in model.modules()] == kinds, "the model was converted"
        if forge is damage and not refused:
            damaged = [name for name in FILES if not same_file(path / name, whole / name)]
            assert not damaged, f"{damaged} was taken"
        if not refused and equal(*(safetensors.torch.load_file(one / WEIGHTS) for one in (path, whole))):
            check_output(frozen, net)
        return "error" if refused else "right"

    return attempt


def load(path, model, cache):
    """Whether ``dynexec.load`` refuses with an error that names the file or the entry, and else what it gives."""
    try:
        return False, dynexec.load(path, model, cost_cache=cache)
    except (TypeError, ValueError, RuntimeError) as error:
        if not (str(path) in str(error) or str(error).startswith("executor must be")):
            raise AssertionError(f"not an error of ours: {type(error).__name__}: {error}") from error
        return True, None


def check_output(frozen, net):
    x = torch.randn(2, 3, 16, 16)
    tolerance = max(TOLERANCE[frozen.dtype], TOLERANCE[torch.float32])  # the network's own dtype
    with torch.no_grad():
        for decisions in Example.record(net, x, 0.0).decisions:
            assert relative_error(frozen(x, decisions), net(x, decisions)) <= tolerance, "another output"


def equal(first, second):
    return first.keys() == second.keys() and all(
        first[name].shape == value.shape and torch.equal(first[name].double(), value.double())
        for name, value in second.items()
    )


def same_file(first, second):
    """Of manifests only what they say counts."""
    first, second = first.read_bytes(), second.read_bytes()
    return first == second or (first[:1] == b"{" and json.loads(first) == json.loads(second))


def damage(path, generator):
    """Bytes changed, missing or added in a file, or no file at all."""
    path /= pick(generator, FILES)
    content, kind = path.read_bytes(), draw(generator, 8)
    if kind < 2:
        path.unlink()
        pick(generator, (lambda _: None, os.mkdir, os.mkfifo))(path)
    elif kind == 2:
        path.write_bytes(content + bytes(1 + draw(generator, 9)))
    else:
        path.write_bytes(mutate_bytes(content, generator))


def forge_manifest(path, generator):
    """Entries of the manifest missing, added or something else, with a hash that fits."""
    path /= MANIFEST
    entries = json.loads(path.read_text())
    for _ in range(1 + draw(generator, 3)):
        change(entries, generator)
    write_manifest(path, entries)


def write_manifest(path, entries):
    entries = {name: value for name, value in entries.items() if name != "sha256"}
    text = json.dumps(entries, sort_keys=True)
    path.write_text(json.dumps(entries | {"sha256": sha256(text.encode()).hexdigest()}))


def change(entries, generator):
    """One entry, here or deeper inside."""
    key = pick(generator, sorted(entries)) if entries else "x"
    if isinstance(entries.get(key), dict) and draw(generator, 6):
        return change(entries[key], generator)
    kind = draw(generator, 8)
    if kind == 0:
        entries.pop(key, None)
    elif kind == 1:
        entries[pick(generator, [*ENTRIES, "x", "", "self", "device"])] = copy.deepcopy(
            pick(generator, NUMBERS + OTHERS)
        )
    elif kind == 2:
        deep = []
        for _ in range(pick(generator, (3, 50, 900))):
            deep = [deep]
        entries[key] = deep
    elif kind < 5:
        entries[key] = copy.deepcopy(pick(generator, NUMBERS + OTHERS))
    else:
        entries[key] = copy.deepcopy(pick(generator, ENTRIES.get(key, OTHERS)))


def forge_tensors(path, generator):
    """A file of other tensors, one whose header lies, or a pickle, with hashes that fit."""
    name = pick(generator, (WEIGHTS, EXAMPLE))
    tensors = safetensors.torch.load_file(path / name)
    for _ in range(draw(generator, 3)):
        forge_tensor(tensors, generator)
    content = safetensors.torch.save(tensors)
    if draw(generator, 3) == 0:
        content = forge_header(content, generator)
    if draw(generator, 12) == 0:
        write_pickle(path / name, path.parent, generator)
    else:
        (path / name).write_bytes(content)
    entries = json.loads((path / MANIFEST).read_text())
    entries["files"][name] = sha256((path / name).read_bytes()).hexdigest()
    write_manifest(path / MANIFEST, entries)


def forge_tensor(tensors, generator):
    key = pick(generator, sorted(tensors))
    x = tensors[key]
    shapes = [
        lambda: x.flatten()[:0],
        lambda: x.flatten()[:1],
        lambda: x.flatten(),
        lambda: x[None],
        lambda: x.flatten()[:1].sum(),
    ]
    shapes += [lambda: x[..., :-1] if x.dim() else x, lambda: torch.cat((x.flatten(), x.flatten()))]
    options = [
        *shapes,
        lambda: x.to(pick(generator, DTYPES)),
        lambda: (x * float("nan")).to(x.dtype),
        lambda: ~x.bool(),
    ]
    kind = draw(generator, 6)
    if kind == 0 and len(tensors) > 1:
        del tensors[key]
    elif kind == 1:
        tensors[pick(generator, ["more", "", "inputs.", "inputs.x", "outputs.0.1", "decisions.2", "sure"])] = x.clone()
    else:
        tensors[key] = pick(generator, options)().contiguous().clone()


def forge_header(content, generator):
    """The header's length, or places, shapes and dtypes in it."""
    length = struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    kind = draw(generator, 4)
    if kind == 0:
        lengths = (0, 1, length - 1, length + 1, len(content), 2**40, 2**63, 2**64 - 1)
        return struct.pack("<Q", pick(generator, lengths)) + content[8:]
    for _ in range(1 + draw(generator, 2)):
        entry = header[pick(generator, sorted(header))]
        if kind == 1:
            entry["data_offsets"] = pick(
                generator, ([0, 0], [0, 2**62], [8, 4], [-4, 0], [0, len(data) + 1], [2**64, 1])
            )
        elif kind == 2:
            entry["shape"] = pick(generator, ([], [0], [2**62, 4], [2**32, 2**32], [-1], [0, 2**63], [2**64]))
        else:
            entry["dtype"] = pick(generator, ("F64", "F8_E5M2", "F8_E8M0", "F4", "U16", "C64", "BOOL", "PICKLE", ""))
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data
