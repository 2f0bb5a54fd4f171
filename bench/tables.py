"""Writes the tables of docs/performance.md, from the rows in bench/results/, and of docs/models.md."""

from argparse import ArgumentParser
from pathlib import Path

from dynexec.report.catalogue import HEADINGS, model_rows
from dynexec.report.rows import read_rows
from dynexec.report.tables import break_even_table, markdown, markdown_table, write_generated

ROOT = Path(__file__).parents[1]


def write(name, part, content):
    """Put ``content`` in place of a generated part of a document."""
    path = ROOT / "docs" / name
    write_generated(path, part, content)
    print(f"{path} written")


if __name__ == "__main__":
    ArgumentParser(description=__doc__).parse_args()
    rows = read_rows(ROOT / "bench" / "results")
    write("performance.md", "break-even", markdown_table(*break_even_table(rows)))
    write("performance.md", "bench", markdown(rows))
    write("models.md", "models", markdown_table(HEADINGS, model_rows()))
