"""What the tests of the GPU benchmarks share: a tiny attention to measure, and a look at a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from srf_retrofit import SRFConfig

CONFIG = SRFConfig(num_features=8, window=4, sinks=1, retained=2)
ATTENTION: dict[str, Any] = {
    "shapes": [(2, 1, 8)], "lengths": (16, 32), "tokens": 64, "variants": {"retained": CONFIG}, "rivals": ("default",),
    "backend": "torch", "dtype": "float32", "device": "cpu", "seconds": 0.01,
}  # fmt: skip


def png(path: Path) -> bool:
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
