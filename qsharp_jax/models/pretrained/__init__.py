"""Published weights: Hugging Face folders and GGUF files, in and, as folders, out."""
from __future__ import annotations

import os
from pathlib import Path

from qsharp_jax.models.pretrained.gguf import open_gguf
from qsharp_jax.models.pretrained.huggingface import CONFIG, open_folder, read_config
from qsharp_jax.models.pretrained.loader import Checkpoint, load_params
from qsharp_jax.models.pretrained.sources import find
from qsharp_jax.models.transformer import TransformerConfig

__all__ = ['Checkpoint', 'find', 'load_params', 'open_checkpoint', 'open_folder', 'open_gguf', 'open_shape']


def open_checkpoint(source: str | os.PathLike[str]) -> Checkpoint:
    """Returns what the head of a GGUF file or Hugging Face folder says; reads no weights.

    Args:
      source: a path, or a name as in `sources.find`.

    Raises:
      ValueError: it is absent, damaged, incomplete, or of another kind than the decoder knows; with the tensor or key.
    """
    path = find(source)
    if path.suffix == '.json':
        raise ValueError(f'{path} says the sizes of a model and holds no weights: it serves --dry_run --topology only. '
                         'Give the folder of a checkpoint.')
    return open_folder(path) if path.is_dir() else open_gguf(path)


def open_shape(source: str | os.PathLike[str]) -> tuple[Path, TransformerConfig]:
    """Returns where a model is described, and the shape of it; no weights need be there.

    Args:
      source: as in `open_checkpoint`, or the path of a config.json by itself, under any name that ends in '.json'.

    Raises:
      ValueError: as `open_checkpoint`.
    """
    path = find(source)
    if path.is_dir() or path.suffix == '.json':
        return path, read_config(path / CONFIG if path.is_dir() else path)[1]
    return path, open_gguf(path).config
