"""The environment that chat templates of published models are written for."""
from __future__ import annotations

import datetime
import json
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2.nodes import Node
import jinja2.parser
import jinja2.sandbox

# Some templates write today's date, and their prompts would change from day to day. This is the day that those of
# Llama 3.2 write where they are not told it.
TODAY = datetime.date(2024, 7, 26)


def compiled(template: str) -> jinja2.Template:
    """Returns a template, sandboxed, as it comes with the weights.

    Raises:
      ValueError: it is no template.
    """
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation])
    environment.globals['raise_exception'] = _refuse
    environment.globals['strftime_now'] = TODAY.strftime
    environment.filters['tojson'] = _to_json
    try:
        return environment.from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f'The chat template cannot be read: {error}') from error


class _Generation(jinja2.ext.Extension):
    """The block `generation`, which marks what the assistant says and writes it unchanged."""

    tags = {'generation'}

    def parse(self, parser: jinja2.parser.Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(('name:endgeneration',), drop_needle=True)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None,
             separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
