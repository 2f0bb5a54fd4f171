"""Writes docs/api.md from the docstrings of what users import."""

import inspect
import re
from pathlib import Path

import dynexec
from dynexec.models import training

PATH = Path(__file__).parents[1] / "docs" / "api.md"
# Module -> names, in the order of the page. What a later module exports again is left to the first one.
EXPORTS = {
    dynexec: [name for name in dynexec.__all__ if not inspect.ismodule(getattr(dynexec, name))],
    dynexec.nn: dynexec.nn.__all__,
    dynexec.ops: ["gather_rows", "scatter_rows", "scatter_rows_", "plan"],
    dynexec.policy: dynexec.policy.__all__,
    dynexec.models: dynexec.models.__all__,
    training: ["Evaluation", "evaluate", "train_dense", "train_policy", "fine_tune"],
    dynexec.measure: dynexec.measure.__all__,
}
# Of a class, what users call or override. Calling a network is its ``forward``.
MEMBERS = {
    "Adapter": ["residual_layers", "shortcut_layers", "activation_layer"],
    "Conversion": ["num_blocks"],
    "DynamicNetwork": ["forward"],
    "Flops": ["dense", "of", "saving"],
    "FrozenNetwork": ["forward", "explain", "profile"],
    "Profile": ["theoretical", "to_dict", "write_json", "read_json", "chrome_trace"],
    "Route": ["from_decisions", "num_samples", "num_blocks", "exact", "counts", "count", "group"],
    "RoutedNetwork": ["part_names", "example_decisions", "run_dense", "check_inputs", "count_flops"],
    "SharingTree": ["shared", "num_layers", "num_tasks", "column_of", "replace", "trunks", "format", "draw"],
    "BlockDrop": ["forward"],
    "SpotTune": ["forward", "freeze_pretrained"],
    "SubsetDropPath": ["forward"],
    **{name: ["forward", "count_flops"] for name in ("ARNet", "AdaMML", "AdaShare", "FeatureSharing")},
}
NOT_BUILT = {"FrozenNetwork", "DynamicBlock", "RoutedNetwork"}  # by users
_LISTS = ("Parameters", "Attributes", "Returns", "Raises")


def api_page():
    """The text of the page."""
    parts = [
        "# API\n\n<!-- Written by bench/api.py from the docstrings: change those. -->\n\n"
        "What each thing does, takes, gives and refuses. The ideas behind them are in [concepts.md](concepts.md).\n"
    ]
    described = set()
    for module, names in EXPORTS.items():
        things = {name: getattr(module, name) for name in names}
        new = {name: thing for name, thing in things.items() if id(thing) not in described}
        described |= {id(thing) for thing in new.values()}
        parts.append(f"## {module.__name__}\n\n{render(inspect.getdoc(module))}")
        if again := [f"`{name}`" for name in things if name not in new]:
            parts.append(f"Also here: {', '.join(again)}, described above.\n")
        parts += [entry(name, thing) for name, thing in sorted(new.items(), key=lambda item: item[0].lower())]
    return "\n".join(parts)


def entry(name, thing):
    """A function or class, with the members of :data:`MEMBERS`."""
    text = f"### {name}\n\n"
    if name not in NOT_BUILT:
        text += f"`{name}{signature(thing)}`\n\n"
    text += render(inspect.getdoc(thing))
    for member in MEMBERS.get(name, ()):
        raw = inspect.getattr_static(thing, member)
        function = raw.fget if isinstance(raw, property) else getattr(thing, member)
        label = member if isinstance(raw, property) else f"{member}{signature(function)}"
        text += f"\n**`.{label}`**\n\n{render(inspect.getdoc(function))}"
    return text


def signature(thing):
    """The arguments as text, without ``self`` and annotations."""
    found = inspect.signature(thing)
    parameters = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for name, parameter in found.parameters.items()
        if name != "self"
    ]
    return str(found.replace(parameters=parameters, return_annotation=inspect.Signature.empty))


def render(docstring):
    """A docstring in numpy's style as Markdown."""
    head, *sections = re.split(r"^(\w+)\n-{3,}\n", docstring, flags=re.MULTILINE)
    text = f"{inline(head.strip())}\n"
    for title, body in zip(sections[::2], sections[1::2]):
        text += f"\n*{title}*\n\n" + (items(body) if title in _LISTS else f"{inline(body.strip())}\n")
    return text


def items(body):
    """The entries of a section, each with its lines of description, as a list."""
    lines = []
    for line in body.rstrip().splitlines():
        if line.startswith(" ") or not line:
            if line and lines[-1].startswith("* ") and lines[-1][-1] not in ".:;,":
                lines[-1] += "."
            lines.append(line and f"  {line.strip()}")
        else:
            name, colon, kind = line.partition(" : ")
            lines.append(f"* `{name}`: {kind}" if colon else f"* {line}")
    return inline("\n".join(lines)) + "\n"


def inline(text):
    """Sphinx's roles and double backticks as Markdown's code."""
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text)
    return re.sub(r"``(.+?)``", r"`\1`", text, flags=re.DOTALL)


if __name__ == "__main__":
    PATH.write_text(api_page())
    print(f"{PATH} written")
