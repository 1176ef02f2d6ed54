"""What papers, and logs that their authors published, say of speed, each with its source and hardware."""

from __future__ import annotations

# SparQ (arXiv 2312.04985v6), table 4 and the logs of graphcore-research/llm-inference-research, branch benchmarks:
# 32 heads of 128, float16, K in two layouts, r = 32, k = 128; microseconds per query of dense attention and of the
# better of the two sparse kernels (Triton, compiled). {(B, S): ((A100 dense, sparse), (A10G dense, sparse))}
SPARQ_GPU = {
    (1, 4096): ((110, 405), (183, 461)),
    (1, 16384): ((257, 528), (588, 510)),
    (1, 65536): ((871, 748), None),
    (4, 4096): ((66.8, 103), (144, 128)),
    (4, 16384): ((212, 173), (569, 167)),
    (16, 4096): ((52.2, 38.8), (137, 43.9)),
    (16, 16384): ((196, 66.0), (540, 116)),
    (64, 4096): ((48.9, 16.2), (128, 30.8)),
    (64, 16384): ((193, 46.2), None),
}  # fmt: skip

# The same logs, CPU: EPYC 7763, 30 threads, float32, PyTorch 2.1.2, B = 1; milliseconds.
# {S: (dense, r=16 k=64, r=32 k=128)}
SPARQ_CPU = {
    1024: (0.17, 1.77, 2.13),
    2048: (0.42, 1.82, 2.30),
    4096: (1.99, 2.20, 2.81),
    8192: (5.41, 2.96, 6.44),
    16384: (12.3, 5.99, 11.6),
    65536: (56.8, 21.9, 52.2),
}  # fmt: skip

# SparQ, figure 9: llama.cpp fork, an EPYC with 32 threads, Llama-2-7B Q8_0, r = d/12, k = S/12. {S: ms (dense, sparse)}
FIGURE_9 = {
    4096: (54.0, 47.5),
    8192: (65.5, 51.8),
    16384: (85.3, 54.3),
    32768: (129.3, 74.7),
    65536: (219.5, 106.7),
    131072: (426.9, 168.0),
}  # fmt: skip

# SparQ, figure 10: gpt-fast fork on an H100 PCIe, Llama-2-7B bfloat16, r = 16, k = S/16. {S: speed-up}
FIGURE_10 = {4096: 0.99, 8192: 1.09, 16384: 1.31, 32768: 1.68, 45000: 1.88}

# TOVA (arXiv 2401.06104), table 1: V100, Llama-2-7B, 4096 tokens. {budget: (largest batch, speed over the full cache)}
TOVA = {256: (139, 8.5), 512: (70, 4.8), 1024: (35, 3.1), 2048: (17, 1.7), 4096: (8, 1.0)}

# KeepKV's measurements: Llama-2-7B, A100-80G, 4k, a fifth of the cache; tokens/s, the full cache with 2 sequences,
# others with 8
KEEPKV = {"dense": 116.5, "h2o": 317.3, "d2o": 214.8}

# Palu (arXiv 2407.21118): RTX 4090, Llama-2-7B, half the rank, 64k; over dense attention
PALU = {"latent-f16": 1.89, "latent-q4": 2.91}
