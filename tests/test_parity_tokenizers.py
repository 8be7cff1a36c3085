"""The files of one tokenizer give the same ids and prompts here and in `transformers`."""
from __future__ import annotations

import pytest

from qsharp_jax.data import tokenizers
from tests import small_tokenizers
from tests.small_tokenizers import KINDS, TEMPLATES, varied_texts, write

pytestmark = pytest.mark.parity

# The class that the published models name, which builds its own pre-tokenizer, and the one that only reads the file.
CLASSES = {'qwen2': 'Qwen2Tokenizer', 'gpt2': 'GPT2Tokenizer', 'gemma': 'GemmaTokenizer'}
CASES = [(kind, 'PreTrainedTokenizerFast') for kind in KINDS] + list(CLASSES.items())


def both(tmp_path, kind, name, **options):
    import transformers
    folder = write(tmp_path, kind, tokenizer_class=name, **options)
    return tokenizers.from_folder(folder), transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize('kind, name', CASES)
def test_ids(tmp_path, kind, name):
    ours, theirs = both(tmp_path, kind, name)
    texts = varied_texts()
    assert len(set(texts)) >= 200
    for text in texts:
        plain = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text) == plain, text
        if ours.bos_id is None or plain[:1] != [ours.bos_id]:
            assert ours.encode_prompt(text) == theirs.encode(text), text
        assert ours.decode(plain) == theirs.decode(plain), text
    assert ours.eos_ids == {theirs.eos_token_id}
    assert ours.bos_id == theirs.bos_token_id


@pytest.mark.parametrize('place', ['jinja', 'config', 'named'])
@pytest.mark.parametrize('kind', [kind for kind in KINDS if TEMPLATES[kind]])
def test_conversations(tmp_path, kind, place):
    ours, theirs = both(tmp_path, kind, 'PreTrainedTokenizerFast', template=place)
    for chat in small_tokenizers.CHATS:
        if kind == 'gemma' and chat[0]['role'] == 'system':
            continue
        # Of the day's date, which ours leaves out, transformers is told.
        options = dict(add_generation_prompt=True, date_string='26 Jul 2024')
        assert ours.render_chat(chat) == theirs.apply_chat_template(chat, tokenize=False, **options)
        ids = theirs.apply_chat_template(chat, tokenize=True, return_dict=False, **options)
        assert ours.encode_chat(chat) == ids
        assert ids.count(ours.bos_id) == (kind in ('llama3', 'gemma'))
