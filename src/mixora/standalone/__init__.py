"""A mixture as a checkpoint that transformers loads without mixora."""

from mixora.standalone.writing import Standalone, check_standalone, write_standalone

__all__ = ["Standalone", "check_standalone", "write_standalone"]
