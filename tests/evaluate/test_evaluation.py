import datasets
import pytest

from mixora.errors import ConfigError, DataError
from mixora.evaluate import METRICS, EvaluationConfig, Examples, default_metrics, evaluate

CALLS = [{"prompt": "a", "completion": "f(a=b)"}, {"prompt": "b", "completion": "g()", "references": ["g()", "h()"]}]
FREE = [{"prompt": "a", "completion": "some words"}, {"prompt": "b", "completion": "f(a=b)"}]
SHORT = EvaluationConfig(max_new_tokens=3)


@pytest.fixture
def make(tokenizer, collate):
    def build(form, rows, **parts):
        return Examples(rows=rows, form=form, tokenizer=tokenizer, collator=collate, **parts)

    return build


def encoded(count):
    rows = [{"input_ids": [4 + n, 5, 6], "labels": [-100, 5, 6]} for n in range(count)]
    return datasets.Dataset.from_list(rows)


def test_default_metrics_follow_the_rows(make):
    assert default_metrics(make("completion", CALLS)) == (
        *("loss", "perplexity", "exact_match", "intent_accuracy", "slot_f1"),
    )
    assert default_metrics(make("completion", FREE)) == ("loss", "perplexity", "exact_match", "bleu", "rouge_l")
    sums = [{"prompt": "a", "completion": "1 + 1\n#### 2"}, {"prompt": "b", "completion": "#### 3"}]
    assert default_metrics(make("completion", sums)) == ("loss", "perplexity", "exact_match", "answer_accuracy")
    talk = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "f()"}]}
    assert "slot_f1" in default_metrics(make("messages", [talk]))
    assert default_metrics(make("text", [{"text": "a"}])) == ("loss", "perplexity")
    assert default_metrics(make("classification", [{"label": 1}])) == ("accuracy", "f1", "mcc")
    assert default_metrics(make("pair", [{"label": 1.0}])) == ("pearson", "spearman")
    assert default_metrics(make("choice", [{}])) == ("accuracy", "accuracy_norm")


@pytest.mark.parametrize("rows", [CALLS, FREE])
def test_generation_metrics(llama, make, rows):
    examples = make("completion", rows, dataset=encoded(2), prompts=[[4], [5, 6]])
    seen = []
    got = evaluate(llama, examples, SHORT, lambda done, total: seen.append((done, total)))
    assert tuple(got.metrics) == default_metrics(examples)
    assert len(got.predictions) == 2
    assert all(isinstance(text, str) for text in got.predictions)
    assert seen == [(2, 2), (2, 2)]


def test_only_what_is_asked_for_is_measured(llama, make):
    got = evaluate(llama, make("completion", FREE, dataset=encoded(2)), EvaluationConfig(metrics=("loss",)))
    assert set(got.metrics) == {"loss"}
    assert got.predictions == ()
    asked = EvaluationConfig(metrics=("bleu", "slot_f1"), max_new_tokens=2)
    assert tuple(evaluate(llama, make("completion", FREE, prompts=[[4], [5]]), asked).metrics) == ("bleu", "slot_f1")


def test_limit_takes_the_first_rows_of_every_part(llama, make):
    examples = make("completion", CALLS, dataset=encoded(2), prompts=[[4], [5]])
    first = make("completion", CALLS[:1], dataset=encoded(1), prompts=[[4]])
    limited = SHORT.model_copy(update={"limit": 1})
    assert evaluate(llama, examples, limited) == evaluate(llama, first, SHORT)


def test_classes_and_numbers(make_bert, make):
    rows = [{"text": "a", "label": n % 3} for n in range(6)]
    data = datasets.Dataset.from_list([{"input_ids": [4 + n], "labels": n % 3} for n in range(6)])
    got = evaluate(make_bert(3), make("classification", rows, dataset=data), EvaluationConfig(batch_size=4))
    assert set(got.metrics) == {"accuracy", "f1", "mcc"}
    assert got.metrics["accuracy"] == sum(p == r["label"] for p, r in zip(got.predictions, rows, strict=True)) / 6
    rows = [{"text": "a", "text_pair": "b", "label": n / 2} for n in range(6)]
    data = datasets.Dataset.from_list([{"input_ids": [4 + n], "labels": n / 2} for n in range(6)])
    got = evaluate(make_bert(1), make("pair", rows, dataset=data), EvaluationConfig())
    assert set(got.metrics) == {"pearson", "spearman"}
    assert all(isinstance(p, float) for p in got.predictions)


def test_choices(llama, make):
    rows = [{"question": "q", "choices": ["a", "bc"], "answer": n % 2} for n in range(4)]
    parts = {"prompts": [[4 + n] for n in range(4)], "choices": [[[4], [5, 6]]] * 4}
    got = evaluate(llama, make("choice", rows, **parts), EvaluationConfig())
    assert got.metrics["accuracy"] == sum(p == r["answer"] for p, r in zip(got.predictions, rows, strict=True)) / 4
    both = EvaluationConfig(metrics=("accuracy_norm", "loss"))
    assert tuple(evaluate(llama, make("choice", rows, dataset=encoded(4), **parts), both).metrics) == both.metrics


@pytest.mark.parametrize(
    ("form", "row", "metrics", "message"),
    [
        ("completion", CALLS[0], ("blue",), r"metrics: got 'blue' for 'completion' rows; did you mean 'bleu'\?"),
        ("pair", {"label": 1}, ("pearson",), r"metrics: got 'pearson' for 'pair' rows.* \(known: accuracy, f1, mcc\)"),
        ("text", {"text": "a"}, (), "metrics: got none; valid for 'text' rows: loss, perplexity"),
        ("texts", {"text": "a"}, None, "form: got 'texts'; did you mean 'text'"),
    ],
)
def test_unknown_metrics(llama, make, form, row, metrics, message):
    with pytest.raises(ConfigError, match=message):
        evaluate(llama, make(form, [row]), EvaluationConfig(metrics=metrics))


@pytest.mark.parametrize(
    ("form", "rows", "parts", "message"),
    [
        ("text", [], {}, "there are no rows to evaluate"),
        ("completion", FREE, {"prompts": [[4], [5]]}, "dataset: is missing, but the metrics asked for 'completion'"),
        ("completion", FREE, {"dataset": [1]}, "dataset: got 1 for 2 rows; valid: one each, not packed"),
        ("choice", [{}], {"prompts": [[4]]}, "choices: is missing"),
        ("choice", [{"choices": ["a"]}], {"choices": [[[4]]]}, "prompts: is missing"),
    ],
)
def test_missing_parts(llama, make, form, rows, parts, message):
    with pytest.raises(DataError, match=message):
        evaluate(llama, make(form, rows, **parts), EvaluationConfig())


def test_every_form_has_metrics_and_a_default_among_them(make):
    rows = {"label": 0, "completion": "a", "messages": [{"role": "assistant", "content": "a"}]}
    for form, known in METRICS.items():
        assert set(default_metrics(make(form, [rows]))) <= set(known)
