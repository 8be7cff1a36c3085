"""How much memory the loading of a checkpoint takes beside the arrays that the devices hold.

  python -m tests.loading_memory --checkpoint=FOLDER_OR_FILE --dtype=float32 --devices=8

Prints, in bytes: the largest stored tensor in the type it is loaded in; all arrays together; and the most anonymous
memory, at any time, above that of the start and above the parts of parameters that devices held by then.
"""
from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
from pathlib import Path
import threading
import time


def anonymous() -> int:
    """Anonymous memory of this process in bytes: mapped files, which the system drops at will, are not in it."""
    lines = Path('/proc/self/status').read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith('RssAnon:'))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--checkpoint', required=True)
    parser.add_argument('--dtype', default='float32', choices=('float32', 'bfloat16'))
    parser.add_argument('--devices', type=int, default=1, choices=(1, 8))
    parser.add_argument('--scan', action='store_true', help='fill stacks of all layers')
    args = parser.parse_args()
    os.environ['XLA_FLAGS'] = f'--xla_force_host_platform_device_count={args.devices}'

    import dataclasses

    import jax
    import jax.numpy as jnp

    from qsharp_jax import sharding
    from qsharp_jax.models import pretrained, transformer
    from qsharp_jax.models.pretrained import loader

    sizes = dict(data=2, fsdp=2, tensor=2) if args.devices == 8 else {}
    mesh = sharding.make_mesh(**sizes)
    file = pretrained.open_checkpoint(args.checkpoint)
    config = dataclasses.replace(file.config, scan_layers=args.scan)
    shapes = transformer.param_shapes(config)
    shardings = sharding.param_shardings(mesh, transformer.logical_axes(config), shapes)
    jax.block_until_ready(jnp.zeros(8) + 1)

    held, put, empty, put_layer = [0], jax.device_put, loader._empty, loader.put_layer

    def counted(part: object, device: object) -> object:
        array = jax.block_until_ready(put(part, device))
        held[0] += array.nbytes
        return array

    def counted_stack(shape: tuple[int, ...], place: jax.sharding.Sharding, dtype: str) -> object:
        # Before it is there: while it is made, nothing else is.
        held[0] += mesh.size * math.prod(place.shard_shape(shape)) * jnp.dtype(dtype).itemsize
        return jax.block_until_ready(empty(shape, place, dtype))

    def uncounted_layer(*parts: object) -> object:  # it is in the stack already
        before = held[0]
        stack = put_layer(*parts)
        held[0] = before
        return stack

    jax.device_put, loader._empty, loader.put_layer = counted, counted_stack, uncounted_layer
    start, most, done = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            before = held[0]  # a part that is finished in between counts as unfinished: never too little
            most[0] = max(most[0], anonymous() - start - before)
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    params = pretrained.load_params(file, shardings, args.dtype)
    seconds = time.perf_counter() - began
    done.set()
    watcher.join()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed, and the C library keeps for another time, is not held
    after = anonymous() - start - held[0]
    largest = max(math.prod(weight.stored_shape) for weight in file.weights) * jnp.dtype(args.dtype).itemsize
    print(json.dumps({
        'largest': largest, 'held': held[0], 'most': most[0], 'ratio': round(most[0] / largest, 2), 'after': after,
        'seconds': round(seconds, 1), 'leaves': len(jax.tree.leaves(params))}))


if __name__ == '__main__':
    main()
