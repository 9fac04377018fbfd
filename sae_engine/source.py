"""One set of latents of a crosscoder, as a step and a pass see it."""
from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from .rules import Activation
from .rules.per_source import rule_of

if TYPE_CHECKING:
    from .crosscoder import Crosscoder

__all__ = ["Source"]


@dataclass(frozen=True, eq=False)
class Source:
    """One set of latents of a :class:`Crosscoder`, with the names that a :class:`SparseAutoencoder` has for its own.

    Attributes:
        coder: that it belongs to.
        number: among its sources.
        reads, writes: columns of the concatenated input and output.
        read_sites, written_sites: the sites that lie there.
    """

    coder: Crosscoder
    number: int
    reads: slice
    writes: slice
    read_sites: range
    written_sites: range

    @property
    def W_enc(self) -> Tensor:
        """(width read, d_sae)."""
        return self.coder.W_enc[self.number]

    @property
    def W_dec(self) -> Tensor:
        """(d_sae, width written): row f is what latent f adds to all the sites that it writes."""
        return self.coder.W_dec[self.number]

    @property
    def b_enc(self) -> Tensor:
        """(d_sae,), a view."""
        return self.coder.b_enc[self.number]

    @property
    def _encoder_bias(self) -> Tensor:
        return self.b_enc

    @property
    def activation(self) -> Activation:
        return rule_of(self.coder.activation, self.number)

    @property
    def d_in(self) -> int:
        return self.reads.stop - self.reads.start

    @property
    def d_out(self) -> int:
        return self.writes.stop - self.writes.start

    @property
    def d_sae(self) -> int:
        return self.coder.d_sae
