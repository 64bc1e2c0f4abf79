"""Write the quickstart data: spoken household commands and the call that carries each of them out.

Every word and sentence frame below was made up for mixora, so the rows carry no third-party text. Each filling of a
domain's slots takes one sentence frame, chosen by a hash; another hash orders the rows, and the splits are cut from
the front. So the files are the same on every machine, and no prompt and no answer is in two splits.

Usage: python make_data.py [FOLDER]
"""

import hashlib
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path

ROWS = {"test": 40, "validation": 15, "train": 120}  # of each domain
LONGEST = 64  # characters of a prompt

SMALL = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
NUMBERS = {word: number for number, word in enumerate(SMALL, 1)}
NUMBERS |= {"fifteen": 15, "twenty": 20, "thirty": 30, "forty": 40, "fifty": 50}

ROOMS = "living room;dining room;nursery;hallway;loft;pantry;conservatory;workshop;landing;playroom;guest room;sunroom"
TONES = "amber;blue;green;pink;violet;white"
SPEAKERS = "sunroom;greenhouse;loft;playroom;living room;workshop;camper van;gym"
GENRES = "bluegrass;bossa nova;opera;reggae;techno;swing;flamenco;ambient;gospel;blues;disco;ska"
DECADES = {"sixties": "1960s", "seventies": "1970s", "eighties": "1980s", "nineties": "1990s"}
LABELS = "lentils;sourdough;roast;stock pot;muffins;sprinkler;face mask;stew;hair dye;marinade;dumplings;paint"
GOODS = {
    "tin": "chickpeas;sardines;coconut milk;paint thinner",
    "bottle": "olive oil;cider;shampoo;soy sauce",
    "jar": "mustard;pesto;olives;peanut butter",
    "packet": "noodles;yeast;crisps;sunflower seeds",
    "carton": "oat milk;orange juice;custard",
    "bag": "spinach;cat litter;charcoal;potatoes",
    "box": "matches;cereal;tissues;light bulbs",
}
PEOPLE = (
    "grandma;grandpa;the plumber;the landlord;aunt lucy;uncle joe;the babysitter;coach rivera;doctor lin;the vet;priya;"
    "tom"
)
NEWS = (
    "the parcel is here;we are running late;the gate is open;the car is fixed;i found the tickets;the match is off;"
    "the soup is ready;the tap still drips;the cat is safe;the power is out;school ends at noon;the keys are inside;"
    "lunch is on me;the bins are full;i missed the bus"
)
EVENTS = (
    "dentist;haircut;piano lesson;boiler check;eye test;yoga class;book club;car wash;swim meet;choir practice;"
    "garden tour;chess night"
)
DAYS = "monday;tuesday;wednesday;thursday;friday;saturday;sunday"
TIMES = "8 am;9 am;10 am;11 am;1 pm;2 pm;3 pm;4 pm;5 pm;6 pm;7 pm"

FRAMES = {
    "lights": (
        "make the {room} lights {tone} at {level} percent",
        "dim the {room} to {level} percent {tone}",
        "set the {room} lamp to {tone}, {level} percent",
        "i would like {a_tone} light in the {room} at {level} percent",
        "turn the {room} {tone} and keep it at {level} percent",
        "{level} percent {tone} light for the {room}, please",
        "give the {room} {a_tone} glow, {level} percent bright",
        "can the {room} be {tone} at {level} percent",
        "{room} lights at {level} percent in {tone}",
    ),
    "heating": (
        "keep the {room} at {degrees} degrees until {until}",
        "heat the {room} to {degrees} degrees until {until}",
        "warm up the {room}, {degrees} degrees, and stop at {until}",
        "until {until} i want {degrees} degrees in the {room}",
        "the {room} should stay at {degrees} degrees till {until}",
        "hold {degrees} degrees in the {room} till {until}",
        "set the {room} radiator to {degrees} until {until}",
        "it is cold in the {room}, make it {degrees} until {until}",
        "run the {room} heater at {degrees} degrees up to {until}",
    ),
    "timer": (
        "set {a_count}-{one_unit} timer for the {label}",
        "count down {count} {units} for the {label}",
        "ping me about the {label} in {count} {units}",
        "i need {count} {units} on the clock for the {label}",
        "start {count} {units} for the {label}",
        "let me know about the {label} after {count} {units}",
        "give the {label} {count} {units}",
        "the {label} should get {count} {units}, start now",
        "remind me to check the {label} in {count} {units}",
    ),
    "shopping": (
        "add {some_packs} of {item} to the list",
        "we have run out of {item}, order {some_packs}",
        "put {some_packs} of {item} in the basket",
        "pick up {some_packs} of {item}",
        "i need {some_packs} of {item} for the weekend",
        "can you get {some_packs} of {item}",
        "remember to buy {item}, {some_packs}",
        "the pantry could use {some_packs} of {item}",
        "{some_packs} of {item} for the next delivery, please",
    ),
    "music": (
        "play {decade} {genre} on the {speaker} speaker",
        "put on some {genre} from the {decade} in the {speaker}",
        "i am in the mood for {decade} {genre} in the {speaker}",
        "let us hear {genre} from the {decade} in the {speaker}",
        "fill the {speaker} with {decade} {genre}",
        "start a mix of {decade} {genre} in the {speaker}",
        "could the {speaker} have {genre} from the {decade}",
        "{decade} {genre} for the {speaker}, please",
        "shuffle {genre} hits of the {decade} in the {speaker}",
    ),
    "message": (
        "send {to} {a_via} saying {text}",
        "write {a_via} to {to}: {text}",
        "let {to} know by {via} that {text}",
        "tell {to} in {a_via} that {text}",
        "{a_via} for {to}, please: {text}",
        "inform {to} by {via} that {text}",
        "drop {to} {a_via}: {text}",
        "{to} should get {a_via} saying {text}",
        "use {a_via} to tell {to} that {text}",
    ),
    "calendar": (
        "book the {event} for {day} at {time}",
        "put the {event} down for {time} on {day}",
        "i have the {event} on {day} at {time}",
        "move the {event} to {day}, {time}",
        "the {event} is on {day} at {time}, note it down",
        "save {day} at {time} for the {event}",
        "remind me of the {event} on {day} at {time}",
        "block {time} on {day}, it is the {event}",
        "{day}, {time}: add the {event}",
    ),
}


def spread(**slots: str | list[str]) -> Iterator[dict[str, str]]:
    """Every combination of the slots' values."""
    choices = [values.split(";") if isinstance(values, str) else values for values in slots.values()]
    for values in itertools.product(*choices):
        yield dict(zip(slots, values, strict=True))


def add_article(phrase: str) -> str:
    """`an eight`, but `a one`: the sound decides."""
    return f"{'an' if phrase[0] in 'aeiou' and phrase != 'one' else 'a'} {phrase}"


def make_plural(word: str) -> str:
    return word + ("es" if word.endswith("x") else "s")


def fill_lights() -> Iterator[tuple[dict[str, str], dict[str, str]]]:
    for slots in spread(room=ROOMS, tone=TONES, level=[str(n) for n in range(5, 100, 5)]):
        yield slots, {**slots, "a_tone": add_article(slots["tone"])}


def fill_heating() -> Iterator[tuple[dict[str, str], dict[str, str]]]:
    for slots in spread(room=ROOMS, degrees=[str(n) for n in range(15, 25)], until=TIMES):
        yield slots, slots


def fill_timer() -> Iterator[tuple[dict[str, str], dict[str, str]]]:
    for slots in spread(label=LABELS, count=list(NUMBERS), unit="minute;hour"):
        if slots["unit"] == "hour" and slots["count"] not in SMALL:
            continue
        units = slots["unit"] if slots["count"] == "one" else make_plural(slots["unit"])
        words = {**slots, "one_unit": slots["unit"], "units": units, "a_count": add_article(slots["count"])}
        yield {"label": slots["label"], "time": f"{NUMBERS[slots['count']]} {units}"}, words


def fill_shopping() -> Iterator[tuple[dict[str, str], dict[str, str]]]:
    for pack, items in GOODS.items():
        for slots in spread(item=items, count=list(SMALL)):
            some = add_article(pack) if slots["count"] == "one" else f"{slots['count']} {make_plural(pack)}"
            call = {"item": slots["item"], "count": str(NUMBERS[slots["count"]]), "pack": pack}
            yield call, {"item": slots["item"], "some_packs": some}


def fill_music() -> Iterator[tuple[dict[str, str], dict[str, str]]]:
    for slots in spread(genre=GENRES, decade=list(DECADES), speaker=SPEAKERS):
        yield {**slots, "decade": DECADES[slots["decade"]]}, slots


def fill_message() -> Iterator[tuple[dict[str, str], dict[str, str]]]:
    for slots in spread(to=PEOPLE, via="text;email;voice note", text=NEWS):
        yield slots, {**slots, "a_via": add_article(slots["via"])}


def fill_calendar() -> Iterator[tuple[dict[str, str], dict[str, str]]]:
    for slots in spread(event=EVENTS, day=DAYS, time=TIMES):
        yield slots, slots


FILLINGS = {
    "lights": fill_lights,
    "heating": fill_heating,
    "timer": fill_timer,
    "shopping": fill_shopping,
    "music": fill_music,
    "message": fill_message,
    "calendar": fill_calendar,
}


def hash_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def pick_frame(domain: str, completion: str) -> str:
    return min(FRAMES[domain], key=lambda frame: hash_of(f"frame|{frame}|{completion}"))


def make_rows(domain: str) -> list[dict[str, str]]:
    """One row per filling whose sentence is short enough, in the order of a hash."""
    rows = []
    for call, words in FILLINGS[domain]():
        completion = f"{domain}({'; '.join(f'{key}={value}' for key, value in call.items())})"
        prompt = pick_frame(domain, completion).format(**words)
        if len(prompt) <= LONGEST:
            rows.append({"prompt": prompt, "completion": completion, "domain": domain})
    return sorted(rows, key=lambda row: hash_of("pick|" + row["completion"]))


def make_splits() -> dict[str, list[dict[str, str]]]:
    splits: dict[str, list[dict[str, str]]] = {name: [] for name in ROWS}
    for domain in FILLINGS:
        rows = iter(make_rows(domain))
        for name, count in ROWS.items():
            splits[name] += itertools.islice(rows, count)
    return {name: sorted(rows, key=lambda row: hash_of("order|" + row["prompt"])) for name, rows in splits.items()}


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    splits = make_splits()
    for name, rows in splits.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8", newline="\n")
    meta = {
        "name": "mixora quickstart: household commands",
        "licence": "Apache-2.0",
        "origin": "made up for mixora by make_data.py; no third-party text",
        "form": "domain(key=value; key=value)",
        "domains": list(FILLINGS),
        "rows": {name: len(rows) for name, rows in splits.items()},
        "longest_prompt": max(len(row["prompt"]) for rows in splits.values() for row in rows),
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("data"))
