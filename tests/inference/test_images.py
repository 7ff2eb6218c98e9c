"""Pictures by path or web address; the addresses lead to a server in this process."""

import functools
import http.server
import re
import threading

import pytest

from llava.image_processing import ImageError
from llava.inference import images
from llava.inference.images import load_image, split_locations


@pytest.fixture
def server(goldens, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Quiet, directory=goldens / "images")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_the_same_picture_from_a_file_and_from_the_web(server, goldens):
    local = load_image(f" {goldens / 'images' / 'landscape.jpg'} ")
    assert local.tobytes() == load_image(f"{server}/landscape.jpg").tobytes()


def test_an_address_without_a_picture(server):
    message = f"image {server}/none.jpg: the server answers 404 File not found; check the address"
    with pytest.raises(ImageError, match=re.escape(message)) as caught:
        load_image(f"{server}/none.jpg")
    assert caught.value.code == "image_missing"


def test_an_answer_that_is_too_large(server, monkeypatch):
    monkeypatch.setattr(images, "MAX_DOWNLOAD_BYTES", 10)
    with pytest.raises(ImageError, match="is over 10 bytes; make it smaller") as caught:
        load_image(f"{server}/landscape.jpg")
    assert caught.value.code == "image_too_large"


@pytest.mark.parametrize("address", ["http://127.0.0.1:9/a.jpg", "http://[", "http:///a"])
def test_an_address_that_leads_nowhere(address, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with pytest.raises(ImageError, match=r"can't be fetched \(.*\); check the address, or download it first"):
        load_image(address)


def test_other_kinds_of_address_are_file_names():
    with pytest.raises(ImageError, match=re.escape("image file:/etc/hostname not found")):
        load_image("file:///etc/hostname")


def test_several_locations_in_one_text(tmp_path):
    assert split_locations("a.jpg, b.jpg,") == ["a.jpg", "b.jpg"]
    assert split_locations("a.jpg;b,c.jpg", ";") == ["a.jpg", "b,c.jpg"]
    assert split_locations("") == []
    path = tmp_path / "with,comma.jpg"
    path.touch()
    assert split_locations(str(path)) == [str(path)]
