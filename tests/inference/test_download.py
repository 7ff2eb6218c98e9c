"""Addresses: http and https alone, also after redirects; for strangers the public internet alone, looked up once."""

import contextlib
import re
import socket
import threading

import pytest

from llava.image_files.errors import ImageError
from llava.inference import download as web
from llava.inference.download import is_global
from llava.inference.load_image import fetch_image, load_image
from tests.local_server import QuietHandler, running_server

INNER = (
    *("127.0.0.1", "127.8.9.1", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1"),
    *("224.0.0.1", "255.255.255.255", "192.0.2.1", "198.18.0.1", "240.0.0.1", "::", "::1", "fe80::1", "fe80::1%eth0"),
    *("fc00::1", "fd12::1", "ff02::1", "2001:db8::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1"),
    *("64:ff9b::a9fe:a9fe", "2002:7f00:1::", "2001:0:7f00:1::", "::7f00:1", "localhost", ""),
)


@pytest.mark.parametrize("address", INNER)
def test_addresses_that_are_not_on_the_public_internet(address):
    assert not is_global(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "93.184.216.34", "2606:4700::1111", "::ffff:8.8.8.8"])
def test_addresses_that_are(address):
    assert is_global(address)


@contextlib.contextmanager
def serving(respond):
    """Run a server in this process that answers by `respond`; yield its port and the requested paths."""
    requested = []

    class Handler(QuietHandler):
        def do_GET(self):
            requested.append(self.path)
            with contextlib.suppress(OSError):
                respond(self)

    with running_server(Handler) as server:
        yield server.server_port, requested


def redirect_to(place, code=302):
    def respond(handler):
        handler.send_response(code)
        handler.send_header("Location", place)
        handler.end_headers()

    return respond


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def image(goldens):
    content = (goldens / "images" / "tiny.png").read_bytes()

    def respond(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)

    return respond


@pytest.mark.parametrize(
    "place",
    ["ftp://127.0.0.1/a.png", "file:///etc/hostname", "data:image/png;base64,AA==", "FILE:/etc/passwd", "gopher://a/",
     "jar:http://a/b", "//[", "javascript:1"],
)  # fmt: skip
@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_redirects_to_other_schemes_are_refused(place, code, monkeypatch):
    def connect(*args, **options):
        raise AssertionError("FTP is used")

    monkeypatch.setattr("ftplib.FTP.connect", connect)
    with serving(redirect_to(place, code)) as (port, requested):
        with pytest.raises(ImageError) as caught:
            load_image(f"http://127.0.0.1:{port}/a.png")
        assert requested == ["/a.png"]
    assert caught.value.code == "image_missing"
    if place != "//[":
        message = f"^image http://127.0.0.1:{port}/a.png is not fetched: {re.escape(place)} is not an http or https URL"
        assert re.match(message, str(caught.value))


def test_redirects_within_http_are_followed(image, goldens):
    with serving(image) as (port, _), serving(redirect_to(f"http://127.0.0.1:{port}/b.png")) as (first, _):
        local = load_image(str(goldens / "images" / "tiny.png"))
        assert load_image(f"HTTP://127.0.0.1:{first}/a.png").tobytes() == local.tobytes()


def test_what_comes_with_a_redirect_is_not_read(image):
    over = threading.Event()

    def respond(handler):
        if handler.path == "/b.png":
            image(handler)
            return
        redirect_to("/b.png")(handler)
        while not over.is_set():
            handler.wfile.write(b"x" * 65536)

    with serving(respond) as (port, _):
        assert load_image(f"http://127.0.0.1:{port}/a.png").size
        over.set()


@pytest.mark.parametrize("location", ["a.png", "/etc/hostname", "file:///etc/hostname", "ftp://a/b.png", ""])
def test_a_path_is_no_address(location):
    with pytest.raises(
        ImageError, match=re.escape(f"image {location} is not fetched: {location} is not an http or https")
    ):
        fetch_image(location)


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "0x7f.1", "2130706433", "0", "me@127.0.0.1"]
)
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_strangers_reach_nothing_on_this_machine(image, host, scheme):
    with serving(image) as (port, requested):
        with pytest.raises(ImageError, match=r"is not fetched: .* is not on the public internet|can't be fetched"):
            fetch_image(f"{scheme}://{host}:{port}/a.png", only_global=True)
        assert requested == []


def test_a_proxy_is_not_asked_for_strangers(image, monkeypatch):
    monkeypatch.delenv("no_proxy")
    with serving(image) as (port, requested):
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{port}")
        with pytest.raises(ImageError, match=r"10\.0\.0\.1 is 10\.0\.0\.1, which is not on the public internet"):
            fetch_image("http://10.0.0.1/a.png", only_global=True)
        assert requested == []


def test_a_redirect_to_an_inner_address_is_refused(image, monkeypatch):
    monkeypatch.setattr(web, "is_global", lambda address: address == "127.0.0.1")
    with serving(image) as (port, requested), serving(redirect_to(f"http://127.0.0.2:{port}/b.png")) as (first, _):
        with pytest.raises(ImageError, match=r"127\.0\.0\.2 is 127\.0\.0\.2, which is not on the public internet"):
            fetch_image(f"http://127.0.0.1:{first}/a.png", only_global=True)
        assert requested == []


def test_a_name_is_looked_up_once_and_connected_to_as_found(image, monkeypatch):
    lookups, found = [], socket.getaddrinfo

    def look_up(host, *args, **options):
        if host != "images.example":
            return found(host, *args, **options)
        lookups.append(host)
        return found("127.0.0.1" if len(lookups) == 1 else "10.0.0.1", *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(web, "is_global", lambda address: address == "127.0.0.1")
    with serving(image) as (port, _):
        assert fetch_image(f"http://images.example:{port}/a.png", only_global=True).size
    assert lookups == ["images.example"]


def test_a_name_with_one_inner_address_is_refused(monkeypatch):
    def look_up(host, port, **options):
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, port)) for ip in ("8.8.8.8", "10.0.0.1")]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    with pytest.raises(ImageError, match=r"images\.example is 10\.0\.0\.1, which is not on the public internet"):
        fetch_image("https://images.example/a.png", only_global=True)


def test_what_a_server_says_is_printed_without_control_characters():
    def respond(handler):
        handler.wfile.write(b"HTTP/1.1 404 \x1b[31mred\x9b2J\x07" + b"x" * 1_000 + b"\r\nContent-Length: 0\r\n\r\n")

    with serving(respond) as (port, _), pytest.raises(ImageError) as caught:
        load_image(f"http://127.0.0.1:{port}/\x1b]0;a\x07.png")
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 600
    assert r"the server answers 404 \x1b[31mred\x9b2J\x07xxx" in message
