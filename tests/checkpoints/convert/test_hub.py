"""An export is pushed to the hub only after every check, as one commit of its own files; the client is a stand-in."""

import sys
from types import SimpleNamespace

import pytest
from layouts import refusal, tree

from ddim.checkpoints.convert.exporting import FILES, ExportSpec, export_checkpoint
from ddim.checkpoints.convert.hub import push_files


class Hub:
    """The hub as its client shows it: repositories by name, and what was asked of it."""

    def __init__(self):
        self.repositories, self.changes = {}, []
        self.user = {"name": "ada", "orgs": [{"name": "engines"}]}

    def whoami(self):
        if self.user is None:
            raise OSError("401 Client Error: Unauthorized.\nInvalid token")
        return self.user

    def repo_exists(self, name):
        return name in self.repositories

    def repo_info(self, name):
        private, files = self.repositories[name]
        return SimpleNamespace(private=private, siblings=[SimpleNamespace(rfilename=file) for file in files])

    def create_repo(self, name, private, exist_ok):
        self.changes.append(("create", name, private, exist_ok))
        return f"https://hub/{name}"

    def upload_folder(self, repo_id, folder_path, allow_patterns, commit_message):
        self.changes.append(("upload", repo_id, sorted(set(tree(folder_path)) & set(allow_patterns))))


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    module = SimpleNamespace(HfApi=lambda: hub, get_token=lambda: "hf_secret")
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return hub


@pytest.mark.parametrize("layout", FILES)
@pytest.mark.parametrize("private", [False, True])
def test_the_files_of_an_export_are_pushed(hub, model_file, tmp_path, layout, private):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    export_checkpoint(ExportSpec(model_file(), str(out), layout, push="ada/digits", private=private))
    assert hub.changes == []  # the files first
    assert push_files("ada/digits", out, FILES[layout], private) == "https://hub/ada/digits"
    create, upload = hub.changes
    assert create == ("create", "ada/digits", private, True)
    assert upload == ("upload", "ada/digits", sorted(FILES[layout]))


def test_the_card_of_a_pushed_model_loads_it_from_there(hub, model_file, tmp_path):
    export_checkpoint(ExportSpec(model_file(), str(tmp_path / "out"), push="engines/digits"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "\n# digits\n" in card
    assert 'DDIMPipeline.from_pretrained("engines/digits")     # on the hub' in card


REFUSED = [
    ({"push": "babbage/digits"}, "your token is for ada, engines, not for babbage"),
    ({"push": "ada/public", "private": True}, "ada/public is a public repository"),
    ({"push": "ada/public"}, "push=ada/public has unet/config.json already"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_what_cannot_be_pushed_is_not_written_either(hub, model_file, tmp_path, options, message):
    hub.repositories = {"ada/public": (False, [".gitattributes", "unet/config.json"]), "ada/mine": (True, [])}
    assert message in refusal(export_checkpoint, ExportSpec(model_file(), str(tmp_path / "out"), **options))
    assert not (tmp_path / "out").exists()
    assert hub.changes == []
    for allowed in ({"push": "ada/public", "overwrite": True}, {"push": "ada/mine", "private": True}):
        export_checkpoint(ExportSpec(model_file(), str(tmp_path / allowed["push"]), **allowed))


def test_local_mistakes_are_reported_before_the_hub_is_asked(hub, model_file, tmp_path):
    hub.user = None  # would be refused
    (tmp_path / "model.pt").touch()
    spec = ExportSpec(model_file(), str(tmp_path), "flat", push="ada/digits")
    assert "model.pt exists already" in refusal(export_checkpoint, spec)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda hub, patch: setattr(hub, "user", None), r"push=ada/digits (401 Client Error: Unauthorized); nothing"),
        (lambda hub, patch: patch.setattr("huggingface_hub.get_token", lambda: None), "needs a token of the hub"),
        (lambda hub, patch: patch.setitem(sys.modules, "huggingface_hub", None), "needs the package huggingface_hub"),
    ],
)
def test_without_access_nothing_is_written(hub, model_file, tmp_path, monkeypatch, change, message):
    change(hub, monkeypatch)
    assert message in refusal(export_checkpoint, ExportSpec(model_file(), str(tmp_path / "out"), push="ada/digits"))
    assert not (tmp_path / "out").exists()


def test_a_failed_push_says_where_the_files_are(hub, tmp_path, monkeypatch):
    def fail(**_):
        raise ConnectionError("connection reset")

    monkeypatch.setattr(hub, "upload_folder", fail)
    message = refusal(push_files, "ada/digits", tmp_path, FILES["flat"], False)
    assert f"(connection reset); the files are in {tmp_path}: run the command again with overwrite=true." in message


@pytest.mark.parametrize("push", ["digits", "a/b/c", "https://hub/ada/digits", "ada/", "ada/my digits"])
def test_a_repository_is_user_and_name(push):
    with pytest.raises(ValueError, match="is no repository of the hub; write USER/NAME"):
        ExportSpec("a", "b", push=push)


def test_a_private_export_needs_a_repository():
    with pytest.raises(ValueError, match="private=true is for a repository of the hub"):
        ExportSpec("a", "b", private=True)
