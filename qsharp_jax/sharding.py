"""Where every array lives: the mesh, and the one table from a model's logical axes to the mesh's axes.

This is the only file that knows the names of the mesh axes. Arrays that a batch runs over are split by rows
over `data` and `fsdp` together; parameters over `fsdp` and `tensor`. One device is a mesh of 1 × 1 × 1.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
import math
from typing import Any
import warnings

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

DATA, FSDP, TENSOR = AXES = ('data', 'fsdp', 'tensor')
BATCH_AXES = (DATA, FSDP)
_PART = 2 ** 23  # bytes a device of a part in `map_rows`: some of the memory on a chip

# Logical axis of a parameter -> mesh axis that it is split over (None: whole on every device).
LOGICAL_AXES: dict[str, str | None] = {
    'vocab': TENSOR,
    'embed': FSDP,
    'heads': TENSOR,
    'kv_heads': TENSOR,
    'head_dim': None,
    'mlp': TENSOR,
    'layers': None,
}

_warned: set[tuple[str, int, int]] = set()


def make_mesh(
    data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Returns a mesh with the axes `data`, `fsdp`, `tensor` over `devices` (all of them when None).

    Args:
      data: ways that a batch's rows are split while every device keeps whole parameters.
      fsdp: ways that rows and parameters are split together.
      tensor: ways that each layer's products are split.
      devices: the devices to use, in the order of the mesh.

    At most one size may be -1: it takes the devices that the others leave. Raises ValueError when the sizes
    do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = dict(zip(AXES, (data, fsdp, tensor)))
    given = ', '.join(f'{name}={size}' for name, size in sizes.items())
    count = len(devices)
    if any(size < 1 and size != -1 for size in sizes.values()):
        raise ValueError(f'mesh {given}: every size must be at least 1, or -1 for the rest of the devices.')
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise ValueError(f'mesh {given}: only one size may be -1, to take the rest of the devices.')
    fixed = int(np.prod([size for size in sizes.values() if size != -1]))
    if count % fixed or (not free and fixed != count):
        raise ValueError(
            f'mesh {given} takes {"a multiple of " if free else ""}{fixed} devices, and there are {count}: '
            f'choose sizes whose product is {count}, one of which may be -1 for the rest.'
        )
    if free:
        sizes[free[0]] = count // fixed
    # Explicit axes, the default of jax.make_mesh, refuse plain Flax layers whose contraction is split.
    auto = (jax.sharding.AxisType.Auto,) * len(AXES)
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=auto, devices=devices)


def batch_shards(mesh: Mesh) -> int:
    """Returns the number of parts that a batch's rows are split into."""
    return int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that splits the leading axis of an array over the mesh's batch axes."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that keeps an array whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def pad_rows(rows: int, mesh: Mesh) -> int:
    """Returns `rows` rounded up to the next number that splits evenly over the mesh's batch axes."""
    shards = batch_shards(mesh)
    return -(-rows // shards) * shards


def check_divisible(rows: int, mesh: Mesh, name: str = 'batch size') -> None:
    """Raises ValueError, in terms of the key `name`, unless the rows split evenly over the mesh."""
    shards = batch_shards(mesh)
    if rows % shards:
        sizes = ' x '.join(f'{axis}={mesh.shape[axis]}' for axis in BATCH_AXES)
        lower = f'{rows - rows % shards} or ' if rows > shards else ''
        raise ValueError(
            f'{name} {rows} does not split over {shards} groups of devices (mesh {sizes}): give a multiple '
            f'of {shards}, such as {lower}{pad_rows(rows, mesh)}, or a mesh with fewer groups.'
        )


def param_shardings(mesh: Mesh, logical_axes: Any, shapes: Any) -> Any:
    """Returns the tree of NamedShardings for parameters.

    Args:
      mesh: from `make_mesh`.
      logical_axes: a tree like the parameters, with a tuple or PartitionSpec of logical axis names per leaf.
        Names may be None, and trailing ones may be missing: such an axis is whole on every device.
      shapes: the parameters, or anything with their shapes (jax.ShapeDtypeStruct).

    An axis that its mesh axis does not divide is kept whole, with one warning per such axis. Raises
    ValueError for a name that the table lacks and for a parameter of which two axes would be split over one
    mesh axis.
    """
    def one(path: Any, axes: Any, leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, _partition(mesh, jax.tree_util.keystr(path), axes, leaf.shape))

    def is_axes(node: Any) -> bool:
        return node is None or isinstance(node, PartitionSpec) or (
            isinstance(node, tuple) and all(name is None or isinstance(name, str) for name in node))

    return jax.tree_util.tree_map_with_path(one, logical_axes, shapes, is_leaf=is_axes)


def _partition(mesh: Mesh, path: str, axes: Any, shape: tuple[int, ...]) -> PartitionSpec:
    axes = tuple(axes or ())
    if len(axes) > len(shape):
        raise ValueError(f'parameter {path} has {len(shape)} axes {shape}, but {len(axes)} names: {axes}.')
    spec: list[str | None] = []
    for name, size in zip(axes, shape):
        if name is not None and name not in LOGICAL_AXES:
            raise ValueError(
                f'parameter {path} names the logical axis {name!r}; known ones: {", ".join(LOGICAL_AXES)}. '
                'Add it to sharding.LOGICAL_AXES.'
            )
        axis = None if name is None else LOGICAL_AXES[name]
        if axis is not None and axis in spec:
            raise ValueError(
                f'parameter {path} with axes {axes}: two of them are split over the mesh axis {axis!r}, and '
                'only one can be. Name one of them None or map it elsewhere in sharding.LOGICAL_AXES.'
            )
        spec.append(axis)
    # Collisions are judged before this, so that whether a model is valid does not depend on the mesh's sizes.
    for i, (name, axis, size) in enumerate(zip(axes, spec, shape)):
        if axis is not None and size % mesh.shape[axis]:
            spec[i] = None
            key = (name, size, mesh.shape[axis])
            if key not in _warned:
                _warned.add(key)
                warnings.warn(
                    f'the axis {name!r} of size {size} (first seen in {path}) does not split over '
                    f'{axis}={mesh.shape[axis]}: it is kept whole on every device.', stacklevel=4)
    while spec and spec[-1] is None:
        spec.pop()
    return PartitionSpec(*spec)


def bytes_per_device(mesh: Mesh, logical_axes: Any, shapes: Any) -> float:
    """Returns the memory that parameters take on each device, in bytes. Arguments as in `param_shardings`."""
    shardings = param_shardings(mesh, logical_axes, shapes)
    sizes = jax.tree.map(
        lambda leaf, place: math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize, shapes, shardings)
    return float(sum(jax.tree.leaves(sizes)))


def born_sharded(init_fn: Callable[..., Any], mesh: Mesh, logical_axes: Any) -> Callable[..., Any]:
    """Returns `init_fn` under jit, with its parameters made where they belong: no device holds all of them.

    Args:
      init_fn: returns a plain tree of parameters; its arguments are arrays or trees of arrays.
      mesh: from `make_mesh`.
      logical_axes: as in `param_shardings`.
    """
    def init(*args: Any) -> Any:
        shardings = param_shardings(mesh, logical_axes, jax.eval_shape(init_fn, *args))
        return jax.jit(init_fn, out_shardings=shardings)(*args)

    return init


def beside_params(params: Any, tree: Any) -> Any:
    """Returns shardings for `tree`, an optimizer's state: moments beside their parameter, the rest whole.

    Args:
      params: on the devices, or their jax.ShapeDtypeStructs with shardings.
      tree: anything with shapes. A leaf whose path ends in the path of a parameter of its shape goes with it.
    """
    places = {_keys(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    whole = next(iter(places.values())).sharding
    if isinstance(whole, NamedSharding):
        whole = NamedSharding(whole.mesh, PartitionSpec())

    def place(path: Any, leaf: Any) -> jax.sharding.Sharding:
        keys = _keys(path)
        for start in range(len(keys)):
            param = places.get(keys[start:])
            if param is not None and param.shape == leaf.shape:
                return param.sharding
        return whole

    return jax.tree_util.tree_map_with_path(place, tree)


def _keys(path: Any) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((key,)) for key in path)


def shard_batch(mesh: Mesh, batch: Any) -> Any:
    """Returns `batch` on the devices, its rows split over the mesh's batch axes.

    Args:
      mesh: from `make_mesh`.
      batch: a tree of host arrays with rows as leading axis. Every process passes the same, whole batch, and
        each device is given its own rows of it, so that the batch does not depend on the number of processes.
        Arrays without axes are replicated.

    Raises ValueError when the rows do not split evenly.
    """
    split, whole = batch_sharding(mesh), replicated(mesh)

    def put(leaf: Any) -> jax.Array:
        leaf = np.asarray(leaf)
        if leaf.ndim:
            check_divisible(leaf.shape[0], mesh, 'a batch of rows')
        return _put(leaf, split if leaf.ndim else whole)

    return jax.tree.map(put, batch)


def constrain_rows(tree: Any, like: jax.Array) -> Any:
    """Returns `tree`, inside jit, with the leading axis of each array split as `shard_batch` splits rows.

    Arrays that a jitted function makes itself, or gathers from ones that are whole on every device, have no
    layout of their own, and the compiler may well keep them whole.

    Args:
      tree: of arrays with rows as leading axis. A node with an attribute `axes` (logical names, or None, of the axes
        of all its arrays) has those split as well: the keys and values of different heads are never mixed, so a
        cache lies where the heads are computed.
      like: an argument of the jitted function that tells the mesh; off a mesh, `tree` is returned as it is.
    """
    mesh = _mesh_of(like)
    if mesh is None:
        return tree

    def place(node: Any) -> Any:
        def one(leaf: jax.Array) -> jax.Array:
            _, *others = _partition(mesh, 'cache', (None, *node.axes[1:]), leaf.shape) or (None,)
            return jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, PartitionSpec(BATCH_AXES, *others)))

        if hasattr(node, 'axes'):
            return jax.tree.map(one, node)
        return jax.lax.with_sharding_constraint(node, NamedSharding(mesh, PartitionSpec(BATCH_AXES)))

    return jax.tree.map(place, tree, is_leaf=lambda node: hasattr(node, 'axes'))


def _mesh_of(array: jax.Array) -> Mesh | None:
    """Returns the mesh that an array is on, inside jit; None off a mesh."""
    mesh = jax.typeof(array).sharding.mesh
    return mesh if set(AXES) <= set(mesh.axis_names) else None


def row_shards(like: jax.Array) -> int:
    """Returns, inside jit, how many shards the rows of a batch are split into; `like` as in `constrain_rows`."""
    mesh = _mesh_of(like)
    return 1 if mesh is None else batch_shards(mesh)


def put_rows(tree: Any, rows: jax.Array, new: Any, like: jax.Array) -> Any:
    """Returns `tree`, inside jit, with some of its rows written anew; where it is given up, nothing else is.

    Args:
      tree: of arrays with rows as leading axis, split as `constrain_rows` does.
      rows: which; a number beyond the last row: none, up to K beyond. No two alike.  # [K] int32
      new: a tree like it, of K rows whose other axes may be shorter: they are put at the beginning.
      like: as in `constrain_rows`.
    """
    mesh = _mesh_of(like)
    shards = 1 if mesh is None else batch_shards(mesh)

    def put(old: jax.Array, rows: jax.Array, new: jax.Array) -> jax.Array:
        place = (rows, *(slice(size) for size in new.shape[1:]))
        return old.at[place].set(new, mode='drop', unique_indices=True)

    def one(old: jax.Array, new: jax.Array) -> jax.Array:
        if not new.size:
            return old
        if shards == 1:
            return put(old, rows, new)
        # Each device writes rows of its own: a write along the axis that is split would bring all of it to each.
        count = old.shape[0] // shards
        mine = rows[None] - count * jnp.arange(shards)[:, None]
        mine = jnp.where(mine < 0, old.shape[0] + len(rows) + jnp.arange(len(rows))[None], mine)
        split = jax.vmap(put, in_axes=(0, 0, None))(old.reshape(shards, count, *old.shape[1:]), mine, new)
        return split.reshape(old.shape)

    return constrain_rows(jax.tree.map(one, tree, new), like)


def spread_rows(array: jax.Array) -> jax.Array:
    """Returns `array`, inside jit, with its leading axis split over all devices, where it divides.

    For what is worked out for each row alone, from no parameters: devices that share the products of a row would all
    do the same. Off a mesh, `array` is returned as it is.
    """
    mesh = _mesh_of(array)
    if mesh is None:
        return array
    if array.shape[0] % mesh.size:
        return constrain_rows(array, array)
    return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, PartitionSpec(AXES)))


def map_rows(fn: Callable[..., Any], arguments: tuple[Any, ...], size: int, limit: int, spread: bool = False,
             fixed: tuple[Any, ...] = ()) -> Any:
    """Returns `fn(*arguments, *fixed)`, inside jit, worked out for some rows after the others where it is large.

    What is small enough the compiler keeps on the chip. The gradient works each part out again.

    Args:
      fn: from and to trees of arrays with rows as leading axis, in which rows do not touch.
      arguments: its arguments.
      size: bytes of what `fn` keeps in between, of all rows on all devices.
      limit: bytes a device up to which all rows are worked out at once.
      spread: whether rows are split as `spread_rows` does, not as `constrain_rows`.
      fixed: more arguments, so large that they must lie still; without a gradient.
    """
    first = jax.tree.leaves(arguments)[0]
    mesh = _mesh_of(first)
    devices, shards = (1, 1) if mesh is None else (mesh.size, batch_shards(mesh))
    rows = first.shape[0]
    if spread and rows % devices == 0:
        shards = devices
    if size <= limit * devices or rows % shards:
        return fn(*arguments, *fixed)
    most = max(rows // shards * _PART * devices // size, 1)  # rows of a device that are small enough
    count = max(number for number in range(1, most + 1) if rows // shards % number == 0)
    parts = rows // shards // count

    # In each part every device has rows of its own, so that none has to move.
    def view(leaf: jax.Array) -> jax.Array:
        return leaf.reshape(shards, parts, count, *leaf.shape[1:])

    def flat(leaf: jax.Array) -> jax.Array:
        return leaf.reshape(shards * count, *leaf.shape[2:])

    def one(part: tuple[jax.Array, Any]) -> Any:
        number, mine = part
        still = jax.tree.map(
            lambda leaf: flat(jax.lax.dynamic_index_in_dim(view(leaf), number, 1, keepdims=False)), fixed)
        return fn(*jax.tree.map(flat, mine), *still)

    split = jax.tree.map(lambda leaf: view(leaf).swapaxes(0, 1), arguments)
    done = jax.lax.map(jax.checkpoint(one), (jnp.arange(parts), split))

    def merge(leaf: jax.Array) -> jax.Array:
        return leaf.reshape(parts, shards, count, *leaf.shape[2:]).swapaxes(0, 1).reshape(rows, *leaf.shape[2:])

    return jax.tree.map(merge, done)


def constrain_last(array: jax.Array, name: str) -> jax.Array:
    """Returns `array`, inside jit, with its last axis split as the table says for a logical name; the others are free.

    A product with a large table should be left where the table's parts are: the compiler may otherwise bring the whole
    table to every device to give each a whole row of the result. Off a mesh, `array` is returned as it is.
    """
    mesh = _mesh_of(array)
    if mesh is None:
        return array
    last = _partition(mesh, name, (name,), array.shape[-1:]) or (None,)
    others = (PartitionSpec.UNCONSTRAINED,) * (array.ndim - 1)
    return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, PartitionSpec(*others, *last)))


def replicate(mesh: Mesh, tree: Any) -> Any:
    """Returns `tree` of host arrays, the same in every process, with each array whole on every device."""
    return jax.tree.map(lambda leaf: _put(np.asarray(leaf), replicated(mesh)), tree)


def shard_params(params: Any, shardings: Any) -> Any:
    """Returns host parameters, the same in every process, on the devices as `param_shardings` says."""
    return jax.tree.map(lambda leaf, sharding: _put(np.asarray(leaf), sharding), params, shardings)


def _put(leaf: np.ndarray, sharding: NamedSharding) -> jax.Array:
    if jax.process_count() == 1:
        return jax.device_put(leaf, sharding)
    # device_put would compare the value across processes first, which costs a broadcast per array.
    return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])


def to_host(tree: Any) -> Any:
    """Returns `tree` as whole numpy arrays; collective when its arrays span several processes."""
    def gather(leaf: Any) -> np.ndarray:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
            return np.asarray(leaf)
        if leaf.is_fully_replicated:
            return np.asarray(leaf.addressable_data(0))
        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))

    return jax.tree.map(gather, tree)


def wait_for_all(name: str) -> None:
    """Returns when every process has come to the place that is called so."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f'qsharp_jax.{name}')


def abstract(tree: Any, shardings: Any = None) -> Any:
    """Returns `tree` as jax.ShapeDtypeStructs with shardings: what a restore aims at, or a program is compiled for.

    Args:
      tree: of arrays, or of anything with a shape and a number type.
      shardings: of its leaves; None for those that they have.
    """
    if shardings is None:
        shardings = jax.tree.map(lambda x: x.sharding, tree)
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, shardings)
