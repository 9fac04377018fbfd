"""The latent pass: a step's gradients by latent, and Adam on them (latent_pass.py in device/ and stock/)."""
import os
from types import SimpleNamespace

import pytest
import torch
from latent_passes import (
    DTYPES,
    FAST,
    LAYOUTS,
    MODES,
    OPTIONS,
    SHAPES,
    adam,
    cast,
    gradients,
    make,
    strided,
    term_of,
)

from sae_engine.testing import assert_same, assert_within_budget
from sae_kernels import reference
from sae_kernels._terms import GATED, GIVEN
from sae_kernels.device import _tuning
from sae_kernels.stock import densified, limits
from sae_kernels.stock.backward import row_products


def state_of(s, number=3):
    groups = {"parameter": s.parameters, "exp_avg": s.exp_avgs, "exp_avg_sq": s.exp_avg_sqs}
    found = {f"{n} {i}": t for n, group in groups.items() for i, t in enumerate(group[:number])}
    return found | {f"copy {i}": t for i, t in enumerate(s.copies)}


def hold(s, backend, **how):
    """The step within the budget of the reference's in the same types."""
    truth, honest, ours = adam(cast(s, torch.float64), "reference", **how), adam(s, "reference", **how), adam(
        s, backend, **how
    )
    assert truth.keys() == ours.keys()
    for name, t in ours.items():
        assert t.dtype == honest[name].dtype, name
        assert_within_budget(t, truth[name].double(), honest[name])


# --- the reference against the definition ----------------------------------------------------------------------------


def autograd_of(s, along=True):
    """The same gradients from a dense computation of a loss: those of decoder, encoder, bias and center."""
    decoder, encoder, bias = (p.clone().requires_grad_() for p in s.parameters)
    center = torch.zeros(s.x.shape[1], dtype=s.x.dtype, requires_grad=True)
    pre = (s.x - center) @ encoder.T + bias
    loss = (s.along * decoder.square().sum(1)).sum() / 2 if along else decoder.sum() * 0
    for term, kept in zip(s.terms, s.kept, strict=True):
        at = reference.to_dense(term.values, term.indices, term.offsets, s.shape[1])
        acts = {GATED: pre.relu() * kept, GIVEN: at}[term.mode]
        torch.testing.assert_close(acts.detach(), at)
        loss = loss + ((acts @ decoder) * term.grad).sum()
        if term.offered.numel():
            follows = pre if term.mode == GIVEN else acts
            loss = loss + (follows[kept] * term.offered).sum()
    loss = loss + 0 * pre.sum()  # a step may have no terms
    return torch.autograd.grad(loss, (decoder, encoder, bias, center))


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("modes", MODES)
def test_gradients_are_those_of_a_dense_computation(modes, backend):
    for dense in ((), (0, 2)):
        s = make(SHAPES["B6-F11-D7-5"], MODES[modes], dense=dense)
        for along in (True, False):
            for got, want in zip(gradients(s, backend, along=along), autograd_of(s, along), strict=False):
                torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("unit_rows", [True, False], ids=["unit rows", "free rows"])
def test_a_step_is_that_of_torchs_adam(unit_rows, layout, backend):
    s = make(SHAPES["B6-F11-D7-5"], MODES["four"])
    *grads, center = autograd_of(s)
    if unit_rows:
        direction = torch.nn.functional.normalize(s.parameters[0])
        grads[0] = grads[0] - (grads[0] * direction).sum(1, keepdim=True) * direction
    parameters = [torch.nn.Parameter(p.clone()) for p in s.parameters]
    betas = OPTIONS["beta1"], OPTIONS["beta2"]
    optimizer = torch.optim.Adam(
        parameters, lr=s.lr.item(), betas=betas, eps=OPTIONS["eps"], weight_decay=OPTIONS["weight_decay"]
    )
    for p, g, m, v in zip(parameters, grads, s.exp_avgs, s.exp_avg_sqs, strict=True):
        p.grad = g
        optimizer.state[p] = {"step": s.step - 1, "exp_avg": m.clone(), "exp_avg_sq": v.clone()}
    optimizer.step()
    if unit_rows:
        parameters[0].data = torch.nn.functional.normalize(parameters[0].data)
    got = adam(s, backend, layout=layout, unit_rows=unit_rows)
    # lr is an fp32 number to us and a float to torch: half an epsilon of it, times a step of a few lr
    close = dict(rtol=1e-7, atol=1e-8)
    for i, p in enumerate(parameters):
        torch.testing.assert_close(got[f"parameter {i}"], p.data, **close)
        torch.testing.assert_close(got[f"exp_avg {i}"], optimizer.state[p]["exp_avg"])
        torch.testing.assert_close(got[f"exp_avg_sq {i}"], optimizer.state[p]["exp_avg_sq"])
    torch.testing.assert_close(got["center"], center)
    torch.testing.assert_close(got["square"], sum(g.square().sum() for g in grads))


# --- back ends against the reference ---------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("modes", MODES)
def test_gradients_within_budget(modes, shape, backend):
    for dtypes in (DTYPES["fp32"], DTYPES["bf16 parameters"]):
        s = make(SHAPES[shape], MODES[modes], dtypes)
        results = gradients(cast(s, torch.float64), "reference"), gradients(s, "reference"), gradients(s, backend)
        for truth, honest, ours in zip(*results, strict=True):
            assert_within_budget(ours, truth.double(), honest)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_are_rounded_once_into_the_type_asked_for(dtype, backend):
    s = make(SHAPES["B6-F11-D7-5"], MODES["two"], DTYPES["fp32"])
    wide, rounded = gradients(s, "reference"), gradients(s, backend, dtype=dtype)
    for got, want in zip(rounded, wide, strict=True):
        assert got.dtype == dtype
        assert_within_budget(got, want.double(), want.to(dtype))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtypes", DTYPES)
def test_adam_within_budget(dtypes, layout, backend):
    for shape in SHAPES.values():
        for unit_rows in (True, False):
            if unit_rows and (shape[0] == 0 or 1 in shape[2:]):
                continue  # all of the gradient is parallel: what is left is rounding, and the budget 0
            hold(make(shape, MODES["two"], DTYPES[dtypes]), backend, layout=layout, unit_rows=unit_rows)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("modes", MODES)
def test_adam_of_any_number_of_terms_within_budget(modes, layout, backend):
    s = make(SHAPES["B6-F11-D7-5"], MODES[modes], DTYPES["bf16"])
    hold(s, backend, layout=layout, unit_rows=modes != "none")  # along * weight alone has no part that is not parallel
    hold(s, backend, layout=layout, number=2, along=False, weight_decay=0.0, beta1=0.0)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dense", [(0,), (1, 2), (0, 1, 2, 3)], ids=str)
def test_dense_terms_within_budget(dense, layout, backend):
    s = make((6, 11, 7, 5), MODES["four"], DTYPES["bf16"], dense=dense)
    hold(s, backend, layout=layout)
    results = gradients(cast(s, torch.float64), "reference"), gradients(s, "reference"), gradients(s, backend)
    for truth, honest, ours in zip(*results, strict=True):
        assert_within_budget(ours, truth.double(), honest)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("modes", ["gated", "four"])
def test_rows_wider_than_a_tile(modes, layout, monkeypatch):
    """Rows of 40 and 23 numbers in tiles of 16, of 10 latents 8 at a time."""
    monkeypatch.setattr(_tuning, "PASS_TILE", 16)
    monkeypatch.setattr(_tuning, "stored_latents", lambda width: 8)
    monkeypatch.setattr(_tuning, "stored_tile", lambda by_columns: (4, 16))
    for dense, unit_rows, number, widths in (
        ((), True, 3, (40, 23)), ((0,), False, 2, (40, 23)), ((), False, 3, (23, 40)), ((), True, 2, (7, 40))
    ):  # fmt: skip
        s = make((5, 10, *widths), MODES[modes], DTYPES["bf16"], dense=dense)
        hold(s, "triton", layout=layout, unit_rows=unit_rows, number=number)
    results = gradients(cast(s, torch.float64), "reference"), gradients(s, "reference"), gradients(s, "triton")
    for truth, honest, ours in zip(*results, strict=True):
        assert_within_budget(ours, truth.double(), honest)


def test_free_rows_wider_than_a_tile_store_no_gradient(monkeypatch):
    """Columns are independent once slopes are there, so that Adam uses gradients up tile by tile, whatever the tile."""
    s = make((5, 10, 40, 23), MODES["two"], DTYPES["fp32"])
    monkeypatch.setattr(_tuning, "stored_latents", lambda width: pytest.fail("gradients are stored"))
    found = []
    for tile in (64, 16):
        monkeypatch.setattr(_tuning, "PASS_TILE", tile)
        found.append(adam(s, "triton", unit_rows=False))
    for name, whole in found[0].items():
        torch.testing.assert_close(found[1][name], whole)


def test_a_strided_encoder_some_latents_at_a_time(monkeypatch):
    monkeypatch.setattr(_tuning, "stored_latents", lambda width: 8)
    hold(make((4, 20, 9, 11), MODES["two"], DTYPES["bf16"]), "triton", layout=LAYOUTS[1])


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("split", [4, 16])
def test_latents_with_many_entries(split, backend, monkeypatch):
    """Zipf-like firing: latents own many times what one program sums, others nothing, and none starts at a border."""
    monkeypatch.setattr(limits, "pass_split", lambda width: split)
    s = make((3 * split + 5, 9, 6, 5), MODES["two"], DTYPES["fp32"])
    s.terms = []
    for offset in (3, 0):
        kept = torch.zeros(s.shape[:2], dtype=torch.bool)
        kept[:, 1] = kept[:, 4] = True
        kept[:offset, 0] = True
        kept[: split + 2, 5] = True
        kept[::7, 7] = True
        values, indices, offsets = reference.compress_kept(torch.randn(s.shape[:2]), kept)[:3]
        grad = torch.randn(s.shape[0], s.shape[2])
        s.terms.append(term_of(values, indices, offsets, torch.empty(0), s.shape[1], GATED, grad))
    hold(s, backend)
    results = gradients(cast(s, torch.float64), "reference"), gradients(s, "reference"), gradients(s, backend)
    for truth, honest, ours in zip(*results, strict=True):
        assert_within_budget(ours, truth.double(), honest)


def test_sums_of_splits_take_bounded_memory():
    for width in (1, 64, 1536, 4096, 4097, 8192, 9984, 1 << 20):
        split = limits.pass_split(width)
        assert split >= 64 and width / split <= 64 and split & (split - 1) == 0
    assert limits.pass_split(4096) == 64 and limits.pass_split(8192) == 128


@pytest.mark.parametrize("backend", FAST)
def test_capacity_leftovers_belong_to_nobody(backend):
    s = make((6, 13, 7, 5), (GATED, GIVEN), DTYPES["fp32"])
    with densified.choosing(False):  # room for more entries is not to have sums go through GEMMs
        exact = adam(s, backend), gradients(s, backend)
    for dense in ((), (0, 1)):
        roomy = []
        for number, term in enumerate(s.terms):
            pad = lambda t: torch.cat([t, torch.full((70,), torch.nan)]) if t.numel() else t  # noqa: E731
            indices = torch.cat([term.indices, term.indices.new_full((70,), 12)])
            roomy.append(term_of(pad(term.values), indices, term.offsets, pad(term.offered), 13, term.mode, term.grad,
                                dense=number in dense))  # fmt: skip
        padded = SimpleNamespace(**vars(s) | {"terms": roomy})
        with densified.choosing(None if dense else False):
            got = adam(padded, backend), gradients(padded, backend)
        for a, b in ((got[0].values(), exact[0].values()), (got[1], exact[1])):
            if dense:  # other sums
                for one, other in zip(a, b, strict=True):
                    torch.testing.assert_close(one, other)
            else:
                assert_same(tuple(a), tuple(b))


@pytest.mark.parametrize("backend", ["reference", *FAST])
@pytest.mark.parametrize(("skip", "layout", "tile"), [(True, 0, 32), (1.0, 1, 32), (2, 0, 16)], ids=str)
def test_where_skip_is_set_nothing_changes(skip, layout, tile, backend, monkeypatch):
    monkeypatch.setattr(_tuning, "PASS_TILE", tile)
    s = make((4, 10, 20, 17), MODES["two"], DTYPES["bf16"])
    exact = adam(s, backend, layout=LAYOUTS[layout])
    assert_same(tuple(adam(s, backend, layout=LAYOUTS[layout], skip=type(skip)(0)).values()), tuple(exact.values()))
    s.copies = [torch.randn_like(c) for c in s.copies]  # not even what a copy should have been
    after = adam(s, backend, layout=LAYOUTS[layout], skip=skip)
    for name, before in state_of(s).items():
        assert torch.equal(after[name], before), name


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_latents_without_entries_move_as_adam_moves_them(backend):
    s = make((6, 11, 7, 5), MODES["two"], DTYPES["fp32"], kept=0.0)
    after = adam(s, backend, unit_rows=False, along=False, weight_decay=0.0)
    beta1, beta2 = OPTIONS["beta1"], OPTIONS["beta2"]
    for i, (p, m, v) in enumerate(zip(s.parameters, s.exp_avgs, s.exp_avg_sqs, strict=True)):
        root = (beta2 * v / (1 - beta2**3)).sqrt()
        torch.testing.assert_close(after[f"exp_avg {i}"], beta1 * m)
        torch.testing.assert_close(after[f"parameter {i}"], p - 0.05 * beta1 * m / (1 - beta1**3) / root)
    assert not after["center"].any() and after["square"] == 0


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_rows_of_zeros_stay_and_others_end_with_norm_1(backend):
    s = make((6, 11, 7, 5), (), DTYPES["fp32"])
    for group in (s.parameters, s.exp_avgs):
        group[0][3] = 0
    after = adam(s, backend, along=False)["parameter 0"]
    assert not after[3].any()
    torch.testing.assert_close(after.norm(dim=1), (torch.arange(11) != 3).float())


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_copies_are_the_parameters_rounded(layout, backend):
    s = make((6, 11, 7, 5), MODES["gated"], DTYPES["bf16"])
    after = adam(s, backend, layout=layout)
    for i in range(2):
        assert after[f"copy {i}"].dtype == torch.bfloat16
        exact = after[f"parameter {i}"]
        if backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1":  # it drops bits where a GPU rounds
            exact = (exact.view(torch.int32) & -(1 << 16)).view(torch.float32)
        assert_same(after[f"copy {i}"], exact.bfloat16())


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout, backend):
    s = make((6, 11, 7, 5), MODES["four"], DTYPES["fp32"])
    odd = SimpleNamespace(**vars(s))
    odd.x, odd.along = strided(s.x), s.along.repeat_interleave(2)[::2]
    odd.terms = []
    for term in s.terms:
        spread = {
            name: t.repeat_interleave(2)[::2] for name, t in term._asdict().items()
            if name not in ("grad", "mode")
        }  # fmt: skip
        odd.terms.append(term._replace(grad=strided(term.grad), **spread))
    odd.parameters, odd.exp_avgs, odd.exp_avg_sqs = (
        [strided(t) for t in group] for group in (s.parameters, s.exp_avgs, s.exp_avg_sqs)
    )
    for a, b in zip(adam(odd, backend, layout=layout).values(), adam(s, backend, layout=layout).values(), strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(gradients(odd, backend), gradients(s, backend), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_runs_give_the_same_bits(layout, backend, monkeypatch):
    monkeypatch.setattr(limits, "pass_split", lambda width: 4)
    s = make((15, 12, 17, 15), MODES["four"], DTYPES["bf16"], dense=(1,))
    assert_same(*(tuple(adam(s, backend, layout=layout).values()) for _ in range(2)))
    assert_same(*(gradients(s, backend) for _ in range(2)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_latents_in_chunks_on_a_cpu(layout, monkeypatch):
    """Chunks share no sum but those over all latents: d(center) and the norm."""
    s = make((20, 75, 13, 17), MODES["four"], DTYPES["fp32"])
    assert limits.latents_in_cache(30) % 32 == 0
    outcomes = []
    for chunk in (75, 32, 64):
        monkeypatch.setattr(limits, "latents_in_cache", lambda width, chunk=chunk: chunk)
        outcomes.append(adam(s, "torch", layout=layout))
    for chunked in outcomes[1:]:
        for name, whole in outcomes[0].items():
            if name in ("center", "square"):  # n terms, in another order: n epsilons of the sum of their magnitudes
                grads = gradients(s, "reference")
                terms = grads[2].abs() @ s.parameters[1].abs() if name == "center" else whole
                numbers = 75 if name == "center" else 75 * 31
                assert ((chunked[name] - whole).abs() <= numbers * torch.finfo(torch.float32).eps * terms).all()
            else:
                assert_same(chunked[name], whole)


@pytest.mark.parametrize("width", [1, 13, 768])
def test_products_of_rows_err_as_sums_of_their_length_do(width):
    """Whatever rows stand beside them, and with NaN and infinity where those belong."""
    a, b = torch.randn(70, width), torch.randn(70, width)
    found = row_products(a, b)
    magnitudes = (a.double() * b.double()).abs().sum(1)
    bound = width * torch.finfo(torch.float32).eps * magnitudes
    assert ((found.double() - (a.double() * b.double()).sum(1)).abs() <= bound).all()
    assert_same(row_products(a[32:], b[32:]), found[32:])
    a[3], a[5, 0] = torch.nan, torch.inf
    after = row_products(a, b.abs())
    assert after[3].isnan() and after[5] == torch.inf and after.isfinite().sum() == 68
    assert row_products(a[:0], b[:0]).shape == (0,)


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_no_latents(backend):
    s = make((4, 0, 3, 2), (), DTYPES["fp32"])
    after = adam(s, backend)
    assert after["center"].shape == (2,) and not after["center"].any() and after["square"] == 0
    assert [g.shape for g in gradients(s, backend)] == [(0, 3), (0, 2), (0,)]


def test_the_bias_corrections_of_early_and_late_steps():
    """1 - beta2 ** step in fp32 would be 3e-5 off at first."""
    s = make((6, 11, 7, 5), MODES["gated"], DTYPES["fp32"])
    # on a GPU the torch back end is PyTorch's fused Adam, which corrects in fp32
    exact = [backend for backend in FAST if backend != "torch" or torch.get_default_device().type == "cpu"]
    for backend in ("reference", *exact):
        for step in (1.0, 2.0, 1e6):
            s.step = torch.tensor(step)
            after = adam(s, backend, unit_rows=False, beta2=0.9999)
            m, v = after["exp_avg 2"].double(), after["exp_avg_sq 2"].double()
            moved = 0.05 * m / (1 - OPTIONS["beta1"] ** step) / ((v / (1 - 0.9999**step)).sqrt() + OPTIONS["eps"])
            # the moments were rounded once, and the result: a few epsilons of what is subtracted and of the whole
            bound = 8 * torch.finfo(torch.float32).eps * (s.parameters[2].abs() + moved.abs())
            assert ((s.parameters[2].double() - moved - after["parameter 2"].double()).abs() <= bound).all(), backend


def test_partial_sums_of_some_latents_at_a_time_are_those_of_all(monkeypatch):
    s = make((20, 40, 12, 12), MODES["two"], DTYPES["fp32"])
    whole = adam(s, "triton")
    monkeypatch.setitem(limits.WIDE_ELEMENTS, "cuda", 2 * 12)  # two programs of eight latents; the last has one
    some = adam(s, "triton")
    torch.testing.assert_close(some.pop("center"), whole.pop("center"))
    torch.testing.assert_close(some.pop("square"), whole.pop("square"))
    for name, tensor in whole.items():
        assert_same(some[name], tensor)


def test_neither_is_differentiated_again():
    s = make((6, 11, 7, 5), MODES["gated"], DTYPES["fp32"])
    s.x.requires_grad_()
    with pytest.raises(RuntimeError, match="differentiated again"):
        gradients(s, "torch")[0].sum().backward()


@pytest.mark.sanitizer
def test_small_and_complete(monkeypatch):
    """Every kernel of the file, few programs each."""
    monkeypatch.setattr(limits, "pass_split", lambda width: 4)
    s = make((20, 12, 20, 20), MODES["two"], DTYPES["bf16"])
    for tile, layout in ((_tuning.PASS_TILE, LAYOUTS[0]), (_tuning.PASS_TILE, LAYOUTS[1]), (16, LAYOUTS[0])):
        monkeypatch.setattr(_tuning, "PASS_TILE", tile)
        hold(s, "triton", layout=layout)
    hold(s, "triton", unit_rows=False)  # of that narrow tile


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("width", "num_latents"), [(768, 32768), (4096, 16384), (9000, 2048)])
def test_production_shapes(width, num_latents, layout):
    s = make((512, num_latents, width, width), MODES["two"], DTYPES["bf16"], kept=0.002)
    for unit_rows in (True, False):
        hold(s, "triton", layout=layout, unit_rows=unit_rows)


@pytest.mark.compiled
@pytest.mark.parametrize(("d_out", "d_in"), [(16, 600), (64, 1024), (600, 16)])
def test_rows_far_narrower_than_the_others(d_out, d_in):
    """Warps hold copies of the narrower row: one that has stored it must not be overtaken by one that still reads."""
    hold(make((6, 11, d_out, d_in), MODES["gated"], DTYPES["fp32"]), "triton", number=2)


def test_whoever_changes_a_tile_that_warps_share_knows_it():
    for latents, columns in ((64, 32), (8, 256), (4, 16), (2, 16)):
        warps = _tuning.stored_warps(latents * columns)
        assert warps == 1 or not _tuning.is_replicated(latents * columns, warps)
    assert _tuning.stored_warps(2048) == 8
    assert _tuning.is_replicated(16, 4) and not _tuning.is_replicated(1024, _tuning.pass_warps(1024))
