"""push: what is written, what is refused, what a hub is asked for; and that SAELens and SAEBench load it."""

import json

import pytest
import torch
import yaml

import sae_engine as se
from sae_engine.checkpoints import formats
from sae_engine.latents import push

D, F, B = 16, 48, 32
HOOK = "blocks.8.hook_resid_pre"
PLACE = {"model": "gpt2-small", "layer": 8, "site": "resid_pre", "d": D, "text": "Skylion007/openwebtext"}
RULES = {"TopK": lambda: se.TopK(5), "ReLU": se.ReLU, "JumpReLU": lambda: se.JumpReLU(F),
         "BatchTopK": lambda: se.BatchTopK(4)}  # fmt: skip


def autoencoder(rule="TopK", seed=0, place=PLACE, **options):
    torch.manual_seed(seed)
    sae = se.SparseAutoencoder(D, F, RULES[rule](), **options)
    with torch.no_grad():
        for name in ("W_enc", "b_enc", "b_dec"):
            getattr(sae, name).normal_(std=0.4)
        if rule == "JumpReLU":
            sae.activation.threshold.uniform_(0.2, 1.0)
    if rule == "BatchTopK":
        se.calibrate_threshold(sae, [inputs()])
    sae.provenance = se.Provenance(**place)
    return sae.eval()


def transcoder(layer, rule="JumpReLU", **options):
    place = {"model": "google/gemma-2-2b", "layer": layer, "site": "mlp_in", "target_layer": layer,
             "target_site": "mlp_out"}  # fmt: skip
    return autoencoder(rule, seed=layer, place=place, apply_b_dec_to_input=False, **options)


def inputs():
    return torch.randn(B, D, generator=torch.Generator().manual_seed(7)) * 2 + 1


def header_of(folder):
    _, header, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(header), text


class PlayedHub:
    """What is asked of a ``huggingface_hub.HfApi``, and the files that it would have been given."""

    def __init__(self):
        self.asked, self.files = [], {}

    def create_repo(self, repo_id, **options):
        self.asked.append(("create_repo", repo_id, options))
        return f"https://hub.example/{repo_id}"

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        from pathlib import Path

        self.asked.append(("upload_folder", repo_id))
        root = Path(folder_path)
        self.files = {file.relative_to(root).as_posix() for file in root.rglob("*") if file.is_file()}


@torch.no_grad()
@pytest.mark.parametrize("rule", RULES)
def test_a_folder_for_each_hook_that_we_read_back(rule, tmp_path):
    sae = autoencoder(rule)
    density = torch.rand(F)
    density[0] = 0
    done = push(sae, "me/saes", folder=tmp_path / "out", dry_run=True, sparsity={HOOK: density}, license="mit",
                description="Trained *twice*.")  # fmt: skip
    assert done.folder == tmp_path / "out" and done.url is None
    assert set(done.files) == {"README.md", *(f"{HOOK}/{name}" for name in (
        "cfg.json", "sae_weights.safetensors", "sparsity.safetensors"))}  # fmt: skip
    assert all((tmp_path / "out" / name).stat().st_size == size > 0 for name, size in done.files.items())
    assert {file.name for file in tmp_path.iterdir()} == {"out"}  # nothing is left of the writing
    again = se.SparseAutoencoder.from_pretrained(tmp_path / "out" / HOOK)
    assert torch.equal(again(inputs()), sae(inputs()))
    assert (again.provenance.layer, again.provenance.site, again.provenance.text) == (8, "resid_pre", PLACE["text"])
    from safetensors.torch import load_file

    logs = load_file(tmp_path / "out" / HOOK / "sparsity.safetensors")["sparsity"]
    assert torch.allclose(10**logs, density, atol=1e-6) and logs[0] == -10
    header, text = header_of(tmp_path / "out")
    assert header["base_model"] == ["openai-community/gpt2"] and header["datasets"] == ["Skylion007/openwebtext"]
    assert header["license"] == "mit" and header["library_name"] == "saelens" and "saelens" in header["tags"]
    assert f"SAE.from_pretrained('me/saes', '{HOOK}')" in text and "Trained *twice*." in text
    (row,) = (line for line in text.splitlines() if line.startswith(f"| `{HOOK}` |"))
    assert row.split(" | ")[1].startswith("JumpReLU" if rule == "BatchTopK" else rule)
    assert row.endswith(f"| {density.double().sum():.4g} | {1 / F:.2%} |") and "`sparsity.safetensors` beside" in text


def test_several_are_named_by_their_hooks_or_by_a_mapping(tmp_path):
    other = autoencoder(place={**PLACE, "layer": 9})
    done = push([autoencoder(), other], "me/saes", folder=tmp_path / "a", dry_run=True)
    assert {name.split("/")[0] for name in done.files} == {HOOK, "blocks.9.hook_resid_pre", "README.md"}
    same = [autoencoder(), autoencoder("ReLU")]
    with pytest.raises(ValueError, match=f"two belong at {HOOK}: give a mapping"):
        push(same, "me/saes", folder=tmp_path / "b", dry_run=True)
    named = {f"{HOOK}/{name}": sae for name, sae in zip(("topk", "relu"), same, strict=True)}
    done = push(named, "me/saes", folder=tmp_path / "b", dry_run=True)
    assert {name.rpartition("/")[0] for name in done.files} == {*named, ""}


def test_what_is_uploaded_is_what_a_dry_run_writes(tmp_path):
    hub = PlayedHub()
    done = push(autoencoder(), "me/saes", private=True, api=hub)
    assert hub.asked == [("create_repo", "me/saes", {"exist_ok": True, "private": True}), ("upload_folder", "me/saes")]
    dry = push(autoencoder(), "me/saes", folder=tmp_path / "dry", dry_run=True)
    assert hub.files == set(done.files) == set(dry.files)
    assert done.url == "https://hub.example/me/saes" and done.folder is None

    class Refusing(PlayedHub):
        def upload_folder(self, **_):
            raise ConnectionError("the hub does not answer")

    with pytest.raises(ConnectionError):
        push(autoencoder(), "me/saes", folder=tmp_path / "kept", api=Refusing())
    assert (tmp_path / "kept" / HOOK / "cfg.json").exists()


@torch.no_grad()
@pytest.mark.parametrize("rule", RULES)
def test_saebench_finds_what_its_loaders_ask_for(rule, tmp_path):
    """What each does with ``ae.pt`` and ``config.json``, in its own formula."""
    sae = autoencoder(rule)
    push(sae, "me/saes", folder=tmp_path / "out", dry_run=True, layouts=("saelens", "saebench"))
    folder = tmp_path / "out" / "saebench" / HOOK
    trainer = json.loads((folder / "config.json").read_text())["trainer"]
    names = {"TopK": "TopKTrainer", "ReLU": "StandardTrainer", "JumpReLU": "JumpReluTrainer",
             "BatchTopK": "BatchTopKTrainer"}  # fmt: skip
    assert trainer["trainer_class"] == names[rule] and trainer["layer"] == 8 and "gpt2" in trainer["lm_name"]
    held = torch.load(folder / "ae.pt")
    x = inputs()
    if rule == "JumpReLU":
        pre = x @ held["W_enc"] + held["b_enc"]
        codes, W_dec, b_dec = pre.relu() * (pre > held["threshold"]), held["W_dec"], held["b_dec"]
    else:
        b_dec = held["bias" if rule == "ReLU" else "b_dec"]
        codes = ((x - b_dec) @ held["encoder.weight"].T + held["encoder.bias"]).relu()
        W_dec = held["decoder.weight"].T
        if rule == "TopK":
            kept = codes.topk(trainer["k"])
            codes = torch.zeros_like(codes).scatter(1, kept.indices, kept.values)
        elif rule == "BatchTopK":
            codes = codes * (codes > held["threshold"])
    assert torch.allclose(W_dec.norm(dim=1), torch.ones(F), atol=1e-5)
    assert torch.allclose(codes @ W_dec + b_dec, sae(x), atol=1e-4)
    assert {file.name for file in (tmp_path / "out").rglob("*config.json")} == {"config.json"}  # its runner takes all
    assert len(list((tmp_path / "out").rglob("config.json"))) == 1


@torch.no_grad()
@pytest.mark.parametrize(("rule", "said"), [("JumpReLU", {}), ("ReLU", {"activation": "relu"})])
def test_circuit_tracer_finds_a_transcoder_of_each_layer(rule, said, tmp_path):
    from safetensors.torch import load_file

    saes = [transcoder(layer, rule, skip=True) for layer in (1, 0, 2)]
    push(saes, "me/transcoders", folder=tmp_path / "out", dry_run=True, layouts=("saelens", "circuit-tracer"))
    folder = tmp_path / "out" / "circuit-tracer"
    assert yaml.safe_load((folder / "config.yaml").read_text()) == {
        "model_name": "google/gemma-2-2b", "model_kind": "transcoder_set", "feature_input_hook": "mlp.hook_in",
        "feature_output_hook": "hook_mlp_out", "scan": "me/transcoders//circuit-tracer", **said}  # fmt: skip
    assert {file.name for file in folder.iterdir()} == {"config.yaml", *(f"layer_{i}.safetensors" for i in range(3))}
    x = inputs()
    for sae in saes:
        held = load_file(folder / f"layer_{sae.provenance.layer}.safetensors")
        codes = x @ held["W_enc"].T + held["b_enc"]
        codes = codes.relu() * (codes > held.pop("activation_function.threshold", torch.zeros(())))
        assert set(held) == {"W_enc", "b_enc", "W_dec", "b_dec", "W_skip"}
        assert torch.allclose(codes @ held["W_dec"] + held["b_dec"] + x @ held["W_skip"].T, sae(x), atol=1e-4)
        again = se.SparseAutoencoder.from_pretrained(folder / f"layer_{sae.provenance.layer}.safetensors")
        assert torch.allclose(again(x), sae(x), atol=1e-4)


def test_what_cannot_be_published_is_refused_and_leaves_nothing(tmp_path):
    out = tmp_path / "out"
    plain = autoencoder()
    nowhere = se.SparseAutoencoder(D, F, se.TopK(5))
    ours = se.SparseAutoencoder(D, F, se.StatisticalTopK(5))
    ours.provenance = plain.provenance
    fresh = se.SparseAutoencoder(D, F, se.BatchTopK(4))
    fresh.provenance = plain.provenance
    long_rows = autoencoder(decoder_init_norm=2.0)
    dry = {"folder": out, "dry_run": True}
    traced = {**dry, "layouts": ["circuit-tracer"]}
    for error, said, saes, options in (
        (ValueError, "does not say where it belongs", nowhere, dry),
        (ValueError, "SAELens has no rule StatisticalTopK", ours, dry),
        (RuntimeError, "threshold", fresh, dry),
        (ValueError, "SAELens has no transcoder with the rule TopK", transcoder(0, "TopK", skip=True), dry),
        (ValueError, "decoder rows whose norm is not 1", long_rows, {**dry, "layouts": ["saebench"]}),
        (ValueError, "no transcoder within a block", plain, traced),
        (ValueError, "circuit-tracer cannot take the rule TopK", transcoder(0, "TopK"), traced),
        (ValueError, "every layer from 0 on, got .1.", transcoder(1), traced),
        (ValueError, "layouts must be", plain, {**dry, "layouts": ["neuroscope"]}),
        (ValueError, "layouts must be", plain, {**dry, "layouts": "saelens"}),
        (ValueError, "folder must be given with dry_run", plain, {"dry_run": True}),
        (TypeError, "dry_run must be", plain, {**dry, "dry_run": 1}),
        (TypeError, r"saes must be|saes\[0\] must be", "sae", dry),
        (TypeError, r"saes\[0\] must be a SparseAutoencoder", ["sae"], dry),
        (ValueError, "at least one", [], dry),
        (ValueError, "cannot be the name of a folder", {"../up": plain}, dry),
        (ValueError, "cannot be the name of a folder", {"saebench": plain}, dry),
        (ValueError, "sparsity: 'other' is none of", plain, {**dry, "sparsity": {"other": torch.rand(F)}}),
        (ValueError, r"must be \(48,\) of shares", plain, {**dry, "sparsity": {HOOK: torch.rand(F) - 3}}),
    ):  # fmt: skip
        with pytest.raises(error, match=said):
            push(saes, "me/saes", **options)
        assert list(tmp_path.iterdir()) == [], said
    for name in ("saes", "me/", "me/saes/more", 3):
        with pytest.raises(ValueError, match="repo_id must be"):
            push(plain, name, **dry)
    out.mkdir()
    (out / "mine.txt").write_text("kept")
    with pytest.raises(FileExistsError, match="is not empty"):
        push(plain, "me/saes", **dry)
    assert (out / "mine.txt").read_text() == "kept"


@pytest.mark.interop
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
@pytest.mark.parametrize("rule", [*RULES, "transcoder"])
def test_saelens_loads_what_is_pushed(rule, tmp_path):
    sae_lens = pytest.importorskip("sae_lens", reason="needs sae-lens: make test-interop")
    sae = transcoder(3, skip=True) if rule == "transcoder" else autoencoder(rule)
    done = push(sae, "me/saes", folder=tmp_path / "out", dry_run=True)
    (name,) = {name.rpartition("/")[0] for name in done.files} - {""}
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "out" / name)
    assert torch.allclose(theirs(inputs()), sae(inputs()), atol=1e-4)
    assert theirs.cfg.metadata.hook_name == name
    assert formats.detect(tmp_path / "out" / name) == "saelens"
