"""URL openers for downloads: http and https only, and for untrusted URLs only hosts on the public internet.

An untrusted URL must not reach what only this machine or its network can (SSRF). `only_global` resolves a host name
once, rejects it if any of its IP addresses is not global, and connects to the address that was checked, so that DNS
rebinding gains nothing. Each redirect is checked in the same way.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import ipaddress
import socket
import ssl
import urllib.parse
import urllib.request
from typing import Any

from llava.files.terminal_text import shorten

SCHEMES = ("http", "https")
_EMBEDS_IPV4 = tuple(map(ipaddress.ip_network, ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32", "::/96")))
"""IPv6 networks that lead to IPv4 addresses: NAT64, 6to4, Teredo, IPv4-compatible."""


def is_address(location: str) -> bool:
    """Return whether a location is an http(s) URL rather than a path."""
    return location.lower().startswith(tuple(f"{scheme}://" for scheme in SCHEMES))


def is_global(address: str) -> bool:
    """Return whether an IP address belongs to the public internet.

    Example:
        >>> is_global("8.8.8.8"), is_global("127.0.0.1"), is_global("::ffff:10.0.0.1"), is_global("169.254.169.254")
        (True, False, False, False)
    """
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:  # not an IP address
        return False
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    if ip.version == 6 and any(ip in network for network in _EMBEDS_IPV4):
        return False
    return ip.is_global and not ip.is_multicast


class Refused(Exception):
    """A URL that must not be fetched; the message says why."""


def refuse_scheme(address: str) -> None:
    """Reject URLs with other schemes than http and https.

    Raises:
        Refused: if the scheme is another one.
    """
    if not is_address(address):
        shown = shorten(address)
        raise Refused(f"{shown} is not an http or https URL; pass one, or download the image first")


def build_opener(only_global: bool) -> urllib.request.OpenerDirector:
    """Return an opener for http and https only; urllib's default one also opens files and FTP, through redirects too.

    Args:
        only_global: reject hosts that are not on the public internet, by `Refused` on opening; proxies are ignored.
    """
    opener = urllib.request.OpenerDirector()
    handlers = (
        [_GlobalHTTPHandler(), _GlobalHTTPSHandler()]
        if only_global
        else [urllib.request.ProxyHandler(), urllib.request.HTTPHandler(), urllib.request.HTTPSHandler()]
    )
    handlers += [
        _Redirects(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
    ]
    for handler in handlers:
        opener.add_handler(handler)
    return opener


class _Redirects(urllib.request.HTTPRedirectHandler):
    def http_error_302(self, req: Any, fp: Any, code: int, msg: str, headers: Any) -> Any:
        if location := headers.get("location") or headers.get("uri"):  # before urllib raises an error of its own
            refuse_scheme(urllib.parse.urljoin(req.full_url, location))
        fp.close()  # the body of a redirect is not read, since it may be endless
        return super().http_error_302(req, io.BytesIO(), code, msg, headers)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


class _GlobalConnection(http.client.HTTPConnection):
    def connect(self) -> None:
        self.sock = _connect_global(self.host, self.port, self.timeout)


class _GlobalTLSConnection(http.client.HTTPSConnection):
    def connect(self) -> None:
        plain = _connect_global(self.host, self.port, self.timeout)
        try:
            self.sock = ssl.create_default_context().wrap_socket(plain, server_hostname=self.host)
        except BaseException:
            plain.close()
            raise


class _GlobalHTTPHandler(urllib.request.HTTPHandler):
    def http_open(self, req: Any) -> Any:
        return self.do_open(_GlobalConnection, req)


class _GlobalHTTPSHandler(urllib.request.HTTPSHandler):
    def https_open(self, req: Any) -> Any:
        return self.do_open(_GlobalTLSConnection, req)


def _connect_global(host: str, port: int, timeout: float) -> socket.socket:
    """Resolve a host once, and connect to one of the addresses that were checked."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    inner = next((address[0] for *_, address in found if not is_global(address[0])), None)
    if inner is not None or not found:
        raise Refused(f"{host} is {inner}, which is not on the public internet; pass a public address")
    failure: OSError | None = None
    for family, kind, protocol, _, address in found:
        connection = socket.socket(family, kind, protocol)
        try:
            connection.settimeout(timeout)
            connection.connect(address)
        except OSError as error:
            connection.close()
            failure = error
            continue
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection
    raise failure
