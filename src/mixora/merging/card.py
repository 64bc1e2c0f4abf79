"""The model card of a merged adapter: what it is, how it was made, what was measured, how to load it."""

import json
from collections.abc import Iterator

from transformers import PreTrainedTokenizerBase

from mixora.merging.result import Merged

_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
}
_FORMS = {
    "adapter": "One LoRA adapter",
    "mixture": "Adapters with one expert",
    "dense": "A dense model",
}
_METHODS = {
    "exact": "computes what the mixture computes in evaluation, up to rounding",
    "averaged": "the mean of the experts' weights, which is what the mixture computes with in evaluation",
    "truncated": "the change of the weight, cut to its largest singular values; the error is relative, of that change",
    "fitted": "nearest LoRA by least squares over real tokens; the error is relative, of what the experts add there",
}


def write_companions(merged: Merged, task_type: str | None, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Write `README.md` and the tokenizer, where it is known, to the folder of the result."""
    if tokenizer is not None:
        tokenizer.save_pretrained(str(merged.out))
    (merged.out / "README.md").write_text("\n".join(_lines(merged, task_type)) + "\n", encoding="utf-8")


def _lines(merged: Merged, task_type: str | None) -> Iterator[str]:
    library = "transformers" if merged.form == "dense" else "peft"
    # a name may come with the adapter that was merged, so each stands as the language around it quotes text
    yield from (
        "---",
        f"base_model: {_literal(merged.base)}",
        f"library_name: {library}",
        "tags: [lora, mixora]",
        "---",
        "",
    )
    recipe = f"recipe {_quote(merged.recipe)}" if merged.recipe else "rules of its own"
    what = _FORMS[merged.form]
    yield f"# {what}, merged from a mixture of adapters"
    yield ""
    yield f"Made by mixora from an adapter with {recipe} on the base {_quote(merged.base)}."
    yield ""
    yield from _how(merged)
    if merged.changes:
        yield from ("", *_changes(merged))
    yield from ("", "## Load", "", "```python", *_loading(merged, task_type), "```")


def _how(merged: Merged) -> Iterator[str]:
    yield from ("## How it was merged", "")
    for method in dict.fromkeys(site.method for site in merged.sites):
        yield f"- {method}: {_METHODS[method]}."
    if merged.soup is not None:
        members = ", ".join(map(str, merged.soup.members))
        yield f"- Greedy soup: the mean of the experts {members} of {len(merged.soup.losses)}, chosen on held-out data:"
        yield f"  loss {merged.soup.loss:.6g}, with all experts {merged.soup.loss_of_all:.6g}."
    if merged.fitted_on is not None:
        yield f"- Fitted on {merged.fitted_on}."
    yield from ("", "| sites | number | method | rank | mean error | largest error |", "|---|---|---|---|---|---|")
    for row in merged.rows():
        errors = f"{row['mean_error']:.3g} | {row['largest_error']:.3g}"
        yield f"| {_quote(row['sites'])} | {row['count']} | {row['method']} | {row['rank']} | {errors} |"


def _changes(merged: Merged) -> Iterator[str]:
    changes = merged.changes
    assert changes is not None
    yield from (
        "## What changed",
        "",
        f"Measured over {changes.predictions} held-out predictions.",
    )
    yield from ("", "| | |", "|---|---|")
    yield f"| loss of the mixture | {changes.loss_of_mixture:.6g} |"
    yield f"| loss after merging | {changes.loss_of_merged:.6g} |"
    yield f"| difference of a logit, mean | {changes.mean_difference:.3g} |"
    yield f"| difference of a logit, largest | {changes.max_difference:.3g} |"
    if changes.divergence is not None:
        yield f"| KL divergence from the mixture, nats | {changes.divergence:.3g} |"


def _loading(merged: Merged, task_type: str | None) -> Iterator[str]:
    auto = _CLASSES.get(str(task_type), "AutoModelForCausalLM")
    yield f"from transformers import {auto}"
    if merged.form == "dense":
        yield from ("", f"model = {auto}.from_pretrained({_literal(str(merged.out))})")
        return
    if merged.form == "mixture":
        yield from ("import mixora", "")
        yield f"base = {auto}.from_pretrained({_literal(merged.base)})"
        yield f"model = mixora.from_pretrained(base, {_literal(str(merged.out))})"
        return
    yield from ("from peft import PeftModel", "")
    yield f"base = {auto}.from_pretrained({_literal(merged.base)})"
    yield f"model = PeftModel.from_pretrained(base, {_literal(str(merged.out))})"


def _quote(name: str) -> str:
    """As code in Markdown, on one line."""
    return "`" + " ".join(name.replace("`", "'").split()) + "`"


def _literal(text: str) -> str:
    """A string of YAML and of Python, on one line."""
    return json.dumps(text, ensure_ascii=False)
