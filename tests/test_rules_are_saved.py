"""Every rule, a user's own among them: trained, saved, loaded, the same bits; or a clear refusal."""
import json

import pytest
import torch

import sae_engine as se
from sae_engine.checkpoints import formats

D, F = 8, 24


class SortedShare(se.Activation):
    """A user's rule: the fewest entries of a token, largest first, whose squares sum up to a share p of all."""

    def __init__(self, p):
        super().__init__()
        self.p = p
        self.register_buffer("seen", torch.zeros(2, 3))

    def _select(self, pre, backend):
        ranked = pre.detach().relu().sort(dim=-1, descending=True).values
        energy = ranked.square().cumsum(-1)
        enough = (energy >= self.p * energy[..., -1:]).to(torch.int8).argmax(-1, keepdim=True)
        least = ranked.gather(-1, enough)
        return se.SparseCodes.from_dense(torch.where((pre >= least) & (pre > 0), pre, 0.0))


RULES = {
    "TopK": lambda: se.TopK(3), "AbsTopK": lambda: se.AbsTopK(3), "ReLU": se.ReLU,
    "BatchTopK": lambda: se.BatchTopK(2.5, threshold_lr=0.3, threshold_start=2, initial_threshold=0.01),
    "MutualChoice": lambda: se.MutualChoice(3), "MatryoshkaBatchTopK": lambda: se.MatryoshkaBatchTopK(3, (6, F)),
    "FeatureChoice": lambda: se.FeatureChoice(F, 3, budgets="uniform", mutual_steps=2, inference="global"),
    "SampledTopK": lambda: se.SampledTopK(3, pool=2.0, score="entropy"),
    "StatisticalTopK": lambda: se.StatisticalTopK(3), "GradientTopK": lambda: se.GradientTopK(3, beta=0.5),
    "TopAFA": lambda: se.TopAFA(target_scale=0.5), "Gated": lambda: se.Gated(F),
    "JumpReLU": lambda: se.JumpReLU(F, threshold=0.02, bandwidth=0.1),
    "LogJumpReLU": lambda: se.LogJumpReLU(F, threshold=0.02, bandwidth=0.1), "SortedShare": lambda: SortedShare(0.7),
}  # fmt: skip
APART = {"AuxTopK", "AuxZipfTopK"}  # of a training step; an autoencoder's own rule they could be, and are saved alike
ADDED = {"Gated": [se.losses.GateLoss(0.1)], "ReLU": [se.losses.L1(0.1)],
         "JumpReLU": [se.losses.StepL0(0.1)], "LogJumpReLU": [se.losses.TanhL0(0.1)]}  # fmt: skip


def trained(name, **options):
    torch.manual_seed(0)
    sae = se.SparseAutoencoder(D, F, RULES[name](), **options)
    step = se.training.TrainStep(sae, lr=0.05, losses=ADDED.get(name, ()))
    for _ in range(4):
        step(torch.randn(64, D), **given(name, 64))
    return sae


def given(name, tokens):
    generator = torch.Generator().manual_seed(5)
    return {"gradient": torch.randn(tokens, D, generator=generator)} if name == "GradientTopK" else {}


def test_every_rule_is_here():
    kinds = {name for name in se.__all__ if isinstance(getattr(se, name), type)}
    assert {n for n in kinds if issubclass(getattr(se, n), se.Activation)} - {"Activation"} - APART <= RULES.keys()


@pytest.mark.parametrize("rescale", [False, True], ids=["plain", "rescaled"])
@pytest.mark.parametrize("name", RULES)
def test_the_same_bits_come_back(name, rescale, tmp_path):
    sae = trained(name, rescale_acts_by_decoder_norm=rescale)
    sae.save_pretrained(tmp_path)
    again = se.SparseAutoencoder.from_pretrained(tmp_path)
    assert type(again.activation) is type(sae.activation)
    assert again.activation.options() == sae.activation.options()
    for key, tensor in sae.activation.state_dict().items():
        assert torch.equal(again.activation.state_dict()[key], tensor), key
    x = torch.randn(16, D)
    folded = rescale and name in ("ReLU", "JumpReLU", "TopAFA", "Gated")  # SAELens does not rescale these
    for mode in (True, False):
        ours, theirs = (s.train(mode)(x, **given(name, 16)) for s in (sae, again))
        if folded:
            torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)  # norms moved to the encoder: fp32 products
        else:
            assert torch.equal(theirs, ours)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("format", formats.FORMATS)
def test_other_formats_hold_a_rule_or_refuse_it(format, name, tmp_path):
    sae = trained(name).eval()
    x = torch.randn(16, D)
    refusal = None
    try:
        sae.save_pretrained(tmp_path / "saved", format=format)
    except ValueError as error:
        refusal = str(error)
    if refusal is not None:
        assert format in refusal and "saelens" in refusal and not (tmp_path / "saved").exists()
        return
    again = se.SparseAutoencoder.from_pretrained(tmp_path / "saved").eval()
    torch.testing.assert_close(again(x, **given(name, 16)), sae(x, **given(name, 16)), rtol=1e-4, atol=1e-5)


def test_thresholds_below_zero_are_the_zeros_that_they_stand_for(tmp_path):
    sae = se.SparseAutoencoder(D, F, se.JumpReLU(F))
    with torch.no_grad():
        sae.activation.threshold[::2] = -0.3
    sae.save_pretrained(tmp_path)
    again, x = se.SparseAutoencoder.from_pretrained(tmp_path), torch.randn(9, D)
    assert torch.equal(again.eval()(x), sae.eval()(x))
    assert torch.equal(again.activation.threshold, sae.activation.threshold)


def test_a_rule_that_nobody_defined_is_named(tmp_path):
    trained("SortedShare").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    config["architecture"] = "sae_engine.TopQ"
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"'TopQ' is not known here: import the module"):
        se.SparseAutoencoder.from_pretrained(tmp_path)


def test_states_of_another_shape_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    trained("SortedShare").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "sae_weights.safetensors")
    save_file({**tensors, "seen": torch.zeros(7)}, tmp_path / "sae_weights.safetensors")
    with pytest.raises(ValueError, match=r"seen must have shape \(2, 3\), got \(7,\)"):
        se.SparseAutoencoder.from_pretrained(tmp_path)


def test_a_rule_that_hides_its_arguments_is_not_saved_without_them(tmp_path):
    class Hiding(se.TopK):
        def __init__(self, k, extra=3):
            super().__init__(k)

    class Odd(se.TopK):
        def __init__(self, k, options=None):
            super().__init__(k)

        def options(self):
            return {"k": self.k, "options": object()}

    for rule, message in ((Hiding(3), "no attribute extra"), (Odd(3), "options that no checkpoint holds")):
        with pytest.raises(TypeError, match=message):
            se.SparseAutoencoder(D, F, rule).save_pretrained(tmp_path / "x")
        assert not (tmp_path / "x").exists()


def test_a_name_of_ours_stays_ours():
    class TopK(se.Activation):
        def _select(self, pre, backend):
            return se.functional.topk(pre, 2)

    from sae_engine.rules.base import RULES as known

    assert known["TopK"] is se.TopK
    with pytest.raises(TypeError, match="another rule has its name"):
        se.SparseAutoencoder(D, F, TopK()).save_pretrained("never")
