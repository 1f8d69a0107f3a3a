"""The network interface that has an address: NCCL is told by name where it may listen."""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import socket
import struct

# From Linux's sockios.h: the first IPv4 address of an interface, in a struct ifreq of 40 bytes, from byte 20 on.
_SIOCGIFADDR = 0x8915
_IFREQ = struct.Struct("16s24x")


def interface_of(host: str) -> str | None:
    """host: an address or a name. None where no interface has it as its first IPv4 address (a further one, IPv6)."""
    try:
        resolved = socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)
    except OSError:
        return None
    address = ipaddress.ip_address(resolved[0][4][0])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            # One without an address has none to compare.
            with contextlib.suppress(OSError):
                found = fcntl.ioctl(probe, _SIOCGIFADDR, _IFREQ.pack(name.encode()))
                first = ipaddress.ip_address(found[20:24])
                if first == address or (first.is_loopback and address.is_loopback):
                    return name
    return None
