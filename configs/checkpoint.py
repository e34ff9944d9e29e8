r"""A published model teaches itself on a GPU or a TPU VM: any Llama, Qwen or Gemma checkpoint.

    python -m experiments.run --config=configs/checkpoint.py --workdir=DIR \
        --config.roles.policy.path=/path/to/model --config.task.name='file:problems.jsonl'

The path is a Hugging Face folder (config.json, *.safetensors, tokenizer) or a .gguf file, here or
on an object store (gs://BUCKET/MODEL; every machine keeps a copy in its cache). The task is any of
those in README: a file of {"prompt", "answer"} rows, Reasoning Gym (the default here, `pip install
reasoning-gym`), a tensorflow-datasets name.

The argument says how the model is asked. `base` (the default): eight solved problems before every
question. `chat`: the model's own chat template, no examples.

Parameters are float32, the model computes in bfloat16, and a low-rank adapter is trained; for full
fine-tuning set `--config.train.lora.rank=0`. Several devices: `--config.mesh.fsdp=-1
--config.mesh.data=1` splits parameters and optimiser over all of them. `configs/gemma3_270m.py` is
the same loop in a size for a laptop, with the numbers to expect.
"""

from ml_collections import ConfigDict


def get_config(arg: str | None = None) -> ConfigDict:
    if arg not in (None, "base", "chat"):
        raise ValueError("the argument is 'base' or 'chat'")
    asked = dict(
        shots=8, question="Q: {prompt}\nA:", answer=" {answer}", stop="\n", max_new_tokens=256
    )
    if arg == "chat":
        asked = dict(chat=True, max_new_tokens=1024)
    return ConfigDict(
        dict(
            name="checkpoint",
            rounds=3,
            roles=dict(policy=dict(path="set --config.roles.policy.path")),
            task=dict(
                name="reasoning_gym/basic_arithmetic?max_terms=3&max_digits=2",
                seed_difficulty=1,
                seed_problems=8,
            ),
            model=dict(dtype="bfloat16", scan=True, remat="dots"),
            prompt=asked,
            generate=dict(prompts=1024, samples=8, difficulty_step=0, batch=64),
            filter=dict(name="verifier", on_empty="skip"),
            train=dict(
                steps=100,
                rows=16,
                row_length=2048,
                lora=dict(rank=16),
                optimizer=dict(learning_rate=2e-4),
            ),
            evaluate=dict(problems=256, difficulties=(1,), batch=64, samples=8),
        )
    )
