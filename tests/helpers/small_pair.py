"""The pair in tests/pair: small, trained, its answers silly. `python -m benchmarks.bundle` makes it."""

from pathlib import Path

PAIR = Path(__file__).resolve().parents[1] / "pair"
TARGET, DRAFTER, STAGE1 = (PAIR / name for name in ("target", "drafter", "stage1"))
