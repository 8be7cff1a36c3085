# flake8: noqa: E501 (programs as XLA writes them)
"""Bytes that a program moves, counted by hand in programs written by hand, and in ones that XLA made."""
from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest

from qsharp_jax import hlo
from qsharp_jax.hlo import Program

# Arrays in the memory of the device, but x and ids on the chip.
ARRAYS = {
    '<layers>': '(<i>, <w>, <x>, <c>)',
    '<state>': '(<w>, <x>, <c>, <h>, <ids>)',
    '<w>': 'bf16[3,256,512]{2,1,0:T(8,128)(2,1)}',
    '<x>': 'bf16[8,256]{1,0:T(8,128)(2,1)S(1)}',
    '<c>': 'bf16[64,512]{1,0:T(8,128)(2,1)}',
    '<h>': 'bf16[1000,512]{1,0:T(8,128)(2,1)}',
    '<ids>': 's32[4]{0:T(128)S(1)}',
    '<law>': 'f32[8,1000]{1,0:T(8,128)}',
    '<i>': 's32[]{:T(128)S(6)}',
}
# A decode loop of three layers in small. Of each layer of w one slice is multiplied with x, which stays on the chip;
# the cache gets one row in place; the head comes to the chip by a copy.
TEXT = '''HloModule decode

%product (...) -> ... {
  %p.0 = <w> parameter(0)
  %p.1 = <x> parameter(1)
  %p.2 = <i> parameter(2)
  %zero = <i> constant(0)
  %layer = bf16[256,512]{1,0:T(8,128)(2,1)} fusion(%p.0, %p.2), kind=kLoop, calls=%sliced
  ROOT %dot = bf16[8,512]{1,0:T(8,128)(2,1)S(1)} convolution(%p.1, %layer), dim_labels=bf_io->bf
}

%sliced (...) -> ... {
  %s.0 = <w> parameter(0)
  %s.1 = <i> parameter(1)
  %none = <i> constant(0)
  %slice = bf16[1,256,512]{2,1,0:T(8,128)(2,1)} dynamic-slice(%s.0, %s.1, %none, /*index=3*/%none)
  ROOT %flat = bf16[256,512]{1,0:T(8,128)(2,1)} bitcast(%slice)
}

%written (...) -> ... {
  %u.0 = <c> parameter(0)
  %u.1 = bf16[1,512]{1,0:T(2,128)(2,1)S(1)} parameter(1)
  %u.2 = <i> parameter(2)
  %left = <i> constant(0)
  ROOT %update = <c> dynamic-update-slice(%u.0, %u.1, %u.2, %left)
}

%layers (...) -> ... {
  %l = <layers> parameter(0)
  %i = <i> get-tuple-element(%l), index=0
  %w = <w> get-tuple-element(%l), index=1
  %x = <x> get-tuple-element(%l), index=2
  %c = <c> get-tuple-element(%l), index=3
  %one = <i> constant(1)
  %next = <i> add(%i, %one)
  %y = bf16[8,512]{1,0:T(8,128)(2,1)S(1)} fusion(%w, %x, %i), kind=kOutput, calls=%product
  %row = bf16[1,512]{1,0:T(2,128)(2,1)S(1)} slice(%y), slice={[0:1], [0:512]}
  %put = <c> fusion(%c, %row, %i), kind=kLoop, calls=%written
  ROOT %all = <layers> tuple(%next, %w, %x, %put)
}

%more (...) -> ... {
  %m = <layers> parameter(0)
  %count = <i> get-tuple-element(%m), index=0
  %three = <i> constant(3)
  ROOT %less = pred[]{:T(512)} compare(%count, %three), direction=LT
}

%cheap (...) -> ... {
  ROOT %d = <law> parameter(0)
}

%dear (...) -> ... {
  %e = <law> parameter(0)
  ROOT %exp = <law> exponential(%e)
}

%step (...) -> ... {
  %t = <state> parameter(0)
  %tw = <w> get-tuple-element(%t), index=0
  %tx = <x> get-tuple-element(%t), index=1
  %tc = <c> get-tuple-element(%t), index=2
  %th = <h> get-tuple-element(%t), index=3
  %ti = <ids> get-tuple-element(%t), index=4
  %nought = <i> constant(0)
  %start = (bf16[1000,512]{1,0:T(8,128)(2,1)S(1)}, <h>, u32[]{:S(2)}) copy-start(%th)
  %in = <layers> tuple(%nought, %tw, %tx, %tc)
  %loop = <layers> while(%in), condition=%more, body=%layers
  %new = <c> get-tuple-element(%loop), index=3
  %done = bf16[1000,512]{1,0:T(8,128)(2,1)S(1)} copy-done(%start)
  %twice = bf16[8,512]{1,0:T(8,128)(2,1)S(1)} concatenate(%tx, %tx), dimensions={1}
  %logits = <law> convolution(%twice, %done), dim_labels=bf_oi->bf
  %law = <law> conditional(%nought, %logits, %logits), branch_computations={%cheap, %dear}
  %rows = bf16[4,512]{1,0:T(4,128)(2,1)S(1)} gather(%th, %ti), offset_dims={1}, slice_sizes={1,512}
  ROOT %out = <state> tuple(%tw, %tx, %new, %th, %ti)
}

%unfinished (...) -> ... {
  %f = <state> parameter(0)
  %fi = <ids> get-tuple-element(%f), index=4
  ROOT %any = pred[]{:T(512)S(6)} custom-call(%fi), custom_call_target="Any"
}

ENTRY %main (...) -> ... {
  %a = <w> parameter(0)
  %b = <x> parameter(1)
  %g = <c> parameter(2)
  %h = <h> parameter(3)
  %k = <ids> parameter(4)
  %other = <c> copy(%g)
  %begin = <state> tuple(%a, %b, %other, %h, %k)
  %end = <state> while(%begin), condition=%unfinished, body=%step
  ROOT %last = <c> get-tuple-element(%end), index=2
}
'''
LOOP = functools.reduce(lambda text, array: text.replace(*array), ARRAYS.items(), TEXT)


def test_a_step_is_counted_as_by_hand() -> None:
    layers = 3 * 256 * 512 * 2  # each slice of w once: x, products and rows are on the chip
    rows = 3 * 2 * 8 * 512 * 2  # the tiles that a row of the cache lies in, read and written, in each layer
    head = 1000 * 512 * 2  # by the copy alone
    logits, law = 8 * 1024 * 4, 2 * 8 * 1024 * 4  # whole tiles; the dearer branch
    tokens = 4 * 8 * 512 * 2  # the tiles that four rows of the table lie in
    program = Program(LOOP)
    assert program.step().flops == 3 * 2 * 8 * 256 * 512 + 2 * 8 * 512 * 1000
    assert program.step().bytes == layers + rows + head + logits + law + tokens
    assert program.run().bytes == program.step().bytes + 2 * 64 * 512 * 2  # and a copy as it begins


@pytest.mark.parametrize('old, new, more', [
    ('%p.1 = bf16[8,256]{1,0:T(8,128)(2,1)S(1)}', '%p.1 = bf16[8,256]{1,0:T(8,128)(2,1)}', 0),
    ('constant(3)', 'constant(5)', 2 * (256 * 512 * 2 + 2 * 8 * 512 * 2)),
    ('constant(1)', 'constant(2)', -256 * 512 * 2 - 2 * 8 * 512 * 2),
    ('dynamic-slice(%s.0', 'negate(%s.0', 3 * 2 * 256 * 512 * 2),
    ('%dear}', '%cheap}', -2 * 8 * 1024 * 4),
], ids=['what a caller says is on the chip', 'trips', 'stride', 'no slice', 'branches'])
def test_each_part_counts_for_itself(old: str, new: str, more: int) -> None:
    assert old in LOOP
    assert Program(LOOP.replace(old, new)).step().bytes - Program(LOOP).step().bytes == more


def test_a_program_without_such_a_loop_has_no_step() -> None:
    with pytest.raises(ValueError, match='has 0 loops whose end is not a constant'):
        Program(LOOP.replace('custom-call(%fi), custom_call_target="Any"',
                             'compare(%fi, %fl), direction=LT').replace(
                                 '  ROOT %any', '  %fl = s32[]{:T(128)} constant(7)\n  ROOT %any')).step()


def test_xla_s_own_programs_are_read() -> None:
    """On CPU everything is in one memory, and layouts have no tiles."""

    @jax.jit
    def product(stack: jax.Array, x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, layer: (jnp.tanh(x @ layer), None), x, stack)[0]

    stack, x = jnp.ones((5, 64, 64)), jnp.ones((8, 64))
    run = Program(product.lower(stack, x).compile().as_text()).run()
    read = [move for move in run.moves if move.bytes * move.times >= stack.nbytes]
    assert read and all(move.times == 5 for move in read)
    assert stack.nbytes <= run.bytes < 4 * stack.nbytes
    assert (run.flops, run.again) == (5 * 2 * 8 * 64 * 64, 0)


@pytest.mark.parametrize('text, size, space', [
    ('bf16[64,1,2048,64]{3,2,1,0:T(8,128)(2,1)}', 64 * 2048 * 128 * 2, 0),
    ('bf16[64,1,2048,64]{2,3,1,0:T(8,128)(2,1)}', 64 * 2048 * 64 * 2, 0),
    ('f32[100]{0:T(1024)}', 4096, 0), ('pred[64,1000]{1,0:T(8,128)(4,1)S(1)}', 64 * 1024, 1),
    ('f32[3,5]{1,0}', 60, 0), ('s32[]', 4, 0)])
def test_arrays_take_whole_tiles_in_their_order(text: str, size: int, space: int) -> None:
    found, = hlo._instruction('x', f'{text} parameter(0)').shapes
    assert (found.bytes, found.space) == (size, space)


@pytest.mark.parametrize('left, right, result, window, labels, count', [
    # A batch of 64 products, as one convolution along an axis with gaps.
    ((64, 8, 128), (64, 128, 256), '64,8,256', 'size=64 stride=63 lhs_dilate=64', '0bf_0io->0bf', 64 * 8 * 128 * 256),
    # One place with each of four, over borders that cost nothing.
    ((64, 1, 128), (128, 32, 4), '64,4,32', 'size=4 pad=3_3 rhs_reversal=1', 'b0f_io0->b0f', 64 * 128 * 4 * 32),
    # Three places summed up.
    ((8, 3, 128), (3, 128, 32), '8,32,1', 'size=3', 'b0f_0io->bf0', 8 * 3 * 128 * 32)])
def test_products_are_counted_in_what_tpus_make_of_them(left, right, result, window, labels, count) -> None:
    found = hlo._instruction('y', f'f32[{result}] convolution(%a, %b), window={{{window}}}, dim_labels={labels}')
    assert hlo._convolution(found, left, right) == count
