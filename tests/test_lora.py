"""Adapters: what they compute, how they are trained, how rounds chain, and PEFT's format."""

import functools
import itertools
import json
import signal
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from finished_runs import promotion
from flax import traverse_util
from processes import Fault, Loop, Outcome, finish
from safetensors import safe_open
from safetensors.numpy import load_file

from karploop import launch, loop, retention
from karploop.catalogue import read_catalogue
from karploop.config import LoraConfig, ObjectiveConfig, OptimizerConfig
from karploop.data.prompting import PlainPrompting
from karploop.errors import UserError
from karploop.lineage import trace_params
from karploop.machinery import prepare
from karploop.mesh import put
from karploop.models import peft as peft_format
from karploop.models.decoder import packed_mask
from karploop.models.lora import Lora, attach, from_pairs, merge, pairs
from karploop.models.weights import ADAPTER, FILE
from karploop.reporting.progress import Progress
from karploop.resolve import resolve
from karploop.retention import Policy
from karploop.stages import Stages
from karploop.store import Store
from karploop.training.objectives import make_objective
from karploop.training.packing import pack, stream, tokenize
from karploop.training.trainer import Trainer, measure

SUMS = [(f"{a}+{b}=", str(a + b)) for a, b in itertools.product(range(8), range(5, 12))]
# Biases, several norms and both kinds of feed-forward block: adapters must leave them alone.
SUPERVISED = make_objective(ObjectiveConfig(), longest=8)
GATED = dict(positions="rope", activation="swiglu", kv_heads=2, qkv_bias=True, out_bias=True)


@pytest.fixture(scope="module")
def batches(tokenizer):
    examples = tokenize(PlainPrompting(tokenizer), *zip(*SUMS, strict=True), row_length=24)
    order = stream(np.ones(len(examples)), np.random.default_rng(0))
    return [batch for batch, _ in itertools.islice(pack([(e,) for e in examples], order, 8, 24), 8)]


def make_lora(weights, rank=3, **fields):
    return Lora(weights.boxed, weights.mesh, LoraConfig(rank=rank, **fields))


def random_adapter(lora, seed=0, size=0.3):
    """Both factors far from zero, the same on every mesh."""
    rng = np.random.default_rng(seed)

    def draw(x, sharding):
        return put((size * rng.normal(size=x.shape)).astype(x.dtype), sharding)

    return jax.tree.map(draw, lora.abstract, lora.shardings)


def logits(model, variables, batch):
    mask = packed_mask(jnp.asarray(batch.segments_BxL))
    hidden, _ = model.apply(variables, batch.tokens_BxL, mask, batch.positions_BxL)
    return model.apply(variables, hidden, method="logits")


def host(tree):
    return jax.tree.map(np.asarray, tree)


def stacked(tree, layers):
    """A tree of unrolled layers as one of scanned layers."""
    flat = traverse_util.flatten_dict(tree["params"])
    joined = {p: np.asarray(x) for p, x in flat.items() if not p[0].startswith("layers_")}
    for path in flat:
        if path[0] == "layers_0":
            of_layers = [np.asarray(flat[f"layers_{i}", *path[1:]]) for i in range(layers)]
            joined["layers", *path[1:]] = np.stack(of_layers)
    return {"params": traverse_util.unflatten_dict(joined)}


# -- what an adapter is ------------------------------------------------------------------------


@pytest.mark.parametrize("scan", [False, True])
def test_factors_fit_their_matrices_and_lie_where_they_do(make_weights, scan):
    weights = make_weights(data=2, fsdp=2, tensor=2, scan=scan, **GATED)
    lora = make_lora(weights)
    matrices = traverse_util.flatten_dict(weights.abstract["params"])
    spots = traverse_util.flatten_dict(weights.shardings["params"])
    shapes, shardings = pairs(lora.abstract), pairs(lora.shardings)
    assert {path[-1] for path in shapes} == {"query", "key", "value", "out", "up", "gate", "down"}
    assert len(shapes) == 7 * (1 if scan else 2)
    for path, (a, b) in shapes.items():
        lead = int(scan)
        assert a.shape[:-1] + b.shape[lead + 1 :] == matrices[path].shape
        assert a.shape[-1] == b.shape[lead] == 3 and a.dtype == b.dtype == jnp.float32
        a_spec, b_spec = (sharding.spec for sharding in shardings[path])
        assert (*a_spec[:-1], *b_spec[lead + 1 :]) == tuple(spots[path].spec)
        assert a_spec[-1] is None and b_spec[lead] is None


def test_targets_choose_matrices(make_weights):
    weights = make_weights()
    lora = make_lora(weights, targets="value, query")
    assert {path[-1] for path in pairs(lora.abstract)} == {"query", "value"}
    assert lora.matrices == ("query", "value")
    assert "gate" not in make_lora(weights).matrices, "a plain feed-forward block has none"
    with pytest.raises(UserError, match="no matrix gate to adapt; it has query, key"):
        make_lora(weights, targets="gate,up")
    with pytest.raises(UserError, match="rank of at least 1"):
        make_lora(weights, rank=0)


@pytest.mark.parametrize(("alpha", "scale"), [(0.0, 2.0), (3.0, 0.75)])
def test_scale_is_alpha_over_rank_and_two_by_default(alpha, scale):
    assert LoraConfig(rank=4, alpha=alpha).scale == scale


def test_initial_factors(make_weights):
    """b is zero; a has a standard deviation of 1/sqrt(fan in), by name and layer alone."""
    weights, scanned = make_weights(width=64), make_weights(width=64, scan=True)
    key = jax.random.key(3)
    lora = make_lora(weights, rank=32)
    adapter = lora.init(key)
    for path, (a, b) in pairs(adapter).items():
        fan_in = {"down": 32, "out": 32}.get(path[-1], 64)
        assert np.std(a) * fan_in**0.5 == pytest.approx(1.0, rel=0.1), path
        assert not np.any(b)
    draws = [np.asarray(a).ravel()[:8] for a, _ in pairs(adapter).values()]
    assert len(np.unique(np.round(draws, 5), axis=0)) == len(draws)
    jax.tree.map(
        np.testing.assert_array_equal,
        host(make_lora(scanned, rank=32).init(key)),
        stacked(adapter, layers=2),
    )
    fewer = pairs(make_lora(weights, rank=32, targets="out").init(key))
    for path, (a, _) in fewer.items():
        np.testing.assert_array_equal(a, pairs(adapter)[path][0])


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_fresh_adapter_changes_no_bit(make_weights, make_params, batches, scan, dtype):
    weights = make_weights(scan=scan, dtype=dtype, **GATED)
    params, lora = make_params(weights), make_lora(weights)
    fresh = lora.init(jax.random.key(0))
    forward = jax.jit(functools.partial(logits, weights.model))
    before = forward(params, batches[0])
    after = forward(attach(params, fresh, lora.scale), batches[0])
    np.testing.assert_array_equal(before, after)
    merged = weights.merge(params, fresh, lora.scale)
    jax.tree.map(np.testing.assert_array_equal, merged, params)


@pytest.mark.parametrize("scan", [False, True])
def test_attached_equals_merged(make_weights, make_params, batches, scan):
    """Loss and gradient of every factor, against those through the sum of matrices."""
    weights = make_weights(scan=scan, remat="dots" if scan else "none", **GATED)
    params, lora = make_params(weights), make_lora(weights)
    adapter = random_adapter(lora)

    def loss(assemble, adapter):
        return measure(
            weights.model, SUPERVISED, assemble(params, adapter, lora.scale), batches[0]
        )[0]

    one, other = (
        jax.jit(jax.value_and_grad(functools.partial(loss, assemble)))(adapter)
        for assemble in (attach, merge)
    )
    fresh = jax.jit(functools.partial(loss, attach))(lora.init(jax.random.key(0)))
    assert abs(float(one[0]) - float(fresh)) > 0.1, "an adapter that does nothing would agree, too"
    assert float(one[0]) == pytest.approx(float(other[0]), rel=1e-5)
    for theirs, ours in zip(jax.tree.leaves(other[1]), jax.tree.leaves(one[1]), strict=True):
        assert np.any(theirs)
        # On some CPUs the two orders of float32 sums are apart by a little more than 1e-4.
        np.testing.assert_allclose(ours, theirs, atol=2e-4 * np.abs(theirs).max())


def test_gradients_by_finite_differences(make_weights, make_params, batches):
    """Along a random direction in every factor at once."""
    weights = make_weights(layers=1, **GATED)
    params, lora = make_params(weights), make_lora(weights)
    adapter, direction = random_adapter(lora), random_adapter(lora, seed=1, size=1.0)

    @jax.jit
    def loss(adapter):
        return measure(weights.model, SUPERVISED, attach(params, adapter, lora.scale), batches[0])[
            0
        ]

    def at(step):
        return float(loss(jax.tree.map(lambda x, d: x + step * d, adapter, direction)))

    gradient = jax.jit(jax.grad(loss))(adapter)
    products = jax.tree.map(lambda g, d: float(jnp.vdot(g, d)), gradient, direction)
    slope = sum(jax.tree.leaves(products))
    assert abs(slope) > 0.1
    assert (at(1e-3) - at(-1e-3)) / 2e-3 == pytest.approx(slope, rel=2e-2)


# -- training ----------------------------------------------------------------------------------


def train(trainer, adapter, params, batches):
    state, losses = trainer.start(adapter), []
    for batch in batches:
        state, metrics = trainer.step(state, batch, 0.01, params)
        losses.append(float(metrics.loss))
    return state, losses


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_only_the_adapter_moves(make_weights, make_params, batches, name):
    weights = make_weights(layers=1)
    trainer = Trainer(weights, OptimizerConfig(name=name), LoraConfig(rank=3))
    params = make_params(weights)
    before, fresh = host(params), trainer.parts.lora.init(jax.random.key(0))
    start = host(fresh)
    state, losses = train(trainer, fresh, params, batches)
    assert np.mean(losses[-2:]) < 0.9 * losses[0]
    assert not any(x.is_deleted() for x in jax.tree.leaves(params)), "the base is shared"
    jax.tree.map(np.testing.assert_array_equal, params, before)
    assert jax.tree.structure(state.params) == jax.tree.structure(start)
    for old, new in zip(jax.tree.leaves(start), jax.tree.leaves(state.params), strict=True):
        assert np.any(old != np.asarray(new))
    sizes = [x.size for x in jax.tree.leaves(state.opt_state)]
    assert sum(sizes) < 2.1 * sum(x.size for x in jax.tree.leaves(start)), "moments of it alone"


def test_the_base_gets_no_gradient(make_weights, make_params, batches):
    """No product of the step has the shape of a matrix's gradient, which is why it is cheap."""
    weights = make_weights(layers=1, mlp_width=40)
    lora, params = make_lora(weights), make_params(weights)

    def loss(assemble, adapter):
        return measure(
            weights.model, SUPERVISED, assemble(params, adapter, lora.scale), batches[0]
        )[0]

    def products(assemble):
        step = jax.jit(jax.grad(functools.partial(loss, assemble)))
        text = step.lower(random_adapter(lora)).as_text()
        made = [line for line in text.splitlines() if "dot_general" in line]
        return sum(line.endswith(("-> tensor<16x40xf32>", "-> tensor<40x16xf32>")) for line in made)

    assert products(merge) > 0 and products(attach) == 0


@pytest.mark.parametrize("scan", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_eight_devices_train_as_one(make_weights, make_params, batches, scan):
    """And scanned as unrolled: losses, adapter and shardings after some steps."""
    config, lora_config = OptimizerConfig(), LoraConfig(rank=3)
    one = make_weights(**GATED)
    params = make_params(one)
    trainer = Trainer(one, config, lora_config)
    expected, losses = train(trainer, random_adapter(trainer.parts.lora), params, batches[:4])
    adapter = host(random_adapter(trainer.parts.lora))
    if scan:
        params, adapter = stacked(params, layers=2), stacked(adapter, layers=2)
        expected = expected._replace(params=stacked(expected.params, layers=2))
    many = make_weights(data=2, fsdp=2, tensor=2, scan=scan, **GATED)
    trainer = Trainer(many, config, lora_config)
    place = functools.partial(jax.tree.map, lambda x, s: put(np.asarray(x), s))
    state, others = train(
        trainer,
        place(adapter, trainer.parts.shardings),
        place(params, many.shardings),
        batches[:4],
    )
    assert others == pytest.approx(losses, rel=1e-4)
    for theirs, ours, sharding in zip(
        jax.tree.leaves(expected.params),
        jax.tree.leaves(state.params),
        jax.tree.leaves(trainer.shardings.params),
        strict=True,
    ):
        # Adam's step is as long as the rate wherever a gradient is near zero, whatever its sign.
        assert np.mean(np.abs(np.asarray(ours) - np.asarray(theirs)) > 1e-4) < 0.01
        assert ours.sharding.is_equivalent_to(sharding, ours.ndim)


# -- stages ------------------------------------------------------------------------------------


@functools.cache
def compiled():
    settings = tiny.get_config().to_dict()
    settings["train"] = settings["train"] | {"lora": {"rank": 2}}
    return prepare(resolve(settings | {"mesh": {"data": 1}}))


def run(workdir):
    """Runs or resumes two rounds of adapters in this process, which keeps its signal handlers."""
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    machinery = compiled()
    machinery.weights._live.clear()  # a process of its own would have nothing on its devices
    try:
        with promotion(), mock.patch.object(launch, "prepare", lambda config: machinery):
            assert launch.launch(machinery.config, str(workdir), "run") == 0
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The workdir of a finished run; not to be changed."""
    workdir = tmp_path_factory.mktemp("lora")
    run(workdir)
    return workdir


def summary(workdir):
    found = json.loads((workdir / "runs/run/summary.json").read_text())
    rounds = {entry["round"]: entry["stages"] for entry in found["rounds"]}
    return found, rounds


def test_rounds_write_adapters_that_continue_on_one_base(finished):
    found, rounds = summary(finished)
    base = finished / "store/warmup" / rounds[-1]["warmup"] / FILE
    folders = [finished / "store/train" / rounds[i]["train"] for i in (0, 1)]
    adapters = []
    for folder in folders:
        assert not (folder / FILE).exists(), "no round writes the weights again"
        assert (folder / ADAPTER).stat().st_size < base.stat().st_size
        with safe_open(folder / ADAPTER, framework="numpy") as file:
            header = json.loads(file.metadata()["karploop"])
        manifest = json.loads((base.parent / "manifest.json").read_text())
        assert header == {
            "rank": 2,
            "alpha": 4.0,
            "targets": "query,key,value,out,up,down",
            "params_sha256": manifest["files"][FILE]["sha256"],
        }
        adapters.append(load_file(folder / ADAPTER))
    first, second = adapters
    moved = [np.abs(second[n] - first[n]).mean() for n in first if n.endswith("/a")]
    drawn = [np.abs(first[n]).mean() for n in first if n.endswith("/a")]
    assert 0 < np.mean(moved) < 0.3 * np.mean(drawn), "round 1 goes on where round 0 ended"
    manifest = json.loads((folders[1] / "manifest.json").read_text())
    assert found["params_sha256"] == manifest["files"][ADAPTER]["sha256"]


def test_an_adapter_is_loaded_merged_with_its_base(finished):
    _, rounds = summary(finished)
    machinery, found = compiled(), []
    stages = Stages(Store(str(finished)), Progress(quiet=True))
    loop.run(machinery, stages, found.append)
    artifact = found[-1].stages["train"]
    assert artifact.manifest.key == rounds[1]["train"]
    weights = machinery.weights
    merged = weights.load(artifact)
    assert weights.load(artifact) is merged, "shared by the stages that sample from it"
    base = load_file(finished / "store/warmup" / rounds[-1]["warmup"] / FILE)
    adapter = load_file(finished / "store/train" / rounds[1]["train"] / ADAPTER)
    for path, leaf in traverse_util.flatten_dict(merged, sep="/").items():
        expected = base[path]
        if f"{path}/a" in adapter:
            expected = expected + 2.0 * np.tensordot(adapter[f"{path}/a"], adapter[f"{path}/b"], 1)
            assert not np.array_equal(leaf, base[path])
        np.testing.assert_allclose(leaf, expected, atol=1e-6)
    shared = weights.load_base(artifact)
    assert weights.load_base(artifact) is shared and len(weights._live) == 1
    with pytest.raises(UserError, match="has rank 2, alpha 4.0 and the matrices query,key"):
        weights.load_adapter(artifact, make_lora(weights, rank=2, alpha=1.0))
    jax.tree.map(np.testing.assert_array_equal, weights.take(artifact), merged)


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bits(tmp_path):
    """Killed between two checkpoints of the first adapter, and at the commit of the second."""
    adapters = "--config.train.lora.rank=2"
    finish(tmp_path / "reference/w", adapters)
    workdir = tmp_path / "killed/w"
    for where in (r"partial/train/\S+/checkpoints/9", r"^os.rename tmp/\S+ store/train/"):
        assert Loop(workdir, adapters, fault=Fault("kill", where)).wait() == -signal.SIGKILL
    assert list(workdir.glob("partial/train/*/checkpoints/6"))
    finish(workdir, adapters)
    Outcome.of(tmp_path / "reference/w").check(Outcome.of(workdir))
    assert len(list(workdir.glob(f"store/train/*/{ADAPTER}"))) == 2


def test_collection_keeps_what_lies_below_a_kept_adapter(finished):
    _, rounds = summary(finished)
    catalogue = read_catalogue(Store(str(finished), print))
    plan = retention.plan(catalogue, Policy(last=1, best=0), set())
    assert not plan.collect, "the base is all that is large, and the last round needs it"
    plan = retention.plan(catalogue, Policy(last=0, best=0), set())
    assert plan.collect == {("warmup", rounds[-1]["warmup"]): [FILE]}


def test_lineage_of_an_adapter_leads_to_its_base(finished):
    found, rounds = summary(finished)
    trace = trace_params(read_catalogue(Store(str(finished), print)), found["params_sha256"])
    assert [link["key"] for link in trace["chain"]] == [
        rounds[1]["train"], rounds[0]["train"], rounds[-1]["warmup"]
    ]  # fmt: skip


# -- PEFT --------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["llama3", "gemma3"])
def checkpoint(request, tmp_path_factory):
    """(makes the torch model anew, the folder that it was saved to)."""
    parity, _ = pytest.importorskip("test_parity"), pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp(request.param)
    parity.make_reference(request.param).save_pretrained(folder)
    return functools.partial(parity.make_reference, request.param), folder


def their_logits(model, batch):
    import test_parity as parity

    with parity.torch.no_grad():
        return parity.their_logits(model.eval(), *batch).numpy()


@pytest.mark.parametrize("scan", [False, True])
def test_peft_loads_what_is_exported(checkpoint, tmp_path, scan):
    import peft
    import test_parity as parity

    make_reference, folder = checkpoint
    weights, params = parity.imported(folder, scan=scan)
    lora = make_lora(weights, rank=3, alpha=4.5, targets="query,value,out,gate,down")
    adapter = random_adapter(lora)
    peft_format.save_peft(tmp_path, adapter, lora, weights, base=str(folder))
    batch = parity.make_batch("right")
    real = batch[1] > 0
    reference = make_reference()
    plain = their_logits(reference, batch)
    loaded = peft.PeftModel.from_pretrained(reference, tmp_path)
    theirs = their_logits(loaded, batch)
    assert np.abs(theirs - plain)[real].max() > 0.1 * np.abs(plain).max()
    for assemble in (attach, merge):
        ours = parity.our_logits(weights, assemble(params, adapter, lora.scale), *batch)
        parity.assert_close(ours[real], theirs[real], 1e-4)

    parity.save_checkpoint(tmp_path / "merged", weights.merge(params, adapter, lora.scale), weights)
    merged = {k: v.numpy() for k, v in loaded.merge_and_unload().state_dict().items()}
    written = parity.Folder(tmp_path / "merged")
    for name in written.names():
        np.testing.assert_allclose(written.read(name), merged[name], atol=1e-5)

    again, kind = peft_format.load_peft(tmp_path, weights)
    assert kind.scale == lora.scale and kind.matrices == lora.matrices
    jax.tree.map(np.testing.assert_array_equal, again, adapter)


@pytest.mark.parametrize(("rslora", "scan"), [(False, True), (True, False)])
def test_an_adapter_of_peft_is_imported(checkpoint, tmp_path, rslora, scan):
    import peft
    import test_parity as parity

    make_reference, folder = checkpoint
    settings = dict(r=4, lora_alpha=6, target_modules=["k_proj", "up_proj"], use_rslora=rslora)
    model = peft.get_peft_model(
        make_reference(), peft.LoraConfig(task_type="CAUSAL_LM", **settings)
    )
    with parity.torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.3 * parity.torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    weights, params = parity.imported(folder, scan=scan)
    adapter, lora = peft_format.load_peft(tmp_path, weights)
    assert lora.matrices == ("key", "up")
    assert lora.scale == pytest.approx(6 / (2 if rslora else 4))
    batch = parity.make_batch("left")
    real = batch[1] > 0
    ours = parity.our_logits(weights, attach(params, adapter, lora.scale), *batch)
    parity.assert_close(ours[real], their_logits(model, batch)[real], 1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(peft_type="IA3"), "is a IA3: karploop knows LORA"),
        (dict(use_dora=True), "uses PEFT's use_dora"),
        (dict(bias="all"), "uses PEFT's bias"),
        (dict(init_lora_weights="pissa"), "init_lora_weights=pissa"),
        (dict(r=None), "has no 'r' and 'lora_alpha'"),
        (dict(r=5), "has the shape .3, 16., this model asks for .5, 16."),
    ],
)
def test_an_adapter_that_means_something_else_is_refused(make_weights, tmp_path, change, message):
    weights = make_weights(**GATED)
    lora = make_lora(weights)
    peft_format.save_peft(tmp_path, random_adapter(lora), lora, weights)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message):
        peft_format.load_peft(tmp_path, weights)


def test_an_adapter_of_another_model_is_refused(make_weights, tmp_path):
    weights = make_weights(**GATED)
    lora = make_lora(weights)
    peft_format.save_peft(tmp_path, random_adapter(lora), lora, weights)
    with pytest.raises(UserError, match="lacks 14 of 42 tensors.*layers.2"):
        peft_format.load_peft(tmp_path, make_weights(layers=3, **GATED))
    with pytest.raises(UserError, match="has 14 tensors that this model has no place for"):
        peft_format.load_peft(tmp_path, make_weights(layers=1, **GATED))
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="no '.*adapter_model.safetensors'"):
        peft_format.load_peft(tmp_path, weights)
    with pytest.raises(UserError, match="no '.*adapter_config.json'"):
        peft_format.load_peft(tmp_path / "nowhere", weights)


def test_pairs_and_back(make_weights):
    adapter = random_adapter(make_lora(make_weights()))
    jax.tree.map(np.testing.assert_array_equal, from_pairs(pairs(adapter)), adapter)
