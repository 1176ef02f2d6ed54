"""Palu, offline (arXiv 2407.21118): a model file whose keys and values are cached as low-rank latents.

`convert` replaces the projections W_k and W_v of each layer by two factors each, W' = B A: the cache holds h = A x, and
keys and values are rebuilt as B h when they are read. What it writes is a normal GGUF file with these keys

    palu.version     uint32 1                  palu.k_rank, palu.v_rank  int32 [n_layer]: of each group
    palu.group_size  uint32: KV heads          palu.latent    str: how latents are to be cached, f16, q4 or q3
    palu.hadamard    bool: latents are rotated, which B undoes
    palu.keep float32, palu.allocate, palu.calibration str: how it was made

and, in place of blk.I.attn_k.weight and blk.I.attn_v.weight, with G groups of w = group_size * head_dim components,

    blk.I.attn_k_a.weight, blk.I.attn_v_a.weight  [G rank, n_embd]   group after group
    blk.I.attn_k_b.weight, blk.I.attn_v_b.weight  [G w, rank]        KV head h belongs to group h // group_size

in F32 where the matrix was F32, else F16. Keys are what B gives before bias, norm and RoPE, in the file's own order of
rows. All other keys and tensors are byte for byte those of the model.
"""

from .conversion import ALLOCATIONS, LATENTS, Conversion, convert

__all__ = ["ALLOCATIONS", "LATENTS", "Conversion", "convert"]
