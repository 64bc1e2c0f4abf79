"""`mixora train` where numbers go wrong: the state before is kept, going on leaves the step out, the report tells."""

import pytest
import torch
from typer.testing import CliRunner

from mixora.cli import app
from mixora.diagnostics.record import read_record
from mixora.errors import NonFiniteError
from mixora.training import run as running
from mixora.training.checkpoints import find_checkpoint, read_resumed, read_state, resumable
from mixora.training.run import fit
from mixora.training.run_config import read_run
from tests.training.poison import PoisonedStep
from tests.training.test_resuming import weights_of
from tests.training.test_run import quiet, settings


@pytest.fixture
def poison(monkeypatch):
    """Poisons all rows of the given steps of the next runs."""

    def at(*steps):
        make = running.make_trainer

        def make_trainer(*given):
            trainer = make(*given)
            trainer.add_callback(PoisonedStep(set(steps)))
            return trainer

        monkeypatch.setattr(running, "make_trainer", make_trainer)

    return at


def tree_of(bases, data, out, **changes):
    """Six steps of four rows, four of them an epoch."""
    tree = settings(bases / "llama", data / "commands", out, train__steps=6, data__train_rows=16)
    tree["evaluate"] = {"limit": 2, "metrics": ["loss"], "generations": 0}
    tree["adapter"] |= {"dropout": 0.1}
    tree["train"] |= changes
    return tree


def test_going_on_without_steps_ends_as_leaving_them_out_at_once(poison, bases, data, tmp_path):
    """The first of the training, one that is first of nothing, the first of an epoch."""
    steps = (1, 3, 5)
    poison(*steps)
    whole = fit(read_run(tree_of(bases, data, tmp_path / "whole", skip_bad_steps=3)), quiet())
    out = tmp_path / "parts"
    for skipped, step in enumerate(steps):
        with pytest.raises(NonFiniteError, match=f"^step {step}: the output of the frozen module") as caught:
            go_on(tree_of(bases, data, out), out, skipped)
        assert f"The state after step {step - 1} is saved" in str(caught.value)
        assert str(caught.value).endswith(f"mixora train --resume {out} --skip-bad-steps {skipped + 1}")
        assert read_state(find_checkpoint(out)[0]).global_step == step - 1
    resumed = go_on(tree_of(bases, data, out), out, 3)
    expected, found = weights_of(tmp_path / "whole"), weights_of(out)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert (resumed.history, resumed.after, resumed.bad_steps) == (whole.history, whole.after, whole.bad_steps)
    assert resumed.notes == ["3 of 6 steps left out: their numbers were not finite."]
    bad = read_record(out).bad_steps
    assert [each.step for each in bad] == list(steps) and {len(each.rows) for each in bad} == {4}
    assert bad[0].place.startswith("the output of the frozen module")
    page = (out / "report.html").read_text()
    assert "Steps left out" in page and bad[0].place in page
    assert [line["step"] for line in resumed.history if line["loss"] is None] == list(steps)


def go_on(tree, out, skipped):
    if not skipped:
        return fit(read_run(tree), quiet())
    return fit(read_resumed(out, {"train": {"skip_bad_steps": skipped}}), quiet(), resume=True)


def test_a_checkpoint_of_the_step_before_stays_as_it_was(poison, bases, data, tmp_path):
    poison(4)
    out = tmp_path / "out"
    with pytest.raises(NonFiniteError, match="after step 3 is saved"):
        fit(read_run(tree_of(bases, data, out, save_every=3)), quiet())
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["checkpoint-3"]


def test_the_option_is_the_setting(bases, data, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(running, "fit", lambda config, *rest: seen.append(config) or exit(0))
    words = ["train", "--model", str(bases / "llama"), "--data", str(data / "commands"), "--skip-bad-steps", "3"]
    CliRunner().invoke(app, [*words, "--out", str(tmp_path / "out")])
    assert [config.train.skip_bad_steps for config in seen] == [3]
    refused = CliRunner().invoke(app, ["train", "--skip-bad-steps", "-1"])
    assert refused.exit_code == 2


def test_a_step_that_goes_wrong_before_any_checkpoint_tells_so(tmp_path):
    with (
        pytest.raises(NonFiniteError, match=r"step 1: bad\nThere is no checkpoint to go on from\.$"),
        resumable(tmp_path),
    ):
        raise NonFiniteError("step 1: bad")
