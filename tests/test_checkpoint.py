"""Checkpoints in folders: shards, and what is wrong with a folder told before anything is read."""

import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy

pytest.importorskip("transformers")

from small_models import save_llama  # noqa: E402

from karploop.config import MeshConfig  # noqa: E402
from karploop.errors import UserError  # noqa: E402
from karploop.mesh import make_mesh  # noqa: E402
from karploop.models.checkpoint import (  # noqa: E402
    load_params,
    model_config,
    open_checkpoint,
    save_checkpoint,
)
from karploop.models.weights import Weights  # noqa: E402
from karploop.roles.local import LocalModel  # noqa: E402


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "model")


def load(folder):
    role = LocalModel.describe(str(folder))
    return role.load(make_mesh(MeshConfig(data=1)))


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite(folder, change):
    """Passes the tensors through a function and writes what it returns."""
    path = folder / "model.safetensors"
    safetensors.numpy.save_file(change(safetensors.numpy.load_file(path)), path)


def test_shards_are_written_and_read_as_one(original, tmp_path):
    weights, params = load(original)
    save_checkpoint(tmp_path, params, weights, shard_bytes=4096)
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(shards) > 2 and shards[0].startswith("model-00001-of-")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == shards
    again = load_params(open_checkpoint(tmp_path), weights)
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_the_mesh_decides_where_parameters_lie(original):
    """Each device gets its part of what one device would hold."""
    checkpoint = open_checkpoint(original)
    config, vocabulary = model_config(checkpoint)
    split = Weights(config, vocabulary, make_mesh(MeshConfig(data=1, fsdp=2, tensor=2)))
    params = load_params(checkpoint, split)
    _, whole = load(original)
    jax.tree.map(np.testing.assert_array_equal, params, whole)
    held = sum(x.addressable_shards[0].data.size for x in jax.tree.leaves(params))
    assert held < 0.6 * sum(x.size for x in jax.tree.leaves(params))


def test_a_host_holds_one_tensor_at_a_time(original, monkeypatch):
    """What is read is on the devices before the next is touched."""
    checkpoint = open_checkpoint(original)
    config, vocabulary = model_config(checkpoint)
    events = []
    read, put = type(checkpoint).read, jax.device_put
    monkeypatch.setattr(
        type(checkpoint), "read", lambda self, n: (events.append("read"), read(self, n))[1]
    )
    monkeypatch.setattr(
        "karploop.models.checkpoint.put",
        lambda x, sharding: (events.append("put"), put(x, sharding))[1],
    )
    load_params(checkpoint, Weights(config, vocabulary, make_mesh(MeshConfig(data=1))))
    assert events == ["read", "put"] * (len(events) // 2)


def test_no_weights(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"no \*.safetensors \(pytorch_model.bin is a pickle"):
        load(folder)


def test_no_config(folder):
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match="no '.*config.json'"):
        load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        load(folder)


@pytest.mark.parametrize("kept", [4, 100, -1])
def test_a_truncated_shard(folder, kept):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match="model.safetensors' cannot be read .*cut short"):
        load(folder)


def test_a_missing_shard(folder):
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="lacks model-00002-of-00002.safetensors"):
        load(folder)


def test_a_shape_mismatch_names_the_tensor_and_both_shapes(folder):
    edit(folder / "config.json", intermediate_size=40)
    message = r"tensor 'model.layers.0.mlp.\w+_proj.weight' has the shape .*32.*asks for .*40"
    with pytest.raises(UserError, match=message):
        load(folder)


def test_missing_and_foreign_tensors(folder):
    edit(folder / "config.json", num_hidden_layers=3)
    with pytest.raises(UserError, match=r"lacks \d+ of \d+ tensors, first 'model.layers.2"):
        load(folder)
    edit(folder / "config.json", num_hidden_layers=1)
    with pytest.raises(UserError, match=r"no place for, first 'model.layers.1"):
        load(folder)


def test_an_unknown_architecture_lists_those_known(folder):
    edit(folder / "config.json", model_type="zamba")
    with pytest.raises(UserError, match="'zamba'.*llama.*qwen2.*qwen3.*gemma2.*gemma3"):
        load(folder)


def test_a_tokenizer_larger_than_the_embedding(folder):
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    edit(folder / "config.json", vocab_size=size - 10)

    def cut(tensors):
        name = "model.embed_tokens.weight"
        return tensors | {name: np.ascontiguousarray(tensors[name][:-10])}

    rewrite(folder, cut)
    with pytest.raises(UserError, match=f"needs an embedding of {size} rows"):
        load(folder)


def test_nothing_is_there(tmp_path):
    with pytest.raises(UserError, match="no model at"):
        LocalModel.describe(str(tmp_path / "nowhere"))
