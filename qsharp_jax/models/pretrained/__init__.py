"""Published weights: Hugging Face folders and GGUF files, in and, as folders, out."""
from __future__ import annotations

import os

from qsharp_jax.models.pretrained.gguf import open_gguf
from qsharp_jax.models.pretrained.huggingface import open_folder
from qsharp_jax.models.pretrained.loader import Checkpoint, load_params
from qsharp_jax.models.pretrained.sources import find

__all__ = ['Checkpoint', 'find', 'load_params', 'open_checkpoint', 'open_folder', 'open_gguf']


def open_checkpoint(source: str | os.PathLike[str]) -> Checkpoint:
    """Returns what the head of a GGUF file or Hugging Face folder says; reads no weights.

    Args:
      source: a path, or a name as in `sources.find`.

    Raises:
      ValueError: it is absent, damaged, incomplete, or of another kind than the decoder knows; with the tensor or key.
    """
    path = find(source)
    return open_folder(path) if path.is_dir() else open_gguf(path)
