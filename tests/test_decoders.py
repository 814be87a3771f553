"""Every decoder against its formula, written another way."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from model.decoders import DECODERS, ComplEx, ConvE, Decoder, DistMult, JointDecoder, conve_shape, make_decoder

B, N, D = 5, 9, 12


def vectors() -> tuple[Tensor, Tensor, Tensor]:
    """q_h [B, D], v_r [B, D], q_t [N, D], float64."""
    generator = torch.Generator().manual_seed(3)
    q_h, v_r, q_t = (torch.randn(rows, D, generator=generator, dtype=torch.float64) for rows in (B, B, N))
    return q_h, v_r, q_t


def ready(decoder: Decoder) -> Decoder:
    """In eval mode and float64, with batch norms that are not the identity."""
    generator = torch.Generator().manual_seed(5)
    for module in decoder.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            for tensor in (module.running_mean, module.weight.data, module.bias.data):
                assert tensor is not None
                tensor.normal_(generator=generator)
            assert module.running_var is not None
            module.running_var.uniform_(0.5, 2, generator=generator)
    return decoder.double().eval()


def normed(x: np.ndarray, norm: nn.BatchNorm1d | nn.BatchNorm2d) -> np.ndarray:
    """Batch norm with stored statistics; channels are the second axis."""
    shape = (1, -1, *[1] * (x.ndim - 2))
    mean, var = norm.running_mean.numpy().reshape(shape), norm.running_var.numpy().reshape(shape)  # type: ignore[union-attr]
    scale, shift = norm.weight.detach().numpy().reshape(shape), norm.bias.detach().numpy().reshape(shape)
    return (x - mean) / np.sqrt(var + norm.eps) * scale + shift


@pytest.mark.parametrize("name", DECODERS)
def test_two_ways_to_score_agree(name: str) -> None:
    """query @ q_t^T against the triple-wise function, all N x B triples one by one."""
    q_h, v_r, q_t = vectors()
    decoder = ready(make_decoder(name, D))
    with torch.no_grad():
        table = decoder(q_h, v_r, q_t)
        single = [
            [decoder.score_triples(q_h[b, None], v_r[b, None], q_t[n, None])[0] for n in range(N)] for b in range(B)
        ]
    assert table.shape == (B, N)
    torch.testing.assert_close(table, torch.tensor(single, dtype=torch.float64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", DECODERS)
def test_gradients_reach_everything_and_no_entity_has_a_bias(name: str) -> None:
    """Gradients reach q_h, v_r, q_t and every parameter; a tail of zeros scores exactly 0, so there is no bias."""
    torch.manual_seed(0)
    q_h, v_r, q_t = (x.requires_grad_() for x in vectors())
    decoder = make_decoder(name, D, dropout=0.0).double()
    decoder(q_h, v_r, q_t).square().sum().backward()
    for tensor in (q_h, v_r, q_t, *decoder.parameters()):
        assert tensor.grad is not None and tensor.grad.abs().sum() > 0
    decoder.eval()
    assert not decoder(q_h, v_r, torch.zeros(N, D, dtype=torch.float64)).any()


def test_distmult_closed_form() -> None:
    q_h, v_r, q_t = vectors()
    got = ready(DistMult(D))(q_h, v_r, q_t)
    want = [[sum(q_h[b, i] * v_r[b, i] * q_t[n, i] for i in range(D)) for n in range(N)] for b in range(B)]
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64))


def test_complex_equals_complex_arithmetic() -> None:
    q_h, v_r, q_t = vectors()
    h, r, t = (torch.complex(*x.chunk(2, dim=1)) for x in (q_h, v_r, q_t))
    want = ((h * r)[:, None] * t[None].conj()).sum(-1).real
    torch.testing.assert_close(ready(ComplEx(D))(q_h, v_r, q_t), want)
    back = ready(ComplEx(D)).score_triples(q_t[:B], v_r, q_h)
    assert not torch.allclose(back, want[range(B), range(B)]), "(h, r, t) and (t, r, h) should have different scores"
    with pytest.raises(ValueError):
        ComplEx(13)


@pytest.mark.parametrize(("kernel", "height"), [(3, None), (2, 6), (3, 4), (1, 1)])
def test_conve_equals_an_explicit_convolution(kernel: int, height: int | None) -> None:
    q_h, v_r, q_t = vectors()
    decoder = ConvE(D, channels=4, kernel=kernel, height=height)
    ready(decoder)
    rows, columns = decoder.height, decoder.width
    image = np.concatenate([q_h.numpy().reshape(B, rows, columns), v_r.numpy().reshape(B, rows, columns)], axis=1)
    image = normed(image[:, None], decoder.input_norm)[:, 0]
    weight, bias = decoder.conv.weight.detach().numpy(), decoder.conv.bias.detach().numpy()  # type: ignore[union-attr]
    maps = np.empty((B, 4, 2 * rows - kernel + 1, columns - kernel + 1))
    for i in range(maps.shape[2]):
        for j in range(maps.shape[3]):
            patch = image[:, i : i + kernel, j : j + kernel]
            for c in range(4):
                maps[:, c, i, j] = (patch * weight[c, 0]).sum(axis=(1, 2)) + bias[c]
    flat = np.maximum(normed(maps, decoder.feature_norm), 0).reshape(B, -1)
    query = flat @ decoder.project.weight.detach().numpy().T + decoder.project.bias.detach().numpy()
    want = np.maximum(normed(query, decoder.hidden_norm), 0) @ q_t.numpy().T
    np.testing.assert_allclose(decoder(q_h, v_r, q_t).detach().numpy(), want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("dim", "kernel", "shape"),
    [
        (200, 3, (10, 20)),
        (128, 3, (8, 16)),
        (100, 3, (10, 10)),
        (36, 3, (6, 6)),
        (62, 3, (2, 31)),
        (36, 9, None),
        (50, 10, (5, 10)),
        (26, 13, None),
        (39, 3, (3, 13)),
    ],
)
def test_conve_shape(dim: int, kernel: int, shape: tuple[int, int] | None) -> None:
    if shape is None:
        with pytest.raises(ValueError):
            conve_shape(dim, kernel)
    else:
        assert conve_shape(dim, kernel) == shape
        assert 2 * shape[0] >= kernel and shape[1] >= kernel


@pytest.mark.parametrize(("prime", "near"), [(199, (198, 200)), (13, (12, 14)), (5, (6,)), (2, (6,))])
def test_conve_names_the_nearest_widths(prime: int, near: tuple[int, ...]) -> None:
    with pytest.raises(ValueError) as error:
        ConvE(prime)
    assert f"D = {prime}" in str(error.value) and all(str(d) in str(error.value) for d in near)
    assert all(conve_shape(d, 3) for d in near)


def test_conve_height_is_checked() -> None:
    assert conve_shape(200, 3, height=20) == (20, 10)
    with pytest.raises(ValueError):
        ConvE(200, height=7)


def test_make_decoder() -> None:
    with pytest.raises(ValueError):
        make_decoder("convee", D)
    decoder = make_decoder("conve", D, dropout=0.7, channels=2)
    rates = [m.p for m in decoder.modules() if isinstance(m, nn.Dropout | nn.Dropout2d)]
    assert rates == [0.7] * 3 and isinstance(decoder, ConvE) and decoder.conv.out_channels == 2
    with pytest.raises(ValueError):
        make_decoder("distmult", 0)


def test_joint_score_is_the_sum_of_the_members_scores() -> None:
    q_h, v_r, q_t = vectors()
    members = [ready(make_decoder("distmult", 8)), ready(make_decoder("complex", 4))]
    parts = zip(members, *(x.split([8, 4], dim=1) for x in (q_h, v_r, q_t)), strict=True)
    expected = sum(member(h, r, t) for member, h, r, t in parts)
    torch.testing.assert_close(JointDecoder(members).eval()(q_h, v_r, q_t), expected)
