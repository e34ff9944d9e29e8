"""The shape of Gemma 3 270M, for `python -m experiments.bench`, with random weights.

    python -m experiments.bench --workloads=w1,score,sft

18 layers, 100 million parameters in them, and with a vocabulary of 262,144 (which is the
tokenizer's, and so a flag of the benchmark) 168 million in the embedding. Speed does not depend on
the weights. All thirteen workloads take about half an hour on two CPU cores. To run a loop on the
published weights: configs/gemma3_270m.py.
"""

from ml_collections import ConfigDict


def get_config(arg: str | None = None) -> ConfigDict:
    if arg:
        raise ValueError("this config takes no argument")
    return ConfigDict(
        dict(
            name="gemma3-270m-shape",
            model=dict(
                layers=18,
                width=640,
                heads=4,
                kv_heads=1,
                head_width=256,
                mlp_width=2048,
                activation="geglu",
                max_length=32_768,
                tied=True,
                norm_offset=True,
                post_norms=True,
                qk_norm=True,
                positions="rope",
                rope_base=1_000_000.0,
                rope_local_base=10_000.0,
                window=512,
                pattern="sssssf",
                embedding_scale=True,
            ),
        )
    )
