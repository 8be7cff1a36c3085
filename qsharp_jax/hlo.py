"""What a compiled program computes and moves on a device, read off the instructions that XLA made of it.

XLA's own cost analysis counts the body of a loop once, every branch of a condition, and what only passes between
arithmetic and the memory on the chip. Here, of the optimised program as text:

- an operand or a result counts if it lies in the device's memory, at the size of its tiles; one that lies on the chip,
  in another memory space, does not, and what copies it there counts once;
- a fusion reads whole operands, or the slices that it takes of them, and writes results whole, or only the part that
  it updates in place;
- a loop counts as often as it runs. One whose end is not a constant counts as one pass;
- of the branches of a condition, the one that moves most counts.

That a product reads an operand once is an assumption: it holds where all of its rows are at work at once, as in a
decode step.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
import dataclasses
import functools
import math
import re

_BITS = {'pred': 8, 's4': 4, 'u4': 4, 'c64': 64, 'c128': 128, 'token': 0, 'opaque': 0}
_FREE = frozenset(('parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'after-all', 'partition-id',
                   'replica-id', 'opt-barrier', 'async-update', 'add-dependency'))
_FREE_CALLS = ('ConcatBitcast', 'AllocateBuffer', 'AssumeGatherIndicesInBound')  # names for memory, no work
_SLICES = ('dynamic-slice', 'slice', 'gather')
_UPDATES = ('dynamic-update-slice', 'scatter')

_COMPUTATION = re.compile(r'(?:ENTRY )?%?([\w.-]+) \(.*\{$')
_INSTRUCTION = re.compile(r'\s*(ROOT )?%?([\w.-]+) = (.*)$')
_SHAPE = re.compile(r'([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?')
_NAME = re.compile(r'%([\w.-]+)')


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array of a program.

    Attributes:
      bits: of an element.
      sizes: of its axes.
      order: the axes from the one that lies closest together.
      tile: the block that the last axes, as they lie, are filled up to.
      space: the memory that it is in; 0 is the device's.
    """

    bits: int
    sizes: tuple[int, ...]
    order: tuple[int, ...]
    tile: tuple[int, ...]
    space: int

    @property
    def bytes(self) -> int:
        """What it takes, whole tiles."""
        sizes = [self.sizes[axis] for axis in self.order]
        for place, block in enumerate(reversed(self.tile)):
            if place < len(sizes):
                sizes[place] = -(-sizes[place] // block) * block
        return math.prod(sizes) * self.bits // 8

    @property
    def moved(self) -> int:
        """The same if it is in the device's memory, else 0."""
        return self.bytes if self.space == 0 else 0

    def window(self, sizes: Sequence[int]) -> int:
        """Returns the bytes of a window of these sizes on it, 0 if it is not in the device's memory."""
        return dataclasses.replace(self, sizes=tuple(sizes)).moved


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation: its name, the arrays of its result, what it is, its operands' names, and the rest."""

    name: str
    shapes: tuple[Shape, ...]
    opcode: str
    operands: tuple[str, ...]
    rest: str

    def numbers(self, key: str) -> tuple[int, ...]:
        """Returns the numbers of an attribute such as `slice_sizes={1,4096}`."""
        found = re.search(rf'\b{key}=\{{([\d,]*)\}}', self.rest)
        return _numbers(found[1]) if found else ()

    def called(self, key: str) -> str:
        """Returns the name of a computation that an attribute gives, '' if it gives none."""
        found = re.search(rf'\b{key}=%?([\w.-]+)', self.rest)
        return found[1] if found else ''


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions by name, in order, and which of them is the result."""

    instructions: dict[str, Instruction]
    root: str

    @functools.cached_property
    def parameters(self) -> dict[int, str]:
        """Names of the parameters by number."""
        return {int(re.match(r'\d+', found.rest)[0]): found.name  # type: ignore[index]
                for found in self.instructions.values() if found.opcode == 'parameter'}

    @functools.cached_property
    def users(self) -> dict[str, list[tuple[Instruction, int]]]:
        """Of each instruction those that read it, and as which operand."""
        found: dict[str, list[tuple[Instruction, int]]] = {}
        for user in self.instructions.values():
            for place, name in enumerate(user.operands):
                found.setdefault(name, []).append((user, place))
        return found


@dataclasses.dataclass(frozen=True)
class Move:
    """What one instruction moves between the device and its memory.

    Attributes:
      instruction: which.
      bytes: each time.
      times: how often it runs.
    """

    instruction: Instruction
    bytes: int
    times: int


@dataclasses.dataclass(frozen=True)
class Run:
    """What a program does on one device.

    Attributes:
      moves: between the device and its memory, by instruction.
      flops: operations of its products; what is done number by number is left out.
      again: the part of them that a gradient repeats to save memory.
    """

    moves: tuple[Move, ...]
    flops: int
    again: int

    @property
    def bytes(self) -> int:
        """Of all moves."""
        return sum(move.bytes * move.times for move in self.moves)


Executed = tuple[Computation, Instruction, int]


class Program:
    """A compiled program, of `jax.stages.Compiled.as_text`."""

    def __init__(self, text: str) -> None:
        """`text` is the optimised program."""
        self.computations: dict[str, Computation] = {}
        name, entry, root = '', '', ''
        lines: dict[str, Instruction] = {}
        for line in text.splitlines():
            header = _COMPUTATION.fullmatch(line)
            if header:
                name, root, lines = header[1], '', {}
                entry = name if line.startswith('ENTRY') else entry
            elif line.startswith('}'):
                self.computations[name] = Computation(lines, root)
            elif name and (found := _INSTRUCTION.match(line)):
                lines[found[2]] = _instruction(found[2], found[3])
                root = found[2] if found[1] else root
        self.entry = self.computations[entry]

    def run(self) -> Run:
        """Returns what the whole program does."""
        return self._run(self._executed(self.entry, 1))

    def step(self) -> Run:
        """Returns what one pass of the program's own loop does: of the one that ends when its data say so.

        Raises:
          ValueError: it has none, or several.
        """
        loops = [found for found in self.entry.instructions.values()
                 if found.opcode == 'while' and self._trips(found) is None]
        if len(loops) != 1:
            raise ValueError(f'the program has {len(loops)} loops whose end is not a constant, and not one.')
        return self._run(self._loop(loops[0], 1))

    def gathered(self) -> list[int]:
        """Returns the bytes that each instruction brings from other devices, by all-gather or all-to-all."""
        return [sum(shape.bytes for shape in found.shapes) for computation in self.computations.values()
                for found in computation.instructions.values()
                if found.opcode.removesuffix('-start') in ('all-gather', 'all-to-all', 'collective-permute')]

    def _run(self, executed: Iterator[Executed]) -> Run:
        moves, flops, again = [], 0, 0
        for computation, found, times in executed:
            if size := self._bytes(computation, found):
                moves.append(Move(found, size, times))
            for product, count in self._products(computation, found):
                flops += times * count
                again += times * count * ('rematted_computation' in product.rest)
        return Run(tuple(moves), flops, again)

    def _executed(self, computation: Computation, times: int) -> Iterator[Executed]:
        """Yields instructions with the computation that they are in and how often they run."""
        for found in computation.instructions.values():
            if found.opcode == 'while':
                yield from self._loop(found, times)
            elif found.opcode == 'conditional':
                names = re.search(r'branch_computations=\{([^}]*)\}', found.rest)
                branches = _NAME.findall(names[1]) if names else [
                    found.called(f'{which}_computation') for which in ('true', 'false')]
                several = [list(self._executed(self.computations[name], times)) for name in branches]
                yield from max(several, key=lambda branch: self._run(iter(branch)).bytes)
            elif found.opcode in ('call', 'async-start'):
                name = found.called('calls') or found.called('to_apply')
                yield from self._executed(self.computations[name], times)
            else:
                yield computation, found, times

    def _loop(self, loop: Instruction, times: int) -> Iterator[Executed]:
        times *= 1 if (trips := self._trips(loop)) is None else trips
        yield from self._executed(self.computations[loop.called('body')], times)

    def _products(self, computation: Computation, found: Instruction) -> Iterator[tuple[Instruction, int]]:
        """Yields the products that an instruction is or holds, and the operations of each."""
        if found.opcode == 'fusion':
            inside = self.computations[found.called('calls')]
            for part in inside.instructions.values():
                yield from self._products(inside, part)
        elif found.opcode in ('convolution', 'dot'):
            left, right = (computation.instructions[name].shapes[0].sizes for name in found.operands[:2])
            yield found, 2 * (_convolution if found.opcode == 'convolution' else _dot)(found, left, right)

    def _trips(self, loop: Instruction) -> int | None:
        """Returns how often a loop runs that counts from 0 to a constant; None for others."""
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest)
        if known:
            return int(known[1])
        condition, body = (self.computations[loop.called(key)] for key in ('condition', 'body'))
        end = condition.instructions[condition.root]
        limit = _constant(condition, end.operands[-1])
        if 'direction=LT' not in end.rest or limit is None:
            return None
        number = re.search(r'index=(\d+)', condition.instructions[end.operands[0]].rest)
        counted = body.instructions[body.instructions[body.root].operands[int(number[1]) if number else 0]]
        step = _constant(body, counted.operands[-1]) if counted.opcode == 'add' else None
        return -(-limit // (step or 1))

    def _bytes(self, computation: Computation, found: Instruction) -> int:
        """Returns what an instruction that is no loop, condition or call moves."""
        if found.opcode in _FREE or found.opcode.endswith('-done') or found.called('custom_call_target') in _FREE_CALLS:
            return 0
        if found.opcode in ('copy-start', 'slice-start'):
            one, other = found.shapes[:2]
            size = min(one.bytes, other.bytes)
            return size * ((one.space == 0) + (other.space == 0))
        if found.opcode == 'fusion':
            inside = self.computations[found.called('calls')]
            read = sum(self._read(inside, place, shape) for place, shape in self._operands(computation, found))
            return read + self._written(inside, inside.root)
        if found.opcode in _SLICES:
            return self._sliced(computation, found) + sum(shape.moved for shape in found.shapes)
        if found.opcode in _UPDATES:
            return 2 * self._updated(computation, found)
        return sum(shape.moved for shape in found.shapes) + sum(
            shape.moved for _, shape in self._operands(computation, found))

    def _operands(self, computation: Computation, found: Instruction) -> Iterator[tuple[int, Shape]]:
        """Yields operands that are arrays, with their places; one that is given twice is read once."""
        for place, name in enumerate(found.operands):
            shapes = computation.instructions[name].shapes
            if len(shapes) == 1 and (found.opcode == 'fusion' or name not in found.operands[:place]):
                yield place, shapes[0]

    def _read(self, inside: Computation, place: int, whole: Shape) -> int:
        """Returns what a fusion reads of an operand."""
        return 0 if whole.space else min(whole.moved, self._read_by(inside, inside.parameters[place], whole)[0])

    def _read_by(self, inside: Computation, name: str, whole: Shape) -> tuple[int, bool]:
        """Returns what is read of an array that a fusion has under this name, and whether it is itself the result."""
        size, given = 0, name == inside.root
        for user, place in inside.users.get(name, ()):
            passed = user.opcode == 'bitcast'
            if user.opcode in _SLICES and place == 0:
                size += self._sliced(inside, user)
            elif user.opcode in _UPDATES and place == 0:
                size += self._updated(inside, user)  # a part of a tile is read before it is written
            elif user.opcode == 'fusion':
                called = self.computations[user.called('calls')]
                part, passed = self._read_by(called, called.parameters[place], whole)
                size += part
            elif not passed:
                return whole.moved, given
            if passed:
                part, again = self._read_by(inside, user.name, whole)
                size, given = size + part, given or again
        return size, given

    def _written(self, inside: Computation, name: str) -> int:
        """Returns what a fusion writes, from its result back."""
        found = inside.instructions[name]
        if found.opcode == 'tuple':
            return sum(self._written(inside, part) for part in found.operands)
        if found.shapes[0].space:
            return 0
        if found.opcode == 'bitcast':
            return self._written(inside, found.operands[0])
        if found.opcode == 'fusion':
            called = self.computations[found.called('calls')]
            return self._written(called, called.root)
        return self._updated(inside, found) if found.opcode in _UPDATES else found.shapes[0].moved

    def _sliced(self, computation: Computation, found: Instruction) -> int:
        """Returns the bytes of the slices that an instruction takes."""
        source, = computation.instructions[found.operands[0]].shapes
        if found.opcode != 'gather':
            return source.window(found.shapes[0].sizes)
        sizes = found.numbers('slice_sizes')
        return source.window(sizes) * (math.prod(found.shapes[0].sizes) // math.prod(sizes))

    def _updated(self, computation: Computation, found: Instruction) -> int:
        """Returns the bytes of the part that an instruction updates in place."""
        target = found.shapes[0]
        if found.opcode != 'scatter':
            return target.window(computation.instructions[found.operands[1]].shapes[0].sizes)
        update, = computation.instructions[found.operands[-1]].shapes
        inserted, given = found.numbers('inserted_window_dims'), found.numbers('update_window_dims')
        sizes = iter([update.sizes[axis] for axis in given])
        window = [1 if axis in inserted else next(sizes) for axis in range(len(target.sizes))]
        return target.window(window) * (math.prod(update.sizes) // math.prod(window))


def _dot(found: Instruction, left: tuple[int, ...], right: tuple[int, ...]) -> int:
    """Returns the multiplications of a product."""
    return math.prod(found.shapes[0].sizes) * math.prod(left[axis] for axis in found.numbers('lhs_contracting_dims'))


def _convolution(found: Instruction, left: tuple[int, ...], right: tuple[int, ...]) -> int:
    """Returns the multiplications of a convolution, which is what products are on TPU; gaps and borders cost none."""
    names = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', found.rest)
    assert names is not None, found.rest
    result = dict(zip(names[3], found.shapes[0].sizes))
    count = dict(zip(names[1], left))['b'] * result['f'] * dict(zip(names[2], right))['i']
    for place, axis in enumerate(sorted(set(names[1]) - set('bf'))):
        def number(key: str, default: str) -> str:
            given = re.search(rf'window=\{{[^}}]*\b{key}=([\w.-]+)', found.rest)
            return given[1].split('x')[place] if given else default

        size, stride, pad = int(number('size', '1')), int(number('stride', '1')), int(number('pad', '0').split('_')[0])
        gap, step = int(number('lhs_dilate', '1')), int(number('rhs_dilate', '1'))
        end = gap * (dict(zip(names[1], left))[axis] - 1)
        places = (stride * there + step * here - pad for there in range(result[axis]) for here in range(size))
        count *= sum(0 <= at <= end and at % gap == 0 for at in places)
    return count


def _constant(computation: Computation, name: str) -> int | None:
    """Returns the whole number that an instruction is, None if it is no such constant."""
    found = computation.instructions[name]
    number = re.match(r'(\d+)\)', found.rest) if found.opcode == 'constant' else None
    return int(number[1]) if number else None


def _instruction(name: str, text: str) -> Instruction:
    end = _closing(text, 0) if text.startswith('(') else text.index(' ')
    kind, rest = text[:end + 1], text[end + 1:].lstrip()
    opcode, _, rest = rest.partition('(')
    end = _closing('(' + rest, 0) - 1
    return Instruction(name, tuple(_shape(found) for found in _SHAPE.finditer(kind)), opcode,
                       tuple(_NAME.findall(rest[:end])), rest)


def _closing(text: str, start: int) -> int:
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] == '(') - (text[place] == ')')
        if depth == 0:
            return place
    raise ValueError(f'no bracket closes {text[start:start + 80]!r}.')


def _shape(found: re.Match[str]) -> Shape:
    kind, sizes, layout = found[1], _numbers(found[2]), found[3] or ''
    order = _numbers(layout.partition(':')[0]) or tuple(reversed(range(len(sizes))))
    tile, space = re.search(r'T\(([\d,]+)\)', layout), re.search(r'S\((\d+)\)', layout)
    bits = _BITS.get(kind) or int(re.search(r'\d+', kind)[0])  # type: ignore[index]
    return Shape(bits, sizes, order, _numbers(tile[1]) if tile else (), int(space[1]) if space else 0)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, filter(None, text.split(','))))
