"""Resuming, failing, and refusing, without processes."""

import json

import pytest
import yaml

from mixora.comparison.matrix import make_matrix
from mixora.comparison.queue import find_missing, work_through
from mixora.comparison.results import gather
from mixora.errors import ConfigError
from mixora.files.folders import claim_folder
from tests.comparison.conftest import Pretend, quiet

ALL = ["commands/lora/seed-0", "commands/sira/seed-0"]


def work(matrix, launcher, overwrite=False):
    return work_through(matrix, find_missing(matrix, overwrite), lambda: launcher, quiet())


def test_the_matrix_has_every_combination_and_the_matched_settings(build, data, tmp_path):
    both = {"a": {"source": str(data / "commands")}, "b": {"source": str(data / "commands"), "train_rows": 8}}
    matrix = build(data=both, seeds=[4, 9])
    assert len({run.name for run in matrix.runs}) == 2 * 2 * 2
    # those of one seed come first, so that a part of them can be compared already
    assert [run.seed for run in matrix.runs] == [4] * 4 + [9] * 4
    run = next(run for run in matrix.runs if run.name == "b/sira/seed-9")
    assert run.config.train.seed == 9 and run.config.data.train_rows == 8
    assert run.config.out == str(tmp_path / "out" / "runs" / "b" / "sira" / "seed-9")
    assert run.config.adapter == matrix.matched["b"]["sira"].adapter
    assert not (tmp_path / "out").exists()


def test_what_is_missing_is_made_and_nothing_else(build, tmp_path):
    matrix, first = build(), Pretend(failing=[ALL[1]])
    assert work(matrix, first) == {ALL[1]: "the disk is full"}
    assert first.made == ALL[:1]
    results = gather(matrix, {})
    assert list(results.records) == ALL[:1] and results.to_dict()["missing"] == ALL[1:]
    # a record that was cut off while it was written is none
    folder = matrix.runs[1].folder
    claim_folder(folder)
    (folder / "run.yaml").write_text("{}")
    (folder / "record.json").write_text('{"title": "co')
    second = Pretend()
    assert work(build(), second) == {} and second.made == ALL[1:]
    assert find_missing(build(), overwrite=False) == []
    stored = yaml.safe_load((tmp_path / "out" / "queue" / f"{ALL[1]}.yaml").read_text())
    assert stored == yaml.safe_load((folder / "run.yaml").read_text())
    # more seeds and methods go on with what is there
    more = find_missing(build(seeds=2, methods=["lora", "sira", "molora"], match=None), overwrite=True)
    assert ALL[0] not in [run.name for run in more]


def test_finished_runs_with_other_settings_are_refused_or_made_again(build, tree):
    work(build(), Pretend())
    changes = {"train": {**tree["train"], "steps": 2}}
    message = r"2 finished runs that were made with other settings; commands/lora/seed-0: train.steps: 1, now 2;"
    with pytest.raises(ConfigError, match=message):
        find_missing(build(**changes), overwrite=False)
    again = Pretend()
    work(build(**changes), again, overwrite=True)
    assert again.made == ALL
    assert find_missing(build(**changes), overwrite=True) == []
    # what is only shown may change
    assert find_missing(build(**changes, title="Another", metric="slot_f1"), overwrite=False) == []


def test_other_ranks_are_other_settings(build):
    work(build(), Pretend())
    with pytest.raises(ConfigError, match=r"adapter.rank: None, now 8"):
        find_missing(build(methods=[{"recipe": "lora", "rank": 8}]), overwrite=False)


def test_a_run_that_leaves_no_record_has_failed(build):
    class Silent(Pretend):
        def launch(self, jobs):
            for outcome in super().launch(jobs):
                (matrix.runs[0].folder / "record.json").unlink(missing_ok=True)
                yield outcome

    matrix = build()
    problems = work(matrix, Silent())
    assert list(problems) == ALL[:1] and "holds no record" in problems[ALL[0]]


def test_two_queues_do_not_share_a_folder(build):
    class Greedy(Pretend):
        def launch(self, jobs):
            with pytest.raises(ConfigError, match="another `mixora compare` is at work"):
                work(build(), Pretend())
            yield from super().launch(jobs)

    assert work(build(), Greedy()) == {}


def test_an_interrupt_stops_what_runs_and_goes_on_later(build):
    stopped = []

    class Interrupted(Pretend):
        def launch(self, jobs):
            try:
                yield next(super().launch(jobs))
                raise KeyboardInterrupt
            finally:
                stopped.append(True)

    with pytest.raises(KeyboardInterrupt):
        work(build(), Interrupted())
    assert stopped
    rest = Pretend()
    work(build(), rest)
    assert rest.made == ALL[1:]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric": "accuracy"}, "metric: got 'accuracy'; valid for commands: loss, perplexity"),
        # the answers are calls, which are not measured so unless it is asked for
        ({"metric": "bleu"}, "metric: got 'bleu'; valid for commands: loss, perplexity, exact_match, intent_accuracy"),
        (
            {"evaluate": {"metrics": ["loss"]}, "metric": "slot_f1"},
            "metric: got 'slot_f1'; valid for commands: loss, or",
        ),
        ({"evaluate": {"metrics": ["accuracy"]}}, "metrics: got 'accuracy' for 'completion' rows"),
        ({"model": {"base": "/nowhere/at/all"}}, "no such file or folder"),
    ],
)
def test_mistakes_are_found_before_anything_is_trained(changes, message, build):
    with pytest.raises(ValueError, match=message):
        build(**changes)


def test_tasks_need_a_metric_that_has_a_mean(build, data):
    tasks = {name: {"source": str(data / "commands")} for name in ("a", "b")}
    with pytest.raises(ConfigError, match=r"evaluate\.metrics: no mean over the tasks of both has any of them"):
        build(data={"both": {"tasks": tasks}}, evaluate={"metrics": ["perplexity"]})


def test_a_metric_that_was_not_measured(build):
    work(build(), Pretend())
    with pytest.raises(ConfigError, match="metric: got 'slot_f1'; valid for commands, where it was measured: loss"):
        gather(build(metric="slot_f1"), {})


def test_classifiers_are_matched_as_classifiers(build, bases, data):
    tree = {"model": {"base": str(bases / "bert")}, "data": {"source": str(data / "classes")}}
    matrix = build(**tree, evaluate={})
    # all four attention linears of two layers, 32 x 32
    assert matrix.matched["classes"]["lora"].trainable == 2 * 4 * 16 * 64
    assert json.dumps([run.config.model_dump(mode="json") for run in matrix.runs])
    assert make_matrix(matrix.comparison) == matrix
