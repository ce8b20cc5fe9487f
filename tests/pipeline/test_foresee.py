"""Foresight, and slots by head, as parts of a distillation or by themselves."""

from __future__ import annotations

import pytest
import torch
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


def test_slots_are_spread_by_rows_that_ask_as_well(tmp_path) -> None:
    text = write_text(tmp_path)
    found = []
    for asking in (0, 384):
        settings = small(
            tmp_path / f"{asking}", text, srf=CONFIG.replace(retained=8), spread_tokens=256,
            spread_recall_tokens=asking,
            tokens=0, tune_tokens=192, length=96, tokens_per_step=192, batch_size=2, foresight_factor=0.5,
            calibration_length=192,
        )  # fmt: skip
        model, results = distill_model(byte_llama(), byte_tokenizer(), settings, progress=False)
        found.append(results["retrofit"]["slots"])
        assert all((layer.attn_fn.foresight[:, 0] == 0.5).all() for layer in srf_attentions(model))
    assert "by 192 tokens" in found[0]
    assert "by 576 tokens" in found[1]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"foresight_factor": 2.5}, r"foresight_factor must be in \[0, 2\], got 2.5"),
        ({"spread_recall_tokens": 64}, "spread_recall_tokens=64 are beside spread_tokens=0"),
        ({"spread_recall_tokens": 64, "spread_tokens": 64, "length": 64}, "needs rows of length >= 192, got 64"),
    ],
)
def test_what_fits_refuse(tmp_path, wrong, message) -> None:
    with pytest.raises(ValueError, match=message):
        small(tmp_path / "out", "text.txt", **({"length": 192, "tokens_per_step": 192, "batch_size": 1} | wrong))


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


def test_a_recipe_may_fit_and_not_train(tmp_path) -> None:
    text = write_text(tmp_path)
    settings = small(
        tmp_path / "out", text, srf=CONFIG.replace(retained=8), tokens=0, spread_tokens=256, recall_share=0.05,
        eval_untrained=True, length=192, tokens_per_step=192, batch_size=1,
    )  # fmt: skip
    teacher = byte_llama()
    before = {name: p.clone() for name, p in teacher.state_dict().items()}
    model, results = distill_model(teacher, byte_tokenizer(), settings, progress=False)
    assert results["training"] == {}
    assert not results["untrained"]
    assert results["text"]["recall_rows"] == 0
    assert [source["rows"] for source in results["text"]["sources"]] == [0]
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items() if ".attn_fn." not in name)
    page = (tmp_path / "out/report.md").read_text()
    assert "tokens in rows of 192, not distilled" in page
    assert results["retrofit"]["slots"] in page
    assert "report.png" not in page
    assert not (tmp_path / "out/report.png").exists()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out/model")
    assert torch.equal(saved(torch.arange(60)[None]).logits, model(torch.arange(60)[None]).logits)
