"""Plug-ins for training tools that have an interface for adapters of others; imported only by those tools."""
