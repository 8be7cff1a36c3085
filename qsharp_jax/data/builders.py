"""What the TFDS builders of this package share. TensorFlow is not needed."""
from __future__ import annotations

from collections.abc import Iterator, Mapping
import contextlib
import dataclasses
import hashlib
import io
import json
import logging
import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tensorflow_datasets as tfds


class TaskConfig(Protocol):
    """A task's parameters, which know their builder."""

    def builder(self, data_dir: str | os.PathLike[str]) -> tfds.core.DatasetBuilder:
        """Returns the builder of this task, which keeps its files below `data_dir`."""

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits."""

    def size(self, split: str) -> int | None:
        """Returns how many records a split has; None where that is known only once they are made."""


def config_name(config: Any, revision: int, contents: Mapping[str, Any] | None = None) -> str:
    """Returns a name that is a hash of every parameter: other parameters never find these prepared files.

    Args:
      config: a dataclass that extends `tfds.core.BuilderConfig`; its own fields are the parameters.
      revision: of the generator, raised whenever the same parameters would make other records.
      contents: what else the records depend on, such as hashes of files.
    """
    inherited = {field.name for field in dataclasses.fields(tfds.core.BuilderConfig)}
    parameters = {field.name: getattr(config, field.name)
                  for field in dataclasses.fields(config) if field.name not in inherited}
    text = json.dumps({'revision': revision, **parameters, **(contents or {})}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def hash_share(text: str) -> float:
    """Returns a number in [0, 1) that depends on the text alone, the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], 'big') / 2 ** 64


def split_of(text: str, fractions: Mapping[str, float]) -> str:
    """Returns the split that a canonical text belongs to.

    It depends on nothing but the text, neither a seed nor the sizes, so that what is held out in one run is held out
    in all of them.

    Args:
      text: canonical form, the same for all problems that must not be separated.
      fractions: share of each split; they sum to 1.
    """
    share, total = hash_share(text), 0.0
    for name, fraction in fractions.items():
        total += fraction
        if share < total:
            return name
    return name


def info(builder: tfds.core.GeneratorBasedBuilder, description: str, answers: bool = True,
         **extra: Any) -> tfds.core.DatasetInfo:
    """Returns what TFDS records about a builder whose examples stay in the order of their ids.

    Args:
      builder: the builder.
      description: of its examples.
      answers: whether there is a feature `answer`, beside `id` and `question`.
      extra: other features.
    """
    named = {'answer': tfds.features.Text()} if answers else {}
    features = tfds.features.FeaturesDict({
        'id': tfds.features.Scalar(dtype=np.int64), 'question': tfds.features.Text(), **named, **extra})
    return tfds.core.DatasetInfo(builder=builder, description=description, features=features, disable_shuffling=True)


def read(task: TaskConfig, split: str, data_dir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Returns a split's records, in the order of their ids, as plain Python values.

    The files are generated on first use; a killed generation leaves nothing half made. A feature `columns` is JSON, and
    becomes one value for each of its keys.

    Raises:
      ValueError: if the task has no such split, cannot make as many distinct records as were asked for, or reads files
        that are missing or not as they should be.
    """
    with _quiet():
        builder = task.builder(data_dir)
        try:
            builder.download_and_prepare(file_format='array_record')
        except OSError:
            # Another process that generates the same records may have finished first.
            builder = task.builder(data_dir)
            if not builder.is_prepared():
                raise
    if split not in builder.info.splits:
        raise ValueError(f'there is no split {split!r} of {builder.name}; it has {", ".join(builder.info.splits)}.')
    return [_record(record) for record in builder.as_data_source(split)]


def prepared(task: TaskConfig, data_dir: str | os.PathLike[str]) -> Path | None:
    """Returns the directory of a task's records; None if they are not made yet."""
    with _quiet():
        builder = task.builder(data_dir)
        return Path(builder.data_dir) if builder.is_prepared() else None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps TFDS from telling of downloads, which there are none of, and of configurations being its user's own."""
    tfds.disable_progress_bar()
    logger = logging.getLogger('absl')
    unusual = lambda record: record.levelno > logging.WARNING
    logger.addFilter(unusual)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.removeFilter(unusual)


def _record(features: Mapping[str, Any]) -> dict[str, Any]:
    plain = {key: _plain(value) for key, value in features.items()}
    columns = json.loads(plain.pop('columns', '{}'))
    return {**plain, **columns}


def _plain(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else value.item() if hasattr(value, 'item') else value
