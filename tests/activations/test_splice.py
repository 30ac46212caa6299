"""Putting something in place of the residual stream of real architectures."""

import pytest
import torch

from saekit import Sae
from saekit.activations import find_blocks, splice, tap
from saekit.sae.trained_on import TrainedOn
from tests.activations.test_tap import CASES, build


def hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize(("prefix", "config"), CASES)
def test_what_is_put_in_is_what_comes_after(prefix, config):
    model, ids = build(config).eval(), torch.randint(3, 90, (2, 7))
    names = [f"{prefix}.{layer}" for layer in range(3)]
    put = torch.randn(2, 7, 32)
    with torch.no_grad(), splice(model, {names[0]: lambda acts: put}), tap(model, names) as read:
        first = read(ids)
    assert torch.equal(first[names[0]], put)
    # The blocks after it compute from it: putting in what comes out of the second gives the third's output again.
    with torch.no_grad(), splice(model, {names[1]: lambda acts: first[names[1]]}), tap(model, names) as read:
        second = read(ids)
    torch.testing.assert_close(second[names[2]], first[names[2]])
    with tap(model, names) as read:
        clean = read(ids)
    assert not torch.equal(clean[names[2]], first[names[2]])
    assert hooks(model) == 0


@pytest.fixture
def llama():
    return build(CASES[0].values[1]).eval()


def test_an_sae_gives_its_reconstruction(llama):
    ids = torch.randint(3, 90, (2, 7))
    sae = Sae(32, 64, 4)
    with tap(llama, ["layers.1"]) as read:
        acts = read(ids)["layers.1"]
    with torch.no_grad(), splice(llama, {"layers.1": sae}), tap(llama, ["layers.1"]) as read:
        torch.testing.assert_close(read(ids)["layers.1"], sae(acts).recon)


def transcoder(reads=None, writes=None, skip=True, d_in=32, d_out=32):
    named = {} if reads is None else {"reads": {reads: d_in}, "writes": {writes: d_out}}
    sae = Sae(d_in, 64, 4, transcode=True, d_out=d_out, skip_connection=skip, **named)
    with torch.no_grad():
        for parameter in (sae.W_skip, sae.b_dec) if skip else (sae.b_dec,):
            parameter.normal_()
    return sae


@pytest.mark.parametrize(
    ("given", "reads", "writes"),
    [
        (transcoder("layers.1.mlp:in", "layers.1.mlp"), "layers.1.mlp:in", "layers.1.mlp"),
        (transcoder(), "layers.1.mlp:in", "layers.1.mlp"),  # sparsify's: its folder's name says it
        (transcoder("layers.0.mlp:in", "layers.0.mlp", skip=False), "layers.1.mlp:in", "layers.1.mlp"),  # moved
        (transcoder("layers.0", "layers.2.mlp"), "layers.0", "layers.2.mlp"),
        (transcoder("layers.1:in", "layers.2:in"), "layers.1:in", "layers.2:in"),
        (transcoder("layers.1.self_attn.q_proj", "layers.1", d_in=32), "layers.1.self_attn.q_proj", "layers.1"),
    ],
)
def test_a_transcoder_replaces_what_it_predicts_from_what_it_reads(llama, given, reads, writes):
    """Of the true input in the same forward pass, as another replacement before it left that."""
    ids, excluded = torch.randint(3, 90, (2, 7)), torch.zeros(2, 7, dtype=torch.bool)
    excluded[0, 2] = True
    with torch.no_grad():
        for before in ({}, {"layers.0.mlp": torch.zeros_like}):
            with splice(llama, before, excluded), tap(llama, [reads, writes]) as read:
                true = read(ids)
            given.max_norm = float(true[reads].norm(dim=-1).quantile(0.7))
            given.max_norm_out = float(true[writes].norm(dim=-1).quantile(0.7))
            kept = (true[reads].norm(dim=-1) > given.max_norm) | (true[writes].norm(dim=-1) > given.max_norm_out)
            kept |= excluded
            assert 0 < kept.sum() < kept.numel()
            with splice(llama, {**before, writes: given}, excluded), tap(llama, [writes]) as read:
                found = read(ids)[writes]
            assert torch.equal(found[kept], true[writes][kept])
            torch.testing.assert_close(found[~kept], given(true[reads]).recon[~kept])
    assert hooks(llama) == 0


def test_a_transcoder_reads_what_is_spliced_in_there(llama):
    ids, given = torch.randint(3, 90, (1, 5)), transcoder()
    with torch.no_grad():
        with (
            splice(llama, {"layers.1.mlp": given, "layers.1.mlp:in": torch.ones_like}),
            tap(llama, ["layers.1.mlp"]) as read,
        ):
            found = read(ids)["layers.1.mlp"]
        torch.testing.assert_close(found, given(torch.ones(1, 5, 32)).recon)
    with splice(llama, {"layers.0.mlp": transcoder(), "layers.1.mlp": given}):
        llama(input_ids=ids).last_hidden_state.sum().backward()
    assert given.W_skip.grad.abs().sum() > 0


def test_what_is_too_long_for_an_sae_stays(llama):
    ids = torch.arange(6).view(2, 3)
    sae = Sae(llama.config.hidden_size, 32, 4)
    with torch.no_grad():
        seen = {}
        with splice(llama, {"layers.0": lambda acts: seen.setdefault("x", acts)}):
            llama(ids)
        norms = seen["x"].norm(dim=-1)
        sae.max_norm = float(norms.median())
        long = norms > sae.max_norm
        assert long.any()
        assert not long.all()
        with splice(llama, {"layers.0": sae}), tap(llama, ["layers.0"]) as read:
            new = read(ids)["layers.0"]
    assert torch.equal(new[long], seen["x"][long])
    torch.testing.assert_close(new[~long], sae(seen["x"]).recon[~long])


def test_later_saes_read_what_earlier_ones_left(llama):
    ids, read_by_second = torch.randint(3, 90, (1, 5)), []
    with torch.no_grad():
        with splice(
            llama, {"layers.0": torch.zeros_like, "layers.1": lambda acts: read_by_second.append(acts) or acts}
        ):
            llama(input_ids=ids)
        block = find_blocks(llama).modules[1]
        zeros = torch.zeros(1, 5, 32)
        positions = llama.rotary_emb(zeros, torch.arange(5)[None])
        expected = block(zeros, position_embeddings=positions)
    torch.testing.assert_close(read_by_second[0], expected if isinstance(expected, torch.Tensor) else expected[0])


def test_tokens_that_are_kept(llama):
    ids = torch.randint(3, 90, (2, 6))
    excluded = torch.tensor([[True, False, False, True, False, False], [False] * 6])
    with tap(llama, ["layers.1"]) as read:
        clean = read(ids)["layers.1"]
    with torch.no_grad(), splice(llama, {"layers.1": torch.zeros_like}, excluded), tap(llama, ["layers.1"]) as read:
        changed = read(ids)["layers.1"]
    assert torch.equal(changed[excluded], clean[excluded])
    assert not changed[~excluded].any()


def test_the_type_of_the_stream_stays(llama):
    llama.to(torch.bfloat16)
    with torch.no_grad(), splice(llama, {"layers.0": Sae(32, 64, 4)}):
        assert llama(input_ids=torch.tensor([[5, 6]])).last_hidden_state.dtype == torch.bfloat16


def test_gradients_flow_through(llama):
    sae = Sae(32, 64, 4)
    with splice(llama, {"layers.0": sae}):
        llama(input_ids=torch.tensor([[5, 6, 7]])).last_hidden_state.sum().backward()
    assert sae.W_dec.grad.abs().sum() > 0


def test_the_model_is_restored_whatever_happens(llama):
    with pytest.raises(RuntimeError, match="boom"), splice(llama, {"layers.0": torch.zeros_like}):
        raise RuntimeError("boom")
    with (
        pytest.raises(ValueError, match="not a module"),
        splice(llama, {"layers.0": torch.zeros_like, "layers.9": abs}),
    ):
        pass
    assert hooks(llama) == 0


@pytest.mark.parametrize(
    ("replacements", "says"),
    [
        ({"layers.9": torch.zeros_like}, "'layers.9' is not a module of LlamaModel: layers has 0 to 2"),
        (
            {"layers.1.mpl": torch.zeros_like},
            "'layers.1.mpl' is not a module of LlamaModel: layers.1 has self_attn, mlp",
        ),
        ({"model.layers.1": torch.zeros_like}, "'model.layers.1' is not a module of LlamaModel: it has embed_tokens, "),
        ({"layers.1": 3}, "layers.1: a int cannot replace activations: pass an Sae or a function"),
        ({"layers.1": Sae(16, 32, 4)}, r"layers.1: the SAE is for a width of 16, .* of shape \[1, 2, 32\]"),
        (
            {"layers.1.mlp": transcoder("layers.1.mlp:in", "layers.1.mlp", d_in=16)},
            r"layers.1.mlp: the transcoder is for a width of 16, .* of shape \[1, 2, 32\]",
        ),
        (
            {"layers.1.mlp": transcoder("layers.1.mlp:in", "layers.1.mlp", d_out=16)},
            r"layers.1.mlp: the transcoder is for a width of 16, .* of shape \[1, 2, 32\]",
        ),
        (
            {"layers.1.mlp": transcoder("layers.2", "layers.1.mlp")},
            "layers.1.mlp cannot be predicted from layers.2, which comes after it",
        ),
        ({"layers.1.mlp": transcoder("layers.9", "layers.1.mlp")}, "'layers.9' is not a module of LlamaModel"),
        (
            {"layers.1.mlp:in": transcoder()},
            "layers.1.mlp:in: a transcoder predicts a module's output, unless its files",
        ),
        (
            {
                "crosscoder": Sae(
                    64, 32, 4, reads={"layers.0": 32, "layers.1": 32}, writes={"layers.0": 32, "layers.1": 32}
                )
            },
            "crosscoder: a crosscoder reads later layers than it writes, .* Use saekit.evaluate, ",
        ),
        (
            {"layers.1": lambda acts: acts[..., :3]},
            r"layers.1: the replacement must have shape \[1, 2, 32\], .* of shape \[1, 2, 3\]",
        ),
        ({"layers.1": lambda acts: None}, "layers.1: the replacement must have .* got a NoneType"),
        (["layers.1"], "replacements is a list: pass a dict from modules' names"),
    ],
)
def test_what_cannot_be_spliced_in_is_one_sentence(llama, replacements, says):
    with pytest.raises(ValueError, match=f"^{says}") as refused, splice(llama, replacements):
        llama(input_ids=torch.tensor([[5, 6]]))
    assert "\n" not in str(refused.value)
    assert hooks(llama) == 0


def test_a_warning_where_an_sae_was_trained_elsewhere(llama):
    llama.name_or_path = "some/llama"
    residual = Sae(32, 64, 4)
    residual.trained_on = TrainedOn("some/llama", "layers.2")
    other = Sae(32, 64, 4)
    other.trained_on = TrainedOn("some/other", "layers.1")
    with splice(llama, {"layers.2": residual}):  # as it was trained: warnings are errors here
        pass
    with pytest.warns(UserWarning, match="spliced in at layers.2.mlp was trained at layers.2$") as warned:  # noqa: SIM117
        with splice(llama, {"layers.2.mlp": residual}):
            pass
    assert warned[0].filename == __file__
    llama.name_or_path = ""  # made in memory: it may be any
    with splice(llama, {"layers.1": other}):
        pass
    llama.name_or_path = "some/llama"
    with pytest.warns(UserWarning, match="at layers.1 was trained on some/other, but this model is some/llama"):  # noqa: SIM117
        with splice(llama, {"layers.1": other}):
            pass
