"""The command `doctor`: what is installed, what the machine has, what works here and what does not."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

import mixora
from mixora.commands.terminal import AsJson, Debug, print_json, reports_errors

if TYPE_CHECKING:
    from mixora.environment import Environment, Machine

STATES = {True: "yes", False: "no", None: "?"}


@reports_errors
def doctor(
    network: Annotated[bool, typer.Option("--network", help="Try whether the hub answers, for three seconds.")] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Tell what works here and what does not, and why; to paste into a bug report. Exit code 1 if nothing can train."""
    from mixora.environment import examine

    found = examine(network)
    if as_json:
        print_json(found.to_dict())
    else:
        for line in describe(found):
            typer.echo(line)
    if found.obstacles:
        raise typer.Exit(1)


def describe(found: "Environment") -> Iterator[str]:
    """Plain lines."""
    yield f"mixora {mixora.__version__}, Python {found.machine.python}, {found.machine.system}"
    yield from _describe_machine(found.machine)
    yield "\npackages"
    for package in found.packages:
        if package.is_needed or package.version:
            yield f"  {'ok' if package.is_fit else 'NO':<4}{package.describe()}"
    yield "\nwhat works here"
    for ability in found.abilities:
        yield f"  {STATES[ability.works]:<4}{ability.name}: {ability.why}"
    yield "\nmixora cannot train here; what to do:" if found.obstacles else "\nmixora can train here"
    yield from (f"  {obstacle}" for obstacle in found.obstacles)


def _describe_machine(machine: "Machine") -> Iterator[str]:
    features = ", ".join(machine.features) or "no units for wide or bf16 products known"
    yield f"processor    {machine.processor}, {machine.cores} cores; {features}"
    yield f"memory       {_size(machine.memory)}, {_size(machine.memory_free)} free"
    yield f"disk         {_size(machine.disk_free)} free here"
    for gpu in machine.accelerators:
        capability = f", compute capability {gpu.capability}" if gpu.capability else ""
        bf16 = "bf16" if gpu.has_bf16 else "no bf16"
        yield f"accelerator  {gpu.name} ({gpu.kind}), {_size(gpu.memory)}{capability}, {bf16}"
    if not machine.accelerators:
        yield "accelerator  none"


def _size(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 2**30:.1f} GiB"
