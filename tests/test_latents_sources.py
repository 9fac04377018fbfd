"""One source of a crosscoder, as features and pages see it: its codes, what it writes, where it says it reads."""
import pytest
import torch
from tiny_models import DOCUMENTS, tiny_gpt2

import sae_engine as se
from sae_engine.latents import collect, of_source, write_dashboard

RULES = {
    "topk": lambda: se.TopK(4), "batch": lambda: se.BatchTopK(4),
    "jumprelu": lambda: [se.JumpReLU(24, threshold=0.01 * s) for s in range(2)],
}  # fmt: skip


def clt(rule="topk", **options):
    torch.manual_seed(0)
    made = se.Crosscoder.clt(2, 32, 24, RULES[rule](), **options)
    with torch.no_grad():
        made.b_enc.uniform_(-0.1, 0.1), made.b_dec.normal_()
    made(torch.randn(16, 2, 32))  # from which a batch rule learns its threshold
    made.provenance = se.Provenance(
        model="m", sites=("blocks.0.hook_resid_mid", "blocks.1.hook_resid_mid"),
        target_sites=("blocks.0.hook_mlp_out", "blocks.1.hook_mlp_out"),
    )  # fmt: skip
    return made.eval()


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_its_codes_are_the_sources_and_all_of_them_add_up(rule, scaled):
    coder, x = clt(rule, rescale_acts_by_decoder_norm=scaled), torch.randn(7, 2, 32)
    whole, total = coder.encode(x).to_dense(), coder.b_dec.expand(7, -1).clone()
    for number, source in enumerate(coder.sources):
        made = of_source(coder, number)
        codes = made.encode(x[:, number])
        torch.testing.assert_close(codes.to_dense(), whole[number])
        assert (codes.to_dense() != 0).any()
        total[:, source.writes] += made.decode(codes)
        assert made.W_dec.data_ptr() == coder.W_dec[number].data_ptr()
    torch.testing.assert_close(total, coder.decode(coder.encode(x)), rtol=1e-4, atol=1e-5)


def test_it_says_where_it_reads_and_writes():
    first, last = (of_source(clt(), number).provenance for number in range(2))
    assert (first.layer, first.site, first.target_site, first.d, first.d_target) == (0, "resid_mid", "unknown", 32, 64)
    assert (last.layer, last.site, last.target_layer, last.target_site) == (1, "resid_mid", 1, "mlp_out")
    coder = clt()
    coder.provenance = None
    assert of_source(coder, 0).provenance is None


@pytest.mark.parametrize("number", [0, 1])
def test_features_and_a_page_of_it(number, tmp_path):
    lm, coder = tiny_gpt2(), clt()
    made = of_source(coder, number)
    features = collect(made, lm, DOCUMENTS, tmp_path / "features", dtype="float32", progress=False)
    assert (features.manifest["layer"], features.manifest["site"]) == (number, "resid_mid")
    page = write_dashboard(features, made, tmp_path / "page", lm=lm, latents=3, contexts=1)
    text = page.read_text(encoding="utf-8")
    assert ("Logit lens: none" in text) is (number == 0)  # the last source writes one site, in the stream
    with pytest.raises(ValueError, match="other weights"):
        write_dashboard(features, of_source(coder, 1 - number), tmp_path / "page", lm=lm)
    with pytest.raises(TypeError, match="of_source"):
        write_dashboard(features, coder, tmp_path / "page", lm=lm)
    with pytest.raises(TypeError, match="of_source"):
        collect(coder, lm, DOCUMENTS, tmp_path / "others", layer=0, site="resid_mid", progress=False)


BAD = {
    "no crosscoder": (lambda: of_source(se.SparseAutoencoder(4, 8, se.TopK(2)), 0), "coder must be a Crosscoder"),
    "no number": (lambda: of_source(clt(), "0"), "number"),
    "no such source": (lambda: of_source(clt(), 2), r"0\.\.1"),
    "several sites": (lambda: of_source(se.Crosscoder([4, 4], [4, 4], 8, se.TopK(2)), 0), "read one site"),
    "summed norms": (lambda: of_source(clt(rescale_acts_by_decoder_norm=True, decoder_norm="sum"), 0), "decoder_norm"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_by_name(case):
    call, named = BAD[case]
    with pytest.raises((TypeError, ValueError), match=named):
        call()
