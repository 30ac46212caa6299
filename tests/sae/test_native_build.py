"""Where native kernels are compiled, where they cannot be had, and who takes them."""

import subprocess
from pathlib import Path

import pytest
import torch

from saekit.sae.kernels import choose_kernels, native_build
from saekit.training.agreed import one_backend
from tests.sae.native import needs_native


@pytest.fixture
def in_a_new_process(tmp_path, forked):
    """What Python prints in a process with a cache of its own."""

    def call(say, **environment):
        done = forked.complete("-c", say, environment=forked.environment(XDG_CACHE_HOME=tmp_path, **environment))
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return call


WHY_NOT = "from saekit.sae.kernels.native_build import why_not; print(why_not())"


class TestBuilding:
    def test_without_a_compiler(self, in_a_new_process):
        say = "import torch; from saekit.sae.kernels import choose_kernels as choose; cpu = torch.device('cpu')\n"
        auto = "print(choose('auto', 'fp32', cpu).name)\n"
        asked = "try: choose('native', 'fp32', cpu)\nexcept ValueError as error: print(error)\n"
        said = in_a_new_process(say + auto + asked + WHY_NOT, CXX="no-such-compiler")
        chosen, refused, why = said.splitlines()
        assert chosen == "cpu"
        assert "no C++ compiler" in refused
        assert why == "there is no C++ compiler (no-such-compiler)"

    def test_a_compiler_that_fails(self, tmp_path, in_a_new_process):
        broken = tmp_path / "c++"
        broken.write_text('#!/bin/sh\n[ "$1" = --version ] || { echo "out of order" >&2; exit 3; }\n')
        broken.chmod(0o755)
        assert in_a_new_process(WHY_NOT, CXX=broken).endswith("failed: out of order")

    @needs_native
    def test_is_compiled_once_and_whole(self, tmp_path, forked, in_a_new_process):
        run, environment = [forked.python, "-c", WHY_NOT], forked.environment(XDG_CACHE_HOME=tmp_path)
        both = [subprocess.Popen(run, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        assert [each.communicate()[0].strip() for each in both] == ["None", "None"]
        (kept,) = (tmp_path / "saekit").iterdir()
        before = kept.stat()
        assert in_a_new_process(WHY_NOT) == "None"
        assert (kept.stat().st_mtime_ns, kept.stat().st_ino) == (before.st_mtime_ns, before.st_ino)

    @needs_native
    def test_where_nothing_can_be_kept(self, tmp_path, in_a_new_process):
        (tmp_path / "saekit").write_text("a file where the folder should be")
        assert in_a_new_process(WHY_NOT) == "None"

    @needs_native
    def test_is_torchs_own_threads(self):
        from saekit.sae.kernels.native_build import _openmp_runtime, library

        library()
        loaded = Path("/proc/self/maps").read_text()
        runtimes = {word for word in loaded.split() if Path(word).name.startswith(native_build.RUNTIMES)}
        assert _openmp_runtime() in runtimes
        linked = subprocess.run(["ldd", library()._name], capture_output=True, text=True, check=True).stdout
        assert not any(name in linked for name in native_build.RUNTIMES)


def test_is_for_cpus():
    with pytest.raises(ValueError, match="need a CPU"):
        choose_kernels("native", "fp32", torch.device("cuda"))


def test_all_ranks_take_the_same_kernels():
    class Ranks:
        device = torch.device("cpu")

        def __init__(self, *others):
            self.others = others

        def gather(self, value):
            return [value, *self.others]

    own = choose_kernels("auto", "fp32", Ranks.device).name
    assert one_backend(Ranks(own, own)) == own
    for others in ("cpu", "native"), ("native", "triton"):
        assert one_backend(Ranks(*others)) == "cpu"
