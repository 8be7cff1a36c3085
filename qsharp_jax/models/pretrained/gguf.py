"""GGUF files: one file with metadata, tokenizer and tensors, most of them quantised."""
from __future__ import annotations

import dataclasses
import mmap
from pathlib import Path
import struct
from typing import Any

import gguf
import numpy as np

from qsharp_jax.models import families
from qsharp_jax.models.families import Keys
from qsharp_jax.models.pretrained.loader import Checkpoint, match

# Scalars of the format by type number; 8 is a string and 9 an array.
SCALARS = {
    0: '<B', 1: '<b', 2: '<H', 3: '<h', 4: '<I', 5: '<i', 6: '<f', 7: '<?', 10: '<Q', 11: '<q', 12: '<d'}
STRING, ARRAY = 8, 9
# Keys below the architecture's name that change nothing.
_HARMLESS = ('vocab_size', 'rope.dimension_sections')
_CHUNK = 2 ** 22  # numbers that are dequantised at once


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file: shape with the slowest axis first, number format, first byte."""

    path: Path
    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    offset: int

    def problem(self) -> str:
        """Returns what keeps it from being read, '' if nothing does."""
        block, _ = gguf.GGML_QUANT_SIZES[self.kind]
        if self.shape[-1] % block:
            return (f'has rows of {self.shape[-1]} numbers, which is no multiple of the {block} in a block of '
                    f'{self.kind.name}.')
        try:
            # A block of zero bytes: the format is readable or it is not, whatever the numbers.
            gguf.quants.dequantize(np.zeros((1, _bytes(self.kind, block)), np.uint8), self.kind)
        except NotImplementedError:
            return f'is stored as {self.kind.name}, which cannot be read.'
        size = self.path.stat().st_size
        if self.offset + _bytes(self.kind, int(np.prod(self.shape))) > size:
            return f'ends beyond the {size} bytes of the file, which is cut short.'
        return ''

    def read(self, dtype: np.dtype[Any], rows: slice = slice(None)) -> np.ndarray:
        """Returns some of its rows, all without `rows`, dequantised, in `dtype`."""
        shape = int(np.prod(self.shape[:-1])), _bytes(self.kind, self.shape[-1])
        stored = np.memmap(self.path, np.uint8, 'r', self.offset, shape).view(np.ndarray)[rows]
        out = np.empty((len(stored), self.shape[-1]), dtype)
        step = max(1, _CHUNK // self.shape[-1])
        for first in range(0, len(stored), step):
            out[first:first + step] = gguf.quants.dequantize(stored[first:first + step], self.kind)
        return out.reshape(-1, *self.shape[1:])


def open_gguf(path: Path) -> Checkpoint:
    """Returns the head of a GGUF file; reads no weights.

    Raises:
      ValueError: the file is no GGUF, is damaged, holds another architecture than `families.GGUF_FAMILIES`, or a key
        or tensor does not fit; with its name and the family.
    """
    if path.stat().st_size == 0:  # which cannot be mapped
        raise ValueError(f'{path} is no GGUF file: it is empty.')
    with path.open('rb') as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            metadata, tensors = _parse(data, path)
        except (struct.error, UnicodeDecodeError) as error:
            raise ValueError(f'{path} is damaged or cut short: its head cannot be read ({error}).') from error
    architecture = metadata.get('general.architecture')
    if architecture not in families.GGUF_FAMILIES:
        allowed = ', '.join(families.GGUF_FAMILIES)
        raise ValueError(f'{path} holds the architecture {architecture!r}; allowed: {allowed}.')
    family = families.GGUF_FAMILIES[architecture]
    assert family.gguf_tensors is not None and family.read_gguf is not None

    def floats(name: str) -> np.ndarray:
        problem = tensors[name].problem()
        if problem:
            raise ValueError(f'{path} ({architecture}): the tensor {name!r} {problem}')
        return tensors[name].read(np.dtype(np.float32))

    start = f'{architecture}.'
    keys = Keys(
        {key.removeprefix(start): value for key, value in metadata.items() if key.startswith(start)}, architecture,
        f'The GGUF metadata of {path}', {name: tensor.shape for name, tensor in tensors.items()}, floats)
    config = family.read_gguf(keys)
    keys.note(*_HARMLESS)
    keys.finish()
    weights = match(path, family, family.gguf_tensors, config, tensors)
    return Checkpoint(path, (path,), family, family.gguf_tensors, config, weights, tensors, metadata)


def _bytes(kind: gguf.GGMLQuantizationType, count: int) -> int:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return count // block * size


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
    return metadata, {name: StoredTensor(path, shape, kind, start + offset) for name, shape, kind, offset in found}
