"""Licences of what mixora needs at run time, from an SBOM: the page `docs/licences.md`, or an error.

python -m release.licences SBOM
"""

import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "docs" / "licences.md"
HEAD = """# Licences of dependencies

Everything that `pip install mixora` brings, with the pins of `constraints.txt`, on Linux with the CPU build of torch.
`make sbom` writes this page, and fails on a licence that `release/licences.py` does not allow. The words are those that
cyclonedx-bom reads from the packages' metadata; of `transformers`, which names its licence in a field that it leaves
out, those of the licence file.

Not listed: what the extras add, and the CUDA libraries and `triton` that the index's usual build of torch for Linux
adds, some of them under NVIDIA's own terms.

| package | version | licence |
|---|---|---|
"""
ALLOWED = {
    # ask for notices alone
    *("0BSD", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0", "ISC", "MIT", "MIT-CMU", "Zlib", "BSD License"),
    *("Apache-2.0", "Apache-2.0 WITH LLVM-exception", "Apache Software License"),
    *("CNRI-Python", "PSF-2.0", "Python-2.0"),
    # asks for the source of what was changed in the package's own files
    *("MPL-2.0", "Mozilla Public License 2.0 (MPL 2.0)"),
}
# a licence that the SBOM leaves out, since the package names it in an older field: as its LICENSE file says
READ = {"transformers": ["Apache-2.0"]}


def read_components(sbom: Mapping[str, Any]) -> Iterator[tuple[str, str, list[str]]]:
    """Name, version and licences of each package but mixora."""
    for component in sorted(sbom["components"], key=lambda one: one["name"].lower()):
        if component["name"] != "mixora":
            licences = read_licences(component) or READ.get(component["name"], [])
            yield component["name"], component["version"], licences


def read_licences(component: Mapping[str, Any]) -> list[str]:
    """Identifiers and names as the package gives them, and the terms of its expressions; a choice is all of it."""
    found = set()
    for one in component.get("licenses", []):
        if "expression" in one:
            found.update(term.strip("() ") for term in re.split(r" AND | OR ", one["expression"]))
        else:
            licence = one["license"]
            found.add(licence.get("id") or licence["name"].rpartition(" :: ")[2])
    return sorted(found)


def main(path: Path) -> None:
    """Write the page; leave with the packages whose licences are not allowed."""
    components = list(read_components(json.loads(path.read_text(encoding="utf-8"))))
    refused = [f"{name}: {words}" for name, _, words in components if not words or not ALLOWED.issuperset(words)]
    if refused:
        raise SystemExit("licences that are not allowed:\n" + "\n".join(refused))
    rows = (f"| {name} | {version} | {', '.join(words)} |\n" for name, version, words in components)
    PAGE.write_text(HEAD + "".join(rows), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
