"""Puts a table that a test run wrote between its markers in tests/README.md. `make chaos` and `make bad-inputs` call it.

python tests/readme_tables.py faults runs/faults.md
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

README = Path(__file__).with_name("README.md")


def put(text: str, name: str, table: str) -> str:
    """`text` with `table` between `<!-- name: ... -->` and the next `<!-- end -->`. Raises ValueError without such markers."""
    pattern = rf"(<!-- {re.escape(name)}: [^\n]*-->\n).*?(<!-- end -->)"
    new, count = re.subn(pattern, lambda found: f"{found[1]}\n{table.strip()}\n\n{found[2]}", text, flags=re.S)
    if count != 1:
        raise ValueError(f"{count} places for the table {name}, expected one")
    return new


def table_of(text: str, name: str) -> list[str]:
    """The lines between the markers."""
    (found,) = re.findall(rf"<!-- {re.escape(name)}: [^\n]*-->\n(.*?)<!-- end -->", text, re.S)
    return str(found).strip().splitlines()


if __name__ == "__main__":
    name, table = sys.argv[1:]
    README.write_text(put(README.read_text(), name, Path(table).read_text()))
