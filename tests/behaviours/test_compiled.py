"""`torch.compile` with the backend that runs what was traced as it is; with inductor see tests/compatibility."""

import pytest
import torch

from tests.behaviours.cases import config, logits, of_adapters
from tests.models import adapt, tiny_bert_classifier


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_traced_model_computes_the_same():
    torch.compiler.reset()
    model = adapt(tiny_bert_classifier(layers=1), config("sira", "encoder", targets=["query"])).eval()
    expected = logits(model, "encoder")
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(logits(compiled, "encoder"), expected, rtol=1e-5, atol=1e-6)
    assert {key.removeprefix("_orig_mod.") for key in of_adapters(compiled)} == of_adapters(model).keys()
