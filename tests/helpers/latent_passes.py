"""Steps of the latent pass that tests share: drawn at small shapes, and taken by any back end."""
from types import SimpleNamespace

import torch

from sae_kernels import reference
from sae_kernels._terms import GATED, GIVEN, Term, lists_of
from sae_kernels.ops import ops

FAST = ("torch", "triton")
LAYOUTS = ("by latent", "by column")
MODES = {
    "none": (), "gated": (GATED,), "two": (GATED, GATED), "four": (GATED, GIVEN, GATED, GATED),
}  # fmt: skip
DTYPES = {  # of the computation and of the parameters; copies where they differ
    "fp32": (torch.float32, torch.float32), "bf16": (torch.bfloat16, torch.float32),
    "fp16": (torch.float16, torch.float32), "bf16 parameters": (torch.bfloat16, torch.bfloat16),
    "fp16 parameters": (torch.float16, torch.float16),
}  # fmt: skip
SHAPES = {  # B, F, D_out, D_in
    "B6-F11-D7-5": (6, 11, 7, 5), "B1-F1-D1-1": (1, 1, 1, 1), "B9-F17-D33-33": (9, 17, 33, 33), "B0": (0, 9, 4, 3),
    "B9-F13-D70-5": (9, 13, 70, 5),  # an encoder that is loaded beside the decoder
}  # fmt: skip
# Numbers that fp32 holds exactly. On a GPU torch's fused Adam rounds beta2 to fp32 before it subtracts it from 1, which
# of 0.99 would move the second moment by eight epsilons of a squared gradient: another beta2, no error of the step.
OPTIONS = dict(beta1=0.875, beta2=1 - 2.0**-7, eps=2.0**-27, weight_decay=2.0**-7)


def term_of(values, indices, offsets, offered, num_latents, mode, grad, *, dense=False):
    empty = [torch.empty(0, dtype=dtype) for dtype in (torch.int64, torch.int32, torch.int64)]
    by_latent = empty if dense else reference.by_latent(indices, offsets, num_latents)
    return Term(grad, values, offered, indices, offsets, *by_latent, mode)


def make(shape, modes, dtypes=(torch.float64, torch.float64), *, kept=0.3, dense=()):
    """A step whose every tensor is drawn, but for values: those follow from x, the encoder and the bias.

    Drawn on the CPU, so that every device takes the same step: one whose gates are all shut leaves rounding alone.
    """
    with torch.device("cpu"):
        s = drawn(shape, modes, dtypes, kept, dense)
    return converted(s, lambda t: t.to(torch.get_default_device()))


def drawn(shape, modes, dtypes, share, dense):
    rows, num_latents, d_out, d_in = shape
    compute, parameter = dtypes
    s = SimpleNamespace(shape=shape, compute=compute, step=torch.tensor(3.0), lr=torch.tensor(0.05))
    s.x = torch.randn(rows, d_in).to(compute)
    sizes = (num_latents, d_out), (num_latents, d_in), (num_latents,)
    s.parameters = [torch.randn(size).to(parameter) for size in sizes]
    s.exp_avgs = [torch.randn(size).mul(0.1).to(parameter) for size in sizes]
    s.exp_avg_sqs = [torch.rand(size).add(0.1).to(parameter) for size in sizes]
    s.copies = [] if compute == parameter else [p.to(compute) for p in s.parameters[:2]]
    s.along = torch.randn(num_latents).to(parameter)
    pre = s.x.double() @ s.parameters[1].double().T + s.parameters[2].double()
    s.kept, s.terms = [], []
    for number, mode in enumerate(modes):
        kept = torch.rand(rows, num_latents) < share
        kept[:, -1:] = False  # a latent without entries, and a row
        kept[1:2] = False
        act = {GATED: reference.relu(pre), GIVEN: torch.randn(pre.shape, dtype=pre.dtype)}[mode]
        values, indices, offsets = reference.compress_kept(act.to(compute), kept)[:3]
        offered = torch.randn(0 if mode == GATED and number == 0 else values.numel()).to(compute)
        grad = torch.randn(rows, d_out).to(compute)
        s.kept.append(kept)
        s.terms.append(term_of(values, indices, offsets, offered, num_latents, mode, grad, dense=number in dense))
    return s


def converted(s, to):
    """The same step with ``to`` applied to every tensor."""
    one = lambda t: to(t) if isinstance(t, torch.Tensor) else t  # noqa: E731
    new = {n: [one(t) for t in v] if isinstance(v, list) else one(v) for n, v in vars(s).items()}
    new["terms"] = [Term(*map(one, term)) for term in s.terms]
    return SimpleNamespace(**new)


def cast(s, dtype):
    """The same step with every number in ``dtype``, but for those that Adam takes as tensors."""
    wide = converted(s, lambda t: t.to(dtype) if t.is_floating_point() else t)
    wide.step, wide.lr = s.step, s.lr
    return wide


def strided(t):
    """The same matrix, its columns contiguous."""
    return t.T.contiguous().T if t.dim() == 2 else t.clone()


def gradients(s, backend, *, dtype=None, along=True):
    weight = s.copies[0] if s.copies else s.parameters[0]
    dtype = dtype or torch.promote_types(s.compute, torch.float32)
    return ops.latent_gradients(s.x, weight, s.along if along else None, *lists_of(s.terms), dtype, backend)


def adam(s, backend, *, layout=LAYOUTS[0], number=3, along=True, unit_rows=True, skip=None, **options):
    """All that a step changes or returns, by name. What ``s`` holds stays."""
    options = OPTIONS | options
    groups = [[t.clone() for t in group[:number]] for group in (s.parameters, s.exp_avgs, s.exp_avg_sqs)]
    groups.append([t.clone() for t in s.copies])
    if layout == LAYOUTS[1]:
        for group in groups:
            group[1:2] = [strided(t) for t in group[1:2]]
    skip = None if skip is None else torch.tensor(skip)
    center, square = ops.latent_adam(
        *groups, s.x, s.along if along else None, *lists_of(s.terms), s.step, s.lr, options["beta1"], options["beta2"],
        options["eps"], options["weight_decay"], unit_rows, skip, backend,
    )  # fmt: skip
    names = ("parameter", "exp_avg", "exp_avg_sq", "copy")
    found = {f"{n} {i}": t for n, group in zip(names, groups, strict=True) for i, t in enumerate(group)}
    return found | {"center": center, "square": square}
