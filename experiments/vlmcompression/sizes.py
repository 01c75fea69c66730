"""Sizes of the models of arXiv 2604.24380 as the presets make them, beside those that its Table 2 prints."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

from torch import nn

from efficientllava.checkpoint.folder import stock_config
from efficientllava.estimate import meta_model, plan_outline
from efficientllava.models.anatomy import parameters
from efficientllava.report.study import table
from efficientllava.settings.compose import FAMILIES, SHARES
from efficientllava.settings.schema import RunConfig
from efficientllava.stages.request import composed

# Billions of parameters left, by label: widthwise and layerwise.
PRINTED = {
    "llava": {"w": {15: 6.0, 30: 5.0, 45: 3.8, 60: 2.8}, "l": {15: 6.0, 30: 5.0, 45: 4.0, 60: 2.8}},
    "internvl": {"w": {15: 3.5, 30: 3.0, 45: 2.5, 60: 1.6}, "l": {15: 3.5, 30: 3.0, 45: 2.5, 60: 1.6}},
    "bunny": {"w": {15: 2.8, 30: 2.4, 45: 2.0, 60: 1.5}, "l": {15: 2.8, 30: 2.4, 45: 2.0, 60: 1.5}},
}
HEAD = ("preset", "nominal", "language model removed", "left", "printed", "deviation")


@cache
def settings_of(name: str) -> RunConfig:
    """The configuration of a preset."""
    return composed(f"experiment={name}", "dry_run=true", "trainer=cpu")


@cache
def model_of(family: str) -> nn.Module:
    """The unpruned model of a family on the meta device."""
    return meta_model(stock_config(settings_of(f"vlmcompression_{family}_w15").model))


def sizes(name: str) -> tuple[float, float]:
    """Share of language-model parameters that a preset removes, and all parameters that are left, in billions."""
    base = model_of(name.split("_")[1])
    plan = plan_outline(base, settings_of(name))
    return plan.achieved[0], (parameters(base) - plan.removed[0]) / 1e9


def rows() -> Iterator[tuple[str, ...]]:
    """One row per preset."""
    for family, printed in PRINTED.items():
        for method, labels in printed.items():
            for label, billions in labels.items():
                name = f"vlmcompression_{family}_{method}{label}"
                nominal = (
                    f"share {SHARES[label]}" if method == "w" else f"{FAMILIES[family].blocks[label]} of 32 blocks"
                )
                removed, left = sizes(name)
                deviation = f"{100 * (left / billions - 1):+.1f} %" if abs(left - billions) > 0.0505 else ""
                yield f"`{name}`", nominal, f"{100 * removed:.1f} %", f"{left:.2f} B", f"{billions} B", deviation


if __name__ == "__main__":
    print(table(HEAD, rows(), 2), end="")
