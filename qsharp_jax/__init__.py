"""Q#: a frozen language model, guided by the learned distribution of its own returns."""
from __future__ import annotations

__version__ = '0.1.0'
