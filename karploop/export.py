"""From a round of a run to a folder that `transformers` or PEFT loads."""

from __future__ import annotations

import functools
import json
import pathlib
from typing import Any

from karploop.catalogue import TRAINED, Catalogue, Name, Run, read_catalogue
from karploop.config import Config
from karploop.data.characters import ends, save_characters
from karploop.data.tasks import get_task
from karploop.errors import UserError
from karploop.files import whole_folder
from karploop.mesh import make_mesh
from karploop.models.checkpoint import load_params, save_checkpoint
from karploop.models.families import to_hf
from karploop.models.peft import save_peft
from karploop.models.weights import ADAPTER, Weights, params_file, params_sha256
from karploop.policy import make_policy
from karploop.reporting.model_card import model_card
from karploop.resolve import resolve
from karploop.roles.local import LocalModel
from karploop.roles.on_mesh import Speaker
from karploop.schema import nearest
from karploop.stages import Artifact
from karploop.store import Store

CARD = "README.md"


def export(
    workdir: str,
    output: str,
    *,
    run: str | None = None,
    round: int | None = None,
    adapter: bool = False,
    dtype: str = "float32",
) -> pathlib.Path:
    """Writes a model, its tokenizer and its card; all of it or nothing.

    Args:
      output: folder that does not exist yet, or is empty.
      run: its name under `runs/`; None where there is one alone.
      round: the parameters as they were at its end; None for the last, −1 for the base.
      adapter: PEFT's format, without the base, instead of a merged model.
      dtype: of a merged model's weights, float32 or bfloat16.

    Raises:
      UserError: no such run or round; a published model that has changed since the run started
        from it; a model from scratch that no family of transformers is built like, or an adapter
        for one; parameters that were collected; or `output` is in use.
    """
    target = pathlib.Path(output)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"'{output}' exists and is not an empty folder: name another --output")
    store = Store(workdir)
    catalogue = read_catalogue(store)
    chosen = _find_run(catalogue, run)
    config = resolve(chosen.config, {})
    last, name = _find_round(chosen, round)
    role = LocalModel.describe(config.policy.path) if config.policy.path else None
    model = role or _from_scratch(config, chosen.name, adapter)
    artifact = _artifact(catalogue, name)
    files = _check_unchanged(artifact, role) if role else {}
    if adapter and params_file(artifact.manifest) != ADAPTER:
        raise UserError(
            f"round {last} of '{chosen.name}' has no adapter, it trained everything or nothing: "
            "leave --adapter out"
        )
    source_of = functools.partial(load_params, role.checkpoint) if role else None
    vocabulary = role.vocabulary if role else model.tokenizer.vocab_size
    weights = Weights(model.config, vocabulary, make_mesh(config.mesh), source_of)
    kept = role.checkpoint.config if role else ends(model.tokenizer)
    with whole_folder(target) as folder:
        if adapter:
            trained, lora = weights.read_adapter(artifact)
            save_peft(folder, trained, lora, weights, base=config.policy.path)
        else:
            params = weights.load(artifact)
            save_checkpoint(folder, params, weights, dtype=dtype, config=kept)
        if role:
            role.save_tokenizer(folder)
        else:
            save_characters(model.tokenizer, folder)
        card = model_card(
            config=chosen.config,
            summary=chosen.summary,
            environment=_read(store, chosen.name, "environment.json"),
            round=last,
            base=config.policy.path,
            files=files,
            params_sha256=params_sha256(artifact.manifest),
            adapter=adapter,
        )
        (folder / CARD).write_text(card, encoding="utf-8")
    return target


def _from_scratch(config: Config, name: str, adapter: bool) -> Speaker:
    """Raises UserError: there are several, no family is built like it, or an adapter is wanted."""
    if config.members > 1:
        raise UserError(
            f"the run '{name}' trained {config.members} models from scratch, and one is exported: "
            "run it with 'config.members' of 1"
        )
    if adapter:
        raise UserError(
            f"the run '{name}' trained a model from scratch, and an adapter is for one that others "
            "have: leave --adapter out"
        )
    made = make_policy(config, get_task(config.task.name)).speaker
    to_hf(made.config, made.tokenizer.vocab_size)  # refuses, before a weight is read
    return made


def _find_run(catalogue: Catalogue, name: str | None) -> Run:
    names = [run.name for run in catalogue.runs]
    if not names:
        raise UserError(f"no runs in '{catalogue.store.root}': name another --workdir")
    if name is None and len(names) > 1:
        raise UserError(f"name the run to export with --run: {', '.join(names)}")
    found = next((run for run in catalogue.runs if run.name == (name or names[0])), None)
    if found is None:
        raise UserError(f"no run '{name}' in '{catalogue.store.root}': {nearest(name, names)}")
    if not found.config or not found.rounds:
        raise UserError(f"the run '{found.name}' has not measured its base yet: let it go on")
    return found


def _find_round(run: Run, round: int | None) -> tuple[int, Name]:
    """The round, and the stage that its parameters are of."""
    last = run.rounds[-1]["round"]
    wanted = last if round is None else round
    if wanted not in run.stages:
        raise UserError(
            f"the run '{run.name}' has the rounds -1 (the base) to {last}, not {wanted}"
        )
    # A round that trained nothing (its filter kept nothing) ends with the parameters before.
    trained = [n for r, ns in run.stages.items() if r <= wanted for n in ns if n[0] in TRAINED]
    if not trained:
        raise UserError(f"the run '{run.name}' lists no parameters: run its command again")
    return wanted, trained[-1]


def _artifact(catalogue: Catalogue, name: Name | None) -> Artifact:
    """A stage with those that its parameters build on."""
    if name is None or name not in catalogue.manifests:
        raise UserError("the parameters are no longer in the store: run the run's command again")

    def collected() -> None:
        raise UserError(
            f"the parameters of {name[0]}/{name[1][:12]} were collected: run the run's command "
            "again with a larger 'config.retention.last'"
        )

    manifest = catalogue.manifests[name]
    below = {}
    if "params" in manifest.inputs:
        below["params"] = _artifact(catalogue, catalogue.input(name, "params"))
    return Artifact(manifest, catalogue.store, collected, below)


def _check_unchanged(artifact: Artifact, role: LocalModel) -> dict[str, str]:
    """The SHA-256 of the base's files. Raises UserError: they are not those that were trained."""
    origin = artifact
    while "params" in origin.inputs:
        origin = origin.inputs["params"]
    recorded = origin.manifest.config
    if recorded.get("files") != role.files():
        raise UserError(
            f"the model at '{role.path}' has changed since the run started from it: put the "
            "former one back, or run again"
        )
    return recorded["files"]


def _read(store: Store, run: str, name: str) -> dict[str, Any]:
    path = store.root / "runs" / run / name
    return json.loads(path.read_text()) if path.exists() else {}
