"""In bfloat16, sums and extremes are taken in float32: of what was rounded, as it was rounded."""

import pytest
import torch

from ngcore.models.affine import Affine
from ngcore.models.kernels.moments import Moments
from ngcore.models.ng_t import RelationalAttention


def rounded(*shape):
    return torch.randn(*shape).bfloat16()


def test_moments_of_rounded_numbers_are_those_in_float32():
    torch.manual_seed(0)
    inputs = [rounded(2, 3, 9, 4), rounded(2, 3, 9, 4), rounded(2, 3, 4), rounded(2, 9, 4)]
    weights = torch.randn(4, 2, 3, 4)
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        outputs = Moments.apply(*leaves)
        assert all(x.dtype == torch.float32 for x in outputs)
        loss = sum((w * x).sum() for w, x in zip(weights, outputs, strict=True))
        found.append((outputs, torch.autograd.grad(loss, leaves)))
    (low, low_gradients), (high, high_gradients) = found
    for own, other in zip(low, high, strict=True):
        assert torch.equal(own, other)
    for own, other in zip(low_gradients, high_gradients, strict=True):
        assert own.dtype == torch.bfloat16
        assert torch.equal(own, other.bfloat16())


def test_extremes_need_not_be_those_that_were_stored():
    """A compiler may store extremes of numbers that are rounded elsewhere: gradients reach them all the same."""
    torch.manual_seed(0)
    leaves = [
        x.requires_grad_() for x in (rounded(1, 1, 9, 4), rounded(1, 1, 9, 4), rounded(1, 1, 4), rounded(1, 9, 4))
    ]
    outputs = Moments.apply(*leaves)
    expected = torch.autograd.grad(outputs[2].sum() + outputs[3].sum(), leaves, retain_graph=True)
    for extreme in outputs[2:]:
        extreme.data.add_(1e-3)
    found = torch.autograd.grad(outputs[2].sum() + outputs[3].sum(), leaves)
    for own, other in zip(found, expected, strict=True):
        assert torch.isfinite(own).all()
        assert torch.equal(own, other)


def test_maps_are_composed_in_float32():
    torch.manual_seed(0)
    first, second = (Affine(torch.randn(4, 4), torch.randn(4)) for _ in range(2))
    attention = RelationalAttention()
    expected = second.after(first), attention.edge_maps()
    with torch.autocast("cpu", torch.bfloat16):
        for own, other in zip((second.after(first), attention.edge_maps()), expected, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(own, other, strict=True))


@pytest.mark.parametrize("of_blocks", [False, True])
def test_attention_gathers_in_float32(of_blocks):
    torch.manual_seed(0)
    attention, nodes, edges = RelationalAttention(), torch.randn(2, 5, 64), torch.randn(2, 5, 5, 32)
    whole = ((slice(0, 5), slice(0, 5)), edges)
    run = (
        (lambda: attention.of_blocks(nodes, torch.zeros(32), [whole]))
        if of_blocks
        else lambda: attention(nodes, edges, slice(None))
    )
    expected = run()
    with torch.autocast("cpu", torch.bfloat16):
        found = run()
    assert found.dtype == torch.bfloat16
    assert (found - expected).norm() < 0.02 * expected.norm()
