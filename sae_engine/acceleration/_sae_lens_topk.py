"""SAELens' TopK, AbsTopK, BatchTopK and Matryoshka: see :mod:`.sae_lens`."""
from __future__ import annotations

from typing import Any

from sae_lens.saes import abstopk_sae, batchtopk_sae, matryoshka_batchtopk_sae, topk_sae
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from torch import Tensor

from ..codes import SparseCodes
from . import _base as core
from ._sae_lens import Inference, Theirs, Training, inverse_of

NORMALIZED = ("constant_norm_rescale", "layer_norm")  # SAELens has no AuxK for these, and says so itself


class _TopK(Theirs):
    _activation: Any = topk_sae.TopK
    _magnitude = False

    def _rule(self, tokens: int) -> Any:
        k = self.activation_fn.k
        return core.TopRule(k, relu=not self._magnitude, magnitude=self._magnitude)


class TopKSAE(_TopK, Inference, topk_sae.TopKSAE):
    pass


class AbsTopKSAE(_TopK, Inference, abstopk_sae.AbsTopKSAE):
    _activation = abstopk_sae.AbsTopK
    _magnitude = True


class _TopKTraining(_TopK, Training):
    def _takes(self, step_input: TrainStepInput) -> bool:
        return self.cfg.normalize_activations not in NORMALIZED  # AuxK of these raises in SAELens: let it

    def _dead_rules(self, step_input: TrainStepInput) -> list[tuple[float, Any]]:
        """Scale and rule of each AuxK term."""
        k_aux = step_input.sae_in.shape[-1] // 2
        return list(_dead_rule(step_input.dead_neuron_mask, k_aux, self._magnitude))

    def _aux_loss(self, codes: SparseCodes, residual: Tensor, inverse: Tensor | None) -> Tensor:
        """Squared error of what the dead latents make of the residual."""
        recons = self.reshape_fn_out(core.decode(codes, self.W_dec, None, inverse), self.d_head)
        return (recons - residual).pow(2).sum(dim=-1).mean()

    def _train(self, step_input: TrainStepInput) -> TrainStepOutput:
        scale = self._scale()
        inverse = inverse_of(scale)
        dead = self._dead_rules(step_input)
        extra = tuple(rule for _, rule in dead)
        (codes, *aux_codes), hidden_pre = self._codes(step_input.sae_in, scale, extra, cancels=True)
        sae_out = self._output(core.decode(codes, self.W_dec, self.b_dec, inverse))
        residual = (step_input.sae_in - sae_out).detach()
        aux_loss = sae_out.new_tensor(0.0)
        if dead:
            terms = [s * self._aux_loss(c, residual, inverse) for (s, _), c in zip(dead, aux_codes, strict=True)]
            aux_loss = self.cfg.aux_loss_coefficient * sum(terms)
        feature_acts = self._activations(self._with_norms(codes, scale))
        output = self._finish(
            step_input, sae_out, feature_acts, hidden_pre, {"auxiliary_reconstruction_loss": aux_loss}
        )
        self._after(output, codes, step_input)
        return output

    def _after(self, output: TrainStepOutput, codes: SparseCodes, step_input: TrainStepInput) -> None:
        pass


class TopKTrainingSAE(_TopKTraining, topk_sae.TopKTrainingSAE):
    pass


class AbsTopKTrainingSAE(_TopKTraining, abstopk_sae.AbsTopKTrainingSAE):
    _activation = abstopk_sae.AbsTopK
    _magnitude = True


class _BatchTopKTraining(_TopKTraining):
    _activation = batchtopk_sae.BatchTopK

    def _rule(self, tokens: int) -> Any:
        return core.BudgetRule(int(self.activation_fn.k * tokens))

    def _after(self, output: TrainStepOutput, codes: SparseCodes, step_input: TrainStepInput) -> None:
        self.update_topk_threshold(codes.values)  # SAELens' own update: it looks at positive values alone
        output.metrics["topk_threshold"] = self.topk_threshold


class BatchTopKTrainingSAE(_BatchTopKTraining, batchtopk_sae.BatchTopKTrainingSAE):
    pass


class MatryoshkaBatchTopKTrainingSAE(_BatchTopKTraining, matryoshka_batchtopk_sae.MatryoshkaBatchTopKTrainingSAE):
    """Each level's codes are decoded once; the reconstructions of the nested prefixes are running sums of theirs."""

    def _dead_rules(self, step_input: TrainStepInput) -> list[tuple[float, Any]]:
        if not self.cfg.use_matryoshka_aux_loss:
            return super()._dead_rules(step_input)
        k_aux, rules, start = step_input.sae_in.shape[-1] // 2, [], 0
        for width in self.cfg.matryoshka_widths:
            mask = step_input.dead_neuron_mask
            if mask is not None:
                mask = mask.clone()
                mask[:start], mask[width:] = False, False
            rules += _dead_rule(mask, k_aux, False) or [(0.0, None)]
            start = width
        return rules

    def _train(self, step_input: TrainStepInput) -> TrainStepOutput:
        scale = self._scale()
        inverse = inverse_of(scale)
        dead = self._dead_rules(step_input)
        extra = tuple(rule for _, rule in dead if rule is not None)
        (codes, *aux_codes), hidden_pre = self._codes(step_input.sae_in, scale, extra, cancels=True)
        levels, start, total = [], 0, self.b_dec
        for width in self.cfg.matryoshka_widths:
            total = core.decode(core.of_latents(codes, start, width), self.W_dec, None, inverse) + total
            levels.append(total)
            start = width
        sae_out = self._output(total)
        targets = levels if self.cfg.use_matryoshka_aux_loss else [sae_out]  # a term for each level's own error
        terms, pending = [], iter(aux_codes)
        for (share, rule), target in zip(dead, targets, strict=False):
            if rule is not None:
                terms.append(share * self._aux_loss(next(pending), (step_input.sae_in - target).detach(), inverse))
        aux_loss = self.cfg.aux_loss_coefficient * sum(terms) if terms else sae_out.new_tensor(0.0)

        feature_acts = self._activations(self._with_norms(codes, scale))
        output = self._finish(
            step_input, sae_out, feature_acts, hidden_pre, {"auxiliary_reconstruction_loss": aux_loss}
        )
        self._after(output, codes, step_input)
        for width, reconstruction in zip(self.cfg.matryoshka_widths[:-1], levels, strict=False):
            loss = self.mse_loss_fn(reconstruction, step_input.sae_in).sum(dim=-1).mean()
            output.losses[f"inner_mse_loss_{width}"] = loss
            output.loss = output.loss + loss
        return output


def _dead_rule(mask: Tensor | None, k_aux: int, magnitude: bool) -> list[tuple[float, Any]]:
    """Scale and rule of an AuxK term over the latents of ``mask``; none where none is dead. Reads the device."""
    dead = 0 if mask is None else int(mask.sum())
    if dead == 0:
        return []
    return [(min(dead / k_aux, 1.0), core.TopRule(min(k_aux, dead), relu=False, magnitude=magnitude, mask=mask))]
