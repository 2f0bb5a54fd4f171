"""The command line: ``dynexec info | demo | bench | report | profile``, also as ``python -m dynexec``.

Each command is a module with ``add_arguments(parser)`` and ``main(args) -> exit status``, imported only when its
command is run.
"""

import argparse
import importlib
import sys

# name -> (module, extra that brings the packages it needs, help)
COMMANDS = {
    "info": ("dynexec.info", None, "versions, devices, threads, what is native and why not"),
    "demo": ("dynexec.report.demo", "demo", "dynamic networks on real digits, photos and video: one table, one page"),
    "bench": ("dynexec.report.bench", "bench", "theoretical against realised speed-up, against every baseline"),
    "report": ("dynexec.report.page", "bench", "one self-contained HTML page of bench, demo and profile results"),
    "profile": (
        "dynexec.report.profile",
        "bench",
        "where the time of a network goes: per block, and what is lost to what",
    ),
}


def main(argv=None):
    """Run the command line; return the exit status, 130 after an interrupt."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="dynexec", description="Execute dynamic neural networks.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    parsers = {name: commands.add_parser(name, help=text, description=text) for name, (_, _, text) in COMMANDS.items()}
    if not argv or argv[0] not in COMMANDS:
        parser.parse_args(argv)  # prints help or the error, and exits
    try:
        module = _load(parser, argv[0])
        module.add_arguments(parsers[argv[0]])
        return module.main(parser.parse_args(argv))
    except OSError as error:  # a folder that may not be written, a full disk
        print(f"dynexec {argv[0]}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:  # its text says what is there already
        print(f"dynexec {argv[0]}: " + ", ".join(["interrupted", *map(str, interrupt.args)]), file=sys.stderr)
        return 130


def _load(parser, command):
    module, extra, _ = COMMANDS[command]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name.split(".")[0] == "dynexec":
            raise
        parser.error(f"{command} needs the package {error.name}: pip install 'dynexec[{extra}]'")
