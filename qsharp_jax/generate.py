"""Text in, guided text out, from a finished run."""
from __future__ import annotations

from collections.abc import Sequence
import math
from pathlib import Path

from qsharp_jax import decoding, experiment, sharding, train
from qsharp_jax.data import prompts as prompts_lib


def run(workdir: Path, questions: Sequence[str], eta: float | None = None, iteration: int = 0, samples: int = 1,
        seed: int = 0, raw: bool = False) -> list[list[str]]:
    """Prints, and returns, answers of the guided policy to each question.

    Args:
      workdir: of the run.
      questions: one text each.
      eta: KL coefficient, `inf` for the reference alone; None for the run's own.
      iteration: whose value network; 0 for the last finished one.
      samples: answers a question.
      seed: of the draws.
      raw: whether questions are whole prompts, without the task's prefix, template and chat.

    Raises:
      ValueError: there is no such run or network, or a question cannot be asked.
    """
    if not questions:
        raise ValueError('there is no prompt: give --prompt, or one prompt a line on standard input.')
    if samples < 1:
        raise ValueError(f'--samples is {samples}; it must be at least 1.')
    if eta is not None and not eta > 0:
        raise ValueError(f'--eta is {eta:g}; it must be above 0 (inf is the reference itself).')
    parts, _, values = train.open_run(Path(workdir), iteration)
    values = parts.decoding_params(values)
    config = parts.config
    eta = float(config.eta) if eta is None else eta
    task = config.task
    records = [{'id': number, 'question': question} for number, question in enumerate(questions)]
    prompts = prompts_lib.from_records(
        records, parts.tokenizer, template='{question}' if raw else task.template, prefix='' if raw else task.prefix,
        chat=task.chat and not raw, max_prompt_tokens=task.max_prompt_tokens, system=task.system)
    if prompts.too_long:
        raise ValueError(f'the prompt {questions[prompts.too_long[0]]!r} has more than task.max_prompt_tokens = '
                         f'{task.max_prompt_tokens} tokens: shorten it.')
    experiment.check_prompts(parts, prompts)
    how = parts.guidance(config.guidance.offset) if math.isfinite(eta) else decoding.Guidance()
    # Nothing is compared here, so there are as few rows as the devices allow.
    rows = min(sharding.pad_rows(len(prompts) * samples, parts.mesh), config.eval.batch_rows)
    queue = parts.queue(how, values, decoding.Answering(config.sampling.max_new_tokens), prompts, rows, seed)
    drawn = queue.draw(range(len(prompts)), samples, parts.policies([eta], [config.sampling.temperature]))
    answers: list[list[str]] = [[] for _ in questions]
    for index, tokens, count in zip(drawn.units.index, drawn.read.tokens, drawn.read.count, strict=True):
        answers[index].append(parts.answer_text(tokens[:count]))
    for question, texts in zip(questions, answers, strict=True):
        for text in texts:
            print(f'{question} {text}' if not raw else f'{question}{text}')
    return answers
