"""An answer depends on its own prompt alone: whatever is computed beside it, in whatever pieces, by whatever chance."""

import dataclasses
import gc
import itertools
import random
import types
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.constants import IMAGE_TOKEN_INDEX
from llava.inference.engine import kv_cache
from llava.inference.engine.cuda_graphs import CudaGraphs
from llava.inference.engine.device_to_host import HostCopy
from llava.inference.engine.engine import Engine
from llava.inference.engine.kv_cache import KVCache
from llava.inference.engine.limits import Limits
from llava.inference.engine.model_runner import ModelRunner
from llava.inference.engine.prefix_groups import common_system_prefix, group_requests
from llava.inference.engine.ragged_llama import RaggedLlama
from llava.inference.engine.sequence import Batch, PrefixGroup, Request, RequestError, Sequence
from llava.inference.session import Prompt, Sampling

IMAGE = IMAGE_TOKEN_INDEX
PATCHES = 4
NAMES = "abcde"


def pixels_of(name):
    return torch.randn(3, 28, 28, generator=torch.Generator().manual_seed(ord(name)))


@torch.no_grad()
def draw_weights(model, seed):
    """Give matrices weights wide enough for answers that differ."""
    generator = torch.Generator().manual_seed(seed)
    named = {name.replace("vision_model.", ""): parameter for name, parameter in model.named_parameters()}
    for _, parameter in sorted(named.items()):
        if parameter.ndim > 1:
            parameter.copy_(torch.randn(parameter.shape, generator=generator))


@pytest.fixture(scope="module")
def tiny_sessions(session, tiny_model):
    """Sessions around random models of 16 words, one of which ends an answer; one with fewer key heads."""
    shapes = [{}, {"num_attention_heads": 4, "num_key_value_heads": 2}, {"num_hidden_layers": 1}]
    models = [tiny_model(seed, vocab_size=16, **shape) for seed, shape in enumerate(shapes)]
    for seed, model in enumerate(models, start=7):
        draw_weights(model, seed)
    return [dataclasses.replace(session, model=model, context_length=64) for model in models]


def make_requests(rows):
    return [
        Request(key, [1, *[IMAGE] * len(images), *ids], tuple(images), request_id=key)
        for key, (images, ids) in enumerate(rows)
    ]


def limits_of(sampling, **changes):
    """Limits of a CPU, but with a step in flight as on a GPU."""
    default = Limits.suiting(torch.device("cpu"), sampling.max_new_tokens)
    return dataclasses.replace(default, **{"steps_in_flight": 1, **changes})


def read_images(groups):
    return ([pixels_of(name) for name in group.images] for group in groups)


def run(session, requests, sampling, *, images=read_images, options=(), **limits):
    """Run the engine; return its sequences by key."""
    limits = limits_of(sampling, **limits)
    prefix = common_system_prefix(requests)
    groups = group_requests(requests, prefix, PATCHES, group_size=limits.group_size)
    engine = Engine(session, sampling, prefix, limits=limits, **dict(options))
    sequences = list(engine.run(groups, images(groups)))
    assert sorted(sequence.request.key for sequence in sequences) == [request.key for request in requests]
    return {sequence.request.key: sequence for sequence in sequences}


def answers_of(sequences):
    return {key: sequence.token_ids for key, sequence in sequences.items()}


def alone(session, request, sampling):
    prompt = Prompt(request.input_ids, [pixels_of(name) for name in request.images])
    return session.generate_ids([prompt], sampling)[0]


questions = st.lists(
    st.tuples(st.lists(st.sampled_from(NAMES), max_size=2), st.lists(st.integers(3, 15), min_size=1, max_size=6)),
    min_size=1,
    max_size=10,
)
sizes = st.fixed_dictionaries(
    {
        "prefill_tokens": st.integers(1, 60),
        "answer_tokens": st.integers(1, 20),
        "max_slots": st.integers(1, 5),
        "encoder_batch": st.integers(1, 4),
        "group_size": st.integers(1, 4),
        "max_sequences": st.sampled_from((None, 2)),
        "steps_in_flight": st.sampled_from((0, 1, 3)),
    }
)


@given(st.integers(0, 2), questions, st.integers(1, 9), sizes)
@settings(max_examples=60, deadline=None)
def test_equals_generate_one_at_a_time(tiny_sessions, which, rows, new_tokens, sizes):
    session, sampling = tiny_sessions[which], Sampling(max_new_tokens=new_tokens)
    requests = make_requests(rows)
    sequences = run(session, requests, sampling, **sizes)
    assert answers_of(sequences) == {request.key: alone(session, request, sampling) for request in requests}


def test_one_question_about_each_image_needs_no_mask(tiny_sessions, monkeypatch):
    """Slots of one sequence go through one causal attention, and give what shared slots give."""
    session, sampling = tiny_sessions[0], Sampling(max_new_tokens=1)
    requests = make_requests([([name], [3 + length] * length) for length, name in enumerate(NAMES, start=1)])
    expected = {request.key: alone(session, request, sampling) for request in requests}
    another = requests[0]._replace(key=5, input_ids=[*requests[0].input_ids, 7])
    masked = []
    real = kv_cache.masked_attention
    monkeypatch.setattr(kv_cache, "masked_attention", lambda *args: masked.append(len(args[0])) or real(*args))
    single = run(session, requests, sampling)
    assert not masked
    shared = run(session, [*requests, another], sampling)
    assert masked
    for sequences in (single, shared):
        assert {key: sequences[key].token_ids for key in expected} == expected


def some_requests(count, seed=0):
    chosen = random.Random(seed)
    return make_requests(
        [
            (
                chosen.choices(NAMES, k=chosen.choice((0, 1, 1, 1, 2))),
                chosen.choices(range(3, 16), k=chosen.randint(1, 6)),
            )
            for _ in range(count)
        ]
    )


@pytest.fixture(scope="module")
def whole(tiny_sessions):
    """Answers of thirty questions without any disturbance."""
    answers = answers_of(run(tiny_sessions[0], some_requests(30), Sampling(max_new_tokens=8)))
    assert len({len(ids) for ids in answers.values()}) > 3  # some end early
    return answers


SMALL = {"prefill_tokens": 20, "answer_tokens": 16, "max_slots": 6, "encoder_batch": 2}


@pytest.mark.parametrize("method", ["prefill", "decode", "__init__"])
@pytest.mark.parametrize("times", [(0,), (1,), (3,), (0, 1, 2), (2, 3, 7)])
@pytest.mark.parametrize("limits", [{}, SMALL], ids=["default", "small"])
def test_memory_that_runs_out_changes_no_answer(tiny_sessions, whole, monkeypatch, caplog, method, times, limits):
    real, calls = getattr(KVCache, method), itertools.count()

    def sometimes(self, *args, **options):
        if next(calls) in times:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, *args, **options)

    monkeypatch.setattr(KVCache, method, sometimes)
    sequences = run(tiny_sessions[0], some_requests(30), Sampling(max_new_tokens=8), **limits)
    assert answers_of(sequences) == whole
    n_calls = next(calls) - 1
    assert len(caplog.records) == sum(time < n_calls for time in times)
    assert all("out of memory: all running sequences are preempted" in message for message in caplog.messages)


def test_a_cache_that_is_dropped_gives_its_memory_back_at_once(tiny_sessions, monkeypatch):
    """The next one is as large as the memory allows, so nothing may wait for the garbage collection."""
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    cache = KVCache(RaggedLlama(tiny_sessions[0].model), [1], 2, 16, graphed=True)
    gc.disable()
    try:
        reference = weakref.ref(cache)
        del cache
        assert reference() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("group_size", [1, 32])
def test_captured_steps_give_the_same(tiny_sessions, whole, monkeypatch, group_size):
    """A captured step reads and writes the same places each time, and its shape is that of several steps.

    With one sequence in each slot, slots whose answer has ended are computed with the others.
    """
    captured = []

    def capture(self, compute, entries, shape):
        inputs = entries.clone()
        result = compute(inputs, shape)
        captured.append(shape)
        graph = types.SimpleNamespace(replay=lambda: result.copy_(compute(inputs, shape)))
        return graph, inputs, result

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(CudaGraphs, "capture", capture)
    for ahead in (0, 1):
        limits = {"steps_in_flight": ahead, "group_size": group_size}
        sampling, options = Sampling(max_new_tokens=8), {"graphed": True}
        assert answers_of(run(tiny_sessions[0], some_requests(30), sampling, options=options, **limits)) == whole
    assert 1 < len(captured) < 10
    assert group_size > 1 or all(shape.n_sequences == shape.n_slots for shape in captured)


def test_moving_slots_together_changes_nothing(tiny_sessions):
    llama = RaggedLlama(tiny_sessions[0].model)
    generator = torch.Generator().manual_seed(0)
    groups = []
    for slot, length in enumerate([2, 3, 1, 3, 2, 2]):
        sequences = [Sequence(None, [3 + slot, 4 + column], column=column) for column in range(1, 1 + slot % 3 + 1)]
        embeds = torch.randn(length, 16, generator=generator)
        groups.append(PrefixGroup((), [], sequences, prefix_embeds=embeds, slot=slot, start=1 + length))
    for group in groups:
        group.sequences = [dataclasses.replace(each, request=Request(0, [1])) for each in group.sequences]
    members = [(group, sequence) for group in groups for sequence in group.sequences]

    def step(kept):
        inputs = [
            (group.start + 2, group.slot, 15 + sequence.column, sequence.column)
            for group in kept
            for sequence in group.sequences
        ]
        return cache.decode(Batch([], inputs=inputs))

    with torch.no_grad():
        cache = KVCache(llama, [1], len(groups), 24)
        tokens = cache.prefill(Batch(members, groups, prefix_length=3, length=16)).argmax(-1)
        cache.set_next_tokens(members, tokens)
        kept = [groups[1], groups[4], groups[5]]
        before = step(kept)
        cache.compact([group.slot for group in kept])
        for slot, group in enumerate(kept):
            group.slot = slot
        assert torch.equal(step(kept), before)


@pytest.mark.parametrize("times", [(1, 2), (2, 9), (4, 5, 6)])
@pytest.mark.parametrize("encoder_batch", [1, 4])
def test_memory_that_runs_out_while_encoding(tiny_sessions, whole, monkeypatch, times, encoder_batch):
    model, calls = tiny_sessions[0].model, itertools.count()
    real = model.encode_images

    def sometimes(pixels):
        if next(calls) in times:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(pixels)

    monkeypatch.setattr(model, "encode_images", sometimes)
    sequences = run(tiny_sessions[0], some_requests(30), Sampling(max_new_tokens=8), encoder_batch=encoder_batch)
    assert answers_of(sequences) == whole


def test_one_question_that_does_not_fit(tiny_sessions, monkeypatch):
    def never(self, *args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(KVCache, "prefill", never)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        run(tiny_sessions[0], some_requests(5), Sampling(max_new_tokens=8))


@pytest.mark.parametrize("ahead", [0, 1, 3])
@pytest.mark.parametrize("answer_tokens", [1, 16, 200])
def test_answers_longer_than_expected(tiny_sessions, whole, answer_tokens, ahead):
    limits = {"answer_tokens": answer_tokens, "steps_in_flight": ahead}
    assert answers_of(run(tiny_sessions[0], some_requests(30), Sampling(max_new_tokens=8), **limits)) == whole


class Watch:
    """Notes the steps of a run, and at each wait how many steps are queued after the one that is waited for."""

    def __init__(self, patch):
        self.steps, self.after = [], []
        number_of, run, wait = {}, ModelRunner.run, HostCopy.wait

        def note(runner, batch):
            self.steps.append("prefill" if batch.groups else "decode")
            copy = run(runner, batch)
            number_of[copy] = len(self.steps)
            return copy

        def wait_for(copy):
            self.after.append(len(self.steps) - number_of[copy])
            return wait(copy)

        patch.setattr(ModelRunner, "run", note)
        patch.setattr(HostCopy, "wait", wait_for)


@pytest.mark.parametrize("new_tokens", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("max_slots", [3, 4, 8, 11])
def test_the_device_always_has_a_step_queued(tiny_sessions, monkeypatch, new_tokens, max_slots):
    """While tokens are waited for, the next step is queued already, as long as there is any."""
    requests = make_requests([([NAMES[number % 5]], [3 + number % 13, 3 + number // 3]) for number in range(36)])
    sampling = Sampling(max_new_tokens=new_tokens)
    limits = {**SMALL, "max_slots": max_slots, "encoder_batch": 3, "group_size": 2}
    with monkeypatch.context() as patch:
        watch = Watch(patch)
        sequences = run(tiny_sessions[0], requests, sampling, **limits)
    assert max(watch.after) == 1
    assert all(watch.after[:-1])
    at_once = run(tiny_sessions[0], requests, sampling, **limits, steps_in_flight=0)
    assert answers_of(sequences) == answers_of(at_once)


class Reads:
    """Images by group, and how many groups' have been read."""

    def __init__(self):
        self.count = 0

    def __call__(self, groups):
        for group in groups:
            self.count += 1
            yield [pixels_of(name) for name in group.images]


def test_the_first_prefill_step_waits_for_few_images(tiny_sessions, monkeypatch):
    requests = make_requests([(pair, [3, 4]) for pair in itertools.product(NAMES, NAMES)])
    reads, at_prefill, prefill = Reads(), [], KVCache.prefill
    monkeypatch.setattr(KVCache, "prefill", lambda *args: at_prefill.append(reads.count) or prefill(*args))
    limits = {"max_slots": 20, "first_groups": 6, "steps_in_flight": 0}
    assert len(run(tiny_sessions[0], requests, Sampling(max_new_tokens=2), images=reads, **limits)) == 25
    assert at_prefill[0] == 6
    assert len(at_prefill) < 5


def test_the_last_slots_are_filled_after_a_decode_step(tiny_sessions, monkeypatch):
    """What is free in the end waits for a step, which may free more; then it does not wait for answers to finish."""
    requests = make_requests([([NAMES[number % 5]], [3 + number]) for number in range(12)])
    watch = Watch(monkeypatch)
    limits = {**SMALL, "max_slots": 4, "encoder_batch": 3}
    run(tiny_sessions[0], requests, Sampling(max_new_tokens=8), **limits)
    assert watch.steps[:6] == ["prefill", "prefill", "prefill", "decode", "prefill", "decode"]


def test_slots_are_filled_while_their_last_tokens_are_in_flight(tiny_sessions, monkeypatch):
    """Where answers end by the limit, decode steps wait for a full KV cache and prefill steps for no answer."""
    pairs = [*itertools.product(NAMES, NAMES)][:12]
    requests, sampling = make_requests([(pair, [3, 4]) for pair in pairs]), Sampling(max_new_tokens=3)
    expected = {request.key: alone(tiny_sessions[0], request, sampling) for request in requests}
    watch = Watch(monkeypatch)
    limits = {"prefill_tokens": 40, "answer_tokens": 16, "max_slots": 4, "encoder_batch": 3, "steps_in_flight": 3}
    sequences = run(tiny_sessions[0], requests, sampling, **limits)
    fill = ["prefill"] * watch.steps.index("decode")
    assert watch.steps == [*fill, "decode", "decode"] * (12 // 4)
    assert answers_of(sequences) == expected
    assert max(watch.after) == 3


def test_the_kv_cache_is_made_while_images_are_read(tiny_sessions, monkeypatch):
    requests, made, at_image = make_requests([([name], [3, 4]) for name in NAMES]), [], []
    create = KVCache.__init__
    monkeypatch.setattr(KVCache, "__init__", lambda *args, **options: made.append(1) or create(*args, **options))

    def images(groups):
        for pixels in read_images(groups):
            at_image.append(len(made))
            yield pixels

    run(tiny_sessions[0], requests, Sampling(max_new_tokens=2), images=images)
    assert at_image == [1] * 5
    assert len(made) == 1  # of the size that was needed


def test_long_answers_do_not_stall_short_ones(tiny_sessions):
    """With room for few, answers come out before the last question has gone in."""
    requests, sampling, reads = some_requests(30), Sampling(max_new_tokens=8), Reads()
    prefix = common_system_prefix(requests)
    limits = limits_of(sampling, encoder_batch=1, max_sequences=4, steps_in_flight=0)
    groups = group_requests(requests, prefix, PATCHES, group_size=limits.group_size)
    sequences = Engine(tiny_sessions[0], sampling, prefix, limits=limits).run(groups, reads(groups))
    next(sequences)
    assert reads.count < len(groups)
    assert len([*sequences]) == 29


def test_finished_groups_keep_no_images(tiny_sessions):
    """Whoever holds the groups does not hold their pixels and embeddings as well."""
    requests, sampling = some_requests(30), Sampling(max_new_tokens=4)
    prefix, limits = common_system_prefix(requests), limits_of(sampling, group_size=2)
    groups = group_requests(requests, prefix, PATCHES, group_size=8)  # divided by the engine
    for _ in Engine(tiny_sessions[0], sampling, prefix, limits=limits).run(groups, read_images(groups)):
        pass
    assert all(group.pixels == [] and group.prefix_embeds is None for group in groups)


def test_chance_is_each_requests_own(tiny_sessions):
    session, requests = tiny_sessions[0], some_requests(20)

    def answers(requests, seed, **limits):
        sampling = Sampling(temperature=1.5, top_p=0.95, max_new_tokens=6, seed=seed)
        return answers_of(run(session, requests, sampling, **limits))

    together = answers(requests, 0)
    for request in requests[::4]:
        assert answers([request._replace(key=0)], 0) == {0: together[request.key]}
    assert answers(requests, 0, prefill_tokens=20, answer_tokens=2, max_slots=2, encoder_batch=1) == together
    assert answers(requests, 1) != together


def logprobs_alone(session, input_ids, images, token_ids):
    """Logprobs of the tokens after a prompt, from one forward of the whole."""
    prompt = torch.tensor([[*input_ids, *token_ids]])
    with torch.no_grad():
        logits = session.model(prompt, images=[pixels_of(name) for name in images] or None).logits[0]
    return logits[-len(token_ids) - 1 : -1].log_softmax(-1)  # (tokens, W)


def test_scores_are_those_of_one_forward(tiny_sessions):
    session = tiny_sessions[1]
    sequences = run(session, some_requests(12), Sampling(max_new_tokens=5), options={"with_scores": True})
    for sequence in sequences.values():
        request, tokens = sequence.request, sequence.token_ids
        expected = logprobs_alone(session, request.input_ids, request.images, tokens)
        chosen = expected.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(sequence.logprobs), chosen, rtol=0, atol=1e-5)
        best, order = expected[0].sort(descending=True)
        assert (tokens[0], sequence.runner_up[0]) == (order[0], order[1])
        assert sequence.runner_up[1] == pytest.approx(best[1].item(), abs=1e-5)


def test_given_answers_are_scored_as_by_one_forward(tiny_sessions):
    session, prompts, requests = tiny_sessions[0], some_requests(12), []
    for key, prompt in enumerate(prompts):
        targets = (3 + key % 5, 4, 2)[: 1 + key % 3]
        requests.append(Request(key, [*prompt.input_ids, *targets[:-1]], prompt.images, targets))
    limits = {"prefill_tokens": 30, "answer_tokens": 1, "max_slots": 3, "encoder_batch": 2}
    for key, sequence in run(session, requests, Sampling(), **limits).items():
        prompt, targets = prompts[key], sequence.request.targets
        expected = logprobs_alone(session, prompt.input_ids, prompt.images, targets)
        chosen = expected.gather(1, torch.tensor(targets)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(sequence.logprobs), chosen, rtol=0, atol=1e-5)


def test_a_request_that_does_not_fit_disturbs_no_other(tiny_sessions, whole):
    requests = some_requests(30)
    long = Request(30, [*requests[3].input_ids, *[5] * 60], requests[3].images)
    sequences = run(tiny_sessions[0], [*requests, long], Sampling(max_new_tokens=8))
    code, message = sequences.pop(30).error
    assert (code, message.partition(" tokens")[0]) == (
        "prompt_too_long",
        f"the prompt takes {len(long.input_ids) + 3 * len(long.images)}",
    )
    assert answers_of(sequences) == whole


def test_images_that_can_not_be_read_disturb_no_other(tiny_sessions, whole):
    def images(groups):
        for group, pixels in zip(groups, read_images(groups), strict=True):
            yield RequestError("image_corrupt", "broken") if "a" in group.images else pixels

    requests = some_requests(30)
    sequences = run(tiny_sessions[0], requests, Sampling(max_new_tokens=8), images=images)
    failed = {key for key, sequence in sequences.items() if sequence.error}
    assert failed == {request.key for request in requests if "a" in request.images}
    assert all(sequences[key].error == ("image_corrupt", "broken") for key in failed)
    assert {key: ids for key, ids in answers_of(sequences).items() if key not in failed} == {
        key: ids for key, ids in whole.items() if key not in failed
    }


def test_stop_texts_end_an_answer(session, swap_words):
    human = session.with_template("llava_v0")
    prompts = [human.prompt_ids(text) for text in ("hello", "and you?", "why?")]
    [full] = human.generate_ids([Prompt(prompts[0], [])], Sampling(max_new_tokens=6))
    ending = swap_words(human, full[3], human.tokenizer.convert_tokens_to_ids("###"))
    assert ending.stops_on_text
    sampling = Sampling(max_new_tokens=6)
    answers = answers_of(run(ending, [Request(key, ids) for key, ids in enumerate(prompts)], sampling))
    assert len(answers[0]) == 4
    for key, ids in enumerate(prompts):
        assert answers[key] == ending.generate_ids([Prompt(ids, [])], sampling)[0]


def test_compiled_steps_give_the_same(tiny_sessions, whole, monkeypatch):
    compiled = []

    def compile_eagerly(function, **options):
        compiled.append(function.__name__)
        return function

    monkeypatch.setattr(torch, "compile", compile_eagerly)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compiled.append(type(self).__name__))
    sequences = run(tiny_sessions[0], some_requests(30), Sampling(max_new_tokens=8), options={"compiled": True})
    assert answers_of(sequences) == whole
    assert compiled == ["project_qkv", "gate_mlp", "CLIPEncoderLayer", "CLIPEncoderLayer"]
