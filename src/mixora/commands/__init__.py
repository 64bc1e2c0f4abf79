"""The commands, a file for each kind; `cli` puts them together."""
