"""`torch.compile` with the backend that runs what was traced as it is, once for each kind of base."""

import pytest
import torch

from tests.behaviours.cases import each_kind, logits, of_adapters, wrap


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
@each_kind
def test_a_traced_model_computes_the_same(kind):
    torch.compiler.reset()
    model = wrap("sira", kind, targets=["q_proj"] if kind == "decoder" else ["query"] if kind == "encoder" else ["q"])
    expected = logits(model, kind)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(logits(compiled, kind), expected, rtol=1e-5, atol=1e-6)
    assert {key.removeprefix("_orig_mod.") for key in of_adapters(compiled)} == of_adapters(model).keys()
