"""A teacher in training and in loops: its distributions, its scores of tokens, and its texts."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import pytest

pytest.importorskip("transformers")

from finished_runs import promotion  # noqa: E402
from published import settings, sums  # noqa: E402
from small_models import save_llama  # noqa: E402
from small_tokenizers import sentence_piece  # noqa: E402

from karploop import launch, loop  # noqa: E402
from karploop.config import (  # noqa: E402
    MeshConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TrainConfig,
)
from karploop.data.characters import save_characters  # noqa: E402
from karploop.data.prompting import PlainPrompting  # noqa: E402
from karploop.data.tasks import get_task  # noqa: E402
from karploop.data.tokenizer import CharTokenizer  # noqa: E402
from karploop.errors import UserError  # noqa: E402
from karploop.machinery import prepare  # noqa: E402
from karploop.mesh import make_mesh  # noqa: E402
from karploop.models import likelihood  # noqa: E402
from karploop.models.checkpoint import save_checkpoint  # noqa: E402
from karploop.models.weights import Weights  # noqa: E402
from karploop.records import Episodes, Examples  # noqa: E402
from karploop.reporting.progress import Progress  # noqa: E402
from karploop.resolve import resolve  # noqa: E402
from karploop.roles.local import LocalModel  # noqa: E402
from karploop.sampling.by_chain import ChainSamples  # noqa: E402
from karploop.stages import Stages, Stopped  # noqa: E402
from karploop.store import Store  # noqa: E402
from karploop.training.distillation import DIVERGENCES, distillation_loss  # noqa: E402
from karploop.training.lessons import units  # noqa: E402
from karploop.training.objectives import make_objective  # noqa: E402
from karploop.training.objectives import settings as objective_settings  # noqa: E402
from karploop.training.packing import pack  # noqa: E402
from karploop.training.reference import logprobs_of  # noqa: E402
from karploop.training.trainer import Trainer, measure, read  # noqa: E402

BATCH = TrainConfig(rows=2, row_length=14)
PROMPTS, ANSWERS = ["1+2=", "34+5=", "6+7="], ["3", "39", "13"]

# -- the step ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def student(make_weights, make_params):
    weights = make_weights(layers=1, width=24, positions="rope")
    return weights, make_params(weights)


@pytest.fixture(scope="module")
def teacher(make_weights, make_params):
    """Wider and of another shape; none of its arrays is as wide as the vocabulary."""
    weights = make_weights(layers=1, width=40, heads=3, positions="rope", tied=True)
    return weights, make_params(weights, seed=1)


def rows(tokenizer, config=None):
    """Units of three labelled rows."""
    examples = Examples(PROMPTS, ANSWERS, np.ones(3, np.int64), ["made"] * 3, np.arange(3))
    return units(examples, PlainPrompting(tokenizer), config or ObjectiveConfig(), 14)


def packed(learnt):
    (batch, taken), *rest = pack(learnt, iter(range(3)), BATCH.rows, BATCH.row_length)
    assert not rest and len(taken) == 3
    return batch


def gradient_of(config, student, teacher):
    """(loss and more, gradient) of the student's parameters, jitted."""
    weights, objective = student[0], make_objective(config, longest=6)

    def loss(params, batch, taught):
        beside = (teacher[0].model, taught)
        return measure(weights.model, objective, params, batch, beside)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def logits_of(weights, params, batch):
    """Of every position, in float64."""

    @jax.jit
    def logits(params, batch):
        given = read(weights.model, params, batch)
        return weights.model.apply(params, given.hidden_BxLxE, method="logits")

    return np.asarray(logits(params, batch), np.float64)


@pytest.fixture(scope="module")
def logits(student, teacher, tokenizer):
    """The student's and the teacher's, of the packed rows."""
    return [logits_of(*model, packed(rows(tokenizer))) for model in (student, teacher)]


def log_softmax(logits, temperature=1.0):
    return logits / temperature - np.log(np.exp(logits / temperature).sum(-1, keepdims=True))


@pytest.mark.parametrize(
    "config",
    [
        *(ObjectiveConfig("gkd", divergence=name, beta=0.3) for name in DIVERGENCES),
        ObjectiveConfig("gkd", temperature=2.5, weighting="example"),
    ],
    ids=[*DIVERGENCES, "warm"],
)
def test_the_loss_in_float64_and_its_gradient_by_finite_differences(
    student, teacher, logits, tokenizer, config
):
    batch, params = packed(rows(tokenizer, config)), student[1]
    loss_of = gradient_of(config, student, teacher)
    (loss, (accuracy, more)), gradient = loss_of(params, batch, teacher[1])
    shares_BxL = (batch.weights_BxL / batch.weights_BxL.sum()).astype(np.float64)
    with jax.enable_x64(True):
        sides = (jnp.array(log_softmax(x, config.temperature).reshape(-1, 16)) for x in logits)
        shares_T = jnp.array(shares_BxL.reshape(-1))
        expected = distillation_loss(*sides, shares_T, config.divergence, config.beta)
        assert expected.dtype == jnp.float64
    assert float(loss) == pytest.approx(float(expected), rel=1e-5) and float(loss) > 0.1
    right_BxL = logits[0].argmax(-1) == batch.targets_BxL
    assert float(accuracy) == pytest.approx((right_BxL * shares_BxL).sum()) and not more

    norm = np.sqrt(sum(float(jnp.sum(g * g)) for g in jax.tree.leaves(gradient)))
    assert norm > 0.1

    def along(step):  # the steepest direction, in which the loss rises by the gradient's norm
        moved = jax.tree.map(lambda p, g: p + step / norm * g, params, gradient)
        return float(loss_of(moved, batch, teacher[1])[0][0])

    assert (along(2e-3) - along(-2e-3)) / 4e-3 == pytest.approx(norm, rel=5e-3)


def test_chunks_change_nothing_and_no_array_holds_all_logits(
    student, teacher, tokenizer, monkeypatch
):
    batch, whole_shape = packed(rows(tokenizer)), "f32[2,14,16]"
    config = ObjectiveConfig("gkd", divergence="jsd", beta=0.5)

    def found():
        loss_of = gradient_of(config, student, teacher)
        given = (student[1], batch, teacher[1])
        return loss_of(*given), str(jax.make_jaxpr(loss_of)(*given))

    whole, program = found()
    assert whole_shape in program
    monkeypatch.setattr(likelihood, "CHUNK", 2 * 2 * 16 * 5)
    chunked, program = found()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), chunked, whole)
    assert whole_shape not in program and "f32[2,5,16]" in program


def test_rows_of_an_embedding_that_no_token_has_are_left_out(
    student, teacher, logits, make_params, tokenizer
):
    batch, config = packed(rows(tokenizer)), ObjectiveConfig("gkd")
    weights = Weights(teacher[0].model.config, 20, teacher[0].mesh)
    padded = weights, make_params(weights, seed=2)
    (loss, _), _ = gradient_of(config, student, padded)(student[1], batch, padded[1])
    sides = [log_softmax(x[..., :16]) for x in (logits[0], logits_of(*padded, batch))]
    shares_BxL = batch.weights_BxL / batch.weights_BxL.sum()
    kl_BxL = (np.exp(sides[1]) * (sides[1] - sides[0])).sum(-1)
    assert float(loss) == pytest.approx((shares_BxL * kl_BxL).sum(), rel=1e-5)


def steps(trainer, params, learnt, count, taught=()):
    state, losses = trainer.start(params), []
    order = itertools.cycle(range(len(learnt)))
    batches = pack(learnt, order, BATCH.rows, BATCH.row_length)
    for batch, _ in itertools.islice(batches, count):
        state, metrics = trainer.step(state, batch, 0.01, taught=taught)
        losses.append(float(metrics.loss))
    return losses, state, metrics


def test_a_student_nears_its_teacher_which_stays_as_it_was(make_weights, make_params, tokenizer):
    """By the same steps on one device and on four."""
    config, found = ObjectiveConfig("gkd", divergence="reverse_kl"), []
    for mesh, count in (({}, 30), (dict(data=1, fsdp=2, tensor=2), 3)):
        one = make_weights(layers=1, width=24, positions="rope", **mesh)
        other = make_weights(layers=1, width=40, heads=2, positions="rope", tied=True, **mesh)
        objective = make_objective(config, longest=6)
        trainer = Trainer(one, OptimizerConfig(), objective=objective, teacher=other)
        taught = make_params(other, seed=1)
        found.append(steps(trainer, make_params(one), rows(tokenizer), count, taught)[0])
        jax.tree.map(np.testing.assert_array_equal, taught, make_params(other, seed=1))
    assert found[0][-1] < found[0][0] / 4
    np.testing.assert_allclose(found[0][:3], found[1], rtol=1e-4)


def test_sampled_tokens_follow_what_the_teacher_says_of_them(
    student, teacher, make_params, tokenizer
):
    """What the teacher finds likelier than the student did becomes likelier, and the reverse."""
    config = ObjectiveConfig("policy_gradient", advantage="teacher", clip_low=0, clip_high=0)
    objective = make_objective(config, longest=6)
    trainer = Trainer(student[0], OptimizerConfig(), objective=objective, teacher=teacher[0])
    texts = rows(tokenizer)
    before, wanted = (
        [x for (x,) in logprobs_of(texts, functools.partial(read_by, params), BATCH)]
        for read_by, params in (
            (trainer.logprobs, student[1]), (trainer.teacher_logprobs, teacher[1])
        )
    )  # fmt: skip
    own = Trainer(teacher[0], OptimizerConfig())
    again = logprobs_of(texts, functools.partial(own.logprobs, teacher[1]), BATCH)
    np.testing.assert_array_equal(np.concatenate(wanted), np.concatenate([x for (x,) in again]))
    advantages = [(w - b).tolist() for w, b in zip(wanted, before, strict=True)]
    tokens = [text.tokens[text.prompt_length :].tolist() for (text,) in texts]
    made = Episodes(
        *(PROMPTS, tokens, [x.tolist() for x in before], advantages, np.ones(3, np.int64)),
        *(["made"] * 3, np.arange(3)),
    )
    learnt = units(made, PlainPrompting(tokenizer), config, 14)
    _, state, metrics = steps(trainer, make_params(student[0]), learnt, 10)
    assert set(metrics.more) == set(objective.measures) >= {"policy/kl_teacher"}
    flat = np.concatenate(advantages)
    assert float(metrics.more["policy/kl_teacher"]) == pytest.approx(-flat.mean(), rel=1e-4)
    after = logprobs_of(texts, functools.partial(trainer.logprobs, state.params), BATCH)
    moved = np.concatenate([x for (x,) in after]) - np.concatenate(before)
    assert (moved * flat).sum() > 0.1
    assert "policy/kl_teacher" not in make_objective(ObjectiveConfig("policy_gradient"), 6).measures


def test_only_keys_that_the_loss_reads_make_its_stage():
    one = objective_settings(ObjectiveConfig("gkd"))
    assert one == objective_settings(ObjectiveConfig("gkd", beta=0.5, margin=2.0))
    for changed in (dict(divergence="jsd"), dict(temperature=2.0), dict(weighting="example")):
        assert objective_settings(ObjectiveConfig("gkd", **changed)) != one
    jsd = ObjectiveConfig("gkd", divergence="jsd")
    assert objective_settings(jsd) != objective_settings(dataclasses.replace(jsd, beta=0.5))


# -- loops of a model from scratch: its own weights teach --------------------------------------

STAGE = dict(steps=6, checkpoint_every=2, rows=4, row_length=32)
SCRATCH = dict(
    name="scratch",
    rounds=2,
    mesh=dict(data=1),
    task=dict(name="reverse_addition", seed_difficulty=1, seed_problems=60),
    model=dict(layers=1, width=16, heads=2, head_width=8, mlp_width=32, max_length=32),
    warmup=STAGE,
    train=STAGE | dict(optimizer=dict(learning_rate=3e-3)),
    generate=dict(prompts=16, batch=16, difficulty_step=0),
    filter=dict(name="none", on_empty="train"),
    objective=dict(name="gkd", divergence="reverse_kl"),
    regime=dict(seed_share=0.5),
    evaluate=dict(problems=4, difficulties=(1,), batch=4),
)
OWN = {"roles": {"teacher": {"weights": "base"}}}


@functools.cache
def own_teacher():
    return prepare(resolve(SCRATCH | OWN))


def sampling_like(other):
    """`prepare`, with a sampler that is compiled already."""
    return lambda config: dataclasses.replace(prepare(config), sampler=other.sampler)


def trained(workdir, stop_requested=lambda: False):
    """Each round's training of a loop in this workdir, or Stopped on the way."""
    machinery, found = own_teacher(), []
    machinery.weights._live.clear()  # as in a process of its own
    store = Store(str(workdir), print)
    store.open()
    with promotion():
        stages = Stages(store, Progress(quiet=True), stop_requested)
        loop.run(machinery, stages, found.append)
    return [done.stages["train"] for done in found[1:]], found[0].stages["warmup"]


def test_the_base_holds_a_model_where_it_was_and_a_stop_changes_nothing(tmp_path):
    """At first there is no divergence from the base, and by it alone none would come."""
    (first, second), base = trained(tmp_path / "whole")
    for done in (first, second):
        assert done.manifest.inputs["role_teacher"]["key"] == base.manifest.key
        (name, bound), *rest = done.manifest.config["teacher"]
        assert (name, bound["weights"], rest) == ("teacher", "base", [])
        losses = done.table("steps.parquet")["loss"].to_numpy()
        assert len(losses) == 6 and abs(losses).max() < 1e-3
    parts = tmp_path / "parts"
    with pytest.raises(Stopped):
        trained(parts, lambda: any(parts.glob("partial/train/*/checkpoints/*")))
    (again, later), _ = trained(parts)
    assert (again.manifest, later.manifest) == (first.manifest, second.manifest), "to the byte"


def test_a_teacher_that_is_the_policy_takes_no_memory_of_its_own():
    """What reads a round's samples are the very buffers that sampled them."""
    config = resolve(SCRATCH | {"roles": {"teacher": {"weights": "policy"}}})
    machinery = prepare(config)
    params, artifact = object(), object()
    machinery.weights.load = lambda found: params if found is artifact else None
    inputs = machinery.roles.inputs(["teacher"], ["base", artifact])
    assert machinery.roles.params("teacher", machinery.weights, inputs) is params
    assert machinery.trainers["train"].objective.reads == "divergences"


def test_a_server_teaches_a_model_that_reads_characters(tmp_path, serve, monkeypatch):
    """What it writes in other characters than the task's is no completion."""
    odd = [[f"{digit}=", " 27\n"] for digit in "13579"]
    server = serve(rules=[*odd, ["2=", "é"]])
    there = {"base_url": server.endpoint.base_url, "model": "small"}
    changes = dict(
        rounds=1, roles=dict(teacher=there), objective=dict(name="sft"),
        generate=SCRATCH["generate"] | dict(chain="teacher"),
    )  # fmt: skip
    monkeypatch.setattr(launch, "prepare", sampling_like(own_teacher()))
    with promotion():
        assert launch.launch(resolve(SCRATCH | changes), str(tmp_path), "run") == 0
    (path,) = (tmp_path / "store/generate").glob("*/samples.parquet")
    samples = ChainSamples.from_table(pq.read_table(path))
    for prompt, text, ended in zip(
        samples.prompts, samples.completions, samples.finished_S, strict=True
    ):
        assert (ended and text == "27") if prompt[-2] in "13579" else not ended
    assert 0 < samples.finished_S.sum() < 16
    (path,) = (tmp_path / "store/train").glob("*/rows.parquet")
    sources = set(pq.read_table(path)["source"].to_pylist())
    summary = json.loads((tmp_path / "runs/run/summary.json").read_text())
    assert sources == {"seed", summary["rounds"][1]["stages"]["generate"]}


# -- loops of published models -----------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A policy, a wider teacher with its tokens, and one with tokens of its own."""
    folder = tmp_path_factory.mktemp("models")
    return {
        "policy": save_llama(folder / "policy"),
        "wide": save_llama(folder / "wide", width=32),
        "strange": save_llama(folder / "strange", tokenizer=sentence_piece()),
    }


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return sums(tmp_path_factory.mktemp("task"))


def published(models, task, **more):
    wanted = {"rounds": 1, "evaluate__samples": 0, "generate__samples": 1, "train__row_length": 128}
    # A random model rarely stops: give it many tries.
    wanted |= {"prompt__max_new_tokens": 40}
    return resolve(settings(models["policy"], task, **wanted | more))


@pytest.fixture(scope="module")
def workdir(models, task, tmp_path_factory):
    """A loop of each kind, in one store; they share what samples."""
    folder = tmp_path_factory.mktemp("loops")
    wide, shared = {"roles__teacher": {"path": models["wide"]}}, prepare(published(models, task))
    for name, more in {
        "distributions": wide | {"objective__name": "gkd"},
        "tokens": wide
        | {"objective__name": "policy_gradient", "objective__advantage": "teacher"}
        | {"regime__data": "replace", "rounds": 2},
        "texts": {
            "roles__teacher": {"path": models["strange"]},
            "generate__chain": "teacher",
            "generate__samples": 2,
        },
    }.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(launch, "prepare", sampling_like(shared))
            config = published(models, task, **more)
            assert launch.launch(config, str(folder), name) == 0
    return folder


def stages_of(workdir, run, stage):
    """Manifest and folder of a stage in each round that has it."""
    summary = json.loads((workdir / "runs" / run / "summary.json").read_text())
    keys = [r["stages"][stage] for r in summary["rounds"] if stage in r["stages"]]
    manifests = [Store(str(workdir)).manifest(stage, key) for key in keys]
    return [(m, workdir / "store" / stage / m.key) for m in manifests]


def test_a_published_teacher_is_a_part_of_what_it_taught(workdir, models):
    files = LocalModel.describe(models["wide"]).files()
    ((train, folder),) = stages_of(workdir, "distributions", "train")
    ((experience, _), *_) = stages_of(workdir, "tokens", "experience")
    for manifest in (train, experience):
        assert json.dumps(files)[1:-1] in json.dumps(manifest.config["teacher"])
    assert train.config["objective"]["name"] == "gkd"
    losses = pq.read_table(folder / "steps.parquet")["loss"].to_numpy()
    assert np.isfinite(losses).all() and (losses > 0.01).all()


def test_each_sampled_token_has_its_own_advantage_and_needs_no_judge(workdir, models, task):
    config = published(models, task, roles__teacher={"path": models["wide"]})
    found = stages_of(workdir, "tokens", "experience")
    assert len(found) == 2
    teacher = LocalModel.describe(models["wide"])
    machinery = prepare(dataclasses.replace(config, roles={"policy": config.policy}))
    weights, params = teacher.load(machinery.weights.mesh)
    reader = Trainer(weights, OptimizerConfig())
    for manifest, folder in found:
        assert "verdicts" not in manifest.inputs
        rows = Episodes.from_table(pq.read_table(folder / "episodes.parquet"))
        # What did not end is learnt from as well.
        assert len(rows) == 8
        texts = units(rows, machinery.policy.prompting, ObjectiveConfig(), 128)
        read_by = functools.partial(reader.logprobs, params)
        said = [x for (x,) in logprobs_of(texts, read_by, config.train)]
        for advantages, logprobs, taught in zip(rows.advantages, rows.logprobs, said, strict=True):
            np.testing.assert_allclose(advantages, taught - np.array(logprobs), atol=1e-4)
        assert np.std(np.concatenate(rows.advantages)) > 0.1
    for _, folder in stages_of(workdir, "tokens", "train"):
        distance = pq.read_table(folder / "steps.parquet")["policy/kl_teacher"].to_numpy()
        assert np.isfinite(distance).all()


def test_a_teachers_texts_are_imitated_in_the_policys_tokens(workdir, models):
    ((manifest, folder),) = stages_of(workdir, "texts", "generate")
    said = json.dumps(manifest.config["roles"])
    assert json.dumps(LocalModel.describe(models["strange"]).files())[1:-1] in said
    assert set(manifest.inputs) == {"prompts"}, "the policy has no part in it"
    samples = ChainSamples.from_table(pq.read_table(folder / "samples.parquet"))
    tokenizer = LocalModel.describe(models["policy"]).tokenizer
    for i, (step,) in enumerate(map(json.loads, samples.steps)):
        assert step["role"] == "teacher" and samples.completions[i].strip() == step["text"].strip()
        if samples.finished_S[i]:
            assert tokenizer.encode(samples.completions[i]) == samples.tokens[i]
    assert samples.finished_S.any()
    ((_, trained_in),) = stages_of(workdir, "texts", "train")
    assert manifest.key in pq.read_table(trained_in / "rows.parquet")["source"].to_pylist()


TAUGHT = {"objective__name": "policy_gradient", "objective__advantage": "teacher"}
BASE = {"roles__teacher": {"weights": "base"}}


@pytest.mark.parametrize(
    "more, message",
    [
        ({"objective__name": "gkd"}, "'config.objective.name=gkd' learns from the role 'teacher'"),
        (TAUGHT, "with 'advantage=teacher' learns from the role 'teacher', and there is none"),
        ({"generate__chain": "teacher"}, "set 'config.roles.teacher.path'"),
        (BASE, "'config.roles.teacher' is asked by nothing"),
        (BASE | {"objective__name": "gkd", "objective__divergence": "jsd", "objective__beta": 0.0},
         "between 0 and 1, both excluded"),
        (BASE | TAUGHT | {"objective__kl": 0.1, "objective__kl_in": "reward"}, "set it to loss"),
        (BASE | TAUGHT | {"judge__name": "verifier"}, "reads no judge"),
        ({"objective__name": "gkd", "roles__teacher": {}}, "'config.roles.teacher' wants a model"),
        (
            {"objective__name": "gkd"}
            | {"roles__teacher": {"base_url": "http://localhost/v1", "model": "m"}},
            "a server reads texts: bind it to weights",
        ),
    ],
)  # fmt: skip
def test_mistakes_are_named_before_anything_is_compiled(models, task, more, message):
    with pytest.raises(UserError, match=message):
        prepare(published(models, task, **more))


def test_a_teacher_with_other_tokens_is_refused_by_both_names(models, task):
    strange = {"roles__teacher": {"path": models["strange"]}}
    for more in (TAUGHT, {"objective__name": "gkd"}):
        with pytest.raises(UserError) as error:
            prepare(published(models, task, **strange, **more))
        for said in (models["strange"], models["policy"], "learn from what this one writes"):
            assert said in str(error.value)
    with pytest.raises(UserError, match="and the policy characters"):
        prepare(resolve(SCRATCH | {"roles": {"teacher": {"path": models["strange"]}}}))
    wide = {"roles__teacher": {"path": models["wide"]}, "objective__name": "gkd"}
    with pytest.raises(UserError, match="longer than the (model's )?context"):
        prepare(published(models, task, **wide, train__row_length=512))


def of_characters(folder, characters):
    """A Llama with random weights that reads them."""
    folder.mkdir()
    save_characters(characters, folder)
    config = ModelConfig(
        layers=1, width=24, heads=2, head_width=12, mlp_width=32, activation="swiglu",
        positions="rope", max_length=32,
    )  # fmt: skip
    weights = Weights(config, characters.vocab_size, make_mesh(MeshConfig(data=1)))
    params = jax.tree.map(lambda x: 3 * x, weights.init(jax.random.key(0)))  # far from uniform
    save_checkpoint(folder, params, weights)
    return str(folder)


def test_a_student_from_scratch_is_taught_by_a_checkpoint_of_the_same_characters(tmp_path):
    characters = CharTokenizer.for_tasks(get_task("reverse_addition"))
    path = of_characters(tmp_path / "teacher", characters)
    changes = {"rounds": 1, "roles": {"teacher": {"path": path}}}
    assert launch.launch(resolve(SCRATCH | changes), str(tmp_path / "w"), "run") == 0
    ((train, folder),) = stages_of(tmp_path / "w", "run", "train")
    assert json.dumps(LocalModel.describe(path).files())[1:-1] in json.dumps(train.config)
    assert (pq.read_table(folder / "steps.parquet")["loss"].to_numpy() > 0.01).all()
    other = of_characters(tmp_path / "other", CharTokenizer(characters.alphabet[::-1]))
    with pytest.raises(UserError, match="and the policy characters"):
        prepare(resolve(SCRATCH | {"roles": {"teacher": {"path": other}}}))
