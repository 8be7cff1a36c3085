"""Writes the networks of a run as Hugging Face folders: OUT/reference, OUT/value and OUT/policy_<method>.

  python experiments/export.py --workdir=runs/mine --out=exported
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
    parser.add_argument('--out', type=Path, required=True, help='directory to write to; new or empty')
    parser.add_argument('--iteration', type=int, default=0, help='whose value network; 0: the last finished one')
    args = parser.parse_args(argv)

    from qsharp_jax import export  # after the command line is known to be right: it takes seconds to import
    for folder in export.run(args.workdir, args.out, args.iteration):
        print(folder)


if __name__ == '__main__':
    cli.main(main)
