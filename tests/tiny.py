"""The smallest loop that has every stage several chunks or checkpoints long: seconds on a CPU.

It learns nothing and never stalls: the filter keeps all that ended, and with nothing kept the run
skips training rather than stopping.
"""

from ml_collections import ConfigDict


def get_config(arg: str | None = None) -> ConfigDict:
    optimizer = dict(name="adamw", learning_rate=1e-3)
    stage = dict(steps=10, checkpoint_every=3, rows=4, row_length=32, optimizer=optimizer)
    return ConfigDict(
        dict(
            name="tiny",
            rounds=2,
            task=dict(name="reverse_addition", seed_difficulty=2, seed_problems=200),
            model=dict(layers=1, width=16, heads=2, head_width=8, mlp_width=32, max_length=32),
            warmup=stage,
            train=stage,
            generate=dict(prompts=64, batch=16),
            filter=dict(name="none", on_empty="skip"),
            evaluate=dict(problems=8, difficulties=(1, 2), batch=16),
        )
    )
