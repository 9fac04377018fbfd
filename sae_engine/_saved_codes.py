"""How SparseCodes are taken apart and put together, by torch.compile and vmap and by pickles and torch.save."""
from __future__ import annotations

import copyreg

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from .codes import SparseCodes


def _flatten(codes: SparseCodes):
    children = [codes.values, codes.indices, codes.offsets]
    if codes.required is not None:  # None would be a leaf
        children.append(codes.required)
    return children, (codes.batch_shape, codes.num_latents, codes.k)


def _unflatten(children, context) -> SparseCodes:
    values, indices, offsets, *required = children
    batch_shape, num_latents, k = context
    return SparseCodes(values, indices, offsets, tuple(batch_shape), num_latents, k, *required)


pytree.register_pytree_node(
    SparseCodes, _flatten, _unflatten, serialized_type_name="sae_engine.SparseCodes"
)


def _reduce(codes: SparseCodes):
    """What a pickle says of codes: the function that makes them again, and its arguments. No cache is saved."""
    saved = (codes.values, codes.indices, codes.offsets, tuple(codes.batch_shape), codes.num_latents, codes.k)
    return _rebuild_codes, (*saved, codes.required)


def _rebuild_codes(values, indices, offsets, batch_shape, num_latents, k, required) -> SparseCodes:
    """Codes from a pickle, which names this function. Files may be damaged or hostile: nothing in them is believed."""
    tensors = [values, indices, offsets] if required is None else [values, indices, offsets, required]
    numbers = [*batch_shape, num_latents] if k is None else [*batch_shape, num_latents, k]
    sound = (
        all(isinstance(t, Tensor) and t.layout == torch.strided and t.device == values.device for t in tensors)
        and all(type(n) is int and n >= 0 for n in numbers)
        and values.is_floating_point()
        and [t.dtype for t in tensors[1:]] == [torch.int32, torch.int64, torch.int64][: len(tensors) - 1]
        and values.dim() == 1 and indices.shape == values.shape
        and offsets.shape == (torch.Size(batch_shape).numel() + 1,)
        and (required is None or required.dim() == 0)
    )  # fmt: skip
    if not sound:
        raise ValueError("these are no saved SparseCodes: their tensors and sizes do not fit together")
    codes = SparseCodes(
        values.contiguous(), indices.contiguous(), offsets.contiguous(), tuple(batch_shape), num_latents, k, required
    )
    if not values.is_meta:
        codes._check_numbers()
        owned = values.shape[0] if required is None else min(int(required), values.shape[0])
        if int(offsets[-1]) != owned or (k is not None and bool((offsets.diff() != k).any())):
            raise ValueError("these are no saved SparseCodes: their offsets do not fit the number of entries")
    return codes


copyreg.pickle(SparseCodes, _reduce)  # type: ignore[arg-type]
torch.serialization.add_safe_globals([_rebuild_codes])  # it checks what it is given: weights_only=True may call it
