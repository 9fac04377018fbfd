"""torch.compile takes every function and module whole; opcheck of the operators that have no back ends of their own."""
import pytest
import torch

import sae_engine as se
from sae_engine import functional as f
from sae_engine.testing import assert_same
from sae_kernels.ops import ops

pytestmark = pytest.mark.no_poison  # opcheck and the compiler compare runs of torch.empty themselves

def test_opcheck_of_the_operators_that_have_no_back_end():
    for threshold in (-1.0, 0.5):
        args = (torch.tensor(threshold, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64), 0.1)
        torch.library.opcheck(ops.move_threshold.default, args)
    torch.library.opcheck(ops.feature_budgets.default, (torch.rand(40), 90, 5, 1.0, 0.5))
    linear = torch.randn(3, 6), torch.randn(6, 40), torch.randn(40)
    torch.library.opcheck(ops.linear.default, [t.requires_grad_() for t in linear])
    torch.library.opcheck(ops.linear.default, (linear[0].detach(), linear[1], None))
    torch.library.opcheck(ops.zipf_shortfall.default, (torch.rand(40), 2.5, 1.0, 0.5))


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_opcheck_of_the_operators_that_are_made_of_others(backend):
    codes = f.threshold(torch.randn(3, 40), 0.5)
    grad, vector = torch.randn(3, 6), torch.randn(40, requires_grad=True)
    args = vector, codes.indices, codes.offsets, *codes.by_latent
    torch.library.opcheck(ops.at_latents.default, (*args, backend))
    args = grad, codes.values, *codes.by_latent, torch.float32
    torch.library.opcheck(ops.encoder_gradient.default, (*args, backend))
    encoder = torch.randn(3, 6), torch.randn(6, 40, requires_grad=True), torch.randn(40, requires_grad=True)
    args = *encoder, torch.randn(6, requires_grad=True), codes.values, codes.indices, codes.offsets, *codes.by_latent
    torch.library.opcheck(ops.encode_entries.default, (*args, backend))


def columns(p):
    return torch.arange(p.shape[-1], device=p.device)  # compiled code knows no default device


FUNCTIONS = {
    "topk": lambda p: f.topk(p, 4), "topk_masked": lambda p: f.topk(p, 4, mask=columns(p) % 2 == 0),
    "topk_sorted": lambda p: f.topk(p, 4, sorted=True), "abs_topk": lambda p: f.topk(p, 4, magnitude=True),
    "batch_topk": lambda p: f.batch_topk(p, 2.5),
    "feature_topm": lambda p: f.feature_topm(p, columns(p) % 3, total=p.shape[-1]),
    "norm_match": lambda p: f.norm_match(p, p.norm(dim=-1) * 0.5),
    "norm_match_capacity": lambda p: f.norm_match(p, p.norm(dim=-1) * 0.5, capacity=90),
    "energy_share": lambda p: f.energy_share(p, 0.7),
    "energy_share_capacity": lambda p: f.energy_share(p, p.new_tensor(0.7), capacity=90),
    "threshold": lambda p: f.threshold(p, 0.5), "threshold_window": lambda p: f.threshold(p, 0.5, bandwidth=0.2),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_selections_compile_whole(name, compile_backend):
    torch._dynamo.reset()
    compiled = torch.compile(FUNCTIONS[name], fullgraph=True, backend=compile_backend)
    for rows in (3, 5):  # the second call recompiles with dynamic sizes
        pre = torch.randn(rows, 30)
        got, want = compiled(pre), FUNCTIONS[name](pre)
        assert isinstance(got, se.SparseCodes) and got.shape == want.shape
        assert_same((got.values, got.indices, got.offsets), (want.values, want.indices, want.offsets))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_selection_to_loss_compiles_whole_with_gradients(name, compile_backend):
    torch._dynamo.reset()

    def loss(pre, weight):
        return f.decode(FUNCTIONS[name](pre), weight).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend=compile_backend)
    grads = []
    for call in (loss, compiled):
        torch.manual_seed(0)
        pre, weight = torch.randn(4, 30, requires_grad=True), torch.randn(30, 7, requires_grad=True)
        call(pre, weight).backward()
        grads.append((pre.grad, weight.grad))
    for eager, ours in zip(*grads, strict=True):
        torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_compiled_selection_is_the_operator(name):
    """And not what runs in its place under ``torch.func``, which is right, dense and slow."""
    torch._dynamo.reset()
    seen = []

    def note(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch.compile(FUNCTIONS[name], fullgraph=True, backend=note)(torch.randn(4, 30))
    assert any(target.startswith("sae_engine.") for target in seen), seen


MODULES = {
    "TopK": lambda: se.TopK(4), "AbsTopK": lambda: se.AbsTopK(4), "BatchTopK": lambda: se.BatchTopK(3),
    "MutualChoice": lambda: se.MutualChoice(3), "TopAFA": lambda: se.TopAFA(), "ReLU": lambda: se.ReLU(),
    "JumpReLU": lambda: se.JumpReLU(30, threshold=0.1, bandwidth=0.2),
}  # fmt: skip


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", MODULES)
def test_autoencoders_compile_whole(name, training, compile_backend):
    torch._dynamo.reset()
    kwargs = {"rescale_acts_by_decoder_norm": name == "TopK", "skip": name == "ReLU"}
    sae = se.SparseAutoencoder(8, 30, MODULES[name](), **kwargs)
    sae(torch.randn(20, 8))  # learns a threshold where there is one
    sae.train(training)
    compiled = torch.compile(sae, fullgraph=True, backend=compile_backend)
    x = torch.randn(6, 8)
    state = {k: v.clone() for k, v in sae.state_dict().items()}
    results = []
    for call in (sae, compiled):
        sae.load_state_dict(state)
        sae.zero_grad()
        out = call(x)
        out.square().sum().backward()
        grads = {n: p.grad.clone() for n, p in sae.named_parameters() if p.grad is not None}
        results.append({"out": out.detach(), **grads, **{f"buffer {n}": b.clone() for n, b in sae.named_buffers()}})
    assert results[0].keys() == results[1].keys()
    for key, eager in results[0].items():
        torch.testing.assert_close(results[1][key], eager, msg=key)


@pytest.mark.parametrize("name", MODULES)
def test_dense_activations_compile_whole(name, compile_backend):
    torch._dynamo.reset()
    module = MODULES[name]()
    pre = torch.randn(5, 30)
    context = {"target_norm": torch.ones(5), "weight_norm": torch.ones(30)} if name == "TopAFA" else {}
    compiled = torch.compile(module, fullgraph=True, backend=compile_backend)
    assert_same(compiled(pre, **context).detach(), module(pre, **context).detach())


def test_eval_of_an_unset_threshold_raises_when_compiled(compile_backend):
    torch._dynamo.reset()
    with torch.device("cpu"):  # on a GPU the assertion would end the process's work there
        module = torch.compile(se.BatchTopK(3).eval(), fullgraph=True, backend=compile_backend)
        with pytest.raises(RuntimeError, match="threshold"):
            module(torch.randn(5, 30))


@pytest.mark.gpu
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", MODULES)
def test_cuda_graph_of_a_dense_forward(name, training):
    module, pre = MODULES[name]().cuda(), torch.randn(64, 30, device="cuda")
    context = {"target_norm": pre.norm(dim=1) / 2, "weight_norm": torch.ones(30, device="cuda")}
    context = context if name == "TopAFA" else {}
    module(pre, **context)
    module.train(training)(pre, **context)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = module(pre, **context)
    pre.copy_(torch.randn_like(pre))
    graph.replay()
    assert_same(out.detach(), module(pre, **context).detach())


@pytest.mark.gpu
def test_a_device_that_is_not_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    pre = torch.randn(8, 4096, device="cuda:1")
    assert_same(f.topk(pre, 4).indices, f.topk(pre.cpu(), 4).indices.to("cuda:1"))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["topk", "batch_topk", "feature_topm", "norm_match_capacity"])
def test_cuda_graph(name):
    pre, weight = torch.randn(64, 4096, device="cuda"), torch.randn(4096, 64, device="cuda")

    def run():
        p = pre[:, :30] if name == "norm_match_capacity" else pre
        return f.decode(FUNCTIONS[name](p), weight[: p.shape[1]])

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    pre.copy_(torch.randn_like(pre))
    graph.replay()
    torch.testing.assert_close(out, run())


def test_a_compiled_threshold_moves_step_by_step(compile_backend):
    """torch 2.13 drops a copy_ into a 0-dimensional float64 buffer from the graph: the update is an operator."""
    torch._dynamo.reset()
    plain, compiled = se.BatchTopK(3, threshold_lr=0.5), se.BatchTopK(3, threshold_lr=0.5)
    call = torch.compile(compiled, fullgraph=True, backend=compile_backend)
    for _ in range(3):
        pre = torch.randn(6, 30)
        plain(pre)
        call(pre)
        torch.testing.assert_close(compiled.threshold, plain.threshold)
