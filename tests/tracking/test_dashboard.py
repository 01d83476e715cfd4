"""Creating the dashboard and bringing it up to date, against a server of a dict."""

import json

import pytest
import wandb_dashboard as dashboard

from medusa_exp.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:Pydantic V1:DeprecationWarning")


class Server:
    """W&B's GraphQL, as far as views go."""

    def __init__(self) -> None:
        self.projects = {"us/heads"}
        self.views: dict[str, dict] = {}

    def __call__(self, api, query, variables) -> dict:
        if "upsertView" in query:
            number = variables.get("id") or f"view-{len(self.views)}"
            self.views[number] = variables
            return {"upsertView": {"view": {"id": number, "name": variables["name"]}}}
        if f"{variables['entityName']}/{variables['projectName']}" not in self.projects:
            return {"project": None}
        nodes = [
            {"node": {"id": number, "displayName": view["displayName"], "spec": view["spec"]}}
            for number, view in self.views.items()
            if view["name"] == variables["viewName"]
        ]
        return {"project": {"allViews": {"edges": nodes}}}


@pytest.fixture
def server(monkeypatch) -> Server:
    from wandb_workspaces.workspaces import interface, internal

    server = Server()
    monkeypatch.setattr(internal, "execute_graphql", server)
    monkeypatch.setattr(internal.wandb, "Api", lambda: None)
    monkeypatch.setattr(interface, "get_app_url", lambda api: "https://wandb.test")
    return server


def test_the_second_time_brings_the_first_up_to_date(server, monkeypatch):
    url = dashboard.create_or_update("us", "heads")
    assert url == "https://wandb.test/us/heads?nw=medusaheads"
    (first,) = server.views.values()
    assert first["displayName"] == "Medusa heads"
    monkeypatch.setattr(dashboard, "SWEPT", ("head.num_heads",))
    assert dashboard.create_or_update("us", "heads") == url
    (second,) = server.views.values()
    accessors = ["config:head.value.num_heads", "config:train.value.learning_rate"]
    assert [text in first["spec"] for text in accessors] == [True, True]
    assert [text in second["spec"] for text in accessors] == [True, False]
    assert json.loads(second["spec"])["section"]["panelBankConfig"]["sections"]


def test_a_project_that_is_not_there_is_named(server):
    with pytest.raises(UserError, match=r"us/tails.*Log a run there first"):
        dashboard.create_or_update("us", "tails")


def test_who_gives_no_project_is_told_the_form(capsys):
    with pytest.raises(SystemExit):
        dashboard.main(["heads"])
    assert "heads is not of the form ENTITY/PROJECT" in capsys.readouterr().err
