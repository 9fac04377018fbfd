"""Objects of SAELens, dictionary_learning and sparsify with random parameters, and what is called on them."""

import os
import warnings

import pytest
import torch

os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")  # sparsify chooses its decoder once, when it is imported
REASON = "needs {}: make test-interop"
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    saes = pytest.importorskip("sae_lens.saes", reason=REASON.format("sae-lens"))
    pytest.importorskip("dictionary_learning", reason=REASON.format("dictionary-learning"))
    sparsify = pytest.importorskip("sparsify", reason=REASON.format("eai-sparsify"))
    from dictionary_learning.dictionary import AutoEncoder, JumpReluAutoEncoder  # noqa: F401
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
    from dictionary_learning.trainers.top_k import AutoEncoderTopK
    from sae_lens.saes.sae import TrainStepInput

MARKS = [
    pytest.mark.interop,
    pytest.mark.filterwarnings("default"),  # of these libraries and their dependencies
]

B, D, F = 72, 12, 200  # more tokens than FEW_TOKENS, so that dictionary_learning's decoder is sparse
SIZE = {"d_in": D, "d_sae": F}
DEAD = torch.arange(F) % 3 == 0
FEW_DEAD = (torch.arange(F) > 4) & (torch.arange(F) < 8)  # fewer than d_in // 2


def sae_lens(name, bias=0.0, **options):
    return lambda: with_parameters(getattr(saes, name)(getattr(saes, f"{name}Config")(**SIZE, **options)), bias)


def with_parameters(module, bias=0.0):
    """Every parameter random, the same on every call; the encoder's bias, where given, so low that few latents fire."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if name == "threshold":
                p.fill_(0.4)
                continue
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
            if name in ("b_enc", "encoder.bias"):
                p.add_(bias)
    return module


def threshold_at(value, make):
    def with_threshold():
        module = make()
        module.threshold = torch.tensor(value)
        return module

    return with_threshold


def below_zero(module):
    """Thresholds that let negative pre-activations by, for the ReLU to stop."""
    with_parameters(module, SPARSE).threshold.data.fill_(-0.5)
    return module


JUMP = {"jumprelu_bandwidth": 0.5, "target_l0": 5.0}
SPARSE, DENSE = -2.5, 0.0  # encoder biases at which rules that follow the data make codes, and do not

INFERENCE = {
    "topk": sae_lens("TopKSAE", k=5),
    "topk rescaled": sae_lens("TopKSAE", k=5, rescale_acts_by_decoder_norm=True),
    "abstopk": sae_lens("AbsTopKSAE", k=5),
    "jumprelu": sae_lens("JumpReLUSAE", SPARSE),
    "jumprelu dense": sae_lens("JumpReLUSAE", DENSE),
    "standard": sae_lens("StandardSAE", SPARSE),
    "standard dense": sae_lens("StandardSAE", DENSE),
    "layer norm": sae_lens("TopKSAE", k=5, normalize_activations="layer_norm", apply_b_dec_to_input=False),
}
TRAINING = {
    "topk": sae_lens("TopKTrainingSAE", k=5),
    "topk plain": sae_lens("TopKTrainingSAE", k=5, rescale_acts_by_decoder_norm=False, aux_loss_coefficient=0.5),
    "abstopk": sae_lens("AbsTopKTrainingSAE", k=5),
    "batchtopk": sae_lens("BatchTopKTrainingSAE", k=5.3),
    "matryoshka": sae_lens("MatryoshkaBatchTopKTrainingSAE", k=5.3, matryoshka_widths=[20, 90, F]),
    "matryoshka aux": sae_lens(
        "MatryoshkaBatchTopKTrainingSAE", k=5.3, matryoshka_widths=[20, 90, F], use_matryoshka_aux_loss=True
    ),
    "jumprelu step": sae_lens("JumpReLUTrainingSAE", SPARSE, **JUMP),
    "jumprelu tanh": sae_lens("JumpReLUTrainingSAE", SPARSE, **JUMP, jumprelu_sparsity_loss_mode="tanh"),
    "jumprelu quadratic ste": sae_lens(
        "JumpReLUTrainingSAE", SPARSE, **JUMP, jumprelu_sparsity_loss_mode="quadratic", jumprelu_ste_to_input=True,
        pre_act_loss_coefficient=0.01,
    ),
    "jumprelu dense": sae_lens("JumpReLUTrainingSAE", DENSE, **JUMP),
    "standard": sae_lens("StandardTrainingSAE", SPARSE),
    "standard l2": sae_lens("StandardTrainingSAE", SPARSE, lp_norm=2.0),
    "standard dense": sae_lens("StandardTrainingSAE", DENSE),
}  # fmt: skip
DICTIONARIES = {
    "AutoEncoderTopK": lambda: with_parameters(AutoEncoderTopK(D, F, 5)),
    "BatchTopKSAE": threshold_at(0.9, lambda: with_parameters(BatchTopKSAE(D, F, 5), -0.5)),
    "BatchTopKSAE unset": lambda: with_parameters(BatchTopKSAE(D, F, 5)),
    "Matryoshka": threshold_at(0.9, lambda: with_parameters(MatryoshkaBatchTopKSAE(D, F, 5, [20, 80, 100]), -0.5)),
    "JumpRelu": lambda: with_parameters(JumpReluAutoEncoder(D, F), SPARSE),
    "JumpRelu below 0": lambda: below_zero(JumpReluAutoEncoder(D, F)),
    "JumpRelu dense": lambda: with_parameters(JumpReluAutoEncoder(D, F), DENSE),
}


def coder(**options):
    return lambda: with_parameters(sparsify.SparseCoder(D, sparsify.SparseCoderConfig(num_latents=F, k=5, **options)))


CODERS = {
    "coder": coder(),
    "coder multi": coder(multi_topk=True),
    "coder skip": coder(transcode=True, skip_connection=True),
}


# ------------------------------------------------------------------------------------------ what is called on them


def sae_forward(sae, x):
    f = sae.encode(x)
    return {"f": f, "decoded": sae.decode(f), "out": sae(x)}


def sae_train(dead):
    def call(sae, x):
        step = TrainStepInput(
            sae_in=x, coefficients={"l0": 0.1, "l1": 0.1}, dead_neuron_mask=dead, n_training_steps=1,
            is_logging_step=False,
        )  # fmt: skip
        out = sae.training_forward_pass(step)
        return {"loss": out.loss, "out": out.sae_out, "f": out.feature_acts, "pre": out.hidden_pre, **out.losses}

    return call


def dictionary_forward(ae, x):
    f = ae.encode(x)
    return {"f": f, "decoded": ae.decode(f), "out": ae(x), "out and f": ae(x, output_features=True)[0]}


def dictionary_train(ae, x):
    options = {"AutoEncoderTopK": {"return_topk": True}, "JumpReluAutoEncoder": {"output_pre_jump": True}}
    f, *others = ae.encode(x, **options.get(type(ae).__name__, {"return_active": True, "use_threshold": False}))
    if type(ae).__name__ == "AutoEncoderTopK":
        order = others[1].argsort(-1)
        others[:2] = [t.gather(-1, order) for t in others[:2]]
    return {"f": f, "decoded": ae.decode(f), **{f"other {n}": t for n, t in enumerate(others)}}


def coder_forward(sae, x):
    acts, indices, pre = sae.encode(x)
    order = indices.argsort(-1)
    return {
        "acts": acts.gather(-1, order), "indices": indices.gather(-1, order), "pre": pre.detach(),
        "decoded": sae.decode(acts, indices),
    }  # fmt: skip


def coder_train(dead):
    def call(sae, x):
        out = sae(x=x, y=None if not sae.cfg.transcode else x.flip(0), dead_mask=dead)
        order = out.latent_indices.argsort(-1)
        loss = out.fvu + out.auxk_loss / 32 + out.multi_topk_fvu / 8
        return {"loss": loss, "out": out.sae_out, "indices": out.latent_indices.gather(-1, order)}

    return call
