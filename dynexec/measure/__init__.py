"""What a network costs: FLOPs."""

from dynexec.measure.flops import Flops, count_call, count_flops, evaluation_mode

__all__ = ["Flops", "count_call", "count_flops", "evaluation_mode"]
