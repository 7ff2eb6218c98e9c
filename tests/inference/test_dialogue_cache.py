"""Both caches give the logits of the whole dialogue at once, however it is divided, and whatever interrupts them."""

import copy
import dataclasses
import importlib.util
import sys
import types

import pytest
import torch

import llava.model
from llava.image_processing import open_image
from llava.inference import dialogue_cache
from llava.inference.chat import Chat
from llava.inference.dialogue_cache import DialogueCaches, LibraryCache, RowCache, load_kernels
from llava.inference.session import Prompt, Sampling
from llava.inference.step_graphs import StepShape
from llava.model.flat_llama import FlatLlama

CONTEXT = 700
KINDS = {"row": lambda model: RowCache(FlatLlama(model)), "library": LibraryCache}
TURNS = ("Is there railing?", "and now?", "Compare it with this", "why?")


@pytest.fixture(params=KINDS)
def open_kind(request):
    return KINDS[request.param]


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model(max_position_embeddings=CONTEXT, num_attention_heads=4, num_key_value_heads=2)


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(3, 60, (CONTEXT,), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def expected(model, tokens):
    """Logits behind each token."""
    with torch.no_grad():
        return model(tokens[None]).logits[0]


@pytest.fixture(params=["greedy", "chance", "chance among the likeliest"])
def sampling(request):
    warm = Sampling(temperature=1.5, max_new_tokens=6, seed=11)
    kinds = {"greedy": Sampling(max_new_tokens=6), "chance": warm}
    return kinds.get(request.param, dataclasses.replace(warm, top_p=0.7))


def check(found, expected):
    torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-5)


def read(cache, model, tokens):
    return cache.read(model.get_input_embeddings()(tokens).detach())


def random_session(session, seed):
    model = copy.deepcopy(session.model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.2)
    return dataclasses.replace(session, model=model)


def answer_plainly(session, prompt, sampling, generator):
    """The answer's ids: the whole dialogue is computed for each token, without a cache."""
    ids = list(prompt.input_ids)
    while True:
        with torch.no_grad():
            embeds = session.model.splice(torch.tensor([ids]), prompt.pixel_values).inputs_embeds
            logits = session.model(inputs_embeds=embeds).logits[0, -1]
        if sampling.temperature == 0:
            token = int(logits.argmax())
        else:
            probabilities = (logits / sampling.temperature).softmax(-1)
            if sampling.top_p is not None:
                ordered, order = probabilities.sort(descending=True)
                probabilities[order[ordered.cumsum(0) - ordered >= sampling.top_p]] = 0
            token = int(torch.multinomial(probabilities, 1, generator=generator))
        ids.append(token)
        answer = ids[len(prompt.input_ids) :]
        if token in session.stop_ids or len(answer) == sampling.max_new_tokens:
            return answer


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("is_ahead", [False, True])
def test_a_chat_says_what_the_whole_dialogue_gives(session, goldens, turn_ids, sampling, seed, is_ahead):
    session = random_session(session, seed)
    pictures = [open_image(goldens / "images" / name) for name in ("landscape.jpg", "portrait.png")]
    chat = Chat(session, sampling)
    chat.is_ahead = is_ahead
    generator = torch.Generator().manual_seed(11)
    ids, pixels = [], []
    for turn, images in zip(TURNS, (pictures[:1], [], pictures[1:], []), strict=True):
        ids += turn_ids(session, turn, len(images), is_first=not ids)
        pixels += session.pixel_values(images)
        expected = answer_plainly(session, Prompt(ids, pixels), sampling, generator)
        assert "".join(chat.reply(turn, images)) == session.decode(expected)
        ids = ids + expected + ([] if expected[-1] in session.stop_ids else [session.tokenizer.eos_token_id])
        assert chat.ids == ids


def test_steps_ahead_that_are_not_wanted_leave_no_trace(session, sampling):
    """Broken off after each piece in turn, a chat that is ahead goes on like one that is not."""
    ahead, behind = Chat(session, sampling), Chat(session, sampling)
    ahead.is_ahead = True
    for n_pieces in (1, 3, 2, 6):
        for chat in (ahead, behind):
            pieces = chat.reply("and now?")
            for _ in range(n_pieces):
                next(pieces, None)
            pieces.close()
        assert ahead.turns == behind.turns
        assert ahead.ids == behind.ids
        assert ahead.fed_tokens == behind.fed_tokens > 0


class Replayed:
    """Does on the CPU what recorded steps do: their inputs and results stay where they were at first."""

    def __init__(self):
        self.recorded = {}

    def __call__(self, compute, entries, shape):
        if shape not in self.recorded:
            taken = entries.clone()
            keys = compute.__self__._layers[0][0]
            self.recorded[shape] = taken, compute(taken, shape), keys.data_ptr()
        taken, result, address = self.recorded[shape]
        taken.copy_(entries)
        assert compute.__self__._layers[0][0].data_ptr() == address
        return result.copy_(compute(taken, shape))


@pytest.fixture
def replayed(monkeypatch):
    """All `Replayed` that are made in the place of graphs."""
    made = []

    def make(recorded_from):
        assert recorded_from > 1
        made.append(Replayed())
        return made[-1]

    monkeypatch.setattr(dialogue_cache, "StepGraphs", make)
    return made


@pytest.mark.parametrize("room, lengths", [(0, [[128], [256], [512], [CONTEXT]]), (CONTEXT - 5, [[512, CONTEXT]])])
def test_steps_are_recorded_anew_when_the_storage_moves(model, tokens, expected, replayed, room, lengths):
    cache = RowCache(FlatLlama(model), graphed=True)
    cache.read(model.get_input_embeddings()(tokens[:5]).detach(), room=room)
    for place in range(5, CONTEXT):
        check(cache.step(tokens[place : place + 1]), expected[place])
    assert [[shape.used for shape in graphs.recorded] for graphs in replayed] == lengths


@pytest.mark.parametrize("is_ahead", [False, True])
def test_a_chat_with_recorded_steps(session, sampling, is_ahead, replayed):
    plain = Chat(session, sampling)
    chat = Chat(session, sampling, RowCache(FlatLlama(session.model), graphed=True))
    chat.is_ahead = is_ahead
    for turn in TURNS:
        assert "".join(chat.reply(turn)) == "".join(plain.reply(turn))
    assert chat.ids == plain.ids
    assert replayed


def test_a_second_interruption_while_the_first_is_dealt_with(session, sampling, monkeypatch):
    chat, undisturbed = Chat(session, sampling), Chat(session, sampling)
    chat.is_ahead = True
    for each in (chat, undisturbed):
        "".join(each.reply("Is there railing?"))

    def interrupt(*args):
        raise KeyboardInterrupt

    pieces = chat.reply("and now?")
    next(pieces)
    monkeypatch.setattr(chat, "_close_turn", interrupt)
    with pytest.raises(KeyboardInterrupt):
        pieces.close()
    monkeypatch.undo()
    assert chat.turns == undisturbed.turns
    for each in (chat, undisturbed):
        each.sampling = Sampling(max_new_tokens=6)
    assert "".join(chat.reply("why?")) == "".join(undisturbed.reply("why?"))
    assert chat.ids == undisturbed.ids


@pytest.mark.parametrize("pieces", [(5,), (3, 1, 130, 2), (260, 60)])
def test_logits_are_those_of_the_whole(open_kind, model, tokens, expected, pieces):
    cache, start = open_kind(model), 0
    for piece in pieces:
        stop = start + piece
        check(read(cache, model, tokens[start:stop]), expected[stop - 1])
        for place in (stop, stop + 1):
            check(cache.step(tokens[place : place + 1]), expected[place])
        start = stop + 2
        assert cache.length == start


def test_storage_grows_by_doubling_and_keeps_what_is_there(model, tokens, expected):
    cache, capacities = RowCache(FlatLlama(model)), []
    read(cache, model, tokens[:5])
    for place in range(5, CONTEXT):
        check(cache.step(tokens[place : place + 1]), expected[place])
        if cache.capacity not in capacities:
            capacities.append(cache.capacity)
    assert capacities == [128, 256, 512, CONTEXT]  # no more than the model has positions


def test_room_that_is_asked_for_is_there_from_the_start(model, tokens):
    cache = RowCache(FlatLlama(model))
    cache.read(model.get_input_embeddings()(tokens[:5]).detach(), room=300)
    assert cache.capacity == 384


def test_what_is_cut_off_is_written_over(open_kind, model, tokens, expected):
    cache = open_kind(model)
    read(cache, model, tokens[:9].flip(0))
    cache.cut(0)
    read(cache, model, tokens[:20])
    cache.step(tokens[:1])
    cache.cut(7)
    cache.cut(30)
    assert cache.length == 7
    check(read(cache, model, tokens[7:12]), expected[11])
    check(cache.step(tokens[12:13]), expected[12])


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("name", ["self_attn.q_proj", "mlp"])
def test_an_interruption_inside_a_layer(open_kind, model, tokens, expected, place, name, monkeypatch):
    cache = open_kind(model)
    module = model.model.layers[place].get_submodule(name)

    def interrupt(*args, **options):
        raise KeyboardInterrupt

    for start in (0, 12):
        monkeypatch.setattr(module, "forward", interrupt)
        with pytest.raises(KeyboardInterrupt):
            read(cache, model, tokens[start : start + 10].flip(0))
        monkeypatch.undo()
        cache.cut(cache.length)
        assert cache.length == start
        read(cache, model, tokens[start : start + 10])
        monkeypatch.setattr(module, "forward", interrupt)
        with pytest.raises(KeyboardInterrupt):
            cache.step(tokens[:1])
        monkeypatch.undo()
        cache.cut(cache.length)
        for step in (start + 10, start + 11):
            check(cache.step(tokens[step : step + 1]), expected[step])


@pytest.mark.parametrize("n_layers", [0, 1])
def test_an_interruption_while_the_storage_grows(model, tokens, expected, n_layers, monkeypatch):
    cache = RowCache(FlatLlama(model))
    read(cache, model, tokens[:128])
    real, calls = cache._storage, iter(range(n_layers))

    def interrupted(capacity):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return real(capacity)

    monkeypatch.setattr(cache, "_storage", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache.step(tokens[:1])
    monkeypatch.undo()
    for place in (128, 129):
        check(cache.step(tokens[place : place + 1]), expected[place])


def test_which_cache_a_model_gets(tiny_model, monkeypatch):
    assert isinstance(DialogueCaches(tiny_model()).open(), RowCache)
    changing = tiny_model(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})
    assert isinstance(DialogueCaches(changing).open(), LibraryCache)


def test_chats_of_a_model_share_what_is_made_once(session, sampling, monkeypatch):
    made = []
    make = dialogue_cache.FlatLlama

    def count(model):
        made.append(model)
        return make(model)

    monkeypatch.setattr(dialogue_cache, "FlatLlama", count)
    session = dataclasses.replace(session, dialogues=None)
    chats = [Chat(one, sampling) for one in (session, session, session.with_template("plain"))]
    assert made == [session.model]
    assert len({id(chat._cache) for chat in chats}) == 3
    monkeypatch.setattr(dialogue_cache, "has_plain_weights", lambda model: False)
    Chat(session, sampling)
    assert len(made) == 2  # as if adapters had come


def test_a_model_that_only_the_library_covers_chats_too(session, sampling, monkeypatch):
    answers = ["".join(chat.reply(turn)) for chat in [Chat(session, sampling)] for turn in TURNS]
    monkeypatch.setattr(dialogue_cache, "is_flat", lambda model: False)
    chat = Chat(session, sampling)
    assert ["".join(chat.reply(turn)) for turn in TURNS] == answers


def have_triton(monkeypatch, build):
    """As though Triton were there, with other kernels: (llama) -> step."""
    stub = types.SimpleNamespace(has_fused_form=lambda _: True, FAILURES=(OSError, RuntimeError), FusedStep=build)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    monkeypatch.setitem(sys.modules, "llava.model.token_step", stub)
    monkeypatch.setattr(llava.model, "token_step", stub, raising=False)


@pytest.mark.parametrize(
    ("spoil", "is_used"),
    [
        (lambda entries, logits: logits, True),
        (lambda entries, logits: 1.01 * logits, True),
        (lambda entries, logits: logits.flip(-1), False),
        (lambda entries, logits: logits * torch.where(entries[1] > 64, torch.nan, 1), False),
    ],
    ids=["the same", "rounded", "others", "no numbers in a second part"],
)
def test_kernels_that_compute_something_else_are_not_used(model, monkeypatch, caplog, spoil, is_used):
    def build(llama):
        def step(entries, layers):
            cache = RowCache(llama)
            cache._layers = list(layers)
            return spoil(entries, cache._compute_step(entries, StepShape(1, 1, 1, cache.capacity)))

        return step

    have_triton(monkeypatch, build)
    assert (load_kernels(FlatLlama(model)) is not None) is is_used
    assert ("kernels compute something else than the layers here" in caplog.text) is not is_used


def test_kernels_that_do_not_compile_are_not_used(model, monkeypatch, caplog):
    error = OSError("no compiler")

    def step(entries, layers):
        raise error

    have_triton(monkeypatch, lambda llama: step)
    assert load_kernels(FlatLlama(model)) is None
    assert caplog.messages == ["Triton can't compile kernels here, so that tokens come more slowly: no compiler"]
    error = torch.OutOfMemoryError("no room")
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        load_kernels(FlatLlama(model))


def test_without_triton_there_are_no_kernels(model, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert load_kernels(FlatLlama(model)) is None
