"""A Hub on this machine for the tests: real HTTP, real git, real clients, no network beyond loopback.

    with Hub(folder) as hub:
        token = hub.add_token("alice")
        ...  # HF_ENDPOINT=hub.endpoint, HF_TOKEN=token

``python -m tests.helpers.hub`` starts one by hand. Layers, each knowing only the ones before it:

    repository.py   a bare git repository: commits, refs, trees, pull requests
    objects.py      large files by sha256, and the Xet store (xorbs and shards)
    web.py          HTTP plumbing: replies, ranges, the record of requests, faults on demand
    api.py          what the clients call on HF_ENDPOINT        files.py   the file store, on a port of its own
    hub.py          tokens, who may do what, start, stop and restart

Everything is on disk but the tokens, so a hub that is stopped and started again on its folder has lost nothing.
"""

from .hub import Hub
from .web import Fault

__all__ = ["Fault", "Hub"]
