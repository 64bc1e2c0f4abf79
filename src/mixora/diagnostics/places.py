"""Where the sites of a model lie: by kind and depth, as far as their paths tell."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

MOST_SITES = 3
_NUMBERED = re.compile(r"(?:(?P<stack>.*?)\.)?(?P<layer>\d+)\.(?P<kind>.+)")


class Place(NamedTuple):
    """A site's layer within its stack, None outside of numbered layers, and its kind: the path without the layer."""

    kind: str
    layer: int | None


def places_of(paths: Iterable[str]) -> dict[str, Place]:
    """The place of each path. Where there are several stacks (encoder and decoder), a kind names its stack."""
    parts = {path: _NUMBERED.match(path) for path in paths}
    stacks = {found["stack"] for found in parts.values() if found}
    places = {}
    for path, found in parts.items():
        if found is None:
            places[path] = Place(path, None)
            continue
        stack = (found["stack"] or "").rpartition(".")[0] or found["stack"]
        kind = f"{stack} {found['kind']}" if len(stacks) > 1 else found["kind"]
        places[path] = Place(kind, int(found["layer"]))
    return places


def group_by_kind(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[str, Mapping[str, Any]]]]:
    """Rows with a `path`, by kind; each with the label of its layer, in the order of depth."""
    places = places_of(row["path"] for row in rows)
    kinds: dict[str, list[tuple[str, Mapping[str, Any]]]] = {}
    for row in sorted(rows, key=lambda row: places[row["path"]].layer or 0):
        kind, layer = places[row["path"]]
        kinds.setdefault(kind, []).append(("" if layer is None else str(layer), row))
    return kinds


def name_site(path: str) -> str:
    """A site in words: `layer 5 self_attn.q_proj`; its path where that has no layer."""
    found = _NUMBERED.match(path)
    if found is None:
        return path
    stack = re.search(r"(encoder|decoder)", found["stack"] or "")
    return f"{stack[0] + ' ' if stack else ''}layer {found['layer']} {found['kind']}"


def spread_over_depth(sites: Sequence[str]) -> list[int]:
    """Places of the first, middle and last site of the most frequent kind (last segment of the path)."""
    kinds = [site.rsplit(".", 1)[-1] for site in sites]
    kind = Counter(kinds).most_common(1)[0][0]
    same = [place for place, other in enumerate(kinds) if other == kind]
    count = min(MOST_SITES, len(same))
    return [same[round(step * (len(same) - 1) / max(count - 1, 1))] for step in range(count)]
