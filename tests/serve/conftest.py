"""What the tests of the web chat share: pages that are served, and a browser."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

HANG_GUARD = 300  # seconds


class ScriptedChat:
    """Model's chat that answers word by word; `go` lets it go on to the next word.

    Attributes:
        text: the answer to every question.
        asked: questions and images so far.
        started: set while an answer is streamed.
        go: each word waits for it; set unless a test clears it.
        ended: set when an answer has ended or was given up.
    """

    def __init__(self, text: str = "a red square") -> None:
        self.text, self.asked, self.answers = text, [], []
        self.started, self.go, self.ended = threading.Event(), threading.Event(), threading.Event()
        self.go.set()

    @property
    def n_turns(self) -> int:
        return len(self.answers)

    def reply(self, question: str, image: Any, sampling: Any) -> Iterator[str]:
        self.asked.append((question, image))
        said = ""
        try:
            for word in self.text.split(" "):
                self.started.set()
                while not self.go.wait(0.01):
                    yield ""
                said += f" {word}" if said else word
                yield said[len(said) - len(word) - bool(" " in said) :]
            self.answers.append(said)
        except GeneratorExit:
            self.answers += [said] if said else []
            raise
        finally:
            self.ended.set()

    def latest(self) -> tuple[str, None]:
        return self.answers[-1], None

    def undo(self) -> None:
        self.answers.pop()

    def reset(self) -> None:
        self.answers = []


@pytest.fixture(scope="session")
def scripted_chat() -> type[ScriptedChat]:
    return ScriptedChat


@pytest.fixture(scope="module")
def upload_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folder of the module's pages, `uploads` in it that of Gradio."""
    from llava.serve.web import own_folder

    with own_folder() as folder:
        yield folder


@pytest.fixture(scope="module")
def serve_page(upload_folder: Path) -> Iterator[Callable[..., str]]:
    """The function (chats of a visitor, further arguments of `build_page`) -> address of the page."""
    from llava.inference.sampling import Sampling
    from llava.serve.conversations import Conversation, Conversations
    from llava.serve.web_page import build_page, launch

    pages = []

    def serve(create_chats: Callable[[], list[Any]], names: tuple[str, ...] = ("model",), **options: Any) -> str:
        conversations = Conversations(lambda: Conversation(create_chats(), upload_folder))
        page = build_page(conversations, names, Sampling(max_new_tokens=6), **options)
        pages.append(page)
        return launch(page, "127.0.0.1", 0)[1]

    yield serve
    for page in pages:
        page.close(verbose=False)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip("no Chromium here; install one, or name it in the variable CHROMIUM")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Any]]:
    """The function (address, further arguments of a browser's context) -> page with cookies of its own."""
    contexts = []

    def open_page(address: str, **options: Any) -> Any:
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.set_default_timeout(HANG_GUARD * 1_000)
        page.goto(address)
        page.wait_for_selector("#question textarea")
        return page

    yield open_page
    for context in contexts:
        context.close()
