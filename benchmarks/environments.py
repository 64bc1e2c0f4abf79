"""Virtual environments of other programs, one each, from the pinned versions of a requirements file."""

import os
import subprocess
import sys
import venv
from pathlib import Path

FOLDER = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mixora" / "environments"


def make_environment(requirements: Path, folder: Path) -> Path:
    """The Python of an environment in `folder`, named as the file is; made where it is missing or of other versions.

    Raises `CalledProcessError` where pip cannot install.
    """
    home = folder / requirements.stem
    python, made_from = home / "bin" / "python", home / "made-from.txt"
    if made_from.is_file() and made_from.read_text() == requirements.read_text():
        return python
    print(f"making the environment {home}", file=sys.stderr, flush=True)
    venv.create(home, clear=True, with_pip=True)
    # torch with what its build needs; the rest as listed, since these programs' own bounds contradict each other
    for words in (["--constraint", str(requirements), "torch"], ["--no-deps", "--requirement", str(requirements)]):
        subprocess.run([python, "-m", "pip", "install", "--quiet", *words], check=True, stdout=sys.stderr)
    made_from.write_text(requirements.read_text())
    return python
