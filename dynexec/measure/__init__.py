"""What a network costs in FLOPs, and where its time goes."""

from dynexec.measure.flops import Flops, count_call, count_flops, evaluation_mode
from dynexec.measure.profile import Part, Profile

__all__ = ["Flops", "Part", "Profile", "count_call", "count_flops", "evaluation_mode"]
