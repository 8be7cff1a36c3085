"""Prints the results of a run as Markdown, and writes its tables, plots and report.html anew.

  python experiments/tables.py --workdir=runs/mine
"""
from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from qsharp_jax import cli, report


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument('--workdir', type=Path, required=True, help='directory of the run')
    args = parser.parse_args(argv)
    report.print_results(args.workdir, markdown=True)


if __name__ == '__main__':
    cli.main(main)
