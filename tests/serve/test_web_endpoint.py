"""The web chat on a served model: what is sent, how an answer arrives, what is said when none does."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import logging
import math
import os
import socket
import subprocess
import sys
import threading
from http.server import ThreadingHTTPServer

import pytest
from PIL import Image

pytest.importorskip("gradio", reason="llava[web] is not installed")

from llava.inference.sampling import Sampling
from llava.serve import web
from llava.serve.endpoint import Endpoint, EndpointChat, complete_url
from llava.serve.model_chat import AnswerError, Certainty
from tests.local_server import QuietHandler, running_server

GREEDY = Sampling(max_new_tokens=6)
HANG_GUARD = 120  # seconds
WORDS = ("a", " red", " square")
EVENTS, HTML = ({"Content-Type": kind} for kind in ("text/event-stream", "text/html"))


def event(text=None, logprob=None, end=None, others=()):
    """Chunk of a streamed chat completion."""
    top = [{"token": text, "logprob": logprob}, *({"token": other, "logprob": value} for other, value in others)]
    found = None if logprob is None else {"content": [{"token": text, "logprob": logprob, "top_logprobs": top}]}
    choice = {"index": 0, "delta": {"content": text}, "logprobs": found, "finish_reason": end}
    return {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "m", "choices": [choice]}


class Handler(QuietHandler):
    protocol_version = "HTTP/1.1"

    def send_json(self, status, content):
        self.send(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def start_stream(self):
        self.send_response(200)
        self.send_header("Content-Type", EVENTS["Content-Type"])
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def write_event(self, body):
        data = f"data: {body if isinstance(body, str) else json.dumps(body)}\n\n".encode()
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def end_stream(self):
        self.write_event("[DONE]")
        self.wfile.write(b"0\r\n\r\n")

    def do_GET(self):
        self.server.keys.append(self.headers["Authorization"])
        self.server.list_models(self)

    def do_POST(self):
        body = json.loads(self.read_body())
        self.server.asked.append(body)
        self.server.answer(self, body)


class Server(ThreadingHTTPServer):
    """OpenAI-compatible server whose answers a test writes.

    Attributes:
        models: that it lists.
        asked: bodies of the chat completions it was asked for.
        keys: authorization of the other requests.
        answer: function (handler, body) that answers.
        was_closed: set when a client has closed its connection in mid-answer.
    """

    def __init__(self, address, handler):
        super().__init__(address, handler)
        self.models, self.asked, self.keys, self.was_closed = ["org/tuned"], [], [], threading.Event()
        self.list_models = lambda handler: handler.send_json(
            200, {"object": "list", "data": [{"id": name, "object": "model"} for name in self.models]}
        )
        self.answer = answer_in_words

    def handle_error(self, request, client_address):
        pass  # a client that went away


def answer_in_words(handler, body):
    handler.start_stream()
    for word in WORDS:
        handler.write_event(event(word))
    handler.write_event(event(end="stop"))
    handler.end_stream()


def answer_with_logprobs(handler, body):
    handler.start_stream()
    handler.write_event(event("a", math.log(0.5), others=[("the", math.log(0.3)), ("one", math.log(0.1))]))
    handler.write_event(event(" square", math.log(0.5), others=[(" circle", math.log(0.4))]))
    handler.write_event(event(end="stop"))
    handler.end_stream()


def refuse(status, message):
    return lambda handler, body: handler.send_json(status, {"error": {"message": message}})


def refuse_logprobs(handler, body):
    if "logprobs" in body:
        handler.send_json(400, {"error": {"message": "logprobs is not supported"}})
    else:
        answer_in_words(handler, body)


def break_off(handler, body):
    handler.start_stream()
    handler.write_event(event("a"))
    handler.close_connection = True


def end_early(handler, body):
    handler.start_stream()
    handler.write_event(event("a"))
    handler.wfile.write(b"0\r\n\r\n")


def report_in_stream(handler, body):
    handler.start_stream()
    handler.write_event(event("a"))
    handler.write_event({"error": {"message": "engine died"}})
    handler.end_stream()


def talk_until_closed(handler, body):
    handler.start_stream()
    with contextlib.suppress(ConnectionError):
        while True:
            handler.write_event(event("and "))
            threading.Event().wait(0.02)  # few enough for a slow browser
    handler.server.was_closed.set()


def say_nothing_until_closed(handler, body):
    handler.connection.recv(1)  # returns when the client closes
    handler.server.was_closed.set()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def server():
    with running_server(Handler, Server) as server:
        yield server


@pytest.fixture
def chat(server):
    return EndpointChat(Endpoint(server.address), "org/tuned")


@pytest.fixture
def image():
    return Image.new("RGB", (90, 60), "red")


def ask(chat, question="What is it?", image=None, sampling=GREEDY):
    return "".join(chat.reply(question, image, sampling))


def image_of(message):
    url = message["content"][0]["image_url"]["url"]
    assert url.startswith("data:image/jpeg;base64,")
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("http://host:8000", "http://host:8000/v1"),
        ("https://host/", "https://host/v1"),
        ("http://host/v1/", "http://host/v1"),
        ("https://host/api/openai", "https://host/api/openai"),
    ],
)
def test_an_address_without_a_path_is_that_of_version_1(given, expected):
    assert complete_url(given) == expected


def test_a_conversation_is_sent_with_its_image(server, chat, image):
    assert ask(chat, image=image, sampling=Sampling(0.5, max_new_tokens=7, seed=3)) == "a red square"
    assert chat.n_turns == 1 and chat.latest() == ("a red square", None)
    assert ask(chat, "and now?") == "a red square"
    first, second = server.asked
    assert {name: first[name] for name in ("model", "temperature", "max_tokens", "seed", "stream")} == {
        "model": "org/tuned", "temperature": 0.5, "max_tokens": 7, "seed": 3, "stream": True,
    }  # fmt: skip
    assert "seed" not in second
    [message] = first["messages"]
    assert message["role"] == "user" and message["content"][1] == {"type": "text", "text": "What is it?"}
    assert image_of(message).size == (90, 60)
    assert second["messages"] == [
        message,
        {"role": "assistant", "content": "a red square"},
        {"role": "user", "content": "and now?"},
    ]
    chat.undo()
    assert chat.n_turns == 1
    chat.reset()
    assert chat.n_turns == 0


def test_a_large_image_is_sent_smaller(server, chat):
    ask(chat, image=Image.new("RGB", (8_660, 5_774), "red"))
    assert image_of(server.asked[0]["messages"][0]).size == (2_048, 1_365)


def test_logprobs_become_a_certainty(server, chat):
    server.answer = answer_with_logprobs
    ask(chat)
    text, certainty = chat.latest()
    assert text == "a square"
    assert certainty == Certainty(pytest.approx(0.25), "the", pytest.approx(0.3))


def test_a_server_that_refuses_logprobs_is_asked_without(server, chat, caplog):
    server.answer = refuse_logprobs
    with caplog.at_level(logging.WARNING):
        assert ask(chat) == ask(chat) == "a red square"
    assert ["logprobs" in body for body in server.asked] == [True, False, False]
    assert chat.latest() == ("a red square", None)
    assert "refuses log-probabilities" in caplog.text


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (refuse(401, "bad key"), r"refuses the key \(HTTP 401\); set OPENAI_API_KEY"),
        (refuse(403, "no"), r"refuses the key \(HTTP 403\)"),
        (refuse(404, "no such model"), r"does not know the model org/tuned \(no such model\)"),
        (refuse(400, "context length is 2048"), r"reports HTTP 400 \(context length is 2048\)"),
        (refuse(500, "x" * 5_000), r"reports HTTP 500 \(x{300}…\)"),
        (break_off, "can't be reached, or broke off"),
        (end_early, "broke off in mid-answer"),
        (report_in_stream, r"reports an error \(engine died\)"),
        (lambda handler, _: handler.send(200, b"data: <html>\n\n", EVENTS), "does not stream what"),
        (lambda handler, _: handler.send(200, b"<html>hello</html>", HTML), "broke off in mid-answer"),
    ],
)
def test_what_a_server_does_wrong_is_said_in_a_sentence(server, chat, answer, message):
    server.answer = answer
    with pytest.raises(AnswerError, match=message):
        ask(chat)
    assert chat.n_turns == 0
    server.answer = answer_in_words
    assert ask(chat) == "a red square"


def test_a_server_that_went_away_is_named(server):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    chat = EndpointChat(Endpoint(f"http://127.0.0.1:{port}"), "m")
    with pytest.raises(AnswerError, match="can't be reached, or broke off"):
        ask(chat)


@pytest.mark.parametrize("answer", [talk_until_closed, say_nothing_until_closed])
def test_stop_closes_the_connection(server, chat, answer):
    server.answer = answer
    pieces = chat.reply("What is it?", None, GREEDY)
    while not server.asked:
        next(pieces)
    said = "".join(next(pieces) for _ in range(20))
    pieces.close()
    assert server.was_closed.wait(HANG_GUARD)
    assert chat.n_turns == (1 if said else 0)
    if said:
        assert chat.latest()[0].startswith(said.strip()[:20])


@pytest.mark.slow
def test_a_served_model_beside_another_in_a_browser(server, serve_page, scripted_chat, open_page):
    server.answer = answer_with_logprobs
    endpoint = Endpoint(server.address)
    page = open_page(serve_page(lambda: [scripted_chat("a red square"), EndpointChat(endpoint, "m")], ("here", "m")))
    page.fill("#question textarea", "What is it?")
    page.locator("#question textarea").press("Enter")
    page.wait_for_function("document.querySelectorAll('.sure').length == 2")
    first, second = page.locator(".bot.message").all_inner_texts()
    assert "a red square" in first and "the server does not say how sure it is" in first
    assert "a square" in second and "25 % sure, otherwise “the…” (30 %)" in second
    server.answer = refuse(500, "engine <died>")
    page.wait_for_selector("#question .submit-button")
    page.click("#retry")
    page.wait_for_selector(".failed")
    assert "HTTP 500 (engine <died>)" in page.locator(".failed").inner_text()
    page.wait_for_selector("#question .submit-button")
    server.answer = talk_until_closed
    page.click("#retry")
    page.wait_for_selector("text=and and and >> nth=0")
    page.click("#question .stop-button")
    assert server.was_closed.wait(HANG_GUARD)
    page.wait_for_selector("#question .submit-button")


# --- the program ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "no model: pass --model-path DIR to load one, or --endpoint URL"),
        (["--endpoint", "ftp://x"], "'ftp://x' is not an address like http://127.0.0.1:8000"),
        (["--endpoint", "localhost:8000"], "is not an address like"),
        (["--endpoint-model", "a", "--model-path", "m"], "--endpoint-model names a model of --endpoint URL"),
        (["--endpoint", "http://x", "--load-4bit"], "--load-4bit is about a model that is loaded here"),
        (["--endpoint", "http://x", "--dtype", "float32"], "--dtype is about a model that is loaded here"),
        (["--endpoint", "http://x", "--compare-with", "b"], "--compare-with is about a model that is loaded here"),
        (["--endpoint", "http://x", "--model-path", "a", "--compare-with", "b"], "3 models are named"),
        (["--endpoint", "http://x", "--endpoint-model", "a", "b", "c"], "3 models are named"),
    ],
)
def test_flags_that_do_not_go_together(capsys, flags, message):
    with pytest.raises(SystemExit) as raised:
        web.main(flags)
    assert raised.value.code == 2
    assert message in capsys.readouterr().err


def run_main(server, *flags):
    return web.main(["--endpoint", server.address, "--port", "0", *flags])


@pytest.mark.parametrize(
    ("models", "message"),
    [
        (["a", "b"], "/v1 serves 2 models (a, b); name one with --endpoint-model"),
        ([str(number) for number in range(99)], "serves 99 models (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, …)"),
        ([], "does not list its models; name one with --endpoint-model"),
    ],
)
def test_one_of_several_models_must_be_named(server, capsys, models, message):
    server.models = models
    assert run_main(server) == 2
    assert message in capsys.readouterr().err


def test_what_is_wrong_at_the_start(server, capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    server.list_models = lambda handler: handler.send_json(401, {"error": {"message": "bad key"}})
    assert run_main(server) == 2
    printed = capsys.readouterr().err
    assert "refuses the key (HTTP 401); set OPENAI_API_KEY" in printed and "secret-key" not in printed
    assert server.keys == ["Bearer secret-key"]
    server.list_models = lambda handler: handler.send_json(500, {"error": {"message": "starting"}})
    assert run_main(server) == 2
    assert "reports HTTP 500 (starting)" in capsys.readouterr().err
    for status in (200, 404):
        server.list_models = lambda handler, status=status: handler.send(status, b"<html>hello</html>", HTML)
        assert run_main(server) == 2
        assert capsys.readouterr().err.count("\n") == 1
    with socket.create_server(("127.0.0.1", 0)) as taken:
        server.address = f"http://127.0.0.1:{taken.getsockname()[1]}"
    assert run_main(server) == 2
    assert "can't be reached" in capsys.readouterr().err


PROGRAM = """
import sys
sys.modules["torch"] = sys.modules["transformers"] = None  # importing them fails
from llava.serve import web
raise SystemExit(web.main(sys.argv[1:]))
"""


@pytest.fixture
def program(server, tmp_path):
    """The page of the served model, in a process without torch."""
    command = [sys.executable, "-c", PROGRAM, "--endpoint", server.address, "--port", "0"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        guard = threading.Timer(HANG_GUARD, process.kill)
        guard.start()
        try:
            yield process
        finally:
            guard.cancel()
            process.kill()


def test_the_page_of_a_served_model_needs_no_torch_and_deletes_its_folder(program, tmp_path):
    line = program.stdout.readline()
    assert line.startswith("The chat is at http://127.0.0.1:"), line + program.stdout.read()
    assert list(tmp_path.glob("llava-chat-*"))
    program.terminate()
    assert program.wait() == 130
    assert "Traceback" not in program.stdout.read()
    assert not list(tmp_path.glob("llava-chat-*"))
