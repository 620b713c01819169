"""Pages as tests see them, without a browser."""

import base64
import gzip
import json
import re
from html.parser import HTMLParser

PACKED = re.compile(r"<(script|template)([^>]*) data-gzip([^>]*)>([^<]*)</")


def unpacked(text: str) -> str:
    """A page with its packed charts and marks as they are, "<" in JSON escaped."""

    def plain(found: re.Match) -> str:
        inner = gzip.decompress(base64.b64decode(found[4])).decode()
        inner = inner.replace("<", "\\u003c") if found[1] == "script" else inner
        return f"<{found[1]}{found[2]}{found[3]}>{inner}</"

    return PACKED.sub(plain, text)


VOID = {"meta", "link", "br", "img", "input", "hr", "source"}
SVG_EMPTY = {"rect", "path"}


class Page(HTMLParser):
    """What a browser would find: addresses, ids, scripts, styles, words, and whether tags are closed."""

    def __init__(self, text: str):
        super().__init__()
        self.addresses, self.ids, self.words = [], [], []
        self.blocks = {"script": [], "style": []}
        self.charts, self.values, self.open, self.unclosed = [], [], [], []
        self.feed(unpacked(text))

    def handle_starttag(self, tag, attrs):
        facts = dict(attrs)
        self.addresses += [v for k, v in attrs if k in ("src", "href", "srcset", "data", "action", "poster") and v]
        self.ids += [v for k, v in attrs if k == "id"]
        self.blocks["style"] += [v for k, v in attrs if k == "style" and v]
        if tag not in VOID:
            self.open.append((tag, facts))

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        if not self.open or self.open[-1][0] != tag:
            self.unclosed.append((tag, self.open[-1:]))
        else:
            self.open.pop()

    def handle_data(self, data):
        tag, facts = self.open[-1] if self.open else ("", {})
        if tag == "script" and facts.get("type") == "application/json":
            value = json.loads(data)
            (self.charts if "layout" in value else self.values).append(value)
        elif tag in self.blocks:
            self.blocks[tag].append(data)
        else:
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))
