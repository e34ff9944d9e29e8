"""The compiled sampling program: parameters change their layout once, the cache never does."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest
from compiled import look_into_sampling

from karploop.dryrun import topology

ROOT = pathlib.Path(__file__).parent.parent


def check(seen: dict) -> None:
    assert seen["dots"], "the loops must be read right"
    assert seen["inside"] < seen["smallest"], "parameters are gathered in the loop"
    assert seen["turned"] == 0, "the cache is copied"
    assert seen["temporaries"] < seen["parameters"], "there is a second copy of the parameters"


@pytest.mark.parametrize("slots", [0, 8])
@pytest.mark.parametrize(
    "axes", [{"data": 1}, {"fsdp": 4, "tensor": 2}], ids=["1 device", "8 devices"]
)
def test_sampling_on_cpu(axes, slots):
    count = axes.get("fsdp", 1) * axes.get("tensor", 1)
    seen = look_into_sampling(jax.devices()[:count], 16, slots, length=96, **axes)
    check(seen)
    if count == 1:
        assert seen["written"] == 8, "a ring of keys or values is copied in each step"
    assert (seen["outside"] >= seen["smallest"]) == (count > 1), "fsdp is gathered before the loop"


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_sampling_of_one_row_on_cpu(kv_heads):
    """Its matrices are multiplied in parts, each by a thread."""
    seen = look_into_sampling(
        jax.devices()[:1], 1, slots=0, length=96, samples=1, kv_heads=kv_heads, data=1
    )
    check(seen)
    assert seen["written"] == 8, "a ring of keys or values is copied in each step"
    assert seen["copied"] < seen["smallest"], "a matrix is turned in each step"
    assert seen["in_parts"] == 4 * 6, "one thread multiplies a matrix"


@pytest.mark.parametrize("slots", ["0", "32"])
def test_sampling_on_a_tpu_that_is_not_here(slots):
    if not topology.has_libtpu():
        pytest.skip('compiling for a TPU takes libtpu: pip install "jax[tpu]"')
    command = [sys.executable, "tests/compiled.py", "v5e:2x2", slots]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = os.environ | {"PYTHONPATH": path}
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    check(json.loads(result.stdout))
