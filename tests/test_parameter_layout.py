"""How the encoder's weight lies in memory, and what of torch and safetensors depends on it."""
import copy

import pytest
import torch
from safetensors.torch import load_file, save_file

import sae_engine as se

D, F, B = 12, 40, 9


def test_parameters_lie_as_torch_and_safetensors_need_them(tmp_path):
    sae, x = se.SparseAutoencoder(D, F, se.TopK(3), skip=True), torch.randn(B, D)
    save_file(sae.state_dict(), tmp_path / "a.safetensors")
    flat = torch.nn.utils.parameters_to_vector(sae.parameters())
    optimizer = torch.optim.LBFGS(sae.parameters(), lr=0.1, max_iter=4)

    def closure():
        optimizer.zero_grad()
        loss = (sae(x) - x).square().mean()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert closure() < first
    torch.nn.utils.vector_to_parameters(flat, sae.parameters())
    for name, value in load_file(tmp_path / "a.safetensors").items():
        assert torch.equal(sae.state_dict()[name], value)


@pytest.mark.parametrize("contiguous", [None, True, False])
def test_layout_of_the_encoder(contiguous, tmp_path):
    sae = se.SparseAutoencoder(D, F, se.TopK(3), contiguous_parameters=contiguous)
    parameter, before = sae.W_enc, sae.W_enc.detach().clone()
    assert sae.W_enc.stride() == ((1, D) if contiguous is False else (F, 1))
    whole = torch.nn.Sequential(torch.nn.Identity(), sae)
    x = torch.randn(B, D)
    expected = sae(x)
    step = se.training.TrainStep(sae, lr=1e-3)
    assert sae.W_enc is parameter and torch.equal(sae.W_enc, before)
    torch.testing.assert_close(sae(x), expected)  # another order of summation
    assert sae.W_enc.stride() == ((F, 1) if contiguous else (1, D))
    step(x)
    state = whole.state_dict()
    assert state["1.W_enc"].is_contiguous() and torch.equal(state["1.W_enc"], sae.W_enc)
    save_file(state, tmp_path / "a.safetensors")
    assert whole.state_dict(keep_vars=True)["1.W_enc"] is parameter
    other = copy.deepcopy(sae)
    with torch.no_grad():
        other.W_enc.zero_()
    other.load_state_dict(sae.state_dict())
    assert torch.equal(other.W_enc, sae.W_enc) and other.W_enc.stride() == sae.W_enc.stride()
    with pytest.raises(TypeError, match="contiguous_parameters"):
        se.SparseAutoencoder(D, F, se.TopK(3), contiguous_parameters="yes")


def test_strided_encoder_trains_alike_under_every_adam():
    """A fused Adam walks memory: a gradient with other strides than its parameter would be silently wrong."""
    outcomes = []
    for contiguous in (False, True):
        for fused in (False, True):
            torch.manual_seed(3)
            sae = se.SparseAutoencoder(D, F, se.TopK(4), contiguous_parameters=contiguous)
            optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2, fused=fused)
            for _ in range(5):
                x = torch.randn(B, D)
                optimizer.zero_grad()
                se.losses.squared_error(sae(x), x).backward()
                assert sae.W_enc.grad.stride() == sae.W_enc.stride()
                optimizer.step()
            outcomes.append([p.detach().clone() for p in sae.parameters()])
    for other in outcomes[1:]:
        for a, b in zip(outcomes[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)  # 5 steps of Adam amplify rounding of the gradient
