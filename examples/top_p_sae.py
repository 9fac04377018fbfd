"""The rule of top_p.py as an architecture that a configuration names:

    PYTHONPATH=examples sae-engine train --preset embedded --set saes.0.architecture=top_p_sae:TopPSAE --set saes.0.p=.5
"""
from dataclasses import dataclass

from top_p import TopP

from sae_engine.training import Architecture


@dataclass(frozen=True, kw_only=True)
class TopPSAE(Architecture):
    p: float = 0.9

    def build_rule(self, d_sae: int, steps: int) -> TopP:
        return TopP(self.p)
