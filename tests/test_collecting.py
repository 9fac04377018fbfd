"""Collections as int8, and several of one pass of the language model."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import DOCUMENTS, collect, tiny_gpt2

from sae_engine.data import (
    ActivationStore,
    collect_sites,
    collecting,
    evaluation_text,
    load_language_model,
    stream_activations,
)
from sae_engine.data.quantized import quantized, restored


@pytest.fixture
def lm():
    return tiny_gpt2()


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def fvu(found, rows):
    return float((found - rows).double().square().sum() / (rows - rows.mean(0)).double().square().sum())


def test_int8_loses_little_even_beside_outlier_dimensions():
    """The bound of the format. With a scale a row alone, large dimensions would leave nothing of the others."""
    lm = load_language_model()
    rows = torch.cat(list(stream_activations(lm, evaluation_text()[:2], layer=2, max_tokens=2000)))
    large = rows.clone()
    large[:, [3, 77]] = large[:, [3, 77]] * 60 + torch.tensor([900.0, -400.0])  # as GPT-2 has two of
    constant = rows.clone()
    constant[9] = rows.mean(0)
    constant[:, 5] = 7
    for x in (rows, large, constant):
        columns = quantized(x, "rows")
        assert fvu(restored(columns.__getitem__, "rows"), x) < 4.9e-5
        of_dimensions = (restored(columns.__getitem__, "rows") - x).square().mean(0) / x.var(0).clamp(min=1e-6)
        assert float(of_dimensions.max()) < 3e-4  # no dimension is given up
    step = large.abs().amax(1, keepdim=True) / 127
    others = torch.ones(256, dtype=torch.bool).index_fill(0, torch.tensor([3, 77]), False)
    assert fvu(((large / step).round() * step)[:, others], large[:, others]) > 0.01
    assert columns["rows"].dtype == torch.int8 and columns["scale"].dtype == torch.float16
    assert torch.equal(restored(columns.__getitem__, "rows")[:, 5], constant[:, 5])


def test_int8_is_stored_read_and_carried_on(lm, tmp_path, monkeypatch):
    exact = collect(lm, tmp_path / "exact", dtype=torch.float32).tensor()
    store = collect(lm, tmp_path / "s", dtype="int8")
    assert (store.dtype, store.manifest["dtype"], store.provenance.dtype) == (torch.float32, "int8", "int8")
    assert fvu(store.tensor(), exact) < 1e-4
    assert torch.equal(torch.cat(list(store.batches(64, shuffle=False))), store.tensor())
    assert next(store.batches(64, dtype="bfloat16")).dtype == torch.bfloat16
    size = (tmp_path / "s" / "shard-00000.safetensors").stat().st_size
    assert size < 300 * (32 + 2 + 16) + 2 * 4 * 32 + 1000
    store.verify()

    real = collecting.replace_file

    def dies(path, write):
        if path.name == "shard-00002.safetensors":
            raise KeyboardInterrupt
        real(path, write)

    monkeypatch.setattr(collecting, "replace_file", dies)
    with pytest.raises(KeyboardInterrupt):
        collect(lm, tmp_path / "cut", dtype=torch.int8)
    monkeypatch.undo()
    collect(lm, tmp_path / "cut", dtype=torch.int8)
    assert contents(tmp_path / "cut") == contents(tmp_path / "s")
    with pytest.raises(ValueError, match=r"dtype: .* has 'int8', this call asks for 'float16'"):
        collect(lm, tmp_path / "s", dtype="float16")


def test_an_int8_shard_without_its_scales_is_damaged(lm, tmp_path):
    store = collect(lm, tmp_path, dtype="int8")
    file = tmp_path / store.manifest["shards"][0]["file"]
    columns = load_file(file)
    del columns["scale"]
    save_file(columns, file)
    with pytest.raises(ValueError, match=r"shard-00000.* is damaged: its scale are None"):
        ActivationStore(tmp_path)


def test_several_sites_of_one_pass_are_what_each_is_alone(lm, tmp_path, monkeypatch):
    sites = ["blocks.1.hook_resid_pre", "transformer.h.0.mlp.c_proj:input", "resid_post_layer_1"]
    passes = []
    real = collecting.batch_rows
    monkeypatch.setattr(collecting, "batch_rows", lambda *a: (passes.append(len(a) - 2), real(*a))[1])
    options = {"shard_tokens": 300, "batch_size": 4, "progress": False, "text_source": "powers", "max_tokens": 700}
    stores = collect_sites(lm, DOCUMENTS, tmp_path / "all", sites, **options)
    assert set(passes) == {3}
    assert [store.path.name for store in stores] == [
        "blocks.1.hook_resid_pre", "blocks.0.mlp.c_proj:input", "blocks.1.hook_resid_post"]  # fmt: skip
    assert [store.d_model for store in stores] == [32, 128, 32]
    for number, (store, site) in enumerate(zip(stores, sites, strict=True)):
        alone = collect(lm, tmp_path / f"alone {number}", layer=None, site=site, max_tokens=700)
        assert contents(store.path) == contents(alone.path)


def test_several_sites_are_carried_on_each_from_where_it_is(lm, tmp_path, monkeypatch):
    sites = ["resid_pre_layer_1", "mlp_out_layer_0", "resid_post_layer_1"]
    options = {"shard_tokens": 150, "batch_size": 4, "progress": False, "max_tokens": 700}
    whole = collect_sites(lm, DOCUMENTS, tmp_path / "whole", sites, **options)
    real = collecting.replace_file
    for shard, site in ((0, 1), (2, 0), (2, 1), (2, 2)):
        def dies(path, write, name=f"shard-{shard:05d}.safetensors", folder=whole[site].path.name):
            if path.name == name and path.parent.name == folder:
                raise KeyboardInterrupt
            real(path, write)

        out = tmp_path / f"{shard} {site}"
        with monkeypatch.context() as patch:
            patch.setattr(collecting, "replace_file", dies)
            with pytest.raises(KeyboardInterrupt):
                collect_sites(lm, DOCUMENTS, out, sites, **options)
        again = collect_sites(lm, DOCUMENTS, out, sites, **options)
        assert [contents(store.path) for store in again] == [contents(store.path) for store in whole]
    more = collect_sites(lm, ["Another text. " * 9], tmp_path / "whole", sites, **{**options, "max_tokens": None},
                         extend=True)  # fmt: skip
    assert len({len(store) for store in more}) == 1 and len(more[0]) > 700
    with pytest.raises(ValueError, match="collections hold different texts: extend each alone"):
        collect_sites(lm, DOCUMENTS, tmp_path / "whole", [*sites, "resid_pre_layer_0"], **options)
    assert [len(store) for store in collect_sites(lm, DOCUMENTS, tmp_path / "whole", sites, **options)] == [
        len(more[0])] * 3  # fmt: skip


def test_sites_that_are_none_or_twice(lm, tmp_path):
    for sites, options, kind, said in [
        ([], {}, ValueError, "sites must name at least one site"), ("resid_pre", {}, TypeError, "sites must be a seq"),
        (["resid_pre_layer_1", "blocks.1.hook_resid_pre"], {}, ValueError, "and each once"),
        (["resid_pre_layer_9"], {}, ValueError, r"layer must be in 0\.\.2"),
        (["resid_pre_layer_1"], {"layer": 1}, TypeError, "layer: sites says it"),
        (["resid_pre_layer_1"], {"contextlength": 1}, TypeError, "contextlength"),
    ]:
        with pytest.raises(kind, match=said):
            collect_sites(lm, DOCUMENTS, tmp_path, sites, **options)
    assert list(tmp_path.iterdir()) == []
