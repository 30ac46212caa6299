"""The options of an SAE's shape. `saekit.config.schema` has the others."""

from __future__ import annotations

from typing import Any

from pydantic import model_validator
from pydantic.dataclasses import dataclass

from saekit.config.options import CONFIG, Files, Shares, in_one_sentence, option
from saekit.registry import SELECTIONS

DEFAULT_EXPANSION_FACTOR = 32
SAE = "Sparse autoencoder"


@in_one_sentence
@dataclass(frozen=True, config=CONFIG)
class SaeConfig:
    """The shape of one SAE (the same for every layer)."""

    d_in: int | None = None
    """D, the width of the activations; None takes it from the model."""
    expansion_factor: int | None = option(
        None,
        f"Latents per dimension of the activations; {DEFAULT_EXPANSION_FACTOR} unless --num-latents is given.",
        panel=SAE,
        common=True,
        ge=1,
    )
    num_latents: int | None = option(
        None, "Number of latents, instead of --expansion-factor.", panel=SAE, unit="latents", ge=1
    )
    k: int = option(
        32,
        "Active latents per token; their mean for batchtopk.",
        panel=SAE,
        common=True,
        unit="latents",
        ge=1,
    )
    activation: str = option(
        "topk",
        "How latents are selected: topk, batchtopk, groupmax, or a plug-in's selection. topk takes each token's k "
        "largest. batchtopk takes those above a threshold per layer, which moves so that they are k on average, and "
        "at most 4k for one token. groupmax takes the largest of each of k equal groups.",
        panel=SAE,
        common=True,
    )
    plugin: Files = option(
        (),
        "Run a Python file that registers selections, sources, placements or formats. May be repeated. Only files "
        "that are named here or in the file of --config are run, never one that a checkpoint names.",
        panel=SAE,
    )
    normalize_decoder: bool = option(True, "Keep the decoder's rows at unit norm.", panel=SAE)
    multi_topk: bool = option(
        False, "Add the loss at 4k latents with weight 1/8, so that the code also works at other k.", panel=SAE
    )
    skip_connection: bool = option(
        False,
        "Add a linear map from what a transcoder reads to what it writes (skip transcoders). It starts at zero.",
        panel=SAE,
    )
    matryoshka: Shares | None = option(
        None,
        "Train nested dictionaries (Matryoshka SAEs), given as ascending shares of the latents that end in 1, such as "
        "0.125,0.25,1. Each prefix of the latents also reconstructs without the others.",
        panel=SAE,
    )

    @model_validator(mode="after")
    def _check(self) -> SaeConfig:
        if self.num_latents is not None and self.expansion_factor is not None:
            raise ValueError(
                f"--num-latents {self.num_latents} and --expansion-factor {self.expansion_factor} both set the size of "
                "the dictionary: give one of them"
            )
        if self.activation not in SELECTIONS:
            raise ValueError(self._unknown())
        if self.multi_topk and not self.kind.multi_topk:
            raise ValueError(f"--multi-topk is for --activation topk: under {self.activation} there is no code at 4k")
        if self.matryoshka is not None and self.multi_topk:
            raise ValueError("--matryoshka and --multi-topk each add a loss of their own: give one of them")
        if self.matryoshka is not None:
            _check_shares(self.matryoshka)
        if self.num_latents is not None or self.d_in is not None:
            self.resolve_num_latents(self.d_in or 1)
        return self

    def _unknown(self) -> str:
        known = f"--activation {self.activation!r} is none of {', '.join(SELECTIONS.names())}"
        if not self.plugin:
            return f"{known}: choose one of them, or name the file that registers it with --plugin"
        return f"{known}: it needs --plugin {' --plugin '.join(map(str, self.plugin))}"

    @property
    def kind(self) -> Any:
        """Return the class that selects latents, a `saekit.sae.selection.Selection`. Imports torch.

        Raises:
            UserError: If it comes from a package that cannot be imported.
        """
        return SELECTIONS.get(self.activation)

    def sizes(self, d_in: int, num_latents: int, d_out: int | None = None) -> dict[str, Any]:
        """Return the arguments of a fresh `Sae` of D dimensions and M latents; with `d_out` of a transcoder's."""
        transcoder = {"transcode": True, "d_out": d_out, "skip_connection": self.skip_connection}
        return {
            **({} if d_out is None else transcoder),
            "d_in": d_in,
            "num_latents": num_latents,
            "k": self.k,
            "normalize_decoder": self.normalize_decoder,
            "multi_topk": self.multi_topk,
            "selection": self.activation,
        }

    def resolve_prefixes(self, num_latents: int) -> tuple[int, ...]:
        """Return the sizes of the nested dictionaries, ascending, the last one M; empty without any.

        Raises:
            ValueError: If two of them would be the same, or one empty.
        """
        prefixes = tuple(round(share * num_latents) for share in self.matryoshka or ())
        if any(size <= before for before, size in zip((0, *prefixes), prefixes, strict=False)):
            sizes = ", ".join(map(str, prefixes))
            raise ValueError(
                f"{_named(self.matryoshka or ())} makes dictionaries of {sizes} latents: each must be larger than the "
                "one before"
            )
        return prefixes

    def resolve_num_latents(self, d_in: int) -> int:
        """Return M for activations of width `d_in`.

        Raises:
            ValueError: If `d_in` contradicts the config's own, `k` is larger than M, the selection cannot have these
                sizes, or two nested dictionaries would be the same.
        """
        if self.d_in is not None and self.d_in != d_in:
            raise ValueError(f"SaeConfig says d_in = {self.d_in}, but the activations are {d_in} wide")
        num_latents = self.num_latents or d_in * (self.expansion_factor or DEFAULT_EXPANSION_FACTOR)
        if self.k > num_latents:
            raise ValueError(
                f"--k {self.k} is larger than the dictionary of {num_latents} latents: "
                "choose a smaller --k or more latents"
            )
        try:
            self.kind.check(self.k, num_latents)
        except ValueError as error:
            raise ValueError(f"--activation {self.activation} with --k {self.k}: {error}") from error
        self.resolve_prefixes(num_latents)
        return num_latents


def _check_shares(shares: tuple[float, ...]) -> None:
    in_order = all(before < share for before, share in zip((0.0, *shares), shares, strict=False))
    if len(shares) < 2 or shares[-1] != 1 or not in_order:
        raise ValueError(f"{_named(shares)}: expected two or more ascending shares, the last of them 1")


def _named(shares: tuple[float, ...]) -> str:
    return f"--matryoshka {','.join(f'{share:g}' for share in shares)}"
