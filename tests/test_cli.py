"""The command line as a user meets it, in processes of its own."""

import argparse
import json
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
from cli_runs import SMOKE, medusa_exp, read, snapshot
from omegaconf import OmegaConf
from wandb_files import run_files
from wandb_files import state as written_state

from medusa_exp import cli, run
from medusa_exp.config import Config, command_line, continuation
from medusa_exp.config.schema import check_model
from medusa_exp.errors import UserError, end_without_reader
from medusa_exp.runs.files import read_json
from medusa_exp.runs.list import read_run
from medusa_exp.runs.metric_table import metric_of

PLANT = Path(__file__).parent / "support" / "elsewhere"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="module")
def run_dir(workplace) -> Path:
    """One run of every stage, in a terminal without bars and boxes, and without pyarrow."""
    poor = {"PYTHONIOENCODING": "ascii", "ELSEWHERE": "pyarrow", "PYTHONPATH": str(PLANT)}
    result = medusa_exp(*SMOKE, "run_dir=run", cwd=workplace, **poor)
    assert result.returncode == 0, result.stderr
    assert "report: run/report.html" in result.stdout.replace(str(workplace) + "/", "")
    return workplace / "run"


def test_help_is_quick_and_light(tmp_path):
    code = "import sys; sys.argv[1:] = ['--help']; from medusa_exp.cli import main\n"
    code += "try: main()\nfinally: print('torch' in sys.modules, 'wandb' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=60
    )
    folder = Path(__file__).parents[1] / "conf" / "experiment"
    assert (
        f"experiment: {', '.join(sorted(path.stem for path in folder.iterdir()))}" in result.stdout
    )
    assert result.stdout.endswith("False False\n")


def test_hydras_parser_is_made_where_each_help_is_checked(monkeypatch):
    def check_help(parser, action):  # as Python 3.14 does it
        if action.help is not None and "%" in action.help:
            raise ValueError("badly formed help string")

    monkeypatch.setattr(argparse._ActionsContainer, "_check_help", check_help, raising=False)
    command_line._accept_lazy_help()
    assert command_line.overrides_in(["seed=1", "-m"]) == ["seed=1"]


@pytest.mark.parametrize("flags", ["--help", "--cfg job"])
def test_a_reader_that_goes_ends_it_quietly(tmp_path, flags):
    # `true` has gone long before there is anything to read.
    command = f"{{ {sys.executable} -m medusa_exp {flags}; echo $? >&2; }} | true"
    found = subprocess.run(
        ["sh", "-c", command], capture_output=True, text=True, cwd=tmp_path, timeout=60
    )
    assert found.stderr in ("141\n", "0\n")


def test_a_pipe_of_others_that_breaks_is_told(capsys):
    with pytest.raises(BrokenPipeError, match="of a server"):
        end_without_reader(BrokenPipeError("of a server"))


def test_an_option_that_there_is_not_is_one_message_and_exit_code_1(tmp_path):
    refused = medusa_exp("--experiment=medusa1", cwd=tmp_path)
    assert refused.returncode == 1 and "Write +experiment=medusa1" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    with pytest.raises(UserError, match="--multi is no option: write --multirun"):
        continuation.arguments(["--multi", "seed=1,2"])


@pytest.mark.slow
def test_a_run_done_again_gives_the_same_numbers(run_dir, workplace):
    """Comes first: later tests evaluate the run anew, with other settings."""
    before = snapshot(run_dir)
    again = ["+experiment=rerun", "rerun.source=run", "run_dir=again", "cache_dir=other"]
    same_tree = ["tree.kind=custom", "tree.path=run/tree.json"]
    result = medusa_exp(*again, *same_tree, cwd=workplace)
    assert result.returncode == 0, result.stderr
    assert snapshot(run_dir) == before
    found = read(workplace / "again/rerun.json")
    assert found["differing"] == []
    assert "equal in every metric that does not depend on timing" in result.stdout
    of_the_checkout = {"commit", "uncommitted changes"}  # which may be worked on meanwhile
    assert set(found["provenance"]) <= of_the_checkout
    old, new = found["metrics"]["train/loss"]
    assert old == new == read(run_dir / "metrics.json")["train/loss"]
    assert (workplace / "again/heads/model.safetensors").read_bytes() == (
        run_dir / "heads/model.safetensors"
    ).read_bytes()
    assert (workplace / "again/run.json").is_file()
    saved = (workplace / "again/.hydra/config.yaml").read_text()
    assert "name: smoke\n" in saved and "kind: custom\n" in saved
    result = medusa_exp("stages=[report]", "run_dir=again", "seed=3", cwd=workplace)
    assert result.returncode == 0, result.stderr
    assert (workplace / "again/.hydra/config.yaml").read_text() == saved
    assert "\nseed: 3\n" in (workplace / "again/.hydra-2/config.yaml").read_text()


def test_a_run_keeps_the_contract(run_dir):
    for name in (
        ".hydra/config.yaml",
        "run.json",
        "metrics.json",
        "heads/config.json",
        "heads/model.safetensors",
        "checkpoints/last.ckpt",
        "tree.json",
        "records.jsonl",
        "report.html",
        "history.csv",
    ):
        assert (run_dir / name).is_file(), name
    run = read(run_dir / "run.json")
    stages = ["pretrain", "train", "calibrate", "evaluate", "report"]
    assert list(run["stages"]) == stages
    assert all(run["stages"][s]["status"] == "done" for s in stages)
    assert run["seed"] == 0 and run["peak_memory_bytes"] > 1e8 and run["device"].startswith("cpu")
    assert all(len(digest) == 64 for digest in run["data"].values()) and run["data"]
    assert set(run["cache_keys"]) == {"dataset", "model", "tokenised"}
    assert run["command"][:4] == ["python", "-m", "medusa_exp", "+experiment=smoke"]
    assert run["cache_keys"]["tokenised"] == read(run_dir / "data.json")["key"]
    metrics = read(run_dir / "metrics.json")
    assert all(isinstance(value, float) for value in metrics.values())
    assert [name for name in metrics if metric_of(name) is None] == []
    assert metrics["eval/identical_fraction"] == 1.0
    for name in ("train/loss", "val/top5_head2", "eval/speedup", "eval/backbone_nats_per_token"):
        assert name in metrics
    records = [json.loads(line) for line in (run_dir / "records.jsonl").read_text().splitlines()]
    for record in records:
        assert sum(record["accept_lengths"]) == record["new_tokens"]
        assert len(record["accept_lengths"]) == record["steps"]
    partial = [p for p in run_dir.parent.rglob("*") if ".partial-" in p.name]
    assert not partial


def test_a_stage_alone_starts_from_the_saved_config(run_dir, workplace):
    hydra = snapshot(run_dir / ".hydra")
    before, heads = read(run_dir / "metrics.json"), snapshot(run_dir / "heads")
    result = medusa_exp(
        "stages=[evaluate]", "run_dir=run", "tree=chain", "evaluate.num_prompts=2", cwd=workplace
    )
    assert result.returncode == 0, result.stderr
    assert f"from {run_dir}/.hydra: +experiment=smoke, evaluate.baselines=[], device=cpu\n" in (
        result.stdout
    )
    assert snapshot(run_dir / ".hydra") == hydra
    assert (run_dir / ".hydra-2" / "config.yaml").is_file()
    after = snapshot(run_dir / "heads")
    card = next(name for name in heads if str(name).endswith("README.md"))  # has what was measured
    assert after.pop(card) != heads.pop(card) and after == heads
    assert read_json(run_dir / "tree.json") == {"parents": [-1, 0, 1], "ranks": [-1, 0, 0]}
    after = read(run_dir / "metrics.json")
    assert after["eval/num_prompts"] == 2 and after["eval/identical_fraction"] == 1.0
    assert {k: v for k, v in after.items() if "train/" in k} == {
        k: v for k, v in before.items() if "train/" in k
    }
    run = read(run_dir / "run.json")
    assert list(run["stages"]) == ["pretrain", "train", "calibrate", "evaluate", "report"]
    assert run["stages"]["evaluate"]["command"][3:] == [
        "stages=[evaluate]",
        "run_dir=run",
        "tree=chain",
        "evaluate.num_prompts=2",
    ]


def test_a_default_that_changed_since_does_not_slip_into_an_old_run(run_dir, workplace):
    saved = run_dir / ".hydra" / "config.yaml"
    text = saved.read_text()
    assert "max_new_tokens: 12\n" in text
    saved.write_text(text.replace("max_new_tokens: 12\n", "max_new_tokens: 7\n"))
    again = ("stages=[evaluate]", "run_dir=run", "evaluate.num_prompts=1")
    refused = medusa_exp(*again, cwd=workplace)
    assert refused.returncode == 1 and ".hydra/config.yaml is not what was" in refused.stderr
    (saved.parent / "sha256.json").unlink()
    result = medusa_exp(*again, cwd=workplace)
    saved.write_text(text)
    assert result.returncode == 0, result.stderr
    records = [json.loads(line) for line in (run_dir / "records.jsonl").read_text().splitlines()]
    assert {record["new_tokens"] for record in records} == {7}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["+experiment=rerun", "rerun.source=/no/run"], "rerun.source=/no/run is no run directory"),
        (["+experiment=medusa1", "head.num_hedas=2"], "mean head.num_heads?"),
        (["+experiment=nothing"], "nothing"),
        (["+experiment=smoke", "train.max_steps=ten"], "train.max_steps=ten: Value 'ten' of type"),
        (["+experiment=smoke", "name=${nope}"], "'nope' not found (hydra.run.dir is made of it): "),
        (["+experiment=smoke", "stages=[trian]"], "stages=trian is not known: use some of"),
        (["+experiment=medusa1", "device=cpu"], "model.path is not set"),
        (["+experiment=medusa1", "model.path=/no/such/dir"], "model.path=/no/such/dir"),
        (["+experiment=smoke", "stages=[calibrate]"], "run stage train first"),
        (["run_dir=run", "-m", "head.num_heads=1,2"], "leave out run_dir, or leave out -m"),
        (["run_dir=run", "+experiment=quickstart"], "an experiment belongs to a new run"),
        (["run_dir=run", "stages=[evaluate]", "decode.stop_ids=[9999]"], "stop_ids=9999"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_a_problem_is_one_message_and_exit_code_1(run_dir, workplace, arguments, message):
    # Hydra takes a coverage run for a debugger's, and then shows every traceback.
    result = medusa_exp(*arguments, "logger=none", cwd=workplace, COVERAGE_PROCESS_CONFIG="")
    assert result.returncode == 1
    assert message in result.stderr + result.stdout
    words = ["Traceback", "Error executing job", "object_type"]
    words += ["HYDRA_FULL_ERROR"] * (message != "nothing")  # which Hydra tells in its own words
    assert not [word for word in words if word in result.stderr + result.stdout]


def test_a_model_that_is_not_named_is_told_before_anything_is_made(tmp_path):
    refused = medusa_exp("+experiment=medusa1", "logger.mode=offline", cwd=tmp_path)
    assert refused.returncode == 1 and refused.stderr.startswith("model.path is not set")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stages", [["trian"], ["pretrain", "train"], ["demo"], ["inspect"], []])
def test_stages_that_have_no_use_for_a_model_are_told_in_other_words(stages):
    check_model(Config(stages=stages))
    with pytest.raises(UserError, match=r"model\.path is not set"):
        check_model(Config(stages=["inspect", "train"]))


@pytest.mark.parametrize("sweep", [[], ["-m", "seed=1,2", "sweep_dir=again"]])
def test_a_run_to_be_done_again_has_to_be_named(tmp_path, sweep):
    refused = medusa_exp("+experiment=rerun", "logger=none", *sweep, cwd=tmp_path)
    assert refused.returncode == 1 and "rerun.source is not set: name the run" in refused.stderr
    assert "model.path" not in refused.stderr
    assert sweep or not any(tmp_path.iterdir())


def test_a_directory_that_cannot_be_is_told_by_who_makes_it(tmp_path):
    hydra = {"run": {"dir": f"{tmp_path}/{'x' * 300}"}, "runtime": {"choices": {}}}
    place = {"rerun": {"source": None}, "hydra": hydra}
    continuation.check_new(OmegaConf.create(place))


def test_what_a_run_goes_on_with_is_one_short_line(tmp_path, monkeypatch):
    monkeypatch.setattr(continuation, "_KEPT", [])
    (tmp_path / ".hydra").mkdir()
    saved = ["seed=1", "dataset.path=http://me:" + "word" * 99 + "@x/" + "y" * 99]
    saved += [f"logger.tags=[{number}]" for number in range(6)]
    (tmp_path / ".hydra/overrides.yaml").write_text(json.dumps(saved))
    for name in (".hydra/config.yaml", "run.json"):
        (tmp_path / name).write_text("{}")
    continuation.arguments(["seed=2", f"run_dir={tmp_path}"])
    said = continuation.kept_in_words()
    assert said.startswith("dataset.path=http://x/yyy") and said.endswith(
        "logger.tags=[4], and 1 more"
    )
    assert "word" not in said and "seed" not in said and len(said) < 200
    continuation.arguments([*saved, f"run_dir={tmp_path}"])
    assert continuation.kept_in_words() == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stages=[export]", "run_dir=RUN"], "run_dir=RUN: there is no such run, and stages=[exp"),
        (["stages=[report,chat]", "run_dir='R U'"], "run_dir=R U: there is no such run"),
        (["stages=[report]", "run_dir=RUN,b"], "run_dir=RUN,b: there is no such run"),
        (["stages=[evaluate]", "head.num_heads=2"], "name it by run_dir=DIR"),
        (["stages=[train,evaluate]", "run_dir=RUN"], None),
        (["stages=[evaluate]", "run_dir=RUN", "heads_from=run"], None),
        (["stages=[evaluate]", "run_dir=RUN", "+experiment=demo"], None),
        (["stages=[evaluate]", "run_dir=begun"], None),
        (["stages=[evaluate]", "--cfg", "job"], None),
        (["stages=[evaluate]", "seed=1,2", "-m"], None),
        (["stages=[exprt]", "run_dir=RUN"], None),  # which is said where all stages are known
        (["stages=${oc.env:STAGES}", "run_dir=RUN"], None),
        (["run_dir=RUN"], None),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_stages_of_a_run_that_is_not_there_are_refused(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "begun/heads").mkdir(parents=True)
    with nullcontext() if message is None else pytest.raises(UserError, match=re.escape(message)):
        continuation.check_begun(arguments, cli._LATER)
    assert set(cli._LATER) < set(cli.STAGES)


def test_words_are_looked_at_before_what_they_ask_for(tmp_path):
    empty = medusa_exp("stages=[evaluate]", "run_dir=", cwd=tmp_path)
    assert empty.returncode == 1 and "run_dir= is empty: name a directory" in empty.stderr
    long = medusa_exp("stages=[evaluate]", f"model.path=[{'[1],' * 25_000}]", cwd=tmp_path)
    assert long.returncode == 1 and "an argument has 65,536 at most" in long.stderr


def test_the_traceback_is_there_for_those_who_ask(workplace):
    result = medusa_exp("+experiment=smoke", "stages=[a]", cwd=workplace, HYDRA_FULL_ERROR="1")
    assert result.returncode == 1 and "Traceback" in result.stderr


@pytest.mark.parametrize("word", ["head.num_heads=99", "stages=[trian]", "model.path="])
def test_nothing_is_left_of_a_run_whose_config_is_refused(tmp_path, word):
    refused = medusa_exp("+experiment=smoke", "run_dir=new", word, cwd=tmp_path)
    assert refused.returncode == 1 and not (tmp_path / "new").exists()


def test_what_a_directory_has_besides_stays_when_a_config_is_refused(tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new/notes.txt").touch()
    refused = medusa_exp("+experiment=smoke", "run_dir=new", "head.num_heads=99", cwd=tmp_path)
    assert refused.returncode == 1 and (tmp_path / "new/notes.txt").is_file()


def test_a_directory_that_was_there_stays_when_a_config_is_refused(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "new").symlink_to("disk")
    refused = medusa_exp("+experiment=smoke", "run_dir=new", "head.num_heads=99", cwd=tmp_path)
    assert refused.returncode == 1 and (tmp_path / "new").is_symlink()
    assert (tmp_path / "disk").is_dir()


def test_why_no_stage_began_is_noted_in_the_run(config, tmp_path):
    config.stages, config.heads_from = ["calibrate"], str(tmp_path / "nowhere")
    config.model.path, config.dataset.kind = "no/such/model/dir", "synthetic"
    with pytest.raises(UserError, match="no/such/model/dir"):
        run(config, tmp_path / "a")
    found = read_run(tmp_path / "a")
    assert found.status == "failed" and not (tmp_path / "a/run.json").exists()
    assert found.reason.startswith("before stage calibrate: UserError: model.path=no/such/model")


def test_a_run_whose_config_was_refused_is_no_run_yet(workplace):
    refused = medusa_exp("+experiment=smoke", "run_dir=new", "head.num_heads=99", cwd=workplace)
    assert refused.returncode == 1 and "head.num_heads=99" in refused.stderr
    result = medusa_exp("+experiment=smoke", "run_dir=new", "stages=[pretrain]", cwd=workplace)
    assert result.returncode == 0, result.stderr


def test_several_sources_on_the_command_line(workplace, run_dir):
    """As the README has it, and without a model: a look at the data."""
    (data,) = (workplace / "outputs/cache/synthetic").glob("[!.]*.json")
    (model,) = {p.parent for p in (workplace / "outputs/cache/pretrained").glob("*/config.json")}
    result = medusa_exp(
        "stages=[inspect]",
        f"+dataset.sources={{a: {{path: {data}}}, b: {{path: {data}, weight: 0.5}}}}",
        f"tokenizer.path={model}",
        "+tokenizer.special_tokens.unk_token='<unk>'",
        "logger=none",
        "run_dir=look",
        cwd=workplace,
    )
    assert result.returncode == 0, result.stderr
    found = read(workplace / "look/data.json")["sources"]
    assert found["a"]["kept records"] == 120 and found["b"]["dropped"] == {"duplicate": 120}


def test_a_piped_prompt_is_answered(run_dir, workplace):
    result = subprocess.run(
        [sys.executable, "-m", "medusa_exp", "stages=[chat]", "run_dir=run"],
        input="What is 2 + 2?",
        cwd=workplace,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr
    assert "tokens per backbone step" in result.stdout
    assert read(run_dir / "metrics.json")["chat/tokens_per_step"] >= 1.0


def test_wandb_offline(run_dir, workplace):
    result = medusa_exp(
        "stages=[evaluate]",
        "run_dir=run",
        "logger=wandb",
        "evaluate.num_prompts=1",
        cwd=workplace,
        WANDB_API_KEY="",
    )
    assert result.returncode == 0, result.stderr
    (file,) = run_files(run_dir)
    metrics, summary = read(run_dir / "metrics.json"), written_state(file)["summary"]
    assert {name: summary.get(name) for name in metrics} == metrics, "those of earlier calls too"


def test_several_processes_in_a_sweep_are_refused(tmp_path):
    sweep = ("-m", *SMOKE, "head.num_heads=1,2", "train.strategy=ddp", "train.devices=2")
    result = medusa_exp(*sweep, cwd=tmp_path, COVERAGE_PROCESS_CONFIG="")
    assert result.returncode == 1
    assert "train.strategy=ddp in a sweep (-m)" in result.stderr + result.stdout
    assert "Traceback" not in result.stderr


def test_a_stage_that_leaves_no_files_has_failed(config, tmp_path, monkeypatch):
    config.stages = ["train"]
    monkeypatch.setattr("medusa_exp.stages.train.run", lambda config, out, session: {})
    with pytest.raises(UserError, match=r"stage train has ended without heads/config\.json and "):
        run(config, tmp_path / "run")
    assert read(tmp_path / "run/run.json")["stages"]["train"]["status"] == "failed"
