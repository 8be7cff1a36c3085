"""Questions as prompts: token ids for the model, text and columns for the reward."""
from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
import dataclasses
import logging
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from qsharp_jax.data import builders, split_ledger
from qsharp_jax.data.arithmetic import ArithmeticConfig
from qsharp_jax.data.questions import Gsm8kConfig, JsonlConfig, MathConfig, QualityConfig
from qsharp_jax.data.star_graph import StarGraphConfig

TASKS: dict[str, Callable[..., builders.TaskConfig]] = {
    'arithmetic': ArithmeticConfig, 'star_graph': StarGraphConfig, 'gsm8k': Gsm8kConfig, 'math': MathConfig,
    'quality': QualityConfig, 'jsonl': JsonlConfig}
_NAMED = 5  # ids that a warning shows

_logger = logging.getLogger(__name__)


class PromptTokenizer(Protocol):
    """What prompts need of a tokenizer."""

    @property
    def eos_ids(self) -> Collection[int]:
        """Every id that ends a text."""

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, none added."""

    def encode_prompt(self, text: str) -> list[int]:
        """Returns the ids of a text that the model goes on from, as it was trained to see them."""

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Returns the ids of a conversation up to where the assistant's turn begins."""

    def single_token(self, text: str) -> int:
        """Returns the id of a text that is one token; ValueError if it is not."""


@dataclasses.dataclass(frozen=True)
class Prompts:
    """The prompts of one split, in the order of their ids.

    Attributes:
      ids: of the examples, unique over the splits of a task.  # [N] int64
      tokens: ids of each prompt, of any length from 1 to `max_prompt_tokens`.  # N lists
      texts: what was encoded: with prefix, without what a chat template adds.  # N
      columns: what else the task knows of each example, such as its answer, by name.  # lists of N
      too_long: ids of the examples left out because their prompts are too long.
    """

    ids: np.ndarray
    tokens: list[list[int]]
    texts: list[str]
    columns: dict[str, list[Any]]
    too_long: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)


def task_config(task: Any) -> builders.TaskConfig:
    """Returns the parameters of the task that a config's section `task` names.

    Raises:
      ValueError: if there is no such task, or its parameters do not fit each other.
    """
    if task.name not in TASKS:
        raise ValueError(f'task.name is {task.name!r}; the tasks are {", ".join(sorted(TASKS))}.')
    return TASKS[task.name](**dict(getattr(task, task.name)))


def ledger_path(task: Any) -> Path | None:
    """Returns where the ledger of the splits is; None if the task's files are not made yet, or it generates them.

    Args:
      task: a config's section `task`.
    """
    directory = builders.prepared(task_config(task), task.data_dir)
    path = directory and directory / split_ledger.FILE
    return path if path and path.exists() else None


def load(task: Any, split: str, tokenizer: PromptTokenizer) -> Prompts:
    """Returns the prompts of a split. Deterministic; the task's files are generated on first use.

    Args:
      task: a config's section `task`: `name`, the section of that name, `template`, `prefix`, `chat`, `system`,
        `data_dir`, `max_prompt_tokens`.
      split: such as 'train'.
      tokenizer: of the reference.

    Raises:
      ValueError: if the split does not exist, asks for more than there is, or has only prompts that are too long.
    """
    records = builders.read(task_config(task), split, task.data_dir)
    return from_records(records, tokenizer, template=task.template, prefix=task.prefix, chat=task.chat,
                        system=task.system, max_prompt_tokens=task.max_prompt_tokens)


def from_records(records: Sequence[Mapping[str, Any]], tokenizer: PromptTokenizer, *, template: str, prefix: str,
                 chat: bool, max_prompt_tokens: int, system: str = '') -> Prompts:
    """Returns the prompts of records with an `id` each.

    Prompts that are too long are counted, named and left out, never cut.

    Args:
      records: of the task; all but `id` become columns.
      tokenizer: of the reference.
      template: text around a question, in which '{question}' or another column stands where it goes.
      prefix: text before the template, such as solved examples.
      chat: whether prefix and template become one user turn of the tokenizer's chat template.
      max_prompt_tokens: most tokens of a prompt.
      system: text of a system turn before the user's, of a chat; '': whatever the template says by itself.

    Raises:
      ValueError: if there is no record, if the template names a column that there is not, or if every prompt is too
        long or one is empty.
    """
    if not records:
        raise ValueError('the split has no records: raise its number of examples.')
    texts, tokens, kept, too_long = [], [], [], {}
    before = [{'role': 'system', 'content': system}] if system else []
    for record in records:
        text = prefix + _fill(template, record)
        ids = (tokenizer.encode_chat([*before, {'role': 'user', 'content': text}]) if chat else
               tokenizer.encode_prompt(text))
        if not ids:
            raise ValueError(f'the prompt of example {record["id"]} is empty; a prompt needs at least one token. Put '
                             'text into task.template or task.prefix.')
        if len(ids) > max_prompt_tokens:
            too_long[record['id']] = len(ids)
            continue
        kept.append(record)
        texts.append(text)
        tokens.append(list(ids))
    if too_long:
        first = ', '.join(f'{id_} ({length} tokens)' for id_, length in list(too_long.items())[:_NAMED])
        dots = ', …' if len(too_long) > _NAMED else ''
        what = (f'{len(too_long)} of {len(records)} prompts are longer than max_prompt_tokens = {max_prompt_tokens}: '
                f'examples {first}{dots}')
        if not kept:
            raise ValueError(f'{what}. Raise task.max_prompt_tokens to {min(too_long.values())} or more, or shorten '
                             'the prefix or the template.')
        _logger.warning('%s; they are left out.', what)
    return Prompts(
        ids=np.array([record['id'] for record in kept], np.int64), tokens=tokens, texts=texts,
        columns={name: [record[name] for record in kept] for name in kept[0] if name != 'id'},
        too_long=tuple(too_long))


def eos_ids(task: Any, tokenizer: PromptTokenizer) -> tuple[int, ...]:
    """Returns every token that ends an answer: the tokenizer's own and those of `task.stop`, in increasing order.

    Raises:
      ValueError: if a stop text is not a single token, or nothing would end an answer.
    """
    ends = set(tokenizer.eos_ids)
    for text in task.stop:
        try:
            ends.add(tokenizer.single_token(text))
        except ValueError as error:
            raise ValueError(f'task.stop has {text!r}, which cannot end an answer: {error}') from error
    if not ends:
        raise ValueError('nothing ends an answer: the tokenizer has no end token, so task.stop needs one.')
    return tuple(sorted(ends))


def _fill(template: str, record: Mapping[str, Any]) -> str:
    try:
        return template.format(**record)
    except (KeyError, IndexError, ValueError) as error:
        fields = ', '.join(f'{{{name}}}' for name in record if name != 'id')
        raise ValueError(f'task.template is {template!r}; it may hold {fields}, and other braces are doubled: {{{{ and '
                         '}}.') from error
