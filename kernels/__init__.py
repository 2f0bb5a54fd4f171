"""Triton device code; installed as ``dynexec.kernels``."""
