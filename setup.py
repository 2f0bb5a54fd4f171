from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["dynexec", "dynexec.*"]), "dynexec.kernels"])
