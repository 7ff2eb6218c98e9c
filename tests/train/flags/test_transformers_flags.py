"""What is read from transformers' source is what transformers itself has, in every supported version."""

from __future__ import annotations

import argparse
import dataclasses
import enum

import pytest
from transformers import HfArgumentParser

from llava.train.flags import command_line, transformers_flags
from llava.train.flags.command_line import build_parser, early_training_arguments, parse_arguments
from llava.train.flags.training_arguments import TrainingArguments
from llava.train.flags.transformers_flags import NotReadable, read_fields, read_parser

NEEDED = ["--output_dir", "out", "--data_path", "data.json", "--use_cpu", "True", "--report_to", "none"]


def comparable(value):
    """Enumerations by their values, other types by their name."""
    if isinstance(value, type) and issubclass(value, enum.Enum):
        return [member.value for member in value]
    return getattr(value, "__name__", value)


def describe(parser):
    return {
        tuple(action.option_strings): [
            type(action).__name__,
            *(comparable(getattr(action, name)) for name in ("dest", "nargs", "const", "default", "type", "required")),
            action.choices and list(action.choices),
            action.help,
        ]
        for action in parser._actions
    }


def test_the_early_parser_has_every_flag_default_and_choice_of_the_real_one():
    early = build_parser(read_parser(), early_training_arguments())
    real = build_parser(HfArgumentParser, TrainingArguments)
    assert describe(early) == describe(real)
    assert early.format_help() == real.format_help()
    assert len(describe(early)) > 150


@pytest.mark.parametrize(
    "words",
    [
        ["--lora_r=8", "--learning-rate", "1e-3"],
        ["--per_device_train", "2"],  # abbreviated
        ["--no_average_tokens_across_devices", "--bf16", "y", "--fp16", "no", "--lora_enable"],
        ["--report_to", "none", "--lr_scheduler_type", "cosine", "--optim=adafactor", "--warmup_steps", "3"],
        ["--log_level", "debug", "--torch_compile_mode", "default", "--debug", "underflow_overflow"],
        ["--lr_scheduler_kwargs", '{"num_cycles": 2}', "--fsdp_config", '{"version": 2}', "--hub_private_repo", "y"],
        ["--label_names", "a", "b", "--gradient_checkpointing", "--eval_steps", "0.5"],
    ],
)
def test_the_early_parser_reads_words_as_the_real_one(words):
    words = ["--output_dir", "out", *words]
    early = build_parser(read_parser(), early_training_arguments()).parse_known_args(words)
    real = build_parser(HfArgumentParser, TrainingArguments).parse_known_args(words)
    assert {key: str(value) for key, value in vars(early[0]).items()} == {
        key: str(value) for key, value in vars(real[0]).items()
    }
    assert early[1] == real[1]


@pytest.mark.parametrize(
    ("words", "end"),
    [
        (["--learning_rate", "abc"], "argument --learning_rate/--learning-rate: invalid float value: 'abc'\n"),
        (["--bf16", "maybe"], "Truthy value expected: got maybe but expected one of yes/no, true/false, t/f, y/n, 1/0"),
        (["--optim", "sgdd"], "argument --optim: invalid choice: 'sgdd' (choose from "),
        (["--seed"], "argument --seed: expected one argument\n"),
        (["--log_level", "loud"], "argument --log_level/--log-level: invalid choice: 'loud' (choose from "),
    ],
)
def test_a_bad_value_is_refused_in_the_real_parsers_words(words, end, capsys):
    messages = []
    for parser in (
        build_parser(read_parser(), early_training_arguments()),
        build_parser(HfArgumentParser, TrainingArguments),
    ):
        with pytest.raises(SystemExit) as stop:
            parser.parse_known_args(words)
        assert stop.value.code == 2
        messages.append(capsys.readouterr().err)
    assert messages[0] == messages[1]
    assert end in messages[0]


def test_everything_is_refused_without_the_early_parser_too(monkeypatch, capsys):
    def refuse():
        raise NotReadable("another form")

    monkeypatch.setattr(command_line, "read_parser", refuse)
    with pytest.raises(ValueError, match=r"^unknown flag --lora_alhpa; did you mean --lora_alpha\?$"):
        parse_arguments([*NEEDED, "--lora_alhpa", "3"])
    with pytest.raises(ValueError, match=r"^--bits 3: choose 4, 8 or 16"):
        parse_arguments([*NEEDED, "--bits", "3"])
    with pytest.raises(SystemExit):
        parse_arguments(["--help"])
    assert "--lora_enable" in capsys.readouterr().out


SOURCE = """
from dataclasses import field
from .kinds import Kind
levels = dict(low=1, high=2)

class TrainingArguments{bases}:
    {first}
    kind: Kind | str = field(default="a", metadata={{"help": "Kind."}})
    if True:
        chosen = "b"
    other: str = field(default=chosen, metadata={{"choices": levels.keys()}})

    def method(self): pass
"""
KINDS = "from enum import Enum\n\nclass Kind(str, Enum):\n    A = 'a'\n    B = 'b'\n"


@pytest.fixture
def written(monkeypatch, tmp_path):
    def write(first='"""Text."""', bases=""):
        (tmp_path / "training_args.py").write_text(SOURCE.format(first=first, bases=bases))
        (tmp_path / "kinds.py").write_text(KINDS)
        return read_fields()

    monkeypatch.setattr(transformers_flags, "_package", lambda: tmp_path)
    transformers_flags._open.cache_clear()
    yield write
    transformers_flags._open.cache_clear()


def test_fields_of_a_source(written):
    parser = argparse.ArgumentParser()
    for field in dataclasses.fields(written()):
        parser.add_argument(f"--{field.name}", default=field.default, choices=field.metadata.get("choices"))
    assert vars(parser.parse_args([])) == {"kind": "a", "other": "b"}
    assert [action.choices and list(action.choices) for action in parser._actions][1:] == [None, ["low", "high"]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bases": "(Base)"}, "TrainingArguments has fields of other classes"),
        ({"first": "plain: int = 3"}, r"training_args.py:7: a field of another form"),
        ({"first": "lost: int = field(default=nowhere)"}, "training_args.py: nowhere is not defined"),
        ({"first": "raised: int = field(default=1 / 0)"}, r"training_args.py:7: ZeroDivisionError"),
        ({"first": "levels: int = field(default=levels + 1)"}, r"training_args.py:7: TypeError"),
        ({"first": "broken: int = ("}, "training_args.py"),
    ],
)
def test_a_source_of_another_form_is_not_guessed_at(written, changes, message):
    with pytest.raises(NotReadable, match=message):
        written(**changes)


def test_a_package_without_the_files(monkeypatch, tmp_path):
    monkeypatch.setattr(transformers_flags, "_package", lambda: tmp_path)
    with pytest.raises(NotReadable, match=r"training_args\.py: "):
        read_fields()
    with pytest.raises(NotReadable, match=r"hf_argparser\.py: "):
        read_parser()
    (tmp_path / "hf_argparser.py").write_text("from .utils import logging\n")
    with pytest.raises(NotReadable, match=r"hf_argparser\.py: "):
        read_parser()
