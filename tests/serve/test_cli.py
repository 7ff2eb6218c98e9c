"""The chat in the terminal, typed through stdin."""

import builtins
import io
import sys

import pytest
import torch

from llava.inference.chat.chat import Chat
from llava.inference.load_image import load_image
from llava.inference.session import Sampling, Session
from llava.model import builder
from llava.serve import cli
from llava.serve.cli import Terminal, main

GREEDY = Sampling(max_new_tokens=5)


@pytest.fixture(scope="module")
def session(goldens):
    torch.set_num_threads(1)
    return Session.load(str(goldens / "llava-v1.5-golden"), device="cpu", dtype="float32")


@pytest.fixture
def talk(session, goldens, monkeypatch, capsys):
    """The function (typed lines, *flags) -> exit code, what was printed, and errors."""
    monkeypatch.setattr(cli, "load_session", lambda args: session)

    def run(lines, *flags, image="landscape.jpg"):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        picture = ["--image-file", str(goldens / "images" / image)] if image else []
        code = main(["--model-path", "any", "--temperature", "0", "--max-new-tokens", "5", *picture, *flags])
        output = capsys.readouterr()
        return code, output.out, output.err

    return run


def answers(session, *turns, images=()):
    chat = Chat(session, GREEDY)
    return ["".join(chat.reply(turn, () if chat.turns else images)) for turn in turns]


@pytest.fixture
def images(goldens):
    return {name: [load_image(str(goldens / "images" / name))] for name in ("landscape.jpg", "portrait.png")}


def test_several_turns_until_the_end_of_input(talk, session, images):
    first, second = answers(session, "Is there railing?", "and now?", images=images["landscape.jpg"])
    assert talk(["Is there railing?", "", "and now?"]) == (
        0,
        f"Type a question, or /help.\nUSER: ASSISTANT: {first}\nUSER: USER: ASSISTANT: {second}\nUSER: \n",
        "",
    )


def test_another_image_starts_anew(talk, session, images, goldens):
    portrait = goldens / "images" / "portrait.png"
    [first] = answers(session, "what?", images=images["landscape.jpg"])
    [second] = answers(session, "what?", images=images["portrait.png"])
    code, output, _ = talk(["what?", f"/image {portrait}", "what?", "/exit", "never asked"])
    assert code == 0
    assert output.split("USER: ")[1:] == [
        f"ASSISTANT: {first}\n",
        f"New conversation about {portrait}.\n",
        f"ASSISTANT: {second}\n",
        "",
    ]


def test_reset_keeps_the_image(talk, session, images):
    [first] = answers(session, "what?", images=images["landscape.jpg"])
    _, output, _ = talk(["what?", "/reset", "what?"])
    assert output.count(f"ASSISTANT: {first}\n") == 2
    assert "New conversation.\n" in output


def test_mistakes_are_named_and_change_nothing(talk, session, images):
    first, second = answers(session, "what?", "why?", images=images["landscape.jpg"])
    code, output, errors = talk(["what?", "/image none.jpg", "/image", "/foo", "why <image>?", "long " * 600, "why?"])
    assert code == 0
    assert f"ASSISTANT: {first}\n" in output
    assert f"ASSISTANT: {second}\n" in output
    lines = errors.splitlines()
    assert (
        lines[0]
        == "error: image none.jpg not found, its folder has no images; check the image folder and the file's name"
    )
    assert lines[1:3] == [f"error: {command!r} is not a command; type /help" for command in ("/image", "/foo")]
    assert lines[3].startswith("error: the question has 1 <image> but 0 images;")
    assert lines[4].endswith("in the context of 512; shorten it; /reset starts a new conversation")


def test_the_limit_of_answers_may_change(talk, session, images):
    chat = Chat(session, GREEDY)
    expected = ["".join(chat.reply("what?", images["landscape.jpg"]))]
    chat.sampling = Sampling(max_new_tokens=2)
    expected.append("".join(chat.reply("why?")))
    code, output, errors = talk(["what?", "/tokens 0", "/tokens many", "/tokens", "/tokens 2", "why?"])
    assert code == 0
    answered = [line.partition("ASSISTANT: ")[2] for line in output.splitlines() if "ASSISTANT: " in line]
    assert answered == expected
    assert "Answers have at most 2 tokens." in output
    assert errors.splitlines() == [
        "error: /tokens 0: give a whole number of tokens, 1 or more",
        "error: /tokens many: give a whole number of tokens, 1 or more",
        "error: '/tokens' is not a command; type /help",
    ]


def test_help_lists_the_commands(talk):
    _, output, _ = talk(["/help"])
    for command in ("/image PATH", "/reset", "/tokens N", "/help", "/exit"):
        assert command in output


def test_without_an_image(talk, session):
    [answer] = answers(session, "hello")
    assert f"ASSISTANT: {answer}\n" in talk(["hello"], image=None)[1]


def test_debug_shows_what_the_model_read(talk, session):
    _, _, errors = talk(["hello"], "--debug", image=None)
    ids = session.prompt_ids("hello")
    assert f"{len(ids) + 4} positions computed; token ids: {str(ids)[:-1]}" in errors


def test_ctrl_c_breaks_an_answer_off_and_ends_at_the_prompt(session, monkeypatch, capsys):
    chat = Chat(session, GREEDY)
    typed = iter(["hello", "and now?"])

    def type_line(prompt):
        line = next(typed, None)
        if line is None:
            raise KeyboardInterrupt
        return line

    shown = []
    write = builtins.print

    def interrupted(*texts, **options):
        if texts and texts[0] == " (stopped)":
            shown.append("stopped")
        elif len(shown) == 0 and options.get("end") == "" and not texts[0].startswith("ASSISTANT"):
            shown.append("piece")
            raise KeyboardInterrupt
        write(*texts, **options)

    monkeypatch.setattr(builtins, "input", type_line)
    monkeypatch.setattr(builtins, "print", interrupted)
    Terminal(chat, []).run()
    monkeypatch.undo()
    assert shown == ["piece", "stopped"]
    assert [question for question, _ in chat.turns] == ["hello", "and now?"]
    assert capsys.readouterr().out.count("ASSISTANT: ") == 2


class TestErrorsAtTheStart:
    def test_a_missing_image(self, talk):
        assert talk([], image="none.jpg")[0] == 2

    def test_an_aspect_ratio_that_does_not_fit(self, talk):
        assert talk([], "--image-aspect-ratio", "pad")[0] == 0
        code, _, errors = talk([], "--image-aspect-ratio", "anyres")
        assert code == 2
        assert errors == (
            "error: --image-aspect-ratio is anyres, but the weights were trained with pad; leave the flag out\n"
        )

    def test_no_bitsandbytes(self, goldens, monkeypatch, capsys):
        monkeypatch.setitem(sys.modules, "bitsandbytes", None)
        assert main(["--model-path", str(goldens / "llava-v1.5-golden"), "--device", "cpu", "--load-4bit"]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: 4 and 8 bit need bitsandbytes")
        assert error.endswith('run: pip install -e ".[quant]"')

    def test_a_missing_model(self, capsys):
        assert main(["--model-path", "/none"]) == 2
        assert "error: /none is neither a directory nor complete in the hub's cache" in capsys.readouterr().err

    def test_out_of_memory(self, goldens, monkeypatch, capsys):
        def too_large(*args):
            raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr(builder, "load_tensors", too_large)
        assert main(["--model-path", str(goldens / "llava-v1.5-golden"), "--device", "cpu"]) == 2
        assert "error: out of memory (CUDA out of memory); pass --load-4bit" in capsys.readouterr().err

    @pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
    def test_a_device_that_is_not_there(self, capsys):
        with pytest.raises(SystemExit, match="2"):
            main(["--model-path", "any", "--device", "cuda"])
        assert "--device: device 'cuda' is not available" in capsys.readouterr().err
