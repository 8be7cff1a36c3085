"""Writing answers: prefill, one guided step, the loop, and going back to a cut."""
from qsharp_jax.decoding.loop import decode
from qsharp_jax.decoding.state import DecodeState, is_eos, rewind, start, unit_keys
from qsharp_jax.decoding.step import Guidance, step

__all__ = ['DecodeState', 'Guidance', 'decode', 'is_eos', 'rewind', 'start', 'step', 'unit_keys']
