"""Folders and files that results are written to."""

from pathlib import Path

from mixora.errors import ConfigError


def claim_folder(out: str | Path) -> Path:
    """Make the folder `out`; `ConfigError` if it holds something already, or cannot be made."""
    folder = Path(out)
    if folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"out: {folder} is not empty; valid: a folder that is new or empty")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"out: {folder} cannot be written: {error}") from None
    return folder


def write_text(path: Path, text: str, overwrite: bool = False) -> Path:
    """Write the file `out`; `ConfigError` if it is there already and may not be replaced, or cannot be written."""
    if path.exists() and not (overwrite and path.is_file()):
        valid = "another file" if path.is_dir() else "another file, or --overwrite to replace it"
        raise ConfigError(f"out: {path} is there already; valid: {valid}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"out: {path} cannot be written: {error}") from None
    return path
