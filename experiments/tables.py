"""Results as tables: those of one run, or a table of the paper with the numbers of several runs beside its own.

  python experiments/tables.py --workdir=runs/mine
  python experiments/tables.py --table=1 --out=tables runs/gsm8k runs/math

The first prints the results of a run as Markdown, and writes its tables, plots and report.html anew. The second prints
the table, and writes it as Markdown, LaTeX, PNG and SVG; --table=fig3 is the figure of pass@1 against KL.
"""
from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from qsharp_jax import cli, report
from qsharp_jax.report import publish


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument('--workdir', type=Path, help='directory of the run, without --table')
    parser.add_argument('--table', choices=publish.NAMES, help='of the paper')
    parser.add_argument('--out', type=Path, default=Path('tables'), help='directory of what --table writes')
    parser.add_argument('workdirs', type=Path, nargs='*', help='directories of runs, with --table')
    args = parser.parse_args(argv)
    if (args.table is None) == (args.workdir is None) or args.workdirs and args.table is None:
        parser.error('give --workdir=WORKDIR, or --table=NUMBER and work directories')
    if args.table is None:
        report.print_results(args.workdir, markdown=True)
    else:
        print(publish.write(args.table, args.workdirs, args.out))
        print(f'Files: {args.out}')


if __name__ == '__main__':
    cli.main(main)
