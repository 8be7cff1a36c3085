"""The reference of a run: loaded from published weights, or pre-trained here."""
from __future__ import annotations

import dataclasses
from pathlib import Path

import jax.numpy as jnp
from jax.sharding import Mesh
import ml_collections

from qsharp_jax import sharding
from qsharp_jax.baselines import pretraining
from qsharp_jax.data import tokenizers
from qsharp_jax.models import pretrained, transformer
from qsharp_jax.models.transformer import TransformerConfig
from qsharp_jax.types import Params


def outline(config: ml_collections.ConfigDict) -> tuple[TransformerConfig, tokenizers.Tokenizer]:
    """Returns shape and tokenizer of the reference that `config.reference` names; of a file, only the head is read.

    Raises:
      ValueError: the file or its package is missing or damaged, or the task has no corpus to train on.
    """
    if config.reference.source == 'pretrain':
        tokenizer = pretraining.tokenizer_of(config)
        return pretraining.model_shape(config, tokenizer.vocab_size), tokenizer
    file = pretrained.open_gguf(config.reference.source)
    return (dataclasses.replace(file.config, dtype=jnp.dtype(config.reference.dtype)),
            tokenizers.from_gguf(file.metadata))


def load(config: ml_collections.ConfigDict, shape: TransformerConfig, tokenizer: tokenizers.Tokenizer, workdir: Path,
         mesh: Mesh) -> tuple[Params, str]:
    """Returns the parameters of the reference, on the mesh, and a digest that names them.

    Args:
      config: of the run.
      shape: from `outline`.
      tokenizer: from `outline`.
      workdir: where a reference that is pre-trained here is kept.
      mesh: the devices.

    Raises:
      ValueError: the weights are missing or damaged.
    """
    if config.reference.source == 'pretrain':
        return pretraining.load_or_train(config, shape, tokenizer, workdir, mesh)
    file = pretrained.open_gguf(config.reference.source)
    host = pretrained.load_params(file)
    shardings = sharding.param_shardings(mesh, transformer.logical_axes(shape), host)
    return sharding.shard_params(host, shardings), file.fingerprint
