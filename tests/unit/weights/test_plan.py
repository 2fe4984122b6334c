"""A recorded plan does what load_weights does, bit for bit, or refuses and names the tensor that is in the way."""

import pytest
import torch

from oapl_engine.weights.receiver.plan import PlanError, live_parameters, record


def manifest(tensors):
    return [(name, str(t.dtype).removeprefix("torch."), list(t.shape)) for name, t in tensors.items()]


def replay(model, plan, tensors):
    live = dict(live_parameters(model).values())
    for region, value in plan.padding:
        region.view(live[region.name]).fill_(value)
    for name, pairs in plan.copies.items():
        for to, at in pairs:
            to.view(live[to.name]).copy_(at.view(tensors[name]))


def test_replay_equals_load_weights_on_poisoned_parameters(fused_model, tensors):
    plan = record(fused_model(), manifest(tensors()))
    ours, theirs = fused_model(), fused_model()
    for parameter in ours.parameters():
        parameter.data.fill_(float("nan"))
    replay(ours, plan, tensors())
    theirs.load_weights(tensors().items())
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_recording_leaves_live_values_alone(fused_model, tensors):
    model = fused_model()
    record(model, manifest(tensors()))
    assert all(not p.any() for p in model.parameters())


@pytest.mark.parametrize("left_out", ["q", "norm", "embed"])
def test_a_missing_tensor_is_refused_by_what_it_would_fill(fused_model, tensors, left_out):
    """A tensor left out is refused by the name of what it would have filled."""
    rest = {name: t for name, t in tensors().items() if name != left_out}
    with pytest.raises(PlanError) as refusal:
        record(fused_model(), manifest(rest))
    assert refusal.value.parameter == {"q": "qkv", "norm": "norm", "embed": "embed"}[left_out]


def test_unused_tensor_is_refused(fused_model, tensors):
    more = tensors() | {"rotary": torch.zeros(4)}
    with pytest.raises(PlanError, match="rotary"):
        record(fused_model(), manifest(more))


def test_a_reshaped_tensor_is_refused_by_name(fused_model, tensors):
    with pytest.raises(PlanError) as refusal:
        record(fused_model(), manifest(tensors() | {"norm": torch.zeros(9)}))
    assert refusal.value.parameter == "norm"


def test_another_dtype_than_the_engines_is_refused_by_name(fused_model, tensors):
    with pytest.raises(PlanError, match=r"embed: expected dtype torch\.bfloat16"):
        record(fused_model(torch.bfloat16), manifest(tensors()))


def test_an_element_written_twice_is_refused(fused_model, tensors):
    class Twice(fused_model):
        def load_weights(self, weights):
            weights = list(weights)
            super().load_weights(weights)
            super().load_weights([(n, t) for n, t in weights if n == "k"])

    with pytest.raises(PlanError, match=r"qkv: .*64 more than once"):
        record(Twice(), manifest(tensors()))


@pytest.mark.parametrize("write", ["in place", "computed"])
def test_what_is_not_a_plain_copy_is_refused(fused_model, tensors, write):
    class Derived(fused_model):
        def load_weights(self, weights):
            weights = list(weights)
            super().load_weights(weights)
            if write == "in place":
                self.norm.data.add_(1)
            else:
                self.norm.data.copy_(dict(weights)["norm"] + 1)

    with pytest.raises(PlanError, match="norm"):
        record(Derived(), manifest(tensors()))


def test_a_packed_parameter_is_refused_by_name(fused_model, tensors):
    model = fused_model()
    model.down = torch.nn.Parameter(torch.empty(0))
    with pytest.raises(PlanError, match="down: expected live storage"):
        record(model, manifest(tensors()))
