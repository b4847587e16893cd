"""Claims of Kim, Kim, Ryu 2025 (arXiv:2502.09376): a global minimum, or a loud failure."""

from lorajax.claims.kim2025 import instances, landscape

__all__ = ["instances", "landscape"]
