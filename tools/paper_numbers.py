"""What papers, and logs that their authors published, say of speed, each with its source and hardware."""

from __future__ import annotations

# SparQ (arXiv 2312.04985v6), table 4 and the logs of graphcore-research/llm-inference-research, branch benchmarks:
# 32 heads of 128, float16, r = 32, k = 128; microseconds per query of dense attention, of the better of the two sparse
# kernels with K in two layouts (Triton, compiled), and of the one with K in one layout.
# {(B, S): ((A100 dense, two, one), (A10G dense, two, one))}
SPARQ_GPU = {
    (1, 4096): ((110, 405, 569), (183, 461, 638)),
    (1, 16384): ((257, 528, 1107), (588, 510, 851)),
    (1, 65536): ((871, 748, 3123), None),
    (4, 4096): ((66.8, 103, 145), (144, 128, 160)),
    (4, 16384): ((212, 173, 308), (569, 167, 351)),
    (16, 4096): ((52.2, 38.8, 58.9), (137, 43.9, 95.5)),
    (16, 16384): ((196, 66.0, 157), (540, 116, 324)),
    (64, 4096): ((48.9, 16.2, 38.2), (128, 30.8, 78.6)),
    (64, 16384): ((193, 46.2, 133), None),
}  # fmt: skip

# The same logs, CPU: EPYC 7763, 30 threads, float32, PyTorch 2.1.2, B = 1; milliseconds.
# {S: (dense, r=16 k=64, the same with K in one layout, r=32 k=128)}
SPARQ_CPU = {
    1024: (0.17, 1.77, 1.65, 2.13),
    2048: (0.42, 1.82, 1.78, 2.30),
    4096: (1.99, 2.20, 1.90, 2.81),
    8192: (5.41, 2.96, 3.73, 6.44),
    16384: (12.3, 5.99, 11.5, 11.6),
    65536: (56.8, 21.9, 52.0, 52.2),
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

# SparQ, figure 3 and appendix D1: llama.cpp, Llama-2-7B, B = 1, a CPU and an A100: seconds of a token are
# (per token of the context, without any)
DENSE_LINES = {"CPU": (1.62e-5, 0.2438), "A100": (4.686e-7, 0.009481)}

# SparQ, appendix: a Bow IPU whose cache lies in remote memory, float16, B = 1, S = 16384, r = 32, k = 128; ms
IPU = (16384, 40.43, 5.457)

# SparQ, figure 10: gpt-fast fork on an H100 PCIe, Llama-2-7B bfloat16, r = 16, k = S/16. {S: speed-up}
FIGURE_10 = {4096: 0.99, 8192: 1.09, 16384: 1.31, 32768: 1.68, 45000: 1.88}

# TOVA (arXiv 2401.06104), table 1: V100, Llama-2-7B, 4096 tokens. {budget: (largest batch, speed over the full cache)}
TOVA = {256: (139, 8.5), 512: (70, 4.8), 1024: (35, 3.1), 2048: (17, 1.7), 4096: (8, 1.0)}

# KeepKV's measurements: Llama-2-7B, A100-80G, 4k, a fifth of the cache; tokens/s, the full cache with 2 sequences,
# others with 8
KEEPKV = {"dense": 116.5, "h2o": 317.3, "d2o": 214.8}

# Palu (arXiv 2407.21118): RTX 4090, Llama-2-7B, half the rank, 64k; over dense: attention, and a whole model's token
PALU = {"latent-f16": (1.89, 1.71), "latent-q4": (2.91, 2.59)}
