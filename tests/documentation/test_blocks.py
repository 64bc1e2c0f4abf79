"""Every fenced block of the documentation is run, or read by what a reader would give it to."""

import re
import shutil
from itertools import groupby

import pytest
import yaml

from mixora.routers import ROUTERS
from tests.characters import save_bases
from tests.documentation import commands, documents, programs, table
from tests.documentation.blocks import BLOCKS, ROOT, Block, read_blocks
from tests.documentation.mixora_command import RUN
from tests.training.conftest import command_rows, write_rows

OF_PAGES = {page: list(blocks) for page, blocks in groupby(BLOCKS, key=lambda block: block.page)}
RUNNERS = {"python", "sh", "text", "", *documents.CHECKS}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of a tiny Llama of four layers."""
    root = tmp_path_factory.mktemp("bases")
    save_bases(root, layers=4)
    return root / "llama"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where a reader works: a checkout, with rows and settings of their own, of few rows each."""
    write_rows(tmp_path / "my_data", "train", command_rows(24))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(RUN))
    (tmp_path / "compare.yaml").write_text((ROOT / "examples/compare/compare.yaml").read_text())
    shutil.copytree(ROOT / "examples", tmp_path / "examples", ignore=shutil.ignore_patterns("*.ipynb"))
    for path in tmp_path.glob("examples/**/*.jsonl"):
        path.write_text("".join(path.read_text(encoding="utf-8").splitlines(keepends=True)[:24]), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    # transformers keeps the code that comes with a model there
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    known = set(ROUTERS)
    yield tmp_path
    for name in set(ROUTERS) - known:
        del ROUTERS[name]


@pytest.mark.parametrize("page", OF_PAGES)
def test_the_blocks_of_a_page(page, folder, base, monkeypatch):
    programs.stand_in(base, monkeypatch)
    programs.lay_out(folder, OF_PAGES[page])
    kept = {}
    for block in OF_PAGES[page]:
        try:
            check(block, kept, folder, base, monkeypatch)
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{page}:{block.line}: {error}") from error


def check(block, kept, folder, base, monkeypatch):
    assert block.language in RUNNERS, f"got {block.language!r}; valid: {', '.join(sorted(RUNNERS))}"
    if block.title is not None:
        (folder / block.title).write_text(block.text)
        monkeypatch.syspath_prepend(folder)
    if (block.page, block.language) in table.RUN_ELSEWHERE:
        return
    if block.language == "python":
        programs.run(block, kept, base)
    elif block.language == "sh":
        for words in commands.split_commands(block.text):
            commands.check(words, monkeypatch)
    elif block.language in documents.CHECKS:
        documents.CHECKS[block.language](block.text, folder)
    else:
        check_printed(block, monkeypatch)


def check_printed(block, monkeypatch):
    """What code before it prints; a command that is told there has to be right too."""
    assert block.follows in ("sh", "python") or why_no_code(block), "no language, and no code before it that prints it"
    for line in block.text.splitlines():
        if line.startswith("mixora "):
            (words,) = commands.split_commands(line)
            commands.check(words, monkeypatch)


def why_no_code(block):
    found = [start for page, start in table.NO_CODE if page == block.page and block.first_line.startswith(start)]
    return bool(found)


def test_the_table_is_about_blocks_that_are_there():
    languages = {(block.page, block.language) for block in BLOCKS}
    for (page, language), test in table.RUN_ELSEWHERE.items():
        assert (page, language) in languages, (page, language)
        assert page.rpartition("/")[2] in (ROOT / test).read_text(encoding="utf-8"), test
    for page, start in table.NO_CODE:
        # one that follows code needs no reason
        kinds = [block for block in BLOCKS if block.page == page and block.first_line.startswith(start)]
        assert kinds and not any(block.language or block.follows in ("sh", "python") for block in kinds), (page, start)
    words = {word.rpartition("/")[2] for block in BLOCKS if block.language == "sh" for word in block.text.split()}
    assert set(table.PROGRAMS_OF_OTHERS) <= words


WRONG = {
    "mixora trian run.yaml": "No such command",
    "mixora train run.yaml --recpie sira": "No such option",
    "mixora train run.yaml train.stpes=3": "did you mean 'steps'",
    "mixora plan --recipe sira --model B adapter.rnk=3": "did you mean 'rank'",
    "mixora evaluate runs/first data.max_lenth=3": "did you mean 'max_length'",
    "mixora export runs/first --to pefd-lora --out runs/lora": "did you mean 'peft-lora'",
    "mixora compare compare.yaml 'methods=[lora, sria]'": "did you mean 'sira'",
    "mixora generate runs/first | mixora serve --prot 1": "No such option",
    "torchrun --nproc-per-node 2 -m mixora train run.yaml --recipe sria": "did you mean 'sira'",
    "make tset": "no such target",
    "make dist QUICKSTRAT=1": "no such target or variable",
    "python -m benchmarks.reliability.kils": "no such module",
    "python -m benchmarks.reliability.kills --qiuck": "--qiuck",
    "python release/prof.py": "no such file",
    'pip install "mixora[servce]"': "servce",
    "curl http://127.0.0.1:8000/v1/model": "v1/model",
    "MIXORA_ALLOW_PART=x mixora doctor": "MIXORA_ALLOW_PART",
    "mixroa doctor": "nothing here knows",
    "mixora chat 'runs": "nothing closes",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_command_is_refused(text, folder, monkeypatch):
    with pytest.raises(AssertionError, match=re.escape(WRONG[text])):
        check(Block("page.md", 1, "sh", None, text, None), {}, folder, None, monkeypatch)


WRONG_BLOCKS = {
    ("yaml", "train: {stpes: 3}"): "did you mean 'steps'",
    ("yaml", "methods: [lora, sria]"): "did you mean 'sira'",
    ("yaml", "trian: {steps: 3}"): "a run or a comparison has",
    ("json", '{"prompt": 3, "completion": "a"}'): "prompt",
    ("json", '{"object": "chat.completion"}'): "choices",
    ("python", "mixora.recipe('sira', rnk=3)"): "did you mean 'rank'",
    ("python", "print(modle)"): "modle",
    ("", "what nothing prints"): "no language",
    ("toml", "a = 1"): "got 'toml'; valid: ",
}


@pytest.mark.parametrize(("language", "text"), WRONG_BLOCKS)
def test_a_wrong_block_is_refused(language, text, folder, base, monkeypatch):
    with pytest.raises(Exception, match=re.escape(WRONG_BLOCKS[language, text])):
        check(Block("page.md", 1, language, None, text, None), {}, folder, base, monkeypatch)


def test_a_block_is_read_with_its_language_title_and_what_it_follows(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.documentation.blocks.ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(
        '# A\n```sh\nls\n```\nsays\n\n    ```\n    a\n      b\n    ```\n## B\n```python title="x.py"\n```\n```\n'
    )
    with pytest.raises(ValueError, match=r"page.md:14: nothing closes"):
        list(read_blocks(page))
    page.write_text(page.read_text() + "c\n```\n")
    found = [(b.line, b.language, b.title, b.text, b.follows) for b in read_blocks(page)]
    assert found[:2] == [(2, "sh", None, "ls\n", None), (7, "", None, "a\n  b\n", "sh")]
    assert found[2:] == [(12, "python", "x.py", "", None), (14, "", None, "c\n", "python")]
