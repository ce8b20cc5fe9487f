"""Single tokens are scored as full logits would score them, padded or not, and the head comes back."""

from __future__ import annotations

import pytest
import torch
from builders import CONFIG, build_llama, logits, tokens
from torch.nn import functional

from srf_retrofit import retrofit
from srf_retrofit.evaluation import scoring


@pytest.fixture(scope="module", params=["softmax", "retrofitted"])
def model(request):
    model = build_llama()
    return retrofit(model, CONFIG) if request.param == "retrofitted" else model


def test_scores_are_those_of_full_logits(model, monkeypatch) -> None:
    monkeypatch.setattr(scoring, "_ENTRIES_CPU", 7 * 97)  # several slices
    ids = tokens(model, 3, 40)
    scored = torch.rand(3, 40, generator=torch.Generator().manual_seed(0)) < 0.3
    scored[:, 0] = False
    head = model.lm_head
    with scoring.evaluating(model):
        some = scoring.score_tokens(model, ids, scored)
        every = scoring.score_tokens(model, ids)
    assert "forward" not in head.__dict__
    full = logits(model, ids)[:, :-1].float()
    nll = functional.cross_entropy(full.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    torch.testing.assert_close(every.nll, nll)
    assert torch.equal(every.right, (full.argmax(-1) == ids[:, 1:]).flatten())
    chosen = scored[:, 1:].flatten()
    torch.testing.assert_close(some.nll, nll[chosen])
    assert torch.equal(some.right, every.right[chosen])


def test_padding_on_the_right_changes_nothing(model) -> None:
    rows = [tokens(model, n, seed=n).tolist() for n in (70, 33, 9)]
    ids = scoring.pad_rows(rows)
    assert ids.shape == (3, 96)
    scored = torch.stack([torch.arange(96) < len(row) for row in rows])
    scored[:, 0] = False
    with scoring.evaluating(model):
        together = scoring.score_tokens(model, ids, scored).nll
        alone = [scoring.score_tokens(model, torch.tensor([row])).nll for row in rows]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_nothing_to_score_and_bad_masks(model) -> None:
    ids = tokens(model, 2, 12)
    nothing = torch.zeros(2, 12, dtype=torch.bool)
    with scoring.evaluating(model):
        assert scoring.score_tokens(model, ids, nothing).nll.shape == (0,)
        with pytest.raises(ValueError, match="nothing before it"):
            scoring.score_tokens(model, ids, ~nothing)
        with pytest.raises(ValueError, match=r"shape of input_ids, \(2, 12\), got \(2, 3\)"):
            scoring.score_tokens(model, ids, nothing[:, :3])


def test_models_that_change_their_logits_are_asked_for_them() -> None:
    model = build_llama()
    ids = tokens(model, 1, 10)
    with scoring.evaluating(model):
        plain = scoring.score_tokens(model, ids).nll
        model.config.logit_scale = 0.5
        monkey = model.forward
        model.forward = lambda **kwargs: type("O", (), {"logits": 0.5 * monkey(**kwargs).logits})()
        scaled = scoring.score_tokens(model, ids).nll
    wanted = functional.cross_entropy(0.5 * logits(build_llama(), ids)[0, :-1], ids[0, 1:], reduction="none")
    torch.testing.assert_close(scaled, wanted)
    assert not torch.allclose(scaled, plain)


def test_batches_hold_every_row_once_within_the_budget() -> None:
    lengths = [5, 100, 33, 1000, 64, 7, 31]
    batches = list(scoring.batches_by_length(lengths, 200))
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert batches[0] == [3]  # longer than the budget: alone, and first
    for batch in batches[1:]:
        assert scoring.padded_length(max(lengths[i] for i in batch)) * len(batch) <= 200
    assert max(map(len, batches)) > 1
    with pytest.raises(ValueError, match="batch_tokens must be >= 1, got 0"):
        list(scoring.batches_by_length(lengths, 0))
