"""Putting a folder on the Hub: what is asked of the client, and what its errors become."""

import inspect
import sys
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalTokenNotFoundError

from ddim_pl.exports.hub import check_hub, push

REAL = huggingface_hub.HfApi


class Client:
    """The part of `HfApi` that is used; `fails` maps a method to its error."""

    def __init__(self, **fails):
        self.calls, self.fails = [], fails

    def answer(self, name, *arguments, **keywords):
        if name in self.fails:
            raise self.fails[name]
        self.calls.append((name, *arguments, keywords))
        return f"hub/{arguments[0]}" if arguments else {"name": "me"}

    def __getattr__(self, name):
        method = inspect.signature(getattr(REAL, name))

        def called(*arguments, **keywords):
            method.bind(self, *arguments, **keywords)  # as the real one takes them
            return self.answer(name, *arguments, **keywords)

        return called


@pytest.fixture
def client(monkeypatch):
    def set_client(**fails):
        made = Client(**fails)
        monkeypatch.setattr("huggingface_hub.HfApi", lambda: made)
        return made

    return set_client


def test_a_folder_is_put_into_a_repository_that_may_be_there(client, tmp_path):
    made = client()
    check_hub("me/model")
    assert push(tmp_path, "me/model") == "hub/me/model"
    assert made.calls == [
        ("whoami", {}),
        ("create_repo", "me/model", {"exist_ok": True}),
        ("upload_folder", {"repo_id": "me/model", "folder_path": str(tmp_path)}),
    ]


def refused(status):
    error = OSError("status")
    error.response = SimpleNamespace(status_code=status)
    return error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (LocalTokenNotFoundError("no token"), "no token is here: run hf auth login"),
        (refused(401), "its token is refused: run hf auth login"),
        (OSError("no route"), r"cannot be used \(OSError: no route\): export without push_to_hub"),
    ],
)
def test_who_cannot_put_something_there_is_told_why(client, error, message):
    client(whoami=error)
    with pytest.raises(ValueError, match=message):
        check_hub("me/model")


def test_a_name_without_an_owner_is_refused(client):
    client()
    with pytest.raises(ValueError, match="push_to_hub must be owner/name, got 'model'"):
        check_hub("model")


def test_the_client_itself_says_that_no_token_is_here(monkeypatch, tmp_path):
    """Not a stub: the real client, offline, of a user who never logged in."""
    monkeypatch.setattr("huggingface_hub.hf_api.get_token", lambda: None)
    with pytest.raises(ValueError, match="no token is here: run hf auth login"):
        check_hub("me/model")


def test_a_failed_upload_says_where_the_folder_is(client, tmp_path):
    client(upload_folder=OSError("broken pipe"))
    with pytest.raises(ValueError, match=f"try again by hf upload me/model {tmp_path}"):
        push(tmp_path, "me/model")


def test_without_the_client_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"pip install 'ddim_pl\[diffusers\]'"):
        check_hub("me/model")
