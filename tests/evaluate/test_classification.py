import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixora.errors import DataError
from mixora.evaluate.classification import classification_scores, predict, regression_scores

CLASSES = st.integers(2, 4).flatmap(
    lambda n: st.tuples(
        st.just(n), st.lists(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)), min_size=1, max_size=20)
    )
)


def f1_of(pairs, wanted):
    hits = sum(p == t == wanted for p, t in pairs)
    size = sum(p == wanted for p, _ in pairs) + sum(t == wanted for _, t in pairs)
    return 2 * hits / size if size else 0.0


@given(CLASSES)
def test_scores_follow_the_formulas(case):
    classes, pairs = case
    got = classification_scores([p for p, _ in pairs], [t for _, t in pairs], classes)
    assert got["accuracy"] == pytest.approx(sum(p == t for p, t in pairs) / len(pairs))
    present = sorted({c for pair in pairs for c in pair})
    expected = f1_of(pairs, 1) if classes == 2 else np.mean([f1_of(pairs, c) for c in present])
    assert got["f1"] == pytest.approx(expected)
    if classes == 2:
        a, b, c, d = (sum(pair == p for pair in pairs) for p in ((1, 1), (0, 0), (1, 0), (0, 1)))
        below = ((a + c) * (a + d) * (b + c) * (b + d)) ** 0.5
        assert got["mcc"] == pytest.approx((a * b - c * d) / below if below else 0.0)


def test_correlations_of_alike_numbers_are_zero():
    assert regression_scores([1.0, 2.0, 3.0], [2.0, 4.0, 9.0])["spearman"] == pytest.approx(1.0)
    assert regression_scores([1.0, 2.0, 3.0], [2.0, 4.0, 6.0])["pearson"] == pytest.approx(1.0)
    for predictions, labels in [([1.0] * 3, [1.0, 2.0, 3.0]), ([1.0, 2.0], [3.0, 3.0]), ([1.0], [1.0])]:
        assert regression_scores(predictions, labels) == {"pearson": 0.0, "spearman": 0.0}
    assert regression_scores([1.0, 1.0 + 1e-12], [1.0, 2.0])["pearson"] == 0.0
    with pytest.raises(DataError, match="not finite"):
        regression_scores([float("nan")], [1.0])


@pytest.mark.parametrize("outputs", [1, 3])
def test_predictions_do_not_depend_on_batches(make_bert, collate, outputs):
    model = make_bert(outputs)
    rows = [{"input_ids": list(range(4, 5 + n)), "labels": 1.5 if outputs == 1 else n % 3} for n in range(9)]
    alone = predict(model, rows, collate, 1)
    assert predict(model, rows, collate, 4) == pytest.approx(alone, abs=1e-5)
    assert isinstance(alone[0], float if outputs == 1 else int)
    assert model.training


@pytest.mark.parametrize(
    ("outputs", "label", "message"),
    [
        (3, 0.5, "the labels are floats, but the model has 3 outputs; valid: 1"),
        (3, 3, r"the model has 3 output\(s\), but a label is class 3"),
        (1, 0, r"the model has 1 output\(s\), but a label is class 0"),
    ],
)
def test_outputs_must_suit_the_labels(make_bert, collate, outputs, label, message):
    with pytest.raises(DataError, match=message):
        predict(make_bert(outputs), [{"input_ids": [4], "labels": label}], collate, 1)
