"""What users import from `llava.mm_utils` gives what the original gave."""

import base64
import io
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from llava.image_processing import CLIPPixels, ImageError, open_image
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
        pixels = pixels[0] if ratio == "anyres" else pixels  # the goldens hold one picture's tiles
        key = f"{name}|{ratio}"
        assert list(pixels.shape) == list(golden_pixels[f"{key}|shape"])
        np.testing.assert_array_equal(pixels[..., ::7, ::7], golden_pixels[f"{key}|stride7"])  # bit for bit
        mean_std = [pixels.mean(), pixels.std()]
        np.testing.assert_allclose(mean_std, golden_pixels[f"{key}|mean_std"], atol=1e-5, rtol=0)

    def test_pictures_of_any_shape_make_one_batch(self, goldens):
        pictures = [open_image(goldens / "images" / name) for name in NAMES]
        processor = CLIPPixels(28)
        pixels = process_images(pictures, processor, config("pad"))
        assert pixels.shape == (8, 3, 28, 28)
        assert pixels.dtype == torch.float32
        for index, picture in enumerate(pictures):
            assert torch.equal(pixels[index : index + 1], process_images([picture], processor, config("pad")))

    def test_tiles_that_differ_in_number_stay_a_list(self):
        pictures = [Image.new("RGB", (56, 28)), Image.new("RGB", (56, 56))]
        tiles = process_images(pictures, CLIPPixels(28), config("anyres", "[(56, 28), (56, 56)]"))
        assert [tile.shape[0] for tile in tiles] == [3, 5]

    def test_square_is_another_word_for_none(self, goldens):
        pictures = [open_image(goldens / "images" / "wide.png")]
        square = process_images(pictures, CLIPPixels(28), config("square"))
        assert torch.equal(square, process_images(pictures, CLIPPixels(28), SimpleNamespace()))

    @pytest.mark.parametrize("size", [(1, 20), (20, 1), (3, 20), (20, 3), (1, 1)])
    @pytest.mark.parametrize("ratio", ["pad", None, "anyres"])
    def test_thin_pictures(self, size, ratio):
        pixels = process_images([Image.new("RGB", size, (10, 200, 30))], CLIPPixels(336), config(ratio))
        assert pixels.shape[-3:] == (3, 336, 336)
        assert torch.isfinite(pixels).all()

    @pytest.mark.parametrize("settings", [config("anyres", None), SimpleNamespace(image_aspect_ratio="anyres")])
    def test_tiles_need_resolutions(self, settings):
        message = r"^image_aspect_ratio is 'anyres', but the config has no image_grid_pinpoints; use 'pad'$"
        with pytest.raises(ValueError, match=message):
            process_images([Image.new("RGB", (2, 2))], CLIPPixels(28), settings)

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
        picture, stream = Image.new("RGB", (3, 2), (1, 2, 3)), io.BytesIO()
        picture.save(stream, "PNG")
        loaded = load_image_from_base64(base64.b64encode(stream.getvalue()))
        assert (loaded.mode, loaded.size, loaded.tobytes()) == ("RGB", (3, 2), picture.tobytes())

    def test_no_picture(self):
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
