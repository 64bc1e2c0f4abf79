"""Base models: from folders, GGUF files, packages and the hub, each checked before it is read."""

from mixora.bases.base import (
    TASK_TYPES,
    Task,
    count_positions,
    is_resized,
    language_task_of,
    load_base,
    name_classes,
    read_base_config,
    read_tokenizer,
    resolve_base,
    sketch,
    sketch_base,
)

__all__ = [
    "TASK_TYPES",
    "Task",
    "count_positions",
    "is_resized",
    "language_task_of",
    "load_base",
    "name_classes",
    "read_base_config",
    "read_tokenizer",
    "resolve_base",
    "sketch",
    "sketch_base",
]
