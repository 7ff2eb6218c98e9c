"""What users import from `llava.mm_utils` gives what the original gave."""

import base64
import io
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from llava.clip_image_processor import CLIPPixels
from llava.image_files.decode import open_image
from llava.image_files.errors import ImageError
from llava.mm_utils import (
    KeywordsStoppingCriteria,
    get_model_name_from_path,
    load_image_from_base64,
    process_images,
    tokenizer_image_token,
)

PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
NAMES = ["alpha.png", "gray.jpg", "landscape.jpg", "palette.png", "portrait.png", "square.png", "tiny.png", "wide.png"]


def config(ratio, pinpoints=PINPOINTS):
    return SimpleNamespace(image_aspect_ratio=ratio, image_grid_pinpoints=pinpoints)


@pytest.fixture(scope="module")
def golden_pixels(goldens):
    return np.load(goldens / "images.npz")


class TestProcessImages:
    @pytest.mark.parametrize("ratio", ["pad", None, "anyres"])
    @pytest.mark.parametrize("name", NAMES)
    def test_every_golden(self, goldens, golden_pixels, name, ratio):
        pixels = process_images([open_image(goldens / "images" / name)], CLIPPixels(336), config(ratio)).numpy()
        pixels = pixels[0] if ratio == "anyres" else pixels  # the goldens hold one image's tiles
        key = f"{name}|{ratio}"
        assert list(pixels.shape) == list(golden_pixels[f"{key}|shape"])
        np.testing.assert_array_equal(pixels[..., ::7, ::7], golden_pixels[f"{key}|stride7"])  # bit for bit
        mean_std = [pixels.mean(), pixels.std()]
        np.testing.assert_allclose(mean_std, golden_pixels[f"{key}|mean_std"], atol=1e-5, rtol=0)

    def test_pictures_of_any_shape_make_one_batch(self, goldens):
        images = [open_image(goldens / "images" / name) for name in NAMES]
        processor = CLIPPixels(28)
        pixels = process_images(images, processor, config("pad"))
        assert pixels.shape == (8, 3, 28, 28)
        assert pixels.dtype == torch.float32
        for index, image in enumerate(images):
            assert torch.equal(pixels[index : index + 1], process_images([image], processor, config("pad")))

    def test_tiles_that_differ_in_number_stay_a_list(self):
        images = [Image.new("RGB", (56, 28)), Image.new("RGB", (56, 56))]
        tiles = process_images(images, CLIPPixels(28), config("anyres", "[(56, 28), (56, 56)]"))
        assert [tile.shape[0] for tile in tiles] == [3, 5]

    def test_square_is_another_word_for_none(self, goldens):
        images = [open_image(goldens / "images" / "wide.png")]
        square = process_images(images, CLIPPixels(28), config("square"))
        assert torch.equal(square, process_images(images, CLIPPixels(28), SimpleNamespace()))

    @pytest.mark.parametrize("size", [(1, 20), (20, 1), (3, 20), (20, 3), (1, 1)])
    @pytest.mark.parametrize("ratio", ["pad", None, "anyres"])
    def test_thin_images(self, size, ratio):
        pixels = process_images([Image.new("RGB", size, (10, 200, 30))], CLIPPixels(336), config(ratio))
        assert pixels.shape[-3:] == (3, 336, 336)
        assert torch.isfinite(pixels).all()

    @pytest.mark.parametrize("settings", [config("anyres", None), SimpleNamespace(image_aspect_ratio="anyres")])
    def test_tiles_need_resolutions(self, settings):
        message = r"^image_aspect_ratio is 'anyres', but the config has no image_grid_pinpoints; use 'pad'$"
        with pytest.raises(ValueError, match=message):
            process_images([Image.new("RGB", (2, 2))], CLIPPixels(28), settings)

    @pytest.mark.parametrize("ratio", ["pad", None, "anyres"])
    @pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "RGBa", "CMYK", "YCbCr", "HSV", "I;16", "I"])
    def test_every_mode_is_made_rgb_first(self, mode, ratio):
        """A padding colour has other parts in other modes."""
        rgb = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
        if mode in ("I;16", "I"):
            gray = np.asarray(rgb.convert("L"))
            rgb = Image.fromarray(gray).convert("RGB")
            image = Image.fromarray(gray.astype(np.uint16) * 257 if mode == "I;16" else gray.astype(np.int32))
        else:
            image = rgb.convert("RGBA").convert(mode) if mode in ("RGBa", "PA") else rgb.convert(mode)
            rgb = (image.convert("RGBA") if mode == "RGBa" else image).convert("RGB")
        settings = config(ratio, [[56, 28], [56, 56]])
        pixels = process_images([image], CLIPPixels(28), settings)
        assert torch.equal(pixels, process_images([rgb], CLIPPixels(28), settings))

    def test_numbers_without_a_range_are_refused(self):
        with pytest.raises(ImageError, match="holds 32-bit floating-point numbers") as caught:
            process_images([Image.new("F", (4, 4))], CLIPPixels(28), config("pad"))
        assert caught.value.code == "image_depth"

    @pytest.mark.parametrize("ratio", ["pad", None, "anyres"])
    @pytest.mark.parametrize("kind", ["CLIPImageProcessorPil", "LlavaImageProcessorPil", "SiglipImageProcessorPil"])
    def test_processors_of_transformers(self, goldens, kind, ratio):
        sizes = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
        is_siglip = kind.startswith("Siglip")
        processor = getattr(transformers, kind)(**({"size": {"height": 28, "width": 28}} if is_siglip else sizes))
        images = [open_image(goldens / "images" / name) for name in ("landscape.jpg", "tiny.png")]
        settings = config(ratio, [[56, 28], [56, 56]])
        pixels = process_images(images, processor, settings)
        tensors = pixels if isinstance(pixels, list) else [pixels]
        assert all(tensor.dtype == torch.float32 for tensor in tensors)
        assert tensors[0].shape[-3:] == (3, 28, 28)
        if not is_siglip:  # which has values and a resize of its own
            expected = process_images(images, CLIPPixels(28), settings)
            expected = expected if isinstance(expected, list) else [expected]
            assert all(torch.equal(*pair) for pair in zip(tensors, expected, strict=True))

    def test_the_processor_inside_one_for_text_and_images(self):
        image = Image.new("RGB", (30, 20), (10, 200, 30))
        outer = SimpleNamespace(image_processor=CLIPPixels(28))
        pixels = process_images([image], outer, config("pad"))
        assert torch.equal(pixels, process_images([image], CLIPPixels(28), config("pad")))

    def test_arrays_are_the_processors_business(self):
        values = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
        processor = transformers.CLIPImageProcessorPil(
            size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
        )
        pixels = process_images([values], processor, config(None))
        assert torch.equal(pixels, process_images([Image.fromarray(values)], processor, config(None)))

    def test_shapes_that_differ_stay_a_list(self):
        """As of processors that do not crop."""
        processor = transformers.CLIPImageProcessorPil(size={"shortest_edge": 28}, do_center_crop=False)
        pixels = process_images([Image.new("RGB", (56, 28)), Image.new("RGB", (28, 28))], processor, config(None))
        assert [tuple(tensor.shape) for tensor in pixels] == [(3, 28, 56), (3, 28, 28)]

    @pytest.mark.parametrize("ratio", ["pad", "anyres"])
    @pytest.mark.parametrize("given", ["photo.jpg", np.zeros((4, 4, 3), np.uint8), None])
    def test_what_is_no_image_is_named(self, ratio, given):
        config = SimpleNamespace(image_aspect_ratio=ratio, image_grid_pinpoints=[(56, 112)])
        with pytest.raises(TypeError, match=rf"^an image is a {type(given).__name__}; pass Pillow images, such"):
            process_images([given], CLIPPixels(56), config)

    def test_a_single_image_is_no_list(self):
        with pytest.raises(TypeError, match=r"^images is a single image; pass a list of images$"):
            process_images(Image.new("RGB", (4, 4)), CLIPPixels(56), SimpleNamespace(image_aspect_ratio="pad"))

    def test_tiles_of_a_processor_without_a_fixed_side(self):
        config = SimpleNamespace(image_aspect_ratio="anyres", image_grid_pinpoints=[(56, 112)])
        processor = SimpleNamespace(size={"shortest_edge": 56}, image_mean=[0.5] * 3)
        with pytest.raises(ValueError, match=r"^anyres needs the side of a tile, but SimpleNamespace has size \{'sh"):
            process_images([Image.new("RGB", (4, 4))], processor, config)

    def test_an_unknown_ratio(self):
        with pytest.raises(ValueError, match="image_aspect_ratio is 'stretch'; choose pad, square, anyres or None"):
            process_images([Image.new("RGB", (4, 4))], CLIPPixels(28), config("stretch"))


class TestTokenizerImageToken:
    def test_every_golden(self, golden_json, tokenizers):
        cases = [case for case in golden_json("tokenization") if "image_ids" in case]
        assert len(cases) > 50
        for case in cases:
            assert tokenizer_image_token(case["text"], tokenizers[case["legacy"]]) == case["image_ids"]

    def test_another_index_and_a_tensor(self, tokenizer):
        ids = tokenizer_image_token("a<image>b", tokenizer, image_token_index=-5, return_tensors="pt")
        assert ids.dtype == torch.int64
        assert ids.tolist() == [1, *tokenizer("a").input_ids[1:], -5, *tokenizer("b").input_ids[1:]]

    def test_literal_ids(self, tokenizer):
        ids = tokenizer_image_token("a <image> b <image>", tokenizer)
        assert ids == [1, 264, 28705, -200, 28705, 287, 28705, -200]
        assert tokenizer_image_token("<image>", tokenizer) == [1, -200]

    def test_a_tokenizer_without_a_token_for_the_start(self):
        def letters(text):
            return SimpleNamespace(input_ids=[ord(letter) for letter in text])

        letters.bos_token_id = None
        assert tokenizer_image_token("ab<image>c", letters) == [97, 98, -200, 99]

    def test_other_tensors_are_refused(self, tokenizer):
        with pytest.raises(ValueError, match="return_tensors is 'np'; use None or 'pt'"):
            tokenizer_image_token("a", tokenizer, return_tensors="np")


class TestModelName:
    def test_every_golden(self, golden_json):
        names = golden_json("names")
        assert {path: get_model_name_from_path(path) for path in names} == names

    @pytest.mark.parametrize("path", ["checkpoint-5", "/checkpoint-5/"])
    def test_a_checkpoint_without_a_parent_keeps_its_name(self, path):
        assert get_model_name_from_path(path) == "checkpoint-5"

    def test_the_current_directory_has_a_name(self, tmp_path, monkeypatch):
        (tmp_path / "my-model").mkdir()
        monkeypatch.chdir(tmp_path / "my-model")
        assert get_model_name_from_path(".") == "my-model"


class TestBase64:
    def test_the_picture_comes_back(self):
        image, stream = Image.new("RGB", (3, 2), (1, 2, 3)), io.BytesIO()
        image.save(stream, "PNG")
        loaded = load_image_from_base64(base64.b64encode(stream.getvalue()))
        assert (loaded.mode, loaded.size, loaded.tobytes()) == ("RGB", (3, 2), image.tobytes())

    def test_no_image(self):
        with pytest.raises(ImageError, match=re.escape("image in base64 can't be decoded")):
            load_image_from_base64(base64.b64encode(b"hello"))


class TestKeywordsStoppingCriteria:
    @pytest.mark.parametrize("prompt_length", [0, 3])
    def test_each_row_ends_by_itself(self, tokenizer, prompt_length):
        prompt = torch.full((2, prompt_length), 5)
        rows = [
            tokenizer.encode_text(text, at_start=False)[:6] for text in (" yes###more", " nothing to see here ever")
        ]
        length = min(map(len, rows))
        ids = torch.cat([prompt, torch.tensor([row[:length] for row in rows])], dim=1)
        assert KeywordsStoppingCriteria(["###"], tokenizer, prompt)(ids, None).tolist() == [True, False]

    def test_keywords_in_the_prompt_do_not_count(self, tokenizer):
        prompt = torch.tensor([tokenizer.encode_text("###")])
        ids = torch.cat([prompt, torch.tensor([tokenizer.encode_text("yes")])], dim=1)
        assert KeywordsStoppingCriteria(["###"], tokenizer, prompt)(ids, None).tolist() == [False]

    @pytest.mark.parametrize("prompt_length", [1, 2, 3, 4, 5])
    def test_keywords_across_the_length_of_a_prompt_that_is_not_handed_over(self, tokenizer, prompt_length):
        prompt = torch.full((1, prompt_length), tokenizer.bos_token_id)
        ids = torch.tensor([tokenizer.encode_text("so it ends.\n###", at_start=False)])
        assert ids.shape[1] > prompt_length
        criteria = KeywordsStoppingCriteria(["ends.\n###"], tokenizer, prompt)
        assert [criteria(ids[:, :count], None).item() for count in range(1, ids.shape[1] + 1)].count(True) == 1

    def test_keywords_that_begin_in_the_prompt(self, tokenizer):
        keyword = tokenizer("STOP NOW").input_ids[1:]
        prompt = torch.tensor([[tokenizer.bos_token_id, 5, *keyword[:-1]]])
        criteria = KeywordsStoppingCriteria(["STOP NOW"], tokenizer, prompt)
        assert criteria(torch.cat([prompt, torch.tensor([keyword[-1:]])], dim=1), None).tolist() == [True]
        assert criteria(prompt, None).tolist() == [False]

    @pytest.mark.parametrize("with_prompt", [True, False])
    def test_special_tokens_are_keywords(self, tokenizer, with_prompt):
        prompt = torch.tensor([[tokenizer.bos_token_id, -200, 5, tokenizer.eos_token_id]])
        rows = torch.tensor([[5, tokenizer.eos_token_id], [5, 6]])
        ids = torch.cat([prompt.expand(2, -1), rows], dim=1) if with_prompt else rows
        assert KeywordsStoppingCriteria(["</s>"], tokenizer, prompt)(ids, None).tolist() == [True, False]
        assert KeywordsStoppingCriteria("</s>", tokenizer, prompt)(ids[:, :-1], None).tolist() == [False, False]

    def test_beams_of_a_prompt_lie_together(self, tokenizer):
        prompts = torch.tensor([[1, 5], [1, 6]])
        mark = tokenizer.encode_text("###", at_start=False)[-1]
        beams = torch.tensor([[1, 5, 7], [1, 5, mark], [1, 6, 7], [1, 6, 8]])
        found = KeywordsStoppingCriteria(["#"], tokenizer, prompts)(beams, None)
        assert (found.dtype, found.tolist()) == (torch.bool, [False, True, False, False])

    def test_generation_ends_by_rows(self, golden_model):
        """The row that meets the keyword ends; the other one goes on."""
        tokenizer, model, _, _ = golden_model
        ids = torch.tensor([tokenizer("one two").input_ids, tokenizer("six ten").input_ids])
        free = model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
        keyword = tokenizer.convert_ids_to_tokens(int(free[0, 2]))
        criteria = KeywordsStoppingCriteria([tokenizer.convert_tokens_to_string([keyword])], tokenizer, ids)
        ended = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0, stopping_criteria=[criteria])
        first = next(count for count in range(1, 7) if criteria(free[:1, :count], None).item())
        assert ended[0, :first].tolist() == free[0, :first].tolist()
        assert not ended[0, first:].any()
