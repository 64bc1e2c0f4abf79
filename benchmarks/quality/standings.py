"""What the final trials of a table say: means with intervals, and paired tests against the reference."""

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.quality.results import Results
from benchmarks.quality.table import read_table
from mixora.comparison.results import SIGNIFICANT, is_better_low
from mixora.comparison.statistics import Difference, Estimate, adjust, compare_pairs, estimate


@dataclass(frozen=True)
class Standing:
    """A method, served in one way, on a data set. `p`: of the difference to the reference, after Holm's adjustment."""

    scores: Mapping[int, float]
    estimate: Estimate
    difference: Difference | None
    p: float | None
    is_better_low: bool

    @property
    def verdict(self) -> str:
        """`better` or `worse` than the reference beyond chance, else nothing."""
        if self.p is None or self.p >= SIGNIFICANT or self.difference is None:
            return ""
        return "better" if (self.difference.mean < 0) == self.is_better_low else "worse"


def stand(results: Results, data: str, also: bool = False, metric: str | None = None) -> dict[str, Standing]:
    """The standing of each method on a data set, served in each of its ways.

    `also`: on the other split that the table names. `metric`: another than the one that tells runs apart.
    """
    table = read_table(results.name)
    metric = metric or table.metrics[data]
    scores = {}
    for method in table.methods:
        finals = results.finals(data, method.name)
        for way in method.served_by[:1] if also else method.served_by:
            name = method.name if way == method.served_by[0] else f"{method.name}, {way}"
            if finals:
                scores[name] = {
                    seed: (line["also"] if also else line["metrics"][way])[metric] for seed, line in finals.items()
                }
    reference = scores.get(table.reference, {})
    differences = {name: compare_pairs(values, reference) for name, values in scores.items() if name != table.reference}
    known = {name: found.p for name, found in differences.items() if found is not None and found.p is not None}
    adjusted = adjust(known)
    return {
        name: Standing(values, estimate(list(values.values())), differences.get(name), adjusted.get(name), low)
        for name, values in scores.items()
        for low in [is_better_low(metric)]
    }
