"""Log-probabilities and entropies of the response tokens, without ever holding [tokens × vocabulary].

Invariant: logits exist for at most `chunk_tokens` tokens at a time, in forward and in backward, whatever the
length of the row, and the numbers are those of `log_softmax(logits / temperature)`: the
distribution that the actor sampled from (design, I6). Logits are formed in the model's dtype and reduced in
float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from common.errors import UserError
from learner import attention
from learner.packing import PackedBatch

CHUNK_TOKENS = 1024  # of logits at one time: 600 MB in float32 at a vocabulary of 152 k


class _ChunkedLogProbs(torch.autograd.Function):
    """log π(target), entropy = f(hidden, weight, bias); logits are recomputed chunk by chunk in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        count = hidden.shape[0]
        logp, entropy, log_norm = (torch.empty(count, dtype=dtype, device=hidden.device) for _ in range(3))
        for low in range(0, count, chunk):
            part = slice(low, low + chunk)
            logits = _logits(hidden[part], weight, bias, temperature, dtype)
            log_norm[part] = logits.logsumexp(-1)
            logp[part] = logits.gather(-1, targets[part, None]).squeeze(-1) - log_norm[part]
            probabilities = (logits - log_norm[part, None]).exp_()
            entropy[part] = log_norm[part] - probabilities.mul_(logits).sum(-1)
        ctx.save_for_backward(hidden, weight, bias, targets, log_norm, entropy)
        ctx.temperature, ctx.chunk = temperature, chunk
        return logp, entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, log_norm, entropy = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        dtype = log_norm.dtype
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        # Summed in float32 over chunks, so that the chunk size does not decide how much bfloat16 rounds away.
        grad_weight = torch.zeros(weight.shape, dtype=dtype, device=weight.device) if wants_weight else None
        grad_bias = torch.zeros(bias.shape, dtype=dtype, device=bias.device) if wants_bias else None
        for low in range(0, hidden.shape[0], ctx.chunk):
            part = slice(low, low + ctx.chunk)
            log_p = _logits(hidden[part], weight, bias, ctx.temperature, dtype).sub_(log_norm[part, None])
            grad = _grad_logits(
                log_p,
                targets[part],
                entropy[part],
                None if grad_logp is None else grad_logp[part],
                None if grad_entropy is None else grad_entropy[part],
            ).div_(ctx.temperature)
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            grad = grad.to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = grad @ weight
            if grad_weight is not None:
                grad_weight += grad.t() @ hidden[part].to(weight.dtype)
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
            None,
        )


def _logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, dtype: torch.dtype
) -> Tensor:
    logits = nn.functional.linear(hidden.to(weight.dtype), weight, bias).to(dtype)
    return logits.div_(temperature) if temperature != 1.0 else logits


def _grad_logits(
    log_p: Tensor, targets: Tensor, entropy: Tensor, grad_logp: Tensor | None, grad_entropy: Tensor | None
) -> Tensor:
    """∂logp/∂z_j = 1[j = target] − p_j and ∂H/∂z_j = −p_j (log p_j + H), times the incoming gradients."""
    if grad_entropy is None:
        grad = log_p.exp_()
        if grad_logp is None:
            return grad.zero_()
        grad.mul_(-grad_logp[:, None])
    else:
        probabilities = log_p.exp()
        grad = log_p.add_(entropy[:, None]).mul_(grad_entropy[:, None])
        if grad_logp is not None:
            grad.add_(grad_logp[:, None])
        grad.mul_(probabilities).neg_()
    if grad_logp is not None:
        grad.scatter_add_(-1, targets[:, None], grad_logp[:, None])
    return grad


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    chunk_tokens: int = CHUNK_TOKENS,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy of its distribution, softmax((hidden · weightᵀ + bias) / T).

    Args:
        hidden: [T, width] states that predict the targets; T may be 0.
        weight: [vocabulary, width]; bias: [vocabulary] or None.
        targets: [T] int64.
        temperature: of sampling, > 0.
        chunk_tokens: tokens whose logits exist at one time, at least 1.

    Returns:
        (logp [T], entropy [T]) in nats, float32 (float64 for float64 input), differentiable once in hidden,
        weight and bias.

    Raises:
        ValueError: temperature or chunk_tokens is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, not {chunk_tokens}")
    return _ChunkedLogProbs.apply(hidden, weight, bias, targets, float(temperature), chunk_tokens)


class TokenHead(nn.Linear):
    """An output head that answers for taken tokens; with hidden states alone it is the plain linear head.

    It *is* the head (same parameters under the same names, ties kept) and not a wrapper, because ZeRO-3 gathers
    a parameter only around the forward of the module that owns it.
    """

    chunk_tokens: int = CHUNK_TOKENS

    def forward(
        self, hidden: Tensor, targets: Tensor | None = None, temperature: float = 1.0
    ) -> Tensor | tuple[Tensor, Tensor]:
        if targets is None:
            return super().forward(hidden)
        return token_logprobs(
            hidden,
            self.weight,
            targets,
            bias=self.bias,
            temperature=temperature,
            chunk_tokens=self.chunk_tokens,
        )

    @classmethod
    def from_linear(cls, linear: nn.Linear, chunk_tokens: int = CHUNK_TOKENS) -> TokenHead:
        """A head that shares `linear`'s parameters."""
        head = cls(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        head.weight, head.bias, head.chunk_tokens = linear.weight, linear.bias, chunk_tokens
        return head


class PolicyModel(nn.Module):
    """A Hugging Face causal language model (Qwen2 / Llama style) seen as a policy over packed rows.

    Everything that uses a parameter happens inside `forward`, hence under DeepSpeed's engine at every ZeRO stage.
    Parameters keep the model's own names below `lm.`: push and export `policy.lm`.

    Args:
        lm: has `.model` (the decoder stack) and `.lm_head` (an nn.Linear, tied or not). Its attention and head
            are replaced in place; generation with it needs `set_attn_implementation` back.
        value_head: add a scalar head on the same states (PPO's critic), started at zero.
        chunk_tokens: tokens whose logits exist at one time.

    Raises:
        UserError: the model is built otherwise, scales or caps its logits, or its output head is no plain linear
            layer (an adapter was put on it, say).
    """

    def __init__(self, lm: nn.Module, *, value_head: bool = False, chunk_tokens: int = CHUNK_TOKENS) -> None:
        super().__init__()
        _check_built_as_expected(lm)
        lm.set_attn_implementation(attention.register())
        if not isinstance(lm.lm_head, nn.Linear):
            kind = type(lm.lm_head).__name__
            raise UserError(
                f"the output head is a {kind}; only a plain linear head is supported",
                setting="lora.target_modules",
            )
        lm.lm_head = TokenHead.from_linear(lm.lm_head, chunk_tokens)
        self.lm = lm
        self.value_head = _zero_head(lm.lm_head) if value_head else None

    def forward(self, batch: PackedBatch, temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor | None]:
        """Evaluate the policy on one packed row.

        Args:
            batch: on the model's device.
            temperature: the one that the actor sampled with.

        Returns:
            (logp [T], entropy [T], values [T] or None), float32, in the order of `batch.targets`. The value
            belongs to the state before the token.
        """
        states = self.lm.model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            use_cache=False,
            segments=attention.Segments(batch.lengths, batch.input_ids.device),
        ).last_hidden_state[0]
        states = states.index_select(0, batch.state_index)
        logp, entropy = self.lm.lm_head(states, batch.targets, temperature)
        values = None if self.value_head is None else self.value_head(states).squeeze(-1).float()
        return logp, entropy, values


def _check_built_as_expected(lm: nn.Module) -> None:
    name = type(lm).__name__
    if not (hasattr(lm, "model") and hasattr(lm, "lm_head")):
        raise UserError(
            f"{name} is not built like Qwen2 or Llama (.model and .lm_head)", setting="model.path"
        )
    for attribute in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(lm.config, attribute, None) not in (None, 1, 1.0):
            raise UserError(
                f"{name} changes its logits ({attribute}), which is not supported", setting="model.path"
            )


def _zero_head(like: nn.Linear) -> nn.Linear:
    head = nn.Linear(like.in_features, 1, device=like.weight.device, dtype=like.weight.dtype)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head
