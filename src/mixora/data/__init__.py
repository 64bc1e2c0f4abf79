"""Rows from files, folders and the hub, checked, encoded and collated. Knows nothing of adapters.

Order: `read_rows` (sources, files, labels, formats) → `encode` (prompts, packing) → `mix` (several tasks) → `Collator`.
"""

from mixora.data.collation import Collator
from mixora.data.encoding import Encoded, encode
from mixora.data.formats import FORMS, Form
from mixora.data.mixing import count_rows, mix, share_out
from mixora.data.prompts import EncodingConfig, ModelKind, conversation_of, render_choices, render_prompt
from mixora.data.sources import Rows, read_rows, splits_of

__all__ = [
    "FORMS",
    "Collator",
    "Encoded",
    "EncodingConfig",
    "Form",
    "ModelKind",
    "Rows",
    "conversation_of",
    "count_rows",
    "encode",
    "mix",
    "read_rows",
    "render_choices",
    "render_prompt",
    "share_out",
    "splits_of",
]
