"""The page as a browser gets it: every link answers, hostile texts stay texts, nothing but GET from this machine."""

from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from made_nights import write_night, write_run
from pages import NASTY

pytest.importorskip("starlette", reason="the extra `show` is not installed")
pytest.importorskip("httpx2", reason="starlette's client for tests is not installed")

from starlette.testclient import TestClient

from xmc_ray.show import app
from xmc_ray.show.app import address, application

HERE = {"at": "shop", "day": "2026-11-24"}
TEXTS = [text.replace("\ud83d", "?") or "nothing" for text in NASTY.values()]  # half a letter is in no file of tags


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, and an output with a night whose every word is hostile, a plain one, one that is damaged, one in the making."""
    root = tmp_path_factory.mktemp("shown")
    write_run(root / "a <run>")
    nasty = [(f"{number}{text}", text, {text: 0.9, "plain": 0.25}) for number, text in enumerate(TEXTS)]
    write_night(root / "shop", "2026-11-24", nasty)
    plain = [(f"d{number}", f"text {number}", {"plain": number / 60}) for number in range(60)]
    write_night(root / "shop", "2026-11-25", plain, files=2)
    damaged = write_night(root / "shop", "2026-11-26", plain)
    next((root / "shop" / "tags" / damaged.name).iterdir()).unlink()
    (root / "shop" / "_nights" / "dt=2026-11-27" / "_work").mkdir(parents=True)
    other = write_night(root / "shop", "2026-11-28", plain)
    (other / "_SUCCESS").write_text('{"run": "run20261128", "files": 7, "rejects": []}')
    return root


@pytest.fixture(scope="module")
def client(root: Path) -> Iterator[TestClient]:
    with TestClient(application(str(root)), base_url="http://127.0.0.1:8000") as client:
        yield client


class Links(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags, self.links = set[str](), list[str]()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        assert not [name for name, _ in attrs if name.startswith("on") or name == "style"], (tag, attrs)
        assert all((value or "").startswith("/") for name, value in attrs if name == "action")  # forms add what is asked for
        self.links += [value for name, value in attrs if name in ("href", "src") and value and value[0] != "#"]


def test_every_link_answers_and_leads_nowhere_else(client: TestClient) -> None:
    waiting, seen, pages = ["/"], set[str](), Counter[str]()
    while waiting:
        link = waiting.pop()
        path = link.partition("?")[0]
        if link in seen or path == "/why" or pages[path] == 15:  # why: tests/show/test_why.py
            continue
        seen.add(link)
        pages[path] += 1
        answer = client.get(link)
        assert answer.status_code == 200, (link, answer.text)
        if link.startswith(("/report", "/style", "/icon")):
            continue
        page = Links(answer.text)
        assert not page.tags & {"script", "iframe", "img", "object", "base"}, link
        assert all(each.startswith("/") and not each.startswith("//") for each in page.links), page.links
        waiting += page.links
    assert len(seen) > 40 and {*pages} >= {
        "/run",
        "/nights",
        "/night",
        "/documents",
        "/document",
        "/labels",
        "/label",
        "/report",
    }


def test_hostile_texts_are_texts(client: TestClient) -> None:
    for path in ("/documents", "/labels", "/label"):
        for text in TEXTS:
            page = client.get(address(path, q=text, label=text, **HERE)).text
            assert "<script" not in page and "<img" not in page and "</main></style>" not in page
    page = client.get(address("/document", id=f"0{TEXTS[0]}", **HERE)).text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "output = &#34;&lt;script&gt;" in client.get(address("/run", at="a <run>")).text


@pytest.mark.parametrize(
    ("day", "words"),
    [
        ("2026-11-26", "a finished night is damaged"),
        ("2026-11-27", "has been begun and is not finished"),
        ("2026-11-28", "another version of xmc_ray may have written it"),
    ],
)
def test_a_night_that_cannot_be_shown_says_why(client: TestClient, day: str, words: str) -> None:
    night = client.get(address("/night", at="shop", day=day))
    assert night.status_code == 200 and words in night.text and "Traceback" not in night.text
    documents = client.get(address("/documents", at="shop", day=day))
    assert documents.status_code == 404 and words in documents.text


@pytest.mark.parametrize("host", ["example.org", "127.0.0.1.example.org", "192.168.0.1:8000", ""])
def test_another_host_is_refused(client: TestClient, host: str) -> None:
    assert client.get("/", headers={"host": host}).status_code == 400
    assert client.get("/", headers={"host": "localhost:9"}).status_code == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_only_get(client: TestClient, method: str) -> None:
    assert client.request(method, "/").status_code == 405


@pytest.mark.parametrize("path", ["/", "/nowhere", "/report?at=shop&day=2026-11-24", "/style.css"])
def test_every_answer_forbids_the_rest(client: TestClient, path: str) -> None:
    headers = client.get(path).headers
    assert "default-src 'none'" in headers["content-security-policy"] and "script" not in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"
    assert ("sandbox" in headers["content-security-policy"]) == path.startswith("/report")


@pytest.mark.parametrize("at", ["../..", "/etc", "shop/../..", "shop/tags", "_nights", "nowhere", ""])
def test_nothing_but_what_was_found_is_opened(client: TestClient, at: str) -> None:
    for path in ("/run", "/nights", "/night", "/report", "/documents"):
        assert client.get(address(path, at=at, day="2026-11-24")).status_code == 404


def test_a_bug_is_one_line(root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(self: object, given: object) -> None:
        raise RuntimeError("inner words")

    monkeypatch.setattr(app.Site, "index", fail)
    answer = TestClient(application(str(root)), base_url="http://localhost").get("/")
    assert answer.status_code == 500 and "inner words" not in answer.text and "a bug of the page" in answer.text
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "inner words" in capsys.readouterr().err
