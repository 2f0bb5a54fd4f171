"""Networks that one launch of the kernel in ``csrc/cuda/resident.h`` runs whole: residual networks for small images.

A thread block takes one sample through all layers: its activations stay in shared memory, and not even the weights of a
residual block that the sample drops are read.
"""

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F

from dynexec import native

STAGES = 3
_WIDTHS = (16, 32, 64)
_LARGEST_IMAGE, _MOST_BLOCKS = 32, 512
_DTYPES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class ResidentNetwork:
    """A packed network, with everything on one device.

    Attributes
    ----------
    weights : uint8 tensor
        The convolutions' fragments, one convolution after the other.
    biases : float32 tensor
    convs : int32 tensor ``[1 + 2 L, 3]``
        For the stem and for each block's two convolutions: where their weights begin, their size in bytes, where their
        biases begin.
    head, head_biases : float32 tensors ``[outputs, 64]``, ``[outputs]``
    ends : tuple of three ints
        For each stage, the number of the block after its last one.
    """

    weights: torch.Tensor
    biases: torch.Tensor
    convs: torch.Tensor
    head: torch.Tensor
    head_biases: torch.Tensor
    ends: tuple[int, int, int]

    def numbers(self):
        """Return the network as numbers for the launch."""
        tensors = self.weights, self.biases, self.convs, self.head, self.head_biases
        return [*(tensor.data_ptr() for tensor in tensors), *self.ends, len(self.head)]


def pack_network(convs, head, blocks, dtype):
    """Pack a network for the kernel.

    Parameters
    ----------
    convs : list of (float tensor ``[K, C, 3, 3]``, float tensor ``[K]``)
        Weights and biases of the stem and of two convolutions per block, with BatchNorm folded.
    head : (float tensor ``[outputs, 64]``, float tensor ``[outputs]``)
        Weights and biases of the linear layer.
    blocks : three ints
        Number of blocks of each stage.
    dtype : torch.float16 or torch.bfloat16
    """
    found, table, at, biases_at = [], [], 0, 0
    for weight, bias in convs:
        fragments = pack_fragments(F.pad(weight, (0, 0, 0, 0, 0, -weight.shape[1] % 16)).to(dtype))
        table.append((at, fragments.numel(), biases_at))
        found.append(fragments)
        at, biases_at = at + fragments.numel(), biases_at + len(bias)
    ends = tuple(sum(blocks[: stage + 1]) for stage in range(STAGES))
    return ResidentNetwork(
        torch.cat(found),
        torch.cat([bias.float() for _, bias in convs]),
        torch.tensor(table, dtype=torch.int32, device=convs[0][0].device),
        *(tensor.float().contiguous() for tensor in head),
        ends,
    )


def pack_fragments(weight):
    """Pack 16-bit weights ``[K, C, 3, 3]`` as the right-hand sides of 16x16 by 16x8 products: uint8.

    The order is ``[K / 8][kernel h][kernel w][C / 16][lane][4]``: lane i has, of output channel i / 4, the input
    channels 2 (i % 4), the next one, and those 8 further.
    """
    k, c = weight.shape[:2]
    split = weight.permute(2, 3, 1, 0).reshape(9, c // 16, 2, 4, 2, k // 8, 8)
    return split.permute(5, 0, 1, 6, 3, 2, 4).contiguous().flatten().view(torch.uint8)


class Resident:
    """A program's network in one launch: ``resident(x, decisions)``.

    Parameters
    ----------
    instructions : list of Instruction
    columns : int
        Number of columns of the decisions.
    weights : callable
        Returns those of a convolution, as (weights, biases, ...).

    Raises
    ------
    ValueError
        If the kernel does not support this network; says why.
    """

    def __init__(self, instructions, columns, weights):
        convs, head, self.blocks = read_network(instructions, columns)
        self.dtype = convs[0].dtype
        weight, bias, *_ = weights(head)
        found = [weights(conv)[:2] for conv in convs]
        self.network = pack_network(found, (weight.flatten(1), bias), self.blocks, self.dtype)

    def __call__(self, x, decisions):
        """Compute logits ``[N, outputs, 1, 1]`` in the dtype of ``x``, for bool decisions ``[N, L]``."""
        return self.launch(x, decisions)

    def decide(self, x, policy):
        """Compute logits for the decisions of a policy, another Resident, in one launch; return both."""
        if len(policy.network.head) != sum(self.blocks):
            raise ValueError(
                f"the policy decides on {len(policy.network.head)} blocks, the network has {sum(self.blocks)}"
            )
        decisions = torch.empty(len(x), sum(self.blocks), dtype=torch.bool, device=x.device)
        return self.launch(x, decisions, policy), decisions

    def launch(self, x, decisions, policy=None, blocks=None):
        """Compute logits; a ``policy`` writes ``decisions``. ``blocks``: how many share a sample; None: what fits."""
        if x.device.type != "cuda" or (reason := native.cuda_missing()) is not None:
            raise RuntimeError(
                f"the resident kernel needs a GPU and the native part: {reason if x.is_cuda else x.device}"
            )
        if x.dtype != self.dtype:
            raise ValueError(f"x must be {self.dtype}, got {x.dtype}")
        results = torch.empty(len(x), len(self.network.head), dtype=torch.float32, device=x.device)
        decisions = decisions.bool().contiguous()
        properties = torch.cuda.get_device_properties(x.device)
        count = properties.multi_processor_count
        if blocks is None:
            blocks = cluster_size(len(x), _clusters(x.device.index) if properties.major >= 9 else {})
        order = None
        if policy is None and len(x) > count:  # those with the most work first
            order = decisions.sum(1).argsort(descending=True).int()
        native.cuda().launch_resident(
            torch.cuda.current_stream(x.device).cuda_stream,
            images=x.data_ptr(), strides=x.stride(), samples=len(x), size=x.shape[2], given=decisions.data_ptr(),
            decided=decisions.data_ptr(), results=results.data_ptr(), order=0 if order is None else order.data_ptr(),
            bfloat16=x.dtype == torch.bfloat16, blocks=blocks,
            network=self.network.numbers(),
            policy=None if policy is None else policy.network.numbers(),
        )  # fmt: skip
        return results.to(x.dtype)[:, :, None, None]


def cluster_size(samples, places):
    """Return how many thread blocks share a sample; ``places``: how many clusters of a size run at once, if any."""
    return max([1, *(size for size, count in places.items() if samples <= count)])


@cache
def _clusters(device):
    with torch.cuda.device(device):
        return {size: native.cuda().count_resident_clusters(size) for size in (2, 4)}


def read_network(instructions, columns):
    """Return the convolutions, the linear layer and the numbers of blocks that a program's instructions consist of.

    Without ``columns``, those of a policy: all blocks always run, and a sigmoid follows the linear layer. ValueError,
    with the reason, if they are not such a network.
    """
    steps = [step for step in instructions if step.op not in ("load", "store")]
    if any(step.op == "gate" and not step.choice for step in steps):
        raise ValueError("it has blocks with two sets of weights")
    convs = [step for step in steps if step.op == "conv"]
    if len(convs) < 2 or len(convs) % 2:
        raise ValueError("it does not have a stem, two convolutions in each block and a linear layer")
    stem, *body, last = convs
    _check_image(stem)
    blocks, x = [0] * STAGES, stem.output
    shortcuts = _read_shortcuts(steps)
    for number, (first, second) in enumerate(zip(body[::2], body[1::2], strict=True)):
        stage = _WIDTHS.index(first.output.channels) if first.output.channels in _WIDTHS else -1
        enters = first.output.channels != x.channels
        follows = (
            stage > 0 and blocks[stage - 1] and not any(blocks[stage:]) if enters else not any(blocks[stage + 1 :])
        )
        if stage < 0 or not follows:
            raise ValueError(f"block {number} is not in one of three stages of {_WIDTHS} channels")
        _check_conv(first, f"the first convolution of block {number}", 2 if enters else 1)
        _check_conv(second, f"the second convolution of block {number}", 1)
        shortcut = shortcuts.get(id(second.other)) if enters else second.other
        size = stem.output.height >> stage
        if any(
            step.output.shape != (_WIDTHS[stage], size, size) or step.conv.dtype != stem.conv.dtype
            for step in (first, second)
        ):
            raise ValueError(f"block {number} does not give {size}x{size} pixels in {stem.conv.dtype}")
        if first.input is not x or first.other is not None or second.input is not first.output or shortcut is not x:
            raise ValueError(f"block {number} is not two convolutions and a shortcut, average pooling where it halves")
        blocks[stage] += 1
        x = second.output
    if not all(blocks) or sum(blocks) > _MOST_BLOCKS:
        raise ValueError(
            f"it has {blocks} blocks of {_WIDTHS} channels: none may be missing, nor be over {_MOST_BLOCKS}"
        )
    _check_head(steps, last, x)
    gates = _read_gates(instructions, columns, body)
    sigmoid = [step for step in steps if step.input is last.output]
    if [(step.op, step.other, step.activation) for step in sigmoid] != [("add", None, "sigmoid")] * (columns == 0):
        raise ValueError("behind the linear layer must be nothing, or for a policy a sigmoid")
    if len(steps) != len(convs) + gates + len(sigmoid) + 1 + 2 * (STAGES - 1):
        raise ValueError("it does more than stem, blocks, pooling and a linear layer")
    return [step.conv for step in (stem, *body)], last.conv, blocks


def _read_gates(instructions, columns, body):
    """Count the gates, each of which must enclose the two convolutions of one block, in the order of the columns."""
    found = []
    for number, step in enumerate(instructions):
        if step.op == "gate":
            found.append((step.column, [id(inner) for inner in instructions[number + 1 : number + 1 + step.gated]]))
    pairs = zip(body[::2], body[1::2], strict=True)
    expected = [(column, [id(first), id(second)]) for column, (first, second) in enumerate(pairs)] if columns else []
    if found != expected or len(found) != columns:
        raise ValueError(f"its {len(found)} gates are not each around one of {len(body) // 2} blocks, in their order")
    return len(found)


def _read_shortcuts(steps):
    """Map the identity of a value to the value of which it is the average of 2x2 pixels, with channels of zeros."""
    pooled = {
        id(step.output): step.input
        for step in steps
        if step.op == "sum"
        and (*step.kernel, *step.stride, *step.padding) == (2, 2, 2, 2, 0, 0)
        and step.divisor in (0, 4)
    }
    return {
        id(step.output): pooled[id(step.input)]
        for step in steps
        if step.op == "add" and step.other is None and step.activation is None and id(step.input) in pooled
    }


def _check_image(stem):
    channels, height, width = stem.input.shape
    wanted = _WIDTHS[0], height, width
    if height != width or height > _LARGEST_IMAGE or height % 4 or channels != 3 or stem.output.shape != wanted:
        raise ValueError(
            f"images must be [3, S, S] with S a multiple of 4 up to {_LARGEST_IMAGE}, and its stem must give "
            f"{_WIDTHS[0]} channels of that size, got {tuple(stem.input.shape)} and {tuple(stem.output.shape)}"
        )
    if stem.conv.dtype not in _DTYPES:
        raise ValueError(f"the kernel computes in float16 and bfloat16, not in {stem.conv.dtype}")
    _check_conv(stem, "the stem", 1)


def _check_conv(step, name, stride):
    geometry = (*step.kernel, *step.stride, *step.dilation, *step.padding)
    if geometry != (3, 3, stride, stride, 1, 1, 1, 1) or step.activation != "relu":
        raise ValueError(
            f"{name} must be 3x3 with stride {stride}, padding 1 and ReLU, got kernel {tuple(step.kernel)}, stride "
            f"{tuple(step.stride)}, dilation {tuple(step.dilation)}, padding {tuple(step.padding)}, {step.activation}"
        )


def _check_head(steps, last, x):
    means = [step for step in steps if step.op == "sum" and step.output is last.input]
    whole = (x.height, x.width)
    good = len(means) == 1 and means[0].input is x and tuple(means[0].kernel) == whole
    good = good and means[0].divisor in (0, x.pixels) and not any(means[0].padding)
    good = good and tuple(last.conv.shape[1:]) == (_WIDTHS[-1], 1, 1)
    if not good or last.output.pixels != 1 or last.activation is not None or last.other is not None:
        raise ValueError("its last layers must be the mean of all pixels and a linear layer")
