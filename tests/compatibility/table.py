"""A pytest plugin that writes docs/guide/works_with.md: a line for each mark `works_with`, and its tests' outcome.

`make works-with` runs the marked tests with it. With `--collect-only` nothing is run, and the outcomes stay open.
"""

import platform
from collections import defaultdict
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "guide" / "works_with.md"
# which library a group is about, where its first word is not the library's name
LIBRARIES = {
    "bases": "transformers",
    "mixora.Trainer": "transformers",
    "mixora.SFTTrainer": "trl",
    "activation checkpointing": "torch",
    "distribution": "torch",
}
HEAD = """# Works with

What mixora was tested with, by tests that run the real library on small models. `make works-with` runs them and writes
this page; another test sees to it that the page has a line for each of them, and no other.

Last run: {date}, Python {python}, {libraries}, on a CPU.
"""
TAIL = """
## Not tested

- A GPU: nothing on this page ran on one. FlashAttention, with packed batches or without, needs one too.
- FSDP2 and DeepSpeed with an accelerator, with a quantised base, with offloading; FSDP of version 1.
- TRL's other trainers (GRPO, KTO, rewards), vision-language models, and `padding_free` of DPO, which TRL 1.16 ignores.
- TRL's packing strategy `wrapped`, which leaves no trace of where a sequence begins: the routers take a row for one.
- Hyper-parameter search with other backends than optuna, and trackers other than TensorBoard and trackio.
- Bases of real size: those here are small and random, but for MiniLM. The quick start trains a real language model.
- Bases that are a mixture themselves: their fused experts are refused, and linear experts were not tried.

## Good to know

- Batches without padding (`padding_free`, `packing`) need no FlashAttention: `sdpa` and `eager` keep sequences apart by
  their position ids, and so do the routers.
- TRL switches dropout off for DPO, but reaches `torch.nn.Dropout` only. Set `dropout` and `expert_dropout` of the
  recipe to 0 there.
- DPO on a model that has a trained adapter compares with a copy of that adapter, named `ref`; with `peft_config` it
  compares with the base. TRL copies by parameter names that mixora does not use, so mixora makes the copy.
"""


@dataclass
class Line:
    """One line of the table: where it is tested, and the outcome of each test."""

    files: set[str] = field(default_factory=set)
    outcomes: list[str] = field(default_factory=list)

    def outcome(self):
        if "failed" in self.outcomes:
            return "**fails**"
        if "passed" not in self.outcomes:
            return "skipped" if self.outcomes else "not run"
        return "passes" if "skipped" not in self.outcomes else "passes, in part skipped"


class Table:
    """Collects the marks of all tests, and what became of them."""

    def __init__(self, page):
        self.page = page
        self.lines = defaultdict(Line)
        self.lines_of = {}

    def pytest_collection_finish(self, session):
        for item in session.items:
            marks = dict.fromkeys(mark.args for mark in item.iter_markers("works_with"))
            self.lines_of[item.nodeid] = [self.lines[mark] for mark in marks]
            for line in self.lines_of[item.nodeid]:
                line.files.add(item.path.relative_to(session.config.rootpath).as_posix())

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            for line in self.lines_of[report.nodeid]:
                line.outcomes.append(report.outcome)

    def pytest_sessionfinish(self, session, exitstatus):
        self.page.write_text(self.write(), encoding="utf-8")

    def write(self):
        groups = defaultdict(list)
        for (group, what), line in sorted(
            self.lines.items(), key=lambda pair: (pair[0][0].lower(), pair[0][1].lower())
        ):
            files = ", ".join(f"`{file}`" for file in sorted(line.files))
            groups[group].append(f"| {what} | {files} | {line.outcome()} |")
        names = sorted({library_of(group) for group in groups} | {"peft"})
        libraries = ", ".join(f"{name} {version(name)}" for name in names)
        parts = [HEAD.format(date=date.today(), python=platform.python_version(), libraries=libraries)]
        for group, rows in groups.items():
            library = library_of(group)
            parts.append(
                f"\n## {group}\n\n{library} {version(library)}\n\n| what | tested by | outcome |\n|---|---|---|\n"
            )
            parts.append("\n".join(rows) + "\n")
        return "".join(parts) + TAIL


def library_of(group):
    """The distribution whose version a group is about."""
    name = LIBRARIES.get(group) or group.split(".")[0].split()[0].lower()
    try:
        version(name)
    except PackageNotFoundError:
        raise LookupError(f"works_with: no library is installed for group {group!r}; name one in LIBRARIES") from None
    return name


def lines_of_page(text):
    """Group, what and files of each line of a page."""
    found, group = [], None
    for row in text.splitlines():
        if row.startswith("## "):
            group = row.removeprefix("## ")
        elif row.startswith("| ") and row != "| what | tested by | outcome |":
            what, files, _ = row.strip("| ").rsplit(" | ", 2)
            found.append((group, what, files))
    return found


def pytest_addoption(parser):
    parser.addoption("--works-with", type=Path, default=PAGE, help="the page to write")


def pytest_configure(config):
    config.pluginmanager.register(Table(config.getoption("--works-with")), "works-with")
