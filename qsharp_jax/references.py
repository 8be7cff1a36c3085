"""Where the networks of a run come from: published weights, or a reference that is pre-trained here."""
from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
import warnings

import jax.numpy as jnp
from jax.sharding import Mesh
import ml_collections

from qsharp_jax.baselines import pretraining
from qsharp_jax.data import tokenizers
from qsharp_jax.models import networks, pretrained, transformer
from qsharp_jax.models import value as value_lib
from qsharp_jax.models.pretrained import Checkpoint
from qsharp_jax.models.transformer import TransformerConfig
from qsharp_jax.models.value import ValueConfig
from qsharp_jax.types import Params, Reference

# Whether `reference.scan_layers` 'auto' scans. For TPUs a scanned 8B model compiles in a fraction of the time
# (docs/scaling.md); a CPU copies the stack's weights and cache in every step. Others were not measured.
SCANS = {'tpu': True}


def outline(
    config: ml_collections.ConfigDict, mesh: Mesh, planned: bool = False,
) -> tuple[TransformerConfig, tokenizers.Tokenizer]:
    """Returns shape and tokenizer of the reference that `config.reference` names; of a file, only the head is read.

    Args:
      config: of the run.
      mesh: the devices.
      planned: whether nothing will ever be loaded: then weights need not be there, and with a config.json alone no
        tokenizer.

    Raises:
      ValueError: the file or its package is missing or damaged, or the task has no corpus to train on.
    """
    start = config.reference.pretrain.start
    if config.reference.source == 'pretrain' and start:
        pretraining.check_corpus(config)
        shape, published = _published(start, planned)
        # It is trained, so its parameters are kept in full whatever it computes in.
        return dataclasses.replace(
            shape, dtype=jnp.dtype(config.reference.dtype), param_dtype=jnp.dtype('float32')), published
    if config.reference.source == 'pretrain':
        tokenizer = pretraining.tokenizer_of(config)
        return pretraining.model_shape(config, tokenizer.vocab_size), tokenizer
    shape, published = _published(config.reference.source, planned)
    # What is computed in a number type is kept in it: a copy in a wider one would be rounded in every step.
    dtype = jnp.dtype(config.reference.dtype)
    scan = scans(config.reference.scan_layers, mesh)
    return dataclasses.replace(shape, dtype=dtype, param_dtype=dtype, scan_layers=scan), published


def network(shape: TransformerConfig, tokenizer: tokenizers.Tokenizer) -> Reference:
    """Returns the reference of this shape as a function, of whose ids only those that the tokenizer has are seen.

    Special tokens behind the model's ids, which `outline` warns of, are none of them.
    """
    return networks.reference(shape, min(shape.vocab_size, tokenizer.vocab_size), tokenizer.holes)


def check_run(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Raises ValueError for a reference that is neither in `workdir` nor in the run that it is to be taken from."""
    pretrain = config.reference.pretrain
    if config.reference.source == 'pretrain' and pretrain.run and not pretraining.is_finished(workdir):
        pretraining.check_run(pretrain.run)


def scans(choice: str, mesh: Mesh) -> bool:
    """Returns whether the layers of a published reference are scanned, by `reference.scan_layers` and the devices."""
    return choice == 'yes' or choice == 'auto' and SCANS.get(mesh.devices.flat[0].platform, False)


def spares(mesh: Mesh) -> bool:
    """Returns whether value passes are worth to be over real tokens alone: where arithmetic binds, not memory."""
    return bool(mesh.devices.flat[0].platform == 'cpu')


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
    def published(source: str) -> tuple[Params, str]:
        file = pretrained.open_checkpoint(source)
        shardings = transformer.param_shardings(shape, mesh)
        return pretrained.load_params(file, shardings, shape.param_dtype), file.fingerprint

    if config.reference.source != 'pretrain':
        return published(config.reference.source)
    start = config.reference.pretrain.start
    return pretraining.load_or_train(
        config, shape, tokenizer, workdir, mesh, functools.partial(published, start) if start else None)


def value_outline(
    config: ml_collections.ConfigDict, reference: TransformerConfig, tokenizer: tokenizers.Tokenizer,
    planned: bool = False,
) -> tuple[TransformerConfig, tokenizers.Tokenizer]:
    """Returns shape and tokenizer of what the value network is started from: `value.source`, or else the reference.

    Args:
      config: of the run.
      reference: shape of the reference.
      tokenizer: of the reference.
      planned: as in `outline`.
    """
    if config.value.source:
        reference, tokenizer = _published(config.value.source, planned)
    return dataclasses.replace(
        reference, dtype=jnp.dtype(config.value.dtype), param_dtype=jnp.dtype('float32'),
        remat=config.value.remat, scan_layers=config.value.scan_layers), tokenizer


def load_value_base(source: str, value_config: ValueConfig, shape: TransformerConfig, mesh: Mesh) -> Params:
    """Returns those parameters of the checkpoint `source`, on the mesh, that a value network starts from.

    Args:
      source: of the config's section `value`.
      value_config: the start of the value network.
      shape: from `value_outline`.
      mesh: the devices.
    """
    def wanted(path: tuple[str, ...]) -> bool:
        return value_lib.is_copied(value_config, shape, path)

    # Layer by layer, of which a part may be wanted: `value.init_value_params` stacks them.
    shape = dataclasses.replace(shape, scan_layers=False)
    shardings = transformer.param_shardings(shape, mesh)
    return pretrained.load_params(pretrained.open_checkpoint(source), shardings, shape.param_dtype, wanted)


def fingerprint(source: str) -> str:
    """Returns what names the weights of a checkpoint; '' for no checkpoint."""
    return pretrained.open_checkpoint(source).fingerprint if source else ''


def _published(source: str, planned: bool) -> tuple[TransformerConfig, tokenizers.Tokenizer]:
    if planned:
        path, shape = pretrained.open_shape(source)
        if path.suffix == '.json':
            return shape, tokenizers.from_config(path, shape.vocab_size)
        tokenizer = tokenizers.from_folder(path) if path.is_dir() else tokenizer_of(pretrained.open_checkpoint(path))
    else:
        file = pretrained.open_checkpoint(source)
        shape, tokenizer = file.config, tokenizer_of(file)
    rows = shape.vocab_size
    beyond = {token: text for text, token in tokenizer.backend.get_vocab(with_added_tokens=True).items()
              if token >= rows}
    if beyond:
        added = {entry['id'] for entry in tokenizer.content['added_tokens']}
        ordinary = sorted(set(beyond) - added)
        if ordinary:
            raise ValueError(f'{source}: the tokenizer has the token {beyond[ordinary[0]]!r} with id {ordinary[0]}, '
                             f'and the model has {rows} ids: they are not of one model.')
        warnings.warn(f'{source}: the model has no ids for the special tokens {sorted(beyond.values())}: they can be '
                      'neither asked nor answered.', stacklevel=2)
    return shape, tokenizer


def tokenizer_of(file: Checkpoint) -> tokenizers.BPETokenizer:
    """Returns the tokenizer that comes with a checkpoint."""
    return tokenizers.from_folder(file.path) if file.path.is_dir() else tokenizers.from_gguf(file.metadata)
