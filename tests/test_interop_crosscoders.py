"""Cross-layer transcoders and transcoder sets against circuit-tracer: its own loaders read ours and compute the same.

`make test-interop` installs it. A result is a sum of at most 3 F products near 1, in two orders: 3 F eps of them.
"""
import pytest
import torch
from crosscoder_cases import made

import sae_engine as se

pytestmark = [
    pytest.mark.interop,
    pytest.mark.filterwarnings("ignore"),  # the library's own
]

CPU = torch.device("cpu")
CLOSE = {"rtol": 0, "atol": 3 * 20 * torch.finfo(torch.float32).eps * 4}


@pytest.fixture
def loaders():
    pytest.importorskip("circuit_tracer", reason="needs circuit-tracer: make test-interop")
    from circuit_tracer.transcoder.cross_layer_transcoder import load_clt, load_gemma_scope_2_clt
    from circuit_tracer.transcoder.single_layer_transcoder import load_transcoder_set

    return load_clt, load_gemma_scope_2_clt, load_transcoder_set


def inputs():
    return torch.randn(13, 3, 6, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("lazy", [True, False])
@pytest.mark.parametrize("rule", ["jumprelu", "relu"])
def test_their_loader_reads_our_cross_layer_transcoder(loaders, rule, lazy, tmp_path):
    ours, x = made("causal", rule), inputs()
    ours.save_pretrained(tmp_path, format="circuit_tracer_clt")
    theirs = loaders[0](str(tmp_path), device=CPU, dtype=torch.float32, lazy_decoder=lazy)
    with torch.no_grad():
        features, _ = theirs.encode_sparse(x.transpose(0, 1), zero_positions=slice(0, 0))
        torch.testing.assert_close(theirs(x.transpose(0, 1)).transpose(0, 1), ours(x), **CLOSE)
    codes, features = ours.encode(x), features.coalesce()
    assert torch.equal(codes.to_dense() != 0, features.to_dense() != 0)
    torch.testing.assert_close(codes.values[codes.values != 0], features.values(), **CLOSE)  # source-major, as theirs


def test_their_files_are_read_and_written_with_the_same_bits(loaders, tmp_path):
    ours = made("causal", "jumprelu")
    ours.save_pretrained(tmp_path / "ours", format="circuit_tracer_clt")
    theirs = loaders[0](str(tmp_path / "ours"), device=CPU, dtype=torch.float32, lazy_decoder=False)
    theirs.to_safetensors(str(tmp_path / "theirs"))
    again = se.Crosscoder.from_pretrained(tmp_path / "theirs")
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), again.state_dict().values(), strict=True))


@pytest.mark.parametrize("rule", ["jumprelu", "relu"])
def test_their_loader_reads_our_transcoder_set(loaders, rule, tmp_path):
    ours, x = made("local", rule, skip=True), inputs()
    ours.save_pretrained(tmp_path, format="transcoder_set")
    theirs = loaders[2](
        {layer: str(tmp_path / f"layer_{layer}.safetensors") for layer in range(3)}, scan="", device=CPU,
        feature_input_hook="hook_resid_mid", feature_output_hook="hook_mlp_out", dtype=torch.float32,
    )  # fmt: skip
    found = ours(x)
    with torch.no_grad():
        for layer, transcoder in enumerate(theirs.transcoders):
            torch.testing.assert_close(transcoder(x[:, layer]), found[:, layer], **CLOSE)


def test_their_reader_of_gemma_scope_2_reads_ours(loaders, tmp_path):
    """It leaves out the layer of the largest number, whatever that is: a fourth is named that is never opened."""
    ours, x = made("causal", "jumprelu"), inputs()
    ours.save_pretrained(tmp_path, format="gemma_scope_2_clt")
    paths = {layer: str(tmp_path / f"params_layer_{layer}.safetensors") for layer in range(3)}
    theirs = loaders[1]({**paths, 3: "left out"}, device=CPU, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(theirs(x.transpose(0, 1)).transpose(0, 1), ours(x), **CLOSE)
