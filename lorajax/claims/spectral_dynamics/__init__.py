"""Claims of "Spectral dynamics of LoRA" (OpenReview gg2Wb2HPOI) and what is derived beside them."""

from lorajax.claims.spectral_dynamics import modes, ranks, tucker, tucker_ranks

__all__ = ["modes", "ranks", "tucker", "tucker_ranks"]
