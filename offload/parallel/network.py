"""By which network interface the other ranks are reached."""

import os
import socket

import psutil

_VARIABLE = "GLOO_SOCKET_IFNAME"


def choose_interface(host: str, port: int) -> None:
    """Have gloo use the interface that leads to rank 0, unless the user has chosen one.

    By itself it takes the one that the machine's own name resolves to, which on many is the loopback's.
    """
    if _VARIABLE not in os.environ and (name := interface_to(host, port)) is not None:
        os.environ[_VARIABLE] = name


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
