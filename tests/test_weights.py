"""Parameters on their way between stages: files, shared buffers, and what is given up."""

import hashlib
import threading
import types

import jax
import numpy as np
import pytest
from flax import traverse_util

from karploop.models.weights import FILE


def artifact(path):
    """What `load` reads of a committed stage."""
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    manifest = types.SimpleNamespace(files={FILE: {"sha256": sha256}})
    return types.SimpleNamespace(manifest=manifest, path=lambda name: path)


def folder(tmp_path, name):
    (tmp_path / name).mkdir()
    return tmp_path / name


def test_a_file_does_not_depend_on_the_mesh_that_wrote_or_reads_it(
    make_weights, make_params, tmp_path
):
    files = []
    for name, sizes in dict(one={}, split=dict(data=2, fsdp=2, tensor=2)).items():
        weights = make_weights(**sizes)
        directory = folder(tmp_path, name)
        weights.save(make_params(weights), directory)
        files.append(directory / FILE)
    assert files[0].read_bytes() == files[1].read_bytes()
    reader = make_weights(fsdp=4, tensor=2)
    loaded = reader.load(artifact(files[1]))
    jax.tree.map(np.testing.assert_array_equal, loaded, make_params(reader))
    jax.tree.map(
        lambda x, abstract, sharding: (
            x.dtype == abstract.dtype and x.sharding.is_equivalent_to(sharding, x.ndim) or 1 / 0
        ),
        loaded,
        reader.abstract,
        reader.shardings,
    )


def test_the_next_stage_gets_the_very_buffers(make_weights, make_params, tmp_path):
    weights = make_weights(layers=1)
    params = make_params(weights)
    weights.save(params, tmp_path)
    saved = artifact(tmp_path / FILE)
    assert weights.load(saved) is params
    assert weights.take(saved) is params
    again = weights.load(saved)  # taken buffers may have been donated: they are read anew
    assert again is not params
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_a_program_is_compiled_while_parameters_are_read_and_only_then(
    make_weights, make_params, tmp_path
):
    weights, lowered = make_weights(layers=1, width=8), []
    weights.save(make_params(weights), tmp_path)
    saved = artifact(tmp_path / FILE)

    def lower():
        lowered.append(threading.current_thread().name)
        return jax.jit(lambda: 1.0).lower()

    weights.load(saved, meanwhile=lower)
    assert not lowered, "they were there"
    weights.take(saved)
    weights.load(saved, meanwhile=lower)
    weights.load(saved, meanwhile=lower)
    assert lowered == ["compiling"]


def test_at_most_two_sets_of_parameters_stay_on_the_devices(make_weights, make_params, tmp_path):
    weights = make_weights(layers=1, width=8)
    saved = []
    for seed in range(3):
        directory = folder(tmp_path, str(seed))
        weights.save(make_params(weights, seed), directory)
        saved.append(artifact(directory / FILE))
    newest = weights.load(saved[2])
    first = weights.load(saved[0])
    assert weights.load(saved[2]) is newest and weights.load(saved[0]) is first
    assert len(weights._live) == 2


@pytest.mark.parametrize("scan", [False, True])
def test_shapes_are_those_of_what_is_drawn(make_weights, scan):
    """In the order of the drawn tree too, which decides that of a file."""
    shape = dict(layers=11, pattern="ssf", window=4, positions="rope", tied=True, post_norms=True)
    weights = make_weights(scan=scan, **shape)
    drawn = jax.eval_shape(weights.init, jax.random.key(0))
    assert list(traverse_util.flatten_dict(drawn)) == list(
        traverse_util.flatten_dict(weights.abstract)
    )
    assert jax.tree.map(lambda x: (x.shape, x.dtype), drawn) == jax.tree.map(
        lambda x: (x.shape, x.dtype), weights.abstract
    )
