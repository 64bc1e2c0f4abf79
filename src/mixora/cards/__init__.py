"""Model cards: what it is, how it was made, what was measured, how to load it, under which licence."""

from mixora.cards.card import Card, CardForm, write_card
from mixora.cards.facts import Facts, facts_of, is_hub_id, show_name
from mixora.cards.text import literal, make_table, quote

__all__ = [
    "Card",
    "CardForm",
    "Facts",
    "facts_of",
    "is_hub_id",
    "literal",
    "make_table",
    "quote",
    "show_name",
    "write_card",
]
