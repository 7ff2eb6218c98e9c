"""Model card of a checkpoint: metadata for the hub, then what it is, how it was trained, scores, use, licence.

A card that was written here ends with a comment that holds the digest of the text before it: `is_untouched` tells by it
whether somebody has changed the card since.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from llava.constants import PLOT_FILE
from llava.files.markdown_text import escape_markdown, format_markdown_table
from llava.hub.licences import LLAMA2, LLAMA2_LINK, LLAMA2_NOTICE
from llava.hub.model_facts import ModelFacts, Training
from llava.model.checkpoint.checkpoint import Layout

TASK, TASK_NAME = "visual-question-answering", "Visual question answering"
_MARK = re.compile(r"\n<!-- card written by llava; sha256 of the text above: ([0-9a-f]{64}) -->\s*\Z")
_PLAIN = re.compile(r"[\w.:/+-]+", re.ASCII)
_EXAMPLE_FILE = re.compile(r"images/example_\d+\.jpg")
_KINDS = {
    Layout.LORA: "LoRA adapter for",
    Layout.PROJECTOR: "Projector for",
    Layout.FULL: "LLaVA-1.5 model, made from",
    Layout.HF: "LLaVA-1.5 model, made from",
}
_LIBRARIES = ("torch", "transformers", "peft")
"""Libraries whose versions the card names."""


@dataclass(frozen=True)
class PartScore:
    """Mean accuracy over some questions and the bounds of its 95 % interval, 0..1; `name` says which questions."""

    name: str
    questions: int
    accuracy: float
    low: float
    high: float


@dataclass(frozen=True)
class CardScores:
    """Scores of the published model.

    Attributes:
        data_name: of the questions, for the reader of the card.
        overall: of all questions.
        by_kind: of each kind of question.
        errors: questions without an answer, which count as wrong.
    """

    data_name: str
    overall: PartScore
    by_kind: Sequence[PartScore]
    errors: int


@dataclass(frozen=True)
class Example:
    """A question of the gallery.

    Attributes:
        image: content of a JPEG file.
        question: its text.
        truth: the true answer; None where it is not known.
        answer: of the model; None after an error.
    """

    image: bytes
    question: str
    truth: str | None
    answer: str | None


def build_card(
    facts: ModelFacts, name: str, *, scores: CardScores | None = None, examples: Sequence[Example] = ()
) -> ModelCard:
    """Return the model card of a checkpoint.

    Args:
        facts: from `read_facts`.
        name: id on the hub, or name of the directory, as a user would load it.
        scores: None = not scored.
        examples: gallery; their images are named by `example_file`.
    """
    short = name.rpartition("/")[2]
    sections = [
        f"# {escape_markdown(short)}",
        describe(facts),
        format_markdown_table([("", ""), *_facts_rows(facts)]),
        *(_training_section(facts.training, facts.has_loss_curve) if facts.training else ()),
        *(_score_section(scores) if scores else ()),
        *(_example_section(examples) if examples else ()),
        *_use_section(facts, name),
        *_licence_section(facts),
    ]
    metadata = card_metadata(facts, short, scores).to_yaml()
    text = f"---\n{metadata}\n---\n\n" + "\n\n".join(sections) + "\n"
    return ModelCard(f"{text}\n<!-- card written by llava; sha256 of the text above: {_digest(text)} -->\n")


def is_untouched(text: str) -> bool:
    """Return whether a card was written by `build_card` and not changed since; line ends don't matter."""
    text = text.replace("\r\n", "\n")
    mark = _MARK.search(text)
    return mark is not None and _digest(text[: mark.start()]) == mark[1]


def example_file(number: int) -> str:
    """Return the name in the repository of a gallery image, counted from 1; not that of the user's own file."""
    return f"images/example_{number}.jpg"


def is_example_file(name: str) -> bool:
    """Return whether a name is one of `example_file`."""
    return _EXAMPLE_FILE.fullmatch(name) is not None


def card_metadata(facts: ModelFacts, name: str, scores: CardScores | None) -> ModelCardData:
    """Return the metadata that the hub reads; what is unknown is left out."""
    relation = "adapter" if facts.layout is Layout.LORA else "quantized" if facts.bits != 16 else "finetune"
    further = {"base_model_relation": relation} if facts.base_id else {}
    return ModelCardData(
        base_model=facts.base_id,
        license=facts.licence and facts.licence.identifier,
        library_name="transformers" if facts.layout is Layout.HF else None,
        pipeline_tag="image-text-to-text",
        tags=["llava", "vqa", *(["lora"] if facts.layout is Layout.LORA else [])],
        model_name=name if scores else None,
        eval_results=[_eval_result(scores)] if scores else None,
        **further,
    )


def describe(facts: ModelFacts) -> str:
    """Return one sentence about what the checkpoint is."""
    base = _base_text(facts) if facts.base else "weights whose origin is not recorded"
    merged = " with a LoRA adapter merged into it" if facts.is_merged else ""
    bits = f", quantised to {facts.bits} bit" if facts.bits != 16 else ""
    layout = ", in the layout of transformers" if facts.layout is Layout.HF else ""
    return f"{_KINDS[facts.layout]} {base}{merged}{bits}{layout}. It answers questions about images."


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _base_text(facts: ModelFacts) -> str:
    if facts.base_id:
        return f"[{facts.base_id}](https://huggingface.co/{facts.base_id})"
    return f"{_code(PurePath(facts.base).name)} (a local directory)"


def _facts_rows(facts: ModelFacts) -> list[tuple[str, str]]:
    rows = [
        ("base", _base_text(facts) if facts.base else None),
        ("revision of the base", facts.base_revision and _code(facts.base_revision)),
        ("fingerprint of the base's weights", facts.base_fingerprint and _code(facts.base_fingerprint)),
        ("prompt template", facts.template and _code(facts.template)),
        ("dtype", facts.dtype and f"{facts.dtype}{'' if facts.bits == 16 else f', {facts.bits} bit'}"),
    ]
    return [(name, value) for name, value in rows if value]


def _training_section(training: Training, has_curve: bool) -> list[str]:
    libraries = [f"{name} {training.versions[name]}" for name in _LIBRARIES if name in training.versions]
    rows = [
        ("trained", {"lora": "LoRA adapter", "projector": "projector alone"}.get(training.kind, "all weights")),
        ("rows", f"{training.rows:,}, {training.rows_per_step:,} a step"),
        ("digest of the data (tokens, labels, image names)", _code(training.data_digest)),
        *((_code(name), _value(value)) for name, value in training.recipe.items()),
        *([("libraries", ", ".join(libraries))] if libraries else []),
    ]
    return [
        "## Training",
        format_markdown_table([("", ""), *rows]),
        *([f"![Loss over the steps]({PLOT_FILE})"] if has_curve else []),
    ]


def _score_section(scores: CardScores) -> list[str]:
    parts = [*scores.by_kind, scores.overall] if len(scores.by_kind) > 1 else [scores.overall]
    rows = [
        (escape_markdown(part.name), f"{part.questions:,}", f"{100 * part.accuracy:.2f}", _bounds(part))
        for part in parts
    ]
    errors = f" {scores.errors:,} had no answer and count as wrong." if scores.errors else ""
    return [
        "## Scores",
        f"VQAv2 accuracy in percent on {escape_markdown(scores.data_name)}, measured by whoever made the model, with "
        f"Wilson's 95 % interval (questions about one image count as a group).{errors}",
        format_markdown_table([("kind of question", "questions", "accuracy", "95 % interval"), *rows]),
    ]


def _example_section(examples: Sequence[Example]) -> list[str]:
    rows = [
        (
            f"![]({example_file(number)})",
            escape_markdown(example.question),
            "(error)" if example.answer is None else escape_markdown(example.answer),
            "" if example.truth is None else escape_markdown(example.truth),
        )
        for number, example in enumerate(examples, 1)
    ]
    head = ("image", "question", "answer of the model", "true answer")
    return [
        "## Examples",
        "The first of the question file, not chosen by how well they went.",
        format_markdown_table([head, *rows]),
    ]


def _use_section(facts: ModelFacts, name: str) -> list[str]:
    is_adapter = facts.layout in (Layout.LORA, Layout.PROJECTOR)
    argument, flag = "", ""
    if is_adapter and not facts.base_id:
        argument, flag = ', model_base="PATH_OF_THE_BASE"', " --model-base PATH_OF_THE_BASE"
    question = "What is the man holding?"
    return [
        "## Use",
        "With the `llava` package that made it:",
        f"```python\nimport llava\n\nmodel = llava.load({json.dumps(name)}{argument})\n"
        f'print(model.ask("man.jpg", "{question}"))\n```',
        f"```bash\npython -m llava.eval.run_llava --model-path {shlex.quote(name)}{flag} --image-file man.jpg \\\n"
        f'    --query "{question}"\n```',
        *_other_programs(facts, name, flag),
    ]


def _other_programs(facts: ModelFacts, name: str, flag: str) -> list[str]:
    """How transformers and vLLM load it, or what has to be done first."""
    if facts.bits != 16:
        return [f"transformers and vLLM do not load this file of {facts.bits} bit: convert the weights in 16 bit."]
    if facts.layout is Layout.HF:
        return [
            "With transformers:",
            _transformers_code(name),
            "With vLLM:",
            f"```bash\nvllm serve {shlex.quote(name)}\n```",
        ]
    merged = "The adapter is merged on the way. " if facts.layout is Layout.LORA else ""
    target = name.rpartition("/")[2] + "_hf"
    return [
        f"transformers and vLLM read another layout. {merged}Convert it, then give them `{target}`:",
        f"```bash\npython -m llava convert --from {shlex.quote(name)}{flag} --to {shlex.quote(target)} "
        f"--layout hf\nvllm serve {shlex.quote(target)}\n```",
        _transformers_code(target),
    ]


def _transformers_code(name: str) -> str:
    return f"""```python
from transformers import AutoProcessor, LlavaForConditionalGeneration
from transformers.image_utils import load_image

model = LlavaForConditionalGeneration.from_pretrained({json.dumps(name)}, device_map="auto")
processor = AutoProcessor.from_pretrained({json.dumps(name)})
content = [{{"type": "image"}}, {{"type": "text", "text": "What is the man holding?"}}]
prompt = processor.apply_chat_template([{{"role": "user", "content": content}}], add_generation_prompt=True)
inputs = processor(images=load_image("man.jpg"), text=prompt, return_tensors="pt")
answer = model.generate(**inputs.to(model.device, model.dtype), max_new_tokens=64)
print(processor.decode(answer[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```"""


def _licence_section(facts: ModelFacts) -> list[str]:
    if facts.licence is None:
        base = _base_text(facts) if facts.base else "the base"
        return ["## Licence", f"Not recorded. That of {base} applies to these weights too: see where it is from."]
    identifier, source = facts.licence
    if identifier == LLAMA2:
        text = f"[Llama 2 Community License]({LLAMA2_LINK}), as {source} says. {LLAMA2_NOTICE}"
    else:
        text = f"{_code(identifier)}, as {source} says."
    return ["## Licence", text]


def _eval_result(scores: CardScores) -> EvalResult:
    overall = scores.overall
    return EvalResult(
        task_type=TASK,
        task_name=TASK_NAME,
        dataset_type="vqa",
        dataset_name=scores.data_name,
        metric_type="accuracy",
        metric_name=f"VQAv2 accuracy, % (95 % interval {_bounds(overall)}, {overall.questions} questions)",
        metric_value=round(100 * overall.accuracy, 2),
    )


def _value(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else escape_markdown(str(value))


def _code(text: str) -> str:
    return f"`{text}`" if _PLAIN.fullmatch(text) else escape_markdown(text)


def _bounds(part: PartScore) -> str:
    return f"{100 * part.low:.1f} to {100 * part.high:.1f}"
