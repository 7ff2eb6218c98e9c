"""The original's methods on model and vision tower, and research code that replaces them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaModel

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.model.builder import load_pretrained_model
from llava.model.configuration import LlavaConfig
from llava.model.llava_arch import LlavaMetaForCausalLM, LlavaMetaModel, build_vision_tower
from llava.model.llava_llama import LlavaLlamaForCausalLM
from llava.model.vision_tower import CLIPVisionTower

IDS = torch.tensor([[1, 5, IMAGE_TOKEN_INDEX, 7, 8], [1, IMAGE_TOKEN_INDEX, 9, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
PATCHES = 16


@pytest.fixture
def images():
    return torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model(golden_model):
    return golden_model[1]


def same_weights(first, second):
    other = dict(second.named_parameters())
    assert [name for name, _ in first.named_parameters()] == list(other)
    assert all(torch.equal(parameter, other[name]) for name, parameter in first.named_parameters())


class TestPreparedInputs:
    def test_what_is_returned(self, model, images):
        labels = torch.where(IDS > 6, IDS, IGNORE_INDEX)
        positions = torch.arange(5).expand(2, 5)
        found = model.prepare_inputs_labels_for_multimodal(IDS, positions, MASK, "cache", labels, images)
        ids, positions, mask, cache, embeds, labels = found
        assert (ids, cache) == (None, "cache")
        assert embeds.shape == (2, 4 + PATCHES, model.config.hidden_size)
        assert mask.dtype == MASK.dtype
        assert mask.sum(dim=1).tolist() == [4 + PATCHES, 2 + PATCHES]
        assert positions[1].tolist() == [*range(2 + PATCHES), 0, 0]
        patches = [IGNORE_INDEX] * PATCHES
        assert labels.tolist() == [[-100, -100, *patches, 7, 8], [-100, *patches, 9, -100, -100]]

    def test_what_was_not_given_is_none(self, model, images):
        found = model.prepare_inputs_labels_for_multimodal(IDS[:1], None, None, None, None, images[:1], [(5, 5)])
        assert [value is None for value in found] == [True, True, True, True, False, True]

    @torch.no_grad()
    def test_the_models_logits_are_the_same(self, model, images):
        _, _, mask, _, embeds, _ = model.prepare_inputs_labels_for_multimodal(IDS, None, MASK, None, None, images)
        logits = model(inputs_embeds=embeds, attention_mask=mask).logits
        expected = model(input_ids=IDS, attention_mask=MASK, images=images).logits
        assert torch.equal(logits[mask.bool()], expected[mask.bool()])

    def test_padding_side_of_the_config(self, model, images, monkeypatch):
        monkeypatch.setattr(model.config, "tokenizer_padding_side", "left")
        mask = model.prepare_inputs_labels_for_multimodal(IDS, None, MASK, None, None, images)[2]
        assert mask[1].tolist() == [0, 0] + [1] * (2 + PATCHES)

    @pytest.mark.parametrize(("ids", "given"), [(IDS, False), (IDS[:, :1], True)])
    def test_without_images_or_in_a_step_the_arguments_are_returned(self, model, images, ids, given):
        found = model.prepare_inputs_labels_for_multimodal(ids, 1, 2, 3, 4, images if given else None)
        assert found[0] is ids
        assert found[1:] == (1, 2, 3, None, 4)


class TestReplacedMethods:
    @torch.no_grad()
    def test_a_replacement_makes_the_llms_inputs(self, model, images, monkeypatch):
        """As research code does that keeps some of the patches."""
        before = model.generate(IDS, attention_mask=MASK, images=images, max_new_tokens=3, do_sample=False)
        original = LlavaMetaForCausalLM.prepare_inputs_labels_for_multimodal
        widths = []

        def shorter(self, ids, positions, mask, cache, labels, images, image_sizes=None):
            found = original(self, ids, positions, mask, cache, labels, images)
            keep = torch.ones(found[4].shape[1], dtype=torch.bool)
            keep[3:9] = False  # patches of both rows
            widths.append(int(keep.sum()))
            mask, embeds = found[2][:, keep], found[4][:, keep]
            return None, None, mask, cache, embeds, None if labels is None else found[5][:, keep]

        monkeypatch.setattr(LlavaMetaForCausalLM, "prepare_inputs_labels_for_multimodal", shorter)
        result = model(input_ids=IDS, attention_mask=MASK, images=images, labels=IDS.clamp(min=IGNORE_INDEX))
        assert result.logits.shape[1] == 4 + PATCHES - 6
        after = model.generate(IDS, attention_mask=MASK, images=images, max_new_tokens=3, do_sample=False)
        assert after.shape == before.shape
        assert widths == [4 + PATCHES - 6] * 2

    @torch.no_grad()
    def test_one_that_changes_nothing_changes_nothing(self, model, images, monkeypatch):
        expected = model(input_ids=IDS, attention_mask=MASK, images=images).logits
        answer = model.generate(IDS, attention_mask=MASK, images=images, max_new_tokens=3, do_sample=False)
        original = LlavaMetaForCausalLM.prepare_inputs_labels_for_multimodal
        monkeypatch.setattr(
            LlavaMetaForCausalLM,
            "prepare_inputs_labels_for_multimodal",
            lambda self, *arguments: original(self, *arguments),
        )
        assert torch.equal(model(input_ids=IDS, attention_mask=MASK, images=images).logits, expected)
        found = model.generate(IDS, attention_mask=MASK, images=images, max_new_tokens=3, do_sample=False)
        assert torch.equal(found, answer)

    @pytest.mark.parametrize("owner", [LlavaMetaForCausalLM, LlavaLlamaForCausalLM])
    @torch.no_grad()
    def test_features_that_are_replaced(self, model, images, monkeypatch, owner):
        ids = IDS[:1]
        _, _, _, _, expected, _ = model.prepare_inputs_labels_for_multimodal(ids, None, None, None, None, images[:1])
        monkeypatch.setattr(owner, "encode_images", lambda self, images: torch.ones(1, 3, 16), raising=False)
        _, _, _, _, embeds, _ = model.prepare_inputs_labels_for_multimodal(ids, None, None, None, None, images[:1])
        assert torch.equal(embeds, torch.cat([expected[:, :2], torch.ones(1, 3, 16), expected[:, -2:]], dim=1))
        assert model(input_ids=ids, images=images[:1]).logits.shape[1] == 7

    @torch.no_grad()
    def test_a_tower_whose_forward_is_replaced(self, model, images, monkeypatch):
        expected = model.get_model().mm_projector(2 * model.get_vision_tower()(images))

        def forward(self, images):
            outputs = self.vision_tower(images.to(self.dtype), output_hidden_states=True)
            return 2 * outputs.hidden_states[self.select_layer][:, 1:]

        monkeypatch.setattr(CLIPVisionTower, "forward", forward)
        assert torch.equal(model.encode_images(images), expected)


class TestVisionTower:
    def test_attributes(self, model):
        tower = model.get_model().get_vision_tower()
        assert tower is model.get_vision_tower()
        assert tower.is_loaded
        assert tower.load_model() is None
        assert tower.load_model(device_map="auto") is None
        assert tower.vision_tower_name == "clip-vit-tiny-patch14-56"
        assert (tower.hidden_size, tower.num_patches, tower.num_patches_per_side) == (32, PATCHES, 4)
        assert tower.config.image_size == 56
        assert tower.dummy_feature.shape == (1, 32)
        assert not tower.dummy_feature.any()
        assert tower.image_processor.crop_size == {"height": 56, "width": 56}

    def test_features_of_a_list_and_without_gradient(self, goldens, images):
        model = load_pretrained_model(str(goldens / "llava-v1.5-golden"), None, "x", device="cpu")[1]
        tower = model.get_vision_tower()
        expected = tower(images)
        features = tower(list(images))
        assert [feature.shape for feature in features] == [(1, PATCHES, 32)] * 2
        torch.testing.assert_close(torch.cat(features), expected)
        assert not expected.requires_grad
        assert model.get_model().mm_projector(expected).requires_grad

    def test_layers_are_reached_as_in_older_versions_of_transformers(self, model, images):
        encoder, found = model.get_vision_tower().vision_tower, []
        layer = encoder.vision_model.encoder.layers[-1].self_attn.k_proj
        handle = layer.register_forward_hook(lambda module, inputs, output: found.append(output.shape))
        model.encode_images(images)
        handle.remove()
        assert found == [(2, PATCHES + 1, 32)]
        assert not any("vision_model" in name for name in encoder.state_dict())

    def test_selected_features_of_the_hidden_states(self, model, images):
        tower = model.get_vision_tower()
        outputs = tower.vision_tower(images, output_hidden_states=True)
        assert torch.equal(tower.feature_select(outputs), tower(images))

    def test_an_llm_without_one(self, tiny_model):
        model = tiny_model(mm_vision_config=None)
        assert model.get_vision_tower() is None
        found = model.prepare_inputs_labels_for_multimodal(IDS, None, None, None, None, torch.zeros(1))
        assert found[0] is IDS

    def test_built_from_a_name(self, goldens, model, images):
        settings = SimpleNamespace(mm_vision_tower=str(goldens / "clip-vit-tiny-patch14-56"), mm_vision_select_layer=-2)
        tower = build_vision_tower(settings, delay_load=True)
        assert torch.equal(tower(images), model.get_vision_tower()(images))
        assert tower.image_processor.crop_size == {"height": 56, "width": 56}
        assert not any(parameter.requires_grad for parameter in tower.parameters())

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"mm_vision_tower": None}, r"^mm_vision_tower is not set; name a directory or hub id such as openai/"),
            ({"vision_tower": "x", "s2": True}, r"^s2 is True, but towers over several scales are not supported"),
        ],
    )
    def test_what_can_not_be_built(self, settings, message):
        with pytest.raises(ValueError, match=message):
            build_vision_tower(SimpleNamespace(**settings))


class TestModules:
    def test_vision_modules_are_added_to_an_llm(self, goldens, tiny_model, model, images):
        llm = tiny_model(mm_vision_config=None)
        settings = SimpleNamespace(
            vision_tower=str(goldens / "clip-vit-tiny-patch14-56"),
            mm_vision_select_layer=-2,
            mm_vision_select_feature="patch",
            mm_projector_type="mlp2x_gelu",
            pretrain_mm_mlp_adapter=None,
        )
        llm.get_model().initialize_vision_modules(settings)
        assert llm.encode_images(images).shape == (2, PATCHES, 16)
        assert torch.equal(llm.get_vision_tower()(images), model.get_vision_tower()(images))
        assert (llm.config.mm_hidden_size, llm.config.mm_projector_type) == (32, "mlp2x_gelu")
        llm.initialize_vision_tokenizer(settings, tokenizer=None)
        with pytest.raises(ValueError, match=r"^mm_use_im_start_end is True, but LLaVA-1.5 has no such tokens"):
            llm.initialize_vision_tokenizer(SimpleNamespace(mm_use_im_start_end=True), tokenizer=None)
        llm.config.mm_use_im_start_end = True
        llm.initialize_vision_tokenizer(SimpleNamespace(mm_use_im_start_end=True), tokenizer=None)

    def test_a_projector_to_start_from(self, goldens, model, tiny_model):
        llm = tiny_model(mm_vision_config=None)
        projector = goldens / "golden-pretrained-projector"
        settings = SimpleNamespace(
            vision_tower=str(goldens / "clip-vit-tiny-patch14-56"),
            mm_vision_select_layer=-2,
            mm_projector_type="mlp2x_gelu",
            pretrain_mm_mlp_adapter=str(projector / "mm_projector.bin"),
        )
        llm.get_model().initialize_vision_modules(settings)
        stored = torch.load(projector / "mm_projector.bin", weights_only=True)
        assert torch.equal(llm.get_model().mm_projector[0].weight, stored["model.mm_projector.0.weight"].float())

    def test_a_body_of_other_code(self):
        """A class with the mixin before Llama has the vision tower its config describes."""

        class Body(LlavaMetaModel, LlamaModel):
            pass

        vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = LlavaConfig(
            hidden_size=16, intermediate_size=8, num_attention_heads=2, num_hidden_layers=1, vocab_size=9,
            mm_vision_config={**vision, "image_size": 28, "patch_size": 14}, mm_vision_tower="some/clip",
        )  # fmt: skip
        body = Body(config)
        assert body.get_vision_tower().vision_tower_name == "some/clip"
        assert body.mm_projector.out_features == 16

    def test_a_model_that_can_not_splice(self, images):
        class Other(LlavaMetaForCausalLM):
            model = SimpleNamespace(get_vision_tower=lambda: "tower")

        with pytest.raises(
            TypeError, match=r"^Other can't put images into prompts; derive it from LlavaLlamaForCausalLM$"
        ):
            Other().prepare_inputs_labels_for_multimodal(IDS, None, None, None, None, images)


class TestFromPretrained:
    def test_released_configs_have_tower_and_projector(self, goldens, model):
        path = str(goldens / "llava-v1.5-golden")
        found = LlavaLlamaForCausalLM.from_pretrained(path, low_cpu_mem_usage=True, torch_dtype="float32")
        same_weights(found, model)
        assert not found.training
        assert not any(parameter.requires_grad for parameter in found.get_vision_tower().parameters())
        assert found.get_vision_tower().image_processor is not None

    def test_options_and_config_of_transformers(self, goldens):
        path = str(goldens / "llava-v1.5-golden")
        config = LlavaConfig.from_pretrained(path, image_aspect_ratio="square")
        model = LlavaLlamaForCausalLM.from_pretrained(
            path, config=config, torch_dtype=torch.float16, device_map={"": "cpu"}, use_cache=False
        )
        assert (model.dtype, model.device.type) == (torch.float16, "cpu")
        assert (model.config.image_aspect_ratio, model.config.use_cache) == ("square", False)
        with pytest.raises(TypeError, match=r"^from_pretrained\(\) got an unexpected keyword argument 'spam'"):
            LlavaLlamaForCausalLM.from_pretrained(path, spam=1)

    def test_derived_classes(self, goldens, model):
        class Derived(LlavaLlamaForCausalLM):
            def __init__(self, config, extra):
                super().__init__(config)
                self.extra = extra

        found = Derived.from_pretrained(str(goldens / "llava-v1.5-golden"), "more", dtype="float32")
        assert (type(found), found.extra) == (Derived, "more")
        same_weights(found, model)

    def test_auto_classes_know_the_model(self, goldens, model):
        path = str(goldens / "llava-v1.5-golden")
        assert type(AutoConfig.from_pretrained(path)) is LlavaConfig
        found = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype="float32")
        assert type(found) is LlavaLlamaForCausalLM
        assert found.config._attn_implementation == "eager"
        same_weights(found, model)

    def test_what_transformers_saves_is_loaded(self, goldens, model, golden_model, tmp_path):
        model.save_pretrained(tmp_path)
        same_weights(LlavaLlamaForCausalLM.from_pretrained(str(tmp_path), dtype="float32"), model)
        golden_model[0].save_pretrained(tmp_path)
        found = load_pretrained_model(str(tmp_path), None, "x", device="cpu", dtype="float32")[1]
        same_weights(found, model)
