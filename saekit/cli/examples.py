"""Examples at the end of a command's help."""

from __future__ import annotations

EXAMPLES: dict[str, tuple[tuple[str, str], ...]] = {
    "saekit": (
        ("See what it does, in two minutes, without a network or a GPU", "saekit demo"),
        ("Check this machine", "saekit doctor"),
        ("Train on a model and a data set", "saekit train EleutherAI/pythia-160m my_text.jsonl"),
    ),
    "train": (
        ("One SAE per layer of the residual stream", "saekit train EleutherAI/pythia-160m my_text.jsonl"),
        (
            "Transcoders of two layers' MLPs",
            "saekit train EleutherAI/pythia-160m my_text.jsonl --transcode --layers 4,8",
        ),
        ("On all GPUs of this machine", "saekit train EleutherAI/pythia-160m my_text.jsonl --launch ddp"),
    ),
    "cache": (
        ("All layers' activations of a model", "saekit cache EleutherAI/pythia-160m my_text.jsonl --out acts"),
        ("How much of it is there", "saekit cache --info acts"),
    ),
    "eval": (
        ("On text that the run has not read", "saekit eval checkpoints/RUN"),
        ("On other text", "saekit eval checkpoints/RUN other_text.jsonl --max-tokens 100000"),
    ),
    "watch": (
        ("The newest run in checkpoints", "saekit watch"),
        ("A run by its name", "saekit watch RUN --save-dir /shared/checkpoints"),
    ),
    "inspect": (
        ("All layers of a run", "saekit inspect checkpoints/RUN"),
        ("One layer in detail", "saekit inspect checkpoints/RUN --layer 3"),
        ("Two runs next to each other", "saekit inspect checkpoints/RUN checkpoints/OTHER"),
    ),
    "report": (("Write report.html", "saekit report checkpoints/RUN"),),
    "demo": (
        ("SAEs of the small model", "saekit demo"),
        ("Transcoders of its MLPs", "saekit demo --transcode"),
    ),
    "config": (
        ("Answer questions, then start what they came to", "saekit config"),
        ("Write the files without questions", "saekit config --yes EleutherAI/pythia-160m my_text.jsonl"),
    ),
    "plan": (
        ("On this machine", "saekit plan EleutherAI/pythia-160m --expansion-factor 64"),
        ("On eight GPUs that are elsewhere", "saekit plan EleutherAI/pythia-160m --gpus 8 --gpu-memory 80GiB"),
    ),
    "hookpoints": (
        ("All modules of a model", "saekit hookpoints EleutherAI/pythia-160m"),
        ("What a pattern matches", "saekit hookpoints EleutherAI/pythia-160m 'layers.*.mlp'"),
    ),
    "doctor": (
        ("This machine", "saekit doctor"),
        ("The processes of a launch file together", "saekit doctor --launch ddp"),
    ),
    "man": (("Where most systems look for them", "saekit man ~/.local/share/man/man1"),),
}
"""By command, or `saekit` for the program: what each is for, and what to type."""
