"""The tower gives transformers' hidden states, without running the layers after them."""

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
def test_layers_after_the_selected_one_are_not_built(layer, depth):
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


@torch.no_grad()
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_layers_give_the_same_for_each_number_of_images(whole, pixels, dynamic):
    tower = build(whole)
    expected = [tower(pixels[:count]) for count in (1, 2)]
    torch._dynamo.reset()
    for layer in tower.vision_tower.modules():
        if isinstance(layer, CLIPEncoderLayer):
            layer.compile(dynamic=dynamic, fullgraph=True, backend="aot_eager")
    for count, features in zip((1, 2), expected, strict=True):
        torch.testing.assert_close(tower(pixels[:count]), features)


@pytest.fixture
def kernels(monkeypatch):
    """Return the list that fills, at each call, with whether cuDNN, flash and efficient kernels may run."""
    seen, attend = [], torch.nn.functional.scaled_dot_product_attention

    def record(*arguments, **options):
        cuda = torch.backends.cuda
        seen.append((cuda.cudnn_sdp_enabled(), cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled()))
        return attend(*arguments, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", record)
    return seen


def test_attention_is_not_cudnns(whole, pixels, kernels):
    before = torch.backends.cuda.cudnn_sdp_enabled()
    build(whole)(pixels)
    assert kernels == [(False, True, True)] * 3
    assert torch.backends.cuda.cudnn_sdp_enabled() == before


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputed_layer_chooses_among_the_same_kernels(pixels, kernels, reentrant):
    tower = CLIPVisionTower(SIZES).train()
    newer = getattr(tower.vision_tower, "activation_checkpointing_enable", None)
    (newer or tower.vision_tower.gradient_checkpointing_enable)({"use_reentrant": reentrant})
    features = tower(pixels)
    assert len(kernels) == 3
    features.sum().backward()
    assert kernels == [(False, True, True)] * 6  # three layers, each twice


def watch_activations(module):
    """Return the list that fills with (name, whether it requires a gradient) of what each submodule returns."""
    seen = []
    for name, part in module.named_modules():

        def note(part, inputs, output, name=name):
            tensors = (
                [output]
                if isinstance(output, torch.Tensor)
                else list(output.values() if hasattr(output, "values") else output)
            )
            seen.extend((name, tensor.requires_grad) for tensor in tensors if isinstance(tensor, torch.Tensor))

        part.register_forward_hook(note)
    return seen


def test_a_frozen_tower_has_no_gradients_in_training(pixels):
    tower = CLIPVisionTower(SIZES).requires_grad_(False)
    seen = watch_activations(tower)
    tower.train()(pixels)
    assert len(seen) > 20
    assert {needs for _, needs in seen} == {False}
    assert not any(module.training for module in tower.modules())


def test_a_trained_tower_has_gradients_in_every_parameter_it_uses(pixels):
    tower = CLIPVisionTower(SIZES).train()
    tower(pixels).sum().backward()
    assert [name for name, parameter in tower.named_parameters() if parameter.grad is None] == [
        "vision_tower.post_layernorm.weight",
        "vision_tower.post_layernorm.bias",
    ]
    assert tower.training


def test_gradients_reach_the_pixels_of_a_frozen_tower(pixels):
    tower = CLIPVisionTower(SIZES).requires_grad_(False)
    wanted = pixels.clone().requires_grad_()
    tower(wanted).sum().backward()
    assert wanted.grad.abs().sum() > 0
