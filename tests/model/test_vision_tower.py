"""The tower gives transformers' hidden states, without running the layers behind them."""

from __future__ import annotations

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from llava.model.vision_tower import CLIPVisionTower, released_name

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 42,
    "patch_size": 14,
    "projection_dim": 8,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}


@pytest.fixture(scope="module")
def whole():
    """transformers' encoder with all layers, random weights."""
    torch.manual_seed(0)
    model = CLIPVisionModel(CLIPVisionConfig(**SIZES)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


@pytest.fixture(scope="module")
def pixels():
    return torch.randn(2, 3, 42, 42, generator=torch.Generator().manual_seed(1))


def build(whole, **options):
    tower = CLIPVisionTower(SIZES, **options).eval()
    missing, _ = tower.vision_tower.load_state_dict(whole.state_dict(), strict=False)
    assert missing == []
    return tower


@pytest.mark.parametrize("layer", [-5, -3, -2, -1, 0, 1, 3, 4])
def test_equals_transformers_hidden_states(whole, pixels, layer):
    with torch.no_grad():
        states = whole(pixels, output_hidden_states=True).hidden_states
        features = build(whole, select_layer=layer)(pixels)
    assert len(states) == 5
    torch.testing.assert_close(features, states[layer][:, 1:])


def test_class_token_is_kept_on_request(whole, pixels):
    with torch.no_grad():
        expected = whole(pixels, output_hidden_states=True).hidden_states[-2]
        torch.testing.assert_close(build(whole, select_feature="cls_patch")(pixels), expected)


@pytest.mark.parametrize(("layer", "depth"), [(-2, 3), (-1, 4), (2, 2), (0, 0)])
def test_layers_behind_the_selected_one_are_not_built(layer, depth):
    tower = CLIPVisionTower(SIZES, layer)
    assert tower.config.num_hidden_layers == depth
    built = {name.split("layers.")[1].split(".")[0] for name, _ in tower.named_parameters() if "layers." in name}
    assert built == {str(index) for index in range(depth)}


def test_sizes():
    tower = CLIPVisionTower(SIZES)
    assert (tower.hidden_size, tower.num_patches_per_side, tower.num_patches) == (16, 3, 9)
    assert tower(torch.zeros(1, 3, 42, 42)).shape == (1, 9, 16)
    assert (tower.dtype, tower.device) == (torch.float32, torch.device("cpu"))


def test_computes_in_its_own_dtype():
    tower = CLIPVisionTower(SIZES).to(torch.bfloat16)
    assert tower(torch.zeros(1, 3, 42, 42)).dtype == torch.bfloat16


@pytest.mark.parametrize(("dtype", "is_same"), [(torch.bfloat16, True), (torch.float32, False)])
def test_autocast_changes_nothing_for_weights_in_half_precision(whole, pixels, dtype, is_same):
    tower = build(whole).to(dtype)
    alone = tower(pixels)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tower(pixels), alone) == is_same


@pytest.mark.parametrize("layer", [5, -6])
def test_layer_that_does_not_exist(layer):
    with pytest.raises(ValueError, match=f"^mm_vision_select_layer {layer} does not exist in an encoder of 4 layers$"):
        CLIPVisionTower(SIZES, layer)


def test_unknown_feature():
    with pytest.raises(ValueError, match=r"^mm_vision_select_feature is 'cls'; choose patch or cls_patch$"):
        CLIPVisionTower(SIZES, select_feature="cls")


@pytest.mark.parametrize(
    ("parameter", "stored"),
    [
        ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        (
            "model.vision_tower.vision_tower.encoder.layers.0.mlp.fc1.bias",
            "model.vision_tower.vision_tower.vision_model.encoder.layers.0.mlp.fc1.bias",
        ),
        (
            "model.vision_tower.vision_tower.vision_model.embeddings.class_embedding",
            "model.vision_tower.vision_tower.vision_model.embeddings.class_embedding",
        ),
    ],
)
def test_names_in_files_are_the_released_ones(parameter, stored):
    assert released_name(parameter) == stored


def test_no_attention_is_planned_for_the_number_of_pictures(whole, pixels):
    tower, seen = build(whole), []
    for layer in tower.vision_tower.modules():
        if isinstance(layer, CLIPEncoderLayer):
            layer.register_forward_pre_hook(lambda *_: seen.append(torch.backends.cuda.cudnn_sdp_enabled()))
    before = torch.backends.cuda.cudnn_sdp_enabled()
    tower(pixels)
    assert seen == [False] * 3
    assert torch.backends.cuda.cudnn_sdp_enabled() == before


@torch.no_grad()
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_layers_give_the_same_for_each_number_of_pictures(whole, pixels, dynamic):
    tower = build(whole)
    expected = [tower(pixels[:count]) for count in (1, 2)]
    torch._dynamo.reset()
    for layer in tower.vision_tower.modules():
        if isinstance(layer, CLIPEncoderLayer):
            layer.compile(dynamic=dynamic, fullgraph=True, backend="aot_eager")
    for count, features in zip((1, 2), expected, strict=True):
        torch.testing.assert_close(tower(pixels[:count]), features)
