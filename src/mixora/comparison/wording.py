"""Results in words and numbers for people: nothing is called better that may be chance."""

import math
from collections.abc import Iterator

from mixora.comparison.results import SIGNIFICANT, Results, Standing, is_better_low
from mixora.comparison.statistics import Difference, Estimate
from mixora.diagnostics.page import NOTHING, SHARES, format_value, is_named

Compared = tuple[Difference, float | None]
# what makes seconds and memory differ
ENVIRONMENT = ("device", "dtype", "torch", "transformers", "peft", "mixora")


def format_estimate(found: Estimate | None, metric: str, sign: str = "") -> str:
    """`2.314 ± 0.021`, with two digits of the interval; shares in per cent. `sign`: "+" for a difference."""
    if found is None:
        return NOTHING
    factor, unit = (100, " points" if sign else " %") if is_named(metric, SHARES) else (1, "")
    mean, half = factor * found.mean, None if found.half is None else factor * found.half
    if not half:
        digits = 4 if half is None else 3
        text = f"{mean:{sign}.{digits}g}"
        return f"{text}{unit}" if half is None else f"{text} ± 0{unit}"
    decimals = max(0, 1 - math.floor(math.log10(half)))
    return f"{mean:{sign},.{decimals}f} ± {half:,.{decimals}f}{unit}"


def judge(results: Results) -> Iterator[str]:
    """A sentence or two on each data set."""
    reference = results.matrix.comparison.reference
    for data in results.standings:
        compared = _compared(results, data)
        if compared:
            yield f"{data}: {_judge(compared, results.metric[data], reference)}"
        elif len(results.matrix.matched[data]) > 1:
            yield f"{data}: no seed has a finished run of {reference} and of another method, so nothing is compared."


def remark(results: Results) -> Iterator[str]:
    """What the reader has to know of chance, and of what is missing."""
    tested = [sum(p is not None for _, p in _compared(results, data).values()) for data in results.standings]
    if any(tested):
        yield (
            "Beyond chance: below 5 % in a paired t test over the seeds, adjusted by Holm for the "
            f"{max(tested)} comparison{'s' * (max(tested) > 1)} of a data set. Intervals are at 95 % each."
        )
    for data, standings in results.standings.items():
        yield from _tell_left_out(data, standings)
    yield from _tell_missing(results)


def _compared(results: Results, data: str) -> dict[str, Compared]:
    """The methods that share a seed with the reference."""
    scores = {name: standing.scores[results.metric[data]] for name, standing in results.standings[data].items()}
    return {name: (score.difference, score.p) for name, score in scores.items() if score.difference is not None}


def _judge(compared: dict[str, Compared], metric: str, reference: str) -> str:
    seeds = sorted({difference.n for difference, p in compared.values() if p is not None})
    if not seeds:
        return (
            f"one seed that {reference} and the others share, which says nothing about chance; "
            "no method is called better. Give two or more seeds."
        )
    low = is_better_low(metric)
    groups: dict[str, list[str]] = {}
    for name, (difference, p) in compared.items():
        words = f"not distinguishable from {reference} by these seeds"
        if p is not None and p < SIGNIFICANT:
            words = f"beyond chance {'better' if (difference.mean < 0) == low else 'worse'} than {reference}"
        groups.setdefault(words, []).append(f"{name} ({format_estimate(difference, metric, '+')})")
    said = "; ".join(f"{words}: {', '.join(names)}" for words, names in sorted(groups.items()))
    better = f"{metric.replace('_', ' ')}, {'lower' if low else 'higher'} is better"
    return f"{better}, {'-'.join(map(str, seeds))} seeds; {said}."


def _tell_left_out(data: str, standings: dict[str, Standing]) -> Iterator[str]:
    for name, standing in standings.items():
        seeds = sorted({seed for score in standing.scores.values() for seed in score.left_out})
        if seeds:
            metrics = [metric for metric, score in standing.scores.items() if score.left_out]
            yield (
                f"{data}: {name} has no finite {', '.join(metrics).replace('_', ' ')} with "
                f"seed {', '.join(map(str, seeds))}; the means leave this out."
            )


def _tell_missing(results: Results) -> Iterator[str]:
    missing = [run.name for run in results.matrix.runs if run.name not in results.records]
    if missing:
        yield f"{len(missing)} of {len(results.matrix.runs)} runs are missing: {', '.join(missing)}."
    made = {tuple(record.environment.get(name) for name in ENVIRONMENT) for record in results.records.values()}
    if len(made) > 1:
        yield f"The runs were made in {len(made)} environments, so their seconds and memory do not compare."


def tabulate(results: Results, data: str) -> list[dict[str, str]]:
    """A row per method: score, difference to the reference, parameters, cost."""
    metric = results.metric[data]
    return [
        _row(standing, metric, results.matrix.comparison.reference) for standing in results.standings[data].values()
    ]


def _row(standing: Standing, metric: str, reference: str) -> dict[str, str]:
    score = standing.scores[metric]
    is_reference = standing.method == reference
    return {
        "method": standing.method,
        "seeds": str(len(score.values)),
        metric: format_estimate(score.estimate, metric),
        f"against {reference}": "reference" if is_reference else format_estimate(score.difference, metric, "+"),
        "trainable": f"{standing.trainable:,}",
        "active": f"{standing.active:,}",
        "train s": format_value(standing.seconds),
        "peak MiB": format_value(standing.memory_mib),
        "tokens/s": format_value(standing.tokens_per_second),
    }
