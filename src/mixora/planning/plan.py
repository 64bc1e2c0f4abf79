"""The plan of a method on a model: the table of sites, printed before training and stored with the adapter."""

import io
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from rich.box import SIMPLE_HEAD
from rich.table import Table

from mixora.contracts import Shape
from mixora.display.console import Console
from mixora.errors import MOST_NAMED, CheckpointError
from mixora.passes import Stream


@dataclass(frozen=True)
class Site:
    """One adapted module. `ranks`: rank of each expert. `leader`: path of the site whose router this one uses.

    `parameters`: trainable numbers, the router's included; `active_parameters`: those a token is computed with.
    `role`: place in the feed-forward part, where experts go through all of it.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    path: str
    rule: str
    in_features: int
    out_features: int
    expert: str
    ranks: Annotated[tuple[int, ...], Field(min_length=1)]
    router: str
    num_experts: int
    top_k: int
    kernel: str
    scale: float
    stream: Stream
    leader: str | None
    parameters: int
    active_parameters: int
    role: Literal["first", "last"] | None = None

    @property
    def shape(self) -> Shape:
        """Widths and ranks."""
        return Shape(self.in_features, self.out_features, self.ranks)


_STORED = TypeAdapter(list[Site])


@dataclass(frozen=True)
class Plan:
    """All sites of a model under a method, in the model's order.

    `notes`: remarks a user should read before training. `kernels`: which kernels compute the sites, and why.
    """

    sites: tuple[Site, ...]
    notes: tuple[str, ...] = ()
    kernels: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        """Trainable numbers of all sites."""
        return sum(site.parameters for site in self.sites)

    @property
    def active_parameters(self) -> int:
        """Numbers of all sites that one token is computed with."""
        return sum(site.active_parameters for site in self.sites)

    def rows(self, full: bool = False) -> list[dict[str, Any]]:
        """The table as plain data; sites that differ only in their layer share a row unless `full`."""
        groups: dict[tuple[Any, ...], list[Site]] = {}
        for site in self.sites:
            key = (site.path,) if full else (star_layer(site.path), _alike(site))
            groups.setdefault(key, []).append(site)
        return [_row(sites) for sites in groups.values()]

    def table(self, full: bool = False) -> Table:
        """The table for a terminal; what all rows have in common stands above and below it."""
        rows = self.rows(full)
        prefix = common_prefix([row["path"] for row in rows])
        routers = sorted({row["router"] for row in rows})
        # kernels never stand in the table, routers only where they differ
        below = {"kernel": self.kernels, **({"router": routers} if len(routers) == 1 else {})}
        rows = [{column: value for column, value in row.items() if column not in below} for row in rows]
        title = f"{len(self.sites)} sites" + (f" in {prefix}" if prefix else "")
        table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for column in rows[0]:
            justify: Literal["left", "right"] = "left" if column in ("path", "router") else "right"
            table.add_column(
                column.replace("_parameters", ""), justify=justify, no_wrap=column != "path", overflow="fold"
            )
        for row in rows:
            row["path"] = row["path"].removeprefix(prefix + ".")
            table.add_row(*(f"{value:,}" if isinstance(value, int) else str(value) for value in row.values()))
        counts = f"trainable {self.parameters:,}, active {self.active_parameters:,} parameters"
        said = [f"{name}: {', '.join(values)}" for name, values in below.items()]
        table.caption = "; ".join([counts, *said])
        return table

    def __str__(self) -> str:
        text = io.StringIO()
        console = Console(file=text, width=140)
        console.print(self.table(), *(f"note: {note}" for note in self.notes), sep="\n")
        return text.getvalue().rstrip()

    def to_list(self) -> list[dict[str, Any]]:
        """Plain data for `adapter_config.json`."""
        return [{**asdict(site), "ranks": list(site.ranks)} for site in self.sites]

    @classmethod
    def from_list(cls, stored: Iterable[dict[str, Any]]) -> "Plan":
        """The plan that `to_list` made plain data of; `CheckpointError` where that is damaged."""
        try:
            return cls(tuple(_STORED.validate_json(json.dumps(list(stored), allow_nan=False))))
        except ValidationError as error:
            faults = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_url=False)]
            raise CheckpointError(f"the adapter's stored plan is damaged: {'; '.join(faults[:5])}") from None
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"the adapter's stored plan is damaged: {error}") from None

    def check_against(self, stored: Iterable[dict[str, Any]]) -> None:
        """Compare with the plan an adapter was trained under; every difference in one `CheckpointError`."""
        old = {site.path: site for site in Plan.from_list(stored).sites}
        new = {site.path: site for site in self.sites}
        problems = [f"{path}: missing in this model" for path in old if path not in new]
        problems += [f"{path}: not in the adapter's plan" for path in new if path not in old]
        for path in old.keys() & new.keys():
            # the kernel is how a site is computed, not what
            pairs = [(f.name, getattr(old[path], f.name), getattr(new[path], f.name)) for f in fields(Site)]
            problems += [
                f"{path}.{name}: adapter {was!r}, model {now!r}"
                for name, was, now in pairs
                if was != now and name != "kernel"
            ]
        if problems:
            shown = "\n  ".join(sorted(problems)[:MOST_NAMED])
            raise CheckpointError(
                f"the adapter was trained under another plan, {len(problems)} differences:\n  {shown}"
            )


def common_prefix(paths: list[str]) -> str:
    """The leading segments that all paths share, before the first layer number."""
    shared = []
    for segments in zip(*(path.split(".") for path in paths), strict=False):
        if len(set(segments)) > 1 or not segments[0].isidentifier():
            break
        shared.append(segments[0])
    return ".".join(shared)


def star_layer(path: str) -> str:
    """The path with a star in the place of its layer."""
    return re.sub(r"\.\d+\.", ".*.", path, count=1)


def _alike(site: Site) -> Site:
    """The site without what differs from layer to layer."""
    return replace(site, path="", leader=None if site.leader is None else "shared")


def _row(sites: list[Site]) -> dict[str, Any]:
    first, layers = sites[0], [int(n[1:-1]) for s in sites for n in re.findall(r"\.\d+\.", s.path)[:1]]
    path = first.path
    if len(sites) > 1:
        is_run = layers == list(range(layers[0], layers[-1] + 1))
        label = f"{layers[0]}-{layers[-1]}" if is_run else ",".join(map(str, layers))
        path = re.sub(r"\.\d+\.", f".{{{label}}}.", path, count=1)
    low, high = min(first.ranks), max(first.ranks)
    return {
        "path": path,
        "shape": f"{first.in_features} x {first.out_features}",
        "experts": first.num_experts,
        "rank": str(high) if low == high else f"{low}-{high}",
        "top_k": first.top_k,
        "router": first.router if first.leader is None else f"{first.router} (shared)",
        "kernel": first.kernel,
        "parameters": sum(site.parameters for site in sites),
        "active_parameters": sum(site.active_parameters for site in sites),
    }
