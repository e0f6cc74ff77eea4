"""What addresses mean: which hosts are this machine."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit


def is_loopback(host: str | None) -> bool:
    """Whether the host is this machine and nobody else's."""
    if host == "localhost":
        return True
    try:
        return host is not None and ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_address(host: str | None) -> bool:
    """Whether it is an IP address, and so no name that somebody else's DNS could point at us."""
    try:
        return bool(host and ipaddress.ip_address(host))
    except ValueError:
        return False


def is_any_address(host: str) -> bool:
    """Whether a socket that is bound to it listens on all addresses of the machine."""
    try:
        return not host or ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def host_of(url: str) -> str | None:
    """The host of an address; None if it is no address."""
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None
