"""What a release is built and proved with (docs/releasing.md); part of the repository, not of the package."""
