"""What is taken out of what is sent."""

from medusa_exp.config import Config, to_shareable
from medusa_exp.tracking.redaction import shareable, shareable_text


def test_values_of_the_environment_are_sent_as_their_names(tmp_path):
    config = Config()
    config.tree.path = config.logger.notes = "secret"
    config.dataset.path = "/data/chats"
    write = "tree: {path: '${oc.env:TOKEN}'}\nlogger: {notes: '${tree.path}'}\n"
    (tmp_path / "config.yaml").write_text(write)
    found = to_shareable(config, tmp_path / "config.yaml")
    assert found["tree"]["path"] == found["logger"]["notes"] == "${oc.env:TOKEN}"
    assert found["dataset"]["path"] == "/data/chats"


def test_home_and_passwords_are_taken_out(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    assert shareable({"/home/ada/x": ["/home/ada", 3, ("/home/adam/x",)]}) == {
        "~/x": ["~", 3, ["/home/adam/x"]]
    }
    assert (
        shareable_text("git clone https://ada:pw@git.test/a@b") == "git clone https://git.test/a@b"
    )
