"""Ports of this machine that nobody else gets between two listeners."""

import socket
import sys
from contextlib import contextmanager


@contextmanager
def reserved_port():
    """A free port that stays ours: -> its number.

    A socket that is bound but does not listen holds it. On Linux a server, which sets SO_REUSEADDR as well, may listen
    there all the same, while the system gives the port to nobody who asks for any free one. Other systems would refuse
    the server, so there the port is only found, not held.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        port = holder.getsockname()[1]
        if sys.platform != "linux":
            holder.close()
        yield port
