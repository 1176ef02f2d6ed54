"""How much each projection matters, by Fisher information (Palu, arXiv 2407.21118, section 3.3).

A weight's information is the mean over windows of its squared gradient, that of the loss of a window; a projection's
score the mean over its weights of the square roots. The gradients are exact and float32; a token's label is the token
that follows it (the paper's code shifts labels twice, and its gradients are float16).
"""

from __future__ import annotations

import numpy as np

from ..config import ModelConfig
from ..errors import ModelError
from ..gguf_file import GGUFFile
from .backward import Network
from .calibration import Windows
from .probes import spread
from .side_file import SideFile

N_WINDOWS, LENGTH = 32, 512  # of the calibration text, and tokens of each


def fisher_scores(file: GGUFFile, config: ModelConfig, windows: Windows, side: SideFile, key: str) -> np.ndarray:
    """float64 [n_layer, 2]: of keys and values. ModelError if a gradient is not finite."""
    network = Network(file, config)
    tokens = spread(windows.tokens, N_WINDOWS)[:, :LENGTH]
    information = np.zeros((config.n_layer, 2, config.n_head_kv * config.head_dim, config.n_embd), np.float32)
    for i in side.steps("differentiating the loss", key, len(tokens), information):
        for gradient in network.gradients(tokens[i]):
            for into, d in zip(information[gradient.layer], (gradient.d_k, gradient.d_v), strict=True):
                into += np.square(d.T @ gradient.x)
    scores = np.sqrt(information / len(tokens)).mean(axis=(2, 3), dtype=np.float64)
    if not np.isfinite(scores).all():
        raise ModelError(f"{file.path}: gradients are not finite: the file's weights are damaged")
    return scores
