"""Every kernel of a call compiles for a GPU, also where there is none; see `compile_for_gpu`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("mode", "kv_dtype"), [("32,4,32", "model"), ("32,4,16,48", "model"), ("0,4,0", "model"), ("32,4,16,96", "int8")]
)
def test_training_continuing_and_decoding_compile_for_an_h100(mode: str, kv_dtype: str, tmp_path: Path) -> None:
    environment = os.environ | {
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}",
    }
    found = subprocess.run(
        [sys.executable, str(TESTS / "compile_for_gpu.py"), mode, "bfloat16", kv_dtype],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-2000:]
    result = json.loads(found.stdout.splitlines()[-1])
    assert not result["failed"], result["failed"]
    expected = {"attend_kernel", "query_kernel", "state_kernel", "fold_gradient_kernel", "run_kernel", "scan_kernel"}
    retained = {"rank_run_kernel", "rank_scan_kernel", "rank_block_kernel", "priority_kernel", "key_kernel"}
    assert expected | (retained if mode.startswith("32") else {"in_block_key_kernel"}) <= set(result["compiled"])
    assert any("decode" in name or "step" in name for name in result["compiled"])
