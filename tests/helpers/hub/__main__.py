"""``python -m tests.helpers.hub [--port PORT] [--folder FOLDER]``: a hub to try pushing and pulling by hand."""

import argparse
import contextlib
import tempfile
import threading
from pathlib import Path

from . import Hub


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.helpers.hub", description=main.__doc__)
    parser.add_argument("--port", type=int, default=5551, help="of HF_ENDPOINT; 0: a free one")
    parser.add_argument("--folder", type=Path, help="where it keeps everything; none: a temporary folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, Hub(arguments.folder or Path(scratch), arguments.port) as hub:
        print(f"export HF_ENDPOINT={hub.endpoint}")
        print(f"export HF_TOKEN={hub.add_token('me', orgs=('acme',))}")
        print("# You are `me`, a member of `acme`. Ctrl-C stops the hub.", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main()
