"""Hugging Face folders: config.json and one or several safetensors files."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qsharp_jax.models import families
from qsharp_jax.models.families import Family, Keys
from qsharp_jax.models.pretrained import safetensors
from qsharp_jax.models.pretrained.loader import Checkpoint, match
from qsharp_jax.models.transformer import TransformerConfig

CONFIG, SINGLE, INDEX = 'config.json', 'model.safetensors', 'model.safetensors.index.json'


def open_folder(path: Path) -> Checkpoint:
    """Returns the head of the checkpoint in a folder; reads no weights.

    Raises:
      ValueError: a file is missing or damaged, the architecture is not known, a key of config.json may change the maths
        and is not supported, or a tensor does not fit; with its name and the family.
    """
    family, config, keys = read_config(path / CONFIG)
    files, tensors = _tensors(path)
    weights = match(path, family, family.tensors, config, tensors)
    return Checkpoint(path, (path / CONFIG, *files), family, family.tensors, config, weights, tensors, keys)


def read_config(file: Path) -> tuple[Family, TransformerConfig, dict[str, Any]]:
    """Returns the family and the shape that a config.json describes, and its keys.

    Raises:
      ValueError: as `open_folder`, as far as it can be known without the weights.
    """
    keys = read_json(file)
    name = keys.get('model_type')
    if name not in families.FAMILIES:
        allowed = ', '.join(families.FAMILIES)
        raise ValueError(f'{file} describes the architecture {name!r}; allowed: {allowed}.')
    family = families.FAMILIES[name]
    reader = Keys(keys, family.name, str(file), {})
    try:
        config = family.read(reader)
    except TypeError as error:  # a number that is a text, or a section that is none
        raise ValueError(f'{file} ({family.name}) has a value of the wrong type: {error}') from error
    reader.finish()
    return family, config, keys


def read_json(path: Path) -> dict[str, Any]:
    """Returns what a JSON file of a folder holds.

    Raises:
      ValueError: there is no such file, or it is no JSON object.
    """
    if not path.is_file():
        raise ValueError(f'{path.parent} has no {path.name}: it is no folder of a Hugging Face checkpoint, or is '
                         'incomplete.')
    try:
        found = json.loads(path.read_text(encoding='utf-8'))
    except ValueError as error:
        raise ValueError(f'{path} is damaged: it is no JSON ({error}).') from error
    if not isinstance(found, dict):
        raise ValueError(f'{path} is damaged: it holds no JSON object.')
    return found


def _tensors(path: Path) -> tuple[list[Path], dict[str, safetensors.StoredTensor]]:
    """Returns the files with the weights, and the tensors in them."""
    if not (path / INDEX).is_file():
        if not (path / SINGLE).is_file():
            raise ValueError(f'{path} has neither {SINGLE} nor {INDEX}: weights in other formats are not read. Save '
                             'them with save_pretrained(..., safe_serialization=True).')
        return [path / SINGLE], safetensors.read_head(path / SINGLE)
    placed = read_json(path / INDEX).get('weight_map', {})
    files = [path / name for name in sorted(set(placed.values()))]
    found = {}
    for file in files:
        if file.parent != path or not file.is_file():
            raise ValueError(f'{path} lacks the file {file.name!r}, which {INDEX} names: the download is incomplete.')
        found.update(safetensors.read_head(file))
    missing = sorted(set(placed) - set(found))
    if missing:
        raise ValueError(f'{path} lacks the tensor {missing[0]!r}, which {INDEX} names ({len(missing)} are missing).')
    return files, found
