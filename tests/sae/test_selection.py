"""Selections: what the protocol promises of every kind, and a kind from outside against the formulas."""

import copy
import json
import pickle
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from saekit import Sae, SaeConfig
from saekit.registry import SELECTIONS, Registry
from saekit.sae import sae_losses, save_as_saelens
from saekit.sae.kernels import choose_kernels
from saekit.sae.selection import Selection
from saekit.sae.selection.batchtopk import BatchTopK
from saekit.sae.selection.topk import TopK
from tests.plugins import ABS_TOPK, loaded
from tests.sae.dense import away_from_the_start_, dense, gradients, tokens

N, D, M, K = 40, 12, 48, 3
SCALE = 1 / (N * 7.5)
KINDS = ("topk", "batchtopk", "groupmax", "abs_topk")


@pytest.fixture(autouse=True)
def abs_topk():
    with loaded(ABS_TOPK):
        yield


def make_sae(selection, kernels="cpu"):
    sae = Sae(D, M, K, selection=selection, generator=torch.Generator().manual_seed(1)).double()
    sae.chosen_kernels = choose_kernels(kernels, "fp32", torch.device("cpu"))
    return away_from_the_start_(sae, 0.5)


@pytest.mark.parametrize("kernels", ["eager", "cpu"])
@pytest.mark.parametrize("prefixes", [(), (6, 20, M)], ids=["", "matryoshka"])
def test_a_kind_from_outside_equals_the_formulas(kernels, prefixes):
    """AbsTopK: code, loss and gradients."""
    sae, x = make_sae("abs_topk", kernels), tokens(N, D)
    sae.prefixes = prefixes
    scores = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    code = scores * torch.zeros_like(scores).scatter(1, scores.abs().topk(K, dim=1).indices, 1.0)
    assert (code < 0).any()
    errors = [(x - code[:, :size] @ sae.W_dec[:size] - sae.b_dec).square().sum() * SCALE for size in prefixes or (M,)]
    out = sae(x)
    assert out.acts.shape == out.indices.shape == (N, K)
    assert out.fired.all()
    torch.testing.assert_close(dense(out.acts, out.indices, M), code)
    losses = sae_losses(x, out, scale=SCALE, auxk_alpha=0.0, num_dead=0)
    torch.testing.assert_close(losses.total, sum(errors))
    found, wanted = gradients(sae, losses.total), gradients(sae, sum(errors))
    for name in found:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-9, atol=1e-13, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", KINDS)
def test_encode_and_forward_agree_and_zeros_do_not_fire(kind):
    sae, x = make_sae(kind).eval(), tokens(2, 5, D)
    acts, indices = sae.encode(x)
    assert acts.shape == indices.shape == (2, 5, sae.max_active)
    torch.testing.assert_close(sae.decode(acts, indices), sae(x).recon)
    assert not sae.selection.fired(torch.zeros(3, 2)).any()
    assert sae.selection.fired(acts).equal(sae(x).fired)
    empty = sae(x[:0])
    assert empty.recon.shape == (0, 5, D)


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_make_the_same_sae_elsewhere(kind):
    sae, x = make_sae(kind), tokens(N, D)
    sizes = pickle.loads(pickle.dumps(sae.sizes()))  # as ranks send them to each other
    other = Sae(**sizes).double()
    other.load_state_dict(sae.state_dict())
    assert other.activation == kind
    assert torch.equal(other(x).recon, sae(x).recon)
    assert other.selection is not sae.selection
    assert kind in repr(sae)


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_gives_back_what_was_saved(kind, tmp_path):
    sae, x = make_sae(kind).float(), tokens(N, D)
    sae.selection.load_(BatchTopK(K, M, 0.1 + 0.2) if kind == "batchtopk" else sae.selection.clone())
    sae.save_to_disk(tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    assert config["activation"] == kind
    assert config.get("plugin") == ("abs_topk.py" if kind == "abs_topk" else None)
    assert torch.equal(Sae.load_from_disk(tmp_path)(x).recon, sae(x).recon)


def test_a_folder_of_an_unknown_kind_says_which_plug_in_made_it(tmp_path):
    make_sae("abs_topk").save_to_disk(tmp_path)
    SELECTIONS._registered.clear()
    with pytest.raises(
        ValueError,
        match=r"'abs_topk' is none of topk, .*: pass the file of its plug-in, abs_topk\.py, with --plugin",
    ):
        Sae.load_from_disk(tmp_path)


def test_the_page_about_extending_shows_a_kind_that_works():
    page = (ABS_TOPK.parents[1] / "docs" / "extending.md").read_text(encoding="utf-8")
    x, expected = tokens(N, D), make_sae("abs_topk")
    SELECTIONS._registered.clear()
    exec(page.split("```python\n")[1].split("```")[0], {"__name__": "their_file"})
    found = make_sae("abs_topk")
    assert type(found.selection) is not type(expected.selection)
    assert torch.equal(found(x).recon, expected(x).recon)
    assert found(x).fired.all()


def test_saelens_has_no_signed_values(tmp_path):
    with pytest.raises(ValueError, match="no architecture for abs_topk"):
        save_as_saelens(make_sae("abs_topk"), tmp_path)


def test_a_selection_is_for_one_size():
    with pytest.raises(ValueError, match=r"for k = 3 of 48 latents, not for k = 4 of 48"):
        Sae(D, M, 4, selection=TopK(3, M))
    for kind in KINDS:
        with pytest.raises(ValueError, match="k = 5 is larger than num_latents = 4"):
            SELECTIONS.get(kind)(5, 4)


def test_thresholds_move_without_a_look_from_the_host():
    """Principle: a step is a fixed graph."""
    with FakeTensorMode():
        selection = BatchTopK(4, 64, 0.5)
        counts = [torch.ones((), dtype=torch.int64) for _ in range(2)]
        acts = torch.rand(7, selection.max_active)
        selection.move_(*counts, selection.sums(acts).sum(0), 1.0)
    assert selection.threshold.shape == ()


def test_the_state_follows_the_parameters_but_keeps_its_type():
    sae = Sae(D, M, K, selection=BatchTopK(K, M, 0.1)).to("meta")
    assert sae.selection.threshold.is_meta
    assert Sae(D, M, K, selection=BatchTopK(K, M, 0.1)).half().selection.threshold.dtype == torch.float64
    own = Sae(D, M, K, selection=BatchTopK(K, M, 0.1))
    other = copy.deepcopy(own)
    other.selection.threshold.fill_(1.0)
    assert float(own.selection.threshold) == 0.1


class Shrinking(TopK):
    """TopK with a price on each value."""

    name = "shrinking"

    def penalty(self, acts, indices):
        return 0.5 * acts.sum(-1)


def test_a_kind_can_have_a_loss_of_its_own():
    sae, x = make_sae(Shrinking(K, M)), tokens(N, D)
    options = {"scale": SCALE, "auxk_alpha": 0.0, "num_dead": 0}
    out = sae(x)
    whole = sae_losses(x, out, **options)
    torch.testing.assert_close(whole.penalty, 0.5 * out.acts.sum() * SCALE)
    torch.testing.assert_close(whole.total, whole.mse + whole.penalty)
    pieces = sum(sae_losses(part, sae(part), **options).total for part in (x[:1], x[1:17], x[17:]))
    found, wanted = gradients(sae, pieces), gradients(sae, whole.total)
    for name in found:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-10, atol=1e-14)
    counted_N1 = torch.arange(N)[:, None] < 10
    few = sae_losses(x * counted_N1, out.masked(counted_N1), **options)
    torch.testing.assert_close(few.penalty, 0.5 * out.acts[:10].sum() * SCALE)
    assert sae.eval()(x).penalty is None


def test_an_installed_package_brings_kinds_along(tmp_path, monkeypatch):
    """By the entry points of its distribution, which is all that `pip install` leaves of them."""
    (tmp_path / "their_package.py").write_text(
        "from saekit.sae.selection.topk import TopK\n\n\nclass Theirs(TopK):\n    name = 'theirs'\n"
    )
    info = tmp_path / "their_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[saekit.selections]\ntheirs = their_package:Theirs\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("saekit.sae.selection.base.SELECTIONS", registry := Registry("saekit.selections", "s", {}))
    monkeypatch.setattr("saekit.sae.storage.SELECTIONS", registry)
    monkeypatch.setattr("saekit.sae.entries.SELECTIONS", registry)
    sae = Sae(D, M, K, selection="theirs")
    assert isinstance(sae.selection, Selection)
    sae.save_to_disk(tmp_path / "sae")
    assert json.loads((tmp_path / "sae" / "cfg.json").read_text())["plugin"] == "their_package:Theirs"
    assert Sae.load_from_disk(tmp_path / "sae").activation == "theirs"
    monkeypatch.delitem(sys.modules, "their_package")


def test_the_configuration_takes_every_kind():
    assert Sae(**SaeConfig(activation="abs_topk", k=4).sizes(8, 32)).activation == "abs_topk"
    with pytest.raises(ValueError, match="under abs_topk there is no code at 4k"):
        SaeConfig(activation="abs_topk", multi_topk=True)
    with pytest.raises(
        ValueError,
        match=r"'nosuch' is none of topk, batchtopk, groupmax, abs_topk: choose one of them, or name the file",
    ):
        SaeConfig(activation="nosuch")
    with pytest.raises(ValueError, match=r"it needs --plugin a\.py --plugin b\.py"):
        SaeConfig(activation="nosuch", plugin=["a.py", "b.py"])


def test_the_second_code_of_multi_topk_follows_the_selection():
    """Also what moves between steps: it is made of the selection as it is."""

    class Scaled(TopK):
        def __init__(self, k, num_latents):
            super().__init__(k, num_latents)
            self.factor = torch.ones(())

        def state(self):
            return {"factor": self.factor}

        def autoencode(self, *arguments, **options):
            rows, acts, indices = super().autoencode(*arguments, **options)
            return rows * self.factor, acts * self.factor, indices

        def wider(self):
            other = Scaled(4 * self.k, self.num_latents)
            other.factor = self.factor
            return other

    sae = Sae(8, 32, 2, selection=Scaled(2, 32), multi_topk=True).train()
    x = torch.randn(5, 8)
    before = sae(x).multi_recon - sae.b_dec
    sae.selection.factor = torch.tensor(3.0)
    torch.testing.assert_close(sae(x).multi_recon - sae.b_dec, 3 * before)
