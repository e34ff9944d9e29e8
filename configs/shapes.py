r"""Shapes of published models without their weights, to see what a run of them would take.

    python -m experiments.dryrun --config=configs/shapes.py:8b --topology=v5e:16x16

The argument is 0.27b (as Gemma 3 270M), 2b (Qwen3 1.7B), 8b (Llama 3.1 8B) or 32b (Qwen3 32B).
Prompts have 512 tokens and completions up to 512; a round samples 4,096 prompts four times, trains
every parameter for 100 steps of 256 rows of 1,024 tokens, and measures 256 problems. It cannot be
run: `configs/checkpoint.py` runs such a model.
"""

import pathlib

from ml_collections import ConfigDict

SHAPES = pathlib.Path(__file__).parent / "shapes"


def get_config(arg: str | None = None) -> ConfigDict:
    known = sorted(folder.name for folder in SHAPES.iterdir())
    if (arg or "2b") not in known:
        raise ValueError(f"the argument is one of {', '.join(known)}")
    return ConfigDict(
        dict(
            name=f"shapes-{arg or '2b'}",
            rounds=1,
            roles=dict(policy=dict(path=str(SHAPES / (arg or "2b")))),
            task=dict(name="reverse_addition", seed_difficulty=1, seed_problems=8),
            model=dict(dtype="bfloat16", scan=True, remat="dots"),
            mesh=dict(data=1, fsdp=-1),
            prompt=dict(max_new_tokens=512),
            generate=dict(prompts=4096, samples=4, difficulty_step=0, batch=256),
            filter=dict(name="verifier", on_empty="skip"),
            train=dict(steps=100, rows=256, row_length=1024, optimizer=dict(learning_rate=1e-5)),
            evaluate=dict(problems=256, difficulties=(1,), batch=256),
        )
    )
