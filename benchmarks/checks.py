"""How a provider's result is compared with the truth, at the size that is timed, just before it is timed.

The truth is ``kernels/reference.py`` or, where that takes seconds (it sorts whole matrices, and turns codes into dense
ones), stock operators that keep the same entries and sum in the same precision; tests hold these to the reference. It
is worked out once for all providers of a cell.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from guarded import Wrong
from inputs import Inputs, total
from stock import Output, bags, dense_codes
from torch import Tensor

from sae_engine import SparseCodes
from sae_kernels import reference

if TYPE_CHECKING:
    from registry import Provider

PART_ELEMENTS = 1 << 22  # of a matrix that a comparison takes at a time: little memory, and on a CPU a cache's worth


def require(holds: bool, op: str, provider: Provider, what: str) -> None:
    if not holds:
        raise Wrong(f"{op}: {provider.name} differs from the reference: {what}")


def once(i: Inputs, name: str, make: Callable[[], Any]) -> Any:
    """``make()``, kept with the inputs for the next provider."""
    known = vars(i).setdefault("known", {})
    if name not in known:
        known[name] = make()
    return known[name]


def parts(rows: int, width: int) -> Iterator[slice]:
    step = max(PART_ELEMENTS // width, 1)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def as_dense(output: Output, like: Tensor) -> Tensor:
    """Any of the forms in which providers return a selection, as a matrix."""
    dense = torch.zeros_like(like)
    match output:
        case SparseCodes():
            try:
                return output.check().to_dense()
            except ValueError as error:
                raise Wrong(f"these are no codes: {error}") from error
        case Tensor():
            return output
        case (values, rows, columns):
            dense[rows, columns] = values
        case (values, indices) if values.dim() == 2:
            dense.scatter_(1, indices.long(), values)
        case (values, positions):
            dense.view(-1)[positions] = values
    return dense


# --- selections ----------------------------------------------------------------------------------------------------


def check_selection(name: str, expected: Callable[[Inputs], Tensor], *, batch: bool) -> Callable:
    """Ours, and whoever promises our tie rule, must keep the very same entries; others the same values."""

    def check(i: Inputs, provider: Provider, output: Output) -> None:
        want, got = once(i, "selection", lambda: expected(i)), as_dense(output, i.pre)
        if provider.lowest or provider.name.startswith("ours"):
            require(torch.equal(want, got), name, provider, "other entries")
            return
        same = same_values(want.flatten()[None], got.flatten()[None]) if batch else same_values(want, got)
        require(same, name, provider, "other values")

    return check


def same_values(want: Tensor, got: Tensor) -> bool:
    """Whether each row holds the same numbers other than 0, wherever they stand in it."""
    if want.shape != got.shape:
        return False
    if torch.equal(want, got):
        return True
    count = (want != 0).sum(1)
    if not torch.equal(count, (got != 0).sum(1)):
        return False
    rows = torch.repeat_interleave(torch.arange(len(want), device=want.device), count)
    ordered = []
    for dense in (want, got):
        values, order = dense[dense != 0].sort()
        ordered.append(values[rows[order].sort(stable=True).indices])  # row by row, ascending in each
    return torch.equal(*ordered)


def first_ranked(by: Tensor, cut: Tensor, room: Tensor | int, dim: int) -> Tensor:
    """What lies above the cut, and of what equals it the first along ``dim``, as far as there is room for both."""
    above, tied = by > cut, by == cut
    left = room - above.sum(dim, keepdim=True)
    return above | (tied & (tied.cumsum(dim, dtype=torch.int32) <= left))


def expected_topk(i: Inputs) -> Tensor:
    cut = i.pre.topk(i.k, sorted=False).values.amin(1, keepdim=True)
    return torch.cat([
        torch.where(first_ranked(i.pre[rows], cut[rows], i.k, 1), i.pre[rows].relu(), 0.0)
        for rows in parts(*i.pre.shape)
    ])  # fmt: skip


def expected_batch_topk(i: Inputs) -> Tensor:
    flat = i.pre.relu().flatten()
    cut = flat.topk(total(i), sorted=False).values.min()
    return torch.where(first_ranked(flat, cut, total(i), 0), flat, 0.0).view_as(i.pre)


def expected_feature_topm(i: Inputs) -> Tensor:
    acts = i.pre.relu()
    ranked = acts.topk(max(i.most, 1), dim=0).values
    cut = ranked.gather(0, (i.m.long() - 1).clamp(min=0)[None])
    return torch.where(first_ranked(acts, cut, i.m, 0), acts, 0.0)


def expected_threshold(i: Inputs) -> Tensor:
    values, indices, offsets, _ = reference.threshold(i.pre, i.theta, None, None, False)
    return reference.to_dense(values, indices, offsets, i.case.F)


def nearest_prefix(i: Inputs) -> tuple[Tensor, Tensor]:
    """How near (B,) in fp64 the norm of a prefix of each row comes to its target, and how long (B,) that prefix is."""
    return once(i, "prefixes", lambda: _nearest_prefix(i))


def _nearest_prefix(i: Inputs) -> tuple[Tensor, Tensor]:
    def of(rows: slice) -> tuple[Tensor, Tensor]:
        score = (i.pre[rows].relu().float() * i.weight_norm).sort(dim=1, descending=True).values
        distance = (score.double().square_().cumsum_(1).sqrt_() - i.target[rows, None].double()).abs_()
        least, place = distance.min(1)
        return least, torch.minimum(place + 1, (score > 0).sum(1))

    least, count = zip(*map(of, parts(*i.pre.shape)), strict=True)
    return torch.cat(least), torch.cat(count)


def check_norm_match(i: Inputs, provider: Provider, output: Output) -> None:
    """Kept values are unscaled, and no prefix is nearer by more than rounding: 1e-6 ours, 1e-4 a running fp32 sum."""
    kept = as_dense(output, i.pre)
    least, _ = nearest_prefix(i)
    rounding = (1e-6 if provider.name.startswith("ours") else 1e-4) * i.target.double()
    for rows in parts(*kept.shape):
        unscaled = (kept[rows] == 0) | (kept[rows] == i.pre[rows])
        require(bool(unscaled.all()), "norm_match", provider, "values that are not the input's")
        distance = ((kept[rows].double() * i.weight_norm).norm(dim=1) - i.target[rows].double()).abs()
        near = distance <= least[rows] + rounding[rows]
        require(bool(near.all()), "norm_match", provider, "a prefix that is not the nearest")


def check_energy_share(i: Inputs, provider: Provider, output: Output) -> None:
    """What is kept holds the share, and no longer without its smallest entry, up to the rounding of a sum."""
    kept = as_dense(output, i.pre)
    rounding = 1e-6 if provider.name.startswith("ours") else 1e-4
    for rows in parts(*kept.shape):
        pre, of = i.pre[rows].relu(), kept[rows]
        require(bool(((of == 0) | (of == pre)).all()), "energy_share", provider, "values that are not the input's")
        smallest = torch.where(of > 0, of, torch.inf).amin(1, keepdim=True)
        left_out = torch.where(of == 0, pre, 0.0).amax(1, keepdim=True)
        require(bool((left_out <= smallest).all()), "energy_share", provider, "a larger entry left out")
        total = pre.double().square().sum(1)
        needed, held = i.share[rows].double() * total, of.double().square().sum(1)
        enough = held >= needed - rounding * total
        shortest = held - smallest[:, 0].double().square() < needed + rounding * total
        require(bool((enough & shortest).all()), "energy_share", provider, "a prefix that is not the shortest")


# --- sums over codes -----------------------------------------------------------------------------------------------


def check_sum(name: str, expected: Callable[[Inputs, torch.dtype], Tensor]) -> Callable:
    """Within twice the reference's own error in the tested dtype plus a rounding (CONTRIBUTING, Tolerances).

    Stock operators may round every partial sum to the tested dtype: they get one rounding per entry.
    """

    def check(i: Inputs, provider: Provider, output: Output) -> None:
        dtype = output.dtype
        truth = once(i, f"{name} exact", lambda: expected(i, torch.float64))
        require(output.shape == truth.shape, name, provider, f"shape {tuple(output.shape)}")
        largest = once(i, f"{name} largest", lambda: truth.abs().max().item())
        yardstick = once(i, f"{name} {dtype}", lambda: (expected(i, dtype).double() - truth).abs().max().item())
        error = (output.double() - truth).abs().max().item()
        roundings = 1 if provider.name.startswith("ours") else max(i.case.k, 8)
        allowed = 2 * (yardstick + roundings * torch.finfo(dtype).eps * largest)
        require(error <= allowed, name, provider, f"error {error:.3g}, allowed {allowed:.3g}")

    return check


def wide(dtype: torch.dtype) -> torch.dtype:
    """What the reference sums in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def expected_decode(i: Inputs, dtype: torch.dtype) -> Tensor:
    values, weight, bias = (t.to(wide(dtype)) for t in (i.values, i.weight, i.bias))
    return (bags(values, i.columns, weight) + bias).to(dtype)


def expected_error(i: Inputs, dtype: torch.dtype, number: int) -> Tensor:
    residual = expected_decode(i, wide(dtype)) - i.grad.to(wide(dtype))
    return (residual, residual.square().sum(1))[number].to(dtype)


def check_error(i: Inputs, provider: Provider, output: Output) -> None:
    for number, part in enumerate(output):
        check = check_sum(f"decode_error {number}", functools.partial(expected_error, number=number))
        check(i, provider, part.to(i.weight.dtype))


def expected_value_gradient(i: Inputs, dtype: torch.dtype) -> Tensor:
    weight, grad = i.weight.to(wide(dtype)), i.grad.to(wide(dtype))
    inner = [
        torch.bmm(weight[i.columns[rows]], grad[rows, :, None])[:, :, 0]
        for rows in parts(i.case.B, i.case.k * i.case.d)
    ]
    return torch.cat(inner).flatten().to(dtype)


def expected_weight_gradient(i: Inputs, dtype: torch.dtype) -> Tensor:
    values, grad = i.values.to(wide(dtype)), i.grad.to(wide(dtype))
    out = grad.new_zeros(i.case.F, i.case.d)
    for rows in parts(i.case.B, i.case.k * i.case.d):
        terms = values[rows, :, None] * grad[rows, None, :]
        out.index_add_(0, i.columns[rows].flatten(), terms.flatten(0, 1))
    return out.to(dtype)


def check_flat(check: Callable) -> Callable:
    """Gradients of values come as (B, k) from stock operators and as (N,) from ours."""
    return lambda i, provider, output: check(i, provider, output.flatten())


def check_dense(i: Inputs, provider: Provider, output: Output) -> None:
    require(torch.equal(output, once(i, "dense", lambda: dense_codes(i))), "to_dense", provider, "another matrix")


# --- products ------------------------------------------------------------------------------------------------------


def check_autoencoder(i: Inputs, provider: Provider, output: Output) -> None:
    """Row by row in norm. GEMMs round differently, so entries within a rounding of the cut may be swapped; decoder rows
    have unit norm, so each swap moves the result by at most twice the cut."""
    dtype = output.dtype
    truth, allowed = once(i, f"autoencoder {dtype}", lambda: autoencoder_truth(i, dtype))
    error = (output.double() - truth).norm(dim=1)
    worst = (error - allowed).argmax()
    what = f"error {error[worst]:.3g} of a row, allowed {allowed[worst]:.3g}"
    require(bool((error <= allowed).all()), "autoencoder", provider, what)


def autoencoder_truth(i: Inputs, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The output in fp64 (B, d), and how far a row may lie from it (B,)."""
    encoder, decoder = i.sae.W_enc.double(), i.sae.W_dec.double()
    eps = torch.finfo(dtype).eps
    truths, limits = [], []
    for rows in parts(i.case.B, i.case.F):
        x = i.x[rows].double()
        pre = x @ encoder  # biases are zero
        values, columns = pre.topk(i.k)
        truth = bags(values.relu(), columns, decoder)
        cut = values[:, -1:]
        rounding = 2 * eps * cut + 2 * i.case.d**0.5 * torch.finfo(torch.float32).eps * x.norm(dim=1, keepdim=True)
        swaps = ((pre - cut).abs() <= rounding).sum(1) - 1
        truths.append(truth)
        limits.append(2 * swaps * cut[:, 0] + 2 * i.k * eps * truth.norm(dim=1))
    return torch.cat(truths), torch.cat(limits)


def exact_product(i: Inputs) -> Tensor:
    """``x @ weight`` in fp64, (B, F)."""
    return once(i, "product", lambda: i.x.double() @ i.weight.double())


def check_encode(i: Inputs, provider: Provider, output: Output) -> None:
    """Ours: the product by error, the selection from it entry by entry. Others say only what they keep: GEMMs round
    differently, so an entry within two roundings of the cut may be in or out, any other may not.

    A rounding is that of a pre-activation to the tested dtype, which stock GEMMs may also do to a few partial sums,
    and the fp32 sum's.
    """
    product, bias = exact_product(i), i.bias.double()
    if provider.name.startswith("ours"):
        (codes,), _, pre = output
        check_product(i, provider, pre, bias)
        want = expected_topk(Inputs(pre=pre, k=i.k))
        require(torch.equal(want, as_dense(codes, pre)), "encode", provider, "other entries than those of its product")
        return
    columns_size = i.weight.double().norm(dim=0) / i.case.d**0.5
    kept = as_dense(output, i.x.new_zeros(product.shape))
    for rows in parts(*kept.shape):
        truth, got = (product[rows] + bias).relu(), kept[rows].double()
        length = i.x[rows].double().norm(dim=1, keepdim=True)
        slack = 4 * torch.finfo(i.x.dtype).eps * (truth + length * columns_size)
        slack += 2 * i.case.d**0.5 * torch.finfo(torch.float32).eps * length
        cut = truth.topk(i.k).values[:, -1:]
        chosen = got != 0
        require(bool((chosen.sum(1) <= i.k).all()), "encode", provider, "more than k entries in a row")
        require(bool((chosen | (truth <= cut + 2 * slack)).all()), "encode", provider, "an entry is missing")
        require(bool((~chosen | (truth >= cut - 2 * slack)).all()), "encode", provider, "an entry too many")
        require(bool(((got - truth).abs() <= slack)[chosen].all()), "encode", provider, "other values")


def check_gemm(i: Inputs, provider: Provider, output: Output) -> None:
    check_product(i, provider, output, torch.zeros_like(i.bias))


def check_product(i: Inputs, provider: Provider, output: Tensor, bias: Tensor) -> None:
    """A few roundings to its dtype, and d of an fp32 sum in any order, of the size that partial sums have."""
    product = exact_product(i)
    worst = 0.0
    for rows in parts(*product.shape):
        truth = product[rows] + bias
        size = truth.abs() + i.x[rows].double().norm(dim=1, keepdim=True) / i.case.d**0.5
        worst = max(worst, ((output[rows].double() - truth).abs() / size).max().item())
    allowed = 4 * torch.finfo(output.dtype).eps + 2 * i.case.d**0.5 * torch.finfo(torch.float32).eps
    require(worst <= allowed, "encode", provider, f"error {worst:.3g}, allowed {allowed:.3g}")


def check_group_maxima(i: Inputs, provider: Provider, output: Output) -> None:
    """Keys of numbers that are not negative are their bits; those of 16-bit numbers are shifted: they end in zeros."""
    lost = -i.pre.shape[1] % i.group_size
    groups = torch.nn.functional.pad(i.pre.relu().float(), (0, lost)).unflatten(1, (-1, i.group_size))
    bits = groups.amax(2).view(torch.int32)
    shift = {torch.bfloat16: 16, torch.float16: 13}.get(i.pre.dtype, 0)
    require(torch.equal(output.int(), bits >> shift), "batch_topk", provider, "other maxima")
