"""Where checkpoints come from and go to: the hub, and `sae-engine convert`."""

import json
from pathlib import Path

import pytest
import torch
from checkpoint_cases import B, D, F, write, write_llama_scope

import sae_engine as se
from sae_engine import cli
from sae_engine.checkpoints import formats, hub
from sae_engine.testing import assert_same


class TestHub:
    @pytest.fixture
    def served(self, tmp_path, monkeypatch):
        """A hub with one repository; what was asked of it."""
        snapshot = tmp_path / "models--a--b" / "snapshots" / "0123abc"
        write("saelens", snapshot / "layers.3", rule="ReLU")
        write("gemma_scope", snapshot / "layer_0" / "width_16k")
        asked = []

        def snapshot_download(repository, **kwargs):
            asked.append((repository, kwargs))
            return str(snapshot)

        def list_repo_files(api, repository, *, revision):
            assert (repository, revision) == ("a/b", "0123abc")
            return [str(file.relative_to(snapshot)) for file in snapshot.rglob("*") if file.is_file()]

        monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
        monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", list_repo_files)
        return asked

    def test_a_folder_of_a_repository(self, served):
        loaded = se.SparseAutoencoder.from_pretrained("a/b/layers.3")
        assert loaded.card.source == "a/b@0123abc/layers.3"
        ((repository, asked),) = served
        assert repository == "a/b" and asked["ignore_patterns"] == ["layers.3/*/*"]
        suffixes = (".json", ".yaml", ".safetensors", ".pt", ".npz")
        assert set(asked["allow_patterns"]) == {f"layers.3/*{s}" for s in suffixes}

    def test_a_file_of_a_repository(self, served):
        loaded = se.SparseAutoencoder.from_pretrained("a/b/layer_0/width_16k/params.npz")
        assert type(loaded.activation) is se.JumpReLU
        files = ("params.npz", "*.json", "*.yaml")
        assert served[0][1]["allow_patterns"] == [f"layer_0/width_16k/{file}" for file in files]

    @pytest.mark.parametrize("name", ["a/b/L8R-8x", "a/b/L8R-8x/checkpoints/final.safetensors"])
    def test_weights_one_folder_below_their_configuration(self, name, served, tmp_path):
        write_llama_scope(tmp_path / "models--a--b" / "snapshots" / "0123abc" / "L8R-8x")
        assert se.SparseAutoencoder.from_pretrained(name).provenance.layer == 8
        patterns = [pattern for _, asked in served for pattern in asked["allow_patterns"]]
        assert {"L8R-8x/checkpoints/final.safetensors"} <= set(patterns)
        assert "L8R-8x/hyperparams.json" in patterns or "L8R-8x/*.json" in patterns

    @pytest.mark.parametrize(("name", "listed"), [
        ("a/b/layers.4", r"no weights in 'layers\.4'; .*'layer_0/width_16k', 'layers\.3'\]: .* a/b/layer_0/width_16k"),
        ("a/b/layer_0", r"no weights in 'layer_0'; weights are in \['layer_0/width_16k'\]"),
        ("a/b", r"holds no weights; weights are in \['layer_0/width_16k', 'layers\.3'\]"),
        ("a/b/layers.3/other.safetensors", r"no weights in 'layers\.3/other\.safetensors'"),
    ])  # fmt: skip
    def test_what_is_not_there(self, name, listed, served):
        with pytest.raises(FileNotFoundError, match=listed):
            se.SparseAutoencoder.from_pretrained(name)

    @pytest.mark.parametrize("name", ["a/b/layers.3", "a/b/layers.4", "a/b"])
    def test_part_of_a_repository_in_the_cache(self, name, served, tmp_path, monkeypatch):
        """Without a network the client gives what it has: that says nothing of what the repository has."""

        def offline(*arguments, **options):
            raise OSError("no route to host")

        monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", offline)
        (tmp_path / "models--a--b" / "snapshots" / "0123abc" / "layers.3" / "sae_weights.safetensors").unlink()
        with pytest.raises(ConnectionError, match=r"the cache holds a part at most, .* \(no route to host\)"):
            se.SparseAutoencoder.from_pretrained(name)

    def test_known_releases_are_centred(self, served, monkeypatch):
        assert se.SparseAutoencoder.from_pretrained("a/b/layers.3").normalize_activations == "none"
        monkeypatch.setattr(hub, "CENTRED", {"a/b"})
        loaded = se.SparseAutoencoder.from_pretrained("a/b/layers.3")
        assert loaded.normalize_activations == "center" and loaded.card.residual == "mean-centred"
        assert se.SparseAutoencoder.from_pretrained("a/b/layers.3", residual="raw").normalize_activations == "none"

    @pytest.mark.parametrize(
        "name", ["nowhere", "./a/b", "/a/b", "../a/b", "a/../b", "a/b/../../c", "~/a/b", "a/b/*", "a//b"]
    )
    def test_what_is_no_name_is_a_path(self, name, served):
        with pytest.raises(FileNotFoundError, match="path must be a folder or a file of weights"):
            se.SparseAutoencoder.from_pretrained(name)
        with pytest.raises(FileNotFoundError):
            se.SparseAutoencoder.from_pretrained(Path("a/b/layers.3"))  # a Path is never a name
        assert served == []

    def test_without_a_network(self, monkeypatch):
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        with pytest.raises(ConnectionError, match="path='nobody/none' is not here, and the hub did not give it"):
            se.SparseAutoencoder.from_pretrained("nobody/none")

    def test_a_refusing_hub(self, monkeypatch):
        from huggingface_hub.errors import HFValidationError

        def refuse(*args, **kwargs):
            raise HFValidationError("no such name\nmore")

        monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
        with pytest.raises(FileNotFoundError, match=r"neither here nor on the hub: no such name$"):
            se.SparseAutoencoder.from_pretrained("nobody/none")


class TestConvert:
    def convert(self, *arguments):
        return cli.main(["convert", *map(str, arguments)])

    # A file of each format, into another that holds it.
    @pytest.mark.parametrize(
        ("origin", "rule", "options", "target"),
        [
            ("saelens", "TopK", {}, "sparsify"),
            ("sparsify", "TopK", {}, "dictionary_learning"),
            ("dictionary_learning", "JumpReLU", {"apply_b_dec_to_input": False}, "gemma_scope"),
            ("gemma_scope", "JumpReLU", {"apply_b_dec_to_input": False}, "saelens"),
            ("openai", "TopK", {"normalize_activations": "layer_norm"}, "saelens"),
            ("batchtopk", "TopK", {}, "saelens"),
            ("saelens", "ReLU", {}, "openai"),
            ("saelens", "TopAFA", {"normalize_activations": "layer_norm"}, "batchtopk"),
        ],
    )
    def test_there_and_back_is_exact(self, origin, rule, options, target, tmp_path, capsys):
        sae = write(origin, tmp_path / "a", rule=rule, **options)
        assert self.convert(tmp_path / "a", tmp_path / "b", "--format", target) == 0
        out = capsys.readouterr().out
        assert f"{target}, {rule}, d_in {D}, d_sae {F}" in out and f"from           {origin}" in out
        assert formats.detect(tmp_path / "b") == target
        assert self.convert(tmp_path / "b", tmp_path / "c", "--format", origin, "--from", target) == 0
        loaded = se.SparseAutoencoder.from_pretrained(tmp_path / "c")
        for name, value in sae.state_dict().items():
            assert_same(loaded.state_dict()[name], value)

    def test_batchtopk_for_inference(self, tmp_path, capsys):
        sae = write("saelens", tmp_path / "a", rule="BatchTopK").eval()
        assert self.convert(tmp_path / "a", tmp_path / "b.npz", "--format", "gemma_scope") == 1
        assert "cannot hold the rule BatchTopK" in capsys.readouterr().err
        assert not (tmp_path / "b.npz").exists()
        assert self.convert(tmp_path / "a", tmp_path / "b.npz", "--format", "gemma_scope", "--inference") == 0
        loaded = se.SparseAutoencoder.from_pretrained(tmp_path / "b.npz")
        x = torch.randn(B, D)
        # fp32, b_dec folded: one more rounding of sums of 12 terms of size 1
        torch.testing.assert_close(loaded(x), sae(x), rtol=0, atol=1e-5)

    def test_decoder_norms_are_folded_where_that_is_asked(self, tmp_path, capsys):
        for rule, options in (("BatchTopK", ("--inference",)), ("ReLU", ())):
            sae = write("saelens", tmp_path / rule, rule=rule).eval()
            sae.W_dec.data *= 3
            sae.save_pretrained(tmp_path / rule)
            arguments = (tmp_path / rule, tmp_path / f"{rule}.folded", "--format", "saelens", "--fold-decoder-norms")
            assert self.convert(*arguments, *options) == 0
            loaded = se.SparseAutoencoder.from_pretrained(tmp_path / f"{rule}.folded")
            torch.testing.assert_close(loaded.W_dec.norm(dim=1), torch.ones_like(loaded.b_enc))
            x = torch.randn(B, D, dtype=sae.W_dec.dtype)
            # weights are rounded once more, in sums of 12 terms of size 3
            torch.testing.assert_close(loaded(x), sae(x), rtol=0, atol=3e-5)
        assert self.convert(tmp_path / "BatchTopK", tmp_path / "c", "--format", "saelens", "--fold-decoder-norms") == 1
        assert "BatchTopK would keep other latents" in capsys.readouterr().err and not (tmp_path / "c").exists()

    def test_nothing_is_overwritten_unless_forced(self, tmp_path, capsys):
        write("saelens", tmp_path / "a")
        (tmp_path / "b").mkdir()
        (tmp_path / "b" / "sae.safetensors").write_text("mine")
        assert self.convert(tmp_path / "a", tmp_path / "b", "--format", "sparsify") == 1
        assert "exists" in capsys.readouterr().err
        assert (tmp_path / "b" / "sae.safetensors").read_text() == "mine"
        assert self.convert(tmp_path / "a", tmp_path / "b", "--format", "sparsify", "--force") == 0
        assert formats.detect(tmp_path / "b") == "sparsify"
        (tmp_path / "empty").mkdir()
        assert self.convert(tmp_path / "a", tmp_path / "empty", "--format", "sparsify") == 0

    @pytest.mark.parametrize("format", ["saelens", "sparsify", "dictionary_learning", "batchtopk", "gemma_scope"])
    def test_whole_or_not_at_all(self, format, tmp_path, monkeypatch):
        write("gemma_scope", tmp_path / "a") if format == "gemma_scope" else write(format, tmp_path / "a")
        (tmp_path / "b").mkdir()
        (tmp_path / "b" / "cfg.json").write_text("mine")

        def fails(*args, **kwargs):
            raise OSError("disk full")

        for writer in ("safetensors.torch.save_file", "pathlib.Path.write_text", "torch.save", "numpy.savez"):
            with monkeypatch.context() as broken:
                broken.setattr(writer, fails)
                for target in ("b", "new/folder"):
                    status = self.convert(tmp_path / "a", tmp_path / target, "--format", format, "--force")
                    if status == 0:  # a writer that this format does not use
                        break
                else:
                    assert [p.name for p in (tmp_path / "b").iterdir()] == ["cfg.json"]
                    assert (tmp_path / "b" / "cfg.json").read_text() == "mine"
                    assert not (tmp_path / "new").exists()
                    return
            for file in (tmp_path / "b").iterdir():
                file.unlink()
            (tmp_path / "b" / "cfg.json").write_text("mine")
        pytest.fail("no writer was used")

    def test_options_of_the_source(self, tmp_path):
        write("saelens", tmp_path / "a")
        cfg = json.loads((tmp_path / "a" / "cfg.json").read_text()) | {"normalize_activations": True}  # of version 5
        (tmp_path / "a" / "cfg.json").write_text(json.dumps(cfg))
        arguments = (tmp_path / "a", tmp_path / "b", "--format", "saelens")
        assert self.convert(*arguments) == 1
        assert self.convert(*arguments, "--activation-scale", "0.5", "--residual", "mean-centred") == 0
        loaded = se.SparseAutoencoder.from_pretrained(tmp_path / "b")
        assert loaded.normalize_activations == "center" and "0.5 times" in loaded.card.normalization
