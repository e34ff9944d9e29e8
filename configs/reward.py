"""A reward model: a head on a checkpoint, trained on comparisons.

    python -m experiments.reward --config=configs/reward.py --config.roles.base.path=PATH \
        --input=comparisons.jsonl --output=DIR

The checkpoint is frozen. With --config.tune=lora an adapter learns with the head, for
`train.epochs` passes over the comparisons, with --config.tune=full all parameters (which wants a
smaller learning rate, --config.train.optimizer.learning_rate=1e-5).

The argument `uncentred` leaves out the term that holds rewards near 0.
"""

from ml_collections import ConfigDict


def get_config(arg: str | None = None) -> ConfigDict:
    if arg not in (None, "uncentred"):
        raise ValueError("the one argument is 'uncentred'")
    return ConfigDict(dict(centring=0.0) if arg else {})
