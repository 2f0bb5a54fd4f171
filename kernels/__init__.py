"""Triton device code; installed as ``dynexec.kernels``. Needs torch and triton, and nothing else of dynexec.

Activations are channels_last batches ``[N, C, H, W]``: N rows of pixels of C channels in memory. Every kernel except
those of :mod:`plan` and :mod:`rows` works on *some rows*: those that ``index`` names from ``offset[0]`` up to
``offset[1]``, both on the device, so that nothing waits to know how many these are; or on all rows if there is no
index. It reads and writes each sample in place, so no rows are moved, and rows that the index does not name stay as
they were.

Grids have a fixed size, as many programs as the device runs at once, and program i takes every tile whose number is i
modulo that size.
"""
