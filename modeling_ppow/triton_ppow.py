"""Triton, where it is installed: the one place that imports it.

transformers asks for every package that a drafter's code imports outside of ``try``, so nothing else may.
"""

import os

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of torch come without it; the plain path needs none of this
    triton = tl = None

HAS_TRITON = triton is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # lets the kernels' tests run without a GPU

__all__ = ["HAS_TRITON", "INTERPRETED", "tl", "triton"]
