"""Blockwise log-probabilities and entropy: both backends against log_softmax of all logits, in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from slipstream.kernels.token_logprob import IGNORE_INDEX, token_logprob, token_logprob_reference
from slipstream.trainer.losses import token_logprobs
from tests.triton_interpreter import DEVICE

SIZES = [(1, 5, 3), (37, 301, 40), (130, 400, 70)]
"""(N, V, H): less than a block, no multiple of one, and several row blocks and vocabulary splits."""

both_backends = pytest.mark.parametrize("backend", ["reference", "triton"])


def problem(size: tuple[int, int, int], dtype: torch.dtype = torch.float32, spread: float = 3.0) -> dict[str, Tensor]:
    """Random hidden, weight, bias and targets; the logits have about the standard deviation `spread`."""
    num_rows, vocab_size, width = size
    generator = torch.Generator().manual_seed(vocab_size)
    tensors = {
        "hidden": torch.randn((num_rows, width), generator=generator) * spread,
        "weight": torch.randn((vocab_size, width), generator=generator) / math.sqrt(width),
        "bias": torch.randn(vocab_size, generator=generator),
    }
    made = {name: tensor.to(DEVICE, dtype).requires_grad_() for name, tensor in tensors.items()}
    targets = torch.randint(0, vocab_size, (num_rows,), generator=generator)
    targets[0] = vocab_size - 1
    return made | {"targets": targets.to(DEVICE)}


def naive(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, bias: Tensor | None, softcap: float
) -> tuple[Tensor, Tensor]:
    """The definition, with all logits at once and in float64."""
    logits = hidden.double() @ weight.double().T
    if bias is not None:
        logits = logits + bias.double()
    if softcap > 0:
        logits = softcap * torch.tanh(logits / softcap)
    log_p = torch.log_softmax(logits / temperature, -1)
    return log_p.gather(1, targets[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(1)


def gradients(results: tuple[Tensor, Tensor], inputs: list[Tensor], seed: int = 0) -> tuple[Tensor, ...]:
    """Of a random combination of both results."""
    generator = torch.Generator().manual_seed(seed)
    upstream = [torch.randn(len(result), generator=generator).to(result) for result in results]
    return torch.autograd.grad(results, inputs, upstream)


def relative(actual: Tensor, expected: Tensor) -> float:
    """Largest difference, as a share of the largest expected magnitude."""
    return ((actual.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


@both_backends
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_forward_is_log_softmax(backend: Any, size: tuple[int, int, int], dtype: torch.dtype, tolerance: float) -> None:
    given = problem(size, dtype)
    hidden, weight, targets = given["hidden"], given["weight"], given["targets"]
    logprobs, entropy = token_logprob(hidden, weight, targets, backend=backend)
    expected, expected_entropy = naive(hidden, weight, targets, 1.0, None, 0.0)
    assert logprobs.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(logprobs.double(), expected, atol=tolerance, rtol=1e-5)
    torch.testing.assert_close(entropy.double(), expected_entropy, atol=tolerance, rtol=1e-5)


@both_backends
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("temperature", "with_bias", "softcap"), [(1.0, False, 0.0), (0.6, False, 5.0), (1.7, True, 0.0), (0.8, True, 4.0)]
)
def test_float32_gradients(
    backend: Any, size: tuple[int, int, int], temperature: float, with_bias: bool, softcap: float
) -> None:
    given = problem(size)
    bias = given["bias"] if with_bias else None
    inputs = [given["hidden"], given["weight"]] + ([bias] if bias is not None else [])
    results = token_logprob(
        given["hidden"], given["weight"], given["targets"], temperature, bias, softcap, vocab_chunk=300, backend=backend
    )
    expected = naive(given["hidden"], given["weight"], given["targets"], temperature, bias, softcap)
    torch.testing.assert_close(results, tuple(part.float() for part in expected), atol=1e-5, rtol=1e-5)
    for actual, wanted in zip(gradients(results, inputs), gradients(expected, inputs), strict=True):
        assert relative(actual, wanted) < 1e-4


@both_backends
def test_bfloat16_gradients_keep_their_dtype(backend: Any) -> None:
    given = problem(SIZES[1], torch.bfloat16)
    inputs = [given["hidden"], given["weight"], given["bias"]]
    arguments = given["hidden"], given["weight"], given["targets"], 0.9, given["bias"], 10.0
    actual = gradients(token_logprob(*arguments, vocab_chunk=100, backend=backend), inputs)
    for part, wanted in zip(actual, gradients(naive(*arguments), inputs), strict=True):
        assert part.dtype == torch.bfloat16
        assert relative(part, wanted) < 2e-2


@both_backends
@pytest.mark.parametrize("chunk", [40, 301, 4096])
def test_the_chunk_size_does_not_matter(backend: Any, chunk: int) -> None:
    given = problem((9, 301, 8))
    inputs = [given["hidden"], given["weight"]]
    whole = token_logprob_reference(*inputs, given["targets"], vocab_chunk=301)
    parts = token_logprob(*inputs, given["targets"], vocab_chunk=chunk, backend=backend)
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-5)
    for actual, wanted in zip(gradients(parts, inputs), gradients(whole, inputs), strict=True):
        assert relative(actual, wanted) < 1e-5


@both_backends
@pytest.mark.filterwarnings("ignore:invalid value|All-NaN:RuntimeWarning")
def test_ignored_rows_are_zero_and_move_nothing(backend: Any) -> None:
    given = problem((20, 150, 16))
    hidden, weight, targets = given["hidden"].detach().clone(), given["weight"], given["targets"]
    ignored = torch.arange(20, device=DEVICE) % 3 == 1
    targets[ignored] = IGNORE_INDEX
    # Whatever stands in a row that does not count.
    hidden[1], hidden[4] = math.nan, math.inf
    hidden.requires_grad_()
    results = token_logprob(hidden, weight, targets, 0.7, vocab_chunk=64, backend=backend)
    assert all((part[ignored] == 0).all() and (part[~ignored] != 0).all() for part in results)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(20, generator=generator).to(DEVICE) for _ in range(2)]
    by_hidden, by_weight = torch.autograd.grad(results, [hidden, weight], upstream)
    assert (by_hidden[ignored] == 0).all()
    kept = hidden.detach()[~ignored].requires_grad_()
    expected = naive(kept, weight, targets[~ignored], 0.7, None, 0.0)
    wanted = torch.autograd.grad(expected, [kept, weight], [part[~ignored].double() for part in upstream])
    assert relative(by_hidden[~ignored], wanted[0]) < 1e-4
    assert relative(by_weight, wanted[1]) < 1e-4


@both_backends
def test_all_rows_ignored_and_no_rows(backend: Any) -> None:
    given = problem((3, 20, 4))
    for hidden, targets in [
        (given["hidden"], torch.full((3,), IGNORE_INDEX, device=DEVICE)),
        (given["hidden"][:0], given["targets"][:0]),
    ]:
        results = token_logprob(hidden, given["weight"], targets, backend=backend)
        by_hidden, by_weight = gradients(results, [given["hidden"], given["weight"]])
        assert all((part == 0).all() for part in (*results, by_hidden, by_weight))


@both_backends
@pytest.mark.parametrize("scale", [1e2, 1e4, 1e30])
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_extreme_logits_do_not_overflow(backend: Any, scale: float) -> None:
    given = problem((11, 300, 8))
    hidden, weight = (given["hidden"].detach() * scale).requires_grad_(), given["weight"]
    results = token_logprob(hidden, weight, given["targets"], vocab_chunk=64, backend=backend)
    expected = naive(hidden, weight, given["targets"], 1.0, None, 0.0)
    # The logits carry float32 rounding, 2^-24 of their size and more with every term of the product.
    slack = 1e-6 * scale
    torch.testing.assert_close(results[0].double(), expected[0], atol=10 * slack, rtol=1e-5)
    assert results[1].isfinite().all()
    assert all(part.isfinite().all() for part in gradients(results, [hidden, weight]))
    capped = token_logprob(hidden, weight, given["targets"], softcap=30.0, vocab_chunk=64, backend=backend)
    assert all(part.isfinite().all() for part in (*capped, *gradients(capped, [hidden, weight])))


@both_backends
def test_entropy_of_large_equal_logits_does_not_cancel(backend: Any) -> None:
    hidden, weight = torch.zeros((2, 4), device=DEVICE), torch.zeros((300, 4), device=DEVICE)
    bias = torch.full((300,), 3e4, device=DEVICE)
    targets = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    logprobs, entropy = token_logprob(hidden, weight, targets, bias=bias, vocab_chunk=64, backend=backend)
    torch.testing.assert_close(entropy, torch.full_like(entropy, math.log(300)), atol=1e-5, rtol=0)
    torch.testing.assert_close(logprobs, torch.full_like(entropy, -math.log(300)), atol=1e-5, rtol=0)


@both_backends
def test_a_bias_can_rule_tokens_out(backend: Any) -> None:
    given = problem((5, 700, 8))
    # Whole tiles, splits and chunks, the first and the last among them.
    bias = torch.full((700,), -1e30, device=DEVICE)
    bias[260:290] = 0.0
    inputs = [given["hidden"], given["weight"]]
    targets = given["targets"] % 30
    results = token_logprob(*inputs, targets + 260, 0.8, bias, vocab_chunk=64, backend=backend)
    expected = naive(given["hidden"], given["weight"][260:290], targets, 0.8, None, 0.0)
    torch.testing.assert_close(results, tuple(part.float() for part in expected), atol=1e-5, rtol=1e-5)
    for actual, wanted in zip(gradients(results, inputs), gradients(expected, inputs), strict=True):
        assert relative(actual, wanted) < 1e-4


@both_backends
def test_views_and_frozen_inputs(backend: Any) -> None:
    given = problem((12, 90, 16))
    hidden = given["hidden"].detach()
    wide = torch.cat([hidden, hidden], 1)[:, :16].requires_grad_()
    across = given["weight"].detach().T.contiguous().T
    results = token_logprob(wide, across, given["targets"], backend=backend)
    assert not wide.is_contiguous()
    expected = naive(wide, across, given["targets"], 1.0, None, 0.0)
    (by_hidden,) = torch.autograd.grad(results[0].sum(), [wide])
    assert relative(by_hidden, torch.autograd.grad(expected[0].sum(), [wide])[0]) < 1e-4
    results = token_logprob(hidden, given["weight"], given["targets"], backend=backend)
    expected = naive(hidden, given["weight"], given["targets"], 1.0, None, 0.0)
    (by_weight,) = torch.autograd.grad(results[1].sum(), [given["weight"]])
    assert relative(by_weight, torch.autograd.grad(expected[1].sum(), [given["weight"]])[0]) < 1e-4


def test_it_equals_the_loss_from_whole_logits() -> None:
    given = problem((15, 120, 8))
    logits = given["hidden"] @ given["weight"].T
    torch.testing.assert_close(
        token_logprob(given["hidden"], given["weight"], given["targets"], 0.6),
        token_logprobs(logits, given["targets"], 0.6),
        atol=1e-5,
        rtol=1e-5,
    )


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages made inside, alive at the same time, and the largest of them."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self.largest = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        for part in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(part, Tensor):
                storage = part.untyped_storage()
                reference = StorageWeakRef(storage)
                self._alive[reference.cdata] = (reference, storage.nbytes())
                self.largest = max(self.largest, storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return result


@both_backends
def test_no_tensor_holds_all_logits(backend: Any) -> None:
    num_rows, vocab_size, width, chunk = 64, 2048, 4, 64
    given = problem((num_rows, vocab_size, width))
    inputs = [given["hidden"], given["weight"]]
    with LiveBytes() as memory:
        results = token_logprob(*inputs, given["targets"], softcap=20.0, vocab_chunk=chunk, backend=backend)
        gradients(results, inputs)
    assert memory.largest <= 4 * max(num_rows * chunk, vocab_size * width)
    # Chunks kept for the backward pass would add up to all logits; so few must be alive together.
    assert memory.peak < 4 * num_rows * vocab_size / 2


def test_the_memory_test_sees_all_logits() -> None:
    given = problem((64, 2048, 4))
    with LiveBytes() as memory:
        token_logprobs(given["hidden"] @ given["weight"].T, given["targets"], 1.0)
    assert memory.peak >= memory.largest >= 4 * 64 * 2048


@both_backends
@pytest.mark.parametrize("wrong", [-1, 20])
def test_a_target_out_of_range(backend: Any, wrong: int) -> None:
    given = problem((3, 20, 4))
    given["targets"][1] = wrong
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match=rf"targets hold {wrong}; allowed: 0 .. 19 or -100"):
            token_logprob(given["hidden"], given["weight"], given["targets"], backend=backend)
    from slipstream.kernels.triton.token_logprob import TokenLogprob

    unchecked = {
        "reference": lambda: token_logprob_reference(given["hidden"], given["weight"], given["targets"]),
        "triton": lambda: TokenLogprob.apply(given["hidden"], given["weight"], None, given["targets"], 1.0, 0.0, 8),
    }
    for part in unchecked[backend]():
        assert part.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(2, 3, 4)}, r"hidden has shape \[2, 3, 4\]; allowed: \[N, H\]"),
        ({"weight": torch.zeros(20, 5)}, r"weight has shape \[20, 5\]; allowed: \[V, 4\]"),
        ({"targets": torch.zeros(2, dtype=torch.int64)}, r"targets are torch.int64 \[2\]; allowed: torch.int64 \[3\]"),
        ({"targets": torch.zeros(3)}, "targets are torch.float32"),
        ({"weight": torch.zeros(20, 4, dtype=torch.bfloat16)}, "hidden is torch.float32 and weight torch.bfloat16"),
        ({"bias": torch.zeros(19)}, r"bias is torch.float32 \[19\]; allowed: .* \[20\]"),
        ({"weight": torch.zeros(20, 4, device="meta")}, "hidden is on cpu and the rest on meta"),
        ({"temperature": 0.0}, "temperature is 0.0; allowed: above 0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"softcap": -1.0}, r"softcap is -1.0; allowed: 0 \(none\) or above"),
        ({"vocab_chunk": 0}, "vocab_chunk is 0; allowed: at least 1"),
        ({"backend": "cuda"}, "backend is 'cuda'; allowed: auto, triton, reference"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "hidden": torch.zeros(3, 4),
        "weight": torch.zeros(20, 4),
        "targets": torch.zeros(3, dtype=torch.int64),
    }
    with pytest.raises(ValueError, match=message) as caught:
        token_logprob(**(arguments | change))
    assert "\n" not in str(caught.value)
