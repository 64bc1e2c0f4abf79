"""Files: documents read within bounds, folders that are written to, nothing ever half there."""
