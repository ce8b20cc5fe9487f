"""Foresight, and slots by layer, as parts of a distillation."""

from __future__ import annotations

import pytest
from builders import CONFIG
from distill_runs import small, write_text
from toy_tokenizers import byte_llama, byte_tokenizer
from transformers import AutoModelForCausalLM

from srf_retrofit import SRFConfig
from srf_retrofit.calibration import least_row
from srf_retrofit.modeling.attention import srf_attentions
from srf_retrofit.modeling.features import no_foresight
from srf_retrofit.pipeline.run import distill_model


def test_slots_are_foreseen_where_rows_are_long_enough(tmp_path) -> None:
    text = write_text(tmp_path)
    least = least_row(CONFIG)
    for name, length in (("short", least), ("long", least + 40)):
        settings = small(
            tmp_path / name, text, length=length, batch_size=1, tokens_per_step=length, tokens=length,
            calibration_tokens=4 * length,
        )  # fmt: skip
        model, results = distill_model(byte_llama(), byte_tokenizer(), settings, progress=False)
        tables = [layer.attn_fn.foresight for layer in srf_attentions(model)]
        fitted = [bool((table != no_foresight(*table.shape[:1], 16)).any()) for table in tables]
        assert fitted == [name == "long"] * len(tables)
        assert ("foresight" in results["retrofit"]) == (name == "long")


@pytest.mark.parametrize("by", ["head", "layer"])
def test_slots_are_spread(tmp_path, by) -> None:
    text = write_text(tmp_path)
    settings = small(
        tmp_path / "out", text, srf=CONFIG.replace(retained=8), spread_tokens=256, spread_by=by, train="all",
        tokens=512,
    )  # fmt: skip
    model, results = distill_model(byte_llama(), byte_tokenizer(), settings, progress=False)
    counts = [layer.srf_config.slots(layer.attn_fn.num_kv_heads) for layer in srf_attentions(model)]
    flat = [h for slots in counts for h in slots]
    assert set(flat) <= {2, 4, 8, 16, 32}
    assert sum(flat) <= 8 * len(flat)
    assert by == "head" or all(len(set(slots)) == 1 for slots in counts)
    assert results["retrofit"]["slots"] in (tmp_path / "out/report.md").read_text()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out/model")
    assert [layer.srf_config.slots(layer.attn_fn.num_kv_heads) for layer in srf_attentions(saved)] == counts
    srf = SRFConfig.from_dict(results["evaluation"]["model"]["srf"])
    assert [srf.for_layer(i).slots(len(slots)) for i, slots in enumerate(counts)] == counts
