"""The 2017 questions of ScienceQA's test split that have an image."""

from dataclasses import replace

from . import scienceqa

BENCHMARK = replace(scienceqa.BENCHMARK, config="ScienceQA-IMG", questions=2017, headline=("accuracy",))
