"""An adapter goes where it is needed: a folder in another form with a card, or a repository on the hub."""

from mixora.exporting.folder import Exported, Options, export_folder, foresee_export
from mixora.exporting.hub import Upload, check_login, check_repository, list_upload, upload

__all__ = [
    "Exported",
    "Options",
    "Upload",
    "check_login",
    "check_repository",
    "export_folder",
    "foresee_export",
    "list_upload",
    "upload",
]
