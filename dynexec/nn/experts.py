"""Blocks with two sets of weights, one of which runs for each sample (SpotTune, Guo et al., CVPR 2019, section 3)."""

import torch

from dynexec.nn.batch_norm import (
    explain_batch_norm,
    hold_batch_norm,
    meets_other_processes,
    uses_batch_statistics,
)
from dynexec.nn.residual import DynamicBlock, choose, computes_all, with_zero_gradients
from dynexec.nn.rows import join_rows, part_rows


class ExpertBlock(DynamicBlock):
    """Mixin for an ``nn.Module`` in whose place samples with a True decision run another module of the same shapes.

    Equivalent to ``torch.where(decisions[:, None, None, None], block.expert()(x), block.forward_dense(x))``. Outside
    ``decide`` it is the block itself. In training mode BatchNorm computes its statistics over all samples, over those
    that run it, or not at all, as the block's placement says.
    """

    chooses_weights = True  # for those who may not import this class

    def expert(self):
        """Return the module for samples whose decision is True."""
        raise NotImplementedError

    def forward_decided(self, execution, x, args, kwargs):
        if any(isinstance(value, torch.Tensor) for value in (*args, *kwargs.values())):
            raise TypeError(
                f"inside decide a block takes one tensor, but the {type(self).__name__} of column "
                f"{self.placement.column} got more"
            )
        execution.check(x, self.placement.num_columns)
        column, expert = self.placement.column, self.expert()
        if self.training and self.placement.batch_norm == "frozen":
            hold_batch_norm(expert)  # it may be registered elsewhere
        own = (self, *self.shortcut_layers())  # which may be registered elsewhere
        trains = uses_batch_statistics(*own, expert)
        if computes_all(self, execution, x) or (trains and self.placement.batch_norm == "all"):
            # A branch may overwrite its input, which the other one needs.
            other = self.forward_dense(x.clone(), *args, **kwargs)
            return choose(execution.column(column), expert(x, *args, **kwargs), other)
        route = execution.route(x.shape[0])
        groups = [(self.forward_dense, own, route.group(column, 0)), (expert, (expert,), route.group(column, 1))]
        try:
            return _run_groups(groups, x, args, kwargs)
        except ValueError as error:
            sizes = " and ".join(str(len(index)) for _, _, index in groups)
            explain_batch_norm(error, self.placement, f"{sizes} samples for the two sets of weights of")
            raise


def _run_groups(groups, x, args, kwargs):
    """Run each group's function on its samples; the modules of one that need not run get zero gradients."""
    running = [group for group in groups if len(group[2]) or meets_other_processes(*group[1])]
    if len(running) > 1:
        indices = [index for _, _, index in groups]
        parts = part_rows(x, indices)
        return join_rows([f(rows, *args, **kwargs) for (f, _, _), rows in zip(groups, parts, strict=True)], indices)
    ((function, modules, _),) = running or groups[:1]  # of an empty batch, the first runs
    y = function(x, *args, **kwargs)
    (idle,) = (others for _, others, _ in groups if others is not modules)
    return with_zero_gradients(y, *idle) if torch.is_grad_enabled() else y
