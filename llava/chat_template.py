"""Write a prompt template as a Jinja chat template for transformers, vLLM and SGLang.

It renders what `llava.data.supervision.build_dialogue` builds and `Conversation.get_prompt` writes, so that a served
model sees the prompts that it was trained on.
"""

from __future__ import annotations

import json
from string import Template

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import Conversation, SeparatorStyle

_SYSTEM_TAG = "<|im_start|>system\n"

_FOLDED = """\
{%- set folded = namespace(turns=[]) -%}
{%- for message in messages -%}
  {%- set own = namespace(parts=[]) -%}
  {%- if message['content'] is string -%}
    {%- set own.parts = [{'type': 'text', 'text': message['content']}] -%}
  {%- else -%}
    {%- for part in message['content'] -%}
      {%- if part['type'] not in ['text', 'image', 'image_url'] -%}
        {{- raise_exception('a message holds text and images, but here is ' ~ part['type']) -}}
      {%- endif -%}
      {%- set own.parts = own.parts + [part] -%}
    {%- endfor -%}
  {%- endif -%}
  {%- if folded.turns and folded.turns[-1]['role'] == message['role'] -%}
    {%- set own.parts = folded.turns[-1]['parts'] + own.parts -%}
    {%- set folded.turns = folded.turns[:-1] -%}
  {%- endif -%}
  {%- set folded.turns = folded.turns + [{'role': message['role'], 'parts': own.parts}] -%}
{%- endfor -%}
"""  # vLLM looks for a loop over message['content'] to see that the template takes lists

_WRITTEN = """\
{%- macro written(parts) -%}
  {%- set text = parts | selectattr('type', 'equalto', 'text') | map(attribute='text') | join('\\n') -%}
  {%- set images = parts | rejectattr('type', 'equalto', 'text') | list | length -%}
  {%- set marks = text.split($image) | length - 1 -%}
  {%- if images and not marks -%}
    {%- set text = $image_line * images ~ text -%}
    {%- set marks = images -%}
  {%- elif images and marks != images -%}
    {{- raise_exception('the text marks ' ~ marks ~ ' images, but there are ' ~ images ~ '; mark each, or none') -}}
  {%- endif -%}
  {%- if marks == 1 -%}
    {%- set text = ($image_line ~ (text | replace($image, '') | trim)) | trim -%}
  {%- endif -%}
  {{- text | replace($image, $shown_image) -}}
{%- endmacro -%}
"""

_DIALOGUE = """\
{%- if folded.turns and folded.turns[0]['role'] == 'system' -%}
  {%- set system = $system_start ~ written(folded.turns[0]['parts']) -%}
  {%- set turns = folded.turns[1:] -%}
{%- else -%}
  {%- set system = $system -%}
  {%- set turns = folded.turns -%}
{%- endif -%}
{{- $opening -}}
{%- for turn in turns -%}
  {%- if turn['role'] != ['user', 'assistant'][loop.index0 % 2] -%}
    {{- raise_exception('user and assistant take turns, but turn ' ~ loop.index ~ ' is of ' ~ turn['role']) -}}
  {%- endif -%}
  {%- set text = written(turn['parts']) -%}
  {%- if loop.index0 % 2 == 0 -%}
    {{- $question -}}
  {%- else -%}
    {{- $answer -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- $answer_start -}}
{%- endif -%}
"""


def chat_template(template: Conversation) -> str:
    """Return the Jinja chat template of a prompt template.

    It takes messages of the roles user and assistant by turns, after an optional one of role system, which replaces
    the template's own. A message's content is a text, or a list of `{"type": "image"}` and `{"type": "text", "text":
    ...}`; several texts are joined by line breaks. Consecutive messages of one role are folded into one message with
    the parts of all: clients send an image and its question as two messages of user. Images come first, each on a line
    of its own, unless the text marks their places with `<image>`. As in training, the text beside a single image is
    stripped of outer white space and comes after it. The begin token is not in it: `processor(text=..., images=...)`
    puts that.

    The text is the same for every template. The ids are too where answers end in a token, as `</s>` is; where they end
    in text (`mpt`, `chatml_direct`) the ids of a second question differ, since training encodes each answer by itself.

    Args:
        template: an empty dialogue.

    Raises:
        ValueError: if the template has no turns of questions and answers (`plain`).
    """
    if template.sep_style is SeparatorStyle.PLAIN:
        raise ValueError(
            f"template {template.version!r} captions images and leaves questions out, so it is not a chat template; "
            "name the template of the weights, such as vicuna_v1"
        )
    image = DEFAULT_IMAGE_TOKEN
    shown = f"<Image>{image}</Image>" if "mmtag" in template.version else image
    style = {
        SeparatorStyle.SINGLE: _labelled_turns,
        SeparatorStyle.TWO: _labelled_turns,
        SeparatorStyle.MPT: _tagged_turns,
        SeparatorStyle.LLAMA_2: _instruction_turns,
    }[template.sep_style]
    names = {"image": _quote(image), "image_line": _quote(f"{image}\n"), "shown_image": _quote(shown)}
    return Template(_FOLDED + _WRITTEN + _DIALOGUE).substitute(names, system=_quote(template.system), **style(template))


def _labelled_turns(template: Conversation) -> dict[str, str]:
    """`SYSTEM USER: question ASSISTANT: answer</s>`, as expressions of Jinja."""
    user, assistant = (_quote(f"{role}:") for role in template.roles)
    after_system = template.get_prompt().removeprefix(template.system)
    return {
        "system_start": _quote(""),
        "opening": f"system ~ {_quote(after_system)}",
        "question": f"{user} ~ (' ' ~ text ~ {_quote(template.sep)} if text else '')",
        "answer": f"{assistant} ~ (' ' ~ text ~ {_quote(template.stop_text)} if text else '')",
        "answer_start": assistant,
    }


def _tagged_turns(template: Conversation) -> dict[str, str]:
    """`<|im_start|>user\\nquestion<|im_end|>`, as expressions of Jinja."""
    user, assistant = (_quote(role) for role in template.roles)
    end = _quote(template.sep)
    return {
        "system_start": _quote(_SYSTEM_TAG),
        "opening": f"system ~ {end}",
        "question": f"{user} ~ (text ~ {end} if text else '')",
        "answer": f"{assistant} ~ (text ~ {end} if text else '')",
        "answer_start": assistant,
    }


def _instruction_turns(template: Conversation) -> dict[str, str]:
    """`[INST] <<SYS>> ... question [/INST] answer </s><s>[INST] ...`, as expressions of Jinja."""
    start, end = _quote("[INST] "), _quote(" [/INST]")
    system = "('<<SYS>>\\n' ~ system ~ '\\n<</SYS>>\\n\\n' if system else '')"
    first_empty = _quote(f"template {template.version!r}: the first message must be a text of 'user'")
    return {
        "system_start": _quote(""),
        "opening": f"raise_exception({first_empty}) if not turns or not written(turns[0]['parts']) else ''",
        "question": f"(({start} ~ {system} if loop.first else {_quote(template.sep)} ~ {start}) ~ text ~ {end}) "
        "if text else ''",
        "answer": f"' ' ~ text ~ {_quote(f' {template.sep2}')} if text else ''",
        "answer_start": _quote(""),
    }


def _quote(text: str) -> str:
    """Write a text as a literal of Jinja, whose strings have JSON's escapes."""
    return json.dumps(text, ensure_ascii=False)
