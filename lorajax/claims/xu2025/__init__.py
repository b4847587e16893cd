"""Claims of Xu et al. 2025 (arXiv:2503.06982): two frozen layers with an adapter on each.

The abstract and the captions are stated; the formulas here are reconstructed or derived (theory
§4). Sizes, ranks and spectra are not known from the paper: 16×16 layers, rank 2, W2 half as strong
as W1 (so that δ_w = 1/2), W2 = U Σ2 Pᵀ and W1 = P Σ1 Vᵀ as gradient flow would have pre-trained
them. "Top" and "bottom" add 5 u vᵀ along the first and last principal component of Y_pre, "generic"
along random unit vectors.
"""

from lorajax.claims.xu2025 import escape, instances, late

__all__ = ["escape", "instances", "late"]
