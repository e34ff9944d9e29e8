"""Eight CPU devices, strict promotion, quick compilation, and a tiny model for tests to share.

Set before any device is used, in this process alone: a process that a test starts sees what a user
would, but for how long it compiles.
"""

import functools
import os

import hypothesis
import jax
import numpy as np
import pytest
from endpoints import serve  # noqa: F401, a fixture

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_disable_most_optimizations", True)  # of LLVM: seven times less to wait for

hypothesis.settings.register_profile("karploop", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("karploop")


LONGEST = (
    *("resume", "lora", "object_store", "policy", "export", "distributed", "gc", "parity"),
    *("config", "chains", "endpoints", "judges", "run", "training", "sweep_runner", "readme"),
    *("objectives", "loop_judges", "regime", "judge_study", "filter_choice", "scoring", "votes"),
    *("teacher", "reward", "reward_training", "reward_loop", "launch_tpu"),
)


def pytest_collection_modifyitems(items):
    """Files that take minutes come first, so that no process is left with one at the end."""
    names = [f"test_{name}" for name in LONGEST]
    order = {name: place for place, name in enumerate(names)}
    items.sort(key=lambda item: order.get(item.path.stem, len(names)))


@pytest.fixture(scope="session", autouse=True)
def compiled_once(tmp_path_factory):
    """What any test of this session compiled, no other compiles again.

    Processes that tests start share it. What users compiled before is not read.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # of the whole session
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_compilation_cache_dir", str(folder / "cache/karploop/xla"))
        yield


@pytest.fixture(scope="session")
def tokenizer():
    """Sixteen ids, so that a split vocabulary is really split."""
    from karploop.data.tokenizer import CharTokenizer

    return CharTokenizer("0123456789+= ")


@pytest.fixture(scope="session")
def make_weights(tokenizer):
    """make_weights(data=1, fsdp=1, tensor=1, **fields of ModelConfig): a tiny model on a mesh.

    The same arguments give the same object, so that tests share what they compile.
    """
    from karploop.config import MeshConfig, ModelConfig
    from karploop.mesh import make_mesh
    from karploop.models.weights import Weights

    tiny = dict(layers=2, width=16, heads=4, head_width=8, mlp_width=32, max_length=32)

    @functools.cache
    def make(data=1, fsdp=1, tensor=1, **model):
        mesh = make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor))
        return Weights(ModelConfig(**(tiny | model)), tokenizer.vocab_size, mesh)

    return make


@pytest.fixture(scope="session")
def make_params():
    """make_params(weights, seed=0): parameters on the weights' mesh, the same on every mesh.

    Drawn by NumPy, because compiling the initialiser takes longer than most tests. Larger than
    initial ones, so that predictions are far from uniform and every parameter matters.
    """
    from karploop.mesh import put

    def make(weights, seed=0):
        rng = np.random.default_rng(seed)

        def draw(x, sharding):
            scale = 1.0 if x.ndim == 1 else 2.0 * x.shape[0] ** -0.5
            values = rng.normal(loc=float(x.ndim == 1), scale=scale, size=x.shape)
            return put(values.astype(x.dtype), sharding)

        return jax.tree.map(draw, weights.abstract, weights.shardings)

    return make
