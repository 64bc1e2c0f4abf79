"""A folder to a repository of the hub: what would go there, and the upload itself."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token

# that of the library that huggingface_hub asks the hub with, which is another one in its second version
from huggingface_hub.errors import HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id

from mixora.errors import ConfigError, UnwrittenError
from mixora.files.folders import MARK


@dataclass(frozen=True)
class Upload:
    """What goes to `repository`: names and bytes of files, and the text of the card that is one of them."""

    repository: str
    is_private: bool
    files: tuple[tuple[str, int], ...]
    card: str

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {**asdict(self), "files": [{"name": name, "bytes": size} for name, size in self.files]}


def check_repository(name: str) -> None:
    """`ConfigError` for what cannot be the name of a repository."""
    try:
        validate_repo_id(name)
        is_named = name.count("/") == 1
    except HFValidationError:
        is_named = False
    if not is_named:
        raise ConfigError(f"repo: got {name!r}; valid: OWNER/NAME of letters, digits, '-', '_' and '.'")


def check_login() -> None:
    """`ConfigError` where there is no token to write with."""
    if not get_token():
        raise ConfigError(
            "hub: there is no token here; valid: `hf auth login`, or HF_TOKEN with a token that may write"
        )


def list_upload(folder: Path, repository: str, is_private: bool) -> Upload:
    """What `upload` would send: every file of the folder but the mark by which mixora knows its own."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MARK)
    files = tuple((path.relative_to(folder).as_posix(), path.stat().st_size) for path in paths)
    return Upload(repository, is_private, files, (folder / "README.md").read_text(encoding="utf-8"))


def upload(folder: Path, found: Upload, overwrite: bool) -> str:
    """Send the listed files as one commit; returns the address.

    A repository that is there is an error unless `overwrite`, which adds a commit to it. Raises `UnwrittenError` with
    the hub's answer.
    """
    api = HfApi()
    try:
        address = api.create_repo(found.repository, private=found.is_private, exist_ok=overwrite)
        api.upload_folder(
            repo_id=found.repository,
            folder_path=folder,
            allow_patterns=[name for name, _ in found.files],
            commit_message="Upload by mixora",
        )
    except (HTTPError, OSError, ValueError) as error:
        raise UnwrittenError(f"{found.repository}: {_explain(error)}") from None
    return str(address)


def _explain(error: Exception) -> str:
    status: Any = getattr(getattr(error, "response", None), "status_code", None)
    known = {
        401: "the hub does not know the token; valid: `hf auth login`",
        403: "the token may not write there; valid: a token with the right to write, and an owner that is you",
        409: "is there already; valid: another name, or --overwrite to add a commit to it",
    }
    answer = " ".join(str(error).split())[:300]
    return known.get(status, f"the hub took nothing, or not all; it answered: {answer}")
