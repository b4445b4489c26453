"""Chunked log-probabilities: parity with the plain softmax, exact gradients, bounded memory, whole policies."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common.errors import UserError
from learner.logprobs import PolicyModel, TokenHead, token_logprobs
from learner.packing import pack


def plain(hidden, weight, targets, bias, temperature):
    log_p = torch.log_softmax(nn.functional.linear(hidden, weight, bias) / temperature, -1)
    return log_p.gather(-1, targets[:, None]).squeeze(-1), -(log_p.exp() * log_p).sum(-1)


def random_head(tokens, width=5, vocabulary=11, bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()

    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    return draw(tokens, width), draw(vocabulary, width), draw(vocabulary) if bias else None, targets


@settings(max_examples=40)
@given(
    tokens=st.integers(0, 9),
    chunk=st.integers(1, 12),
    temperature=st.floats(0.2, 3.0),
    bias=st.booleans(),
    uses=st.sampled_from([(1.0, 0.0), (0.0, 1.0), (0.7, -0.3)]),
)
def test_equals_log_softmax_forward_and_backward(tokens, chunk, temperature, bias, uses):
    hidden, weight, offset, targets = random_head(tokens, bias=bias)
    inputs = [tensor for tensor in (hidden, weight, offset) if tensor is not None]
    cotangent = torch.linspace(-1, 2, tokens, dtype=torch.float64)
    results = []
    for function in (
        lambda: plain(hidden, weight, targets, offset, temperature),
        lambda: token_logprobs(
            hidden, weight, targets, bias=offset, temperature=temperature, chunk_tokens=chunk
        ),
    ):
        logp, entropy = function()
        parts = [
            use * (cotangent * value).sum() for use, value in zip(uses, (logp, entropy), strict=True) if use
        ]
        results.append((logp, entropy, *torch.autograd.grad(sum(parts), inputs)))
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_gradcheck():
    hidden, weight, bias, targets = random_head(4, vocabulary=6, width=3)

    def function(hidden, weight, bias):
        return token_logprobs(hidden, weight, targets, bias=bias, temperature=0.7, chunk_tokens=3)

    assert torch.autograd.gradcheck(function, (hidden, weight, bias))


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any operation returned, views of `ignore` aside."""

    def __init__(self, ignore: torch.Tensor | None = None) -> None:
        super().__init__()
        self.elements = 0
        self._ignored = ignore.data_ptr() if ignore is not None else None

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        leaves = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        sizes = [leaf.numel() for leaf in leaves if leaf.data_ptr() != self._ignored]
        self.elements = max([self.elements, *sizes])
        return result


def test_memory_is_bounded_by_the_chunk_in_forward_and_backward():
    tokens, vocabulary, width, chunk = 600, 1000, 8, 20
    hidden = torch.randn(tokens, width, requires_grad=True)
    weight = torch.randn(vocabulary, width, requires_grad=True)
    targets = torch.randint(0, vocabulary, (tokens,))
    with LargestTensor() as seen:
        logp, entropy = token_logprobs(hidden, weight, targets, chunk_tokens=chunk)
        (logp.sum() + entropy.sum()).backward()
    assert seen.elements == chunk * vocabulary
    with LargestTensor() as seen:
        sum(part.sum() for part in plain(hidden, weight, targets, None, 1.0)).backward()
    assert seen.elements == tokens * vocabulary


def test_half_precision_reduces_in_float32():
    hidden, weight, _, targets = random_head(50, width=16, vocabulary=300, bias=False)
    hidden, weight = hidden.detach().bfloat16(), (0.3 * weight.detach()).bfloat16()
    logp, entropy = token_logprobs(hidden, weight, targets, chunk_tokens=10)
    assert logp.dtype == entropy.dtype == torch.float32
    logits = (hidden @ weight.t()).double()  # the rounding of the logits is the model's own
    log_p = torch.log_softmax(logits, -1)
    torch.testing.assert_close(
        logp.double(), log_p.gather(-1, targets[:, None]).squeeze(-1), rtol=0, atol=1e-5
    )


def test_half_precision_weight_gradient_does_not_depend_on_the_chunk():
    hidden, weight, _, targets = random_head(400, width=16, vocabulary=64, bias=False)
    gradients = []
    for chunk in (1, 400):
        leaf = weight.detach().bfloat16().requires_grad_()
        token_logprobs(hidden.detach().bfloat16(), leaf, targets, chunk_tokens=chunk)[0].sum().backward()
        gradients.append(leaf.grad.float())
    error = (gradients[0] - gradients[1]).norm() / gradients[1].norm()
    assert error < 5e-3  # adding 400 roundings in bfloat16 would give several per cent


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_temperature_must_be_positive(temperature):
    hidden, weight, _, targets = random_head(1)
    with pytest.raises(ValueError, match="temperature"):
        token_logprobs(hidden, weight, targets, temperature=temperature)


def test_chunk_must_hold_a_token():
    hidden, weight, _, targets = random_head(1)
    with pytest.raises(ValueError, match="chunk_tokens"):
        token_logprobs(hidden, weight, targets, chunk_tokens=0)


def test_head_shares_parameters_and_still_is_a_linear_layer():
    linear = nn.Linear(4, 9)
    head = TokenHead.from_linear(linear)
    states = torch.randn(3, 4)
    assert head.weight is linear.weight
    torch.testing.assert_close(head(states), linear(states))


def tiny_lm(kind: str, seed: int = 0, **config) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    common = {
        "vocab_size": config.pop("vocab_size", 53), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    }  # fmt: skip
    configs = {"qwen2": (Qwen2Config, Qwen2ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}
    config_class, model_class = configs[kind]
    return model_class(config_class(**common, tie_word_embeddings=kind == "qwen2", **config))


PROMPTS = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10, 11]]
RESPONSES = [[12, 13, 14, 15], [16], list(range(17, 40)), [41, 42]]


def sample_by_sample(lm, samples, temperature):
    """Log-probabilities and entropies from one plain, unpacked forward per sample."""
    rows = []
    for sample in samples:
        prompt, response = PROMPTS[sample], torch.tensor(RESPONSES[sample])
        ids = torch.tensor([prompt + RESPONSES[sample]])
        logits = lm(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        log_p = torch.log_softmax(logits / temperature, -1)
        rows.append((log_p.gather(-1, response[:, None]).squeeze(-1), -(log_p.exp() * log_p).sum(-1)))
    return tuple(torch.cat(part) for part in zip(*rows, strict=True))


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_policy_equals_unpacked_model(kind, checkpointing):
    lm = tiny_lm(kind)
    reference = copy.deepcopy(lm)
    policy = PolicyModel(lm).train()
    if checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    samples = [2, 0, 3, 1]
    logp, entropy, values = policy(pack(samples, PROMPTS, RESPONSES), temperature=0.8)
    expected = sample_by_sample(reference, samples, 0.8)
    assert values is None
    torch.testing.assert_close(logp, expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy, expected[1], rtol=1e-5, atol=1e-5)
    (logp.sum() + 0.1 * entropy.sum()).backward()
    (expected[0].sum() + 0.1 * expected[1].sum()).backward()
    for (name, ours), theirs in zip(lm.named_parameters(), reference.parameters(), strict=True):
        error = (ours.grad - theirs.grad).norm() / theirs.grad.norm()
        assert error < 1e-5, name


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_policy_keeps_names_and_ties(kind):
    lm = tiny_lm(kind)
    names, tied = (
        [name for name, _ in lm.named_parameters()],
        lm.lm_head.weight is lm.model.embed_tokens.weight,
    )
    policy = PolicyModel(lm)
    assert tied == (kind == "qwen2")
    assert [name for name, _ in policy.lm.named_parameters()] == names
    assert (lm.lm_head.weight is lm.model.embed_tokens.weight) == tied
    assert [name for name, _ in policy.named_parameters()] == [f"lm.{name}" for name in names]


def test_plain_forward_of_a_packed_model_is_refused():
    lm = tiny_lm("qwen2")
    PolicyModel(lm)
    with pytest.raises(ValueError, match="segments"):
        lm(input_ids=torch.tensor([[1, 2, 3]]), use_cache=False)


def test_a_head_that_is_not_linear_is_refused():
    lm = tiny_lm("qwen2")
    lm.lm_head = nn.Sequential(lm.lm_head)
    with pytest.raises(UserError, match="lora.target_modules: the output head is a Sequential"):
        PolicyModel(lm)


def test_a_model_that_changes_its_logits_is_refused():
    lm = tiny_lm("qwen2")
    lm.config.final_logit_softcapping = 30.0
    with pytest.raises(UserError, match="model.path: Qwen2ForCausalLM changes its logits"):
        PolicyModel(lm)
    with pytest.raises(UserError, match="model.path: Linear is not built like Qwen2"):
        PolicyModel(nn.Linear(2, 2))


def test_the_chunk_of_the_policy_bounds_its_logits():
    batch, largest = pack([2], PROMPTS, RESPONSES), []
    for chunk in (2, 1000):
        policy = PolicyModel(tiny_lm("llama", vocab_size=5000), chunk_tokens=chunk)
        with torch.no_grad(), LargestTensor(ignore=policy.lm.lm_head.weight) as seen:
            policy(batch)
        largest.append(seen.elements)
    assert largest == [2 * 5000, len(RESPONSES[2]) * 5000]


def test_filler_reaches_every_parameter_with_an_exact_zero():
    policy = PolicyModel(tiny_lm("qwen2"), value_head=True)
    logp, entropy, values = policy(pack([], PROMPTS, RESPONSES))
    assert logp.shape == entropy.shape == values.shape == (0,)
    (logp.sum() + values.sum()).backward()
    for name, parameter in policy.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_value_head_reads_the_state_before_each_token_and_starts_at_zero():
    policy = PolicyModel(tiny_lm("llama"), value_head=True)
    batch = pack([0, 3], PROMPTS, RESPONSES)
    assert not policy(batch)[2].any()
    with torch.no_grad():
        policy.value_head.weight.normal_()
    together = policy(batch)[2]
    alone = torch.cat([policy(pack([sample], PROMPTS, RESPONSES))[2] for sample in (0, 3)])
    assert together.shape == (6,)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
