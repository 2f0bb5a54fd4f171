"""What the code of the documentation needs and the tests do not have: other packages, networks' files, smaller sizes.

Used by the ``<!-- test`` comments of README.md and docs/.
"""

import os
import pickle
import socket
import types
from collections import OrderedDict
from functools import partial
from unittest import mock

import adamml_cases
import official_keys
import torch
import toys
from torch import distributed, nn

from dynexec import models


def _efficientnet():
    """EfficientNet-B0's stages, the first block of each without a skip."""
    stages = [
        [toys.InvertedResidual(8, 8, stride=2), *(toys.InvertedResidual(8, 8) for _ in range(count - 1))]
        for count in (1, 2, 2, 3, 3, 4, 1)
    ]
    return toys.finish(toys.Network(8, stages, 8))


def smaller(name, **arguments):
    """``create_model(name)`` gives a smaller network of the kind until the page is through."""
    models._MODELS[name] = partial(models._MODELS[name], **arguments)


def packages():
    """Modules in place of torchvision and timm: networks with as many blocks, few channels and random weights."""
    torchvision, timm = types.ModuleType("torchvision"), types.ModuleType("timm")
    torchvision.models = types.ModuleType("torchvision.models")
    torchvision.models.resnet50 = partial(_resnet, (3, 4, 6, 3))
    torchvision.models.resnet18 = partial(_resnet, (2, 2, 2, 2))
    timm.create_model = lambda name, pretrained: {"efficientnet_b0": _efficientnet}[name]()
    return {"torchvision": torchvision, "torchvision.models": torchvision.models, "timm": timm}


def _resnet(blocks, weights=None):
    """A network of torchvision's structure, random whatever ``weights`` says."""
    stages, inputs = [], 8
    for number, count in enumerate(blocks):
        outputs = 8 << number
        first = toys.BasicBlock(inputs, outputs, 2 if number else 1)
        stages.append([first, *(toys.BasicBlock(outputs, outputs) for _ in range(count - 1))])
        inputs = outputs
    network = toys.Network(8, stages, inputs)
    network.stem = nn.Sequential(nn.AvgPool2d(4), network.stem)
    return toys.finish(network)


class MyBlock(toys.BasicBlock):
    """A block of a reader's own, with a projection."""

    def __init__(self):
        super().__init__(8, 8)
        self.projection = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))) + self.projection(x))


def own_network():
    """A reader's own network: ``layer3`` of two :class:`MyBlock`, ``layer4`` of two blocks as torchvision's."""
    blocks = {
        "conv1": nn.Conv2d(3, 8, 3, padding=1),
        "layer3": nn.Sequential(MyBlock(), MyBlock()),
        "layer4": nn.Sequential(toys.BasicBlock(8, 8), toys.BasicBlock(8, 8)),
        "pool": nn.AdaptiveAvgPool2d(1),
        "flatten": nn.Flatten(),
        "fc": nn.Linear(8, 5),
    }
    return nn.Sequential(OrderedDict(blocks))


def join_alone():
    """A process group of this process."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)


def leave_and_expect_one():
    """No process group; the environment is that of the only process of torchrun."""
    distributed.destroy_process_group()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0", "WORLD_SIZE": "1"}


def pass_for_a_compiler():
    """AOTInductor stores programs uncompiled until the page is through; test_deployment_export.py compiles one."""
    inductor = torch._inductor
    mock.patch.object(inductor, "aoti_compile_and_package", _store).start()
    mock.patch.object(inductor, "aoti_load_package", lambda path: torch.export.load(path).module()).start()


def _store(program, package_path):
    torch.export.save(program, package_path)
    return package_path


def save_blockdrop(path):
    """A fine-tuned checkpoint of ResNet-110 with random numbers."""
    names = {"agent": "policy", "resnet": "backbone"}
    parts = {entry: official_keys.official_state(f"resnet110_cifar10 {part}") for entry, part in names.items()}
    torch.save(parts | {"epoch": 2000, "acc": 0.936, "reward": 0.195}, path)


def save_adashare(path, policy_path):
    """A re-trained ResNet-34 for three tasks and, beside it, a policy, both random."""
    sections = "resnet34 backbone", "nyu_v2_3task tasks"
    state = {k: v for section in sections for k, v in official_keys.official_state(section, "adashare").items()}
    torch.save({"mtl-net": state, "weights": {}, "alphas": {}, "iter": 19600, "temp": 0.5}, path)
    policy = {f"task{task + 1}_policy": torch.eye(2).long()[torch.randint(2, (16,))] for task in range(3)}
    with open(policy_path, "wb") as file:
        pickle.dump(policy, file)


def save_arnet(path):
    """A whole network with ResNets, random."""
    state = official_keys.official_state("resnet", "arnet")
    torch.save({"epoch": 50, "state_dict": {f"module.{key}": value for key, value in state.items()}}, path)


def save_adamml(path):
    """A trained network for RGB and sound, random."""
    state = adamml_cases.official_state(adamml_cases.official_shapes(("rgb", "sound")))
    state = {f"module.{key}": value for key, value in state.items()}
    torch.save({"state_dict": state, "epoch": 35, "best_top1": 0.5, "temperature": 1.4}, path)
