"""Evaluates the value network of a finished iteration at any eta, on any split; rows go to results.jsonl.

  python experiments/evaluate.py --workdir=runs/mine --etas=0.05,0.1,0.3 --split=test --iteration=2

Rows that are there stay as they are, and so do the etas that the run has chosen.
"""
from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from qsharp_jax import cli


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument('--workdir', type=Path, required=True, help='directory of the run')
    parser.add_argument('--etas', type=cli.numbers, required=True, help='KL coefficients, such as 0.05,0.1')
    parser.add_argument('--split', default='test', choices=('train', 'validation', 'test'))
    parser.add_argument('--iteration', type=int, default=0, help='whose network to use; 0: the last finished one')
    parser.add_argument('--methods', type=cli.words, default=('qsharp',), help='any of qsharp,cd,fudge,vas')
    parser.add_argument('--examples', type=int, default=0, help='prompts of the split; 0: as in the configuration')
    parser.add_argument('--samples', type=int, default=0, help='answers a prompt; 0: as in the configuration')
    args = parser.parse_args(argv)

    from qsharp_jax import train  # after the command line is known to be right: it takes seconds to import
    train.evaluate_checkpoint(
        args.workdir, etas=args.etas, split=args.split, iteration=args.iteration, methods=args.methods,
        examples=args.examples, samples=args.samples)


if __name__ == '__main__':
    cli.main(main)
