"""What a run shows when it is done: tables, plots, and one page with all of it."""
from __future__ import annotations

from qsharp_jax.report.html import print_results, summary, write
from qsharp_jax.report.tables import markdown, terminal

__all__ = ['markdown', 'print_results', 'summary', 'terminal', 'write']
