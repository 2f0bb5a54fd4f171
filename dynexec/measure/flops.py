"""FLOPs of a dynamic network, split by what decisions can save."""

from contextlib import contextmanager
from dataclasses import dataclass
from threading import get_ident

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode


class FlopCount:
    """Base of what ``count_flops`` returns: has ``dense``, and ``of(decisions)`` with the policy charged."""

    def saving(self, decisions):
        """Compute the theoretical saving under ``decisions``: a float, which may be negative.

        This is the share of ``dense`` that is not needed on average, with the policy charged.
        """
        return 1.0 - self.of(decisions).double().mean().item() / self.dense


@dataclass(frozen=True)
class Flops(FlopCount):
    """FLOPs of one image. A multiply-add counts as two; only convolutions and matrix products count.

    Attributes
    ----------
    fixed : int
        Cost of every image: stem, shortcuts, head.
    block : tuple of int
        What a True decision adds in each block, by column: its residual branch or, with two sets of weights, the
        difference between them.
    policy : int
        Cost of the policy network; 0 without one.
    """

    fixed: int
    block: tuple[int, ...]
    policy: int = 0

    @property
    def dense(self):
        """FLOPs with all decisions True and without a policy: the static network."""
        return self.fixed + sum(self.block)

    def of(self, decisions):
        """Count the FLOPs that each image needs under ``decisions``, policy included.

        Parameters
        ----------
        decisions : bool tensor ``[N, L]`` or ``[L]``

        Returns
        -------
        int64 tensor ``[N]`` or scalar

        Raises
        ------
        ValueError
            If the number of columns is not the number of blocks.
        """
        if decisions.shape[-1:] != (len(self.block),):
            raise ValueError(f"decisions must be bool [N, {len(self.block)}], got shape {tuple(decisions.shape)}")
        block = torch.tensor(self.block, dtype=torch.int64, device=decisions.device)
        return self.fixed + self.policy + (decisions * block).sum(-1)


def count_flops(model, example_input):
    """Count the FLOPs of one image without computing anything: tensors inside only have shapes.

    Parameters
    ----------
    model : nn.Module
        A :class:`dynexec.nn.DynamicNetwork`, a converted model, or any other (which has no blocks, so all is fixed).
        Left as it is; counted in evaluation mode.
    example_input : tensor ``[N, ...]``, or the input of a network of :mod:`dynexec.models`
        Only its shape, dtype and device matter. N may be anything but 0; one image is counted.

    Returns
    -------
    Flops
        Or the result of the network's own ``count_flops``, which also has ``dense``, ``policy``, ``of`` and ``saving``.

    Raises
    ------
    TypeError, ValueError
        If ``example_input`` is not a tensor or holds no image, or if the model reads values.
    """
    if getattr(model, "counts_own_flops", False):  # by an attribute, as its class lives in a layer above this one
        return model.count_flops(example_input)
    if not isinstance(example_input, torch.Tensor):
        raise TypeError(f"example_input must be a tensor, got {type(example_input).__name__}")
    if example_input.dim() == 0 or len(example_input) == 0:
        raise ValueError(f"example_input must hold at least one image, got shape {tuple(example_input.shape)}")
    # A DynamicNetwork by its two parts, not its class, which lives in a layer above this one.
    split = hasattr(model, "backbone") and hasattr(model, "policy")
    backbone, policy = (model.backbone, model.policy) if split else (model, None)
    with evaluation_mode(model), FakeTensorMode(allow_non_fake_inputs=True) as fake, torch.no_grad():
        image = fake.from_tensor(example_input[:1].detach())
        fixed, block = _count(backbone, image)
        of_policy, its_blocks = _count(policy, image) if policy is not None else (0, ())
        return Flops(fixed, block, of_policy + sum(its_blocks))  # a policy may be a converted network: all of it runs


def count_call(module, *shape, dtype=torch.float32):
    """Count the FLOPs of calling ``module`` in evaluation mode with a tensor of this shape, without computing anything.

    Parameters
    ----------
    module : nn.Module
    *shape : int
        Shape of its only argument.
    dtype : torch.dtype
        Dtype of its only argument: that of the module's parameters.

    Returns
    -------
    int
    """
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    with evaluation_mode(module), FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        counter = FlopCounterMode(display=False)
        with counter:
            module(torch.empty(shape, dtype=dtype, device=device))
    return counter.get_total_flops()


@contextmanager
def evaluation_mode(model):
    """Context manager that puts ``model`` in evaluation mode, and its submodules back in their own modes at the end."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield model.eval()
    finally:
        for module, training in modes.items():
            module.training = training


def _count(model, image):
    """Count the FLOPs that all samples need, and what a True decision adds in each of the model's dynamic blocks."""
    # By its attribute, not its class: blocks live in a layer above this one.
    blocks = [m for m in model.modules() if hasattr(m, "shortcut_layers") and getattr(m, "placement", None) is not None]
    per_block = [0] * len(blocks)
    counter = FlopCounterMode(display=False)
    repeated = inside = 0  # counted once more; of residual branches
    entered, thread = {}, get_ident()  # others may run the model meanwhile

    def enter(block, arguments):
        if get_ident() == thread:
            entered[block] = counter.get_total_flops()

    def leave(block, arguments, named, output):
        nonlocal repeated, inside
        if get_ident() != thread:
            return
        total = counter.get_total_flops()
        own = total - entered[block]
        if getattr(block, "chooses_weights", False):
            block.expert()(*arguments, **named)
            other = counter.get_total_flops() - total
            repeated += other
            per_block[block.placement.column] += other - own
            return
        x = next(value for value in (*arguments, *named.values()) if isinstance(value, torch.Tensor))
        for layer in block.shortcut_layers():  # once more, to tell the shortcut from the residual branch
            x = layer(x)
        shortcut = counter.get_total_flops() - total
        repeated += shortcut
        inside += own - shortcut
        per_block[block.placement.column] += own - shortcut

    hooks = [block.register_forward_pre_hook(enter) for block in blocks]
    hooks += [block.register_forward_hook(leave, with_kwargs=True) for block in blocks]
    try:
        with counter:
            model(image)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise ValueError(
            f"the FLOPs of this {type(model).__name__} cannot be counted: what it computes depends on values, and here "
            f"tensors have shapes only ({error})"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    return counter.get_total_flops() - repeated - inside, tuple(per_block)
