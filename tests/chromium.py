"""A headless Chromium that is told what to do over a pipe; needs the browser, and of Python the standard library."""

import base64
import itertools
import json
import os
import shutil
import subprocess
from pathlib import Path

from processes import wait_until

PATH = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


class Page:
    """One tab of a new browser, with an empty profile in `folder`; use it by `with`."""

    def __init__(self, folder, width=1100, height=800):
        (ours, its_out), (its_in, ours_in) = os.pipe(), os.pipe()
        # it reads its commands from descriptor 3 and answers on 4: a shell arranges that without a fork of ours
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run",
                 "--disable-background-networking", "--disable-dev-shm-usage", "--hide-scrollbars",
                 f"--user-data-dir={folder}", "about:blank"]
        command = ["bash", "-c", f'exec "$@" 3<&{its_in} 4>&{its_out}', "chromium", PATH, *flags]
        self._process = subprocess.Popen(command, pass_fds=(its_in, its_out), stdin=subprocess.DEVNULL,
                                         stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(its_in), os.close(its_out)
        self._commands, self._answers = os.fdopen(ours_in, "wb"), os.fdopen(ours, "rb")
        self._numbers, self._session, self.events, self._read = itertools.count(1), {}, [], b""
        tab = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = {"sessionId": self.call("Target.attachToTarget", targetId=tab, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.resize(width, height)

    def call(self, method, **parameters):
        """Make a call of the DevTools protocol; events that come before its answer are kept in `events`."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters, **self._session}
        self._commands.write(json.dumps(message).encode() + b"\0")
        self._commands.flush()
        while True:
            *messages, self._read = (self._read + self._answers.read1(1 << 20)).split(b"\0")
            for found in map(json.loads, messages):
                if found.get("id") == number:
                    answer = found
                else:
                    self.events.append(found)
            if "answer" in locals():
                assert "error" not in answer, answer
                return answer["result"]

    def evaluate(self, script):
        """Return the value of a JavaScript expression."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def resize(self, width, height, mobile=False):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)

    def prefer(self, scheme):
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def open(self, url):
        self.call("Page.navigate", url=url)

    def text(self):
        return self.evaluate("document.body ? document.body.innerText : ''")

    def shows(self, *texts):
        """Wait until all of these texts can be read on the page."""
        wait_until(lambda: all(text in self.text() for text in texts))

    def problems(self):
        """Return what the console said: errors, warnings, exceptions."""
        self.evaluate("1")          # events that are on their way come before its answer
        kinds = {"Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled"}
        return [event for event in self.events if event.get("method") in kinds]

    def requests(self):
        return [event["params"]["request"]["url"] for event in self.events
                if event.get("method") == "Network.requestWillBeSent"]

    def screenshot(self, path):
        Path(path).write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._session = {}
        self._commands.write(json.dumps({"id": 0, "method": "Browser.close"}).encode() + b"\0")
        self._commands.close()
        self._process.wait(20)
        self._answers.close()
