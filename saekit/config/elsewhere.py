"""Options that other tools have: what they are called here, or that they are not there.

The option whose name is spelled most alike is a bad answer: `--seed` does not mean `--split`. The names in these tables
are those of sparsify, SAELens, dictionary_learning and OpenMOSS, and those that training scripts often have.
"""

from __future__ import annotations

import re

RENAMED = {
    "--split": "dataset-split hf-split",
    "--text-column": "text-key text-field column dataset-column column-name",
    "--data-args": "dataset-args dataset-kwargs load-dataset-kwargs",
    "--max-examples": "max-samples num-samples n-samples num-examples n-examples limit max-rows",
    "--max-tokens": "tokens training-tokens num-tokens n-tokens total-tokens total-training-tokens train-tokens",
    "--num-proc": "data-preprocessing-num-proc preprocessing-num-proc workers num-workers n-workers dataset-num-proc",
    "--ctx-len": "ctx-length context-size context-length context-len n-ctx ctx cache-ctx-len max-length max-seq-len "
    "max-seq-length seq-len seq-length sequence-length block-size",
    "--batch-size": "bs per-device-train-batch-size llm-batch-size lm-batch-size store-batch-size-prompts "
    "model-batch-size",
    "--grad-acc-steps": "gradient-accumulation-steps grad-accum-steps accumulation-steps accumulate-grad-batches",
    "--micro-acc-steps": "micro-batches num-chunks chunks",
    "--data-seed": "shuffle-seed",
    "--exclude-tokens": "ignore-tokens ignore-token-ids exclude-token-ids",
    "--exclude-special-tokens": "remove-bos exclude-bos exclude-bos-pad-eos-position ignore-special-tokens skip-bos",
    "--num-latents": "d-sae dict-size dictionary-size n-latents num-features n-features num-neurons hidden-size "
    "n-dirs latents d-hidden",
    "--expansion-factor": "expansion exp-factor multiplier dict-multiplier",
    "--k": "topk top-k l0 target-l0 num-active",
    "--transcode": "transcoder transcoders train-transcoder",
    "--skip-connection": "skip affine-skip use-skip use-skip-connection",
    "--crosscode": "crosscoder cross-coder crosscoders",
    "--crosscode-models": "other-model model-b second-model compare-with diff-model model-diff",
    "--matryoshka": "matryoshka-widths matryoshka-steps group-fractions",
    "--init": "b-dec-init-method decoder-init-method encoder-init-method decoder-init-norm init-scale",
    "--finetune": "from-pretrained-path pretrained init-from finetune-from from-pretrained warm-start",
    "--resume": "resume-from-checkpoint resume-from resume-checkpoint continue from-checkpoint load-checkpoint",
    "--revision": "model-revision",
    "--dtype": "model-dtype lm-dtype torch-dtype llm-dtype",
    "--load-in-8bit": "load-in-8-bit int8 use-8bit quantize",
    "--hf-token": "token hub-token use-auth-token hf-api-token huggingface-token",
    "--optimizer": "optim optimizer-name optimizer-type",
    "--lr": "learning-rate base-lr",
    "--lr-warmup-steps": "warmup-steps warmup lr-warm-up-steps warm-up-steps num-warmup-steps lr-warmup",
    "--beta2": "adam-beta2 beta-2",
    "--max-bad-steps": "skip-nan-steps max-nan-steps",
    "--auxk-alpha": "auxk-coef auxk-coeff aux-alpha aux-coef aux-coeff aux-loss-coefficient aux-k-coef auxk aux-loss",
    "--dead-feature-threshold": "dead-feature-window dead-threshold feature-sampling-window dead-toks-threshold "
    "dead-latent-threshold",
    "--save-dir": "checkpoint-path checkpoint-dir checkpoints-dir output-dir out-dir output output-path out save-path "
    "exp-result-path results-dir",
    "--run-name": "name run experiment-name exp-name wandb-name wandb-run-name",
    "--save-every": "save-steps save-interval checkpoint-every checkpoint-interval save-freq save-frequency",
    "--keep-last": "save-total-limit keep keep-checkpoints",
    "--overwrite": "force overwrite-output-dir overwrite-existing exist-ok",
    "--log-every": "log-steps logging-steps log-interval log-frequency log-freq wandb-log-frequency",
    "--log-with": "report-to logger tracker tracking",
    "--eval-every": "eval-steps eval-interval evaluate-every eval-frequency eval-freq evaluation-interval do-eval",
    "--eval-tokens": "n-eval-batches eval-batches n-eval-tokens eval-batch-size-prompts",
    "--placement layer-map": "distribute-modules layer-parallel",
    "--placement zero3": "distribute-latents zero-stage",
    "--launch zero3": "deepspeed deepspeed-config",
    "--launch ddp": "ddp distributed multi-gpu data-parallel",
    "--num-processes (with --launch)": "nproc-per-node nproc num-gpus n-gpus gpus world-size devices num-devices",
    "--config": "config-file yaml cfg config-path",
}
"""What an option or argument is called here, and its names elsewhere."""

_READS = "--reads names the input hookpoint and --writes the target; --transcode takes a module's input and output"
_HOOKPOINTS = (
    "choose modules by their paths with --hookpoints (layers.3.mlp, or layers.3.mlp:in for its input), layers by "
    "number with --layers"
)
_SPARSITY = "there is no sparsity penalty: --k sets how many latents are active"
_JUMPRELU = "there is no JumpReLU: --activation chooses how latents are selected, and --k how many"
_LENGTH = (
    "a run reads its data once, and --max-tokens shortens it; a step has --batch-size × --grad-acc-steps × ranks "
    "sequences of --ctx-len tokens"
)
_DEVICE = (
    "saekit uses the GPU if there is one, and CUDA_VISIBLE_DEVICES chooses it (empty: the CPU); --launch starts one "
    "process per GPU"
)
_SEED = "--init-seed sets the seed of the weights, --data-seed that of the order of the data"
_SCHEDULE = "the learning rate rises for --lr-warmup-steps and then falls linearly to zero"
_BUFFER = "--mix keeps the activations of N steps and mixes their tokens; --shuffle shuffles the sequences"
_CACHED = "saekit cache writes activations to disk, and --activations DIR trains on them"
_TYPES = "--dtype sets the type of the language model's weights; the SAEs are float32"
_PROJECT = "with --log-with wandb, --run-name names the run; wandb itself reads WANDB_ENTITY, WANDB_MODE, ..."

OTHERWISE = {
    "MODEL is the first argument, without an option's name": "model model-name lm-name model-path model-id "
    "model-name-or-path pretrained-model lm llm",
    "DATASET is the second argument, without an option's name": "dataset dataset-name dataset-path data-path "
    "data dataset-repo hf-dataset train-data corpus",
    _READS: "hook-name-out hook-layer-out hook-point-out hookpoint-out d-out",
    _HOOKPOINTS: "hookpoint hook-points hook-point hook-name hook-names hook hook-layer hook-layers layer "
    "submodule submodule-name submodules io hook-point-in site act-name module modules sae-positions",
    "all heads of a layer are read together, for example with --hookpoints layers.*.self_attn.o_proj:in": "head-index "
    "hook-head-index hook-head-index-out",
    "a crosscoder reads and writes all hookpoints that --crosscode names, and --layers may narrow them": "num-layers "
    "n-layers encoder-layers cross-layers",
    _SPARSITY: "l1 l1-coefficient l1-coeff l1-coef l1-penalty l1-alpha l1-lambda l1-weight sparsity-penalty sparsity "
    "sparsity-coefficient sparsity-weight l0-coefficient l0-penalty l0-lambda lambda lp-norm l1-warm-up-steps "
    "l1-warmup-steps sparsity-warmup-steps initial-sparsity-penalty scale-sparsity-penalty-by-decoder-norm",
    _JUMPRELU: "jumprelu jumprelu-init-threshold jumprelu-bandwidth bandwidth jumprelu-lr-factor",
    "--activation chooses how latents are selected: topk, batchtopk or groupmax": "architecture activation-fn act-fn "
    "activation-function trainer trainer-class dict-class sae-type sae-class use-batchtopk batchtopk batch-topk "
    "groupmax activation-fn-str",
    "saekit has no equivalent": "embed-skip gram-lookup lookup-max-order gram-table-path gram-table-hash noise-scale "
    "decoder-orthogonal-init apply-b-dec-to-input norm-init-scale same-init-for-all-layers init-with-transpose "
    "code-normalization",
    "--k sets the number of active latents for the whole run": "k-decay-steps k-anneal-steps k-schedule",
    "BatchTopK moves its threshold by itself (--activation batchtopk)": "threshold-beta threshold-start-step threshold "
    "topk-threshold-lr",
    _LENGTH: "epochs num-epochs n-epochs epoch num-train-epochs max-epochs steps max-steps num-steps n-steps "
    "total-steps total-training-steps train-steps training-steps iterations iters num-iterations finetuning-tokens",
    _DEVICE: "device gpu cuda cpu device-id gpu-id cuda-device accelerator no-cuda use-cpu use-cuda act-store-device "
    "device-map",
    _SEED: "seed random-seed rng-seed init-seeds seeds",
    "--log-with wandb logs to wandb": "wandb use-wandb log-to-wandb wandb-mode with-wandb",
    "--log-with tensorboard logs to TensorBoard": "tensorboard use-tensorboard tb",
    _PROJECT: "wandb-project wandb-entity wandb-group project wandb-id wandb-tags",
    _SCHEDULE: "lr-scheduler lr-scheduler-name lr-scheduler-type scheduler lr-schedule lr-decay-steps lr-end min-lr "
    "decay-start lr-decay sched-type cosine",
    "the decay of Adam's first moment is fixed at 0.9; --beta2 sets that of the second": "adam-beta1 beta1 beta-1 "
    "adam-betas betas",
    "there is no weight decay: the decoder's rows are kept at unit norm (--normalize-decoder)": "wd l2 weight-decay",
    "this number is fixed: --optimizer chooses among adam, adam8bit, signum and muon": "momentum adam-epsilon "
    "adam-eps eps nesterov",
    "gradients are not clipped; a step with NaN or Inf is skipped (--max-bad-steps)": "grad-clip max-grad-norm "
    "gradient-clip-val clip-grad clip-grad-norm gradient-clipping",
    "dead latents are revived while training, not resampled: --revive-alpha, or --auxk-alpha": "resample-steps "
    "resample-dead use-ghost-grads ghost-grads neuron-resampling dead-feature-resampling resample-mode",
    "the loss is that of the reconstruction (FVU); saekit eval measures the language model's loss": "loss-fn loss "
    "mse-loss-normalization loss-type reconstruction-loss",
    "activations are not normalized: the learning rates adapt to them (--scale-biases), and --max-norm-multiple "
    "excludes attention sinks": "normalize-activations normalize norm-activation activation-norm "
    "rescale-acts-by-decoder-norm",
    _BUFFER: "n-batches-in-buffer buffer-size n-ctxs refresh-batch-size buffer buffer-tokens mixing-fraction "
    "activation-buffer-size buffer-device activations-mixing-fraction",
    "--batch-size counts sequences of --ctx-len tokens": "train-batch-size-tokens out-batch-size batch-size-tokens "
    "sae-batch-size tokens-per-batch train-batch-size",
    _CACHED: "use-cached-activations cached-activations-path activation-dir activations-dir cache-activations "
    "activation-path activations-path new-cached-activations-path",
    "saekit reads it from the model's config": "d-in activation-dim d-model d-mlp model-dim input-dim activation-size "
    "width",
    "--data-args streaming=true streams a data set, and --max-examples limits it": "streaming stream is-streaming",
    "saekit recognizes a column input_ids and .bin files": "is-dataset-tokenized tokenized pretokenized is-tokenized",
    "documents are packed without gaps, with an EOS token before each": "prepend-bos add-bos return-overflowed-tokens "
    "disable-concat-sequences packing concat",
    _TYPES: "fp16 bf16 fp32 autocast autocast-lm mixed-precision precision amp half use-fp16 use-bf16",
    "8 bits are the only choice: --load-in-8bit": "load-in-4bit load-in-4-bit 4bit quantization bnb-4bit",
    "saekit does not use torch.compile; --kernels chooses the code that computes the SAEs": "compile compile-llm "
    "compile-sae torch-compile compile-model llm-compilation-mode sae-compilation-mode",
    "--placement zero3 shards the SAEs, and --shard-lm the language model": "fsdp tp tensor-parallel tp-size sp pp",
    "saekit does not upload; upload a checkpoint's folder with `hf upload`": "push-to-hub hf-repo-id hub-repo "
    "hub-model-id upload hf-repo save-to-hub",
    "saekit never runs code from the hub": "trust-remote-code dataset-trust-remote-code",
    "set HF_HOME to move the hub's cache": "cache-dir hf-home hf-cache hf-cache-dir",
    "set HF_HUB_OFFLINE=1 to work without the hub": "offline local-files-only",
    "saekit prints plain lines instead of the live view if stderr is not a terminal": "verbose quiet silent progress "
    "no-progress-bar log-level tqdm",
}
"""What to do instead, and the names elsewhere of what saekit does not have or has in another form."""


def _table() -> dict[str, str]:
    answers: dict[str, str] = {}
    for target, names in RENAMED.items():
        answers |= dict.fromkeys(names.split(), f"it is called {target} here")
    for text, names in OTHERWISE.items():
        answers |= dict.fromkeys(names.split(), text)
    return answers


ANSWERS = _table()
"""By an option's name elsewhere, with dashes and without those in front."""


def answer(name: str) -> str | None:
    """Say what to use instead of an option that another tool has.

    Args:
        name: With or without dashes in front; underscores count as dashes, and `sae.lr` as `lr`.

    Returns:
        A clause that names options as the command line does; None for a name that is not in the table.
    """
    plain = name.lstrip("-").replace("_", "-").lower()
    for known in (plain, plain.removeprefix("no-"), plain.rpartition(".")[2]):
        if known in ANSWERS:
            return ANSWERS[known]
    return None


def options_in(text: str) -> set[str]:
    """Return the options that a text names, as they are typed."""
    return set(re.findall(r"--[a-z0-9][a-z0-9-]*", text))


def without_dashes(text: str) -> str:
    """Return a text in which options are named as in YAML and in Python."""
    return re.sub(r"--([a-z0-9][a-z0-9-]*)", lambda found: found[1].replace("-", "_"), text)
