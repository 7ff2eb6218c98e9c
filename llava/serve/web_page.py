"""Web page of a chat: layout and event handlers in Gradio; see `conversations` for what they call."""

from __future__ import annotations

import difflib
import html
import math
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder

from llava.image_files.decode import open_image
from llava.inference.sampling import Sampling
from llava.serve.conversations import MAX_QUESTION_CHARACTERS, Conversation, Conversations, Turn, Upload
from llava.serve.model_chat import Certainty

CSS = (Path(__file__).parent / "assets" / "web.css").read_text(encoding="utf-8")
UPLOAD_LIMIT = 50 * 2**20  # bytes of a file
MAX_WAITING = 64  # questions; further ones are refused
_KEPT_SECONDS = 3_600  # of uploaded files, which are looked through as often
_SHOWN_EVERY = 0.1  # seconds; a browser that draws every token is too busy to see a click on Stop
_PUNCTUATION = re.compile(r"[^\w\s]|_")
_MODEL = "model"  # concurrency group: visitors wait in order


def build_page(
    conversations: Conversations,
    names: Sequence[str],
    sampling: Sampling,
    examples: Sequence[tuple[str, str]] = (),
    answers_at_once: int = 1,
) -> gr.Blocks:
    """Build the page.

    Args:
        conversations: of the visitors.
        names: of the models; with two, they answer side by side.
        sampling: starting values of the settings, and the seed.
        examples: pairs of an image's path and a question.
        answers_at_once: 1 for models that are computed here, since they share a device.
    """
    title = " and ".join(names)
    with gr.Blocks(
        title=f"{title} - llava", fill_height=True, analytics_enabled=False, delete_cache=(_KEPT_SECONDS,) * 2
    ) as page:
        gr.HTML(f"<h1>{html.escape(title)}</h1>", elem_id="heading")
        with gr.Row(elem_id="answers"):
            panels = [_panel(name, show_label=len(names) > 1) for name in names]
        box = _question_box()
        with gr.Row(elem_id="buttons"):
            retry = gr.Button("Retry", size="sm", elem_id="retry")
            new = gr.Button("New chat", size="sm", elem_id="new")
        with gr.Accordion("Settings", open=False):
            temperature = gr.Slider(
                0, 2, sampling.temperature, step=0.05, label="Temperature", info="0: always the likeliest answer"
            )
            longest = gr.Slider(1, 1024, sampling.max_new_tokens, step=1, label="Longest answer, in tokens")
        if examples:
            rows = [{"text": question, "files": [path]} for path, question in examples]
            gr.Examples(rows, box, label="Examples", examples_per_page=len(rows), elem_id="examples")
        handlers = Handlers(conversations, len(panels), sampling)
        _connect(page, handlers, panels, (box, retry, new), (temperature, longest), answers_at_once)
    return page.queue(max_size=MAX_WAITING, default_concurrency_limit=answers_at_once)


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
        max_file_size=UPLOAD_LIMIT,
        prevent_thread_lock=True,
        quiet=True,
        footer_links=[],
        ssr_mode=False,
    )


def _question_box() -> gr.MultimodalTextbox:
    box = gr.MultimodalTextbox(
        placeholder="Add an image and ask",
        show_label=False,
        file_types=["image"],
        file_count="single",
        max_plain_text_length=1_000_000,  # a longer text would be pasted as a file
        autofocus=True,
        elem_id="question",
    )
    refuse_addresses(box)
    return box


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


def refuse_addresses(box: gr.MultimodalTextbox) -> None:
    """Let a box take uploads alone: Gradio would fetch images of any size from addresses that a request names.

    It changes the object, since Gradio writes a file beside the source of every subclass.
    """
    move_upload = box.async_move_resource_to_block_cache

    async def move(path: str | Path | None) -> str | None:
        if str(path).lower().startswith(("http:", "https:")):
            raise refusal("Upload the image; addresses are not fetched.")
        return await move_upload(path)

    box.async_move_resource_to_block_cache = move


class Handlers:
    """What the page's events do.

    Args:
        conversations: of the visitors.
        n_models: panels to fill.
        sampling: its seed is that of all answers.
    """

    def __init__(self, conversations: Conversations, n_models: int, sampling: Sampling) -> None:
        self._conversations, self._n_models, self._sampling = conversations, n_models, sampling

    def ask(self, message: dict[str, Any], temperature: float, longest: float, request: gr.Request) -> Iterator[Any]:
        """Ask what was typed, about the image that came with it."""
        question, upload = read_message(message)
        conversation = self._conversations.get(request.session_hash)
        with conversation.lock:
            states = conversation.ask(question, upload, self._choose(temperature, longest))
            del upload  # half a gigabyte, if the image is large
            yield from self._show(conversation, states)

    def ask_again(self, temperature: float, longest: float, request: gr.Request) -> Iterator[Any]:
        """Ask the latest question again."""
        conversation = self._conversations.find(request.session_hash)
        if conversation is None or not conversation.turns:
            raise refusal("There is no question to ask again.")
        conversation = self._conversations.get(request.session_hash)  # counts as use
        with conversation.lock:
            yield from self._show(conversation, conversation.ask_again(self._choose(temperature, longest)))

    def _choose(self, temperature: float, longest: float) -> Sampling:
        return Sampling(temperature=temperature, max_new_tokens=int(longest), seed=self._sampling.seed)

    def _show(self, conversation: Conversation, states: Iterator[None]) -> Iterator[Any]:
        emptied = gr.MultimodalTextbox(value=None, submit_btn=False, stop_btn=True)
        ready = gr.MultimodalTextbox(submit_btn=True, stop_btn=False)
        shown = -math.inf
        for _ in states:
            if time.monotonic() - shown >= _SHOWN_EVERY:
                yield emptied, *show_turns(conversation.turns, self._n_models)
                emptied, shown = gr.skip(), time.monotonic()
        yield ready, *show_turns(conversation.turns, self._n_models)

    def stop(self, request: gr.Request) -> None:
        """End the answer that is being streamed."""
        if conversation := self._conversations.find(request.session_hash):
            conversation.stop()

    def start_again(self, request: gr.Request) -> Any:
        """Forget the conversation; its answer may still be computed in another thread."""
        self._conversations.drop(request.session_hash)
        return show_turns([], self._n_models)

    def leave(self, request: gr.Request) -> None:
        """Forget the conversation of a page that was closed."""
        self._conversations.drop(request.session_hash)


def _connect(
    page: gr.Blocks,
    handlers: Handlers,
    panels: Sequence[gr.Chatbot],
    controls: Sequence[Any],
    settings: Sequence[gr.Slider],
    answers_at_once: int,
) -> None:
    """Connect the page's events with their handlers."""
    box, retry, new = controls
    shared = {"concurrency_id": _MODEL, "concurrency_limit": answers_at_once, "api_visibility": "private"}
    box.submit(handlers.ask, [box, *settings], [box, *panels], **shared)
    retry.click(handlers.ask_again, [*settings], [box, *panels], **shared)
    box.stop(handlers.stop, queue=False, api_visibility="private")
    gr.on([new.click, *(panel.clear for panel in panels)], handlers.start_again, None, list(panels), queue=False,
        api_visibility="private")  # fmt: skip
    page.unload(handlers.leave)


def refusal(message: str) -> gr.Error:
    """Return an error that the visitor sees, and the server's terminal does not."""
    return gr.Error(message, duration=8, print_exception=False)


def read_message(message: dict[str, Any]) -> tuple[str, Upload | None]:
    """Return question and image of what a visitor sent.

    Raises:
        gr.Error: if there is no question, it is too long, or the file is not an image that can be read.
    """
    question, files = (message.get("text") or "").strip(), message.get("files") or []
    if not question:
        raise refusal("Type a question about the image.")
    if len(question) > MAX_QUESTION_CHARACTERS:
        raise refusal(f"The question has {len(question)} characters; the most are {MAX_QUESTION_CHARACTERS}.")
    if not files:
        return question, None
    path = Path(files[0] if isinstance(files[0], str) else files[0]["path"])
    if not path.resolve().is_relative_to(Path(get_upload_folder()).resolve()):
        raise refusal("Upload the image; files of the server are not read.")
    try:
        return question, Upload(path, open_image(path))
    except ValueError as error:
        raise refusal(html.escape(str(error).replace(str(path), path.name))) from error


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
    """Return a model's answer as Markdown: its text, how sure the model is, and its error."""
    answer, base = turn.answers[place], turn.answers[0]
    if answer.error is not None:
        text = f"{escape(answer.text)}\n\n" if answer.text else ""
        return f'{text}<span class="failed">{escape(answer.error)}</span>'
    if not answer.is_complete:
        return escape(answer.text) or "…"
    text = escape(answer.text) or "(no text)"
    if place and base.is_complete:
        text = mark_differences(base.text, answer.text)
    return f'{text}\n\n<span class="sure">{_describe(answer.certainty)}</span>'


def _describe(certainty: Certainty | None) -> str:
    if certainty is None:
        return "the server does not say how sure it is"
    sure, other = f"{_percent(certainty.probability)} sure", escape(certainty.runner_up.strip())
    if not certainty.runner_up_probability:
        return sure
    return f"{sure}, otherwise {f'“{other}…”' if other else 'no text'} ({_percent(certainty.runner_up_probability)})"


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
