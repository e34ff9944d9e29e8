"""Randomness by identity: whatever differs in seed, member, round or stage has noise of its own."""

import itertools

import jax
import numpy as np

from karploop.rng import Rng, folded

STAGES = ("warmup", "prompts", "generate", "train", "filter")


def test_no_two_stages_share_their_noise():
    """Neither on the device nor on the host, and the same identity has the same noise again."""
    identities = list(itertools.product((0, 1, 2), (0, 1), (-1, 0, 1), STAGES))
    on_device, on_host = set(), set()
    for seed, member, index, stage in identities:
        rng = Rng(seed, member, index)
        on_device.add(tuple(jax.random.key_data(rng.key(stage)).tolist()))
        on_host.add(tuple(rng.numpy(stage).integers(1 << 62, size=2).tolist()))
    assert len(on_device) == len(on_host) == len(identities)
    one, again = Rng(3, 1, 4), Rng(3, 1, 4)
    assert one.key("train") == again.key("train")
    np.testing.assert_array_equal(one.numpy("train").random(3), again.numpy("train").random(3))


def test_the_order_of_words_matters():
    assert folded((1, 2)) != folded((2, 1)) and folded((1, 2)) != folded((1, 2, 0))
