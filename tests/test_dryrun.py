"""What the dry run reads off compiled programs, and what it says of runs that do not fit."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from karploop.config import Config, LoraConfig, OptimizerConfig
from karploop.dryrun import flops, topology
from karploop.dryrun.chips import TPUS
from karploop.dryrun.hlo import collectives
from karploop.dryrun.programs import Program, compile_program, example_batch, exhausted, lay
from karploop.dryrun.report import report
from karploop.dryrun.roofline import Work, moved, time_of
from karploop.dryrun.search import candidates
from karploop.errors import UserError
from karploop.models import likelihood
from karploop.resolve import resolve
from karploop.training.packing import Tokenized, pack
from karploop.training.trainer import Trainer

ROOT = pathlib.Path(__file__).parent.parent
MESH = {"data": 2, "fsdp": 4, "tensor": 2}
PROGRAM = """HloModule made_by_hand

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(f32[] %a, f32[] %b)
}

%start (p: bf16[64,8]) -> bf16[64,32] {
  ROOT %gather.1 = bf16[64,32]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=7, replica_groups={{0,2,4,6},{8,10,12,14},{1,3,5,7},{9,11,13,15}}, dimensions={1}
}

%rest (p: bf16[64,8]) -> bf16[64,32] {
  ROOT %gather.2 = bf16[64,32]{1,0} all-gather(%p), channel_id=7, replica_groups=[4,4]<=[2,4,2]T(0,2,1), dimensions={1}
}

%all-reduce-scatter.9 (p: f32[32]) -> f32[8] {
  %whole = f32[32]{0} all-reduce(%p), channel_id=8, replica_groups=[4,4]<=[2,4,2]T(0,2,1), to_apply=%add
  ROOT %own = f32[8]{0} dynamic-slice(%whole), dynamic_slice_sizes={8}
}

%body (t: (s32[], bf16[64,8])) -> (s32[], bf16[64,8]) {
  %one = bf16[64,32]{1,0} fusion(%p), kind=kCustom, calls=%start
  %two = bf16[64,32]{1,0} fusion(%p), kind=kCustom, calls=%rest
  %three = f32[8]{0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.9
  ROOT %tuple = (s32[], bf16[64,8]) tuple(%p)
}

%condition (t: (s32[], bf16[64,8])) -> pred[] {
  %layers = s32[]{:T(128)} constant(28)
  ROOT %less = pred[] compare(%counter, %layers), direction=LT
}

%until_done (t: (s32[], bf16[64,8])) -> pred[] {
  ROOT %all = pred[] all-reduce(%x), channel_id=3, replica_groups=mesh['a'=2,'b'=4,'c'=2] {'a','b'}, to_apply=%add
}

%outer (t: (s32[], bf16[64,8])) -> (s32[], bf16[64,8]) {
  ROOT %loop = (s32[], bf16[64,8]) while(%t), condition=%condition, body=%body
}

ENTRY %main (p: bf16[64,8]) -> bf16[64,8] {
  %swap = (f32[10]{0}, f32[10]{0}, u32[], u32[]) collective-permute-start(%q), channel_id=1, source_target_pairs={{0,1},{1,0},{2,3},{3,2}}
  %sums = (f32[3]{0}, f32[5]{0}) all-reduce(%q, %r), channel_id=2, replica_groups=[8,2]<=[2,8]T(1,0), to_apply=%add
  %alone = f32[3]{0} all-reduce(%q), channel_id=4, replica_groups=[16,1]<=[16], to_apply=%add
  %known = (s32[], bf16[64,8]) while(%t), condition=%until_done, body=%plain, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %loop = (s32[], bf16[64,8]) while(%t), condition=%until_done, body=%outer
}
"""  # noqa: E501


def test_collectives_count_as_often_as_their_loops_go_round():
    found = {(one.kind, one.axes): one for one in collectives(PROGRAM, MESH, open_loops=5)}
    assert found.keys() == {
        ("all-gather", ("fsdp",)),
        ("reduce-scatter", ("fsdp",)),
        ("all-reduce", ("data",)),
        ("all-reduce", ("data", "fsdp")),
        ("collective-permute", ("tensor",)),
    }
    gather = found["all-gather", ("fsdp",)]  # two pieces of one, in 28 layers of an open loop
    assert (gather.count, gather.group, gather.assumed) == (140, 4, True)
    assert gather.moved == 64 * 32 * 2 * 3 / 4
    assert found["reduce-scatter", ("fsdp",)].moved == 32 * 4 * 3 / 4
    assert found["all-reduce", ("data",)].moved == 2 * 8 * 4 / 2
    assert found["all-reduce", ("data",)].count == 1
    assert found["all-reduce", ("data", "fsdp")].count == 5, "the loop that goes round more often"
    assert found["collective-permute", ("tensor",)].moved == 40


def test_groups_of_cut_axes_are_read():
    line = "ROOT %r = f32[8] all-gather(%p), replica_groups=mesh['a'=4,'b'=4] {'b':(2)2}"
    text = f"ENTRY %main (p: f32[4]) -> f32[8] {{\n  {line}\n}}\n"
    [one] = collectives(text, {"data": 4, "fsdp": 2, "tensor": 2})
    assert (one.axes, one.group) == (("tensor",), 2)


def test_groups_of_named_axes_follow_the_order_of_devices():
    groups = "mesh['a'=2,'b'=1,'c'=4], device_ids=([4,2]T(1,0)) {'a'}"
    line = f"ROOT %r = f32[8] all-gather(%p), replica_groups={groups}, dimensions={{0}}"
    text = f"ENTRY %main (p: f32[4]) -> f32[8] {{\n  {line}\n}}\n"
    [one] = collectives(text, {"data": 4, "fsdp": 2})
    assert (one.axes, one.group) == (("fsdp",), 2)
    with pytest.raises(ValueError, match="not known"):
        collectives(text.replace("mesh[", "other["), {"data": 4, "fsdp": 2})


ADAPTERS = [LoraConfig(), LoraConfig(rank=4)]
SHAPES = [
    dict(activation="swiglu", kv_heads=2, positions="rope"),
    dict(activation="gelu", tied=True),
]


@pytest.mark.parametrize("shape, lora", [*zip(SHAPES, ADAPTERS, strict=True)])
def test_flops_are_those_that_the_compiler_counts(make_weights, shape, lora):
    """Of an unrolled model with products so large that what is left out counts little."""
    wide = dict(width=128, heads=4, head_width=32, mlp_width=512, max_length=64)
    weights = make_weights(**wide, **shape)
    trainer = Trainer(weights, OptimizerConfig(), lora)
    batch, _ = next(pack([(Tokenized(np.zeros(3, np.int32), 1),)], iter([0]), 8, 64))
    counted = trainer.lower_step(batch).compile().cost_analysis()["flops"]
    config, vocabulary = weights.model.config, weights.model.vocabulary
    assert flops.train_step(config, vocabulary, 8, 64, lora) == pytest.approx(counted, rel=0.12)


def _shapes(**settings) -> Config:
    """A model's config.json alone, in small."""
    folder = settings.pop("folder")
    small = {
        **{"roles": {"policy": {"path": str(folder)}}, "mesh": {"data": 1}},
        **{"model": {"scan": True, "remat": "dots"}, "prompt": {"max_new_tokens": 8}},
        **{"generate": {"batch": 8, "samples": 2, "prompts": 16, "difficulty_step": 0}},
        **{"train": {"rows": 8, "row_length": 32}, "evaluate": {"batch": 8, "problems": 8}},
    }
    return resolve(small, settings)


@pytest.fixture
def bare(tmp_path):
    """A folder without weights and tokenizer."""
    model = dict(
        model_type="llama", hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, intermediate_size=64, vocab_size=256,
        max_position_embeddings=256, hidden_act="silu", tie_word_embeddings=False,
    )  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(model))
    return tmp_path


def test_bytes_sent_do_not_grow_with_replicas_but_for_the_gradient(bare, monkeypatch):
    """Each device has as many rows on two replicas as on four; logits come in several chunks."""
    monkeypatch.setattr(likelihood, "CHUNK", 1 << 10)
    sent = []
    for data in (2, 4):
        settings = {"mesh.data": str(data), "mesh.fsdp": "2", "train.rows": str(4 * data)}
        laid = lay(_shapes(folder=bare, **settings), jax.devices())
        program = compile_program(laid, "train step")
        assert {one.count for one in program.collectives} - {1, 2}, "loops are counted"
        sent.append(sum(moved(program).values()))
    gradient = 2 * 4 * laid.weights.count()  # all-reduced whole in float32, at most
    assert sent[1] <= sent[0] + gradient * (3 / 4 - 1 / 2) * 1.1, sent


@pytest.mark.parametrize("name", ["gkd", "dpo", "kto", "policy_gradient", "reward"])
def test_batches_are_those_that_objectives_read(bare, name):
    settings = {"objective.name": name, "train.accumulation": "2", "objective.kl": "0.1"}
    settings["roles.teacher.weights"] = "base"
    laid = lay(_shapes(folder=bare, **settings), jax.devices())
    assert laid.trainer.lower_step(example_batch(laid)).out_info[1].loss.shape == ()


def test_what_does_not_fit_says_what_to_change(bare):
    laid = lay(_shapes(folder=bare), jax.devices())
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (148.21G) exceeds available HBM (15.75G)."
    )
    memory = exhausted(message)
    assert memory == {"needed": 148.21 * 2**30, "available": 15.75 * 2**30}
    step = Program("train step", False, memory | {"arguments": 1e9})
    found = report(laid, {"train step": step}, "v5e:4x4", 1, TPUS["v5e"])
    assert not found["fits"] and found["memory_limit"] == 15.75 * 2**30
    advice = " ".join(found["programs"]["train step"]["advice"])
    assert "config.model.remat=full" in advice and "config.train.accumulation=2" in advice
    small = Program("rollout", True, {"arguments": 9e9, "temporaries": 1e9, "peak": 1e10}, 8e9)
    found = report(laid, {"rollout": small}, "v5e:4x4", 1, TPUS["v5e"])
    assert not found["fits"], "what lies beside a program takes room, too"
    assert "config.mesh.tensor" in " ".join(found["programs"]["rollout"]["advice"])


def test_what_leaves_a_slice_takes_longer():
    done, sent = Work(197e12, 819e9, 10), {"data": 100e9, "tensor": 100e9}
    inside = time_of(done, sent, TPUS["v5e"], devices=1)
    assert (inside.compute, inside.memory, inside.network) == (1.0, 1.0, 2.0)
    assert (inside.best, inside.worst, inside.bound) == (2.0, 4.0, "network")
    assert time_of(done, sent, TPUS["v5e"], 1, slices=2).network == 1.0 + 32.0


def test_search_leaves_out_what_cannot_be(bare):
    config = _shapes(folder=bare)
    found = candidates(config, jax.devices(), TPUS["v5e"], None)
    meshes = {tuple(each.laid.weights.mesh.shape.values()) for each in found}
    assert (8, 1, 1) in meshes and (2, 2, 2) in meshes
    assert not any(tensor == 8 for *_, tensor in meshes), "there are four heads"
    assert [each.seconds for each in found] == sorted(each.seconds for each in found)


def _dryrun(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "experiments.dryrun", *arguments],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_the_command_on_the_devices_at_hand(tmp_path):
    file = tmp_path / "reports/tiny.json"
    result = _dryrun("--config=tests/tiny.py", "--json", f"--output={file}")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found == json.loads(file.read_text())
    assert found["programs"].keys() == {"rollout", "score", "train step"}
    for program in found["programs"].values():
        assert program["memory"]["peak"] > program["memory"]["arguments"] > 0
        assert program["flops"] > 0 and program["collectives"] == []
    table = _dryrun(f"--tables={file.parent}")
    assert table.returncode == 0 and "| train step |" in table.stdout


@pytest.mark.parametrize("name", ["v9:2x2", "v5e-16"])
def test_an_unknown_topology_is_a_mistake(name):
    with pytest.raises(UserError, match=f"{name}.*v4:2x2x2; v5e:4x4.*v5p.*v6e:4x4; tpu7x"):
        topology.check(name)
    if name == "v9:2x2":
        result = _dryrun("--config=tests/tiny.py", f"--topology={name}")
        assert result.returncode == 2 and "Traceback" not in result.stderr


@pytest.fixture
def libtpu():
    if not topology.has_libtpu():
        pytest.skip('compiling for a TPU takes libtpu: pip install "jax[tpu]"')


def test_a_tpu_that_is_not_here(libtpu):
    arguments = ("--topology=v5e:2x2", "--config.mesh.data=2", "--config.mesh.fsdp=2")
    result = _dryrun("--config=tests/tiny.py", "--json", *arguments)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["device"] == "TPU v5e" and found["devices"] == 4
    step = found["programs"]["train step"]
    assert step["memory"]["peak"] < found["memory_limit"]
    assert {"data", "fsdp"} & {each["axes"] for each in step["collectives"]}
    assert found["forecast"]["round"]["chip_hours"] > 0
    assert step["estimate"]["worst"] >= step["estimate"]["best"] > 0


def test_the_gradients_of_a_tied_matrix_cross_the_network_as_one(libtpu):
    arguments = ("--topology=v5e:2x4", "--programs=train step", "--config.mesh.tensor=2")
    settings = ("--config.mesh.fsdp=4", "--config.train.rows=8")
    result = _dryrun("--config=configs/shapes.py:2b", "--json", *arguments, *settings)
    assert result.returncode == 0, result.stderr
    sent = [
        each["bytes"]
        for each in json.loads(result.stdout)["programs"]["train step"]["collectives"]
        if each["axes"] == "fsdp" and each["kind"] in ("all-reduce", "reduce-scatter")
    ]
    once = 151_936 * 2048 / 2 * 4 * 2 * (4 - 1) / 4  # its half in float32, round a ring
    assert 0 < sum(sent) < 1.1 * once, "other matrices' are summed as they are sent"


@pytest.mark.slow
def test_what_is_too_large_for_a_tpu_ends_with_3(libtpu):
    result = _dryrun(
        "--config=configs/shapes.py:8b", "--topology=v5e:2x2", "--programs=train step",
        "--config.mesh.fsdp=4",
    )  # fmt: skip
    assert result.returncode == 3, result.stderr
    assert "DOES NOT FIT" in result.stdout and "try: " in result.stdout


def test_several_slices_share_the_axis_of_replicas(libtpu):
    """In a process of its own, for libtpu is to be told what it runs on before JAX is loaded."""
    code = """if True:
        from karploop.dryrun import topology
        topology.prepare_environment()
        from karploop.config import MeshConfig
        from karploop.errors import UserError
        from karploop.mesh import make_mesh
        devices = topology.devices_of("v5e:2x2", 2)
        mesh = make_mesh(MeshConfig(data=2, fsdp=4), devices)
        assert {d.slice_index for d in mesh.devices[0].flat} == {0}
        try:
            make_mesh(MeshConfig(data=1, fsdp=8), devices)
        except UserError as error:
            assert "2 slices" in str(error)
        else:
            raise AssertionError
    """
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=300)


def test_a_prompt_that_does_not_fit_the_context_is_refused(bare):
    with pytest.raises(UserError, match="--prompt_length"):
        lay(_shapes(folder=bare), jax.devices(), prompt_length=1000)
    assert lay(_shapes(folder=bare), jax.devices(), prompt_length=100).prompt == 100


def test_shapes_have_the_sizes_they_are_named_for():
    from configs.shapes import SHAPES as folders
    from karploop.models.families import from_hf

    sizes = {}
    for folder in folders.iterdir():
        c, vocabulary = from_hf(json.loads((folder / "config.json").read_text()))
        matrices = sum(flops.matrices(c).values()) * c.layers
        sizes[folder.name] = (matrices + vocabulary * c.width * (1 if c.tied else 2)) / 1e9
    assert sizes == pytest.approx({"0.27b": 0.268, "2b": 1.72, "8b": 8.03, "32b": 32.8}, rel=0.01)
