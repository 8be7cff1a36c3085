"""The reference of a run: loaded from published weights, or pre-trained here."""
from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import ml_collections

from qsharp_jax import sharding
from qsharp_jax.baselines import pretraining
from qsharp_jax.data import tokenizers
from qsharp_jax.models import pretrained, transformer
from qsharp_jax.models.transformer import TransformerConfig
from qsharp_jax.types import Params


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A language model ready to be sampled from.

    Attributes:
      config: its shape.
      params: its parameters, on the mesh.
      tokenizer: text to ids and back.
      digest: hash of its weights.
    """

    config: TransformerConfig
    params: Params
    tokenizer: tokenizers.Tokenizer
    digest: str


def load(config: ml_collections.ConfigDict, workdir: Path, mesh: Mesh) -> Loaded:
    """Returns the reference that `config.reference` names, on the mesh.

    Args:
      config: of the run.
      workdir: where a reference that is pre-trained here is kept.
      mesh: the devices.

    Raises:
      ValueError: the weights are missing or damaged.
    """
    if config.reference.source == 'pretrain':
        return Loaded(*pretraining.load_or_train(config, workdir, mesh))
    file = pretrained.open_gguf(config.reference.source)
    shape = dataclasses.replace(file.config, dtype=jnp.dtype(config.reference.dtype))
    host = pretrained.load_params(file)
    shardings = sharding.param_shardings(mesh, transformer.logical_axes(shape), host)
    return Loaded(shape, sharding.shard_params(host, shardings), tokenizers.from_gguf(file.metadata),
                  file.fingerprint)
