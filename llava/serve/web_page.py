"""Web page of a chat: layout and event handlers in Gradio; see `conversations` for what they call."""

from __future__ import annotations

import difflib
import html
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from llava.image_files.decode import open_image
from llava.inference.sampler import Sampling
from llava.serve.conversations import MAX_QUESTION_CHARACTERS, Conversation, Conversations, Turn

CSS = (Path(__file__).parent / "assets" / "web.css").read_text(encoding="utf-8")
_UPLOAD_LIMIT = "50mb"
_KEPT_SECONDS = 3_600  # of uploaded files, which are looked through as often
_PUNCTUATION = re.compile(r"[^\w\s]|_")
_MODEL = "model"  # concurrency group: one answer is computed at a time, visitors wait in order


def build_page(
    conversations: Conversations,
    names: Sequence[str],
    sampling: Sampling,
    examples: Sequence[tuple[str, str]] = (),
) -> gr.Blocks:
    """Build the page.

    Args:
        conversations: of the visitors.
        names: of the models; with two, they answer side by side.
        sampling: starting values of the settings.
        examples: pairs of an image's path and a question.
    """
    title = " and ".join(names)
    with gr.Blocks(
        title=f"{title} - llava", fill_height=True, analytics_enabled=False, delete_cache=(_KEPT_SECONDS,) * 2
    ) as page:
        gr.HTML(f"<h1>{html.escape(title)}</h1>", elem_id="heading")
        with gr.Row(elem_id="answers"):
            panels = [_panel(name, show_label=len(names) > 1) for name in names]
        box = gr.MultimodalTextbox(
            placeholder="Drop or paste an image and ask about it",
            show_label=False,
            file_types=["image"],
            file_count="single",
            autofocus=True,
            elem_id="question",
        )
        with gr.Row(elem_id="buttons"):
            retry = gr.Button("Retry", size="sm", elem_id="retry")
            new = gr.Button("New chat", size="sm", elem_id="new")
        with gr.Accordion("Settings", open=False):
            temperature = gr.Slider(
                0, 2, sampling.temperature, step=0.05, label="Temperature", info="0: always the likeliest answer"
            )
            longest = gr.Slider(1, 1024, sampling.max_new_tokens, step=1, label="Longest answer, in tokens")
        if examples:
            gr.Examples([{"text": question, "files": [path]} for path, question in examples], box, label="Examples")
        _connect(page, conversations, panels, (box, retry, new), (temperature, longest))
    return page.queue(max_size=64, default_concurrency_limit=1)


def launch(page: gr.Blocks, host: str, port: int, *, share: bool = False, auth: tuple[str, str] | None = None) -> Any:
    """Serve the page in the background; returns Gradio's app, the local address and the public one or None.

    Raises:
        OSError: if the address can't be bound.
    """
    fonts = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif")
    return page.launch(
        server_name=host,
        server_port=port or None,
        share=share,
        auth=auth,
        css=CSS,
        theme=gr.themes.Default(primary_hue="blue", neutral_hue="slate", font=fonts),
        max_file_size=_UPLOAD_LIMIT,
        prevent_thread_lock=True,
        quiet=True,
        footer_links=[],
        ssr_mode=False,
    )


def _panel(name: str, *, show_label: bool) -> gr.Chatbot:
    return gr.Chatbot(
        label=name,
        show_label=show_label,
        height="60vh",
        buttons=["copy"],
        feedback_options=None,
        allow_file_downloads=False,
        allow_tags=False,
        placeholder="Ask a question about an image.",
    )


def _connect(
    page: gr.Blocks,
    conversations: Conversations,
    panels: Sequence[gr.Chatbot],
    controls: Sequence[Any],
    settings: Sequence[gr.Slider],
) -> None:
    """Connect the page's events with their handlers."""
    box, retry, new = controls

    def ask(message: dict[str, Any], temperature: float, longest: float, request: gr.Request) -> Iterator[Any]:
        conversation = conversations.get(request.session_hash)
        question, image = read_message(message)
        yield from answer(conversation, question, image, temperature, longest)

    def ask_again(temperature: float, longest: float, request: gr.Request) -> Iterator[Any]:
        conversation = conversations.get(request.session_hash)
        turn = conversation.undo()
        if turn is None:
            raise gr.Error("There is no question to ask again.", duration=5)
        yield from answer(conversation, turn.question, turn.image, temperature, longest)

    def answer(
        conversation: Conversation, question: str, image: Image.Image | None, temperature: float, longest: float
    ) -> Iterator[Any]:
        sampling = Sampling(temperature=temperature, max_new_tokens=int(longest))
        emptied = gr.MultimodalTextbox(value=None, submit_btn=False, stop_btn=True)
        for _ in conversation.ask(question, image, sampling):
            yield emptied, *show_turns(conversation.turns, len(panels))
            emptied = gr.skip()
        yield gr.MultimodalTextbox(submit_btn=True, stop_btn=False), *show_turns(conversation.turns, len(panels))

    def start_again(request: gr.Request) -> Any:
        conversations.drop(request.session_hash)  # its answer may still be computed in another thread
        return show_turns([], len(panels))

    def end_answer(request: gr.Request) -> None:
        conversations.get(request.session_hash).stop()

    def drop(request: gr.Request) -> None:
        conversations.drop(request.session_hash)

    shared = {"concurrency_id": _MODEL, "concurrency_limit": 1, "api_visibility": "private"}
    box.submit(ask, [box, *settings], [box, *panels], **shared)
    retry.click(ask_again, [*settings], [box, *panels], **shared)
    box.stop(end_answer, queue=False, api_visibility="private")
    gr.on([new.click, *(panel.clear for panel in panels)], start_again, None, list(panels), queue=False,
        api_visibility="private")  # fmt: skip
    page.unload(drop)


def read_message(message: dict[str, Any]) -> tuple[str, Image.Image | None]:
    """Return question and image of what a visitor sent.

    Raises:
        gr.Error: if there is no question, it is too long, or the file is not an image that can be read.
    """
    question, files = (message.get("text") or "").strip(), message.get("files") or []
    if not question:
        raise gr.Error("Type a question about the image.", duration=5)
    if len(question) > MAX_QUESTION_CHARACTERS:
        raise gr.Error(f"The question has {len(question)} characters; the most are {MAX_QUESTION_CHARACTERS}.")
    if not files:
        return question, None
    path = Path(files[0] if isinstance(files[0], str) else files[0]["path"])
    try:
        return question, open_image(path)
    except ValueError as error:
        raise gr.Error(html.escape(str(error).replace(str(path), path.name))) from error


def show_turns(turns: Sequence[Turn], n_models: int) -> list[list[dict[str, Any]]]:
    """Return the messages of each model's panel."""
    return [[message for turn in turns for message in _show_turn(turn, place)] for place in range(n_models)]


def _show_turn(turn: Turn, place: int) -> list[dict[str, Any]]:
    image = [] if turn.thumbnail is None else [{"role": "user", "content": {"path": str(turn.thumbnail)}}]
    return [
        *image,
        {"role": "user", "content": escape(turn.question)},
        {"role": "assistant", "content": show_answer(turn, place)},
    ]


def show_answer(turn: Turn, place: int) -> str:
    """Return a model's answer as Markdown: its text, or its error, and how sure the model is."""
    if (error := turn.errors[place]) is not None:
        return f'<span class="failed">{escape(error)}</span>'
    reply = turn.replies[place]
    if reply is None:
        return escape(turn.texts[place]) or "…"
    text = escape(reply.text) or "(no text)"
    if place and turn.replies[0] is not None:
        text = mark_differences(turn.replies[0].text, reply.text)
    sure, other = f"{_percent(reply.probability)} sure", escape(reply.runner_up.strip())
    if other:
        sure += f", otherwise “{other}…” ({_percent(reply.runner_up_probability)})"
    return f'{text}\n\n<span class="sure">{sure}</span>'


def _percent(share: float) -> str:
    return "under 1 %" if share < 0.005 else f"{share:.0%}".replace("%", " %")


def escape(text: str) -> str:
    """Return text as Markdown that shows it as it is: punctuation becomes character references."""
    return _PUNCTUATION.sub(lambda found: f"&#{ord(found[0])};", text).replace("\n", "<br>")


def mark_differences(base: str, text: str) -> str:
    """Return text as Markdown in which the words that the base text lacks are marked."""
    words, base_words = re.findall(r"\s+|\S+", text), re.findall(r"\s+|\S+", base)
    matches = difflib.SequenceMatcher(a=base_words, b=words, autojunk=False).get_opcodes()
    parts = [(kind, escape("".join(words[start:end]))) for kind, _, _, start, end in matches if end > start]
    return "".join(part if kind == "equal" else f"<mark>{part}</mark>" for kind, part in parts)
