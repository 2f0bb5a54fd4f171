"""Blocks that obey decisions, and the ``decide`` context from which they read them."""

from dynexec.nn.batch_norm import recompute_batch_norm
from dynexec.nn.context import active_route, decide
from dynexec.nn.drop_path import SubsetDropPath
from dynexec.nn.experts import ExpertBlock
from dynexec.nn.network import DynamicNetwork
from dynexec.nn.residual import DynamicBlock, Placement, ResidualBlock, assign_columns, dynamic_blocks
from dynexec.nn.routed import RoutedNetwork
from dynexec.nn.structure import Adapter

__all__ = [
    "Adapter",
    "DynamicBlock",
    "DynamicNetwork",
    "ExpertBlock",
    "Placement",
    "ResidualBlock",
    "RoutedNetwork",
    "SubsetDropPath",
    "active_route",
    "assign_columns",
    "decide",
    "dynamic_blocks",
    "recompute_batch_norm",
]
