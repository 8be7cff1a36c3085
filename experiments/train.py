r"""Runs Q# from a configuration: collect, aggregate, fit, guide, evaluate, report.

  python experiments/train.py --config=configs/arithmetic.py:tiny --workdir=runs/mine --config.eta=0.2

  python experiments/train.py --config=configs/arithmetic.py:tiny --workdir=runs/other --relabel_from=runs/mine \
    --config.reward=my_rewards.py:brevity

The same command continues a run that was stopped. Every key is in configs/default.py.
"""
from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from qsharp_jax import cli


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument('--config', metavar='FILE:SIZE', help='configuration; override with --config.KEY=VALUE')
    parser.add_argument('--workdir', type=Path, required=True, help='directory of everything the run makes')
    parser.add_argument('--dry_run', action='store_true',
                        help='print configuration, parameter counts, shapes and memory, and stop')
    parser.add_argument('--topology', default='', metavar='v5e:4x4',
                        help='with --dry_run: compile for these TPUs and print memory, work and the largest batch')
    parser.add_argument('--relabel_from', type=Path, metavar='WORKDIR',
                        help='take the roll-outs of that run, and grade them by the reward of this one')
    parser.add_argument('--relabel_iterations', type=int, default=0, metavar='K',
                        help='with --relabel_from: take only the first K iterations; 0: all')
    config, others = cli.parse_config(argv)
    args = parser.parse_args(others)
    if config is None:
        parser.error('add --config=configs/arithmetic.py:tiny or another file')

    from qsharp_jax import train  # after the command line is known to be right: it takes seconds to import
    train.run(config, args.workdir, dry_run=args.dry_run, topology=args.topology,
              relabel_from=args.relabel_from, relabel_iterations=args.relabel_iterations)


if __name__ == '__main__':
    cli.main(main)
