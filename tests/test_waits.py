"""Nothing waits for the device, but for what docs/waits.md lists: every public function, module, loss and metric.

Without a GPU the device is played (``played_cuda``); on one, PyTorch's own guard says what waits. Whoever adds a public
name has to say here what it does: the lists below are held to ``__all__``.
"""

import re
from pathlib import Path

import pytest
import torch
from played_cuda import Played

import sae_engine as se
from sae_engine import functional as f
from sae_engine import losses, metrics, training
from sae_engine.losses import AFA, AuxK, AuxZipf, MultiTopK
from sae_engine.training import DeadLatents, TrainStep
from sae_engine.training.architectures import BatchTopKSAE, TopKSAE
from sae_engine.training.auto import resolved
from sae_engine.training.config import DataConfig, OptimConfig, SAEConfig, TrainConfig
from sae_engine.training.forward import PreActivations
from sae_engine.training.trainee import Trainee

B, D, F = 5, 16, 45  # no multiples of 16: Triton compiles anew for those
ROOM = B * F
IN_SLABS = {"latents": 2560, "memory_budget": B * 2048 * 4}  # two of them, of all tokens
HAS_GPU = torch.cuda.is_available()  # a played device says that it is there


@pytest.fixture
def refusing(no_waiting):
    """A context that refuses waits, on tensors of the default device."""
    if HAS_GPU:
        with torch.device("cuda"):
            yield no_waiting
        return
    with Played() as played, torch.device("cuda"):
        yield played.refusing


def pre():
    return torch.randn(B, F, requires_grad=True)


def codes(**options):
    return f.topk(torch.randn(B, F), 4) if not options else f.threshold(torch.randn(B, F), 0.5, **options)


def weights():
    return torch.randn(F, D, requires_grad=True), torch.randn(D, requires_grad=True)


def backward(out):
    out = out.values if isinstance(out, se.SparseCodes) else out
    out.square().sum().backward()


def selecting(run):
    """A selection of one matrix, with its gradient."""
    return lambda: (p := pre(), lambda: backward(run(p)))[1]


def module(make, *, eval=False, dense=True, **context):
    """A rule's forward (dense) or selection, after one forward in training."""

    def prepare():
        rule, p, given = make(), pre(), {name: value() for name, value in context.items()}
        rule(p, **given)
        rule.train(not eval)
        rule(p.detach(), **given)  # eval reads a threshold once
        return lambda: backward((rule if dense else rule.select)(p, **given))

    return prepare


def autoencoder(make, *, eval=False, **options):
    def prepare():
        sae, x = se.SparseAutoencoder(D, F, make(), **options), torch.randn(B, D)
        sae(x)
        sae.train(not eval)
        sae(x)
        return lambda: backward(sae(x))

    return prepare


def crosscoder(make):
    """Of two layers of which the first writes both: a forward and its gradients."""
    return lambda: (clt := se.Crosscoder.clt(2, D, F, make()), x := torch.randn(B, 2, D), lambda: backward(clt(x)))[2]


def step(make=lambda: se.TopK(4), added=lambda: (), calls=2, latents=F, **options):
    def prepare():
        sae = se.SparseAutoencoder(D, latents, make())
        run, x = TrainStep(sae, lr=1e-3, losses=added(), **options), torch.randn(B, D)
        for _ in range(2):
            run.warm_up(x)
        return lambda: [run(x) for _ in range(calls)]

    return prepare


def between_two_lines(architecture):
    """What a run does to an autoencoder at each update, none a replay, until it logs; and the means that it starts."""

    def prepare():
        sae = SAEConfig(hook_name="model.a", architecture=architecture, d_sae=F, aux_k=4)
        optim = OptimConfig(train_batch_size_tokens=B, dead_after=2 * B, memory_budget=2**20)
        config = resolved(
            TrainConfig(saes=[sae], optim=optim, data=DataConfig(training_tokens=B * 20)), [(D, D)], max_length=8,
            device_type="cuda", embedded=False,
        )  # fmt: skip
        trainee = Trainee(
            config.saes[0], config, places=((0,), (0,)), widths=(D,), total=20, device=torch.empty(0).device,
            mean=None, buffer=PreActivations(), context={},
        )  # fmt: skip
        x = torch.randn(B, D)
        for _ in range(2):
            trainee.step.warm_up(x)
        trainee.train(lambda site, scale: x * scale, 0)
        return lambda: ([trainee.train(lambda site, scale: x * scale, n) for n in (1, 2)], trainee.metrics())

    return prepare


def metric(make, update):
    """Updates, the first of which makes the sums."""

    def prepare():
        measured, arguments = make(), update()
        return lambda: [measured.update(*arguments) for _ in range(2)]

    return prepare


def norms():
    return {"target_norm": lambda: torch.rand(B) * 3, "weight_norm": lambda: torch.rand(F) + 0.5}


def learning():
    return se.JumpReLU(F, threshold=0.4, bandwidth=0.5)


def of_codes(loss, rule=lambda: None):
    """A loss of codes that carry gradients."""

    def prepare():
        made, p = rule(), pre()
        found = f.topk(p, 4) if made is None else f.threshold(p, made._theta(), bandwidth=0.5, capacity=ROOM)
        x, (W, b) = torch.randn(B, D), weights()
        return lambda: backward(loss(found, made, x, W, b))

    return prepare


WITHOUT_WAITING = {
    "Crosscoder": crosscoder(lambda: se.TopK(4)), "Crosscoder, each": crosscoder(lambda: [se.TopK(4), se.TopK(4)]),
    # functional
    "functional.topk": selecting(lambda p: f.topk(p, 4)),
    "functional.topk, sorted": lambda: (p := torch.randn(B, F), lambda: f.topk(p, 4, sorted=True))[1],
    "functional.topk, mask": lambda: (p := pre(), m := torch.rand(F) < 0.5, lambda: backward(f.topk(p, 4, mask=m)))[2],
    "functional.batch_topk": selecting(lambda p: f.batch_topk(p, 3.5)),
    "functional.feature_topm": selecting(lambda p: f.feature_topm(p, 2)),
    "functional.feature_topm, total": lambda: (
        p := pre(), m := torch.full((F,), 2), lambda: backward(f.feature_topm(p, m, total=2 * F)))[2],
    "functional.norm_match, capacity": lambda: (
        p := pre(), t := torch.ones(B), lambda: backward(f.norm_match(p, t, capacity=ROOM)))[2],
    "functional.energy_share, capacity": selecting(lambda p: f.energy_share(p, 0.9, capacity=ROOM)),
    "functional.threshold, capacity": selecting(lambda p: f.threshold(p, 0.0, capacity=ROOM)),
    "functional.threshold, bandwidth": lambda: (
        p := pre(), t := torch.rand(F, requires_grad=True),
        lambda: backward(f.threshold(p, t, bandwidth=0.2, capacity=ROOM)))[2],
    "functional.decode": lambda: (c := codes(), w := weights(), lambda: backward(f.decode(c, *w)))[2],
    "functional.decode_prefixes": lambda: (
        c := codes(), w := weights(), lambda: backward(f.decode_prefixes(c, *w, widths=(4, 20, F))))[2],
    "functional.encode": lambda: (
        x := torch.randn(B, D), w := torch.randn(D, F, requires_grad=True),
        lambda: backward(f.encode(x, w, select=se.TopK(4))))[2],
    "functional.encode_with": lambda: (
        x := torch.randn(B, D), w := torch.randn(D, F, requires_grad=True),
        lambda: backward(f.encode_with(x, w, select=[se.TopK(4), se.BatchTopK(2)]).codes[1]))[2],
    "functional.linear": lambda: (
        x := torch.randn(B, D), w := torch.randn(D, F, requires_grad=True), b := torch.zeros(F),
        lambda: f.linear(x, w, b).sum().backward())[3],
    "functional.largest": selecting(lambda p: f.largest(p, 20)),
    "functional.at_latents": lambda: (
        c := codes(), v := torch.rand(F, requires_grad=True), lambda: f.at_latents(v, c).sum().backward())[2],
    "functional.move_threshold": lambda: (
        t := torch.full((), -1.0), v := torch.rand(()), lambda: f.move_threshold(t, v, 0.1))[2],
    "functional.feature_budgets": lambda: (d := torch.rand(F), lambda: f.feature_budgets(d, 20, B))[1],
    "functional.sparse_mlp": lambda: (
        x := torch.randn(2, D), kept := torch.randn(2, F).relu(), up := torch.randn(F, D), down := torch.randn(F, D),
        lambda: f.sparse_mlp(x, kept, up, down))[4],
    "functional.zipf_shortfall": lambda: (d := torch.rand(F), lambda: f.zipf_shortfall(d, 3))[1],
    # rules: dense in every mode, codes where their number is known
    "TopK": module(lambda: se.TopK(4)),
    "AbsTopK": module(lambda: se.AbsTopK(4)),
    "AuxTopK": module(lambda: se.AuxTopK(4), dead_mask=lambda: torch.rand(F) < 0.5),
    "AuxZipfTopK": module(lambda: se.AuxZipfTopK(4), shortfall=lambda: torch.rand(F)),
    "ReLU": module(se.ReLU),
    "BatchTopK": module(lambda: se.BatchTopK(3.5, threshold_start=1), dense=False),
    "BatchTopK, eval": module(lambda: se.BatchTopK(3.5), eval=True),
    "MutualChoice": module(lambda: se.MutualChoice(3.5)),
    "MatryoshkaBatchTopK": module(lambda: se.MatryoshkaBatchTopK(3.5, (4, F))),
    "SampledTopK": module(lambda: se.SampledTopK(3.5, pool=2)),
    "SampledTopK, entropy": module(lambda: se.SampledTopK(3.5, pool=2, score="entropy")),
    "FeatureChoice": module(lambda: se.FeatureChoice(F, 3.5), dense=False),
    "FeatureChoice, eval": module(lambda: se.FeatureChoice(F, 3.5), eval=True),
    "GradientTopK": module(lambda: se.GradientTopK(4), attribution=lambda: torch.randn(B, F)),
    "TopAFA, capacity": module(lambda: se.TopAFA(capacity=ROOM), dense=False, **norms()),
    "JumpReLU, eval": module(learning, eval=True),
    "LogJumpReLU, eval": module(lambda: se.LogJumpReLU(F), eval=True),
    "Gated": module(lambda: se.Gated(F)),
    "StatisticalTopK": module(lambda: se.StatisticalTopK(4)),
    "RunningDensity": lambda: (d := se.RunningDensity(F), c := codes(), lambda: d.update(c))[2],
    # autoencoders
    "SparseAutoencoder": autoencoder(lambda: se.TopK(4)),
    "SparseAutoencoder, layer norm": autoencoder(
        lambda: se.BatchTopK(3), normalize_activations="layer_norm", rescale_acts_by_decoder_norm=True, skip=True),
    "SparseAutoencoder, made": lambda: lambda: se.SparseAutoencoder(D, F, se.FeatureChoice(F, 3.0), device="cuda"),
    "SparseDecoder": lambda: (d := se.SparseDecoder(F, D), c := codes(), lambda: backward(d(c)))[2],
    "init_as_top_afa": lambda: (s := se.SparseAutoencoder(D, F, se.TopAFA()), lambda: se.init_as_top_afa(s))[1],
    "init_firing": lambda: (
        s := se.SparseAutoencoder(D, F, se.JumpReLU(F)), x := torch.randn(B, D), lambda: se.init_firing(s, x, 4))[2],
    "inference_form": lambda: (s := se.SparseAutoencoder(D, F, learning()), lambda: se.inference_form(s))[1],
    # codes
    "SparseCodes.l0": lambda: (c := codes(capacity=ROOM), lambda: c.l0)[1],
    "SparseCodes.by_latent": lambda: (c := codes(), lambda: c.by_latent)[1],
    "SparseCodes.assert_fits": lambda: (c := codes(capacity=ROOM), lambda: c.assert_fits())[1],
    "SparseCodes.validate": lambda: (c := codes(), lambda: c.validate())[1],
    "SparseCodes.to_dense": lambda: (c := codes(capacity=ROOM), lambda: c.to_dense())[1],
    "SparseCodes.to_padded, k": lambda: (c := codes(), lambda: c.to_padded())[1],
    "SparseCodes.from_topk": lambda: (
        v := torch.rand(B, 3), i := torch.arange(3).expand(B, 3), lambda: se.SparseCodes.from_topk(v, i, F))[2],
    "SparseCodes.to_sparse_csr": lambda: (c := codes(), lambda: c.to_sparse_csr())[1],
    "SparseCodes.replace": lambda: (c := codes(), lambda: c.replace(values=c.values * 2))[1],
    "SparseCodes.split_latents": lambda: (c := codes(), lambda: c.split_latents((4, 20, F)))[1],
    "SparseCodes.transposed_for": lambda: (c := codes(), w := weights()[0], lambda: c.transposed_for(w))[2],
    "SparseCodes.detach": lambda: (c := codes(), lambda: c.detach())[1],
    "SparseCodes.to": lambda: (c := codes(), lambda: c.to(torch.float16))[1],
    "SparseCodes.float and its like": lambda: (
        c := codes(), lambda: (c.double(), c.float(), c.half(), c.bfloat16()))[1],
    "SparseCodes * and its like": lambda: (
        c := codes(capacity=ROOM), v := torch.rand(F, requires_grad=True), s := torch.rand(()),
        lambda: (backward(-c * v / s * 2 / v), repr(c)))[3],
    "SparseCodes.__getitem__, k": lambda: (c := codes(), lambda: c[1:3])[1],
    "SparseCodes.shape and its like": lambda: (
        c := codes(), lambda: (c.shape, c.rows, c.device, c.dtype, len(c), bool(c)))[1],
    "cat": lambda: (c := codes(), lambda: se.cat([c, c]))[1],
    # losses
    "losses.squared_error": lambda: (x := torch.randn(B, D), y := pre()[:, :D], lambda: losses.squared_error(y, x))[2],
    "losses.mse": lambda: (x := torch.randn(B, D), y := pre()[:, :D], lambda: losses.mse(y, x))[2],
    "losses.fvu": lambda: (x := torch.randn(B, D), y := pre()[:, :D], lambda: losses.fvu(y, x))[2],
    "losses.auxk": of_codes(lambda c, _, x, W, b: losses.auxk(c, W, x, normalize=True)),
    "losses.aux_zipf": of_codes(lambda c, _, x, W, b: losses.aux_zipf(c, W, x)),
    "losses.afa": of_codes(lambda c, _, x, W, b: losses.afa(c, x)),
    "losses.gated": of_codes(lambda c, _, x, W, b: losses.gated(c, x, W, b, l1=0.1, weight_norm=W.norm(dim=1))),
    "losses.matryoshka": of_codes(lambda c, _, x, W, b: losses.matryoshka(c, x, W, b, widths=(4, F))),
    "losses.tanh_l0": of_codes(lambda c, _, x, W, b: losses.tanh_l0(c, weight_norm=W.norm(dim=1))),
    "losses.step_l0": of_codes(lambda c, rule, x, W, b: losses.step_l0(c, rule), learning),
    "losses.target_l0": of_codes(lambda c, rule, x, W, b: losses.target_l0(c, rule, 3.0), learning),
    # metrics
    "metrics.Reconstruction": metric(metrics.Reconstruction, lambda: (torch.randn(B, D), torch.randn(B, D))),
    "metrics.Sparsity": metric(lambda: metrics.Sparsity(F), lambda: (codes(capacity=ROOM),)),
    "metrics.SiteReconstruction": metric(
        lambda: metrics.SiteReconstruction([3, D - 3]), lambda: (torch.randn(B, D), torch.randn(B, D))),
    "metrics.SourceSparsity": metric(lambda: metrics.SourceSparsity(B, F), lambda: (codes(capacity=ROOM),)),
    "metrics.LatentScaling": metric(
        lambda: metrics.LatentScaling(torch.randn(F, D)), lambda: (codes(capacity=ROOM), torch.randn(B, D))),
    "metrics.relative_norms": lambda: (n := torch.rand(F, 2), lambda: metrics.relative_norms(n))[1],
    "metrics.EpsilonLBO": metric(
        lambda: metrics.EpsilonLBO(torch.rand(F), points=4), lambda: (codes(), torch.randn(B, D))),
    "metrics.TailTruncation": metric(lambda: metrics.TailTruncation(torch.randn(F, D), [0.5, 1.0]), lambda: (codes(),)),
    "metrics.NextTokenLoss": metric(metrics.NextTokenLoss, lambda: (
        torch.randn(2, 5, 9), torch.zeros(2, 5, dtype=torch.int64))),
    "metrics.decoder_cosines": lambda: (w := torch.randn(F, D), lambda: metrics.decoder_cosines(w, block=16))[1],
    # training
    "training.TrainStep": step(),
    "training.TrainStep, bf16": step(lambda: se.BatchTopK(3.5), compute_dtype=torch.bfloat16),
    "training.TrainStep, stored": step(grad_clip=1.0),
    "training.TrainStep, moments": step(compute_dtype=torch.bfloat16, moments=torch.bfloat16, copies=False),
    "training.TrainStep, moments stored": step(grad_clip=1.0, moments=torch.bfloat16),
    "training.TrainStep, chunks": step(lambda: se.BatchTopK(3.5), memory_budget=2 * F * 4),
    "training.TrainStep, slabs": step(added=lambda: AuxK(5), **IN_SLABS),
    "training.TrainStep, slabs of a batch": step(lambda: se.BatchTopK(3.5), **IN_SLABS),
    "training.TrainStep, capacity": step(lambda: se.TopAFA(capacity=ROOM)),
    "training.TrainStep, FeatureChoice": step(lambda: se.FeatureChoice(F, 3.5)),
    "training.TrainStep, made": lambda: (s := se.SparseAutoencoder(D, F, se.TopK(4)), lambda: TrainStep(s, lr=1e-3))[1],
    "training.TrainStep, schedule": step(
        scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 / (1 + n))),
    "training.train, TopK": between_two_lines(TopKSAE(k=4)),
    "training.train, BatchTopK": between_two_lines(BatchTopKSAE(k=4)),
    "losses.AuxK": step(added=lambda: AuxK(5), dead_after=200),
    "losses.AuxZipf": step(added=lambda: AuxZipf(5, density=se.RunningDensity(F))),
    "losses.MultiTopK": step(added=MultiTopK),
    "losses.AFA": step(added=AFA),
    "losses.Reconstruction": step(),
    "losses.L1": step(added=lambda: losses.L1(0.1)),
    "losses.NestedReconstruction": step(lambda: se.MatryoshkaBatchTopK(3.5, (4, F))),
    "losses.evaluate": lambda: (
        s := se.SparseAutoencoder(D, F, se.TopK(4)), x := torch.randn(B, D),
        lambda: losses.evaluate(s, x, losses.AFA())["loss"].backward())[2],
    "calibrate_threshold": lambda: (
        s := se.SparseAutoencoder(D, F, se.BatchTopK(3)), x := torch.randn(B, D),
        lambda: se.calibrate_threshold(s, [x, x]))[2],
    "losses.l1": of_codes(lambda c, _, x, W, b: losses.l1(c, weight_norm=W.norm(dim=1))),
    "training.DeadLatents": lambda: (
        d := DeadLatents(F, device="cuda"), on := torch.rand(F) < 0.5,
        lambda: (d.count(on, B), d.at_most(B), d.mask))[2],
}  # fmt: skip

# What that list says of them. Each does wait, so that the list stays true.
WAITING = {
    "functional.energy_share": selecting(lambda p: f.energy_share(p, 0.9)),
    "functional.norm_match": lambda: (p := torch.randn(B, F), t := torch.ones(B), lambda: f.norm_match(p, t))[2],
    "functional.threshold": lambda: (p := torch.randn(B, F), lambda: f.threshold(p, 0.0))[1],
    "functional.feature_topm": lambda: (
        p := torch.randn(B, F), m := torch.full((F,), 2), lambda: f.feature_topm(p, m))[2],
    "Crosscoder, one budget": crosscoder(lambda: se.BatchTopK(3.5)),
    "ReLU.select": lambda: (p := pre(), lambda: se.ReLU().select(p))[1],
    "Gated.select": module(lambda: se.Gated(F), dense=False),
    "StatisticalTopK.select": module(lambda: se.StatisticalTopK(4), dense=False),
    "BatchTopK.select": module(lambda: se.BatchTopK(3.5), eval=True, dense=False),
    "FeatureChoice.select": module(lambda: se.FeatureChoice(F, 3.5), eval=True, dense=False),
    "JumpReLU": module(learning),
    "LogJumpReLU": module(lambda: se.LogJumpReLU(F)),
    "TopAFA": module(se.TopAFA, **norms()),
    "SparseCodes.cpu": lambda: (c := codes(), lambda: c.cpu())[1],
    "SparseCodes.check": lambda: (c := codes(capacity=ROOM), lambda: c.check())[1],
    "SparseCodes.to_padded": lambda: (c := f.batch_topk(torch.randn(B, F), 3), lambda: c.to_padded())[1],
    "SparseCodes.__getitem__": lambda: (c := f.batch_topk(torch.randn(B, F), 3), lambda: c[1:])[1],
    "SparseCodes.from_dense": lambda: (d := torch.randn(B, F).relu(), lambda: se.SparseCodes.from_dense(d))[1],
    "SparseCodes.to_sparse_csr": lambda: (c := codes(capacity=ROOM), lambda: c.to_sparse_csr())[1],
    "cat": lambda: (c := codes(capacity=ROOM), lambda: se.cat([c, c]))[1],
    "Standardization": lambda: (x := torch.randn(B, D), lambda: se.Standardization.of(x, [D]))[1],
    "init_sparse": lambda: (s := se.SparseAutoencoder(D, F, se.TopAFA()), lambda: se.init_sparse(s, 4))[1],
    "inference_form": lambda: (
        s := se.SparseAutoencoder(D, F, se.BatchTopK(3, initial_threshold=0.1)), lambda: se.inference_form(s))[1],
    "metrics.decoder_similarity": lambda: (w := torch.randn(F, D), lambda: metrics.decoder_similarity(w))[1],
    "metrics.cross_layer_share": lambda: (n := torch.rand(2, F, 3), lambda: metrics.cross_layer_share(n))[1],
    "training.TrainStep, dead": step(added=lambda: AuxK(5), dead_after=4, density_interval=2),
    **{f"losses.{kind.__name__}": step(learning, lambda kind=kind: [losses.L1(0.1), kind(0.1)])
       for kind in (losses.StepL0, losses.TanhL0, losses.PreActivation)},
    "losses.GateLoss": step(lambda: se.Gated(F), lambda: losses.GateLoss(0.1)),
    "losses.evaluate, dead": lambda: (
        s := se.SparseAutoencoder(D, F, se.TopK(4)), x := torch.randn(B, D), on := torch.zeros(F, dtype=torch.bool),
        lambda: losses.evaluate(s, x, dead=on))[3],
    "training.TrainStep, density": step(lambda: se.TopAFA(capacity=ROOM), density_interval=2),
    "training.TrainStep, FeatureChoice in slabs": step(lambda: se.FeatureChoice(2560, 3.5), **IN_SLABS),
}  # fmt: skip

# Names without tensors of their own, or whose work is reading: the host gets numbers, text or files from them, or a
# device what the host had. And a step that is replayed as a graph, in which nothing can wait.
APART = {
    "Activation", "ByLatent", "EncodeInfo", "Encoded", "functional.EncodeInfo", "functional.Encoded",
    "CannotAccelerate", "accelerate", "accelerated", "restore", "distributed", "functional",
    "lm", "losses", "metrics", "training", "SparseCodes", "SparseCodes.cuda", "metrics.evaluate",
    "metrics.ppl_sparsity", "metrics.loss_recovered", "training.CapturedStep", "training.peak_bytes",
    "training.state_bytes", "training.Loss",
    "losses.Loss", "losses.LossInput", "losses.Pull", "Provenance",
    "losses.losses_for", "ablate", "max_activating", "steer", "fold_standardization",
    "metrics.evaluate_during", "metrics.evaluate_sites", "metrics.evaluate_sites_during",
    # A run reads the device where it logs, evaluates and saves; its updates are above.
    "Run", "Trainer", "train", *(f"training.{name}" for name in (
        "Architecture", "Callback", "Interrupted", "Run", "TrainConfig", "Trainer", "preset", "resume")),
}  # fmt: skip


def named(cases):
    return {name.partition(",")[0] for name in cases}


def test_every_public_name_is_declared():
    known = named(WITHOUT_WAITING) | {name.removesuffix(".select") for name in named(WAITING)} | APART
    public = set(se.__all__)
    for part in (f, losses, metrics, training):
        public |= {f"{part.__name__.rpartition('.')[2]}.{name}" for name in part.__all__}
    assert public <= known, f"say in this file whether these wait: {sorted(public - known)}"
    methods = {f"SparseCodes.{name}" for name, value in vars(se.SparseCodes).items()
               if not name.startswith("_") and (callable(value) or isinstance(value, property | classmethod))}
    grouped = ("shape", "rows", "device", "dtype", "double", "float", "half", "bfloat16")  # "and its like"
    simple = {f"SparseCodes.{name}" for name in grouped}
    assert methods - simple <= known


@pytest.mark.parametrize("name", WITHOUT_WAITING)
def test_nothing_waits(name, refusing):
    if name == "SparseCodes.to_sparse_csr" and not HAS_GPU:
        pytest.skip("the played device has no sparse tensors")
    if HAS_GPU:  # kernels are loaded before
        WITHOUT_WAITING[name]()()
    run = WITHOUT_WAITING[name]()
    with refusing():
        run()


@pytest.mark.parametrize("name", WAITING)
def test_what_is_said_to_wait_does(name, refusing):
    run = WAITING[name]()
    with pytest.raises(RuntimeError, match=r"host|values|mask|synchroniz"), refusing():
        run()


def test_the_list_in_the_documentation_has_them_all():
    text = (Path(__file__).resolve().parent.parent / "docs" / "waits.md").read_text(encoding="utf-8")
    section = text.partition("## What waits for the GPU")[2]
    listed = set(re.findall(r"\w+", " ".join(re.findall(r"`([^`]+)`", section))))
    for name in named(WAITING):
        parts = [part for part in name.split(".") if part not in ("functional", "metrics", "training", "select")]
        assert set(parts) - {"SparseCodes", "__getitem__"} <= listed, name


CAPTURED = {
    "AbsTopK": lambda: se.AbsTopK(4), "AuxTopK": lambda: se.AuxTopK(4), "AuxZipfTopK": lambda: se.AuxZipfTopK(4),
    "BatchTopK": lambda: se.BatchTopK(3.5), "FeatureChoice": lambda: se.FeatureChoice(F, 3.5),
    "Gated": lambda: se.Gated(F), "GradientTopK": lambda: se.GradientTopK(4), "JumpReLU": learning,
    "LogJumpReLU": lambda: se.LogJumpReLU(F), "MatryoshkaBatchTopK": lambda: se.MatryoshkaBatchTopK(3.5, (4, F)),
    "MutualChoice": lambda: se.MutualChoice(3.5), "ReLU": se.ReLU, "SampledTopK": lambda: se.SampledTopK(3.5, pool=2),
    "StatisticalTopK": lambda: se.StatisticalTopK(4), "TopAFA": se.TopAFA, "TopK": lambda: se.TopK(4),
}  # fmt: skip
CONTEXT = {
    "AuxTopK": {"dead_mask": lambda: torch.rand(F) < 0.5}, "AuxZipfTopK": {"shortfall": lambda: torch.rand(F)},
    "GradientTopK": {"attribution": lambda: torch.randn(B, F)}, "TopAFA": norms(),
}  # fmt: skip


def test_every_rule_is_captured():
    kinds = {name for name in se.__all__ if isinstance(getattr(se, name), type)}
    assert {name for name in kinds if issubclass(getattr(se, name), se.Activation)} - {"Activation"} == CAPTURED.keys()


@pytest.mark.parametrize("eval", [False, True], ids=["train", "eval"])
@pytest.mark.parametrize("name", sorted(CAPTURED))
def test_a_dense_forward_can_be_captured(name, eval):
    """After one like it nothing reads the device, brings tensors from the host or loads a kernel."""
    if HAS_GPU:
        pytest.skip("test_registration and test_rules capture them on a GPU")
    with Played() as played, torch.device("cuda"):
        rule, context = CAPTURED[name](), {key: value() for key, value in CONTEXT.get(name, {}).items()}
        rule(pre(), **context)
        rule.train(not eval)
        p = pre()
        for _ in range(2):
            rule(p, **context).sum().backward()
        with played.capturing():
            rule(p, **context).sum().backward()


@pytest.mark.parametrize("eval", [False, True], ids=["train", "eval"])
@pytest.mark.parametrize("name", sorted(CAPTURED.keys() - {"AuxTopK", "AuxZipfTopK", "GradientTopK"}))
def test_an_autoencoder_can_be_captured(name, eval):
    if HAS_GPU:
        pytest.skip("played here; on a GPU the rules are captured by test_registration and test_rules")
    with Played() as played, torch.device("cuda"):
        sae, x = se.SparseAutoencoder(D, F, CAPTURED[name]()), torch.randn(B, D)
        sae(x)
        sae.train(not eval)
        sae(x).sum().backward()
        with played.capturing():
            sae(x).sum().backward()


def test_a_step_is_captured_after_a_warm_up():
    """Two ordinary steps load no kernel of AuxK, for nothing is dead yet: the capture would have to."""
    if HAS_GPU:
        pytest.skip("played here; test_training_capture captures a step on a GPU")
    for warm in (False, True):
        with Played() as played, torch.device("cuda"):
            sae, x = se.SparseAutoencoder(D, F, se.TopK(4)), torch.randn(B, D)
            run = TrainStep(sae, lr=1e-3, losses=AuxK(5), compute_dtype=torch.bfloat16, dense=False)
            for _ in range(2):
                (run.warm_up if warm else run)(x)
            with played.capturing():
                if warm:
                    run(x)
                else:
                    with pytest.raises(RuntimeError, match="first launched"):
                        run(x)


SEEN = {
    "item": lambda x: x.sum().item(), "bool": lambda x: bool(x.any()), "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0], "list": lambda x: x[[0, 1]], "tensor": lambda x: torch.tensor(1.0, device="cuda"),
    "cpu": lambda x: x.cpu(), "repeats": lambda x: torch.repeat_interleave(torch.ones(3, dtype=torch.int64)),
    "devices": lambda x: x + torch.ones(4, device="cpu"), "foreach": lambda x: torch._foreach_add_([x], x.sum()),
    "generator": lambda x: torch.randn(3, generator=torch.Generator()),
}  # fmt: skip


@pytest.mark.parametrize("name", SEEN)
def test_the_played_device_sees_what_waits(name):
    if HAS_GPU:
        pytest.skip("there is a real one")
    with Played() as played, torch.device("cuda"):
        x = torch.randn(3, 4)
        with played.refusing():
            torch.full((), 2.0).mul(x).sum()
            with pytest.raises(RuntimeError, match=r"host|values|mask|same device|generator"):
                SEEN[name](x)
