"""What a checkpoint consists of, written into it, by which damage shows later: a size and a checksum for each file."""

import hashlib
import json
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"


def write_manifest(folder: Path) -> None:
    """Note all files of a folder, at any depth."""
    files = {
        path.relative_to(folder).as_posix(): _describe(path) for path in sorted(folder.rglob("*")) if path.is_file()
    }
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=1) + "\n", encoding="utf-8")


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as stream:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def find_damage(folder: Path) -> str | None:
    """What is missing or differs from what was written, in words; None for a whole folder."""
    try:
        files = json.loads((folder / MANIFEST).read_bytes())["files"]
        problems = [_compare(folder / name, **written) for name, written in files.items()]
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its {MANIFEST} is damaged ({type(error).__name__})"
    return "; ".join(filter(None, problems)) or None


def _compare(path: Path, bytes: int, sha256: str) -> str | None:
    if not path.is_file():
        return f"{path.name} is missing"
    size = path.stat().st_size
    if size != bytes:
        return f"{path.name} has {size:,} bytes of {bytes:,}"
    return None if _describe(path)["sha256"] == sha256 else f"{path.name} is damaged: its checksum differs"
