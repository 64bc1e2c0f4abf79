"""What a merge measures, against sums written out; the greedy soup on losses that are given."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mixora.errors import ConfigError, DataError
from mixora.merging.approximation import Approximation, hooked
from mixora.merging.comparison import compare, predict, sum_loss
from mixora.merging.soup import Soup, cook
from mixora.mixture.low_rank import LowRank
from mixora.routing.draws import current_serving

LOGITS = [[[1.0, 0.0, -1.0], [0.5, 2.0, 0.0], [3.0, 1.0, 1.0]], [[0.0, 0.0, 1.0], [1.0, 1.0, 4.0], [2.0, 0.0, 0.0]]]


class Base(nn.Module):
    """Gives logits that stand in the batch, through a site that adds to them."""

    def __init__(self, is_encoder_decoder=False):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(is_encoder_decoder=is_encoder_decoder)
        self.site = Site()

    def forward(self, logits, labels):
        return SimpleNamespace(logits=self.site(logits))


class Site(nn.Module):
    """A frozen module that doubles, and experts that add 1 to the first logit."""

    path = "site"

    def __init__(self):
        super().__init__()
        self.base_layer = lambda x: 2 * x

    def forward(self, x):
        return 2 * x + torch.tensor([1.0, 0.0, 0.0])


def entropy(row, label):
    return math.log(sum(map(math.exp, row))) - row[label]


def batch(labels, rows=LOGITS):
    return {"logits": torch.tensor(rows), "labels": torch.tensor(labels)}


def test_supervised_predictions_of_a_decoder_are_those_before_the_labels():
    logits_NV, labels_N = predict(Base(), batch([[9, 1, -100], [9, -100, 2]]))
    assert labels_N.tolist() == [1, 2]
    assert logits_NV.tolist() == [[3.0, 0.0, -2.0], [3.0, 2.0, 8.0]]
    assert logits_NV.dtype == torch.float32


def test_supervised_predictions_of_an_encoder_decoder_stand_at_the_labels():
    logits_NV, labels_N = predict(Base(is_encoder_decoder=True), batch([[0, 1, -100], [-100, -100, 2]]))
    assert labels_N.tolist() == [0, 1, 2]
    assert logits_NV[:, 0].tolist() == [3.0, 2.0, 5.0]


def test_of_a_classifier_each_row_is_a_prediction():
    logits_NV, labels_N = predict(Base(), batch([2, 0], [row[0] for row in LOGITS]))
    assert (logits_NV.shape, labels_N.tolist()) == ((2, 3), [2, 0])


def test_batches_without_labels_are_refused():
    with pytest.raises(DataError, match=r"^held_out: got batches of logits, mask; valid: with labels$"):
        predict(Base(), {"logits": torch.zeros(1), "mask": torch.zeros(1)})


def test_summed_losses():
    rows, labels = LOGITS[0], [2, 0, 1]
    expected = sum(entropy(row, label) for row, label in zip(rows, labels, strict=True))
    assert sum_loss(torch.tensor(rows), torch.tensor(labels)).item() == pytest.approx(expected, rel=1e-6)
    numbers_N = torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64)
    assert sum_loss(torch.tensor(rows), numbers_N).item() == pytest.approx(1.0 + 0.25 + 4.0)


# what takes the experts' place adds 0.5 to the second logit: B^T A x with A x = x_2, where x_2 is 1 / 2
PAIR = LowRank(torch.tensor([[0.0, 0.0, 0.5]]), torch.tensor([[0.0, 1.0, 0.0]]))


def test_the_change_over_several_batches():
    rows = [[1.0, 0.0, 1.0], [0.5, 2.0, 1.0], [3.0, 1.0, -2.0]]
    labels, told = [0, 1, 2], []
    batches = [
        {"logits": torch.tensor(rows[:1]), "labels": torch.tensor(labels[:1])},
        {"logits": torch.tensor([rows]), "labels": torch.full((1, 3), -100)},
        {"logits": torch.tensor(rows[1:]), "labels": torch.tensor(labels[1:])},
    ]
    model = Base()
    found = compare(model, [model.site], {"site": PAIR}, batches, lambda *numbers: told.append(numbers))
    mixed = [[2 * a + 1, 2 * b, 2 * c] for a, b, c in rows]
    merged = [[2 * a, 2 * b + c / 2, 2 * c] for a, b, c in rows]
    pairs = list(zip(mixed, merged, labels, strict=True))
    assert found.predictions == 3
    assert found.loss_of_mixture == pytest.approx(sum(entropy(m, y) for m, _, y in pairs) / 3, rel=1e-6)
    assert found.loss_of_merged == pytest.approx(sum(entropy(n, y) for _, n, y in pairs) / 3, rel=1e-6)
    differences = [[abs(a - b) for a, b in zip(m, n, strict=True)] for m, n, _ in pairs]
    assert found.mean_difference == pytest.approx(sum(map(sum, differences)) / 9, rel=1e-6)
    assert found.max_difference == max(map(max, differences)) == 1.0
    divergence = 0.0
    for m, n, _ in pairs:
        p, q = ([math.exp(v) / sum(map(math.exp, row)) for v in row] for row in (m, n))
        divergence += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert found.divergence == pytest.approx(divergence / 3, rel=1e-5)
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_nothing_supervised_is_nothing_to_measure():
    model = Base()
    with pytest.raises(DataError, match=r"^held_out: no token is supervised, so there is nothing to measure$"):
        compare(model, [model.site], {"site": PAIR}, [batch([[-100] * 3] * 2)], lambda *numbers: None)


def test_numbers_have_a_squared_error_and_no_divergence():
    model = Base()
    batches = [{"logits": torch.tensor([[1.0, 0.0, 4.0]]), "labels": torch.tensor([2.5])}]
    found = compare(model, [model.site], {"site": PAIR}, batches, lambda *numbers: None)
    assert (found.loss_of_mixture, found.loss_of_merged, found.divergence) == (0.25, 0.25, None)


def test_a_hook_is_gone_when_its_context_is():
    site, seen = Site(), []
    with hooked([site], lambda module, args, output: seen.append(float(output[0]))):
        site(torch.zeros(3))
    site(torch.zeros(3))
    assert seen == [1.0]


def sites(*counts, draws=True):
    router = [SimpleNamespace(num_experts=count, draws=draws) for count in counts]
    return [SimpleNamespace(parts={"default": SimpleNamespace(router=r)}) for r in router]


class Served(nn.Module):
    """A classifier of two classes whose loss for label 1 is given for each set of members."""

    def __init__(self, losses):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.losses, self.asked = losses, []

    def forward(self, labels, **rest):
        members = current_serving().members
        self.asked.append(members)
        p = math.exp(-self.losses[frozenset(members)])
        return SimpleNamespace(logits=torch.tensor([[0.0, math.log(p / (1 - p))]]).expand(len(labels), -1))


LOSSES = {
    frozenset([0]): 1.0,
    frozenset([1]): 0.75,
    frozenset([2]): 0.5,
    frozenset([2, 1]): 0.5,
    frozenset([2, 0]): 0.25,
    frozenset([0, 1, 2]): 2.0,
}


def test_a_soup_begins_with_the_best_and_keeps_what_lowers_the_loss():
    """An expert that leaves the loss as it is stays out."""
    model, told = Served(LOSSES), []
    batches = [{"labels": torch.ones(1, dtype=torch.long)}, {"labels": torch.ones(3, dtype=torch.long)}]
    soup = cook(model, sites(3, 3), "default", batches, lambda *numbers: told.append(numbers))
    assert soup.members == (0, 2)
    assert [soup.loss, soup.loss_of_all, *soup.losses] == pytest.approx([0.25, 2.0, 1.0, 0.75, 0.5], rel=1e-5)
    asked = [(0,), (1,), (2,), (2, 1), (2, 0), (0, 1, 2)]
    assert model.asked == [members for members in asked for _ in batches]
    assert told == [(done, 6) for done in range(1, 7)]
    assert isinstance(soup, Soup)


@pytest.mark.parametrize(("modules", "got"), [(sites(4, draws=False), "no"), (sites(3, 2), r"\[2, 3\]"), ([], "no")])
def test_a_soup_needs_one_number_of_drawn_experts(modules, got):
    message = (
        f"^soup: the sites of this adapter draw from {got} experts; valid: one number of drawn experts at all sites, "
        "as in the recipe adamix$"
    )
    with pytest.raises(ConfigError, match=message):
        cook(nn.Module(), modules, "default", [], lambda *numbers: None)


def test_a_soup_of_nothing_supervised_is_refused():
    batches = [{"labels": torch.ones(0, dtype=torch.long)}]
    with pytest.raises(DataError, match=r"^soup: no token is supervised, so there is nothing to measure$"):
        cook(Served(LOSSES), sites(3), "default", batches, lambda *numbers: None)


@pytest.mark.parametrize("name", ["fit", "held_out"])
def test_material_is_checked_when_it_is_named(name):
    good = {"fit": [{}], "held_out": [{}]}
    with pytest.raises(DataError, match=f"^{name}: has no batches; valid: one or more$"):
        Approximation(**{**good, name: []})
    message = f"^{name}: got a generator, which can be gone through once; valid: a list or a DataLoader$"
    with pytest.raises(DataError, match=message):
        Approximation(**{**good, name: (batch for batch in [{}])})
    assert (Approximation(**good).origin, Approximation(**good).memory) == ("batches of the caller", 2147483648)
