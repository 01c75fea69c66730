"""What a judge is asked about predictions, and the file that keeps it for later.

The layout of the requests, temperatures and lengths are those of the official scripts of MM-Vet (arXiv 2308.02490),
LLaVA-Bench (arXiv 2304.08485) and MathVista (arXiv 2310.02255). The wording is ours, unless ``evaluate.judge.prompts``
names a folder with the benchmarks' own: published scores are comparable only with these.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..runtime import UserError, digest, json_lines, write_whole
from ..settings.schema import JudgeConfig
from .scorers.text import FAILED, llava_bench_pair, mathvista_extract, mmvet_grade
from .tasks import Record, predicted, value

MMVET = """\
Grade how far an answer agrees with the reference answer: 1.0 if all of it is right, 0.0 if none of it is, and steps of
0.1 between. Parts joined by <AND> must all be there, and each is worth its share; of those joined by <OR>, one is
enough. Wording does not matter, and true details beyond the reference are neither rewarded nor punished. Write the
grade of the last row as a bare number, nothing else.

Question | Reference | Answer | Grade
--- | --- | --- | ---
Which words are on the two signs? | exit <AND> mind the step | The upper sign says "Exit". | 0.5
How many birds sit on the wire? | 7 <OR> seven | There are seven birds on it. | 1.0
What is the result of the sum on the board? | 42 | The sum is 24. | 0.0
What happens here? | a boy in a red coat <AND> feeds ducks <AND> at a frozen pond | A child at a pond feeds birds. | 0.6
"""

_RATE = """\
The context describes an image that you cannot see. Two assistants have answered the question about that image. {what}
Give each of them one overall score from 1 (useless) to 10 (perfect). Judge the answers by their content: neither their
order nor their length may matter. The first line of your reply holds nothing but the two scores, assistant 1 first,
with one blank between them. Explain the scores from the second line on."""
LLAVA_BENCH = {
    "conv": "Look at whether the answers fit the image, answer what was asked, and are exact.",
    "detail": "Look at how fully and how exactly the answers describe the image, and whether they make anything up.",
    "complex": "Look at whether the reasoning is sound, fits the image, and goes as deep as the question asks.",
}
LLAVA_BENCH_SYSTEM = "You compare answers of assistants, carefully and without a favourite."

MATHVISTA = """\
A question and a response to it follow. Copy the final answer out of the response in the form that the hint asks for,
an option's letter, a number or a list. Do not solve the question yourself, do not correct the answer, and write nothing
else.

Question: How many apples are left in the bowl? Hint: give an integer.
Response: Five apples were there and two are taken, so three remain.
Extracted answer: 3

Question: Which angle is the largest? Choices: (A) P (B) Q (C) R
Response: Angle Q is opposite the longest side, which makes it the largest.
Extracted answer: B

Question: Between which two years did sales double? Hint: give a list.
Response: They rose from 20 in 2011 to 40 in 2013.
Extracted answer: [2011, 2013]
"""

Texts = Mapping[str, str]  # the constant part of what is asked, by name


@dataclass(frozen=True)
class Judging:
    """How the answers to a benchmark are judged.

    Attributes:
        file: Name of the official prompts in the folder ``evaluate.judge.prompts``.
        texts: Our wording; LLaVA-Bench has one per category and a ``system`` message.
        messages: Role and content of what is asked about a record: with ``prediction``, ``question`` and ``answer``
            (LLaVA-Bench: ``gpt_answer`` wins over it); LLaVA-Bench also ``caption`` and ``category``, for MathVista
            ``query`` wins over ``question``.
        readable: Whether a reply can be read.
        reminder: What is added when it could not.
        settings: By protocol the temperature, the longest reply in tokens, and the evaluations of one answer.
        decided: Whether a record needs no judge.
    """

    file: str
    texts: Texts
    messages: Callable[[Record, Texts], list[tuple[str, str]]]
    readable: Callable[[str], bool]
    reminder: str
    settings: Mapping[str, tuple[float, int, int]]
    decided: Callable[[Record], bool] = lambda record: False


def _question(record: Record, *keys: str) -> str:
    text = next((record[key] for key in keys if record.get(key)), None) or value(record, "question")
    return str(text).replace("<image>", "").strip()


def _mmvet(record: Record, texts: Texts) -> list[tuple[str, str]]:
    answer = str(value(record, "answer")).replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    row = " | ".join([_question(record), answer, predicted(record), ""])
    return [("user", f"{texts['']}\n{row}")]


def _llava_bench(record: Record, texts: Texts) -> list[tuple[str, str]]:
    category = str(value(record, "category")).removeprefix("llava_bench_")
    if category not in LLAVA_BENCH:
        raise UserError(f"record {record['id']!r}: 'category' is {category!r}; it must be {', '.join(LLAVA_BENCH)}")
    caption = value(record, "caption")
    caption = caption if isinstance(caption, str) else "\n".join(caption)
    reference = record["gpt_answer"] if "gpt_answer" in record else value(record, "answer")
    parts = [f"[Context]\n{caption}", f"[Question]\n{_question(record)}"]
    for number, answer in ((1, reference), (2, predicted(record))):
        parts += [f"[Assistant {number}]\n{answer}", f"[End of Assistant {number}]"]
    parts.append(f"[System]\n{texts[category]}")
    return [("system", texts["system"]), ("user", "".join(f"{part}\n\n" for part in parts))]


def _mathvista(record: Record, texts: Texts) -> list[tuple[str, str]]:
    question = _question(record, "query")
    return [("user", f"{texts[''].strip()}\n\n{question}\n\n{predicted(record).strip()}\n\nExtracted answer: ")]


JUDGES = {
    "mmvet": Judging(
        file="mmvet.txt",
        texts={"": MMVET},
        messages=_mmvet,
        readable=lambda reply: mmvet_grade(reply) is not None,
        reminder="\nThe grade of the last row, as a bare number between 0.0 and 1.0:",
        settings={"llava": (0.0, 3, 5), "lmms_eval": (0.0, 128, 1)},
    ),
    "llava_bench": Judging(
        file="rule.json",
        texts={name: _RATE.format(what=what) for name, what in LLAVA_BENCH.items()} | {"system": LLAVA_BENCH_SYSTEM},
        messages=_llava_bench,
        readable=lambda reply: llava_bench_pair(reply) != FAILED,
        reminder="The first line must be two numbers with one blank between them, and nothing else.",
        settings={"llava": (0.2, 1024, 3), "lmms_eval": (0.2, 1024, 1)},
    ),
    "mathvista": Judging(
        file="mathvista.txt",
        texts={"": MATHVISTA},
        messages=_mathvista,
        readable=lambda reply: bool(reply.strip()),
        reminder="\nThe answer must not be empty:",
        settings={"llava": (0.0, 256, 1), "lmms_eval": (0.0, 256, 1)},
        decided=lambda record: mathvista_extract(str(record.get("prediction") or "").strip(), record) is not None,
    ),
}
SYSTEM = "llava_bench_system.txt"  # optional beside rule.json: LLaVA-Bench's system message, which stands in its script


def load(task: str, folder: str | None) -> tuple[Texts, str]:
    """The texts of a task, and their digest and source: scores with different ones are not comparable.

    Args:
        task: A key of `JUDGES`.
        folder: With the official files (LLaVA's ``rule.json`` as it is; of MM-Vet and MathVista the constant text
            before the question); None for our wording.

    Raises:
        UserError: The task's file is not there or is not of its kind.
    """
    if folder is None:
        texts = JUDGES[task].texts
        return texts, f"{digest(texts)} (own wording)"
    path = Path(folder).expanduser() / JUDGES[task].file
    try:
        texts = {"": path.read_text(encoding="utf-8")}
        if task == "llava_bench":
            rules = json.loads(texts[""])
            texts = {name: rules[f"llava_bench_{name}"]["prompt"] for name in LLAVA_BENCH}
    except (OSError, ValueError, LookupError, TypeError) as error:
        fix = f"it must hold the official {path.name}; or leave evaluate.judge.prompts out"
        raise UserError(f"evaluate.judge.prompts={folder}: {path.name} cannot be read ({error!r}); {fix}") from error
    if task == "llava_bench":
        system = path.with_name(SYSTEM)
        texts["system"] = system.read_text(encoding="utf-8").strip() if system.exists() else LLAVA_BENCH_SYSTEM
    return texts, f"{digest(texts)} (official files)"


@dataclass(frozen=True)
class Request:
    """One record that is to be judged once.

    Attributes:
        run: Number of the evaluation, from 0; its seed.
        record: The record.
        body: Of a chat completion without a model; None where no judge is needed.
        prompts: Digest and source of the prompts.
    """

    run: int
    record: Record
    body: dict[str, Any] | None
    prompts: str


def requests(records: Sequence[Record], task: str, config: JudgeConfig, protocol: str = "llava") -> list[Request]:
    """What a judge has to be asked about predictions: for every evaluation one request per record.

    Args:
        records: As the task's scorer wants them, but without verdicts; see also `Judging.messages`.
        task: A key of `JUDGES`.
        config: ``prompts`` and ``runs``.
        protocol: ``llava`` or ``lmms_eval``; decides about lengths and the number of evaluations.

    Raises:
        UserError: A record or a prompt file lacks something.
    """
    judging, (texts, label) = JUDGES[task], load(task, config.prompts)
    temperature, tokens, runs = judging.settings[protocol]

    def body(record: Record, run: int) -> dict[str, Any] | None:
        if judging.decided(record):
            return None
        messages = [{"role": role, "content": content} for role, content in judging.messages(record, texts)]
        return {"messages": messages, "temperature": temperature, "max_tokens": tokens, "seed": run}

    return [Request(run, record, body(record, run), label) for run in range(config.runs or runs) for record in records]


def again(task: str, body: Mapping[str, Any], attempt: int) -> dict[str, Any]:
    """The request after ``attempt`` replies that could not be read: a reminder, and half a degree warmer each time."""
    if attempt == 0:
        return dict(body)
    *before, last = body["messages"]
    messages = [*before, {**last, "content": last["content"] + JUDGES[task].reminder}]
    return {**body, "messages": messages, "temperature": min(2.0, body["temperature"] + attempt / 2)}


def write_requests(asked: Sequence[Request], task: str, protocol: str, path: Path) -> None:
    """Write requests for later, one line of JSON each; `read_requests` reads them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"task": task, "protocol": protocol}
    write_whole(path, json_lines({**about, **asdict(request)} for request in asked))


def read_requests(path: Path) -> tuple[list[Request], str, str]:
    """Read what `write_requests` has written.

    Returns:
        The requests, the task and the protocol.

    Raises:
        UserError: The file cannot be read, or is of another kind.
    """
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        heads = {(row.pop("task"), row.pop("protocol")) for row in rows}
        asked = [Request(**row) for row in rows]
        ((task, protocol),) = heads
        JUDGES[task].settings[protocol]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: holds no requests for a judge ({error!r}); give a file that was exported") from error
    return asked, task, protocol
