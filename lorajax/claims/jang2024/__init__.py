"""Claims of Jang, Lee, Ryu 2024 (arXiv:2402.11867): LoRA in the NTK regime has no spurious minima.

The instances are those of `claims.ntk`: 8×8 updates, up to 20 Gaussian data, one output, squared
loss, decay a tenth of the least one at which nothing is learned. A map over (rank, samples) is one
vmapped program, and every run's end is judged by its own certificate.
"""

from lorajax.claims.jang2024 import generalization, instances, landscape, optimum
from lorajax.claims.jang2024.landscape import outcomes

__all__ = ["generalization", "instances", "landscape", "optimum", "outcomes"]
