"""The web chat: what its page shows, and the page itself in a browser."""

import os
import re
import shutil
import socket
import time

import pytest
from PIL import Image

# ruff: noqa: E402 - the page needs Gradio
gr = pytest.importorskip("gradio", reason="llava[web] is not installed")

from llava.inference.chat.chat import Chat
from llava.inference.loaded_model import Reply
from llava.inference.sampler import Sampling
from llava.inference.session import Session
from llava.serve import web
from llava.serve.conversations import Conversation, Conversations, Turn
from llava.serve.web_page import build_page, escape, launch, mark_differences, read_message, show_answer, show_turns

HOSTILE = (
    """<img src=x onerror="document.title='owned'"><script>document.title='owned'</script> *a* _b_ `c` [d](e) $f$"""
)
GREEDY = Sampling(max_new_tokens=6)


def turn_of(texts, probabilities=None, errors=None, **fields):
    replies = [Reply(text, p, "no", 0.2) for text, p in zip(texts, probabilities or [0.5] * len(texts), strict=True)]
    defaults = {"question": "why?", "image": None, "thumbnail": None, "in_chat": [True] * len(texts)}
    return Turn(texts=list(texts), replies=replies, errors=errors or [None] * len(texts), **defaults | fields)


def test_text_is_shown_as_it_is():
    shown = escape(HOSTILE + "\nnext ä")
    assert not re.search(r"[<>*_`\[\]$\"]", shown.replace("<br>", ""))
    assert "next ä" in shown


def test_an_answer_comes_with_its_probability():
    assert show_answer(turn_of(["yes"], [0.934]), 0) == (
        'yes\n\n<span class="sure">93 % sure, otherwise “no…” (20 %)</span>'
    )
    assert "under 1 % sure" in show_answer(turn_of(["yes"], [0.001]), 0)
    assert show_answer(turn_of(["a"], errors=["out of <memory>"]), 0).startswith('<span class="failed">out of &#60;')


def test_words_that_differ_from_the_first_model_are_marked():
    assert mark_differences("a red car", "a blue car") == "a <mark>blue</mark> car"
    assert mark_differences("yes", "yes") == "yes"
    assert mark_differences("", "<b>") == "<mark>&#60;b&#62;</mark>"
    assert show_answer(turn_of(["red", "blue"]), 1).startswith("<mark>blue</mark>")
    assert "<mark>" not in show_answer(turn_of(["red", "blue"]), 0)


def test_a_turn_is_question_and_answer_in_each_panel(tmp_path):
    turn = turn_of(["a", "b"], thumbnail=tmp_path / "x.jpg", image=Image.new("RGB", (4, 4)))
    panels = show_turns([turn, turn_of(["c", "d"])], 2)
    assert [[message["role"] for message in panel] for panel in panels] == [
        ["user", "user", "assistant", "user", "assistant"]
    ] * 2
    assert panels[0][0]["content"] == {"path": str(tmp_path / "x.jpg")}


@pytest.mark.parametrize(
    ("text", "content", "message"),
    [
        (" ", None, "Type a question"),
        ("x" * 9_000, None, "9000 characters; the most are 8000"),
        ("what?", b"no image", "photo.png can.* be decoded"),
        ("what?", b"\x89PNG\r\n\x1a\n", "photo.png"),
    ],
)
def test_what_cannot_be_asked(tmp_path, text, content, message):
    path = tmp_path / "photo.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(gr.Error, match=message) as raised:
        read_message({"text": text, "files": [] if content is None else [str(path)]})
    assert str(tmp_path) not in raised.value.message


def test_wrong_flags_and_addresses(tmp_path, capsys):
    with pytest.raises(SystemExit):
        web.main(["--model-path", "x", "--auth", "me"])
    assert "USER:PASSWORD" in capsys.readouterr().err
    missing = ["--model-path", str(tmp_path / "none")]
    assert web.main([*missing, "--host", "192.0.2.1"]) == 2
    assert "can't listen on 192.0.2.1, port 7860" in capsys.readouterr().err
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert web.main([*missing, "--port", str(port)]) == 2
        assert f"port {port} (Address already in use); choose another" in capsys.readouterr().err
    assert web.main([*missing, "--port", "0"]) == 2
    assert "none" in capsys.readouterr().err


# --- in a browser -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def session(goldens):
    return Session.load(str(goldens / "llava-v1.5-golden"), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def address(session, goldens, tmp_path_factory):
    """Serve two models side by side; return the address."""
    folder = tmp_path_factory.mktemp("thumbnails")
    conversations = Conversations(lambda: Conversation([session, session], folder))
    examples = [(str(goldens / "images" / "tiny.png"), "Is it tiny?")]
    page = build_page(conversations, ["base", "tuned"], GREEDY, examples)
    _, address, _ = launch(page, "127.0.0.1", 0)
    yield address
    page.close()


@pytest.fixture(scope="module")
def browser():
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
def visit(browser, address):
    """Return the function () -> a visitor's page, each with cookies of its own."""
    contexts = []

    def open_page():
        contexts.append(browser.new_context())
        page = contexts[-1].new_page()
        page.set_default_timeout(120_000)
        page.goto(address)
        page.wait_for_selector("#question textarea")
        return page

    yield open_page
    for context in contexts:
        context.close()


def ask(page, question, image=None):
    """Ask, and wait until both models have answered; an image starts a new conversation."""
    before = page.locator(".sure").count() if image is None else 0
    if image is not None:
        page.set_input_files("#question input[type=file]", image)
        page.wait_for_selector("#question img")
    page.fill("#question textarea", question)
    page.locator("#question textarea").press("Enter")
    page.wait_for_function(f"document.querySelectorAll('.sure').length == {before + 2}")


@pytest.mark.slow
def test_a_conversation_in_a_browser(visit, goldens, session):
    page = visit()
    ask(page, f"Is there railing? {HOSTILE}", goldens / "images" / "landscape.jpg")
    assert page.title() == "base and tuned - llava"
    assert HOSTILE in page.locator(".user.message").all_inner_texts()[-1]
    assert page.locator("#answers img").first.evaluate("image => image.naturalWidth") > 100
    ask(page, "and now?")
    assert page.locator("#answers .bot.message").count() == 4
    page.click("#new")
    page.wait_for_function("document.querySelectorAll('.sure').length == 0")


@pytest.mark.slow
def test_stop_keeps_the_answer_as_far_as_it_came(visit, monkeypatch):
    stream = Chat._stream

    def slow_stream(*arguments):
        for piece in stream(*arguments):
            yield piece
            time.sleep(0.1)

    monkeypatch.setattr(Chat, "_stream", slow_stream)
    page = visit()
    page.click("text=Settings")
    page.get_by_label("number input for Longest answer, in tokens").fill("400")
    page.fill("#question textarea", "Tell me a story")
    page.locator("#question textarea").press("Enter")
    page.wait_for_selector("#question .stop-button")
    page.click("#question .stop-button")
    page.wait_for_selector("#question .submit-button")
    assert page.locator(".sure").count() == 2
    assert max(map(len, page.locator(".bot.message").all_inner_texts())) < 1_000


@pytest.mark.slow
def test_two_visitors_see_nothing_of_each_other(visit, goldens):
    first, second = visit(), visit()
    ask(first, "My secret question?", goldens / "images" / "landscape.jpg")
    ask(second, "Another question?", goldens / "images" / "portrait.png")
    assert "secret" not in second.content()
    ask(first, "and now?")
    assert first.locator(".sure").count() == 4 and second.locator(".sure").count() == 2


@pytest.mark.slow
def test_files_that_are_not_photos(visit, goldens, tmp_path):
    page = visit()
    (tmp_path / "photo.png").write_bytes(b"no image at all")
    page.set_input_files("#question input[type=file]", tmp_path / "photo.png")
    page.fill("#question textarea", "What is this?")
    page.wait_for_timeout(500)
    page.locator("#question textarea").press("Enter")
    page.wait_for_selector("text=photo.png >> nth=0")
    Image.new("RGB", (8_660, 5_774), "red").save(tmp_path / "large.jpg")  # 50 megapixels
    page = visit()
    ask(page, "What color?", tmp_path / "large.jpg")
    assert page.locator("#answers img").first.evaluate("image => image.naturalWidth") == 640
