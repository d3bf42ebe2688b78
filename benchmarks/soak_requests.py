"""Random requests for `soak.py`, and the two targets that answer them."""

from __future__ import annotations

import contextlib
import http.client
import json
import multiprocessing
import random
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

from tda_export.errors import TdaError
from tda_export.runtime import Artifact, Conversation, Model, Sampling, load, open_artifact
from tda_export.runtime.deployment import PriceDeployment
from tda_export.runtime.text import Text

MOST_PROMPT, MOST_ANSWER, MOST_CHAT = 512, 64, 1024  # the most tokens of each
WORDS_KEPT = 12_000  # more than the cache of the tokenizers package holds (10,000, 0.4 kB each)
LETTERS = str.maketrans("0123456789", "ghijklmnop")  # turns hexadecimal digits into letters
CLIENTS = 3
PATIENCE = 600  # seconds to wait for an answer, and for a target to end
ENDS = ("read", "read", "read", "closed", "dropped", "cancelled")  # ends of a generation, drawn with equal chances
WORDS = "the sea was calm and a small boat went slowly along the coast of an island".split()  # noqa: SIM905 (a text)
ANY_PRICES = (0.0, 1e-8, 1e-6)  # for artifacts without a table; how much they skip does not matter here


class Running(Protocol):
    """A running target, in the process `pid`."""

    pid: int

    def check(self) -> None:
        """Raise TdaError if the target has ended, or has given a wrong answer."""

    def counts(self) -> Mapping[str, int]:
        """Stop the target, and return the number of requests for each end."""


Target = Callable[[Path, str, int], AbstractContextManager[Running]]


def length(chance: random.Random, most: int) -> int:
    """Draw a length from 1 to `most`; its logarithm is uniform."""
    return round(most ** chance.random())


def sampling(chance: random.Random) -> dict[str, Any]:
    """Draw sampling options: greedy for half of the requests."""
    if chance.random() < 0.5:
        return {"temperature": 0.0}
    return {
        "temperature": 0.8,
        "top_k": 40,
        "repetition_penalty": chance.choice([1.0, 1.1]),
        "seed": chance.getrandbits(32),
    }


def budgets(artifact: Artifact) -> list[dict[str, float]]:
    """Return the budgets to draw from: no budget, and with prices also dense and two others."""
    if artifact.layout != "priced":
        return [{}]
    table = artifact.price_table
    if table is None:
        return [{}, *({"price": price} for price in ANY_PRICES)]
    return [{}, {"price": 0.0}, {"sparsity": 0.3}, {"price": table.most_price / 2}]


def generate_until_told(folder: Path, provider: str, seed: int, pipe: Connection) -> None:
    """Generate until a message comes through the pipe, then send the number of requests for each end."""
    model, chance, counts = load(folder, provider=provider), random.Random(seed), Counter[str]()
    chats = model.text.has_chat_template
    conversation = Conversation(model, context=min(MOST_CHAT, model.check_context(None))) if chats else None
    take_most_memory(model, conversation)
    while not pipe.poll():
        if conversation is not None and chance.random() < 0.3:
            if chance.random() < 0.2:
                conversation.reset()
            text = " ".join(chance.choices(WORDS, k=length(chance, 40)))
            generation = conversation.say(text, max_new_tokens=length(chance, MOST_ANSWER))
        elif chance.random() < 0.05:
            with contextlib.suppress(TdaError):
                model.generate([model.artifact.shape.vocab_size])
            counts["refused"] += 1
            continue
        else:
            generation = plain_generation(model, chance)
        end = chance.choice(ENDS)
        stop_at = length(chance, MOST_ANSWER)
        for place, _ in enumerate(generation, 1):
            if end != "read" and place >= stop_at:
                if end == "cancelled":
                    generation.cancel()
                else:
                    break
        if end == "closed":
            generation.close()
        del generation
        counts[end] += 1
    pipe.recv()
    pipe.send(dict(counts))


def take_most_memory(model: Model, conversation: Conversation | None) -> None:
    """Generate with the longest prompt, fill a conversation, and fill the tokenizer's cache of words.

    Otherwise their memory, which is bounded but first used later, would look like growth.
    """
    for number in range(WORDS_KEPT):
        model.text.encode(f"{number:x}".translate(LETTERS))
    prompt = min(MOST_PROMPT, model.check_context(None) - MOST_ANSWER)
    list(model.generate([0] * prompt, max_new_tokens=MOST_ANSWER, ignore_eos=True))
    while conversation is not None and conversation.dropped_turns == 0:
        list(conversation.say(" ".join(2 * WORDS), max_new_tokens=1))


def plain_generation(model: Model, chance: random.Random) -> Any:
    """Begin a generation from random tokens."""
    context = model.check_context(None)
    prompt = chance.choices(range(model.artifact.shape.vocab_size), k=length(chance, min(MOST_PROMPT, context - 1)))
    budget = chance.choice(budgets(model.artifact))
    how: PriceDeployment | None = model.at(**budget) if budget else None
    return model.generate(
        prompt,
        max_new_tokens=length(chance, MOST_ANSWER),
        sampling=Sampling(**sampling(chance)),
        deployment=how,
        stop=chance.choice([(), ("the", "\n")]),
        ignore_eos=chance.random() < 0.5,
    )


@dataclass
class Generating:
    """Runs `generate_until_told` in a process."""

    process: Any
    pipe: Connection

    @property
    def pid(self) -> int:
        return int(self.process.pid)

    def check(self) -> None:
        if not self.process.is_alive():
            raise TdaError(f"The process that generates ended by itself, with {self.process.exitcode}. See above.")

    def counts(self) -> Mapping[str, int]:
        self.pipe.send("stop")
        if not self.pipe.poll(PATIENCE):
            raise TdaError(f"The process that generates did not stop within {PATIENCE} seconds.")
        counts: dict[str, int] = self.pipe.recv()
        return counts


@contextlib.contextmanager
def generating(folder: Path, provider: str, seed: int) -> Iterator[Running]:
    """Generate in a process of its own."""
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=generate_until_told, args=(folder, provider, seed, there), daemon=True)
    process.start()
    try:
        yield Generating(process, here)
    finally:
        process.terminate()
        process.join()


class Serving:
    """A server in a process, and clients in threads of this one."""

    def __init__(self, process: subprocess.Popen[str], address: tuple[str, int], folder: Path, seed: int) -> None:
        self.pid, self._process, self._address = process.pid, process, address
        artifact = open_artifact(folder)
        self._most_words = min(MOST_PROMPT, artifact.shape.max_positions) // 8  # since a token may be one letter
        self._chats = Text(artifact).has_chat_template
        self._budgets, self._name = budgets(artifact), folder.resolve().name
        self._counts, self._wrong, self._stop = Counter[str](), list[str](), threading.Event()
        self._clients = [
            threading.Thread(target=self._ask, args=(random.Random(seed + number),), daemon=True)
            for number in range(CLIENTS)
        ]
        for client in self._clients:
            client.start()

    def check(self) -> None:
        if self._process.poll() is not None:
            raise TdaError(f"The server ended by itself, with {self._process.returncode}. See above.")
        if self._wrong:
            raise TdaError(f"The server answered wrongly: {self._wrong[0]}")

    def counts(self) -> Mapping[str, int]:
        self._stop.set()
        for client in self._clients:
            client.join(PATIENCE)
        self.check()
        return self._counts

    def _ask(self, chance: random.Random) -> None:
        try:
            while not self._stop.is_set():
                self._counts[self._request(chance)] += 1
        except Exception as error:  # `check` raises it in the main thread
            self._wrong.append(f"{type(error).__name__}: {error}")

    def _request(self, chance: random.Random) -> str:
        """Send a request on a connection of its own, and return how it ended."""
        path, body = self._body(chance)
        wrong = chance.random() < 0.05
        if wrong:
            body["unknown"] = True
        connection = http.client.HTTPConnection(*self._address, timeout=PATIENCE)
        try:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            if not body["stream"] and chance.random() < 0.2:
                return "disconnected"
            response = connection.getresponse()
            if response.status != (400 if wrong else 200):
                raise TdaError(f"status {response.status}: {response.read()[:200]!r}")
            if body["stream"] and not wrong and chance.random() < 0.4:
                response.read(length(chance, 4000))
                return "disconnected"
            response.read()
            return "refused" if wrong else "read"
        finally:
            connection.close()

    def _body(self, chance: random.Random) -> tuple[str, dict[str, Any]]:
        text = " ".join(chance.choices(WORDS, k=length(chance, self._most_words)))
        body = {
            "model": self._name,
            "stream": chance.random() < 0.7,
            "max_tokens": length(chance, MOST_ANSWER),
            **chance.choice(self._budgets),
            **sampling(chance),
        }
        if not self._chats or chance.random() < 0.5:
            return "/v1/completions", body | {"prompt": text}
        return "/v1/chat/completions", body | {"messages": [{"role": "user", "content": text}]}


@contextlib.contextmanager
def serving(folder: Path, provider: str, seed: int) -> Iterator[Running]:
    """Start a server on a free port of this machine."""
    command = [sys.executable, "-m", "tda_export", "serve", str(folder), "--port", "0", "--provider", provider]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("Serving "):
                host, port = line.split("://")[1].split("/v1")[0].rsplit(":", 1)
                threading.Thread(target=sys.stderr.writelines, args=(process.stderr,), daemon=True).start()
                yield Serving(process, (host, int(port)), folder, seed)
                return
            sys.stderr.write(line)
        raise TdaError("The server did not start. See above.")
    finally:
        process.terminate()  # running requests have the server's --grace to end
        process.wait(PATIENCE)


TARGETS: dict[str, Target] = {"generate": generating, "serve": serving}
