"""Writes the tables of docs/performance.md from the rows in bench/results/."""

from pathlib import Path

from dynexec.report.rows import read_rows
from dynexec.report.tables import markdown, replace_generated

ROOT = Path(__file__).parents[1]

if __name__ == "__main__":
    docs = ROOT / "docs" / "performance.md"
    docs.write_text(replace_generated(docs.read_text(), "bench", markdown(read_rows(ROOT / "bench" / "results"))))
    print(f"{docs} written")
