"""The side of an engine's process that answers a test (support.asking): JSON, a line each way.

Runs in the engines' own environments, so it imports what all of them have.
"""

import json
import os
import sys
from collections.abc import Iterator
from typing import Any


class Answers:
    """What was stdout, for answers alone: what libraries write there goes to stderr from now on."""

    def __init__(self) -> None:
        self._stream = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def say(self, answer: Any) -> None:
        """Give an answer."""
        self._stream.write(json.dumps(answer) + "\n")
        self._stream.flush()

    def requests(self) -> Iterator[Any]:
        """All requests until stdin ends; each is to be answered before the next."""
        self.say("ready")
        for line in sys.stdin:
            yield json.loads(line)
