"""Checkpoints that are damaged, foreign or hostile: refused with the file's name, nothing run and nothing written."""
import json
import pickle
import random
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_cases import D, F, write
from safetensors.torch import load_file, save_file

import sae_engine as se
from sae_engine import cli
from sae_engine.checkpoints import formats

# Each of these makes a function of the folder.


def config(file="cfg.json", **changes):
    def damage(folder):
        (folder / file).write_text(json.dumps({**json.loads((folder / file).read_text()), **changes}))

    return damage


def trainer(**fields):
    return config("config.json", trainer=fields)


def state(change, name="ae.pt"):
    """A torch file's dictionary after ``change(dictionary)``."""

    def damage(folder):
        held = torch.load(folder / name, weights_only=True)
        change(held)
        torch.save(held, folder / name)

    return damage


def sets(name="ae.pt", **values):
    """A torch file with these values; ``__`` in a name stands for a dot."""
    return state(lambda held: held.update({key.replace("__", "."): value for key, value in values.items()}), name)


def openai(**values):
    return sets("autoencoder.pt", **values)


def content(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def cut(name, share=0.5):
    def damage(folder):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * share)])

    return damage


def removed(name):
    return lambda folder: (folder / name).unlink()


def records(name, change, compression=zipfile.ZIP_STORED):
    """The same archive with other records: ``change(name, data) -> data``."""

    def damage(folder):
        with zipfile.ZipFile(folder / name) as archive:
            held = {entry: archive.read(entry) for entry in archive.namelist()}
        with zipfile.ZipFile(folder / name, "w", compression) as archive:
            for entry, data in held.items():
                archive.writestr(entry, change(entry, data))

    return damage


def array(**values):
    """params.npz with these arrays."""

    def damage(folder):
        with np.load(folder / "params.npz") as arrays:
            held = dict(arrays)
        np.savez(folder / "params.npz", **{**held, **values})

    return damage


def declared(shape):
    """params.npz with a W_enc that declares a shape which it does not hold."""
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (64 - (10 + len(header) + 1) % 64) + b"\n"
    data = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + b"\0" * 64
    return records("params.npz", lambda name, old: data if name == "W_enc.npy" else old)


class Bomb:
    """Unpickled carelessly, it makes a file."""

    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return (Path.touch, (Path(self.target),))


def eight_bits(folder):
    file = folder / "sae.safetensors"
    save_file({name: tensor.to(torch.float8_e4m3fn) for name, tensor in load_file(file).items()}, file)


def index_elsewhere(folder):
    (folder / "sae_weights.safetensors").rename(folder.parent / "elsewhere.safetensors")
    index = {"weight_map": dict.fromkeys(["W_enc", "W_dec", "b_enc", "b_dec"], "../elsewhere.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def other_archive(folder):
    with zipfile.ZipFile(folder / "autoencoder.pt", "w") as archive:
        archive.writestr("a.txt", "a")


def wrong_checksum(folder):
    data = bytearray((folder / "params.npz").read_bytes())
    data[300] ^= 0xFF
    (folder / "params.npz").write_bytes(bytes(data))


def zip_bomb(folder):
    np.savez_compressed(folder / "params.npz", W_enc=np.zeros((D, 2**22), np.float32), W_dec=0, threshold=0)


def bomb(folder):
    torch.save({"pre_bias": Bomb(folder / "ran")}, folder / "autoencoder.pt")


def bare_bomb(folder):
    (folder / "autoencoder.pt").write_bytes(pickle.dumps({"pre_bias": Bomb(folder / "ran")}))


def array_bomb(folder):
    array(W_enc=np.array([Bomb(folder / "ran")], dtype=object))(folder)


DL, OPENAI, SAELENS = "dictionary_learning", "openai", "saelens"
DAMAGES = {
    # any format
    "empty file": (OPENAI, content("autoencoder.pt", b""), "no safetensors file"),
    "text for weights": (OPENAI, content("autoencoder.pt", b"hello, world" * 9), "no safetensors file"),
    "empty folder": (OPENAI, removed("autoencoder.pt"), "holds no checkpoint of a known format"),
    "archive of something else": (OPENAI, other_archive, "no safetensors file"),
    # safetensors
    "truncated safetensors": (SAELENS, cut("sae_weights.safetensors"), "not a whole safetensors"),
    "truncated in the header": ("sparsify", cut("sae.safetensors", 0.01), "not a whole safetensors"),
    "a header of 2**39 bytes": (
        SAELENS, content("sae_weights.safetensors", (2**39).to_bytes(8, "little") + b"{" * 99), "whole safetensors"),
    "8-bit floats": ("sparsify", eight_bits, "encoder.weight must be a tensor of a floating-point"),
    "an index that leads elsewhere": (SAELENS, index_elsewhere, "index of weights in several files"),
    # configurations
    "no configuration": ("sparsify", removed("cfg.json"), "cfg.json is missing"),
    "no weights": ("batchtopk", removed("sae.pt"), "sae.pt is missing"),
    "configuration of something else": (SAELENS, content("cfg.json", b'{"a": 1}'), "fields are missing"),
    "a configuration of 20 MiB": (SAELENS, content("cfg.json", b'{"a": "' + b"a" * 20 * 2**20 + b'"}'), "too many"),
    "bytes for a configuration": (SAELENS, content("cfg.json", b"\xff\xfe\x00"), "not JSON"),
    "k is NaN": (SAELENS, config(k=float("nan")), "k must be an int"),
    "k is NaN, batch": ("saelens BatchTopK", config(k=float("nan")), "0 < k"),
    "k is infinite, batch": ("saelens BatchTopK", config(k=float("inf")), "0 < k"),
    "k exceeds d_sae": ("sparsify", config(k=F + 1), "k must not exceed d_sae"),
    "k is true": ("sparsify", config(k=True), "k must be an int"),
    "d_in is negative": ("sparsify", config(d_in=-1), "d_in must be a positive integer"),
    "num_latents is huge": ("sparsify", config(num_latents=2**62), "encoder.weight must have shape"),
    "no number of latents": ("sparsify", config(num_latents=0, expansion_factor="8"), "d_sae must be a positive"),
    "groupmax": ("sparsify", config(activation="groupmax"), "groupmax"),
    "transcode is text": ("sparsify", config(transcode="yes"), "transcode must be true or false"),
    "whitening": (SAELENS, config(normalize_activations="covariance_whitening"), "covariance_whitening"),
    "architecture is a list": (SAELENS, config(architecture=["topk"]), "architecture"),
    "hook_z": (SAELENS, config(reshape_activations="hook_z"), "hook_z"),
    "unknown dict_class": (DL, trainer(dict_class="IdentityDict"), "IdentityDict"),
    "another dict_class": (f"{DL} ReLU", trainer(dict_class="AutoEncoderTopK"), "has the keys of AutoEncoder"),
    "two values of k": (DL, trainer(dict_class="AutoEncoderTopK", k=5), "says k = 4 and .* says 5"),
    "threshold_beta above 1": (
        f"{DL} BatchTopK", trainer(dict_class="BatchTopKSAE", threshold_beta=1.5), "threshold_beta must satisfy"),
    "unknown sae_type": ("batchtopk", config("config.json", sae_type="quantile"), "sae_type 'quantile'"),
    "tied weights": ("batchtopk", config("config.json", tied_weights=True), "untied"),
    "top_k is text": ("batchtopk", config("config.json", top_k="4"), "k must be an int"),
    # torch files
    "pickle that runs something": (OPENAI, bomb, "tensors alone .weights_only=True"),
    "bare pickle": (OPENAI, bare_bomb, "bare pickle, which is never opened"),
    "truncated torch file": (DL, cut("ae.pt"), "not a whole zip"),
    "a list": (OPENAI, lambda f: torch.save([torch.zeros(3)], f / "autoencoder.pt"), "dictionary of named tensors"),
    "numbers for names": (OPENAI, lambda f: torch.save({1: torch.zeros(3)}, f / "autoencoder.pt"), "dictionary of"),
    "a tensor larger than its file": (
        DL, sets(encoder__weight=torch.zeros(1).expand(2**31, D)), "more than the .* bytes"),
    "a storage shorter than declared": (
        DL, records("ae.pt", lambda name, data: data[:4] if "/data/" in name else data), "tensors alone"),
    "compressed records": (DL, records("ae.pt", lambda _, data: data, zipfile.ZIP_DEFLATED), "compressed records"),
    "a sparse tensor": (DL, sets(b_dec=torch.eye(D).to_sparse()), "ordinary dense"),
    "a missing tensor": (DL, state(lambda held: held.pop("b_dec")), "lacks b_dec"),
    "a tensor too many": (DL, sets(extra=torch.ones(1)), "extra"),
    "a transposed tensor": (
        DL, state(lambda held: held.update({"decoder.weight": held["encoder.weight"]})), "decoder.weight must have"),
    "k of two elements": (DL, sets(k=torch.ones(2)), "k must be one"),
    "k of 0": (DL, sets(k=torch.tensor(0)), "says k = 0"),
    "a threshold of NaN": (f"{DL} BatchTopK", sets(threshold=torch.tensor(torch.nan)), "negative or NaN"),
    "text for a tensor": (OPENAI, openai(pre_bias="b"), "pre_bias must"),
    "integers for weights": (OPENAI, openai(pre_bias=torch.ones(D, dtype=torch.int8)), "floating-point"),
    "an activation of another kind": (OPENAI, openai(activation="GELU"), "'GELU'"),
    "TopK without k": (OPENAI, openai(activation="TopK"), "lacks k"),
    "TopK without ReLU": (
        OPENAI, openai(activation="TopK", activation_state_dict={"k": 3, "postact_fn": "Identity"}), "Identity"),
    # npz
    "truncated npz": ("gemma_scope", cut("params.npz"), "not a whole zip"),
    "pickled array": ("gemma_scope", array_bomb, "W_enc.npy"),
    "a huge shape": ("gemma_scope", declared((2**40, 2**20)), "declares shape"),
    "a shape beyond integers": ("gemma_scope", declared((2**200, 3)), "declares shape"),
    "a zip bomb": ("gemma_scope", zip_bomb, "unpacks to more than"),
    "a record with a wrong checksum": ("gemma_scope", wrong_checksum, "not a whole .npz"),
    "a threshold that is no number": ("gemma_scope", array(threshold=np.full(F, np.nan, np.float32)), "NaN"),
    "a threshold too short": ("gemma_scope", array(threshold=np.ones(F - 1, np.float32)), "threshold must have shape"),
    "whole numbers": ("gemma_scope", array(b_enc=np.ones(F, np.int64)), "floating-point"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_refused_and_named(name, tmp_path):
    what, damage, message = DAMAGES[name]
    format, _, rule = what.partition(" ")
    folder = tmp_path / "sae"
    write(format, folder, rule)
    damage(folder)
    before = {p.name for p in folder.iterdir()}
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        se.SparseAutoencoder.from_pretrained(folder)
    assert str(folder) in str(caught.value)  # the file, or the folder that has none
    assert cli.main(["convert", str(folder), str(tmp_path / "out"), "--format", "saelens"]) == 1
    assert {p.name for p in folder.iterdir()} == before  # nothing ran
    assert not (tmp_path / "out").exists()


def complaint_of(folder):
    try:
        se.SparseAutoencoder.from_pretrained(folder)
    except (ValueError, FileNotFoundError) as error:
        return str(error)
    return None


@pytest.mark.parametrize("format", formats.FORMATS)
def test_bytes_changed_at_random_raise_nothing_else(format, tmp_path):
    """Loaded, or refused as documented."""
    write(format, tmp_path)
    rng = random.Random(5)
    whole = {file: file.read_bytes() for file in tmp_path.iterdir()}
    refused = 0
    for _ in range(60):
        file = rng.choice(sorted(whole))
        data = bytearray(whole[file])
        # headers and directories are at either end
        places = [rng.randrange(400), len(data) - 1 - rng.randrange(400), rng.randrange(len(data))]
        for place in rng.sample(places, rng.randint(1, 3)):
            data[place % len(data)] = rng.randrange(256)
        file.write_bytes(bytes(data[: rng.choice([len(data), len(data), rng.randrange(len(data))])]))
        complaint = complaint_of(tmp_path)
        assert complaint is None or str(tmp_path) in complaint
        refused += complaint is not None
        file.write_bytes(whole[file])
    assert refused > 20
    assert complaint_of(tmp_path) is None
