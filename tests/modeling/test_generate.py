"""`generate` in every mode equals decoding without a cache; what a recurrent state cannot do is refused."""

from __future__ import annotations

import pytest
import torch
from builders import CONFIG, PURE, build_llama, logits, tokens
from transformers import DynamicCache, GenerationConfig, StaticCache

from srf_retrofit import retrofit

NEW = 18


@pytest.fixture(params=["hybrid state", "eight bits", "pure", "some layers"])
def model(request):
    if request.param == "eight bits":
        return retrofit(build_llama(), CONFIG.replace(kv_dtype="int8"))
    if request.param == "some layers":
        return retrofit(build_llama(), CONFIG, layers=[0, 2])
    return retrofit(build_llama(), PURE if request.param == "pure" else CONFIG)


def prompt(model, padded: bool = True) -> dict[str, torch.Tensor]:
    """Three rows of 21 positions; padded on the left by 0, 6 and 13 if asked for."""
    ids = tokens(model, 3, 21)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :6] = 0
        mask[2, :13] = 0
        ids = ids.masked_fill(mask == 0, model.config.pad_token_id)
    return {"input_ids": ids, "attention_mask": mask}


def assert_greedy(model, out: torch.Tensor, inputs: dict[str, torch.Tensor]) -> None:
    """Every new token is the likeliest one after what precedes it, by one forward without a cache."""
    start = inputs["input_ids"].shape[1]
    assert torch.equal(out[:, :start], inputs["input_ids"])
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(out[:, start:])], 1)
    likeliest = logits(model, out, attention_mask=mask).argmax(-1)
    assert torch.equal(out[:, start:], likeliest[:, start - 1 : -1])


def generate(model, inputs: dict, **kwargs) -> torch.Tensor:
    # No end-of-sequence token: every row runs to the end.
    settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(**inputs, **{**settings, **kwargs})


@pytest.mark.parametrize("padded", [False, True], ids=["full rows", "left padding"])
@pytest.mark.parametrize(
    "mode",
    [
        {},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 1},
        {"prefill_chunk_size": 8},
        {"prefill_chunk_size": 5, "cache_implementation": "static"},
    ],
    ids=["dynamic", "no cache", "static", "chunks of 1", "chunks of 8", "static chunks of 5"],
)
def test_greedy(model, mode, padded) -> None:
    inputs = prompt(model, padded)
    out = generate(model, inputs, **mode)
    assert out.shape == (3, 21 + NEW)
    assert_greedy(model, out, inputs)


def test_rows_generate_what_they_generate_alone(model) -> None:
    inputs = prompt(model)
    together = generate(model, inputs)
    for row, start in enumerate((0, 6, 13)):
        alone = generate(model, {name: x[row : row + 1, start:] for name, x in inputs.items()})
        assert torch.equal(together[row, start:], alone[0])


@pytest.mark.parametrize(
    "mode",
    [
        {"do_sample": True, "top_k": 20},
        {"num_beams": 3},
        {"num_beams": 2, "do_sample": True, "num_return_sequences": 2},
    ],
    ids=["sampling", "beams", "beam sampling"],
)
@pytest.mark.parametrize("cache", [None, "static"])
def test_sampling_and_beams(model, mode, cache) -> None:
    inputs = prompt(model)
    torch.manual_seed(3)
    expected = generate(model, inputs, use_cache=False, **mode)
    torch.manual_seed(3)
    given = {} if cache is None else {"cache_implementation": cache}
    assert torch.equal(generate(model, inputs, **given, **mode), expected)


@pytest.mark.parametrize("cached", ["returned", "given"])
def test_a_conversation_reuses_its_cache(model, cached) -> None:
    turn = {"max_new_tokens": 9, "return_dict_in_generate": True}
    cache = DynamicCache(config=model.config) if cached == "given" else None
    ids = tokens(model, 1, 12)
    for seed in (5, 6, 7):
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        out = generate(model, {**inputs, "past_key_values": cache}, **turn)
        assert_greedy(model, out.sequences, inputs)
        cache = out.past_key_values
        ids = torch.cat([out.sequences, tokens(model, 1, 7, seed=seed)], 1)


def test_embeddings_as_a_prompt(model) -> None:
    inputs = prompt(model, padded=False)
    embedded = model.get_input_embeddings()(inputs["input_ids"])
    out = generate(model, {"inputs_embeds": embedded, "attention_mask": inputs["attention_mask"]})
    assert torch.equal(out, generate(model, inputs)[:, 21:])


@pytest.mark.parametrize("kv_dtype", ["model", "int8"])
def test_a_static_cache_is_compiled_as_one_graph(kv_dtype) -> None:
    """One graph for all steps, on the state's own memory."""
    model = retrofit(build_llama(num_hidden_layers=1), CONFIG.replace(kv_dtype=kv_dtype))
    graphs = []

    def count(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    ids = tokens(model, 1, 40)
    cache = StaticCache(config=model.config, max_cache_len=64)
    out = [logits(model, ids[:, :20], past_key_values=cache, use_cache=True)]
    step = torch.compile(model.forward, backend=count, fullgraph=True)
    with torch.no_grad():
        for token in ids[:, 20:].split(1, dim=1):
            position = cache.get_seq_length().view(1, 1).clone()
            out.append(step(token, position_ids=position, past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(out, 1), logits(model, ids), rtol=1e-4, atol=1e-4)
    assert len(graphs) == 1


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_assisted_decoding_is_refused_in_both_roles() -> None:
    model, plain = retrofit(build_llama(), CONFIG), build_llama()
    inputs = prompt(model, padded=False)
    one = {name: x[:1] for name, x in inputs.items()}
    with pytest.raises(ValueError, match="stateful"):
        generate(model, one, assistant_model=plain)
    with pytest.raises(ValueError, match="stateful"):
        generate(model, one, prompt_lookup_num_tokens=3)
    with pytest.raises(ValueError, match="cannot be the assistant"):
        generate(plain, one, assistant_model=model)


def test_continuous_batching_is_refused() -> None:
    model = retrofit(build_llama(), CONFIG)
    prompts = [[3, 4, 5], [6, 7]]
    with pytest.raises(ValueError, match="continuous batching keeps pages"):
        model.generate_batch(prompts, generation_config=GenerationConfig(max_new_tokens=2))
    with pytest.raises(ValueError, match="continuous batching keeps pages"):
        generate(model, {"input_ids": torch.tensor([[3, 4, 5]])}, cache_implementation="paged")


def test_attention_matrices_are_refused() -> None:
    model = retrofit(build_llama(), CONFIG)
    with pytest.raises(ValueError, match="output_attentions=True is not possible"):
        generate(model, prompt(model), output_attentions=True, return_dict_in_generate=True)
