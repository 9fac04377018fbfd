"""TrainStep's updates: those of torch.optim.Adam, alone or on two processes, resumed bit for bit."""

import io

import pytest
import torch
from training_cases import F64, RULES, B, D, F, assert_parameters_close, make, train_step

import sae_engine as se
from sae_engine.losses import AFA, AuxK, MultiTopK
from sae_engine.testing import assert_same

# --- Adam ------------------------------------------------------------------------------------------------------------


def plain_training(sae, batches, *, unit_rows, grad_clip=None, accumulate=1, **options):
    """loss.backward(), the parallel part removed, torch's own Adam, rows rescaled."""
    optimizer = torch.optim.Adam([p for p in sae.parameters() if p.requires_grad], **options)
    losses = []
    for number, x in enumerate(batches):
        loss = se.losses.squared_error(sae(x), x)
        (loss / accumulate).backward()
        losses.append(loss.detach())
        if (number + 1) % accumulate:
            continue
        with torch.no_grad():
            if unit_rows:
                W, g = sae.W_dec, sae.W_dec.grad
                g -= (g * W).sum(1, keepdim=True) / W.square().sum(1, keepdim=True) * W
        if grad_clip is not None:
            torch.nn.utils.clip_grad_norm_(sae.parameters(), grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        if unit_rows:
            with torch.no_grad():
                sae.W_dec /= sae.W_dec.norm(dim=1, keepdim=True)
    return torch.stack(losses)


@pytest.mark.parametrize("contiguous", [False, True], ids=["latent-contiguous", "row-major"])
@pytest.mark.parametrize("unit_rows", [False, True])
@pytest.mark.parametrize("rule", ["TopK", "BatchTopK", "TopAFA", "JumpReLU"])
def test_fifty_steps_equal_torch_adam(rule, unit_rows, contiguous):
    options = dict(lr=3e-3, betas=(0.8, 0.95), eps=1e-7, weight_decay=0.01)
    ours, theirs = (make(RULES[rule](), contiguous_parameters=contiguous) for _ in range(2))
    batches = torch.randn(50, B, D, dtype=F64)
    expected = plain_training(theirs, batches, unit_rows=unit_rows, **options)
    step = train_step(ours, normalize_decoder=unit_rows, **options)
    losses = torch.stack([step(x)["loss"] for x in batches])
    # The learning rate is an fp32 number on the device, and Adam's bias corrections are made of it.
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)
    assert_parameters_close(ours, theirs, rtol=1e-5, atol=1e-6)
    if rule == "BatchTopK":
        torch.testing.assert_close(ours.activation.threshold, theirs.activation.threshold, rtol=1e-5, atol=1e-6)
    if unit_rows:
        torch.testing.assert_close(ours.W_dec.norm(dim=1), torch.ones(F, dtype=F64))


@pytest.mark.parametrize(
    "options", [{"grad_clip": 0.5}, {"accumulate": 3}, {"grad_clip": 1.0, "accumulate": 2}], ids=str
)
def test_stored_gradients(options):
    ours, theirs = (make(se.TopK(4)) for _ in range(2))
    batches = torch.randn(12, B, D, dtype=F64)
    plain_training(theirs, batches, unit_rows=True, lr=1e-2, **options)
    step = train_step(ours, lr=1e-2, **options)
    for number, x in enumerate(batches):
        report = step(x)
        assert ("grad_norm" in report) == ((number + 1) % options.get("accumulate", 1) == 0)
    assert_parameters_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_fused_and_stored_steps_agree():
    fused, stored = (make(se.TopK(4)) for _ in range(2))
    x = torch.randn(B, D, dtype=F64)
    norms = [train_step(fused, lr=1e-2, losses=AuxK(5))(x)["grad_norm"],
             train_step(stored, lr=1e-2, losses=AuxK(5), grad_clip=1e9)(x)["grad_norm"]]  # fmt: skip
    torch.testing.assert_close(*norms)
    assert_parameters_close(fused, stored)


@pytest.mark.parametrize("grad_clip", [None, 1e9], ids=["fused", "stored"])
def test_unit_rows_of_16_bit_parameters_are_rounded_once(grad_clip):
    """Each number by at most half an ulp, and so the norm; a norm rounded to 16 bits before would add as much again."""
    sae = make(se.TopK(4), dtype=torch.bfloat16)
    step = train_step(sae, lr=1e-2, grad_clip=grad_clip)
    torch.manual_seed(0)
    for _ in range(3):
        step(torch.randn(B, D).bfloat16())
    assert (sae.W_dec.double().norm(dim=1) - 1).abs().max() <= torch.finfo(torch.bfloat16).eps / 2


def test_frozen_parameters_stay():
    for frozen in ("W_enc", "W_dec", "b_dec", "b_enc"):
        sae = make(se.TopK(4))
        sae.get_parameter(frozen).requires_grad_(False)
        before = {name: p.detach().clone() for name, p in sae.named_parameters()}
        train_step(sae, lr=1e-2, normalize_decoder=False)(torch.randn(B, D, dtype=F64))
        for name, p in sae.named_parameters():
            assert torch.equal(p, before[name]) == (name == frozen), name


def test_two_runs_give_the_same_bits():
    runs = []
    for _ in range(2):
        sae = make(se.BatchTopK(3.5), dtype=torch.float32)
        step = train_step(sae, lr=1e-2, losses=[AuxK(5), MultiTopK()], dead_after=30)
        torch.manual_seed(1)
        reports = [step(torch.randn(B, D)) for _ in range(8)]
        runs.append([*sae.state_dict().values(), *reports[-1].values()])
    assert_same(*(tuple(run) for run in runs))


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_other_back_ends_train_alike(backend):
    results = []
    for chosen in ("torch", backend):
        sae = make(se.TopK(4), dtype=torch.float32)
        step = train_step(sae, lr=1e-2, losses=[AuxK(5), AFA()], dead_after=20, backend=chosen)
        torch.manual_seed(1)
        losses = [step(torch.randn(B, D))["loss"] for _ in range(4)]
        results.append((torch.stack(losses), sae.W_enc.detach(), sae.W_dec.detach(), sae.b_dec.detach()))
    for ours, other in zip(*results, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-3, atol=1e-4)  # Adam's first steps are lr * sign(gradient)


# --- state -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
def test_resumes_bit_for_bit(compute_dtype):
    def build():
        sae = make(se.BatchTopK(3.5), dtype=torch.float32)
        return sae, train_step(
            sae, lr=1e-2, losses=[AuxK(5)], dead_after=30, compute_dtype=compute_dtype, weight_decay=0.1,
            scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 / (1 + n)),
        )  # fmt: skip

    batches = torch.randn(8, B, D)
    sae, step = build()
    for x in batches[:4]:
        step(x)
    file = io.BytesIO()
    torch.save({"sae": sae.state_dict(), "step": step.state_dict()}, file)
    file.seek(0)
    for x in batches[4:]:
        expected = step(x)
    saved = torch.load(file, weights_only=True)
    resumed, second = build()
    resumed.load_state_dict(saved["sae"])
    second.load_state_dict(saved["step"])
    for x in batches[4:]:
        report = second(x)
    assert_same(tuple(report.values()), tuple(expected.values()))
    assert_same(tuple(resumed.state_dict().values()), tuple(sae.state_dict().values()))
    assert float(second.optimizer.param_groups[0]["lr"]) == pytest.approx(1e-2 / 9)


def test_the_state_of_torch_adam_can_be_taken_over():
    ours, theirs = (make(se.TopK(4)) for _ in range(2))
    batches = torch.randn(6, B, D, dtype=F64)
    optimizer = torch.optim.Adam(theirs.parameters(), lr=1e-2)
    for x in batches[:3]:
        se.losses.squared_error(theirs(x), x).backward()
        optimizer.step()
        optimizer.zero_grad()
    ours.load_state_dict(theirs.state_dict())
    step = train_step(ours, lr=1e-2, normalize_decoder=False)
    step.optimizer.load_state_dict(optimizer.state_dict())
    for x in batches[3:]:
        step(x)
        se.losses.squared_error(theirs(x), x).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_parameters_close(ours, theirs, rtol=1e-5, atol=1e-6)


# --- density, and what only a GPU can show --------------------------------------------------------

