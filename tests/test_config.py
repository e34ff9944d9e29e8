"""Settings: resolved, typed, bounded, refused with the nearest name, and every one of them read."""

import dataclasses
import pathlib
import sys

import jax
import numpy as np
import pytest
import tiny
from processes import ROOT
from small_models import save_llama
from small_tokenizers import CHATML

from karploop import cli, config, launch
from karploop.config import ChainConfig, Config, JudgingConfig, RewardConfig
from karploop.errors import UserError
from karploop.offline_chain import run_file
from karploop.offline_judge import run_file as judge_file
from karploop.offline_reward import run_file as reward_file
from karploop.reporting.progress import Progress
from karploop.resolve import resolve
from karploop.schema import lay
from karploop.training.objectives import make_objective
from karploop.training.objectives import settings as objective_settings
from karploop.training.packing import Tokenized, pack, places


def test_overrides_are_read_as_the_type_of_their_key():
    resolved = resolve(
        {"train": {"steps": 10}},
        {
            "train.optimizer.learning_rate": "1e-4",
            "train.optimizer.clip_norm": "2",
            "evaluate.difficulties": "1,2,7",
            "model.qk_norm": "true",
            "filter.name": "123",
        },
    )
    assert resolved.train.steps == 10
    assert resolved.train.optimizer.learning_rate == 1e-4
    assert resolved.train.optimizer.clip_norm == 2.0
    assert resolved.evaluate.difficulties == (1, 2, 7)
    assert resolved.model.qk_norm is True
    assert resolved.filter.name == "123"
    assert resolved.warmup == Config().warmup


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"trian.steps": "3"}, "unknown key 'config.trian': did you mean 'train'?"),
        ({"train.stpes": "3"}, "unknown key 'config.train.stpes': did you mean 'steps'?"),
        ({"train": "3"}, "'config.train' is a group of keys"),
        ({"seed.x": "3"}, "'config.seed' is a value"),
        ({"train.steps": "many"}, "'config.train.steps' wants int, got 'many'"),
        ({"train.steps": "3.5"}, "'config.train.steps' wants int, got 3.5"),
        ({"train.steps": "0"}, "'config.train.steps' must be at least 1, got 0"),
        ({"model.qk_norm": "7"}, "'config.model.qk_norm' wants bool"),
        ({"generate.top_p": "1.5"}, "'config.generate.top_p' must be at most 1.0"),
        ({"generate.prompts": "0"}, "'config.generate.prompts' must be at least 1"),
        ({"model.positions": "roep"}, "'config.model.positions' is 'roep': did you mean 'rope'?"),
        ({"evaluate.difficulties": ""}, "'config.evaluate.difficulties' wants a list"),
        ({"train.optimizer.learning_rate": "1e999"}, "must be finite"),
        ({"mesh.data": "-1", "mesh.fsdp": "-1"}, "at most one −1"),
        ({"train.row_length": "4096"}, "longer than the model's 'config.model.max_length'"),
        ({"train.optimizer.warmup": "0.9", "train.optimizer.decay": "0.9"}, "exceed the whole"),
        ({"train.lora.rank": "-1"}, "'config.train.lora.rank' must be at least 0"),
        ({"train.lora.targets": "qeury"}, "names 'qeury': did you mean 'query'?"),
        ({"train.lora.targets": "up,gate"}, "'config.train.lora.targets' names 'gate', and"),
        ({"train.lora.targets": "up,up"}, "names a matrix twice"),
        ({"train.lora.targets": ""}, "'config.train.lora.targets' names ''"),
        ({"warmup.lora.rank": "4"}, "there is nothing in them to adapt"),
        ({"filter.name": "vote", "judge.voters": "members"}, "set 'config.members' to 2 or more"),
        ({"filter.match": "vote", "judge.voters": "members"}, "set 'config.members' to 2 or more"),
        (
            {"filter.name": "chain(vote, cap)", "judge.voters": "members"},
            "set 'config.members' to 2 or more",
        ),
        (
            {"filter.threshold_step": "0.1", "filter.threshold_last": "0.4"},
            "rises to 'config.filter.threshold_last' of 0.4",
        ),
        ({"filter.nll_low": "0.95"}, "want low below high"),
        ({"filter.nll_high": "1.5"}, "both in 0 … 1"),
    ],
)
def test_bad_settings_are_refused_with_key_and_remedy(overrides, message):
    with pytest.raises(UserError) as error:
        resolve({}, overrides)
    assert message in str(error.value)


def test_unknown_keys_in_a_config_file_are_refused_too():
    with pytest.raises(UserError, match="unknown key 'config.model.widht': did you mean 'width'"):
        resolve({"model": {"widht": 3}})


def test_overrides_are_taken_out_of_the_command_line_in_every_spelling():
    rest, overrides = cli.split_overrides(
        [
            "run",
            "--config=a.py",
            "--config.a.b=1",
            "--config.c",
            "x=y",
            "--config.flag",
            "--workdir=w",
        ]
    )
    assert rest == ["run", "--config=a.py", "--workdir=w"]
    assert overrides == {"a.b": "1", "c": "x=y", "flag": "true"}


CONFIGS = {
    "addition": "tiny",
    "reversal": "",
    "checkpoint": "chat",
    "shapes": "8b",
    "gemma3_270m": "",
    "gemma3_270m_shape": "",
    "zipf": "",
    "star": "rationalise,tiny",
    "rest_em": "tiny",
    "raft": "tiny",
    "rft": "tiny",
    "spin": "tiny",
    "distill": "on_policy,tiny",
    "constitutional": "dpo,tiny",
    "overoptimization": "tiny",
    "self_rewarding": "random,tiny",
    "rlaif": "random,tiny",
    "d_rlaif": "random,tiny",
    "rlhf": "dpo,tiny",
}


FOR_FILES = {
    "chain": (ChainConfig(), "debate"),
    "judge": (JudgingConfig(), "pairwise"),
    "reward": (RewardConfig(), "uncentred"),
}


def test_every_shipped_config_is_tested():
    there = {path.stem for path in (ROOT / "configs").glob("*.py")}
    assert there == CONFIGS.keys() | FOR_FILES.keys()


@pytest.mark.parametrize("name", FOR_FILES)
def test_shipped_configs_of_files_are_valid(name):
    defaults, argument = FOR_FILES[name]
    assert lay(defaults, cli.load_settings(f"{ROOT}/configs/{name}.py")) == defaults
    assert lay(defaults, cli.load_settings(f"{ROOT}/configs/{name}.py:{argument}")) != defaults


@pytest.mark.parametrize("name", CONFIGS)
def test_shipped_configs_are_valid(name):
    for argument in {"", CONFIGS[name]}:
        spec = f"{ROOT}/configs/{name}.py" + (f":{argument}" if argument else "")
        assert cli.load_config(spec, {}).rounds > 0
    with pytest.raises(UserError, match="refuses the argument"):
        cli.load_config(f"{ROOT}/configs/{name}.py:nonsense", {})


_OWN = ("karploop.config", "karploop.resolve", "karploop.schema")


def _record_reads(monkeypatch, reads: set[tuple[str, str]]) -> None:
    """Notes each (config class, field) that other karploop code asks for."""

    def watched(self, name):
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.startswith("karploop.") and caller not in _OWN:
            reads.add((type(self).__name__, name))
        return object.__getattribute__(self, name)

    for cls in vars(config).values():
        if dataclasses.is_dataclass(cls):
            monkeypatch.setattr(cls, "__getattribute__", watched)


_STRETCHED = dict(
    positions="rope", rope_scaling="llama3", rope_local_base=10.0, window=4, pattern="sf"
)


def _run_chains(server, folder) -> None:
    """Chains that among them read every option."""
    (folder / "in.jsonl").write_text('{"prompt": "a"}\n')
    there = {"roles.policy.base_url": server.endpoint.base_url, "roles.policy.model": "small"}
    for chain in ("critique_revise", "debate", "draft_judge_revise", "extract_validate_repair"):
        chained = lay(ChainConfig(), {"chain": chain}, there)
        out = str(folder / f"{chain}.jsonl")
        run_file(chained, str(folder / "in.jsonl"), out, Progress(quiet=True), folder / "replies")


def _run_judges(model, folder) -> None:
    source = folder / "pairs.jsonl"
    source.write_text('{"prompt": "a", "completion": "b", "completions": ["b", "c"]}\n')
    review = str(folder / "review.jsonl")
    pathlib.Path(review).write_text('{"prompt": "a", "completion": "b", "score": 1}\n')
    for name in ("constitution", "ensemble"):
        settings = {"name": name, "rationale": name == "constitution", "max_new_tokens": 8}
        settings |= {"members": "person, rubric, debate", "review": review}
        judging = lay(JudgingConfig(), {"judge": settings}, {"roles.judge.path": model})
        judge_file(judging, str(source), str(folder / f"{name}.jsonl"), Progress(quiet=True))


def _trace_objectives() -> None:
    """Every loss, without computing it."""
    text = Tokenized(
        np.arange(4, dtype=np.int32),
        2,
        by_token={name: np.zeros(2) for name in ("sampler", "advantage", "reference")},
        by_text={"present": 1.0, "reference": 0.0, "desirable": 1.0},
    )
    batch, _ = next(pack([(text, text)], iter([0]), 2, 8))
    choices = config.ObjectiveConfig.__dataclass_fields__["name"].metadata["choices"]
    for name in choices:
        asked = config.ObjectiveConfig(name, kl=0.1)
        objective_settings(asked)
        objective = make_objective(asked, longest=4)
        shape = {"rewards": (places(2, 8),)}.get(objective.reads, (2, 8))
        jax.eval_shape(objective.loss, np.zeros(shape, np.float32), batch)


def _train_reward(model, folder) -> None:
    source = folder / "comparisons.jsonl"
    source.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    given = {"roles.base.path": model}
    for tune in ("head", "lora"):
        settings = lay(RewardConfig(), {"held_out": 0.0, "tune": tune}, given)
        reward_file(settings, str(source), str(folder / tune), Progress(quiet=True))


def test_every_key_is_read_by_something(monkeypatch, tmp_path, serve):
    """Dead keys make a run look like what it is not. Runs every branch that reads a key."""
    reads: set[tuple[str, str]] = set()
    _record_reads(monkeypatch, reads)
    stretched = {"model": dict(_STRETCHED, scan=True, remat="dots")}
    by_text = ("near_duplicates", "perplexity", "diverse", "cap")
    muon = {"warmup": {"optimizer": {"name": "muon"}}}
    variants = [
        {"filter": {"name": f"chain({', '.join(by_text)})"}} | stretched,
        {"filter": {"name": "parses", "on_empty": "train"}},
        {"filter": {"name": "random", "match": "vote", "on_empty": "skip"}}
        | {"train": {"mixing": "by_difficulty"}, "regime": {"data": "budget", "patience": 1}}
        | {"judge": {"equivalence": "math"}},
        {"filter": {"name": "length"}, "task": {"name": "reverse"}, "noise": {"rate": 0.5}} | muon,
    ]
    for name in ("dpo", "kto", "policy_gradient"):
        variant = {"filter": {"name": "none", "on_empty": "skip"}, "generate": {"samples": 4}}
        judge = "simulated_annotators" if name == "kto" else "vote"
        variants.append(variant | {"objective": {"name": name}, "judge": {"name": judge}})
    for index, variant in enumerate(variants):
        settings = tiny.get_config()
        settings.update(variant | {"mesh": {"data": 1}})
        # Not by `update`: warm-up and training are one object in that config.
        adapter = {} if index else {"train.lora.rank": "2"}
        launch.launch(resolve(settings.to_dict(), adapter), str(tmp_path), f"variant-{index}")
    published = {
        "roles.policy.path": save_llama(tmp_path / "model", CHATML, max_length=512),
        "prompt.chat": "true",
        "prompt.max_new_tokens": "8",
        "train.row_length": "256",
        "evaluate.samples": "2",
        "filter.name": "all_of(threshold, margin)",
        "judge.name": "rubric",
        "generate.chain": "answer",
    }
    # A checkpoint brings its own shape.
    settings = {k: v for k, v in tiny.get_config().to_dict().items() if k != "model"}
    launch.launch(resolve(settings | {"mesh": {"data": 1}}, published), str(tmp_path), "published")
    _run_chains(serve(), tmp_path)
    _run_judges(published["roles.policy.path"], tmp_path)
    _train_reward(published["roles.policy.path"], tmp_path)
    _trace_objectives()
    every = {
        (cls.__name__, field.name)
        for cls in vars(config).values()
        if dataclasses.is_dataclass(cls)
        for field in dataclasses.fields(cls)
    }
    # Read from a run's config.json by the garbage collector, which never sees these objects.
    elsewhere = {("RetentionConfig", "last"), ("RetentionConfig", "best")}
    # Read through the config's own properties, `key_value_heads` and `sliding_layers`.
    elsewhere |= {("ModelConfig", "kv_heads"), ("ModelConfig", "pattern")}
    elsewhere |= {("LoraConfig", "alpha")}  # likewise, through `scale`
    assert every - reads - elsewhere == {("Config", "retention")}
