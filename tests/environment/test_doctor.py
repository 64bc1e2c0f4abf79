"""What `mixora doctor` tells, on this machine and on broken ones."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from packaging.requirements import Requirement
from typer.testing import CliRunner

from mixora import environment
from mixora.cli import app
from mixora.commands.doctor import describe
from mixora.environment import Ability, Environment, Package, abilities, examine, machine
from mixora.environment.machine import Accelerator, read_machine
from mixora.environment.packages import read_packages
from mixora.kernels import KERNELS


@pytest.fixture(scope="module")
def found():
    return examine()


def test_this_machine_can_train(found):
    assert found.obstacles == []
    by_name = {ability.name: ability for ability in found.abilities}
    assert found.abilities[0].name == "training" and found.abilities[0].works
    assert {f"kernel {name}" for name in KERNELS} <= by_name.keys()
    assert all(by_name[f"kernel {name}"].works for name in KERNELS if name != "triton")
    assert by_name["Hugging Face hub"].works is None
    assert by_name["fused loss"].works


def test_versions_and_ranges_are_those_of_the_metadata(found):
    needed = {package.name: package for package in found.packages if package.is_needed}
    lines = [Requirement(line) for line in metadata.requires("mixora")]
    assert needed.keys() == {line.name for line in lines if "extra" not in str(line.marker)}
    assert all(needed[line.name].version == metadata.version(line.name) for line in lines if line.name in needed)
    assert needed["torch"].range == str(next(line.specifier for line in lines if line.name == "torch"))
    assert {"bitsandbytes", "torchao", "ray", "lm-eval"} <= {p.name for p in found.packages if not p.is_needed}


def test_the_machine(found):
    machine = found.machine
    assert machine.cores == len(os.sched_getaffinity(0)) and machine.memory > machine.memory_free > 0
    assert bool(machine.accelerators) == torch.cuda.is_available()
    if "AVX512" in torch.backends.cpu.get_cpu_capability():
        assert "avx512f" in machine.features


def test_text_and_json_and_exit_codes(found, monkeypatch):
    monkeypatch.setattr(environment, "examine", lambda network: found)
    told = CliRunner().invoke(app, ["doctor"])
    assert told.exit_code == 0 and "mixora can train here" in told.output and "kernel joint" in told.output
    assert f"torch {metadata.version('torch')}" in told.output
    assert json.loads(CliRunner().invoke(app, ["doctor", "--json"]).output)["can_train"] is True
    lacking = replace(found, packages=(Package("peft", "0.1", ">=0.21", True),))
    monkeypatch.setattr(environment, "examine", lambda network: lacking)
    told = CliRunner().invoke(app, ["doctor"])
    assert told.exit_code == 1
    assert 'peft 0.1 (supported: >=0.21): pip install "peft>=0.21"' in told.output


def test_obstacles_say_what_to_do(found):
    machine = replace(found.machine, disk_free=2**20)
    broken = (Ability("training", False, "ImportError: no torch", is_needed=True), Ability("ray", False, "x"))
    packages = (Package("torch", None, ">=2.11", True), Package("triton", None, "", False))
    assert Environment(machine, packages, broken).obstacles == [
        'torch is not installed (supported: >=2.11): pip install "torch>=2.11"',
        "training: ImportError: no torch",
        "only 1 MiB of disk are free here: make room",
    ]


def test_gpus_are_described(found):
    gpu = Accelerator("NVIDIA H100", "cuda", 80 * 2**30, "9.0", True)
    text = "\n".join(describe(replace(found, machine=replace(found.machine, accelerators=(gpu,)))))
    assert "NVIDIA H100 (cuda), 80.0 GiB, compute capability 9.0, bf16" in text


def test_a_container_without_proc_is_no_obstacle(monkeypatch):
    monkeypatch.setattr(environment.machine, "_lines_of", lambda path: {})
    machine = read_machine()
    assert machine.memory > 0 and machine.memory_free is None and machine.features == ()
    files = {"/proc/meminfo": {"MemTotal": "4096 kB"}, "/sys/fs/cgroup/memory.max": {str(2**20): ""}}
    monkeypatch.setattr(environment.machine, "_lines_of", lambda path: files.get(path, {}))
    assert read_machine().memory == 2**20


def test_the_hub_is_tried_only_when_asked(monkeypatch):
    asked = []

    def refuse(request, timeout):
        asked.append((request.full_url, timeout))
        raise OSError("no route to host")

    monkeypatch.setattr(abilities.urllib.request, "urlopen", refuse)
    assert abilities._hub(False).works is None and asked == []
    assert not abilities._hub(True).works and asked == [("https://huggingface.co", 3)]


def test_no_secrets_and_no_home(found, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    error = ImportError(f"cannot import name 'x' from 'torch' ({Path.home()}/site-packages/torch)\nmore")
    assert abilities._reason(error) == "ImportError: cannot import name 'x' from 'torch' (~/site-packages/torch)"
    text = "\n".join(describe(found)) + json.dumps(found.to_dict())
    assert "hf_secret" not in text and str(Path.home()) not in text and str(Path.cwd()) not in text


def test_without_metadata_the_optional_packages_are_left(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", missing)
    assert not any(package.is_needed for package in read_packages())


def test_a_torch_that_does_not_load_is_told(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('libcuda.so is missing')")
    program = "import mixora_command; mixora_command.main()"
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", program, "doctor"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "training: ImportError: libcuda.so is missing" in done.stdout


def test_what_is_not_installed_comes_with_its_command(monkeypatch):
    monkeypatch.setattr(abilities, "version_of", lambda name: None)
    told = {ability.name: ability for ability in abilities._of_libraries()}
    bases = told["bases in 4 and 8 bits, bitsandbytes"]
    assert (bases.works, bases.why) == (False, 'pip install "mixora[quantised]"')


@pytest.mark.parametrize(("version", "told"), [(None, "the package is not installed"), ("2.8", "flash-attn 2.8")])
def test_flash_attention_where_there_is_a_gpu(version, told, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(abilities, "version_of", lambda name: version)
    found = abilities._flash_attention()
    assert found.works is bool(version) and told in found.why


def test_gpus_are_found(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (apple,) = machine._read_accelerators()
    assert (apple.name, apple.kind, apple.memory) == ("Apple GPU", "mps", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    facts = SimpleNamespace(name="NVIDIA H100", total_memory=2**36, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: facts)
    assert machine._read_accelerators() == (Accelerator("NVIDIA H100", "cuda", 2**36, "9.0", True),) * 2


def test_what_other_versions_of_python_need_is_left(monkeypatch):
    lines = ["torch>=2", 'tomli>=1; python_version < "3"', 'numpy>=2; python_version >= "3"', 'ray>=2; extra == "ray"']
    monkeypatch.setattr(metadata, "requires", lambda name: lines)
    assert {package.name for package in read_packages() if package.is_needed} == {"torch", "numpy"}
