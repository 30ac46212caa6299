import pytest
import torch

from saekit.sae import Sae, normalize_decoder_, project_decoder_gradient_


def make_sae(**kwargs):
    return Sae(8, 32, 4, generator=torch.Generator().manual_seed(0), **kwargs)


def test_start_is_a_tied_decoder_with_unit_rows():
    sae = make_sae()
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(32))
    torch.testing.assert_close(torch.cosine_similarity(sae.W_dec, sae.W_enc), torch.ones(32))
    assert sae.W_enc.abs().max() <= 8**-0.5
    assert not sae.b_enc.any()
    assert not sae.b_dec.any()


def test_the_generator_decides_the_start():
    first, second = make_sae(), make_sae()
    assert torch.equal(first.W_enc, second.W_enc)
    assert not torch.equal(first.W_enc, Sae(8, 32, 4, generator=torch.Generator().manual_seed(1)).W_enc)


@pytest.mark.parametrize("kind", [{}, {"transcode": True, "skip_connection": True}], ids=["sae", "transcoder"])
@pytest.mark.parametrize("lead", [(5,), (2, 3), ()])
def test_encode_decode_forward_agree_at_any_leading_shape(lead, kind):
    sae, generator = make_sae(**kind).eval(), torch.Generator().manual_seed(1)
    x = torch.randn(*lead, 8, generator=generator)
    for started_at_zero in (sae.b_enc, sae.b_dec, sae.W_skip):
        if started_at_zero is not None:
            started_at_zero.data.normal_(generator=generator)
    acts, indices = sae.encode(x)
    assert acts.shape == indices.shape == (*lead, 4)
    assert (acts.diff(dim=-1) <= 0).all()
    out = sae(x)
    torch.testing.assert_close(sae.decode(acts, indices, x if kind else None), out.recon)
    expected = torch.einsum("...k,...kd->...d", acts, sae.W_dec[indices]) + sae.b_dec
    torch.testing.assert_close(out.recon, expected + x @ sae.W_skip.T if kind else expected)
    scores = torch.relu((x if kind else x - sae.b_dec) @ sae.W_enc.T + sae.b_enc)
    torch.testing.assert_close(acts, scores.topk(4).values)


def test_low_precision_input_is_computed_in_the_parameters_type():
    sae, x = make_sae(), torch.randn(3, 8).to(torch.bfloat16)
    assert sae(x).recon.dtype == torch.float32
    torch.testing.assert_close(sae(x).recon, sae(x.float()).recon)


def test_multi_topk_only_in_training():
    sae, x = make_sae(multi_topk=True), torch.randn(3, 8)
    assert sae.train()(x).multi_recon is not None
    assert sae.eval()(x).multi_recon is None
    assert sae.train()(x).acts.shape == (3, 4)


def test_multi_topk_with_fewer_than_4k_latents():
    sae = Sae(8, 10, 4, multi_topk=True)
    assert sae(torch.randn(3, 8)).multi_recon.shape == (3, 8)


def test_projection_leaves_no_part_along_the_row():
    sae = make_sae()
    sae.W_dec.grad = torch.randn(32, 8)
    before = sae.W_dec.grad.clone()
    project_decoder_gradient_(sae)
    torch.testing.assert_close((sae.W_dec.grad * sae.W_dec).sum(1), torch.zeros(32), atol=1e-6, rtol=0)
    removed = before - sae.W_dec.grad  # parallel to the row
    torch.testing.assert_close(torch.cosine_similarity(removed, sae.W_dec.detach()).abs(), torch.ones(32))


def test_normalization_keeps_directions_and_zero_rows():
    sae = make_sae()
    with torch.no_grad():
        sae.W_dec.mul_(3)
        sae.W_dec[5] = 0
    directions = torch.nn.functional.normalize(sae.W_dec.detach(), dim=1)
    normalize_decoder_(sae)
    torch.testing.assert_close(sae.W_dec.detach(), directions)


@pytest.mark.parametrize(("sizes", "says"), [((0, 4, 1), "at least 1"), ((4, 4, 5), "k = 5 is larger")])
def test_impossible_sizes(sizes, says):
    with pytest.raises(ValueError, match=says):
        Sae(*sizes)
