"""TPUs that are not there: devices of a named topology to compile for, and what their makers publish about them.

The compiler comes in the package libtpu and runs on any CPU. Nothing can be executed on these devices.
"""
from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re

import jax
from jax.experimental import topologies


@dataclasses.dataclass(frozen=True)
class Generation:
    """One kind of TPU, in figures a chip. Source: cloud.google.com/tpu/docs, the page of each version.

    Attributes:
      accelerator: begins the name of the accelerator type.
      units: the name goes on with this many times the number of chips: some count cores.
      cores: devices a chip that JAX shows.
      dimensions: numbers in a topology.
      memory: high-bandwidth memory, in bytes.
      flops: bfloat16 operations a second.
      bandwidth: of that memory, in bytes a second.
    """

    accelerator: str
    units: int
    cores: int
    dimensions: int
    memory: float
    flops: float
    bandwidth: float


GENERATIONS = {
    'v4': Generation('v4', 2, 2, 3, 32 * 2 ** 30, 275e12, 1228e9),
    'v5e': Generation('v5litepod', 1, 1, 2, 16 * 2 ** 30, 197e12, 819e9),
    'v5p': Generation('v5p', 2, 1, 3, 95 * 2 ** 30, 459e12, 2765e9),
    'v6e': Generation('v6e', 1, 1, 2, 32 * 2 ** 30, 918e12, 1640e9),
    'tpu7x': Generation('tpu7x', 2, 2, 3, 192 * 2 ** 30, 2307e12, 7380e9),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A named arrangement of chips.

    Attributes:
      name: such as 'v5e:4x4'.
      generation: of its chips.
      shape: chips along each axis.
    """

    name: str
    generation: Generation
    shape: tuple[int, ...]

    @property
    def chips(self) -> int:
        """How many there are."""
        return math.prod(self.shape)

    @property
    def environment(self) -> dict[str, str]:
        """What libtpu asks the environment for where no TPU tells it."""
        return {
            'TPU_ACCELERATOR_TYPE': f'{self.generation.accelerator}-{self.generation.units * self.chips}',
            'TPU_WORKER_HOSTNAMES': 'localhost',
            # Otherwise it looks for a server that only machines with TPUs have.
            'TPU_SKIP_MDS_QUERY': '1',
            # Compilers, unlike programs, may run side by side on one machine.
            'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
        }

    @property
    def flops(self) -> float:
        """Peak bfloat16 operations a second of one device."""
        return self.generation.flops / self.generation.cores

    @property
    def bandwidth(self) -> float:
        """Bytes a second between one device and its memory."""
        return self.generation.bandwidth / self.generation.cores


def parse(name: str) -> Topology:
    """Returns the topology that a name such as 'v5e:4x4' or 'v5p:2x2x2' stands for.

    Raises:
      ValueError: there is no such kind of TPU, or the numbers are not chips along its axes; with what is allowed.
    """
    kind, _, size = name.partition(':')
    examples = {kind: f'{kind}:{"x".join("2" * generation.dimensions)}' for kind, generation in GENERATIONS.items()}
    if kind not in GENERATIONS:
        raise ValueError(f'--topology is {name!r}; the kinds of TPU are {", ".join(GENERATIONS)}, and a topology is '
                         f'written as {", ".join(examples.values())}.')
    generation = GENERATIONS[kind]
    if not re.fullmatch(r'x'.join([r'[1-9]\d*'] * generation.dimensions), size):
        raise ValueError(f'--topology is {name!r}; of {kind} it is written as {generation.dimensions} numbers of '
                         f'chips, such as {examples[kind]}.')
    return Topology(name, generation, tuple(map(int, size.split('x'))))


def devices(topology: Topology) -> list[jax.Device]:
    """Returns the devices of a topology, for a mesh to compile for. Everything else stays on this machine's CPU.

    Raises:
      ValueError: libtpu is not installed, or does not know this arrangement of chips.
    """
    if importlib.util.find_spec('libtpu') is None:
        raise ValueError('--topology needs the TPU compiler, the package libtpu: run pip install -e ".[tpu]" '
                         'in the folder of this project.')
    os.environ.update(topology.environment)
    # With libtpu installed JAX would look for a TPU of this machine's own; read when JAX makes its first array.
    os.environ['JAX_PLATFORMS'] = 'cpu'
    jax.config.update('jax_platforms', 'cpu')
    options = {}
    if topology.chips == 1:  # less than the host that libtpu expects
        options['chips_per_host_bounds'] = topology.shape + (1,) * (3 - len(topology.shape))
    try:
        found = topologies.get_topology_desc(platform='tpu', topology_name=topology.name, **options)
    except jax.errors.JaxRuntimeError as error:
        if 'INVALID_ARGUMENT' not in str(error):
            raise
        raise ValueError(f'--topology {topology.name}: libtpu knows no such arrangement of chips ({error}). Sides are '
                         'usually 1 (a single chip) or multiples of 2, such as 2x2, 2x4, 4x4, 4x8.') from error
    return list(found.devices)
