"""Thousands of calls of frozen networks, no two alike: right outputs, and memory that does not grow.

    python bench/soak.py --calls 10000

A frozen BlockDrop network and a frozen AdaShare one, whose parts are chosen per task, run on random batch sizes from 0 to 16,
image sizes and decisions. Every tenth output, drawn at random, is compared with the model's own. The last quarter of the
calls comes from four threads at once. Resident memory is read every hundred calls; once each network has seen all
sizes, for which the first fifth of the calls is given, it may grow by 16 MB. Exit status 1 if it grew more, or an
output was another. Linux only.
"""

import argparse
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import dynexec
from dynexec.executors.proof import relative_error
from dynexec.models import adashare_resnet, blockdrop_resnet

SIZES = (16, 24, 32)
LARGEST_BATCH = 16
THREADS = 4
TOLERANCE = 1e-5
GROWTH = 16.0  # MB
CHECKED = 0.1  # of the calls


def resident():
    """Resident memory in MB."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmRSS"].split()[0]) / 1024
