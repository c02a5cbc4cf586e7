"""HTML pages taken apart, and texts that try to break one."""

from html.parser import HTMLParser

VOID = {"meta"}


# Everything that makes a browser fetch or run something.
FOREIGN_TAGS = {
    "script",
    "link",
    "img",
    "iframe",
    "object",
    "embed",
    "base",
    "form",
    "audio",
    "video",
    "source",
    "image",
    "use",
    "a",
}


FOREIGN_ATTRIBUTES = {"src", "href", "srcset", "xlink:href", "action", "background", "poster", "data", "style"}


NASTY = {
    "script": "<script>alert(1)</script>",
    "closing tag": "</main></style></title><img src=x onerror=alert(1)>",
    "quotes": """a "double" and 'single' & ampersand""",
    "entity": "&lt;b&gt; &#0;",
    "null byte": "be\0fore \x0b\x1b\x7f after",
    "half a letter": "before \ud83d after",
    "right to left": "تصنيف المنتجات ‮turned‬ עברית",
    "emoji": "👩‍👩‍👧‍👦 🍎",
    "long word": "x" * 10_000,
    "address": "see https://example.org/?src=1",
    "empty": "",
}


class Page(HTMLParser):
    """A page taken apart; an AssertionError if a tag is left open or closed twice."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.inside: list[tuple[str, str]] = []
        self.style = ""
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open += [tag] if tag not in VOID else []

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["style"]:
            self.style += data
        else:
            self.texts.append(data)
            self.inside.append((self.open[-1] if self.open else "", data))

    def having(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        return [found for name, found in self.tags if name == tag and attributes.items() <= found.items()]
