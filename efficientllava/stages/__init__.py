"""The stages of a run, in terms of the packages that do the work; `efficientllava.pipeline` puts them in order."""
