"""Baselines that dynexec is compared with: every other way to run the same network on a CPU or a GPU.

A baseline is prepared once for a network and a batch size, then called with images and decisions. Baselines that are
``dense`` run the static network and ignore the decisions.
"""

import shutil
from copy import copy, deepcopy
from functools import lru_cache, partial

import torch

from dynexec.convert import revert
from dynexec.executors import freeze
from dynexec.executors.block import pack_module
from dynexec.executors.graphs import Graphs, choosing_algorithms
from dynexec.executors.instructions import count_readers
from dynexec.executors.launch_program import is_plain
from dynexec.executors.launches import LaunchPrograms
from dynexec.executors.segment import make_segments
from dynexec.measure.environment import why_missing
from dynexec.nn.experts import ExpertBlock
from dynexec.nn.residual import apply_layers, count_blocks, dynamic_blocks
from dynexec.report.libraries import export_module, open_in_onnx_runtime, open_in_openvino


class Baseline:
    """One way to run a network; subclasses get ready in ``prepare`` and compute in ``__call__``.

    Attributes
    ----------
    name : str
    dense : bool
        Whether it runs the static network, whatever the decisions.
    follows_decisions : bool
        Whether its time depends on the decisions, so that it must be timed for each keep rate.
    own : bool
        Whether it is dynexec's. If dense, it is then not a candidate for the strongest dense one.
    needs : tuple of str
        Packages that must be installed.
    device : str or None
        The only device type that it runs on; None: any.
    policy : callable or None
        The policy network as this baseline runs it, images to probabilities ``[N, L]``.

    Parameters
    ----------
    model : nn.Module
        Contains L dynamic blocks with columns (dynexec's own or converted), in evaluation mode, with or without a
        policy (see :class:`dynexec.nn.DynamicNetwork`). Not changed.
    images : tensor ``[N, C, H, W]``
        An example of the batch, in the dtype and on the device of the model.
    threads : int
        For libraries with thread pools of their own; torch's is set by the caller.
    """

    name = ""
    dense = False
    follows_decisions = False
    own = False
    needs = ()
    device = None

    def __init__(self, model, images, *, threads):
        policy = getattr(model, "policy", None)
        self.policy = None if policy is None else _Eager(policy)
        self.prepare(model, images, threads)
        if images.device.type == "cuda" and not self.follows_decisions:
            # cuDNN keeps the algorithms that it measures now. Those that run other batches would measure all the time.
            with choosing_algorithms():
                self(images, images.new_ones(len(images), count_blocks(_backbone(model)), dtype=torch.bool))

    def prepare(self, model, images, threads):
        """Build what :meth:`__call__` runs; arguments are those of the class."""
        raise NotImplementedError

    def __call__(self, images, decisions):
        """Map images ``[N, C, H, W]`` (contiguous) and bool decisions ``[N, L]`` to logits."""
        raise NotImplementedError

    @classmethod
    def missing(cls):
        """Return why it cannot run here, or None."""
        return why_missing(cls.needs)


class _Eager:
    """A channels_last copy of a module."""

    def __init__(self, module):
        self.module = deepcopy(module).to(memory_format=torch.channels_last)

    def __call__(self, images):
        return self.module(images.contiguous(memory_format=torch.channels_last))


class _PerBlock(Baseline):
    """A copy of the network in which every dynamic block computes ``self.block_forward(block, x, ...)``."""

    def prepare(self, model, images, threads):
        self.model = _Eager(_backbone(model))
        self.decisions = None
        for block in dynamic_blocks(self.model.module):
            block.forward = partial(self.block_forward, block)

    def __call__(self, images, decisions):
        self.decisions = decisions
        return self.model(images)

    def block_forward(self, block, x, *args, **kwargs):
        raise NotImplementedError


class MaskedEager(_PerBlock):
    """Computes everything, then multiplies by the mask: as published code does, and the reference for all others."""

    name = "masked eager"

    def block_forward(self, block, x, *args, **kwargs):
        keep = self.decisions[:, block.placement.column].to(x.dtype).reshape(-1, 1, 1, 1)
        if isinstance(block, ExpertBlock):
            other = block.forward_dense(x, *args, **kwargs)
            return block.expert()(x, *args, **kwargs) * keep + other * (1 - keep)
        shortcut = apply_layers(block.shortcut_layers(), x)
        return _full(block, x, shortcut, args, kwargs) * keep + shortcut * (1 - keep)


class NaiveGather(_PerBlock):
    """Per block, in eager mode: indexes the kept samples, runs the block, ``index_copy``."""

    name = "naive gather"
    follows_decisions = True

    def block_forward(self, block, x, *args, **kwargs):
        keep = self.decisions[:, block.placement.column]
        kept = keep.nonzero().squeeze(1)
        if isinstance(block, ExpertBlock):
            rest = (~keep).nonzero().squeeze(1)
            branches = [(kept, block.expert()), (rest, block.forward_dense)]
            parts = [(i, f(x[i], *args, **kwargs)) for i, f in branches if len(i)]
            y = parts[0][1].new_empty(len(x), *parts[0][1].shape[1:])
            for index, rows in parts:
                y.index_copy_(0, index, rows)
            return y
        shortcut = apply_layers(block.shortcut_layers(), x)
        if len(kept) == 0:
            return shortcut
        return shortcut.index_copy(0, kept, _full(block, x[kept], shortcut[kept], args, kwargs))


class GroupByPolicy(_PerBlock):
    """Runs samples with identical decisions together through a static sub-network, in eager mode."""

    name = "group by policy"
    follows_decisions = True

    def __call__(self, images, decisions):
        policies, group = torch.unique(decisions, dim=0, return_inverse=True)
        logits = None
        for number, policy in enumerate(policies):
            members = (group == number).nonzero().squeeze(1)
            self.decisions = policy.tolist()
            rows = self.model(images[members])
            if logits is None:
                logits = rows.new_empty(len(images), *rows.shape[1:])
            logits[members] = rows
        return logits

    def block_forward(self, block, x, *args, **kwargs):
        keep = self.decisions[block.placement.column]
        if isinstance(block, ExpertBlock):
            return (block.expert() if keep else block.forward_dense)(x, *args, **kwargs)
        if keep:
            return block.forward_dense(x, *args, **kwargs)
        return apply_layers(block.shortcut_layers(), x)


class DenseEager(Baseline):
    """The static network in eager mode, channels_last: what most people run."""

    name = "dense eager"
    dense = True

    def prepare(self, model, images, threads):
        self.model = _Eager(static_network(model))

    def __call__(self, images, decisions):
        return self.model(images)


class DenseCompiled(DenseEager):
    """The static network under ``torch.compile``, with its weights frozen, compiled for this batch size."""

    name = "dense compiled"

    def prepare(self, model, images, threads):
        super().prepare(model, images, threads)
        torch.compiler.reset()  # the code of earlier batch sizes and networks counts against a limit
        how = {"mode": "max-autotune"} if images.device.type == "cuda" else {"options": {"freezing": True}}
        self.model.module.compile(dynamic=False, fullgraph=True, **how)
        self.model(images)

    @classmethod
    def missing(cls):
        return None if shutil.which("g++") or shutil.which("clang++") else "no C++ compiler"


class LibraryPrograms(LaunchPrograms):
    """A static network in the library's convolutions alone.

    cuDNN adds no bias unless a ReLU follows, and a separate pass for it takes as long as a projection: therefore the
    bias of a shortcut is moved to the convolution that the shortcut is added to.
    """

    library_alone = True

    def finish(self, builder):
        readers = count_readers(builder.instructions)
        adding = {id(step.other): step for step in builder.instructions if step.op == "conv" and step.other is not None}
        for step in builder.instructions:
            alone = step.op == "conv" and step.activation is None and readers[id(step.output)] == 1
            if alone and is_plain(step):  # or a kernel of ours runs it, which wants a bias
                if (last := adding.get(id(step.output))) is not None:
                    step.conv, last.conv = copy(step.conv), copy(last.conv)
                    step.conv.bias, last.conv.bias = None, last.conv.bias + step.conv.bias
        return super().finish(builder)


class DenseLibrary(Baseline):
    """The static network, BatchNorm folded, in cuDNN's convolutions with bias, addition and ReLU, in one CUDA graph."""

    name = "dense cuDNN"
    dense = True
    device = "cuda"

    def prepare(self, model, images, threads):
        packed = pack_module(static_network(model).to(memory_format=torch.channels_last), images)
        module, segments = make_segments(packed.__self__, partial(LibraryPrograms, 0))
        assert segments, "a network without convolutions"
        self.graphs = Graphs(lambda images, _: (module.forward(images),), layout=torch.channels_last)

    def __call__(self, images, decisions):
        output = self.graphs(images, None, "dense")[0]
        if self.graphs.failed:  # launched one by one it would be no match
            raise RuntimeError(f"no CUDA graph: {next(iter(self.graphs.failed.values()))}")
        return output


class OnnxRuntime(Baseline):
    """The static network in ONNX Runtime, with all graph optimisations."""

    name = "ONNX Runtime"
    dense = True
    needs = ("onnxruntime", "onnxscript")
    device = "cpu"

    def prepare(self, model, images, threads):
        self.run = open_in_onnx_runtime(export_onnx(model, tuple(images.shape)), threads)

    def __call__(self, images, decisions):
        return self.run(images)[0]


class OpenVino(Baseline):
    """The static network in OpenVINO, set for latency, float32."""

    name = "OpenVINO"
    dense = True
    needs = ("openvino", "onnxscript")
    device = "cpu"

    def prepare(self, model, images, threads):
        self.run = open_in_openvino(export_onnx(model, tuple(images.shape)), threads)

    def __call__(self, images, decisions):
        return self.run(images)[0]


class Dynexec(Baseline):
    """The frozen network, given the decisions."""

    name = "dynexec"
    follows_decisions = True
    own = True

    def prepare(self, model, images, threads):
        self.model = freeze(model, images)
        if self.policy is not None:
            self.policy = lambda images: self.model.policy(images.contiguous(memory_format=torch.channels_last))

    def __call__(self, images, decisions):
        return self.model(images, decisions)


class DenseFrozen(Dynexec):
    """dynexec itself at keep rate 1."""

    name = "dense frozen"
    dense = True
    follows_decisions = False

    @classmethod
    def like(cls, frozen):
        """Return one with the network of ``frozen``, a :class:`Dynexec`: another might be frozen to run differently."""
        found = object.__new__(cls)
        vars(found).update(vars(frozen))
        return found

    def __call__(self, images, decisions):
        return self.model(images, torch.ones_like(decisions))


REFERENCE = MaskedEager
BASELINES = (
    MaskedEager,
    DenseEager,
    DenseLibrary,
    DenseCompiled,
    OnnxRuntime,
    OpenVino,
    DenseFrozen,
    NaiveGather,
    GroupByPolicy,
)


def static_network(model):
    """Return a copy of the backbone of ``model`` without decisions, as if all were True."""
    static = deepcopy(_backbone(model))
    for name, block in list(static.named_modules()):
        if isinstance(block, ExpertBlock):
            parent, _, child = name.rpartition(".")
            setattr(static.get_submodule(parent), child, block.expert())
    revert(static)
    for block in dynamic_blocks(static):
        block.placement = None  # a layer like any other
    return static.eval()


def _backbone(model):
    return getattr(model, "backbone", model)


@lru_cache(maxsize=1)  # ONNX Runtime and OpenVINO take the same file
def export_onnx(model, shape):
    """Export the static network of ``model`` as an ONNX file (bytes), for float32 input of one shape."""
    return export_module(static_network(model), torch.zeros(shape))


def _full(block, x, shortcut, args, kwargs):
    layers = block.residual_layers()
    if layers is None:
        return block.forward_dense(x, *args, **kwargs)
    full = apply_layers(layers, x) + shortcut
    activation = block.activation_layer()
    return full if activation is None else activation(full)
