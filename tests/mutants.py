"""Put known faults back, one by one, and see that a test notices each: `make mutants`.

`python -m tests.mutants FVU zero3` tries only those whose names contain one of the words.

Not part of the test suite: it runs the suite's quick core once per fault, in copies of the committed tree.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console

ROOT = Path(__file__).parents[1]
MODEL, SPARSE, LOSSES = "saekit/sae/model.py", "saekit/sae/kernels/sparse.py", "saekit/sae/losses.py"
TORCH_OPS, EAGER = "saekit/sae/kernels/torch_ops.py", "saekit/sae/kernels/eager.py"
SCORES, ADAM = "saekit/sae/kernels/scores.py", "saekit/training/adam.py"
NATIVE, ROWS, TOPK, AMX = (f"saekit/sae/kernels/native{part}" for part in (".cpp", "_rows.h", "_topk.h", "_amx.h"))
TRITON_OPS = "saekit/sae/kernels/triton_ops.py"
TRAINER, COUNTERS = "saekit/training/trainer.py", "saekit/training/counters.py"
ZERO3, DDP = "saekit/placement/zero3.py", "saekit/placement/ddp.py"
LOCAL = "saekit/placement/local.py"
CHECKPOINT, SAVING = "saekit/runs/checkpoint.py", "saekit/training/saving.py"
RECOVERY = "saekit/runs/recovery.py"
TAP = "saekit/activations/tap.py"
EVALUATE = "saekit/analysis/evaluate.py"
EVALUATING = "saekit/training/evaluating.py"
ADVANCE = "run.counters[name].after(fired[name], tokens)"
DEAD_CODE = "self.W_enc[dead], self.b_enc[dead],"
BELOW_LEARNS = "acts_NK - (acts_NK * (acts_NK <= threshold)).detach()"
BATCHTOPK, GROUPMAX = (f"saekit/sae/selection/{kind}.py" for kind in ("batchtopk", "groupmax"))

FAULTS = [
    ("AuxK adds b_dec again", MODEL, "self.b_dec, k_aux)[0]", "self.b_dec, k_aux)[0] + self.b_dec"),
    ("AuxK's gradient does not reach the encoder", MODEL, DEAD_CODE, DEAD_CODE.replace("[dead]", "[dead].detach()")),
    (
        "Multi-TopK's gradient is lost",
        MODEL,
        "self.W_dec) + self.b_dec, recon_ND\n",
        "self.W_dec) + self.b_dec, recon_ND.detach()\n",
    ),
    (
        "Triton: maxima without the bias",
        TRITON_OPS,
        "    scores += tl.load(b_ptr + m, mask=m < M, other=0.0).to(tl.float32)\n    # Of",
        "    # Of",
    ),
    (
        "Triton: members without the bias",
        TRITON_OPS,
        "    scores += tl.load(b_ptr + m, mask=m < M, other=0.0).to(tl.float32)\n    at",
        "    at",
    ),
    ("Triton: each chunk's products where the first one's are", TRITON_OPS, "out=out_NK[some])", "out=out_NK[:rows])"),
    ("the plan forgets products of slices", "saekit/planning/bank.py", "x_ND.new_empty(slices, rows, K)\n", "x_ND\n"),
    ("no ReLU mask in the backward pass", SPARSE, "grad_NK * (acts_NK > 0)", "grad_NK * 1"),
    ("no candidate to spare", SPARSE, "min(each + spare, num_latents // parts)", "each"),
    ("large dimensions take all bits", SCORES, ".clamp_(1e-12, 1e12).pow_(0.25)", ".fill_(1.0)"),
    ("a token's scale is lost on the bias", SCORES, ".addcmul_(one_over_x_n1, b_M[part])", ".add_(b_M[part])"),
    ("a native bias is not in the token's unit", TOPK, "bias[m] * one_over_x", "bias[m]"),
    ("a native choice passes over what is no number", TOPK, "> infinity ? LARGEST : key", "> infinity ? key : key"),
    ("native sums forget all but the last", ROWS, "sum[d] += weight * row[d]", "sum[d] = weight * row[d]"),
    ("a native step keeps the gradient along a row", ROWS, "grad[d] - along * param[d]", "grad[d]"),
    (
        "native moments stand still",
        ROWS,
        "second = rounded_by_odds(new_second, noise, odds)",
        "second = rounded(new_second)",
    ),
    ("AMX loses one of equal scores", AMX, "ties-- <= 0", "ties-- <= 1"),
    ("AMX forgets what came before a slab", AMX, "keys.data() + count + i", "keys.data() + i"),
    ("a native step of sums forgets a latent's pairs", NATIVE, "sums.of(m, grad.data())", "sums.of(0, grad.data())"),
    (
        "a step's rate is a Python number",
        "saekit/training/signum.py",
        "y.grad.sign().mul_(lr)",
        'y.grad.sign().mul_(group["lr"])',
    ),
    (
        "later steps use the first one's numbers",
        "saekit/training/prepared.py",
        "        self._static.copy_(numbers, non_blocking=True)",
        "            self._static.copy_(numbers, non_blocking=True)",
    ),
    ("what is deferred outlives its step", ADAM, "sums.clear()", "pass"),
    ("what is deferred hides what is not finite", LOCAL, "each.bound()", "each.bound().nan_to_num(0.0, 0.0, 0.0)"),
    ("native kernels on some of the ranks", "saekit/training/plan.py", "if len(wanted) == 1", "if wanted"),
    ("a bias loses what bfloat16 rounds off", SCORES, "(b_M - W_low_ME[:, D]).nan_to_num_(0.0)", "0"),
    ("negative scores are chosen by their bits", TORCH_OPS, "(bits_NK < 0).any(1)", "(bits_NK != bits_NK).any(1)"),
    ("what is not a number is passed over", TORCH_OPS, "by_bits and not scores_nM[0].isnan().any()", "by_bits"),
    ("the bias is forgotten when values are made exact", SPARSE, ".add_(b_M[candidates_NC])", ""),
    ("second moments in bfloat16 are cut off", EAGER, "(mixed >> 16 & 0xFFFF)", "0"),
    ("a group's first member is taken for its best", TORCH_OPS, "members_NGg.amax(1)", "members_NGg[:, 0]"),
    ("the residual is not detached", LOSSES, "(x_ND - out.recon).detach()", "x_ND - out.recon"),
    (
        "AuxK is not scaled by the number of dead latents",
        LOSSES,
        "auxk_scale) * min(1.0, num_dead / k_aux)",
        "auxk_scale)",
    ),
    ("selected counts as fired", "saekit/sae/selection/base.py", "return acts > 0", "return acts >= 0"),
    ("counters count micro-batches", TRAINER, ADVANCE, ADVANCE.replace("tokens)", "len(batches))")),
    ("micro_acc_steps cuts nothing", TRAINER, "x_ND.tensor_split(cfg.micro_acc_steps)", "[x_ND]"),
    ("micro_acc_steps divides the loss", TRAINER, "losses.total)", "losses.total / self.cfg.micro_acc_steps)"),
    (
        "N is a micro-batch's",
        TRAINER,
        "forward.count_tokens(batches)\n                scale",
        "forward.count_tokens(batches[:1])\n                scale",
    ),
    (
        "decay is planned in micro-batches",
        "saekit/training/plan.py",
        "total_steps=self.total_steps, decay",
        "total_steps=self.total_steps * self.cfg.grad_acc_steps, decay",
    ),
    (
        "averages are cleared at another rhythm",
        TRAINER,
        "windows = self._fresh_windows()\n                    tokens_at_report",
        "windows = self._fresh_windows() if run.step % 5 == 0 else windows\n                    tokens_at_report",
    ),
    ("resume is off by one", "saekit/training/state.py", 'index["step"], index', 'index["step"] + 1, index'),
    (
        "reporting moves the counters",
        TRAINER,
        "report.step(stats)\n",
        "report.step(stats)\n                    [run.counters[n].observe(out.acts, out.indices) for n in windows]\n",
    ),
    ("a block's input is taken for its output", TAP, "residual(output)", "residual(_args)"),
    (
        "the last layer is read after the final norm",
        TAP,
        "        return taken",
        "        taken[hookpoints[-1]] = base.norm(taken[hookpoints[-1]])\n        return taken",
    ),
    (
        "FVU forgets the mean",
        "saekit/training/statistics.py",
        "return self.sum_squares - self.sum_D.square().sum() / self.count",
        "return self.sum_squares",
    ),
    (
        "the gradient is not projected",
        TORCH_OPS,
        "g.addcmul_(p, along / norms / norms, value=-1)",
        "pass",
    ),
    (
        "zero3 lets a later chunk replace the gradient of an earlier one",
        ZERO3,
        "zero.micro_step_id = self._backwards[hookpoint]",
        "zero.micro_step_id = 0",
    ),
    ("zero3 averages over the ranks", ZERO3, "loss * self.world_size", "loss"),
    (
        "layer-map counts rows as other ranks marked theirs",
        "saekit/placement/layer_map.py",
        "        return together.view(-1)\n",
        "        return together.flip(0).view(-1)\n",
    ),
    (
        "a layer's number is the last one in a hookpoint's path",
        "saekit/sae/storage.py",
        'for part in path.split(".")',
        'for part in reversed(path.split("."))',
    ),
    (
        "zero3 does not project",
        ZERO3,
        "        self._torch_optimizer.register_step_pre_hook(rows.project)\n",
        "",
    ),
    (
        "zero3 normalizes each rank's part of a row by itself",
        "saekit/placement/shards.py",
        "        return sum_over_ranks(everywhere)[:, here]",
        "        return everywhere[:, here]",
    ),
    (
        "zero3 restores moments but not weights",
        ZERO3,
        "            piece.scatter(whole, piece.flat)\n",
        "",
    ),
    (
        "the index is written before the files",
        SAVING,
        "        written = self._on_all(",
        "        self._on_first(lambda: checkpoint.finish_checkpoint(plan.run_dir, run.step, {}, index))\n"
        "        written = self._on_all(",
    ),
    ("who dies before the last rename is forgotten", RECOVERY, "            put_in_place(partial)\n", ""),
    ("the newest is that of the highest step", CHECKPOINT, "key=lambda each: each[1])", "key=lambda each: each[0])"),
    (
        "what is half deleted keeps its name",
        "saekit/runs/files.py",
        "            os.replace(folder, doomed)\n        shutil.rmtree(doomed)",
        "            doomed = folder\n        shutil.rmtree(doomed)",
    ),
    ("skipping forgets to drop the gradient", DDP, "            gradient.zero_()\n", "            pass\n"),
    (
        "a skipped step moves the counters",
        "saekit/training/faults.py",
        "        counters.forget()\n",
        "        counters.tokens_since_fired_M += 1\n        counters.forget()\n",
    ),
    ("only rank 0 knows of a bad step", "saekit/training/faults.py", "placement.sum(rows)", "rows"),
    (
        "zero ablation puts in the mean",
        EVALUATE,
        "mean_D.expand(acts.shape), torch.zeros_like)",
        "mean_D.expand(acts.shape), lambda acts: mean_D.expand(acts.shape))",
    ),
    (
        "excluded tokens are ablated, too",
        EVALUATE,
        "torch.where(own[..., None], ways[change](x).to(acts), acts)",
        "ways[change](x).to(acts)",
    ),
    (
        "together, layers read the true activations",
        EVALUATE,
        'replacements["spliced"][name] = self._reconstruct(name)',
        'replacements["spliced"][name] = lambda acts, out=out: out.recon',
    ),
    (
        "KL the wrong way round",
        "saekit/analysis/subject.py",
        "(p_NV - q_NV).mul_(p_NV.exp())",
        "(q_NV - p_NV).mul_(q_NV.exp())",
    ),
    (
        "intervals over tokens that count as independent",
        "saekit/analysis/results.py",
        "* count / (count - 1)",
        "/ (count - 1)",
    ),
    (
        "a document that begins in a trained sequence is held out",
        "saekit/data/held_out.py",
        "before[last + 1] > before[first]",
        "before[last + 1] > before[last]",
    ),
    (
        "evaluating moves the global random numbers",
        EVALUATING,
        "found = self.evaluate(self._look_up)",
        "found = (__import__('torch').rand(1), self.evaluate(self._look_up))[1]",
    ),
    (
        "the point is evaluated, not the average that is saved",
        "saekit/placement/local.py",
        "return around(self._optimizers[hookpoint].export(), **",
        "return around(self._saes[hookpoint].state_dict(), **",
    ),
    ("a stopped evaluation counts as done", EVALUATING, "            run.evaluated = run.step\n", "            pass\n"),
    ("the tap stops every pass", TAP, "            if not at_work:\n                return\n", ""),
    (
        "a rank with fewer sequences drops out of step",
        "saekit/analysis/subject.py",
        "range(0, self.num_batches * self.batch_size, self.batch_size)",
        "range(0, len(mine), self.batch_size)",
    ),
    ("dead biases sink", LOSSES, "revive = -(len(x_ND)", "revive = (len(x_ND)"),
    ("every chunk raises dead biases as a whole batch", LOSSES, "-(len(x_ND) * revive_scale)", "-(40 * revive_scale)"),
    (
        "b_dec learns at b_enc's rate",
        "saekit/training/optimizers.py",
        '"params": [sae.b_dec], "lr": lr * input_scale',
        '"params": [sae.b_dec], "lr": lr * to_biases * input_scale',
    ),
    (
        "in a short run nothing is ever dead",
        "saekit/training/schedule.py",
        "min(total_tokens // 50, long, MOST_TOKENS_ASLEEP)",
        "MOST_TOKENS_ASLEEP",
    ),
    (
        "a smaller dictionary learns nothing from its own errors",
        SPARSE,
        "told_GND = grad_GND.flip(0)",
        "told_GND = 0 * grad_GND.flip(0)",
    ),
    (
        "a latent hears its own dictionary's error only",
        SPARSE,
        "grad_GND.flip(0).cumsum_(0).flip(0)",
        "grad_GND",
    ),
    (
        "what lies below the threshold still learns",
        EAGER,
        "acts_NK.masked_fill(acts_NK <= threshold, 0.0)",
        BELOW_LEARNS,
    ),
    ("a BatchTopK code is as wide as k", BATCHTOPK, "min(CODE_WIDTH * self.k, self.num_latents)", "self.k"),
    (
        "thresholds are moved by twice the tokens",
        "saekit/training/thresholds.py",
        "window.moments.count, window",
        "2 * window.moments.count, window",
    ),
    (
        "thresholds are forgotten on resume",
        "saekit/training/state.py",
        "selection.load_(saved.selection)",
        "selection",
    ),
    (
        "a threshold is not saved exactly",
        BATCHTOPK,
        '{"threshold": float(self.threshold)}',
        '{"threshold": round(float(self.threshold), 6)}',
    ),
    ("an SAE's copy moves its threshold", "saekit/sae/selection/base.py", 'plain.to("cpu", copy=True)', "plain"),
    ("a signed value does not fire", "examples/abs_topk.py", "return acts != 0", "return acts > 0"),
    (
        "a checkpoint's plug-in is run",
        "saekit/config/run.py",
        "        parts: dict[type, Any] = {}\n",
        "        load_plugins(values)\n        parts: dict[type, Any] = {}\n",
    ),
    (
        "what is too long still trains",
        TRAINER,
        ".only(covered_N1)",
        "",
    ),
    ("what is too long counts as variance", "saekit/training/statistics.py", "x_ND *= counted_N1", "pass"),
    (
        "calibration is of all activations, however long",
        "saekit/training/start.py",
        "x_ND if limits is None else x_ND[~(norms_N > limits[name])]",
        "x_ND",
    ),
    ("an SAE forgets which activations it is for", MODEL, '"max_norm": self.max_norm,', ""),
    ("all groups of a GroupMax SAE are the first one", EAGER, "[:, None] * (num_columns // parts)", "[:, None] * 0"),
    ("a GroupMax code is the k largest", GROUPMAX, "return self.k\n", "return 1\n"),
    ("low precision alone chooses in a group", SPARSE, "LEAST_SPARE // parts, 1)", "LEAST_SPARE // parts)"),
    (
        "SAELens reads the encoder the wrong way round",
        "saekit/sae/formats/saelens.py",
        "sae.W_enc.T,",
        "sae.W_enc,",
    ),
    (
        "what another split shares with the trained one stays in",
        "saekit/data/held_out.py",
        "~np.isin(finger",
        "np.isin(finger",
    ),
    (
        "a latent that does not fire shows its neighbour's activation",
        "saekit/analysis/codes.py",
        "np.where(self._keys_P[found] == keys, self.acts_P[found], np.float32(0))",
        "self.acts_P[found]",
    ),
    (
        "a window runs into the next sequence",
        "saekit/analysis/codes.py",
        "(places_LCW // ctx_len == places_LC[:, :, None] // ctx_len)",
        "(places_LCW >= 0)",
    ),
    (
        "one passage fills the list",
        "saekit/analysis/codes.py",
        "new_P[1:] = (np.diff(stretch_P) != 0) | (np",
        "new_P[1:] = (stretch_P[1:] >= 0) | (np",
    ),
    (
        "the logit lens leaves the norm out",
        "saekit/analysis/features.py",
        "make_dual(mean_D.to(directions)",
        "make_dual((0 * mean_D + 1).to(directions)",
    ),
    ("excluded tokens have codes", "saekit/analysis/features.py", "& (counted & sae.counted(x))[..., None]", ""),
    ("what is too long has codes", "saekit/analysis/features.py", "(counted & sae.counted(x))", "counted"),
    ("what is too long is ablated with the others", EVALUATE, "_where(own, ways[change])", "ways[change]"),
    (
        "evaluations between steps take all lengths",
        EVALUATING,
        "sizes.max_norm = run.calibration[name].max_norm",
        "pass",
    ),
    ("an overflow in the first batch is left out", "saekit/training/start.py", "if finite and any(", "if any("),
    ("finetuning forgets how long decoder rows were", "saekit/sae/decoder.py", "sae.W_enc.mul_(scale_M1)", "pass"),
    ("ε is the same in any unit", "saekit/training/optimizers.py", "EPS / input_scale", "EPS"),
    (
        "what is too long is counted as nothing",
        "saekit/training/statistics.py",
        "_ratio(tokens - counted, tokens)",
        "0.0",
    ),
    (
        "a token that is left out is near the threshold",
        "saekit/sae/output.py",
        "sums=mask(self.sums)",
        "sums=self.sums",
    ),
    (
        "shades are of the wrong quantile",
        "saekit/views/page/build.py",
        "layer.quantiles_L[:, -1][:, None, None]",
        "layer.quantiles_L[:, -2][:, None, None]",
    ),
]


def notices(file: str, good: str, bad: str) -> bool:
    """Whether the tests fail in a copy of the tree with `good` replaced by `bad`."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "saekit"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(copy)], check=True)
        text = (copy / file).read_text(encoding="utf-8")
        if text.count(good) != 1:
            sys.exit(f"{file}: expected exactly one {good!r}")
        (copy / file).write_text(text.replace(good, bad), encoding="utf-8")
        room = file.split("/")[1]
        tests = ["tests/sae", "tests/placement", "tests/training"]
        if room in ("evaluation", "data", "features", "page"):
            tests = [f"tests/{room}"]
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
        return subprocess.run(command, cwd=copy, capture_output=True, check=False).returncode == 1


def main() -> None:
    console = Console()
    if shutil.which("git") is None:
        sys.exit("needs git")
    missed = 0
    words = sys.argv[1:]
    for name, file, good, bad in FAULTS:
        if words and not any(word in name for word in words):
            continue
        noticed = notices(file, good, bad)
        missed += not noticed
        console.print(f"{'noticed' if noticed else '[red]MISSED [/red]'}  {name}")
    sys.exit(missed)


if __name__ == "__main__":
    main()
