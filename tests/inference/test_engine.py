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
from llava.inference import backlog as backlog_module
from llava.inference import engine as engine_module
from llava.inference import tree_cache as tree_cache_module
from llava.inference.backlog import Backlog, Failed
from llava.inference.engine import Engine, Selected
from llava.inference.grouping import Ask, plan_groups
from llava.inference.picture_source import PictureError
from llava.inference.selection import chance
from llava.inference.session import Prompt, Sampling
from llava.inference.step_graphs import StepGraphs
from llava.inference.tree_cache import TreeCache
from llava.model.flat_llama import FlatLlama

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


def make_asks(rows):
    return [Ask(key, [1, *[IMAGE] * len(images), *ids], tuple(images)) for key, (images, ids) in enumerate(rows)]


def run(session, asks, sampling, *, max_branches=32, pieces=None, ahead=1, **options):
    """Run the engine; return branches and failures by key."""
    plan = plan_groups(asks, PATCHES, max_branches=max_branches)
    pictures = ([pixels_of(name) for name in group.images] for group in plan.groups)
    waiting = Backlog(session, len(plan.stem_ids), plan.groups, pictures, room=sampling.max_new_tokens, is_padded=False)
    engine = Engine(session, sampling, plan.stem_ids, **options)
    engine._ahead = ahead
    if pieces is not None:
        engine._positions, engine.spare, engine._max_rows, waiting.encoder_batch = pieces
    results = list(engine.run(waiting))
    keys = [(result.branch if isinstance(result, Failed) else result).ask.key for result in results]
    assert sorted(keys) == [ask.key for ask in asks]
    return dict(zip(keys, results, strict=True))


def alone(session, ask, sampling):
    prompt = Prompt(list(ask.ids), [pixels_of(name) for name in ask.images])
    return session.generate_ids([prompt], sampling)[0]


questions = st.lists(
    st.tuples(st.lists(st.sampled_from(NAMES), max_size=2), st.lists(st.integers(3, 15), min_size=1, max_size=6)),
    min_size=1,
    max_size=10,
)
pieces = st.tuples(st.integers(1, 60), st.integers(1, 20), st.integers(1, 5), st.integers(1, 4))


@given(
    st.integers(0, 2),
    questions,
    st.integers(1, 9),
    st.integers(1, 4),
    pieces,
    st.booleans(),
    st.sampled_from((0, 1, 3)),
)
@settings(max_examples=60, deadline=None)
def test_equals_generate_one_at_a_time(tiny_sessions, which, rows, new_tokens, max_branches, pieces, limited, ahead):
    session, sampling = tiny_sessions[which], Sampling(max_new_tokens=new_tokens)
    asks = make_asks(rows)
    limit = {"max_questions": 2} if limited else {}
    results = run(session, asks, sampling, max_branches=max_branches, pieces=pieces, ahead=ahead, **limit)
    assert {key: branch.generated for key, branch in results.items()} == {
        ask.key: alone(session, ask, sampling) for ask in asks
    }


def test_one_question_about_each_picture_needs_no_mask(tiny_sessions, monkeypatch):
    """Rows that are no trees go through one causal attention, and give what trees give."""
    session, sampling = tiny_sessions[0], Sampling(max_new_tokens=1)
    asks = make_asks([([name], [3 + length] * length) for length, name in enumerate(NAMES, start=1)])
    expected = {ask.key: alone(session, ask, sampling) for ask in asks}
    another = asks[0]._replace(key=5, ids=[*asks[0].ids, 7])
    masked = []
    real = tree_cache_module.attend_dense
    monkeypatch.setattr(tree_cache_module, "attend_dense", lambda *args: masked.append(len(args[0])) or real(*args))
    lines = run(session, asks, sampling)
    assert not masked
    trees = run(session, [*asks, another], sampling)
    assert masked
    for results in (lines, trees):
        assert {key: results[key].generated for key in expected} == expected


def some_asks(count, seed=0):
    chosen = random.Random(seed)
    return make_asks(
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
    results = run(tiny_sessions[0], some_asks(30), Sampling(max_new_tokens=8))
    answers = {key: branch.generated for key, branch in results.items()}
    assert len({len(ids) for ids in answers.values()}) > 3  # some end early
    return answers


@pytest.mark.parametrize("method", ["prefill", "step", "__init__"])
@pytest.mark.parametrize("times", [(0,), (1,), (3,), (0, 1, 2), (2, 3, 7)])
@pytest.mark.parametrize("pieces", [None, (20, 16, 6, 2)])
def test_memory_that_runs_out_changes_no_answer(tiny_sessions, whole, monkeypatch, caplog, method, times, pieces):
    real, calls = getattr(TreeCache, method), itertools.count()

    def sometimes(self, *args, **options):
        if next(calls) in times:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, *args, **options)

    monkeypatch.setattr(TreeCache, method, sometimes)
    results = run(tiny_sessions[0], some_asks(30), Sampling(max_new_tokens=8), pieces=pieces)
    assert {key: branch.generated for key, branch in results.items()} == whole
    n_calls = next(calls) - 1
    assert len(caplog.records) == sum(time < n_calls for time in times)
    assert all("out of memory; going on with" in message for message in caplog.messages)


def test_a_cache_that_is_dropped_gives_its_memory_back_at_once(tiny_sessions, monkeypatch):
    """The next one is as large as the memory allows, so nothing may wait for the garbage collection."""
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    cache = TreeCache(FlatLlama(tiny_sessions[0].model), [1], 2, 16, graphed=True)
    gc.disable()
    try:
        reference = weakref.ref(cache)
        del cache
        assert reference() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("max_branches", [1, 32])
def test_recorded_steps_give_the_same(tiny_sessions, whole, monkeypatch, max_branches):
    """A recorded step reads and writes the same places each time, and its shape is that of several steps.

    With one question in each row, rows whose answer has ended are computed with the others.
    """
    recorded = []

    def record(self, compute, entries, shape):
        taken = entries.clone()
        result = compute(taken, shape)
        recorded.append(shape)
        graph = types.SimpleNamespace(replay=lambda: result.copy_(compute(taken, shape)))
        return graph, taken, result

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(StepGraphs, "_record", record)
    for ahead in (0, 1):
        options = {"graphed": True, "ahead": ahead, "max_branches": max_branches}
        results = run(tiny_sessions[0], some_asks(30), Sampling(max_new_tokens=8), **options)
        assert {key: branch.generated for key, branch in results.items()} == whole
    assert 1 < len(recorded) < 10
    assert max_branches > 1 or all(shape.n_answers == shape.n_rows for shape in recorded)


def test_moving_rows_together_changes_nothing(tiny_sessions):
    session = tiny_sessions[0]
    plan = plan_groups(some_asks(12), PATCHES)
    pictures = ([pixels_of(name) for name in group.images] for group in plan.groups)
    waiting = Backlog(session, len(plan.stem_ids), plan.groups, pictures, room=8, is_padded=False)
    rows = []
    while waiting.peek():
        rows.append(waiting.take())
    with torch.no_grad():
        cache = TreeCache(FlatLlama(session.model), plan.stem_ids, len(rows), 96)
        tokens = cache.prefill(rows).argmax(-1)
        branches = [(row, branch) for row in rows for branch in row.group.branches]
        cache.choose(branches, tokens)
        for (_, branch), token in zip(branches, tokens.tolist(), strict=True):
            branch.generated.append(token)
        kept = [rows[1], rows[-1], rows[-2]]
        live = [(row, branch) for row in kept for branch in row.group.branches]
        before = cache.step(live)
        for row in rows:
            if row not in kept:
                cache.release(row)
        cache.compact(kept)
        assert sorted(row.slot for row in kept) == [0, 1, 2]
        assert cache.n_free == len(rows) - 3
        for row in kept:
            row.fill -= len(row.group.branches)  # the same step again
        assert torch.equal(cache.step(live), before)


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
    monkeypatch.setattr(backlog_module, "ENCODER_BATCH", encoder_batch)
    results = run(tiny_sessions[0], some_asks(30), Sampling(max_new_tokens=8))
    assert {key: branch.generated for key, branch in results.items()} == whole


def test_one_question_that_does_not_fit(tiny_sessions, monkeypatch):
    def never(self, *args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(TreeCache, "prefill", never)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        run(tiny_sessions[0], some_asks(5), Sampling(max_new_tokens=8))


@pytest.mark.parametrize("ahead", [0, 1, 3])
@pytest.mark.parametrize("spare", [1, 16, 200])
def test_answers_longer_than_expected(tiny_sessions, whole, monkeypatch, spare, ahead):
    monkeypatch.setattr(engine_module, "FIRST_SPARE", spare)
    results = run(tiny_sessions[0], some_asks(30), Sampling(max_new_tokens=8), ahead=ahead)
    assert {key: branch.generated for key, branch in results.items()} == whole


class Watch:
    """Notes the moves of a run, and at each wait how many moves are behind the one that is waited for."""

    def __init__(self, patch):
        self.moves, self.behind = [], []
        number_of, create, wait = {}, Selected.__init__, Selected.wait

        def note(selected, *args):
            number_of[selected] = len(self.moves)
            create(selected, *args)

        def wait_for(selected):
            self.behind.append(len(self.moves) - number_of[selected])
            return wait(selected)

        for name in ("prefill", "step"):
            patch.setattr(TreeCache, name, self._noting(name, getattr(TreeCache, name)))
        patch.setattr(Selected, "__init__", note)
        patch.setattr(Selected, "wait", wait_for)

    def _noting(self, name, move):
        def launch(cache, *args, **options):
            self.moves.append(name)
            return move(cache, *args, **options)

        return launch


@pytest.mark.parametrize("new_tokens", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("max_rows", [3, 4, 8, 11])
def test_the_device_always_has_a_move_in_front_of_it(tiny_sessions, monkeypatch, new_tokens, max_rows):
    """While tokens are waited for, the next move is queued already, as long as there is any."""
    asks = make_asks([([NAMES[number % 5]], [3 + number % 13, 3 + number // 3]) for number in range(36)])
    sampling, pieces = Sampling(max_new_tokens=new_tokens), (20, 16, max_rows, 3)
    options = {"pieces": pieces, "max_branches": 2}
    with monkeypatch.context() as patch:
        watch = Watch(patch)
        results = run(tiny_sessions[0], asks, sampling, **options)
    assert max(watch.behind) == 1
    assert all(watch.behind[:-1])
    at_once = run(tiny_sessions[0], asks, sampling, **options, ahead=0)
    assert {key: branch.generated for key, branch in results.items()} == {
        key: branch.generated for key, branch in at_once.items()
    }


def test_the_device_begins_when_few_pictures_are_read(tiny_sessions, monkeypatch):
    session, asks = tiny_sessions[0], make_asks([(pair, [3, 4]) for pair in itertools.product(NAMES, NAMES)])
    plan, read, at_prefill = plan_groups(asks, PATCHES), [], []
    prefill = TreeCache.prefill

    def pictures():
        for group in plan.groups:
            read.append(group)
            yield [pixels_of(name) for name in group.images]

    monkeypatch.setattr(TreeCache, "prefill", lambda *args: at_prefill.append(len(read)) or prefill(*args))
    waiting = Backlog(session, len(plan.stem_ids), plan.groups, pictures(), room=2, is_padded=False)
    engine = Engine(session, Sampling(max_new_tokens=2), plan.stem_ids)
    engine._max_rows = 20
    assert len([*engine.run(waiting)]) == 25
    assert at_prefill[0] == backlog_module.FIRST_BATCH
    assert len(at_prefill) < 5


def test_the_last_rows_are_filled_behind_a_step(tiny_sessions, monkeypatch):
    """What is free in the end waits for a step, which may free more; then it does not wait for answers to finish."""
    asks = make_asks([([NAMES[number % 5]], [3 + number]) for number in range(12)])
    watch = Watch(monkeypatch)
    run(tiny_sessions[0], asks, Sampling(max_new_tokens=8), pieces=(20, 16, 4, 3))
    assert watch.moves[:6] == ["prefill", "prefill", "prefill", "step", "prefill", "step"]


def test_rows_are_filled_while_their_last_tokens_are_on_their_way(tiny_sessions, monkeypatch):
    """Where answers end by the limit, steps wait for full caches and prefills for no answer."""
    pairs = [*itertools.product(NAMES, NAMES)][:12]
    asks, sampling = make_asks([(pair, [3, 4]) for pair in pairs]), Sampling(max_new_tokens=3)
    expected = {ask.key: alone(tiny_sessions[0], ask, sampling) for ask in asks}
    watch = Watch(monkeypatch)
    results = run(tiny_sessions[0], asks, sampling, pieces=(40, 16, 4, 3), ahead=3)
    fill = ["prefill"] * watch.moves.index("step")
    assert watch.moves == [*fill, "step", "step"] * (12 // 4)
    assert {key: branch.generated for key, branch in results.items()} == expected
    assert max(watch.behind) == 3


def test_the_cache_is_made_while_pictures_are_read(tiny_sessions, monkeypatch):
    asks, made, at_picture = make_asks([([name], [3, 4]) for name in NAMES]), [], []
    plan, create = plan_groups(asks, PATCHES), TreeCache.__init__
    monkeypatch.setattr(TreeCache, "__init__", lambda *args, **options: made.append(1) or create(*args, **options))

    def pictures():
        for group in plan.groups:
            at_picture.append(len(made))
            yield [pixels_of(name) for name in group.images]

    waiting = Backlog(tiny_sessions[0], len(plan.stem_ids), plan.groups, pictures(), room=2, is_padded=False)
    list(Engine(tiny_sessions[0], Sampling(max_new_tokens=2), plan.stem_ids).run(waiting))
    assert at_picture == [1] * 5
    assert len(made) == 1  # of the size that was needed


def test_long_answers_do_not_stall_short_ones(tiny_sessions):
    """With room for few, answers come out before the last question has gone in."""
    asks = some_asks(30)
    plan = plan_groups(asks, PATCHES)
    read = []

    def pictures():
        for group in plan.groups:
            read.append(group)
            yield [pixels_of(name) for name in group.images]

    waiting = Backlog(tiny_sessions[0], len(plan.stem_ids), plan.groups, pictures(), room=8, is_padded=False)
    waiting.encoder_batch = 1
    engine = Engine(tiny_sessions[0], Sampling(max_new_tokens=8), plan.stem_ids, max_questions=4)
    results = engine.run(waiting)
    next(results)
    assert len(read) < len(plan.groups)
    assert len([*results]) == 29


def test_chance_is_each_questions_own(tiny_sessions):
    session, sampling = tiny_sessions[0], Sampling(temperature=1.5, top_p=0.95, max_new_tokens=6)
    asks = some_asks(20)

    def answers(asks, seed, **options):
        results = run(session, asks, sampling, chance_of=lambda key, step: chance(seed, key, step), **options)
        return {key: branch.generated for key, branch in results.items()}

    together = answers(asks, 0)
    for ask in asks[::4]:
        moved = ask._replace(key=0)
        results = run(session, [moved], sampling, chance_of=lambda key, step, ask=ask: chance(0, ask.key, step))
        assert results[0].generated == together[ask.key]
    assert answers(asks, 0, pieces=(20, 2, 2, 1)) == together
    assert answers(asks, 1) != together


def logprobs_alone(session, ask, ids):
    """Logprobs of ids behind a prompt, from one forward of the whole."""
    prompt = torch.tensor([[*ask.ids, *ids]])
    with torch.no_grad():
        logits = session.model(prompt, images=[pixels_of(name) for name in ask.images] or None).logits[0]
    return logits[-len(ids) - 1 : -1].log_softmax(-1)  # (ids, W)


def test_scores_are_those_of_one_forward(tiny_sessions):
    session = tiny_sessions[1]
    for branch in run(session, some_asks(12), Sampling(max_new_tokens=5), with_scores=True).values():
        expected = logprobs_alone(session, branch.ask, branch.generated)
        chosen = expected.gather(1, torch.tensor(branch.generated)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(branch.logprobs), chosen, rtol=0, atol=1e-5)
        best, order = expected[0].sort(descending=True)
        assert (branch.generated[0], branch.runner_up[0]) == (order[0], order[1])
        assert branch.runner_up[1] == pytest.approx(best[1].item(), abs=1e-5)


def test_given_answers_are_scored_as_by_one_forward(tiny_sessions):
    session = tiny_sessions[0]
    asks = []
    for key, ask in enumerate(some_asks(12)):
        targets = (3 + key % 5, 4, 2)[: 1 + key % 3]
        asks.append(Ask(key, [*ask.ids, *targets[:-1]], ask.images, targets))
    for key, branch in run(session, asks, Sampling(), pieces=(30, 1, 3, 2)).items():
        ask = asks[key]
        stripped = ask._replace(ids=ask.ids[: len(ask.ids) - len(ask.targets) + 1])
        expected = logprobs_alone(session, stripped, ask.targets)
        chosen = expected.gather(1, torch.tensor(ask.targets)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(branch.logprobs), chosen, rtol=0, atol=1e-5)


def test_a_question_that_does_not_fit_disturbs_no_other(tiny_sessions, whole):
    asks = some_asks(30)
    long = Ask(30, [*asks[3].ids, *[5] * 60], asks[3].images)
    results = run(tiny_sessions[0], [*asks, long], Sampling(max_new_tokens=8))
    failed = results.pop(30)
    assert (failed.code, failed.message.partition(" tokens")[0]) == (
        "prompt_too_long",
        f"the prompt takes {len(long.ids) + 3 * len(long.images)}",
    )
    assert {key: branch.generated for key, branch in results.items()} == whole


def test_pictures_that_can_not_be_read_disturb_no_other(tiny_sessions, whole):
    asks = some_asks(30)
    plan = plan_groups(asks, PATCHES)
    pictures = (
        PictureError("image_corrupt", "broken") if "a" in group.images else [pixels_of(name) for name in group.images]
        for group in plan.groups
    )
    waiting = Backlog(tiny_sessions[0], len(plan.stem_ids), plan.groups, pictures, room=8, is_padded=False)
    results = list(Engine(tiny_sessions[0], Sampling(max_new_tokens=8), plan.stem_ids).run(waiting))
    failed = {result.branch.ask.key for result in results if isinstance(result, Failed)}
    assert failed == {ask.key for ask in asks if "a" in ask.images}
    assert {result.ask.key: result.generated for result in results if not isinstance(result, Failed)} == {
        key: ids for key, ids in whole.items() if key not in failed
    }


def test_stop_texts_end_an_answer(session, swap_words):
    human = session.with_template("llava_v0")
    prompts = [human.prompt_ids(text) for text in ("hello", "and you?", "why?")]
    [full] = human.generate_ids([Prompt(prompts[0], [])], Sampling(max_new_tokens=6))
    ending = swap_words(human, full[3], human.tokenizer.convert_tokens_to_ids("###"))
    assert ending.stops_on_text
    sampling = Sampling(max_new_tokens=6)
    results = run(ending, [Ask(key, ids) for key, ids in enumerate(prompts)], sampling)
    assert len(results[0].generated) == 4
    for key, ids in enumerate(prompts):
        assert results[key].generated == ending.generate_ids([Prompt(ids, [])], sampling)[0]


def test_compiled_steps_give_the_same(tiny_sessions, whole, monkeypatch):
    compiled = []

    def compile_eagerly(function, **options):
        compiled.append(function.__name__)
        return function

    monkeypatch.setattr(torch, "compile", compile_eagerly)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compiled.append(type(self).__name__))
    results = run(tiny_sessions[0], some_asks(30), Sampling(max_new_tokens=8), compiled=True)
    assert {key: branch.generated for key, branch in results.items()} == whole
    assert compiled == ["project_heads", "gate_states", "CLIPEncoderLayer", "CLIPEncoderLayer"]
