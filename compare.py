"""Loss, gradient (by HF names) and memory on the bundled tiny model; tree-agnostic. argv: out.npz"""
import sys, dataclasses, jax, numpy as np, jax.numpy as jnp
from spiral_jax.model import hf
from spiral_jax.model.architecture import read_architecture, Architecture
from spiral_jax.model.transformer import ModelConfig, init_variables
from spiral_jax.learner.logprobs import group_logprobs
from spiral_jax.core.mesh import host_mesh, path_name
mesh = host_mesh()
out = {}
def names(tree, L):
    try: return {o.name: o.read() for o in hf.outputs_of(tree)}
    except TypeError: return {o.name: o.read() for o in hf.outputs_of(tree, L)}
for which in ("bundled:tiny",):
    path = hf.resolve_path(which)
    arch = read_architecture(path)
    for rank in (0, 4):
        for remat in ("none","layer","attention","dots"):
            config = ModelConfig(arch, lora_rank=rank, lora_alpha=6.0, attention_block=16, remat=remat)
            params = hf.load_params(path, config, mesh)
            rng = np.random.default_rng(0)
            prompt = rng.integers(0, arch.V, (4, 40)).astype(np.int32); plen = np.array([40, 13, 1, 29], np.int32)
            trace = rng.integers(0, arch.V, (4, 3, 21)).astype(np.int32)
            w = rng.normal(size=(4,3,21)).astype(np.float32)
            if rank:
                lora = jax.tree_util.tree_map_with_path(lambda p, a: None, jax.eval_shape(lambda: init_variables(config, jax.random.key(0)))["lora"])
                shapes = jax.eval_shape(lambda: init_variables(config, jax.random.key(0)))["lora"]
                def fill(p, a):
                    n = path_name(p)
                    room, rest = n.split("/", 1)
                    full = np.random.default_rng([*rest.encode()]).normal(0, 0.1, (arch.L, *(a.shape[1:] if room == "layers" else a.shape))).astype(np.float32)
                    if room == "last_layer": return full[-1]
                    return full[:a.shape[0]]
                lora = jax.tree_util.tree_map_with_path(fill, shapes)
                vs = {"params": params, "lora": lora}; key = "lora"
            else:
                vs = {"params": params}; key = "params"
            def loss(part):
                lp, _ = group_logprobs(config, vs | {key: part}, prompt, plen, trace, 1.0, 8)
                return jnp.sum(w * lp), lp
            (v, lp), g = jax.jit(jax.value_and_grad(loss, has_aux=True))(vs[key])
            out[f"{rank}/{remat}/lp"] = np.asarray(lp)
            for n, a in names(g, arch.L).items(): out[f"{rank}/{remat}/{n}"] = a
np.savez(sys.argv[1], **out)
# memory
arch = Architecture(V=512, D=256, F=768, L=7, H=8, J=4, E=32, norm_eps=1e-6, rope_theta=1e4, tied=True)
for rank in (0, 8):
    for remat in ("layer", "attention", "dots", "none"):
        config = ModelConfig(arch, lora_rank=rank, attention_block=32, remat=remat)
        shapes = jax.eval_shape(lambda: init_variables(config, jax.random.key(0)))
        key = "lora" if rank else "params"
        i32 = jnp.int32
        ids = (jax.ShapeDtypeStruct((2, 64), i32), jax.ShapeDtypeStruct((2,), i32), jax.ShapeDtypeStruct((2, 2, 32), i32))
        f = lambda part, rest, *ids: group_logprobs(config, rest | {key: part}, *ids, 1.0, 16)[0].sum()
        m = jax.jit(jax.value_and_grad(f)).lower(shapes.pop(key), shapes, *ids).compile().memory_analysis()
        print(rank, remat, "temp", m.temp_size_in_bytes, "args", m.argument_size_in_bytes, "out", m.output_size_in_bytes)
