"""Answers prompts: with the guided policy of a run, or with any checkpoint, guided by a value network or not.

  python experiments/generate.py --workdir=runs/mine --prompt='12 + 30 =' --eta=0.1 --samples=4
  python experiments/generate.py --reference=path/to/model --prompt='Who are you?'
  python experiments/generate.py --reference=path/to/model --value=runs/mine/checkpoints/value_2 --eta=0.1

With --reference, answers appear token by token. Without --prompt, prompts are read from standard input, one a line;
with --reference they are the turns of one conversation.
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
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument('--workdir', type=Path, help='directory of a run')
    source.add_argument('--reference', help='a checkpoint, written as reference.source of a config')
    parser.add_argument('--value', type=Path, help='with --reference: value directory of a run, or an exported one')
    parser.add_argument('--prompt', action='append', help='the question; may be given several times')
    parser.add_argument('--eta', type=float, help='KL coefficient, inf for the reference; default: as configured')
    parser.add_argument('--iteration', type=int, default=0,
                        help='with --workdir: whose network to use; 0: the last finished one')
    parser.add_argument('--samples', type=int, default=1, help='answers a prompt')
    parser.add_argument('--seed', type=int, default=0, help='of the draws')
    parser.add_argument('--raw', action='store_true', help='take prompts as they are, without template')
    parser.add_argument('--temperature', type=float, help='with --reference: default that of the value network, or 1')
    parser.add_argument('--top_p', type=float, help='with --reference: default that of the value network, or 1')
    parser.add_argument('--max_new_tokens', type=int,
                        help='with --reference: default that of the value network, or 256')
    parser.add_argument('--dtype', choices=('float32', 'bfloat16'), default='float32', help='with --reference')
    parser.add_argument('--allow_other_reference', action='store_true',
                        help='guide with a value network that was fitted with another reference')
    args = parser.parse_args(argv)
    lines = (line.rstrip('\n') for line in sys.stdin)

    other, unread = ('workdir', ('iteration',)) if args.reference is not None else (
        'reference', ('value', 'temperature', 'top_p', 'max_new_tokens', 'dtype', 'allow_other_reference'))
    for name in unread:
        if getattr(args, name) != parser.get_default(name):
            parser.error(f'--{name} goes with --{other}')
    if args.reference is not None:
        from qsharp_jax import chat  # after the command line is known to be right: it takes seconds to import
        chat.run(args.reference, args.value, args.prompt or lines, conversation=not args.prompt, eta=args.eta,
                 temperature=args.temperature, top_p=args.top_p, max_new_tokens=args.max_new_tokens, dtype=args.dtype,
                 samples=args.samples, seed=args.seed, raw=args.raw, allow_other=args.allow_other_reference)
        return
    from qsharp_jax import generate
    generate.run(args.workdir, args.prompt or list(lines), eta=args.eta, iteration=args.iteration,
                 samples=args.samples, seed=args.seed, raw=args.raw)


if __name__ == '__main__':
    cli.main(main)
