"""One claim: log-probs, loss and every gradient are within twice torch's own error in the same dtype."""

from dataclasses import replace

import pytest
import torch
from oapl_kernels import Objective, PolicyInputs, fused_policy_loss, head, matmul, oapl_loss, single_pass
from oapl_kernels.objectives import OBJECTIVES, grpo, gspo, oapl, tis, with_reference_kl
from oapl_kernels.testing import Products

from tests.support.head_reference import (
    CPU,
    ODD,
    fused,
    make_case,
    odd_case,
    plain_autograd,
    relative_error,
)
from tests.support.head_reference import compare as compare_cases

LENGTHS = {
    "whole": [5, 1, 30, 17, 1, 9, 24],
    "one": [61],
    "long": [3, 71, 8, 2],  # the second is longer than four chunks of 16
}
CHUNK = 16


def compare(objective, lengths, dtype, backend="torch", **options):
    compare_cases(fused, lambda seed: make_case(objective, lengths, seed, dtype, **options), dtype, backend=backend)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize(
    "objective", [oapl(0.05), grpo(), with_reference_kl(oapl(0.05), 0.1)], ids=lambda objective: objective.name
)
@pytest.mark.parametrize("entropy_coefficient", [0.0, 0.02])
@pytest.mark.parametrize("backend", ["torch", CPU])
def test_error_is_at_most_twice_that_of_torch(objective, lengths, dtype, entropy_coefficient, backend):
    if backend == "cpu" and dtype == torch.float64:
        pytest.skip("float64 runs on the torch backend alone")
    compare(objective, lengths, dtype, backend=backend, entropy_coefficient=entropy_coefficient)


@pytest.mark.parametrize("backend", ["torch", CPU])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("objective", [oapl(0.05), grpo()], ids=lambda objective: objective.name)
@pytest.mark.parametrize("name", ODD)
def test_odd_cases(name, objective, dtype, backend):
    compare_cases(fused, lambda seed: odd_case(name, objective, seed, dtype), dtype, backend=backend)


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
@pytest.mark.parametrize("lengths", [LENGTHS["whole"], LENGTHS["long"]], ids=["whole", "long"])
def test_every_objective_of_the_table(name, lengths):
    objective = OBJECTIVES[name](0.05) if name in ("oapl", "kimi") else OBJECTIVES[name]()
    compare(objective, lengths, torch.float32)


@pytest.mark.parametrize("objective", [gspo(0.1, 0.2), tis(level="sequence"), grpo()], ids=lambda o: o.name)
@pytest.mark.parametrize(("temperature", "softcap"), [(0.1, None), (10.0, None), (0.7, 3.0)])
@pytest.mark.parametrize("backend", ["torch", CPU])
def test_temperature_and_softcap(objective, temperature, softcap, backend):
    compare(objective, LENGTHS["long"], torch.float32, backend=backend, temperature=temperature, softcap=softcap)


@pytest.mark.parametrize("backend", ["torch", CPU])
def test_bf16_products_as_on_hardware_that_has_them(monkeypatch, backend):
    """Machines without a bf16 unit widen instead; both ways are held to the claim."""
    for module in (head, matmul):
        monkeypatch.setattr(module, "multiplies_natively", lambda dtype, device: dtype != torch.float16)
    for lengths in (LENGTHS["whole"], LENGTHS["long"], [90, 3]):
        compare(oapl(0.05), lengths, torch.bfloat16, backend=backend)


def test_the_claim_fails_with_a_gradient_off_by_a_thousandth(monkeypatch):
    right = head.Head.gradient
    monkeypatch.setattr(head.Head, "gradient", lambda self, z, y, s, a, e: right(self, z, y, s, a * 1.001, e))
    with pytest.raises(AssertionError, match="torch's own"):
        compare(oapl(0.05), LENGTHS["whole"], torch.float32)


def test_the_claim_fails_with_bf16_logits(monkeypatch):
    right = head.Head.logits
    rounded = lambda self, hidden: right(self, hidden).copy_(right(self, hidden).bfloat16())  # noqa: E731
    monkeypatch.setattr(head.Head, "logits", rounded)
    with pytest.raises(AssertionError, match="torch's own"):
        compare(oapl(0.05), LENGTHS["whole"], torch.float32)


def test_the_claim_fails_when_a_long_sequence_does_not_wait(monkeypatch):
    """With scope "sequence", the derivative of an early piece is not known before the last one."""
    monkeypatch.setattr(single_pass.SinglePass, "_long_sequence", single_pass.SinglePass._long_token)
    with pytest.raises(AssertionError, match="torch's own"):
        compare(oapl(0.05), LENGTHS["long"], torch.float32)


@pytest.mark.parametrize("length", [40, 200])
def test_long_sequence_waits_as_rows_or_as_one_accumulator(length, monkeypatch):
    """fp32 rows are cheaper up to D tokens; both forms give the gradient of the undivided sequence."""
    made = []
    start = single_pass.UnscaledGradient.__init__

    def record(self, *arguments):
        start(self, *arguments)
        made.append("rows" if self.rows is not None else "sums")

    monkeypatch.setattr(single_pass.UnscaledGradient, "__init__", record)
    case = make_case(oapl(0.05), [4, length, 7], 0, torch.float64, depth=64)
    deferred, whole = fused(case, chunk_tokens=16, backend="torch"), fused(case, chunk_tokens=999, backend="torch")
    assert made == ["rows" if length <= 64 else "sums"]
    for name, value in whole.items():
        torch.testing.assert_close(deferred[name], value, rtol=1e-10, atol=1e-12)


def test_everything_masked_gives_a_constant_and_no_gradient():
    case = make_case(oapl(0.05), [4, 40, 3], 0, torch.float32)
    case = replace(case, inputs=replace(case.inputs, mask=torch.zeros(47, dtype=torch.uint8)))
    found = fused(case, chunk_tokens=CHUNK, backend="torch")
    assert float(found["loss"]) == pytest.approx(float(case.inputs.advantage.square().sum() / case.normalizer))
    assert all((found[name] == 0).all() for name in ("hidden", "weight", "bias"))


def test_ignored_targets_count_as_masked():
    case = make_case(grpo(), LENGTHS["long"], 0, torch.float64)
    ignored = replace(
        case, target=torch.where(case.inputs.mask, case.target, -100), inputs=replace(case.inputs, mask=None)
    )
    by_mask, by_target = fused(case, chunk_tokens=CHUNK), fused(ignored, chunk_tokens=CHUNK)
    for name in ("loss", "hidden", "weight", "bias"):
        torch.testing.assert_close(by_mask[name], by_target[name])
    assert (by_target["logprob"][~case.inputs.mask] == 0).all()


def test_ignored_targets_cost_nothing():
    case = make_case(oapl(0.05), [40, 8, 80], 0, torch.float32, depth=16, vocabulary=64)
    case.target[::2] = -100
    case.target[40:48] = -100  # a whole sequence
    kept = int((case.target != -100).sum())
    with Products() as meter:
        result = call(case, hidden=case.hidden.requires_grad_(), weight=case.weight.requires_grad_())
    assert meter.flops == 6 * kept * 16 * 64
    assert float(result.sequence_logprob[1]) == 0
    constant = float(case.inputs.advantage[1] ** 2) / case.normalizer
    assert float(result.loss.detach()) > constant > 0


def test_an_empty_batch_gives_zero_and_zero_gradients():
    hidden, weight = torch.zeros(0, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    nothing, none = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    result = oapl_loss(hidden, weight, none, torch.tensor([0]), nothing, nothing, beta2=1.0)
    result.loss.backward()
    assert float(result.loss.detach()) == 0
    assert hidden.grad.shape == (0, 8)
    assert (weight.grad == 0).all()
    assert result.sequence_logprob.shape == (0,)


def test_sequence_logprob_is_the_sum_over_trained_tokens():
    case = make_case(oapl(0.05), LENGTHS["long"], 0, torch.float64)
    result = fused_policy_loss(
        case.hidden, case.weight, case.target, case.cu_seqlens, case.objective, case.inputs, normalizer=1.0
    )
    exact = [
        (lp * m).sum()
        for lp, m in zip(*(x.split(LENGTHS["long"]) for x in (result.logprob, case.inputs.mask)), strict=True)
    ]
    torch.testing.assert_close(result.sequence_logprob, torch.stack(exact))


def test_micro_batches_add_up_to_the_whole():
    case = make_case(grpo(), [6, 30, 9], 0, torch.float64)
    whole = fused(case, backend="torch")
    hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
    loss = 0.0
    inputs = replace(case.inputs, cu_seqlens=case.cu_seqlens)
    for first, last in ((0, 1), (1, 3)):
        start, end = int(case.cu_seqlens[first]), int(case.cu_seqlens[last])
        part = inputs.sequences(first, last, start, end)
        micro = fused_policy_loss(
            hidden[start:end], weight, case.target[start:end], part.cu_seqlens, case.objective, part,
            normalizer=case.normalizer, bias=case.bias,
        ).loss  # fmt: skip
        micro.backward()
        loss += float(micro.detach())
    assert loss == pytest.approx(float(whole["loss"]))
    torch.testing.assert_close(hidden.grad, whole["hidden"])
    torch.testing.assert_close(weight.grad, whole["weight"])


def call(case, **options):
    keywords = {"normalizer": case.normalizer, "backend": "torch", "chunk_tokens": CHUNK} | options
    hidden = keywords.pop("hidden", case.hidden)
    weight = keywords.pop("weight", case.weight)
    return fused_policy_loss(hidden, weight, case.target, case.cu_seqlens, case.objective, case.inputs, **keywords)


def test_weight_grad_leaves_the_gradient_of_the_bias_alone():
    """The bias has no sums of the caller's: its gradient starts at zero."""
    case = make_case(oapl(0.05), LENGTHS["long"], 0, torch.float32)
    found = []
    for weight_grad in (None, torch.ones(case.weight.shape)):
        bias = case.bias.clone().requires_grad_()
        call(case, weight=case.weight.clone().requires_grad_(), bias=bias, weight_grad=weight_grad).loss.backward()
        found.append(bias.grad)
    assert torch.equal(*found)


@pytest.mark.parametrize("lengths", [LENGTHS["whole"], LENGTHS["long"]], ids=["whole", "long"])
def test_weight_grad_is_added_to_and_none_is_returned(lengths):
    case = make_case(oapl(0.05), lengths, 0, torch.bfloat16)
    hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
    call(case, hidden=hidden, weight=weight).loss.backward()
    before = torch.randn(weight.shape)
    added, second = before.clone(), case.weight.clone().requires_grad_()
    call(case, hidden=case.hidden.clone().requires_grad_(), weight=second, weight_grad=added).loss.backward()
    assert second.grad is None
    torch.testing.assert_close((added - before).bfloat16(), weight.grad, rtol=1e-2, atol=1e-5)


def test_upstream_gradient_scales_what_is_handed_out():
    case = make_case(oapl(0.05), LENGTHS["long"], 0, torch.float64)
    gradients = []
    for scale in (1.0, -2.5):
        hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
        (call(case, hidden=hidden, weight=weight).loss * scale).backward()
        gradients.append((hidden.grad / scale, weight.grad / scale))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_weight_grad_refuses_an_upstream_gradient_other_than_1():
    case = make_case(oapl(0.05), [4], 0, torch.float32)
    loss = call(case, hidden=case.hidden.requires_grad_(), weight_grad=torch.zeros_like(case.weight)).loss
    with pytest.raises(ValueError, match=r"gradient of loss is 0.5 with weight_grad given; allowed: 1"):
        (loss * 0.5).backward()


def test_gradients_are_handed_out_once():
    case = make_case(oapl(0.05), [4], 0, torch.float32)
    loss = call(case, hidden=case.hidden.requires_grad_()).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="already handed out"):
        loss.backward()


@pytest.mark.parametrize("lengths", [[32] * 4, [128]], ids=["whole", "deferred"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("train_hidden", "train_weight", "units"), [(True, True, 6), (True, False, 4), (False, True, 4), (False, False, 2)]
)
def test_operations_are_the_fewest_possible(lengths, dtype, train_hidden, train_weight, units):
    case = make_case(oapl(0.05), lengths, 0, dtype, depth=16, vocabulary=64)
    with Products() as meter:
        call(case, hidden=case.hidden.requires_grad_(train_hidden), weight=case.weight.requires_grad_(train_weight))
    assert meter.flops == units * 128 * 16 * 64


@pytest.mark.parametrize(("depth", "entropy", "units"), [(128, 0.0, 6), (16, 0.0, 10), (128, 0.01, 10)])
def test_kl_penalty_costs_nothing_where_rows_wait(depth, entropy, units):
    """On a sequence longer than a chunk; with an accumulator it has gradient products of its own."""
    case = make_case(with_reference_kl(oapl(0.05), 0.1), [128], 0, torch.float32, depth=depth, vocabulary=64)
    with Products() as meter:
        call(
            case, hidden=case.hidden.requires_grad_(), weight=case.weight.requires_grad_(), entropy_coefficient=entropy
        )
    assert meter.flops == units * 128 * depth * 64


def test_no_gradient_products_under_no_grad():
    case = make_case(oapl(0.05), LENGTHS["long"], 0, torch.float32)
    untouched = torch.zeros_like(case.weight)
    with torch.no_grad(), Products() as meter:
        result = call(
            case, hidden=case.hidden.requires_grad_(), weight=case.weight.requires_grad_(), weight_grad=untouched
        )
    assert meter.flops == 2 * case.hidden.numel() * len(case.weight)
    assert not result.loss.requires_grad
    assert (untouched == 0).all()


def test_no_tensor_as_large_as_tokens_times_vocabulary_is_made():
    tokens, vocabulary, largest = 512, 600, 0

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    case = make_case(oapl(0.05), [40] * 12 + [32], 0, torch.float32, depth=8, vocabulary=vocabulary)
    with Sizes():
        call(case, hidden=case.hidden.requires_grad_(), weight=case.weight.requires_grad_(), chunk_tokens=80)
    assert largest == 80 * vocabulary < tokens * vocabulary / 6


def test_any_callable_is_an_objective():
    def squared(logprob, inputs):
        return (inputs.per_token(inputs.advantage) * logprob.square() * inputs.mask).sum()

    compare(Objective("squared", "token", squared), LENGTHS["long"], torch.float32)


def test_objective_with_a_wrong_scope_is_refused():
    """Where it would matter: on a sequence longer than a chunk."""
    case = make_case(Objective("liar", "sequence", lambda lp, i: (lp.square() * i.mask).sum()), [200], 0, torch.float32)
    with pytest.raises(
        ValueError, match=r"objective 'liar' has scope 'sequence' but its derivative varies.*chunk_tokens >= 200"
    ):
        fused(case, chunk_tokens=CHUNK, backend="torch")


def test_a_callable_must_return_a_sum():
    case = make_case(Objective("vector", "token", lambda logprob, inputs: logprob), [4], 0, torch.float32)
    with pytest.raises(ValueError, match=r"the objective returned \[4\]; allowed"):
        fused(case, backend="torch")


def test_non_contiguous_inputs():
    case = make_case(oapl(0.05), LENGTHS["long"], 0, torch.float32)
    plain = fused(case, chunk_tokens=CHUNK, backend="torch")
    strided = replace(
        case,
        hidden=case.hidden.t().contiguous().t(),
        weight=torch.cat([case.weight, case.weight], 1)[:, : case.weight.shape[1]],
        target=torch.stack([case.target, case.target], 1)[:, 0],
    )
    assert not strided.hidden.is_contiguous()
    for name, value in fused(strided, chunk_tokens=CHUNK, backend="torch").items():
        torch.testing.assert_close(value, plain[name], rtol=1e-5, atol=1e-6)


def test_autocast_computes_in_bf16_with_fp32_gradients():
    case = make_case(oapl(0.05), LENGTHS["long"], 0, torch.float32)
    hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = call(case, hidden=hidden, weight=weight)
    result.loss.backward()
    low = case.to(torch.bfloat16)
    exact = plain_autograd(replace(low, bias=None).to(torch.float64))
    assert relative_error(result.logprob, exact["logprob"]) < 1e-6
    assert weight.grad.dtype == hidden.grad.dtype == torch.float32
    assert relative_error(weight.grad, exact["weight"]) < 5e-3


GOOD = {
    "hidden": torch.randn(6, 4),
    "weight": torch.randn(9, 4),
    "target": torch.arange(6),
    "cu_seqlens": torch.tensor([0, 2, 6]),
    "behavior_logprob": torch.zeros(6),
    "advantage": torch.zeros(2),
    "beta2": 1.0,
}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"hidden": torch.zeros(6)}, r"hidden has shape \[6\]; allowed: \[any, any\]"),
        ({"hidden": torch.zeros(6, 4, dtype=torch.int64)}, r"hidden has dtype int64; allowed: bfloat16"),
        ({"weight": torch.zeros(9, 5)}, r"weight has shape \[9, 5\]; allowed: \[any, 4\]"),
        ({"weight": torch.zeros(9, 4).double()}, r"weight has dtype torch.float64 but hidden has torch.float32"),
        ({"weight": torch.zeros(9, 4, device="meta")}, r"weight is on meta; allowed: cpu"),
        ({"bias": torch.zeros(4)}, r"bias has shape \[4\]; allowed: \[9\]"),
        ({"target": torch.tensor([0, 1, 2, 3, 9, 5])}, r"target\[4\] is 9; allowed: 0 to 8, or ignore_index -100"),
        ({"target": torch.tensor([0, 1, -1, 3, 4, 5])}, r"target\[2\] is -1; allowed: 0 to 8"),
        ({"target": torch.zeros(6)}, r"target has dtype float32; allowed: int32, int64"),
        ({"cu_seqlens": torch.tensor([0, 4, 2, 6])}, r"cu_seqlens\[2\] is 2 after 4; allowed: strictly increasing"),
        ({"cu_seqlens": torch.tensor([0, 2, 5])}, r"cu_seqlens runs from 0 to 5; allowed: from 0 to 6"),
        ({"behavior_logprob": torch.tensor([0, 0, torch.nan, 0, 0, 0])}, r"behavior_logprob\[2\] is nan; allowed"),
        ({"advantage": torch.zeros(3)}, r"advantage has shape \[3\]; allowed: \[2\]"),
        ({"advantage": torch.tensor([0, torch.inf])}, r"advantage has inf; allowed: finite"),
        ({"mask": torch.ones(5)}, r"mask has shape \[5\]; allowed: \[6\]"),
        ({"beta2": 0.0}, r"beta2 is 0.0; allowed"),
        ({"normalizer": 0.0}, r"normalizer is 0.0; allowed"),
        ({"temperature": -1.0}, r"temperature is -1.0; allowed"),
        ({"softcap": 0.0}, r"softcap is 0.0; allowed"),
        ({"chunk_tokens": 0}, r"chunk_tokens is 0; allowed"),
        ({"chunk_tokens": 2.5}, r"chunk_tokens is 2.5; allowed: an integer"),
        ({"entropy_coefficient": float("nan")}, r"entropy_coefficient is nan; allowed"),
        ({"hidden": [[1.0]]}, r"hidden is a list; allowed: a tensor"),
        ({"target": torch.arange(5)}, r"target has shape \[5\]; allowed: \[6\]"),
        ({"behavior_logprob": torch.zeros(5)}, r"behavior_logprob has shape \[5\]; allowed: \[6\]"),
        ({"cu_seqlens": torch.tensor([0, 2, 2, 6])}, r"cu_seqlens\[2\] is 2 after 2; allowed: strictly increasing"),
        ({"beta2": -1.0}, r"beta2 is -1.0; allowed"),
        ({"weight_grad": torch.zeros(9, 4).bfloat16()}, r"weight_grad has dtype bfloat16; allowed: float32"),
        ({"backend": "fast"}, r"backend is 'fast'; allowed: 'auto'"),
        ({"backend": "triton"}, r"backend is 'triton' with tensors on cpu; allowed"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(wrong, message):
    arguments = GOOD | wrong
    positional = [arguments.pop(name) for name in list(GOOD)[:6]]
    with pytest.raises(ValueError, match=message):
        oapl_loss(*positional, **arguments)


def test_an_objective_that_is_none_is_named():
    with pytest.raises(ValueError, match="objective is a str; allowed: an Objective"):
        call(replace(make_case(oapl(0.05), [4], 0, torch.float32), objective="oapl"))


def test_nan_in_masked_behaviour_log_probs_is_harmless():
    case = make_case(oapl(0.05), LENGTHS["long"], 0, torch.float32)
    poisoned = torch.where(case.inputs.mask, case.inputs.behavior_logprob, torch.nan)
    plain = fused(case, chunk_tokens=CHUNK)
    for name, value in fused(
        replace(case, inputs=replace(case.inputs, behavior_logprob=poisoned)), chunk_tokens=CHUNK
    ).items():
        torch.testing.assert_close(value, plain[name])


def test_inputs_are_left_as_they_were():
    case = make_case(grpo(), LENGTHS["long"], 0, torch.float32)
    before = {name: getattr(case, name).clone() for name in ("hidden", "weight", "target", "cu_seqlens")}
    behavior = case.inputs.behavior_logprob.clone()
    fused(case, chunk_tokens=CHUNK)
    assert all(torch.equal(value, getattr(case, name)) for name, value in before.items())
    assert torch.equal(behavior, case.inputs.behavior_logprob)
    assert PolicyInputs(behavior, case.inputs.advantage).cu_seqlens is None
