"""Prompts: templates, chat, lengths, ends of answers."""
from __future__ import annotations

import json
import logging

import ml_collections
import numpy as np
import pytest

from qsharp_jax import config as config_lib
from qsharp_jax.data import prompts as prompts_lib


class Characters:
    """A tokenizer whose ids are code points."""

    eos_ids = frozenset({1})

    def encode(self, text):
        return [ord(character) for character in text]

    def encode_prompt(self, text):
        return self.encode(text)

    def encode_chat(self, messages):
        return self.encode(''.join(f'<{message["role"]}>{message["content"]}' for message in messages) + '<assistant>')

    def decode(self, ids):
        return ''.join(map(chr, ids))

    def single_token(self, text):
        ids = self.encode(text)
        if len(ids) != 1:
            raise ValueError(f'{text!r} must be exactly one token, but is {len(ids)}')
        return ids[0]


TOKENIZER = Characters()
RECORDS = [{'id': 7, 'question': '3+4', 'answer': '7'}, {'id': 9, 'question': '12+34', 'answer': '46'},
           {'id': 11, 'question': '1+1', 'answer': '2'}]
PLAIN = {'template': '{question} =', 'prefix': '1 + 2 = 3\n', 'chat': False, 'system': '', 'max_prompt_tokens': 100}


def section(tmp_path, **changes):
    return ml_collections.ConfigDict({
        'name': 'arithmetic', 'data_dir': str(tmp_path), 'stop': ('\n',), **PLAIN,
        'arithmetic': {'operations': ('+',), 'train_examples': 6, 'validation_examples': 2, 'test_examples': 3,
                       'max_operand': 30, 'two_digit_share': 0.5, 'seed': 0},
        'star_graph': {'degree': 2, 'path_length': 3, 'num_nodes': 9, 'pretrain_examples': 2, 'train_examples': 4,
                       'validation_examples': 2, 'test_examples': 3, 'seed': 0}, **changes})


def test_plain_prompts_are_prefix_and_template():
    prompts = prompts_lib.from_records(RECORDS, TOKENIZER, **PLAIN)
    assert prompts.ids.tolist() == [7, 9, 11] and prompts.ids.dtype == np.int64 and len(prompts) == 3
    assert prompts.texts[1] == '1 + 2 = 3\n12+34 ='
    assert [TOKENIZER.decode(tokens) for tokens in prompts.tokens] == prompts.texts
    assert prompts.columns == {'question': ['3+4', '12+34', '1+1'], 'answer': ['7', '46', '2']}


def test_chat_prompts_are_one_user_turn():
    prompts = prompts_lib.from_records(RECORDS[:1], TOKENIZER, **{**PLAIN, 'chat': True})
    assert TOKENIZER.decode(prompts.tokens[0]) == '<user>1 + 2 = 3\n3+4 =<assistant>'
    assert prompts.texts == ['1 + 2 = 3\n3+4 =']
    prompts = prompts_lib.from_records(RECORDS[:1], TOKENIZER, **{**PLAIN, 'chat': True, 'system': 'Be brief.'})
    assert TOKENIZER.decode(prompts.tokens[0]) == '<system>Be brief.<user>1 + 2 = 3\n3+4 =<assistant>'
    assert prompts.texts == ['1 + 2 = 3\n3+4 =']


def test_long_prompts_are_named_and_left_out_never_cut(caplog):
    with caplog.at_level(logging.WARNING):
        prompts = prompts_lib.from_records(RECORDS, TOKENIZER, **{**PLAIN, 'max_prompt_tokens': 15})
    assert prompts.ids.tolist() == [7, 11] and prompts.too_long == (9,)
    assert prompts.columns['answer'] == ['7', '2'] and len(prompts.tokens) == len(prompts.texts) == 2
    assert '1 of 3 prompts are longer than max_prompt_tokens = 15: examples 9 (17 tokens)' in caplog.text


def test_a_prompt_of_just_the_allowed_length_stays():
    prompts = prompts_lib.from_records(RECORDS, TOKENIZER, **{**PLAIN, 'max_prompt_tokens': 17})
    assert len(prompts) == 3 and max(map(len, prompts.tokens)) == 17


def test_only_long_prompts_are_refused_with_the_length_that_is_needed():
    with pytest.raises(ValueError, match=r'3 of 3 .* 9 \(17 tokens\).*Raise task.max_prompt_tokens to 15'):
        prompts_lib.from_records(RECORDS, TOKENIZER, **{**PLAIN, 'max_prompt_tokens': 4})


def test_empty_prompts_and_empty_splits_are_refused():
    with pytest.raises(ValueError, match='example 5 is empty'):
        prompts_lib.from_records([{'id': 5, 'question': ''}], TOKENIZER, template='{question}', prefix='', chat=False,
                                 max_prompt_tokens=4)
    with pytest.raises(ValueError, match='no records'):
        prompts_lib.from_records([], TOKENIZER, **PLAIN)


@pytest.mark.parametrize('template', ['{problem}=', '{question} {', '{}'])
def test_a_template_that_cannot_be_filled_names_the_columns(template):
    with pytest.raises(ValueError, match=r'it may hold \{question\}, \{answer\}'):
        prompts_lib.from_records(RECORDS, TOKENIZER, **{**PLAIN, 'template': template})


def test_braces_can_be_written():
    prompts = prompts_lib.from_records(RECORDS[:1], TOKENIZER, **{**PLAIN, 'template': r'\boxed{{{question}}}'})
    assert prompts.texts[0].endswith(r'\boxed{3+4}')


@pytest.mark.parametrize('name', ['arithmetic', 'star_graph'])
def test_load_reads_the_task_that_the_section_names(tmp_path, name):
    task = section(tmp_path, name=name)
    prompts = prompts_lib.load(task, 'test', TOKENIZER)
    again = prompts_lib.load(task, 'test', TOKENIZER)
    assert len(prompts) == 3 and set(prompts.columns) >= {'question', 'answer'}
    assert prompts.texts == again.texts and prompts.tokens == again.tokens
    assert ('/' in prompts.columns['question'][0]) == (name == 'star_graph')
    assert not {*prompts.ids} & {*prompts_lib.load(task, 'train', TOKENIZER).ids}


def test_an_unknown_task_is_refused(tmp_path):
    with pytest.raises(ValueError, match='the tasks are arithmetic, .*, star_graph'):
        prompts_lib.load(section(tmp_path, name='chess'), 'test', TOKENIZER)


def test_stop_texts_end_answers_beside_the_tokenizers_own(tmp_path):
    assert prompts_lib.eos_ids(section(tmp_path), TOKENIZER) == (1, ord('\n'))
    with pytest.raises(ValueError, match=r"task.stop has '\\n\\n', which cannot end an answer"):
        prompts_lib.eos_ids(section(tmp_path, stop=('\n\n',)), TOKENIZER)


def test_something_must_end_an_answer(tmp_path):
    endless = Characters()
    endless.eos_ids = frozenset()
    with pytest.raises(ValueError, match='nothing ends an answer'):
        prompts_lib.eos_ids(section(tmp_path, stop=()), endless)


def test_the_papers_prompt_is_one_user_turn(tmp_path):
    path = tmp_path / 'own.jsonl'
    path.write_text('{"question": "What is {x} + 1?", "answer": "x", "hint": "{y}"}\n')
    config = config_lib.load('configs/gsm8k.py:tiny', [
        ('task.name', 'jsonl'), ('task.jsonl.train', str(path)), ('task.jsonl.validation_share', '0'),
        ('task.data_dir', str(tmp_path / 'data'))])
    prompts = prompts_lib.load(config.task, 'train', TOKENIZER)
    text = 'Problem:\n\nWhat is {x} + 1? Write your answer inside \\boxed{}.\n\nSolution:'
    assert prompts.texts == [text]
    assert TOKENIZER.decode(prompts.tokens[0]) == f'<user>{text}<assistant>'
    assert prompts.columns == {'question': ['What is {x} + 1?'], 'answer': ['x'], 'hint': ['{y}']}
    assert json.loads(prompts_lib.ledger_path(config.task).read_text())['splits']['train']['ids'] == [0]
