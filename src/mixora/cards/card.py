"""The writer of all model cards."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import mixora
from mixora.bases import TASK_TYPES
from mixora.cards.facts import Facts, licence_of_base, show_name
from mixora.cards.front_matter import write_front_matter
from mixora.cards.text import literal, make_table, quote
from mixora.files.asides import writing
from mixora.recipes import read_recipe, recipe_names
from mixora.short_names import SHORT_NAMES

CardForm = Literal["adapter", "peft-lora", "averaged", "dense", "standalone"]
# settings that change what a run shows or keeps, not what it learns
_ASIDE = {"log_every", "save_every", "keep_checkpoints", "fused_loss", "interruptions"}
_AUTO = {"SEQ_CLS": "AutoModelForSequenceClassification", "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM"}
_TASKS = {kind: task for task, kind in TASK_TYPES.items()}


@dataclass(frozen=True)
class _Form:
    title: str
    library: str
    tags: tuple[str, ...]
    limit: str


_FORMS: dict[CardForm, _Form] = {
    "adapter": _Form(
        "A mixture of adapters",
        "peft",
        (),
        "Loads where mixora is installed and imported; plain PEFT and servers of LoRA cannot read it.",
    ),
    "peft-lora": _Form(
        "One LoRA adapter, merged from a mixture of adapters",
        "peft",
        ("lora",),
        "Servers that read one rank for all modules, and no patterns, need it written with `--uniform-rank` where "
        "ranks differ.",
    ),
    "averaged": _Form(
        "Adapters with one expert, merged from a mixture of adapters",
        "peft",
        (),
        "Loads where mixora is installed and imported; plain PEFT and servers of LoRA cannot read it.",
    ),
    "dense": _Form(
        "A dense model, merged from a mixture of adapters",
        "transformers",
        (),
        "The change was rounded to the type of the weights when it was added to them.",
    ),
    "standalone": _Form(
        "A language model with a mixture of adapters inside",
        "transformers",
        (),
        "For inference. It brings code of its own, `modeling_mixora.py`, which `trust_remote_code=True` runs: read it.",
    ),
}


@dataclass(frozen=True)
class Card:
    """What a card tells.

    `base`: what transformers loads the base from, where that is not its name in `facts`. `details`: lines of sections
    between the results and how to load. `has_results`: it computes what the run measured; else the card says that the
    scores are of something else.
    """

    form: CardForm
    facts: Facts
    base: str | None = None
    details: tuple[str, ...] = ()
    has_results: bool = True

    def render(self, folder: Path) -> str:
        """The whole text, for what is written to `folder`."""
        form = _FORMS[self.form]
        head = write_front_matter(self.facts, form.library, list(form.tags), form.title, self.has_results)
        return f"---\n{head.strip()}\n---\n\n" + "\n".join(self._lines(self.facts.place or str(folder))) + "\n"

    def _lines(self, place: str) -> Iterator[str]:
        facts = self.facts
        recipe = f"recipe {quote(facts.recipe)}" if facts.recipe else "rules of its own"
        yield from (f"# {_FORMS[self.form].title}", "")
        base = quote(show_name(facts.base))
        yield f"Made by mixora {mixora.__version__} from an adapter with {recipe} on the base {base}."
        yield from _tell_recipe(facts)
        yield from _tell_plan(facts)
        yield from _tell_training(facts)
        yield from _tell_results(facts, self.has_results)
        yield from (("", *self.details) if self.details else ())
        yield from ("", "## Load", "", "```python", *self._loading(literal(place)), "```")
        if self.form in ("adapter", "averaged"):
            yield from ("", "`mixora.from_pretrained` in place of `PeftModel.from_pretrained` checks every tensor.")
            asked = "" if self._outputs() is None else f", given `{self._outputs()}`,"
            yield f"`peft.AutoPeftModel` and its kin{asked} load a base too that is a folder or a name of the hub."
        yield from self._tell_limits()
        yield from self._tell_licence()

    def _loading(self, place: str) -> Iterator[str]:
        auto = _AUTO.get(str(self.facts.task_type), "AutoModelForCausalLM")
        if self.form in ("dense", "standalone"):
            trust = ", trust_remote_code=True" if self.form == "standalone" else ""
            yield from (f"from transformers import {auto}", "")
            yield f"model = {auto}.from_pretrained({place}{trust})"
            return
        if self.form != "peft-lora":
            yield "import mixora  # PEFT and transformers know the adapter from here on"
        base = self.base or self.facts.base
        # what transformers does not read
        if base in SHORT_NAMES or base.startswith("~") or base.endswith(".gguf"):
            yield from ("from mixora.bases import load_base", "from peft import PeftModel", "")
            yield f"base, tokenizer = load_base({_join(literal(base), self._task(), self._outputs())})"
        else:
            yield from ("from peft import PeftModel", f"from transformers import {auto}", "")
            yield f"base = {auto}.from_pretrained({_join(literal(base), self._outputs())})"
        yield f"model = PeftModel.from_pretrained(base, {place})"

    def _task(self) -> str | None:
        """As an argument, where it is not the one that mixora takes a base to be for."""
        task = _TASKS.get(str(self.facts.task_type), "causal-lm")
        return None if task == "causal-lm" else f"task={literal(task)}"

    def _outputs(self) -> str | None:
        """As an argument: a base knows of two, or of those that it had before."""
        return None if self.facts.outputs is None else f"num_labels={self.facts.outputs}"

    def _tell_limits(self) -> Iterator[str]:
        yield from ("", "## Limits", "", f"- {_FORMS[self.form].limit}")
        if self.form not in ("dense", "standalone"):
            yield "- It was made for the weights of that base. Others of the same shape load, but do not fit."
            if (copy := self.facts.quantised_copy) is not None:
                yield f"- These were {quote(copy)}: on the original's weights it computes something else."
        if self.facts.record is not None:
            yield "- The results are of one run with one seed, on the rows named above."
            yield "- What does not stand here was not measured."
        else:
            yield "- Nothing is known here of how the adapter was trained, or of its quality but what stands above."

    def _tell_licence(self) -> Iterator[str]:
        yield from ("", "## Licence", "")
        of_base = licence_of_base(self.facts.base)
        yield f"- Of this: {quote(self.facts.licence) if self.facts.licence else 'not stated by its author'}."
        holds = " Its weights are in here." if self.form in ("dense", "standalone") else ""
        yield f"- Of the base: {quote(of_base) if of_base else 'not known here; look it up with the base'}.{holds}"


def write_card(folder: Path, card: Card) -> Path:
    """Write `README.md`, in place of one that PEFT may have left there."""
    path = folder / "README.md"
    with writing(path) as aside:
        aside.write_text(card.render(folder), encoding="utf-8")
    return path


def _join(*arguments: str | None) -> str:
    return ", ".join(filter(None, arguments))


def _tell_recipe(facts: Facts) -> Iterator[str]:
    if facts.recipe in recipe_names():
        known = read_recipe(facts.recipe)
        yield from ("", f"{known.about} {known.title}: {known.paper}.")


def _tell_plan(facts: Facts) -> Iterator[str]:
    if facts.plan is None or not facts.plan.sites:
        return
    columns = ("modules", "experts", "rank", "per token", "router", "parameters", "active")
    rows = (
        (quote(row["path"]), row["experts"], row["rank"], row["top_k"], quote(row["router"]), *counts)
        for row in facts.plan.rows()
        for counts in [(f"{row['parameters']:,}", f"{row['active_parameters']:,}")]
    )
    yield from ("", "## The mixture", "", *make_table(columns, rows), "")
    yield f"{len(facts.plan.sites)} modules are adapted. Parameters: {facts.plan.parameters:,}, of which"
    yield f"{facts.plan.active_parameters:,} are active for a token."


def _tell_training(facts: Facts) -> Iterator[str]:
    record = facts.record
    if record is None:
        return
    data = ", ".join(quote(show_name(source)) for source in facts.sources) or quote(show_name(record.data))
    yield from ("", "## Training", "", f"On {data}; {quote(record.created)}.", "")
    settings = {**(facts.settings.get("train") or {}), **record.environment}
    told = {n: value for n, value in settings.items() if isinstance(value, int | float | str) and n not in _ASIDE}
    yield from make_table(("setting", ""), ((quote(name), quote(value)) for name, value in told.items()))
    for note in record.notes:
        yield from ("", f"Note: {quote(note)}")


def _tell_results(facts: Facts, is_of_this: bool) -> Iterator[str]:
    if facts.record is None:
        return
    before, after = facts.record.before, facts.record.after
    rows = after.get("rows")
    count = f" of {int(rows):,} held-out rows" if rows else ""
    yield from ("", "## Results", "", f"Scores{count}, by the run itself.")
    if not is_of_this:
        yield "They are those of the mixture before it was merged. What is here computes something else, as told below."
    yield ""
    names = [name for name in after if name != "rows"]
    lines = ((quote(name), _number(before.get(name)), _number(after[name])) for name in names)
    yield from make_table(("", "before training", "after"), lines)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"
