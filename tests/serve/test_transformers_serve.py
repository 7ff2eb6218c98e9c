"""`transformers serve` answers over HTTP, from the exported `hf` layout, what this code answers."""

from __future__ import annotations

import base64
import io
import json
import re
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

import llava
from llava.inference.sampling import Sampling

pytestmark = pytest.mark.slow
for module in ("fastapi", "uvicorn", "openai"):
    pytest.importorskip(module, reason="`transformers serve` needs transformers[serving]")

pytest.importorskip("transformers", minversion="5.24", reason="5.10's server needs requests, which its extra lacks")

TINY = Path(__file__).parents[2] / "playground/llava-tiny"
QUESTIONS = ["What color is it?", "What shape is it?", "Is it red?", "How many shapes are there?"]
HANG_GUARD = 540  # seconds


def draw_circle():
    image = Image.new("RGB", (90, 60), "white")
    ImageDraw.Draw(image).ellipse((30, 10, 70, 50), fill="red")
    return image


def image_part(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


@pytest.fixture(scope="module")
def checkpoint(load_program, tmp_path_factory):
    """The embedded model in the hf layout."""
    target = tmp_path_factory.mktemp("serve") / "llava-tiny-hf"
    convert = load_program("scripts/convert_checkpoint.py").main
    assert convert(["--from", str(TINY), "--to", str(target), "--layout", "hf"]) == 0
    return target


@pytest.fixture(scope="module")
def address(checkpoint):
    """The address of a server that the system gave a free port."""
    words = ["serve", str(checkpoint), "--device", "cpu", "--dtype", "float32", "--host", "127.0.0.1", "--port", "0"]
    command = [sys.executable, "-m", "transformers.cli.transformers", *words]
    with subprocess.Popen(command, stderr=subprocess.STDOUT, stdout=subprocess.PIPE, text=True) as server:
        guard = threading.Timer(HANG_GUARD, server.kill)
        guard.start()
        try:
            found = wait_for_address(server.stdout)
            threading.Thread(target=server.stdout.read, daemon=True).start()  # a full pipe would stop the server
            yield found
        finally:
            guard.cancel()
            server.kill()


def wait_for_address(lines):
    """Read a server's log up to the line with its address; the log ends where the server ends."""
    printed = []
    for line in lines:
        printed.append(line)
        if found := re.search(r"running on (http://127\.0\.0\.1:[1-9]\d*)", line):
            return found[1]
    pytest.fail(f"the server did not start:\n{''.join(printed)}")


@pytest.fixture(scope="module")
def complete(address, checkpoint):
    """The function (messages, more fields) -> body of the answer to a chat completion."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def post(messages, **fields):
        body = {"model": str(checkpoint), "messages": messages, "temperature": 0, "max_tokens": 16, **fields}
        request = urllib.request.Request(
            f"{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with opener.open(request, timeout=HANG_GUARD) as answer:
            return answer.read().decode()

    return post


@pytest.fixture(scope="module")
def model():
    return llava.load(str(TINY), device="cpu", dtype="float32")


def streamed_text(body):
    events = [json.loads(line.removeprefix("data: ")) for line in body.splitlines() if line.startswith("data: {")]
    assert events[-1]["choices"][0]["finish_reason"] == "stop"
    return "".join(event["choices"][0]["delta"].get("content", "") for event in events)


@pytest.mark.parametrize("question", QUESTIONS)
def test_answers_as_here_in_one_message_or_two(complete, model, question):
    image = draw_circle()
    expected = model.ask(image, question, max_new_tokens=16).text
    session = model.session
    n_tokens = session.spliced_length(session.prepare(question, [image]))
    shown, text = image_part(image), {"type": "text", "text": question}
    one = [{"role": "user", "content": [shown, text]}]
    two = [{"role": "user", "content": [shown]}, {"role": "user", "content": question}]
    assert expected
    for messages in (one, two):
        body = json.loads(complete(messages))
        assert body["choices"][0]["message"]["content"] == expected
        assert body["choices"][0]["finish_reason"] == "stop"
        assert body["usage"]["prompt_tokens"] == n_tokens
        assert streamed_text(complete(messages, stream=True)) == expected


def test_a_second_turn_answers_as_here(complete, model):
    image = draw_circle()
    chat = model.chat(image, max_new_tokens=16)
    first, second = (chat.ask(question).text for question in QUESTIONS[:2])
    messages = [
        {"role": "user", "content": [image_part(image)]},
        {"role": "user", "content": QUESTIONS[0]},
        {"role": "assistant", "content": first},
        {"role": "user", "content": QUESTIONS[1]},
    ]
    assert json.loads(complete(messages))["choices"][0]["message"]["content"] == second


def test_the_web_chat_talks_to_it(address, checkpoint, model, monkeypatch):
    from llava.serve.endpoint import Endpoint, EndpointChat  # needs openai

    monkeypatch.setenv("NO_PROXY", "*")
    image, chat = draw_circle(), EndpointChat(Endpoint(address), str(checkpoint))
    ours = model.chat(image, max_new_tokens=16)
    for question in QUESTIONS[:2]:
        shown = None if chat.n_turns else image
        text = "".join(chat.reply(question, shown, Sampling(max_new_tokens=16)))
        assert text.strip() == ours.ask(question).text
        assert chat.latest() == (text.strip(), None)  # this server gives no log-probabilities
