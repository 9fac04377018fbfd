"""The page of an autoencoder's latents: what stands in it, that no text breaks out of it, what a browser shows."""

import gzip
import json
import re

import pytest
import torch
from browser import CHROMIUM, WHY_NOT, look, rows_seen
from tiny_models import DOCUMENTS, tiny_gpt2

import sae_engine as se
from sae_engine.latents import collect, logit_lens, max_activating, write_dashboard, write_neuronpedia

# What a text can do to a page that trusts it: end the script, the element, the string; and what nobody would see.
HOSTILE = ("</script><script>document.title = 'taken'</script>", "\"'`${1}\\", "<img src=x onerror=alert(1)>", "&lt;",
           "a\nb\tc\r", "\x00\x07\x1b\x7f\x85", "\u202eback\u2066wards\u2028", "\ud800", "<!-- --> ]]>",
           "日本語 🙂")  # fmt: skip


class HostileTokenizer:
    bos_token_id = eos_token_id = 0

    def decode(self, ids):
        return HOSTILE[ids[0] % len(HOSTILE)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Model, autoencoder, features, and the page of 40 latents with hostile tokens and title."""
    torch.manual_seed(0)
    lm = tiny_gpt2()
    sae = se.SparseAutoencoder(32, 48, se.TopK(4))
    with torch.no_grad():
        sae.b_enc[7] = -1e4  # dead
    folder = tmp_path_factory.mktemp("dashboard")
    features = collect(sae, lm, DOCUMENTS, folder / "features", layer=1, site="resid_post", dtype="float32",
                       text_source=HOSTILE[0], progress=False)  # fmt: skip
    object.__setattr__(lm, "tokenizer", HostileTokenizer())
    index = write_dashboard(features, sae, folder / "page", lm=lm, latents=40, contexts=3, window=12, title=HOSTILE[0])
    return lm, sae, features, index


def entries_of(page, number):
    text = (page / f"data-{number}.js").read_text(encoding="ascii")
    assert text.startswith(f"saeChunk({number}, ") and text.endswith(");\n")
    assert not set(text) & set("<>&")
    return json.loads(text[len(f"saeChunk({number}, ") : -3])


def overview_of(page):
    return json.loads((page / "latents.js").read_text(encoding="ascii")[len("window.saeLatents = ") : -2])


@torch.no_grad()
def test_the_page_says_what_the_features_and_the_weights_say(made):
    _, sae, features, index = made
    overview = overview_of(index.parent)
    counts = features.counts()
    assert overview["counts"] == counts.tolist() and overview["encoded"] == features.manifest["encoded"]
    shown = overview["shown"]
    assert shown == sorted(range(48), key=lambda latent: (-int(counts[latent]), latent))[:40] and counts[shown[-1]] > 0
    entries = [entry for number in range(2) for entry in entries_of(index.parent, number)]
    assert len(entries) == len(shown)
    rows = torch.nn.functional.normalize(sae.W_dec, dim=1)
    for place in (0, 5, len(shown) - 1):
        latent, entry = shown[place], entries[place]
        assert sum(entry["h"]["counts"]) == counts[latent]
        assert entry["h"]["high"] == pytest.approx(float(features.by_latent(latent).values.max()), rel=1e-3)
        cosines = rows @ rows[latent]
        cosines[latent] = -2
        best = cosines.topk(8)
        assert [pair[0] for pair in entry["n"]] == best.indices.tolist()
        assert [pair[1] for pair in entry["n"]] == pytest.approx(best.values.tolist(), abs=1e-3)
        own = torch.nn.functional.cosine_similarity(sae.W_enc[:, latent], sae.W_dec[latent], dim=0)
        assert entry["e"] == pytest.approx(float(own), abs=1e-3)
        for context, found in zip(entry["c"], max_activating(features, latent, 3, window=12), strict=True):
            assert context["t"] == [HOSTILE[token % len(HOSTILE)] for token in found.token_ids.tolist()]
            assert context["a"] == pytest.approx(found.activations.tolist(), rel=1e-3)
            assert (context["p"], context["d"], context["k"]) == (found.peak, found.document, found.token)


@torch.no_grad()
def test_the_logit_lens_is_the_final_norm_and_the_unembedding(made):
    lm, sae = made[:2]
    norm, head = lm.model.transformer.ln_f, lm.model.lm_head
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    try:
        rows = torch.nn.functional.normalize(sae.W_dec, dim=1) * 32**0.5
        expected = head(norm(rows)) - head(norm.bias)
        found = logit_lens(lm, 7.0 * sae.W_dec, k=5)  # as long as it likes
    finally:
        torch.nn.init.ones_(norm.weight)
        torch.nn.init.zeros_(norm.bias)
    assert torch.allclose(found.raised_by, expected.topk(5).values, atol=1e-4)
    assert torch.allclose(expected.gather(1, found.raised), found.raised_by, atol=1e-4)
    assert torch.allclose(found.lowered_by, -expected.neg().topk(5).values, atol=1e-4)
    assert torch.allclose(expected.gather(1, found.lowered), found.lowered_by, atol=1e-4)
    for error, said, directions in ((ValueError, r"must be \(n, 32\)", torch.ones(2, 31)),
                                    (TypeError, "directions must be", torch.ones(2, 32).int())):  # fmt: skip
        with pytest.raises(error, match=said):
            logit_lens(lm, directions)


def test_no_text_becomes_html(made):
    text = made[3].read_text(encoding="utf-8")
    assert text.count("<script") == 2 and text.count("</script>") == 2  # the page's own
    assert "<img" not in text and text.count("document.title = ") == text.count("&lt;script&gt;document.title = ") == 3
    assert re.search(r"\b(innerHTML|outerHTML|insertAdjacentHTML|document\.write)\b", text) is None
    assert re.search(r"https?://(?!www\.w3\.org/2000/svg)", text) is None  # nothing is loaded from elsewhere


def test_pages_are_replaced_and_need_no_model(made, tmp_path):
    _, sae, features, _ = made
    write_dashboard(features, sae, tmp_path, latents=None, contexts=1)
    everything = overview_of(tmp_path)["shown"]
    assert sorted(everything) == list(range(48)) and (tmp_path / "data-1.js").exists()
    dead = entries_of(tmp_path, 1)[everything.index(7) - 32]
    assert dead["c"] == [] and dead["h"] is None and dead["n"]
    assert entries_of(tmp_path, 0)[0]["w"] == [] and entries_of(tmp_path, 0)[0]["c"][0]["t"][0].startswith("[")
    write_dashboard(features, sae, tmp_path, latents=[7, 3], contexts=0)
    assert overview_of(tmp_path)["shown"] == [3, 7] and not (tmp_path / "data-1.js").exists()
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "Logit lens: none, since no language model was given" in page


def test_a_decoder_that_does_not_write_to_the_stream_has_no_lens(made, tmp_path):
    lm, _, _, _ = made
    sae = se.SparseAutoencoder(32, 48, se.TopK(4))
    ids = torch.arange(24).view(2, 12)
    features = collect(sae, lm, [ids], tmp_path / "features", layer=1, site="z", progress=False)
    page = write_dashboard(features, sae, tmp_path / "page", lm=lm, latents=2).read_text(encoding="utf-8")
    assert "Logit lens: none, since decoder rows are directions at z, not in the residual stream" in page


def test_what_does_not_belong_together_is_refused(made, tmp_path):
    lm, sae, features, _ = made
    other = tiny_gpt2()
    object.__setattr__(other, "sha256", "1" * 64)
    for error, said, call in (
        (ValueError, "sae is not the autoencoder whose features", lambda: write_dashboard(
            features, se.SparseAutoencoder(32, 48, se.TopK(4)), tmp_path)),
        (ValueError, "lm is not the model whose features", lambda: write_dashboard(features, sae, tmp_path, lm=other)),
        (ValueError, "latents must be at least 1", lambda: write_dashboard(features, sae, tmp_path, latents=0)),
        (ValueError, r"latents must be in 0\.\.47", lambda: write_dashboard(features, sae, tmp_path, latents=[48])),
        (ValueError, "at least one latent", lambda: write_dashboard(features, sae, tmp_path, latents=[])),
        (TypeError, "latents must be a number", lambda: write_dashboard(features, sae, tmp_path, latents="all")),
        (TypeError, "features must be", lambda: write_dashboard(tmp_path, sae, tmp_path)),
        (TypeError, "sae must be", lambda: write_dashboard(features, lm, tmp_path)),
        (TypeError, "lm must be", lambda: write_dashboard(features, sae, tmp_path, lm=lm.model)),
    ):  # fmt: skip
        with pytest.raises(error, match=said):
            call()
    assert not (tmp_path / "index.html").exists()


def lines_of(path):
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in data.splitlines()]


def test_neuronpedia_is_given_the_same(made, tmp_path):
    lm, sae, features, _ = made
    names = {"model_id": "tiny", "set_name": "res-me", "release": "mine", "creator": "Me"}
    source = write_neuronpedia(features, sae, tmp_path, lm=lm, latents=[3, 7, 9], contexts=4, **names)
    assert source == tmp_path / "tiny" / "1-res-me"
    latents = {int(line["index"]): line for line in lines_of(source / "features" / "batch-0.jsonl.gz")}
    contexts = lines_of(source / "activations" / "batch-0.jsonl.gz")
    assert set(latents) == {3, 7, 9} and latents[7]["maxActApprox"] == 0 == latents[7]["frac_nonzero"]
    lens = logit_lens(lm, sae.W_dec[[3, 7, 9]], 8)
    for row, (latent, line) in enumerate(sorted(latents.items())):
        found = max_activating(features, latent, 4, window=32)
        own = [context for context in contexts if context["index"] == str(latent)]
        assert [context["values"] for context in own] == [context.activations.tolist() for context in found]
        assert [context["maxValueTokenIndex"] for context in own] == [context.peak for context in found]
        assert sum(line["freq_hist_data_bar_heights"]) == features.counts()[latent]
        assert line["pos_str"] == [HOSTILE[token % len(HOSTILE)] for token in lens.raised[row].tolist()]
        assert line["vector"] == pytest.approx(sae.W_dec[latent].tolist(), rel=1e-5)
        assert (line["modelId"], line["layer"], line["hookName"]) == ("tiny", "1-res-me", "blocks.1.hook_resid_post")
    assert len({context["id"] for context in contexts}) == len(contexts) == 8
    (about,) = lines_of(source / "source.jsonl")
    assert (about["id"], about["setName"], about["num_tokens_in_prompt"]) == ("1-res-me", "res-me", 32)
    (release,), (sources,) = lines_of(source / "release.jsonl"), lines_of(source / "sourceset.jsonl")
    assert sources["releaseName"] == release["name"] == "mine"
    with pytest.raises(ValueError, match="set_name must be of letters"):
        write_neuronpedia(features, sae, tmp_path, lm=lm, **{**names, "set_name": "../up"})
    with pytest.raises(TypeError, match="lm must be given"):
        write_neuronpedia(features, sae, tmp_path, lm=None, **names)


@pytest.mark.skipif(CHROMIUM is None, reason=WHY_NOT)
def test_a_browser_shows_it(made):
    """From file://, with hostile tokens: all of it is drawn, nothing of it is run, and the console has no word."""
    _, _, features, index = made
    latent = overview_of(index.parent)["shown"][34]  # of the second file
    seen = look(index, fragment=f"#{latent}", height=900)
    dom = seen.dom
    assert seen.console == []
    assert f"<h2>Latent {latent}</h2>" in dom
    assert f"fires on {int(features.counts()[latent])} of" in dom
    assert dom.count('class="context"') == len(max_activating(features, latent, 3))
    assert dom.count("<rect") == 24 and dom.count("<li>") == len(overview_of(index.parent)["shown"])
    assert dom.count("<table>") == 3  # neighbours and both sides of the logit lens
    assert "<title>&lt;/script&gt;" in dom and "<img" not in dom and dom.count("<script") == 2 + 1  # and data-1.js
    assert "␀" in dom and "\\u202e" in dom and "↵" in dom and "日本語 🙂" in dom
    assert not set(dom) & set("\x00\x07\x1b\x7f\x85\u202e\u2066\u2028")
    assert rows_seen(seen.png) > 300


@pytest.mark.skipif(CHROMIUM is None, reason=WHY_NOT)
def test_a_page_whose_data_is_missing_says_so(made, tmp_path):
    """And so the console of the test above would have had a word."""
    (tmp_path / "index.html").write_text(made[3].read_text(encoding="utf-8"), encoding="utf-8")
    seen = look(tmp_path / "index.html")
    assert seen.console and "latents.js is missing: copy the whole folder." in seen.dom
