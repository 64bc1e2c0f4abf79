"""The command line. Heavy libraries are imported by the commands that need them, so that help is quick."""

from typing import Annotated

import typer

import mixora
from mixora.commands.answers import chat
from mixora.commands.bench import bench
from mixora.commands.comparison import compare
from mixora.commands.doctor import doctor
from mixora.commands.methods import plan, recipes
from mixora.commands.reports import report
from mixora.commands.runs import evaluate, generate, inspect
from mixora.commands.serving import serve
from mixora.commands.training import train
from mixora.commands.weights import convert, craft, export

TUTORIAL = """Fine-tune Hugging Face models with mixtures of adapters.

A first run, on a model and rows of your own:

\b
  mixora recipes                                  which methods there are
  mixora plan --recipe sira --model MODEL         what would be trained, and its memory
  mixora train --recipe sira --model MODEL --data rows.jsonl --out runs/first
  mixora generate runs/first --prompt "Hello"     ask the trained model
  mixora evaluate runs/first                      its metrics on held-out rows
  mixora inspect runs/first                       what its routers do
  mixora report runs/first                        the same and more as a page, made anew from the run's record
  mixora compare compare.yaml                     methods x seeds at equal parameters; goes on where it was stopped

Several data sets, with scores and load of the experts for each:

\b
  mixora train --model MODEL data.tasks.a.source=a.jsonl data.tasks.b.source=b.jsonl data.mixing.temperature=2

A sparse model:

\b
  mixora craft --model DENSE --out DIR            make a dense model sparse (PESC); it computes what it did
  mixora convert CHECKPOINT --out DIR             read a released Camelidae, Qwen2idae or Sparsetral model

An adapter of other code:

\b
  mixora convert ADAPTER --model MODEL --out DIR  read a MoLA or MixLoRA adapter of MoE-PEFT

A trained adapter goes where it is needed:

\b
  mixora export runs/first --to peft-lora --out DIR     one LoRA; where the input routes, the nearest: --approximate
  mixora export runs/first --to dense --out DIR         the same in the weights of the base
  mixora export runs/first --to standalone --out DIR    a model that transformers loads without mixora
  mixora export runs/first --to hub --repo OWNER/NAME   --dry-run lists what would be uploaded

Adapters at work, one or several on one base:

\b
  mixora chat runs/first                          talk to it in a terminal
  mixora serve runs/first runs/second             an HTTP endpoint in OpenAI's manner, on this machine alone

Time and memory, in a checkout of the repository:

\b
  mixora bench                                    which benchmarks there are
  mixora bench step                               a training step, against PEFT's LoRA

MODEL is a folder, a GGUF file, a hub id, or a short name such as smollm2-135m-instruct. Rows are JSON lines with
prompt and completion; messages; text; text and label; or question, choices and answer.

A run that was interrupted, and what works on this machine:

\b
  mixora train --resume runs/first                go on from its newest checkpoint
  mixora doctor                                   versions, devices, what works and what does not

Any setting can follow as key=value: train.steps=200 adapter.rank=8 data.max_length=256. The same settings can stand
in a file: mixora train run.yaml train.steps=200

train, craft, convert, export and compare take --dry-run. Nothing is replaced without --overwrite, but for the page
that `mixora report` writes anew.

Exit codes: 0 done, 1 a fault in mixora, 2 a mistake in what was asked, 130 interrupted.
"""


def _tell_version(asked: bool) -> None:
    if asked:
        typer.echo(f"mixora {mixora.__version__}")
        raise typer.Exit


def _main_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="The version.")
    ] = False,
) -> None: ...


app = typer.Typer(
    callback=_main_options, help=TUTORIAL, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False
)

for command in (
    recipes,
    plan,
    train,
    evaluate,
    generate,
    inspect,
    report,
    compare,
    craft,
    convert,
    export,
    chat,
    serve,
    doctor,
):
    app.command()(command)
# a benchmark reads its own options, --help among them
app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(bench)


def main() -> None:
    """Entry point of the `mixora` script."""
    app()


if __name__ == "__main__":
    main()
