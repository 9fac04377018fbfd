"""The same autoencoder with other parameters: what one library computes at run time, another has in its weights.

Products and sums are taken in fp64 and rounded once.
"""
from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .. import rules
from ._checkpoint import Checkpoint


def fold_decoder_norms(c: Checkpoint) -> Checkpoint:
    """Without ``rescale_acts_by_decoder_norm``: the norms go to the encoder and decoder rows get norm 1.

    The rule sees the same pre-activations as before, so thresholds stay.
    """
    if not c.rescale_acts_by_decoder_norm:
        return c
    wide = {n: c.tensors[n].double() for n in ("W_enc", "b_enc", "W_dec")}
    norms = wide["W_dec"].norm(dim=1)
    wide["W_dec"] = wide["W_dec"] / torch.where(norms == 0, 1.0, norms)[:, None]
    wide["W_enc"], wide["b_enc"] = wide["W_enc"] * norms, wide["b_enc"] * norms
    return replace(c, tensors=_rounded(c, wide), rescale_acts_by_decoder_norm=False)


def unit_decoder_rows(c: Checkpoint) -> Checkpoint:
    """Decoder rows of norm 1 and latents as large as what they add to the output; the reconstruction is the same.

    Raises:
        ValueError: under another rule than ReLU and JumpReLU other latents would be kept.
    """
    if c.rescale_acts_by_decoder_norm:
        return fold_decoder_norms(c)
    if c.activation not in (rules.ReLU, rules.JumpReLU):
        raise ValueError(
            f"fold_decoder_norms must be False: {c.activation.__name__} would keep other latents; it can be True for "
            "ReLU, JumpReLU, and whatever has rescale_acts_by_decoder_norm"
        )
    W_dec = c.tensors["W_dec"].double()
    norms = W_dec.norm(dim=1)
    norms = torch.where(norms == 0, 1.0, norms)
    wide = {name: t.double() * norms for name, t in c.tensors.items() if name in ("W_enc", "b_enc", "threshold")}
    wide["W_dec"] = W_dec / norms[:, None]
    return replace(c, tensors=_rounded(c, wide))


def fold_input_scale(c: Checkpoint, scale: float, target_scale: float | None = None) -> Checkpoint:
    """The autoencoder for activations as they are, of one that was trained on ``scale`` times them
    (``expected_average_only_in``).

    ``target_scale`` is what multiplied a transcoder's targets; an autoencoder's are its inputs. Latents are the same;
    with ``rescale_acts_by_decoder_norm`` they, and BatchTopK's threshold, are divided by the latter like the decoder's
    rows. TopAFA compares latents times norms of the decoder's rows with the norm of the input. Where both shrink alike
    it keeps the same latents, else its ``target_scale`` takes the difference up.
    """
    target_scale = scale if target_scale is None else target_scale
    wide = {n: c.tensors[n].double() for n in ("W_enc", "W_dec", "b_dec")}
    wide["W_enc"] = wide["W_enc"] * scale
    wide["W_dec"], wide["b_dec"] = wide["W_dec"] / target_scale, wide["b_dec"] / target_scale
    if "W_skip" in c.tensors:
        wide["W_skip"] = c.tensors["W_skip"].double() * (scale / target_scale)
    if c.rescale_acts_by_decoder_norm and "threshold" in c.tensors:
        wide["threshold"] = c.tensors["threshold"].double() / target_scale
    options = c.options
    if c.activation is rules.TopAFA:
        options = {**options, "target_scale": options.get("target_scale", 1.0) * scale / target_scale}
    return replace(c, tensors=_rounded(c, wide), options=options)


def subtract_b_dec(c: Checkpoint, subtract: bool) -> Checkpoint:
    """With ``apply_b_dec_to_input`` as asked: the encoder's bias takes up the difference, ``b_dec @ W_enc``."""
    if c.apply_b_dec_to_input == subtract:
        return c
    shift = c.tensors["b_dec"].double() @ c.tensors["W_enc"].double()
    b_enc = c.tensors["b_enc"].double() + (shift if subtract else -shift)
    return replace(c, tensors=_rounded(c, {"b_enc": b_enc}), apply_b_dec_to_input=subtract)


def gated_as_jumprelu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the JumpReLU that a gated SAE with tied weights is, from b_gate, b_mag, r_mag and the others.

    A gate ``e + b_gate > 0`` says of the magnitude ``p = exp(r_mag) e + b_mag`` that ``p > b_mag - exp(r_mag) b_gate``.
    Rajamanoharan et al. 2024, arXiv:2404.16014.
    """
    rest = {name: t for name, t in tensors.items() if name not in ("b_gate", "b_mag", "r_mag")}
    W_enc, b_gate, b_mag = tensors["W_enc"], tensors["b_gate"].double(), tensors["b_mag"].double()
    scale = tensors["r_mag"].double().exp()
    threshold = (b_mag - scale * b_gate).clamp(min=0)  # magnitudes pass a ReLU as well
    exact = torch.promote_types(W_enc.dtype, torch.float32)
    folded = {"W_enc": (W_enc.double() * scale).to(W_enc.dtype), "threshold": threshold.to(exact)}
    return {**rest, **folded, "b_enc": tensors["b_mag"]}


def _rounded(c: Checkpoint, wide: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: wide[n].to(t.dtype) if n in wide else t for n, t in c.tensors.items()}
