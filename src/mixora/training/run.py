"""The whole way of a run: load, plan, evaluate, train, evaluate again, save, read back, report."""

import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel, get_peft_model
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from mixora.bases import TASK_TYPES
from mixora.cards import Card, facts_of, write_card
from mixora.diagnostics.checkpoint import history_of
from mixora.diagnostics.record import RunRecord
from mixora.diagnostics.report import write_report
from mixora.errors import ConfigError
from mixora.evaluate import Evaluation, Examples, evaluate
from mixora.files.asides import writing
from mixora.files.folders import check_folder
from mixora.files.locks import FolderLock
from mixora.loading import count_outputs, from_pretrained, read_adapter_config
from mixora.planning.plan import Plan
from mixora.training.arguments import make_arguments
from mixora.training.beginning import begin
from mixora.training.checkpoints import ChangedIntervals, finish, read_state, resumable
from mixora.training.costs import Clock, describe_costs
from mixora.training.description import (
    describe_environment,
    describe_model,
    describe_run,
    describe_scores,
    list_generations,
)
from mixora.training.determinism import deterministic
from mixora.training.interruption import Interruption
from mixora.training.material import (
    Material,
    TrainingSet,
    make_examples,
    make_training_set,
    read_material,
    sample_batches,
)
from mixora.training.processes import agree, check_processes, is_first, wait_for_all
from mixora.training.progress import Progress, StepProgress
from mixora.training.run_config import RunConfig
from mixora.training.run_folder import open_folder, paths_read, write_settings
from mixora.training.start import Start, write_start
from mixora.training.tasks import evaluation_of, mixture_table
from mixora.training.trainers import Trainer
from mixora.tuner import MixoraConfig, allocate, plan
from mixora.tuner.serving import served_by


def build(material: Material, rows: TrainingSet, config: RunConfig, progress: Progress) -> tuple[MixoraConfig, Plan]:
    """The adapter's configuration, its budget allocated, and its plan on the base."""
    adapter = config.adapter.build(task_type=TASK_TYPES[material.task])
    with progress.task(f"allocating, {adapter.method.allocator.kind}") as advance:
        adapter = allocate(material.model, adapter, sample_batches(material, rows.dataset, config), advance)
    return adapter, plan(material.model, adapter)


def fit(config: RunConfig, progress: Progress, overwrite: bool = False, resume: bool = False) -> RunRecord | None:
    """Run `config` from data to report; writes settings, adapter, report and record below `config.out`.

    With `overwrite` an earlier run's results there are replaced, once the data, the model and all settings have proved
    to fit. With `resume` the run that was interrupted there goes on from its newest whole checkpoint, or from its
    beginning where it has none. Returns the record that the report was made from. Raises `StoppedError` after a signal,
    once a checkpoint is written, `UnwrittenError` where the disk is full, and `NonFiniteError` where numbers go wrong.

    Where several processes were started, each calls this: all train, the first one does the rest alone, and the others
    return None. Raises `TrainingError` where they do not find together, and `ConfigError` while another writes there.
    """
    with deterministic(config.train.deterministic), FolderLock(Path(config.out)) as lock:
        return _fit(config, progress, overwrite, resume, lock)


def _fit(config: RunConfig, progress: Progress, overwrite: bool, resume: bool, lock: FolderLock) -> RunRecord | None:
    started = time.perf_counter()
    _meet(config, overwrite, resume, lock)
    # a new classification head is drawn with the base
    torch.manual_seed(config.train.seed)
    material, rows = _read(config, progress)
    begun = begin(Path(config.out), material, rows, resume, progress)
    adapter, table = build(material, rows, config, progress)
    _show_plan(table, rows, progress)
    examples = make_examples(material, config)
    torch.manual_seed(config.train.seed)
    model = get_peft_model(material.model, adapter)
    measured = {"before": measure(model, examples, config, progress, "before")} if is_first() else {}
    out = _claim(config, overwrite, resume, begun.start, lock)
    with resumable(out):
        trainer = make_trainer(model, material, rows, config)
        seconds = train(trainer, begun.checkpoint, progress)
        if not is_first():
            wait_for_all()
            return None
        measured["after"] = measure(model, examples, config, progress, "after")
        seen = describe_model(model, material, table, examples, config, progress)
        measured["reloaded"] = _read_back(model, material, examples, config, progress)
        record = RunRecord(
            **describe_run(config, adapter, material),
            **seen,
            **describe_scores(rows, examples, measured),
            history=history_of(trainer.state.log_history),
            generations=list_generations(examples, measured, config.evaluate.generations),
            environment=describe_environment(config, time.perf_counter() - started)
            | describe_costs(seconds, trainer.state.num_input_tokens_seen)
            | {"interruptions": begun.start.interruptions},
            notes=[*table.notes, *_remark(rows, trainer), *begun.notes],
            bad_steps=trainer.bad_steps,
        )
        _write_pages(record, config, progress)
    finish(out, config.train.keep_checkpoints)
    wait_for_all()
    return record


def _meet(config: RunConfig, overwrite: bool, resume: bool, lock: FolderLock) -> None:
    """Processes that were started together find together, before one of them looks at a folder that others write."""
    make_arguments(config)  # opens their group; a mistake in it has cost nothing yet
    check_processes()
    if is_first():
        lock.take()
        if not resume:
            check_folder(config.out, overwrite, paths_read(config))


def _claim(config: RunConfig, overwrite: bool, resume: bool, start: Start, lock: FolderLock) -> Path:
    if is_first():
        if not resume:
            open_folder(config, overwrite)
            lock.take()
        write_settings(config)
        write_start(Path(config.out), start)
    wait_for_all()
    return Path(config.out)


def _read(config: RunConfig, progress: Progress) -> tuple[Material, TrainingSet]:
    progress.say(f"reading {config.data.origin} and {config.model.base}")
    with progress.task("reading"):
        material = read_material(config)
    with progress.task("encoding, rows") as advance:
        return material, make_training_set(material, config, advance)


def train(trainer: Trainer, checkpoint: Path | None, progress: Progress) -> float:
    """Train, from `checkpoint` on if there is one; `KeyboardInterrupt` after a signal, with a checkpoint.

    Returns the seconds that it took, before the checkpoint and after.
    """
    state = None if checkpoint is None else read_state(checkpoint)
    clock = Clock.of(state)
    if checkpoint and state and state.global_step >= state.max_steps:
        # the trainer would make one more step
        trainer.model.load_adapter(str(checkpoint), trainer.model.active_adapter, is_trainable=True)
        trainer.state = state
        trainer.restore_readings(checkpoint)
        return clock.seconds
    trainer.add_callback(clock)
    trainer.add_callback(ChangedIntervals())
    with progress.task("training") as advance, Interruption() as interruption:
        trainer.add_callback(StepProgress(advance))
        trainer.add_callback(interruption)
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    if agree(interruption.requested):
        raise KeyboardInterrupt
    return clock.seconds


def _read_back(
    model: PeftModel, material: Material, examples: Mapping[str, Examples], config: RunConfig, progress: Progress
) -> dict[str, Evaluation]:
    """Save the adapter, and measure what is read from there; `model` is used up."""
    folder = Path(config.out) / "adapter"
    with writing(folder) as aside:
        save(model, material.tokenizer, aside)
    progress.say(f"saved {folder}; reading it back")
    return measure(from_pretrained(model.unload(), folder), examples, config, progress, "read back")


def _write_pages(record: RunRecord, config: RunConfig, progress: Progress) -> None:
    """The report, and the card of the adapter, in place of PEFT's, which knows nothing of the run."""
    folder = Path(config.out) / "adapter"
    settings = config.model_dump(mode="json")
    with progress.task("writing the report"):
        of_run: dict[str, Any] = {"base": config.model.base, "record": record, "settings": settings}
        facts = facts_of(read_adapter_config(folder), outputs=count_outputs(folder), **of_run)
        write_card(folder, Card("adapter", facts))
        write_report(record, Path(config.out))


def _show_plan(table: Plan, rows: TrainingSet, progress: Progress) -> None:
    progress.show(table.table())
    for note in table.notes:
        progress.say(f"note: {note}")
    if rows.tasks:
        progress.show(mixture_table(rows.tasks))


def make_trainer(model: PeftModel, material: Material, rows: TrainingSet, config: RunConfig) -> Trainer:
    """A `mixora.Trainer` set up as `config` says; `ConfigError` for arguments that transformers refuses."""
    arguments = make_arguments(config)
    # embeddings are never changed here, and looking for it would ask the hub for the base at each checkpoint
    model.save_pretrained = partial(model.save_pretrained, save_embedding_layers=False)  # type: ignore[method-assign]
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=rows.dataset,
        data_collator=material.collator(),
        fused_loss=config.train.fused_loss,
        skip_bad_steps=config.train.skip_bad_steps,
    )
    trainer.saves_before_bad_step = True
    trainer.remove_callback(transformers.PrinterCallback)
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise ConfigError(
            "train.arguments: the model is sharded, and mixora train evaluates and saves in one process; "
            "valid: mixora.Trainer in a script of your own, or neither fsdp nor deepspeed"
        )
    return trainer


def measure(
    model: Any, examples: Mapping[str, Examples], config: RunConfig, progress: Progress, when: str
) -> dict[str, Evaluation]:
    """The metrics of `model` on the held-out rows of each task."""
    found = {}
    for name, of_task in examples.items():
        what = "evaluating" if config.data.tasks is None else f"evaluating {name}"
        with progress.task(f"{what}, {when}") as advance, served_by(model, config.evaluate.served_by):
            found[name] = evaluate(model, of_task, evaluation_of(config, of_task), advance)
    return found


def save(model: PeftModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the adapter and the tokenizer."""
    # embeddings are never changed here, and looking for it would ask the hub for the base
    model.save_pretrained(str(folder), save_embedding_layers=False)
    tokenizer.save_pretrained(str(folder))


def _remark(rows: TrainingSet, trainer: Trainer) -> Iterator[str]:
    if rows.truncated:
        yield f"{rows.truncated} training rows were longer than max_length and lost tokens."
    if trainer.bad_steps:
        yield (
            f"{len(trainer.bad_steps)} of {trainer.state.global_step} steps left out: their numbers were not finite."
        )
    yield from filter(None, (trainer.idle_sites.note, trainer.alarm.note))
