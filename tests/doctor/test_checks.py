"""What each check makes of what it looks at; the causes are faked, but for gloo, which is tried."""

import importlib
import os
import sys
import time
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from packaging.requirements import Requirement

from saekit.doctor import devices, hub, libraries, limits, probes, ranks
from saekit.doctor.findings import GIB, RESOURCES, Finding, make_check, shown
from saekit.doctor.probes import Outcome, Probes
from saekit.units import size

ASKED = {
    name: Requirement(f"{name}{bounds}")
    for name, bounds in {"torch": ">=2.6,<2.14", "deepspeed": ">=0.19,<0.20", "bitsandbytes": ">=0.45"}.items()
}


def only(findings):
    (finding,) = findings
    return finding


def fixes(finding, state, *parts):
    """Whether a finding has the state, and a remedy with all of the parts."""
    assert finding.state == state, finding
    assert finding.remedy is not None
    assert all(part in finding.remedy for part in parts), finding.remedy
    return finding


def fine(finding):
    assert finding.state == "ok", finding
    assert finding.remedy is None
    return finding


# Checks that fail


def test_a_check_that_raises_is_a_problem_with_type_and_first_line():
    def check():
        yield Finding("hub", "before", "ok", "seen")
        raise KeyError("first\nsecond")

    found = fixes(only(make_check("hub", "cache", check)), "problem", "--debug")
    assert (found.area, found.name) == ("hub", "cache")
    assert "KeyError: 'first" in found.found
    assert not found.blocks


def test_only_the_first_line_of_an_error_is_shown():
    def check():
        raise OSError("one\ntwo")

    assert "(OSError: one)" in only(make_check("hub", "cache", check)).found


def test_debug_lets_the_error_out():
    with pytest.raises(ZeroDivisionError):
        make_check("hub", "cache", lambda: [1 / 0], debug=True)


# Libraries


@pytest.fixture
def installed(monkeypatch):
    """`installed(torch="2.7.0")`: the only libraries there are, all of which can be imported."""

    def fake(**versions):
        def version(name):
            if name not in versions:
                raise PackageNotFoundError(name)
            return versions[name]

        monkeypatch.setattr(libraries, "version", version)
        monkeypatch.setattr(libraries, "find_spec", lambda name: None)
        monkeypatch.setattr(libraries, "importlib", SimpleNamespace(import_module=lambda name: None))

    return fake


def library(name, asked=ASKED):
    return only(libraries.library(name, asked))


def test_a_library_within_its_bounds(installed):
    installed(torch="2.13.0+cpu")
    assert fine(library("torch")).found == "2.13.0+cpu (>=2.6,<2.14)"


@pytest.mark.parametrize("version", ["2.5.1", "2.14.0"])
def test_a_library_out_of_bounds(installed, version):
    installed(torch=version)
    found = fixes(library("torch"), "problem", 'pip install "torch>=2.6,<2.14"')
    assert found.found == f"{version}, but saekit needs >=2.6,<2.14"
    assert not found.blocks


def test_a_nightly_build_counts_by_its_number(installed):
    installed(torch="2.13.0.dev20260101+cu130")
    fine(library("torch"))


def test_without_torch_nothing_can_be_trained(installed):
    installed()
    assert fixes(library("torch"), "problem", 'pip install "torch>=2.6,<2.14"').blocks


@pytest.mark.parametrize(
    ("name", "lost"), [("deepspeed", "--placement zero3"), ("bitsandbytes", "--optimizer adam8bit")]
)
def test_without_an_optional_library_its_options_are_lost(installed, name, lost):
    installed()
    found = fixes(library(name), "problem", f'pip install "{name}>=')
    assert lost in found.found
    assert not found.blocks
    fixes(library(name, {}), "note", f"pip install {name}")  # where saekit does not ask for it


def test_triton_is_not_missed_by_itself(installed):
    installed()
    fine(library("triton"))


def test_a_library_that_cannot_be_imported(installed, monkeypatch):
    def broken(name):
        raise OSError("libcublas.so.12: cannot open shared object file")

    installed(torch="2.7.0")
    monkeypatch.setattr(libraries, "importlib", SimpleNamespace(import_module=broken))
    found = fixes(library("torch"), "problem", 'pip install --force-reinstall "torch>=2.6,<2.14"')
    assert "OSError: libcublas.so.12" in found.found
    assert found.blocks


def test_a_library_under_another_distribution(installed, monkeypatch):
    installed()
    monkeypatch.setattr(libraries, "find_spec", lambda name: object())
    assert "unknown version" in fine(library("torch")).found


def test_tokenizers_are_bound_by_transformers(installed, monkeypatch):
    installed(tokenizers="0.30.0")
    asked = {"transformers": {"tokenizers": Requirement("tokenizers>=0.22,<0.23")}}
    monkeypatch.setattr(libraries, "requirements", lambda name: asked.get(name, {}))
    found = fixes(library("tokenizers"), "problem", 'pip install "tokenizers>=0.22,<0.23"')
    assert "transformers needs" in found.found


def test_requirements_are_those_of_this_system(monkeypatch):
    lines = ["One_Thing>=1", "other>=2; sys_platform == 'nowhere'", "more>=3; extra == 'dev'"]
    monkeypatch.setattr(libraries, "requires", lambda name: lines)
    assert list(libraries.requirements("saekit")) == ["one-thing"]


def test_saekit_from_a_folder(installed, monkeypatch):
    def nowhere(name):
        raise PackageNotFoundError(name)

    installed()
    monkeypatch.setattr(libraries, "requires", nowhere)
    assert libraries.requirements("saekit") == {}
    fixes(only(libraries.about()), "note", "pip install -e .")


def test_python_has_bounds():
    fine(only(libraries.python("3.11.7", ">=3.10")))
    fine(only(libraries.python("3.11.7", None)))
    fixes(only(libraries.python("3.9.2", ">=3.10")), "problem", "Python >=3.10")


# Devices


def fake_torch(available=False, cuda="12.8", error="", **more):
    def init():
        raise RuntimeError(error)

    return SimpleNamespace(
        cuda=SimpleNamespace(is_available=lambda: available, device_count=lambda: 1, init=init, **more),
        version=SimpleNamespace(cuda=cuda, hip=None),
    )


def test_no_gpu_is_no_problem():
    assert "none" in fine(only(devices.cuda(fake_torch(), [], {}))).found
    assert "CUDA 12.8" in fine(only(devices.cuda(fake_torch(available=True), [], {}))).found


def test_a_gpu_and_a_torch_without_cuda():
    found = fixes(
        only(devices.cuda(fake_torch(cuda=None), ["Tesla V100, 470.57"], {})),
        "problem",
        'pip install --force-reinstall "torch',
    )
    assert "1 NVIDIA GPU (Tesla V100, 470.57)" in found.found


def test_a_gpu_and_an_old_driver():
    error = "The NVIDIA driver on your system is too old (found version 11040). Please update it from the URL: http://"
    found = fixes(
        only(devices.cuda(fake_torch(error=error), ["V100"], {})), "problem", "update the NVIDIA driver", "CUDA 12.8"
    )
    assert "too old (found version 11040)" in found.found
    assert "http" not in found.found


def test_a_gpu_that_does_not_answer():
    found = only(devices.cuda(fake_torch(error="CUDA unknown error"), ["V100"], {}))
    fixes(found, "problem", "nvidia-smi", "CUDA 12.8")
    assert "CUDA unknown error" in found.found


@pytest.mark.parametrize("value", ["", "-1"])
def test_a_gpu_that_is_hidden(value):
    found = only(devices.cuda(fake_torch(), ["V100"], {"CUDA_VISIBLE_DEVICES": value}))
    fixes(found, "note", "unset CUDA_VISIBLE_DEVICES")


def test_gpus_are_counted_without_torch(monkeypatch, tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'Tesla T4, 535.10'\necho 'Tesla T4, 535.10'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert devices.nvidia_gpus() == ["Tesla T4, 535.10"] * 2


def one_gpu(free=70, capability=(9, 0), architectures=("sm_80", "sm_90")):
    major, minor = capability
    return fake_torch(
        available=True,
        get_device_properties=lambda number: SimpleNamespace(name="H100", major=major, minor=minor),
        mem_get_info=lambda number: (free * GIB, 80 * GIB),
        get_arch_list=lambda: list(architectures),
    )


def test_a_gpu_is_described():
    found = fine(only(devices.gpu(one_gpu(), 1)))
    assert found.name == "GPU 1"
    assert found.found == "H100, 70.0 GiB of 80.0 GiB free, capability 9.0, fast in bf16"
    assert "float32 instead of bf16" in only(devices.gpu(one_gpu(capability=(7, 5)), 0)).found


def test_a_gpu_that_others_use():
    fixes(only(devices.gpu(one_gpu(free=5), 0)), "note", "nvidia-smi", "CUDA_VISIBLE_DEVICES")


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ((7, 0), ("sm_75", "sm_80"), False),
        ((8, 6), ("sm_80", "sm_90"), True),
        ((10, 0), ("sm_80", "sm_90a"), False),
        ((12, 0), ("sm_80", "compute_90"), True),
        ((6, 1), ("sm_70", "compute_90"), False),
        ((6, 1), (), True),
    ],
)
def test_whether_torch_was_built_for_a_gpu(capability, architectures, runs):
    found = only(devices.gpu(one_gpu(capability=capability, architectures=architectures), 0))
    if runs:
        fine(found)
    else:
        assert "no code for it" in fixes(found, "problem", "pytorch.org").found


@pytest.mark.parametrize("variable", ["OMP_NUM_THREADS", "MKL_NUM_THREADS"])
def test_too_few_threads(variable):
    found = fixes(
        only(devices.threads(1, 64, 128, {variable: "1"})), "note", f"unset {variable}", "export OMP_NUM_THREADS=64"
    )
    assert f"{variable}=1" in found.found


def test_half_of_the_cores_is_too_few():
    fixes(only(devices.threads(4, 8, 16, {})), "note", "export OMP_NUM_THREADS=8")


def test_two_variables_for_threads():
    both = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    fixes(only(devices.threads(1, 8, 8, both)), "note", "unset OMP_NUM_THREADS MKL_NUM_THREADS")


def test_too_few_threads_that_no_variable_explains():
    assert fixes(only(devices.threads(1, 8, 8, {})), "note", "export OMP_NUM_THREADS=8").remedy.count("unset") == 0


def test_more_threads_than_a_container_may_run():
    fixes(only(devices.threads(64, 2, 2, {})), "note", "export OMP_NUM_THREADS=2")


@pytest.mark.parametrize(("number", "cores", "allowed"), [(1, 1, 1), (8, 8, 16), (16, 8, 16), (5, 8, 16)])
def test_threads_that_fit(number, cores, allowed):
    fine(only(devices.threads(number, cores, allowed, {"OMP_NUM_THREADS": str(number)})))


def test_the_cpu_and_its_vectors():
    backend = SimpleNamespace(cpu=SimpleNamespace(get_cpu_capability=lambda: "AVX512"))
    has = SimpleNamespace(
        _is_avx512_bf16_supported=lambda: True, _is_vnni_supported=lambda: True, _is_amx_tile_supported=lambda: False
    )
    fake = SimpleNamespace(backends=backend, cpu=has)
    found = fine(only(devices.cpu(fake, "Xeon", 2)))
    assert found.found == "Xeon, 2 cores; AVX512, AVX512-BF16, VNNI"
    backend.cpu.get_cpu_capability = lambda: "DEFAULT"
    fixes(only(devices.cpu(fake, "Xeon", 2)), "note", "ATEN_CPU_CAPABILITY")


def test_kernels_on_this_cpu_are_those_that_train():
    from saekit.sae.kernels import auto_backend

    bf16, kernels, selecting = devices.kernels(torch.device("cpu"), triton=False, capability=None)
    fine(bf16)
    fine(selecting)
    assert fine(kernels).found == f"auto is {auto_backend(torch.device('cpu'))}"


def test_what_runs_have_measured_is_told(tmp_path, monkeypatch):
    from saekit.sae.kernels import fastest

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(fastest, "types", lambda *_: ("fp32", "int8"))
    assert devices.selecting("cpu").endswith("none has yet")
    monkeypatch.setattr(fastest, "measure", lambda *_: {"fp32": 0.3, "int8": 0.1})
    fastest.seconds_by_type("cpu", fastest.Work(4096, 512, 16384, 32))
    assert "auto is int8 for D 512, M 16384, k 32, N 4096 (fp32 3.0 × its time)" in devices.selecting("cpu")
    assert devices.selecting("native").endswith("none has yet")


def test_a_cpu_without_a_compiler(monkeypatch):
    monkeypatch.setattr("saekit.sae.kernels.native_build.why_not", lambda: "no C++ compiler")
    _, kernels, _ = devices.kernels(torch.device("cpu"), triton=False, capability=None)
    found = fixes(kernels, "note", "apt install g++", "CXX")
    assert found.found.startswith("auto is cpu; ")
    assert found.found.endswith("no C++ compiler")


@pytest.mark.parametrize(
    ("name", "triton", "capability", "remedy"),
    [
        ("cpu", False, (9, 0), "pip install triton"),
        ("triton", True, (7, 0), "--kernels cpu"),
        ("triton", True, (9, 0), None),
    ],
)
def test_kernels_on_a_gpu(monkeypatch, name, triton, capability, remedy):
    chosen = SimpleNamespace(name=name, select_dtype=torch.bfloat16)
    monkeypatch.setattr("saekit.sae.kernels.choose_kernels", lambda *_: chosen)
    monkeypatch.setattr("saekit.sae.kernels.has_fast_bf16", lambda _: True)
    bf16, kernels = devices.kernels(torch.device("cuda", 0), triton=triton, capability=capability)
    assert "fast" in fine(bf16).found
    assert f"auto is {name}, selecting in bf16" in kernels.found
    if remedy is None:
        fine(kernels)
    else:
        fixes(kernels, "note", remedy)


# Ranks and 8 bits


def gloo(outcome, **environment):
    return only(ranks.gloo(outcome, environment))


def test_what_was_tried_with_gloo():
    met = {"ranks": 2, "seconds": 0.05, "address": "10.0.0.7"}
    assert "2 ranks met in 0.05 s over 10.0.0.7" in fine(gloo(Outcome(met))).found
    assert "(one machine)" in fine(gloo(Outcome(met | {"address": "127.0.1.1"}))).found
    assert "over eth0" in fine(gloo(Outcome(met | {"address": None}), GLOO_SOCKET_IFNAME="eth0")).found


def test_a_host_whose_name_leads_nowhere():
    found = gloo(Outcome({"ranks": 2, "seconds": 0.05, "address": None}))
    fixes(found, "note", "for several machines", "GLOO_SOCKET_IFNAME", "/etc/hosts")


def test_ranks_that_cannot_meet():
    failed = Outcome(failed="RuntimeError: [enforce fail at /src/device.cc:84] ifa != nullptr. Unable to find address")
    found = fixes(gloo(failed), "problem", "export GLOO_SOCKET_IFNAME=lo", "/etc/hosts")
    assert "(RuntimeError: Unable to find address)" in found.found
    fixes(gloo(failed, GLOO_SOCKET_IFNAME="nope0"), "problem", "unset GLOO_SOCKET_IFNAME (now nope0)")


def no_nccl():
    raise AttributeError("module 'torch._C' has no attribute '_nccl_version'")


def test_nccl():
    assert "2.27.5" in fine(only(ranks.nccl(lambda: (2, 27, 5), 8))).found
    fine(only(ranks.nccl(no_nccl, 1)))
    fixes(only(ranks.nccl(no_nccl, 2)), "problem", 'pip install --force-reinstall "torch', "WSL")


def test_deepspeed():
    fine(only(ranks.deepspeed(Outcome({"version": "0.19"}))))
    found = only(ranks.deepspeed(Outcome(failed="ImportError: no name")))
    fixes(found, "problem", 'pip install --force-reinstall --no-deps "deepspeed', "layer-map")
    assert "ImportError: no name" in found.found


def compilers(there, triton=False, **environment):
    return only(ranks.compilers(lambda name: name if name in there else None, environment, triton=triton))


def test_saekit_needs_no_compiler_without_triton():
    fine(compilers({"gcc", "c++", "ninja"}))
    found = fixes(compilers(set()), "note", "apt install g++", "pip install ninja")
    assert "saekit does not use" in found.found
    assert "ninja" not in compilers({"c++", "ninja"}).found.partition("no ")[2]
    assert fixes(compilers({"c++"}), "note", "pip install ninja").remedy.count("g++") == 0


def test_triton_needs_a_c_compiler():
    fixes(compilers(set(), triton=True), "problem", "apt install gcc", "--kernels cpu")
    assert "clang starts" in fine(compilers({"clang", "c++", "ninja"}, triton=True)).found
    assert "icx starts" in fine(compilers({"icx", "c++", "ninja"}, triton=True, CC="icx")).found


def test_triton_needs_pythons_headers(tmp_path):
    fixes(only(ranks.headers(tmp_path)), "problem", "python3-dev", "--kernels cpu")
    (tmp_path / "Python.h").touch()
    fine(only(ranks.headers(tmp_path)))


def test_8_bits():
    fixes(only(ranks.load_in_8bit(Outcome(), cuda=False)), "note", "--dtype bfloat16")
    fine(only(ranks.load_in_8bit(Outcome(), cuda=True)))
    fixes(only(ranks.load_in_8bit(Outcome(failed="no library"), cuda=True)), "problem", "--upgrade", "bitsandbytes")
    assert "on the CPU" in fine(only(ranks.adam8bit(Outcome({"device": "cpu", "moved": True})))).found
    found = only(ranks.adam8bit(Outcome({"device": "cuda"}, "RuntimeError: no kernel")))
    fixes(found, "problem", "--upgrade", "--optimizer adam")
    assert "cuda (RuntimeError: no kernel)" in found.found
    assert "changed nothing" in only(ranks.adam8bit(Outcome({"device": "cpu", "moved": False}))).found


# Probes


def probe(code, limit_s=60.0):
    with Probes({"one": code}, limit_s) as running:
        return running.outcome("one")


def test_gloo_is_really_tried(monkeypatch):
    for variable in ("GLOO_SOCKET_IFNAME", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(variable, raising=False)
    outcome = probe(probes.GLOO)
    assert outcome.failed is None
    assert outcome.said["ranks"] == (2 if os.uname().sysname == "Linux" else 1)


def test_gloo_on_an_interface_that_there_is_not(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nope0")
    outcome = probe(probes.GLOO)
    assert "nope0" in outcome.failed
    fixes(gloo(outcome, GLOO_SOCKET_IFNAME="nope0"), "problem", "unset GLOO_SOCKET_IFNAME")


def test_the_other_probes():
    codes = {"deepspeed": probes.DEEPSPEED, "bitsandbytes": probes.ADAM8BIT}
    codes = {library: code for library, code in codes.items() if importlib.util.find_spec(library) is not None}
    if not codes:
        pytest.skip("neither DeepSpeed nor bitsandbytes on this system")
    with Probes(codes) as running:
        for library in codes:
            outcome = running.outcome(library)
            assert outcome.failed is None
            assert outcome.said["version"]
            assert outcome.said.get("moved", True)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="elsewhere probes take turns")
def test_a_probe_that_hangs_is_ended_and_the_others_are_heard(tmp_path):
    done = tmp_path / "done"
    codes = {"good": f"said['x'] = 1; open({str(done)!r}, 'w').close()", "bad": "import time; time.sleep(100)"}
    with Probes(codes, limit_s=1) as running:
        while not done.is_file():
            time.sleep(0.05)
        start = time.monotonic()
        assert running.outcome("bad").failed == "no answer within 1 s"
        assert running.outcome("good") == Outcome({"x": 1})
        assert time.monotonic() - start < 20


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="elsewhere probes share a process")
def test_a_probe_that_crashes_takes_no_other_with_it():
    codes = {
        "crash": "import os; os.kill(os.getpid(), 11)",
        "error": "said['before'] = 1; raise ValueError('one\\ntwo')",
        "good": "import os; os.write(1, b'noise\\n'); said['x'] = 1",
    }
    with Probes(codes) as running:
        assert running.outcome("crash").failed == "ended by SIGSEGV"
        assert running.outcome("error") == Outcome({"before": 1}, "ValueError: one")
        assert running.outcome("good") == Outcome({"x": 1})


def test_probes_end_with_their_block(tmp_path):
    told = tmp_path / "pid"
    code = f"import os, time; open({str(told)!r}, 'w').write(str(os.getpid())); time.sleep(100)"
    with Probes({"one": code}):
        while not told.is_file() or not told.read_text():
            time.sleep(0.05)
    pid = int(told.read_text())
    deadline = time.monotonic() + 10
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(pid)


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # Killed, and waiting for somebody to take note of it.
    stat = Path(f"/proc/{pid}/stat")
    return not (stat.is_file() and stat.read_text().rpartition(")")[2].split()[0] == "Z")


def test_probes_that_cannot_be_started(monkeypatch):
    def refuse(*_, **__):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(probes.subprocess, "Popen", refuse)
    assert "Cannot allocate memory" in probe(probes.GLOO).failed


def test_the_current_folder_shadows_no_module(monkeypatch, tmp_path):
    if not hasattr(sys.flags, "safe_path"):
        pytest.skip("Python 3.10 always looks into the current folder")
    (tmp_path / "colorsys.py").write_text("raise RuntimeError('the wrong one')")
    monkeypatch.chdir(tmp_path)
    assert probe("import colorsys").failed is None


# The hub


def test_where_a_token_comes_from(tmp_path):
    file = tmp_path / "token"
    assert fine(only(hub.token({}, file))).found == "none: public repositories only"
    file.write_text("")
    assert only(hub.token({}, file)).found.startswith("none")
    file.write_text("hf_abc")
    assert fine(only(hub.token({}, file))).found == "a token is set (from the token file)"
    assert fine(only(hub.token({"HF_TOKEN": "hf_xyz"}, file))).found == "a token is set (from HF_TOKEN)"
    assert fine(only(hub.token({"HF_TOKEN": " "}, file))).found == "a token is set (from the token file)"
    kept = {"HF_TOKEN": "hf_xyz", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}
    fixes(only(hub.token(kept, file)), "note", "unset HF_HUB_DISABLE_IMPLICIT_TOKEN", "--hf-token")


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"])
def test_the_hub_switched_off(variable):
    found = fixes(only(hub.offline({variable: "1"})), "note", f"unset {variable}")
    assert f"{variable}=1" in found.found
    fine(only(hub.offline({variable: "0"})))


def test_what_is_cached(tmp_path):
    cache = tmp_path / "hub"
    assert fine(only(hub.contents(cache))).found == "nothing yet"
    blobs = cache / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    (cache / "version.txt").touch()
    for name in ("x", "y"):
        (blobs / name).write_bytes(b"0" * 2**20)
    snapshot = cache / "models--a--b" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    (snapshot / "x").symlink_to(blobs / "x")
    assert only(hub.contents(cache)).found == "1 repository, 2 MiB"
    assert hub.blob_bytes([cache / "models--a--b"], most=1) is None


# Resources


def test_memory():
    assert fine(only(limits.memory(20 * GIB, 32 * GIB, None))).found == "20.0 GiB free of 32.0 GiB"
    fixes(only(limits.memory(2 * GIB, 32 * GIB, None)), "note", "--layers", "--moments-dtype bf16")
    found = fixes(only(limits.memory(GIB // 2, 64 * GIB, 4 * GIB)), "problem", "--expansion-factor")
    assert "512 MiB free of the 4.0 GiB that this container or job may use (of 64.0 GiB in total)" in found.found


def test_swap():
    assert fine(only(limits.swap(0, 0))).found == "none"
    assert fine(only(limits.swap(4 * GIB, GIB))).found == "1.0 GiB of 4.0 GiB used"


def folder(path):
    return only(limits.folder(RESOURCES, "save-dir", path, "use --save-dir FOLDER"))


@pytest.mark.parametrize(("free", "state"), [(0.5, "problem"), (5, "note"), (500, "ok")])
def test_free_disk(monkeypatch, tmp_path, free, state):
    asked = []
    monkeypatch.setattr(
        limits.shutil, "disk_usage", lambda path: asked.append(path) or SimpleNamespace(free=free * GIB)
    )
    found = folder(tmp_path / "not" / "there")
    assert asked == [tmp_path]
    assert found.found.startswith(f"{size(free * GIB)} free at ")
    if state == "ok":
        fine(found)
    else:
        fixes(found, state, "free some", "--save-dir")


def test_a_folder_that_cannot_be_written(monkeypatch, tmp_path):
    file = tmp_path / "file"
    file.touch()
    assert "Not a directory" in fixes(folder(file / "cache"), "problem", "--save-dir").found

    def refuse(**_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(limits.tempfile, "TemporaryFile", refuse)
    assert "Read-only file system" in fixes(folder(tmp_path), "problem", "--save-dir").found


def test_looking_at_a_folder_leaves_nothing_in_it(tmp_path):
    folder(tmp_path / "cache")
    assert list(tmp_path.iterdir()) == []


def test_shared_memory(monkeypatch, tmp_path):
    def has(free):
        monkeypatch.setattr(limits.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))

    has(64 * 2**20)
    fixes(only(limits.shared_memory(2, tmp_path)), "problem", "--shm-size=1g")
    fixes(only(limits.shared_memory(0, tmp_path)), "note", "--shm-size=1g")
    has(8 * GIB)
    fine(only(limits.shared_memory(2, tmp_path)))
    assert list(limits.shared_memory(2, tmp_path / "missing")) == []


def test_open_files():
    fixes(only(limits.open_files(256, 1_048_576)), "note", "ulimit -n 4096")
    fixes(only(limits.open_files(256, 512)), "note", "ulimit -n 512")
    fixes(only(limits.open_files(256, -1)), "note", "ulimit -n 4096")
    fixes(only(limits.open_files(256, 256)), "note", "administrator")
    fine(only(limits.open_files(1024, 1024)))
    assert fine(only(limits.open_files(-1, -1))).found == "no limit"


def test_a_system_without_such_a_limit(monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)
    fine(only(limits.open_files(*limits.open_file_limits())))


def test_home_is_not_named(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert shown(tmp_path / "a" / "b") == os.path.join("~", "a", "b")
    assert shown(tmp_path.parent) == str(tmp_path.parent)
