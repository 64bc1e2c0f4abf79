"""What a run was started with: checksums of rows and weights, and what is told when they differ."""

import datasets
import pytest
import torch
from torch import nn

from mixora.errors import CheckpointError
from mixora.training.start import SAMPLES, Start, check_start, digest_rows, digest_weights, write_start

ROWS = [{"input_ids": [n, n + 1, n + 2][: n % 3 + 1], "label": n / 2, "task": "ab"[n % 2]} for n in range(2500)]


def rows(changes=()):
    return datasets.Dataset.from_list([{**row, **dict(changes).get(n, {})} for n, row in enumerate(ROWS)])


@pytest.mark.parametrize(
    "change", [{"label": -1.0}, {"task": "c"}, {"input_ids": [0]}, {"input_ids": []}, {"input_ids": [2400, 2401]}]
)
def test_every_value_of_every_row_counts(change):
    assert digest_rows(rows()) == digest_rows(rows())
    assert digest_rows(rows({2400: change})) != digest_rows(rows())


def test_the_order_counts_and_how_it_is_stored_does_not():
    order = list(reversed(range(len(ROWS))))
    picked = rows().select(order)
    assert digest_rows(picked) != digest_rows(rows())
    assert digest_rows(picked) == digest_rows(datasets.Dataset.from_list([ROWS[n] for n in order]))


def test_names_shapes_and_a_sample_of_the_weights_count():
    def model(width=64, seed=0):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(64, width), nn.BatchNorm1d(width))

    same = digest_weights(model())
    assert same == digest_weights(model())
    for other in (model(seed=1), model(width=65), model().to(torch.bfloat16), nn.ModuleList(model())[:1]):
        assert digest_weights(other) != same
    changed = model()
    changed[0].weight.data.flatten()[64 * 64 // SAMPLES] += 1
    assert digest_weights(changed) != same


def test_other_versions_are_told(tmp_path):
    now = Start(rows=2, digest="a", configuration={"x": 1}, weights="b", versions={"torch": "2.13.0"})
    write_start(tmp_path, now.model_copy(update={"versions": {"torch": "2.12.0"}, "configuration": {"x": 1, "y": 2}}))
    kept, (told,) = check_start(tmp_path, now)
    assert kept.interruptions == 1 and told.startswith("torch was 2.12.0 when the run was started and is 2.13.0 now")
    with pytest.raises(CheckpointError, match="the training rows: 2, were 3"):
        write_start(tmp_path, now.model_copy(update={"rows": 3}))
        check_start(tmp_path, now)
    (tmp_path / "start.json").write_text("{")
    with pytest.raises(CheckpointError, match="is damaged, so it is not known what the run was started with"):
        check_start(tmp_path, now)
