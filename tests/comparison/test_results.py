"""What is told of runs whose numbers are known."""

import io
import json
import math
import re

import pytest
from PIL import Image
from rich.console import Console
from scipy import stats

from mixora.comparison.plot import plot_front
from mixora.comparison.queue import find_missing, work_through
from mixora.comparison.report import summarise, write_results
from mixora.comparison.results import find_cheapest, gather
from mixora.comparison.statistics import Estimate
from mixora.comparison.wording import format_estimate, judge, remark, tabulate
from tests.comparison.conftest import SIRA, Pretend, quiet

SEEDS = 4
NOISE = [0.10, -0.05, 0.02, -0.07]
WOBBLE = [0.01, 0.0, -0.01, 0.005]


def measure(name):
    """`sira` is better than `lora` by about 0.5 at every seed; `molora` by nothing but noise."""
    _, method, seed = name.split("/")
    n = int(seed.removeprefix("seed-"))
    loss = {"lora": 2.0, "sira": 1.5 + WOBBLE[n], "molora": 2.0 + 2 * WOBBLE[n]}[method] + NOISE[n]
    costs = {"train_seconds": {"lora": 10.0, "sira": 30.0, "molora": 20.0}[method] + n, "device": "CPU"}
    return {"loss": loss, "exact_match": 1 - loss / 4}, {**costs, "train_token_per_second": None}


@pytest.fixture
def finish(build):
    """The results of a comparison of three methods by what `measure` gives."""

    def run(measure=measure, failing=(), **changes):
        matrix = build(**{"methods": ["lora", SIRA, "molora"], "match": None, "seeds": SEEDS, **changes})
        missing = find_missing(matrix, overwrite=True)
        problems = work_through(matrix, missing, lambda: Pretend(failing, measure), quiet())
        return gather(matrix, problems)

    return run


def test_numbers_against_scipy(finish):
    results = finish()
    sira, lora = results.standings["commands"]["sira"], results.standings["commands"]["lora"]
    values = [2.0 + noise for noise in NOISE]
    interval = stats.t.interval(0.95, SEEDS - 1, loc=sum(values) / SEEDS, scale=stats.sem(values))
    found = lora.scores["loss"].estimate
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx(interval)
    difference = sira.scores["loss"].difference
    assert difference.mean == pytest.approx(-0.5 + sum(WOBBLE) / SEEDS)
    assert difference.half < found.half / 5  # paired: what the seeds have in common is gone
    one, other = stats.ttest_1samp([w - 0.5 for w in WOBBLE], 0).pvalue, stats.ttest_1samp(WOBBLE, 0).pvalue
    assert sira.scores["loss"].p == pytest.approx(2 * one)
    assert results.standings["commands"]["molora"].scores["loss"].p == pytest.approx(other)
    assert lora.scores["loss"].difference is None
    assert (sira.seconds, sira.memory_mib, sira.trainable, sira.active) == (31.5, None, 700, 300)


def test_words_tell_what_is_noise(finish):
    (words,) = judge(finish())
    assert words.startswith("commands: loss, lower is better, 4 seeds; beyond chance better than lora: sira (-0.49")
    assert "not distinguishable from lora by these seeds: molora (+0.00" in words
    assert any("adjusted by Holm for the 2 comparisons" in remark for remark in remark(finish()))
    (words,) = judge(finish(metric="exact_match"))
    assert "exact match, higher is better" in words and "better than lora: sira (+12.47 ± 0.34 points)" in words
    (words,) = judge(finish(match={"reference": "sira", "tolerance": 99.0}))
    assert "beyond chance worse than sira: lora (+0.49" in words


def test_one_seed_crowns_nobody(finish):
    results = finish(seeds=1)
    (words,) = judge(results)
    assert words.startswith("commands: one seed that lora and the others share, which says nothing about chance")
    assert "better than" not in words and not list(remark(results))
    rows = tabulate(results, "commands")
    assert rows[1]["loss"] == "1.61" and rows[1]["against lora"] == "-0.49"
    assert "±" not in json.dumps(rows, ensure_ascii=False)


def test_runs_that_fail_or_diverge_are_named_and_left_out(finish):
    def diverge(name):
        scores, costs = measure(name)
        return {**scores, **({"loss": math.inf} if name.endswith("molora/seed-2") else {})}, costs

    results = finish(diverge, failing=["commands/sira/seed-1"])
    standings = results.standings["commands"]
    assert set(standings["molora"].scores["loss"].values) == {0, 1, 3}
    assert set(standings["sira"].scores["loss"].values) == {0, 2, 3}
    assert standings["sira"].scores["loss"].difference.n == 3
    text = " ".join(remark(results))
    assert "commands: molora has no finite loss with seed 2; the means leave this out." in text
    assert "1 of 12 runs are missing: commands/sira/seed-1." in text
    page = write_results(results, "mixora compare").read_text()
    assert ">Failed runs</h2>" in page and "the disk is full" in page


def test_without_the_reference_nothing_is_compared(finish):
    results = finish(seeds=1, failing=["commands/lora/seed-0"])
    assert list(judge(results)) == [
        "commands: no seed has a finished run of lora and of another method, so nothing is compared."
    ]
    assert write_results(results, "mixora compare").is_file()
    nothing = finish(seeds=1, out=results.matrix.comparison.out + "-2", failing=[r.name for r in results.matrix.runs])
    assert "3 of 3 runs are missing" in write_results(nothing, "mixora compare").read_text()


def test_counts_are_means_where_an_allocator_saw_other_rows(finish, monkeypatch):
    monkeypatch.setattr(
        Pretend, "count", lambda self, name: {"total": 9000, "trainable": 700, "active": 300 + int(name[-1])}
    )
    found = finish(seeds=3).standings["commands"]["sira"]
    assert (found.trainable, found.active) == (700, 301)


def test_other_environments_are_told(finish):
    results = finish(lambda name: (measure(name)[0], {"device": name[-1]}), seeds=2)
    assert "The runs were made in 2 environments, so their seconds and memory do not compare." in remark(results)
    assert len(plot_front(results, "commands").axes) == 1  # no panel for seconds that nobody knows


def test_who_is_not_dominated(finish):
    results = finish()
    # all count 300 active parameters here, so that the lowest loss alone is left
    assert find_cheapest(results, "commands", "active") == {"sira"}
    assert find_cheapest(results, "commands", "seconds") == {"lora", "sira"}
    by_parameters, by_seconds = plot_front(results, "commands").axes
    assert by_parameters.get_ylim()[0] > by_parameters.get_ylim()[1]  # a lower loss stands higher
    filled = [bars.lines[0].get_markerfacecolor() != "white" for bars in by_seconds.containers]
    assert filled == [True, True, False]
    assert by_seconds.get_xlabel() == "seconds of training"
    assert {text.get_text() for text in by_seconds.figure.legends[0].get_texts()} == {"lora", "sira", "molora"}
    shapes = [(bars.lines[0].get_marker(), bars.lines[0].get_color()) for bars in by_seconds.containers]
    assert len({marker for marker, _ in shapes}) == len({colour for _, colour in shapes}) == 3


def test_page_record_and_terminal(finish):
    results = finish(title="A <comparison>")
    page = write_results(results, "mixora compare x.yaml")
    text = page.read_text()
    assert "A &lt;comparison&gt;" in text and "mixora compare x.yaml" in text and "data:image/png;base64," in text
    assert not re.search(r"(src|href)=\"(?!data:|#)", text)
    with Image.open(page.with_name("pareto-commands.png")) as picture:
        assert picture.size[0] == 1000
    record = json.loads(page.with_name("comparison.json").read_text())
    assert len(record["runs"]) == 3 * SEEDS and record["failed"] == {} and record["missing"] == []
    run = next(run for run in record["runs"] if (run["method"], run["seed"]) == ("sira", 2))
    assert run["after"]["loss"] == 1.5 + WOBBLE[2] + NOISE[2] and run["environment"]["train_seconds"] == 32.0
    assert record["not_dominated"]["commands"]["seconds"] == ["lora", "sira"]
    console = Console(width=80, file=io.StringIO())
    for part in summarise(results):
        console.print(part)
    shown = console.file.getvalue()
    assert "…" not in shown and "2.00 ± 0.12" in shown and "reference" in shown


@pytest.mark.parametrize(
    ("found", "metric", "text"),
    [
        (Estimate(2.31415, 0.0213, 3), "loss", "2.314 ± 0.021"),
        (Estimate(1234.5, 12.0, 3), "perplexity", "1,234 ± 12"),
        (Estimate(0.8312, 0.0213, 3), "accuracy", "83.1 ± 2.1 %"),
        (Estimate(0.5, None, 1), "exact_match", "50 %"),
        (Estimate(2.31415, None, 1), "loss", "2.314"),
        (Estimate(2.0, 0.0, 2), "loss", "2 ± 0"),
        (None, "loss", "\N{EN DASH}"),
    ],
)
def test_two_digits_of_the_interval(found, metric, text):
    assert format_estimate(found, metric) == text


def test_a_method_without_a_finite_score_stands_in_no_plot_and_on_no_front(finish):
    def diverge(name):
        scores, costs = measure(name)
        return {**scores, **({"exact_match": math.nan} if "molora" in name else {})}, costs

    results = finish(diverge, seeds=1, metric="exact_match")
    assert results.standings["commands"]["molora"].scores["exact_match"].estimate is None
    assert find_cheapest(results, "commands", "seconds") == {"lora", "sira"}
    by_parameters = plot_front(results, "commands").axes[0]
    assert [bars.get_label() for bars in by_parameters.containers] == ["lora", "sira"]
    # more is better, and up
    assert by_parameters.get_ylim()[0] < by_parameters.get_ylim()[1]


def test_one_method_is_compared_with_nothing(finish):
    assert list(judge(finish(methods=["lora"], seeds=1))) == []


def test_the_page_tells_how_methods_were_matched(finish):
    page = write_results(finish(seeds=1, match={"tolerance": 99.0}), "mixora compare").read_text()
    assert "As many trainable parameters of the adapter as lora, within 9900.0%" in page
