"""README and docs: links resolve, what they name exists, their code runs."""

import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from scripts import api_reference

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TESTS = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(page: pathlib.Path, language: str) -> list[str]:
    """The page's code blocks."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.M | re.S)


def anchors(page: pathlib.Path) -> set[str]:
    """The names that GitHub gives to its headings."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@every_page
def test_links_resolve(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@every_page
def test_files_and_tests_that_are_named_exist(page):
    text = page.read_text()
    folders = "benchmarks|configs|docs|examples|resfu_jax|scripts|tests"
    for path in re.findall(rf"\b((?:{folders})/[\w/]+\.(?:py|md|png|json))\b", text):
        assert (ROOT / path).exists(), path
    for name in re.findall(r"`(test_\w+)`", text):
        assert f"def {name}(" in TESTS, name


def test_every_page_is_in_the_table():
    linked = set(re.findall(r"\]\((\w+\.md)\)", (ROOT / "docs/README.md").read_text()))
    assert linked == {page.name for page in PAGES[1:]} - {"README.md"}


def test_pages_that_are_read_first_are_short():
    for name, lines in {"README": 40, "performance": 120}.items():
        assert len((ROOT / "docs" / f"{name}.md").read_text().splitlines()) <= lines


@every_page
def test_code_is_python(page):
    for code in blocks(page, "python"):
        compile(code, page.name, "exec")


def test_no_address_is_invented():
    """Of this project's own, none is known."""
    kinds = {".py", ".md", ".ipynb", ".html", ".toml", ".txt", ""}
    folders = "benchmarks colab configs docs examples resfu_jax scripts tests .ci".split()
    files = [*ROOT.iterdir(), *(file for name in folders for file in (ROOT / name).rglob("*"))]
    ours = re.compile(r"://[^\s\"')>]*resfu[-_]?jax|colab\.research\.google\.com", re.I)
    for file in files:
        if file.is_file() and file.suffix in kinds and not file.name.startswith(".git"):
            assert not (found := ours.search(file.read_text(errors="replace"))), (file, found)


def test_the_api_reference_is_up_to_date():
    assert api_reference.PAGE.read_text() == api_reference.reference(), (
        "python -m scripts.api_reference writes it anew"
    )


def test_backbone_of_extending():
    def logits():
        names = {}
        exec(blocks(ROOT / "docs/extending.md", "python")[3], names)
        return names["model"](jnp.ones((1, 32, 48, 3)))

    assert jax.eval_shape(logits).shape == (1, 32, 48, 5)


@pytest.fixture
def run(tmp_path):
    """Runs Python in a process of its own, which finds learned_jbu.py as extending.md has it."""
    upsampler, use, config, _, task, task_config = blocks(ROOT / "docs/extending.md", "python")
    (tmp_path / "focal.py").write_text(task)
    (tmp_path / "shapes_focal.py").write_text(task_config)
    (tmp_path / "learned_jbu.py").write_text(upsampler)
    (tmp_path / "use.py").write_text(use)
    (tmp_path / "shapes_learned_jbu.py").write_text(config)

    def run(*arguments):
        paths = os.pathsep.join([str(tmp_path), str(ROOT), str(ROOT / "tests")])
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=os.environ
            | dict(
                PYTHONPATH=paths,
                UPSAMPLERS="learned_jbu toy_upsampler",
                TMPDIR=str(tmp_path),
            ),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    return run


@pytest.mark.slow
def test_upsamplers_of_other_packages_pass_the_common_suite(run, tmp_path):
    """That of docs/extending.md and toy_upsampler.py, which needs nothing of this package."""
    run(tmp_path / "use.py")
    suite = ["-m", "pytest", "-q", "-rA", "-n", "0", "-p", "no:cacheprovider"]
    output = run(*suite, "tests/test_upsamplers_common.py", "-k", "learned_jbu or toy")
    for name in ("learned_jbu", "toy"):
        assert len(re.findall(rf"^PASSED .*\b{name}\]", output, re.M)) >= 18


@pytest.mark.slow
def test_upsampler_of_extending_trains(run, tmp_path):
    output = run("train.py", "--config", tmp_path / "shapes_learned_jbu.py", "--dry_run")
    assert "step 2/2  validation: mIoU" in output


@pytest.mark.slow
def test_task_of_extending_trains(run, tmp_path):
    output = run("train.py", "--config", tmp_path / "shapes_focal.py", "--dry_run")
    assert "step 2/2  validation: mIoU" in output
