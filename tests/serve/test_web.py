"""The web chat: what its page shows, and the page itself in a browser."""

import re
import socket
import time
import types

import pytest
from PIL import Image

# ruff: noqa: E402 - the page needs Gradio
gr = pytest.importorskip("gradio", reason="llava[web] is not installed")

from llava.inference.chat.chat import Chat
from llava.inference.sampling import Sampling
from llava.inference.session import Session
from llava.serve import web
from llava.serve.conversations import Answer, Conversation, Conversations, Turn
from llava.serve.local_chat import LocalChat
from llava.serve.model_chat import Certainty
from llava.serve.web_page import build_page, escape, launch, mark_differences, read_message, show_answer, show_turns

HOSTILE = (
    """<img src=x onerror="document.title='owned'"><script>document.title='owned'</script> *a* _b_ `c` [d](e) $f$"""
)
GREEDY = Sampling(max_new_tokens=6)


def turn_of(texts, probabilities=None, error=None, thumbnail=None):
    certainties = [Certainty(p, "no", 0.2) for p in probabilities or [0.5] * len(texts)]
    answers = [Answer(text, error is None, sure, error) for text, sure in zip(texts, certainties, strict=True)]
    return Turn("why?", thumbnail, answers)


def test_text_is_shown_as_it_is():
    shown = escape(HOSTILE + "\nnext ä")
    assert not re.search(r"[<>*_`\[\]$\"]", shown.replace("<br>", ""))
    assert "next ä" in shown


def test_an_answer_comes_with_its_probability():
    assert show_answer(turn_of(["yes"], [0.934]), 0) == (
        'yes\n\n<span class="sure">93 % sure, otherwise “no…” (20 %)</span>'
    )
    assert "under 1 % sure" in show_answer(turn_of(["yes"], [0.001]), 0)
    assert "otherwise no text (8 %)" in show_answer(Turn("", None, [Answer("a", True, Certainty(0.9, "", 0.08))]), 0)
    assert "the server does not say" in show_answer(Turn("", None, [Answer("a", True, None)]), 0)
    assert show_answer(turn_of([""], error="out of <memory>"), 0).startswith('<span class="failed">out of &#60;')
    assert show_answer(turn_of(["half"], error="no"), 0) == 'half\n\n<span class="failed">no</span>'


def test_words_that_differ_from_the_first_model_are_marked():
    assert mark_differences("a red car", "a blue car") == "a <mark>blue</mark> car"
    assert mark_differences("yes", "yes") == "yes"
    assert mark_differences("", "<b>") == "<mark>&#60;b&#62;</mark>"
    assert show_answer(turn_of(["red", "blue"]), 1).startswith("<mark>blue</mark>")
    assert "<mark>" not in show_answer(turn_of(["red", "blue"]), 0)


def test_a_turn_is_question_and_answer_in_each_panel(tmp_path):
    turn = turn_of(["a", "b"], thumbnail=tmp_path / "x.jpg")
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
def test_what_cannot_be_asked(upload_folder, text, content, message):
    path = upload_folder / "uploads" / "photo.png"
    path.parent.mkdir(exist_ok=True)
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(gr.Error, match=message) as raised:
        read_message({"text": text, "files": [] if content is None else [str(path)]})
    assert str(path.parent) not in raised.value.message


def test_a_file_of_the_server_is_not_read(tmp_path):
    """Gradio refuses it earlier; `test_web_limits` asks over HTTP."""
    Image.new("RGB", (4, 4)).save(tmp_path / "photo.png")
    for path in (tmp_path / "photo.png", tmp_path / "x" / ".." / "photo.png"):
        with pytest.raises(gr.Error, match="files of the server are not read"):
            read_message({"text": "what?", "files": [str(path)]})


def test_wrong_flags_and_addresses(tmp_path, capsys):
    with pytest.raises(SystemExit):
        web.main(["--model-path", "x", "--auth", "me"])
    assert "USER:PASSWORD" in capsys.readouterr().err
    missing = ["--model-path", str(tmp_path / "none")]
    assert web.main([*missing, "--host", "192.0.2.1"]) == 2
    assert "can't listen on 192.0.2.1, port 7860" in capsys.readouterr().err
    for number in (-1, 65_536):
        assert web.main([*missing, "--port", str(number)]) == 2
        assert f"can't listen on port {number} (ports are 0 to 65535); choose another" in capsys.readouterr().err
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert web.main([*missing, "--port", str(port)]) == 2
        assert f"port {port} (Address already in use); choose another" in capsys.readouterr().err
    assert web.main([*missing, "--port", "0"]) == 2
    assert "none" in capsys.readouterr().err
    assert web.main([*missing, "--port", "0", "--examples", "none.jsonl"]) == 2
    assert "none.jsonl can't be read (No such file or directory); check --examples" in capsys.readouterr().err


def test_a_model_without_vision_tower_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(web, "load_session", lambda _: types.SimpleNamespace(image_processor=None))
    assert web.main(["--model-path", "text-only", "--port", "0"]) == 2
    assert capsys.readouterr().err == (
        "error: text-only has no vision tower, so it can't see images; pass --vision-tower DIR\n"
    )


# --- in a browser -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def session(goldens):
    return Session.load(str(goldens / "llava-v1.5-golden"), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def address(session, goldens, upload_folder):
    """Serve two models side by side; return the address."""
    conversations = Conversations(lambda: Conversation([LocalChat(session), LocalChat(session)], upload_folder))
    examples = [(str(goldens / "images" / "tiny.png"), "Is it tiny?")]
    page = build_page(conversations, ["base", "tuned"], GREEDY, examples)
    _, address, _ = launch(page, "127.0.0.1", 0)
    yield address
    page.close(verbose=False)


@pytest.fixture
def visit(open_page, address):
    """The function () -> a visitor's page."""
    return lambda: open_page(address)


def ask(page, question, image=None):
    """Ask, and wait until both models have answered; an image starts a new conversation."""
    page.wait_for_selector("#question .submit-button")
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
def test_an_example_is_asked_with_its_image(visit):
    page = visit()
    page.click("text=Is it tiny?")
    page.wait_for_selector("#question img")
    page.locator("#question textarea").press("Enter")
    page.wait_for_function("document.querySelectorAll('.sure').length == 2")
    page.wait_for_function("document.querySelectorAll('#answers img').length == 2")  # they are loaded after the text


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
    page.wait_for_selector("#question .submit-button")
    page.wait_for_selector("#question :text('photo.png'), #question img, #question .thumbnail-item")
    page.fill("#question textarea", "What is this?")
    page.locator("#question textarea").press("Enter")
    page.wait_for_selector('.toast-body:has-text("can\'t be decoded")')
    Image.new("RGB", (8_660, 5_774), "red").save(tmp_path / "large.jpg")  # 50 megapixels
    page = visit()
    ask(page, "What color?", tmp_path / "large.jpg")
    assert page.locator("#answers img").first.evaluate("image => image.naturalWidth") == 640
