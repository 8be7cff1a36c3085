r"""Reproduces a table or figure of the paper: plans its runs, shows what is done, runs what is missing, and makes it.

  python experiments/reproduce.py --table=4 --size=small
  python experiments/reproduce.py --table=1 --size=small --run \
    --config.reference.source=path/to/model --config.task.gsm8k.folder=path/to/gsm8k
  python experiments/reproduce.py --figure=star_graph --size=small --run

Without --run nothing is computed: the plan is printed, and the table of what there is. With it, the same command goes
on where it was stopped. Keys are for all runs of the plan. See docs/reproduce.md.
"""
from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from qsharp_jax import cli


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    wanted = parser.add_mutually_exclusive_group(required=True)
    wanted.add_argument('--table', help='1 to 7, or fig3')
    wanted.add_argument('--figure', choices=('star_graph',), help='of section 3')
    parser.add_argument('--size', default='small', help='tiny, small or paper')
    parser.add_argument('--root', type=Path, default=cli.REPRODUCED, help='where the runs are kept')
    parser.add_argument('--jobs', type=cli.words, default=(), help='names of the runs meant; all, if left out')
    parser.add_argument('--policy', default='', help='checkpoint of the other policy of table 7')
    parser.add_argument('--run', action='store_true', help='run what is missing')
    spec, overrides, others = cli.split_arguments(argv)
    args = parser.parse_args(others)
    if spec is not None:
        parser.error('the plan says which configurations run: leave out --config, and override keys of it')

    from qsharp_jax import reproduce  # after the command line is known to be right: it takes seconds to import
    reproduce.run(args.figure or args.table, args.size, args.root, overrides, args.policy, args.jobs, execute=args.run)


if __name__ == '__main__':
    cli.main(main)
