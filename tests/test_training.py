"""Training: the loss, what it learns from, how examples are packed, the step, and divergence."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from hypothesis import given
from hypothesis import strategies as st

from karploop.bindings import Bindings
from karploop.config import ObjectiveConfig, OptimizerConfig
from karploop.data.prompting import PlainPrompting
from karploop.errors import UserError
from karploop.machinery import prepare
from karploop.models.decoder import packed_mask
from karploop.reporting.progress import Progress
from karploop.resolve import resolve
from karploop.stages import Stages, Stopped
from karploop.store import Store
from karploop.training.checkpoints import Checkpoints, RemoteCheckpoints, open_checkpoints
from karploop.training.length import Length
from karploop.training.objectives import make_objective
from karploop.training.optimizer import learning_rate
from karploop.training.packing import Batch, Tokenized, pack, stream, tokenize
from karploop.training.train import Diverged
from karploop.training.trainer import Trainer, measure

SUMS = [(f"{a}+{b}=", str(a + b)) for a, b in itertools.product(range(8), range(5, 12))]


@pytest.fixture(scope="module")
def sums(tokenizer):
    texts = tokenize(PlainPrompting(tokenizer), *zip(*SUMS, strict=True), row_length=24)
    return [(text,) for text in texts]


def batches_of(examples, rows=4, row_length=24, seed=0):
    order = stream(np.ones(len(examples)), np.random.default_rng(seed))
    return (batch for batch, _ in pack(examples, order, rows, row_length))


@pytest.fixture(scope="module")
def make_trainer(make_weights):
    """make_trainer(optimiser): of a one-layer model on one device."""
    weights = make_weights(layers=1, positions="rope", activation="swiglu")
    return functools.cache(lambda name: (weights, Trainer(weights, OptimizerConfig(name=name))))


def train_steps(trainer, params, examples, steps):
    """Losses of `steps` steps, and the state after them."""
    state, losses = trainer.start(params), []
    for batch in itertools.islice(batches_of(examples, rows=8), steps):
        state, metrics = trainer.step(state, batch, 0.01)
        losses.append(float(metrics.loss))
    return losses, state


# -- the loss ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lossy(make_weights, make_params, sums):
    """A model, its parameters, a packed batch, and the jitted loss with its gradient."""
    weights = make_weights(layers=1)
    supervised = make_objective(ObjectiveConfig(), longest=8)
    loss = functools.partial(measure, weights.model, supervised)
    loss_of = jax.jit(jax.value_and_grad(loss, has_aux=True))
    return weights.model, make_params(weights), next(batches_of(sums)), loss_of


def test_loss_and_accuracy_equal_those_computed_by_hand(lossy):
    model, params, batch, loss_of = lossy

    @jax.jit
    def forward(params, batch):
        mask_BxLxL = packed_mask(batch.segments_BxL)
        hidden_BxLxE, _ = model.apply(params, batch.tokens_BxL, mask_BxLxL, batch.positions_BxL)
        return model.apply(params, hidden_BxLxE, method="logits")

    logits_BxLxV = np.asarray(forward(params, batch), np.float64)
    losses, right = [], []
    for row, column in zip(*np.nonzero(batch.weights_BxL), strict=True):
        logits_V, target = logits_BxLxV[row, column], batch.targets_BxL[row, column]
        losses.append(np.log(np.sum(np.exp(logits_V))) - logits_V[target])
        right.append(np.argmax(logits_V) == target)
    (loss, (accuracy, _)), _ = loss_of(params, batch)
    assert float(loss) == pytest.approx(np.mean(losses), rel=1e-5)
    assert float(accuracy) == pytest.approx(np.mean(right))
    assert 0 < np.mean(right) < 1


def test_only_completions_are_learnt(lossy):
    """Other targets in prompts and padding change no loss and no gradient; in completions both."""
    _, params, batch, loss_of = lossy
    learnt_BxL = batch.weights_BxL > 0
    other_BxL = (batch.targets_BxL + 1) % 16
    elsewhere = batch._replace(targets_BxL=np.where(learnt_BxL, batch.targets_BxL, other_BxL))
    there = batch._replace(targets_BxL=np.where(learnt_BxL, other_BxL, batch.targets_BxL))
    (loss, _), grads = loss_of(params, batch)
    assert loss_of(params, elsewhere)[0][0] == loss
    jax.tree.map(np.testing.assert_array_equal, loss_of(params, elsewhere)[1], grads)
    assert loss_of(params, there)[0][0] != loss


def test_a_batch_without_targets_gives_zero_not_nan(lossy):
    _, params, batch, loss_of = lossy
    (loss, _), grads = loss_of(params, batch._replace(weights_BxL=0 * batch.weights_BxL))
    assert loss == 0
    assert not any(np.any(np.asarray(g)) for g in jax.tree.leaves(grads))


# -- packing -----------------------------------------------------------------------------------


def test_targets_are_the_completion_and_its_stop_token(tokenizer):
    [example] = tokenize(PlainPrompting(tokenizer), ["12+3="], ["15"], row_length=16)
    batch, taken = next(pack([(example,)], iter([0] * 3), rows=1, row_length=16))
    assert taken == [0, 0]
    learnt = batch.targets_BxL[batch.weights_BxL > 0].tolist()
    assert learnt == [*tokenizer.encode("15"), tokenizer.eos_id] * 2
    assert batch.tokens_BxL[0, :8].tolist() == [tokenizer.bos_id, *tokenizer.encode("12+3=15")]


def test_an_example_that_no_row_holds_is_refused(tokenizer):
    assert len(tokenize(PlainPrompting(tokenizer), ["12+3="], ["15"], row_length=8)) == 1
    with pytest.raises(UserError, match="takes 8 tokens, 'row_length' is 7.*'12\\+3=15'"):
        tokenize(PlainPrompting(tokenizer), ["12+3="], ["15"], row_length=7)


@st.composite
def examples_to_pack(draw):
    """Examples of distinct tokens, with a row length that holds each of them."""
    lengths = draw(st.lists(st.integers(2, 9), min_size=1, max_size=12))
    examples = []
    for number, length in enumerate(lengths):
        tokens = np.arange(length, dtype=np.int32) + 100 * (number + 1)
        examples.append(Tokenized(tokens, draw(st.integers(1, length - 1))))
    return examples, draw(st.integers(8, 20)), draw(st.integers(1, 4))


@given(examples_to_pack(), st.integers(0, 99))
def test_packing_places_every_example_whole_and_in_order(case, seed):
    examples, row_length, rows = case
    order = list(itertools.islice(stream(np.ones(len(examples)), np.random.default_rng(seed)), 300))
    placed = []
    for batch, taken in itertools.islice(
        pack([(e,) for e in examples], iter(order), rows, row_length), 3
    ):
        assert all(array.shape == (rows, row_length) for array in jax.tree.leaves(batch))
        found = [example for row in range(rows) for example in unpack(batch, row, examples)]
        assert sorted(found) == sorted(taken), "what is in the rows is what was taken, no more"
        free = [row_length - int((batch.segments_BxL[row] > 0).sum()) for row in range(rows)]
        placed += taken
        waiting = len(examples[order[len(placed)]].tokens) - 1
        assert waiting > max(free), "a batch ends only when the next example fits nowhere"
    assert placed == order[: len(placed)], "nothing is skipped"


def unpack(batch: Batch, row: int, examples) -> list[int]:
    """The examples of a row, after checking that each is whole and that the rest is padding."""
    start, found = 0, []
    for segment in range(1, batch.segments_BxL[row].max(initial=0) + 1):
        number = int(batch.tokens_BxL[row, start]) // 100 - 1
        example = examples[number]
        stop = start + len(example.tokens) - 1
        here = (row, slice(start, stop))
        assert (batch.segments_BxL[here] == segment).all()
        assert batch.tokens_BxL[here].tolist() == example.tokens[:-1].tolist()
        assert batch.targets_BxL[here].tolist() == example.tokens[1:].tolist()
        assert batch.positions_BxL[here].tolist() == list(range(stop - start))
        learnt = batch.targets_BxL[here][batch.weights_BxL[here] > 0].tolist()
        assert learnt == example.tokens[example.prompt_length :].tolist()
        found.append(number)
        start = stop
    assert not any(array[row, start:].any() for array in jax.tree.leaves(batch))
    return found


@given(st.integers(1, 40), st.floats(1e-6, 1e6), st.integers(0, 99))
def test_equal_weights_give_plain_epochs(count, weight, seed):
    drawn = stream(np.full(count, weight), np.random.default_rng(seed))
    for _ in range(3):
        assert sorted(itertools.islice(drawn, count)) == list(range(count))


@given(st.lists(st.floats(0.0, 10.0), min_size=1, max_size=8), st.integers(0, 99))
def test_weights_are_shares_of_the_stream(weights, seed):
    """After k passes an example has come between floor(kc) − k and … of its expectation kc."""
    weights_N = np.array(weights)
    if weights_N.sum() == 0:
        weights_N[0] = 1.0
    expected_N = 400 * weights_N / weights_N.sum()
    drawn = stream(weights_N, np.random.default_rng(seed))
    counts_N = np.bincount(list(itertools.islice(drawn, 400)), minlength=len(weights_N))
    assert (counts_N[weights_N == 0] == 0).all()
    # Each pass rounds an expectation up or down at random: a standard deviation of at most a half.
    passes = 400 / len(weights_N)
    assert np.abs(counts_N - expected_N).max() < 6 * np.sqrt(passes) / 2 + 2 * len(weights_N) + 2


# -- the step ----------------------------------------------------------------------------------

GOLDEN = {
    "adamw": [6.65332, 5.02602, 4.18081, 3.74, 2.97665, 2.78803],
    "muon": [6.65332, 4.76212, 3.72563, 2.85161, 2.11324, 2.16176],
}


@pytest.mark.parametrize("name", GOLDEN)
def test_losses_of_a_tiny_run(make_trainer, make_params, sums, name):
    """Golden values, and that the optimiser lowers the loss at all."""
    weights, trainer = make_trainer(name)
    losses, _ = train_steps(trainer, make_params(weights), sums, 12)
    assert np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3])
    assert losses[:6] == pytest.approx(GOLDEN[name], rel=1e-3), (
        "the numbers of training have changed. If you meant that (another loss, optimiser, packing "
        f"or architecture), say so in the commit and put these here: {np.round(losses[:6], 5)}. If "
        "not, it is a bug"
    )


def test_muon_orthogonalises_each_matrix_of_a_layer(make_trainer, make_params, sums):
    """All singular values of an update are alike, where input and output axes are told right."""
    weights, trainer = make_trainer("muon")
    params = make_params(weights)
    before = jax.tree.map(np.asarray, params)["params"]
    _, state = train_steps(trainer, params, sums, 1)
    update = jax.tree.map(lambda new, old: np.asarray(new) - old, state.params["params"], before)
    matrices = {
        "value": update["layers_0"]["attention"]["value"].reshape(16, 32),
        "out": update["layers_0"]["attention"]["out"].reshape(32, 16),
        "up": update["layers_0"]["mlp"]["up"],
        "down": update["layers_0"]["mlp"]["down"],
    }
    for name, update_IxO in matrices.items():
        # Of the first eleven: there are no more different tokens here for a layer to read.
        singular = np.linalg.svd(update_IxO, compute_uv=False)[:11]
        stretch = max(1.0, update_IxO.shape[1] / update_IxO.shape[0]) ** 0.5
        np.testing.assert_allclose(singular, 7 * 0.01 * stretch, rtol=0.4, err_msg=name)
    for name in ("embedding", "head"):  # Nesterov Adam's first step is as long everywhere
        moved = np.abs(update[name])[np.abs(update[name]) > 1e-4]
        np.testing.assert_allclose(moved, 0.01 * (1 + 0.9 / 1.9), rtol=0.05, err_msg=name)


def test_adamw_decays_matrices_only(make_trainer, make_params, sums):
    """With a batch that has no targets, a weight decay of 0.01 is all that an update does."""
    weights, trainer = make_trainer("adamw")
    params = make_params(weights)
    before = jax.tree.map(np.asarray, params)["params"]
    batch = next(batches_of(sums, rows=8))
    nothing = batch._replace(weights_BxL=0 * batch.weights_BxL)
    state, _ = trainer.step(trainer.start(params), nothing, 5.0)
    after = state.params["params"]
    np.testing.assert_allclose(after["head"], before["head"] * 0.95, rtol=1e-5)
    np.testing.assert_allclose(
        after["layers_0"]["mlp"]["up"], before["layers_0"]["mlp"]["up"] * 0.95, rtol=1e-5
    )
    np.testing.assert_array_equal(after["final_norm"]["scale"], before["final_norm"]["scale"])


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_shardings_survive_a_step_which_donates_its_state(make_weights, make_params, sums, name):
    weights = make_weights(data=2, fsdp=2, tensor=2, layers=1)
    trainer = Trainer(weights, OptimizerConfig(name=name))
    state = trainer.start(make_params(weights))
    new, _ = trainer.step(state, next(batches_of(sums, rows=8)), 0.01)
    assert all(x.is_deleted() for x in jax.tree.leaves(state)), "old and new would both fill memory"
    jax.tree.map(lambda x, s: _assert_lies(x, s), new, trainer.shardings)
    moments = [
        x
        for path, x in jax.tree_util.tree_leaves_with_path(new.opt_state)
        if jax.tree_util.keystr(path).endswith("['layers_0']['mlp']['up']")
    ]
    assert moments, "the optimiser keeps a moment of every matrix"
    for moment in moments:
        _assert_lies(moment, new.params["params"]["layers_0"]["mlp"]["up"].sharding)
        assert moment.addressable_shards[0].data.size == moment.size // 4


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_an_optimisers_state_is_made_where_it_stays_and_is_small(make_weights, name):
    """Two moments a parameter at most, split as the parameters are from the first moment on.

    By the compiled program that makes it, which needs no device large enough to hold it.
    """
    weights = make_weights(data=2, fsdp=2, tensor=2, layers=1, width=64, mlp_width=256)
    trainer = Trainer(weights, OptimizerConfig(name=name))
    made = trainer._init_opt.lower(weights_on_mesh(weights)).compile()

    def here(tree) -> int:
        """Bytes on one device."""
        return sum(
            x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape))
            for x in jax.tree.leaves(tree)
        )

    params = here(weights_on_mesh(weights))
    memory = made.memory_analysis()
    assert here(trainer.abstract.opt_state) <= 2 * params + 1024
    assert memory.output_size_in_bytes <= 2 * params + 4096
    assert memory.temp_size_in_bytes <= 4096, "nothing is made whole and then split"


def weights_on_mesh(weights):
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        weights.abstract,
        weights.shardings,
    )


def _assert_lies(x, sharding):
    assert x.sharding.is_equivalent_to(sharding, x.ndim), (x.sharding, sharding)


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 0.1), (4, 0.5), (9, 1.0), (50, 1.0), (60, 0.84), (75, 0.6), (99, 0.2 + 0.8 / 50)],
)
def test_schedule(step, expected):
    """Up over the first tenth, flat, and down over the last half to a fifth of the peak."""
    config = OptimizerConfig(learning_rate=3.0, warmup=0.1, decay=0.5, final=0.2)
    assert learning_rate(config, step, 100) == pytest.approx(3.0 * expected)


def test_schedule_without_warm_up_and_decay():
    config = OptimizerConfig(learning_rate=3.0, warmup=0.0, decay=0.0)
    assert [learning_rate(config, step, 10) for step in (0, 5, 9)] == [3.0] * 3


# -- interruptions -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def machinery():
    """A warm-up of eight steps in which 20 problems pass by more than twice."""
    stage = dict(steps=8, checkpoint_every=1, rows=4, row_length=16)
    return prepare(
        resolve(
            dict(
                task=dict(seed_difficulty=1, seed_problems=20),
                model=dict(layers=1, width=8, heads=2, head_width=4, mlp_width=8, max_length=16),
                mesh=dict(data=1),
                warmup=stage,
                train=stage,
                rounds=0,
                evaluate=dict(difficulties=(1,), problems=4, batch=4),
                generate=dict(batch=4),
            )
        )
    )


def warmed_up(machinery, workdir, stop_requested=lambda: False):
    """The committed warm-up of a run in this workdir, or Stopped on the way."""
    store = Store(str(workdir), print)
    store.open()
    machinery.weights._live.clear()  # as in a process of its own
    stages = Stages(store, Progress(quiet=True), stop_requested)
    return Bindings(machinery, stages).base(0)


def with_warmup(machinery, **changes):
    warmup = dataclasses.replace(machinery.config.warmup, **changes)
    config = dataclasses.replace(machinery.config, warmup=warmup)
    return dataclasses.replace(machinery, config=config)


def test_a_stage_of_so_many_tokens_ends_with_them_and_its_rate_follows_them(machinery, tmp_path):
    """Stopped and resumed too, and whatever `steps` is."""
    machinery = with_warmup(machinery, tokens=300, checkpoint_every=2)
    whole = warmed_up(machinery, tmp_path / "whole")
    table = whole.table("steps.parquet").to_pydict()
    ends = np.cumsum(table["tokens"])
    assert ends[-2] < 300 <= ends[-1] and ends[-1] == whole_tokens(whole)
    begins = [0, *ends[:-1]]
    assert table["learning_rate"] == [
        learning_rate(machinery.config.warmup.optimizer, begin, 300, size)
        for begin, size in zip(begins, table["tokens"], strict=True)
    ]
    asked = itertools.count()
    with pytest.raises(Stopped):
        warmed_up(machinery, tmp_path / "parts", lambda: next(asked) >= 3)
    again = with_warmup(machinery, steps=1)
    assert warmed_up(again, tmp_path / "parts").manifest == whole.manifest


def whole_tokens(artifact) -> int:
    """Tokens of all rows that were trained on, from how often each was."""
    prompts, completions = (
        artifact.inputs["seed"].table("examples.parquet")[name].to_pylist()
        for name in ("prompts", "completions")
    )
    return sum(
        row["times"] * (1 + len(prompts[row["row"]]) + len(completions[row["row"]]))
        for row in artifact.table("rows.parquet").to_pylist()
    )


def test_a_stage_of_passes_trains_on_each_row_so_often(machinery, tmp_path):
    artifact = warmed_up(with_warmup(machinery, epochs=2.0), tmp_path)
    assert artifact.table("rows.parquet")["times"].to_pylist() == [2] * 20
    rates = artifact.table("steps.parquet")["learning_rate"].to_numpy()
    assert len(rates) < 8 and rates[-1] < rates.max()


def test_a_stage_has_one_length():
    with pytest.raises(UserError, match="one length"):
        resolve({}, {"train.tokens": "100", "train.epochs": "2"})
    assert Length("steps", 8).of(None, [1, 2]) == 1


def test_stopped_and_resumed_it_trains_on_the_same_rows_in_the_same_order(machinery, tmp_path):
    """Through more than two passes: nothing is replayed, skipped or shuffled anew, to the bit."""
    machinery = with_warmup(machinery, checkpoint_every=3)
    whole = warmed_up(machinery, tmp_path / "whole")
    times = whole.table("rows.parquet")["times"].to_numpy()
    assert len(times) == 20 and times.min() >= 2, "each problem passes by more than once"
    for before in (3, 1):  # questions whether to stop, before the one behind the next checkpoint
        asked = itertools.count()
        with pytest.raises(Stopped):
            warmed_up(machinery, tmp_path / "parts", lambda n=asked, b=before: next(n) >= b)
    kept = (tmp_path / "parts").glob("partial/warmup/*/checkpoints/*")
    assert sorted(path.name for path in kept) == ["3", "6"]
    assert warmed_up(machinery, tmp_path / "parts").manifest == whole.manifest, "files and hashes"


@pytest.mark.parametrize("kind", [Checkpoints, RemoteCheckpoints])
def test_training_keeps_two_checkpoints_however_long_it_goes_on(tmp_path, kind):
    state = {"w": jax.device_put(jnp.arange(4.0), jax.devices()[0])}
    checkpoints = kind(epath.Path(tmp_path), print)
    for step in range(1, 7):
        checkpoints.save(step, jax.tree.map(lambda x, s=step: x + s, state), np.zeros((step, 1)))
    checkpoints.close()
    place = tmp_path / "checkpoints" if kind is Checkpoints else tmp_path
    assert sorted(path.name.split("-")[0:2][-1].lstrip("0") for path in place.iterdir()) == [
        "5",
        "6",
    ]
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    step, restored, log = kind(epath.Path(tmp_path), print).restore(abstract)
    assert step == 6 and len(log) == 6
    np.testing.assert_array_equal(restored["w"], np.arange(4.0) + 6)


# -- divergence --------------------------------------------------------------------------------


def test_divergence_is_named_and_keeps_the_last_good_state(machinery, tmp_path, monkeypatch):
    """The rate explodes at step 4: what is saved after it is bad, and goes."""
    exploding = lambda c, step, *_: 1e30 if step >= 4 else 1e-3  # noqa: E731
    monkeypatch.setattr("karploop.training.train.learning_rate", exploding)
    store = Store(str(tmp_path), print)
    store.open()
    bindings = Bindings(machinery, Stages(store, Progress(quiet=True)))
    with pytest.raises(Diverged, match=r"loss is .* at step 5: .*state of step 4 is.*seed:\d+"):
        bindings.base(0)
    assert not list((tmp_path / "store").glob("warmup/*")), "nothing bad is committed"
    [partial] = (tmp_path / "partial" / "warmup").iterdir()
    abstract = machinery.trainers["warmup"].abstract
    step, state, log = open_checkpoints(epath.Path(partial)).restore(abstract)
    assert step == 4 and len(log) == 4
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(state.params)) < 10
