"""benchmarks/results: every kept file says how it was made, or benchmarks/README.md says that it does not."""

import json

import pytest
from measurements import RESULTS

TABLE = [
    row.split(" | ")
    for row in (RESULTS.parent / "README.md").read_text().splitlines()
    if row.startswith("| `")
]
NAMES = {"command": ("command",), "date": ("date",), "versions": ("versions", "software", "torch")}


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*.json")), ids=lambda file: file.name)
def test_a_result_says_how_it_was_made(file):
    document = json.loads(file.read_text())
    assert document["machine"]
    lacking = [what for what, keys in NAMES.items() if not any(document.get(key) for key in keys)]
    said = [lacks for files, lacks, _ in TABLE if f"`{file.name}`" in files]
    assert said == ([", ".join(lacking)] if lacking else [])
