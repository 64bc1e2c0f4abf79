import pytest

from tests.endpoint.service import make_roster, running


@pytest.fixture(scope="package")
def roster():
    return make_roster()


@pytest.fixture(scope="package")
def service(roster):
    """A server with four slots, on a thread of the tests' process."""
    with running(roster, slots=4) as service:
        yield service


@pytest.fixture
def client(service):
    with service.client() as client:
        yield client
