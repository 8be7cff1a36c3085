"""What a run shows when it is done: tables, plots, and one page with all of it."""
from __future__ import annotations

from qsharp_jax.report.html import print_results, write

__all__ = ['print_results', 'write']
