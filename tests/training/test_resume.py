"""A run that stops and goes on ends where the uninterrupted one does, bit for bit."""

import json
import shutil
from dataclasses import replace
from itertools import product

import pytest
import torch

from saekit import Sae, SaeConfig, UserError
from saekit.errors import Interrupted
from saekit.placement import Single
from saekit.placement.failure import one_error
from saekit.runs.folder import way_on
from saekit.runs.layout import FORMAT
from saekit.runs.lease import Writer, write_lease
from saekit.runs.locate import locate
from saekit.runs.recovery import find_checkpoint
from tests.training.conftest import KINDS, Recorder, StopAfter
from tests.training.runs import assert_same_tensors, metrics_of, tensors_of

REFERENCE_RECIPE = {
    "init": "uniform",
    "decoder_lr_ratio": 1.0,
    "beta2": 0.999,
    "scale_biases": False,
    "auxk_relative_to": "variance",
    "encoder_bias_lr_ratio": 1.0,
    "revive_alpha": 0.0,
    "max_norm_multiple": 0.0,
}
"""Without what is set in `SaeConfig`."""


RECIPES = {"defaults": {"auxk_relative_to": "residual"}, "reference": REFERENCE_RECIPE}
SAES = product(["mixed"], ["adam", "signum", "muon"], [2, 5], RECIPES, ["topk"])


@pytest.mark.parametrize(
    ("kind", "optimizer", "stop_at", "recipe", "activation"),
    [
        *SAES,
        ("transcoder", "adam", 2, "defaults", "topk"),
        ("transcoder", "signum", 5, "defaults", "batchtopk"),
        ("transcoder", "muon", 5, "reference", "topk"),
        ("crosscoder", "adam", 5, "defaults", "batchtopk"),
        ("crosscoder", "signum", 2, "reference", "topk"),
        ("crosscoder", "muon", 2, "defaults", "topk"),
    ],
)
def test_interrupted_and_resumed_equals_uninterrupted(
    make_trainer, tmp_path, kind, optimizer, stop_at, recipe, activation
):
    options, of_sae = KINDS[kind]
    options = {"grad_acc_steps": 2, "batch_size": 4, "dead_feature_threshold": 100, **RECIPES[recipe], **options}
    sae = SaeConfig(num_latents=64, k=4, activation=activation, **of_sae)
    options |= {"optimizer": optimizer, "sae": sae}
    whole = make_trainer("whole", **options).fit()
    with pytest.raises(Interrupted) as stopped:
        make_trainer("parts", reporter=StopAfter(stop_at), **options).fit()
    assert stopped.value.step == stop_at
    assert (tmp_path / "parts" / "latest").resolve().name == f"step_{stop_at:08d}"
    watcher = Recorder()
    resumed = make_trainer("parts", resume=True, reporter=watcher, **options).fit()
    assert [stats.step for stats in watcher.steps] == list(range(stop_at + 1, 8))
    assert watcher.infos[0].start_step == stop_at
    assert_same_tensors(tensors_of(resumed), tensors_of(whole))
    assert metrics_of(tmp_path / "parts") == metrics_of(tmp_path / "whole")


def test_resume_of_a_finished_run_changes_nothing(make_trainer, tmp_path):
    whole = make_trainer().fit()
    before = tensors_of(whole)
    again = make_trainer(resume=True).fit()
    assert again == whole
    assert_same_tensors(tensors_of(again), before)


def test_changed_maths_is_refused_and_listed_and_harmless_changes_are_not(make_trainer):
    make_trainer().fit()
    with pytest.raises(UserError) as refused:
        make_trainer(resume=True, lr=0.5, auxk_alpha=0.0, save_every=3).fit()
    message = str(refused.value)
    assert "--lr was 0.01 and is 0.5" in message
    assert "--auxk-alpha was 0.03125 and is 0.0" in message
    assert "save-every" not in message
    make_trainer(resume=True, save_every=3, micro_acc_steps=2, log_every=2).fit()


@pytest.mark.parametrize("other", [FORMAT - 1, FORMAT + 1])
def test_only_todays_format_is_gone_on_from(make_trainer, other):
    file = make_trainer().fit() / "checkpoint.json"
    file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), "format": other}), encoding="utf-8")
    with pytest.raises(
        UserError, match=f"has format {other}, and this version of saekit resumes only from format {FORMAT}"
    ):
        make_trainer(resume=True).fit()


def test_the_index_says_what_it_should(make_trainer, tmp_path):
    checkpoint = make_trainer().fit()
    index = json.loads((checkpoint / "checkpoint.json").read_text())
    assert (index["step"], index["serial"], index["format"]) == (7, 1, FORMAT)
    assert index["schedule"]["total_steps"] == 7
    assert index["schedule"]["lr_of_last_step"] == metrics_of(checkpoint.parent)[-1]["learning_rate"]
    assert index["data"]["next_sequence"] == index["data"]["sequences"]
    assert index["seeds"] == {"init": 0, "data": 42}
    assert index["hookpoints"] == ["layers.0", "layers.1", "layers.2"]
    assert index["excluded_tokens"] == [0, 1]
    assert index["config"]["k"] == 4
    assert index["versions"]["torch"]
    on_disk = {f.relative_to(checkpoint).as_posix() for f in checkpoint.rglob("*") if f.is_file()} - {"checkpoint.json"}
    assert set(index["files"]) == on_disk
    assert not [name for name in on_disk if name.endswith((".pt", ".bin", ".pkl"))]


@pytest.mark.parametrize("file", ["layers.1/state.safetensors", "layers.0/sae.safetensors", "layers.2/cfg.json"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "changed"])
def test_a_damaged_checkpoint_is_named(make_trainer, file, damage):
    checkpoint = make_trainer().fit()
    target = checkpoint / file
    content = target.read_bytes()
    if damage == "missing":
        target.unlink()
    else:
        target.write_bytes(content[:-10] if damage == "truncated" else content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match=file):
        make_trainer(resume=True).fit()


def test_weights_that_are_not_finite_are_not_saved(make_trainer, tmp_path):
    class Spoils(Recorder):
        def step(self, stats):
            if stats.step == 4:
                with torch.no_grad():
                    trainer.placement.sae("layers.1").W_enc[3, 2] = float("nan")

    trainer = make_trainer(save_every=2, reporter=Spoils())
    with pytest.raises(UserError, match=r"layers\.1: NaN or Inf in the SAE's weights at step 4"):
        trainer.fit()
    assert (tmp_path / "run" / "latest").resolve().name == "step_00000002"
    assert not list((tmp_path / "run").glob(".step*"))


def test_going_back_to_an_earlier_checkpoint_keeps_what_is_written_then(make_trainer, tmp_path):
    """A higher-numbered checkpoint from before is neither counted as the newest nor deleted for nothing."""
    make_trainer(save_every=3, keep_last=9).fit()
    run = tmp_path / "run"
    assert sorted(path.name[-1] for path in run.glob("step_*")) == ["3", "6", "7"]
    with pytest.raises(Interrupted):
        make_trainer(resume=run / "step_00000003", keep_last=1, reporter=StopAfter(5)).fit()
    assert (run / "latest").resolve().name == "step_00000005"
    assert (run / "latest" / "checkpoint.json").is_file()
    assert sorted(path.name[-1] for path in run.glob("step_*")) == ["5", "6", "7"]
    # Without its link, it is still the newest, for those who look at it as for those who go on from it.
    (run / "latest").unlink()
    assert locate(run).checkpoint == find_checkpoint(run).folder == run / "step_00000005"
    resumed = make_trainer(resume=True).fit()
    assert_same_tensors(tensors_of(resumed), tensors_of(make_trainer("whole").fit()))


def test_a_copy_that_a_user_has_put_next_to_the_checkpoints_is_none_of_them(make_trainer, tmp_path):
    make_trainer(save_every=3, keep_last=1).fit()
    run = tmp_path / "run"
    shutil.copytree(run / "step_00000007", run / "step_00000007.good")
    assert find_checkpoint(run).folder == run / "step_00000007"
    (run / "latest").unlink()
    assert locate(run).checkpoint == run / "step_00000007"
    make_trainer(resume=run / "step_00000007", keep_last=1).fit()
    assert (run / "step_00000007.good" / "checkpoint.json").is_file()


def test_a_run_whose_folder_was_taken_over_writes_nothing_more(make_trainer, tmp_path):
    class IsTakenForDead(Recorder):
        def step(self, stats):
            if stats.step == 4:
                write_lease(tmp_path / "run" / ".lock", replace(Writer.here(), host="node7"))

    with pytest.raises(UserError, match=r"another process has taken over the run folder .*run,"):
        make_trainer(save_every=2, reporter=IsTakenForDead()).fit()
    assert [folder.name for folder in (tmp_path / "run").glob("*step*")] == ["step_00000002"]


class TwoRanks(Single):
    """The one that is left of two."""

    world_size = 2


@pytest.mark.parametrize(
    ("found", "way"),
    [
        ("nothing", "it has no checkpoint yet: start it again"),
        ("config.yaml", "it has no checkpoint yet: start it again with --overwrite"),
        ("step_00000003", "--resume {run} continues from the last checkpoint"),
    ],
)
def test_only_a_run_with_a_checkpoint_is_said_to_go_on(tmp_path, found, way):
    run = tmp_path / "run"
    if found != "nothing":
        (run / found).mkdir(parents=True)
    with pytest.raises(UserError) as ended, one_error(TwoRanks(torch.device("cpu")), lambda: way_on(run)):
        raise RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer")
    assert str(ended.value).endswith(f"; {way.format(run=run)}")


def test_last_words_promise_what_is_there(make_trainer, tmp_path, capfd):
    trainer, way = make_trainer(), f"; --resume {tmp_path / 'run'} continues from the last checkpoint\n"
    trainer._last_words("SIGTERM came")
    assert capfd.readouterr().err.endswith("Error: SIGTERM came; it has not saved a checkpoint yet\n")
    trainer.fit()
    for each in (trainer, make_trainer(resume=True)):
        each._last_words("SIGTERM came")
        assert capfd.readouterr().err.endswith(way)


def test_last_words_are_those_of_the_first_rank(make_trainer, monkeypatch, capfd):
    """Which tells the others, on machines where no signal may have come."""
    monkeypatch.setattr(Single, "first_to_fail", lambda self: False)
    make_trainer()._last_words("SIGTERM came")
    assert capfd.readouterr().err == ""


class FailsToStart(Recorder):
    """A tracker without a login, say."""

    def start(self, info):
        raise UserError("--log-with: no login")


def test_a_run_that_fails_to_start_leaves_nothing_and_puts_the_old_one_back(make_trainer, tmp_path):
    with pytest.raises(UserError, match="no login"):
        make_trainer("fresh", reporter=FailsToStart()).fit()
    assert not (tmp_path / "fresh").exists()
    before = tensors_of(make_trainer("old").fit())
    with pytest.raises(UserError, match="no login"):
        make_trainer("old", overwrite=True, init_seed=3, reporter=FailsToStart()).fit()
    assert_same_tensors(tensors_of(tmp_path / "old" / "latest"), before)
    with pytest.raises(UserError, match="no login"):
        make_trainer("old", resume=True, reporter=FailsToStart()).fit()
    assert_same_tensors(tensors_of(tmp_path / "old" / "latest"), before)
    make_trainer("old", overwrite=True, init_seed=3).fit()
    assert not list(tmp_path.glob(".*"))
    assert not list((tmp_path / "old").glob(".*"))


def test_a_linked_run_folder_is_replaced_behind_the_link(make_trainer, tmp_path):
    (tmp_path / "scratch").mkdir()
    (tmp_path / "run").symlink_to("scratch")
    make_trainer().fit()
    make_trainer(overwrite=True).fit()
    assert (tmp_path / "run").is_symlink()
    assert (tmp_path / "scratch" / "latest" / "checkpoint.json").is_file()


def test_a_folder_with_a_config_of_its_own_is_not_a_run(make_trainer, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("mine: true")
    with pytest.raises(UserError, match="does not look like a run"):
        make_trainer(overwrite=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        make_trainer("file")


def test_what_the_defaults_came_to_is_kept_apart(make_trainer):
    checkpoint = make_trainer(lr=None, lr_warmup_steps=None).fit()
    index = json.loads((checkpoint / "checkpoint.json").read_text())
    assert "lr" not in index["config"]
    assert index["resolved"]["lr"] == pytest.approx(1.75e-3 * (2**14 / 64 * 128 / 16) ** 0.5)
    assert index["resolved"] == {**index["resolved"], "lr_warmup_steps": 2, "num_latents": 64, "d_in": 16}


def test_layers_are_saved_one_at_a_time(make_trainer, monkeypatch):
    """Copies of every layer at once would be a second model in memory."""
    order = []
    save, whole = Sae.save_to_disk, type(make_trainer("x").placement).whole
    monkeypatch.setattr(Sae, "save_to_disk", lambda *a: (order.append("write"), save(*a)))
    monkeypatch.setattr(
        "saekit.placement.Single.whole", lambda self, name: (order.append("make"), whole(self, name))[1]
    )
    make_trainer(optimizer="signum").fit()
    assert order == ["make", "write"] * 3


def test_the_files_of_a_checkpoint_are_not_needed_once_it_is_loaded(make_trainer, tmp_path):
    """Tensors that a file is mapped to would change with it, and take the process along if a network disk is lost."""

    class Overwrites(Recorder):
        def start(self, info):
            if info.start_step:
                for file in (tmp_path / "run" / "step_00000003").rglob("*.safetensors"):
                    with file.open("r+b") as stream:
                        stream.write(bytes(file.stat().st_size))

    with pytest.raises(Interrupted):
        make_trainer(reporter=StopAfter(3)).fit()
    resumed = make_trainer(resume=True, reporter=Overwrites()).fit()
    assert_same_tensors(tensors_of(resumed), tensors_of(make_trainer("whole").fit()))
