"""Networks out: Hugging Face folders that `transformers` opens, tensor by tensor from wherever the parameters are."""
from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qsharp_jax import sharding
from qsharp_jax.models.families import FAMILIES, Family, Weight
from qsharp_jax.models.families.base import Keys
from qsharp_jax.models.pretrained import safetensors
from qsharp_jax.models.pretrained.huggingface import CONFIG, INDEX, SINGLE
from qsharp_jax.models.transformer import LAYER, STACK, TransformerConfig
from qsharp_jax.types import Params

HEAD, HEAD_CONFIG = 'value_head.safetensors', 'value_head.json'
_FILE_BYTES = 5 * 10 ** 9  # most that one of several files holds

_Entry = tuple[tuple[int, ...], np.dtype[Any], Callable[[], np.ndarray]]


def family_of(config: TransformerConfig) -> Family:
    """Returns the family whose config.json says all that `config` says.

    Raises:
      ValueError: there is none: no class of `transformers` computes what this model does.
    """
    plain = dataclasses.replace(config, dtype=jnp.float32, param_dtype=jnp.float32, remat=False, scan_layers=False)
    for family in FAMILIES.values():
        try:
            found = family.read(Keys(family.write(plain), family.name, 'the config', {}))
        except ValueError:  # it has no word for a part of it
            continue
        if found == plain:
            return family
    raise ValueError(f'this model cannot be written for transformers: none of the families {", ".join(FAMILIES)} '
                     f'computes what it does ({config}).')


def write_model(path: Path, config: TransformerConfig, params: Params, *, base: bool = False,
                keys: Mapping[str, Any] | None = None, file_bytes: int = _FILE_BYTES) -> None:
    """Writes config.json and the weights, in the number type that they have.

    Of several processes all call it and the first one writes, what the others hold being gathered tensor by tensor.

    Args:
      path: of the folder, made when missing.
      config: the shape.
      params: the parameters, on the host or on any devices.
      base: leave out the language model's head: the folder then opens as the family's base model.
      keys: more of config.json, such as the ids of special tokens.
      file_bytes: most that one file holds; more are written where it does not suffice.

    Raises:
      ValueError: no family computes what this model does.
    """
    family = family_of(config)
    kept, head = family.tensors.weights(config), family.tensors.names['head']
    if base:
        kept = [dataclasses.replace(weight, name=weight.name.removeprefix(family.tensors.prefix))
                for weight in kept if weight.name != head]
    grouped: dict[str, list[Weight]] = {}
    for weight in kept:
        grouped.setdefault(weight.name, []).append(weight)
    entries = {name: _entry(sorted(weights, key=lambda weight: weight.columns or (0, 1)), params)
               for name, weights in grouped.items()}
    path.mkdir(parents=True, exist_ok=True)
    dtype = next(iter(entries.values()))[1]
    write_json(path / CONFIG, {
        **family.write(config), 'model_type': family.name, 'dtype': str(dtype), **(keys or {}),
        'architectures': [family.base_architecture if base else family.architecture]})
    files = _files(entries, file_bytes)
    for name, part in files.items():
        write_tensors(path / name, part)
    if len(files) > 1:
        write_json(path / INDEX, {
            'metadata': {'total_size': sum(map(_bytes, entries.values()))},
            'weight_map': {name: file for file, part in files.items() for name in part}})
    sharding.wait_for_all('write_model')


def write_value(path: Path, config: TransformerConfig, params: Params, about: Mapping[str, Any],
                keys: Mapping[str, Any] | None = None) -> None:
    """Writes a value network: its trunk as the family's base model, and its head in files of its own beside it.

    Args:
      path: of the folder, made when missing.
      config: of the trunk.
      params: {'trunk': ..., 'head': ...}.
      about: what value_head.json says: how the scores are read, and what they are valid for.
      keys: as in `write_model`.

    Raises:
      ValueError: no family computes what this trunk does.
    """
    write_model(path, config, params['trunk'], base=True, keys=keys)
    write_tensors(path / HEAD, {
        name: (leaf.shape, np.dtype(leaf.dtype), functools.partial(sharding.to_host, leaf))
        for name, leaf in params['head'].items()})
    write_json(path / HEAD_CONFIG, dict(about))
    sharding.wait_for_all('write_value')


def write_tensors(path: Path, entries: Mapping[str, _Entry]) -> None:
    """Writes one safetensors file; of several processes the first one."""
    if jax.process_index() == 0:
        safetensors.write(path, entries)
    else:
        for _, _, get in entries.values():
            get()  # collective where arrays span processes


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file; of several processes the first one."""
    if jax.process_index() == 0:
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + '\n', encoding='utf-8')


def _entry(weights: list[Weight], params: Params) -> _Entry:
    """Returns a stored tensor of one or several parameters: shape, type, and what fetches and arranges it."""
    found = [_find(weight, params) for weight in weights]
    leaves = [leaf for leaf, _ in found]

    def get() -> np.ndarray:
        parts = [weight.write(np.asarray(sharding.to_host(leaf if layer is None else leaf[layer])))
                 for weight, (leaf, layer) in zip(weights, found)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)

    return weights[0].stored_shape, np.dtype(leaves[0].dtype), get


def _find(weight: Weight, params: Params) -> tuple[Any, int | None]:
    """Returns the array that holds a parameter, and which of its layers it is where they are stacked."""
    layer, path = None, weight.path
    if STACK in params and path[0].startswith(LAYER):
        layer, path = int(path[0].removeprefix(LAYER)), (STACK, *path[1:])
    return functools.reduce(lambda tree, key: tree[key], path, params), layer


def _bytes(entry: _Entry) -> int:
    return math.prod(entry[0]) * entry[1].itemsize


def _files(entries: Mapping[str, _Entry], most: int) -> dict[str, dict[str, _Entry]]:
    """Returns the tensors by the names of the files that they go to, in their order."""
    groups: list[dict[str, _Entry]] = [{}]
    for name, entry in entries.items():
        if groups[-1] and sum(map(_bytes, groups[-1].values())) + _bytes(entry) > most:
            groups.append({})
        groups[-1][name] = entry
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    stem, _, ending = SINGLE.partition('.')
    return {f'{stem}-{number:05d}-of-{len(groups):05d}.{ending}': group
            for number, group in enumerate(groups, start=1)}
