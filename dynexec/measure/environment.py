"""The environment that measured times depend on: the processor, and package versions."""

import importlib.metadata
import importlib.util
import platform
from functools import lru_cache
from pathlib import Path

# Modules that are not called as the package that brings them.
_PACKAGES = {"skimage": "scikit-image", "sklearn": "scikit-learn", "skvideo": "scikit-video"}


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


def missing_packages(modules):
    """Return the names of the packages to install for those of ``modules`` that are not installed, a tuple of str."""
    return tuple(_PACKAGES.get(name, name) for name in modules if importlib.util.find_spec(name) is None)


def why_missing(modules):
    """Return "not installed: " and :func:`missing_packages`, or None if there are none."""
    absent = missing_packages(modules)
    return f"not installed: {', '.join(absent)}" if absent else None
