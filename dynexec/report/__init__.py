"""Benchmarks, their networks and baselines, video decoding, reports and the demo: the code of the commands."""
