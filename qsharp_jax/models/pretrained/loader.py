"""From a file into shards: one stored tensor at a time, and of it only what each device keeps."""
from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
import functools
import hashlib
import itertools
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from qsharp_jax.models.families import Family, Format, Weight
from qsharp_jax.models.transformer import LAYER, STACK, TransformerConfig
from qsharp_jax.types import Array, Params


class Stored(Protocol):
    """One tensor of a file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape, slowest axis first."""

    def problem(self) -> str:
        """Returns what keeps it from being read, '' if nothing does."""

    def read(self, dtype: np.dtype[Any], rows: slice = slice(None)) -> np.ndarray:
        """Returns rows of it as they are stored, mapped from the file, or in `dtype` where it is quantised."""


@dataclasses.dataclass(frozen=True, eq=False)
class Checkpoint:
    """The head of a checkpoint, checked against the family it says it is of: everything but the numbers.

    Attributes:
      path: the file or the folder.
      files: all that the weights and the shape are read from.
      family: how it is read.
      tensor_format: how its tensors are named and laid out.
      config: the shape of the model.
      weights: where each of our parameters is in it.
      tensors: what it stores, by name.
      metadata: of a GGUF file everything it says about itself, the tokenizer included; of a folder its config.json.
    """

    path: Path
    files: tuple[Path, ...]
    family: Family
    tensor_format: Format
    config: TransformerConfig
    weights: tuple[Weight, ...]
    tensors: Mapping[str, Any]
    metadata: dict[str, Any]

    @functools.cached_property
    def fingerprint(self) -> str:
        """The SHA-256 of its file, or of the hashes of its files, in hexadecimal."""
        digests = []
        for path in self.files:
            with path.open('rb') as stream:
                digests.append(hashlib.file_digest(stream, 'sha256').hexdigest())
        return digests[0] if len(digests) == 1 else hashlib.sha256(' '.join(digests).encode()).hexdigest()


def match(source: Path, family: Family, tensor_format: Format, config: TransformerConfig,
          tensors: Mapping[str, Stored]) -> tuple[Weight, ...]:
    """Returns where each parameter of `config` is among the stored tensors.

    Raises:
      ValueError: naming the tensor that is missing, unexpected, of the wrong shape or not readable, and the family.
    """
    weights = tensor_format.weights(config)
    plain = tensor_format.prefix
    if plain and not any(name.startswith(plain) for name in tensors):  # a checkpoint of the base model
        weights = [dataclasses.replace(weight, name=weight.name.removeprefix(plain)) for weight in weights]
    needed = {weight.name: weight for weight in weights}
    what = f'{source} ({family.name})'
    missing = [name for name in needed if name not in tensors]
    # A head beside tied embeddings is the embeddings again.
    repeated = {tensor_format.names['head']} if config.tied_embeddings else set()
    extra = sorted(name for name in tensors
                   if name not in needed and name not in repeated and not tensor_format.is_ignored(name))
    if missing:
        raise ValueError(f'{what} lacks the tensor {missing[0]!r} ({len(missing)} are missing).')
    if extra:
        raise ValueError(f'{what} has a tensor {extra[0]!r} that this architecture does not use ({len(extra)} are '
                         'unexpected).')
    for name, weight in needed.items():
        if tuple(tensors[name].shape) != weight.stored_shape:
            raise ValueError(f'{what}: the tensor {name!r} has shape {tuple(tensors[name].shape)}; the metadata imply '
                             f'{weight.stored_shape}.')
        problem = tensors[name].problem()
        if problem:
            raise ValueError(f'{what}: the tensor {name!r} {problem}')
    return tuple(weights)


def load_params(checkpoint: Checkpoint, shardings: Params = None, dtype: Any = np.float32,
                wanted: Callable[[tuple[str, ...]], bool] = lambda path: True) -> Params:
    """Returns the parameters of `transformer.hidden_states` for `checkpoint.config`.

    At no time does the host hold more, beside what the devices keep, than the part of one tensor that one device keeps,
    and of a quantised one the whole rows that this part lies in.

    Args:
      checkpoint: from `open_checkpoint`, which has checked all of it.
      shardings: a tree like the parameters that are wanted; None for NumPy arrays on the host. Where it has the layers
        stacked, the stacks are filled in place, layer by layer.
      dtype: of the parameters.
      wanted: whether a parameter, by its keys, is read at all.
    """
    params: dict[str, Any] = {}
    stacked = shardings is not None and STACK in shardings
    for weight in checkpoint.weights:
        if not wanted(weight.path):
            continue
        *keys, last = weight.path
        layer = None
        if stacked and keys and keys[0].startswith(LAYER):
            layer = int(keys[0].removeprefix(LAYER))
            keys[0] = STACK
        place, sharding = params, shardings
        for key in keys:
            place = place.setdefault(key, {})
            sharding = None if shardings is None else sharding[key]
        stored = checkpoint.tensors[weight.name]
        if shardings is None:
            place[last] = _own(weight.read(stored.read(np.dtype(dtype))), dtype)
        elif layer is None:
            place[last] = put(weight, stored, sharding[last], dtype)
        else:
            if last not in place:
                place[last] = _empty((checkpoint.config.layers, *weight.shape), sharding[last], dtype)
            place[last] = put_layer(place[last], weight, stored, layer)
    return params


def put_layer(stack: Array, weight: Weight, stored: Stored, layer: int) -> Array:
    """Returns `stack` [N, ...] with a parameter as one of its layers, written in place; `stack` is given up."""
    one = jax.sharding.NamedSharding(stack.sharding.mesh, jax.sharding.PartitionSpec(*stack.sharding.spec[1:]))
    filled = _write_layer(stack, put(weight, stored, one, stack.dtype), layer, out_sharding=stack.sharding)
    # The part that was written is freed before the next tensor is read.
    return filled.block_until_ready()


def _empty(shape: tuple[int, ...], sharding: jax.sharding.Sharding, dtype: Any) -> Array:
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)()


@functools.partial(jax.jit, static_argnames=('out_sharding',), donate_argnums=0)
def _write_layer(stack: Array, array: Array, layer: Array, out_sharding: jax.sharding.Sharding) -> Array:
    filled = jax.lax.dynamic_update_index_in_dim(stack, array, layer, 0)
    return jax.lax.with_sharding_constraint(filled, out_sharding)


def put(weight: Weight, stored: Stored, sharding: jax.sharding.Sharding, dtype: Any) -> Array:
    """Returns a parameter on the devices in `dtype`; the host copies the part of one device at a time.

    Rows of the stored tensor are read once, for all devices that keep some of them.
    """
    places: Mapping[Any, Any] = sharding.addressable_devices_indices_map(weight.shape)
    wanted = [(device, *weight.part(index)) for device, index in places.items()]
    arrays: list[Array] = []
    for rows, sharing in itertools.groupby(sorted(wanted, key=lambda one: one[1].start or 0), key=lambda one: one[1]):
        ours = None
        for device, _, part, inside in sharing:
            if ours is None:
                ours = part.read(stored.read(np.dtype(dtype), rows))
            # Never the mapped file itself: what lies there must not change under a running program.
            arrays.append(jax.device_put(_own(ours[inside], dtype), device).block_until_ready())
    return jax.make_array_from_single_device_arrays(weight.shape, sharding, arrays)


def _own(array: np.ndarray, dtype: Any) -> np.ndarray:
    """Returns an array of its own memory, laid out for XLA; a copy only where it is none yet."""
    base: Any = array
    while isinstance(base, np.ndarray) and not isinstance(base, np.memmap):
        base = base.base
    return np.array(array, dtype, order='C', copy=True if isinstance(base, np.memmap) else None)
