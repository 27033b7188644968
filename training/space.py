"""Serve the page on which target and drafter race, on this machine.

ppow space                                  # SmolLM2-135M-Instruct and the drafter of this repository
ppow space --target TARGET --drafter DRAFTER --baseline STAGE1
"""

import importlib.util
import os
import socket
import sys
from pathlib import Path

from .config import SpaceConfig

FOLDER = Path(__file__).resolve().parent.parent / "space"


def main(config: SpaceConfig) -> None:
    """Serve until interrupted.

    Raises:
        ValueError: without the page's files or Gradio, or for a port that is taken.
    """
    if not (FOLDER / "app.py").exists():
        raise ValueError(
            f"{FOLDER}, which holds the page, is missing: the installation is not complete. Install ppow again."
        )
    if importlib.util.find_spec("gradio") is None:
        raise ValueError("The page needs Gradio: pip install 'gradio>=6.31,<7' (`make space` does it).")
    check_port(config.host, config.port)
    from .loading import check_model
    from .smollm2 import demo_pair

    names = {part: getattr(config, part) for part in ("target", "drafter", "baseline")}
    if config.target is None and not any(os.environ.get(f"PPOW_{part.upper()}") for part in names):
        names["target"], names["drafter"] = demo_pair()
    for part, name in names.items():
        if name:
            check_model(part, name)
            os.environ[f"PPOW_{part.upper()}"] = name
    if config.threads:
        import torch

        torch.set_num_threads(config.threads)
    sys.path.insert(0, str(FOLDER))
    importlib.import_module("app").launch(server_name=config.host, server_port=config.port)


def check_port(host: str, port: int) -> None:
    """Raise a ValueError unless a server can listen there; Gradio wants the port of this machine's own address too."""
    for address in (host.strip("[]"), "127.0.0.1"):
        try:
            socket.create_server((address, port), family=socket.AF_INET6 if ":" in address else socket.AF_INET).close()
        except OSError as error:
            what = f"--host {host}, --port {port}: {address}:{port} cannot be listened on ({error.strerror})"
            raise ValueError(f"{what}; name another --port, or stop what uses this one.") from None
