"""Experts behind modules that give more than one tensor."""

import pytest
import torch
from peft import get_peft_model
from torch import nn

import mixora
from mixora.errors import ModelError
from tests.models import fill


def behind_part():
    router = {"kind": "topk", "renormalise": True}
    rule = {"targets": ["part"], "expert": {"kind": "bottleneck"}, "router": router}
    return mixora.MixoraConfig(rules={"ffn": rule})


class Giving(nn.Module):
    """A block whose feed-forward part gives what `wrap` makes of its hidden states."""

    class Part(nn.Module):
        def __init__(self, wrap):
            super().__init__()
            self.up, self.down, self.wrap = nn.Linear(4, 6), nn.Linear(6, 4), wrap

        def forward(self, x):
            return self.wrap(self.down(self.up(x)))

    def __init__(self, wrap):
        super().__init__()
        self.part = self.Part(wrap)

    def forward(self, x):
        return self.part(x)


@pytest.mark.parametrize("wrap", [lambda y: {"y": y}, lambda y: [y], lambda y: (None, y), lambda y: ()])
def test_a_module_that_gives_no_hidden_states_is_refused(wrap):
    model = get_peft_model(Giving(wrap), behind_part())
    with pytest.raises(ModelError, match=r"part: a Part gives a (dict|list|tuple); valid .* alone or first in a tuple"):
        model(torch.randn(2, 4))


def test_what_a_module_gives_beside_hidden_states_stays():
    scores, x = torch.randn(3), torch.randn(2, 4)
    alone = get_peft_model(Giving(lambda y: y), behind_part())
    fill(alone)
    pair = get_peft_model(Giving(lambda y: (y, scores)), behind_part())
    pair.load_state_dict(alone.state_dict())
    y, beside = pair(x)
    assert torch.equal(y, alone(x)) and beside is scores
    with pair.disable_adapter():
        assert torch.equal(pair(x)[0], alone.get_base_model().part.base_layer(x)) and pair(x)[1] is scores
