import math
import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mixora.errors import DataError
from mixora.evaluate import token_loss
from mixora.evaluate.inference import inference

ROW = st.lists(st.integers(4, 19), min_size=2, max_size=12).flatmap(
    lambda ids: st.tuples(st.just(ids), st.integers(1, len(ids) - 1))
)


def encoded(ids, prompt):
    return {"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]}


def reference(model, rows):
    """Float64, one row at a time, token by token."""
    model = model.double().eval()
    losses = []
    for row in rows:
        with torch.no_grad():
            logs = model(torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        losses += [-float(logs[t - 1, label]) for t, label in enumerate(row["labels"]) if label != -100 and t]
    model.float()
    return sum(losses) / len(losses), len(losses)


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(ROW, min_size=1, max_size=7), size=st.integers(1, 8))
def test_loss_is_the_float64_mean_over_tokens_for_any_batch_size(llama, collate, rows, size):
    rows = [encoded(*row) for row in rows]
    loss, count = reference(llama, rows)
    got = token_loss(llama, rows, collate, size)
    assert got["loss"] == pytest.approx(loss, rel=1e-5)
    assert got["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert got["tokens"] == count


def test_order_of_rows_changes_nothing(llama, collate):
    draw = random.Random(0)
    rows = [encoded([draw.randint(4, 19) for _ in range(length)], 1) for length in range(2, 20)]
    first = token_loss(llama, rows, collate, 4)
    draw.shuffle(rows)
    assert token_loss(llama, rows, collate, 4) == first


def test_packed_rows_lose_what_loose_ones_do(llama, collate):
    rows = [encoded(list(range(4, 4 + n)), 1) for n in (3, 5, 7)]
    packed = {name: [token for row in rows for token in row[name]] for name in ("input_ids", "labels")}
    packed["position_ids"] = [place for row in rows for place in range(len(row["input_ids"]))]
    got = token_loss(llama, [packed], lambda bins: {k: torch.tensor([v]) for k, v in bins[0].items()}, 1)
    assert got == pytest.approx(token_loss(llama, rows, collate, 2), rel=1e-5)


def test_encoder_decoder_loss(t5, collate):
    rows = [{"input_ids": [5, 6, 7], "labels": [8, 9, 2]}, {"input_ids": [5], "labels": [2]}]
    t5.eval()
    with torch.no_grad():
        expected = t5(**collate(rows)).loss
    for size in (1, 2):
        got = token_loss(t5, rows, collate, size)
        assert got["loss"] == pytest.approx(float(expected), rel=1e-5)
        assert got["tokens"] == 4


def test_perplexity_may_be_infinite(llama, collate):
    with torch.no_grad():
        llama.lm_head.weight.mul_(1e6)
    assert token_loss(llama, [encoded([4, 5, 6, 7, 8], 1)], collate, 1)["perplexity"] == math.inf


def test_every_training_flag_is_restored(llama):
    llama.train()
    llama.model.layers[0].eval()
    before = [module.training for module in llama.modules()]
    with pytest.raises(RuntimeError, match="stop"), inference(llama):
        assert not any(module.training for module in llama.modules())
        assert not torch.is_grad_enabled()
        raise RuntimeError("stop")
    assert [module.training for module in llama.modules()] == before


def test_progress_counts_rows(llama, collate):
    seen = []
    token_loss(llama, [encoded([4, 5], 1)] * 5, collate, 2, lambda done, total: seen.append((done, total)))
    assert seen == [(2, 5), (4, 5), (5, 5)]


@pytest.mark.parametrize(
    ("rows", "size", "message"),
    [
        ([], 1, "there are no rows to evaluate"),
        ([{"input_ids": [4, 5], "labels": [-100, -100]}], 1, "no token is supervised"),
        ([{"input_ids": [4, 5], "labels": [-100, 5]}], 0, "batch_size: got 0; valid: 1 or more"),
    ],
)
def test_nothing_to_measure(llama, collate, rows, size, message):
    with pytest.raises(DataError, match=message):
        token_loss(llama, rows, collate, size)
