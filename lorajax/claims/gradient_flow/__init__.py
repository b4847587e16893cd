"""Claims about every LoRA flow: what it conserves, reduces to, is solved by (theory §1, §2)."""

from lorajax.claims.gradient_flow import conservation, critical, descents, exact, modes

__all__ = ["conservation", "critical", "descents", "exact", "modes"]
