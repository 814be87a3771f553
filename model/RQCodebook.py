"""RQCodebook, the residual quantizer (Eq. 3-5), under the name that other scripts import. The code: quantizers.py."""

from model.quantizers import (
    RQCodebook,
    RQOutput,
    code_perplexity,
    collisions,
    entropy_bits,
)

__all__ = ["RQCodebook", "RQOutput", "code_perplexity", "collisions", "entropy_bits"]
