"""A crosscoder as a dense loop over its sources and the sites that they write: what the engine is held to, in fp64."""
import torch

import sae_engine as se

WIRINGS = {
    "joint": "joint", "causal": "causal", "each": "each", "local": "local",
    "windows": [(range(0, 2), (0, 2)), (1, 2), (range(1, 3), range(1, 3))],
}  # fmt: skip
D, F, B, SITES = 6, 20, 13, 3
WIDTHS = [D] * SITES


def rules(name, sources, latents=F):
    """A rule of that name for so many sources."""
    made = {
        "topk": lambda: se.TopK(4),
        "batch": lambda: se.BatchTopK(2.5),  # one budget for all sources and tokens
        "token": lambda: se.rules.TopKOverSources(7, sources) if sources > 1 else se.TopK(7),  # of all sources together
        "batches": lambda: [se.BatchTopK(2.5 + s) for s in range(sources)],
        "jumprelu": lambda: [se.JumpReLU(latents, threshold=0.1, bandwidth=0.2) for _ in range(sources)],
        "relu": se.ReLU,
        "mixed": lambda: [se.TopK(2 + s) if s % 2 else se.BatchTopK(3) for s in range(sources)],
    }
    return made[name]()


def copied(made, sae):
    """Gives an autoencoder the weights of a crosscoder's only source."""
    with torch.no_grad():
        sae.W_enc.copy_(made.W_enc[0]), sae.W_dec.copy_(made.W_dec[0])
        sae.b_enc.copy_(made.b_enc[0]), sae.b_dec.copy_(made.b_dec)


def number_of_sources(wiring):
    return {"joint": 1}.get(wiring, SITES) if isinstance(wiring, str) else len(wiring)


def coder(wiring="causal", rule="topk", seed=0, dtype=torch.float64, **options):
    """A crosscoder over three sites, its biases and skips not zero."""
    torch.manual_seed(seed)
    chosen = WIRINGS[wiring]
    made = se.Crosscoder(WIDTHS, WIDTHS, F, rules(rule, number_of_sources(chosen)), wiring=chosen, dtype=dtype,
                         **options)  # fmt: skip
    with torch.no_grad():
        for p in (made.b_enc, made.b_dec, *(made.W_skip or ())):
            p.uniform_(-0.1, 0.1)
        for p in made.W_enc:
            p.mul_(3)
    return made


def batch(seed=1, tokens=B, dtype=torch.float64):
    g = torch.Generator("cpu").manual_seed(seed)
    drawn = [torch.randn(tokens, SITES, D, generator=g, dtype=dtype, device="cpu") for _ in range(2)]
    return tuple(t.to(torch.get_default_device()) for t in drawn)


def norms(made, number):
    parts = made.W_dec[number].split([WIDTHS[t] for t in made.wiring[number][1]], 1)
    if made.decoder_norm == "sum":
        return sum(part.square().sum(1).sqrt() for part in parts)
    return sum(part.square().sum(1) for part in parts).sqrt()


class Jump(torch.autograd.Function):
    """JumpReLU with the rectangle estimator for its threshold."""

    @staticmethod
    def forward(ctx, pre, theta, width):
        ctx.save_for_backward(pre, theta)
        ctx.width = width
        return torch.where(pre > theta, pre, 0.0)

    @staticmethod
    def backward(ctx, grad):
        pre, theta = ctx.saved_tensors
        inside = (pre - theta).abs() < ctx.width / 2
        return torch.where(pre > theta, grad, 0.0), -(theta / ctx.width * grad * inside).sum(0), None


def _first(pre, k):
    """1 at each row's k largest."""
    return torch.zeros_like(pre).scatter(1, pre.topk(k, dim=1).indices, 1.0)


def _dense(rule, pre):
    """What a rule keeps of (rows, F), as a dense matrix."""
    if isinstance(rule, se.BatchTopK):
        kept = torch.zeros(pre.numel(), dtype=pre.dtype)
        kept[pre.detach().relu().flatten().topk(int(rule.k * len(pre))).indices] = 1
        return pre.relu() * kept.view_as(pre)
    if isinstance(rule, se.TopK):
        return pre.relu() * _first(pre, rule.k)
    if isinstance(rule, se.JumpReLU):
        return Jump.apply(pre, rule.threshold.to(pre.dtype), rule.bandwidth)
    return pre.relu()


def dense_codes(made, x):
    """(sources, B, F), as the rule keeps them."""
    pres = []
    for number, (read, _) in enumerate(made.wiring):
        pre = torch.cat([x[:, t] for t in read], 1) @ made.W_enc[number] + made.b_enc[number]
        pres.append(pre * norms(made, number) if made.rescale_acts_by_decoder_norm else pre)
    rule = made.activation
    if isinstance(rule, se.rules.PerSource):
        return torch.stack([_dense(of_source, pre) for of_source, pre in zip(rule, pres, strict=True)])
    if rule.scope == "batch":
        return _dense(rule, torch.cat(pres)).view(len(pres), *pres[0].shape)
    if rule.scope == "token":
        of_token = _first(torch.cat(pres, 1), rule.k)
        return torch.stack([pre.relu() * kept for pre, kept in zip(pres, of_token.chunk(len(pres), 1), strict=True)])
    return torch.stack([_dense(rule, pre) for pre in pres])


def forward(made, x, codes=None):
    """(B, sites, d): each pair of a source and a site that it writes is a product of its own."""
    codes = dense_codes(made, x) if codes is None else codes
    out = []
    for t in range(SITES):
        y = made.b_dec[t * D : (t + 1) * D].expand(len(x), D)
        for number, (_, written) in enumerate(made.wiring):
            if t in written:
                place = (t - written.start) * D
                z = codes[number] / norms(made, number) if made.rescale_acts_by_decoder_norm else codes[number]
                y = y + z @ made.W_dec[number][:, place : place + D]
        if made.W_skip is not None:
            y = y + x[:, t] @ made.W_skip[t].T
        out.append(y)
    return torch.stack(out, 1)
