import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.models import token_ids


@pytest.fixture(scope="session")
def plain_peft(tmp_path_factory):
    """Asks the one process of `plain_peft.py`; its imports take longer than all that it computes."""
    log = tmp_path_factory.mktemp("plain_peft") / "log.txt"
    script = str(Path(__file__).with_name("plain_peft.py"))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with log.open("w") as stderr, subprocess.Popen([sys.executable, script], stderr=stderr, **pipes) as process:

        def ask(**request):
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            assert process.stdout.readline() == "done\n", log.read_text()[-3000:]

        yield ask
        # what ends it
        process.stdin.close()


@pytest.fixture
def by_plain_peft(plain_peft, tmp_path):
    """The logits of an adapter on its base, both in folders."""

    def find(auto, base, adapter):
        ids, out = str(tmp_path / "ids.safetensors"), str(tmp_path / "logits.safetensors")
        save_file({"ids": token_ids(2, 9)}, ids)
        plain_peft(auto=auto, base=str(base), adapter=str(adapter), ids=ids, out=out)
        return load_file(out)["logits"]

    return find
