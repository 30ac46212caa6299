"""A new selection, source, placement or format is one file, outside the package and inside it."""

import ast
from functools import cache
from pathlib import Path

import pytest
import torch

import saekit as package
from saekit.registry import FORMATS, PLACEMENTS, SELECTIONS, SOURCES, load_plugin
from tests.cli.conftest import saekit  # noqa: F401  # a fixture
from tests.plugins import forget_plugins

SELECTION = '''
from saekit.registry import SELECTIONS
from saekit.sae.selection import Selection


@SELECTIONS.register("toy_selection")
class Toy(Selection):
    """The k largest, halved."""

    name = "toy_selection"

    def encode(self, x_ND, W_enc_MD, b_enc_M, centre_D, kernels):
        acts_NK, indices_NK = kernels.encode_topk(x_ND, W_enc_MD, b_enc_M, self.k, centre_D=centre_D)
        return acts_NK / 2, indices_NK
'''

SOURCE = '''
import torch

from saekit.activations.hookpoints import Hookpoint
from saekit.activations.source import Activations, Source
from saekit.registry import SOURCES


@SOURCES.register("toy_source")
class Toy(Source):
    """Noise, most of it along 3 of 12 axes."""

    name, data_name, ctx_len, num_sequences = "toy", "none", 8, 4 * 6

    def __init__(self, cfg, placement, say, have):
        pass

    def begin(self, cfg, device, rank, world_size):
        self.hookpoints, self.global_batch = (Hookpoint("somewhere", 12),), cfg.batch_size

    def read(self, step):
        return [step]

    def checksum(self, step):
        return str(step)

    def count(self, step):
        return self.global_batch * self.ctx_len

    def __call__(self, step):
        rows_ND = torch.randn(self.count(step), 12, generator=torch.Generator().manual_seed(step))
        rows_ND[:, 3:] /= 100
        return Activations({"somewhere": rows_ND})
'''

PLACEMENT = '''
from saekit.placement import Single
from saekit.registry import PLACEMENTS


@PLACEMENTS.register("toy_placement")
class Toy(Single):
    """One process that counts its steps."""

    name = "toy_placement"
    title = "one process that counts its steps"
    steps = 0

    def apply(self, lr_scale):
        type(self).steps += 1
        super().apply(lr_scale)
'''

FORMAT = '''
import torch

from saekit import Sae
from saekit.registry import FORMATS
from saekit.sae.formats import Format


@FORMATS.register("toy_format")
class Toy(Format):
    """What torch makes of the parameters, and nothing of the rest."""

    name, looks_for = "toy_format", "sae.pt"

    def recognizes(self, folder):
        return (folder / "sae.pt").is_file()

    def read(self, folder, device="cpu"):
        tensors = torch.load(folder / "sae.pt", weights_only=True)
        sae = Sae(12, len(tensors["b_enc"]), int(tensors.pop("k")), selection="toy_selection")
        sae.load_state_dict(tensors)
        return sae.to(device)

    def write(self, sae, folder, metadata=None):
        folder.mkdir(parents=True)
        torch.save({**sae.state_dict(), "k": torch.tensor(sae.k)}, folder / "sae.pt")
'''

PLUGINS = {"selection": SELECTION, "source": SOURCE, "placement": PLACEMENT, "format": FORMAT}
REGISTRIES = {"selection": SELECTIONS, "source": SOURCES, "placement": PLACEMENTS, "format": FORMATS}
ROOT = Path(package.__file__).parent


@cache
def strings_by_file():
    """Every string in the package's code, by file."""
    return {
        file.relative_to(ROOT).as_posix(): {
            node.value
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        for file in ROOT.rglob("*.py")
    }


@pytest.fixture
def files(tmp_path):
    """One file per seam; what they registered is forgotten afterwards."""
    forget_plugins()
    folder = tmp_path / "plugins"
    folder.mkdir()
    for seam, text in PLUGINS.items():
        (folder / f"{seam}.py").write_text(text, encoding="utf-8")
    yield {seam: folder / f"{seam}.py" for seam in PLUGINS}
    forget_plugins()


@pytest.mark.parametrize("seam", PLUGINS)
def test_a_plug_in_is_found_after_its_one_file_is_loaded(files, seam):
    name, registry = f"toy_{seam}", REGISTRIES[seam]
    assert name not in registry
    load_plugin(files[seam])
    assert name in registry.names()
    assert registry.get(name).name in (name, "toy")
    assert registry.origin(name) == str(files[seam])
    others = [other for other in PLUGINS if other != seam]
    assert not [other for other in others if f"toy_{other}" in REGISTRIES[other]], "it is one file, and no other"


def test_one_run_of_four_plug_ins(files, saekit, tmp_path):  # noqa: F811
    """Activations of the source train the selection under the placement; the format keeps what was trained."""
    plugins = [part for seam in ("selection", "source", "placement") for part in ("--plugin", files[seam])]
    kinds = ["--activation", "toy_selection", "--source", "toy_source", "--placement", "toy_placement"]
    small = ["--num-latents", 24, "--k", 3, "--batch-size", 4, "--log-every", 1, "--run-name", "run"]
    done = saekit("train", "toy", "none", *plugins, *kinds, *small, "--save-dir", tmp_path)
    assert done.code == 0, done.err
    assert PLACEMENTS.get("toy_placement").steps == 6
    trained = package.load(tmp_path / "run", "somewhere")
    assert trained.activation == "toy_selection"

    load_plugin(files["format"])
    package.save(trained, tmp_path / "kept", format="toy_format")
    again, x = package.load(tmp_path / "kept"), torch.randn(9, 12)
    assert torch.equal(again(x).recon, trained(x).recon)


@pytest.mark.parametrize(
    ("name", "home"),
    [
        ("batchtopk", "sae/selection/batchtopk.py"),
        ("groupmax", "sae/selection/groupmax.py"),
        ("layer-map", "placement/layer_map.py"),
        ("zero3", "placement/zero3.py"),
        ("saelens", "sae/formats/saelens.py"),
    ],
)
def test_a_built_in_kind_is_named_in_its_file_and_in_the_registry_only(name, home):
    """Defaults apart, which somebody has to name."""
    named = {file for file, strings in strings_by_file().items() if name in strings}
    if home.startswith("placement/"):
        named.discard("config/ranks.py")  # options that belong to one of them, such as --layer-map
    assert named == {"registry.py", home}
