"""The benchmark: its command on a small model, and its costs against numbers made by hand."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from experiments.bench import libraries
from karploop import cli
from karploop.benchmark import costs, inside, names, report, run, workloads
from karploop.benchmark.costs import Cost, Rates, Shape, Texts, forward, sampling, scoring, training
from karploop.benchmark.subject import make_subject
from karploop.config import Config, LoraConfig, MeshConfig, ModelConfig, RoleConfig
from karploop.errors import UserError

ROOT = pathlib.Path(__file__).parent.parent
CONFIG = """
from ml_collections import ConfigDict
def get_config(arg=None):
    shape = dict(layers=1, width=16, heads=2, head_width=8, mlp_width=32, max_length=512)
    return ConfigDict(dict(name="small", model=shape))
"""
# 2 query heads of 4, 1 key-value head; gated. A layer's matrices: 3·8 + 3·4 + 3·4 + 8·3 + 3·3·5.
SMALL = ModelConfig(
    layers=2, width=3, heads=2, kv_heads=1, head_width=4, mlp_width=5, activation="swiglu",
    tied=True, window=2, pattern="sf",
)  # fmt: skip
LAYER, HEAD = 24 + 12 + 12 + 24 + 45, 3 * 7


def bench(
    folder: pathlib.Path, *flags: str, module: str = "experiments.bench"
) -> subprocess.CompletedProcess:
    (folder / "small.py").write_text(CONFIG)
    command = [sys.executable, "-m", module, f"--config={folder}/small.py", *flags]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


def test_a_json_line_and_a_table_row_for_each_workload(tmp_path):
    result = bench(
        tmp_path, "--workloads=w2,sft_lora", "--repeats=3", "--vocabulary=50",
        f"--output={tmp_path}/results", "--machine=A small one",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    rows = [json.loads(line) for line in lines[:2]]
    assert [row["workload"] for row in rows] == ["w2", "sft_lora"]
    for row in rows:
        assert report.FIELDS.keys() == row.keys()
        assert len(row["all_seconds"]) == 3 and row["seconds"] == np.median(row["all_seconds"])
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["seconds"], rel=1e-3)
        assert row["flops_per_second"] == pytest.approx(row["flops"] / row["seconds"], rel=1e-3)
        assert row["of_limit"] == pytest.approx(row["limit_seconds"] / row["seconds"], rel=1e-3)
        assert row["compile_seconds"] > row["seconds"]
        assert row["peak_host_bytes"] > row["program_bytes"] > 0
        assert row["parameters"] == 50 * 16 * 2 + 16 * 16 * 4 + 2 * 16 * 32 + 3 * 16
    assert [row["tokens"] for row in rows] == [128, 1024]
    table = [line.split()[0] for line in lines if line.startswith(("w2 ", "sft_lora "))]
    assert table == ["w2", "sft_lora"]
    kept = tmp_path / "results" / "a-small-one"
    assert len((kept / "results.jsonl").read_text().splitlines()) == 2
    assert "| w2 |" in (kept / "README.md").read_text()
    assert (kept / "limit.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_every_workload_runs(tmp_path):
    result = bench(tmp_path, "--repeats=1", "--vocabulary=50", f"--loop={ROOT}/tests/tiny.py")
    assert result.returncode == 2 and "context" in result.stderr  # w4 is longer than 512
    result = bench(
        tmp_path, "--repeats=1", "--vocabulary=50", f"--loop={ROOT}/tests/tiny.py",
        "--config.model.max_length=1024",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    count = len(names.WORKLOADS)
    rows = {row["workload"]: row for row in map(json.loads, result.stdout.splitlines()[:count])}
    assert list(rows) == list(names.WORKLOADS)
    assert rows["dpo"]["parts"].keys() == {"reference", "step"}
    assert rows["loop"]["parts"].keys() >= {"generate", "train", "evaluate", "outside"}
    assert 0 < rows["loop"]["outside_share"] < 1
    assert rows["in_loop"]["of_alone"] > 0
    for start in (rows["start"], rows["start_one"]):
        assert start["parts"]["warm sampling"] < start["parts"]["sampling"] < start["seconds"]


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--workloads=w1,skore"], "did you mean 'score'?"),
        (["--workloads=w4"], "texts of"),  # 512 tokens is the context
        (["--output=results"], "--machine"),
        (["--config.model.wdth=3"], "did you mean 'width'?"),
        (["--vocabulary=1"], "--vocabulary"),
        (["--repeats=0"], "--repeats"),
    ],
)
def test_mistakes_end_with_a_sentence(tmp_path, flags, said):
    if flags == ["--workloads=w4"]:
        config = Config(model=ModelConfig(max_length=512), mesh=MeshConfig(data=1))
        with pytest.raises(UserError, match=said):
            workloads.draw("w4", make_subject(config, 50))
        return
    result = bench(tmp_path, *flags)
    assert result.returncode == 2
    assert said in result.stderr and "Traceback" not in result.stderr


def test_published_weights_bring_their_vocabulary():
    config = Config(roles={"policy": RoleConfig(path="somewhere")})
    with pytest.raises(UserError, match="has its own"):
        make_subject(config, 50)


def test_what_is_asked_for_is_written(make_params):
    shape = ModelConfig(layers=1, width=8, heads=1, head_width=8, mlp_width=8)
    subject = make_subject(Config(model=shape, mesh=MeshConfig(data=1)), 30)
    wanted = workloads.Asked([3, 5, 2], [1, 4, 2], samples=2, slots=2, buckets=(8,))
    drawing = workloads.Drawing("w4", subject, wanted, make_params(subject.weights))
    found = drawing(0)
    assert [[len(c.tokens) for c in some] for some in found] == [[1, 1], [4, 4], [2, 2]]
    assert found != drawing(1)


def test_a_loop_samples_what_the_sampler_alone_does():
    one = {"mesh.data": "1"}
    config = cli.load_config(f"{ROOT}/tests/tiny.py", one)
    found = inside.sampling_in_loop(config, repeats=2)  # which fails if their tokens differ
    assert found["tokens"] > 2 * 64
    stage, sampler = (np.array(found["parts"][name]) for name in ("stage", "sampler"))
    assert found["of_alone"] == pytest.approx(np.median(sampler / stage))
    chain = {"generate.chain": "answer", "model.alphabet": "ascii"}
    chained = cli.load_config(f"{ROOT}/tests/tiny.py", one | chain)
    with pytest.raises(UserError, match="chain"):
        inside.sampling_in_loop(chained, repeats=1)


def test_output_lengths_are_geometric_and_bounded():
    wanted = workloads.asked("w4", seed=0)
    assert wanted == workloads.asked("w4", seed=0) != workloads.asked("w4", seed=1)
    assert min(wanted.lengths) >= 16 and max(wanted.lengths) <= 512 and max(wanted.new) <= 256
    many = np.concatenate([workloads.asked("w4", seed).new for seed in range(50)])
    # Of a geometric variable cut at 256, the mean is 64 · (1 − (63/64)^256).
    assert np.mean(many) == pytest.approx(64 * (1 - (63 / 64) ** 256), rel=0.05)
    assert np.mean(many <= 44) == pytest.approx(0.5, abs=0.02)


def test_pairs_see_the_window_in_sliding_layers_alone():
    shape = Shape(SMALL, 7)
    assert shape.pairs(3) == (1 + 2 + 2) + (1 + 2 + 3)
    assert shape.pairs(1, before=9) == 2 + 10


def test_a_forward_pass_by_hand():
    shape = Shape(SMALL, 7)
    assert (shape.in_layers, shape.head) == (2 * LAYER, HEAD)
    found = forward(shape, tokens=3, pairs=11, predicted=1)
    # 2 FLOPs a number and token; a pair: 2 heads × 4 numbers × 2 products × 2 FLOPs.
    assert found.flops == 2 * (3 * 2 * LAYER + HEAD) + 11 * 32
    assert found.bytes == 4 * (2 * LAYER + HEAD)
    assert forward(shape, 3, 11, 0).bytes == 4 * 2 * LAYER


def test_sampling_by_hand():
    shape = Shape(SMALL, 7)
    prefill, *steps = sampling(shape, [3, 1], [2, 3], slots=2)
    assert prefill == forward(shape, 4, 11 + 2, 2)
    # One step behind 3 tokens, two behind 1 and 2: three in all, two at a time.
    assert len(steps) == 2
    seen = (2 + 4) + (2 + 2) + (2 + 3)
    flops = 2 * 3 * (2 * LAYER + HEAD) + 32 * seen
    assert sum(step.flops for step in steps) == pytest.approx(flops)
    cached = 2 * 1 * 4 * 4 * seen  # keys and values, one head of 4 numbers of 4 bytes
    assert sum(s.bytes for s in steps) == pytest.approx(2 * 4 * (2 * LAYER + HEAD) + cached)
    assert sampling(shape, [3], [1], slots=1) == [forward(shape, 3, 11, 1)]


def test_scoring_by_hand():
    shape = Shape(SMALL, 7)
    assert scoring(shape, 2, 3) == [forward(shape, 6, 22, 4)]
    behind = 2 * (shape.pairs(5) - shape.pairs(2))
    assert scoring(shape, 2, 3, prefix=2) == [
        forward(shape, 2, shape.pairs(2), 0),
        forward(shape, 6, behind, 4),
    ]


def test_training_by_hand():
    shape = Shape(SMALL, 7)
    products, attention = 2 * (6 * 2 * LAYER + 5 * HEAD), 2 * 11 * 32
    (full,) = training(shape, Texts(2, 3), 5)
    assert full == Cost(3 * (products + attention), 40 * (2 * LAYER + HEAD))
    factors = 2 * 4 * ((3 + 8) + (5 + 3))  # layers × rank × (inputs + outputs)
    (lora,) = training(shape, Texts(2, 3), 5, LoraConfig(rank=4, targets="query,down"))
    assert lora.flops == 2 * products + 3 * attention + 6 * 6 * factors
    assert lora.bytes == 4 * (2 * (2 * LAYER + HEAD) + 10 * factors)


def test_a_prompt_counts_once_for_all_that_is_behind_it():
    texts, shape = Texts(2, 3, branches=2, length=4), Shape(SMALL, 7)
    assert (texts.tokens, texts.predicted) == (2 * (3 + 8), 2 * (1 + 8))
    assert texts.pairs(shape) == 2 * (shape.pairs(3) + 2 * (shape.pairs(7) - shape.pairs(3)))
    alone = Texts(4, 7)
    assert alone.tokens - texts.tokens == 2 * 3
    assert alone.pairs(shape) - texts.pairs(shape) == 2 * shape.pairs(3)


def test_the_limit_is_the_longer_of_arithmetic_and_memory():
    rates = Rates(flops=10.0, bytes=2.0)
    assert Cost(20.0, 2.0).seconds(rates) == 2.0
    assert Cost(20.0, 6.0).seconds(rates) == 3.0
    assert costs.total([Cost(1.0, 2.0), Cost(3.0, 4.0)]) == Cost(4.0, 6.0)


def test_results_of_a_machine_are_replaced_by_workload(tmp_path):
    rates = dict(flops={"up": 1e9}, copied=1e9, read=2e9, devices=1, device="cpu", platform="cpu",
                 cores=2, jax="0")  # fmt: skip
    one = dict(workload="w2", model="m", dtype="float32", of_limit=0.5, tokens_per_second=10.0)
    report.write([one, one | {"workload": "w1"}], rates, tmp_path, "Two cores, 2026")
    place = report.write([one | {"seconds": 1.23456789}], rates, tmp_path, "Two cores, 2026")
    assert place == tmp_path / "two-cores-2026"
    rows = [json.loads(line) for line in (place / "results.jsonl").read_text().splitlines()]
    assert [row["workload"] for row in rows] == ["w1", "w2"]
    assert rows[1]["seconds"] == 1.2346
    assert "# Two cores, 2026" in (place / "README.md").read_text()


# -- other libraries -----------------------------------------------------------------------------

PEERS = "experiments.bench.peers"


@pytest.mark.parametrize("name", ["w1", "w2", "w3", "score", "sft", "sft_lora", "dpo", "grpo"])
def test_transformers_does_the_same_amount(name, make_params):
    pytest.importorskip("peft", reason="transformers is measured with torch and PEFT")
    from experiments.bench import torch_peer

    shape = ModelConfig(
        layers=1, width=16, heads=2, head_width=8, mlp_width=32, activation="swiglu", tied=True,
        positions="rope", max_length=512,
    )  # fmt: skip
    subject = make_subject(Config(model=shape, mesh=MeshConfig(data=1)), 50)
    work = torch_peer.make(name, subject)
    parts = work.run()
    ours = run.make(name, subject)
    assert work.tokens == ours.tokens
    assert parts.keys() == {"dpo": {"reference", "step"}, "grpo": {"sampling", "step"}}.get(
        name, set()
    )


def test_a_model_that_transformers_does_not_have_is_named():
    pytest.importorskip("peft", reason="transformers is measured with torch and PEFT")
    from experiments.bench import torch_peer

    with pytest.raises(UserError, match="no model family of transformers"):
        torch_peer.make("w2", make_subject(Config(mesh=MeshConfig(data=1)), 50))


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--peers=vllm"], "known: karploop"),
        (["--peers=karploop", "--workloads=skore"], "did you mean 'score'?"),
        (["--peers=karploop", "--workloads=loop"], "known: dpo"),
        (["--peers=karploop", "--output=results"], "--machine"),
    ],
)
def test_mistakes_with_peers_end_with_a_sentence(tmp_path, flags, said):
    result = bench(tmp_path, *flags, module=PEERS)
    assert result.returncode == 2
    assert said in result.stderr and "Traceback" not in result.stderr


def test_a_peer_that_is_not_installed_is_named():
    with pytest.raises(UserError, match="pip install jax no-such-thing"):
        libraries.Peer("", ("jax", "no-such-thing")).versions()


@pytest.mark.slow
def test_peers_are_told_beside_karploop(tmp_path):
    pytest.importorskip("peft", reason="transformers is measured with torch and PEFT")
    result = bench(
        tmp_path, "--workloads=grpo", "--repeats=1", "--vocabulary=50", "--machine=A small one",
        f"--output={tmp_path}/results", "--config.model.activation=swiglu",
        "--config.model.positions=rope", module=PEERS,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    ours, other = (json.loads(line) for line in result.stdout.splitlines()[:2])
    assert (ours["peer"], other["peer"]) == ("karploop", "transformers")
    assert other["times"] == pytest.approx(
        ours["tokens_per_second"] / other["tokens_per_second"], rel=1e-3
    )
    assert {"torch", "peft"} <= other["versions"].keys()
    kept = tmp_path / "results" / "a-small-one"
    assert len((kept / "peers.jsonl").read_text().splitlines()) == 2
    assert "| grpo | transformers |" in (kept / "peers.md").read_text()
