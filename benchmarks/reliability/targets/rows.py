"""Rows of all four formats, their encoding, folders of them, and chat templates."""

import csv
import io
import json
from collections.abc import Callable
from typing import Any

import pyarrow
import pyarrow.parquet

from benchmarks.reliability.targets.drawing import Draw
from benchmarks.reliability.targets.material import CHAT, ROWS, fresh, make_tokenizer
from mixora.data import EncodingConfig, Rows, encode, read_rows, splits_of, templates

TEMPLATE_SECONDS = 0.5
ODD_LINES = (
    b'{"prompt": "a", "prompt": "b", "completion": "c"}',
    b'{"prompt": "\\ud800", "completion": "c"}',
    b'{"prompt": NaN, "completion": "c"}',
    b'{"text": ' + b"[" * 3000,
    b'{"text": ' + b"9" * 5000 + b"}",
    b'\xef\xbb\xbf{"text": "a"}',
    b'{"text": "a"}\r{"text": "b"}',
    b'{"text": "a\\u0000b"}',
    '{"text": "\u2028\u202e\x85"}'.encode(),
    b'{"text": "a", "label": 1e999}',
    b'{"text": "a", "label": ' + b"9" * 400 + b"}",
    b"\xff\xfe{\x00}\x00",
    b"\x0b\n\x0c\n",
)
ODD_TABLES = (
    b"prompt,completion\na,b\n",
    b"prompt,prompt,completion\na,b,c\n",
    b'text,label\n"a\nb",1\nc,"2"\n',
    b"text,label\na," + b"9" * 5000 + b"\n",
    b"text,label\na,\xd9\xa3\n",
    b"text\n" + b"x" * 140_000 + b"\n",
    b"text\r\ra\r",
    b"\xef\xbb\xbftext\na\n",
    b"text\na\x00b\n",
    b"text,\na,b,c\n",
    b'question,choices,answer\nq,"[""a"",""b""]",1\n',
    b'text\n"a"b\n',
    b"text\n",
)
ODD_TEMPLATES = (
    CHAT,
    "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
    "{{ 'a' * 10**11 }}",
    "{{ 9**(9**9) }}",
    "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ range(10**9) }}",
    "{{ ''.__class__.__mro__ }}",
    "{{ messages[0]['content'].__init__.__globals__ }}",
    "{{ raise_exception('no') }}",
    "{% include '/etc/passwd' %}",
    "{{ messages | tojson }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '{:>1000000000}'.format(1) }}",
    "{{ 'x'.center(1000000000) }}",
    "{{ strftime_now('%Y' * 100000) }}",
    "{{ lipsum(n=100000) }}",
    "{{ 1 // 0 }}",
    "{{ messages[10]['content'] }}",
    "{% if",
    "{{ undefined.x.y }}",
    "{{ '\\ud800' }}",
    "{% for m in messages %}{{ m['content'] }}{% endfor %}",
)


def _read(data: bytes, suffix: str, count: Callable[[bytes], int]) -> Rows:
    with fresh("rows") as folder:
        path = folder / f"rows{suffix}"
        path.write_bytes(data)
        rows = read_rows(path)
        assert len(rows) == count(data), f"{len(rows)} rows read of {count(data)}"
        for row in rows:
            assert isinstance(row, dict)
            # what is accepted can be written down again
            json.dumps(row, ensure_ascii=False, default=str).encode()
    return rows


def read_lines(data: bytes) -> None:
    """A JSONL file of any bytes: each line that is not blank is a row, or the file is refused."""
    _read(data, ".jsonl", lambda content: sum(bool(line.strip()) for line in content.split(b"\n")))


def _text(draw: Draw, rows: list[Any]) -> list[str]:
    return [json.dumps(row, ensure_ascii=draw.byte() % 2 == 0, default=str) for row in rows]


def read_objects(data: bytes) -> None:
    """JSONL of rows with damages."""
    draw = Draw(data)
    rows = [draw.damage(row) if draw.byte() % 2 else row for row in [draw.pick(ROWS)] * (1 + draw.below(3))]
    joint = draw.pick(("\n", "\r\n", "\n\n", "\n \n"))
    read_lines(joint.join(_text(draw, rows)).encode("utf-8", "surrogatepass"))


def read_list(data: bytes) -> None:
    """A JSON file of any bytes."""
    _read(data, ".json", lambda content: len(json.loads(content.decode("utf-8-sig"))))


def read_table(data: bytes) -> None:
    """A CSV file of any bytes."""

    def count(content: bytes) -> int:
        lines = list(csv.reader(io.StringIO(content.decode("utf-8-sig"), newline="")))
        return sum(bool(line) for line in lines[next(n for n, line in enumerate(lines) if line) :]) - 1

    _read(data, ".csv", count)


def read_parquet(data: bytes) -> None:
    """A Parquet file with damages."""
    draw = Draw(data)
    files = parquet_files()
    content = draw.alter(draw.pick(files)) if draw.byte() % 8 else draw.rest()
    _read(content, ".parquet", lambda whole: pyarrow.parquet.ParquetFile(io.BytesIO(whole)).metadata.num_rows)


def parquet_files() -> list[bytes]:
    found = []
    for compression in ("none", "snappy", "zstd"):
        table = pyarrow.table({"text": ["a", "b", "é"] * 5, "label": [0, 1, 2] * 5, "when": [None, 1.5, 2.5] * 5})
        file = io.BytesIO()
        pyarrow.parquet.write_table(table, file, compression=compression)
        found.append(file.getvalue())
    return found


def read_folder(data: bytes) -> None:
    """A folder with files of odd names and a meta.json."""
    draw = Draw(data)
    with fresh("splits") as folder:
        for _ in range(1 + draw.below(3)):
            name = draw.pick(("train.jsonl", "validation.jsonl", "train.csv", "test.json", "x.parquet", "meta.json"))
            path = folder / name
            if path.exists():
                continue
            if draw.byte() % 6 == 0:
                path.mkdir()
            else:
                path.write_bytes(draw.pick(ODD_LINES) if draw.byte() % 2 else json.dumps(draw.pick(ROWS)).encode())
        if draw.byte() % 2 and not (folder / "meta.json").is_dir():
            labels = {"labels": draw.value()} if draw.byte() % 2 else draw.value()
            (folder / "meta.json").write_text(json.dumps(labels, default=str))
        read_rows(folder, draw.pick(splits_of(folder)), limit=draw.pick((None, 1, 5)))


def encode_text(data: bytes) -> None:
    """Text of any characters as token ids: a row for each, not over the limit, with something to learn."""
    draw = Draw(data)
    form = draw.pick(("completion", "messages", "text", "choice"))
    texts = [draw.text() for _ in range(4)]
    row = {
        "completion": {"prompt": texts[0], "completion": texts[1]},
        "messages": {"messages": [{"role": "user", "content": texts[0]}, {"role": "assistant", "content": texts[1]}]},
        "text": {"text": texts[0]},
        "choice": {"question": texts[0], "choices": texts[1:3], "answer": draw.below(2)},
    }[form]
    config = EncodingConfig(max_length=draw.pick((2, 8, 100)), packing=draw.byte() % 4 == 0)
    with fresh("encoded") as folder:
        text = json.dumps([row, row], ensure_ascii=draw.byte() % 2 == 0)
        (folder / "rows.json").write_bytes(text.encode("utf-8", "surrogatepass"))
        rows = read_rows(folder / "rows.json", form=form)
    encoded = encode(rows, make_tokenizer(draw.pick((None, CHAT))), config, model_kind="decoder")
    assert config.packing or len(encoded.dataset) == len(rows)
    for found in encoded.dataset:
        assert 0 < len(found["input_ids"]) == len(found["labels"]) <= config.max_length
        assert any(label >= 0 for label in found["labels"])


def render_template(data: bytes) -> None:
    """A chat template of any text."""
    row = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"}]}
    allowed = templates.MOST_SECONDS
    templates.MOST_SECONDS = TEMPLATE_SECONDS
    try:
        tokenizer = make_tokenizer(data.decode("utf-8", "replace") or CHAT)
        encode(Rows((row,), "messages", None, "rows"), tokenizer, EncodingConfig(), model_kind="decoder")
    finally:
        templates.MOST_SECONDS = allowed


def seed_lines() -> list[bytes]:
    whole = [json.dumps(row).encode() for row in ROWS]
    return [*whole, b"\n".join(whole[:2]), *ODD_LINES, *(b"\n".join((whole[0], line)) for line in ODD_LINES)]


def seed_lists() -> list[bytes]:
    return [json.dumps([row, row]).encode() for row in ROWS] + [b"[" + line + b"]" for line in ODD_LINES]
