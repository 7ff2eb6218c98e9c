"""The stand-in of the hub, and a client that is led to it."""

from __future__ import annotations

from collections.abc import Iterator

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

from tests.hub.stand_in import TOKEN, Hub, running_hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A stand-in that this process's client asks, with a token that it knows."""
    with running_hub() as stand_in:
        lead_to(stand_in.address, monkeypatch)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("cache")))
        disable_progress_bars()
        yield stand_in
        enable_progress_bars()
        huggingface_hub.close_session()


def lead_to(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the hub's client ask an address, without its retries' waiting."""
    huggingface_hub.close_session()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # Xet's protocol is of its own library
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
