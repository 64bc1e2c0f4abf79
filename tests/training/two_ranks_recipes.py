"""On two ranks: every recipe as `benchmarks.reliability.data_parallel` trains it; losses, facts and weights."""

from benchmarks.reliability.data_parallel import list_cases, train


def find(folder):
    return {name: train(folder / "recipes", **case) for name, case in list_cases(quick=True).items()}
