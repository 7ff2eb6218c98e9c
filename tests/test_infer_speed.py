"""`benchmarks/infer_speed.py` on the CPU: every part gives its figures; vLLM would get the same weights and prompts."""

import importlib.machinery
import json
import sys
import types

import pytest
import torch

from llava.inference.grouped import answer_batch
from llava.inference.session import Sampling

WORDS = ["--tiny", "--images", "6", "--captions", "3", "--compared", "4", "--peer-images", "2", "--peer-batches", "2"]
WORDS += ["--device", "cpu", "--workers", "0"]


@pytest.fixture(scope="module")
def program(load_program):
    return load_program("benchmarks/infer_speed.py")


@pytest.fixture(scope="module")
def share(program):
    return sys.modules["device_share"]


class Library(types.ModuleType):
    """Stands in for vLLM: what it is given is answered by transformers."""

    def __init__(self):
        super().__init__("vllm")
        self.__spec__ = importlib.machinery.ModuleSpec("vllm", None)
        self.answers = []
        self.SamplingParams = types.SimpleNamespace

    def LLM(self, **settings):
        from transformers import AutoProcessor, LlavaForConditionalGeneration

        assert settings["limit_mm_per_prompt"] == {"image": 1}
        self.model = LlavaForConditionalGeneration.from_pretrained(settings["model"]).eval()
        self.images = AutoProcessor.from_pretrained(settings["model"]).image_processor
        return types.SimpleNamespace(generate=self.generate)

    def generate(self, prompts, choice, use_tqdm):
        config, outputs = self.model.config, []
        patches = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
        for prompt in prompts:
            ids = prompt["prompt_token_ids"]
            assert ids.count(config.image_token_id) == 1
            place = ids.index(config.image_token_id)
            ids = torch.tensor([ids[:place] + [config.image_token_id] * patches + ids[place + 1 :]])
            pixels = self.images(prompt["multi_modal_data"]["image"], return_tensors="pt")["pixel_values"]
            tokens = {"max_new_tokens": choice.max_tokens, "min_new_tokens": choice.min_tokens, "pad_token_id": 0}
            row = self.model.generate(ids, pixel_values=pixels, do_sample=False, **tokens)[0, ids.shape[1] :]
            outputs.append(types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=row.tolist())]))
        self.answers.append([output.outputs[0].token_ids for output in outputs])
        return outputs


@pytest.mark.slow
def test_all_parts(program, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "vllm", Library())
    parts = [part for part in program.PARTS if part != "attention"]
    assert program.main([*WORDS, "--profile", "--parts", *parts, "--output", str(tmp_path / "speed.json")]) == 0
    report = json.loads((tmp_path / "speed.json").read_text())
    assert "failed" not in report
    rows = {row["case"]: row for row in report["rows"]}
    for case in ("4.24 questions per picture", "the same shuffled", "one question per picture", "3 captions"):
        for who in ("ours", "vLLM"):
            assert rows[f"{who}, {case}"]["questions_per_second"] > 0
    assert rows["transformers, batch 2"]["questions_per_second"] > 0
    assert sum("profiled" in case for case in rows) == 3
    [agreement] = (row for row in report["rows"] if row["part"] == "agreement")
    assert agreement["same_answers"] == 1
    assert "| vLLM, 3 captions |" in capsys.readouterr().out


def test_vllm_gets_the_models_weights_and_prompts(program, monkeypatch, tmp_path):
    peer = sys.modules["vllm_peer"]
    library = Library()
    options = program.parse_options([*WORDS, "--parts"])
    program.draw_pictures(tmp_path, 2, program.picture_size(options.tiny))
    bench = program.Bench(options, torch.device("cpu"), tmp_path)
    questions = bench.questions(2)
    ours = answer_batch(bench.session, questions, tmp_path, Sampling(max_new_tokens=3), workers=0)
    ours = {answer.question.question_id: answer.text for answer in ours}
    directory = tmp_path / "hf"
    directory.mkdir()
    peer.export_hf(bench.session, directory)
    prompts = peer.make_prompts(bench.session, questions)
    pictures = [tmp_path / question.images[0] for question in questions]
    assert peer.Peer(library, directory, 400).answer(prompts, pictures, 3) > 0
    texts = [bench.session.decode(ids) for ids in library.answers[0]]
    assert texts == [ours[question.question_id] for question in questions]


def test_vllm_that_stops_early_is_not_measured(program, tmp_path):
    peer = sys.modules["vllm_peer"]
    short = types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=[5])])
    llm = types.SimpleNamespace(generate=lambda prompts, choice, use_tqdm: [short])
    library = types.SimpleNamespace(LLM=lambda **settings: llm, SamplingParams=types.SimpleNamespace)
    program.draw_pictures(tmp_path, 1, (8, 8))
    with pytest.raises(RuntimeError, match=r"vLLM gave 1 answers of \[1\] tokens; 3 were asked"):
        peer.Peer(library, tmp_path, 40).answer([[1, 2]], [tmp_path / "000000.jpg"], 3)


def test_a_part_that_fails_is_tried_without_graphs(program, monkeypatch, capsys):
    from llava.inference import tree_cache

    tried = []

    def fail(bench):
        tried.append(tree_cache.StepGraphs)
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    monkeypatch.setattr(tree_cache, "StepGraphs", tree_cache.StepGraphs)
    monkeypatch.setitem(program.MEASURES, "ceiling", fail)
    assert program.main([*WORDS, "--parts", "ceiling"]) == 1
    assert [made() if number else made for number, made in enumerate(tried)] == [tried[0], None]
    assert capsys.readouterr().out.count("ceiling failed:") == 2


def test_parts_without_vllm(program, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert list(program.measure_vllm(None)) == []
    assert "it is not installed" in capsys.readouterr().out


def test_the_devices_share(share):
    spans = [share.Span(*row) for row in ((1.0, 2.0, "a"), (1.5, 3.0, "b"), (1.6, 1.7, "c"), (3.5, 4.0, "d"))]
    found = share.device_share([*spans, share.Span(6.0, 6.5, "e")])
    assert (found.busy, found.first, found.last) == (3.0, 1.0, 6.5)
    assert found.gaps == [share.Gap(4.0, 2.0, "d", "e"), share.Gap(3.0, 0.5, "b", "d")]
    lines = share.as_lines(found, 8.0, count=1).splitlines()
    assert lines == [
        "device busy 3.000 of 8.000 s (37.5%); idle 1.000 s before, 1.500 s behind, 2.500 s in 2 gaps, "
        "2.500 s of it in gaps of 1 ms and more",
        "   2000.00 ms at   4.000 s: d .. e",
    ]
    assert share.device_share([]) == share.DeviceShare(0.0, 0.0, 0.0, [])


def test_the_plot_shows_what_was_measured(load_program, tmp_path, request):
    plot = load_program("benchmarks/speed_plot.py")
    measured = request.config.rootpath / "benchmarks/results/infer_speed.json"
    rows = json.loads(measured.read_text())["rows"]
    assert plot.bars(rows, "tokens_per_second") == [
        (row["case"], row["tokens_per_second"]) for row in rows if row["part"] == "captions"
    ]
    short = dict(plot.bars(rows, "questions_per_second"))
    assert short["ours, one question per picture"] > short["transformers, batch 32"] > 0
    assert plot.main(["--input", str(measured), "--output", str(tmp_path / "speed.svg")]) == 0
    assert "<svg" in (tmp_path / "speed.svg").read_text()
    with pytest.raises(ValueError, match="holds no speeds; see the measuring program"):
        plot.draw({"machine": "", "rows": rows[:1]}, tmp_path / "none.svg")


def test_two_processes_answer_for_two_gpus(load_program, tmp_path, capfd):
    program = load_program("benchmarks/infer_gpus.py")
    output = tmp_path / "gpus.json"
    assert program.main(["--gpus", "2", "--images", "2", "--tiny", "--output", str(output)]) == 0
    row = json.loads(output.read_text())["2"]
    assert row["questions_per_second"] > 0 and row["share_of_linear"] == 1
    assert "2 GPUs: " in capfd.readouterr().out


@pytest.mark.slow
def test_the_small_model_is_measured(load_program, tmp_path, capsys):
    program = load_program("benchmarks/infer_tiny.py")
    words = ["--scenes", "1", "--rounds", "1", "--output", str(tmp_path / "tiny.json")]
    assert program.main(words) == 0
    report = json.loads((tmp_path / "tiny.json").read_text())
    assert report["pictures"] == 1 < report["questions"]
    assert [row["same_answers"] for row in report["rows"]] == [1, 1, 1]
    assert all(row["questions_per_second"] > 0 for row in report["rows"])
    assert capsys.readouterr().out.count("100.00%") == 3
