import pytest
from tiny import write_small_llava

from llavolta import data, digits


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """A small digits data set: 48 training and 12 held-out scenes."""
    return digits.build(tmp_path_factory.mktemp("data") / "digits", scenes=48, heldout=12, seed=1)


@pytest.fixture(scope="session")
def small_model(tmp_path_factory):
    return write_small_llava(tmp_path_factory.mktemp("model") / "small-llava")


@pytest.fixture(autouse=True)
def data_cache(tmp_path_factory, monkeypatch):
    """What data sets keep about themselves stays out of data/cache."""
    folder = tmp_path_factory.getbasetemp() / "data-cache"
    monkeypatch.setattr(data, "CACHE", folder)
    return folder
