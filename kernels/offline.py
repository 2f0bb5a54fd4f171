"""Machine code without a GPU: what the kernels' launchers would launch, for any architecture, and what it uses."""

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from unittest.mock import patch
from zlib import crc32

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from dynexec.kernels.device import assume_architecture

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class _NoDriver:
    """Stands in for the driver of a GPU that is not there."""

    def __init__(self, architecture):
        self.target = GPUTarget("cuda", architecture, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.target.arch  # Triton keeps what it compiled by device

    def get_current_stream(self, device=None):
        return 0


def compile_launches(call, architecture, share=(0, 1)):
    """Compile the kernels that ``call()`` launches on tensors on the meta device, without running any.

    ``architecture`` is 80 for sm_80. ``share`` is (number, of how many), for one of several processes: only the
    launches of this one are compiled, see :func:`share_of`. Returns a list of Triton's result for each launch.
    """
    compiled, run = [], JITFunction.run

    def compile_only(kernel, *args, grid, warmup, **kwargs):
        if share_of(kernel, args, kwargs, share[1]) == share[0]:
            compiled.append(run(kernel, *args, grid=grid, warmup=True, **kwargs))

    before = driver._active
    driver.set_active(_NoDriver(architecture))
    try:
        with patch.object(JITFunction, "run", compile_only), assume_architecture(architecture):
            call()
    finally:
        driver._active = before
    return compiled


def share_of(kernel, arguments, options, shares):
    """Return which of several processes compiles a launch: the same one for all launches that Triton compiles once."""
    kinds = [kernel.fn.__name__, options]
    for parameter, value in zip(kernel.params, arguments, strict=False):  # further ones are among the options
        if isinstance(value, torch.Tensor):
            aligned = not parameter.do_not_specialize_on_alignment and value.data_ptr() % 16 == 0
            kinds.append((value.dtype, aligned))
        elif isinstance(value, int) and not parameter.is_constexpr:
            kinds.append(not parameter.do_not_specialize and (value == 1, value % 16 == 0))
        else:
            kinds.append(value)
    return crc32(repr(kinds).encode()) % shares


def inspect(compiled):
    """Return what a compiled kernel uses, from its machine code: a dict of registers, bytes and instructions."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run("-res-usage", file.name)
        code = _run("--dump-sass", file.name)
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    instructions = [
        (int(address, 16), re.sub(r"^@!?U?P\w+\s+", "", text))
        for address, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", code)
    ]
    kinds = Counter(text.split()[0].split(".")[0] for _, text in instructions)
    return {
        "registers": registers,
        "stack": stack,
        "shared": compiled.metadata.shared,
        "warps": compiled.metadata.num_warps,
        "tensor_core": kinds["HGMMA"] + kinds["HMMA"],
        "async_copies": kinds["LDGSTS"] + kinds["UTMALDG"],
        "spills": kinds["LDL"] + kinds["STL"],
        "wide": sum(text.startswith(("LDG.E", "STG.E")) and ".128" in text for _, text in instructions),
        "narrow": sum(text.startswith(("LDG.E", "STG.E")) and ".128" not in text for _, text in instructions),
        "waits": kinds["ACQBULK"],
        "loop": _main_loop(instructions),
        "instructions": len(instructions),
    }


def _main_loop(instructions):
    """Count the instructions of the shortest loop that multiplies matrices; 0 if there is none."""
    found = []
    for address, text in instructions:
        target = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if target and int(target.group(1), 16) < address:
            body = [text for place, text in instructions if int(target.group(1), 16) <= place <= address]
            if any(text.startswith(("HGMMA", "HMMA")) for text in body):
                found.append(len(body))
    return min(found, default=0)


def _run(*arguments):
    return subprocess.run([_TOOLS / "cuobjdump", *arguments], check=True, capture_output=True, text=True).stdout
