"""Claims about every LoRA flow: what it conserves, reduces to, is solved by (theory §1, §2)."""

from lorajax.claims.gradient_flow import conservation, descents, exact, modes

__all__ = ["conservation", "descents", "exact", "modes"]
