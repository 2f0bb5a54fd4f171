"""A backbone of dynamic blocks, with the policy that decides for it."""

from torch import nn

from dynexec.nn.context import decide
from dynexec.nn.residual import dynamic_blocks
from dynexec.policy import threshold


class DynamicNetwork(nn.Module):
    """Network that decides per sample which blocks to run, then runs them.

    Parameters
    ----------
    backbone : nn.Module
        Contains L dynamic blocks with columns: a converted model, or one built from :class:`dynexec.nn.ResidualBlock`
        with its columns assigned.
    policy : nn.Module, optional
        ``policy(images)`` returns keep probabilities ``[N, L]``. None: decisions must be given in every call.

    Raises
    ------
    ValueError
        If ``backbone`` has no dynamic block with a column.
    """

    def __init__(self, backbone, policy=None):
        super().__init__()
        if not any(block.placement for block in dynamic_blocks(backbone)):
            raise ValueError("backbone has no dynamic block with a column: call dynexec.convert(backbone) first")
        self.backbone = backbone
        self.policy = policy

    def forward(self, images, decisions=None, *, return_decisions=False, soft_decisions=None, mode="exact"):
        """Run the backbone on the blocks that the decisions keep.

        Parameters
        ----------
        images : float tensor ``[N, ...]``
        decisions : bool tensor ``[N, L]`` or ``[L]``, optional
            None: the policy decides, deterministically, keeping a block if its probability is at least 0.5.
        return_decisions : bool
            Also return the decisions.
        soft_decisions : float tensor ``[N, L]`` or ``[L]``, optional
            In place of decisions: the weights of what a True decision gives, for :class:`dynexec.decide` in soft mode.
        mode : {"exact", "capacity"}
            See :class:`dynexec.decide`.

        Returns
        -------
        The backbone's output, or ``(output, decisions)``.

        Raises
        ------
        TypeError, ValueError
            As in :class:`dynexec.decide`; also if decisions and soft decisions are both given, or neither is and there
            is no policy.
        """
        if soft_decisions is not None:
            if decisions is not None:
                raise ValueError("decisions must be None where soft_decisions are given")
            decisions, mode = soft_decisions, "soft"
        if decisions is None:
            if self.policy is None:
                raise ValueError("decisions is None, but this network has no policy: give bool decisions [N, L]")
            decisions = threshold(self.policy(images))
        with decide(decisions, mode=mode):
            output = self.backbone(images)
        return (output, decisions) if return_decisions else output
