"""Images from paths and URLs, which lead to a server in this process."""

import contextlib
import functools
import http.server
import re
import threading

import pytest

from llava.image_files.errors import ImageError
from llava.inference import load_image as images
from llava.inference.load_image import load_image, quote_address, split_locations
from tests.local_server import QuietHandler, running_server


@pytest.fixture
def server(monkeypatch):
    """Return the function folder -> address of a server that gives its files."""
    monkeypatch.setenv("no_proxy", "*")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    with contextlib.ExitStack() as stack:

        def serve(folder):
            handler = functools.partial(Quiet, directory=folder)
            return stack.enter_context(running_server(handler)).address

        yield serve


@pytest.fixture
def address(server, goldens):
    return server(goldens / "images")


def test_the_same_image_from_a_file_and_from_the_web(address, goldens):
    local = load_image(f" {goldens / 'images' / 'landscape.jpg'} ")
    assert local.tobytes() == load_image(f"{address}/landscape.jpg").tobytes()


def test_an_address_without_an_image(address):
    message = f"image {address}/none.jpg: the server answers 404 File not found; check the address"
    with pytest.raises(ImageError, match=re.escape(message)) as caught:
        load_image(f"{address}/none.jpg")
    assert caught.value.code == "image_missing"


def test_an_answer_that_is_too_large(address, monkeypatch):
    monkeypatch.setattr(images, "MAX_IMAGE_BYTES", 10)
    with pytest.raises(ImageError, match="has more than 10 bytes; make it smaller") as caught:
        load_image(f"{address}/landscape.jpg")
    assert caught.value.code == "image_too_large"


@pytest.mark.parametrize("address", ["http://127.0.0.1:9/a.jpg", "http://[", "http:///a"])
def test_an_address_that_leads_nowhere(address, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with pytest.raises(ImageError, match=r"can't be fetched \(.*\); check the address, or download it first"):
        load_image(address)


@pytest.mark.parametrize(
    ("address", "quoted"),
    [
        ("http://a.example/b c/ä.jpg", "http://a.example/b%20c/%C3%A4.jpg"),
        ("http://a.example/b%20c.jpg?w=1&h=%2F", "http://a.example/b%20c.jpg?w=1&h=%2F"),
        ("http://a.example/100%.jpg", "http://a.example/100%25.jpg"),
        ("http://a.example/犬.jpg?q=ü x#part", "http://a.example/%E7%8A%AC.jpg?q=%C3%BC%20x"),
        ("https://müller.example:8080/a.jpg", "https://xn--mller-kva.example:8080/a.jpg"),
        ("http://me:pä ss@a.example/a.jpg", "http://me:p%C3%A4%20ss@a.example/a.jpg"),
        ("http://[::1]:80/a b.jpg", "http://[::1]:80/a%20b.jpg"),
        ("http://a.example/x\ny\x01", "http://a.example/xy%01"),
    ],
)
def test_addresses_are_quoted(address, quoted):
    assert quote_address(address) == quoted
    assert quote_address(quoted) == quoted


def test_names_with_spaces_and_umlauts_are_fetched(server, goldens, tmp_path):
    for name in ("a b.png", "größe 犬.png", "100%.png"):
        image = goldens / "images" / "tiny.png"
        (tmp_path / name).write_bytes(image.read_bytes())
        assert load_image(f"{server(tmp_path)}/{name}").tobytes() == load_image(str(image)).tobytes()


class Dripping(QuietHandler):
    """Sends a byte now and then, and never ends."""

    in_headers = False

    def do_GET(self):
        if not self.in_headers:
            self.send_response(200)
            self.send_header("Content-Length", "1000000")
            self.end_headers()
        self.wfile.write(b"" if not self.in_headers else b"HTTP/1.1 200 OK\r\nX-Long: ")
        with contextlib.suppress(OSError):
            while not self.server.is_over.wait(0.05):
                self.wfile.write(b"x")
                self.wfile.flush()


@pytest.mark.parametrize("in_headers", [False, True], ids=["body", "headers"])
def test_a_dripping_server_ends_by_a_total_time(monkeypatch, in_headers):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(images, "TOTAL_SECONDS", 0.5)
    handler = type("Handler", (Dripping,), {"in_headers": in_headers})
    with running_server(handler) as server:
        server.is_over = threading.Event()
        address = f"{server.address}/a.jpg"
        try:
            message = f"^image {re.escape(address)} was not complete after 0.5 seconds; download it first$"
            with pytest.raises(ImageError, match=message) as caught:
                load_image(address)
        finally:
            server.is_over.set()
    assert caught.value.code == "image_missing"


def test_a_download_that_breaks_off(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")

    class Short(QuietHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"x" * 10)

    with running_server(Short) as server:
        address = f"{server.address}/a.jpg"
        with pytest.raises(
            ImageError, match=r"can't be fetched \(IncompleteRead\(10 bytes read, 990 more expected\)\)"
        ):
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


def test_a_list_longer_than_a_file_name():
    names = [f"some_folder/photo_{number}.jpg" for number in range(40)]
    assert split_locations(",".join(names)) == names


def test_the_home_directory(tmp_path, monkeypatch, goldens):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "a,b.png").write_bytes((goldens / "images" / "tiny.png").read_bytes())
    assert split_locations("~/a,b.png") == ["~/a,b.png"]
    assert load_image("~/a,b.png").tobytes() == load_image(str(goldens / "images" / "tiny.png")).tobytes()
