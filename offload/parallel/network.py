"""By which network interface the other ranks are reached."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

_VARIABLE = "GLOO_SOCKET_IFNAME"


@contextmanager
def chosen_interface(host: str, port: int) -> Iterator[str | None]:
    """Within this gloo uses the interface that leads to rank 0, unless the user has chosen one; its name.

    By itself it takes the one that the machine's own name resolves to, which on many is the loopback's.
    """
    name = None if _VARIABLE in os.environ else interface_to(host, port)
    if name is None:
        yield os.environ.get(_VARIABLE)
        return
    os.environ[_VARIABLE] = name
    try:
        yield name
    finally:
        del os.environ[_VARIABLE]


def interface_to(host: str, port: int) -> str | None:
    """The interface with the address from which packets to ``host`` leave; None if that cannot be told."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)  # of a datagram socket: nothing is sent
            own = probe.getsockname()[0]
    except OSError:
        return None
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == own for entry in addresses):
            return name
    return None
