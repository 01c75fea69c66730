"""The installed runtime: llama.cpp's server out of ``xllamacpp``, asked over the loopback of this machine.

Its speed is measured here, and image features are read out of it. It hands image embeddings to a decoder and to nobody
else. So a decoder is written that gives them back: one layer of attention whose scores depend on the distance alone and
peak at one distance, with the identity as values. The final state of a text behind an image is then the direction of
that image token which stands as far before the text's end.
"""

from __future__ import annotations

import base64
import io
import json
import math
import statistics
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..runtime import UserError
from . import decoders
from .decoders import Tensors
from .inputs import CONTROL, NORMAL, SPACE, UNKNOWN

SERVER = Path(__file__).with_name("server.py")
GREEDY = {"temperature": 0.0, "top_k": 1, "samplers": ["top_k"], "return_tokens": True}
TIMEOUT = 3600.0  # seconds for one answer
PATIENCE = 20.0  # seconds for an end
# Speed is measured on one thread, files in turn.
PROMPT, DECODED = 128, 32  # tokens, as far as the context has room for them
LOADS = 3
KNOWN = 24  # tokens that any vocabulary has, from the fourth on
# The decoder that gives image tokens back, see `probe_decoder`.
WORDS = ("<unk>", "<img>", "</img>", SPACE + "a")
TYPES = [UNKNOWN, CONTROL, CONTROL, NORMAL]
MARGIN = 9  # words behind an image whose first token is asked for
SHARPNESS = 60.0  # what a neighbour of the peak lacks, in units of the softmax


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
        self.marker: str = self.ask("props")["media_marker"]

    def _read(self) -> Any:
        line = self._process.stdout.readline()
        if not line:
            raise self._failed()
        return json.loads(line)

    def _failed(self) -> UserError:
        _end(self._process)
        self._log.seek(0)
        lines = [line.strip() for line in self._log.read().decode(errors="replace").splitlines() if line.strip()]
        told = (
            [line for line in lines if "error" in line.lower() or "assert" in line.lower()] or lines or ["no message"]
        )
        return UserError(f"{self._path}: {version()} does not take it: {told[0][:300]}")

    def cpu(self) -> float:
        """Seconds of CPU that the runtime has used."""
        try:
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        except OSError as error:
            raise self._failed() from error
        return float(self._read())

    def ask(self, place: str, **body: Any) -> Any:
        """What an endpoint of the server answers.

        Args:
            place: Such as ``tokenize`` or ``completion``.
            **body: Fields of the request; none for what is only read.

        Raises:
            UserError: The runtime refused the request, or it has ended.
        """
        request = urllib.request.Request(
            f"{self._address}/{place}",
            json.dumps(body).encode() if body else None,
            {"Content-Type": "application/json"},
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

    def prompt(self, text: Any, image: Image.Image | None, placeholder: str) -> Any:
        """A prompt: a text in which a placeholder stands for the image; without one a text, or token ids."""
        if image is None:
            return text
        return {"prompt_string": text.replace(placeholder, self.marker), "multimodal_data": [_png(image)]}

    def chat(self, question: str, image: Image.Image) -> str:
        """The prompt that the server makes of a message with an image, by the chat template in the file."""
        shown = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{_png(image)}"}}
        message = {"role": "user", "content": [shown, {"type": "text", "text": question}]}
        return self.ask("apply-template", messages=[message])["prompt"]

    def complete(self, prompt: Any, tokens: int = 1, ignore_eos: bool = False, cached: bool = False) -> dict[str, Any]:
        """Greedy continuation of a prompt.

        Args:
            prompt: Text, token ids, or output of `prompt`.
            tokens: Of the continuation at most, >= 1.
            ignore_eos: Go on behind an end.
            cached: Do not read again what the last prompt begins with.
        """
        return self.ask(
            "completion", prompt=prompt, n_predict=tokens, ignore_eos=ignore_eos, cache_prompt=cached, **GREEDY
        )

    def next_token(self, prompt: Any, vocabulary: int, cached: bool = False) -> tuple[Tensor, int]:
        """Log-probabilities of the token behind a prompt, ``(vocabulary,)``, and the prompt's length.

        Args:
            prompt: As for `complete`.
            vocabulary: Number of tokens.
            cached: As for `complete`.
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
    asked = {
        "model": str(model),
        "mmproj": mmproj and str(mmproj),
        "context": context,
        "embeddings": embeddings,
        "exact": exact,
    }
    pipe = subprocess.PIPE
    with tempfile.TemporaryFile() as log:
        command = [sys.executable, "-I", str(SERVER), json.dumps(asked)]
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, text=True)
        try:
            yield Runtime(process, log, model)
        finally:
            _end(process)


def _end(process: Any) -> None:
    """End the server, which does so by itself once nobody can ask it any more."""
    with suppress(OSError):  # what it was never told
        process.stdin.close()
    try:
        process.wait(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def speeds(files: Mapping[str, Path], context: int, repeats: int) -> dict[str, dict[str, float]]:
    """Sizes of files, how long they take to load (in memory already), and what `rates` says of them."""
    loads = {name: [_load_seconds(file, context) for _ in range(LOADS)] for name, file in files.items()}
    return {
        name: {"bytes": files[name].stat().st_size, "load_seconds": statistics.median(loads[name]), **found}
        for name, found in rates(files, context, repeats).items()
    }


def rates(files: Mapping[str, Path], context: int, repeats: int) -> dict[str, dict[str, float]]:
    """Measure files side by side, on one thread.

    Args:
        files: By name, such as ``dense`` and ``exported``.
        context: Tokens that all of them have room for, >= 8.
        repeats: Rounds over all files; medians are reported.

    Returns:
        By name: tokens per second of CPU of a prompt (``prefill``) and of the tokens behind it (``decode``;
        ``decode_ms``: milliseconds of CPU for one).
    """
    prompt = min(PROMPT, context // 2)
    answer = min(DECODED, context - prompt - 1)
    ids = [3 + position % KNOWN for position in range(prompt)]
    rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in files}
    with ExitStack() as stack:
        servers = {name: stack.enter_context(serve(file, context=context)) for name, file in files.items()}
        for number in range(1 + repeats):
            for name in [*servers][:: 1 if number % 2 else -1]:
                # Of a prompt that is known the last token alone is read again: a step for every token of the answer.
                first = _cpu_seconds(servers[name], ids, 1)
                rounds[name].append((first, _cpu_seconds(servers[name], ids, answer, cached=True)))
    found = {}
    for name, times in rounds.items():
        first, later = (statistics.median(each) for each in zip(*times[1:], strict=True))  # after a warm-up
        found[name] = {"prefill": prompt / first, "decode": answer / later, "decode_ms": 1e3 / answer * later}
    return found


def _load_seconds(file: Path, context: int) -> float:
    with serve(file, context=context) as runtime:
        return runtime.seconds


def _cpu_seconds(runtime: Runtime, ids: list[int], count: int, cached: bool = False) -> float:
    started = runtime.cpu()
    told: Any = runtime.complete(ids, tokens=count, ignore_eos=True, cached=cached)
    seconds = max(runtime.cpu() - started, 1e-6)
    done, meant = (told["timings"]["prompt_n"], told["tokens_predicted"]), (1 if cached else len(ids), count)
    if done != meant:
        raise RuntimeError(f"the runtime read and wrote {done} tokens, meant were {meant}")
    return seconds


def probe_decoder(width: int, distance: int) -> tuple[dict[str, Any], Tensors]:
    """Keys and tensors of a decoder that gives back what stands so many tokens before."""
    head = math.gcd(width, 128)
    # One turn of the slowest use of the first pair of channels is longer than twice the distance.
    score = 2 * SHARPNESS * distance**2 * math.sqrt(head)
    query, key = torch.zeros(width // head, head), torch.zeros(width // head, head)
    query[:, 0], query[:, 1] = math.sqrt(score) * math.cos(1.0), math.sqrt(score) * -math.sin(1.0)
    key[:, 0] = math.sqrt(score)
    none, same, ones = torch.zeros(width, width), torch.eye(width), torch.ones(width)
    made = {
        "token_embd.weight": torch.zeros(len(WORDS), width),
        "output_norm.weight": ones,
        "rope_freqs.weight": torch.full((head // 2,), float(distance)),
        "blk.0.attn_norm.weight": ones,
        "blk.0.attn_q.weight": none,
        "blk.0.attn_q.bias": query.flatten(),
        "blk.0.attn_k.weight": none,
        "blk.0.attn_k.bias": key.flatten(),
        "blk.0.attn_v.weight": same,
        "blk.0.attn_output.weight": same,
        "blk.0.ffn_norm.weight": ones,
        **{f"blk.0.{name}.weight": torch.zeros(decoders.BLOCK, width) for name in ("ffn_gate", "ffn_up")},
        "blk.0.ffn_down.weight": torch.zeros(width, decoders.BLOCK),
    }
    keys = {
        "context_length": 4 * distance,
        "embedding_length": width,
        "block_count": 1,
        "attention.head_count": width // head,
        "attention.head_count_kv": width // head,
        "feed_forward_length": decoders.BLOCK,
        "attention.layer_norm_rms_epsilon": 1e-12,
        "rope.dimension_count": head,
    }
    words = {
        "model": "t5",
        "tokens": [*WORDS],
        "token_type": TYPES,
        "scores": [0.0] * len(WORDS),
        "unknown_token_id": 0,
        "eos_token_id": 0,
        "add_bos_token": False,
        "add_eos_token": False,
        "add_space_prefix": True,
        "remove_extra_whitespaces": True,
    }
    metadata = {f"llama.{key}": value for key, value in keys.items()}
    metadata |= {f"tokenizer.ggml.{key}": value for key, value in words.items()}
    return metadata, iter([(name, lambda tensor=tensor: tensor) for name, tensor in made.items()])


def cosines(
    folder: Path, mmproj: Path, image: Image.Image, features: Tensor, sample: Sequence[int], closed: bool
) -> list[float]:
    """Cosine between what the runtime makes of an image and what the model makes of it.

    Args:
        folder: Where the decoder is written; it is removed again.
        mmproj: The image side.
        image: An image.
        features: The model's, ``(tokens, width)``.
        sample: Image tokens to compare, each in ``range(tokens)``.
        closed: Whether the runtime writes a token behind an image.
    """
    tokens, width = features.shape
    file = folder / ".probe.gguf"
    try:
        metadata, tensors = probe_decoder(width, tokens + MARGIN - 1)
        decoders.write(file, "llama", metadata, tensors, "f32")
        with serve(file, mmproj, context=4 * tokens + 64, embeddings=True, exact=True) as runtime:
            found = [_last_state(runtime, image, index + MARGIN - closed) for index in sample]
    finally:
        file.unlink(missing_ok=True)
    return [
        float(torch.cosine_similarity(vector, features[index], 0)) for index, vector in zip(sample, found, strict=True)
    ]


def _last_state(runtime: Runtime, image: Image.Image, words: int) -> Tensor:
    """The final state of a text of some words behind an image."""
    answer = runtime.ask("embedding", content=runtime.prompt("<image>" + " a" * words, image, "<image>"))
    return torch.tensor(answer[0]["embedding"][-1])
