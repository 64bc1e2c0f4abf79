"""What the PEFT that is installed cannot do, as marks that skip with the reason, and what it warns about."""

import peft
import pytest
from packaging.version import Version
from transformers.integrations.peft import MIN_PEFT_VERSION

HERE = Version(peft.__version__)

native = pytest.mark.skipif(
    Version(MIN_PEFT_VERSION) > HERE,
    reason=f"transformers' own loading of adapters asks for PEFT {MIN_PEFT_VERSION}, here is {HERE}",
)
lora_export = pytest.mark.skipif(
    Version("0.19") > HERE, reason=f"peft.save_as_lora came with PEFT 0.19, here is {HERE}"
)
WARNINGS = [
    "ignore:Could not find a config file in  - will assume:UserWarning",
    "ignore:Model (has|with) `tie_word_embeddings=True`:UserWarning",
]
if Version("0.21") <= HERE:
    WARNINGS = []
