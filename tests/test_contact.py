import pytest

from ray_merge import contact as module
from ray_merge.contact import Contact, NoContact
from ray_merge.errors import ContactLost, Refusal


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(module, "FIRST_WAIT_SECONDS", 0.01)


class Server:
    """Answers after some failures."""

    def __init__(self, failures):
        self.failures, self.asked = failures, 0

    def __call__(self):
        self.asked += 1
        if self.asked <= self.failures:
            raise NoContact("503: away")
        return "answer"


def contact(seconds, said):
    return Contact(server="http://head", seconds=seconds, say=said.append)


def test_it_asks_until_an_answer_comes_and_says_once_that_it_does():
    said, server = [], Server(2)
    assert contact(60, said)(server) == "answer"
    assert server.asked == 3
    assert said == ["http://head does not answer (503: away); asking again for 60 s"]


def test_a_silence_that_lasts_is_contact_lost_with_the_last_answer():
    server = Server(1000)
    with pytest.raises(ContactLost, match=r"http://head has not answered for .* s \(503: away\)"):
        contact(0.05, [])(server)
    assert server.asked > 1


def test_any_other_error_is_not_asked_again():
    def ask():
        raise Refusal("no rights")

    with pytest.raises(Refusal, match="no rights"):
        contact(60, [])(ask)
