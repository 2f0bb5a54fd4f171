"""Networks as folders without executable content: ``save`` writes one, ``load`` freezes what is in it."""

from dynexec.deployment.load import load
from dynexec.deployment.save import save

__all__ = ["load", "save"]
