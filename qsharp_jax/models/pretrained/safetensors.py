"""The safetensors format: a head in JSON, then the tensors as they lie in memory.

Read through the system's file mapping, so that a part of a tensor costs a part of its memory, and written tensor by
tensor. The format: https://github.com/huggingface/safetensors, section Format.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

# What the format calls a number type -> the type. Quantised ones have scales that a family would have to know.
DTYPES = {
    'F64': np.dtype(np.float64), 'F32': np.dtype(np.float32), 'F16': np.dtype(np.float16),
    'BF16': np.dtype(ml_dtypes.bfloat16)}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MOST_HEAD = 100_000_000  # bytes of a head; the format allows no more
_LENGTH = 8  # bytes of the number in front that says how long the head is


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file: name of its number type, shape, first byte in the file, bytes."""

    path: Path
    kind: str
    shape: tuple[int, ...]
    offset: int
    size: int

    def problem(self) -> str:
        """Returns what keeps it from being read, '' if nothing does."""
        if self.kind not in DTYPES:
            return f'is stored as {self.kind}; supported: {", ".join(DTYPES)}.'
        return ''

    def read(self, dtype: np.dtype[Any], rows: slice = slice(None)) -> np.ndarray:
        """Returns some of its rows, all without `rows`, as they are stored, mapped from the file."""
        del dtype
        return np.memmap(self.path, DTYPES[self.kind], 'r', self.offset, self.shape).view(np.ndarray)[rows]


def read_head(path: Path) -> dict[str, StoredTensor]:
    """Returns the tensors of a file, by name.

    Raises:
      ValueError: the file is no safetensors file, or is damaged or cut short.
    """
    size = path.stat().st_size
    with path.open('rb') as stream:
        length = int.from_bytes(stream.read(_LENGTH), 'little')
        text = stream.read(length) if length <= min(size, _MOST_HEAD) else b''
    if size < _LENGTH or len(text) < length or not length:
        raise ValueError(f'{path} is no safetensors file, or is cut short: its head of {length} bytes is not there.')
    try:
        head = json.loads(text)
        found = {}
        for name, entry in head.items():
            if name == '__metadata__':
                continue
            begin, end = entry['data_offsets']
            shape = tuple(entry['shape'])
            found[name] = StoredTensor(path, entry['dtype'], shape, _LENGTH + length + begin, end - begin)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f'{path} is damaged: its head cannot be read ({error!r}).') from error
    for name, tensor in found.items():
        if tensor.offset < _LENGTH + length or tensor.size < 0:
            raise ValueError(f'{path} is damaged: the tensor {name!r} cannot begin where its head says.')
        if tensor.offset + tensor.size > size:
            raise ValueError(f'{path} is cut short: the tensor {name!r} ends at byte {tensor.offset + tensor.size}, '
                             f'and the file has {size}.')
        dtype = DTYPES.get(tensor.kind)
        if dtype is not None and tensor.size != math.prod(tensor.shape) * dtype.itemsize:
            raise ValueError(f'{path} is damaged: the tensor {name!r} of shape {tensor.shape} and type {tensor.kind} '
                             f'has {tensor.size} bytes.')
    return found


def write(path: Path, tensors: Mapping[str, tuple[tuple[int, ...], np.dtype[Any], Callable[[], np.ndarray]]]) -> None:
    """Writes a file; each array is asked for when its turn comes, and then let go.

    Args:
      path: of the file, which appears when it is whole.
      tensors: by name: shape, type, and what returns the array.
    """
    head: dict[str, Any] = {'__metadata__': {'format': 'pt'}}
    place = 0
    for name, (shape, dtype, _) in tensors.items():
        size = math.prod(shape) * dtype.itemsize
        head[name] = {'dtype': NAMES[dtype], 'shape': list(shape), 'data_offsets': [place, place + size]}
        place += size
    text = json.dumps(head, separators=(',', ':')).encode()
    text += b' ' * (-len(text) % _LENGTH)
    partial = path.with_name(path.name + '.tmp')
    with partial.open('wb') as stream:
        stream.write(len(text).to_bytes(_LENGTH, 'little') + text)
        for shape, dtype, get in tensors.values():
            stream.write(np.ascontiguousarray(get(), dtype).reshape(shape).view(np.uint8).data)
    partial.rename(path)
