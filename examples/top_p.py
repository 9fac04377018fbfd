"""A rule of one's own: as many entries of a token as hold a share p of the energy of its pre-activations after ReLU.

    sae = se.SparseAutoencoder(768, 24576, TopP(0.9))
    step = se.training.TrainStep(sae, lr=1e-4)

A checkpoint names the rule: import this file before ``SparseAutoencoder.from_pretrained`` reads one.
"""
import sae_engine as se


class TopP(se.Activation):
    entry_values = se.rules.kept_values  # what is kept is the pre-activation: gradients are then as sparse as codes

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def _select(self, pre, backend):
        return se.functional.energy_share(pre, self.p, capacity=se.rules.captured_size(pre), backend=backend)
