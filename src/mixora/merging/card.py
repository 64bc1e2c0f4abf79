"""What the card of a merged adapter tells beside what every card does: how it was merged, and what that changed."""

from collections.abc import Iterator

from transformers import PreTrainedTokenizerBase

from mixora.cards import Card, Facts, make_table, quote, write_card
from mixora.merging.result import Merged

_METHODS = {
    "exact": "computes what the mixture computes in evaluation, up to rounding",
    "averaged": "the mean of the experts' weights, which is what the mixture computes with in evaluation",
    "truncated": "the change of the weight, cut to its largest singular values; the error is relative, of that change",
    "fitted": "nearest LoRA by least squares over real tokens; the error is relative, of what the experts add there",
}


def write_companions(merged: Merged, facts: Facts, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """Write `README.md` and the tokenizer, where it is known, to the folder of the result."""
    if tokenizer is not None:
        tokenizer.save_pretrained(str(merged.out))
    details = tuple(_how(merged)) + (("", *_changes(merged)) if merged.changes else ())
    # what was cut, fitted, or averaged over some experts only computes something else than what the run measured
    is_whole = merged.soup is None or len(merged.soup.members) == len(merged.soup.losses)
    is_same = is_whole and all(site.method in ("exact", "averaged") for site in merged.sites)
    write_card(merged.out, Card(merged.form, facts, merged.base, details, is_same))


def _how(merged: Merged) -> Iterator[str]:
    yield from ("## How it was merged", "")
    for method in dict.fromkeys(site.method for site in merged.sites):
        yield f"- {method}: {_METHODS[method]}."
    if merged.soup is not None:
        members = ", ".join(map(str, merged.soup.members))
        yield f"- Greedy soup: the mean of the experts {members} of {len(merged.soup.losses)}, chosen on held-out data:"
        yield f"  loss {merged.soup.loss:.6g}, with all experts {merged.soup.loss_of_all:.6g}."
    if merged.fitted_on is not None:
        yield f"- Fitted on {quote(merged.fitted_on)}."
    columns = ("sites", "number", "method", "rank", "mean error", "largest error")
    rows = (
        (quote(row["sites"]), *(row[name] for name in ("count", "method", "rank")), *errors)
        for row in merged.rows()
        for errors in [(f"{row['mean_error']:.3g}", f"{row['largest_error']:.3g}")]
    )
    yield from ("", *make_table(columns, rows))


def _changes(merged: Merged) -> Iterator[str]:
    changes = merged.changes
    assert changes is not None
    rows = [
        ("loss of the mixture", f"{changes.loss_of_mixture:.6g}"),
        ("loss after merging", f"{changes.loss_of_merged:.6g}"),
        ("difference of a logit, mean", f"{changes.mean_difference:.3g}"),
        ("difference of a logit, largest", f"{changes.max_difference:.3g}"),
    ]
    if changes.divergence is not None:
        rows.append(("KL divergence from the mixture, nats", f"{changes.divergence:.3g}"))
    yield from ("## What changed", "", f"Measured over {changes.predictions} held-out predictions.", "")
    yield from make_table(("", ""), rows)
