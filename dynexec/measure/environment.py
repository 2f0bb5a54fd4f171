"""The environment that measured times depend on: the processor, and package versions."""

import importlib.metadata
import platform
from functools import lru_cache
from pathlib import Path


@lru_cache(maxsize=1)
def processor_name():
    """Return the CPU's name as the system reports it, for instance ``"AMD EPYC 7B13"``."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def package_version(package):
    """Return the version of an installed package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
