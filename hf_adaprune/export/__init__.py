"""Pruned models in the file formats of other runtimes."""

from .gguf import export_gguf

__all__ = ["export_gguf"]
