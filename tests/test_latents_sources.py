"""One source of a crosscoder, as features and pages see it: its codes, what it writes, where it says it reads."""
import gzip
import json

import pytest
import torch
from browser import CHROMIUM, WHY_NOT, look
from tiny_models import DOCUMENTS, tiny_gpt2

import sae_engine as se
from sae_engine.data import stream_activations, together
from sae_engine.latents import collect, logit_lens, of_source, write_dashboard, write_delphi, write_neuronpedia

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


@pytest.mark.parametrize("scaled", ["", "joint", "sum"])
@pytest.mark.parametrize("rule", RULES)
def test_its_codes_are_the_sources_and_all_of_them_add_up(rule, scaled):
    options = {"rescale_acts_by_decoder_norm": True, "decoder_norm": scaled} if scaled else {}
    coder, x = clt(rule, **options), torch.randn(7, 2, 32)
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


def page_of(page):
    overview = json.loads((page.parent / "latents.js").read_text()[len("window.saeLatents = ") : -2])
    return overview, json.loads((page.parent / "data-0.js").read_text()[len("saeChunk(0, ") : -3])


@pytest.mark.parametrize("number", [0, 1])
def test_features_and_a_page_of_it(number, tmp_path):
    lm, coder = tiny_gpt2(), clt()
    made = of_source(coder, number)
    features = collect(made, lm, DOCUMENTS, tmp_path / "features", dtype="float32", progress=False)
    assert (features.manifest["layer"], features.manifest["site"]) == (number, "resid_mid")
    page = write_dashboard(features, made, tmp_path / "page", lm=lm, latents=3, contexts=1)
    assert "Logit lens: none" not in page.read_text(encoding="utf-8")
    overview, entries = page_of(page)
    rows = made.W_dec[overview["shown"]].detach()
    first, second = rows.split(32, dim=1) if number == 0 else (rows, rows)
    expected = {"the sum of all 2 sites": first + second, "blocks.1.hook_mlp_out": second,
                "blocks.0.hook_mlp_out": first}  # fmt: skip
    assert overview["lenses"] == list(expected) if number == 0 else ["blocks.1.hook_mlp_out"]
    for place, name in enumerate(overview["lenses"]):
        lens = logit_lens(lm, expected[name], 8)
        for row, entry in enumerate(entries):
            raised = [value for _, value in entry["w"][place]["u"]]
            assert raised == pytest.approx(lens.raised_by[row].tolist(), rel=1e-3)
            share = 1 if name.startswith("the sum") else expected[name][row].square().sum() / rows[row].square().sum()
            assert entry["w"][place]["s"] == pytest.approx(float(share), rel=1e-3)
    names = {"model_id": "tiny", "set_name": "clt", "release": "mine", "creator": "Me"}
    export = write_neuronpedia(features, made, tmp_path / "export", lm=lm, latents=1, contexts=1, **names)
    line = json.loads(gzip.decompress((export / "features" / "batch-0.jsonl.gz").read_bytes()).splitlines()[0])
    assert line["hasVector"] is bool(line["vector"]) is (number == 1)
    assert line["pos_values"] == pytest.approx([value for _, value in entries[0]["w"][0]["u"]], rel=1e-3)
    with pytest.raises(ValueError, match="other weights"):
        write_dashboard(features, of_source(coder, 1 - number), tmp_path / "page", lm=lm)
    with pytest.raises(TypeError, match="of_source"):
        write_dashboard(features, coder, tmp_path / "page", lm=lm)
    with pytest.raises(TypeError, match="of_source"):
        collect(coder, lm, DOCUMENTS, tmp_path / "others", layer=0, site="resid_mid", progress=False)


@pytest.mark.skipif(CHROMIUM is None, reason=WHY_NOT)
def test_a_browser_offers_the_lens_of_each_site(tmp_path):
    lm, made = tiny_gpt2(), of_source(clt(), 0)
    features = collect(made, lm, DOCUMENTS[:8], tmp_path / "features", progress=False)
    seen = look(write_dashboard(features, made, tmp_path / "page", lm=lm, latents=3))
    assert seen.console == [] and seen.dom.count("<option") == 3
    assert "the sum of all 2 sites · 100 %" in seen.dom and "blocks.1.hook_mlp_out · " in seen.dom


@pytest.mark.parametrize("decoder_norm", ["joint", "sum"])
def test_a_joint_crosscoder_of_two_models_reads_both(decoder_norm, tmp_path):
    torch.manual_seed(0)
    lm, other = together(tiny_gpt2(), tiny_gpt2()), tiny_gpt2()
    object.__setattr__(lm.others[0], "sha256", "1" * 64)
    coder = se.Crosscoder([32, 32], [32, 32], 24, se.BatchTopK(4), rescale_acts_by_decoder_norm=True,
                          decoder_norm=decoder_norm)  # fmt: skip
    sites = ("blocks.1.hook_resid_post", "blocks.1.hook_resid_post@1")
    coder.provenance = se.Provenance(model="a", sites=sites, models=("a", "b"))
    coder(x := 0.01 * torch.randn(64, 2, 32))  # from which the rule learns its threshold
    made = of_source(coder.eval(), 0)
    torch.testing.assert_close(made.encode(x.flatten(1)).to_dense(), coder.encode(x).to_dense())
    torch.testing.assert_close(made.decode(made.encode(x.flatten(1))) + coder.b_dec, coder.decode(coder.encode(x)))
    features = collect(made, lm, DOCUMENTS[:8], tmp_path / "features", dtype="float32", progress=False)
    assert features.provenance.sites == sites and features.provenance.models == ("tiny", "tiny")
    page = write_dashboard(features, made, tmp_path / "page", lm=lm, latents=3, contexts=1)
    overview, entries = page_of(page)
    assert overview["lenses"] == list(sites[::-1])  # each is a stream of its own: there is no sum
    lens = logit_lens(lm.others[0], made.W_dec[overview["shown"], 32:].detach(), 8)
    assert [value for _, value in entries[0]["w"][0]["u"]] == pytest.approx(lens.raised_by[0].tolist(), rel=1e-3)
    assert [entry["e"] for entry in entries] == pytest.approx(torch.nn.functional.cosine_similarity(
        made.W_enc.T, made.W_dec, dim=1)[overview["shown"]].tolist(), abs=1e-3)  # fmt: skip
    names = {"model_id": "tiny", "set_name": "clt", "release": "mine", "creator": "Me"}
    silent = of_source(coder, 0)
    silent.read_places = None
    for said, call in {
        "has a layer, and these read": lambda: write_neuronpedia(features, made, tmp_path / "no", lm=lm, **names),
        "module must be given": lambda: write_delphi(features, tmp_path / "no"),
        "no model 1": lambda: collect(made, other, DOCUMENTS, tmp_path / "no", progress=False),
        "together": lambda: write_dashboard(features, made, tmp_path / "no", lm=other),
        "site: this source reads 2": lambda: collect(made, lm, DOCUMENTS, tmp_path / "no", layer=1, progress=False),
        "Provenance": lambda: collect(silent, lm, DOCUMENTS, tmp_path / "no", progress=False),
        "to be put into a model": lambda: se.steer(lm, made, {0: 1.0}),
        "save the crosscoder": lambda: made.save_pretrained(tmp_path / "no"),
    }.items():
        with pytest.raises(ValueError, match=said):
            call()


def test_codes_of_several_sites_are_those_of_their_rows(tmp_path):
    """And a source of the second model alone needs no other."""
    torch.manual_seed(0)
    lm = together(tiny_gpt2(), tiny_gpt2())
    sites = ("blocks.1.hook_resid_post", "blocks.2.hook_resid_pre@1")
    coder = se.Crosscoder([32, 32], [32, 32], 24, se.TopK(4), wiring=[((0, 2), (0, 2)), (1, (0, 2))]).eval()
    coder.provenance = se.Provenance(model="a", sites=sites, models=("a", "b"))
    options = {"batch_size": 4, "context_length": 16}
    made = of_source(coder, 0)
    features = collect(made, lm, DOCUMENTS[:8], tmp_path / "both", dtype="float32", progress=False, **options)
    rows = [torch.cat(list(stream_activations(lm, DOCUMENTS[:8], site=site, **options))) for site in sites]
    expected = made.encode(torch.cat(rows, 1)).to_dense()
    torch.testing.assert_close(features.codes().to_dense()[features.tokens().encoded], expected)
    second = of_source(coder, 1)
    assert (second.provenance.model, second.provenance.site) == ("b", "resid_pre")
    alone = collect(second, lm.others[0], DOCUMENTS[:8], tmp_path / "one", dtype="float32", progress=False, **options)
    torch.testing.assert_close(alone.codes().to_dense()[alone.tokens().encoded], second.encode(rows[1]).to_dense())
    page = write_dashboard(alone, second, tmp_path / "page", lm=lm.others[0], latents=1)
    assert "the model of blocks.1.hook_resid_post@1 was not given" in page.read_text(encoding="utf-8")
    assert page_of(page)[0]["lenses"] == ["blocks.2.hook_resid_pre"]


BAD = {
    "no crosscoder": (lambda: of_source(se.SparseAutoencoder(4, 8, se.TopK(2)), 0), "coder must be a Crosscoder"),
    "no number": (lambda: of_source(clt(), "0"), "number"),
    "no such source": (lambda: of_source(clt(), 2), r"0\.\.1"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_by_name(case):
    call, named = BAD[case]
    with pytest.raises((TypeError, ValueError), match=named):
        call()
