"""The decoder against transformers' own models: the same weights must give the same numbers.

Every family is built with unequal sizes (heads × head width is not the width, odd vocabulary,
windows shorter than the text) from random numbers, saved by transformers and read by karploop.
"""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="parity is measured against torch")
transformers = pytest.importorskip("transformers")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from karploop.config import MeshConfig, ModelConfig  # noqa: E402
from karploop.mesh import make_mesh  # noqa: E402
from karploop.models.checkpoint import (  # noqa: E402
    Folder,
    load_params,
    model_config,
    save_checkpoint,
)
from karploop.models.decoder import packed_mask  # noqa: E402
from karploop.models.families import to_hf  # noqa: E402
from karploop.models.weights import Weights  # noqa: E402
from karploop.sampling.distributions import GREEDY  # noqa: E402
from karploop.sampling.rollout import Decoding, rollout  # noqa: E402

LENGTH, VOCABULARY = 23, 97
COMMON = dict(
    vocab_size=VOCABULARY,
    hidden_size=24,
    intermediate_size=44,
    num_hidden_layers=3,
    max_position_embeddings=256,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}
# Heads, key-value heads and head width differ by case: GQA ratios 1, 2, 4 and 6.
CASES = {
    "llama2": ("LlamaConfig", dict(num_attention_heads=4, num_key_value_heads=4, head_dim=10)),
    "llama3": (
        "LlamaConfig",
        dict(num_attention_heads=4, num_key_value_heads=2, head_dim=8, rope_parameters=LLAMA3),
    ),
    "llama-biased-tied": (
        "LlamaConfig",
        dict(
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=8,
            attention_bias=True,
            mlp_bias=True,
            tie_word_embeddings=True,
        ),
    ),
    "qwen2": ("Qwen2Config", dict(num_attention_heads=6, num_key_value_heads=1)),
    "qwen2-window": (
        "Qwen2Config",
        dict(
            num_attention_heads=4,
            num_key_value_heads=2,
            use_sliding_window=True,
            sliding_window=5,
            max_window_layers=1,
        ),
    ),
    "qwen3": ("Qwen3Config", dict(num_attention_heads=4, num_key_value_heads=1, head_dim=12)),
    "gemma2": (
        "Gemma2Config",
        dict(
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=10,
            sliding_window=6,
            query_pre_attn_scalar=17,
            attn_logit_softcapping=5.0,
            final_logit_softcapping=3.0,
        ),
    ),
    "gemma3": (
        "Gemma3TextConfig",
        dict(
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=10,
            num_hidden_layers=7,
            sliding_window=6,
            query_pre_attn_scalar=21,
            rope_parameters=GEMMA3_ROPE,
        ),
    ),
}
REPRESENTATIVE = ("llama3", "gemma3")  # where all are too many to wait for


def make_reference(case: str):
    """A random model of transformers in float32, with no parameter at its trivial value."""
    name, settings = CASES[case]
    config = getattr(transformers, name)(**(COMMON | settings))
    config._attn_implementation = "eager"
    torch.manual_seed(sum(case.encode()))
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            # Matrices at a scale that makes attention and outputs far from uniform.
            parameter.copy_(0.3 * noise if parameter.ndim > 1 else parameter + 0.2 * noise)
            if "embed" in name and "gemma" not in config.model_type:
                parameter.mul_(3.0)
            if "post_" in name and "gemma" in config.model_type:
                parameter.add_(2.0)  # else tied embeddings repeat the last token for ever
    return model


@pytest.fixture(scope="module", params=list(CASES))
def pair(request, tmp_path_factory):
    """(torch model, our weights, our parameters, the folder that both come from)."""
    reference = make_reference(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    reference.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1, "the reader is to meet several shards"
    return reference, *imported(folder), folder


def imported(folder, **execution):
    checkpoint = Folder(folder)
    config, vocabulary = model_config(checkpoint, **execution)
    weights = Weights(config, vocabulary, make_mesh(MeshConfig(data=1, fsdp=2, tensor=2)))
    return weights, load_params(checkpoint, weights)


def make_batch(side: str):
    """Rows of unequal length, padded on one side: tokens, mask of real tokens, positions."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, VOCABULARY, (3, LENGTH))
    real = np.zeros((3, LENGTH), np.int64)
    for row, length in enumerate((LENGTH, 17, 9)):
        real[row, slice(0, length) if side == "right" else slice(LENGTH - length, None)] = 1
    return np.where(real, tokens, 0), real, np.maximum(np.cumsum(real, axis=1) - 1, 0)


def our_logits(weights, params, tokens, real, positions):
    @jax.jit
    def forward(params):
        mask = packed_mask(jnp.asarray(real, jnp.int32))
        hidden, _ = weights.model.apply(params, jnp.asarray(tokens), mask, jnp.asarray(positions))
        return weights.model.apply(params, hidden, method="logits")

    return np.asarray(forward(params))


def their_logits(reference, tokens, real, positions):
    return reference(
        input_ids=torch.tensor(tokens),
        attention_mask=torch.tensor(real),
        position_ids=torch.tensor(positions),
    ).logits


def assert_close(ours, theirs, tolerance):
    """Largest difference over the largest value."""
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


@pytest.mark.parametrize("side", ["right", "left"])
def test_logits(pair, side):
    reference, weights, params, _ = pair
    tokens, real, positions = make_batch(side)
    with torch.no_grad():
        theirs = their_logits(reference, tokens, real, positions).numpy()
    ours = our_logits(weights, params, tokens, real, positions)
    assert np.ptp(theirs) > 1, "logits that hardly differ would agree by themselves"
    assert_close(ours[real > 0], theirs[real > 0], 1e-4)


def test_gradients_of_the_mean_loss(pair):
    reference, weights, params, _ = pair
    tokens, real, positions = make_batch("right")
    targets, counted = tokens[:, 1:], real[:, 1:].astype(np.float32)

    theirs = torch.log_softmax(their_logits(reference, tokens, real, positions)[:, :-1], -1)
    picked = theirs.gather(-1, torch.tensor(targets)[..., None])[..., 0]
    reference.zero_grad()
    (-(picked * torch.tensor(counted)).sum() / counted.sum()).backward()
    gradients = {n: p.grad.numpy() for n, p in reference.named_parameters()}

    @jax.jit
    def gradient(params):
        def loss(params):
            mask = packed_mask(jnp.asarray(real, jnp.int32))
            hidden, _ = weights.model.apply(
                params, jnp.asarray(tokens), mask, jnp.asarray(positions)
            )
            logits = weights.model.apply(params, hidden[:, :-1], method="logits")
            taken = jnp.take_along_axis(
                jax.nn.log_softmax(logits), jnp.asarray(targets)[..., None], axis=-1
            )
            return -(taken[..., 0] * counted).sum() / counted.sum()

        return jax.grad(loss)(params)

    ours = exported(gradient(params), weights)
    assert set(ours) == set(gradients)
    for name, theirs in gradients.items():
        assert_close(ours[name], theirs, 1e-3)


def exported(params, weights) -> dict[str, np.ndarray]:
    """Our parameters under their checkpoint's names."""
    from flax import traverse_util

    from karploop.models.checkpoint import tensor_slots

    found = {}
    for path, leaf in traverse_util.flatten_dict(params["params"]).items():
        slots = tensor_slots(path, weights.model.config)
        leaves = np.asarray(leaf) if path[0] == "layers" else [np.asarray(leaf)]
        found |= {one.name: one.from_ours(x) for one, x in zip(slots, leaves, strict=True)}
    return found


def greedy(weights, params, tokens, real, new):
    """Our greedy continuation of left-padded prompts, with the key-value cache."""

    @jax.jit
    def decode(params):
        return rollout(
            weights.model,
            params,
            jnp.asarray(tokens, jnp.int32),
            jnp.asarray(real.sum(axis=1), jnp.int32),
            jnp.arange(len(tokens), dtype=jnp.uint32),
            jnp.full(len(tokens), new, jnp.int32),
            jax.random.key(0),
            samples=1,
            max_new=new,
            sampling=GREEDY,
            stop_ids=(-1,),
            pad_id=0,
            decoding=Decoding(fused_steps=8),
        )

    return np.asarray(decode(params).tokens_RxT)


def test_greedy_decoding_with_the_cache(pair):
    """64 tokens, which is far past every window and the original context of the scaled RoPE."""
    reference, weights, params, _ = pair
    tokens, real, _ = make_batch("left")
    theirs = reference.generate(
        torch.tensor(tokens),
        attention_mask=torch.tensor(real),
        max_new_tokens=64,
        min_new_tokens=64,
        do_sample=False,
        eos_token_id=None,
    )[:, LENGTH:].numpy()
    ours = greedy(weights, params, tokens, real, 64)
    assert len(np.unique(theirs)) > 5, "a loop over few tokens would be too easy to match"
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    "pair",
    [
        case if case in REPRESENTATIVE else pytest.param(case, marks=pytest.mark.slow)
        for case in CASES
    ],
    indirect=True,
)
def test_scanned_layers_and_recomputation_change_nothing(pair):
    _, weights, params, folder = pair
    batch = make_batch("left")
    expected = our_logits(weights, params, *batch)
    scanned = imported(folder, scan=True, remat="full")
    for other in (scanned, imported(folder, remat="dots")):
        np.testing.assert_allclose(our_logits(*other, *batch), expected, atol=2e-5)
    tokens, real, _ = batch
    one, other = (greedy(w, p, tokens, real, 16) for w, p in ((weights, params), scanned))
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("scan", [False, True])
def test_export_is_the_import_to_the_bit(pair, tmp_path, scan):
    reference, _, _, folder = pair
    weights, params = imported(folder, scan=scan)
    save_checkpoint(tmp_path, params, weights, shard_bytes=20_000)
    written, original = Folder(tmp_path), Folder(folder)
    assert set(written.names()) == set(original.names())
    for name in written.names():
        np.testing.assert_array_equal(written.read(name), original.read(name))
    again = imported(tmp_path, scan=scan)
    assert again[0].model.config == weights.model.config
    jax.tree.map(np.testing.assert_array_equal, again[1], params)


def test_transformers_loads_the_export_as_the_same_model(pair, tmp_path):
    reference, weights, params, _ = pair
    save_checkpoint(tmp_path, params, weights)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager", dtype=torch.float32
    )
    assert type(loaded) is type(reference)
    tokens, real, positions = make_batch("right")
    with torch.no_grad():
        one, other = (their_logits(m, tokens, real, positions) for m in (reference, loaded.eval()))
    np.testing.assert_array_equal(one.numpy(), other.numpy())


def test_bfloat16_computes_close_to_float32_over_float32_parameters(pair):
    _, weights, params, folder = pair
    half, half_params = imported(folder, dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(half_params)} == {jnp.dtype("float32")}
    batch = make_batch("right")
    difference = our_logits(half, half_params, *batch) - our_logits(weights, params, *batch)
    spread = np.std(our_logits(weights, params, *batch))
    assert 0 < np.abs(difference).mean() < 0.1 * spread


def test_a_model_from_scratch_that_fits_llama_is_exported_as_llama():
    config = ModelConfig(positions="rope", activation="swiglu")
    assert to_hf(config, 15)["model_type"] == "llama"
