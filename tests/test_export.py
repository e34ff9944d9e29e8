"""A run's model as a folder: what transformers and PEFT make of it, and what its card says."""

import json
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

pytest.importorskip("transformers")

from processes import ROOT  # noqa: E402
from published import compiled, run, sums  # noqa: E402
from small_models import save_llama  # noqa: E402
from small_tokenizers import CHATML  # noqa: E402

from karploop import launch  # noqa: E402
from karploop.catalogue import read_catalogue  # noqa: E402
from karploop.config import MeshConfig  # noqa: E402
from karploop.data.tasks import get_task  # noqa: E402
from karploop.data.tokenizer import CharTokenizer  # noqa: E402
from karploop.errors import UserError  # noqa: E402
from karploop.export import _artifact, export  # noqa: E402
from karploop.mesh import make_mesh  # noqa: E402
from karploop.models.peft import load_peft  # noqa: E402
from karploop.resolve import resolve  # noqa: E402
from karploop.retention import Policy as Retention  # noqa: E402
from karploop.retention import execute, plan  # noqa: E402
from karploop.roles.local import LocalModel  # noqa: E402
from karploop.sampling.distributions import GREEDY  # noqa: E402
from karploop.store import Store  # noqa: E402

LEARNING = dict(train__optimizer=dict(learning_rate=0.1))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("model"), CHATML)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return sums(tmp_path_factory.mktemp("task"))


@pytest.fixture(scope="module")
def workdir(model, task, tmp_path_factory):
    folder = tmp_path_factory.mktemp("w")
    run(folder, model=model, task=task, **LEARNING)
    return folder


@pytest.fixture(scope="module")
def merged(workdir):
    return export(str(workdir), str(workdir / "merged"))


def trained_params(workdir, model, task, round=1):
    """The parameters of a round as the loop itself samples from them."""
    summary = json.loads((workdir / "runs" / "run" / "summary.json").read_text())
    key = summary["rounds"][round + 1]["stages"]["train"]
    artifact = _artifact(read_catalogue(Store(str(workdir))), ("train", key))
    weights = compiled(model, task, 2).weights
    weights._live = {}
    return weights.load(artifact), artifact, weights


def test_transformers_gives_the_same_greedy_texts(workdir, merged, model, task):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    params, *_ = trained_params(workdir, model, task)
    sampler, policy = compiled(model, task, 2).sampler, compiled(model, task, 2).policy
    prompts = ["1 + 2", "8 + 8", "0 + 5", "7 + 3"]
    ours = sampler.complete(
        params, [policy.prompting.prompt(p) for p in prompts], range(4),
        jax.random.key(0), samples=1, sampling=GREEDY,
        limits=[policy.completion_length] * 4, batch=4,
    )  # fmt: skip
    theirs = AutoModelForCausalLM.from_pretrained(merged)
    tokenizer = AutoTokenizer.from_pretrained(merged)
    shots = policy.prompting._shots
    for prompt, [completion] in zip(prompts, ours, strict=True):
        ids = tokenizer(shots.render(prompt), return_tensors="pt").input_ids
        with torch.no_grad():
            out = theirs.generate(ids, do_sample=False, max_new_tokens=len(completion.tokens))
        assert out[0, ids.shape[1] :].tolist() == completion.tokens


def test_export_and_import_give_back_the_parameters(workdir, merged, model, task):
    params, _, weights = trained_params(workdir, model, task)
    again = LocalModel.describe(str(merged))
    _, read = again.load(weights.mesh)
    jax.tree.map(np.testing.assert_array_equal, read, params)
    assert again.tokenizer == LocalModel.describe(model).tokenizer


def test_an_adapter_alone_is_pefts(workdir, model, task, tmp_path):
    folder = export(str(workdir), str(tmp_path / "adapter"), adapter=True)
    _, artifact, weights = trained_params(workdir, model, task)
    wanted, lora = weights.read_adapter(artifact)
    found, kind = load_peft(folder, weights)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    assert kind.scale == lora.scale
    assert not list(folder.glob("model*.safetensors"))
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]


def test_an_earlier_round_and_the_base(workdir, model, task, tmp_path):
    first, *_ = trained_params(workdir, model, task, round=0)
    weights = compiled(model, task, 2).weights
    folder = export(str(workdir), str(tmp_path / "first"), round=0)
    _, read = LocalModel.describe(str(folder)).load(weights.mesh)
    jax.tree.map(np.testing.assert_array_equal, read, first)
    base = export(str(workdir), str(tmp_path / "base"), round=-1, dtype="bfloat16")
    _, read = LocalModel.describe(str(base)).load(weights.mesh)
    _, original = LocalModel.describe(model).load(weights.mesh)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2**-8), read, original)


def test_the_card_says_how_it_was_made(workdir, merged, model):
    card = (merged / "README.md").read_text()
    assert card.startswith('---\nlibrary_name: "transformers"')
    summary = json.loads((workdir / "runs" / "run" / "summary.json").read_text())
    last = summary["rounds"][-1]
    said = [summary["params_sha256"], model, "low-rank adapter of rank 2", "`none`"]
    said += [f"| 1 | {last['metrics']['samples']:.4g} | {last['metrics']['kept']:.4g} |"]
    said += [f"| 1 | {last['evals']['sums/1/pass@1']:.4g} |", '"max_new_tokens": 6']
    environment = json.loads((workdir / "runs" / "run" / "environment.json").read_text())
    said += [environment["command"]]
    for text in said:
        assert text in card, text
    base = LocalModel.describe(model).files()
    assert all(f"- `{name}`, SHA-256 `{sha}`" in card for name, sha in base.items())


def test_mistakes(workdir, model, task, tmp_path):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "file").touch()
    for arguments, message in [
        (dict(output=str(taken)), "is not an empty folder"),
        (dict(run="rum"), "did you mean 'run'?"),
        (dict(round=7), "has the rounds -1 (the base) to 1, not 7"),
        (dict(round=-1, adapter=True), "has no adapter"),
        (dict(workdir=str(tmp_path / "nowhere")), "nowhere"),
    ]:
        asked = dict(workdir=str(workdir), output=str(tmp_path / "out")) | arguments
        with pytest.raises(UserError) as error:
            export(**asked)
        assert message in str(error.value)
        assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_a_base_that_has_changed_is_refused(model, task, tmp_path):
    copy = tmp_path / "model"
    copy.mkdir()
    for path in pathlib.Path(model).iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    run(tmp_path / "w", model=str(copy), task=task, rounds=0, fresh=True)
    [weights] = copy.glob("*.safetensors")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    with pytest.raises(UserError, match="has changed since the run started from it"):
        export(str(tmp_path / "w"), str(tmp_path / "out"))


def test_a_collected_run_still_exports_what_was_kept(model, task, tmp_path):
    run(tmp_path, model=model, task=task, rounds=3, train__lora=dict(rank=0), fresh=True,
        retention=dict(last=1, best=0))  # fmt: skip
    store = Store(str(tmp_path))
    with store.gate(exclusive=True):
        execute(store, plan(read_catalogue(store), Retention(), live=set()))
    export(str(tmp_path), str(tmp_path / "last"))
    with pytest.raises(UserError, match="were collected"):
        export(str(tmp_path), str(tmp_path / "first"), round=0)


@pytest.fixture(scope="module")
def from_scratch(tmp_path_factory):
    """The folder of a run that trained a model from scratch."""
    folder, stage = tmp_path_factory.mktemp("scratch"), dict(rows=2, row_length=16)
    shape = dict(layers=1, width=16, heads=2, head_width=8, mlp_width=32, max_length=16)
    settings = dict(
        name="scratch",
        rounds=0,
        mesh=dict(data=1),
        task=dict(name="reverse_addition", seed_difficulty=1, seed_problems=20),
        model=shape | dict(positions="rope", activation="swiglu"),
        warmup=stage | dict(steps=3, optimizer=dict(learning_rate=0.1)),
        train=stage,
        generate=dict(prompts=2, batch=2),
        evaluate=dict(problems=2, difficulties=(1,), batch=2),
    )
    assert launch.launch(resolve(settings), str(folder), "run") == 0
    return str(folder)


def test_a_model_from_scratch_is_a_llama_that_reads_characters(from_scratch, tmp_path):
    from transformers import AutoTokenizer

    folder = export(from_scratch, str(tmp_path / "out"))
    read = LocalModel.describe(str(folder))
    weights, params = read.load(make_mesh(MeshConfig(data=1)))
    catalogue = read_catalogue(Store(from_scratch))
    (name,) = (name for name in catalogue.manifests if name[0] == "warmup")
    trained = weights.load(_artifact(catalogue, name))
    jax.tree.map(np.testing.assert_array_equal, params, trained)
    own = CharTokenizer.for_tasks(get_task("reverse_addition"))
    assert read.tokenizer.tokens(99) == own.tokens(99)
    theirs = AutoTokenizer.from_pretrained(folder)
    assert theirs("1+2=").input_ids == own.encode_prompt("1+2=")
    said = json.loads((folder / "config.json").read_text())
    assert (said["model_type"], said["bos_token_id"], said["eos_token_id"]) == ("llama", 1, 2)
    card = (folder / "README.md").read_text()
    assert "Trained from scratch" in card and "base_model" not in card


@pytest.mark.parametrize(
    "setting, value, message",
    [
        ("members", 2, "trained 2 models from scratch"),
        ("model", dict(activation="gelu"), "no model family of transformers is built like"),
    ],
)
def test_models_from_scratch_that_are_not_exported(from_scratch, tmp_path, setting, value, message):
    folder = shutil.copytree(from_scratch, tmp_path / "w")
    path = folder / "runs" / "run" / "config.json"
    config = json.loads(path.read_text())
    config[setting] = config[setting] | value if isinstance(value, dict) else value
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        export(str(folder), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_a_model_from_scratch_is_refused(from_scratch, tmp_path):
    with pytest.raises(UserError, match="an adapter is for one that others have"):
        export(from_scratch, str(tmp_path / "out"), adapter=True)


def test_the_command(workdir, tmp_path):
    command = [sys.executable, "-m", "experiments.export", f"--workdir={workdir}", "--run=run"]
    done = subprocess.run(
        [*command, f"--output={tmp_path / 'out'}"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "model.safetensors").exists()
    done = subprocess.run(
        [*command, f"--output={tmp_path / 'out'}"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
