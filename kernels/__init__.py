"""Triton device code; installed as ``dynexec.kernels``. Needs torch and triton, and nothing else of dynexec.

Activations are channels_last batches ``[N, C, H, W]``: in memory N rows of pixels of C channels. Every kernel but
those of :mod:`plan` and :mod:`rows` works on *some rows*: those that ``index`` names from ``offset[0]`` up to
``offset[1]``, both on the device, so that nobody waits to know how many they are; or on all of them where there is no
index. It reads and writes each sample at its own place, hence nothing is moved, and rows that the index does not name
stay as they were.

Grids are of a fixed size, as many programs as the device runs at once, and each program takes every so many-th tile of
those that there are.
"""
