"""What a field of the configuration says of itself: its meaning, its range, and when it has an effect.

`settings_of` is read by the checks, by ``--help`` and by docs/options.md, so that they cannot differ.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import field, fields, is_dataclass
from functools import partial
from typing import Any, NamedTuple

SHARE, POSITIVE, COUNT, NATURAL = "[0, 1)", "(0, infinity)", "[1, infinity)", "[0, infinity)"
DTYPE = "auto | float32 | float16 | bfloat16"


class Rule(NamedTuple):
    """What a value may be; null passes where the type allows it."""

    allows: Callable[[Any], bool]
    text: str


class When(NamedTuple):
    """When a setting has an effect: a test of the whole configuration, and what would give it one."""

    holds: Callable[[Any], bool]
    fix: str


class About(NamedTuple):
    """What stands at a field; see `setting`."""

    help: str
    within: Rule | None
    when: tuple[When, ...]
    inside: tuple[When, ...]
    follows: str | None


def setting(
    default: Any,
    help: str = "",
    within: str | Rule | None = None,
    *when: When,
    inside: tuple[When, ...] = (),
    follows: str | None = None,
    was: str | None = None,
    looks: tuple[str, ...] = (),
) -> Any:
    """A field of a node.

    Args:
        default: Its value; for a node, its class.
        help: What it means, and its unit.
        within: A range such as ``(0, 1]``, options such as ``lora | full``, or a rule of its own.
        *when: What must hold for the key to have an effect.
        inside: The same for the keys of this node, but not for the node itself, which is a choice of an option.
        follows: Key of the same range whose value it takes where it is not typed.
        was: Its former name.
        looks: At what the loss of this weight looks: logits or hidden (states), and teacher where it needs one.
    """
    said = {
        "about": About(help, rule(within) if isinstance(within, str) else within, when, inside, follows),
        "was": was,
        "looks": looks,
    }
    if isinstance(default, type):
        return field(default_factory=default, metadata=said)
    if isinstance(default, list | dict):
        return field(default_factory=partial(copy, default), metadata=said)
    return field(default=default, metadata=said)


def rule(text: str) -> Rule:
    """The rule that a text states; see `setting`."""
    if text[0] not in "([":
        options = text.split(" | ")
        return Rule(lambda value: value in options, f"one of {', '.join(options)}")
    low, high = (float(end) for end in text[1:-1].split(","))
    above = operator.gt if text[0] == "(" else operator.ge
    below = operator.lt if text[-1] == ")" else operator.le
    return Rule(lambda value: isinstance(value, int | float) and above(value, low) and below(value, high), f"in {text}")


Setting = tuple[str, Any, About, tuple[When, ...]]


def settings_of(node: Any, prefix: str = "", above: tuple[When, ...] = ()) -> Iterator[Setting]:
    """Every setting of a node and of the nodes in it.

    Args:
        node: An instance of a class of `efficientllava.settings.schema`.
        prefix: The node's own key with a dot behind it; empty for the root.
        above: What must hold for any key of the node to have an effect.

    Yields:
        Its dotted key, its value, what is said of it, and what must hold for it to have an effect, `above` included.
    """
    for each in fields(node):
        about, value = each.metadata["about"], getattr(node, each.name)
        when = (*above, *about.when)
        yield prefix + each.name, value, about, when
        if is_dataclass(value):
            yield from settings_of(value, f"{prefix}{each.name}.", (*when, *about.inside))
