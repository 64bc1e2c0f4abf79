"""From the folder of a run or an adapter to a folder in another form, with its card."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

from peft.utils.constants import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from mixora.bases import read_tokenizer
from mixora.cards import Card, CardForm, Facts, facts_of, is_hub_id, write_card
from mixora.config import did_you_mean, parse
from mixora.diagnostics.record import RECORD, RunRecord, read_record
from mixora.errors import ConfigError
from mixora.files.documents import read_json
from mixora.files.folders import check_folder, claim_folder
from mixora.loading import count_outputs, read_adapter_config
from mixora.merging import Form, Merged
from mixora.merging.export import name_base
from mixora.short_names import SHORT_NAMES
from mixora.standalone import Standalone, check_standalone, write_standalone
from mixora.training.merging import find_settings, foresee_merge, load_adapted, merge_folder, sketch_adapted
from mixora.training.progress import Progress
from mixora.training.run_config import ModelSection

MERGED: tuple[CardForm, ...] = get_args(Form)


@dataclass(frozen=True)
class Options:
    """How to merge: as `mixora.merge`; `soup` on the evaluation rows, `fit_rows` for the nearest LoRA."""

    rank: int | None = None
    uniform_rank: bool = False
    soup: bool = False
    fit_rows: int | None = None


@dataclass(frozen=True)
class Exported:
    """What was written; `made` is how, where it is no copy."""

    out: Path
    form: CardForm
    made: Merged | Standalone | None

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        made = {} if self.made is None else self.made.to_dict() if isinstance(self.made, Merged) else asdict(self.made)
        return {**made, "form": self.form, "out": str(self.out)}


def export_folder(
    source: Path,
    out: Path,
    changes: Mapping[str, Any],
    progress: Progress,
    *,
    form: CardForm,
    options: Options = Options(),
    base_id: str | None = None,
    licence: str | None = None,
    repository: str | None = None,
    overwrite: bool = False,
) -> Exported:
    """Write the adapter of a run, or a saved one, to `out` as `form`, with a card that tells what its run measured.

    `changes`: settings of a run. `base_id`: what the result calls its base. `repository`: where others will load it
    from, for which it may name no folder of this machine. Raises what `merge_folder` and `write_standalone` do.
    """
    adapter, tree = _check(source, changes, form, options)
    facts = replace(_read_facts(source, adapter, tree, base_id, licence), place=repository)
    if repository is not None:
        _check_base_name(facts.base, form)
    if form in MERGED:
        settings: dict[str, Any] = {"to": form, **vars(options), "base_id": base_id, "overwrite": overwrite}
        return Exported(out, form, merge_folder(source, out, changes, progress, facts=facts, **settings))
    base = tree["model"]["base"]
    check_folder(out, overwrite, [source, base])
    if form == "standalone":
        progress.say(f"reading {adapter} and {base}")
        model, tokenizer = load_adapted(source, adapter, parse(ModelSection, tree["model"], "model"))
        companions: dict[str, Any] = {"tokenizer": tokenizer, "facts": facts, "progress": progress.task}
        return Exported(out, form, write_standalone(model, out, overwrite=overwrite, **companions))
    _copy_adapter(adapter, claim_folder(out, overwrite, [source, base]), base_id)
    read_tokenizer(base, adapter).save_pretrained(str(out))
    write_card(out, Card(form, facts))
    return Exported(out, form, None)


def foresee_export(
    source: Path, out: Path, changes: Mapping[str, Any], *, form: CardForm, options: Options, overwrite: bool = False
) -> dict[str, str]:
    """What `export_folder` would do to each site, by path; reads no weights of the base, and writes nothing."""
    adapter, tree = _check(source, changes, form, options)
    if form in MERGED:
        settings: dict[str, Any] = {"to": form, **vars(options), "overwrite": overwrite}
        return foresee_merge(source, out, changes, **settings)
    check_folder(out, overwrite, [source, tree["model"]["base"]])
    if form == "standalone":
        check_standalone(sketch_adapted(adapter, parse(ModelSection, tree["model"], "model")))
    config: Any = read_adapter_config(adapter)
    return {site["path"]: "as it is" for site in config.plan or ()}


def _check(source: Path, changes: Mapping[str, Any], form: str, options: Options) -> tuple[Path, dict[str, Any]]:
    if form not in get_args(CardForm):
        raise ConfigError(f"to: got {form!r}{did_you_mean(form, [*get_args(CardForm), 'hub'])}")
    asked = [name for name, value in vars(options).items() if value is not None and value is not False]
    if form not in MERGED and asked:
        raise ConfigError(f"{', '.join(asked)}: nothing is merged; valid: with {', '.join(MERGED)}")
    needs_rows = options.soup or options.fit_rows is not None
    adapter, tree = find_settings(source, changes, needs_rows)
    parse(ModelSection, tree["model"], "model")
    return adapter, tree


def _read_facts(
    source: Path, adapter: Path, tree: Mapping[str, Any], base_id: str | None, licence: str | None
) -> Facts:
    record: RunRecord | None = read_record(source) if (source / RECORD).is_file() else None
    of_run: dict[str, Any] = {"base": tree["model"]["base"], "record": record, "settings": tree, "licence": licence}
    facts = facts_of(read_adapter_config(adapter), outputs=count_outputs(adapter), **of_run)
    return facts if base_id is None else replace(facts, base=base_id, weights=facts.base)


def _check_base_name(base: str, form: CardForm) -> None:
    """`ConfigError` where what others load would name a folder of this machine as its base."""
    # mixora alone knows short names, and merges write the folder in place of them
    short = form == "adapter" and base in SHORT_NAMES
    if form in ("dense", "standalone") or short or is_hub_id(base):
        return
    known = SHORT_NAMES[base].origin if base in SHORT_NAMES else None
    hint = f"{known}, of which this one is a copy or a quantisation" if known else "the same weights on the hub"
    raise ConfigError(
        f"base_id: others cannot load the base from {name_base(base)}; valid: --base-id OWNER/NAME, {hint}"
    )


def _copy_adapter(adapter: Path, out: Path, base_id: str | None) -> None:
    """The two files of an adapter; nothing else that may lie beside them is anybody's business."""
    shutil.copyfile(adapter / SAFETENSORS_WEIGHTS_NAME, out / SAFETENSORS_WEIGHTS_NAME)
    config = read_json(adapter / CONFIG_NAME)
    if base_id is not None:
        config["base_model_name_or_path"] = base_id
    (out / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
