"""`python -m tests.documentation.search SITE`: whether the search of the built site finds what readers look for.

lunr is the Python port of the library that searches in the browser.
"""

import html
import json
import re
import sys
from pathlib import Path

from lunr import lunr

# what a reader types, and a page that has to be among the first found
WANTED = {
    "capacity_factor": "methods/sira/",
    "4-bit": "guide/four_bit/",
    "ZeRO-3": "guide/sharding/",
    "vLLM": "guide/serve_elsewhere/",
    "dead experts": "guide/router/",
    "null experts": "methods/adamoe/",
    "resume": "guide/cli/",
    "packing": "guide/data/",
    "temperature": "guide/tasks/",
    "OpenAI": "guide/chat_and_serve/",
    "axolotl": "guide/axolotl_and_swift/",
    "MoE-PEFT": "guide/convert/",
    "mixora.merge": "api/export/",
    "from_pretrained": "api/adapters/",
    "allow_parts": "api/parts/",
    "CheckpointError": "api/errors/",
}
FIRST = 10


def main(site):
    """Ends with the terms that find none of their pages among the first, or with the number of those that do."""
    found = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))
    separator = re.compile(found["config"]["separator"])
    sections = [{"location": section["location"], **_words_of(section, separator)} for section in found["docs"]]
    boosts = [{"field_name": name, "boost": found["config"]["fields"][name]["boost"]} for name in ("title", "text")]
    index = lunr(ref="location", fields=boosts, documents=sections)
    missed = {}
    for term, page in WANTED.items():
        asked = " ".join(f"+{word}" for word in separator.split(term))
        first = [hit["ref"] for hit in index.search(asked)[:FIRST]]
        if not any(place.startswith(page) for place in first):
            missed[term] = first
    if missed:
        raise SystemExit("\n".join(f"{term}: not on {WANTED[term]} but {first}" for term, first in missed.items()))
    print(f"{len(WANTED)} terms found among {len(sections)} sections")


def _words_of(section, separator):
    plain = {name: html.unescape(re.sub("<[^>]+>", " ", section[name])) for name in ("title", "text")}
    return {name: " ".join(filter(None, separator.split(text))) for name, text in plain.items()}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
