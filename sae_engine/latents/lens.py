"""The logit lens: which tokens a latent's direction makes likelier, if the model ended behind it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..data.contexts import check_int
from ..data.models import LanguageModel
from ..data.places import input_device
from ..data.replacing import run_with_replacement
from ..data.sites import Site

ADDED = ("attn_out", "mlp_out")  # to the stream; the others are the stream itself
IN_THE_STREAM = (*ADDED, "resid_pre", "resid_mid", "resid_post")
ROWS = 64  # at a time: as many rows of logits are in memory


class Lens(NamedTuple):
    """What directions raise and lower most: token ids and changes of their logits, all (directions, k)."""

    raised: Tensor
    raised_by: Tensor
    lowered: Tensor
    lowered_by: Tensor


@torch.no_grad()
def logit_lens(lm: LanguageModel, directions: Tensor, k: int = 10) -> Lens:
    """The tokens whose logits directions of the residual stream raise and lower most.

    A direction, scaled to the norm sqrt(d_model), takes the place of what leaves the last block, and goes through the
    final norm, the unembedding and what else the model does to logits. What zeros give there, the biases, is
    subtracted. So the numbers compare tokens, not latents, and say nothing of what later blocks make of a direction.

    Args:
        lm: from :func:`sae_engine.data.load_language_model`.
        directions: (n, d_model) rows of a decoder that writes to the residual stream.
        k: how many tokens on either side.

    Raises:
        TypeError, ValueError: an argument is of another kind, shape or out of range; the last block's output cannot be
            read.

    Source: nostalgebraist 2020, "interpreting GPT: the logit lens".

    Example:
        >>> lm = se.data.load_language_model()
        >>> embedding = lm.model.get_output_embeddings().weight[[500]]
        >>> norm = lm.model.transformer.ln_f.weight
        >>> logit_lens(lm, embedding / norm, k=1).raised.tolist()
        [[500]]
    """
    if not isinstance(lm, LanguageModel):
        raise TypeError(f"lm must be a LanguageModel (see load_language_model), got {type(lm).__name__}")
    if not isinstance(directions, Tensor) or not directions.is_floating_point():
        raise TypeError(f"directions must be a floating-point tensor, got {type(directions).__name__}")
    if directions.ndim != 2 or directions.shape[1] != lm.d_model or not len(directions):
        raise ValueError(f"directions must be (n, {lm.d_model}), got {tuple(directions.shape)}")
    k = check_int("k", k, 1)
    site = Site("resid_post", lm.num_layers - 1)
    device = input_device(lm.model)
    norms = directions.norm(dim=1, keepdim=True, dtype=torch.float32)
    rows = directions.float() / torch.where(norms == 0, 1.0, norms) * math.sqrt(lm.d_model)
    found = []
    for part in rows.split(ROWS):
        ended = torch.cat([torch.zeros_like(part[:1]), part])[:, None]
        ids = torch.zeros(len(ended), 1, dtype=torch.int64, device=device)
        logits = run_with_replacement(lm.model, ids, ended.to, site=site)[:, 0].float()
        change = logits[1:] - logits[:1]
        raised, lowered = change.topk(min(k, change.shape[1])), change.neg().topk(min(k, change.shape[1]))
        found.append([t.cpu() for t in (raised.indices, raised.values, lowered.indices, -lowered.values)])
    return Lens(*(torch.cat(parts) for parts in zip(*found, strict=True)))
