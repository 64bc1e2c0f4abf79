"""What a run would do, without doing it: everything that is cheap to check is checked, and nothing is written."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from mixora.bases import TASK_TYPES
from mixora.files.folders import check_folder
from mixora.footprint import Memory
from mixora.planning.plan import Plan
from mixora.training.arguments import make_arguments
from mixora.training.checkpoints import find_checkpoint
from mixora.training.material import (
    Material,
    count_rows_of_epoch,
    encode_rows,
    make_examples,
    read_material,
)
from mixora.training.planning import longest_row, weigh
from mixora.training.processes import count_asked
from mixora.training.rows import first_rows
from mixora.training.run_config import RunConfig
from mixora.training.run_folder import paths_read
from mixora.tuner import MixoraConfig, plan

TRIED_ROWS = 256
# allocators that read what a rehearsal does not
READ_WEIGHTS = ("spectral", "sensitivity")


@dataclass(frozen=True)
class Rehearsal:
    """What a run would do. `memory`: bytes of a training step by part. `steps`: of the optimiser, or the most of
    them where rows are packed.

    `plan` and `memory` are None where they follow from weights. `goes_on_from`: a checkpoint.
    """

    out: str
    task: str
    train_rows: int
    evaluation_rows: int
    steps: int
    is_packed: bool
    plan: Plan | None
    memory: Memory | None
    goes_on_from: str | None

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {**vars(self), "plan": self.plan and self.plan.to_list(), "memory": self.memory and asdict(self.memory)}

    def lines(self) -> Iterator[RenderableType]:
        """For a terminal."""
        if self.plan and self.memory:
            yield self.plan.table()
            yield from (f"note: {note}" for note in self.plan.notes)
            yield f"memory of a step of the longest rows: about {self.memory.peak / 2**20:,.0f} MiB"
        else:
            yield "the plan follows from the base's weights, which were not read"
        if self.goes_on_from:
            yield f"goes on from {self.goes_on_from}"
        most = "at most " if self.is_packed else ""
        yield f"{most}{self.steps} steps on {self.train_rows} rows, as {self.task}"
        yield f"{self.evaluation_rows} rows to evaluate on"
        yield f"would write to {self.out}: run.yaml, checkpoints, adapter, report.html with its plots, record.json"
        yield "nothing was written"


def rehearse(config: RunConfig, overwrite: bool = False, resume: bool = False) -> Rehearsal:
    """Check the folder, the rows, the encoding of the first ones, the plan and the trainer's arguments.

    Of the base, only configuration and tokenizer are read. Raises what the run would raise of these.
    """
    checkpoint, _ = find_checkpoint(Path(config.out)) if resume else (None, [])
    if not resume:
        check_folder(config.out, overwrite, paths_read(config))
    material = read_material(config, with_weights=False)
    rows = material.train_rows()
    encode_rows(material, config, {name: first_rows(of_task, TRIED_ROWS) for name, of_task in rows.items()})
    examples = make_examples(material, config)
    arguments = make_arguments(config)
    sizes = {name: len(of_task) for name, of_task in rows.items()}
    batches = math.ceil(count_rows_of_epoch(config, sizes) / (config.train.batch_size * count_asked()))
    per_epoch = math.ceil(batches / config.train.gradient_accumulation)
    table, memory = _plan(material, config, config.adapter.build(task_type=TASK_TYPES[material.task]))
    return Rehearsal(
        out=config.out,
        task=material.task,
        train_rows=sum(sizes.values()),
        evaluation_rows=sum(len(of_task.rows) for of_task in examples.values()),
        steps=config.train.steps or math.ceil(per_epoch * arguments.num_train_epochs),
        is_packed=config.data.packing,
        plan=table,
        memory=memory,
        goes_on_from=str(checkpoint) if checkpoint else None,
    )


def _plan(material: Material, config: RunConfig, adapter: MixoraConfig) -> tuple[Plan | None, Memory | None]:
    if adapter.method.allocator.kind in READ_WEIGHTS and adapter.method.allocation is None:
        return None, None
    length = min(config.data.max_length, longest_row(material.model))
    table, sizes = plan(material.model, adapter), (config.train.batch_size, length)
    given = config.train.arguments
    # the second is what transformers called the first
    recomputes = bool(given.get("activation_checkpointing", given.get("gradient_checkpointing")))
    return table, weigh(material.model, adapter, *sizes, fused=config.train.fused_loss, recomputes=recomputes)
