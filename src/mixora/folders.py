"""Folders that results are written to."""

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
