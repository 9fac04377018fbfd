"""Everything that takes ``device=`` has all of its tensors there, the rule of an autoencoder among them."""

import ast
import inspect
from pathlib import Path

import pytest
import torch

import sae_engine as se
from sae_engine import _slabs

F = 24
RULES = {
    "AbsTopK": lambda: se.AbsTopK(3), "AuxTopK": lambda: se.AuxTopK(3),
    "AuxZipfTopK": lambda: se.AuxZipfTopK(3, shortfall=torch.rand(F)),
    "BatchTopK": lambda: se.BatchTopK(2.5, threshold_start=2), "FeatureChoice": lambda: se.FeatureChoice(F, 2.5),
    "Gated": lambda: se.Gated(F), "GradientTopK": lambda: se.GradientTopK(3), "JumpReLU": lambda: se.JumpReLU(F),
    "LogJumpReLU": lambda: se.LogJumpReLU(F), "MatryoshkaBatchTopK": lambda: se.MatryoshkaBatchTopK(2.5, (4, F)),
    "MutualChoice": lambda: se.MutualChoice(2.5), "ReLU": lambda: se.ReLU(), "SampledTopK": lambda: se.SampledTopK(2.5),
    "StatisticalTopK": lambda: se.StatisticalTopK(3), "TopAFA": lambda: se.TopAFA(), "TopK": lambda: se.TopK(3),
}  # fmt: skip
ON_A_DEVICE = {
    "BatchTopK": lambda **o: se.BatchTopK(2.5, threshold_start=2, **o),
    "Crosscoder": lambda **o: se.Crosscoder.clt(2, 6, F, se.ReLU(), skip=True, **o),
    "FeatureChoice": lambda **o: se.FeatureChoice(F, 2.5, **o),
    "Gated": lambda **o: se.Gated(F, **o), "JumpReLU": lambda **o: se.JumpReLU(F, **o),
    "LogJumpReLU": lambda **o: se.LogJumpReLU(F, **o),
    "MatryoshkaBatchTopK": lambda **o: se.MatryoshkaBatchTopK(2.5, (4, F), threshold_start=2, **o),
    "MutualChoice": lambda **o: se.MutualChoice(2.5, **o), "RunningDensity": lambda **o: se.RunningDensity(F, **o),
    "SampledTopK": lambda **o: se.SampledTopK(2.5, **o), "SparseDecoder": lambda **o: se.SparseDecoder(F, 6, **o),
    "SparseAutoencoder": lambda **o: se.SparseAutoencoder(6, F, se.JumpReLU(F), d_out=8, skip=True, **o),
}  # fmt: skip


ROOT = Path(__file__).resolve().parent.parent
MAKERS = {"arange", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "randperm", "scalar_tensor",
          "tensor", "tril_indices", "triu_indices", "zeros"}  # fmt: skip


def tensors(module):
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def modules_of(kind):
    return {name for name in se.__all__ if inspect.isclass(getattr(se, name)) and issubclass(getattr(se, name), kind)}


def test_the_lists_are_complete():
    assert modules_of(se.Activation) - {"Activation"} == RULES.keys()
    signatures = {name: inspect.signature(getattr(se, name)) for name in modules_of(torch.nn.Module)}
    takes = {name for name, signature in signatures.items() if "device" in signature.parameters}
    through_options = {"MatryoshkaBatchTopK", "SampledTopK"}
    assert takes | through_options == ON_A_DEVICE.keys()


@pytest.mark.parametrize("name", ON_A_DEVICE)
def test_constructors_put_everything_on_the_device(name):
    module = ON_A_DEVICE[name](device="meta")
    here = ON_A_DEVICE[name]()
    assert {k: t.dtype for k, t in tensors(module).items()} == {k: t.dtype for k, t in tensors(here).items()}
    assert {t.device.type for t in tensors(module).values()} == {"meta"}


@pytest.mark.parametrize("name", ON_A_DEVICE)
def test_a_device_that_is_none_is_refused_by_name(name):
    with pytest.raises(ValueError, match=r"^device must be a device's name, as 'cpu' or 'cuda:0', got 'gpu'$"):
        ON_A_DEVICE[name](device="gpu")
    with pytest.raises(ValueError, match=r"^device: 'cuda:99' cannot be used on this machine"):
        ON_A_DEVICE[name](device="cuda:99")
    with pytest.raises(TypeError, match=r"^device must be a torch.device or its name"):
        ON_A_DEVICE[name](device=1.5)


@pytest.mark.parametrize("folder", ["kernels", "sae_engine"])
def test_every_new_tensor_says_where_it_lies(folder):
    """After torch.set_default_device, one that does not would lie elsewhere than what it meets."""
    silent = []
    for file in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MAKERS
                and ast.unparse(node.func.value) == "torch" and not {"device", None} & {k.arg for k in node.keywords}
            ):  # fmt: skip
                silent.append(f"{file.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}")
    assert not silent, "\n".join(silent)


def test_loading_looks_at_the_device_before_the_file():
    with pytest.raises(ValueError, match=r"^device: 'cuda:99' cannot be used on this machine"):
        se.SparseAutoencoder.from_pretrained("there/is/no/such/folder", device="cuda:99")


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_an_autoencoder_takes_its_rule_along(name, dtype):
    rule = RULES[name]()
    before = {k: t.dtype for k, t in tensors(rule).items()}
    sae = se.SparseAutoencoder(6, F, rule, device="meta", dtype=dtype)
    assert {t.device.type for t in tensors(sae).values()} == {"meta"}
    assert {k: t.dtype for k, t in tensors(sae.activation).items()} == before  # a threshold stays as exact as it was
    assert {p.dtype for k, p in sae.named_parameters(recurse=False)} == {dtype or torch.float32}


def test_inference_form_stays_on_the_device():
    rule = se.BatchTopK(2.0, initial_threshold=0.5)
    rule._require_threshold()  # read here: a tensor on the meta device has no value
    sae = se.SparseAutoencoder(6, F, rule)
    assert {t.device for t in tensors(se.inference_form(sae)).values()} == {sae.W_enc.device}


def test_what_the_allocator_holds_in_reserve_is_free_memory(monkeypatch):
    """A second process's gigabyte is used; blocks that this one keeps cached are not."""
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 69 << 30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 39 << 30)
    assert _slabs.free_memory_bytes(device) == 40 << 30
    assert _slabs.default_budget_bytes(device) == 10 << 30
