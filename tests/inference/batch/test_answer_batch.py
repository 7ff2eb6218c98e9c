"""`answer_batch` gives every question its answer or its error, whatever the order, the grouping and the share."""

import dataclasses
import itertools
import re

import pytest
import torch

from llava.constants import IMAGE_TOKEN_INDEX
from llava.image_files.decode import open_image
from llava.inference.batch import answer_batch as module
from llava.inference.batch.answer_batch import answer_batch
from llava.inference.batch.questions import Question
from llava.inference.engine.image_loader import AHEAD, THREADS, default_workers
from llava.inference.engine.limits import Limits
from llava.inference.engine.ragged_llama import has_plain_weights
from llava.inference.prompts import answered_ids
from llava.inference.session import Sampling, Session

GREEDY = Sampling(max_new_tokens=5)
QUESTIONS = [
    Question(0, "Is there railing?", ("landscape.jpg",)),
    Question("1", "hello"),
    Question(2, "gone", ("none.jpg",)),
    Question(3, "Compare <image> with <image>", ("portrait.png", "square.png")),
    Question(4, " ", ("tiny.png",)),
    Question(5, "What are the  colors?", ("landscape.jpg",)),
    Question(6, "far", ("../images/tiny.png",)),
    Question(7, "long " * 600, ("landscape.jpg",)),
    Question(8, "broken", ("torn.png",)),
    Question(9, "huge", ("huge.png",)),
    Question(10, "<image>", ()),
    Question(11, "Wörter 漢字 🙂\nzwei", ("tiny.png",)),
    Question(12, "Is there <image> railing?", ("landscape.jpg",)),
    Question(13, "one too few <image>", ("tiny.png", "tiny.png")),
]
CODES = {
    2: "image_missing",
    4: "question_empty",
    6: "path_outside_folder",
    7: "prompt_too_long",
    8: "image_corrupt",
    9: "image_too_large",
    10: "question_empty",
    13: "image_count_mismatch",
}


@pytest.fixture(scope="module")
def singly(answer_singly):
    """Text of each good question, answered alone."""
    return answer_singly([question for question in QUESTIONS if question.question_id not in CODES], GREEDY)


def limits_of(sampling, **changes):
    return dataclasses.replace(Limits.suiting(torch.device("cpu"), sampling.max_new_tokens), **changes)


def by_id(answers):
    answers = list(answers)
    found = {answer.question.question_id: answer for answer in answers}
    assert len(found) == len(answers)
    return found


def texts(answers):
    return {key: answer.text for key, answer in by_id(answers).items() if answer.error is None}


@pytest.mark.parametrize("options", [{}, {"batch_size": 1}, {"batch_size": 3}, {"workers": 1}, {"compile_mode": "off"}])
def test_answers_equal_single_ones_and_errors_stay_their_own(session, folder, singly, options):
    found = by_id(answer_batch(session, QUESTIONS, folder, GREEDY, **options))
    assert {key: answer.error for key, answer in found.items() if answer.error} == CODES
    assert {key: answer.text for key, answer in found.items() if not answer.error} == singly
    assert all(answer.text == "" and answer.message for answer in found.values() if answer.error)
    assert [found[question.question_id].question for question in QUESTIONS] == QUESTIONS


@pytest.mark.parametrize("options", [{}, {"batch_size": 1}, {"sampling": {"num_beams": 2}}, {"sampling": {"seed": 1}}])
def test_a_limit_near_the_context_is_cut_to_what_is_left(session, folder, answer_singly, caplog, options):
    options = dict(options)
    sampling = Sampling(max_new_tokens=2000, **options.pop("sampling", {}))
    length = session.spliced_length(session.prepare(QUESTIONS[3].text, [open_image(folder / "tiny.png")] * 2))
    narrow = dataclasses.replace(session, context_length=length + 2, warned_limits=set())
    found = by_id(answer_batch(narrow, QUESTIONS, folder, sampling, **options))
    assert {key: answer.error for key, answer in found.items() if answer.error} == CODES
    notes = [record.getMessage() for record in caplog.records if "max_new_tokens" in record.getMessage()]
    assert len(notes) == 1
    for question in QUESTIONS:
        if question.question_id not in CODES:
            images = [open_image(folder / name) for name in question.images]
            prompt = narrow.prepare(question.text, images)
            [expected] = narrow.answer_prompts([prompt], sampling)
            assert found[question.question_id].text == expected
            alone = dataclasses.replace(sampling, max_new_tokens=narrow.context_length - narrow.spliced_length(prompt))
            assert session.answer_prompts([prompt], alone) == [expected]


def test_beams_go_through_generate(session, folder):
    beams = Sampling(num_beams=2, max_new_tokens=3)
    found = by_id(answer_batch(session, QUESTIONS, folder, beams))
    assert {key: answer.error for key, answer in found.items() if answer.error} == CODES
    assert found["1"].text == session.answer_prompts([session.prepare("hello")], beams)[0]


def test_an_adapter_that_is_not_merged(session, goldens, folder):
    from llava.model.builder import attach_adapter, load_pretrained_model

    base = str(goldens / "llava-v1.5-golden")
    model = load_pretrained_model(base, None, "base", device="cpu", dtype="float32")[1]
    adapted = dataclasses.replace(session, model=attach_adapter(model, goldens / "llava-v1.5-golden-task-lora"))
    found = texts(answer_batch(adapted, QUESTIONS[:2], folder, GREEDY))
    images = [open_image(folder / "landscape.jpg")]
    [expected] = adapted.answer_prompts([adapted.prepare(QUESTIONS[0].text, images)], GREEDY)
    assert found[0] == expected
    assert found[0] != texts(answer_batch(session, QUESTIONS[:2], folder, GREEDY))[0]


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_weights(request, folder, bits):
    pytest.importorskip("bitsandbytes")
    path = str(request.config.rootpath / "playground/llava-tiny")
    session = Session.load(path, bits=bits, device="cpu", dtype="float32")
    questions = [
        Question(key, text, (name,))
        for key, (text, name) in enumerate(
            itertools.product(
                ("What is it?", "How many red shapes are there?", "Is there a circle?"), ("landscape.jpg", "square.png")
            )
        )
    ]
    found = texts(answer_batch(session, questions, folder, GREEDY))
    for question in questions:
        images = [open_image(folder / name) for name in question.images]
        [expected] = session.answer_prompts([session.prepare(question.text, images)], GREEDY)
        assert found[question.question_id] == expected
    assert len(set(found.values())) > 1
    plain = Session.load(path, device="cpu", dtype="float32")
    assert not has_plain_weights(session.model)
    assert has_plain_weights(plain.model)


@pytest.mark.parametrize("sampling", [Sampling(temperature=1, seed=3), Sampling(temperature=1, seed=3, num_beams=2)])
def test_chance_depends_on_seed_and_id_alone(session, folder, sampling):
    sampling = dataclasses.replace(sampling, max_new_tokens=3)
    whole = texts(answer_batch(session, QUESTIONS, folder, sampling))
    for part in (QUESTIONS[::-1], QUESTIONS[11:], QUESTIONS[3:4]):
        found = texts(answer_batch(session, part, folder, sampling, batch_size=2))
        assert found == {key: whole[key] for key in found}
    other = dataclasses.replace(sampling, seed=4)
    assert texts(answer_batch(session, QUESTIONS, folder, other)) != whole


def test_without_a_seed_chance_differs(session):
    free = Sampling(temperature=1.5, max_new_tokens=8)
    assert len({texts(answer_batch(session, QUESTIONS[1:2], "", free))["1"] for _ in range(3)}) > 1


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_shares_together_are_the_whole(session, folder, world_size, beams):
    sampling = Sampling(max_new_tokens=2, num_beams=beams)
    whole = by_id(answer_batch(session, QUESTIONS, folder, sampling))
    shares = [
        by_id(answer_batch(session, QUESTIONS, folder, sampling, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    assert sum(map(len, shares)) == len(QUESTIONS)
    assert {key: answer for share in shares for key, answer in share.items()} == whole


@pytest.mark.parametrize("beams", [1, 2])
def test_what_is_done_is_not_asked_again(session, folder, beams):
    sampling = Sampling(max_new_tokens=2, num_beams=beams)
    whole = by_id(answer_batch(session, QUESTIONS, folder, sampling))
    done = {QUESTIONS[place] for place in (0, 1, 4, 8)}
    rest = by_id(answer_batch(session, QUESTIONS, folder, sampling, done=done))
    assert rest == {key: answer for key, answer in whole.items() if answer.question not in done}


@pytest.mark.parametrize("window, planned", [(1, 1), (3, 2), (5, 100), (1000, 1)])
@pytest.mark.parametrize("options", [{}, {"batch_size": 1}, {"workers": 1}, {"choices": ["yes", "no"]}])
def test_windows_of_any_size_give_the_same_answers(session, folder, window, planned, options):
    whole = by_id(answer_batch(session, QUESTIONS, folder, GREEDY, **options))
    options = {**options, "limits": limits_of(GREEDY, window=window, planned_groups=planned)}
    assert by_id(answer_batch(session, QUESTIONS, folder, GREEDY, **options)) == whole
    shares = [
        by_id(answer_batch(session, QUESTIONS, folder, GREEDY, **options, rank=rank, world_size=3))
        for rank in (0, 1, 2)
    ]
    assert sum(map(len, shares)) == len(QUESTIONS)
    assert {key: answer for share in shares for key, answer in share.items()} == whole


@pytest.mark.parametrize("kept", range(len(QUESTIONS)))
def test_stopped_anywhere_nothing_is_lost_or_repeated(session, folder, kept):
    sampling = Sampling(max_new_tokens=2)
    limits = limits_of(sampling, window=2, planned_groups=2)
    whole = by_id(answer_batch(session, QUESTIONS, folder, sampling, limits=limits))
    answers = answer_batch(session, QUESTIONS, folder, sampling, limits=limits)
    first = by_id(itertools.islice(answers, kept))
    answers.close()
    done = {answer.question for answer in first.values()}
    rest = by_id(answer_batch(session, QUESTIONS, folder, sampling, done=done, limits=limits))
    assert not rest.keys() & first.keys()
    assert {**first, **rest} == whole


def test_prompts_that_do_not_start_with_the_system_prefix_are_answered_too(session, folder, monkeypatch, singly):
    """After the others, with a system prefix of their own: whatever two questions tell about the rest."""
    prompts = []

    def too_long(questions, requests_of):
        prompts.append(requests_of(QUESTIONS[11])[0].input_ids)  # the whole of a prompt, as far as its image
        return prompts[0][: prompts[0].index(IMAGE_TOKEN_INDEX)]

    monkeypatch.setattr(module, "find_system_prefix", too_long)
    found = by_id(answer_batch(session, QUESTIONS, folder, GREEDY))
    assert len(prompts) == 1
    assert {key: answer.error for key, answer in found.items() if answer.error} == CODES
    assert {key: answer.text for key, answer in found.items() if not answer.error} == singly


def test_the_first_answer_waits_for_few_questions_and_none_that_is_done(session, monkeypatch):
    questions = [Question(key, f"Is it {key}?", (f"{key // 4}.jpg",)) for key in range(1000)]  # no image is there
    done = set(questions[:900])
    tokenised = []
    real = Session.prompt_ids

    def noting(self, text, *args, **options):
        tokenised.append(text)
        return real(self, text, *args, **options)

    monkeypatch.setattr(Session, "prompt_ids", noting)
    limits = limits_of(GREEDY, window=16, planned_groups=8)
    for skipped in ((), done):
        tokenised.clear()
        answers = answer_batch(session, questions, "", GREEDY, done=skipped, limits=limits)
        assert next(answers).error == "image_missing"
        ahead = 4 * (limits.first_groups + 8 + AHEAD * max(THREADS, default_workers(session.model.device)))
        assert len(tokenised) <= ahead + 2 * 16
        answers.close()
    assert len(list(answer_batch(session, questions, "", GREEDY, done=done, limits=limits))) == 100
    assert not set(tokenised) & {question.text for question in questions[1:899]}  # the system prefix is that of all


def test_no_questions(session):
    assert list(answer_batch(session, [])) == []


def test_scores(session, folder):
    found = by_id(answer_batch(session, QUESTIONS, folder, GREEDY, with_scores=True))
    with torch.no_grad():
        logprobs = session.model(torch.tensor([session.prompt_ids("hello")])).logits[0, -1].log_softmax(-1)
    best, order = logprobs.sort(descending=True)
    scores = found["1"].scores
    assert set(scores) == {"logprob", "first_token_logprob", "runner_up", "runner_up_logprob"}
    assert scores["first_token_logprob"] == pytest.approx(best[0].item(), abs=1e-4)
    assert scores["runner_up_logprob"] == pytest.approx(best[1].item(), abs=1e-4)
    assert scores["runner_up"] == session.tokenizer.decode([order[1]])
    assert scores["logprob"] < scores["first_token_logprob"]
    assert all(answer.scores is None for answer in found.values() if answer.error)
    assert texts(answer_batch(session, QUESTIONS, folder, GREEDY)) == {
        key: answer.text for key, answer in found.items() if not answer.error
    }


def test_a_closed_list_of_answers(session, folder):
    choices = ["yes", "no", "two words"]
    found = by_id(answer_batch(session, QUESTIONS, folder, choices=choices))
    assert {key: answer.error for key, answer in found.items() if answer.error} == CODES
    scores = found["1"].scores
    for choice in choices:
        ids, targets = answered_ids("hello", 0, choice, session.template, session.tokenizer)
        with torch.no_grad():
            logprobs = session.model(torch.tensor([ids])).logits[0, -len(targets) :].log_softmax(-1)
        expected = logprobs.gather(1, torch.tensor(targets)[:, None]).sum().item()
        assert scores["choices"][choice] == pytest.approx(expected, abs=2e-4)
    assert scores["choices"][found["1"].text] == scores["logprob"] == max(scores["choices"].values())
    assert len({answer.text for answer in found.values() if not answer.error}) > 1


@pytest.mark.parametrize("batch_size", [1, 5])  # groups that a question's answers do not all fit into
def test_all_answers_of_a_list_are_scored_in_one_share(session, folder, batch_size):
    choices = ["yes", "no", "two words"]
    options = {"choices": choices, "batch_size": batch_size, "world_size": 2}
    whole = by_id(answer_batch(session, QUESTIONS, folder, choices=choices))
    shares = [texts(answer_batch(session, QUESTIONS, folder, rank=rank, **options)) for rank in range(2)]
    assert all(shares)
    assert sum(map(len, shares)) == len(QUESTIONS) - len(CODES)
    assert {**shares[0], **shares[1]} == {key: answer.text for key, answer in whole.items() if not answer.error}


def test_many_answers_of_a_list_are_shared_evenly(session, folder):
    questions = [Question(key, "What is it?", (f"{key}.jpg",)) for key in range(4)]  # each is an error of its own
    options = {"choices": ["a", "b", "c", "d"], "batch_size": 2, "world_size": 2}
    assert [len(list(answer_batch(session, questions, folder, rank=rank, **options))) for rank in range(2)] == [2, 2]


def test_a_given_answer_scores_as_much_as_the_same_generated(session, folder, swap_words):
    """The generated answer's ids, its end included, are those of the given answer."""
    yes = answered_ids("hello", 0, "yes", session.template, session.tokenizer)[1][0]
    hello = QUESTIONS[1:2]
    first = session.generate_ids([session.prepare("hello")], GREEDY)[0][0]
    saying = swap_words(session, first, yes)
    [generated] = answer_batch(saying, hello, folder, Sampling(max_new_tokens=1), with_scores=True)
    [given] = answer_batch(saying, hello, folder, choices=["yes"])
    ids, targets = answered_ids("hello", 0, "yes", saying.template, saying.tokenizer)
    assert targets == [yes, session.tokenizer.eos_token_id]
    with torch.no_grad():
        end = saying.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)[targets[1]].item()
    assert given.scores["logprob"] == pytest.approx(generated.scores["logprob"] + end, abs=2e-4)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": 0}, "batch_size is 0; choose 1 or more"),
        ({"compile_mode": "maybe"}, "compile_mode is 'maybe'; choose auto, on, off"),
        ({"with_scores": True, "sampling": Sampling(num_beams=2)}, "scores and choices don't go with beam search"),
        ({"choices": ["a"], "sampling": Sampling(temperature=1)}, "choices are scored, not sampled; leave temperature"),
        ({"choices": ["a", "a"]}, "choices ['a', 'a'] are empty or repeated; give each answer once"),
        ({"choices": ["a", " "]}, "choices ['a', ' '] are empty or repeated"),
    ],
)
def test_options_that_do_not_go_together(session, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        list(answer_batch(session, QUESTIONS, **options))


def test_models_on_several_devices_have_no_scores(session, monkeypatch):
    monkeypatch.setattr(session.model, "hf_device_map", {"a": 0, "b": 1}, raising=False)
    with pytest.raises(ValueError, match="scores and choices need the model on one device"):
        list(answer_batch(session, QUESTIONS, with_scores=True))
    assert len(list(answer_batch(session, QUESTIONS[1:2], "", GREEDY))) == 1  # through generate


def test_images_for_a_model_without_a_vision_tower(session, folder):
    blind = dataclasses.replace(session, image_processor=None)
    with pytest.raises(ValueError, match="the model has no vision tower; ask without images, or pass --vision-tower"):
        list(answer_batch(blind, QUESTIONS, folder))
    assert list(texts(answer_batch(blind, QUESTIONS[1:2], folder, GREEDY))) == ["1"]


@pytest.mark.slow
def test_a_hundred_questions_about_an_image_and_ten_thousand_in_all(session, folder):
    names = ("landscape.jpg", "portrait.png", "square.png", "tiny.png")
    questions = [
        Question(key, f"Is {key % 1000} there?", (names[0] if key < 106 else names[key * 7 % 4],))
        for key in range(10_000)
    ]
    found = texts(answer_batch(session, questions, folder, Sampling(max_new_tokens=1)))
    assert len(found) == 10_000
    for key in (0, 50, 105, 9_999):
        images = [open_image(folder / name) for name in questions[key].images]
        prompt = session.prepare(questions[key].text, images)
        assert [found[key]] == session.answer_prompts([prompt], Sampling(max_new_tokens=1))
