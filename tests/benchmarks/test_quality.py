"""The evidence: tables are read, trials queued and kept, and what they say is told by tests that are not ours."""

import json
from concurrent.futures import Future
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from benchmarks.quality import queue, table
from benchmarks.quality.costs import measure_costs
from benchmarks.quality.front import find_front
from benchmarks.quality.page import fill, write_page
from benchmarks.quality.results import Results, waiting
from benchmarks.quality.rows import select_rows
from benchmarks.quality.standings import stand
from benchmarks.quality.trial import run_trial
from mixora.errors import ConfigError, DataError
from tests.training.conftest import write_rows

ROOT = Path(__file__).parents[2]

SMALL = {
    "title": "Intents",
    "question": "Does it learn?",
    "model": {"base": "minilm-l6", "dtype": "bfloat16"},
    "metrics": {"intents": "accuracy"},
    "methods": [{"recipe": "lora", "rank": 8}, {"recipe": "sira", "num_experts": 4, "top_k": 2}],
    "match": None,
    "learning_rates": [1e-6, 8e-3],
    "seeds": 1,
    "train": {"steps": 16, "batch_size": 16},
    "evaluate": {"limit": 40, "batch_size": 40},
    "minutes": 0.1,
}


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A table over the project's own rows: which of seven domains a command is of."""
    lines = (ROOT / "examples/quickstart/data/train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = list(map(json.loads, lines))
    domains = sorted({row["domain"] for row in rows})
    labelled = [{"text": row["prompt"], "label": domains.index(row["domain"]), "domain": row["domain"]} for row in rows]
    for split, part in {"train": labelled[120:600], "validation": labelled[:60], "test": labelled[60:120]}.items():
        write_rows(tmp_path / "rows", split, part)
    return make_table(tmp_path, monkeypatch, data={"intents": {"source": str(tmp_path / "rows"), "max_length": 24}})


def make_table(folder, monkeypatch, **changes):
    (folder / "tables").mkdir(exist_ok=True)
    (folder / "tables" / "small.yaml").write_text(yaml.safe_dump({**SMALL, **changes}))
    monkeypatch.setattr(table, "TABLES", folder / "tables")
    for known in (table.read_table, table.data_of, table.match_table, table.tuning_trials, table.final_trials):
        known.cache_clear()
    return Results("small", folder / "results")


@pytest.mark.parametrize("name", table.table_names())
def test_tables_are_right(name):
    of_name = table.read_table(name)
    assert of_name.question and len(of_name.learning_rates) == 3 and len(of_name.seed_list) >= 5
    for method in of_name.methods:
        method.adapter()


def test_a_table_can_take_another_base():
    assert table.read_table("mixtures@some/base").model.base == "some/base"
    with pytest.raises(ConfigError, match=r"valid: .*mixtures"):
        table.read_table("mixture")


def test_a_data_set_can_have_more_rates(small, tmp_path, monkeypatch):
    """Which the choice waits for, and the page names."""
    data = yaml.safe_load((tmp_path / "tables/small.yaml").read_text())["data"]
    results = make_table(tmp_path, monkeypatch, data=data, seeds=5, more_rates={"intents": [1e-3]})
    of_lora = table.tuning_trials("small", "intents", "lora")
    assert [trial.rate for trial in of_lora] == [1e-6, 1e-3, 8e-3]
    for trial in of_lora[:2]:
        results.add(trial, invented(trial))
    assert results.best_rate("intents", "lora") is None
    make_all(results)
    text = fill("<!-- table small -->\n<!-- end -->", tmp_path / "results")
    assert "of 1e-06, 0.008, on intents 0.001 too;" in text and "| lora | 1e-06 (0.71, 0.71, 0.71) |" in text


@pytest.mark.parametrize("field, value", [("metric", "accuracy"), ("out", "runs/small")])
def test_a_table_has_no_settings_without_effect(field, value, tmp_path, monkeypatch):
    make_table(tmp_path, monkeypatch, data={"intents": {"source": "rows"}}, **{field: value})
    with pytest.raises(ConfigError, match=f"{field}: unknown key"):
        table.read_table("small")


@pytest.mark.slow
def test_a_small_table_shows_what_it_must(small, tmp_path, monkeypatch):
    """A rate that changes nothing loses in tuning, methods learn, and the page tells it."""
    small = make_table(tmp_path, monkeypatch, data=table.read_table("small").model_dump()["data"], group_by="domain")
    for method in ("lora", "sira"):
        for _ in range(2):
            for trial in waiting(small, "intents", method):
                small.add(trial, run_trial(trial))
        assert small.best_rate("intents", method) == 8e-3
        still, learnt = small.tuning("intents", method).values()
        assert learnt > still + 0.2
    standings = stand(Results("small", tmp_path / "results"), "intents")
    assert all(found.estimate.mean > 0.4 and found.estimate.n == 1 for found in standings.values())
    page = tmp_path / "page.md"
    page.write_text("<!-- table small -->\n<!-- end -->")
    costs = {
        row["method"]: row for row in json.loads(measure_costs("small", 2, tmp_path / "results").read_text())["rows"]
    }
    assert costs["lora"]["ratio"] == costs["lora"]["memory_ratio"] == 1.0
    assert all(row["ms"] > 0 and row["mebibytes"] > 0 for row in (costs["lora"], costs["sira"]))
    write_page(page, tmp_path / "plots", tmp_path / "results")
    assert "| sira |" in page.read_text()
    (of_sira,) = small.finals("intents", "sira").values()
    before, after = (of_sira["specialisation"][key] for key in ("untrained", "information"))
    assert before > 0 and after > 0 and before != after
    assert f"| sira | intents | {before:.4f} | {after:.4f} |" in page.read_text()
    assert "| lora | intents | 0." not in page.read_text()
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"small.svg", "small-front.svg"}


@given(st.dictionaries(st.text(), st.tuples(st.floats(0, 9), st.floats(0, 9)), min_size=1))
def test_nothing_beats_what_is_in_front_and_all_else_is_beaten(points):
    front = find_front(points)
    for name, (cost, gain) in points.items():
        beaten = any(
            points[one][0] <= cost and points[one][1] >= gain and points[one] != (cost, gain) for one in points
        )
        assert not (name in front and beaten)
        assert name in front or any(points[one][0] <= cost and points[one][1] >= gain for one in front)


def invented(trial, gain=0.02):
    """Accuracies of a method that gains something, with noise that both share by seed."""
    noise = [0.01, -0.02, 0.03, 0.0, -0.01][trial.seed % 5]
    own = (0.001 * trial.seed if trial.method == "sira" else 0.0) + (gain if trial.method == "sira" else 0.0)
    counts = {"trainable": 1_000_000, "active": 500_000 + 20_000 * trial.seed}
    scores = {"accuracy": 0.7 + noise + own, "mcc": 0.4 - own}
    return {"metrics": {"merged": scores}, **counts, "total_seconds": 1.0}


def make_all(results):
    """Those of tuning, then the final ones."""
    for method in ("lora", "sira"):
        for _ in range(2):
            for trial in waiting(results, "intents", method):
                results.add(trial, invented(trial))


def test_differences_are_those_of_a_paired_test(small, tmp_path, monkeypatch):
    data = yaml.safe_load((tmp_path / "tables/small.yaml").read_text())["data"]
    results = make_table(tmp_path, monkeypatch, seeds=5, data=data, beside={"intents": ["mcc"]})
    make_all(results)
    standings = stand(results, "intents")
    mixture, plain = ([standings[name].scores[seed] for seed in range(5)] for name in ("sira", "lora"))
    assert standings["sira"].p == pytest.approx(stats.ttest_rel(mixture, plain).pvalue)
    assert standings["sira"].verdict == "better" and standings["lora"].verdict == ""
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table small -->\n<!-- end -->\nafter\n")
    write_page(page, tmp_path / "plots", tmp_path / "results")
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "▲" in text
    # what is measured beside is tested too, and only on the final rows
    assert "intents, accuracy | intents, mcc |" in text and text.count("▲") == text.count("▼") == 1
    (tuning, *_), (final, *_) = (
        table.tuning_trials("small", "intents", "lora"),
        table.final_trials("small", "intents", "lora", 8e-3),
    )
    assert tuning.config.evaluate.metrics == ("accuracy",) and final.config.evaluate.metrics == ("accuracy", "mcc")
    # as the trials counted them, the mean over the seeds
    assert text.count("| 1.00 M, 0.54 M |") == 2
    plot = (tmp_path / "plots" / "small.svg").read_bytes()
    write_page(page, tmp_path / "plots", tmp_path / "results")
    assert page.read_text() == text and "seeds)" not in text
    assert (tmp_path / "plots" / "small.svg").read_bytes() == plot and len(plot) > 1000
    last = table.final_trials("small", "intents", "sira", results.best_rate("intents", "sira"))[-1]
    results.add(last, {"failed": "nan", "total_seconds": 1.0})
    assert "(4 of 5 seeds)" in fill(text, tmp_path / "results")


def test_a_digest_tells_settings_not_how_they_are_written(small, tmp_path, monkeypatch):
    """A recipe's own numbers may be written down; any other number, or head that is trained, is another trial."""
    data = yaml.safe_load((tmp_path / "tables/small.yaml").read_text())["data"]

    def digest(**overrides):
        methods = [{"recipe": "sira", "num_experts": 4, "top_k": 2, **overrides}]
        make_table(tmp_path, monkeypatch, data=data, methods=methods)
        return table.tuning_trials("small", "intents", "sira")[0].digest

    assert digest() == digest(scale=8.0) == digest(rules={"attention": {"expert": {"scale": 8.0}}})
    changed = [digest(scale=2.0), digest(modules_to_save=["pooler"]), digest(targets=["all-linear"])]
    assert len({digest(), *changed}) == 4


def test_parts_of_another_kind_are_another_trial(small, tmp_path, monkeypatch):
    """Though all their settings have the same names and values."""
    data = yaml.safe_load((tmp_path / "tables/small.yaml").read_text())["data"]
    kinds = ("proportional", "spectral", "sensitivity")
    methods = [{"name": kind, "recipe": "hilo", "allocator": {"kind": kind, "budget": 400000}} for kind in kinds]
    methods += [{"recipe": name, "num_experts": 4, "rank": 4, "scale": 2.0} for name in ("adamole", "adamoe")]
    make_table(tmp_path, monkeypatch, data=data, methods=methods)
    digests = {table.tuning_trials("small", "intents", name)[0].digest for name in (*kinds, "adamole", "adamoe")}
    assert len(digests) == 5


def test_a_queue_goes_on_where_it_was_stopped(small, tmp_path, monkeypatch):
    made = []

    class Pool:
        def __init__(self, workers, **settings): ...
        def __enter__(self):
            return self

        def __exit__(self, *error): ...
        def submit(self, run, trial):
            made.append(trial)
            future = Future()
            future.set_result(invented(trial))
            return future

    monkeypatch.setattr(queue, "ProcessPoolExecutor", Pool)
    queue.work(["small"], workers=2, tuning=True, folder=tmp_path / "results")
    assert [trial.stage for trial in made] == ["tuning"] * 4
    queue.work(["small"], workers=2, folder=tmp_path / "results")
    assert [trial.stage for trial in made[4:]] == ["final"] * 2
    queue.work(["small"], workers=2, folder=tmp_path / "results")
    assert len({trial.key for trial in made}) == len(made) == 6
    # another recipe under the same name counts anew
    make_table(
        tmp_path,
        monkeypatch,
        train={"steps": 31},
        data=yaml.safe_load((tmp_path / "tables/small.yaml").read_text())["data"],
    )
    queue.work(["small"], workers=2, minutes=0.0, folder=tmp_path / "results")
    assert len(made) == 6
    queue.work(["small"], workers=2, tuning=True, folder=tmp_path / "results")
    assert [trial.stage for trial in made[6:]] == ["tuning"] * 4


def test_a_result_that_was_cut_short_is_passed_over_and_made_again(small, tmp_path, capsys):
    for trial in waiting(small, "intents", "lora"):
        small.add(trial, invented(trial))
    whole = small.path.read_text()
    small.path.write_text(whole[:-30])
    again = Results("small", tmp_path / "results")
    assert f"{small.path}, line 2: was not written to its end" in capsys.readouterr().err
    (missing,) = waiting(again, "intents", "lora")
    again.add(missing, invented(missing))
    assert small.path.read_text() == whole
    assert Results("small", tmp_path / "results").best_rate("intents", "lora") is not None


@pytest.mark.parametrize(
    "line, reason", [('{"digest": "a', "is not JSON"), ("[1, 2]", "has no digest"), ("{}", "has no digest")]
)
def test_a_damaged_result_is_named(line, reason, tmp_path):
    (tmp_path / "small.jsonl").write_text(f'{{"digest": "b"}}\n{line}\n{{"digest": "c"}}\n')
    with pytest.raises(DataError, match=rf"small\.jsonl, line 2: {reason}"):
        Results("small", tmp_path)


def test_rows_that_would_be_cut_or_are_ambiguous_are_left_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    choice = {"question": "Which one?", "choices": ["a", "b"], "answer": 0}
    long = {**choice, "question": "word " * 100}
    write_rows(tmp_path / "rows", "train", [choice, {**choice, "choices": ["a", "a"]}, long, choice])
    folder = select_rows(str(tmp_path / "rows"), "smollm2-135m-instruct", 64)
    lines = Path(folder, "train.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [choice, choice]
    write_rows(tmp_path / "labelled", "train", [{"text": "word " * 100, "label": 0}])
    assert select_rows(str(tmp_path / "labelled"), "minilm-l6", 8) == str(tmp_path / "labelled")
    assert select_rows("some/hub-id", "smollm2-135m-instruct", 64) == "some/hub-id"
