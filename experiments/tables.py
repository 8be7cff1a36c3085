"""Results as tables: those of one run, or a table of the paper with the numbers of several runs beside its own.

  python experiments/tables.py --workdir=runs/mine
  python experiments/tables.py --table=1 --out=tables runs/gsm8k runs/math
  python experiments/tables.py --figure=star_graph --out=tables runs/star_graph

The first prints the results of a run as Markdown, and writes its tables, plots and report.html anew. The second prints
the table, and writes it as Markdown, LaTeX, PNG and SVG; --table=fig3 is the figure of pass@1 against KL. The third
prints what every method reaches on star graphs, draws it as PNG and SVG, and writes star_graph.json, which stands for
the runs where these are not: --figure=star_graph path/to/star_graph.json
"""
from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from qsharp_jax import cli, report, star_graph_records
from qsharp_jax.report import publish


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument('--workdir', type=Path, help='directory of the run, by itself')
    parser.add_argument('--table', choices=publish.NAMES, help='of the paper')
    parser.add_argument('--figure', choices=(star_graph_records.NAME,), help='of the paper, section 3')
    parser.add_argument('--out', type=Path, default=Path('tables'), help='directory of what is written of several runs')
    parser.add_argument('workdirs', type=Path, nargs='*',
                        help='directories of runs, with --table or --figure; with --figure also a star_graph.json')
    args = parser.parse_args(argv)
    if sum(given is not None for given in (args.table, args.figure, args.workdir)) != 1 or (
            args.workdirs and args.workdir is not None):
        parser.error('give --workdir=WORKDIR, or --table=NUMBER or --figure=star_graph and work directories')
    if args.workdir is not None:
        report.print_results(args.workdir, markdown=True)
    elif args.figure is not None:
        print(star_graph_records.write(args.workdirs, args.out))
        print(f'Files: {args.out}')
    else:
        from qsharp_jax import reproduce  # after the command line is known to be right: it takes seconds to import
        print(reproduce.table(args.table, args.workdirs, args.out))
        print(f'Files: {args.out}')


if __name__ == '__main__':
    cli.main(main)
