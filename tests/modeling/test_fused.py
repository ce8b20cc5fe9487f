"""The fused kernels against the oracles in Triton's interpreter, at small shapes; `test_fused_gpu` takes real ones.

`quadratic_attention` judges plain rows; padding, packing and states are judged by the PyTorch core in float64, which
has oracles of its own (`fused_checks`).
"""

from __future__ import annotations

import pytest
import torch
from core_inputs import assert_states_close
from fused_checks import DEVICE, compare_plain, compare_rows, config_of, doubles, tensors

from srf_retrofit import retrofit
from srf_retrofit.modeling.attention import srf_attentions
from srf_retrofit.modeling.configuration import SRFConfig
from srf_retrofit.modeling.feature_map import FoldedMap, LinearFeatures, log_features
from srf_retrofit.modeling.ops import choose_backend, fold, srf_attention
from srf_retrofit.modeling.state import SRFState
from srf_retrofit.testing import assert_close, quadratic_attention, random_feature_map, tiny_llama

pytestmark = pytest.mark.usefixtures("small_parts")

PURE = (0, 2, 0)
SMALL = [(8, 2, 3), (8, 0, 0), (5, 4, 0), (1, 0, 2), PURE]
UNEVEN = [(8, 2, (3, 5)), (4, 1, (20, 2)), (8, 0, (0, 2))]


@pytest.mark.parametrize("mode", SMALL, ids=str)
def test_matches_the_quadratic_oracle(mode):
    compare_plain(config_of(*mode), 53 if mode[0] != 1 else 11, random_feature_map(1, 16, 16))


@pytest.mark.parametrize("mode", UNEVEN, ids=str)
def test_heads_with_slots_of_their_own(mode):
    config, maps = config_of(*mode), random_feature_map(2, 16, 16)
    compare_plain(config, 53, maps, kv_heads=2)
    shape = {"heads": 2, "kv_heads": 2}
    mask = torch.rand(2, 45) > 0.3
    state = compare_rows(config, tensors(45, batch=2, **shape), maps, attention_mask=mask)
    state = compare_rows(config, tensors(21, batch=2, **shape), maps, state=state)
    compare_rows(config, tensors(30, **shape), maps, state=state, cu_seqlens=torch.tensor([0, 7, 30]))


def test_half_precision_of_heads_with_slots_of_their_own():
    compare_plain(config_of(8, 2, (3, 5)), 40, random_feature_map(2, 16, 16), dtype=torch.bfloat16, kv_heads=2)


@pytest.mark.parametrize("length", [1, 16, 17])
def test_short_rows(length):
    compare_plain(config_of(8, 2, 3), length, random_feature_map(1, 16, 16))


@pytest.mark.parametrize("mode", [(8, 2, 3), PURE], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(mode, dtype):
    compare_plain(config_of(*mode), 40, random_feature_map(1, 16, 16), dtype=dtype)


@pytest.mark.parametrize("geometry", ["identity", "shift"])
def test_simple_geometries_and_odd_sizes(geometry):
    maps = random_feature_map(1, 24, 20, geometry=geometry)
    compare_plain(config_of(8, 2, 3, features=24), 37, maps, dim=20, heads=3)


@pytest.mark.parametrize("ablation", ["no_tail", "tail_only", "no_retained"])
def test_ablations(ablation):
    compare_plain(config_of(8, 2, 3), 37, random_feature_map(1, 16, 16), ablation=ablation)


@pytest.mark.parametrize("mode", [PURE], ids=str)
def test_the_pure_form_without_its_tail_is_its_sinks(mode):
    compare_plain(config_of(*mode), 37, random_feature_map(1, 16, 16), ablation="no_tail")


@pytest.mark.parametrize("mode", [(8, 2, 3), PURE], ids=str)
def test_padding_and_rows_that_continue_in_mid_block(mode):
    config, maps = config_of(*mode), random_feature_map(1, 16, 16)
    mask = torch.rand(3, 45) > 0.3
    mask[1, :10], mask[2] = False, False
    state = compare_rows(config, tensors(45, batch=3), maps, attention_mask=mask)
    later = torch.ones(3, 21, dtype=torch.bool)
    later[0, 13:] = False
    compare_rows(config, tensors(21, batch=3), maps, state=state, attention_mask=later)
    compare_rows(config, tensors(3, batch=3), maps, state=state)


@pytest.mark.parametrize("mode", [(8, 2, 3), PURE], ids=str)
def test_packed_documents_with_and_without_states(mode):
    config, maps = config_of(*mode), random_feature_map(1, 16, 16)
    state = compare_rows(config, tensors(60), maps, cu_seqlens=torch.tensor([0, 1, 27, 44, 60]))
    compare_rows(config, tensors(30), maps, state=state, cu_seqlens=torch.tensor([0, 7, 8, 20, 30]))


@pytest.mark.parametrize("mode", [(8, 2, 3), PURE], ids=str)
def test_gradients_of_projection_and_geometry(mode):
    config, maps = config_of(*mode), random_feature_map(1, 16, 16)

    def leaves(folded, *args):
        sides = (
            LinearFeatures(*(t.detach().to(*args).requires_grad_() for t in side))
            for side in (folded.query, folded.key)
        )
        return FoldedMap(*sides)

    xs = tensors(37)
    ys = doubles(xs)
    mine, theirs = leaves(fold(maps), DEVICE), leaves(fold(maps), torch.float64)
    o, _ = srf_attention(*xs, mine, config, backend="triton")
    expected, _ = srf_attention(*ys, theirs, config, backend="torch")
    weight = torch.randn(o.shape)
    parameters = [*mine.query, *mine.key]
    grads = torch.autograd.grad((o * weight.to(o)).sum(), parameters)
    rights = torch.autograd.grad((expected * weight.double()).sum(), [*theirs.query, *theirs.key])
    scale = rights[0].abs().max().item()
    for i, (a, b) in enumerate(zip(grads, rights, strict=True)):
        assert_close(a.cpu(), b, 1e-5, f"map {i}", least_scale=scale)


@pytest.mark.parametrize("mode", [(8, 2, 3), PURE], ids=str)
@pytest.mark.parametrize("scale", [1e-6, 30.0, 1e3])
def test_extreme_norms(mode, scale):
    config, maps = config_of(*mode), random_feature_map(1, 16, 16, geometry="preconditioner")
    xs = tensors(37, scale=scale)
    o, _ = srf_attention(*xs, maps.to(DEVICE), config, backend="triton")
    assert torch.isfinite(o).all()
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(o.square().sum(), xs))
    if scale < 1e3:
        expected, _ = quadratic_attention(*(x.detach() for x in xs), maps, config)
        # Exponents of about 1e4 carry their rounding into the weights.
        assert_close(o.cpu(), expected, 1e-5 if scale < 1 else 2e-3, "o")


@pytest.mark.parametrize("mode", [PURE], ids=str)
def test_keys_far_above_all_before_them_in_their_block(mode):
    """A block of the pure form then needs several references."""
    config, maps = config_of(*mode), random_feature_map(1, 16, 16, geometry="identity")
    xs = tensors(50)
    with torch.no_grad():
        # Log-features of keys fall with their norm, so that every tenth stands far above the nine before it.
        for x in xs[:2]:
            x *= torch.linspace(8.0, 0.5, 10, device=DEVICE).repeat(5)[:, None]
    ys = doubles(xs)
    b = log_features(ys[1].detach(), fold(maps.to(torch.float64)).key, 0.25)
    assert (b[..., 2:, :] - b[..., 2:3, :]).max() > 60
    o, _ = srf_attention(*xs, maps.to(DEVICE), config, backend="triton")
    expected, _ = quadratic_attention(*ys, maps, config)
    assert_close(o.cpu(), expected, 1e-4, "o")
    weight = torch.randn(o.shape)
    grads = torch.autograd.grad((o * weight.to(DEVICE)).sum(), xs)
    rights = torch.autograd.grad((expected * weight.double()).sum(), ys)
    for name, mine, theirs in zip("qkv", grads, rights, strict=True):
        assert_close(mine.cpu(), theirs, 1e-4, f"grad {name}", least_scale=0.1)


@pytest.mark.parametrize("mode", [(8, 2, 3), PURE], ids=str)
@torch.no_grad()
def test_no_output_depends_on_a_later_token(mode):
    config, maps = config_of(*mode), random_feature_map(1, 16, 16).to(DEVICE)
    xs = tensors(50)
    o, _ = srf_attention(*xs, maps, config, backend="triton")
    changed = [x.clone() for x in xs]
    for x in changed:
        x[:, :, 29:] = 10 * torch.randn_like(x[:, :, 29:])
    again, _ = srf_attention(*changed, maps, config, backend="triton")
    assert torch.equal(again[:, :, :29], o[:, :, :29])


def test_backends_say_why():
    q = torch.randn(1, 2, 8, 16)
    config = config_of(8, 2, 3)
    assert choose_backend(q, config, backend="torch") == ("torch", "asked for")
    with pytest.raises(ValueError, match="backend must be one of"):
        choose_backend(q, config, backend="cuda")
    with pytest.raises(ValueError, match=r"no kernel for torch\.float64"):
        choose_backend(q.double(), config, backend="triton")
    with pytest.raises(ValueError, match="causal=False"):
        choose_backend(q, config.replace(retained=0), causal=False, backend="triton")
    with pytest.raises(ValueError, match="window=256 is above the 128"):
        choose_backend(q, config.replace(window=256), backend="triton")
    with pytest.raises(ValueError, match=r"batch=70000 is above the 65535 .* backend='torch' can"):
        choose_backend(q[:, :, :1].expand(70_000, -1, -1, -1), config, backend="triton")
    chosen, reason = choose_backend(q, config.replace(window=256))
    assert chosen == "torch"
    assert "window=256" in reason


def test_without_a_device_the_reason_is_the_device(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    chosen, reason = choose_backend(torch.randn(1, 2, 8, 16), config_of(8, 2, 3))
    assert chosen == "torch"
    assert "need a CUDA device" in reason


@pytest.mark.parametrize("kv_dtype", ["model", "int8"])
def test_a_compiled_graph_holds_the_kernels_as_one_operator(kv_dtype):
    config, maps = config_of(8, 2, 3, kv_dtype=kv_dtype), fold(random_feature_map(1, 16, 16).to(DEVICE))
    xs = tensors(20)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(q, k, v):
        return srf_attention(q, k, v, maps, config, backend="triton")[0]

    o, plain = run(*xs), srf_attention(*xs, maps, config, backend="triton")[0]
    assert_close(o.cpu(), plain.detach().double().cpu(), 1e-6)
    grads, rights = (torch.autograd.grad(x.square().sum(), xs) for x in (o, plain))
    for mine, theirs in zip(grads, rights, strict=True):
        assert_close(mine.cpu(), theirs.double().cpu(), 1e-5)


@pytest.mark.parametrize("mode", [(8, 2, 3), (0, 0, 0)], ids=str)
def test_a_compiled_graph_serves_any_length(mode):
    config, maps = config_of(*mode), fold(random_feature_map(1, 16, 16).to(DEVICE))

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def run(q, k, v):
        return srf_attention(q, k, v, maps, config, backend="triton")[0]

    for length in (20, 27):
        xs = tensors(length)
        o, plain = run(*xs), srf_attention(*xs, maps, config, backend="triton")[0]
        assert_close(o.cpu(), plain.detach().double().cpu(), 1e-6)
        grads, rights = (torch.autograd.grad(x.square().sum(), xs) for x in (o, plain))
        for mine, theirs in zip(grads, rights, strict=True):
            assert_close(mine.cpu(), theirs.double().cpu(), 1e-5)


@torch.no_grad()
def test_a_step_overwrites_the_state_only_when_told_to():
    config, maps = config_of(8, 2, 3), random_feature_map(1, 16, 16).to(DEVICE)
    _, state = srf_attention(*tensors(21), maps, config, output_final_state=True, backend="torch")
    before = SRFState(*(t.clone() for t in state))
    token = tensors(1)
    o, wanted = srf_attention(*token, maps, config, initial_state=state, output_final_state=True, backend="torch")
    step = {"initial_state": state, "output_final_state": True, "backend": "triton"}
    mine, after = srf_attention(*token, maps, config, **step)
    assert all(torch.equal(a, b) for a, b in zip(state, before, strict=True))
    assert_close(mine.cpu(), o.double().cpu(), 1e-5)
    assert_states_close(SRFState(*(t.cpu() for t in after)), SRFState(*(t.cpu() for t in wanted)), 1e-5)
    _, same = srf_attention(*token, maps, config, in_place=True, **step)
    assert same is state
    assert_states_close(SRFState(*(t.cpu() for t in same)), SRFState(*(t.cpu() for t in wanted)), 1e-5)


@torch.no_grad()
def test_a_model_computes_the_same_with_either_backend():
    config = SRFConfig(num_features=16, window=4, sinks=2, retained=3)
    model = retrofit(tiny_llama(num_hidden_layers=1), config).to(DEVICE)
    ids = torch.randint(3, 97, (2, 14), device=DEVICE)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    logits = {}
    for backend in ("torch", "triton"):
        for layer in srf_attentions(model):
            layer.backend = backend
        out = model(ids[:, :11], attention_mask=mask[:, :11], use_cache=True)
        steps = [out.logits]
        for i in range(11, 14):
            out = model(
                ids[:, i : i + 1], attention_mask=mask[:, : i + 1], past_key_values=out.past_key_values, use_cache=True
            )
            steps.append(out.logits)
        logits[backend] = torch.cat(steps, 1)[mask.bool()]
    assert_close(logits["triton"].cpu(), logits["torch"].double().cpu(), 2e-5)
