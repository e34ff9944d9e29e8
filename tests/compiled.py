"""What the compiled sampling program does with parameters and cache; as a command, for a TPU.

python tests/compiled.py v5e:2x2 32    # slots; compiled by libtpu, which no TPU is needed for
"""

import functools
import json
import math
import re
import sys


def computations(hlo: str) -> dict[str, str]:
    """Name → text of each computation of an HLO module."""
    parts = re.split(r"^(?:ENTRY )?%?([\w.\-]+) \([^\n]*\{\n", hlo, flags=re.M)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def reachable(found: dict[str, str], start: str) -> set[str]:
    """`start` and the computations that it calls, directly or not."""
    seen, todo = set(), [start]
    while todo:
        name = todo.pop()
        if name in found and name not in seen:
            seen.add(name)
            todo += re.findall(r"(?:to_apply|calls|body|condition)=%?([\w.\-]+)", found[name])
            for branches in re.findall(r"branch_computations=\{([^}]*)\}", found[name]):
                todo += re.findall(r"[\w.\-]+", branches)
    return seen


def results(text: str, *opcodes: str) -> list[tuple[list[str], str]]:
    """Of each such instruction: the shapes of its result, as "2,16"; its operands."""
    found = re.findall(rf" = (.*?) (?:{'|'.join(opcodes)})\(([^)]*)\)", text)
    return [(re.findall(r"\w\[([\d,]+)\]", result), operands) for result, operands in found]


def _size(shape: str) -> int:
    return math.prod(int(n) for n in shape.split(","))


def look_into_sampling(
    devices,
    prompts: int,
    slots: int,
    length: int,
    dtype: str = "float32",
    samples: int = 2,
    kv_heads: int = 4,
    **axes: int,
) -> dict:
    """Compiles a rollout of `samples` completions a prompt, `slots` prompts at a time (0: all).

    Args:
      length: tokens of a prompt, and of a completion.

    Returns:
      Of each device: bytes of `temporaries` besides the cache and of `parameters` while decoding;
      elements of the largest all-gather `outside` of and `inside` the loops, and of the `smallest`
      matrix; `turned`: how often keys or values are copied or transposed, of prompts in the loops;
      `written`: in the loops, what makes a ring: one step's column put into it, or a copy;
      `dots`: matrix products inside the loops, and `copied`, elements of the largest array that
      is copied or transposed in them; `in_parts`: those of a matrix in four parts and a vector.
    """
    import jax
    import numpy as np

    from karploop.config import MeshConfig, ModelConfig
    from karploop.data.tokenizer import CharTokenizer
    from karploop.mesh import batch_parts, make_mesh
    from karploop.models.weights import Weights
    from karploop.sampling.distributions import Sampling
    from karploop.sampling.rollout import Decoding
    from karploop.sampling.sampler import Sampler

    shape = {"layers": 4, "width": 512, "mlp_width": 2048, "heads": 8, "kv_heads": kv_heads}
    config = ModelConfig(
        **shape, head_width=128, positions="rope", window=32, pattern="sf", dtype=dtype
    )
    mesh = make_mesh(MeshConfig(**axes), devices)
    weights = Weights(config, 16_384, mesh)
    sampler = Sampler(
        weights, CharTokenizer.ascii(), prompt_length=length - 1, completion_length=length - 1
    )
    parts = batch_parts(mesh)

    def array(*of_a_row):
        return jax.ShapeDtypeStruct((prompts, *of_a_row), np.int32)

    key = jax.eval_shape(jax.random.key, 0)
    arguments = (array(length), array(), array(), array(), key, sampler.prefix, samples)
    lowered = sampler._decode.lower(
        weights.abstract, *arguments, Sampling(), Decoding(slots, parts=parts)
    )
    compiled = lowered.compile()
    found = computations(hlo := compiled.as_text())
    bodies = re.findall(r" while\(.*?body=%?([\w.\-]+)", hlo)
    loops = set().union(*(reachable(found, body) for body in bodies))
    inside = "".join(found[name] for name in loops)
    outside = "".join(found[name] for name in found.keys() - loops)
    shards = [
        math.prod(sharding.shard_shape(x.shape))
        for x, sharding in zip(
            jax.tree.leaves(weights.abstract), jax.tree.leaves(weights.decode_shardings),
            strict=True,
        )
        if x.ndim > 1
    ]  # fmt: skip
    # Half of the layers keep a window, the others all columns, and of new tokens all but the last.
    decoded, heads = (slots or prompts) // parts, config.kv_heads // mesh.shape["tensor"]
    half, rows = config.layers // 2, decoded * samples
    lead = "".join(f"{size}," for size in (rows, heads) if size > 1)
    rings = [f"{lead}{columns},128" for columns in (32, length - 1)]
    read = [f"1,{decoded},{heads},{columns},128" for columns in (32, length)]
    assert all(f"[{kept}]" in inside for kept in rings)
    held = 2 * half * sum(map(_size, (*rings, *read)))
    itemsize = np.dtype(config.dtype).itemsize
    # Where fsdp splits parameters, what is gathered for decoding is a temporary, and meant to be.
    split = axes.get("fsdp", 1) > 1

    def largest(text, opcodes):
        found = results(text, *opcodes)
        return max([0, *(_size(shape) for shapes, _ in found for shape in shapes)])

    gathered = functools.partial(largest, opcodes=("all-gather", "all-gather-start"))

    return {
        "temporaries": compiled.memory_analysis().temp_size_in_bytes
        - itemsize * held
        - split * itemsize * sum(shards),
        "parameters": 4 * sum(shards),
        "smallest": min(shards),
        "outside": gathered(outside),
        "inside": gathered(inside),
        "turned": sum(
            bool({*shapes} & {*rings})
            and "broadcast" not in operands  # zeros, of which two are to be made
            for shapes, operands in results(hlo, "copy", "transpose")
        )
        # What was read is taken from the prefill's cache, once.
        + sum(bool({*shapes} & {*read}) for shapes, _ in results(inside, "copy", "transpose")),
        "written": sum(
            shapes[0] in rings
            for shapes, _ in results(inside, "fusion", "copy")
            if len(shapes) == 1
        ),
        "copied": largest(inside, ("copy", "transpose")),
        "in_parts": len(re.findall(r" = f32\[4,1,\d+\]\S* dot\(.*, lhs_batch_dims=\{0\}", inside)),
        "dots": len(re.findall(r" (?:dot|convolution)\(", inside)),
    }


if __name__ == "__main__":
    from karploop.dryrun import topology

    topology.prepare_environment()  # before JAX is imported
    # Large enough that not all of it fits the chips' vector memory.
    sizes = {"prompts": 64, "slots": int(sys.argv[2]), "length": 256, "dtype": "bfloat16"}
    devices = topology.devices_of(sys.argv[1])
    print(json.dumps(look_into_sampling(devices, **sizes, fsdp=2, tensor=2)))
