"""Virtual environments of other libraries, one each, from the pinned versions in `NAME.txt` beside this file."""

import os
import subprocess
import sys
import venv
from pathlib import Path

FOLDER = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mixora" / "peers"


def make_environment(name: str, folder: Path) -> Path:
    """The Python of `folder`/`name`, made where it is missing or of other versions.

    Raises `CalledProcessError` where pip cannot install.
    """
    requirements = Path(__file__).with_name(f"{name}.txt")
    python = folder / name / "bin" / "python"
    made_from = folder / name / "made-from.txt"
    if made_from.is_file() and made_from.read_text() == requirements.read_text():
        return python
    print(f"making the environment {folder / name}", file=sys.stderr, flush=True)
    venv.create(folder / name, clear=True, with_pip=True)
    # torch with what its build needs; the rest as listed, since the peers' own bounds contradict each other
    for words in (["--constraint", str(requirements), "torch"], ["--no-deps", "--requirement", str(requirements)]):
        subprocess.run([python, "-m", "pip", "install", "--quiet", *words], check=True, stdout=sys.stderr)
    made_from.write_text(requirements.read_text())
    return python
