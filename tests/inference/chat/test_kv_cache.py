"""Both KV caches give the logits of one forward over the whole conversation, however it is divided or interrupted."""

import copy
import dataclasses
import sys
import types

import pytest
import torch

import llava.inference.chat
from llava.image_files.decode import open_image
from llava.inference.chat import kv_cache
from llava.inference.chat.chat import Chat
from llava.inference.chat.kv_cache import GrowingKVCache, KVCacheFactory, TransformersKVCache, load_fused_step
from llava.inference.engine.cuda_graphs import StepShape
from llava.inference.engine.ragged_llama import RaggedLlama
from llava.inference.sampler import draw_key, exponential_noise
from llava.inference.session import Prompt, Sampling, Session
from llava.model.capabilities import COMPILER, TRITON, Machine, choose

CONTEXT = 700
KINDS = {"row": lambda model: GrowingKVCache(RaggedLlama(model)), "library": TransformersKVCache}
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
    """Logits after each token."""
    with torch.no_grad():
        return model(tokens[None]).logits[0]


@pytest.fixture(params=["greedy", "temperature", "top_p"])
def sampling(request):
    warm = Sampling(temperature=1.5, max_new_tokens=6, seed=11)
    kinds = {"greedy": Sampling(max_new_tokens=6), "temperature": warm}
    return kinds.get(request.param, dataclasses.replace(warm, top_p=0.7))


def check(found, expected):
    torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-5)


def read(cache, model, tokens):
    return cache.prefill(model.get_input_embeddings()(tokens).detach())


def random_session(session, seed):
    model = copy.deepcopy(session.model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.2)
    return dataclasses.replace(session, model=model)


def answer_plainly(session, prompt, sampling):
    """The answer's ids, from one forward over the whole conversation per token, without a KV cache."""
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
            key = draw_key(sampling.seed, prompt.input_ids, len(ids) - len(prompt.input_ids))
            token = int((probabilities / exponential_noise(torch.tensor([key]), len(logits))[0]).argmax())
        ids.append(token)
        answer = ids[len(prompt.input_ids) :]
        if token in session.stop_ids or len(answer) == sampling.max_new_tokens:
            return answer


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("is_pipelined", [False, True])
def test_a_chat_says_what_the_whole_dialogue_gives(session, goldens, turn_ids, sampling, seed, is_pipelined):
    session = random_session(session, seed)
    photos = [open_image(goldens / "images" / name) for name in ("landscape.jpg", "portrait.png")]
    chat = Chat(session, sampling)
    chat.is_pipelined = is_pipelined
    ids, pixels = [], []
    for turn, images in zip(TURNS, (photos[:1], [], photos[1:], []), strict=True):
        ids += turn_ids(session, turn, len(images), is_first=not ids)
        pixels += session.pixel_values(images)
        expected = answer_plainly(session, Prompt(ids, pixels), sampling)
        assert "".join(chat.reply(turn, images)) == session.decode(expected)
        ids = ids + expected + ([] if expected[-1] in session.stop_ids else [session.tokenizer.eos_token_id])
        assert chat.ids == ids


def test_pipelined_steps_that_are_dropped_leave_no_trace(session, sampling):
    """Stopped after any piece, a pipelined chat continues like one that is not."""
    pipelined, plain = Chat(session, sampling), Chat(session, sampling)
    pipelined.is_pipelined = True
    for n_pieces in (1, 3, 2, 6):
        for chat in (pipelined, plain):
            pieces = chat.reply("and now?")
            for _ in range(n_pieces):
                next(pieces, None)
            pieces.close()
        assert pipelined.turns == plain.turns
        assert pipelined.ids == plain.ids
        assert pipelined.computed_positions == plain.computed_positions > 0


class Replayed:
    """CUDA graphs imitated on the CPU: inputs and outputs keep their addresses from the first call on."""

    def __init__(self):
        self.captured = {}

    def __call__(self, compute, entries, shape):
        if shape not in self.captured:
            taken = entries.clone()
            keys = compute.__self__._layers[0][0]
            self.captured[shape] = taken, compute(taken, shape), keys.data_ptr()
        taken, result, address = self.captured[shape]
        taken.copy_(entries)
        assert compute.__self__._layers[0][0].data_ptr() == address
        return result.copy_(compute(taken, shape))


@pytest.fixture
def replayed(monkeypatch):
    """Every `Replayed` created instead of CUDA graphs."""
    made = []

    def make(capture_at):
        assert capture_at > 1
        made.append(Replayed())
        return made[-1]

    monkeypatch.setattr(kv_cache, "CudaGraphs", make)
    return made


@pytest.mark.parametrize("room, lengths", [(0, [[128], [256], [512], [CONTEXT]]), (CONTEXT - 5, [[512, CONTEXT]])])
def test_graphs_are_captured_again_when_the_storage_moves(model, tokens, expected, replayed, room, lengths):
    cache = GrowingKVCache(RaggedLlama(model), is_graphed=True)
    cache.prefill(model.get_input_embeddings()(tokens[:5]).detach(), room=room)
    for place in range(5, CONTEXT):
        check(cache.decode(tokens[place : place + 1]), expected[place])
    assert [[shape.length for shape in graphs.captured] for graphs in replayed] == lengths


@pytest.mark.parametrize("is_pipelined", [False, True])
def test_a_chat_with_graphed_steps(session, sampling, is_pipelined, replayed):
    plain = Chat(session, sampling)
    chat = Chat(session, sampling, GrowingKVCache(RaggedLlama(session.model), is_graphed=True))
    chat.is_pipelined = is_pipelined
    for turn in TURNS:
        assert "".join(chat.reply(turn)) == "".join(plain.reply(turn))
    assert chat.ids == plain.ids
    assert replayed


def test_a_second_interruption_during_the_first_ones_clean_up(session, sampling, monkeypatch):
    chat, undisturbed = Chat(session, sampling), Chat(session, sampling)
    chat.is_pipelined = True
    for each in (chat, undisturbed):
        "".join(each.reply("Is there railing?"))

    def interrupt(*args):
        raise KeyboardInterrupt

    pieces = chat.reply("and now?")
    next(pieces)
    monkeypatch.setattr(Session, "spliced_length", interrupt)  # the first thing that recording the turn asks for
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
            check(cache.decode(tokens[place : place + 1]), expected[place])
        start = stop + 2
        assert cache.length == start


def test_storage_grows_by_doubling_and_keeps_what_is_there(model, tokens, expected):
    cache, capacities = GrowingKVCache(RaggedLlama(model)), []
    read(cache, model, tokens[:5])
    for place in range(5, CONTEXT):
        check(cache.decode(tokens[place : place + 1]), expected[place])
        if cache.capacity not in capacities:
            capacities.append(cache.capacity)
    assert capacities == [128, 256, 512, CONTEXT]  # no more than the model has positions


def test_room_that_is_asked_for_is_there_from_the_start(model, tokens):
    cache = GrowingKVCache(RaggedLlama(model))
    cache.prefill(model.get_input_embeddings()(tokens[:5]).detach(), room=300)
    assert cache.capacity == 384


def test_truncated_positions_are_overwritten(open_kind, model, tokens, expected):
    cache = open_kind(model)
    read(cache, model, tokens[:9].flip(0))
    cache.truncate(0)
    read(cache, model, tokens[:20])
    cache.decode(tokens[:1])
    cache.truncate(7)
    cache.truncate(30)
    assert cache.length == 7
    check(read(cache, model, tokens[7:12]), expected[11])
    check(cache.decode(tokens[12:13]), expected[12])


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
        cache.truncate(cache.length)
        assert cache.length == start
        read(cache, model, tokens[start : start + 10])
        monkeypatch.setattr(module, "forward", interrupt)
        with pytest.raises(KeyboardInterrupt):
            cache.decode(tokens[:1])
        monkeypatch.undo()
        cache.truncate(cache.length)
        for step in (start + 10, start + 11):
            check(cache.decode(tokens[step : step + 1]), expected[step])


@pytest.mark.parametrize("n_tensors", range(4))
def test_an_interruption_while_the_storage_grows(model, tokens, expected, n_tensors, monkeypatch):
    """Before the keys of the first layer, its values, the keys of the second, its values."""
    cache = GrowingKVCache(RaggedLlama(model))
    read(cache, model, tokens[:128])
    real, calls = torch.zeros, iter(range(n_tensors))

    def interrupted(*arguments, **options):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(torch, "zeros", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache.decode(tokens[:1])
    monkeypatch.undo()
    for place in (128, 129):
        check(cache.decode(tokens[place : place + 1]), expected[place])


def test_the_kv_cache_of_a_model(tiny_model, monkeypatch):
    assert isinstance(KVCacheFactory(tiny_model()).create(), GrowingKVCache)
    changing = tiny_model(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})
    assert isinstance(KVCacheFactory(changing).create(), TransformersKVCache)


def test_chats_of_a_model_share_what_is_made_once(session, sampling, monkeypatch):
    made = []
    make = kv_cache.RaggedLlama

    def count(model):
        made.append(model)
        return make(model)

    monkeypatch.setattr(kv_cache, "RaggedLlama", count)
    session = dataclasses.replace(session, kv_caches=None)
    chats = [Chat(one, sampling) for one in (session, session, session.with_template("plain"))]
    assert made == [session.model]
    assert len({id(chat._cache) for chat in chats}) == 3
    monkeypatch.setattr(kv_cache, "can_be_captured", lambda model: False)
    Chat(session, sampling)
    assert len(made) == 2  # as after attaching an adapter


def test_a_model_that_needs_transformers_forward_chats_too(session, sampling, monkeypatch):
    answers = ["".join(chat.reply(turn)) for chat in [Chat(session, sampling)] for turn in TURNS]
    monkeypatch.setattr(kv_cache, "supports_ragged", lambda model: False)
    chat = Chat(session, sampling)
    assert ["".join(chat.reply(turn)) for turn in TURNS] == answers


def have_triton(monkeypatch, build):
    """Pretend that Triton is installed, with other kernels: (llama) -> decode step."""
    stub = types.SimpleNamespace(
        has_fused_form=lambda _: True, COMPILE_ERRORS=(OSError, RuntimeError), FusedDecodeStep=build
    )
    hopper = choose(Machine("cuda", "H100", (9, 0), installed=frozenset({TRITON, COMPILER})))
    monkeypatch.setattr(kv_cache, "capabilities_of", lambda device: hopper)
    monkeypatch.setitem(sys.modules, "llava.inference.chat.decode_step", stub)
    monkeypatch.setattr(llava.inference.chat, "decode_step", stub, raising=False)


@pytest.mark.parametrize(
    ("spoil", "is_used"),
    [
        (lambda entries, logits: logits, True),
        (lambda entries, logits: 1.01 * logits, True),
        (lambda entries, logits: logits.flip(-1), False),
        (lambda entries, logits: logits * torch.where(entries[1] > 64, torch.nan, 1), False),
    ],
    ids=["equal", "rounded", "different", "NaN in a second split"],
)
def test_kernels_that_disagree_with_the_layers_are_not_used(model, monkeypatch, caplog, spoil, is_used):
    def build(llama):
        def step(entries, layers):
            cache = GrowingKVCache(llama)
            cache._layers = list(layers)
            return spoil(entries, cache._decode(entries, StepShape(1, 1, 1, cache.capacity)))

        return step

    have_triton(monkeypatch, build)
    assert (load_fused_step(RaggedLlama(model)) is not None) is is_used
    assert ("the Triton decode kernels disagree with the layers" in caplog.text) is not is_used


def test_kernels_that_do_not_compile_are_not_used(model, monkeypatch, caplog):
    error = OSError("no compiler")

    def step(entries, layers):
        raise error

    have_triton(monkeypatch, lambda llama: step)
    assert load_fused_step(RaggedLlama(model)) is None
    assert caplog.messages == ["Triton can't compile the decode kernels, so decoding is slower: no compiler"]
    error = torch.OutOfMemoryError("no room")
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        load_fused_step(RaggedLlama(model))


@pytest.mark.parametrize(("capability", "installed"), [((9, 0), {COMPILER}), ((7, 5), {TRITON, COMPILER})])
def test_without_triton_and_before_ampere_there_are_no_kernels(model, monkeypatch, capability, installed):
    here = choose(Machine("cuda", "GPU", capability, installed=frozenset(installed)))
    monkeypatch.setattr(kv_cache, "capabilities_of", lambda device: here)
    assert load_fused_step(RaggedLlama(model)) is None
    cache = KVCacheFactory(model).create()
    assert cache._is_graphed  # CUDA graphs need no Triton
    assert cache._fused_step is None
