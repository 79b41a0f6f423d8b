"""The form of a conversation for other programs, made from the prompts of the training:

<BOS>System: Be brief.\\nQuestion: Who?\\nAnswer: I.<EOS><BOS>Question: Why?\\nAnswer:
"""

import re
from typing import Any

from sampling.text import answers_questions, last_trained_on_text
from tokenizer import Tokenizer, prompt_text

ORDER = "at most one system message, then user and assistant in turn; a prompt ends with the user"
JINJA = """\
{%- set turns = messages[1:] if messages[0]['role'] == 'system' else messages -%}
{%- if not turns or (add_generation_prompt and turns[-1]['role'] != 'user') -%}
{{- raise_exception(ORDER) -}}
{%- endif -%}
{%- for turn in turns -%}
{%- if turn['role'] != ['user', 'assistant'][loop.index0 % 2] -%}
{{- raise_exception(ORDER) -}}
{%- elif turn['role'] == 'assistant' -%}
{{- ' ' + turn['content'] | trim + '<EOS>' -}}
{%- else -%}
{{- '<BOS>' -}}
{%- if loop.first and messages[0]['role'] == 'system' and messages[0]['content'] | trim -%}
{{- SYSTEM + messages[0]['content'] | trim + '\\n' -}}
{%- endif -%}
{{- QUESTION + turn['content'] | trim -}}
{%- if add_generation_prompt or not loop.last -%}{{- ANSWER -}}{%- endif -%}
{%- endif -%}
{%- endfor -%}"""
CONTINUED = "{% for m in messages %}{{ m['content'] }}{% endfor %}"  # of a model of text


def asks(tokenizer: Tokenizer, state: dict[str, Any]) -> bool:
    """Whether the model of a checkpoint answers questions, and does not continue text."""
    return answers_questions(tokenizer) and not last_trained_on_text(state)


def jinja_template() -> str:
    """The template of models that answer questions, for `apply_chat_template` and llama.cpp."""
    system, question, answer = prompt_text("|", "|").split("|")
    texts = {"SYSTEM": system, "QUESTION": question.lstrip(), "ANSWER": answer, "ORDER": ORDER}
    return re.sub("|".join(texts), lambda found: repr(texts[found[0]]), JINJA)


def ollama_template() -> str:
    """The same for Ollama, which fills it in for each turn, and for the last one up to .Response.
    The space before an answer is part of what the model wrote, but not of other texts."""
    system, _, rest = prompt_text("{{ .Prompt }}", "{{ .System }}").partition("\n")
    space = '{{ if .Response }}{{ if ne (printf "%.1s" .Response) " " }} {{ end }}{{ end }}'
    start = f"<BOS>{{{{ if .System }}}}{system}\n{{{{ end }}}}{rest}"
    return f"{start}{space}{{{{ .Response }}}}<EOS>"
