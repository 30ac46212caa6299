"""What a process that trains will import, and what it does but once, whatever it is started for."""

import gc
import sys
from contextlib import redirect_stdout, suppress
from functools import partial
from importlib import import_module


def import_everything() -> None:
    """So that copies of this process need not; sets torch to one thread."""
    import torch

    torch.set_num_threads(1)
    with suppress(RuntimeError):  # it has been set before
        torch.set_num_interop_threads(1)
    # At first use they import the language model's own module, and DeepSpeed, by way of a `torch.compile`, these two.
    models = [f"transformers.models.{model}.modeling_{model}" for model in ("gpt2", "llama")]
    models += ["transformers.models.auto.tokenization_auto", "transformers.convert_slow_tokenizer"]
    ours = ["saekit.cli", "saekit.training.launch", "saekit.placement.launcher", "saekit.placement.zero3"]
    ours += ["saekit.planning", "saekit.analysis", "saekit.views.page.build"]
    launchers = ["torch.distributed.run", "accelerate.commands.launch"]
    compiling = ["torch._inductor.compile_fx", "torch._dynamo.repro.after_dynamo"]
    with redirect_stdout(sys.stderr):  # DeepSpeed says there what it found; answers go to stdout
        for module in [*ours, *launchers, "datasets", *models, *compiling]:
            import_module(module)
        with suppress(ImportError):
            _prepare_deepspeed()
        _build_command_line()
        # A second of regular expressions that loading any model compiles.
        import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("gpt2")
    gc.collect()
    gc.freeze()  # the copies' own collections need not look at all of this again


def _prepare_deepspeed() -> None:
    """Do what else comes with its first engine: it tries a compiler, and gets ready to compile an optimizer."""
    deepspeed = import_module("deepspeed")
    assert deepspeed.ops.__compatible_ops__
    for part in ("runtime.zero.muon.muon_optimizer", "runtime.superoffload.superoffload_stage3"):
        import_module(f"deepspeed.{part}")
    import_module("deepspeed.module_inject.auto_ep_layer")


def _build_command_line() -> None:
    """As Typer does it from our functions, at each start."""
    app = import_module("saekit.cli.app")
    built = import_module("typer.main").get_command(app.app)
    app.run = partial(_run_what_is_built, app.run, built)


def _run_what_is_built(run, built, _):
    run(built)
