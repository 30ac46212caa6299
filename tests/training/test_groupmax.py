"""GroupMax in training: what is trained is saved and read again."""

import pytest
import torch

from saekit import Sae, SaeConfig, UserError
from saekit.errors import Interrupted
from tests.training.conftest import Recorder, StopAfter
from tests.training.runs import assert_same_tensors, tensors_of

GROUPMAX = SaeConfig(num_latents=64, k=4, activation="groupmax")


def test_what_is_saved_keeps_one_latent_of_each_group(make_trainer):
    watcher = Recorder()
    saes = Sae.load_many(make_trainer(sae=GROUPMAX, reporter=watcher, lr=0.01).fit())
    for sae in saes.values():
        _, indices = sae.encode(torch.randn(50, sae.d_in))
        assert torch.equal(indices // 16, torch.arange(4).expand(50, 4))
    for name in saes:
        first, *_, last = (stats.layers[name] for stats in watcher.steps)
        assert last.fvu < first.fvu
        assert 3 < last.l0 <= 4, "a group may have nothing positive"


def test_interrupted_and_resumed_equals_uninterrupted(make_trainer):
    whole = make_trainer("whole", sae=GROUPMAX).fit()
    with pytest.raises(Interrupted):
        make_trainer("parts", sae=GROUPMAX, reporter=StopAfter(3)).fit()
    assert_same_tensors(tensors_of(make_trainer("parts", sae=GROUPMAX, resume=True).fit()), tensors_of(whole))
    with pytest.raises(UserError, match="--activation was groupmax and is topk"):
        make_trainer("parts", sae=SaeConfig(num_latents=64, k=4), resume=True).fit()
