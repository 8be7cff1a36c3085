"""Answers prompts with the guided policy of a run.

  python experiments/generate.py --workdir=runs/mine --prompt='12 + 30 =' --eta=0.1 --samples=4

Without --prompt, prompts are read from standard input, one a line.
"""
from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
import sys

from qsharp_jax import cli


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument('--workdir', type=Path, required=True, help='directory of the run')
    parser.add_argument('--prompt', action='append', help='the question; may be given several times')
    parser.add_argument('--eta', type=float, help='KL coefficient, inf for the reference; default: as configured')
    parser.add_argument('--iteration', type=int, default=0, help='whose network to use; 0: the last finished one')
    parser.add_argument('--samples', type=int, default=1, help='answers a prompt')
    parser.add_argument('--seed', type=int, default=0, help='of the draws')
    parser.add_argument('--raw', action='store_true', help='take prompts as they are, without the task\'s template')
    args = parser.parse_args(argv)
    prompts = args.prompt if args.prompt else [line.rstrip('\n') for line in sys.stdin]

    from qsharp_jax import generate  # after the command line is known to be right: it takes seconds to import
    generate.run(args.workdir, prompts, eta=args.eta, iteration=args.iteration, samples=args.samples, seed=args.seed,
                 raw=args.raw)


if __name__ == '__main__':
    cli.main(main)
