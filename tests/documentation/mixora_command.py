"""The real command line, up to where its work would begin: options are parsed, settings read, and nothing is made."""

from typer.main import get_command
from typer.testing import CliRunner

from benchmarks import running
from mixora.cli import app
from mixora.config import merge_trees
from mixora.training.run_config import read_run

# a reader's own run, where a command names its folder or leaves out what it does not look at
RUN = {"model": {"base": "base"}, "data": {"source": "rows.jsonl"}}
# what happens as soon as they are read
AT_ONCE = ("--help", "--version", "--install-completion", "--show-completion")


class WorkBegins(BaseException):
    """Passes by all handlers of errors."""


def begin(*arguments, **options):
    raise WorkBegins


def begin_with_run(tree, *arguments, **options):
    read_run({**RUN, **tree})
    raise WorkBegins


def begin_with_changes(folder, changes, *arguments, **options):
    read_run(merge_trees(RUN, changes))
    raise WorkBegins


def begin_benchmark(name, arguments):
    running.read_options(
        name, running.importlib.import_module(f"benchmarks.{running.BENCHMARKS[name].module}"), arguments
    )
    raise WorkBegins


# where the commands begin to look at models, rows, folders of runs, machines and networks
BEGINNINGS = {
    "mixora.training.run.fit": begin,
    "mixora.training.rehearsal.rehearse": begin,
    "mixora.training.launcher.launch": begin,
    "mixora.training.checkpoints.read_resumed": begin_with_changes,
    "mixora.training.planning.plan_without_weights": begin_with_run,
    "mixora.training.planning.craft_adapter": begin_with_run,
    "mixora.training.results.reopen": begin_with_changes,
    "mixora.exporting.folder.find_settings": begin_with_changes,
    "mixora.commands.destinations.check_login": lambda: None,
    "mixora.conversion.convert": begin,
    "mixora.comparison.matrix.make_matrix": begin,
    "mixora.diagnostics.checkpoint.find_record": begin,
    "mixora.answering.roster.find_source": begin,
    "mixora.environment.examine": begin,
    "benchmarks.running.run": begin_benchmark,
}


def check(words, monkeypatch):
    """Raises `AssertionError` with what the command line says where it refuses `words`."""
    if len(words) == 1 and words[0] in AT_ONCE:
        known = {option for parameter in get_command(app).params for option in parameter.opts}
        assert words[0] in known | {"--help"}
        return
    with monkeypatch.context() as patch:
        for place, beginning in BEGINNINGS.items():
            patch.setattr(place, beginning)
        try:
            result = CliRunner().invoke(app, words, input="what a pipe brings\n")
        except WorkBegins:
            return
    # what only tells something has come to its end
    assert result.exit_code == 0 and words[0] in ("recipes", "bench"), f"mixora {' '.join(words)}: {result.output}"
