"""Makes programs for a GPU, and holds what those of all image sizes share."""

import torch

from dynexec.executors.conditional import Conditional, conditional_missing
from dynexec.executors.graphs import makes_graph
from dynexec.executors.instructions import Builder
from dynexec.executors.launch_program import LaunchProgram
from dynexec.executors.resident import Resident, read_network
from dynexec.executors.twins import Twins

_OF_GRAPHS = "graphs"  # the workspace of all that are a network's own
# Executors that need conditional nodes on a GPU.
_WITH_NODES = "conditional", "switched"
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class LaunchBuilder(Builder):
    """A builder of what the kernels support."""

    def _choose(self, conv, op, size, even):
        from dynexec.kernels.conv import MAX_TAPS

        _, _, *kernel = conv.shape
        in_gate = any(step.op == "gate" and not step.gated for step in self.instructions)  # one that is still open
        by_library = op == "conv" and even and not in_gate
        return op if conv.dtype in _DTYPES and (by_library or kernel[0] * kernel[1] <= MAX_TAPS) else None


class LaunchPrograms:
    """Makes the programs of one segment, for all image sizes.

    Parameters
    ----------
    columns : int
        Number of columns of the decisions.
    batch_invariant : bool
        Whether a sample's result must not depend on the rest of the batch, not even in a single bit.
    """

    library_alone = False  # whether the library runs also what takes it several passes

    def __init__(self, columns, batch_invariant=False):
        self.columns, self.batch_invariant = columns, batch_invariant
        self.weights, self._workspaces, self._conditional = _Weights(), {}, None
        self.twins = Twins(self.weights)
        self.first = None  # of the programs
        self.resident = None  # their network for the kernel that runs it whole

    def builder(self):
        """Return a builder for one program."""
        return LaunchBuilder(self.columns)

    def finish(self, builder):
        """Return the program of what a builder has collected."""
        program = LaunchProgram(builder.instructions, self)
        self.first = self.first or program
        return program

    def renew(self, program, executor):
        """Return the program itself; what other executors keep between calls is freed."""
        if executor not in _WITH_NODES:
            self._conditional = None
        self._workspaces = {key: value for key, value in self._workspaces.items() if key == _OF_GRAPHS}
        return program

    def take_resident(self, instructions):
        """Return a program's network for the kernel that runs it whole; ValueError if the kernel does not support it.

        There is one for all image sizes, since they share their weights: graphs need these for longer than a program is
        kept.
        """
        if self.resident is None:
            self.resident = Resident(instructions, self.columns, self.weights)
        else:
            read_network(instructions, self.columns)
        return self.resident

    def take_conditional(self, x, executor):
        """Return what inserts conditional nodes, or None if there are none for this batch and executor."""
        if executor not in _WITH_NODES or x.device.type != "cuda":
            return None
        if (reason := conditional_missing()) is not None:
            raise RuntimeError(f"no conditional nodes: {reason}")
        if self._conditional is None:
            self._conditional = Conditional(x.device)
        return self._conditional

    def take_workspace(self, device):
        """Return the memory for sums that several programs of a kernel share; None if they must not be shared."""
        from dynexec.kernels.conv import Workspace

        if self.batch_invariant:
            return None
        # Kernels of one stream run one after the other; those of another one must not use the same memory.
        key = None
        if device.type == "cuda":
            if makes_graph():
                key = _OF_GRAPHS
            elif torch.cuda.is_current_stream_capturing():
                return Workspace(device)  # of somebody else's graph, which may run beside anything
            else:
                key = torch.cuda.current_stream(device).cuda_stream
        if key not in self._workspaces:
            self._workspaces[key] = Workspace(device)
        return self._workspaces[key]


class _Weights:
    """Weights of convolutions as the kernels and the library read them: both channels_last."""

    def __init__(self):
        self._found = {}  # by identity, which holds while the convolution is kept

    def __call__(self, conv, depthwise=False):
        """Return weights, bias in float32, and bias in the dtype; a missing bias is None."""
        if id(conv) not in self._found:
            weight = conv.weight
            if depthwise:
                weight = weight.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)
            else:
                weight = weight.contiguous(memory_format=torch.channels_last)
            bias = None if conv.bias is None else conv.bias.float()
            self._found[id(conv)] = conv, (weight, bias, conv.bias)
        return self._found[id(conv)][1]
