"""What a release is made of: version, proofs, licences, workflows, image, papers for those who come from outside."""

import json
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from typer.testing import CliRunner

import mixora
from benchmarks import startup
from mixora.cli import app
from release import licences, proof

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.findall(r"^([a-z-]+):", MAKEFILE, flags=re.MULTILINE))
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TORCH = re.search(r"torch==[\d.]+", MAKEFILE).group()


def lines_of(name):
    return (ROOT / name).read_text(encoding="utf-8").splitlines()


def instructions(word):
    """The arguments of each such instruction of the Dockerfile, continued lines joined."""
    joined = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    return [line.removeprefix(f"{word} ") for line in joined.splitlines() if line.startswith(f"{word} ")]


# version


def test_the_version_is_that_of_the_installation():
    assert mixora.__version__ == version("mixora")
    assert CliRunner().invoke(app, ["--version"]).output == f"mixora {version('mixora')}\n"


def test_the_version_is_told_without_heavy_libraries():
    program = "import sys; from mixora_command import main\ntry: main()\nfinally: print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program, "--version"], capture_output=True, text=True, check=True)
    assert not {"torch", "peft", "transformers", "numpy"} & set(done.stdout.split())


def test_the_changelog_keeps_its_form():
    headings = [line for line in lines_of("CHANGELOG.md") if line.startswith("#")]
    assert headings[:2] == ["# Changelog", "## [Unreleased]"]
    for heading in headings[2:]:
        kind = r"### (Added|Changed|Deprecated|Removed|Fixed|Security)"
        assert re.fullmatch(kind + r"|## \[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", heading), heading


# what `make dist` and `make sbom` prove


def write_wheel(path, **files):
    with zipfile.ZipFile(path, "w") as wheel:
        for name, text in files.items():
            wheel.writestr(name, text)
    return path


def test_wheels_that_differ_are_refused(tmp_path):
    one = write_wheel(tmp_path / "one.whl", a="1", b="2")
    assert proof.compare_wheels(one, write_wheel(tmp_path / "same.whl", b="2", a="1")) == 2
    with pytest.raises(SystemExit, match=r"differs .* in b, c$"):
        proof.compare_wheels(one, write_wheel(tmp_path / "other.whl", a="1", b="3", c=""))
    with pytest.raises(SystemExit, match=r"valid: one file \*.whl"):
        proof.find_one(tmp_path, "*.whl")


def test_the_sdist_names_files_that_are_there():
    for name in PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["only-include"]:
        assert (ROOT / name).exists(), name


def component(name, *found):
    return {"name": name, "version": "1", "licenses": list(found)}


def test_licences_are_read_and_judged(tmp_path, monkeypatch):
    monkeypatch.setattr(licences, "PAGE", tmp_path / "licences.md")
    good = [
        component("b", {"expression": "(MIT OR Apache-2.0) AND 0BSD"}),
        component("A", {"license": {"name": "License :: OSI Approved :: BSD License"}}, {"license": {"id": "ISC"}}),
        component("mixora"),
    ]
    sbom = tmp_path / "sbom.json"
    sbom.write_text(json.dumps({"components": good}))
    licences.main(sbom)
    rows = (tmp_path / "licences.md").read_text().splitlines()[-2:]
    assert rows == ["| A | 1 | BSD License, ISC |", "| b | 1 | 0BSD, Apache-2.0, MIT |"]
    bad = [component("c", {"expression": "MIT OR GPL-3.0-only"}), component("d")]
    sbom.write_text(json.dumps({"components": good + bad}))
    with pytest.raises(SystemExit, match=r"not allowed:\nc: \['GPL-3.0-only', 'MIT'\]\nd: \[\]$"):
        licences.main(sbom)


def test_the_page_lists_the_licence_of_every_dependency():
    listed = {
        canonicalize_name(line.split("|")[1].strip()) for line in lines_of("docs/licences.md") if line[:2] == "| "
    }
    needed = {canonicalize_name(Requirement(line).name) for line in PROJECT["project"]["dependencies"]}
    assert needed <= listed


# workflows


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_call_make_targets_and_may_do_little(path):
    workflow = yaml.safe_load(path.read_text())
    assert set(workflow.get("permissions").values()) <= {"read"}
    for name, job in workflow["jobs"].items():
        assert name == "publish" or set(job.get("permissions", {}).values()) <= {"read"}
        assert job["timeout-minutes"] <= 60
        for step in job["steps"]:
            called = re.sub(r"\$\{\{.*?\}\}", "", step.get("run", "make")).split()
            words = {word for word in called[1:] if "=" not in word}
            assert called[0] == "make" and words <= TARGETS, step
            assert re.search(r"@(v\d+|release/v\d+|[0-9a-f]{40})$", step.get("uses", "@v1")), step


def test_only_a_job_with_reviewers_publishes():
    release = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())
    publish = release["jobs"]["publish"]
    assert publish["environment"] == "pypi" and publish["permissions"] == {"id-token": "write"}
    assert publish["needs"] == "build" and not any("run" in step for step in publish["steps"])
    # YAML 1.1 reads the key `on` as true
    assert release[True] == {"push": {"tags": ["v*"]}}


# the image


def test_the_image_copies_what_is_there_and_not_ignored():
    kept = {line[1:] for line in lines_of(".dockerignore") if line.startswith("!")}
    copied = {name.removesuffix("/") for line in instructions("COPY") for name in line.split()[:-1]}
    assert copied == kept
    assert all((ROOT / name).exists() for name in copied)
    # what the build reads besides the source
    assert {PROJECT["project"]["readme"], *PROJECT["project"]["license-files"], "pyproject.toml"} <= copied


def test_the_image_is_pinned_and_unprivileged():
    (base,) = instructions("FROM")
    assert re.fullmatch(r"nvidia/cuda:[\d.]+-runtime-ubuntu[\d.]+", base)
    assert instructions("USER") == ["10001"]
    runs = " ".join(instructions("RUN"))
    assert "--uid 10001 mixora" in runs
    assert runs.count("pip install") == runs.count("--constraint constraints.txt") == 2
    assert f'"{TORCH}"' in runs and TORCH in lines_of("constraints.txt")
    named = PROJECT["tool"]["hatch"]["version"]["raw-options"]["dist_name"]
    assert f"SETUPTOOLS_SCM_PRETEND_VERSION_FOR_{named.upper()}=$VERSION pip install" in runs
    (extras,) = re.findall(r'"\.\[(.*?)\]"', runs)
    assert set(extras.split(",")) <= set(PROJECT["project"]["optional-dependencies"])
    (entry,) = instructions("ENTRYPOINT")
    assert json.loads(entry)[0] in PROJECT["project"]["scripts"]
    assert not re.search(r"token|secret|password|api_key", " ".join(instructions("ENV") + instructions("ARG")), re.I)


# papers


def test_the_citation_file_names_the_four_papers():
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(found) and found["cff-version"] == "1.2.0"
    assert found["license"] == PROJECT["project"]["license"]
    papers = {paper["url"].rpartition("/")[2]: paper for paper in found["references"]}
    methods = {
        name: (ROOT / "docs" / "methods" / f"{name}.md").read_text() for name in ("sira", "hilo", "pesc", "adamix")
    }
    assert all(any(f"arXiv {number}" in text for number in papers) for text in methods.values()) and len(papers) == 4
    for paper in papers.values():
        assert paper["type"] == "article" and paper["title"] and isinstance(paper["year"], int)
        assert all(set(author) == {"family-names", "given-names"} for author in paper["authors"])


def test_contributing_is_short_and_says_how_to_add_a_part():
    lines = lines_of("CONTRIBUTING.md")
    assert len(lines) <= 60 and "## Add a part" in lines
    # line by line: `make a b  # what it is`
    called = {word for line in lines if line.startswith("make ") for word in line.split("#")[0].split()[1:]}
    assert called <= TARGETS and {"dist", "sbom"} <= called


# start-up


def test_start_up_is_measured_in_processes_of_its_own(tmp_path, monkeypatch):
    busy = "import time\nwhile time.process_time() < 0.3: pass"
    monkeypatch.setattr(startup, "PROGRAMS", {"import peft": [busy], "python": ["pass"]})
    path = startup.main(["--repeats", "2", "--name", "quick"], tmp_path)
    peft, python = json.loads(path.read_text())["rows"]
    assert path.name.startswith("quick-") and peft["ratio"] == 1
    assert peft["cpu_seconds"] >= 0.3 > python["cpu_seconds"]
