"""What the questions take, refuse, find out and write; nobody is at a terminal."""

import io
import json
import shutil

import numpy as np
import pytest
import yaml
from datasets import Dataset, DatasetDict
from rich.console import Console

from saekit.config import RunConfig
from saekit.errors import UserError
from saekit.planning import Machine
from saekit.units import parse_count, show_count
from saekit.wizard import files_of, start, start_command, write_files
from saekit.wizard.ask import show
from saekit.wizard.sizes import BATCH
from tests.wizard.conftest import BACK, ENTER

ALL = ("resid", "all")
"""Hookpoints and layers."""
SIZES = ("64 latents", "4", "32")
"""Dictionary, k, context."""


@pytest.fixture
def several_columns(tmp_path):
    file = tmp_path / "several.jsonl"
    rows = [{"title": "short", "body": "much longer than the title", "year": 1900 + n} for n in range(50)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_a_run_in_one_process(answer, model_dir, text_file, targets):
    draft, asker = answer("1", str(model_dir), str(text_file), "resid", "even", *SIZES, "2k", "4")
    assert [key for key, _ in asker.asked] == [
        "machine", "model", "dataset", "hookpoints", "layers", "dictionary", "k", "ctx_len", "max_tokens", "batch_size",
        "run", "confirm",
    ]  # fmt: skip
    assert asker.told["model"] == ["Llama: 3 layers of width 16, reads up to 64 tokens"]
    rows = asker.told["dataset"]
    assert rows[0] == "Columns text, id; the text is in text"
    assert len(rows) == 3
    assert rows[1].startswith("│ a")
    assert asker.told["layers"] == ["2 of 3, one SAE per layer"]
    assert asker.told["hookpoints"] == ["3 SAEs of width 16: layers.{0-2}"]
    files = files_of(draft)
    assert list(files) == [targets.run]
    name = f"{model_dir.name}-text.jsonl"
    assert yaml.safe_load(files[targets.run]) == {
        "model": str(model_dir), "dataset": str(text_file), "layers": "0-2:2", "num_latents": 64, "k": 4,
        "ctx_len": 32, "max_tokens": 2000, "batch_size": 4, "save_dir": "checkpoints", "run_name": name,
    }  # fmt: skip
    assert start_command(draft) == ["saekit", "train", "--config", str(targets.run)]
    assert not targets.run.exists()  # until it is told to


@pytest.mark.parametrize(
    ("options", "coders", "latents"),
    [
        ({"transcode": True}, "one transcoder per layer", "32 latents in each transcoder"),
        ({"hookpoints": "mlp", "transcode": True}, "one transcoder per layer", "32 latents in each transcoder"),
        ({"crosscode": "resid"}, "1 crosscoder", "96 latents in each crosscoder"),
        ({"crosscode_models": ""}, "one crosscoder per layer", "64 latents in each crosscoder"),
    ],
)
def test_other_coders_are_called_by_their_names(answer, model_dir, text_file, options, coders, latents):
    # What the others say cannot be an answer.
    first = {"transcode": ("transcoders",), "crosscode_models": ("resid",)}.get("".join(options), ())
    options = {name: value or str(model_dir) for name, value in options.items()}
    draft, asker = answer("1", str(model_dir), str(text_file), *first, "all", "2x", "4", "32", "2k", "4", **options)
    assert asker.told["layers"] == [f"3 of 3, {coders}"]
    assert asker.told["dictionary"] == [latents]
    assert draft.config().train.coder in asker.explained["dictionary"]


def test_a_kind_that_is_typed_takes_the_place_of_the_files(model_dir, targets):
    targets.run.parent.mkdir(parents=True, exist_ok=True)
    targets.run.write_text("crosscode: resid\n")
    assert start({"transcode": True}, targets).config().train.coder == "transcoder"
    targets.run.write_text("crosscode_models: other\nhookpoints: mlp\n")
    assert start({"transcode": True}, targets).config().train.crosscode_models is None
    assert start({"crosscode_models": "another"}, targets).config().train.hookpoints == ("mlp",)
    targets.run.write_text("transcode: true\nhookpoints: mlp\n")
    assert start({"hookpoints": "attn"}, targets).config().train.transcode is True
    typed = {"reads": "mlp:in", "writes": "mlp"}
    assert start(typed, targets).config().train.hookpoints is None


def test_wrong_answers_are_told_as_train_tells_them(answer, model_dir, text_file):
    _, asker = answer(
        *("none", "0x80GiB", "8x", "1"),
        *("", "./no-such-model", str(model_dir)),
        *("", "no-such.jsonl", str(text_file)),
        *("mlpx", "layers.{0", "transcoders"),
        *("0-9", "x", "1"),
        *("many", "7", "0x", "64 latents"),
        *("65", "k", "0", "4"),
        *("65", "1", "32"),
        *("5M tokens", "1.5", "16", "64"),
        *("0", "4", "2"),
    )
    said = [(key, problem) for key, _, problem in asker.problems]
    for number, (key, part) in enumerate(
        [
            ("machine", "--num-processes 'none': expected a number such as 2, or 8x80GiB"),
            ("machine", "--num-processes '0x80GiB'"),
            ("machine", "--num-processes '8x'"),
            ("model", "MODEL is missing"),
            ("model", "model './no-such-model': there is no such folder"),
            ("dataset", "DATASET is missing"),
            ("dataset", "data set 'no-such.jsonl': there is no such file or folder"),
            ("hookpoints", "--hookpoints mlpx: there is no such module"),
            ("hookpoints", "--hookpoints layers.{0: braces are unbalanced or nested"),
            ("layers", "--layers 3,4,5,6,7,8,9: out of range; the model has 3 layers, 0 to 2"),
            ("layers", "--layers 'x': expected numbers and ranges"),
            ("dictionary", "dictionary size 'many': expected a whole number"),
            ("dictionary", "7 is less than the width 16: write 7x for 7 latents per dimension, or 7 latents"),
            ("dictionary", "dictionary size '0'"),
            ("k", "--k 65 is larger than the dictionary of 64 latents"),
            ("k", "--k 'k'"),
            ("k", "--k '0'"),
            ("ctx_len", "--ctx-len 65 is more than the 64 tokens that this model can read"),
            ("ctx_len", "--ctx-len 1: "),
            ("max_tokens", "--max-tokens '5M tokens': expected a whole number"),
            ("max_tokens", "--max-tokens '1.5'"),
            ("max_tokens", "--max-tokens 16 is less than one sequence of 32"),
            ("batch_size", "--batch-size '0'"),
            ("batch_size", "--max-tokens 64 is 2 sequences of 32, fewer than one optimizer step of 4"),
        ]
    ):
        assert said[number][0] == key
        assert part in said[number][1]
    assert len(said) == number + 1


def test_several_processes_get_a_launch_file_and_a_placement(answer, model_dir, text_file, targets):
    for placement, kind in (("ddp", "MULTI_GPU"), ("layer-map", "MULTI_GPU"), ("zero3", "DEEPSPEED")):
        draft, asker = answer("3", str(model_dir), str(text_file), *ALL, *SIZES, "all", "2", "ddp2", placement)
        assert asker.problems == [
            ("placement", "ddp2", "--placement ddp2 is not possible with 3 ranks: choose one of ddp, layer-map, zero3")
        ]
        said = yaml.safe_load(files_of(draft)[targets.launch])
        assert (said["num_processes"], said["distributed_type"]) == (3, kind)
        assert said["gpu_ids"] == "-1,-1"
        assert said["mixed_precision"] == "no"
        assert (said.get("mpirun_config") == {"role": "layer-map"}) == (placement == "layer-map")
        assert "placement" not in yaml.safe_load(files_of(draft)[targets.run])
        assert start_command(draft)[-2:] == ["--launch", str(targets.launch)]


def test_the_recommended_placement_is_the_default_and_gpus_can_be_elsewhere(answer, model_dir, text_file, targets):
    draft, asker = answer("8x80GiB", str(model_dir), str(text_file), *ALL, *SIZES, "all", "2")
    assert draft.machine == Machine("cuda", 8, 80 * 2**30, "GPU of 80GiB")
    assert dict(asker.asked)["placement"] == draft.plan.recommended.placement == draft.placement
    said = yaml.safe_load(files_of(draft)[targets.launch])
    assert said["num_processes"] == 8
    assert "gpu_ids" not in said
    assert said["use_cpu"] is False


def test_what_does_not_fit_is_marked_and_not_offered_first(answer, model_dir, text_file):
    sizes = ("250000x", "4", "32", "all", "1")
    draft, asker = answer("2x6.5GiB", str(model_dir), str(text_file), *ALL, *sizes, "ddp")
    fits = {each.placement: each.fits for each in draft.plan.choices}
    assert fits["ddp"] is False
    assert dict(asker.asked)["placement"] != "ddp"
    assert asker.told["placement"] == ["The plan says that it does not fit."]
    assert "ddp (does not fit): every process holds all SAEs; " in asker.explained["placement"]
    assert f"{dict(asker.asked)['placement']} (recommended): each holds" in asker.explained["placement"]


def test_an_earlier_run_yaml_gives_the_defaults_and_keeps_what_is_not_asked(answer, model_dir, text_file, targets):
    sizes = ("8x", "3", "16", "4096", "2")
    answers = ("2", str(model_dir), str(text_file), "transcoders", "0,2", *sizes, "zero3", "runs/mine")
    first, _ = answer(*answers)
    write_files(files_of(first))
    with targets.run.open("a") as file:
        file.write("lr: 0.003  # mine\nsave-every: 7\n")
    again, asker = answer()
    assert [default for _, default in asker.asked] == [*answers, "yes"]
    assert yaml.safe_load(files_of(again)[targets.run]) == {
        **yaml.safe_load(files_of(first)[targets.run]), "lr": 0.003, "save_every": 7,
    }  # fmt: skip
    assert files_of(again)[targets.launch] == files_of(first)[targets.launch]
    assert f"{targets.run} (replaces the existing file and removes its comments)" in asker.told["run"]
    assert f"{targets.launch} (replaces the existing file): zero3 on 2 processes" in asker.told["run"]


def test_what_was_typed_goes_over_the_file_and_is_written(answer, model_dir, text_file, targets):
    targets.run.write_text(
        f"model: {model_dir}\ndataset: gone\nnum_latents: 64\nk: 4\nplacement: ddp\nlayer_stride: 2\n"
    )
    draft, asker = answer(
        processes="2", dataset=str(text_file), expansion_factor="8", placement="zero3", layers="1", grad_acc_steps="2"
    )
    defaults = dict(asker.asked)
    assert (defaults["dictionary"], defaults["k"], defaults["layers"]) == ("8x", "4", "1")
    assert (defaults["machine"], defaults["placement"]) == ("2", "zero3")
    written = yaml.safe_load(files_of(draft)[targets.run])
    assert (written["expansion_factor"], written["grad_acc_steps"], written["layers"]) == (8, 2, "1")
    assert {"num_latents", "layer_stride", "placement"}.isdisjoint(written)
    RunConfig.from_flat(written)


def test_another_data_set_drops_what_belonged_to_the_one_before(answer, model_dir, text_file, targets):
    targets.run.write_text(f"model: {model_dir}\ndataset: other\nsplit: test\ntext_column: body\nmax_examples: 9\n")
    draft, _ = answer("1", str(model_dir), str(text_file), *ALL, *SIZES)
    written = yaml.safe_load(files_of(draft)[targets.run])
    assert {"split", "text_column"}.isdisjoint(written)
    assert written["max_examples"] == 9


def test_the_column_is_asked_for_only_where_there_is_a_choice(answer, model_dir, several_columns, tmp_path):
    start_of_it = ("1", str(model_dir))
    draft, asker = answer(*start_of_it, str(several_columns), "year", "title", *ALL, *SIZES, "all", "1")
    assert dict(asker.asked)["text_column"] == "body"  # the longer one
    assert asker.problems == [("text_column", "year", "--text-column 'year': the columns with text are title, body")]
    assert draft.values["text_column"] == "title"
    assert asker.told["text_column"][1] == "│ short"
    one = tmp_path / "one.jsonl"
    one.write_text('{"content": "some text", "n": 1}\n')
    draft, asker = answer(*start_of_it, str(one), *ALL, *SIZES, "all", "1")
    assert "text_column" not in dict(asker.asked)
    assert draft.values["text_column"] == "content"
    none = tmp_path / "none.jsonl"
    none.write_text('{"n": 1}\n')
    _, asker = answer(*start_of_it, str(none), str(one), *ALL, *SIZES, "all", "1")
    assert asker.problems[0][2] == "no column has text or the name input_ids, only n: give other data"


def test_the_split_is_asked_for_only_where_there_is_no_train(answer, model_dir, tmp_path):
    rows = Dataset.from_dict({"text": ["some text that is long enough"] * 20})
    DatasetDict(dev=rows, test=rows).save_to_disk(tmp_path / "d")
    draft, asker = answer("1", str(model_dir), str(tmp_path / "d"), "train", "dev[:50%]", *ALL, *SIZES, "all", "1")
    assert ("split", "train") in asker.asked
    assert "no such split; the data set has dev, test" in asker.problems[0][2]
    assert draft.values["split"] == "dev[:50%]"
    assert asker.told["split"][0] == "20 rows, columns text; the text is in text"
    assert "split" not in dict(answer("1", str(model_dir), str(tmp_path / "d"), split="test")[1].asked)


def test_token_ids_are_shown_as_text_and_held_against_the_vocabulary(answer, model_dir, tmp_path):
    Dataset.from_dict({"input_ids": [[65, 66, 67, 68] * 16] * 8}).save_to_disk(tmp_path / "ids")
    Dataset.from_dict({"input_ids": [[65, 50000] * 32] * 8}).save_to_disk(tmp_path / "foreign")
    np.arange(60, 90, dtype=np.uint16).tofile(tmp_path / "ids.bin")
    _, asker = answer(
        *("1", str(model_dir), str(tmp_path / "foreign"), str(tmp_path / "ids"), BACK, str(tmp_path / "ids.bin")),
        *(*ALL, *SIZES, "all", "1"),
    )
    assert "token id 50,000, but the model knows 257 tokens" in asker.problems[0][2]
    assert asker.told["dataset"][0] == "Columns input_ids: already tokenized"
    assert asker.told["dataset"][1].startswith("│ 60 61 62 63 64 65 66 67 … = '")


def test_token_ids_of_another_type_and_a_model_without_a_tokenizer(answer, model_dir, tmp_path, text_file):
    bare = shutil.copytree(
        model_dir, tmp_path / "bare", ignore=lambda folder, names: [n for n in names if "token" in n]
    )
    ids = np.random.default_rng(0).integers(1, 250, 4000)
    for dtype in ("uint16", "uint32"):
        ids.astype(dtype).tofile(tmp_path / f"{dtype}.bin")
    ways = [str(text_file), str(tmp_path / "uint32.bin"), str(tmp_path / "uint16.bin")]
    _, asker = answer("1", str(bare), *ways, *ALL, *SIZES, "all", "1")
    assert "is text, but the model has no tokenizer" in asker.problems[0][2]
    assert "looks like uint32, but is read as uint16" in asker.problems[1][2]
    shown = " ".join(str(each) for each in ids[:8])
    assert asker.told["dataset"][1] == f"│ {shown} …"


def test_going_back_over_a_choice_that_changes_the_questions(answer, model_dir, text_file, targets):
    ways = ["2", BACK, "1", str(model_dir), str(text_file), *ALL, *SIZES, BACK, BACK, BACK, "32x", "513", ENTER, ENTER]
    draft, asker = answer(*ways, "all", "2")
    assert [key for key, _, problem in asker.problems if "--k 513 is larger than the dictionary of 512" in problem]
    assert "placement" not in dict(asker.asked)
    assert draft.values["expansion_factor"] == 32
    assert "num_latents" not in draft.values
    assert draft.values["k"] == 4  # offered again, and taken


def test_a_folder_that_is_taken_is_refused_and_another_offered(answer, model_dir, text_file, tmp_path):
    taken = tmp_path / "checkpoints" / f"{model_dir.name}-text.jsonl"
    taken.mkdir(parents=True)
    (taken / "metrics.jsonl").touch()
    beginning = ("1", str(model_dir), str(text_file), *ALL, *SIZES, "all", "2")
    draft, asker = answer(*beginning, f"checkpoints/{taken.name}", ENTER)
    assert "already exists: --resume continues it" in asker.problems[0][2]
    assert draft.values["run_name"] == f"{taken.name}-2"


def test_kept_options_that_fit_no_placement_are_named(answer, model_dir, text_file, targets):
    targets.run.write_text("layer_map: 0-2:0\n")
    _, asker = answer("1", "2", str(model_dir), str(text_file), *ALL, *SIZES, "all", "2")
    assert "--layer-map has no meaning with one process" in asker.problems[0][2]
    targets.run.write_text("optimizer: muon\nshard_lm: true\n")
    with pytest.raises(AssertionError, match="no placement on 2 ranks supports the other options"):
        answer("2", str(model_dir), str(text_file), *ALL, *SIZES, "all", "2")


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("kk: 4\n", "there is no option 'kk'"),
        ("k: 0\n", "--k 0: "),
        ("- 1\n", "expected lines such as"),
        ("a: [\n", "not valid YAML"),
    ],
)
def test_a_run_yaml_that_cannot_be_used_is_left_alone(targets, content, part):
    targets.run.write_text(content)
    with pytest.raises(UserError, match=part):
        start({}, targets)
    assert targets.run.read_text() == content


def test_a_launch_file_of_somebody_elses_gives_no_defaults(answer, model_dir, text_file, targets):
    for content in ("[1, 2]\n", "\x00", "num_processes: many\ndistributed_type: X\n", "num_processes: 4\n"):
        targets.launch.write_text(content)
        _, asker = answer("1", str(model_dir), str(text_file), *ALL, *SIZES)
        assert asker.asked[0] == ("machine", "1")


def test_secrets_are_not_written(answer, model_dir, text_file, targets):
    draft, asker = answer("1", str(model_dir), str(text_file), *ALL, *SIZES, hf_token="hf_secret")
    assert "hf_secret" not in files_of(draft)[targets.run]
    assert "hf_token is not written: give --hf-token again, or set HF_TOKEN" in asker.told["run"]


def test_both_files_or_none(tmp_path):
    (tmp_path / "b").mkdir()
    with pytest.raises(UserError, match=r"b cannot be written \(Is a directory\)"):
        write_files({tmp_path / "b": "2"})
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_files({tmp_path / "a": "1", blocked / "b": "2"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "file"]


def test_counts():
    for text in ("100M", "1e8", "100,000,000", "100_000_000", "100 m", "0.1B", "100000k"):
        assert parse_count("--x", text) == 10**8
    assert [show_count(number) for number in (10**8, 3 * 10**9, 1500, 1_000_001)] == ["100M", "3B", "1500", "1000001"]
    for text in ("", "x", "0", "-5", "1.5", "1,00", "1e", "nan"):
        with pytest.raises(UserError, match="--x"):
            parse_count("--x", text)


def test_where_nothing_fits_there_is_advice_and_the_smallest_is_offered(answer, model_dir, text_file):
    draft, asker = answer("2x1.5GiB", str(model_dir), str(text_file), *ALL, "250000x", "4", "32", "all", "1")
    assert draft.plan.recommended is None
    smallest = min(draft.plan.choices, key=lambda choice: choice.total)
    assert dict(asker.asked)["placement"] == smallest.placement
    console = Console(file=io.StringIO(), width=150)
    show(console, BATCH, "1", BATCH.tell(draft))
    shown = console.file.getvalue()
    assert shown.startswith("Batch size   1\n")
    assert "does not fit" in shown
    assert "what to change" in shown
    assert "--moments-dtype bf16" in shown


def test_gpus_that_are_found_set_the_number_of_processes(answer, model_dir, text_file, targets, monkeypatch):
    def two_gpus(processes=None):
        if (processes or 0) > 2:
            raise UserError(f"{processes} processes need as many GPUs, but this machine has 2")
        return Machine("cuda", processes or 2, 80 * 2**30, "GPU of a kind")

    monkeypatch.setattr("saekit.wizard.inputs.detect", two_gpus)
    beginning = (str(model_dir), str(text_file), *ALL, *SIZES, "all", "2")
    draft, asker = answer("3", ENTER, *beginning, "ddp")
    assert asker.asked[0] == ("machine", "2")
    assert "has 2 × GPU of a kind, 80.0 GiB each: use one process per GPU" in asker.explained["machine"]
    assert asker.told["machine"] == ["2 × GPU of a kind, 80.0 GiB each"]
    assert "but this machine has 2" in asker.problems[0][2]
    write_files(files_of(draft))
    assert yaml.safe_load(targets.launch.read_text())["use_cpu"] is False
    monkeypatch.undo()  # the same files on a machine without: its number, not theirs
    assert answer("1", *beginning)[1].asked[0] == ("machine", "1")
