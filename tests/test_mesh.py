"""The mesh: how things are laid on it, and that no layout changes what is computed."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from karploop.config import MeshConfig, ModelConfig, OptimizerConfig
from karploop.data.prompting import PlainPrompting
from karploop.errors import UserError
from karploop.mesh import (
    AXES,
    DECODE_RULES,
    TRAIN_RULES,
    agree,
    any_process,
    batch_parts,
    check_batch,
    join_slices,
    main_first,
    make_mesh,
    partition_spec,
    put,
    replicated,
    to_host,
)
from karploop.models.weights import Weights
from karploop.sampling.distributions import Sampling
from karploop.sampling.sampler import Sampler
from karploop.training.packing import pack, stream, tokenize
from karploop.training.trainer import Trainer

LAYOUTS = {
    "data parallel": dict(data=8),
    "fsdp": dict(fsdp=8),
    "tensor": dict(tensor=4),
    "mixed": dict(data=2, fsdp=2, tensor=2),
}


# -- the mesh and its mistakes -----------------------------------------------------------------


def test_minus_one_takes_what_is_there():
    assert make_mesh(MeshConfig(data=-1, fsdp=2, tensor=2)).shape == dict(data=2, fsdp=2, tensor=2)
    assert make_mesh(MeshConfig(data=1, tensor=-1)).shape == dict(data=1, fsdp=1, tensor=8)
    assert make_mesh(MeshConfig(data=2)).size == 2, "one process may leave devices idle"
    assert make_mesh(MeshConfig()).axis_names == AXES


def test_slices_are_joined_along_data_alone():
    """Stand-ins for devices, which arrive in any order; slices of real ones are elsewhere."""
    devices = [
        SimpleNamespace(id=i, slice_index=i // 8, platform="cpu", device_kind="cpu")
        for i in range(16)
    ]
    joined = join_slices((4, 2, 2), devices[::-1], 2)
    slices = np.vectorize(lambda device: device.slice_index)(joined)
    assert joined.shape == (4, 2, 2) and len({d.id for d in joined.flat}) == 16
    assert (slices == np.array([0, 0, 1, 1])[:, None, None]).all()
    with pytest.raises(UserError, match="config.mesh.data.* is 1, .* 2 slices: give a multiple"):
        join_slices((1, 8, 2), devices, 2)


def test_a_mesh_larger_than_the_machine_is_refused():
    with pytest.raises(UserError, match=r"config.mesh.*data 4 × fsdp 4.*needs 16.*are 8.*-1"):
        make_mesh(MeshConfig(data=4, fsdp=4))
    with pytest.raises(UserError, match="config.mesh.*by 3.*there are 8.*product divides"):
        make_mesh(MeshConfig(data=-1, tensor=3))


def test_several_processes_must_use_all_their_devices(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="takes 4 of the 8 devices of 2 processes.*-1"):
        make_mesh(MeshConfig(data=4))


def test_a_batch_that_does_not_divide_is_refused_with_one_that_does():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    assert batch_parts(mesh) == 4
    check_batch(12, mesh, "config.train.rows")
    with pytest.raises(UserError, match="'config.train.rows' is 6.*4.*such as 8"):
        check_batch(6, mesh, "config.train.rows")


@pytest.mark.parametrize(
    ("mesh", "model", "message"),
    [
        (dict(tensor=4), dict(heads=2), "'config.mesh.tensor' is 4.*'heads' of 2.*divisor of 2"),
        (dict(tensor=2), dict(mlp_width=9), "'config.mesh.tensor' is 2.*'mlp' of 9.*layers_0/mlp"),
        (dict(fsdp=4), dict(width=6), "'config.mesh.fsdp' is 4.*'embed' of 6"),
    ],
)
def test_an_axis_that_does_not_divide_is_named(make_weights, mesh, model, message):
    with pytest.raises(UserError, match=message):
        make_weights(**mesh, **model)


# -- logical axes ------------------------------------------------------------------------------


def test_rules_refuse_collisions_and_unknown_axes():
    assert partition_spec(["embed", "heads", "head_width"]) == PartitionSpec("fsdp", "tensor", None)
    assert partition_spec(["embed", "mlp"], DECODE_RULES) == PartitionSpec(None, "tensor")
    for axes in (["embed", "embed"], ["vocab", "mlp"], ["batch", "embed"]):
        with pytest.raises(ValueError, match="one mesh axis twice"):
            partition_spec(axes)
    with pytest.raises(ValueError, match="no rule for.*'embd'"):
        partition_spec(["embd", "mlp"])


def test_the_training_layout_extends_the_decoding_layout(make_weights):
    """They differ by fsdp alone: one all-gather takes the first to the second."""
    assert TRAIN_RULES.keys() == DECODE_RULES.keys()
    weights = make_weights(data=2, fsdp=2, tensor=2)

    def check(train, decode):
        without = [None if entry == "fsdp" else entry for entry in train.spec]
        assert PartitionSpec(*without) == decode.spec
        return "fsdp" in train.spec

    extended = jax.tree.map(check, weights.shardings, weights.decode_shardings)
    assert sum(jax.tree.leaves(extended)) == 2 + 2 * 6, "every matrix is split over fsdp"


def test_parameters_are_really_split(make_weights, make_params):
    params = make_params(make_weights(fsdp=4, tensor=2))["params"]
    parts = {
        name: x.size // x.addressable_shards[0].data.size
        for name, x in {
            "embedding": params["embedding"],
            "head": params["head"],
            "query": params["layers_0"]["attention"]["query"],
            "out": params["layers_0"]["attention"]["out"],
            "down": params["layers_0"]["mlp"]["down"],
            "norm": params["final_norm"]["scale"],
        }.items()
    }
    assert parts == dict(embedding=8, head=8, query=8, out=8, down=8, norm=1)


def test_a_vocabulary_that_does_not_divide_stays_whole():
    """15 ids on 2 devices: the tokenizer decides the size, so no remedy would be the user's."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2))
    shardings = Weights(ModelConfig(layers=1), 15, mesh).shardings["params"]
    assert shardings["embedding"].spec == PartitionSpec(None, "fsdp")
    assert shardings["head"].spec == PartitionSpec("fsdp", None)
    assert shardings["layers_0"]["mlp"]["up"].spec == PartitionSpec("fsdp", "tensor")


def test_arrays_go_to_the_mesh_and_back_whole(make_weights, make_params):
    weights = make_weights(data=2, fsdp=2, tensor=2)
    params = make_params(weights)
    host = to_host(params)
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(host))
    jax.tree.map(np.testing.assert_array_equal, host, to_host(make_params(make_weights())))
    values = np.arange(6.0).reshape(2, 3)
    np.testing.assert_array_equal(to_host(put(values, replicated(weights.mesh))), values)


def test_one_process_agrees_with_itself():
    assert [agree(lambda: True), agree(lambda: False)] == [True, False]
    assert [any_process(True), any_process(False)] == [True, False]


def test_main_first():
    """Alone, a process is the main one: its result and its errors come through."""
    assert main_first(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        main_first(lambda: 1 / 0)


def test_when_the_main_process_fails_the_others_fail_with_it(monkeypatch):
    done = []
    monkeypatch.setattr("karploop.mesh.is_main", lambda: False)
    assert main_first(lambda: done.append(1)) is None and done == [1]
    monkeypatch.setattr("karploop.mesh.any_process", lambda flag: True)
    with pytest.raises(UserError, match="main process could not start"):
        main_first(lambda: done.append(2))
    assert done == [1], "what the main process goes first in is not begun"


# -- every layout computes the same ------------------------------------------------------------


@pytest.fixture(scope="module")
def examples(tokenizer):
    prompts = [f"{a}+{b}=" for a in range(8) for b in range(5, 12)]
    return tokenize(
        PlainPrompting(tokenizer), prompts, [str(eval(p[:-1])) for p in prompts], row_length=24
    )


@pytest.fixture(scope="module")
def trained_on(make_weights, make_params, tokenizer, examples):
    """trained_on(**sizes of the mesh): losses of four steps, and completions after them."""

    @functools.cache
    def run(**sizes):
        weights = make_weights(**sizes, layers=1, positions="rope")
        trainer = Trainer(weights, OptimizerConfig())
        order = stream(np.ones(len(examples)), np.random.default_rng(0))
        batches = (
            batch for batch, _ in pack([(e,) for e in examples], order, rows=8, row_length=24)
        )
        state, losses = trainer.start(make_params(weights)), []
        for _ in range(4):
            state, metrics = trainer.step(state, next(batches), 0.01)
            losses.append(float(metrics.loss))
        sampler = Sampler(weights, tokenizer, prompt_length=5, completion_length=6)
        completions = sampler.complete(
            state.params,
            ["1+2=", "3", "55+6="],
            [0, 1, 2],
            jax.random.key(3),
            samples=2,
            sampling=Sampling(temperature=0.7, top_p=0.9),
            limits=[6, 6, 6],
            batch=8,
        )
        return losses, [c for of_prompt in completions for c in of_prompt]

    return run


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_and_sampling_do_not_depend_on_the_layout(trained_on, layout):
    """Losses to a relative 1e-5 (sums in another order), tokens exactly, log-probs to 1e-4."""
    losses, completions = trained_on()
    got_losses, got_completions = trained_on(**LAYOUTS[layout])
    assert losses[-1] < losses[0]
    np.testing.assert_allclose(got_losses, losses, rtol=1e-5)
    assert [c.tokens for c in got_completions] == [c.tokens for c in completions]
    for got, expected in zip(got_completions, completions, strict=True):
        np.testing.assert_allclose(got.logprobs, expected.logprobs, atol=1e-4)


def test_a_step_moves_no_activations_from_layout_to_layout(make_weights, examples, capfd):
    """The compiler, from jax 0.11 on, says so where it makes them whole in between."""
    weights = make_weights(fsdp=4, tensor=2, layers=2, positions="rope")
    trainer = Trainer(weights, OptimizerConfig())
    batch, _ = next(pack([(e,) for e in examples], iter(range(8)), rows=8, row_length=24))
    trainer._step.lower(trainer.abstract, (), (), batch, jnp.float32(1)).compile()
    assert "rematerialization" not in capfd.readouterr().err
