"""minirt: GGUF Llama-family models in Python on CPU and NVIDIA GPU, with the KV-cache compression methods side by side.

from minirt import Llama, Sampling

with Llama.load("model.gguf") as llama:
    for piece in llama.stream("The capital of France is", max_tokens=8, sampling=Sampling(temperature=0)):
        print(piece, end="", flush=True)
"""

from typing import TYPE_CHECKING, Any

from .errors import ModelError, UsageError
from .version import __version__

if TYPE_CHECKING:
    from .answer import Answer
    from .llama import Llama
    from .sampling import Sampling

__all__ = ["Answer", "Llama", "ModelError", "Sampling", "UsageError", "__version__"]


def __getattr__(name: str) -> Any:
    # Llama and what it needs are imported when first asked for: `minirt --help` answers at once.
    if name in ("Answer", "Llama", "Sampling"):
        from . import answer, llama, sampling

        return {"Answer": answer.Answer, "Llama": llama.Llama, "Sampling": sampling.Sampling}[name]
    raise AttributeError(f"module 'minirt' has no attribute {name!r}")
