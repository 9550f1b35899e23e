"""Chat templates of known formats: how each writes the turns of a conversation."""

from __future__ import annotations

from outliermerge.errors import quoted, suggest
from outliermerge.spec.settings import SettingError

AUTO = "auto"
_SYSTEM_FIRST = """\
{%- if messages[0].role == 'system' -%}
    {%- set system, turns = messages[0].content.strip(), messages[1:] -%}
{%- else -%}
    {%- set system, turns = '', messages -%}
{%- endif -%}
"""
_ALTERNATE = """\
    {%- if (turn.role == 'user') != (loop.index0 % 2 == 0) -%}
        {{- raise_exception('after the system turn, user and assistant must take turns') -}}
    {%- endif -%}
"""
TEMPLATES = {
    "chatml": """\
{%- for turn in messages -%}
    {{- '<|im_start|>' + turn.role + '\\n' + turn.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
""",
    "llama3": """\
{{- bos_token -}}
{%- for turn in messages -%}
    {{- '<|start_header_id|>' + turn.role + '<|end_header_id|>\\n\\n' -}}
    {{- turn.content.strip() + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{%- endif -%}
""",
    "mistral": _SYSTEM_FIRST
    + "{{- bos_token -}}\n{%- for turn in turns -%}\n"
    + _ALTERNATE
    + """\
    {%- if turn.role == 'user' -%}
        {%- set before = system + '\\n\\n' if loop.first and system else '' -%}
        {{- ' [INST] ' + before + turn.content.strip() + ' [/INST]' -}}
    {%- else -%}
        {{- ' ' + turn.content.strip() ~ eos_token -}}
    {%- endif -%}
{%- endfor -%}
""",
    "alpaca": _SYSTEM_FIRST
    + """\
{%- if system -%}
    {{- system + '\\n\\n' -}}
{%- endif -%}
{%- for turn in turns -%}
    {%- set header = '### Instruction:' if turn.role == 'user' else '### Response:' -%}
    {{- header + '\\n' + turn.content.strip() + '\\n\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '### Response:\\n' -}}
{%- endif -%}
""",
    "exaone": """\
{%- if messages[0].role != 'system' -%}
    {{- '[|system|][|endofturn|]\\n' -}}
{%- endif -%}
{%- for turn in messages -%}
    {{- '[|' + turn.role + '|]' + turn.content -}}
    {{- '\\n' if turn.role == 'user' else '[|endofturn|]\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '[|assistant|]' -}}
{%- endif -%}
""",
    "gemma": _SYSTEM_FIRST
    + "{{- bos_token -}}\n{%- for turn in turns -%}\n"
    + _ALTERNATE
    + """\
    {%- set role = 'model' if turn.role == 'assistant' else turn.role -%}
    {%- set before = system + '\\n\\n' if loop.first and system else '' -%}
    {{- '<start_of_turn>' + role + '\\n' + before + turn.content.strip() + '<end_of_turn>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<start_of_turn>model\\n' -}}
{%- endif -%}
""",
    "phi3": """\
{%- for turn in messages -%}
    {{- '<|' + turn.role + '|>\\n' + turn.content + '<|end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|assistant|>\\n' -}}
{%- endif -%}
""",
    "zephyr": """\
{%- for turn in messages -%}
    {{- '<|' + turn.role + '|>\\n' + turn.content ~ eos_token + '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|assistant|>\\n' -}}
{%- endif -%}
""",
    "vicuna": _SYSTEM_FIRST
    + """\
{{- bos_token -}}
{%- if system -%}
    {{- system + ' ' -}}
{%- endif -%}
{%- for turn in turns -%}
    {%- if turn.role == 'user' -%}
        {{- 'USER: ' + turn.content.strip() + ' ' -}}
    {%- else -%}
        {{- 'ASSISTANT: ' + turn.content.strip() ~ eos_token -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- 'ASSISTANT:' -}}
{%- endif -%}
""",
}
"""Templates by the name of their format. None of them writes tools."""


def is_jinja(text: str) -> bool:
    """Tell whether a text is a template itself, and not the name of one."""
    return "{" in text or "\n" in text


def check_template_name(text: str | None) -> None:
    """Refuse the name of a template that is not known.

    Raises:
        SettingError: a text is neither a name, nor `auto`, nor Jinja.
    """
    if text is None or is_jinja(text) or text in (AUTO, *TEMPLATES):
        return
    raise SettingError(
        ("chat_template",),
        f"{quoted(text)} is no known format, and no Jinja template. "
        f"{suggest(text, (AUTO, *TEMPLATES))}",
    )
