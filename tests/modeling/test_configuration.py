"""The configuration: what it accepts, what it refuses and how it says so, and that every accepted one computes."""

from __future__ import annotations

import json

import pytest
import torch
from core_inputs import DIM, assert_states_close
from hypothesis import given, settings
from hypothesis import strategies as st

from srf_retrofit.modeling.configuration import CONFIG_VERSION, PROJECTIONS, STATE_DTYPES, SRFConfig
from srf_retrofit.modeling.ops import srf_attention
from srf_retrofit.modeling.state import SRFState
from srf_retrofit.testing import assert_close, quadratic_attention, random_feature_map


@st.composite
def configurations(draw: st.DrawFn, largest: int = 1024) -> SRFConfig:
    window = draw(st.integers(0, largest))
    return SRFConfig(
        num_features=draw(st.integers(0 if window else 1, largest)),
        window=window,
        sinks=draw(st.integers(0, largest)),
        retained=draw(st.integers(0, largest)) if window else 0,
        retention_delay=draw(st.integers(0, 16)),
        retention_half_life=draw(st.integers(0, 64)),
        projection=draw(st.sampled_from(PROJECTIONS)),
        state_dtype=draw(st.sampled_from(STATE_DTYPES)),
        seed=draw(st.integers(0, 2**40)),
        layers=draw(st.none() | st.sets(st.integers(0, 99), min_size=1).map(tuple)),
    )


@given(configurations())
def test_a_dictionary_of_json_types_reads_back_equal(config):
    assert SRFConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.is_pure == (config.window == 0)
    assert config.replace(seed=1).seed == 1


@given(configurations(), st.integers(0, 3), st.integers(1, 4), st.integers(1, 128))
def test_a_state_has_the_layout_it_announces_at_any_length(config, rows, kv_heads, head_dim):
    layout = SRFState.layout(config, rows, kv_heads, head_dim, torch.bfloat16)
    state = SRFState.empty(config, rows, kv_heads, head_dim, dtype=torch.bfloat16, device="meta")
    assert set(layout) == set(SRFState._fields)
    for name, tensor in zip(SRFState._fields, state, strict=True):
        assert (tuple(tensor.shape), tensor.dtype) == layout[name]
        assert tensor.shape[0] == rows


@settings(deadline=None, max_examples=25)
@given(configurations(largest=12), st.integers(1, 70), st.integers(1, 90), st.sampled_from([(1, 1), (3, 1), (4, 2)]))
@torch.no_grad()
def test_every_accepted_configuration_matches_the_oracle(config, length, chunk_size, heads):
    config = config.replace(state_dtype="float32")
    generator = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(1, n, length, DIM, generator=generator) for n in (heads[0], heads[1], heads[1]))
    maps = random_feature_map(heads[1], config.num_features, DIM)
    o, state = srf_attention(q, k, v, maps, config, chunk_size=chunk_size, output_final_state=True)
    expected, expected_state = quadratic_attention(q, k, v, maps, config, output_final_state=True)
    assert_close(o, expected, 1e-5)
    assert_states_close(state, expected_state, 1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_features": -1}, "num_features must be >= 0, got -1"),
        ({"num_features": 0, "window": 0, "retained": 0}, "num_features=0 with window=0 leaves nothing to attend to"),
        ({"feature_map": "softmax"}, "feature_map must be one of random, trained, hedgehog, relu, got 'softmax'"),
        ({"feature_map": "hedgehog", "num_features": 7}, "hedgehog features come in pairs"),
        ({"retention_half_life": -1}, "retention_half_life must be >= 0, got -1"),
        ({"num_features": 2.5}, "num_features must be an integer, got 2.5"),
        ({"num_features": True}, "num_features must be an integer, got True"),
        ({"window": -1}, "window must be >= 0, got -1"),
        ({"sinks": -4}, "sinks must be >= 0, got -4"),
        ({"retained": -2}, "retained must be >= 0, got -2"),
        ({"retained": 8, "window": 0}, "retained=8 needs window >= 1"),
        ({"seed": -1}, "seed must be >= 0, got -1"),
        ({"projection": "hadamard"}, "projection must be one of simplex, orthogonal, iid, got 'hadamard'"),
        ({"state_dtype": "int8"}, "state_dtype must be one of float32, float16, bfloat16, got 'int8'"),
        ({"layers": ()}, "layers is empty"),
        ({"layers": (0, -1)}, "layers must be non-negative integers"),
        ({"version": 0}, "version must be a positive integer, got 0"),
    ],
)
def test_values_out_of_range_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        SRFConfig(**changes)


def test_a_newer_version_is_refused_before_its_fields_are_looked_at():
    with pytest.raises(ValueError, match="install a newer srf_retrofit"):
        SRFConfig.from_dict({"version": CONFIG_VERSION + 1, "field_of_the_future": 1})


def test_unknown_fields_and_other_types_are_refused():
    with pytest.raises(
        ValueError, match="unknown SRF configuration field\\(s\\) windows; known: feature_map, forget_gate"
    ):
        SRFConfig.from_dict({"windows": 3})
    with pytest.raises(ValueError, match="must be a mapping, got list"):
        SRFConfig.from_dict([1])
