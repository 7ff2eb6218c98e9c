"""The web chat under many, hostile and vanishing visitors: what is bounded, refused, given back and never read."""

from __future__ import annotations

import gc
import json
import threading
import time
import uuid
import weakref
from pathlib import Path

import psutil
import pytest
from PIL import Image

pytest.importorskip("gradio", reason="llava[web] is not installed")

import httpx  # comes with Gradio

from llava.serve import web_page
from llava.serve.model_chat import AnswerError

HANG_GUARD = 300  # seconds
HOSTILE = (
    "<img src=x onerror=\"document.title='owned'\"> <script>document.title='owned'</script> **a** [b](javascript:c)"
)


def wait_until(is_true):
    """Wait; a guard against hanging is all that ends it otherwise."""
    end = time.monotonic() + HANG_GUARD
    while not is_true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


class Visitor:
    """Client of the page's HTTP API, as its JavaScript is one."""

    def __init__(self, address, session=None):
        self.session = session or uuid.uuid4().hex
        self.http = httpx.Client(base_url=f"{address}gradio_api", timeout=HANG_GUARD, trust_env=False)
        self.config = httpx.get(f"{address}config", timeout=HANG_GUARD, trust_env=False).json()

    def function(self, element, event):
        """Number of the page's function for an event of an element."""
        ids = [part["id"] for part in self.config["components"] if part["props"].get("elem_id") == element]
        return next(f["id"] for f in self.config["dependencies"] if [ids[0], event] in [list(t) for t in f["targets"]])

    def post(self, element, event, data):
        body = {"data": data, "fn_index": self.function(element, event), "session_hash": self.session}
        return self.http.post("/queue/join", json=body)

    def ask(self, question="What is it?", files=()):
        return self.post("question", "submit", [{"text": question, "files": list(files)}, 0, 6])

    def upload(self, data, name="photo.png"):
        return self.http.post("/upload", files={"files": (name, data)})

    def messages(self):
        """Yield what the page is sent, until everything that was asked is done."""
        with self.http.stream("GET", "/queue/data", params={"session_hash": self.session}) as response:
            for line in response.iter_lines():
                if line.startswith("data:"):
                    message = json.loads(line.removeprefix("data:"))
                    if message["msg"] == "close_stream":
                        return
                    yield message

    def result(self):
        """The last message about the latest question."""
        return [message for message in self.messages() if message["msg"] == "process_completed"][-1]


def file_of(path, **fields):
    return {"path": str(path), "meta": {"_type": "gradio.FileData"}, **fields}


@pytest.fixture
def chats(scripted_chat):
    """The chats of all visitors so far; the text and the pace of the next one are those of the first."""
    return []


@pytest.fixture
def address(serve_page, scripted_chat, chats):
    go = threading.Event()
    go.set()

    def create():
        chats.append(scripted_chat())
        chats[-1].go = create.go
        return [chats[-1]]

    create.go = go
    address = serve_page(create)
    yield address
    go.set()


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    Image.new("RGB", (30, 20), "red").save(path)
    return path


def hold(chats, address):
    """Start an answer that does not end; returns its chat, whose `go` lets all answers end."""
    visitor = Visitor(address)
    visitor.ask("warm up")
    assert visitor.result()["success"]
    go = chats[-1].go
    go.clear()
    first = Visitor(address)
    first.ask("the first question")
    wait_until(lambda: len(chats) == 2 and chats[1].started.is_set())
    return chats[1]


# --- many -------------------------------------------------------------------------------------------------------------


def test_of_a_thousand_quick_questions_64_wait_and_the_rest_are_refused(address, chats):
    held = hold(chats, address)
    process = psutil.Process()
    visitors = [Visitor(address)]
    before = process.memory_info().rss
    answers = []
    for number in range(1_000):
        visitors[0].session = f"visitor{number}"
        answers.append(visitors[0].ask("x" * 7_000))
    assert [answer.status_code for answer in answers].count(200) == web_page.MAX_WAITING == 64
    refused = [answer for answer in answers if answer.status_code != 200]
    assert all(answer.status_code == 503 and "Queue is full" in answer.text for answer in refused)
    assert process.memory_info().rss - before < 500e6
    held.go.set()
    last = Visitor(address)
    wait_until(lambda: last.ask("and now?").status_code == 200)
    assert "a red square" in json.dumps(last.result()["output"])
    assert len(chats) == 1 + 1 + 64 + 1


def test_a_visitor_who_asks_twice_is_answered_in_order(serve_page, scripted_chat):
    chats = []

    def create():
        chats.append(scripted_chat())
        chats[0].go.clear()
        return [chats[0]]

    address = serve_page(create, answers_at_once=8)
    visitor = Visitor(address)
    for number in range(3):
        assert visitor.ask(f"question {number}").status_code == 200
    wait_until(lambda: chats and chats[0].started.is_set())
    other = Visitor(address, visitor.session)
    assert len(chats[0].asked) == 1  # the others wait
    chats[0].go.set()
    assert other.result()["success"]
    assert len(chats) == 1 and len(chats[0].answers) == 3


def test_at_a_server_several_visitors_are_answered_at_once(serve_page, scripted_chat):
    chats = []

    def create():
        chats.append(scripted_chat())
        chats[-1].go.clear()
        return [chats[-1]]

    address = serve_page(create, answers_at_once=2)
    first, second = Visitor(address), Visitor(address)
    first.ask()
    second.ask()
    wait_until(lambda: len(chats) == 2 and all(chat.started.is_set() for chat in chats))
    for chat in chats:
        chat.go.set()
    assert first.result()["success"] and second.result()["success"]


# --- those who leave --------------------------------------------------------------------------------------------------


def test_the_answer_of_a_visitor_who_left_ends_and_its_memory_comes_back(serve_page, scripted_chat):
    found = []

    class Chat(scripted_chat):
        def __init__(self):
            super().__init__()
            self.go.clear()
            found.append((weakref.ref(self), self.started, self.ended))

    address = serve_page(lambda: [Chat()])
    visitor = Visitor(address)
    with visitor.http.stream("GET", f"/heartbeat/{visitor.session}") as heartbeat:
        lines = heartbeat.iter_lines()  # closes the connection when it is collected
        assert next(lines)
        visitor.ask()
        wait_until(lambda: found and found[0][1].is_set())
    reference, _, ended = found[0]
    assert ended.wait(HANG_GUARD)

    def is_gone():
        gc.collect()
        return reference() is None

    wait_until(is_gone)


@pytest.mark.slow
def test_a_browser_that_is_closed_in_mid_answer(address, chats, open_page):
    page = open_page(address)
    page.fill("#question textarea", "Are you there?")
    page.locator("#question textarea").press("Enter")
    wait_until(lambda: chats and chats[0].ended.is_set())
    chats[0].go.clear()
    chats[0].ended.clear()
    page.wait_for_selector("#question .submit-button")
    page.fill("#question textarea", "And now?")
    page.locator("#question textarea").press("Enter")
    page.wait_for_selector("#question .stop-button")
    page.context.close()
    assert chats[0].ended.wait(HANG_GUARD)


@pytest.mark.slow
def test_a_full_queue_is_a_word_in_the_browser(address, chats, open_page):
    page = open_page(address)
    held = hold(chats, address)
    crowd = Visitor(address)
    for _ in range(web_page.MAX_WAITING):
        assert crowd.ask().status_code == 200
    page.fill("#question textarea", "May I?")
    page.locator("#question textarea").press("Enter")
    page.wait_for_selector(".toast-body")
    assert "currently busy" in page.locator(".toast-body").inner_text()
    held.go.set()


# --- files ------------------------------------------------------------------------------------------------------------


def test_an_upload_is_shown_to_the_model_and_copied(address, chats, photo, upload_folder):
    visitor = Visitor(address)
    [path] = visitor.upload(photo.read_bytes()).json()
    assert path.startswith(str((upload_folder / "uploads").resolve()))
    visitor.ask(files=[file_of(path)])
    assert visitor.result()["success"]
    [(question, image)] = chats[0].asked
    assert question == "What is it?" and image.size == (30, 20)


def test_an_upload_over_the_limit_is_refused_and_not_kept(open_address, upload_folder):
    visitor = Visitor(open_address)
    answer = visitor.upload(b"x" * (web_page.UPLOAD_LIMIT + 1))
    assert answer.status_code == 413, answer.text
    assert [path for path in upload_folder.rglob("*") if path.is_file() and path.stat().st_size > 1e6] == []


def test_uploads_expire(serve_page, scripted_chat, photo, upload_folder, monkeypatch):
    monkeypatch.setattr(web_page, "_KEPT_SECONDS", 1)
    visitor = Visitor(serve_page(lambda: [scripted_chat()]))
    [path] = visitor.upload(photo.read_bytes() + b"expires").json()
    wait_until(lambda: not Path(path).exists())


@pytest.fixture(scope="module")
def open_chats():
    """The chats of the visitors of `open_address`."""
    return []


@pytest.fixture(scope="module")
def open_address(serve_page, scripted_chat, open_chats):
    """A page for many tests."""

    def create():
        open_chats.append(scripted_chat())
        return [open_chats[-1]]

    return serve_page(create)


@pytest.fixture(scope="module")
def secret(upload_folder):
    """An image beside the upload folder."""
    path = upload_folder / "secret.png"
    Image.new("RGB", (31, 17), "blue").save(path)
    return path


PLACES = ["{secret}", "{uploads}/../secret.png", "{uploads}/x/../../secret.png", "../secret.png", "/etc/passwd",
          "../../../../../../etc/passwd", "file://{secret}", "{uploads}/..%2fsecret.png"]  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_files_outside_the_upload_folder_are_not_served(open_address, upload_folder, secret, place):
    place = place.format(secret=secret, uploads=upload_folder / "uploads")
    host, port = open_address.removeprefix("http://").strip("/").split(":")
    for route in ("gradio_api/file=", "gradio_api/file/", "file=", "static/", "assets/", "gradio_api/stream/"):
        with httpx.Client(trust_env=False, timeout=HANG_GUARD) as client:
            for written in (place, place.replace("/", "%2F").replace("..", "%2e%2e")):
                url = httpx.URL(scheme="http", host=host, port=int(port), raw_path=f"/{route}{written}".encode())
                answer = client.get(url)
                assert answer.status_code in (400, 403, 404, 405, 422, 500), (url, answer.status_code)
                assert answer.content != secret.read_bytes() and b"root:" not in answer.content


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("shape", ["as the page sends it", "without mark", "text", "as a stream", "with an address"])
def test_a_forged_request_reads_no_file_outside_the_upload_folder(
    open_address, open_chats, upload_folder, secret, place, shape
):
    path = place.format(secret=secret, uploads=upload_folder / "uploads")
    file = {
        "as the page sends it": file_of(path),
        "without mark": {"path": path},
        "text": path,
        "as a stream": file_of(path, is_stream=True),
        "with an address": file_of(path, url=f"/gradio_api/file={path}", orig_name="photo.png"),
    }[shape]
    visitor = Visitor(open_address)
    answer = visitor.ask(files=[file])
    if answer.status_code == 200:
        assert not visitor.result()["success"]
    assert not any(chat.asked for chat in open_chats)


def test_an_address_in_a_request_is_not_fetched(open_address, open_chats):
    """Gradio itself fetches it, without a limit of size, unless the host is a private one."""
    visitor = Visitor(open_address)
    for url in ("http://example.org/photo.png", "https://example.org/photo.png", f"{open_address}gradio_api/info"):
        visitor.ask(files=[file_of(url)])
        message = visitor.result()
        assert not message["success"] and "addresses are not fetched" in message["output"]["error"]
    assert not any(chat.asked for chat in open_chats)


# --- faults -----------------------------------------------------------------------------------------------------------


def test_a_model_that_fails_gets_a_message_and_the_server_lives(serve_page, scripted_chat):
    class Chat(scripted_chat):
        def reply(self, question, image, sampling):
            if question == "large":
                raise AnswerError("out of memory <b>")
            return super().reply(question, image, sampling)

    visitor = Visitor(serve_page(lambda: [Chat()]))
    visitor.ask("large")
    shown = json.dumps(visitor.result()["output"])
    assert "out of memory &#60;b&#62;" in shown
    visitor.ask("small")
    assert "a red square" in json.dumps(visitor.result()["output"])


@pytest.mark.slow
def test_after_a_fault_of_the_program_a_visitor_can_ask_again(serve_page, scripted_chat, open_page):
    class Chat(scripted_chat):
        def reply(self, question, image, sampling):
            if question == "fail":
                raise RuntimeError("no kernel")
            return super().reply(question, image, sampling)

    page = open_page(serve_page(lambda: [Chat()]))
    page.fill("#question textarea", "fail")
    page.locator("#question textarea").press("Enter")
    page.wait_for_selector(".failed:has-text('the program failed in this answer')")
    page.wait_for_selector("#question .submit-button")
    page.fill("#question textarea", "again")
    page.locator("#question textarea").press("Enter")
    page.wait_for_selector("text=a red square")


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_hostile_and_long_texts_on_a_phone(serve_page, scripted_chat, open_page, scheme):
    texts = iter([f"{HOSTILE} a red square", f"{HOSTILE} a {'blue' * 500}"])
    address = serve_page(lambda: [scripted_chat(next(texts)), scripted_chat(next(texts))], (HOSTILE, "tuned"))
    page = open_page(address, viewport={"width": 390, "height": 844}, color_scheme=scheme, is_mobile=True)
    page.fill("#question textarea", "W" * 5_000 + HOSTILE)
    page.locator("#question textarea").press("Enter")
    page.wait_for_function("document.querySelectorAll('.sure').length == 2")
    assert page.title() != "owned"
    assert HOSTILE in page.locator(".bot.message").first.inner_text()
    assert page.locator(".bot.message mark").all_inner_texts()[0].startswith("blueblue")
    assert page.locator(".bot.message img, .bot.message script, .bot.message a").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    lightness = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (max(lightness[:3]) < 80) == (scheme == "dark")
