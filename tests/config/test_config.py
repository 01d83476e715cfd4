import json
import re
import shutil
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.errors import HydraException
from transformers.utils.chat_template_utils import render_jinja_template

from medusa_exp import cli
from medusa_exp.cli import STAGES
from medusa_exp.config import (
    Config,
    continuation,
    from_hydra,
    load_saved,
    register,
    to_dict,
    unknown_key,
)
from medusa_exp.config.compose import checked_again
from medusa_exp.errors import UserError
from medusa_exp.stages.session import Session

CONF = resources.files("medusa_exp.conf")
EXPERIMENTS = sorted(p.name.removesuffix(".yaml") for p in (CONF / "experiment").iterdir())
CHOICES = sorted(
    f"{'+' * (group.name == 'sweep')}{group.name}={choice.name.removesuffix('.yaml')}"
    for group in CONF.iterdir()
    if group.is_dir() and group.name not in ("experiment", "hydra", "__pycache__")
    for choice in group.iterdir()
)


def composed(*overrides: str) -> Config:
    register()
    with initialize_config_module("medusa_exp.conf", version_base="1.3"):
        return from_hydra(compose("config", overrides=list(overrides)))


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes(experiment):
    config = composed(f"+experiment={experiment}")
    assert config.name == experiment
    assert config.stages and set(config.stages) <= set(STAGES)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_says_its_command(experiment):
    text = (CONF / "experiment" / f"{experiment}.yaml").read_text()
    assert f"# command:  python -m medusa_exp +experiment={experiment}" in text


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_of_every_group_composes(choice):
    composed(choice, *(["tree.paths=[[0]]"] if choice == "tree=custom" else []))


def _values(values: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _values(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def test_no_config_names_code_to_run():
    for path in (CONF).rglob("*.yaml"):
        assert "_target_" not in path.read_text()


@pytest.mark.parametrize("override", ["head.num_hedas=2", "trian.max_steps=1", "head=medsua"])
def test_a_typo_is_refused(override):
    with pytest.raises(HydraException, match=r"num_hedas|trian|medsua"):
        composed(override)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.max_step=5", "train.max_step: there is no such key; did you mean train.max_steps?"),
        ("+head.num_hedas=2", "did you mean head.num_heads?"),
        ("modl.path=x", "modl: there is no such key; did you mean model?"),
        ("max_steps=5", "did you mean train.max_steps or model.pretrain.max_steps?"),
        ("head.learning_rate=1", "did you mean train.learning_rate?"),
        ("decode.temp=1", "did you mean decode.temperature?"),
        ("dataset={pth: x}", "dataset.pth: there is no such key; did you mean dataset.path?"),
        ("foo=1", "foo: there is no such key; `--cfg job` prints all there are."),
    ],
)
def test_a_mistyped_key_is_answered_with_the_one_that_was_meant(override, said):
    with pytest.raises(UserError, match=re.escape(said)):
        cli.compose(["+experiment=smoke", override])


@pytest.mark.parametrize(
    "key", [key for key, value in _values(to_dict(Config())) if isinstance(value, list)]
)
def test_one_value_where_a_list_belongs_is_answered_with_the_list(key):
    said = f"{key}=train: {key} is a list: write '{key}=[train]'."
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        cli.compose(["+experiment=smoke", f"{key}=train"])


def test_one_override_where_a_list_of_them_belongs_is_answered_with_the_list():
    said = "compose takes a list of overrides: compose(['+experiment=smoke'])."
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        cli.compose("+experiment=smoke")


@pytest.mark.parametrize(
    ("section", "key", "value", "said"),
    [
        ("train", "max_steps", "ten", "train.max_steps: Value 'ten' of type 'str' could not"),
        ("train", "lora", None, "train.lora: field 'train.lora' is not Optional"),
        ("train", "kind", "zzz", "train.kind=zzz is not known: use one of medusa1, medusa2."),
        (None, "stages", "train", "stages: a list is wanted"),
    ],
)
def test_what_python_code_sets_is_checked_before_anything(tmp_path, section, key, value, said):
    config = cli.compose(["+experiment=smoke"])
    setattr(getattr(config, section) if section else config, key, value)
    with pytest.raises(UserError, match=f"^{re.escape(said)}"):
        cli.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_python_code_sets_is_no_reference():
    config = cli.compose([r"name='a\${b}c'"])
    assert config.name == checked_again(config).name == "a${b}c"
    config.dataset.path, config.tree.paths = "${oc.env:HOME}", [[0], [0, 1]]
    again = checked_again(config)
    assert again == config and again.dataset.path == "${oc.env:HOME}"


def test_one_value_within_a_section_too():
    with pytest.raises(
        UserError, match=r"^\+decode={.*}: a list, .*, is wanted at decode\.stop_ids"
    ):
        cli.compose(["+experiment=smoke", "+decode={stop_ids: 3}"])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.max_steps=ten", "train.max_steps=ten: Value 'ten' of type 'str' could not be c"),
        ("train.max_steps=1e3", "train.max_steps=1e3: Value '1000.0' of type 'float' could not"),
        ("train.lora.rank=x", "train.lora.rank=x: Value 'x' of type 'str' could not be conv"),
        ("train={seed: 1, max_steps: x}", "train.seed: there is no such key"),
        ("+train={max_steps: x}", "+train={max_steps: x}: train.max_steps: Value 'x' of type"),
    ],
)
def test_a_value_of_another_type_is_one_line(override, said):
    with pytest.raises(UserError, match=f"^{re.escape(said)}.*$") as caught:
        cli.compose(["+experiment=smoke", override])
    assert "\n" not in str(caught.value) and "object_type" not in str(caught.value)


@pytest.mark.parametrize(
    "value",
    ["date=2024-01-01/a.jsonl", "a, b=c.jsonl", "caf\u00e9.jsonl", "a(1).jsonl", "[x]a.jsonl"],
)
def test_a_value_that_needs_quotes_is_answered_with_them(value):
    with pytest.raises(UserError) as caught:
        continuation.key_of(f"dataset.path={value}")
    said = str(caught.value)
    assert said.startswith(f"dataset.path={value} is no override that Hydra can read: ")
    word = re.search('Put the value in quotes, within those of the shell: "(.*)"$', said)[1]
    assert composed(word).dataset.path == value


def test_a_word_that_no_quotes_mend_is_answered_without():
    with pytest.raises(UserError, match=r"can read: .*(?<!\")$"):
        continuation.key_of("dataset path=x")


@pytest.mark.parametrize("value", ["nan", "inf", "-1"])
def test_no_number_may_be_anything(value):
    """Every key is in tests/golden/refused_values.json."""
    with pytest.raises(UserError, match=r"train\.epochs=\S+ is out of range"):
        composed(f"train.epochs={value}")


def test_a_key_that_is_forced_in_is_refused():
    with pytest.raises(UserError, match=r"head\.x: there is no such key"):
        composed("+head.x=1")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("device=gpu", r"device=gpu is not known: use one of auto, cpu, cuda"),
        ("evaluate.baselines=[magic]", r"evaluate\.baselines=magic is not known"),
        ("model.path=' '", r"model\.path is empty"),
        ("evaluate.server='user:secret@host'", r"evaluate\.server is no URL of a server: http"),
        ("regenerate.server='http://a:1, b:2'", r"regenerate\.server is no URL of a server: http"),
        ("dataset.val_fraction=0", r"val_fraction=0 leaves stage calibrate no prompt"),
        ("dataset.test_fraction=0", r"test_fraction=0 leaves stage evaluate no prompt"),
        ("decode.max_new_tokens=1024", r"leaves no token of dataset\.max_length=1024 to a prompt"),
    ],
)
def test_a_wrong_value_is_refused_with_what_it_may_be(override, message):
    with pytest.raises(UserError, match=message):
        composed(override)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("export.dtype=float16",), r"export\.dtype=float16: .*Leave it out"),
        (("train=medusa2", "train.lora.output=adapter"), r"set train\.lora\.output=merged"),
    ],
)
def test_what_no_whole_model_is_exported_of_is_refused_before_the_training(overrides, message):
    wanted = ("export.format=hf_generate", *overrides)
    composed(*wanted)  # the stage is not asked for
    with pytest.raises(UserError, match=message):
        composed("stages=[train,export]", *wanted)


@pytest.mark.parametrize(
    "overrides",
    [
        ("dataset.test_fraction=0", "evaluate.path=questions.txt"),
        ("dataset.val_fraction=0", "stages=[train]"),
        ("regenerate.server='HTTPS://[::1]:8000/v1, http://b'",),
    ],
)
def test_what_no_stage_misses_is_taken(overrides):
    composed(*overrides)


@pytest.mark.parametrize("key", ["run_dir", "sweep_dir"])
@pytest.mark.parametrize("value", ["", "''"])
def test_a_directory_without_a_name_is_refused(key, value):
    with pytest.raises(UserError, match=f"{key}= is empty: name a directory"):
        continuation.arguments([f"{key}={value}"])


def test_a_wrong_type_is_refused():
    with pytest.raises(HydraException):
        composed("head.num_heads=many")


def test_the_template_of_vicuna_is_fastchats():
    template = composed("+experiment=vicuna_7b").tokenizer.chat_template
    chat = [("user", "Hi"), ("assistant", "Hello!"), ("user", "Bye")]
    messages = [{"role": role, "content": content} for role, content in chat]
    [[text], _] = render_jinja_template(
        [messages], chat_template=template, add_generation_prompt=True, bos_token="<s>"
    )
    start = "<s>A chat between a curious user and an artificial intelligence assistant. "
    assert text.startswith(start + "The assistant gives helpful, detailed, and polite answers to ")
    assert text.endswith("user's questions. USER: Hi ASSISTANT: Hello!</s>USER: Bye ASSISTANT:")
    system = {"role": "system", "content": "Rules."}
    [[text], _] = render_jinja_template([[system, *messages[:2]]], chat_template=template)
    assert text == "Rules. USER: Hi ASSISTANT: Hello!</s>"


def test_a_saved_config_is_read_where_hydra_is_not(tmp_path):
    saved = tmp_path / "run" / ".hydra" / "config.yaml"
    saved.parent.mkdir(parents=True)
    saved.write_text("run_dir: outputs/${now:%Y}\nsweep_dir: outputs/${now:%Y}\nseed: 3\n")
    config = from_hydra(load_saved(saved))
    assert (config.seed, config.run_dir, config.sweep_dir) == (3, str(tmp_path / "run"), "")


@pytest.mark.parametrize("kind", ["recurrent", "auto", "rooted", None])
def test_a_saved_config_of_before_own_projections_has_one_for_all(tmp_path, kind):
    saved = tmp_path / "run" / ".hydra" / "config.yaml"
    saved.parent.mkdir(parents=True)
    saved.write_text("seed: 3\n" + (f"head:\n  kind: {kind}\n" if kind else ""))
    one = from_hydra(load_saved(saved)).head.own_projections
    assert one is (False if kind in ("recurrent", "auto") else None)
    changed = load_saved(saved)
    changed.head.kind = "rooted"  # as a word of the command line does, which says no more
    assert from_hydra(changed).head.kind == "rooted"
    saved.write_text(f"head:\n  kind: {kind or 'medusa'}\n  own_projections: null\n")
    assert from_hydra(load_saved(saved)).head.own_projections is None


@pytest.mark.parametrize(
    ("override", "section", "key", "expected"),
    [
        (
            "dataset.columns={user: q, assistant: a}",
            "dataset",
            "columns",
            {"user": "q", "assistant": "a"},
        ),
        ("dataset.role_map={narrator: system}", "dataset", "role_map", {"narrator": "system"}),
        ("dataset.role_map.narrator=system", "dataset", "role_map", {"narrator": "system"}),
        ("+dataset.role_map={narrator: system}", "dataset", "role_map", {"narrator": "system"}),
        (
            "tokenizer.special_tokens={pad_token: x}",
            "tokenizer",
            "special_tokens",
            {"pad_token": "x"},
        ),
    ],
)
def test_keys_that_users_choose_need_no_plus(override, section, key, expected):
    assert getattr(getattr(composed(override), section), key) == expected


def test_an_error_that_is_its_own_cause_names_no_key():
    """As OmegaConf's are in a debugger."""
    error = ValueError("x")
    error.__cause__ = error
    assert unknown_key(error) is None


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["run_dir=run", "+sweep=heads"], "leave out run_dir, or leave out -m and +sweep"),
        (["run_dir=new", "-m", "seed=1,2"], "a sweep makes many, in sweep_dir"),
        (["hydra.run.dir=run", "stages=[report]"], "there are runs in that directory"),
        (["run_dir=${oc.env:PWD}/run"], "give run_dir as a plain path"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_an_existing_run_cannot_do_is_refused_before_hydra(
    tmp_path, monkeypatch, argv, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run" / continuation.SAVED).parent.mkdir(parents=True)
    for name in (continuation.SAVED, "run.json"):
        (tmp_path / "run" / name).write_text("[]")
    with pytest.raises(UserError, match=re.escape(message)):
        continuation.arguments(argv)


@pytest.mark.parametrize(
    ("argv", "written"),
    [
        (["--experiment=medusa1"], "Write +experiment=medusa1;"),
        (["--experiment", "medusa1", "seed=1"], "Write +experiment=medusa1;"),
        (["seed=1", "--sweep", "head.num_heads=2"], "Write +sweep=VALUE;"),
        (
            ["--run-dir=x"],
            "--run-dir=x is no option: a key stands without dashes before it. Write run_dir=x;",
        ),
        (["--model.path=a", "-m"], "Write model.path=a;"),
        (["--multi", "seed=1,2"], "--multi is no option"),
        (["-x"], "Write KEY=VALUE;"),
        (["--cfg", "joob"], "argument --cfg/-c: invalid choice: 'joob'"),
        (["seed=1", "--cfg"], "argument --cfg/-c: expected one argument."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_option_that_there_is_not_is_answered_with_the_key(argv, written):
    with pytest.raises(UserError, match=re.escape(written)):
        continuation.arguments(argv)


def test_options_that_there_are_pass_wherever_they_stand():
    flags = ["--cfg", "job", "--multirun", "-m", "--help", "--config-dir", "x", "-p", "y"]
    assert continuation.arguments(["name=x", *flags, "~seed"]) == ["name=x", "~seed", *flags]
    assert continuation.is_sweep(["name=x", "-m", "seed=1,2"])


@pytest.fixture
def moved_on(tmp_path, monkeypatch) -> tuple[Path, Path]:
    """The folder in which a run began with relative paths, and its directory, seen from another."""
    began, out = tmp_path / "began", tmp_path / "run"
    for folder in (began / "model", began / "chats", out / ".hydra", tmp_path / "here"):
        folder.mkdir(parents=True)
    (began / "chats/a.json").touch()
    saved = {"model": {"path": "model"}, "dataset": {"path": "chats/*.json"}}
    saved["tokenizer"] = {"path": "org/name"}  # of the hub
    (out / ".hydra/config.yaml").write_text(json.dumps(saved))
    (out / ".hydra/hydra.yaml").write_text(json.dumps({"hydra": {"runtime": {"cwd": str(began)}}}))
    monkeypatch.chdir(tmp_path / "here")
    return began, out


def test_saved_paths_that_lead_nowhere_here_are_told_with_where_they_lead(moved_on):
    began, out = moved_on
    where = f"the folder in which it began, {began}: give the command there, or add "
    where += f"model.path={began}/model dataset.path={began}/chats/*.json."
    with pytest.raises(UserError, match="no such directory. Saved .*" + re.escape(where)):
        Session.of_run(out).decoder()


@pytest.mark.parametrize("pattern", ["{}/chats/*.json", "chats/**.json", "chats/*.jsonl"])
def test_other_patterns_are_told_as_they_are(moved_on, pattern):
    began, out = moved_on
    saved = {"dataset": {"path": pattern.format(began)}}
    (out / ".hydra/config.yaml").write_text(json.dumps(saved))
    config = from_hydra(load_saved(out / ".hydra/config.yaml"))
    with pytest.raises(UserError, match="as it is"), continuation.told_of_places(out, config):
        raise UserError("as it is")


def test_in_the_folder_in_which_it_began_nothing_is_said_of_others(moved_on, monkeypatch):
    began, out = moved_on
    monkeypatch.chdir(began)
    config = from_hydra(load_saved(out / ".hydra/config.yaml"))
    with pytest.raises(UserError, match=r"^as it is$"), continuation.told_of_places(out, config):
        raise UserError("as it is")


@pytest.mark.parametrize("change", ["given", "moved", "unknown", "broken"])
def test_other_places_are_told_as_they_are(moved_on, change):
    began, out = moved_on
    config = from_hydra(load_saved(out / ".hydra/config.yaml"))
    if change == "given":  # by this call
        config.model.path, config.dataset.path = "other", None
    elif change == "moved":  # the machine is another
        shutil.rmtree(began)
    else:
        text = "a: [" if change == "broken" else "{}"
        (out / ".hydra/hydra.yaml").write_text(text)
    with pytest.raises(UserError, match=r"^as it is$"), continuation.told_of_places(out, config):
        raise UserError("as it is")
