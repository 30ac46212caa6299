"""Names that other tools give to options get an answer, and every option that an answer names exists."""

import re
from pathlib import Path

import pytest

import saekit
from saekit import UserError
from saekit.config.elsewhere import ANSWERS, OTHERWISE, RENAMED, answer, options_in
from saekit.config.flat import option_names
from saekit.config.run import PARTS
from tests.cli.conftest import build_once

SPARSIFY = """
    transcode skip_connection embed_skip gram_lookup loss_fn k_decay_steps hookpoints init_seeds distribute_modules
    distribute_latents log_to_wandb wandb_log_frequency shuffle_seed data_preprocessing_num_proc gram_table_path
    return_overflowed_tokens
"""
SAELENS = """
    model_name hook_name hook_layer hook_head_index dataset_path dataset_trust_remote_code streaming context_size d_in
    is_dataset_tokenized use_cached_activations cached_activations_path architecture d_sae b_dec_init_method
    activation_fn from_pretrained_path apply_b_dec_to_input n_batches_in_buffer training_tokens store_batch_size_prompts
    train_batch_size_tokens normalize_activations device act_store_device seed prepend_bos autocast autocast_lm
    compile_llm compile_sae adam_beta1 adam_beta2 mse_loss_normalization l1_coefficient lp_norm l1_warm_up_steps
    lr_scheduler_name lr_warm_up_steps lr_end lr_decay_steps feature_sampling_window dead_feature_window
    d_out hook_name_out hook_layer_out hook_head_index_out
    wandb_project wandb_entity wandb_log_frequency verbose n_eval_batches jumprelu_init_threshold jumprelu_bandwidth
    scale_sparsity_penalty_by_decoder_norm aux_loss_coefficient rescale_acts_by_decoder_norm checkpoint_path
"""
DICTIONARY_LEARNING = """
    activation_dim dict_size layer lm_name submodule_name steps warmup_steps decay_start sparsity_penalty l1_penalty
    dict_class trainer use_wandb save_steps log_steps n_ctxs refresh_batch_size out_batch_size threshold_beta
    threshold_start_step group_fractions resample_steps num_tokens bandwidth target_l0 remove_bos io
    num_layers same_init_for_all_layers norm_init_scale init_with_transpose encoder_layers code_normalization
"""


@pytest.fixture(scope="module")
def options():
    """The options of `saekit train`, as they are typed."""
    from typer.main import get_command

    from saekit.cli.app import app

    return {name for option in get_command(app).commands["train"].params for name in option.opts}


def test_every_option_that_is_named_exists(options):
    named = {option: text for text in ANSWERS.values() for option in options_in(text)}
    assert len(named) > 40
    assert {option: text for option, text in named.items() if option not in options} == {}


def test_no_option_of_ours_is_in_the_table(options):
    assert {name for name in ANSWERS if f"--{name}" in options} == set()


def test_no_name_stands_twice():
    names = " ".join([*RENAMED.values(), *OTHERWISE.values()]).split()
    assert sorted(names) == sorted(ANSWERS)


@pytest.mark.parametrize("names", [SPARSIFY, SAELENS, DICTIONARY_LEARNING], ids=["sparsify", "SAELens", "dictionary"])
def test_the_options_of_other_tools(names):
    ours = option_names(*PARTS)
    assert [name for name in names.split() if name not in ours and answer(name) is None] == []


PAGE = (Path(__file__).parents[2] / "docs" / "coming-from.md").read_text(encoding="utf-8")
ROWS = [line.split("|")[1:3] for line in PAGE.splitlines() if line.startswith("| `")]
CLASSES = {"MODEL", "DATASET", "CrossCoderTrainer"}


def test_the_page_names_options_that_exist_and_options_that_are_answered(options):
    ours = option_names(*PARTS)
    theirs = {name for left, _ in ROWS for name in re.findall(r"`([^`]+)`", left)}
    names = {name for each in theirs if "." not in each for name in each.split()} - CLASSES
    assert len(names) > 90
    assert [name for name in sorted(names) if name not in ours and answer(name) is None] == []
    assert {option for _, right in ROWS for option in options_in(right)} <= options
    assert set(SPARSIFY.split()) - {"embed_skip", "gram_lookup", "gram_table_path", "distribute_latents"} <= names | {
        "return_overflowed_tokens"
    }


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("--transcoder", "it is called --transcode here"),
        ("--crosscoder", "it is called --crosscode here"),
        ("--affine_skip", "it is called --skip-connection here"),
        ("--hook_name_out", "the input hookpoint and --writes the target"),
        ("--hook_layer_out", "the input hookpoint and --writes the target"),
        ("--norm_init_scale", "saekit has no equivalent"),
        ("--submodule", "--hookpoints"),
        ("--wandb", "--log-with wandb"),
        ("--log_to_wandb", "--log-with wandb"),
        ("--l1", "--k"),
        ("--epochs", "--max-tokens"),
        ("--device", "CUDA_VISIBLE_DEVICES"),
        ("--seed", "--init-seed sets the seed of the weights, --data-seed"),
        ("--hook_name", "--layers"),
        ("--d_sae", "it is called --num-latents here"),
        ("--D-SAE", "it is called --num-latents here"),
        ("--sae.d_sae", "it is called --num-latents here"),
        ("--no-wandb", "--log-with wandb"),
        ("--model", "MODEL is the first argument"),
        ("--learning-rate", "it is called --lr here"),
        ("--shuffle_seed", "it is called --data-seed here"),
        ("--init_seeds", "--init-seed"),
        ("--distribute_modules", "--placement layer-map"),
    ],
)
def test_on_the_command_line(saekit_main, name, says):
    code, line = saekit_main("train", "m", "d", name, "3")
    assert code == 2
    assert line.startswith(f"Error: there is no option {name.replace('_', '-')}: ")
    assert says in line
    assert line.endswith("; see saekit train --help")


def test_a_misspelt_option_of_ours_gets_the_nearest(saekit_main):
    code, line = saekit_main("train", "m", "d", "--batch-siz", "3")
    assert code == 2
    assert "--batch-size" in line


def test_other_commands_answer_if_they_have_the_option(saekit_main):
    assert "it is called --max-tokens here" in saekit_main("eval", "r", "--num-tokens", "5")[1]
    assert "--num-latents" not in saekit_main("eval", "r", "--d-sae", "5")[1]


def test_in_python_and_yaml_without_dashes(tmp_path):
    with pytest.raises(UserError, match=r"^there is no option 'd_sae': it is called num_latents here$"):
        saekit.train("m", "d", d_sae=5)
    (tmp_path / "run.yaml").write_text("seed: 3\n")
    with pytest.raises(UserError, match="'seed': init_seed sets the seed of the weights, data_seed that of the order"):
        saekit.TrainConfig.from_yaml(tmp_path / "run.yaml")


@pytest.fixture
def saekit_main(monkeypatch, capsys):
    """Run the command line in this process; returns the exit code and the line on stderr."""
    import sys

    from saekit.cli import main

    build_once(monkeypatch)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["saekit", *arguments])
        with pytest.raises(SystemExit) as leaving:
            main()
        (line,) = capsys.readouterr().err.splitlines()
        return leaving.value.code, line

    return call
