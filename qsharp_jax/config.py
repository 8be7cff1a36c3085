"""Configurations: loading, overriding, checking, and what may change when a run is resumed.

A configuration is a locked `ml_collections.ConfigDict` with exactly the keys of `configs/default.py`.
"""
from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import difflib
import fnmatch
import functools
import importlib.util
import json
import math
from pathlib import Path
import sys
import traceback
from types import ModuleType
from typing import Any

import ml_collections

from qsharp_jax.config_rules import check_values

Overrides = Sequence[tuple[str, str]]  # of ('collect.samples', '4')

_ROOT = Path(__file__).resolve().parents[1]

# Changing these extends a run or observes it; changing any other makes it another run.
_MAY_CHANGE = ('eta', 'eval.*', 'baselines.*', 'logging.*', 'checkpoint.*', 'mesh.*', 'fit.checkpoint_every_steps',
               'fit.skip_corrupt', 'reference.pretrain.run', 'reward_options.*', 'task.data_dir', 'task.*.folder',
               'task.math.test_folder')


def load(spec: str, overrides: Overrides = ()) -> ml_collections.ConfigDict:
    """The checked, locked configuration of a file.

    Args:
      spec: 'path/to/file.py' or 'path/to/file.py:size'; the file has `get_config()` or `get_config(size)`.
      overrides: dotted keys with their values as texts, applied in order.

    Raises:
      ValueError: the file or size does not exist, a key is unknown, or a value is of the wrong type or out of range.
    """
    path, _, size = spec.partition(':')
    get_config = _load_module(path).get_config
    with _worded_errors(path):
        config = get_config(size) if size else get_config()
    config.lock()
    _check_keys(config, path)
    for key, text in overrides:
        override(config, key, text)
    check_values(flatten(config))
    return config


def default() -> ml_collections.ConfigDict:
    """The configuration of `configs/default.py`."""
    config: ml_collections.ConfigDict = _load_module(str(_ROOT / 'configs' / 'default.py')).get_config()
    return config


def override(config: ml_collections.ConfigDict, key: str, text: str) -> None:
    """Sets one key of a configuration from text, read as the type that the key has.

    Args:
      config: changed in place.
      key: dotted, such as 'collect.samples'.
      text: the value; items of a tuple are separated by commas.

    Raises:
      ValueError: there is no such key, or the text is not of its type.
    """
    keys = flatten(config)
    if key not in keys:
        inside = [name for name in keys if name.startswith(key + '.')]
        if inside:
            raise ValueError(f'config.{key} is a section: set one of its keys, {_names(inside)}.')
        raise ValueError(_unknown_key(key, list(keys)))
    _set(config, key, _parse(key, text, _default_keys()[key]))


def flatten(config: ml_collections.ConfigDict | Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
    """All keys of a configuration, dotted, in its order."""
    keys: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, (ml_collections.ConfigDict, Mapping)):
            keys.update(flatten(value, f'{prefix}{name}.'))
        else:
            keys[prefix + name] = tuple(value) if isinstance(value, list) else value
    return keys


def to_json(config: ml_collections.ConfigDict) -> str:
    """The configuration as JSON text, one key a line; infinities become the text 'inf'."""
    return json.dumps(_plain(config), indent=2, allow_nan=False)


def from_json(text: str) -> ml_collections.ConfigDict:
    """The checked, locked configuration that `to_json` wrote, keys added since at their defaults.

    Raises:
      ValueError: the text is no configuration, or has a key that no longer exists.
    """
    try:
        saved = flatten(json.loads(text))
    except (AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f'the saved configuration cannot be read: {error}.') from error
    config = default()
    for key, value in saved.items():
        if key not in flatten(config):
            raise ValueError(_unknown_key(key, list(flatten(config))))
        _set(config, key, _restored(value, flatten(config)[key]))
    check_values(flatten(config))
    return config


def check_resume(saved: ml_collections.ConfigDict, current: ml_collections.ConfigDict) -> None:
    """Raises ValueError, listing the differences, unless a run of `saved` may go on as `current`.

    More iterations are fine, and so is any change to what is observed: evaluation, logging, checkpoints, mesh, eta.
    """
    old, new = flatten(saved), flatten(current)
    changed = [f'{key} was {old[key]!r}, now {new[key]!r}' for key in new
               if old[key] != new[key] and not _may_change(key, old[key], new[key])]
    if changed:
        raise ValueError(
            f'the workdir was written with another configuration: {"; ".join(changed)}. Give it back its values, or '
            'choose another --workdir.')


def _load_module(path: str) -> ModuleType:
    """The module of a configuration file, wherever it lies; it may import `configs` and `qsharp_jax`."""
    if not Path(path).is_file():
        raise ValueError(f'there is no configuration file {path!r}. Try --config=configs/arithmetic.py:tiny.')
    spec = importlib.util.spec_from_file_location(f'config_file_{Path(path).stem}', path)
    if spec is None or spec.loader is None:
        raise ValueError(f'the configuration {path!r} is no Python file.')
    module = importlib.util.module_from_spec(spec)
    with _importable(_ROOT):
        spec.loader.exec_module(module)
    if not callable(getattr(module, 'get_config', None)):
        raise ValueError(f'the configuration file {path!r} has no function get_config.')
    return module


@contextlib.contextmanager
def _importable(root: Path) -> Iterator[None]:
    # `configs` is not installed with the package, and the entry points run from their own directory.
    sys.path.insert(0, str(root))
    try:
        yield
    finally:
        sys.path.remove(str(root))


@contextlib.contextmanager
def _worded_errors(path: str) -> Iterator[None]:
    """Turns what a locked ConfigDict refuses into a sentence; other errors of the file keep their traceback."""
    try:
        yield
    except ValueError as error:  # the file's own words, such as on a size that it does not have
        raise ValueError(str(error)) from error
    except (AttributeError, KeyError, TypeError) as error:
        frames = traceback.extract_tb(error.__traceback__)
        if 'ml_collections' not in frames[-1].filename:
            raise
        line = next(frame for frame in reversed(frames) if 'ml_collections' not in frame.filename)
        words = ' '.join(str(error.args[0]).split()).strip('"\'')
        raise ValueError(f'{path}, line {line.lineno}, `{line.line}`: {words}') from error


def _check_keys(config: ml_collections.ConfigDict, path: str) -> None:
    """Raises ValueError unless the configuration has the keys of the default one, of the same types."""
    keys, expected = flatten(config), _default_keys()
    for key in keys:
        if key not in expected:
            raise ValueError(f'{path}: {_unknown_key(key, list(expected))}')
    for key, value in expected.items():
        if key not in keys:
            raise ValueError(f'{path}: config.{key} is missing; start from get_config() of configs/default.py.')
        if type(keys[key]) is not type(value):
            raise ValueError(f'{path}: config.{key} is {keys[key]!r}; it must be {_KINDS[type(value)][1]}.')


@functools.cache
def _default_keys() -> Mapping[str, Any]:
    return flatten(default())


def _set(config: ml_collections.ConfigDict, key: str, value: Any) -> None:
    section, _, name = key.rpartition('.')
    for word in section.split('.') if section else ():
        config = config[word]
    config[name] = value


def _restored(value: Any, old: Any) -> Any:
    """A value read from JSON, in the type of the key's default: infinities were written as texts."""
    if isinstance(old, tuple):
        return tuple(_restored(item, old[0] if old else item) for item in value)
    return float(value) if isinstance(old, float) else value


def _unknown_key(key: str, known: Sequence[str]) -> str:
    """The sentence for a key that does not exist, with the nearest that do."""
    last = {name: name.rpartition('.')[2] for name in known}
    near = difflib.get_close_matches(key, known, n=3, cutoff=0.7)
    # A right name in the wrong section, or a slip in a short name, is far from the full name.
    for word in difflib.get_close_matches(key.rpartition('.')[2], list(last.values()), n=2, cutoff=0.75):
        near += [name for name in known if last[name] == word and name not in near]
    section = key.rpartition('.')[0]
    beside = [name for name in known if section and name.rpartition('.')[0] == section]
    if not near and beside:
        return f'there is no config.{key}. config.{section} has {_names(beside, " and ")}.'
    if not near:
        return f'there is no config.{key}. All keys are in configs/default.py.'
    return f'there is no config.{key}. Did you mean {_names(near[:4], " or ")}?'


def _names(keys: Sequence[str], last: str = ' or ') -> str:
    names = [f'config.{key}' for key in keys]
    return names[0] if len(names) == 1 else ', '.join(names[:-1]) + last + names[-1]


def _parse(key: str, text: str, old: Any) -> Any:
    """The value that a text means for a key whose value is `old`."""
    read, kind = _KINDS[type(old)]
    try:
        return read(text, old)
    except ValueError as error:
        raise ValueError(f'config.{key} is given as {text!r}; it must be {kind}.') from error


def _read_bool(text: str, old: bool) -> bool:
    words = {'true': True, 'yes': True, '1': True, 'false': False, 'no': False, '0': False}
    if text.lower() not in words:
        raise ValueError(text)
    return words[text.lower()]


def _read_tuple(text: str, old: tuple[Any, ...]) -> tuple[Any, ...]:
    try:
        items = ast.literal_eval(text.strip() or '()')
    except (ValueError, SyntaxError):
        items = tuple(item.strip() for item in text.strip('()[] ').split(','))
    if not isinstance(items, (tuple, list)):
        items = (items,)
    kind = type(old[0]) if old else str
    if kind is not str and any(isinstance(item, bool) for item in items):
        raise ValueError(text)
    return tuple(kind(item) for item in items)


_KINDS: dict[type, tuple[Callable[[str, Any], Any], str]] = {
    bool: (_read_bool, 'true or false'),
    int: (lambda text, old: int(text), 'a whole number'),
    float: (lambda text, old: float(text), 'a number'),
    str: (lambda text, old: text, 'a text'),
    tuple: (_read_tuple, 'a list such as a,b,c whose items are of one type'),
}


def _may_change(key: str, old: Any, new: Any) -> bool:
    if key == 'iterations':
        return bool(new >= old)
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in _MAY_CHANGE)


def _plain(value: Any) -> Any:
    if isinstance(value, (ml_collections.ConfigDict, Mapping)):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
