"""Checkpoints of a run and directories of finished value networks, written by orbax.

A checkpoint appears whole or not at all, whenever the process dies. Orbax does not notice a byte that changes
on disk, so a fingerprint of every array is kept beside it: what is restored is bit for bit what was saved, on
any number of devices.
"""
from __future__ import annotations

from collections.abc import Mapping
import hashlib
import json
import os
from typing import Any
import warnings

from etils import epath
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from qsharp_jax import sharding
from qsharp_jax.types import Array

VALUE_FILE = 'value.json'
_PARAMS = 'params'

# A value predicts returns of this reference's tokens on this support: with others its scores mean nothing.
REFUSED = ('reference', 'tokenizer', 'support')
# It was fitted to roll-outs of this kind: with others it still guides, but by another return.
WARNED = ('sampler', 'budget', 'reward')

_Leaves = dict[str, dict[str, Any]]


class Checkpoints:
    """The last `keep` checkpoints of a run, in one directory. Every process of a run calls every method."""

    def __init__(self, directory: str | os.PathLike[str], keep: int = 2) -> None:
        """Opens `directory`, made when missing; raises ValueError unless `keep` is at least 1."""
        if keep < 1:
            raise ValueError(f'keep is {keep}: at least 1 checkpoint must be kept.')
        self._directory = epath.Path(directory).absolute()
        # Saving waits until all is on disk: `step` is then safe, whatever kills the process next.
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=False, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(self._directory, options=options)

    def all_steps(self) -> list[int]:
        """Returns the steps with a whole checkpoint, increasing."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, meta: Mapping[str, Any]) -> None:
        """Returns when `state` is on disk as `step`; older checkpoints beyond `keep` are then deleted.

        Args:
          step: above that of every checkpoint there is.
          state: a tree of jax arrays; those are left as they are.
          meta: JSON data: the position of the run, the manifest of the data set.
        """
        last = max(self.all_steps(), default=-1)
        if step <= last:
            raise ValueError(f'step {step} cannot be saved to {self._directory}, which has step {last} '
                             'already: continue from that one, or choose another directory.')
        self._manager.save(step, args=ocp.args.Composite(
            state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(_seal(meta, _describe(state)))))

    def restore_latest(self, target: Any) -> tuple[Any, dict[str, Any]] | None:
        """Returns (state, meta) of the newest readable checkpoint, or None when there is none at all.

        Args:
          target: a state, or its jax.ShapeDtypeStructs, that says which arrays are wanted and how they are
            laid out over the devices; they stream there directly, wherever they were when saved.

        A checkpoint that cannot be read is named in a warning and the one before it is used; it is then
        renamed, so that the run can save that step again. Raises ValueError when none can be read, and when
        the newest readable one is of another network or optimizer than `target`.
        """
        steps = self.all_steps()
        broken: dict[int, str] = {}
        for step in reversed(steps):
            try:
                meta, leaves = _unseal(self._restore(step, meta=ocp.args.JsonRestore()).meta)
            except Exception as error:  # Damage shows as any kind of exception, depending on the byte.
                self._warn(broken, step, error)
                continue
            _check_leaves(leaves, target, f'checkpoint {self._directory / str(step)}')
            try:
                state = self._restore(step, state=ocp.args.StandardRestore(sharding.abstract(target))).state
                _check_fingerprints(leaves, state)
            except Exception as error:
                self._warn(broken, step, error)
                continue
            self._set_aside(broken)
            return state, meta
        if broken:
            why = '; '.join(f'step {step}: {reason}' for step, reason in broken.items())
            raise ValueError(f'no checkpoint in {self._directory} can be read ({why}). Bring back a copy, '
                             'or delete that directory to start this part of the run again.')
        return None

    def close(self) -> None:
        """Frees orbax's threads."""
        self._manager.close()

    def _restore(self, step: int, **args: Any) -> Any:
        return self._manager.restore(step, args=ocp.args.Composite(**args))

    def _warn(self, broken: dict[int, str], step: int, error: Exception) -> None:
        broken[step] = f'{type(error).__name__}: {str(error).strip()[:200]}'
        warnings.warn(f'checkpoint {self._directory / str(step)} cannot be read and is passed over '
                      f'({broken[step]}).', stacklevel=3)

    def _set_aside(self, broken: Mapping[int, str]) -> None:
        # Only now that another one was read: were none readable, the cause might lie elsewhere.
        if jax.process_index() == 0:
            for step in broken:
                path = self._directory / str(step)
                aside = self._directory / f'unreadable-{step}'
                if aside.exists():
                    aside.rmtree()
                path.rename(aside)
        sharding.wait_for_all('checkpoint.set_aside')
        if broken:
            self._manager.reload()


def save_params(directory: str | os.PathLike[str], params: Any, meta: Mapping[str, Any]) -> None:
    """Returns when a finished network is on disk; what `directory` held before is replaced.

    Args:
      directory: of the network; gets `params/` and then `value.json`, whose presence says that all is there.
      params: a tree of jax arrays.
      meta: JSON data that says what the network is; for a value network the keys of `REFUSED` and `WARNED`.
    """
    path = epath.Path(directory).absolute()
    leaves = _describe(params)
    if jax.process_index() == 0:
        path.mkdir(parents=True, exist_ok=True)
        (path / VALUE_FILE).unlink(missing_ok=True)
    sharding.wait_for_all('checkpoint.unlink')
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / _PARAMS, params, force=True)
    if jax.process_index() == 0:
        partial = path / f'{VALUE_FILE}.tmp'
        partial.write_text(json.dumps(_seal(meta, leaves), indent=2))
        partial.rename(path / VALUE_FILE)
    sharding.wait_for_all('checkpoint.written')


def load_meta(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the `meta` that a network was saved with; raises ValueError when the directory is not whole."""
    return _read_value_file(epath.Path(directory).absolute())[0]


def restore_params(directory: str | os.PathLike[str], target: Any) -> tuple[Any, dict[str, Any]]:
    """Returns (params, meta) of a network from `save_params`, laid out as `target` says.

    Args:
      directory: as given to `save_params`.
      target: parameters, or their jax.ShapeDtypeStructs, with shardings.

    Raises ValueError when the directory is not whole, is damaged, or holds another network than `target`.
    """
    path = epath.Path(directory).absolute()
    meta, leaves = _read_value_file(path)
    _check_leaves(leaves, target, f'the network in {path}')
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            params = checkpointer.restore(path / _PARAMS, sharding.abstract(target))
        _check_fingerprints(leaves, params)
    except Exception as error:
        raise ValueError(f'the network in {path} cannot be read ({type(error).__name__}: {error}). Bring '
                         'back a copy, or fit it again.') from error
    return params, meta


def check_value_meta(saved: Mapping[str, Any], current: Mapping[str, Any], allow_other: bool = False) -> None:
    """Raises ValueError when a value network does not fit what it is about to guide, in words.

    Args:
      saved: the `meta` of the value network.
      current: the same keys for what is to be guided: `reference` and `tokenizer` hashes, `support` of the
        returns, and the `sampler`, `budget` and `reward` of the roll-outs.
      allow_other: only warn of another reference, tokenizer or support.

    Another sampler, budget or reward always only warns.
    """
    for name in (*REFUSED, *WARNED):
        for side, meta in (('the saved value network', saved), ('the run', current)):
            if name not in meta:
                raise ValueError(f'{side} does not say its {name}; it must name all of '
                                 f'{", ".join((*REFUSED, *WARNED))}.')
        # As JSON, in which tuples are lists: one side has been through a file.
        if _normal(saved[name]) == _normal(current[name]):
            continue
        differ = f'the value network was fitted with {name} {saved[name]!r}, this run has {current[name]!r}'
        if name in WARNED:
            warnings.warn(f'{differ}: it still guides, but towards returns that this run does not sample.',
                          stacklevel=2)
        elif allow_other:
            warnings.warn(f'{differ}: used all the same, as asked.', stacklevel=2)
        else:
            raise ValueError(f'{differ}: its scores would mean nothing here. Use the {name} it was fitted '
                             'with, fit another value network, or allow it explicitly.')


def _read_value_file(path: epath.Path) -> tuple[dict[str, Any], _Leaves]:
    try:
        return _unseal(json.loads((path / VALUE_FILE).read_text()))
    except FileNotFoundError:
        raise ValueError(f'{path} holds no finished network: {VALUE_FILE} is missing. Give the directory of '
                         'a finished fit.') from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{path / VALUE_FILE} cannot be read ({error}). Bring back a copy, or fit the '
                         'network again.') from error


def _seal(meta: Mapping[str, Any], leaves: _Leaves) -> dict[str, Any]:
    # Normal first: JSON turns keys that are numbers into text, which sorts otherwise.
    meta = _normal(dict(meta))
    text = json.dumps([meta, leaves], sort_keys=True)
    return {'meta': meta, 'leaves': leaves, 'sha256': hashlib.sha256(text.encode()).hexdigest()}


def _unseal(sealed: dict[str, Any]) -> tuple[dict[str, Any], _Leaves]:
    meta, leaves = sealed['meta'], sealed['leaves']
    if _seal(meta, leaves)['sha256'] != sealed['sha256']:
        raise ValueError('its JSON is not what was saved')
    return meta, leaves


def _describe(tree: Any) -> _Leaves:
    """Returns shape, dtype and fingerprint of each array, by its path."""
    prints = sharding.to_host(_fingerprints(tree))
    return {
        jax.tree_util.keystr(path): {
            'shape': list(leaf.shape), 'dtype': str(leaf.dtype), 'fingerprint': int(mark)}
        for (path, leaf), mark in zip(jax.tree_util.tree_leaves_with_path(tree), prints)
    }


def _check_leaves(leaves: _Leaves, target: Any, what: str) -> None:
    """Raises ValueError, naming the first differences, when `target` has other arrays than were saved."""
    saved = {path: (tuple(leaf['shape']), leaf['dtype']) for path, leaf in leaves.items()}
    wanted = {jax.tree_util.keystr(path): (tuple(leaf.shape), str(leaf.dtype))
              for path, leaf in jax.tree_util.tree_leaves_with_path(target)}
    differ = [path for path in sorted(saved.keys() | wanted.keys()) if saved.get(path) != wanted.get(path)]
    if differ:
        lines = '; '.join(f'{path}: saved {saved.get(path, "nothing")}, wanted {wanted.get(path, "nothing")}'
                          for path in differ[:3])
        raise ValueError(f'{what} is of another network or optimizer than this config makes: '
                         f'{len(differ)} arrays differ ({lines}). Use the config it was written with, '
                         'or another directory.')


def _check_fingerprints(leaves: _Leaves, tree: Any) -> None:
    changed = [path for path, leaf in _describe(tree).items() if leaf != leaves[path]]
    if changed:
        raise ValueError(f'{len(changed)} arrays are not what was saved, the first of them {changed[0]}')


@jax.jit
def _fingerprints(tree: Any) -> list[Array]:
    """Returns one uint32 per array: a sum over its bits that no change of a single element leaves as it was.

    Integer sums are exact in any order, so the layout over devices does not matter.
    """
    return [_fingerprint(leaf) for leaf in jax.tree.leaves(tree)]


def _fingerprint(leaf: Array) -> Array:
    if leaf.dtype == jnp.bool_:
        leaf = leaf.astype(jnp.uint8)
    width = min(leaf.dtype.itemsize * 8, 32)
    bits = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f'uint{width}')).astype(jnp.uint32)
    place = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    # An odd factor is invertible modulo 2^32; one factor per place also notices a change of places.
    return jnp.sum(bits * (place * jnp.uint32(0x9E3779B1) ^ place >> 15 | jnp.uint32(1)), dtype=jnp.uint32)


def _normal(value: Any) -> Any:
    return json.loads(json.dumps(value))
