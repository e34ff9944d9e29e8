"""Reward models: the objective by hand, what is read of a text, the head, command and judge."""

from __future__ import annotations

import functools
import hashlib
import json
import pathlib
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize, special
from small_models import save_llama
from small_tokenizers import CHATML, byte_level

from karploop.config import JudgingConfig, MeshConfig, RewardConfig
from karploop.data.comparisons import read_comparisons, to_comparison
from karploop.errors import UserError
from karploop.files import file_sha256
from karploop.mesh import make_mesh
from karploop.models.decoder import packed_mask
from karploop.models.reward_head import RewardHead
from karploop.offline_judge import run_file as judge_file
from karploop.offline_reward import run_file, weigh
from karploop.reporting.progress import Progress
from karploop.reporting.statistics import share_interval
from karploop.roles.local import LocalModel
from karploop.roles.reward import CARD, HEAD, Replies, Spelling, TrainedReward, load_reward
from karploop.schema import lay
from karploop.training.reward import bradley_terry
from karploop.training.reward_head import Pairs, fit_head

ROOT = pathlib.Path(__file__).parent.parent
QUIET = Progress(quiet=True)
ROOM = 128  # tokens


# -- objective -------------------------------------------------------------------------------------


def by_hand(chosen, rejected, weights, centring):
    """In float64, straight from the formula."""
    chosen, rejected, weights = (np.asarray(x, np.float64) for x in (chosen, rejected, weights))
    losses = -np.log(1 / (1 + np.exp(rejected - chosen))) + centring * (chosen + rejected) ** 2
    return float(np.sum(weights * losses) / np.sum(weights))


CHOSEN, REJECTED, WEIGHTS = [1.5, -0.25, 3.0], [0.5, 0.75, -1.0], [1.0, 0.5, 2.0]


def test_the_loss_by_hand():
    given = (jnp.array(x, jnp.float32) for x in (CHOSEN, REJECTED, WEIGHTS))
    loss = bradley_terry(*given, 0.1)
    assert loss.dtype == jnp.float32
    # (log(1 + 1/e) + 0.1·4 + (log(1 + e) + 0.1·0.25)/2 + 2·(log(1 + e⁻⁴) + 0.1·4)) / 3.5
    assert float(loss) == pytest.approx(0.6339121, abs=1e-6)
    assert float(loss) == pytest.approx(by_hand(CHOSEN, REJECTED, WEIGHTS, 0.1), abs=1e-6)


def test_the_gradient_by_finite_differences():
    arrays = [jnp.array(x, jnp.float32) for x in (CHOSEN, REJECTED, WEIGHTS)]
    gradients = jax.grad(bradley_terry, argnums=(0, 1))(*arrays, 0.1)
    for side, gradient_N in enumerate(gradients):
        for i in range(3):
            values = []
            for step in (1e-6, -1e-6):
                moved = [np.array(x, np.float64) for x in (CHOSEN, REJECTED)]
                moved[side][i] += step
                values.append(by_hand(*moved, WEIGHTS, 0.1))
            expected = (values[0] - values[1]) / 2e-6
            assert float(gradient_N[i]) == pytest.approx(expected, abs=1e-5)


def test_only_centring_tells_where_rewards_lie():
    chosen_N, rejected_N, weights_N = (jnp.array(x) for x in (CHOSEN, REJECTED, WEIGHTS))
    loss, moved = (bradley_terry(chosen_N + by, rejected_N + by, weights_N) for by in (0.0, 7.0))
    assert float(loss) == pytest.approx(float(moved), abs=1e-6)
    loss, moved = (bradley_terry(chosen_N + b, rejected_N + b, weights_N, 0.01) for b in (0.0, 7.0))
    assert float(moved) > float(loss) + 1


def test_rewards_far_apart_overflow_nothing():
    far_N, weights_N = jnp.array([1e4, -1e4]), jnp.ones(2)
    loss, gradient_N = jax.value_and_grad(bradley_terry)(far_N, -far_N, weights_N)
    assert float(loss) == pytest.approx(1e4) and np.allclose(gradient_N, [0, -0.5])
    half = bradley_terry(far_N.astype(jnp.bfloat16), far_N.astype(jnp.bfloat16), weights_N)
    assert half.dtype == jnp.float32 and float(half) == pytest.approx(np.log(2))


# -- head ------------------------------------------------------------------------------------------


def drawn(count: int, width: int = 12, seed: int = 0) -> tuple[Pairs, np.ndarray]:
    """Pairs that a hidden direction tells apart, with entries of very different size."""
    rng = np.random.default_rng(seed)
    truth_E = rng.normal(size=width)
    sizes_E = 10.0 ** rng.integers(-2, 4, width)
    two_2xNxE = rng.normal(size=(2, count, width)) + 3 * rng.normal(size=width)
    swapped_N = two_2xNxE[0] @ truth_E < two_2xNxE[1] @ truth_E
    two_2xNxE[:, swapped_N] = two_2xNxE[::-1, swapped_N]
    two_2xNxE *= sizes_E
    two_2xNxE[:, :, 3] = 5.0  # says nothing
    weights_N = rng.uniform(0.5, 1.5, count)
    return Pairs(*(x.astype(np.float32) for x in (*two_2xNxE, weights_N))), truth_E / sizes_E


def fit(pairs: Pairs, mesh: MeshConfig = MeshConfig(data=1), **settings):  # noqa: B008, frozen
    given = dict(l2=1.0, centring=0.01, steps=500, key=jax.random.key(0)) | settings
    return fit_head(pairs, mesh=make_mesh(mesh), **given)


def right(head: RewardHead, pairs: Pairs) -> np.ndarray:
    return head.rewards(pairs.chosen_NxE) > head.rewards(pairs.rejected_NxE)


def test_the_head_is_the_minimum():
    """Against scipy on the same objective in float64."""
    pairs, _ = drawn(101)
    fitted = fit(pairs, l2=0.3, centring=0.05)
    chosen, rejected, weights = (x.astype(np.float64) for x in pairs)
    texts, shares = np.concatenate([chosen, rejected]), np.tile(weights / weights.sum() / 2, 2)
    mean = shares @ texts
    spread = np.sqrt(shares @ (texts - mean) ** 2)
    spread[3] = np.inf
    chosen, rejected = (chosen - mean) / spread, (rejected - mean) / spread
    ridge = 0.3 * 12 / weights.sum()

    def objective(head):
        loss = by_hand(chosen @ head, rejected @ head, weights, 0.05)
        return loss + ridge / 2 * head @ head

    best = optimize.minimize(objective, np.zeros(12), method="BFGS", options=dict(gtol=1e-8)).x
    np.testing.assert_allclose(
        fitted.head.weights_E * np.where(spread < 1e9, spread, 0), best, atol=1e-3
    )
    assert fitted.gradient < 1e-4
    plain = by_hand(chosen @ best, rejected @ best, weights, 0.05)
    assert fitted.loss == pytest.approx(plain, abs=1e-4)


def test_the_head_orders_what_is_separable_and_its_mean_reward_is_0():
    every, _ = drawn(900)
    pairs, unseen = Pairs(*(x[:300] for x in every)), Pairs(*(x[300:] for x in every))
    fitted = fit(pairs, l2=0.01)
    assert right(fitted.head, pairs).mean() > 0.98 and right(fitted.head, unseen).mean() > 0.95
    assert fitted.head.weights_E[3] == 0, "an entry that never varies has no say"
    rewards_2xN = [fitted.head.rewards(x) for x in pairs[:2]]
    assert np.average(np.mean(rewards_2xN, axis=0), weights=pairs.weights_N) == pytest.approx(
        0, abs=1e-6
    )


def test_the_head_is_the_same_again_and_on_eight_devices():
    pairs, _ = drawn(101)  # which eight does not divide
    one, again, eight = fit(pairs), fit(pairs), fit(pairs, MeshConfig(data=4, fsdp=2))
    np.testing.assert_array_equal(one.head.weights_E, again.head.weights_E)
    rewards = [fitted.head.rewards(pairs.chosen_NxE) for fitted in (one, eight)]
    np.testing.assert_allclose(*rewards, atol=1e-4)


def test_a_stronger_penalty_keeps_rewards_closer():
    pairs, _ = drawn(101)
    spreads = [
        np.std(fit(pairs, l2=l2).head.rewards(pairs.chosen_NxE)) for l2 in (0.01, 1.0, 100.0)
    ]
    assert spreads[0] > 1.5 * spreads[1] and spreads[1] > 1.5 * spreads[2]


@pytest.mark.parametrize("seed", [0, 1])
def test_labels_of_noise_teach_nothing(seed):
    rng = np.random.default_rng(seed)
    two_2xNxE = rng.normal(size=(2, 600, 12)).astype(np.float32)
    pairs = Pairs(*two_2xNxE, np.ones(600, np.float32))
    fitted = fit(Pairs(*(x[:300] for x in pairs)))
    found = share_interval(right(fitted.head, Pairs(*(x[300:] for x in pairs))), range(300))
    assert found.low < 0.5 < found.high and found.high - found.low < 0.12


# -- reading ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain_model(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("plain") / "m", max_length=ROOM)


@pytest.fixture(scope="module")
def chat_model(plain_model):
    """The same weights with a chat template."""
    folder = shutil.copytree(plain_model, pathlib.Path(plain_model).with_name("chat"))
    byte_level(CHATML).save_pretrained(folder)
    return str(folder)


@functools.cache
def reader(path: str, split: bool = False) -> Replies:
    """On one device or, split in every way, on eight; tests share what it compiles."""
    mesh = MeshConfig(data=2, fsdp=2, tensor=2) if split else MeshConfig(data=1)
    model = LocalModel.describe(path)
    spelling = Spelling(model, model.tokenizer.has_template)
    return Replies.of(model, spelling, make_mesh(mesh), batch=8)


def plain_pass(path: str, reply) -> np.ndarray:
    """hidden_E of a reply's last token by one forward pass of its tokens, and nothing else."""
    of = reader(path)
    model, params = of.weights.model, of._params
    tokens_1xL = jnp.array([of._spelling.tokens(*reply)], jnp.int32)
    positions_1xL = jnp.arange(tokens_1xL.shape[1])[None]
    mask_1xLxL = packed_mask(jnp.ones_like(tokens_1xL))
    hidden_1xLxE, _ = jax.jit(model.apply)(params, tokens_1xL, mask_1xLxL, positions_1xL)
    return np.asarray(hidden_1xLxE[0, -1])


REPLIES = [(f"why {i}?", "because " * (i % 3) + "x" * (7 * i % 11)) for i in range(11)]


def test_what_is_read_is_the_last_tokens_state(chat_model):
    """Whatever the length, its neighbours and the mesh."""
    one = reader(chat_model)
    lengths = [len(one._spelling.tokens(*reply)) for reply in REPLIES]
    assert min(lengths) < 32 < max(lengths), "two programs, by length"
    found_NxE, reasons = one.read(REPLIES)
    assert reasons == [""] * len(REPLIES)
    for i in (lengths.index(min(lengths)), lengths.index(max(lengths))):
        expected_E = plain_pass(chat_model, REPLIES[i])
        assert np.abs(expected_E).mean() > 0.3, "far from what the comparison leaves open"
        np.testing.assert_allclose(found_NxE[i], expected_E, atol=1e-3)
    alone_NxE, _ = one.read(REPLIES[:1])
    np.testing.assert_allclose(alone_NxE, found_NxE[:1], atol=1e-3)
    short = [i for i, length in enumerate(lengths) if length <= 32]
    split_NxE, _ = reader(chat_model, split=True).read([REPLIES[i] for i in short])
    np.testing.assert_allclose(split_NxE, found_NxE[short], atol=1e-3)


def test_a_shared_beginning_changes_nothing(plain_model):
    given = [("you are asked to be kind, brief and clear: " * 2, "yes" * i) for i in range(5)]
    one = reader(plain_model)
    found_NxE, _ = one.read(given)
    assert [len(prefix) for prefix in one._reader._prefixes] == [64]
    np.testing.assert_allclose(found_NxE[4], plain_pass(plain_model, given[4]), atol=1e-3)
    np.testing.assert_allclose(one.read(given[:1])[0], found_NxE[:1], atol=1e-3)


def test_a_reply_ends_with_the_token_that_ends_it(chat_model, plain_model):
    model = LocalModel.describe(chat_model)
    asked = [{"role": "user", "content": "a"}]
    ids, learnt = model.tokenizer.conversation([*asked, {"role": "assistant", "content": "b"}])
    last = len(ids) - learnt[::-1].index(True)
    as_chat = Spelling(model, chat=True)
    assert as_chat.tokens("a", "b") == as_chat.tokens(asked, "b") == ids[:last]
    tokenizer = LocalModel.describe(plain_model).tokenizer
    as_text = Spelling(LocalModel.describe(plain_model), chat=False).tokens("a b", " c")
    assert as_text == [*tokenizer.encode("a b"), *tokenizer.encode(" c"), tokenizer.eos_id]


# -- comparisons -----------------------------------------------------------------------------------


def test_both_shapes_of_comparisons_are_read(tmp_path):
    chat = [{"role": "user", "content": "p"}]
    rows = [
        {"prompt": "p", "chosen": "good", "rejected": "bad"},
        {"messages": chat, "completions": ["bad", "good"], "winner": "second"},
        {"prompt": "p", "completions": ["good", "bad"], "winner": "first"},
        {"prompt": "p", "completions": ["a", "b"], "winner": "tie"},
        {"prompt": "p", "completions": ["a", "b"], "winner": None},
        {"prompt": "p", "completions": ["a", "a"]},
    ]
    found = read_comparisons(write(tmp_path, rows))
    assert (found.ties, found.no_winner) == (1, 2)
    assert [(c.chosen, c.rejected, c.topic) for c in found.decided] == [("good", "bad", "p")] * 3
    assert len({c.is_held_out(0.5, seed=0) for c in found.decided}) == 1


def test_prompts_are_held_out_whole_and_in_the_share_asked_for():
    some = [to_comparison({"prompt": f"{i}", "chosen": "a", "rejected": "b"}) for i in range(1000)]
    tenth, half = ({c.topic for c in some if c.is_held_out(f, 0)} for f in (0.1, 0.5))
    assert 70 < len(tenth) < 130 and tenth < half
    assert {c.topic for c in some if c.is_held_out(0.1, 1)} != tenth


def test_prompts_count_the_same_or_comparisons_do():
    row = {"chosen": "a", "rejected": "b"}
    some = [to_comparison({"prompt": prompt} | row) for prompt in "ppqp"]
    np.testing.assert_allclose(weigh(RewardConfig(), some), [1 / 3, 1 / 3, 1, 1 / 3], rtol=1e-6)
    np.testing.assert_array_equal(weigh(RewardConfig(equal="comparisons"), some), np.ones(4))


# -- command ---------------------------------------------------------------------------------------


def write(folder, rows) -> str:
    path = folder / "in.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def config(model: str, **overrides) -> RewardConfig:
    return lay(RewardConfig(), {}, {"roles.base.path": model, "held_out": "0.3"} | overrides)


@pytest.fixture(scope="module")
def rows(plain_model):
    """Comparisons that a direction in the model's hidden states decides."""
    rng = np.random.default_rng(0)
    words = ["fox", "dog", "answer", "12", "hello", "world", "quick", "?"]
    pairs = [[" ".join(rng.choice(words, 4)) for _ in range(2)] for _ in range(240)]
    pairs = [pair for pair in pairs if pair[0] != pair[1]]
    prompts = [f"q{i // 2}" for i in range(len(pairs))]
    flat = [(p, text) for p, pair in zip(prompts, pairs, strict=True) for text in pair]
    hidden_NxE, _ = reader(plain_model).read(flat)
    quality = (hidden_NxE - hidden_NxE.mean(0)) / hidden_NxE.std(0) @ rng.normal(size=16)
    order = [
        pair[:: 1 if a > b else -1]
        for pair, a, b in zip(pairs, quality[::2], quality[1::2], strict=True)
    ]
    return [
        {"prompt": p, "chosen": a, "rejected": b} for p, (a, b) in zip(prompts, order, strict=True)
    ]


@pytest.fixture(scope="module")
def trained(plain_model, rows, tmp_path_factory):
    """A folder of a reward model."""
    folder = tmp_path_factory.mktemp("reward")
    more = [
        {"prompt": "p", "completions": ["a", "b"], "winner": "tie"},
        {"prompt": "p", "completions": ["a", "b"], "winner": None},
        {"prompt": "p", "chosen": "a" * 2 * ROOM, "rejected": "b"},
    ]
    run_file(config(plain_model), write(folder, rows + more), str(folder / "out"), QUIET)
    return folder / "out"


def test_the_folder_says_what_was_trained_and_how_well(trained, plain_model, rows):
    card = json.loads((trained / CARD).read_text())
    assert {path.name for path in trained.iterdir()} == {HEAD, CARD}
    assert card["base"]["path"] == plain_model
    weights = pathlib.Path(plain_model) / "model.safetensors"
    assert card["base"]["files"][weights.name] == file_sha256(weights)
    assert card["head_sha256"] == hashlib.sha256((trained / HEAD).read_bytes()).hexdigest()
    assert card["comparisons"] == {"used": len(rows), "ties": 1, "no_winner": 1, "no_room": 1}
    training, held_out = card["training"], card["held_out"]
    assert training["comparisons"] + held_out["comparisons"] == len(rows)
    assert 40 < held_out["comparisons"] < 100 and "low" not in training
    assert training["accuracy"] > 0.9 and held_out["accuracy"] > 0.8
    assert 0.7 < held_out["low"] < held_out["accuracy"] < held_out["high"] <= 1
    assert card["settings"]["seed"] == 0 and card["settings"]["l2"] == 1.0
    assert training["gradient"] < 1e-3


@pytest.fixture(scope="module")
def judge(trained):
    """On one device, with another batch than in training."""
    return load_reward(str(trained), make_mesh(MeshConfig(data=1)), batch=5)


def test_the_judge_gives_the_rewards_of_training(trained, judge, rows):
    card = json.loads((trained / CARD).read_text())
    replies = [(row["prompt"], row[side]) for row in rows for side in ("chosen", "rejected")]
    found = judge.scores(replies)
    rewards = np.array([opinion.criteria["reward"] for opinion in found])
    np.testing.assert_allclose([o.score for o in found], special.expit(rewards), atol=1e-12)
    right = card["training"]["accuracy"] * card["training"]["comparisons"]
    right += card["held_out"]["accuracy"] * card["held_out"]["comparisons"]
    assert np.sum(rewards[::2] > rewards[1::2]) == pytest.approx(right, abs=1)
    alone = [judge.scores([reply])[0].criteria["reward"] for reply in replies[:3]]
    np.testing.assert_allclose(alone, rewards[:3], atol=1e-3)
    known = judge.identity()
    assert (known["head"], known["base"]) == (card["head_sha256"], card["base"]["files"])


def test_pairs_are_judged_by_the_difference_and_what_has_no_room_is_not(judge):
    long = "x" * 2 * ROOM
    short, missing = judge.scores([("q1", "fox"), ("q1", long)])
    assert missing.score is None and missing.criteria == {"reward": None}
    assert "context has room for 128" in missing.reason and 0 < short.score < 1
    two, back, without = judge.pairs([("q", "fox", "dog"), ("q", "dog", "fox"), ("q", "fox", long)])
    assert two.score == pytest.approx(1 - back.score) and two.winner != back.winner
    assert without.score is None and without.winner is None and without.reason
    assert judge.scores([]) == []


def test_files_are_judged_by_it(trained, plain_model, judge, tmp_path):
    """Each row by its shape; and a role that is no reward model, or is nothing else, is refused."""
    rows = [
        {"prompt": "p", "completion": "one"},
        {"prompt": "p", "completions": ["one", "two"]},
        {"prompt": "p", "completions": ["one", "two", "three"]},
    ]
    target = tmp_path / "out.jsonl"
    given = {"judge.name": "reward", "roles.judge.path": str(trained), "judge.batch": "8"}
    judge_file(lay(JudgingConfig(), {}, given), write(tmp_path, rows), str(target), QUIET)
    one, two, three = map(json.loads, target.read_text().splitlines())
    expected = [o.score for o in judge.scores([("p", t) for t in ("one", "two", "three")])]
    assert one["score"] == pytest.approx(expected[0], abs=1e-5)
    assert three["scores"] == pytest.approx(expected, abs=1e-5)
    (pair,) = judge.pairs([("p", "one", "two")])
    assert two["score"] == pytest.approx(pair.score, abs=1e-5)
    assert two["winner"] == pair.winner and two["length"] == 0
    for other, message in (
        ({"roles.judge.path": plain_model}, "wants a reward model"),
        ({"judge.name": "rubric"}, "is a reward model, which gives numbers alone"),
    ):
        config = lay(JudgingConfig(), {}, given | other)
        with pytest.raises(UserError, match=message):
            judge_file(config, write(tmp_path, rows), str(tmp_path / "no.jsonl"), QUIET)


def test_a_model_that_is_there_is_left_alone_and_another_is_refused(
    trained, plain_model, chat_model, rows, tmp_path, monkeypatch
):
    source, before = str(trained.parent / "in.jsonl"), (trained / HEAD).stat().st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr(LocalModel, "load", None)  # nothing is read
        run_file(config(plain_model, batch="16"), source, str(trained), QUIET)
    assert (trained / HEAD).stat().st_mtime_ns == before
    fewer = write(tmp_path, rows[:50])
    for given in (
        (config(plain_model), fewer),
        (config(plain_model, l2="2"), source),
        (config(plain_model, seed="1"), source),
        (config(chat_model), source),
    ):
        with pytest.raises(UserError, match="of another checkpoint, of other comparisons"):
            run_file(*given, str(trained), QUIET)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="exists and holds no reward model"):
        run_file(config(plain_model), source, str(tmp_path / "full"), QUIET)


def test_a_changed_checkpoint_or_head_is_refused(trained, chat_model, tmp_path):
    mesh = make_mesh(MeshConfig(data=1))
    with pytest.raises(UserError, match="is not the one that"):
        load_reward(str(trained), mesh, 4, base=chat_model)
    with pytest.raises(UserError, match="holds no reward model"):
        TrainedReward.describe(str(tmp_path))
    broken = tmp_path / "broken"
    broken.mkdir()
    RewardHead(np.zeros(16, np.float32), 0.0).save(broken / HEAD)
    (broken / CARD).write_bytes((trained / CARD).read_bytes())
    with pytest.raises(UserError, match="is not the one that reward.json is about"):
        TrainedReward.describe(str(broken))


GOOD = {"prompt": "p", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    "overrides, rows, message",
    [
        ({}, [], "no rows"),
        ({}, [{"prompt": "p", "chosen": "a"}], "line 1: a comparison wants two texts"),
        ({}, [{"prompt": "p", "chosen": ["a"], "rejected": "b"}], "one of them is no text"),
        ({}, [GOOD, {"prompt": "p", "completion": "a"}], "line 2: a comparison has \"chosen\""),
        ({}, [{"prompt": "p", "completions": ["a"]}], "this row has neither"),
        ({}, [GOOD | {"rejected": "a"}], "line 1: both texts are the same"),
        ({}, [{"prompt": "p", "completions": ["a", "b"], "winner": "frist"}], "mean 'first'?"),
        ({}, [{"tokens": [1], "chosen": "a", "rejected": "b"}], "and not 'tokens'"),
        ({}, [{"prompt": "p", "completions": ["a", "b"]}], "0 ties, 1 without a winner"),
        ({"held_out": "0.9", "seed": "1"}, [GOOD], "all prompts of its 1 comparisons are held out"),
        ({"roles.base.path": "nowhere"}, [GOOD], "no model at 'nowhere'"),
        ({"roles.base.path": ""}, [GOOD], "'config.roles.base' wants a 'path'"),
        ({"roles.base.base_url": "http://x"}, [GOOD], "which no server gives"),
        ({"roles.bsae.path": "x"}, [GOOD], "did you mean 'base'?"),
        ({"roles.base.chat": "yes"}, [GOOD], "has no chat template"),
        ({"batch": "3"}, [GOOD], "'config.batch' is 3"),
        ({"equal": "rows"}, [GOOD], "'config.equal' is 'rows'"),
    ],
)  # fmt: skip
def test_mistakes_are_named(plain_model, tmp_path, overrides, rows, message):
    with pytest.raises(UserError) as caught:
        source = write(tmp_path, rows)
        run_file(config(plain_model, **overrides), source, str(tmp_path / "out"), QUIET)
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def command(tmp_path, *given: str, before=("-m",)) -> subprocess.CompletedProcess:
    return subprocess.run(
        [
            sys.executable, *before, "experiments.reward", "--config=configs/reward.py",
            f"--input={tmp_path / 'in.jsonl'}", f"--output={tmp_path / 'out'}", *given,
        ],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip


def test_the_command(plain_model, tmp_path, rows):
    write(tmp_path, rows[:20])
    refused = command(tmp_path, "--config.stpes=3")
    assert refused.returncode == 2 and "did you mean 'steps'?" in refused.stderr
    assert "Trace" not in refused.stderr
    done = command(tmp_path, f"--config.roles.base.path={plain_model}", "--config.steps=20")
    assert done.returncode == 0 and "20 comparisons (0 more not used)" in done.stderr, done.stderr
    TrainedReward.describe(str(tmp_path / "out"))


def test_a_failure_at_the_last_moment_leaves_no_folder(plain_model, tmp_path, rows, monkeypatch):
    given = (config(plain_model, steps="20"), write(tmp_path, rows[:20]), str(tmp_path / "out"))

    def fail(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("karploop.offline_reward.write_atomic", fail)
        run_file(*given, QUIET)
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl"}


@pytest.mark.slow
def test_a_kill_at_the_last_moment_leaves_no_folder(plain_model, tmp_path, rows):
    write(tmp_path, rows[:20])
    base = f"--config.roles.base.path={plain_model}"
    fault = ("tests/faults.py", str(tmp_path), "kill", CARD, "1", "--")
    killed = command(tmp_path, base, before=fault)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "out").exists()
    assert command(tmp_path, base).returncode == 0
    refused = command(tmp_path, base, "--config.l2=2")
    assert refused.returncode == 2 and "name another --output" in refused.stderr
    assert "Trace" not in refused.stderr
