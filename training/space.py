"""Serve the Space of this repository on this machine.

ppow space                                  # the bundled pair
ppow space --target TARGET --drafter DRAFTER --baseline STAGE1
"""

import importlib.util
import os
import sys
from pathlib import Path

from .config import SpaceConfig

FOLDER = Path(__file__).resolve().parent.parent / "space"


def main(config: SpaceConfig) -> None:
    """Serve until interrupted.

    Raises:
        ValueError: outside of a checkout of the repository, or without Gradio.
    """
    if not (FOLDER / "app.py").exists():
        raise ValueError(f"{FOLDER} is missing: run `ppow space` from a checkout of the repository.")
    if importlib.util.find_spec("gradio") is None:
        raise ValueError("The page needs Gradio: pip install -e '.[space]'")
    for part in ("target", "drafter", "baseline"):
        if getattr(config, part):
            os.environ[f"PPOW_{part.upper()}"] = getattr(config, part)
    if config.threads:
        import torch

        torch.set_num_threads(config.threads)
    sys.path.insert(0, str(FOLDER))
    importlib.import_module("app").launch(server_name=config.host, server_port=config.port)
