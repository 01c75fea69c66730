"""The installed runtime: llama.cpp's server out of ``xllamacpp``, asked over the loopback of this machine."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..runtime.errors import UserError

SERVER = Path(__file__).with_name("server.py")
GREEDY = {"temperature": 0.0, "top_k": 1, "samplers": ["top_k"], "return_tokens": True}
TIMEOUT = 3600.0  # seconds for one answer


def version() -> str:
    """Name and version of the installed runtime."""
    return f"xllamacpp {metadata.version('xllamacpp')}"


class Runtime:
    """A model in the runtime; see `serve`.

    Attributes:
        seconds: What loading took.
        marker: The text that stands for an image in a prompt.
    """

    def __init__(self, process: Any, log: Any, path: Path) -> None:
        self._process, self._log, self._path = process, log, path
        told = self._read()
        self.seconds = float(told["seconds"])
        self._address = told["address"]
        self._open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
        with self._open(f"{self._address}/props", timeout=TIMEOUT) as reply:
            self.marker: str = json.load(reply)["media_marker"]

    def _read(self) -> Any:
        line = self._process.stdout.readline()
        if not line:
            raise self._failed()
        return json.loads(line)

    def _failed(self) -> UserError:
        self._process.wait()
        self._log.seek(0)
        lines = [line.strip() for line in self._log.read().decode(errors="replace").splitlines() if line.strip()]
        told = (
            [line for line in lines if "error" in line.lower() or "assert" in line.lower()] or lines or ["no message"]
        )
        return UserError(f"{self._path}: {version()} does not take it: {told[0][:300]}")

    def cpu(self) -> float:
        """Seconds of CPU that the runtime has used."""
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return float(self._read())

    def ask(self, place: str, **body: Any) -> Any:
        """What an endpoint of the server answers.

        Args:
            place: Such as ``tokenize`` or ``completion``.
            **body: Fields of the request.

        Raises:
            UserError: The runtime refused the request, or it has ended.
        """
        request = urllib.request.Request(
            f"{self._address}/{place}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with self._open(request, timeout=TIMEOUT) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as error:
            raise UserError(f"{self._path}: {version()} refused {place}: {error.read().decode()[:300]}") from error
        except (OSError, ValueError) as error:
            raise self._failed() from error

    def tokens(self, text: str, special: bool = True) -> list[int]:
        """Token ids of a text; ``special`` adds what the file says stands at a text's beginning and end."""
        return self.ask("tokenize", content=text, add_special=special, parse_special=True)["tokens"]

    def prompt(self, text: str, images: Sequence[Image.Image]) -> Any:
        """A prompt; the marker stands in ``text`` where an image does."""
        return {"prompt_string": text, "multimodal_data": [_png(image) for image in images]} if images else text

    def chat(self, question: str, images: Sequence[Image.Image] = ()) -> str:
        """The prompt that the server makes of a message, by the chat template in the file."""
        urls = [{"url": f"data:image/png;base64,{_png(image)}"} for image in images]
        content: list[Any] = [{"type": "image_url", "image_url": url} for url in urls]
        message = {"role": "user", "content": [*content, {"type": "text", "text": question}]}
        return self.ask("apply-template", messages=[message])["prompt"]

    def complete(self, prompt: Any, tokens: int = 1, ignore_eos: bool = False) -> dict[str, Any]:
        """Greedy continuation of a prompt.

        Args:
            prompt: Text, token ids, or output of `prompt`.
            tokens: Of the continuation at most, >= 1.
            ignore_eos: Go on behind an end.
        """
        return self.ask(
            "completion", prompt=prompt, n_predict=tokens, ignore_eos=ignore_eos, cache_prompt=False, **GREEDY
        )

    def next_token(self, prompt: Any, vocabulary: int, cached: bool = False) -> tuple[Tensor, int]:
        """Log-probabilities of the token behind a prompt, ``(vocabulary,)``, and the prompt's length.

        Args:
            prompt: As for `complete`.
            vocabulary: Number of tokens.
            cached: Do not read again what the last prompt begins with.
        """
        # What is drawn does not matter, as long as it is neither an end nor a part of a letter: of such the server says
        # nothing. The bias is of the drawing alone.
        plain = [[self.tokens("a", special=False)[-1], 1e6]]
        options = {"n_predict": 1, "n_probs": vocabulary, "logit_bias": plain, "cache_prompt": cached}
        answer = self.ask("completion", prompt=prompt, **options, **GREEDY)
        found = torch.full((vocabulary,), -torch.inf, dtype=torch.float64)
        for entry in answer["completion_probabilities"][0]["top_logprobs"]:
            found[entry["id"]] = entry["logprob"]
        return found.log_softmax(0), answer["tokens_evaluated"]  # it sums a large vocabulary in float32


def _png(image: Image.Image) -> str:
    data = io.BytesIO()
    image.save(data, "PNG")
    return base64.b64encode(data.getvalue()).decode()


@contextmanager
def serve(
    model: Path,
    mmproj: Path | None = None,
    *,
    context: int,
    embeddings: bool = False,
    exact: bool = False,
) -> Iterator[Runtime]:
    """Load files into the runtime, on one thread.

    Args:
        model: GGUF file of a decoder.
        mmproj: GGUF file of its image side.
        context: Tokens that there is room for, >= 1.
        embeddings: Answer with the final hidden states of all positions in place of text.
        exact: Keep keys and values in float32 and not, as the runtime does unless told otherwise, in float16.

    Yields:
        The runtime.

    Raises:
        UserError: The runtime does not take the files; says its first line about it.
    """
    files = {"model": str(model), "mmproj": mmproj and str(mmproj)}
    asked = {**files, "context": context, "embeddings": embeddings, "exact": exact}
    pipe = subprocess.PIPE
    with tempfile.TemporaryFile() as log:
        command = [sys.executable, "-I", str(SERVER), json.dumps(asked)]
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, text=True)
        try:
            yield Runtime(process, log, model)
        finally:
            process.stdin.close()  # pyright: ignore[reportOptionalMemberAccess]
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
