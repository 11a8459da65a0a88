"""The compiled CPU executor is found, loaded, and missed loudly; wheels are built with it and without."""

import ctypes
import importlib.readers
import os
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import time
import types
import zipfile
from pathlib import Path

import pytest

import diffopt
from diffopt.errors import CompiledExecutorWarning, SettingsError
from diffopt.solvers import library

ROOT = Path(__file__).resolve().parents[2]
SUFFIX = ".dll" if sys.platform == "win32" else ".so"
VARIANTS = ("baseline", "avx2", "avx512")
NEEDED = {"avx2": {"avx2", "fma"}, "avx512": {"avx512f", "avx512dq", "avx512vl", "avx512bw"}}


def compiler() -> str | None:
    """Return the C++ compiler that an installation here finds, if any."""
    return next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))), None)


def widest(limit: str = "avx512") -> str | None:
    """Return the variant to expect of an installation, read off the machine: what Linux says of its processor."""
    if not compiler():
        return None
    info = Path("/proc/cpuinfo")
    flags = set(info.read_text().split()) if info.exists() else set()
    allowed = VARIANTS[: VARIANTS.index(limit) + 1]
    return next(name for name in reversed(allowed) if NEEDED.get(name, set()) <= flags)


def run(code: str, cwd: Path = ROOT, **variables: str) -> str:
    """Run code in a fresh process, without the variables that the library reads but those given; return its output."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DIFFOPT_CPU_")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=cwd, env=environment | variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


PRINT_VARIANT = """
import warnings
from diffopt.solvers import library
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    assert (library.load() is None) == (library.variant() is None)
assert len(caught) == (library.load() is None), [str(w.message) for w in caught]
if library.load() is not None:
    assert library.load() is library.load()
    assert library.load().diffopt_abi() == library.ABI
print(library.variant())
"""


def test_this_installation_has_the_widest_variant():
    # Without a compiler there is none, and that is no failure.
    assert run(PRINT_VARIANT) == str(widest())


def test_the_empty_path_means_none_and_warns_once():
    code = """
import warnings
from diffopt import CompiledExecutorWarning
from diffopt.solvers import library
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    assert [library.load(), library.variant(), library.load()] == [None] * 3
(warning,) = caught
assert warning.category is CompiledExecutorWarning and issubclass(warning.category, UserWarning)
print(warning.message)
"""
    message = run(code, DIFFOPT_CPU_LIBRARY="")
    assert re.search("executor is missing .*DIFFOPT_CPU_LIBRARY.*empty.*several times longer.*unset", message)


def test_the_child_of_a_fork_does_not_wait_for_a_thread_of_its_parent():
    code = """
import os, signal, warnings
from diffopt.solvers import library
warnings.simplefilter("ignore")
library._lock.acquire()  # as another thread that is searching at this moment
child = os.fork()
if not child:
    signal.alarm(60)
    library.load()
    os._exit(0)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert run(code) == "0"


@pytest.fixture
def fresh(monkeypatch):
    """A process that has not looked for the library yet, and an environment that says nothing of it."""
    monkeypatch.delenv("DIFFOPT_CPU_LIBRARY", raising=False)
    monkeypatch.delenv("DIFFOPT_CPU_LEVEL", raising=False)
    monkeypatch.setattr(library, "_looked", False)
    monkeypatch.setattr(library, "_library", None)
    return monkeypatch


@pytest.mark.parametrize("level", VARIANTS)
def test_the_level_limits_the_variant_of_this_installation(fresh, level):
    fresh.setenv("DIFFOPT_CPU_LEVEL", level)
    found, _ = library.find()
    assert (found and found.variant) == widest(level)


@pytest.fixture
def pretend(fresh, tmp_path):
    """Return a function that adds a folder to the search, with libraries of an ABI each (None: a broken file)."""
    places: list[Path] = []
    answers: dict[str, tuple[int | None, int]] = {}

    def cdll(path: str):
        abi, level = answers[path]
        if abi is None:
            raise OSError("file too short")
        return types.SimpleNamespace(path=path, diffopt_abi=lambda: abi, diffopt_cpu_level=lambda: level)

    def put(machine: int, **abis: int | None) -> Path:
        places.append(tmp_path / str(len(places)))
        places[-1].mkdir()
        for name, abi in abis.items():
            path = places[-1] / f"libdiffopt_cpu_{name}{SUFFIX}"
            path.touch()
            answers[str(path)] = (abi, machine)
        return places[-1]

    fresh.setattr(ctypes, "CDLL", cdll)
    fresh.setattr(library, "folders", lambda: places)
    return put


ALL = dict.fromkeys(VARIANTS, library.ABI)


@pytest.mark.parametrize("machine", range(3))
@pytest.mark.parametrize("limit", range(3))
def test_the_widest_variant_that_is_allowed(pretend, fresh, machine, limit):
    expected = min(machine, limit)
    folder = pretend(machine, **ALL)
    fresh.setenv("DIFFOPT_CPU_LEVEL", VARIANTS[limit])
    assert library.variant() == VARIANTS[expected]
    assert library.loaded().path == folder / f"libdiffopt_cpu_{VARIANTS[expected]}{SUFFIX}"
    assert library.load().path == str(library.loaded().path)


def test_a_variant_that_was_not_built_is_not_missed(pretend):
    pretend(2, baseline=library.ABI, avx2=library.ABI)
    assert library.variant() == "avx2"  # Warnings are errors here.


def test_the_first_folder_that_has_a_library(pretend):
    pretend(0)
    pretend(1, **ALL)
    pretend(2, **ALL)
    assert library.variant() == "avx2"


def test_another_abi_counts_as_missing(pretend):
    pretend(2, **dict.fromkeys(VARIANTS, library.ABI + 1))
    expected = f"version {library.ABI + 1}, but this version of diffopt needs {library.ABI}.*make cpu"
    with pytest.warns(CompiledExecutorWarning, match=expected):
        assert library.load() is None
    assert library.load() is None and library.variant() is None  # and warns no more


@pytest.mark.parametrize("abi", [None, library.ABI + 1], ids=["broken", "of another ABI"])
def test_a_library_that_is_second_best_is_taken_with_a_warning(pretend, abi):
    pretend(2, baseline=library.ABI, avx2=library.ABI, avx512=abi)
    expected = "cannot be used .*avx512.*(too short|version).*avx2.* is taken instead"
    with pytest.warns(CompiledExecutorWarning, match=expected):
        assert library.variant() == "avx2"
    assert library.variant() == "avx2"


def test_a_stale_build_does_not_hide_a_good_one(pretend):
    pretend(2, baseline=library.ABI - 1)
    good = pretend(0, **ALL)
    with pytest.warns(CompiledExecutorWarning, match="is taken instead"):
        assert library.loaded().path.parent == good


def test_where_warnings_are_errors_the_first_call_raises(pretend):
    with pytest.raises(CompiledExecutorWarning):
        library.load()
    assert library.load() is None


def test_a_named_library_is_taken_instead_of_all_others(pretend, fresh):
    pretend(2, **ALL)
    folder = pretend(1, baseline=library.ABI, **{"of_mine": library.ABI})
    fresh.setenv("DIFFOPT_CPU_LIBRARY", str(folder / f"libdiffopt_cpu_baseline{SUFFIX}"))
    fresh.setenv("DIFFOPT_CPU_LEVEL", "nonsense")  # does not concern it
    assert (library.variant(), library.loaded().path.parent) == ("baseline", folder)
    fresh.setenv("DIFFOPT_CPU_LIBRARY", str(folder / f"libdiffopt_cpu_of_mine{SUFFIX}"))
    assert library.variant() == "baseline"  # What was found stays.
    fresh.setattr(library, "_looked", False)
    assert library.variant() == "of_mine"


def test_a_named_library_that_the_machine_cannot_run_is_refused(pretend, fresh):
    folder = pretend(1, **ALL)
    fresh.setenv("DIFFOPT_CPU_LIBRARY", str(folder / f"libdiffopt_cpu_avx512{SUFFIX}"))
    with pytest.raises(SettingsError, match="compiled for avx512, but this machine runs at most avx2"):
        library.load()


def test_a_path_that_cannot_be_used_raises_every_time(fresh, tmp_path):
    text = tmp_path / "text.so"
    text.write_text("no library")
    foreign = sys.modules["_ctypes"].__file__  # a library, but not ours
    cases = {tmp_path / "none.so": "no such file", text: "cannot be loaded", foreign: "not a library of"}
    for path, why in cases.items():
        fresh.setenv("DIFFOPT_CPU_LIBRARY", str(path))
        for _ in range(2):
            with pytest.raises(SettingsError, match=f"DIFFOPT_CPU_LIBRARY.*expected.*got '{path}'.*{why}.*make cpu"):
                library.load()


def test_a_level_that_is_none(fresh):
    fresh.setenv("DIFFOPT_CPU_LEVEL", "sse")
    with pytest.raises(SettingsError, match="DIFFOPT_CPU_LEVEL.*expected.*baseline, avx2, avx512, got 'sse'.*unset"):
        library.variant()


def test_threads_look_once(pretend, fresh):
    pretend(2, **ALL)
    looks, answers, find = [], [], library.find

    def slow_find():
        looks.append(1)
        time.sleep(0.2)
        return find()

    fresh.setattr(library, "find", slow_find)
    threads = [threading.Thread(target=lambda: answers.append(library.load())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(looks) == 1 and len(answers) == 8 and set(map(id, answers)) == {id(library.load())}


def test_the_folders(monkeypatch, tmp_path):
    beside = Path(library.__file__).parent
    assert library.folders() == [beside, beside.parents[1] / "build" / "cpu"]
    # An installer that keeps what it built elsewhere than the sources.
    (tmp_path / f"libdiffopt_cpu_baseline{SUFFIX}").touch()
    both = importlib.readers.MultiplexedPath(beside, tmp_path)
    monkeypatch.setattr(library.resources, "files", lambda package: both)
    monkeypatch.setattr(library, "_SOURCE_TREE", tmp_path)  # site-packages, where a build/ would be another package
    assert library.folders() == [tmp_path]
    # In a zip file.
    monkeypatch.setattr(library.resources, "files", lambda package: zipfile.Path(zipfile.ZipFile(tmp_path / "z", "w")))
    assert library.folders() == []


def test_the_warning_is_public():
    assert diffopt.CompiledExecutorWarning is CompiledExecutorWarning
    assert issubclass(CompiledExecutorWarning, diffopt.DiffoptWarning)


# Slow: these need a C++ compiler, and packages from the index.


@pytest.mark.slow
def test_a_compiled_library_of_another_abi_is_refused(fresh, tmp_path):
    source, path = tmp_path / "fake.cpp", tmp_path / f"libdiffopt_cpu_baseline{SUFFIX}"
    functions = f"int diffopt_abi() {{ return {library.ABI + 7}; }} int diffopt_cpu_level() {{ return 0; }}"
    source.write_text(f'extern "C" {{ {functions} }}')
    subprocess.run([compiler(), "-shared", "-fPIC", source, "-o", path], check=True)
    fresh.setattr(library, "folders", lambda: [tmp_path])
    with pytest.warns(CompiledExecutorWarning, match=f"version {library.ABI + 7}, but .* needs {library.ABI}"):
        assert library.load() is None
    fresh.setenv("DIFFOPT_CPU_LIBRARY", str(path))
    with pytest.raises(SettingsError, match=f"version {library.ABI + 7}, but .* needs {library.ABI}"):
        library.find()


@pytest.fixture(scope="module")
def builder(tmp_path_factory):
    """Return a function that runs Python in an environment that has pip and the build backend, and no torch."""
    folder = tmp_path_factory.mktemp("builder")
    environment = os.environ | {"PIP_CONSTRAINT": str(ROOT / "constraints.txt"), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}

    def python(*command: object, **variables: str) -> None:
        command = [folder / "bin" / "python", *command]
        done = subprocess.run(command, cwd=ROOT, env=environment | variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python("-m", "pip", "install", "--quiet", "scikit-build-core")
    return python


def contents(wheel_folder: Path) -> tuple[Path, set[str], set[str]]:
    """Return a folder's only wheel, its libraries and its other files; it must be of any Python and this platform."""
    (wheel,) = wheel_folder.glob("*.whl")
    assert re.fullmatch(rf"diffopt_torch-{re.escape(diffopt.__version__)}-py3-none-(?!any)\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as opened:
        names = {name for name in opened.namelist() if name.startswith("diffopt/")}
        assert any(name.endswith("/licenses/LICENSE") for name in opened.namelist())
        assert all(name.startswith(("diffopt/", "diffopt_torch-")) for name in opened.namelist())
        assert not any(name.startswith("diffopt/solvers/cpu/") for name in names)
    libraries = {name for name in names if name.endswith(SUFFIX)}
    return wheel, libraries, names - libraries


SOURCES = {"diffopt/py.typed"} | {path.relative_to(ROOT).as_posix() for path in ROOT.glob("diffopt/**/*.py")}


def test_the_package_has_sources():
    assert "diffopt/solvers/library.py" in SOURCES


@pytest.mark.slow
def test_a_wheel_has_the_library_and_works(builder, tmp_path):
    builder("-m", "pip", "wheel", "--no-deps", "--wheel-dir", tmp_path, ROOT)
    wheel, libraries, others = contents(tmp_path)
    assert others >= SOURCES
    expected = VARIANTS[: VARIANTS.index(widest()) + 1]  # at least: the compiler may know more than the machine
    assert libraries >= {f"diffopt/solvers/libdiffopt_cpu_{name}{SUFFIX}" for name in expected}
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    code = PRINT_VARIANT + "print(library.loaded().path.parent)"
    output = run(code, cwd=tmp_path, PYTHONPATH=str(tmp_path / "installed"))
    assert output.split() == [widest(), str(tmp_path / "installed" / "diffopt" / "solvers")]


@pytest.mark.slow
def test_without_a_compiler_the_wheel_has_no_library_and_works(builder, tmp_path):
    builder("-m", "pip", "wheel", "--no-deps", "--wheel-dir", tmp_path, ROOT, CXX="/nonexistent")
    wheel, libraries, others = contents(tmp_path)
    assert not libraries and others >= SOURCES
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    code = PRINT_VARIANT + "print(caught[0].message)"
    output = run(code, cwd=tmp_path, PYTHONPATH=str(tmp_path / "installed"))
    why = re.escape(f"(no libdiffopt_cpu_baseline{SUFFIX} in {tmp_path / 'installed' / 'diffopt' / 'solvers'})")
    assert re.match(rf"None\n.*is missing {why}.*install diffopt again", output)


@pytest.mark.slow
def test_the_source_distribution_builds(builder, tmp_path):
    builder("-c", f"from scikit_build_core.build import build_sdist; build_sdist({str(tmp_path)!r})")
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.split("/", 1)[1] for name in opened.getnames()}
    compiled = {path.relative_to(ROOT).as_posix() for path in (ROOT / "diffopt/solvers/cpu").iterdir()}
    assert compiled | SOURCES | {"CMakeLists.txt", "LICENSE", "pyproject.toml"} <= names
    builder("-m", "pip", "wheel", "--no-deps", "--wheel-dir", tmp_path, archive)
    _, libraries, others = contents(tmp_path)
    assert f"diffopt/solvers/libdiffopt_cpu_baseline{SUFFIX}" in libraries and others >= SOURCES


@pytest.mark.slow
def test_an_editable_installation_sees_the_source_tree(builder, tmp_path):
    # In a copy: it writes to build/cpu/. A module added later is seen, and a tree that is named goes first.
    tree, site = tmp_path / "tree", tmp_path / "site"
    ignored = shutil.ignore_patterns(".*", "build", "output", "site", "__pycache__")
    shutil.copytree(ROOT, tree, ignore=ignored)
    builder("-m", "pip", "install", "--no-deps", "--target", site, "--editable", tree)
    (tree / "diffopt" / "added_later.py").write_text("HERE = __file__")
    # As if the process had this installation, and not its own of ROOT.
    code = f"import site, sys\nsys.path = [p for p in sys.path if p != {str(ROOT)!r}]\nsite.addsitedir({str(site)!r})"
    code += PRINT_VARIANT + "print(library.loaded().path.parent); import diffopt.added_later as m; print(m.HERE)"
    output = run(code, cwd=tmp_path)
    assert output.split() == [widest(), str(tree / "build" / "cpu"), str(tree / "diffopt" / "added_later.py")]
    code = f"import site; site.addsitedir({str(site)!r}); import diffopt; print(diffopt.__file__)"
    assert run(code, cwd=tmp_path, PYTHONPATH=str(ROOT)) == str(ROOT / "diffopt" / "__init__.py")
