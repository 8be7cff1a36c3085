"""Writing answers: prefill, one guided step, the loop, going back to a cut, and rows that are filled again."""
from qsharp_jax.decoding.candidates import Guidance
from qsharp_jax.decoding.loop import decode
from qsharp_jax.decoding.refill import advance, Answering, Answers, Block, Orders, Pool, prefill, refill, Task, vacant
from qsharp_jax.decoding.state import DecodeState, is_eos, keys_of, prefix, rewind, stage_keys, start, unit_keys
from qsharp_jax.decoding.step import step

__all__ = ['Answering', 'Answers', 'Block', 'DecodeState', 'Guidance', 'Orders', 'Pool', 'Task', 'advance', 'decode',
           'is_eos', 'keys_of', 'prefill', 'prefix', 'refill', 'rewind', 'stage_keys', 'start', 'step', 'unit_keys',
           'vacant']
