"""What pyproject.toml cannot say: the configuration travels in the package, where an installed command finds it."""

from setuptools import find_namespace_packages, setup

setup(
    packages=[*find_namespace_packages(include=["efficientllava*", "hydra_plugins*"]), "efficientllava.conf"],
    package_dir={"efficientllava.conf": "conf"},
)
