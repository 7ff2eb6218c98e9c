"""The vision tower is found inside the weights, else as the flag says, else beside them, else in the hub's cache."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPVisionConfig, CLIPVisionModel

from llava.model.builder import build_model
from llava.model.checkpoint.checkpoint import open_checkpoint
from llava.model.checkpoint.find_vision_tower import attach_tower
from llava.model.checkpoint.lazy_tensors import LazyTensors
from llava.model.checkpoint.read_tensors import open_weights
from llava.model.checkpoint.write_tensors import write_weights
from llava.model.configuration import load_config
from llava.model.vision_tower import TOWER_PREFIX, VIT_L_14_336, released_name

FULL, TOWER = "llava-v1.5-golden", "clip-vit-tiny-patch14-56"


@pytest.fixture
def towerless(goldens, copy_golden, tmp_path):
    """The golden checkpoint without the tower's tensors."""
    directory = copy_golden(FULL, tmp_path / "models" / "towerless")
    for path in directory.glob("pytorch_model*"):
        path.unlink()
    golden = open_weights(goldens / FULL)
    write_weights(golden.renamed(lambda name: None if name.startswith(TOWER_PREFIX) else name), directory)
    return directory


def test_a_tower_beside_the_checkpoint_is_found(goldens, towerless, golden_model, no_network):
    shutil.copytree(goldens / TOWER, towerless.parent / TOWER)
    checkpoint = open_checkpoint(towerless)
    tower = open_weights(goldens / TOWER)
    used = {name for name in checkpoint.tensors if name.startswith(TOWER_PREFIX)}
    assert used == {f"model.vision_tower.vision_tower.{name}" for name in tower if name.startswith("vision_model.")}
    model = build_model(checkpoint, dtype="float32", device="cpu")
    pixels = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    inside = golden_model[1].get_vision_tower()(pixels)
    assert model.get_vision_tower()(pixels).shape == inside.shape


def test_a_tower_asked_for_is_used(goldens, towerless):
    checkpoint = open_checkpoint(towerless, vision_tower=goldens / TOWER)
    assert checkpoint.config.mm_vision_tower == str(goldens / TOWER)
    assert any(name.startswith(TOWER_PREFIX) for name in checkpoint.tensors)
    assert checkpoint.image_processor.crop_size["height"] == 56


@pytest.mark.parametrize(
    "settings", [{"model_type": "siglip_vision_model"}, {"vision_config": {"model_type": "siglip"}}]
)
def test_a_vision_tower_that_is_not_clip(goldens, towerless, tmp_path, settings):
    other = tmp_path / "siglip"
    shutil.copytree(goldens / TOWER, other)
    (other / "config.json").chmod(0o644)
    (other / "config.json").write_text(json.dumps({"hidden_size": 32, **settings}))
    message = rf"^{other} holds a vision tower of type 'siglip(_vision_model)?', and LLaVA-1.5's is CLIP; weights tra"
    with pytest.raises(ValueError, match=message):
        open_checkpoint(towerless, vision_tower=other)


def test_a_tower_that_is_nowhere(towerless, no_network):
    message = rf"^{TOWER} is neither a directory nor complete in the hub's cache, and HF_HUB_OFFLINE forbids"
    with pytest.raises(FileNotFoundError, match=message):
        open_checkpoint(towerless)


def test_an_llm_without_tower_has_no_eyes(change_config, towerless):
    change_config(towerless, mm_vision_tower=None)
    checkpoint = open_checkpoint(towerless)
    assert checkpoint.image_processor is None
    assert checkpoint.config.mm_vision_config is None


def test_one_asked_for_in_vain_is_mentioned(goldens, caplog):
    caplog.set_level("INFO")
    open_checkpoint(goldens / FULL, vision_tower=goldens / TOWER)
    assert caplog.messages == [f"vision tower: inside the checkpoint (--vision-tower {goldens / TOWER} is not needed)"]


def test_the_place_is_logged(goldens, towerless, caplog):
    caplog.set_level("INFO")
    open_checkpoint(towerless, vision_tower=goldens / TOWER)
    assert caplog.messages == [f"vision tower: {goldens / TOWER}"]


def test_a_tower_as_newer_libraries_save_it(goldens, towerless, tmp_path):
    """transformers 5 leaves the level `vision_model.` out of the names."""
    newer = tmp_path / "newer"
    loaded = CLIPVisionModel.from_pretrained(goldens / TOWER)
    fresh = CLIPVisionModel(loaded.config)
    fresh.load_state_dict(loaded.state_dict())
    fresh.save_pretrained(newer)
    assert "embeddings.class_embedding" in load_file(newer / "model.safetensors")
    expected = open_checkpoint(towerless, vision_tower=goldens / TOWER).tensors
    found = open_checkpoint(towerless, vision_tower=newer).tensors
    assert sorted(found) == sorted(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_unknown_sizes_of_a_tower_inside(copy_golden, tmp_path):
    directory = copy_golden(FULL, tmp_path / "alone" / "x")
    message = (
        f"^the sizes of vision tower '{TOWER}' are unknown: no config.json, and it is not OpenAI's ViT-L/14-336; pass "
        "--vision-tower with its directory$"
    )
    with pytest.raises(FileNotFoundError, match=message):
        open_checkpoint(directory)


def test_openais_vision_tower_needs_no_config(copy_golden, change_config, tmp_path):
    """Its sizes follow from the shapes of its tensors, whatever it is called; only shapes are looked at."""
    directory = copy_golden(FULL, tmp_path / "alone" / "x")
    change_config(directory, mm_vision_tower="my/encoder", mm_hidden_size=...)
    with torch.device("meta"):
        tower = CLIPVisionModel(CLIPVisionConfig(**VIT_L_14_336)).state_dict()
    golden = open_weights(directory).renamed(lambda name: None if name.startswith(TOWER_PREFIX) else name)
    large = LazyTensors.of({released_name(TOWER_PREFIX + name): tensor for name, tensor in tower.items()})
    tensors, config, _ = attach_tower(load_config(directory), golden.overlaid(large.entries), None, [directory])
    assert config.mm_vision_config == VIT_L_14_336
    assert config.mm_hidden_size == 1024
    assert len(tensors) == len(golden) + len(large)


def test_the_hubs_revision_of_a_tower_is_recorded(goldens, towerless, hub_cache, no_network):
    revision = "a" * 40
    hub_cache("tiny/tower", goldens / TOWER, revision)
    checkpoint = open_checkpoint(towerless, vision_tower="tiny/tower")
    assert (checkpoint.config.mm_vision_tower, checkpoint.config.mm_vision_tower_revision) == ("tiny/tower", revision)
