"""PPOW drafters: the public names, handed on lazily so that ``import ppow`` costs no torch import.

The other modules of this folder are what a Hub repository of a drafter carries; this file stays at home.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for editors and type checkers, which do not run ``__getattr__``
    from .block_ppow import PPOWBlockDrafter
    from .configuration_ppow import PPOWConfig
    from .modeling_ppow import PPOWDrafter

__version__ = "0.1.0"

_HOME = {
    "PPOWBlockDrafter": "block_ppow",
    "PPOWConfig": "configuration_ppow",
    "PPOWDrafter": "modeling_ppow",
}

__all__ = ["PPOWBlockDrafter", "PPOWConfig", "PPOWDrafter", "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
