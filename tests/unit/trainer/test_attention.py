"""Both forms of packed attention against dense masks; the index arithmetic of the CUDA form over plain torch."""

import pytest
import torch

from oapl_engine.samples import PromptSpan
from oapl_engine.trainer.attention import (
    AttentionOptions,
    _varlen,
    attention_kernel,
    plan_attention,
    segment_attention,
    varlen_attention,
)

CPU = torch.device("cpu")
# prefix of 5 with responses 3, 1; unshared 4 and 6; a prefix longer than one small call; one response on its own
SPANS = [
    PromptSpan(0, 5, ((5, 3), (8, 1))),
    PromptSpan(9, 0, ((9, 4), (13, 6))),
    PromptSpan(19, 250, ((269, 30), (299, 7))),
    PromptSpan(306, 0, ((306, 9),)),
]
ROWS = 315


def tensors(dtype=torch.float64):
    torch.manual_seed(0)
    shapes = [(1, 4, ROWS, 8), (1, 2, ROWS, 8), (1, 2, ROWS, 8)]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def plain_varlen(q, k, v, cu_q, cu_k, max_q, max_k, scale, window, softcap):
    """Variable-length attention, causal and aligned bottom right, in plain torch: what flash kernels compute."""
    out = []
    for i in range(len(cu_q) - 1):
        queries, keys = q[cu_q[i] : cu_q[i + 1]], k[cu_k[i] : cu_k[i + 1]]
        assert len(queries) <= max_q
        assert len(keys) <= max_k
        values = v[cu_k[i] : cu_k[i + 1]].repeat_interleave(q.shape[1] // v.shape[1], 1)
        keys = keys.repeat_interleave(q.shape[1] // k.shape[1], 1)
        scores = torch.einsum("qhd,khd->hqk", queries, keys) * (q.shape[-1] ** -0.5 if scale is None else scale)
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        distance = torch.arange(len(queries))[:, None] + len(keys) - len(queries) - torch.arange(len(keys))[None]
        hidden = (distance < 0) | (distance >= (window or len(keys)))
        out.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), values))
    return torch.cat(out)


def dense(q, k, v, window, softcap, sinks=None):
    """Mask over all rows from who may read whom, written without the plan."""
    owner, position = torch.zeros(ROWS, dtype=torch.long), torch.zeros(ROWS, dtype=torch.long)
    group = torch.zeros(ROWS, dtype=torch.long)
    for g, span in enumerate(SPANS):
        for i, (start, rows) in enumerate([(span.start, span.length), *span.responses]):
            owner[start : start + rows], group[start : start + rows] = i, g
            position[start : start + rows] = torch.arange(rows) + (span.length if i else 0)
    prefix = torch.tensor([span.length > 0 for span in SPANS])[group] & (owner == 0)
    may = (group[:, None] == group) & ((owner[:, None] == owner) | prefix) & (position[:, None] >= position)
    may &= position[:, None] - position < (window or ROWS)
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    scores = q @ k.transpose(2, 3) * 0.3
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~may, -torch.inf)
    weights = scores.exp()
    total = weights.sum(-1, keepdim=True) + (0 if sinks is None else sinks.exp()[:, None, None])
    return (weights / total @ v).transpose(1, 2)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("form", ["segments", "varlen"])
def test_forms_against_dense_mask(form, window, softcap):
    """Outputs and gradients of q, k, v agree with a dense masked softmax to 1e-12 in float64."""
    plan, inputs = plan_attention(SPANS, CPU), tensors()
    upstream = torch.randn(1, ROWS, 4, 8, dtype=torch.float64)
    expected = torch.autograd.grad((dense(*inputs, window, softcap) * upstream).sum(), inputs)
    if form == "segments":
        out = segment_attention(*inputs, plan, AttentionOptions(0.3, window, softcap))
    else:
        out = varlen_attention(*(x[0] for x in inputs), plan, plain_varlen, AttentionOptions(0.3, window, softcap))[
            None
        ]
    torch.testing.assert_close(out, dense(*inputs, window, softcap), atol=1e-12, rtol=1e-12)
    for found, wanted in zip(torch.autograd.grad((out * upstream).sum(), inputs), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_sinks_against_dense(softcap):
    """Outputs and gradients, also of the sinks, agree with a softmax whose sum holds exp(sink)."""
    inputs = [*tensors(), torch.randn(4, dtype=torch.float64, requires_grad=True)]
    *qkv, sinks = inputs
    upstream = torch.randn(1, ROWS, 4, 8, dtype=torch.float64)
    expected = dense(*qkv, 4, softcap, sinks)
    out = segment_attention(*qkv, plan_attention(SPANS, CPU), AttentionOptions(0.3, 4, softcap, sinks))
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=1e-12)
    gradients = (torch.autograd.grad((found * upstream).sum(), inputs) for found in (out, expected))
    for found, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-11, rtol=1e-11)


@pytest.mark.gpu
def test_varlen_kernel_on_a_gpu():
    """torch's varlen flash kernel in bf16 is as far from float64 as SDPA in bf16 is, within a factor of two."""
    device = torch.device("cuda")
    exact = segment_attention(*tensors(), plan_attention(SPANS, CPU), AttentionOptions(0.3))
    inputs = [x.detach().to(device, torch.bfloat16) for x in tensors()]
    plan = plan_attention(SPANS, device, "varlen")
    found = varlen_attention(*(x[0] for x in inputs), plan, _varlen, AttentionOptions(0.3))[None].cpu()
    peer = segment_attention(*inputs, plan, AttentionOptions(0.3)).cpu()
    assert (found - exact).abs().max() <= 2 * (peer - exact).abs().max()


def test_gather_only_where_shared():
    """Without a shared prefix nothing is copied: keys are the rows themselves."""
    assert plan_attention([PromptSpan(0, 0, ((0, 4), (4, 6)))], CPU).gather is None
    plan = plan_attention(SPANS[:1], CPU)
    assert plan.gather.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 8]
    assert plan.cu_query.tolist() == [0, 5, 8, 9]
    assert plan.cu_key.tolist() == [0, 5, 13, 19]
    assert (plan.max_query, plan.max_key) == (5, 8)


def test_kernel_choice():
    assert attention_kernel("auto", CPU, torch.bfloat16) == "sdpa"
    assert attention_kernel("auto", torch.device("cuda"), torch.float32) == "sdpa"
    assert attention_kernel("sdpa", torch.device("cuda"), torch.bfloat16) == "sdpa"
    assert attention_kernel("auto", torch.device("cuda"), torch.bfloat16) in ("flash", "varlen")
    with pytest.raises(ValueError, match=r'"flash": flash-attn cannot run on cpu .* use model.attention = "auto"'):
        attention_kernel("flash", CPU, torch.bfloat16)
